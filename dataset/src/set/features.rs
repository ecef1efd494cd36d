//! Rows of features: of a whole sidecar, or of one that grows while it is read.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use ella_store::Digest;

use super::{by_shard, entry_of, whole};
use crate::error::DataError;
use crate::feature_file::FeatureReader;
use crate::features::{FeatureSet, FeatureSpec};
use crate::files::{CacheLimits, FileAt, Files};
use crate::manifest::ShardEntry;
use crate::order::SampleRef;
use crate::sidecar::Counts;

const HINT: &str = "run the same `ella embed` again to make it anew";

/// A data set's features of one encoder for a column of captions.
#[derive(Debug)]
pub struct Features {
    set: FeatureSet,
    /// The records of the shards' files that are known to be there.
    shards: Vec<OnceLock<ShardEntry>>,
    files: Arc<Files>,
    empty: Arc<FeatureReader>,
}

impl Features {
    pub(super) async fn open(set: FeatureSet, shards: Vec<OnceLock<ShardEntry>>, files: Arc<Files>) -> Result<Features, DataError> {
        // A row that most steps read: not among what may be closed.
        let own = Files::new(CacheLimits::default(), None);
        let how = set.spec().clone();
        let entry = set.empty().await?.ok_or_else(|| set.lacks(None))?;
        let file = FileAt { store: set.folder(), entry: &entry, hint: HINT };
        let empty: Arc<FeatureReader> = own.open(file, move |content| FeatureReader::of(content, &how)).await?;
        Ok(Features { set, shards, files, empty })
    }

    /// What they are.
    pub fn spec(&self) -> &FeatureSpec {
        self.set.spec()
    }

    /// Bytes of all files; of those that are not known to be there, as many as they can have.
    pub fn bytes(&self) -> u64 {
        let bytes = self.shards.iter().zip(self.set.most_bytes()).map(|(entry, most)| entry.get().map_or(most, |entry| entry.bytes));
        bytes.fold(0, u64::saturating_add)
    }

    /// Whether a shard has its features, as far as this process knows.
    pub fn has(&self, shard: usize) -> bool {
        self.shards.get(shard).is_some_and(|entry| entry.get().is_some())
    }

    /// Whether a shard has its features. The store is asked where this process does not know.
    pub async fn find(&self, shard: usize) -> Result<bool, DataError> {
        if self.has(shard) {
            return Ok(true);
        }
        let Some(entry) = self.set.entry(shard).await? else { return Ok(false) };
        self.learn(shard, entry);
        Ok(true)
    }

    /// Fails if the store would not take a shard's features, as [`FeatureSet::check_size`] does.
    ///
    /// # Errors
    /// `FeaturesTooLarge`.
    pub fn check_size(&self, shard: usize, tokens: &[u32]) -> Result<(), DataError> {
        self.set.check_size(shard, tokens)
    }

    /// Stores a shard's features, as [`FeatureSet::write`] does; if another worker was first, its features are these from now on.
    pub async fn write(&self, shard: usize, rows: u64, file: Bytes, counts: Counts) -> Result<(), DataError> {
        self.learn(shard, self.set.write(shard, rows, file, counts).await?);
        Ok(())
    }

    /// Writes their manifest if every shard has its features now. Whether that is so.
    pub async fn finish(&self) -> Result<bool, DataError> {
        if !self.set.missing().await?.is_empty() {
            return Ok(false);
        }
        self.set.finish().await.map(|_| true)
    }

    fn learn(&self, shard: usize, entry: ShardEntry) {
        if let Some(place) = self.shards.get(shard) {
            place.get_or_init(|| entry);
        }
    }

    /// The features of a shard, row for row, every byte checked.
    pub async fn shard(&self, index: usize) -> Result<Arc<FeatureReader>, DataError> {
        let file = self.reader(index).await?;
        let whole = whole(file, |file| file.content().check_all()).await;
        whole.inspect_err(|_| self.shards[index].get().iter().for_each(|entry| self.files.close(&entry.blake3)))
    }

    /// The empty caption's features: one row.
    pub fn empty(&self) -> &FeatureReader {
        &self.empty
    }

    /// Positions stored of each of these rows; `None` is the empty caption's.
    pub async fn positions(&self, at: &[Option<SampleRef>]) -> Result<Vec<usize>, DataError> {
        let mut positions = vec![0; at.len()];
        self.visit(at, |i, file, row| {
            positions[i] = file.positions(row)? as usize;
            Ok(())
        })
        .await?;
        Ok(positions)
    }

    /// Copies these rows, `None` the empty caption's, into `out`, which has equal parts of `part` bytes, `[positions, width]`: each into the
    /// part of the number beside it in `parts`. What a row does not fill is zeroed; one that does not fit is an error.
    ///
    /// Rows of mapped files that nobody has used before are asked of the system all at once, in case nobody has read them ahead.
    pub async fn copy(&self, at: &[Option<SampleRef>], parts: &[usize], part: usize, out: &mut [u8]) -> Result<(), DataError> {
        self.advise(at.iter().flatten(), FeatureReader::expect).await?;
        self.visit(at, |i, file, row| {
            let (numbers, _) = file.row(row)?;
            let wrong = || DataError::FeatureRow { row, what: format!("{} bytes do not fit into {part}", numbers.len()) };
            let slot = parts.get(i).and_then(|number| out.get_mut(number * part..(number + 1) * part)).ok_or_else(wrong)?;
            slot.get_mut(..numbers.len()).ok_or_else(wrong)?.copy_from_slice(numbers);
            slot[numbers.len()..].fill(0);
            Ok(())
        })
        .await
    }

    /// Shows `each` where every row lies, file by file: its number in `at`, its file, its row there.
    async fn visit(
        &self,
        at: &[Option<SampleRef>],
        mut each: impl FnMut(usize, &FeatureReader, usize) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let order = by_shard(at.len(), |i| at[i].map(|sample| (sample.shard, sample.row)));
        for group in order.chunk_by(|a, b| at[*a].map(|sample| sample.shard) == at[*b].map(|sample| sample.shard)) {
            let file = match group.first().and_then(|first| at[*first]) {
                Some(sample) => self.reader(sample.shard as usize).await?,
                None => Arc::clone(&self.empty),
            };
            for &i in group {
                each(i, &file, at[i].map_or(0, |sample| sample.row as usize))?;
            }
        }
        Ok(())
    }

    /// Has the system begin to read these rows, where they are in mapped files. Nothing is fetched for it.
    pub async fn read_ahead(&self, at: &[SampleRef]) -> Result<(), DataError> {
        self.advise(at.iter(), FeatureReader::read_ahead).await
    }

    async fn advise<'a>(
        &self,
        at: impl Iterator<Item = &'a SampleRef>,
        advise: impl Fn(&FeatureReader, usize) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        for sample in at.filter(|sample| self.has(sample.shard as usize)) {
            let spec = self.spec().clone();
            let file = self.file(sample.shard as usize)?;
            if let Some(reader) = self.files.open_mapped(file, move |content| FeatureReader::of(content, &spec)).await? {
                advise(&reader, sample.row as usize)?;
            }
        }
        Ok(())
    }

    async fn reader(&self, index: usize) -> Result<Arc<FeatureReader>, DataError> {
        let spec = self.spec().clone();
        self.files.open(self.file(index)?, move |content| FeatureReader::of(content, &spec)).await
    }

    /// A shard's file; an error if it is not known to be there.
    pub(crate) fn file(&self, index: usize) -> Result<FileAt<'_>, DataError> {
        let store = self.set.folder();
        let entry = entry_of(store, &self.shards, index)?.get().ok_or_else(|| self.set.lacks(Some(index)))?;
        Ok(FileAt { store, entry, hint: HINT })
    }

    /// Opens a shard's file ahead of use. One that is still to be made is passed over.
    pub(crate) async fn open_ahead(&self, index: usize, keep: &HashSet<Digest>) -> Result<bool, DataError> {
        if !self.has(index) {
            return Ok(true);
        }
        let spec = self.spec().clone();
        self.files.open_ahead(self.file(index)?, keep, move |content| FeatureReader::of(content, &spec)).await
    }
}
