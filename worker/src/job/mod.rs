//! Order-free work in units ([`Job`]): in this process alone ([`run_local`]), or leased from a coordinator together with any number of
//! other workers ([`run_leased`]).
//!
//! Both go the same way: a job in one process is a coordinator and a worker that are joined by a channel instead of a network. What a unit
//! is only the job knows. Units are idempotent: their outputs have names made from their inputs, and are written once, conditionally; so a
//! job that was cut off anywhere and is started again does what is missing.

mod error;
mod hand;
pub mod kinds;
mod leased;
mod local;
mod tell;

pub use ella_coordinator::job::{MOST_SLOTS, PLAN};
pub use error::{JobEnd, JobError};
pub(crate) use leased::Leased;
pub use leased::run_leased;
pub use local::run_local;
pub use tell::Tell;

use async_trait::async_trait;

/// Order-free work.
#[async_trait]
pub trait Job: Send + Sync {
    /// Does a unit; gives the units that follow, which are released when all of this stage are done. The first stage is the unit
    /// [`PLAN`]. A unit has a thread of its own, so it may block; it is dropped at an await, or asked by [`Tell::stopped`], when this
    /// worker leaves.
    async fn unit(&self, unit: &str, tell: &Tell) -> Result<Vec<String>, JobError>;
}
