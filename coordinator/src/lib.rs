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
//! - [`metrics`]: the same as Prometheus reads it; [`logs`] and [`trace`]: lines on stderr and spans over OTLP, for workers too.

use std::net::SocketAddr;

pub mod client;
pub mod core;
pub mod credentials;
pub mod history;
pub mod job;
pub mod logs;
pub mod machine;
pub mod metrics;
#[cfg(test)]
mod random;
pub mod shell;
pub mod status;
pub mod trace;

/// Where somebody is to listen, as it is typed.
///
/// # Errors
/// What is expected: a host's name is none, for it may stand for several addresses.
pub fn listens(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected ADDRESS:PORT with a number as address, as in 127.0.0.1:7000, 0.0.0.0:7000 or [::1]:7000".to_owned())
}

#[cfg(test)]
mod tests {
    use super::listens;

    #[test]
    fn a_name_is_told_what_is_expected_in_its_place() {
        assert_eq!(listens("[::1]:7000").unwrap().port(), 7000);
        assert!(["localhost:7000", "127.0.0.1", ":7000"].iter().all(|text| listens(text).unwrap_err().contains("ADDRESS:PORT")));
    }
}
