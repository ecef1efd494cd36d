//! Object stores by URL, and the run log that lives in them.
//!
//! Owns: deadlines, retries and typed errors of every store call; BLAKE3 digests; create-if-absent with a lost reply told apart
//! from a lost race; the numbered run log and the commits it names; a machine's cache of whole objects. Does not own: what a checkpoint holds, or when one is taken.
//! Futures of some size are boxed: the code of an async function is compiled by every program that awaits it, that of a box here alone.
//!
//! Invariants (design.md §1):
//! - **COMMIT** a checkpoint exists when its record does; the record is created once, conditionally, durably, and names every part
//!   with its digest.
//! - **TERM** one log per run, numbers contiguous from 0, each created only if absent; whoever finds its next number taken stops.
//! - **LIVE** every call has a deadline per attempt and overall, and a typed error.
//! - **KNOWN** retries are counted by operation and reason ([`Store::retries`], [`Store::retry_report`]), and over the process, with failures
//!   and bytes ([`totals`]).

mod cache;
mod chance;
#[cfg(feature = "cloud")]
mod cloud;
pub mod commit;
pub mod conformance;
pub mod digest;
mod error;
pub mod faulty;
mod half_written;
#[cfg(feature = "cloud")]
mod http;
mod limits;
pub mod log;
mod open;
mod probe;
mod read;
mod record;
mod state;
mod store;
mod tally;
mod write;

pub use cache::{CacheCounts, DiskCache};
pub use chance::Chance;
pub use commit::{Fault, Problem, collect_leftovers, commit_folder, find_unseen, parse_folder, remove_leftovers, verify_commit};
pub use digest::{Digest, Hasher};
pub use error::{Operation, StoreError};
pub use limits::Limits;
pub use log::{LogError, RunLog};
pub use open::redacted;
pub use probe::probe;
pub use record::{Body, Commit, LedgerEpoch, Outcome, Part, Record, Term};
pub use state::{Ended, RunState};
pub use store::{Meta, RetryCount, Store};
pub use tally::{StoreTotals, totals};
pub use write::Created;
