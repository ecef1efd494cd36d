//! This machine's cache of a data set that is not on it (`data.cache`), and what is told of it (KNOWN).

use super::Encoding;
use super::encoding::FAILED;
use ella_dataset::{DataError, DataSet};
use ella_proto::config::Data;
use ella_store::{CacheCounts, DiskCache, Store};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Set once this process could not have its default cache.
static UNUSABLE: AtomicBool = AtomicBool::new(false);

/// Opens the cache that a data set in `store` is read through; none if that is local, or the config wants none.
///
/// # Errors
/// If the folder that the config names cannot be used. The default one is done without then, which is counted.
pub async fn cache(config: &Data, store: &Store) -> Result<Option<DiskCache>, DataError> {
    if store.local_path().is_some() || config.cache_bytes == 0 {
        return Ok(None);
    }
    if let Some(folder) = &config.cache {
        return Ok(Some(DiskCache::open(folder, config.cache_bytes).await?));
    }
    let opened = match default_folder() {
        Some(folder) => DiskCache::open(folder, config.cache_bytes).await.map_err(|error| error.to_string()),
        None => Err("neither XDG_CACHE_HOME nor HOME is set".to_owned()),
    };
    let unusable = |why: &String| {
        UNUSABLE.store(true, Relaxed);
        tracing::warn!("no cache of the data set on this machine: {why}; name a folder in data.cache, or set data.cache_bytes = 0");
    };
    Ok(opened.inspect_err(unusable).ok())
}

/// Where the user's caches are.
fn default_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(caches.join("ella").join("data"))
}

/// What is told of captions that are encoded ahead.
const ENCODED: [&str; 4] = ["embedded", "truncated", "absent", FAILED];

/// What reading a data set through its cache came to, and encoding its captions ahead; told bit by bit.
#[derive(Debug, Default)]
pub(super) struct Reads {
    data: Option<Arc<DataSet>>,
    encoding: Option<Arc<Encoding>>,
    told: BTreeMap<String, u64>,
}

impl Reads {
    pub(super) fn of(data: &Arc<DataSet>, encoding: Option<&Arc<Encoding>>) -> Self {
        Self { data: Some(Arc::clone(data)), encoding: encoding.cloned(), told: BTreeMap::new() }
    }

    /// What came to it since the last call, by name.
    pub(super) fn news(&mut self) -> HashMap<String, u64> {
        let counts = self.data.as_ref().and_then(|data| data.cache()).map(|counts| named(&counts)).unwrap_or_default();
        let unusable = (self.data.is_some() && UNUSABLE.load(Relaxed)).then(|| ("cache_unusable".to_owned(), 1));
        let encoded = self.encoding.as_ref().map(|encoding| encoding.counts()).unwrap_or_default();
        let encoded = ENCODED.iter().filter_map(|name| Some((format!("captions_{name}"), *encoded.get(*name)?)));
        let mut news = HashMap::new();
        for (name, count) in counts.into_iter().chain(unusable).chain(encoded) {
            let told = self.told.entry(name.clone()).or_default();
            if count > *told {
                news.insert(name, count - *told);
                *told = count;
            }
        }
        news
    }
}

fn named(counts: &CacheCounts) -> Vec<(String, u64)> {
    let CacheCounts { hits, misses, fetched_bytes, corrupt, evicted, evicted_bytes, bypassed } = counts;
    let own = [
        ("hits", *hits),
        ("misses", *misses),
        ("fetched_bytes", *fetched_bytes),
        ("corrupt", *corrupt),
        ("evicted", *evicted),
        ("evicted_bytes", *evicted_bytes),
    ];
    let own = own.map(|(name, count)| (format!("cache_{name}"), count));
    own.into_iter().chain(bypassed.iter().map(|(why, count)| (format!("cache_bypassed_{}", why.replace(' ', "_")), *count))).collect()
}
