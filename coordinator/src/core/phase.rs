//! Where the run is, and how it ends.

use super::{Failure, Time};
use ella_proto::exit::Exit;
use ella_proto::ids::Step;
use ella_proto::v1;

/// How a run ended, as far as this coordinator is concerned.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are applied and committed.
    Done,
    /// Told to leave; it can be resumed.
    Preempted {
        /// By whom, or why.
        reason: String,
    },
    /// It could not go on.
    Failed(Box<Failure>),
}

impl Outcome {
    /// The process's exit code (design.md §6).
    pub fn exit_code(&self) -> u8 {
        let exit = match self {
            Self::Done => Exit::Done,
            Self::Failed(_) if self.is_permanent() => Exit::NoRetry,
            Self::Failed(_) => Exit::Failed,
            Self::Preempted { .. } => Exit::Preempted,
        };
        exit.code()
    }

    /// Whether it failed, and would fail in the same way again.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Failed(failure) if failure.permanent())
    }

    /// As the wire says it.
    pub(crate) fn on_the_wire(&self) -> v1::Outcome {
        match self {
            Self::Done => v1::Outcome::Done,
            Self::Preempted { .. } => v1::Outcome::Preempted,
            Self::Failed(_) => v1::Outcome::Failed,
        }
    }

    /// One word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Preempted { .. } => "preempted",
            Self::Failed(_) => "failed",
        }
    }

    /// Why, in words; empty for a run that is done.
    pub fn reason(&self) -> String {
        match self {
            Self::Done => String::new(),
            Self::Preempted { reason } => reason.clone(),
            Self::Failed(failure) => failure.to_string(),
        }
    }

    pub(super) fn record(&self) -> ella_store::Outcome {
        match self {
            Self::Done => ella_store::Outcome::Done,
            Self::Preempted { .. } => ella_store::Outcome::Preempted,
            Self::Failed(_) => ella_store::Outcome::Failed,
        }
    }
}

/// Where the run is.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// For workers to come, and to load. No generation runs.
    Waiting {
        /// It fails then.
        until: Time,
        /// Enough are here, or were, though some may still load.
        here: bool,
    },
    /// A generation is formed; its ranks restore or copy the state and close their ring.
    Starting {
        /// Those that are not ready then are let go.
        until: Time,
    },
    /// Steps are being taken.
    Training,
    /// The generation is over, and not all that were in it have left it.
    Regrouping {
        /// Those that have not left it then are let go.
        until: Time,
    },
    /// Workers were asked to commit and leave, or one of them is leaving.
    Draining {
        /// Why.
        reason: String,
        /// It fails then.
        until: Time,
    },
    /// All ranks have applied their last step; its commit is awaited.
    Closing {
        /// That step.
        step: Step,
        /// Why it is not the run's last step, if it is not.
        preempted: Option<String>,
        /// It fails then.
        until: Time,
    },
    /// The end is being recorded.
    Ending {
        /// What is recorded.
        outcome: Outcome,
        /// It fails then.
        until: Time,
    },
    /// The outcome is decided.
    Over(Outcome),
}

impl Phase {
    /// Whether the outcome is decided.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Over(_))
    }

    /// Whether ranks take steps, commit, or have just done so.
    pub(super) fn has_begun(&self) -> bool {
        matches!(self, Self::Training | Self::Draining { .. } | Self::Closing { .. })
    }

    /// Whether all ranks have applied their last step.
    pub(super) fn is_ending(&self) -> bool {
        matches!(self, Self::Closing { .. } | Self::Ending { .. } | Self::Over(_))
    }

    /// Whether there are ranks.
    pub(super) fn has_generation(&self) -> bool {
        self.has_begun() || matches!(self, Self::Starting { .. } | Self::Regrouping { .. })
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        match self {
            Self::Waiting { until, .. }
            | Self::Starting { until }
            | Self::Regrouping { until }
            | Self::Draining { until, .. }
            | Self::Closing { until, .. }
            | Self::Ending { until, .. } => Some(*until),
            Self::Training | Self::Over(_) => None,
        }
    }

    /// The word of `RunStatus.phase`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting",
            Self::Starting { .. } => "starting",
            Self::Training | Self::Closing { preempted: None, .. } | Self::Ending { outcome: Outcome::Done, .. } => "training",
            Self::Regrouping { .. } => "regrouping",
            Self::Draining { .. } | Self::Closing { .. } | Self::Ending { .. } => "draining",
            Self::Over(outcome) => outcome.name(),
        }
    }
}
