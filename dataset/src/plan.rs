//! The plan of a data set, its units, and how they become a manifest.
//!
//! Every source is a unit: its output is named from its input, written once, conditionally, and described by a record that is
//! written last. So units can be done anywhere, in any order, twice; a finished one is skipped. In the destination:
//!
//! ```text
//! plan.json                       settings and sources: whose folder this is
//! shards/00000-9f86d081884c-0000.arrow
//! units/00000-9f86d081884c.json   what became of source 0
//! report.json                     every sample refused, by reason (KNOWN)
//! manifest.json                   written last: the data set is whole
//! ```

use std::collections::HashMap;

use bytes::Bytes;
use ella_store::{Created, Digest, Store};
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::manifest::{LatentSpec, MANIFEST, Manifest, SCHEMA, Settings, ShardEntry, SourceEntry, at, canonical, parse, pretty, read};
use crate::report::Report;
use crate::source::Source;
use crate::tree;

/// The plan's key in a data set's folder.
pub const PLAN: &str = "plan.json";
/// The report's key in a data set's folder.
pub const REPORT: &str = "report.json";

/// What a data set will be: everything that decides its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this record.
    pub schema: u32,
    /// How samples are filtered and pictures made.
    pub settings: Settings,
    /// How latents are made, if they are.
    pub latents: Option<LatentSpec>,
    /// The sources' file names in order, without folders: a moved source is the same source.
    pub sources: Vec<String>,
    /// Their sizes. Not part of the record: a broken source may be replaced by a whole one, which is then a new unit.
    #[serde(skip)]
    sizes: Vec<u64>,
}

impl Plan {
    /// Checks the settings and makes the plan.
    pub fn new(settings: &Settings, latents: Option<LatentSpec>, sources: &[Source]) -> Result<Plan, DataError> {
        settings.check()?;
        if !settings.images && latents.is_none() {
            return Err(DataError::Setting { field: "images", rule: "on unless latents are made", found: "off".into() });
        }
        if sources.is_empty() {
            return Err(DataError::SourceMissing { source_name: "(none given)".into() });
        }
        let sizes = sources.iter().map(Source::bytes).collect();
        let sources = sources.iter().map(|source| source.file_name().to_owned()).collect();
        Ok(Plan { schema: SCHEMA, settings: settings.clone(), latents, sources, sizes })
    }

    /// Makes a destination this plan's own, or finds that it already is. A folder that holds another plan's data is refused.
    pub async fn claim(&self, out: &Store) -> Result<(), DataError> {
        if read(out, PLAN).await?.is_none() {
            if read(out, MANIFEST).await?.is_some() {
                return Err(other(out, MANIFEST, "plan.json", "a plan beside it", "none"));
            }
            if out.create(PLAN, pretty(self)).await? == Created::Yes {
                return Ok(());
            }
        }
        let file = at(out, PLAN);
        let there: Plan = parse(&file, &out.get(PLAN).await?)?;
        match difference("", &json(self), &json(&there)) {
            None => Ok(()),
            Some((field, expected, found)) => Err(DataError::Other { file, field, expected, found }),
        }
    }

    /// The name of a unit's files, made from its input: settings, place, and the source's name and size.
    pub fn unit(&self, index: usize) -> String {
        let source = (self.sources.get(index), self.sizes.get(index));
        unit_name(index, &Digest::of(&canonical(&(&self.settings, &self.latents, source))))
    }

    /// The record of a unit, if it is finished.
    pub async fn record(&self, index: usize, out: &Store) -> Result<Option<UnitRecord>, DataError> {
        let key = unit_key(&self.unit(index));
        let Some(bytes) = read(out, &key).await? else { return Ok(None) };
        let record: UnitRecord = parse(&at(out, &key), &bytes)?;
        record.validate(&at(out, &key))?;
        Ok(Some(record))
    }

    /// Reads all unit records and writes `report.json` and, last, `manifest.json`.
    pub async fn finish(&self, out: &Store) -> Result<Report, DataError> {
        let mut report = Report::default();
        let (mut sources, mut shards) = (Vec::new(), Vec::new());
        let mut keys = KeyIndex::default();
        for index in 0..self.sources.len() {
            let missing = DataError::RecordMissing {
                file: at(out, &unit_key(&self.unit(index))),
                hint: "this source is not prepared yet: run `ella prepare` again",
            };
            let record = self.record(index, out).await?.ok_or(missing)?;
            keys.add(self, index, &record, out).await?;
            sources.push(record.source);
            shards.extend(record.shards);
            report.merge(record.report);
        }
        if report.kept == 0 {
            out.put(REPORT, pretty(&report)).await?;
            return Err(DataError::NothingKept { read: report.read, refused: report.refused_line() });
        }
        let manifest = Manifest::new(Some(self.settings.clone()), self.latents.clone(), sources, shards);
        publish(out, &manifest, &report).await?;
        Ok(report)
    }
}

/// What became of one source. Written last of the unit's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitRecord {
    /// Version of this record.
    pub schema: u32,
    /// The source.
    pub source: SourceEntry,
    /// Its shards.
    pub shards: Vec<ShardEntry>,
    /// Keys of the rows, in order: to find keys that two sources share without reading shards.
    pub keys: Vec<String>,
    /// What became of its samples.
    pub report: Report,
}

impl UnitRecord {
    fn validate(&self, file: &str) -> Result<(), DataError> {
        let wrong = |what: &str| Err(DataError::Record { file: file.to_owned(), what: what.to_owned() });
        let rows: u64 = self.shards.iter().map(|s| s.rows).sum();
        if !self.report.adds_up() || self.report.kept != rows || self.keys.len() as u64 != rows {
            return wrong("report: read, kept, refused, keys and the shards' rows do not add up");
        }
        crate::manifest::validate_shards(&self.shards).or_else(|what| wrong(&what))
    }

    /// Whether its shards are there, by name and size. One that was lost is made again: its bytes are given by its input.
    pub(crate) async fn is_whole(&self, out: &Store) -> Result<bool, DataError> {
        for shard in &self.shards {
            if out.head(&shard.name).await?.is_none_or(|meta| meta.bytes != shard.bytes) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes the record of a finished unit, once. A record that is already there wins, if it says the same.
    pub async fn write(&self, unit: &str, out: &Store) -> Result<(), DataError> {
        let key = unit_key(unit);
        if out.create(&key, pretty(self)).await? == Created::Yes {
            return Ok(());
        }
        let there: UnitRecord = parse(&at(out, &key), &out.get(&key).await?)?;
        match difference("", &json(self), &json(&there)) {
            None => Ok(()),
            Some((field, expected, found)) => Err(DataError::Other { file: at(out, &key), field, expected, found }),
        }
    }
}

/// Finds keys that two sources share. 16 bytes a key: 34 million keys take well under 2 GiB.
#[derive(Debug, Default)]
pub(crate) struct KeyIndex {
    units: HashMap<u64, u32>,
}

impl KeyIndex {
    pub(crate) async fn add(&mut self, plan: &Plan, index: usize, record: &UnitRecord, out: &Store) -> Result<(), DataError> {
        for key in &record.keys {
            let hash = Digest::of(key.as_bytes());
            let (short, _) = hash.as_bytes().split_first_chunk().unwrap_or((&[0; 8], &[]));
            let Some(earlier) = self.units.insert(u64::from_le_bytes(*short), index as u32) else { continue };
            let earlier = earlier as usize;
            // Two keys may share 64 bits of a digest: the earlier record says whether it is the key itself.
            let first = plan.record(earlier, out).await?;
            if first.as_ref().is_some_and(|first| first.keys.contains(key)) {
                let name = |i: usize| plan.sources.get(i).cloned().unwrap_or_default();
                return Err(DataError::DuplicateKey { key: key.clone(), first: name(earlier), second: name(index) });
            }
        }
        Ok(())
    }
}

pub(crate) fn unit_name(index: usize, input: &Digest) -> String {
    format!("{index:05}-{}", &input.to_string()[..12])
}

fn unit_key(unit: &str) -> String {
    format!("units/{unit}.json")
}

/// Writes a shard with its tree, once, and describes it. One that is there already must be the same.
pub async fn write_file(out: &Store, name: String, rows: u64, file: Bytes) -> Result<ShardEntry, DataError> {
    create_file(out, ShardEntry::of(name, rows, &file), file, |_| false).await
}

/// Writes a file of a unit, once, with its tree, and describes what is there. A file already there is what an earlier attempt left, here or
/// elsewhere: whole, for files appear whole or not at all, but perhaps of other bytes where a GPU or another processor made it.
/// If `same` takes it for this unit's, it stands.
pub(crate) async fn create_file(
    out: &Store,
    entry: ShardEntry,
    file: Bytes,
    same: impl FnOnce(&Bytes) -> bool,
) -> Result<ShardEntry, DataError> {
    if out.create(&entry.name, file.clone()).await? == Created::Yes {
        tree::write(out, &entry.name, &file).await?;
        return Ok(entry);
    }
    let there = out.get(&entry.name).await?;
    let entry = match entry.check(out.url(), &there) {
        Err(_) if same(&there) => ShardEntry::of(entry.name, entry.rows, &there),
        checked => checked.map(|()| entry)?,
    };
    tree::write(out, &entry.name, &there).await?;
    Ok(entry)
}

/// Refuses a destination whose manifest is another one.
pub(crate) async fn refuse_other(out: &Store, manifest: &Manifest) -> Result<(), DataError> {
    let Some(bytes) = read(out, MANIFEST).await? else { return Ok(()) };
    let there: Manifest = parse(&at(out, MANIFEST), &bytes)?;
    match difference("", &json(manifest), &json(&there)) {
        None => Ok(()),
        Some((field, expected, found)) => Err(DataError::Other { file: at(out, MANIFEST), field, expected, found }),
    }
}

/// Writes the report and then, once, the manifest that makes the data set visible.
pub(crate) async fn publish(out: &Store, manifest: &Manifest, report: &Report) -> Result<(), DataError> {
    refuse_other(out, manifest).await?;
    out.put(REPORT, pretty(report)).await?;
    match out.create(MANIFEST, pretty(manifest)).await? {
        Created::Yes => Ok(()),
        Created::AlreadyThere => refuse_other(out, manifest).await,
    }
}

fn other(out: &Store, key: &str, field: &str, expected: &str, found: &str) -> DataError {
    DataError::Other { file: at(out, key), field: field.into(), expected: expected.into(), found: found.into() }
}

fn json(record: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(record).unwrap_or_default()
}

/// The first field in which two records differ, with both values as text.
pub(crate) fn difference(path: &str, expected: &serde_json::Value, found: &serde_json::Value) -> Option<(String, String, String)> {
    use serde_json::Value::{Array, Object};
    match (expected, found) {
        _ if expected == found => None,
        (Object(a), Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            let null = serde_json::Value::Null;
            keys.into_iter().find_map(|key| {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                difference(&path, a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null))
            })
        }
        (Array(a), Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().find_map(|(i, (a, b))| difference(&format!("{path}[{i}]"), a, b))
        }
        (Array(a), Array(b)) => Some((path.to_owned(), format!("{} entries", a.len()), format!("{} entries", b.len()))),
        _ => Some((path.to_owned(), expected.to_string(), found.to_string())),
    }
}
