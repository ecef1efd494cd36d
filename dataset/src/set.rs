//! A prepared data set as training sees it: open shards by number, each one's digest checked when it is first opened.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use ella_store::Store;

use crate::error::DataError;
use crate::feature_file::FeatureReader;
use crate::features::{FeatureManifest, FeatureSet, FeatureSpec};
use crate::ipc;
use crate::manifest::{Manifest, ShardEntry, at, join, read};
use crate::shard::{ShardLayout, ShardReader};

/// How much is kept open.
#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    /// Shards open at once, at least one.
    pub shards: usize,
    /// Bytes of shards held in memory (fetched ones; mapped files do not count).
    pub bytes: u64,
}

impl Default for CacheLimits {
    /// 1024 shards, 2 GiB.
    fn default() -> CacheLimits {
        CacheLimits { shards: 1024, bytes: 2 << 30 }
    }
}

/// A prepared data set.
#[derive(Debug)]
pub struct DataSet {
    store: Store,
    manifest: Manifest,
    layout: ShardLayout,
    limits: CacheLimits,
    shards: Cache<ShardReader>,
}

impl DataSet {
    /// Opens a data set by path or URL.
    pub async fn open(url: &str) -> Result<DataSet, DataError> {
        DataSet::open_store(Store::open(url)?, CacheLimits::default()).await
    }

    /// Opens a data set in a store's folder.
    pub async fn open_store(store: Store, limits: CacheLimits) -> Result<DataSet, DataError> {
        let manifest = Manifest::load(&store).await?;
        let layout = ShardLayout {
            pictures: manifest.settings.is_some(),
            images: manifest.has_images(),
            moments: manifest.latents.as_ref().map(|spec| spec.len()),
        };
        let shards = Cache::new(manifest.shards.len(), limits, "run the same `ella prepare` again to make it anew");
        Ok(DataSet { store, manifest, layout, limits, shards })
    }

    /// What the data set is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it is.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// One shard, open: mapped if it is a local file, else fetched. A byte that is not what the manifest says is an error.
    pub async fn shard(&self, index: usize) -> Result<Arc<ShardReader>, DataError> {
        let layout = self.layout;
        let open = move |file: &str, bytes| ShardReader::open(file, bytes, layout);
        self.shards.get(&self.store, &self.manifest.shards, index, open).await
    }

    /// The complete features of an encoder. Missing or incomplete ones are an error that says what there is.
    pub async fn features(&self, spec: &FeatureSpec) -> Result<Features, DataError> {
        let set = FeatureSet::find(&self.store, &self.manifest, spec).await?;
        let manifest = set.finish().await?;
        // A manifest tells what there was; what was deleted since is better missed now than hours into training.
        set.check_complete().await?;
        let hint = "run the same `ella embed` again to make it anew";
        let files = Cache::new(manifest.shards.len(), self.limits, hint);
        let empty = Cache::new(1, self.limits, hint);
        Ok(Features { folder: set.folder().clone(), manifest, files, empty })
    }

    /// Begins, or goes on with, features of an encoder.
    pub async fn begin_features(&self, spec: &FeatureSpec) -> Result<FeatureSet, DataError> {
        FeatureSet::begin(&self.store, &self.manifest, spec).await
    }
}

/// A data set's complete features of one encoder.
#[derive(Debug)]
pub struct Features {
    folder: Store,
    manifest: FeatureManifest,
    files: Cache<FeatureReader>,
    empty: Cache<FeatureReader>,
}

impl Features {
    /// What they are.
    pub fn manifest(&self) -> &FeatureManifest {
        &self.manifest
    }

    /// The features of a shard, row for row. Their digest is checked when they are first opened.
    pub async fn shard(&self, index: usize) -> Result<Arc<FeatureReader>, DataError> {
        let spec = self.manifest.encoder.clone();
        let open = move |file: &str, bytes| FeatureReader::open(file, bytes, &spec);
        self.files.get(&self.folder, &self.manifest.shards, index, open).await
    }

    /// The empty caption's features: one row.
    pub async fn empty(&self) -> Result<Arc<FeatureReader>, DataError> {
        let spec = self.manifest.encoder.clone();
        let open = move |file: &str, bytes| FeatureReader::open(file, bytes, &spec);
        self.empty.get(&self.folder, std::slice::from_ref(&self.manifest.empty), 0, open).await
    }
}

/// Open files by number, the least recently used closed first.
struct Cache<T> {
    limits: CacheLimits,
    /// What to do about a file that is not there.
    hint: &'static str,
    /// Each file's own lock, so that it is opened once while others are being opened.
    slots: Vec<tokio::sync::Mutex<Slot<T>>>,
    /// Open files, the least recently used in front.
    used: Mutex<Used>,
}

struct Slot<T> {
    open: Option<Arc<T>>,
    /// A local file is digested once for a process; fetched bytes whenever they are fetched.
    checked: bool,
}

#[derive(Default)]
struct Used {
    /// Number and bytes in memory.
    order: VecDeque<(usize, u64)>,
    bytes: u64,
}

impl<T> fmt::Debug for Cache<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("limits", &self.limits).field("files", &self.slots.len()).finish_non_exhaustive()
    }
}

impl<T: Send + Sync + 'static> Cache<T> {
    fn new(files: usize, limits: CacheLimits, hint: &'static str) -> Cache<T> {
        let slot = || tokio::sync::Mutex::new(Slot { open: None, checked: false });
        Cache { limits, hint, slots: (0..files).map(|_| slot()).collect(), used: Mutex::default() }
    }

    async fn get(
        &self,
        store: &Store,
        entries: &[ShardEntry],
        index: usize,
        open: impl FnOnce(&str, Bytes) -> Result<T, DataError> + Send + 'static,
    ) -> Result<Arc<T>, DataError> {
        let (Some(slot), Some(entry)) = (self.slots.get(index), entries.get(index)) else {
            return Err(DataError::Row { file: format!("{} (shards)", store.url()), row: index, rows: entries.len() });
        };
        let mut slot = slot.lock().await;
        if let Some(there) = &slot.open {
            self.touch(index);
            return Ok(Arc::clone(there));
        }
        let local = store.local_path().map(|folder| folder.join(&entry.name));
        let in_memory = if local.is_some() { 0 } else { entry.bytes };
        let there = local.as_ref().is_none_or(|path| path.exists());
        let fetched = if local.is_none() { read(store, &entry.name).await? } else { there.then(Bytes::new) };
        let missing = || DataError::RecordMissing { file: at(store, &entry.name), hint: self.hint };
        let fetched = fetched.ok_or_else(missing)?;
        let (entry, folder, check) = (entry.clone(), store.url().to_owned(), !slot.checked || local.is_none());
        // Mapping, digesting and validating read the whole file: not on a thread that others wait for.
        let opening = tokio::task::spawn_blocking(move || {
            let bytes = local.as_deref().map_or(Ok(fetched), ipc::map)?;
            if check {
                entry.check(&folder, &bytes)?;
            }
            open(&join(&folder, &entry.name), bytes)
        });
        let stopped = |e: tokio::task::JoinError| DataError::Stopped { source_name: join(store.url(), "shards"), what: e.to_string() };
        let opened = Arc::new(opening.await.map_err(stopped)??);
        *slot = Slot { open: Some(Arc::clone(&opened)), checked: true };
        drop(slot);
        self.admit(index, in_memory);
        Ok(opened)
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn touch(&self, index: usize) {
        let mut used = self.used();
        if let Some(at) = used.order.iter().position(|&(i, _)| i == index)
            && let Some(entry) = used.order.remove(at)
        {
            used.order.push_back(entry);
        }
    }

    /// Counts a newly opened file, and closes the least recently used ones beyond the limits. Whoever still holds one keeps it.
    fn admit(&self, index: usize, bytes: u64) {
        let mut used = self.used();
        used.order.push_back((index, bytes));
        used.bytes += bytes;
        while used.order.len() > 1 && (used.order.len() > self.limits.shards || used.bytes > self.limits.bytes) {
            let Some((oldest, bytes)) = used.order.pop_front() else { break };
            used.bytes -= bytes;
            // A slot that is locked is being used right now; it is closed when it comes up again.
            match self.slots.get(oldest).map(|slot| slot.try_lock()) {
                Some(Ok(mut slot)) => slot.open = None,
                _ => {
                    used.order.push_back((oldest, bytes));
                    used.bytes += bytes;
                    break;
                }
            }
        }
    }
}
