//! Why a coordinator could not begin or go on, apart from what befalls the run itself.

use super::AccessError;
use ella_proto::exit::Exit;
use ella_store::{LogError, StoreError};
use std::net::SocketAddr;

/// Why a coordinator could not begin, or broke.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The run folder holds a run of another config (SAME).
    #[error("{url}: this run was begun with another config; keys that differ: {}; put them back, or choose another run.output", keys.join(", "))]
    OtherConfig {
        /// The run.
        url: String,
        /// What differs, among what binds a run.
        keys: Vec<String>,
    },
    /// The run has taken more steps than it is to take.
    #[error(
        "train.steps: must be {step} or more (found {steps}): the run {url} has reached step {step}; raise it, or choose another run.output"
    )]
    FewerSteps {
        /// The run.
        url: String,
        /// Of its newest commit.
        step: u64,
        /// As the config has it.
        steps: u64,
    },
    /// The run folder holds commits of another config, and its own config is gone.
    #[error(
        "{url}/run.toml: missing, and the commit of step {step} was made with another config; restore it from a copy, or choose another run.output"
    )]
    OtherDigest {
        /// The run.
        url: String,
        /// The newest commit.
        step: u64,
    },
    /// The effective config in the run folder can't be read.
    #[error("{reason}; restore it from a copy, or choose another run.output")]
    BadRunToml {
        /// Which file, and what is wrong with it.
        reason: String,
    },
    /// A file of somebody's own has the name of the run's.
    #[error("{file}: no run has written this, and a run would overwrite it: move it to another folder, or choose another run.output")]
    OwnToml {
        /// The file.
        file: String,
    },
    /// The run folder is a data set's.
    #[error("{url}: holds something else: a data set ({file} is there); choose another run.output")]
    HoldsData {
        /// The folder.
        url: String,
        /// What says so.
        file: &'static str,
    },
    /// No commit is whole.
    #[error("{url}: the commit of step {step} is damaged, and so are those before it: {what}; restore the file from a copy")]
    DamagedCommits {
        /// The run.
        url: String,
        /// The newest commit.
        step: u64,
        /// The parts that are damaged in it.
        what: String,
    },
    /// The store can't be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The run's log can't be used.
    #[error(transparent)]
    Log(#[from] LogError),
    /// An address can't be had.
    #[error("{address}: cannot listen there ({source}); choose another address, or port 0 for any free one")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Anyone on the network would be let in.
    #[error(
        "{address}: others than this machine reach this address, and nothing is asked of them: give --token-file, --access, or --tls-cert, --tls-key \
         and --tls-ca (docs/security.md says how), or --insecure to let everyone in"
    )]
    Unguarded {
        /// The address.
        address: SocketAddr,
    },
    /// Access can't be controlled as asked.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// No secret can be made.
    #[error("/dev/urandom: cannot be read ({0}); a coordinator needs it for its workers' secrets")]
    NoRandomness(std::io::Error),
    /// A server broke.
    #[error("the {name} server broke: {reason}")]
    Server {
        /// Which.
        name: &'static str,
        /// What it said.
        reason: String,
    },
    /// A task panicked.
    #[error("a task of the coordinator broke: {0}")]
    Task(String),
    /// The driver ended without an outcome, which only another error can cause.
    #[error("the coordinator ended without an outcome")]
    NoOutcome,
}

impl RunError {
    /// The process's exit code (design.md §6).
    pub fn exit_code(&self) -> u8 {
        let exit = match self {
            Self::OtherConfig { .. }
            | Self::FewerSteps { .. }
            | Self::OtherDigest { .. }
            | Self::BadRunToml { .. }
            | Self::OwnToml { .. }
            | Self::Bind { .. }
            | Self::Unguarded { .. }
            | Self::Access(_) => Exit::Usage,
            Self::Store(StoreError::BadUrl { .. } | StoreError::Unsupported { .. }) => Exit::Usage,
            // As of any store: a right that is missing does not come by itself.
            Self::Store(StoreError::Permission { .. }) | Self::Log(LogError::Store(StoreError::Permission { .. })) => Exit::NoRetry,
            Self::HoldsData { .. }
            | Self::DamagedCommits { .. }
            | Self::Log(LogError::Gap { .. } | LogError::Bad { .. } | LogError::Gone { .. }) => Exit::NoRetry,
            Self::Store(_) | Self::Log(_) | Self::Server { .. } | Self::Task(_) | Self::NoOutcome | Self::NoRandomness(_) => Exit::Failed,
        };
        exit.code()
    }
}
