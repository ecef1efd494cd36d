//! `manifest.json`: what a prepared data set is, down to every byte.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;
use ella_store::{Digest, Store, StoreError};
use futures::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::settings::{CaptionColumn, Settings};
use crate::shard::ShardLayout;

/// The version of every record this module writes.
pub const SCHEMA: u32 = 1;
/// The manifest's key in a data set's folder.
pub const MANIFEST: &str = "manifest.json";

/// Which network made the latents, and their shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentSpec {
    /// BLAKE3 of the encoder's weights.
    pub model: Digest,
    /// Channels of the moments: means, then log-variances (8 for the SD VAEs).
    pub channels: u32,
    /// Pixels of a picture's side for each of a latent's.
    pub downscale: u32,
}

impl LatentSpec {
    /// `[channels, height, width]` of the moments of a picture of this width and height.
    pub fn shape(&self, size: (u32, u32)) -> [usize; 3] {
        let side = |pixels: u32| (pixels / self.downscale.max(1)) as usize;
        [self.channels as usize, side(size.1), side(size.0)]
    }

    /// Numbers in a row of moments.
    pub fn numbers(&self, size: (u32, u32)) -> usize {
        self.shape(size).iter().product()
    }
}

/// One source, and what became of its samples in numbers. Which keys were refused is in `report.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceEntry {
    /// File name without its folder, so that a moved source is the same source.
    pub name: String,
    /// Rows of the file, where it is a table or list whose parts are prepared apart.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rows: Option<Range<u64>>,
    /// Bytes that were read: of the file, or of the part and its pictures.
    pub bytes: u64,
    /// BLAKE3 of them.
    pub blake3: Digest,
    /// Samples read.
    pub read: u64,
    /// Samples kept.
    pub kept: u64,
    /// Members of a tar that belonged to no sample.
    pub ignored: u64,
}

/// One file of a data set or of its features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Key relative to the folder that its manifest is in.
    pub name: String,
    /// Rows.
    pub rows: u64,
    /// Size of the file.
    pub bytes: u64,
    /// BLAKE3 of the file.
    pub blake3: Digest,
    /// Width and height of its pictures.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub size: Option<(u32, u32)>,
}

impl ShardEntry {
    /// Describes a file's bytes.
    pub fn of(name: String, rows: u64, file: &[u8]) -> ShardEntry {
        ShardEntry { name, rows, bytes: file.len() as u64, blake3: Digest::of(file), size: None }
    }

    /// Whether these are the bytes that were described.
    pub fn check(&self, folder: &str, file: &[u8]) -> Result<(), DataError> {
        let (expected, found) = (self.blake3, Digest::of(file));
        if found == expected { Ok(()) } else { Err(DataError::Digest { file: join(folder, &self.name), expected, found }) }
    }
}

/// A prepared data set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this record.
    pub schema: u32,
    /// How the pictures were made. None: there are only captions.
    pub settings: Option<Settings>,
    /// How the latents were made, if there are any.
    pub latents: Option<LatentSpec>,
    /// The columns of captions.
    pub captions: Vec<CaptionColumn>,
    /// What it was made from.
    pub sources: Vec<SourceEntry>,
    /// Rows of all shards.
    pub samples: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// The shards, in the order of their samples in the sources.
    pub shards: Vec<ShardEntry>,
}

impl Manifest {
    /// Sums up shards.
    pub fn new(settings: Option<Settings>, latents: Option<LatentSpec>, sources: Vec<SourceEntry>, shards: Vec<ShardEntry>) -> Manifest {
        let samples = shards.iter().map(|s| s.rows).sum();
        let bytes = shards.iter().map(|s| s.bytes).sum();
        let captions = settings.as_ref().map_or_else(|| vec![CaptionColumn::default()], |settings| settings.captions.clone());
        Manifest { schema: SCHEMA, settings, latents, captions, sources, samples, bytes, shards }
    }

    /// Reads and validates the manifest of the data set in a folder.
    pub fn load(store: &Store) -> BoxFuture<'_, Result<Manifest, DataError>> {
        Box::pin(async move {
            let hint = "this is no prepared data set, or preparing it did not finish: run `ella prepare` (again)";
            let bytes = read(store, MANIFEST).await?.ok_or(DataError::RecordMissing { file: at(store, MANIFEST), hint })?;
            let manifest: Manifest = parse(&at(store, MANIFEST), &bytes)?;
            manifest.validate(&at(store, MANIFEST))?;
            Ok(manifest)
        })
    }

    /// Checks what the types cannot: sums, names, digests. `file` names the manifest in errors.
    pub fn validate(&self, file: &str) -> Result<(), DataError> {
        let wrong = |what: String| Err(DataError::Record { file: file.to_owned(), what });
        validate_shards(&self.shards).or_else(wrong)?;
        let rows: u64 = self.shards.iter().map(|s| s.rows).sum();
        if rows != self.samples {
            return wrong(format!("samples: must be the sum of the shards' rows (expected {rows}, found {})", self.samples));
        }
        let bytes: u64 = self.shards.iter().map(|s| s.bytes).sum();
        if bytes != self.bytes {
            return wrong(format!("bytes: must be the sum of the shards' bytes (expected {bytes}, found {})", self.bytes));
        }
        if self.samples == 0 {
            return wrong("samples: must be 1 or more (found 0)".into());
        }
        if self.captions.is_empty() {
            return wrong("captions: must name one column or more".into());
        }
        let Some(settings) = &self.settings else { return Ok(()) };
        settings.check().or_else(|error| wrong(format!("settings.{error}")))?;
        match self.shards.iter().position(|shard| shard.size.is_none()) {
            Some(shard) => wrong(format!("shards[{shard}].size: must be there, as the data set has pictures")),
            None => Ok(()),
        }
    }

    /// The columns of a shard.
    pub(crate) fn layout(&self, shard: &ShardEntry) -> ShardLayout {
        let captions = self.captions.iter().map(|column| column.name.clone()).collect();
        let moments = self.latents.as_ref().zip(shard.size).map(|(latents, size)| latents.numbers(size));
        ShardLayout { captions, pictures: self.settings.is_some(), images: self.has_images(), moments }
    }

    /// The place of a column of captions among the data set's own.
    pub fn caption_column(&self, name: &str) -> Option<usize> {
        self.captions.iter().position(|column| column.name == name)
    }

    /// The shards as the order wants them: size of the pictures, and rows.
    pub fn order_shards(&self) -> Vec<(Option<(u32, u32)>, u64)> {
        self.shards.iter().map(|shard| (shard.size, shard.rows)).collect()
    }

    /// The data set's identity, bound into commits: BLAKE3 of the manifest as compact JSON with its fields in order.
    pub fn digest(&self) -> Digest {
        Digest::of(&canonical(self))
    }

    /// The settings' resolution, pixels; none if there are only captions.
    pub fn resolution(&self) -> Option<u32> {
        self.settings.as_ref().map(|s| s.resolution)
    }

    /// Whether the shards hold encoded images.
    pub fn has_images(&self) -> bool {
        self.settings.as_ref().is_some_and(|s| s.images)
    }
}

/// The rules for a list of files: safe, unique names; rows; numbers that can be summed up.
pub(crate) fn validate_shards(shards: &[ShardEntry]) -> Result<(), String> {
    let mut names = HashSet::with_capacity(shards.len());
    let (mut rows, mut bytes) = (0_u64, 0_u64);
    for (i, shard) in shards.iter().enumerate() {
        let name = &shard.name;
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b));
        if !plain || name.split('/').any(|part| part.is_empty() || part.starts_with('.')) {
            return Err(format!("shards[{i}].name: must be a plain relative name (found {name:?})"));
        }
        if !names.insert(name) {
            return Err(format!("shards[{i}].name: must be unique (found {name} twice)"));
        }
        if shard.rows == 0 {
            return Err(format!("shards[{i}].rows: must be 1 or more (found 0)"));
        }
        for (field, sum, more) in [("rows", &mut rows, shard.rows), ("bytes", &mut bytes, shard.bytes)] {
            let beyond = || format!("shards[{i}].{field}: the sum up to here must be below 2^64 (found {more}, and {sum} before)");
            *sum = sum.checked_add(more).ok_or_else(beyond)?;
        }
    }
    Ok(())
}

/// Compact JSON, fields in declared order: what digests are made of. Our records are plain structs, which always serialise.
pub(crate) fn canonical(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).unwrap_or_default()
}

/// JSON for files that people look at.
pub(crate) fn pretty(record: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec_pretty(record).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

/// Reads a record strictly: another schema version and unknown fields are errors that name the file and the field.
pub(crate) fn parse<T: DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T, DataError> {
    #[derive(Deserialize)]
    struct Version {
        schema: u32,
    }
    let wrong = |what: String| DataError::Record { file: file.to_owned(), what };
    let version: Version = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
    if version.schema != SCHEMA {
        return Err(wrong(format!("schema: unknown version (expected {SCHEMA}, found {})", version.schema)));
    }
    serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))
}

/// A small file's bytes, or none if it is not there.
pub(crate) async fn read(store: &Store, key: &str) -> Result<Option<Bytes>, DataError> {
    match store.get_record(key).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn join(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

/// A key as messages name it.
pub(crate) fn at(store: &Store, key: &str) -> String {
    join(store.url(), key)
}
