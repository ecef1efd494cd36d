//! A prepared data set as training sees it: rows of shards and features, each byte checked before its first use.

mod features;

pub use features::Features;

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use ella_store::{CacheCounts, Digest, DiskCache, Store};
use futures::future::BoxFuture;

use crate::caption_set::{CaptionManifest, CaptionSet, read_captions};
use crate::content::Content;
use crate::error::DataError;
use crate::features::{FeatureSet, FeatureSpec};
use crate::files::{CacheLimits, FileAt, Files, Opened};
use crate::manifest::Manifest;
use crate::order::SampleRef;
use crate::room::Memory;
use crate::shard::{RowRef, ShardReader};

const SHARD_HINT: &str = "run the same `ella prepare` again to make it anew";
const CAPTIONS_HINT: &str = "run `ella caption` again to make it anew";

/// A prepared data set.
#[derive(Debug)]
pub struct DataSet {
    store: Store,
    manifest: Arc<Manifest>,
    files: Arc<Files>,
}

impl DataSet {
    /// Opens a data set by path or URL.
    pub async fn open(url: &str) -> Result<DataSet, DataError> {
        DataSet::open_store(Store::open(url)?, CacheLimits::default()).await
    }

    /// Opens a data set in a store's folder.
    pub async fn open_store(store: Store, limits: CacheLimits) -> Result<DataSet, DataError> {
        DataSet::open_through(store, limits, None).await
    }

    /// The same, and reads it through a cache on this machine unless it is local. Of the files of such a data set only as many stay open as
    /// the cache may hold.
    pub fn open_through(store: Store, limits: CacheLimits, cache: Option<DiskCache>) -> BoxFuture<'static, Result<DataSet, DataError>> {
        Box::pin(async move {
            let manifest = Arc::new(Manifest::load(&store).await?);
            Ok(DataSet { store, manifest, files: Arc::new(Files::new(limits, cache)) })
        })
    }

    /// What the data set is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The same, to keep.
    pub fn shared_manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Where it is.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Memory that fetched shards and features take.
    pub fn memory(&self) -> Memory {
        self.files.memory()
    }

    /// What the cache that it is read through did for this process, if there is one (KNOWN).
    pub fn cache(&self) -> Option<CacheCounts> {
        self.files.cache()
    }

    /// How many files were opened, and why.
    pub fn opened(&self) -> Opened {
        self.files.opened()
    }

    /// One shard, open: mapped if it is a local file, else fetched. A byte that is not what the manifest says is an error.
    pub fn shard(&self, index: usize) -> BoxFuture<'_, Result<Arc<ShardReader>, DataError>> {
        Box::pin(async move {
            let shard = self.reader(index).await?;
            let whole = whole(shard, |shard| shard.content().check_all()).await;
            whole.inspect_err(|_| self.files.close(&self.manifest.shards[index].blake3))
        })
    }

    /// Shows `each` the rows `at`: their number in `at`, and the row. They come shard by shard, so that one shard is held at a time.
    /// A byte of theirs that is not what the manifest says is an error.
    ///
    /// Rows of mapped files that nobody has used before are asked of the system all at once, in case nobody has read them ahead.
    pub async fn rows<E: From<DataError>>(
        &self,
        at: &[SampleRef],
        mut each: impl FnMut(usize, RowRef<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.advise(at, ShardReader::expect).await?;
        let order = by_shard(at.len(), |i| (at[i].shard, at[i].row));
        for group in order.chunk_by(|a, b| at[*a].shard == at[*b].shard) {
            let Some(first) = group.first() else { continue };
            let shard = self.reader(at[*first].shard as usize).await?;
            for &i in group {
                each(i, shard.row(at[i].row as usize)?)?;
            }
        }
        Ok(())
    }

    /// Has the system begin to read these rows, where they are in mapped files. Nothing is fetched for it.
    pub async fn read_ahead(&self, at: &[SampleRef]) -> Result<(), DataError> {
        self.advise(at, ShardReader::read_ahead).await
    }

    async fn advise(&self, at: &[SampleRef], advise: impl Fn(&ShardReader, usize) -> Result<(), DataError>) -> Result<(), DataError> {
        for sample in at {
            let index = sample.shard as usize;
            if let Some(reader) = self.files.open_mapped(self.file(index)?, self.parse(index)).await? {
                advise(&reader, sample.row as usize)?;
            }
        }
        Ok(())
    }

    async fn reader(&self, index: usize) -> Result<Arc<ShardReader>, DataError> {
        self.files.open(self.file(index)?, self.parse(index)).await
    }

    pub(crate) fn file(&self, index: usize) -> Result<FileAt<'_>, DataError> {
        Ok(FileAt { store: &self.store, entry: entry_of(&self.store, &self.manifest.shards, index)?, hint: SHARD_HINT })
    }

    pub(crate) async fn open_ahead(&self, index: usize, keep: &HashSet<Digest>) -> Result<bool, DataError> {
        self.files.open_ahead(self.file(index)?, keep, self.parse(index)).await
    }

    fn parse(&self, index: usize) -> impl FnOnce(Content) -> Result<ShardReader, DataError> + Send + 'static {
        let manifest = Arc::clone(&self.manifest);
        move |content| ShardReader::of(content, manifest.layout(&manifest.shards[index]))
    }

    /// An added column of captions, whole.
    pub async fn added_captions(&self, column: &str) -> Result<AddedCaptions, DataError> {
        let set = CaptionSet::find(&self.store, &self.manifest, column).await?;
        let manifest = set.finish().await?;
        Ok(AddedCaptions { folder: set.folder().clone(), manifest, files: Arc::clone(&self.files) })
    }

    /// All captions of a shard in a column, the data set's own or an added one, in the order of the rows; empty where a sample has none.
    pub async fn captions(&self, column: &str, shard: usize) -> Result<Vec<String>, DataError> {
        let Some(own) = self.manifest.caption_column(column) else {
            return Ok(self.added_captions(column).await?.shard(shard).await?.to_vec());
        };
        let reader = self.shard(shard).await?;
        (0..reader.rows()).map(|row| reader.caption(row, own).map(str::to_owned)).collect()
    }

    /// The complete features of an encoder for a column of captions. Missing or incomplete ones are an error that says what there is.
    pub async fn features(&self, spec: &FeatureSpec, column: &str) -> Result<Features, DataError> {
        let set = FeatureSet::find(&self.store, &self.manifest, spec, column).await?;
        let manifest = set.finish().await?;
        // A manifest tells what there was; what was deleted since is better missed now than hours into training.
        set.check_complete().await?;
        let shards = manifest.shards.into_iter().map(OnceLock::from).collect();
        Features::open(set, shards, Arc::clone(&self.files)).await
    }

    /// Features as far as they are there, to which the others are added as they are made. The empty caption's must be there.
    pub async fn growing_features(&self, set: FeatureSet) -> Result<Features, DataError> {
        let shards = self.manifest.shards.iter().map(|_| OnceLock::new()).collect();
        Features::open(set, shards, Arc::clone(&self.files)).await
    }

    /// Begins, or goes on with, features of an encoder for a column of captions.
    pub async fn begin_features(&self, spec: &FeatureSpec, column: &str) -> Result<FeatureSet, DataError> {
        if self.manifest.caption_column(column).is_none() {
            // It must be there, and whole.
            self.added_captions(column).await?;
        }
        FeatureSet::begin(&self.store, &self.manifest, spec, column).await
    }
}

/// An added column of captions, whole.
#[derive(Debug)]
pub struct AddedCaptions {
    folder: Store,
    manifest: CaptionManifest,
    files: Arc<Files>,
}

impl AddedCaptions {
    /// What it is.
    pub fn manifest(&self) -> &CaptionManifest {
        &self.manifest
    }

    /// The captions of a shard, row for row; empty where none could be made. Every byte is checked.
    pub async fn shard(&self, index: usize) -> Result<Arc<[String]>, DataError> {
        let entry = entry_of(&self.folder, &self.manifest.shards, index)?;
        let file = FileAt { store: &self.folder, entry, hint: CAPTIONS_HINT };
        let read = |content: Content| -> Result<Arc<[String]>, DataError> {
            content.check_all()?;
            Ok(read_captions(content.name(), content.bytes().clone())?.into())
        };
        let captions: Arc<Arc<[String]>> = self.files.open(file, read).await?;
        Ok(Arc::clone(&captions))
    }
}

fn entry_of<'a, T>(store: &Store, entries: &'a [T], index: usize) -> Result<&'a T, DataError> {
    let missing = || DataError::Row { file: format!("{} (shards)", store.url()), row: index, rows: entries.len() };
    entries.get(index).ok_or_else(missing)
}

/// The numbers below `count` in the order of where their rows lie.
fn by_shard<K: Ord>(count: usize, place: impl Fn(usize) -> K) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|i| place(*i));
    order
}

/// A file of which every byte is checked, on a thread that nobody waits for.
async fn whole<T: Send + Sync + 'static>(
    file: Arc<T>,
    check: impl FnOnce(&T) -> Result<(), DataError> + Send + 'static,
) -> Result<Arc<T>, DataError> {
    let checking = tokio::task::spawn_blocking(move || check(&file).map(|()| file));
    checking.await.map_err(|e| DataError::Stopped { source_name: "a file of the data set".into(), what: e.to_string() })?
}
