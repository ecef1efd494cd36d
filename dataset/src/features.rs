//! Features: what a text encoder made of every caption, in sidecar files beside the shards.
//!
//! ```text
//! features/<fingerprint>/spec.json                    the encoder, exactly; and whose captions
//! features/<fingerprint>/00000-9f86d081884c-0000.arrow   row for row beside the shard of that name
//! features/<fingerprint>/00000-9f86d081884c-0000.json    its record, written after it
//! features/<fingerprint>/empty.arrow, empty.json      the empty caption's, one row
//! features/<fingerprint>/manifest.json                written last: features of all shards
//! ```
//!
//! The fingerprint covers everything that changes a feature, so a stale cache can't be taken for a fresh one.

use bytes::Bytes;
use ella_store::{Created, Digest, Store};
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::feature_file::FeatureReader;
use crate::manifest::{MANIFEST, Manifest, SCHEMA, ShardEntry, at, canonical, parse, pretty, read, validate_shards};
use crate::plan::{create_file, difference};

const FOLDER: &str = "features";
const SPEC: &str = "spec.json";
/// The name of the empty caption's features: no shard has it, as shards' names begin with digits.
const EMPTY: &str = "empty";
/// Missing shards that an error names.
const NAMED: usize = 5;

/// What becomes of the positions after a caption's end (design.md §4: padding is part of the meaning).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// Captions are padded to `max_tokens`, and all positions are stored and attended to.
    Fixed,
    /// Only a caption's own positions are stored; keys are masked.
    None,
}

/// Which of the encoder's layers features are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureLayers {
    /// The last hidden state.
    Last,
    /// The layer-normalized average over all layers.
    Average,
}

/// How numbers are stored, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureDtype {
    /// IEEE half precision.
    F16,
    /// bfloat16; in the files as u16, for Arrow has no such type.
    Bf16,
    /// Single precision.
    F32,
}

impl FeatureDtype {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            FeatureDtype::F16 | FeatureDtype::Bf16 => 2,
            FeatureDtype::F32 => 4,
        }
    }
}

/// Everything that decides what a feature is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSpec {
    /// BLAKE3 of the text encoder's weights and configuration.
    pub weights_digest: Digest,
    /// BLAKE3 of the tokenizer.
    pub tokenizer_digest: Digest,
    /// Longest caption in tokens; longer ones are cut.
    pub max_tokens: u32,
    /// What becomes of the positions after a caption's end.
    pub padding: Padding,
    /// Which layers features are made of.
    pub layers: FeatureLayers,
    /// How numbers are stored.
    pub dtype: FeatureDtype,
    /// Width of a position: the encoder's hidden size.
    pub width: u32,
}

impl FeatureSpec {
    /// BLAKE3 of the spec as compact JSON: the name of the features' folder.
    pub fn fingerprint(&self) -> Digest {
        Digest::of(&canonical(self))
    }

    /// Bytes of a position.
    pub fn token_bytes(&self) -> usize {
        self.width as usize * self.dtype.bytes()
    }

    /// Positions stored for a caption of that many tokens.
    pub fn stored_tokens(&self, tokens: u32) -> u32 {
        match self.padding {
            Padding::Fixed => self.max_tokens,
            Padding::None => tokens,
        }
    }

    fn check(&self) -> Result<(), DataError> {
        let rule = |ok, field, rule, found: u32| {
            if ok { Ok(()) } else { Err(DataError::Setting { field, rule, found: found.to_string() }) }
        };
        rule((1..=1 << 16).contains(&self.max_tokens), "max_tokens", "1 to 65536", self.max_tokens)?;
        rule((1..=1 << 16).contains(&self.width), "width", "1 to 65536", self.width)
    }
}

/// What `spec.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecRecord {
    schema: u32,
    /// Digest of the data set's manifest.
    data: Digest,
    encoder: FeatureSpec,
}

/// One shard's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShardRecord {
    schema: u32,
    shard: ShardEntry,
}

/// The features of a whole data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureManifest {
    /// Version of this record.
    pub schema: u32,
    /// Digest of the data set's manifest.
    pub data: Digest,
    /// The encoder.
    pub encoder: FeatureSpec,
    /// Its digest: the folder's name.
    pub fingerprint: Digest,
    /// Files in the order of the data set's shards, with as many rows.
    pub shards: Vec<ShardEntry>,
    /// One row: the empty caption's, for captions that training drops.
    pub empty: ShardEntry,
}

impl FeatureManifest {
    fn validate(&self, file: &str, spec: &FeatureSpec, data: &Manifest) -> Result<(), DataError> {
        let wrong = |what: String| Err(DataError::Record { file: file.to_owned(), what });
        let same = |field: &str, expected: String, found: String| {
            if expected == found { Ok(()) } else { Err(format!("{field}: expected {expected}, found {found}")) }
        };
        validate_shards(&self.shards)
            .and_then(|()| same("data", data.digest().to_string(), self.data.to_string()))
            .and_then(|()| same("fingerprint", spec.fingerprint().to_string(), self.fingerprint.to_string()))
            .and_then(|()| same("encoder", spec.fingerprint().to_string(), self.encoder.fingerprint().to_string()))
            .and_then(|()| same("shards", data.shards.len().to_string(), self.shards.len().to_string()))
            .or_else(wrong)?;
        same("empty.name", format!("{EMPTY}.arrow"), self.empty.name.clone()).or_else(wrong)?;
        same("empty.rows", "1".into(), self.empty.rows.to_string()).or_else(wrong)?;
        for (i, (features, shard)) in self.shards.iter().zip(&data.shards).enumerate() {
            same(&format!("shards[{i}].rows"), shard.rows.to_string(), features.rows.to_string()).or_else(wrong)?;
        }
        Ok(())
    }
}

/// A data set's features of one encoder: being made, or whole.
#[derive(Clone, Debug)]
pub struct FeatureSet {
    folder: Store,
    spec: FeatureSpec,
    data: Manifest,
}

impl FeatureSet {
    /// Begins, or goes on with, the features of an encoder in a data set's folder. Safe to call from many workers at once.
    pub async fn begin(store: &Store, data: &Manifest, spec: &FeatureSpec) -> Result<FeatureSet, DataError> {
        spec.check()?;
        let set = FeatureSet::new(store, data, spec);
        let record = SpecRecord { schema: SCHEMA, data: data.digest(), encoder: spec.clone() };
        if set.folder.create(SPEC, pretty(&record)).await? == Created::AlreadyThere {
            set.check_spec().await?;
        }
        Ok(set)
    }

    fn new(store: &Store, data: &Manifest, spec: &FeatureSpec) -> FeatureSet {
        let folder = store.child(&format!("{FOLDER}/{}", spec.fingerprint()));
        FeatureSet { folder, spec: spec.clone(), data: data.clone() }
    }

    /// The features of an encoder, which must be there; else an error that says what there is instead.
    pub async fn find(store: &Store, data: &Manifest, spec: &FeatureSpec) -> Result<FeatureSet, DataError> {
        let set = FeatureSet::new(store, data, spec);
        if read(&set.folder, SPEC).await?.is_none() {
            let found = what_there_is(store, spec).await?;
            return Err(DataError::FeaturesMissing { folder: set.folder.url().to_owned(), found });
        }
        set.check_spec().await?;
        Ok(set)
    }

    async fn check_spec(&self) -> Result<(), DataError> {
        let file = at(&self.folder, SPEC);
        let there: SpecRecord = parse(&file, &self.folder.get(SPEC).await?)?;
        let wanted = SpecRecord { schema: SCHEMA, data: self.data.digest(), encoder: self.spec.clone() };
        let json = |record| serde_json::to_value(record).unwrap_or_default();
        match difference("", &json(&wanted), &json(&there)) {
            None => Ok(()),
            Some((field, expected, found)) => Err(DataError::Other { file, field, expected, found }),
        }
    }

    /// The encoder.
    pub fn spec(&self) -> &FeatureSpec {
        &self.spec
    }

    /// The folder that the names of [`ShardEntry`] are in.
    pub(crate) fn folder(&self) -> &Store {
        &self.folder
    }

    /// Shards of the data set that have no features, or whose features lack their file or its record.
    pub async fn missing(&self) -> Result<Vec<usize>, DataError> {
        let there = self.folder.list("").await?;
        let lacks = |name: String| there.binary_search_by(|meta| meta.key.cmp(&name)).is_err();
        let lacking = |i: &usize| ["json", "arrow"].iter().any(|kind| lacks(format!("{}.{kind}", self.stem(*i))));
        Ok((0..self.data.shards.len()).filter(lacking).collect())
    }

    /// The record of a shard's features, if they are there.
    pub async fn entry(&self, shard: usize) -> Result<Option<ShardEntry>, DataError> {
        self.record(self.stem(shard)).await
    }

    /// Whether the empty caption has its features.
    pub async fn has_empty(&self) -> Result<bool, DataError> {
        Ok(self.whole(EMPTY).await?.is_some())
    }

    /// Stores the empty caption's features, a file of one row, once. To be called before [`FeatureSet::finish`].
    pub async fn write_empty(&self, file: Bytes) -> Result<ShardEntry, DataError> {
        self.store_file(EMPTY, ShardEntry::of(format!("{EMPTY}.arrow"), 1, &file), file).await
    }

    async fn record(&self, stem: &str) -> Result<Option<ShardEntry>, DataError> {
        let key = format!("{stem}.json");
        let Some(bytes) = read(&self.folder, &key).await? else { return Ok(None) };
        let record: ShardRecord = parse(&at(&self.folder, &key), &bytes)?;
        Ok(Some(record.shard))
    }

    /// A record whose file is there too.
    async fn whole(&self, stem: &str) -> Result<Option<ShardEntry>, DataError> {
        let Some(entry) = self.record(stem).await? else { return Ok(None) };
        Ok(self.folder.head(&entry.name).await?.map(|_| entry))
    }

    /// Stores a shard's features, once, and then their record. If another worker was first, its features stay.
    pub async fn write(&self, shard: usize, rows: u64, file: Bytes) -> Result<ShardEntry, DataError> {
        let name = format!("{}.arrow", self.stem(shard));
        let expected = self.data.shards.get(shard).map_or(0, |entry| entry.rows);
        if rows != expected {
            let what = format!("expected {expected} rows, as in its shard, found {rows}");
            return Err(DataError::Arrow { file: at(&self.folder, &name), what });
        }
        if let Some(entry) = self.whole(self.stem(shard)).await? {
            return Ok(entry);
        }
        self.store_file(self.stem(shard), ShardEntry::of(name, rows, &file), file).await
    }

    /// Stores a file and then its record. If another worker was first, its record stays; a file that was lost and made again must be
    /// the one that its record describes.
    async fn store_file(&self, stem: &str, entry: ShardEntry, file: Bytes) -> Result<ShardEntry, DataError> {
        let (spec, rows) = (self.spec.clone(), entry.rows);
        let whole = move |there: &Bytes| FeatureReader::open("features", there.clone(), &spec).is_ok_and(|file| file.rows() as u64 == rows);
        let entry = create_file(&self.folder, entry, file, whole).await?;
        let (key, record) = (format!("{stem}.json"), ShardRecord { schema: SCHEMA, shard: entry.clone() });
        if self.folder.create(&key, pretty(&record)).await? == Created::Yes {
            return Ok(entry);
        }
        let there = self.record(stem).await?.unwrap_or_else(|| entry.clone());
        match (there == entry, at(&self.folder, &key)) {
            (true, _) => Ok(entry),
            (false, file) => Err(DataError::Other {
                file,
                field: "shard.blake3".into(),
                expected: entry.blake3.to_string(),
                found: there.blake3.to_string(),
            }),
        }
    }

    /// Fails unless every shard has its features; then their manifest, which is written if it was not there.
    pub async fn finish(&self) -> Result<FeatureManifest, DataError> {
        let file = at(&self.folder, MANIFEST);
        if let Some(bytes) = read(&self.folder, MANIFEST).await? {
            let manifest: FeatureManifest = parse(&file, &bytes)?;
            manifest.validate(&file, &self.spec, &self.data)?;
            return Ok(manifest);
        }
        let mut shards = Vec::with_capacity(self.data.shards.len());
        self.check_complete().await?;
        for shard in 0..self.data.shards.len() {
            shards.push(self.entry(shard).await?.ok_or_else(|| self.incomplete(vec![self.stem(shard).to_owned()]))?);
        }
        let empty = self.record(EMPTY).await?.ok_or_else(|| self.incomplete(vec![EMPTY.to_owned()]))?;
        let (data, encoder, fingerprint) = (self.data.digest(), self.spec.clone(), self.spec.fingerprint());
        let manifest = FeatureManifest { schema: SCHEMA, data, encoder, fingerprint, shards, empty };
        manifest.validate(&file, &self.spec, &self.data)?;
        // Whoever was first wrote the same: it is made from the same records.
        self.folder.create(MANIFEST, pretty(&manifest)).await?;
        Ok(manifest)
    }

    /// Fails, naming the first missing ones, unless every shard and the empty caption have their features.
    pub async fn check_complete(&self) -> Result<(), DataError> {
        let mut missing: Vec<_> = self.missing().await?.iter().map(|&i| self.stem(i).to_owned()).collect();
        if !self.has_empty().await? {
            missing.push(EMPTY.to_owned());
        }
        if missing.is_empty() { Ok(()) } else { Err(self.incomplete(missing)) }
    }

    fn incomplete(&self, mut missing: Vec<String>) -> DataError {
        let missing_count = missing.len();
        if missing_count > NAMED {
            missing.truncate(NAMED);
            missing.push("…".into());
        }
        // The empty caption's file counts as one more.
        let total = self.data.shards.len() + 1;
        let folder = self.folder.url().to_owned();
        DataError::FeaturesIncomplete { folder, missing_count, total, missing: missing.join(", ") }
    }

    /// A shard's name without folder and extension.
    fn stem(&self, shard: usize) -> &str {
        let name = self.data.shards.get(shard).map_or("", |entry| entry.name.as_str());
        let base = name.rsplit('/').next().unwrap_or_default();
        base.strip_suffix(".arrow").unwrap_or(base)
    }
}

/// Which features a data set has, and how each differs from the wanted ones.
async fn what_there_is(store: &Store, wanted: &FeatureSpec) -> Result<String, DataError> {
    let json = |spec: &FeatureSpec| serde_json::to_value(spec).unwrap_or_default();
    let mut found = Vec::new();
    for folder in store.folders(FOLDER).await? {
        let key = format!("{folder}/{SPEC}");
        let Some(bytes) = read(store, &key).await? else { continue };
        let there: SpecRecord = parse(&at(store, &key), &bytes)?;
        let (wanted, there) = (json(wanted), json(&there.encoder));
        let differs: Vec<_> = wanted
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(field, value)| difference(field, value, there.get(field)?))
            .map(|(field, expected, found)| format!("{field} expected {expected}, found {found}"))
            .collect();
        found.push(format!("is {} ({})", folder.rsplit('/').next().unwrap_or_default(), differs.join("; ")));
    }
    if found.is_empty() { Ok("are none at all".into()) } else { Ok(found.join(", and ")) }
}
