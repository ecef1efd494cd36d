//! What can go wrong, in NCCL's own words where it has any.

use std::time::Duration;

/// Why a call into NCCL or the CUDA driver did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The shared library is on none of the paths tried. Nothing is wrong with the machine if it has no NVIDIA GPU.
    #[error("{library}: not found (tried {tried}); install it, or name its folder")]
    Absent {
        /// The library's file name.
        library: &'static str,
        /// Every path that was tried, each with the loader's reason.
        tried: String,
    },
    /// The library was found but lacks a function that is needed: it is too old, or not what its name says.
    #[error("{library}: has no function {symbol}; install NCCL 2.18 or newer and a matching driver")]
    Symbol {
        /// The library's file name.
        library: &'static str,
        /// The function that it lacks.
        symbol: &'static str,
        /// The loader's reason.
        source: libloading::Error,
    },
    /// NCCL refused a call, or a collective failed later. The communicator is of no more use: abort it.
    #[error("{call}: NCCL error {code}: {text}; {detail}")]
    Nccl {
        /// The function that was called.
        call: &'static str,
        /// NCCL's result code.
        code: i32,
        /// NCCL's text for the code.
        text: String,
        /// NCCL's last error message, which says more than the code.
        detail: String,
    },
    /// The CUDA driver refused a call.
    #[error("{call}: CUDA driver error {code}: {text}")]
    Cuda {
        /// The function that was called.
        call: &'static str,
        /// The driver's result code.
        code: i32,
        /// The driver's text for the code.
        text: String,
    },
    /// The deadline passed first. Abort the communicator; if that too times out, end the process.
    #[error("{call}: not done after {elapsed:.1?}; a rank is missing, dead or stuck")]
    Timeout {
        /// What was being waited for.
        call: &'static str,
        /// How long it was waited for.
        elapsed: Duration,
    },
    /// The communicator was aborted, from this thread or another.
    #[error("{call}: the communicator was aborted")]
    Aborted {
        /// The call that found this.
        call: &'static str,
    },
    /// The rank is not smaller than the number of ranks, or the number is not one that NCCL takes.
    #[error("rank {rank} of {world}: expected a rank below the world size, and a world of 1 to 2147483647 ranks")]
    BadRank {
        /// The rank that was asked for.
        rank: u32,
        /// The number of ranks that was asked for.
        world: u32,
    },
    /// The operating system gave no thread for a call that may hang.
    #[error("{call}: no thread to run it on: {source}")]
    Thread {
        /// The call that was to run.
        call: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}
