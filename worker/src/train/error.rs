//! Why training stops short of its end, and what the coordinator is told of it.

use super::fault::{self, Bad};
use crate::commit::CommitError;
use crate::feed::FeedError;
use crate::reduce::CollectiveError;
use crate::reduce::fixed::FixedError;
use ella_dataset::ledger::LedgerError;
use ella_model::ModelError;
use ella_proto::v1::FailureKind;

/// Why training stopped short.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// libtorch's own error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A network's error.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data's error.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// A peer is gone, or late, or does something else.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The GPU's driver failed.
    #[error(transparent)]
    Gpu(#[from] nccl_rs::Error),
    /// A stream or an operator of the GPU failed.
    #[error("GPU: {0}")]
    Cuda(#[from] ella_cuda::Error),
    /// A loss or gradient that is not finite, or outside what `exact` reduction holds. Nothing was updated from it.
    #[error("step {step}{}: {bad}; lower train.optimizer.lr, or look at the samples of this step: {samples}", fault::of_lane(*.lane))]
    NotFinite {
        /// The step.
        step: u64,
        /// The lane, where it is of one.
        lane: Option<u32>,
        /// What is wrong.
        bad: Bad,
        /// Where the samples are listed, and what else it may be.
        samples: String,
    },
    /// The sums of a step cannot be formed.
    #[error(transparent)]
    Sum(#[from] FixedError),
    /// The ranks together have not used what makes up the step (ONCE).
    #[error("step {step}: {what} of all ranks are {found} (expected {expected}); all ranks must run the same program on the same data")]
    Dealt {
        /// The step.
        step: u64,
        /// What was counted.
        what: &'static str,
        /// As it must be.
        expected: u64,
        /// As it is.
        found: u64,
    },
    /// The ranks' sums do not make sense.
    #[error("step {step}: {source}")]
    Ledger {
        /// The step.
        step: u64,
        /// What is wrong.
        source: LedgerError,
    },
    /// A commit could not be saved.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The coordinator has ended the generation.
    #[error("the generation was ended")]
    Interrupted,
}

impl TrainError {
    /// What to tell the coordinator: the kind, and whether starting again would fail in the same way.
    pub fn failure(&self) -> (FailureKind, bool) {
        match self {
            Self::Torch(_) | Self::Gpu(_) | Self::Cuda(_) | Self::Sum(_) => (FailureKind::Internal, false),
            // What libtorch says of a network's operator is as much its own as what it says elsewhere.
            Self::Model(ModelError::Torch(_) | ModelError::Fused(_)) => (FailureKind::Internal, false),
            Self::Model(error) => (FailureKind::Input, error.is_permanent()),
            Self::Feed(error) => (FailureKind::Input, error.is_permanent()),
            Self::Collective(_) => (FailureKind::Collective, false),
            // The same step gives the same numbers (SAME), so a restart would end here again.
            Self::NotFinite { .. } | Self::Ledger { .. } | Self::Dealt { .. } => (FailureKind::Numeric, true),
            Self::Commit(CommitError::Store { source, .. }) => (FailureKind::Store, source.is_permanent()),
            Self::Commit(CommitError::Late { .. }) => (FailureKind::Store, false),
            Self::Commit(CommitError::Died | CommitError::Interrupted) | Self::Interrupted => (FailureKind::Internal, false),
        }
    }

    /// Whether it only ends the generation: this rank and its state are as well as ever.
    pub fn spares_the_rank(&self) -> bool {
        match self {
            Self::Collective(error) => error.is_of_peers(),
            Self::Interrupted | Self::Commit(CommitError::Interrupted) => true,
            _ => false,
        }
    }
}
