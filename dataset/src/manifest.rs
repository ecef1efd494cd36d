//! `manifest.json`: what a prepared data set is, down to every byte.

use std::collections::BTreeSet;

use bytes::Bytes;
use ella_store::{Digest, Store};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// The version of every record this module writes.
pub const SCHEMA: u32 = 1;
/// The manifest's key in a data set's folder.
pub const MANIFEST: &str = "manifest.json";

/// What decides a prepared data set's bytes, beside its sources.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Side of the square pictures, pixels: a multiple of 8, 8 to 8192.
    pub resolution: u32,
    /// Smallest accepted length of an original's shorter side, pixels.
    pub min_edge: u32,
    /// Fewest words in a caption.
    pub min_caption_words: u32,
    /// Most words in a caption.
    pub max_caption_words: Option<u32>,
    /// Field of the `.json` file that holds the caption. None: the `.txt` file if there is one, else the field `caption`.
    pub caption_field: Option<String>,
    /// JPEG quality of the stored pictures, 1 to 100.
    pub jpeg_quality: u8,
    /// A shard is closed when its images, captions and latents reach this many bytes.
    pub shard_bytes: u64,
    /// Most pixels of an original: a bound against decompression bombs.
    pub max_pixels: u64,
    /// Put the source's name (`photos-00000/`) before every key, for sources that number their samples alike.
    pub key_prefix: bool,
    /// Store the pictures. Off makes sense only with latents.
    pub images: bool,
}

impl Settings {
    /// The usual settings for a resolution: no picture is enlarged, any caption of one word or more, quality 95, shards of 128 MiB.
    pub fn new(resolution: u32) -> Settings {
        Settings {
            resolution,
            min_edge: resolution,
            min_caption_words: 1,
            max_caption_words: None,
            caption_field: None,
            jpeg_quality: 95,
            shard_bytes: 128 << 20,
            max_pixels: 1 << 27,
            key_prefix: false,
            images: true,
        }
    }

    /// Checks every field against its range.
    pub fn check(&self) -> Result<(), DataError> {
        fn rule(ok: bool, field: &'static str, rule: &'static str, found: impl ToString) -> Result<(), DataError> {
            if ok { Ok(()) } else { Err(DataError::Setting { field, rule, found: found.to_string() }) }
        }
        let side = self.resolution;
        rule(side.is_multiple_of(8) && (8..=8192).contains(&side), "resolution", "a multiple of 8 from 8 to 8192", side)?;
        rule(self.min_edge >= 1, "min_edge", "1 or more", self.min_edge)?;
        let most = self.max_caption_words.unwrap_or(u32::MAX);
        rule(most >= self.min_caption_words.max(1), "max_caption_words", "1 or more, and not below min_caption_words", most)?;
        rule((1..=100).contains(&self.jpeg_quality), "jpeg_quality", "1 to 100", self.jpeg_quality)?;
        let bytes = self.shard_bytes;
        rule((1..=4 << 30).contains(&bytes), "shard_bytes", "1 byte to 4 GiB", bytes)?;
        let pixels = self.max_pixels;
        rule((1..=1 << 30).contains(&pixels), "max_pixels", "1 to 2^30", pixels)?;
        let field = self.caption_field.as_deref();
        rule(field != Some(""), "caption_field", "the name of a JSON field", "an empty name")
    }
}

/// Which network made the latents, and their shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentSpec {
    /// BLAKE3 of the encoder's weights.
    pub model: Digest,
    /// Channels of the moments: means, then log-variances (8 for the SD VAEs).
    pub channels: u32,
    /// Height of the latent.
    pub height: u32,
    /// Width of the latent.
    pub width: u32,
}

impl LatentSpec {
    /// Numbers in a row of moments: channels × height × width.
    pub fn len(&self) -> usize {
        self.channels as usize * self.height as usize * self.width as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One source, and what became of its samples in numbers. Which keys were refused is in `report.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceEntry {
    /// File name without its folder, so that a moved source is the same source.
    pub name: String,
    /// Size of the file.
    pub bytes: u64,
    /// BLAKE3 of the file.
    pub blake3: Digest,
    /// Samples read.
    pub read: u64,
    /// Samples kept.
    pub kept: u64,
    /// Members of the tar that belonged to no sample.
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
}

impl ShardEntry {
    /// Describes a file's bytes.
    pub fn of(name: String, rows: u64, file: &[u8]) -> ShardEntry {
        ShardEntry { name, rows, bytes: file.len() as u64, blake3: Digest::of(file) }
    }

    /// Whether these are the bytes that were described.
    pub fn check(&self, folder: &str, file: &[u8]) -> Result<(), DataError> {
        let (expected, found) = (self.blake3, Digest::of(file));
        if found == expected { Ok(()) } else { Err(DataError::Digest { file: join(folder, &self.name), expected, found }) }
    }
}

/// A prepared data set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this record.
    pub schema: u32,
    /// How the pictures were made. None: there are only captions.
    pub settings: Option<Settings>,
    /// How the latents were made, if there are any.
    pub latents: Option<LatentSpec>,
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
        Manifest { schema: SCHEMA, settings, latents, sources, samples, bytes, shards }
    }

    /// Reads and validates the manifest of the data set in a folder.
    pub async fn load(store: &Store) -> Result<Manifest, DataError> {
        let hint = "this is no prepared data set, or preparing it did not finish: run `ella prepare` (again)";
        let bytes = read(store, MANIFEST).await?.ok_or(DataError::RecordMissing { file: at(store, MANIFEST), hint })?;
        let manifest: Manifest = parse(&at(store, MANIFEST), &bytes)?;
        manifest.validate(&at(store, MANIFEST))?;
        Ok(manifest)
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
        if let Some(settings) = &self.settings {
            settings.check().or_else(|error| wrong(format!("settings.{error}")))?;
        }
        Ok(())
    }

    /// The data set's identity, bound into commits: BLAKE3 of the manifest as compact JSON with its fields in order.
    pub fn digest(&self) -> Digest {
        Digest::of(&canonical(self))
    }

    /// Side of the pictures, pixels; none if there are only captions.
    pub fn resolution(&self) -> Option<u32> {
        self.settings.as_ref().map(|s| s.resolution)
    }

    /// Whether the shards hold encoded images.
    pub fn has_images(&self) -> bool {
        self.settings.as_ref().is_some_and(|s| s.images)
    }
}

/// The rules for a list of files: safe, unique names; rows.
pub(crate) fn validate_shards(shards: &[ShardEntry]) -> Result<(), String> {
    let mut names = BTreeSet::new();
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
    if store.head(key).await?.is_none() {
        return Ok(None);
    }
    Ok(Some(store.get(key).await?))
}

pub(crate) fn join(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

/// A key as messages name it.
pub(crate) fn at(store: &Store, key: &str) -> String {
    join(store.url(), key)
}
