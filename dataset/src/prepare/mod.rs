//! From sources to a prepared data set, as units of work: look into the sources and plan; prepare every part; find duplicates, and
//! prepare the parts that hold some again without them; finish.
//!
//! Each step can be repeated, and be cut off anywhere: what stands is skipped, and the bytes that come out are those of one calm run.

mod duplicates;
mod judge;
mod originals;
mod part;
mod resolve;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use ella_store::{Meta, Store};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt, stream};
use half::f16;
use tokio::sync::OnceCell;

use crate::error::DataError;
use crate::manifest::{LatentSpec, MANIFEST, Manifest, ShardEntry, at, read};
use crate::plan::{PLAN, Part, Plan, SHARDS, UNITS, UnitRecord, publish, same_sources, unit_key, write_report};
use crate::report::{Refusal, Report};
use crate::settings::{CAPTION_FIELDS, Settings};
use crate::source::{Piece, Source};
use crate::tree::{TREES, file_of};
use judge::Judge;
pub use judge::{KeyList, TokenCounter};
pub use originals::originals;
use resolve::{LeftOut, LeftOuts};

/// Records read at once.
const READ_AT_ONCE: usize = 32;

/// Turns pictures into VAE moments. Implemented where the networks are.
pub trait LatentEncoder: Send + Sync {
    /// Which network this is, and the shape of what it makes.
    fn spec(&self) -> LatentSpec;
    /// Pictures encoded at once; a part's last batch may have fewer.
    fn batch(&self) -> usize;
    /// Encodes `count` pictures of one width and height: 8-bit RGB `[count, height, width, 3]` to moments `[count, channels, h, w]`.
    fn encode(&self, rgb: &[u8], count: usize, size: (u32, u32)) -> Result<Vec<f16>, Box<dyn std::error::Error + Send + Sync>>;
}

/// Is told what became of a unit's samples so far.
pub type UnitWatch = Box<dyn Fn(&Report) + Send>;

/// What works on samples, beside the settings.
#[derive(Clone, Default)]
pub struct PrepareOptions {
    /// Threads that decode and encode pictures; 0: one for every core.
    pub threads: usize,
    /// Makes latents.
    pub latents: Option<Arc<dyn LatentEncoder>>,
    /// Counts tokens, where the settings bound them.
    pub tokens: Option<Arc<dyn TokenCounter>>,
    /// The keys that alone are kept.
    pub allow: Option<Arc<KeyList>>,
    /// The keys that are not kept.
    pub deny: Option<Arc<KeyList>>,
}

impl PrepareOptions {
    fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        }
    }
}

impl fmt::Debug for PrepareOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let latents = self.latents.as_ref().map(|encoder| encoder.spec());
        f.debug_struct("PrepareOptions").field("threads", &self.threads).field("latents", &latents).finish_non_exhaustive()
    }
}

/// What is left to do, as found when planning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToDo {
    /// Parts to prepare.
    pub parts: Vec<usize>,
    /// Parts that are prepared, of sources that look newer than they were then: their bytes must be the same still.
    pub check: Vec<usize>,
}

/// A data set that is being prepared. Its methods are the steps, each a unit of work that may be done anywhere.
#[derive(Debug)]
pub struct Preparation {
    sources: Vec<Source>,
    settings: Settings,
    options: PrepareOptions,
    out: Store,
    plan: OnceCell<Plan>,
    left_out: OnceCell<LeftOuts>,
}

impl Preparation {
    /// A preparation of sources into a folder. The options must be those that the settings name.
    pub fn new(sources: Vec<Source>, settings: Settings, options: PrepareOptions, out: Store) -> Result<Preparation, DataError> {
        let digests = [
            (
                "caption_tokens.tokenizer",
                settings.filters.caption_tokens.as_ref().map(|r| r.tokenizer),
                options.tokens.as_ref().map(|t| t.digest()),
            ),
            ("allow", settings.filters.allow, options.allow.as_ref().and_then(|list| list.digest())),
            ("deny", settings.filters.deny, options.deny.as_ref().and_then(|list| list.digest())),
        ];
        if let Some((field, expected, found)) = digests.into_iter().find(|(_, expected, found)| expected != found) {
            let found = format!("expected {expected:?}, found {found:?}");
            return Err(DataError::Setting { field, rule: "what the data set was planned with", found });
        }
        let sources = sources.into_iter().map(|source| source.with(settings.within())).collect();
        Ok(Preparation { sources, settings, options, out, plan: OnceCell::new(), left_out: OnceCell::new() })
    }

    /// Looks into the sources, makes the destination this data set's own, and finds what is left to do.
    pub fn plan(&self) -> BoxFuture<'_, Result<ToDo, DataError>> {
        Box::pin(async move {
            let latents = self.options.latents.as_ref().map(|encoder| encoder.spec());
            let plan = Plan::new(&self.settings, latents, &self.sources).await?;
            if read(&self.out, PLAN).await?.is_none() {
                self.refuse_alike(&plan).await?;
            }
            plan.claim(&self.out).await?;
            let plan = self.plan.get_or_init(|| async { plan }).await;
            let (shards, records) = (self.out.list(SHARDS).await?, &self.out.list(UNITS).await?);
            let whole = |shard: &ShardEntry| listed(&shards, &shard.name).is_some_and(|meta| meta.bytes == shard.bytes);
            let left_out = self.read_left_out().await?.unwrap_or_default();
            // Once a data set is whole, first attempts at parts with duplicates are not needed, and gone.
            let finished = read(&self.out, MANIFEST).await?.is_some();
            let parts = &plan.parts().collect::<Vec<_>>();
            let looks = stream::iter(0..parts.len()).map(|index| async move {
                let unit = self.unit(plan, index, &parts[index], &[])?;
                let record = if listed(records, &unit_key(&unit)).is_some() { UnitRecord::load(&unit, &self.out).await? } else { None };
                Ok((index, record))
            });
            let mut looks = looks.buffered(READ_AT_ONCE);
            let mut todo = ToDo::default();
            while let Some((index, first)) = looks.try_next().await.map_err(|e: DataError| e)? {
                let part = &parts[index];
                let Some(first) = first else {
                    self.refuse_changed(index, part, records).await?;
                    todo.parts.push(index);
                    continue;
                };
                let replaced = finished && left_out.parts.contains_key(&index);
                if !replaced && !first.shards.iter().all(whole) {
                    todo.parts.push(index);
                } else if self.source(part)?.stamp() != first.stamp.as_deref() {
                    todo.check.push(index);
                }
            }
            Ok(todo)
        })
    }

    /// Prepares a part, unless it is done.
    pub fn part(&self, index: usize, watch: UnitWatch) -> BoxFuture<'_, Result<UnitRecord, DataError>> {
        Box::pin(async move { self.prepare_part(index, &[], watch).await })
    }

    /// Prepares a part without its duplicates, unless that is done.
    pub fn again(&self, index: usize, watch: UnitWatch) -> BoxFuture<'_, Result<UnitRecord, DataError>> {
        Box::pin(async move {
            let left_out = self.left_outs().await?.parts.get(&index).map_or(&[][..], Vec::as_slice);
            self.prepare_part(index, left_out, watch).await
        })
    }

    /// All parts: to [`check`](Self::check) each, whatever its source looks like.
    pub async fn parts(&self) -> Result<std::ops::Range<usize>, DataError> {
        Ok(0..self.planned().await?.parts().count())
    }

    /// Reads a part's source again, and the pictures that its rows name: they must be those that were prepared. Of a source that only looks
    /// newer, its new look is noted.
    pub fn check(&self, index: usize) -> BoxFuture<'_, Result<(), DataError>> {
        Box::pin(async move {
            let plan = self.planned().await?;
            let part = part_of(plan, index)?;
            let source = self.source(&part)?.clone();
            let Some(record) = self.record(index, &part, &[]).await? else { return Ok(()) };
            originals::check(&self.out, plan, (index, &part), &source, record).await
        })
    }

    /// Writes `report.json` and, last, `manifest.json`; then deletes what earlier attempts left.
    pub fn finish(&self) -> BoxFuture<'_, Result<Report, DataError>> {
        Box::pin(async move {
            let plan = self.planned().await?;
            let left_out = self.left_outs().await?;
            let parts = &plan.parts().collect::<Vec<_>>();
            let records = stream::iter(0..parts.len());
            let records = records.map(|index| async move { self.done(index, &parts[index], &left_out.keys(index)).await });
            let mut records = records.buffered(READ_AT_ONCE);
            let (mut report, mut sources, mut shards) = (Report::default(), Vec::new(), Vec::new());
            while let Some(record) = records.try_next().await? {
                sources.push(record.source);
                shards.extend(record.shards);
                report.merge(record.report);
            }
            if report.kept == 0 {
                write_report(&self.out, &report).await?;
                // All parts are done, and loosened filters are another plan.
                Plan::withdraw(&self.out).await?;
                return Err(self.nothing_kept(plan, &report).await);
            }
            let manifest = Manifest::new(Some(plan.settings.clone()), plan.latents.clone(), sources, shards);
            publish(&self.out, &manifest, &report).await?;
            self.delete_leftovers(&manifest).await?;
            Ok(report)
        })
    }

    /// Why nothing was kept: what refused the samples or, where none had any of the fields that hold captions, just that. Parts of few
    /// samples do not conclude it by themselves.
    async fn nothing_kept(&self, plan: &Plan, report: &Report) -> DataError {
        let nothing = DataError::NothingKept { read: report.read, refused: report.refused_line() };
        let without = report.counts().find(|(why, _)| **why == Refusal::CaptionMissing).map_or(0, |(_, count)| count);
        let named = self.settings.captions.iter().map(|column| column.field.clone()).collect::<Option<Vec<_>>>();
        let named = named.map_or_else(|| CAPTION_FIELDS.join(", "), |named| named.join(", "));
        let first = plan.parts().next().and_then(|part| Some((self.source(&part).ok()?.clone(), part)));
        let (Some((source, part)), true) = (first, without == report.read) else { return nothing };
        let (source_name, piece) = (source.name().to_owned(), piece_of(&source, &part));
        let found = tokio::task::spawn_blocking(move || part::fields_of(source, &piece)).await;
        match found {
            Ok(Ok(found)) if !found.is_empty() => DataError::CaptionField { source_name, fields: named, found },
            _ => nothing,
        }
    }

    /// Deletes shards that no manifest names, of attempts at sources that were replaced and of parts that were prepared again; and what
    /// killed writers left half-written.
    async fn delete_leftovers(&self, manifest: &Manifest) -> Result<(), DataError> {
        let trees = format!("{TREES}/{SHARDS}");
        for folder in ["", SHARDS, UNITS, &trees] {
            self.out.sweep(folder).await?;
        }
        let named: BTreeSet<&str> = manifest.shards.iter().map(|shard| shard.name.as_str()).collect();
        let there = [self.out.list(SHARDS).await?, self.out.list(&trees).await?].concat();
        let left = there.iter().filter(|meta| !named.contains(file_of(&meta.key).unwrap_or(&meta.key)));
        for meta in left {
            self.out.delete(&meta.key).await?;
        }
        Ok(())
    }

    async fn prepare_part(&self, index: usize, left_out: &[LeftOut], watch: UnitWatch) -> Result<UnitRecord, DataError> {
        let plan = self.planned().await?;
        let part = part_of(plan, index)?;
        let source = self.source(&part)?;
        let keys: Vec<String> = left_out.iter().map(|left| left.key.clone()).collect();
        let there = self.record(index, &part, &keys).await?;
        if let Some(record) = &there
            && self.is_whole(record).await?
        {
            return Ok(record.clone());
        }
        let left_out: HashMap<_, _> = left_out.iter().map(|left| (left.key.clone(), left.why.clone())).collect();
        let judge = Judge::new(&plan.settings, plan.key_prefix(&part), &self.options, left_out);
        let unit = self.unit(plan, index, &part, &keys)?;
        let work = part::Work { plan, unit, source, piece: piece_of(source, &part), judge, there };
        part::run(work, &self.out, &self.options, watch).await
    }

    /// Whether a record's shards are there, by name and size. One that was lost is made again: its bytes are given by its input.
    async fn is_whole(&self, record: &UnitRecord) -> Result<bool, DataError> {
        for shard in &record.shards {
            if self.out.head(&shard.name).await?.is_none_or(|meta| meta.bytes != shard.bytes) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn planned(&self) -> Result<&Plan, DataError> {
        let load = || async {
            let hint = "run `ella prepare` again";
            let plan = Plan::load(&self.out).await?;
            plan.ok_or(DataError::RecordMissing { file: at(&self.out, PLAN), hint })
        };
        let plan = self.plan.get_or_try_init(load).await?;
        let given: Vec<String> = self.sources.iter().map(|source| source.file_name().to_owned()).collect();
        let there: Vec<String> = plan.sources.iter().map(|source| source.name.clone()).collect();
        same_sources(&given, &there, at(&self.out, PLAN))?;
        Ok(plan)
    }

    fn source(&self, part: &Part<'_>) -> Result<&Source, DataError> {
        let missing = || DataError::SourceMissing { source_name: format!("source {} of the plan", part.source) };
        self.sources.get(part.source).ok_or_else(missing)
    }

    async fn record(&self, index: usize, part: &Part<'_>, left_out: &[String]) -> Result<Option<UnitRecord>, DataError> {
        let plan = self.planned().await?;
        UnitRecord::load(&self.unit(plan, index, part, left_out)?, &self.out).await
    }

    /// The name of a part's files, if these keys are left out of it.
    fn unit(&self, plan: &Plan, index: usize, part: &Part<'_>, left_out: &[String]) -> Result<String, DataError> {
        Ok(plan.unit(index, part, self.source(part)?.bytes(), left_out))
    }

    /// The record of a part that must be done.
    async fn done(&self, index: usize, part: &Part<'_>, left_out: &[String]) -> Result<UnitRecord, DataError> {
        let record = self.record(index, part, left_out).await?;
        let hint = "this source is not prepared yet: run `ella prepare` again";
        record.ok_or(DataError::RecordMissing { file: at(&self.out, &format!("{UNITS}/{index:05}-….json")), hint })
    }

    /// A part that was prepared from a source of another size is another part, and its name tells.
    async fn refuse_changed(&self, index: usize, part: &Part<'_>, records: &[Meta]) -> Result<(), DataError> {
        let source = self.source(part)?;
        match of_another(index, records, &self.out).await? {
            None => Ok(()),
            Some(expected) => Err(DataError::SourceReplaced { source_name: source.name().to_owned(), expected, found: source.bytes() }),
        }
    }
}

/// The size that a part's source had, if it was prepared from another one: a record of other input has another name.
async fn of_another(index: usize, records: &[Meta], out: &Store) -> Result<Option<u64>, DataError> {
    let own = format!("{UNITS}/{index:05}-");
    let after = records.partition_point(|meta| meta.key < own);
    let Some(other) = records.get(after).filter(|meta| meta.key.starts_with(&own)) else { return Ok(None) };
    let other = other.key.trim_start_matches(UNITS).trim_matches('/').trim_end_matches(".json");
    Ok(Some(UnitRecord::load(other, out).await?.map_or(0, |record| record.source.bytes)))
}

/// An object of a sorted list.
fn listed<'a>(list: &'a [Meta], key: &str) -> Option<&'a Meta> {
    list.binary_search_by(|meta| meta.key.as_str().cmp(key)).ok().map(|at| &list[at])
}

fn part_of(plan: &Plan, index: usize) -> Result<Part<'_>, DataError> {
    let missing = || DataError::SourceMissing { source_name: format!("part {index} of the plan") };
    plan.parts().nth(index).ok_or_else(missing)
}

fn piece_of(source: &Source, part: &Part<'_>) -> Piece {
    part.piece.cloned().unwrap_or_else(|| Piece { rows: 0..0, bytes: 0..source.bytes() })
}

/// Prepares sources into a data set, here, one part after another. Finished parts are skipped, so that the same call after an
/// interruption goes on, and makes the same bytes. Must run in a tokio runtime.
pub fn prepare<'a>(
    sources: &'a [Source],
    out: &'a Store,
    settings: &'a Settings,
    options: &'a PrepareOptions,
) -> BoxFuture<'a, Result<Report, DataError>> {
    Box::pin(async move {
        let preparation = Preparation::new(sources.to_vec(), settings.clone(), options.clone(), out.clone())?;
        let quiet = || -> UnitWatch { Box::new(|_| {}) };
        let todo = preparation.plan().await?;
        for part in todo.check {
            preparation.check(part).await?;
        }
        for part in todo.parts {
            preparation.part(part, quiet()).await?;
        }
        for part in preparation.resolve().await? {
            preparation.again(part, quiet()).await?;
        }
        preparation.finish().await
    })
}
