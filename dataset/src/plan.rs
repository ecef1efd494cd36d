//! The plan of a data set, and the records of its parts.
//!
//! Every source, or part of a large one, is a unit of work: its output is named from its input, written once, conditionally, and
//! described by a record that is written last. So units can be done anywhere, in any order, twice; a finished one is skipped. In the
//! destination:
//!
//! ```text
//! plan.json                       settings and sources: whose folder this is
//! shards/00000-9f86d081884c-0000.arrow
//! units/00000-9f86d081884c.json   what became of part 0
//! duplicates.json                 which samples are left out as duplicates of which, where that was looked for
//! report.json                     every sample refused, by reason (KNOWN)
//! manifest.json                   written last: the data set is whole
//! ```

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ella_store::{Created, Digest, Store};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::manifest::{
    LatentSpec, MANIFEST, Manifest, SCHEMA, ShardEntry, SourceEntry, at, canonical, parse, pretty, read, validate_shards,
};
use crate::report::Report;
use crate::settings::Settings;
use crate::source::{Piece, Source, SourceKind, stem};
use crate::tree;

/// The plan's key in a data set's folder.
pub const PLAN: &str = "plan.json";
/// The report's key in a data set's folder.
pub const REPORT: &str = "report.json";
/// What was found of duplicates, in a data set's folder.
pub(crate) const DUPLICATES: &str = "duplicates.json";
/// The folder of units' records.
pub(crate) const UNITS: &str = "units";
/// The folder of shards.
pub(crate) const SHARDS: &str = "shards";
/// Sources that an error names.
const SOURCES_NAMED: usize = 5;
/// Sources looked into at once.
const LOOKED_AT_ONCE: usize = 16;

/// What a data set will be: everything that decides its bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this record.
    pub schema: u32,
    /// How samples are filtered and pictures made.
    pub settings: Settings,
    /// How latents are made, if they are.
    pub latents: Option<LatentSpec>,
    /// The sources in order.
    pub sources: Vec<PlannedSource>,
}

/// One source of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedSource {
    /// The file's name without its folder: a moved source is the same source.
    pub name: String,
    /// What kind of file it is.
    pub kind: SourceKind,
    /// The parts of a table or list. None for a tar, which is one: so a broken tar may be replaced by a whole one.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub pieces: Vec<Piece>,
    /// What stands before its keys, where keys have prefixes and its name without the ending would not tell it from another source.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub prefix: Option<String>,
}

/// One part of a plan: what a unit of work prepares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part<'a> {
    /// The source's place in the plan.
    pub source: usize,
    /// The part of a table or list.
    pub piece: Option<&'a Piece>,
}

impl Plan {
    /// Checks the settings, looks into the sources and makes the plan.
    pub async fn new(settings: &Settings, latents: Option<LatentSpec>, sources: &[Source]) -> Result<Plan, DataError> {
        settings.check()?;
        if !settings.images && latents.is_none() {
            return Err(DataError::Setting { field: "images", rule: "on unless latents are made", found: "off".into() });
        }
        if sources.is_empty() {
            return Err(DataError::SourceMissing { source_name: "(none given)".into() });
        }
        let prefixes = if settings.key_prefix { prefixes(sources) } else { vec![None; sources.len()] };
        let planned = stream::iter(sources.iter().map(planned)).buffered(LOOKED_AT_ONCE).try_collect::<Vec<_>>().await?;
        let sources = planned.into_iter().zip(prefixes).map(|(source, prefix)| PlannedSource { prefix, ..source }).collect();
        Ok(Plan { schema: SCHEMA, settings: settings.clone(), latents, sources })
    }

    /// The plan of a destination, if it has one.
    pub async fn load(out: &Store) -> Result<Option<Plan>, DataError> {
        let Some(bytes) = read(out, PLAN).await? else { return Ok(None) };
        let plan: Plan = parse(&at(out, PLAN), &bytes)?;
        plan.settings.check()?;
        Ok(Some(plan))
    }

    /// Makes a destination this plan's own, or finds that it already is. A folder that holds another plan's data is refused.
    pub async fn claim(&self, out: &Store) -> Result<(), DataError> {
        if read(out, PLAN).await?.is_none() {
            if read(out, MANIFEST).await?.is_some() {
                let (field, expected) = (PLAN.into(), "a plan beside it".into());
                return Err(DataError::Other { file: at(out, MANIFEST), field, expected, found: "none".into() });
            }
            refuse_run(out).await?;
            if out.create(PLAN, pretty(self)).await? == Created::Yes {
                return Ok(());
            }
        }
        let there: Plan = parse(&at(out, PLAN), &out.get_record(PLAN).await?)?;
        let names = |plan: &Plan| plan.sources.iter().map(|source| source.name.clone()).collect::<Vec<_>>();
        same_sources(&names(self), &names(&there), at(out, PLAN))?;
        same(self, &there, at(out, PLAN))
    }

    /// Gives a destination up that came to nothing, for a plan of other settings to take it: no shard was written. What was refused stays
    /// told in its report. Only for who knows that nobody works there.
    pub async fn withdraw(out: &Store) -> Result<(), DataError> {
        if read(out, MANIFEST).await?.is_some() || !out.list(SHARDS).await?.is_empty() {
            return Ok(());
        }
        for unit in out.list(UNITS).await? {
            out.delete(&unit.key).await?;
        }
        for key in [DUPLICATES, PLAN] {
            out.delete(key).await?;
        }
        Ok(())
    }

    /// The parts in order.
    pub fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        self.sources.iter().enumerate().flat_map(|(source, planned)| {
            let tar = (planned.kind == SourceKind::Tar).then_some(Part { source, piece: None });
            tar.into_iter().chain(planned.pieces.iter().map(move |piece| Part { source, piece: Some(piece) }))
        })
    }

    /// What stands before the keys of a part's samples.
    pub(crate) fn key_prefix(&self, part: &Part<'_>) -> String {
        let source = self.sources.get(part.source).filter(|_| self.settings.key_prefix);
        source.map_or_else(String::new, |source| format!("{}/", source.prefix.as_deref().unwrap_or_else(|| stem(&source.name))))
    }

    /// The name of a part's files, made from its input: settings, place, the source's name (or the prefix that tells it from others) and part,
    /// and what is left out of it. `bytes` is a tar's size.
    pub(crate) fn unit(&self, index: usize, part: &Part<'_>, bytes: u64, left_out: &[String]) -> String {
        let source = self.sources.get(part.source).map(|source| (source.prefix.as_ref().unwrap_or(&source.name), source.kind));
        let size = part.piece.is_none().then_some(bytes);
        let input = canonical(&(&self.settings, &self.latents, source, part.piece, size, left_out));
        unit_name(index, &Digest::of(&input))
    }
}

async fn planned(source: &Source) -> Result<PlannedSource, DataError> {
    let kind = source.kind();
    let pieces = if kind == SourceKind::Tar { Vec::new() } else { source.pieces().await? };
    Ok(PlannedSource { name: source.file_name().to_owned(), kind, pieces, prefix: None })
}

/// Prefixes of the keys of those sources that are not told apart by their names without the ending: with the ending, or after as many of their
/// folders as it takes.
fn prefixes(sources: &[Source]) -> Vec<Option<String>> {
    let mut namesakes = BTreeMap::<&str, Vec<usize>>::new();
    for (at, source) in sources.iter().enumerate() {
        namesakes.entry(source.stem()).or_default().push(at);
    }
    let mut prefixes = vec![None; sources.len()];
    for group in namesakes.into_values().filter(|group| group.len() > 1) {
        let deepest = group.iter().map(|at| sources[*at].folders().count()).max().unwrap_or(0);
        let labels = |depth: usize, name: fn(&Source) -> &str| -> Vec<String> {
            let label = |at: &usize| {
                let folders: Vec<&str> = sources[*at].folders().collect();
                [&folders[folders.len().saturating_sub(depth)..], &[name(&sources[*at])]].concat().join("/")
            };
            group.iter().map(label).collect()
        };
        let mut wanted = (0..=deepest).flat_map(|depth| [labels(depth, Source::stem), labels(depth, Source::file_name)]);
        // Of two stores even all folders may be the same; then a key that both have is an error, as ever.
        let found = wanted.find(|labels| labels.iter().collect::<BTreeSet<_>>().len() == group.len()).unwrap_or_default();
        for (at, label) in group.into_iter().zip(found) {
            prefixes[at] = Some(label);
        }
    }
    prefixes
}

/// What became of one part. Written last of the unit's files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnitRecord {
    /// Version of this record.
    pub schema: u32,
    /// The source, or the part of it.
    pub source: SourceEntry,
    /// What told this version of the source from others where it was read. Not part of what the unit is: copies differ in it.
    pub stamp: Option<String>,
    /// Its shards.
    pub shards: Vec<ShardEntry>,
    /// Keys of the samples that were kept, in the source's order: to find keys that two sources share without reading shards.
    pub keys: Vec<String>,
    /// The first half of the BLAKE3 digest of each one's picture, in hexadecimal, where duplicates are looked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub contents: Vec<String>,
    /// Each one's perceptual hash, where pictures that look alike are looked for.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub looks: Vec<String>,
    /// What became of its samples.
    pub report: Report,
}

impl UnitRecord {
    /// The record of a unit, if it is finished.
    pub(crate) async fn load(unit: &str, out: &Store) -> Result<Option<UnitRecord>, DataError> {
        let key = unit_key(unit);
        let Some(bytes) = read(out, &key).await? else { return Ok(None) };
        let record: UnitRecord = parse(&at(out, &key), &bytes)?;
        record.validate(&at(out, &key))?;
        Ok(Some(record))
    }

    fn validate(&self, file: &str) -> Result<(), DataError> {
        let wrong = |what: &str| Err(DataError::Record { file: file.to_owned(), what: what.to_owned() });
        validate_shards(&self.shards).or_else(|what| wrong(&what))?;
        let rows: u64 = self.shards.iter().map(|s| s.rows).sum();
        let as_many = |list: &[String]| list.is_empty() || list.len() as u64 == rows;
        if !self.report.adds_up() || self.report.kept != rows || self.keys.len() as u64 != rows {
            return wrong("report: read, kept, refused, keys and the shards' rows do not add up");
        }
        if !as_many(&self.contents) || !as_many(&self.looks) {
            return wrong("contents, looks: must be as many as the keys, or none");
        }
        Ok(())
    }

    /// Notes that a source which looks newer was found to be the same, so that it need not be read again the next time.
    pub(crate) async fn seen_as(self, unit: &str, stamp: Option<&str>, out: &Store) -> Result<(), DataError> {
        let record = UnitRecord { stamp: stamp.map(str::to_owned), ..self };
        Ok(out.put(&unit_key(unit), pretty(&record)).await?)
    }

    /// Writes the record of a finished unit, once. A record that is already there wins, if it says the same.
    pub(crate) async fn write(&self, unit: &str, out: &Store) -> Result<(), DataError> {
        let key = unit_key(unit);
        if out.create(&key, pretty(self)).await? == Created::Yes {
            return Ok(());
        }
        let there: UnitRecord = parse(&at(out, &key), &out.get_record(&key).await?)?;
        same(self, &UnitRecord { stamp: self.stamp.clone(), ..there }, at(out, &key))
    }
}

pub(crate) fn unit_name(index: usize, input: &Digest) -> String {
    format!("{index:05}-{}", &input.to_string()[..12])
}

pub(crate) fn unit_key(unit: &str) -> String {
    format!("{UNITS}/{unit}.json")
}

/// Writes a file again that a record names, if it was lost. Other bytes than the record's are refused, and nothing is written.
pub(crate) async fn restore_file(out: &Store, recorded: &ShardEntry, file: Bytes) -> Result<(), DataError> {
    if out.head(&recorded.name).await?.is_some_and(|meta| meta.bytes == recorded.bytes) {
        return Ok(());
    }
    let found = Digest::of(&file);
    if found != recorded.blake3 {
        return Err(DataError::MadeOtherwise { file: at(out, &recorded.name), expected: recorded.blake3, found });
    }
    create_file(out, recorded.clone(), file, |_| false).await.map(|_| ())
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
        Err(_) if same(&there) => ShardEntry { size: entry.size, ..ShardEntry::of(entry.name, entry.rows, &there) },
        checked => checked.map(|()| entry)?,
    };
    tree::write(out, &entry.name, &there).await?;
    Ok(entry)
}

/// Refuses a destination that a run trains into: what one of both deletes or looks for would be the other's.
pub(crate) async fn refuse_run(out: &Store) -> Result<(), DataError> {
    let file = "run.toml";
    match out.head(file).await? {
        Some(_) => Err(DataError::HoldsRun { folder: out.url().to_owned(), file }),
        None => Ok(()),
    }
}

/// Refuses a destination whose manifest is another one.
pub(crate) async fn refuse_other(out: &Store, manifest: &Manifest) -> Result<(), DataError> {
    let Some(bytes) = read(out, MANIFEST).await? else { return Ok(()) };
    let there: Manifest = parse(&at(out, MANIFEST), &bytes)?;
    same(manifest, &there, at(out, MANIFEST))
}

/// Writes the report and then, once, the manifest that makes the data set visible.
pub(crate) async fn publish(out: &Store, manifest: &Manifest, report: &Report) -> Result<(), DataError> {
    refuse_other(out, manifest).await?;
    write_report(out, report).await?;
    match out.create(MANIFEST, pretty(manifest)).await? {
        Created::Yes => Ok(()),
        Created::AlreadyThere => refuse_other(out, manifest).await,
    }
}

/// Writes what became of every sample; a report that is there already is left alone if it says the same.
pub(crate) async fn write_report(out: &Store, report: &Report) -> Result<(), DataError> {
    let text = pretty(report);
    if read(out, REPORT).await?.as_ref() != Some(&text) {
        out.put(REPORT, text).await?;
    }
    Ok(())
}

/// Refuses a plan, in `file`, of more or fewer sources, and names those that only one has.
pub(crate) fn same_sources(expected: &[String], there: &[String], file: String) -> Result<(), DataError> {
    if expected.len() == there.len() {
        return Ok(());
    }
    let told = |own: &[String], others: &[String]| {
        let only: Vec<String> = own.iter().filter(|name| !others.contains(name)).map(|name| format!("{name:?}")).collect();
        let more = if only.len() > SOURCES_NAMED { format!(" and {} more", only.len() - SOURCES_NAMED) } else { String::new() };
        let only = only[..only.len().min(SOURCES_NAMED)].join(", ");
        let sources = if own.len() == 1 { "1 source".to_owned() } else { format!("{} sources", own.len()) };
        if only.is_empty() { sources } else { format!("{sources}, with {only}{more}") }
    };
    let (expected, found) = (told(expected, there), told(there, expected));
    Err(DataError::Other { file, field: "sources".into(), expected, found })
}

/// Refuses a record, in `file`, that says something else than is expected.
pub(crate) fn same(expected: &impl Serialize, there: &impl Serialize, file: String) -> Result<(), DataError> {
    fn json(record: &impl Serialize) -> serde_json::Value {
        serde_json::to_value(record).unwrap_or_default()
    }
    match difference("", &json(expected), &json(there)) {
        None => Ok(()),
        Some((field, expected, found)) => Err(DataError::Other { file, field, expected, found }),
    }
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
