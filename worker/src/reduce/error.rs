//! What can go wrong between ranks.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::tcp::Refusals;

/// Why an operation over ranks failed. The data is unspecified then, and the engine of no more use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// Nothing moved for the whole timeout: a peer is stopped, cut off, or does not take part.
    #[error("rank {rank}: {op}: nothing came from rank {waiting_for} in time ({elapsed:.1?} since the start); see what it is doing")]
    Timeout {
        /// This rank.
        rank: u32,
        /// The neighbour that was waited for. It may itself be waiting for another.
        waiting_for: u32,
        /// The operation.
        op: Op,
        /// The time since the operation began.
        elapsed: Duration,
    },
    /// A neighbour's connection closed or broke in the middle: it died, or left after an error of its own.
    #[error("{op}: rank {rank} is lost: {reason}")]
    PeerLost {
        /// The rank that is lost.
        rank: u32,
        /// The operation.
        op: Op,
        /// What the system said.
        reason: String,
    },
    /// This rank was told to stop, by its [`AbortHandle`](super::AbortHandle).
    #[error("aborted")]
    Aborted,
    /// Two ranks do not ask for the same thing: the program differs between them.
    #[error(
        "ranks disagree: rank {rank} asks for {ours}, rank {peer} for {theirs}; all ranks must run the same program on the same configuration"
    )]
    Mismatch {
        /// This rank.
        rank: u32,
        /// The other rank.
        peer: u32,
        /// What this rank asks for.
        ours: Op,
        /// What the other rank asks for.
        theirs: Op,
    },
    /// What a peer sent is not a frame of this protocol.
    #[error(
        "{op}: rank {peer} sent something that is not a frame (expected an ella-reduce frame, found bytes {found}); is something between the machines changing data?"
    )]
    Garbled {
        /// The peer.
        peer: u32,
        /// The operation.
        op: Op,
        /// What was found, in hexadecimal.
        found: String,
    },
    /// An earlier operation failed, so that the ranks are no longer in step.
    #[error("not usable after an earlier failure ({first}); join the next generation with a new one")]
    Broken {
        /// The earlier failure.
        first: String,
    },
    /// The ranks did not find each other in time.
    #[error("rank {rank}: the ring did not close in {elapsed:.1?}: {missing}; refused meanwhile: {refused}")]
    Meet {
        /// This rank.
        rank: u32,
        /// The neighbours that were missing.
        waiting_for: Vec<u32>,
        /// The same in words, with the last thing that was tried.
        missing: String,
        /// For a part of the time nothing that may be the next rank was there to be called: one that is merely late is.
        unreached: bool,
        /// The time since the start.
        elapsed: Duration,
        /// Who came and was sent away.
        refused: Box<Refusals>,
    },
    /// This rank has certificates for TLS, and the next one has none.
    #[error(
        "rank {rank} speaks TLS, and rank {next} at {address} does not: give --tls-cert, --tls-key and --tls-ca to every worker of the run, or to none"
    )]
    OneSided {
        /// This rank.
        rank: u32,
        /// The next one.
        next: u32,
        /// Where that was called.
        address: SocketAddr,
    },
    /// The rank is not one of the world.
    #[error("rank {rank} of {world}: expected a rank below the world size")]
    Rank {
        /// The rank.
        rank: u32,
        /// The number of ranks.
        world: u32,
    },
    /// An address to listen on could not be had.
    #[error("{address}: cannot listen: {source}; choose an address of this machine and a free port (0 for any)")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The system refused something that has nothing to do with a peer.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// What arrived of another rank's state is something else.
    #[error(
        "what was copied of rank {root}'s state is not what that rank has: its sums differ, so that bytes changed on the way or in memory; start this \
         worker again, and look at its machine and network if it comes again"
    )]
    Torn {
        /// The rank that was copied from.
        root: u32,
    },
    /// A tensor that cannot be reduced as it is.
    #[error("tensor of shape {shape:?}: expected {expected}, found {found}")]
    Tensor {
        /// Its shape.
        shape: Vec<i64>,
        /// What is needed.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// Two ranks work on one GPU, which NCCL cannot do.
    #[error("rank {first} and rank {second} are on the same GPU ({uuid}); give each worker a GPU of its own, or start fewer workers")]
    SharedGpu {
        /// The lower rank.
        first: u32,
        /// The higher rank.
        second: u32,
        /// The GPU.
        uuid: String,
    },
    /// NCCL or the CUDA driver failed.
    #[error(transparent)]
    Nccl(#[from] nccl_rs::Error),
    /// A stream of libtorch's could not be had.
    #[error("GPU: {0}")]
    Stream(#[from] ella_cuda::Error),
    /// A tensor operation failed.
    #[error("tensor: {0}")]
    Torch(#[from] tch::TchError),
}

impl CollectiveError {
    /// Whether it comes from others, or from the end of the generation: this rank is as well as ever.
    pub fn is_of_peers(&self) -> bool {
        match self {
            // The GPU may be at its tensors still: only the end of this process frees them.
            Self::Nccl(nccl_rs::Error::Timeout { call: "ncclCommAbort", .. } | nccl_rs::Error::Thread { .. }) => false,
            // The next generation finds the same library.
            Self::Nccl(nccl_rs::Error::Absent { .. } | nccl_rs::Error::Symbol { .. }) => false,
            Self::Torn { .. } | Self::SharedGpu { .. } | Self::Tensor { .. } | Self::Torch(_) | Self::Stream(_) | Self::Bind { .. } => {
                false
            }
            _ => true,
        }
    }
}

/// One operation, as the ranks compare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// How many operations came before it.
    pub sequence: u64,
    /// What it does.
    pub kind: OpKind,
    /// The number of elements (of bytes, for a broadcast).
    pub elements: u64,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sequence, kind, elements } = self;
        match kind {
            OpKind::SumI64 => write!(f, "a sum of {elements} i64"),
            OpKind::SumF32 => write!(f, "a sum of {elements} f32"),
            OpKind::SumBf16 => write!(f, "a sum of {elements} bf16"),
            OpKind::Broadcast { root } => write!(f, "a broadcast of {elements} bytes from rank {root}"),
            OpKind::Barrier => write!(f, "a barrier"),
        }?;
        write!(f, " (operation {sequence})")
    }
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Sum of 64-bit integers.
    SumI64,
    /// Sum of 32-bit floats.
    SumF32,
    /// Sum of bfloat16s.
    SumBf16,
    /// Copy of one rank's bytes.
    Broadcast {
        /// The rank whose bytes they are.
        root: u32,
    },
    /// Nothing, together.
    Barrier,
}

/// Numbers an engine's operations, and remembers its first failure.
#[derive(Debug, Default)]
pub(super) struct Steps {
    next: u64,
    first_failure: Option<String>,
}

impl Steps {
    /// The next operation, unless an earlier one failed.
    pub(super) fn begin(&mut self, kind: OpKind, elements: usize) -> Result<Op, CollectiveError> {
        if let Some(first) = &self.first_failure {
            return Err(CollectiveError::Broken { first: first.clone() });
        }
        let sequence = self.next;
        self.next += 1;
        Ok(Op { sequence, kind, elements: elements as u64 })
    }

    /// Remembers that nothing can follow `error`.
    pub(super) fn fail(&mut self, error: &CollectiveError) {
        self.first_failure.get_or_insert_with(|| error.to_string());
    }
}
