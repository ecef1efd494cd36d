//! Why a model could not be had from the hub.

use std::path::PathBuf;

use super::HubId;

/// Why a model could not be had from the hub, or from what was downloaded from it before.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No answer, or a connection that broke off again and again.
    #[error(
        "{id}: is no path here, and the hub cannot be reached ({endpoint}: {reason}); give a folder, try again with a network, \
         or download it on another machine with `hf download {}`, copy its cache, and set HF_HUB_OFFLINE=1", id.repo()
    )]
    Unreachable {
        /// The model.
        id: Box<HubId>,
        /// The hub.
        endpoint: String,
        /// The last failure.
        reason: String,
    },
    /// Offline, and not in the cache.
    #[error(
        "{id}: is no path here, and not in the cache {} (HF_HUB_OFFLINE is set); give a folder, unset HF_HUB_OFFLINE, \
         or set HF_HOME to where `hf download {}` put it", cache.display(), id.repo()
    )]
    NotCached {
        /// The model.
        id: Box<HubId>,
        /// The cache.
        cache: PathBuf,
    },
    /// Private, gated, or not there: the hub does not tell them apart for strangers.
    #[error(
        "{id}: the hub refuses it (status {status}); check the id, accept the licence at {endpoint}/{}, and set HF_TOKEN to a token \
         that may read it", id.repo()
    )]
    Refused {
        /// The model.
        id: Box<HubId>,
        /// The hub.
        endpoint: String,
        /// HTTP's status: 401 or 403.
        status: u16,
    },
    /// No model of this id.
    #[error("{id}: is no path here, and the hub {endpoint} has no model {} (or no revision {}); check the id", id.repo(), id.revision())]
    NoModel {
        /// The model.
        id: Box<HubId>,
        /// The hub.
        endpoint: String,
    },
    /// The model is there, the revision is not.
    #[error("{id}: the hub has no revision {} of {}; give a branch, a tag or a commit", id.revision(), id.repo())]
    NoRevision {
        /// The model.
        id: Box<HubId>,
    },
    /// Nothing there that ella reads.
    #[error("{id}: {rule} (found {found}); {instead}")]
    NotModel {
        /// The model.
        id: Box<HubId>,
        /// What was expected.
        rule: String,
        /// What the repository holds.
        found: String,
        /// What to do.
        instead: &'static str,
    },
    /// An answer that makes no sense.
    #[error("{id}: {url}: {reason}; check HF_ENDPOINT, and try again")]
    Answer {
        /// The model.
        id: Box<HubId>,
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A file that came with other contents than the hub promised.
    #[error("{id}: {file} came damaged (expected SHA-256 {expected}, found {found}); try again")]
    Damaged {
        /// The model.
        id: Box<HubId>,
        /// The file.
        file: String,
        /// The digest promised.
        expected: String,
        /// The digest of what came.
        found: String,
    },
    /// Another process downloads the same file, and comes no further.
    #[error("{}: another process has been downloading this file without progress for {seconds} s; end it, and try again", lock.display())]
    Busy {
        /// The lock that it holds.
        lock: PathBuf,
        /// How long.
        seconds: u64,
    },
    /// The cache cannot be read or written.
    #[error("{}: {source}; check its permissions and free space, or set HF_HOME to another place", path.display())]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The machine's HTTP client cannot be set up.
    #[error("HTTPS cannot be set up ({0}); check the machine's certificates")]
    Client(String),
    /// Neither says where the cache is.
    #[error("neither HF_HOME nor HOME is set; set HF_HOME to where models may be kept")]
    NoHome,
}

impl HubError {
    /// Whether the same may work at another time.
    pub fn passes(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Damaged { .. } | Self::Busy { .. } | Self::Disk { .. } | Self::Answer { .. })
    }
}
