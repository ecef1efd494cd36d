//! Why a worker ended without having finished, and what that means for the next try.

use crate::control::ControlError;
use crate::device::NoDevice;
use crate::feed::FeedError;
use crate::job::JobEnd;
use crate::reduce::CollectiveError;
use crate::train::TrainError;
use crate::train::state::StateError;
use ella_model::ModelError;
use ella_proto::config::ConfigError;
use ella_proto::v1::FailureKind;
use ella_store::StoreError;

/// Why a worker ended without having finished.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// The control plane.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The job.
    #[error(transparent)]
    Job(#[from] JobEnd),
    /// The coordinator's config cannot be used here.
    #[error("the coordinator's config: {0}")]
    Config(#[from] ConfigError),
    /// A model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data set.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// The run folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The commit to resume from.
    #[error("commit {folder}: {source}")]
    Restore {
        /// Its folder.
        folder: String,
        /// What is wrong with it.
        source: StateError,
    },
    /// The other workers.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A peer's address means nothing here.
    #[error("the worker at {peer} cannot be found: {message}")]
    Peer {
        /// The address as the peer gave it.
        peer: String,
        /// The resolver's words.
        message: String,
    },
    /// The run wants another kind of device than this worker was started for.
    #[error("the run has workers.device = \"{wanted}\", but this worker computes on {found}; start it with --device {wanted}")]
    OtherDevice {
        /// As the run's config says.
        wanted: &'static str,
        /// As it was started.
        found: &'static str,
    },
    /// Something the coordinator should not have sent.
    #[error("the coordinator sent {0}, which makes no sense here")]
    Protocol(&'static str),
    /// The coordinator knows of a state that is no more.
    #[error("the coordinator takes this worker to have the state of step {step}, which it has not any more")]
    OtherState {
        /// The step.
        step: u64,
    },
    /// A run is to begin anew, which this worker's state cannot: it belonged to one that nobody else remembers.
    #[error("this worker's state is of a run that was lost before its first commit; start it again")]
    Spent,
    /// libtorch's own error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// The operating system.
    #[error("the system refused {what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

impl WorkError {
    /// What to tell the coordinator: the kind, and whether starting again would fail in the same way.
    pub(super) fn failure(&self) -> (FailureKind, bool) {
        match self {
            Self::Train(error) => error.failure(),
            Self::Feed(error) => (FailureKind::Input, error.is_permanent()),
            Self::Model(ModelError::Unavailable { passes, .. }) => (FailureKind::Input, !passes),
            Self::Config(_) | Self::Model(_) | Self::Restore { .. } => (FailureKind::Input, true),
            Self::Store(error) => (FailureKind::Store, error.is_permanent()),
            Self::Collective(error) => (FailureKind::Collective, matches!(error, CollectiveError::SharedGpu { .. })),
            Self::Control(error) => (FailureKind::Internal, error.is_permanent()),
            Self::Job(error) => (FailureKind::Internal, error.is_permanent()),
            Self::Device(_) | Self::OtherDevice { .. } => (FailureKind::Internal, true),
            Self::Peer { .. } | Self::Protocol(_) | Self::OtherState { .. } | Self::Spent | Self::Torch(_) | Self::System { .. } => {
                (FailureKind::Internal, false)
            }
        }
    }

    /// Whether it only ends the generation: this worker is as fit for the next one as ever.
    pub(super) fn spares_the_rank(&self) -> bool {
        match self {
            Self::Train(error) => error.spares_the_rank(),
            Self::Collective(error) => error.is_of_peers(),
            Self::Peer { .. } | Self::OtherState { .. } => true,
            _ => false,
        }
    }

    /// Whether starting again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        self.failure().1
    }
}
