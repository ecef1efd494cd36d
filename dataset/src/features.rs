//! Features: what a text encoder made of every caption of a column, in sidecar files beside the shards ([`crate::sidecar`]).
//!
//! They lie in `features/<fingerprint>/<column>/`; the fingerprint covers everything that changes a feature, so a stale cache can't be
//! taken for a fresh one. Beside the shards' files, `empty.arrow` holds the empty caption's features, one row, for captions that training drops.

use std::sync::Arc;

use bytes::Bytes;
use ella_store::{Digest, Store};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::feature_file::FeatureReader;
use crate::manifest::{Manifest, ShardEntry, canonical, join};
use crate::plan::difference;
use crate::sidecar::{Counts, Kind, Sidecar, SidecarManifest};

/// The folder of all features in a data set's.
const FOLDER: &str = "features";
/// The name of the empty caption's features: no shard has it, as shards' names begin with digits.
const EMPTY: &str = "empty";

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
            // A caption that is not there has no positions.
            Padding::Fixed if tokens > 0 => self.max_tokens,
            _ => tokens,
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

/// The features of a whole data set.
pub type FeatureManifest = SidecarManifest<FeatureSpec>;

impl FeatureManifest {
    /// The empty caption's file.
    pub fn empty(&self) -> &[ShardEntry] {
        &self.extra
    }
}

impl Kind for FeatureSpec {
    const EXTRA: &'static [&'static str] = &[EMPTY];
    const HINT: &'static str = "run `ella embed` again to complete them";

    fn stands(&self, file: &Bytes, rows: u64) -> bool {
        FeatureReader::open("features", file.clone(), self).is_ok_and(|file| file.rows() as u64 == rows)
    }
}

/// The features of a column of captions: being made, or whole.
#[derive(Clone, Debug)]
pub struct FeatureSet(Sidecar<FeatureSpec>);

impl FeatureSet {
    /// Begins, or goes on with, the features of an encoder in a data set's folder. Safe to call from many workers at once.
    pub async fn begin(store: &Store, data: &Arc<Manifest>, spec: &FeatureSpec, column: &str) -> Result<FeatureSet, DataError> {
        spec.check()?;
        Ok(FeatureSet(FeatureSet::sidecar(store, data, spec, column).begin().await?))
    }

    fn sidecar(store: &Store, data: &Arc<Manifest>, spec: &FeatureSpec, column: &str) -> Sidecar<FeatureSpec> {
        Sidecar::new(store, &format!("{FOLDER}/{}/{column}", spec.fingerprint()), data, spec.clone())
    }

    /// The features of an encoder, which must be there; else an error that says what there is instead.
    pub async fn find(store: &Store, data: &Arc<Manifest>, spec: &FeatureSpec, column: &str) -> Result<FeatureSet, DataError> {
        let set = FeatureSet::sidecar(store, data, spec, column);
        if !set.is_begun().await? {
            let found = what_there_is(store, spec).await?;
            return Err(DataError::FeaturesMissing { folder: set.folder.url().to_owned(), found });
        }
        Ok(FeatureSet(set))
    }

    /// The encoder.
    pub fn spec(&self) -> &FeatureSpec {
        &self.0.spec
    }

    /// The folder that the names of [`ShardEntry`] are in.
    pub(crate) fn folder(&self) -> &Store {
        &self.0.folder
    }

    /// Shards of the data set that have no features, or whose features lack their file or its record.
    pub fn missing(&self) -> BoxFuture<'_, Result<Vec<usize>, DataError>> {
        Box::pin(async move { Ok(self.0.missing().await?.0) })
    }

    /// The record of a shard's features, if they and it are there.
    pub async fn entry(&self, shard: usize) -> Result<Option<ShardEntry>, DataError> {
        Ok(self.0.whole(self.0.stem(shard)).await?.map(|record| record.file))
    }

    /// The record of the empty caption's features, if they and it are there.
    pub async fn empty(&self) -> Result<Option<ShardEntry>, DataError> {
        Ok(self.0.whole(EMPTY).await?.map(|record| record.file))
    }

    /// The error that a shard, or the empty caption, has no features.
    pub(crate) fn lacks(&self, shard: Option<usize>) -> DataError {
        self.0.incomplete(vec![shard.map_or(EMPTY, |shard| self.0.stem(shard)).to_owned()])
    }

    /// Bytes of each shard's features, if every caption had as many tokens as there can be.
    pub(crate) fn most_bytes(&self) -> impl Iterator<Item = u64> {
        let row = u64::from(self.0.spec.max_tokens) * self.0.spec.token_bytes() as u64;
        self.0.rows().map(move |rows| rows.saturating_mul(row))
    }

    /// Fails if the store would not take a shard's features, whose captions have so many tokens: known before anything is encoded.
    ///
    /// # Errors
    /// `FeaturesTooLarge`.
    pub fn check_size(&self, shard: usize, tokens: &[u32]) -> Result<(), DataError> {
        let spec = &self.0.spec;
        let bytes = tokens.iter().map(|tokens| u64::from(spec.stored_tokens(*tokens)) * spec.token_bytes() as u64).sum();
        self.0
            .shard(shard)
            .map_or(Ok(()), |entry| fits(&join(self.folder().url(), self.0.stem(shard)), entry, bytes, self.folder().largest_created()))
    }

    /// Stores the empty caption's features, a file of one row, once. To be called before [`FeatureSet::finish`].
    pub async fn write_empty(&self, file: Bytes) -> Result<ShardEntry, DataError> {
        Ok(self.0.write_extra(EMPTY, file).await?.file)
    }

    /// Stores a shard's features, once, and then their record, with what was counted. If another worker was first, its features stay.
    pub fn write(&self, shard: usize, rows: u64, file: Bytes, counts: Counts) -> BoxFuture<'_, Result<ShardEntry, DataError>> {
        Box::pin(async move { Ok(self.0.write(shard, rows, file, |_| Ok(counts.into())).await?.file) })
    }

    /// Fails unless every shard has its features; then their manifest, which is written if it was not there.
    pub fn finish(&self) -> BoxFuture<'_, Result<FeatureManifest, DataError>> {
        Box::pin(async move { self.0.finish().await })
    }

    /// Fails, naming the first missing ones, unless every shard and the empty caption have their features.
    pub fn check_complete(&self) -> BoxFuture<'_, Result<(), DataError>> {
        Box::pin(async move { self.0.check_complete().await })
    }
}

/// A file of features is written only if it is not there, and whole. Tokens, offsets and the file's own description are not in `bytes`.
fn fits(file: &str, shard: &ShardEntry, bytes: u64, most: Option<u64>) -> Result<(), DataError> {
    const REST: u64 = 200 << 20;
    let Some(most) = most.map(|most| most - REST).filter(|most| bytes > *most) else { return Ok(()) };
    // Shards of one size are not alike to a hair.
    let size = u128::from(shard.bytes) * u128::from(most) / u128::from(bytes) * 9 / 10;
    Err(DataError::FeaturesTooLarge { file: format!("{file}.arrow"), bytes, most, shard_mib: ((size >> 20) as u64).max(1) })
}

/// Every encoder whose features were begun in a data set's folder, with its columns.
pub async fn features_in(store: &Store) -> Result<Vec<(FeatureSpec, Vec<String>)>, DataError> {
    let mut found = Vec::new();
    for folder in store.folders(FOLDER).await? {
        let (mut spec, mut columns) = (None, Vec::new());
        for column in store.folders(&folder).await? {
            let Some(there) = Sidecar::<FeatureSpec>::spec_in(&store.child(&column)).await? else { continue };
            columns.push(column.rsplit('/').next().unwrap_or_default().to_owned());
            spec = Some(there);
        }
        found.extend(spec.map(|spec| (spec, columns)));
    }
    Ok(found)
}

/// Which features a data set has, and how each differs from the wanted ones.
async fn what_there_is(store: &Store, wanted: &FeatureSpec) -> Result<String, DataError> {
    let json = |spec: &FeatureSpec| serde_json::to_value(spec).unwrap_or_default();
    let wanted = json(wanted);
    let mut found = Vec::new();
    for (spec, columns) in features_in(store).await? {
        let there = json(&spec);
        let differs = wanted.as_object().into_iter().flatten();
        let differs = differs.filter_map(|(field, value)| difference(field, value, there.get(field)?));
        let mut differs: Vec<_> = differs.map(|(field, expected, found)| format!("{field} expected {expected}, found {found}")).collect();
        if differs.is_empty() {
            differs.push(format!("of the captions {} only", columns.join(", ")));
        }
        found.push(format!("is {} ({})", spec.fingerprint(), differs.join("; ")));
    }
    if found.is_empty() { Ok("are none at all".into()) } else { Ok(found.join(", and ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_that_no_request_takes_are_told_with_the_size_of_shards_that_would_do() {
        let shard = ShardEntry { bytes: 128 << 20, ..ShardEntry::of("shards/0.arrow".into(), 3500, &Bytes::new()) };
        let told = |bytes, most| {
            fits("s3://b/f", &shard, bytes, most).err().map(|error| (error.is_permanent(), error.is_usage(), error.to_string()))
        };
        assert_eq!(told(5_000_000_000, Some(5000 << 20)), None);
        let (permanent, usage, message) = told(10_000_000_000, Some(5000 << 20)).unwrap();
        assert!(permanent && !usage && message.contains("--shard-mib 57 or less"), "{message}");
        assert_eq!(told(u64::MAX, None), None);
    }
}
