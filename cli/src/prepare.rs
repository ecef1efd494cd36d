//! `ella prepare`: sources to a prepared data set.

use std::sync::{Mutex, PoisonError};

use clap::Args;
use ella_dataset::{Damage, MOST_NAMED, Manifest, Plan, REPORT, Report, Source, SourceOptions, originals};
use ella_proto::config::{Config, Device as Choice, JobConfig, JobKind, JobTable};
use ella_store::Store;
use ella_worker::models;
use ella_worker::prepare::{CONFIG, PrepareSettings};

use crate::embed::Device;
use crate::jobs::{Ran, Who};
use crate::ui::{DONE, Fail, Meter, NO_RETRY, Out, count, note};

#[derive(Debug, Args)]
pub(crate) struct Prepare {
    #[command(flatten)]
    settings: PrepareSettings,
    /// Where the data set goes: a path or URL
    #[arg(long, value_name = "DST", required_unless_present = "coordinator", default_value = "", hide_default_value = true)]
    out: String,
    /// Where latents are computed
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    #[command(flatten)]
    who: Who,
}

impl Prepare {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let table = JobTable::new(JobKind::Prepare, self.out.clone());
        let config = JobConfig::new(table, &self.settings)?;
        if !self.who.is_joined() {
            Store::open(&self.out)?;
            self.settings.check()?;
            self.settings.check_used()?;
        }
        if !self.who.is_elsewhere() {
            // Whoever does the work on this machine finds the models there.
            for (option, model) in [("--tokenizer", &self.settings.tokenizer), ("--latents", &self.settings.latents)] {
                model.as_ref().map(|model| models::locate(option, model)).transpose()?;
            }
        }
        let ran = self.who.run(&config, self.device.into()).or_else(|fail| self.failed(fail, &config))?;
        if self.who.is_elsewhere() || ran.code != DONE {
            return Ok(self.who.conclude(&ran, &config, out));
        }
        let store = Store::open(&self.out)?;
        let report = read_report(&store)?;
        out.result(&report, || table_of(&report, store.url()));
        Ok(DONE)
    }

    /// What failed for good before anything was made does not bind the destination to what was asked for.
    fn failed(&self, fail: Fail, config: &JobConfig) -> Result<Ran, Fail> {
        if fail.code == NO_RETRY && !self.who.is_elsewhere() {
            let store = Store::open(&self.out)?;
            let withdrawn = crate::runtime()?.block_on(async {
                // Written once the plan is there: of another's destination it is another.
                match store.get(CONFIG).await {
                    Ok(there) if there == config.to_toml() => Plan::withdraw(&store).await,
                    _ => Ok(()),
                }
            });
            if let Err(error) = withdrawn {
                note(error);
            }
        }
        Err(fail)
    }
}

/// The config that a data set was prepared by, its sources being elsewhere now if any are given.
fn told(data: &str, sources: &[String]) -> Result<(JobTable, PrepareSettings), Fail> {
    let store = Store::open(data)?;
    let there = crate::runtime()?.block_on(async {
        match store.head(CONFIG).await? {
            Some(_) => store.get(CONFIG).await.map(Some),
            None => Ok(None),
        }
    })?;
    let missing = || Fail::lasting(format_args!("{data}/{CONFIG}: not found; run the same `ella prepare` again: it writes it"));
    let Some(there) = there else {
        let manifest = crate::runtime()?.block_on(Manifest::load(&store));
        return Err(if manifest.is_ok_and(|manifest| manifest.settings.is_none()) { of_captions(data) } else { missing() });
    };
    let text = String::from_utf8_lossy(&there).into_owned();
    let Config::Job(config) = Config::parse(&text, &format!("{data}/{CONFIG}"), &[])? else { return Err(missing()) };
    let mut settings = config.settings(&PrepareSettings::full())?;
    if !sources.is_empty() {
        settings.sources = sources.to_vec();
    }
    Ok((JobTable { data: data.to_owned(), ..config.job }, settings))
}

/// A data set of captions alone has nothing that `ella prepare` made.
fn of_captions(data: &str) -> Fail {
    Fail::lasting(format_args!(
        "{data}: made by `ella embed` from a folder of .txt files: it has no originals to compare, and no sources to make shards anew from; to \
         replace a damaged shard delete it and run the same `ella embed` again"
    ))
}

/// The same, where all sources that are given must be those that were prepared.
fn told_of_all(data: &str, sources: &[String]) -> Result<(JobTable, PrepareSettings), Fail> {
    let (table, settings) = told(data, sources)?;
    if !sources.is_empty() {
        crate::runtime()?.block_on(same_names(&Store::open(data)?, &settings))?;
    }
    Ok((table, settings))
}

fn options_of(settings: &PrepareSettings) -> SourceOptions {
    SourceOptions { image_column: settings.image_column.clone(), key_column: settings.key_column.clone() }
}

/// A source may be moved, but is known by its name: another one is another source.
async fn same_names(store: &Store, settings: &PrepareSettings) -> Result<(), Fail> {
    let given = Source::find_all(&settings.sources, &options_of(settings)).await?;
    let there = Plan::load(store).await?.map(|plan| plan.sources).unwrap_or_default();
    if given.len() != there.len() {
        let (was, now) = (count(there.len(), "source"), given.len());
        return Err(Fail::usage(format_args!(
            "--source: the data set was prepared from {was}, in their order (found {now}); give all of them"
        )));
    }
    match given.iter().zip(&there).find(|(given, there)| given.file_name() != there.name) {
        None => Ok(()),
        Some((given, there)) => Err(Fail::usage(format_args!(
            "--source {}: the data set was prepared from {:?} in its place; a source may be moved, but must have the name that it had",
            given.name(),
            there.name
        ))),
    }
}

/// Whether these are a data set's sources, by their names.
pub(crate) fn find_again(data: &str, sources: &[String]) -> Result<(), Fail> {
    told_of_all(data, sources).map(drop)
}

/// Whether a data set could be prepared again: sources of the same sizes, lists of keys and models are there.
pub(crate) fn ready_again(data: &str, sources: &[String]) -> Result<(), Fail> {
    let (table, settings) = told_of_all(data, sources)?;
    let (runtime, models) = (crate::runtime()?, settings.load(Choice::Auto)?);
    runtime.block_on(async {
        settings.preparation(&table.data, models).await?.plan().await?;
        Ok(())
    })
}

/// Reads all sources of a data set again, and the pictures that lists name. Gives those that are not what was prepared.
pub(crate) fn changed(data: &str, sources: &[String]) -> Result<Vec<Damage>, Fail> {
    let (_, settings) = told(data, sources)?;
    let store = Store::open(data)?;
    let meter = Mutex::new(Meter::new("sources", 0));
    let watch = |done: usize, parts: usize| {
        let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
        meter.of(parts as u64);
        meter.at(done as u64, "parts");
    };
    crate::runtime()?.block_on(async {
        let (found, gone) = Source::find_there(&settings.sources, &options_of(&settings)).await?;
        Ok(originals(&store, found, gone, &watch).await?)
    })
}

/// Prepares a data set again as it was told then, its sources being elsewhere now if any are given.
pub(crate) fn again(data: &str, sources: &[String]) -> Result<(), Fail> {
    let (table, settings) = told_of_all(data, sources)?;
    let config = JobConfig::new(table, &settings)?;
    match Who::here().run(&config, Choice::Auto)?.code {
        DONE => Ok(()),
        code => Err(Fail { code, message: format!("{data}: was not repaired to the end") }),
    }
}

fn read_report(store: &Store) -> Result<Report, Fail> {
    let bytes = crate::runtime()?.block_on(store.get(REPORT))?;
    serde_json::from_slice(&bytes).map_err(|error| Fail::lasting(format_args!("{}/{REPORT}: {error}", store.url())))
}

/// Counts by reason, and where the whole list is.
pub(crate) fn table_of(report: &Report, url: &str) -> String {
    let mut text = format!("{:>8}  read\n{:>8}  kept\n{:>8}  refused\n", report.read, report.kept, report.read - report.kept);
    for (why, count) in report.counts() {
        text += &format!("{count:>8}    {why}\n");
    }
    if !report.refused_unnamed.is_empty() {
        text += &format!("the first {MOST_NAMED} refused keys of each reason: {url}/{REPORT}; all of them: {url}/units\n");
    } else if !report.refused.is_empty() {
        text += &format!("every refused key with its reason: {url}/{REPORT}\n");
    }
    text + &format!("data set: {url}")
}
