//! Why a worker ended without having finished, and what that means for the next try.

use crate::control::ControlError;
use crate::device::NoDevice;
use crate::feed::FeedError;
use crate::gpu::fault::{Fault, first_line};
use crate::job::JobEnd;
use crate::memory::{Needs, OutOfMemory, Room};
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
    /// The run folder is another one here.
    #[error("{0}")]
    Elsewhere(String),
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
    /// A GPU's memory was full.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// The GPU does not work any more, for this process at least.
    #[error("{said}: this worker's GPU is of no more use to it, and it ends; {}", fault.hint())]
    Broken {
        /// In libtorch's or the driver's words.
        said: String,
        /// What it is taken for.
        fault: Fault,
    },
    /// A GPU's streams, or its memory's bound.
    #[error("the GPU: {0}")]
    Gpu(#[from] ella_cuda::Error),
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
            Self::Model(ModelError::Torch(_) | ModelError::Fused(_)) => (FailureKind::Internal, false),
            Self::Model(error) => (FailureKind::Input, error.is_permanent()),
            Self::Config(_) | Self::Restore { .. } => (FailureKind::Input, true),
            Self::Store(error) => (FailureKind::Store, error.is_permanent()),
            // The next process finds the same library.
            Self::Collective(CollectiveError::Nccl(nccl_rs::Error::Absent { .. } | nccl_rs::Error::Symbol { .. })) => {
                (FailureKind::Machine, true)
            }
            Self::Collective(error) => (FailureKind::Collective, matches!(error, CollectiveError::SharedGpu { .. })),
            Self::Control(error) => (FailureKind::Internal, error.is_permanent()),
            Self::Job(error) => (FailureKind::Internal, error.is_permanent()),
            Self::Device(_) | Self::OtherDevice { .. } | Self::Elsewhere(_) => (FailureKind::Machine, true),
            Self::Memory(error) => (FailureKind::Machine, error.is_permanent()),
            // A GPU that has no kernels here has none the next time; the others may well work in a new process.
            Self::Broken { fault, .. } => (FailureKind::Machine, *fault == Fault::Generation),
            Self::Gpu(_) => (FailureKind::Machine, false),
            Self::Peer { .. } | Self::Protocol(_) | Self::OtherState { .. } | Self::Spent | Self::Torch(_) | Self::System { .. } => {
                (FailureKind::Internal, false)
            }
        }
    }

    /// The same error where it tells of a GPU that broke or is full, in whatever it was wrapped, with what is known of it.
    pub(super) fn explained(self, needs: Option<&Needs>, room: impl FnOnce() -> Option<Room>) -> Self {
        match Fault::of(&self) {
            Some(Fault::OutOfMemory) if !matches!(self, Self::Memory(_)) => match OutOfMemory::of(&self, needs, room()) {
                Some(error) => Self::Memory(error),
                None => self,
            },
            Some(fault) if fault.ends_the_process() && !matches!(self, Self::Broken { .. }) => {
                Self::Broken { said: first_line(&self), fault }
            }
            _ => self,
        }
    }

    /// Whether it only ends the generation: this worker is as fit for the next one as ever.
    pub(super) fn spares_the_rank(&self) -> bool {
        match self {
            // In NCCL's words or a peer's: this process's GPU may be what broke.
            _ if Fault::of(self).is_some() => false,
            Self::Train(error) => error.spares_the_rank(),
            Self::Collective(error) => error.is_of_peers(),
            Self::Peer { .. } | Self::OtherState { .. } => true,
            _ => false,
        }
    }

    /// Whether the generation did not begin because nothing was reached where the next rank is to listen, or one that does not speak TLS as this one.
    pub(super) fn is_of_the_next(&self) -> bool {
        use CollectiveError::{Meet, OneSided};
        matches!(self, Self::Peer { .. } | Self::Collective(Meet { unreached: true, .. } | OneSided { .. }))
    }

    /// Whether what was typed is at fault: an address that this worker cannot listen on, as for a coordinator.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Collective(CollectiveError::Bind { .. }))
    }

    /// Whether starting again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        self.failure().1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::TchError;

    fn torch(text: &str) -> TchError {
        TchError::Torch(format!("{text}\nException raised from c10_cuda_check_implementation at CUDAException.cpp:44"))
    }

    /// In whatever it is wrapped: the step's, the feed's, a collective's own.
    #[test]
    fn a_gpu_that_broke_ends_its_worker_and_nothing_else_does() {
        let assert = "CUDA error: device-side assert triggered";
        let nccl = nccl_rs::Error::Nccl {
            call: "ncclAllReduce",
            code: 1,
            text: "unhandled cuda error".into(),
            detail: "Cuda failure 719 'unspecified launch failure'".into(),
        };
        for error in [
            WorkError::Torch(torch(assert)),
            WorkError::Train(TrainError::Torch(torch(assert))),
            WorkError::Train(TrainError::Feed(FeedError::Torch(torch("CUDA error: uncorrectable ECC error encountered")))),
            WorkError::Train(TrainError::Collective(nccl.into())),
        ] {
            assert!(!error.spares_the_rank(), "{error}");
            let error = error.explained(None, || None);
            assert!(matches!(error, WorkError::Broken { .. }) && !error.spares_the_rank(), "{error}");
            // Exit code 1: another process may do well.
            assert_eq!(error.failure(), (FailureKind::Machine, false));
            let text = error.to_string();
            assert!(text.contains("of no more use to it, and it ends") && !text.contains("Exception raised"), "{text}");
        }
        let old = WorkError::Torch(torch("CUDA error: no kernel image is available for execution on the device"));
        assert!(old.explained(None, || None).is_permanent());
        let absent = WorkError::Collective(nccl_rs::Error::Absent { library: "libnccl.so.2", tried: String::new() }.into());
        assert!(absent.is_permanent() && !absent.spares_the_rank(), "{absent}");
        let lost = WorkError::Train(TrainError::Collective(CollectiveError::Aborted)).explained(None, || None);
        assert!(matches!(lost, WorkError::Train(_)) && lost.spares_the_rank());
    }

    /// Of an operator that failed for once nobody knows that it would again; of a model that is not there everybody does.
    #[test]
    fn what_libtorch_says_within_a_network_is_worth_another_try() {
        let failed = || ModelError::from(torch("could not create a primitive"));
        for error in [WorkError::Train(failed().into()), WorkError::Model(failed())] {
            assert_eq!(error.failure(), (FailureKind::Internal, false), "{error}");
        }
        let read =
            |kind: std::io::ErrorKind| WorkError::Model(ModelError::Unreadable { file: "unet/x.safetensors".into(), source: kind.into() });
        assert_eq!(read(std::io::ErrorKind::TimedOut).failure(), (FailureKind::Input, false));
        assert_eq!(read(std::io::ErrorKind::PermissionDenied).failure(), (FailureKind::Input, true));
        let missing = || ModelError::MissingFile { file: "unet".into(), expected: "a folder".into() };
        for error in [WorkError::Train(missing().into()), WorkError::Model(missing())] {
            assert_eq!(error.failure(), (FailureKind::Input, true), "{error}");
        }
    }

    #[test]
    fn a_full_gpu_is_told_as_such_and_spares_nobody() {
        let full = || WorkError::Train(TrainError::Torch(torch("CUDA out of memory. Tried to allocate 2.00 GiB.")));
        assert!(!full().spares_the_rank());
        let room = Room { total: 80 << 30, free: 1 << 30, mine: 78 << 30, limit: None };
        let error = full().explained(None, || Some(room));
        assert!(matches!(error, WorkError::Memory(_)) && error.is_permanent() && !error.spares_the_rank(), "{error}");
        assert!(!full().explained(None, || None).is_permanent(), "unknown: another try");
    }
}
