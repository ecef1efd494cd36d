//! The control plane: of a run, who takes part, what is committed, and when it is over; of a job, who does which unit. Never in the way
//! of a step (LIVE), and without libtorch.
//!
//! - [`core`]: every decision on a run, as a state machine without I/O, clock or randomness.
//! - [`job`]: the same for a job of leased units.
//! - [`history`]: what a run has been through, in bounded memory, for people.
//! - [`machine`]: what the two share, and what the shell knows of them.
//! - [`shell`]: what connects them to gRPC, HTTP and a run's folder in an object store, which is its only memory.
//! - [`client`]: asking a coordinator for its status, and to stop.
//! - [`status`]: the status of either as JSON.

pub mod client;
pub mod core;
pub mod credentials;
pub mod history;
pub mod job;
pub mod machine;
#[cfg(test)]
mod random;
pub mod shell;
pub mod status;
