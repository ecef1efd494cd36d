//! Why a unit was not done, and why a worker ended without the job being done.

use crate::control::ControlError;
use ella_model::ModelError;
use ella_proto::config::ConfigError;
use ella_proto::exit::Exit;

/// Why a unit could not be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct JobError {
    /// What happened, what it happened to, and what to do.
    pub message: String,
    /// It would fail in the same way anywhere: input that cannot be used. Else others get their try.
    pub permanent: bool,
    /// This worker can do no unit any more: its GPU is broken. It ends, and others go on.
    pub breaks_the_worker: bool,
    /// This worker would fail in the same way again, and others would not.
    pub of_this_machine: bool,
    /// How a process ends that does the job by itself: no other machine has what this one lacks.
    pub alone: Exit,
}

impl JobError {
    /// Input that cannot be used, wherever it is tried.
    pub fn permanent(message: impl ToString) -> Self {
        Self { permanent: true, alone: Exit::NoRetry, ..Self::passing(message) }
    }

    /// What may pass: a store that is away, a full disk.
    pub fn passing(message: impl ToString) -> Self {
        let (permanent, breaks_the_worker, of_this_machine) = (false, false, false);
        Self { message: message.to_string(), permanent, breaks_the_worker, of_this_machine, alone: Exit::Failed }
    }

    /// The same, as the type of an error tells it of this machine.
    pub fn alone(self, is_usage: bool, is_permanent: bool) -> Self {
        Self { alone: Exit::of(is_usage, is_permanent), ..self }
    }

    /// A model that cannot be used here. Another machine may have it.
    pub fn of_model(error: &ModelError) -> Self {
        Self::passing(error).alone(error.is_usage(), error.is_permanent())
    }

    /// What this machine has wrong, and no other.
    pub(crate) fn of_this_machine(message: impl ToString) -> Self {
        Self { of_this_machine: true, ..Self::passing(message) }
    }

    /// The same, of a worker that can do nothing more.
    pub fn of_a_broken_worker(self) -> Self {
        Self { breaks_the_worker: true, ..self }
    }
}

/// Why a worker ended without the job being done.
#[derive(Clone, Debug, thiserror::Error)]
pub enum JobEnd {
    /// No coordinator, or none that wants this worker.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The coordinator's config cannot be used here.
    #[error("the coordinator's config is no job's: {0}")]
    Config(String),
    /// This worker cannot do the job.
    #[error("this worker cannot do the job: {0}")]
    Unfit(JobError),
    /// This worker can do nothing more.
    #[error("this worker ends, because its GPU does not work any more: {0}")]
    Broken(JobError),
    /// The job failed.
    #[error("the job failed: {reason}")]
    Failed {
        /// The coordinator's words, which name what could not be done.
        reason: String,
        /// Starting it again would fail in the same way.
        permanent: bool,
    },
    /// The coordinator is gone, and none came in its place.
    #[error(
        "no coordinator has answered at {url} for {seconds} s (job.orphan_timeout; {why}); start the job again: what is done stays done"
    )]
    Orphaned {
        /// Where.
        url: String,
        /// For how long.
        seconds: u64,
        /// The last try's words.
        why: String,
    },
    /// The coordinator that came in its place has another config.
    #[error("the coordinator at {url} has another config now; start this worker again to take it up")]
    OtherConfig {
        /// Where.
        url: String,
    },
    /// The operating system.
    #[error("the system refused random bytes: {0}")]
    System(String),
}

impl JobEnd {
    /// Whether starting again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Control(error) => error.is_permanent(),
            Self::Unfit(error) | Self::Broken(error) => error.permanent || error.of_this_machine,
            Self::Failed { permanent, .. } => *permanent,
            Self::Config(_) => true,
            Self::Orphaned { .. } | Self::OtherConfig { .. } | Self::System(_) => false,
        }
    }
}

impl From<ConfigError> for JobEnd {
    fn from(error: ConfigError) -> Self {
        Self::Config(error.to_string())
    }
}
