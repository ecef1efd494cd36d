//! `[data]`.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A prepared data set: URL or path.
    pub path: String,
    /// How many consecutive shards are shuffled together (ORDER).
    #[serde(default = "Data::window")]
    pub window: usize,
    /// Columns of captions, of which each sample's is chosen anew in every epoch (NOISE); left out: the data set's own, by its weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub captions: Vec<CaptionChoice>,
    /// Most bytes of shards and features that a worker holds in memory, those read ahead included. Mapped files count nothing: local ones, and
    /// those in the cache.
    #[serde(default = "Data::memory_bytes")]
    pub memory_bytes: u64,
    /// Where each worker's machine keeps what it fetches of a data set that is not on it, each file once, checked by its digest; left out:
    /// `~/.cache/ella/data` (below `XDG_CACHE_HOME`, if that is set).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Most bytes that this cache holds, for all processes of a machine together; 0: there is none.
    #[serde(default = "Data::cache_bytes")]
    pub cache_bytes: u64,
}

/// One of `data.captions`: a column, and how often it is taken relative to the others that a sample has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionChoice {
    /// The column's name in the data set: one of its own, or one that was added.
    pub column: String,
    /// Its weight.
    #[serde(default = "CaptionChoice::weight")]
    pub weight: f64,
}

impl CaptionChoice {
    fn weight() -> f64 {
        1.0
    }
}

impl Data {
    fn window() -> usize {
        16
    }

    fn memory_bytes() -> u64 {
        2 << 30
    }

    fn cache_bytes() -> u64 {
        50 << 30
    }
}
