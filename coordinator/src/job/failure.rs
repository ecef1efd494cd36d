//! Why a job failed: typed, and put into words at the edge only.

use crate::core::Who;

/// Units that are named in words; the others are counted.
const MOST_NAMED: usize = 10;

/// A unit that nobody could do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// Its name.
    pub unit: String,
    /// The last error.
    pub error: String,
    /// It would fail in the same way anywhere.
    pub permanent: bool,
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobFailure {
    /// Nobody came, or nobody came back.
    #[error("there was no worker for {waited_ms} ms (job.start_timeout); start workers, and the job again: what is done stays done")]
    NoWorker {
        /// Milliseconds.
        waited_ms: u64,
    },
    /// A stage ended with units that nobody could do.
    #[error("{} of the {of} units of stage {stage} could not be done: {}", units.len(), listed(units))]
    GivenUp {
        /// From 1.
        stage: u32,
        /// Units of that stage.
        of: usize,
        /// All of them, by name.
        units: Vec<GivenUp>,
    },
    /// A worker says that no worker can do this job.
    #[error("{who} cannot do this job, and no other could: {message}")]
    Worker {
        /// Which.
        who: Who,
        /// In its words.
        message: String,
    },
}

impl JobFailure {
    /// Whether the job would fail in the same way if it were started again.
    pub fn permanent(&self) -> bool {
        match self {
            Self::NoWorker { .. } => false,
            Self::GivenUp { units, .. } => units.iter().any(|unit| unit.permanent),
            Self::Worker { .. } => true,
        }
    }
}

fn listed(units: &[GivenUp]) -> String {
    let mut text = units.iter().take(MOST_NAMED).map(|given_up| format!("{}: {}", given_up.unit, given_up.error)).collect::<Vec<_>>();
    if units.len() > MOST_NAMED {
        text.push(format!("and {} more, each named in the coordinator's log", units.len() - MOST_NAMED));
    }
    text.join("; ")
}
