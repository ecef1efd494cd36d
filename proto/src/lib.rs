//! What coordinator, workers and clients agree on: the wire messages ([`v1`]), the run's config ([`config`]) and the numbers that
//! name things ([`ids`]).

pub mod config;
pub mod ids;

/// The messages and the gRPC service of `ella/v1/ella.proto`, generated (see `tests/generated.rs`).
#[allow(missing_docs, missing_debug_implementations, clippy::all, unreachable_pub, rustdoc::all)]
pub mod v1 {
    include!("ella.v1.rs");
}
