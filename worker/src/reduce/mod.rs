//! Sums over ranks: one trait, and an engine for each kind of place that ella runs in.
//!
//! | engine | for |
//! |---|---|
//! | [`Solo`] | a world of one |
//! | [`Tcp`] | machines without a GPU, and the small sums and the bootstrap of machines with one: a ring over sockets, or over TLS |
//! | [`Nccl`] | tensors in GPU memory |
//! | [`InProcess`] | tests: ranks are threads |
//!
//! What holds for all of them, and is tried on all of them by one suite (`conformance`):
//! - All ranks end with the same bits. Sums of `i64` wrap, so they do not depend on any order (SAME); sums of `f32` are formed in a fixed order
//!   that depends on the world size. So are those of `bf16`, each of whose additions is rounded to the nearest bfloat16, as NCCL's are: a sum over N
//!   ranks is off by at most (N - 1) · 2⁻⁸ of the sum of the absolute values.
//! - A sum that is begun ([`Collective::begin_sum`]) may go on beside the device's other work until it is settled.
//! - Every wait has a deadline (LIVE): a stall of a peer for longer than the timeout is [`CollectiveError::Timeout`], a peer's death is
//!   [`CollectiveError::PeerLost`], and [`AbortHandle::abort`] ends a call from another thread at once.
//! - Ranks that do not ask for the same thing get [`CollectiveError::Mismatch`], never mixed data.
//! - After any of these the data is unspecified and the engine is of no more use: the next generation builds a new one.
//!
//! [`fixed`] holds the arithmetic that makes a sum of gradients independent of who adds what (SAME).

mod abort;
#[cfg(test)]
mod conformance;
mod error;
pub mod fixed;
mod in_process;
mod nccl;
mod solo;
mod tcp;
mod tensor;

use std::fmt;
use std::time::Duration;

use half::bf16;
use tch::Tensor;

pub use abort::AbortHandle;
pub use error::{CollectiveError, Op, OpKind};
pub use in_process::InProcess;
pub use nccl::Nccl;
pub(crate) use nccl::current_stream;
pub use solo::Solo;
pub use tcp::{Listener, Membership, Refusals, Tcp};

/// The result of an operation over ranks.
pub type Result<T> = std::result::Result<T, CollectiveError>;

/// How long a stall may last, unless [`Collective::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// What two bfloat16s add up to, rounded to the nearest, ties to even.
fn add_bf16(a: bf16, b: bf16) -> bf16 {
    bf16::from_f32(a.to_f32() + b.to_f32())
}

/// Operations that all ranks of a generation take part in. Every rank calls the same ones, in the same order, with the same lengths.
pub trait Collective: Send + fmt::Debug {
    /// This rank, below [`world`](Self::world).
    fn rank(&self) -> u32;

    /// The number of ranks.
    fn world(&self) -> u32;

    /// Replaces every element by its sum over all ranks; sums wrap.
    ///
    /// # Errors
    /// See [`CollectiveError`]; the same for every operation here.
    fn sum_i64(&mut self, data: &mut [i64]) -> Result<()>;

    /// Replaces every element by its sum over all ranks, the same bits on all of them.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    fn sum_f32(&mut self, data: &mut [f32]) -> Result<()>;

    /// Replaces every element by its sum over all ranks, the same bits on all of them; each addition is rounded to the nearest.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    fn sum_bf16(&mut self, data: &mut [bf16]) -> Result<()>;

    /// Replaces `data` by rank `root`'s.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    fn broadcast(&mut self, root: u32, data: &mut [u8]) -> Result<()>;

    /// Returns when all ranks have called it.
    ///
    /// # Errors
    /// See [`CollectiveError`].
    fn barrier(&mut self) -> Result<()>;

    /// From now on, how long nothing may move before an operation gives up.
    fn set_timeout(&mut self, timeout: Duration);

    /// A handle that ends, from any thread, whatever this rank is doing here.
    fn abort_handle(&self) -> AbortHandle;

    /// Sums a contiguous tensor of `f32`, `bf16` or `i64` over all ranks, in place: without a copy in host memory, and through a copy of it for a tensor
    /// elsewhere, unless the engine knows better. Autograd does not see it.
    ///
    /// # Errors
    /// [`CollectiveError::Tensor`] for another dtype or layout; else see [`CollectiveError`].
    fn sum_tensor(&mut self, tensor: &mut Tensor) -> Result<()> {
        tensor::sum_in_host_memory(self, tensor)
    }

    /// Begins to sum a tensor as [`sum_tensor`](Self::sum_tensor) does. What this thread had put on the device before comes first; nothing may read
    /// or write the tensor until [`settle`](Self::settle) has returned. It is kept alive until then. An engine for which waiting is all there is
    /// to do is done when this returns.
    ///
    /// # Errors
    /// As [`sum_tensor`](Self::sum_tensor).
    fn begin_sum(&mut self, mut tensor: Tensor) -> Result<()> {
        self.sum_tensor(&mut tensor)
    }

    /// Waits for every sum that was begun. Says how long the device was at them, where it did so beside other work; waiting for other ranks counts.
    ///
    /// # Errors
    /// As [`sum_tensor`](Self::sum_tensor).
    fn settle(&mut self) -> Result<Duration> {
        Ok(Duration::ZERO)
    }

    /// Replaces a contiguous tensor of any dtype by rank `root`'s, in place.
    ///
    /// # Errors
    /// As [`sum_tensor`](Self::sum_tensor).
    fn broadcast_tensor(&mut self, root: u32, tensor: &mut Tensor) -> Result<()> {
        tensor::broadcast_in_host_memory(self, root, tensor)
    }
}
