//! A small safe communicator over NVIDIA's NCCL: non-blocking initialisation, deadlines, and an abort that works from another thread.
//!
//! The library is loaded at run time. It is never needed to build, and a machine without it gets [`Error::Absent`], not a panic.
//!
//! # Why a table of our own
//! cudarc has bindings, but its loader never asks for `libnccl.so.2`, the only name under which the library ships; a missing library or
//! symbol panics there at its first use; and its safe layer hides the handle, so that nothing can be aborted or polled. What is left of it for
//! us would be a dozen foreign function types, and those fit on one page here ([`Library`] for NCCL, [`cuda`] for the few driver calls).
//! There are no grouped calls: everything trained is one flat buffer, so a step is a few collectives, each of a stretch of it.
//!
//! # How it stays alive (LIVE)
//! - Communicators are created with `blocking = 0`: no call into NCCL is meant to block, and what it began is polled against a deadline.
//! - Every call on a communicator holds its lock, for the length of that call only. [`AbortHandle::abort`] therefore never frees
//!   a communicator that another thread is inside of, and waits only for a call, not for the collective behind it.
//! - NCCL's abort and destroy have been seen to hang, so both run on a thread of their own, and are waited for only so long.
//!
//! One thread owns a [`Communicator`]; [`AbortHandle`]s may go anywhere.

mod comm;
pub mod cuda;
mod error;
mod library;
mod sys;

pub use comm::{AbortHandle, Buffer, Communicator, Dtype};
pub use error::Error;
pub use library::{Library, UniqueId, Version};
