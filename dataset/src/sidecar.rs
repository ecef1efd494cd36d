//! Sidecars: what was made of a data set afterwards, in files beside its shards, row for row.
//!
//! ```text
//! <folder>/spec.json                       what this is, exactly; and whose
//! <folder>/00000-9f86d081884c-0000.arrow   row for row beside the shard of that name
//! <folder>/00000-9f86d081884c-0000.json    its record, written after it
//! <folder>/manifest.json                   written last: files for all shards
//! ```
//!
//! Each file is a unit of leased work: written once, conditionally, and skipped if it is there.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use ella_store::{Created, Digest, Meta, Store};
use futures::{StreamExt, TryStreamExt, stream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::manifest::{MANIFEST, Manifest, SCHEMA, ShardEntry, at, join, parse, pretty, read, validate_shards};
use crate::plan::{create_file, restore_file, same};
use crate::tree::TREES;

const SPEC: &str = "spec.json";
/// Missing files that an error names.
const NAMED: usize = 5;
/// Records read at once.
const READ_AT_ONCE: usize = 32;

/// Numbers that a unit counted, by name.
pub type Counts = BTreeMap<String, u64>;
/// Samples of which nothing could be made: what was said of each, by its key, by the reason.
pub(crate) type Declined = BTreeMap<String, BTreeMap<String, String>>;

/// What a file's record tells of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    pub(crate) counts: Counts,
    pub(crate) declined: Declined,
}

impl From<Counts> for Told {
    fn from(counts: Counts) -> Self {
        Told { counts, declined: Declined::new() }
    }
}

/// What tells one kind of sidecar from another.
pub(crate) trait Kind: Clone + Debug + PartialEq + Serialize + DeserializeOwned {
    /// Files beside those of the shards, of one row each.
    const EXTRA: &'static [&'static str];
    /// What to do where the sidecar is not whole.
    const HINT: &'static str;

    /// Whether a file that another writer left can stand for one with these rows.
    fn stands(&self, file: &Bytes, rows: u64) -> bool;
}

/// What `spec.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecRecord<K> {
    schema: u32,
    /// Digest of the data set's manifest.
    data: Digest,
    spec: K,
}

/// One file's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileRecord {
    schema: u32,
    pub(crate) file: ShardEntry,
    pub(crate) counts: Counts,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub(crate) declined: Declined,
}

impl FileRecord {
    /// What several files count together.
    pub(crate) fn total(records: &[FileRecord]) -> Counts {
        let mut total = Counts::new();
        for (name, count) in records.iter().flat_map(|record| &record.counts) {
            let total = total.entry(name.clone()).or_default();
            *total = total.saturating_add(*count);
        }
        total
    }
}

/// A whole sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SidecarManifest<K> {
    /// Version of this record.
    pub schema: u32,
    /// Digest of the data set's manifest.
    pub data: Digest,
    /// What it is.
    pub spec: K,
    /// Files in the order of the data set's shards, with as many rows.
    pub shards: Vec<ShardEntry>,
    /// Further files, of one row each.
    pub extra: Vec<ShardEntry>,
    /// What was counted while they were made, over all files.
    pub counts: Counts,
}

/// A sidecar of a data set: being made, or whole.
#[derive(Clone, Debug)]
pub(crate) struct Sidecar<K> {
    pub(crate) folder: Store,
    pub(crate) spec: K,
    data: Arc<Manifest>,
    digest: Digest,
}

impl<K: Kind> Sidecar<K> {
    pub(crate) fn new(store: &Store, folder: &str, data: &Arc<Manifest>, spec: K) -> Self {
        Self { folder: store.child(folder), spec, data: Arc::clone(data), digest: data.digest() }
    }

    /// Makes the folder this sidecar's own, or finds that it is. Safe to call from many workers at once.
    pub(crate) async fn begin(self) -> Result<Self, DataError> {
        // Only looked at, as a rule: a worker that comes late, and is killed as it writes, would leave that half-written after the sweep.
        if self.is_begun().await? {
            return Ok(self);
        }
        let record = SpecRecord { schema: SCHEMA, data: self.digest, spec: self.spec.clone() };
        if self.folder.create(SPEC, pretty(&record)).await? == Created::AlreadyThere {
            self.check_spec().await?;
        }
        Ok(self)
    }

    /// Whether anything was begun here; something else's folder is an error.
    pub(crate) async fn is_begun(&self) -> Result<bool, DataError> {
        if read(&self.folder, SPEC).await?.is_none() {
            return Ok(false);
        }
        self.check_spec().await.map(|()| true)
    }

    /// The spec in a folder, whosever it is.
    pub(crate) async fn spec_in(folder: &Store) -> Result<Option<K>, DataError> {
        let Some(bytes) = read(folder, SPEC).await? else { return Ok(None) };
        Ok(Some(parse::<SpecRecord<K>>(&at(folder, SPEC), &bytes)?.spec))
    }

    async fn check_spec(&self) -> Result<(), DataError> {
        let file = at(&self.folder, SPEC);
        let there: SpecRecord<K> = parse(&file, &self.folder.get(SPEC).await?)?;
        let wanted = SpecRecord { schema: SCHEMA, data: self.digest, spec: self.spec.clone() };
        same(&wanted, &there, file)
    }

    /// Shards of the data set whose file, or its record, is not there; and the names of missing further files.
    pub(crate) async fn missing(&self) -> Result<(Vec<usize>, Vec<&'static str>), DataError> {
        let there = self.names().await?;
        let lacking = |stem: &str| ["json", "arrow"].iter().any(|kind| !there.contains(&format!("{stem}.{kind}")));
        let shards = (0..self.data.shards.len()).filter(|shard| lacking(self.stem(*shard))).collect();
        Ok((shards, K::EXTRA.iter().copied().filter(|name| lacking(name)).collect()))
    }

    /// The names of all files in the folder.
    async fn names(&self) -> Result<HashSet<String>, DataError> {
        let Some(path) = self.folder.local_path() else {
            return Ok(self.folder.list("").await?.into_iter().map(|meta| meta.key).collect());
        };
        // A store's listing asks for the size of each file too: two seconds for a hundred thousand.
        let read = tokio::task::spawn_blocking(move || match std::fs::read_dir(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(HashSet::new()),
            entries => entries
                .and_then(|entries| entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect())
                .map_err(|source| DataError::Io { path, source }),
        });
        read.await.map_err(|e| DataError::Stopped { source_name: self.folder.url().to_owned(), what: e.to_string() })?
    }

    /// The record of a file, if it is there.
    pub(crate) async fn record(&self, stem: &str) -> Result<Option<FileRecord>, DataError> {
        let key = format!("{stem}.json");
        let Some(bytes) = read(&self.folder, &key).await? else { return Ok(None) };
        Ok(Some(parse(&at(&self.folder, &key), &bytes)?))
    }

    /// A record whose file is there too.
    pub(crate) async fn whole(&self, stem: &str) -> Result<Option<FileRecord>, DataError> {
        let Some(record) = self.record(stem).await? else { return Ok(None) };
        Ok(self.folder.head(&record.file.name).await?.map(|_| record))
    }

    /// Stores a shard's file, once, and then its record. If another worker was first, its file stays; `tell` is asked of the file that
    /// does.
    pub(crate) async fn write(
        &self,
        shard: usize,
        rows: u64,
        file: Bytes,
        tell: impl FnOnce(Bytes) -> Result<Told, DataError>,
    ) -> Result<FileRecord, DataError> {
        let stem = self.stem(shard);
        let expected = self.data.shards.get(shard).map_or(0, |entry| entry.rows);
        if rows != expected {
            let what = format!("expected {expected} rows, as in its shard, found {rows}");
            return Err(DataError::Arrow { file: join(self.folder.url(), &format!("{stem}.arrow")), what });
        }
        self.store_file(stem, rows, file, tell).await
    }

    /// Stores a further file of one row.
    pub(crate) async fn write_extra(&self, name: &str, file: Bytes) -> Result<FileRecord, DataError> {
        self.store_file(name, 1, file, |_| Ok(Told::default())).await
    }

    /// Stores a file and then its record. If another worker was first, its record stays; a file that was lost and made again must be
    /// the one that its record describes.
    async fn store_file(
        &self,
        stem: &str,
        rows: u64,
        file: Bytes,
        tell: impl FnOnce(Bytes) -> Result<Told, DataError>,
    ) -> Result<FileRecord, DataError> {
        if let Some(record) = self.record(stem).await? {
            restore_file(&self.folder, &record.file, file).await?;
            return Ok(record);
        }
        let entry = ShardEntry::of(format!("{stem}.arrow"), rows, &file);
        let (spec, made) = (self.spec.clone(), entry.blake3);
        let ours = file.clone();
        let entry = create_file(&self.folder, entry, file, move |there| spec.stands(there, rows)).await?;
        // An earlier attempt may have left its file and not its record, and not have made what this one did.
        let stands = if entry.blake3 == made { ours } else { self.folder.get(&entry.name).await? };
        let Told { counts, declined } = tell(stands)?;
        let record = FileRecord { schema: SCHEMA, file: entry, counts, declined };
        let key = format!("{stem}.json");
        if self.folder.create(&key, pretty(&record)).await? == Created::Yes {
            return Ok(record);
        }
        let there = self.record(stem).await?.unwrap_or_else(|| record.clone());
        same(&record.file, &there.file, at(&self.folder, &key))?;
        Ok(there)
    }

    /// The files that the manifest names, or before there is one, those that have a record; whether or not they are there.
    pub(crate) async fn recorded(&self) -> Result<Vec<ShardEntry>, DataError> {
        if let Some(manifest) = self.manifest().await? {
            return Ok([manifest.shards, manifest.extra].concat());
        }
        let there = self.names().await?;
        let has = &|stem: &str| there.contains(&format!("{stem}.json"));
        let records = stream::iter(0..self.files()).map(|file| async move {
            let stem = self.file_stem(file);
            if has(stem) { self.record(stem).await } else { Ok(None) }
        });
        let records: Vec<Option<FileRecord>> = records.buffered(READ_AT_ONCE).try_collect().await?;
        Ok(records.into_iter().flatten().map(|record| record.file).collect())
    }

    /// Fails unless every file is there; then their manifest, which is written if it was not there. Deletes what killed writers left.
    pub(crate) async fn finish(&self) -> Result<SidecarManifest<K>, DataError> {
        let manifest = match self.manifest().await? {
            // Whoever wrote it may have been killed before it swept.
            Some(manifest) => manifest,
            None => self.publish().await?,
        };
        for folder in ["", TREES] {
            self.folder.sweep(folder).await?;
        }
        Ok(manifest)
    }

    /// Writes the manifest, which makes the sidecar whole.
    async fn publish(&self) -> Result<SidecarManifest<K>, DataError> {
        let records = self.records().await?;
        let counts = FileRecord::total(&records);
        let mut shards: Vec<_> = records.into_iter().map(|record| record.file).collect();
        let extra = shards.split_off(self.data.shards.len());
        let manifest = SidecarManifest { schema: SCHEMA, data: self.digest, spec: self.spec.clone(), shards, extra, counts };
        self.validate(&at(&self.folder, MANIFEST), &manifest)?;
        // Whoever was first wrote the same: it is made from the same records.
        self.folder.create(MANIFEST, pretty(&manifest)).await?;
        Ok(manifest)
    }

    /// The records of all files, in order; fails unless every file is there.
    pub(crate) async fn records(&self) -> Result<Vec<FileRecord>, DataError> {
        self.check_complete().await?;
        let records = stream::iter(0..self.files()).map(|file| async move {
            let stem = self.file_stem(file);
            self.record(stem).await?.ok_or_else(|| self.incomplete(vec![stem.to_owned()]))
        });
        records.buffered(READ_AT_ONCE).try_collect().await
    }

    /// What is there of it: the records, as far as they were listed, with when each was written.
    pub(crate) async fn listed(&self) -> Result<(usize, Vec<Meta>), DataError> {
        let metas = self.folder.files("").await?;
        let there: HashSet<&str> = metas.iter().map(|meta| meta.key.as_str()).collect();
        let stems = (0..self.files()).map(|file| self.file_stem(file));
        let done: HashSet<String> =
            stems.filter(|stem| there.contains(format!("{stem}.arrow").as_str())).map(|stem| format!("{stem}.json")).collect();
        Ok((self.files(), metas.iter().filter(|meta| done.contains(&meta.key)).cloned().collect()))
    }

    /// The manifest, if the sidecar is whole.
    pub(crate) async fn manifest(&self) -> Result<Option<SidecarManifest<K>>, DataError> {
        let Some(bytes) = read(&self.folder, MANIFEST).await? else { return Ok(None) };
        let file = at(&self.folder, MANIFEST);
        let manifest = parse(&file, &bytes)?;
        self.validate(&file, &manifest)?;
        Ok(Some(manifest))
    }

    fn validate(&self, file: &str, manifest: &SidecarManifest<K>) -> Result<(), DataError> {
        let wrong = |what: String| Err(DataError::Record { file: file.to_owned(), what });
        let same = |field: &str, expected: String, found: String| {
            if expected == found { Ok(()) } else { Err(format!("{field}: expected {expected}, found {found}")) }
        };
        let spec = |spec: &K| serde_json::to_string(spec).unwrap_or_default();
        let extra: Vec<String> = K::EXTRA.iter().map(|name| format!("{name}.arrow")).collect();
        let found: Vec<&str> = manifest.extra.iter().map(|entry| entry.name.as_str()).collect();
        validate_shards(&manifest.shards)
            .and_then(|()| validate_shards(&manifest.extra))
            .and_then(|()| same("data", self.digest.to_string(), manifest.data.to_string()))
            .and_then(|()| same("spec", spec(&self.spec), spec(&manifest.spec)))
            .and_then(|()| same("extra", extra.join(" "), found.join(" ")))
            .and_then(|()| same("shards", self.data.shards.len().to_string(), manifest.shards.len().to_string()))
            .or_else(wrong)?;
        let rows = |entry: &ShardEntry| entry.rows;
        if let Some(entry) = manifest.extra.iter().find(|entry| rows(entry) != 1) {
            return wrong(format!("extra: {} must have 1 row (found {})", entry.name, entry.rows));
        }
        match manifest.shards.iter().zip(&self.data.shards).position(|(own, shard)| rows(own) != rows(shard)) {
            Some(i) => wrong(format!("shards[{i}].rows: expected {}, found {}", self.data.shards[i].rows, manifest.shards[i].rows)),
            None => Ok(()),
        }
    }

    /// Fails, naming the first missing ones, unless every file is there.
    pub(crate) async fn check_complete(&self) -> Result<(), DataError> {
        let (shards, extra) = self.missing().await?;
        let missing: Vec<_> = shards.iter().map(|&shard| self.stem(shard)).chain(extra).map(str::to_owned).collect();
        if missing.is_empty() { Ok(()) } else { Err(self.incomplete(missing)) }
    }

    pub(crate) fn incomplete(&self, mut missing: Vec<String>) -> DataError {
        let missing_count = missing.len();
        if missing_count > NAMED {
            missing.truncate(NAMED);
            missing.push("…".into());
        }
        let total = self.files();
        let folder = self.folder.url().to_owned();
        DataError::SidecarIncomplete { folder, missing_count, total, missing: missing.join(", "), hint: K::HINT }
    }

    /// Rows of every shard.
    pub(crate) fn rows(&self) -> impl Iterator<Item = u64> {
        self.data.shards.iter().map(|shard| shard.rows)
    }

    /// How many files there should be: one for every shard, and the further ones.
    fn files(&self) -> usize {
        self.data.shards.len() + K::EXTRA.len()
    }

    /// The name of a file without extension, further ones after the shards'.
    fn file_stem(&self, file: usize) -> &str {
        match file.checked_sub(self.data.shards.len()) {
            None => self.stem(file),
            Some(extra) => K::EXTRA.get(extra).copied().unwrap_or_default(),
        }
    }

    /// A shard of the data set.
    pub(crate) fn shard(&self, shard: usize) -> Option<&ShardEntry> {
        self.data.shards.get(shard)
    }

    /// A shard's name without folder and extension.
    pub(crate) fn stem(&self, shard: usize) -> &str {
        let name = self.shard(shard).map_or("", |entry| entry.name.as_str());
        let base = name.rsplit('/').next().unwrap_or_default();
        base.strip_suffix(".arrow").unwrap_or(base)
    }
}
