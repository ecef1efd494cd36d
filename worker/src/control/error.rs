//! Why the control plane is of no use any more.

use crate::train::Ending;
use ella_proto::v1::{Outcome, RefusedReason};

/// Why the control plane is of no use any more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ControlError {
    /// No connection.
    #[error("{url}: no coordinator answers ({message}); check the address and that ella-coordinator runs")]
    Unreachable {
        /// Where.
        url: String,
        /// The transport's words.
        message: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator refused this worker: {detail}")]
    Refused {
        /// In short.
        reason: RefusedReason,
        /// In words.
        detail: String,
        /// Starting again would end in the same way.
        permanent: bool,
    },
    /// What the coordinator was shown lets nobody in, or has too small a role.
    #[error("{url}: the coordinator refused this worker: {reason}")]
    NoEntry {
        /// Where.
        url: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The run or job had ended before this worker came.
    #[error("{detail}")]
    Over {
        /// How.
        outcome: Outcome,
        /// In words.
        detail: String,
        /// It failed, and starting again would fail in the same way.
        permanent: bool,
    },
    /// The stream ended before the coordinator had taken this worker in.
    #[error("the coordinator is gone ({0}) before it took this worker in; start the worker again")]
    Unwelcomed(String),
    /// The stream ended, or nobody answered on it any more, and no coordinator has taken this worker in since.
    #[error("without a coordinator for {seconds} s (workers.orphan_timeout): {why}; start the run again to resume from its last commit")]
    Orphaned {
        /// For how long.
        seconds: u64,
        /// What became of the last one, and of the tries to reach the next.
        why: String,
    },
    /// The coordinator is there, and reads nothing.
    #[error("the coordinator reads nothing, and {messages} messages wait for it; start the run again to resume from its last commit")]
    Unread {
        /// That wait.
        messages: usize,
    },
    /// The coordinator does not need this worker any more.
    #[error("the coordinator let this worker go: {0}")]
    Released(String),
    /// The coordinator ended the run.
    #[error("the coordinator ended the run: {reason}")]
    Aborted {
        /// In its words.
        reason: String,
        /// Starting again would fail in the same way.
        permanent: bool,
    },
    /// An expected message did not come.
    #[error("no {what} from the coordinator within {seconds} s")]
    Late {
        /// Which message.
        what: &'static str,
        /// The deadline.
        seconds: u64,
    },
}

impl ControlError {
    /// Whether starting again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        use RefusedReason as R;
        match self {
            Self::Refused { reason, permanent, .. } => *permanent || matches!(reason, R::Version | R::Config | R::Data | R::Malformed),
            Self::NoEntry { .. } => true,
            Self::Over { permanent, .. } | Self::Aborted { permanent, .. } => *permanent,
            _ => false,
        }
    }

    /// Whether a coordinator that is there has said it of this worker: it is not asked again.
    pub(crate) fn is_its_word(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::NoEntry { .. } | Self::Over { .. })
    }

    /// For a worker that is of no use any more: how that ends it, unless it is an error.
    pub(crate) fn ending(self) -> Result<Ending, Self> {
        match self {
            Self::Over { outcome: Outcome::Done, detail, .. } => {
                tracing::info!("nothing is left to do: {detail}");
                Ok(Ending::Done)
            }
            Self::Over { outcome: Outcome::Preempted, .. } => Ok(Ending::Preempted),
            Self::Released(reason) => {
                tracing::info!("let go: {reason}");
                Ok(Ending::Preempted)
            }
            error => Err(error),
        }
    }
}
