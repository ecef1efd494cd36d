//! The control plane of a run: who takes part, what is committed, and when it is over. Never in the way of a step (LIVE), and without
//! libtorch.
//!
//! - [`core`]: every decision, as a state machine without I/O, clock or randomness.
//! - [`shell`]: what connects it to gRPC, HTTP and the run's folder in an object store, which is its only memory.
//! - [`client`]: asking a coordinator for its status, and to stop.
//! - [`status`]: a run's status as JSON.

pub mod client;
pub mod core;
pub mod shell;
pub mod status;
