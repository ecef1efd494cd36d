//! How far a data set's folder is, read from what is there: of its preparation, and of every sidecar.
//!
//! Sums are those of the units' records. Of very many, as many as [`MOST_READ`] are read, spread evenly, and the sums are theirs scaled up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ella_store::{Meta, Store};
use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;

use crate::caption_set::{CaptionSpec, captions_in};
use crate::error::DataError;
use crate::features::{FeatureSpec, features_in};
use crate::manifest::{MANIFEST, Manifest, at, parse, read};
use crate::plan::{Plan, REPORT, UNITS, UnitRecord};
use crate::report::Report;
use crate::sidecar::{Counts, FileRecord, Kind, Sidecar};

/// Records that are read of one kind of work.
const MOST_READ: usize = 2000;
/// Records read at once.
const READ_AT_ONCE: usize = 32;
/// The rate is that of units of the last ten minutes, by when their records were written,
const WINDOW_MS: u64 = 600_000;
/// or of so many, if fewer came.
const FEWEST: usize = 8;

/// How far one kind of work is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Progress {
    /// `prepare`, `embed` or `caption`.
    pub kind: &'static str,
    /// Which features or column it is; empty of a preparation.
    pub name: String,
    /// All of it is done and stands in a manifest.
    pub whole: bool,
    /// Parts of the sources, or shards.
    pub units: usize,
    /// Of them, done.
    pub units_done: usize,
    /// Samples of the units that are done, whatever became of them.
    pub samples: u64,
    /// What became of them: `kept`, `refused.<why>`, and more.
    pub counts: Counts,
    /// Bytes of what was written.
    pub bytes: u64,
    /// Of the units that are done, those whose records were read: if not all, samples, counts and bytes are scaled up from them.
    pub units_read: usize,
    /// Units that are done a second over the last ten minutes (or the last eight units); none before the second, and of what is whole.
    pub units_per_second: Option<f64>,
    /// Samples, at that rate.
    pub samples_per_second: Option<f64>,
    /// Until all units are done, at that rate.
    pub seconds_left: Option<f64>,
    /// Since the last unit was done, by the store's clock and this machine's.
    pub idle_seconds: Option<f64>,
}

/// How far all work on a data set's folder is, the preparation first. None: there is no data set, and none was begun. `now_ms`: the time,
/// since 1970.
///
/// # Errors
/// The store's, and records that are damaged.
pub async fn progress(store: &Store, now_ms: u64) -> Result<Option<Vec<Progress>>, DataError> {
    let plan = Plan::load(store).await?;
    let whole = match read(store, MANIFEST).await? {
        Some(_) => Some(Arc::new(Manifest::load(store).await?)),
        None => None,
    };
    let mut found = match (&plan, &whole) {
        (None, None) => return Ok(None),
        (plan, Some(manifest)) => vec![prepared(store, plan.as_ref(), manifest).await?],
        (Some(plan), None) => vec![preparing(store, plan, now_ms).await?],
    };
    let Some(manifest) = whole else { return Ok(Some(found)) };
    for (spec, columns) in features_in(store).await? {
        for column in columns {
            let fingerprint = spec.fingerprint().to_string();
            let (folder, name) = (format!("features/{fingerprint}/{column}"), format!("{} of {column}", &fingerprint[..12]));
            found.extend(sidecar::<FeatureSpec>(store, &folder, &manifest, ("embed", name), now_ms).await?);
        }
    }
    for column in captions_in(store).await? {
        found.extend(sidecar::<CaptionSpec>(store, &format!("captions/{column}"), &manifest, ("caption", column), now_ms).await?);
    }
    Ok(Some(found))
}

/// A data set that is whole: its report counts exactly.
async fn prepared(store: &Store, plan: Option<&Plan>, manifest: &Manifest) -> Result<Progress, DataError> {
    let report: Option<Report> = match read(store, REPORT).await? {
        Some(bytes) => {
            serde_json::from_slice(&bytes).map(Some).map_err(|e| DataError::Record { file: at(store, REPORT), what: e.to_string() })?
        }
        None => None,
    };
    let mut sums = Sums::default();
    match report {
        Some(report) => sums.report(&report),
        None => (sums.samples, sums.counts) = (manifest.samples, Counts::from([("kept".to_owned(), manifest.samples)])),
    }
    sums.bytes = manifest.bytes;
    let units = plan.map_or(manifest.sources.len(), |plan| plan.parts().count());
    Ok(sums.progress(("prepare", String::new()), true, (units, units, units), None))
}

async fn preparing(store: &Store, plan: &Plan, now_ms: u64) -> Result<Progress, DataError> {
    // A part that was prepared from another version of its source has more than one record, and one with duplicates too: the last counts.
    let mut last = BTreeMap::<u64, Meta>::new();
    for meta in store.files(UNITS).await? {
        let number = |name: &str| name.split_once('-')?.0.parse::<u64>().ok();
        let name = meta.key.rsplit('/').next().and_then(|name| name.strip_suffix(".json"));
        let Some(part) = name.and_then(number) else { continue };
        if last.get(&part).is_none_or(|other| other.changed_ms <= meta.changed_ms) {
            last.insert(part, meta);
        }
    }
    let (units, records) = (plan.parts().count(), last.into_values().collect::<Vec<_>>());
    let sums = sums(&records, |meta| async move {
        let record: UnitRecord = parse(&at(store, &meta.key), &store.get_record(&meta.key).await?)?;
        let mut sums = Sums::default();
        sums.report(&record.report);
        sums.bytes = record.shards.iter().map(|shard| shard.bytes).fold(0, u64::saturating_add);
        Ok(sums)
    });
    let pace = Pace::of(&records, units, now_ms);
    let (sums, units_read) = sums.await?;
    Ok(sums.progress(("prepare", String::new()), false, (units, records.len(), units_read), Some(pace)))
}

async fn sidecar<K: Kind>(
    store: &Store,
    folder: &str,
    data: &Arc<Manifest>,
    what: (&'static str, String),
    now_ms: u64,
) -> Result<Option<Progress>, DataError> {
    let Some(spec) = Sidecar::<K>::spec_in(&store.child(folder)).await? else { return Ok(None) };
    let sidecar = Sidecar::new(store, folder, data, spec);
    sidecar.is_begun().await?;
    if let Some(manifest) = sidecar.manifest().await? {
        let files = [manifest.shards, manifest.extra].concat();
        let (bytes, samples) = (files.iter().map(|file| file.bytes).fold(0, u64::saturating_add), data.samples);
        let units = files.len();
        return Ok(Some(Sums { samples, counts: manifest.counts, bytes }.progress(what, true, (units, units, units), None)));
    }
    let (units, records) = sidecar.listed().await?;
    let extra: BTreeSet<String> = K::EXTRA.iter().map(|name| format!("{name}.json")).collect();
    let (folder, extra) = (&sidecar.folder, &extra);
    let sums = sums(&records, |meta| async move {
        let FileRecord { file, counts, .. } = parse(&at(folder, &meta.key), &folder.get(&meta.key).await?)?;
        let samples = if extra.contains(&meta.key) { 0 } else { file.rows };
        Ok(Sums { samples, counts, bytes: file.bytes })
    });
    let pace = Pace::of(&records, units, now_ms);
    let (sums, units_read) = sums.await?;
    Ok(Some(sums.progress(what, false, (units, records.len(), units_read), Some(pace))))
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Sums {
    samples: u64,
    counts: Counts,
    bytes: u64,
}

impl Sums {
    fn report(&mut self, report: &Report) {
        self.samples += report.read;
        *self.counts.entry("kept".to_owned()).or_default() += report.kept;
        for (why, count) in report.counts() {
            *self.counts.entry(format!("refused.{why}")).or_default() += count;
        }
    }

    fn add(mut self, other: Self) -> Self {
        self.samples += other.samples;
        self.bytes += other.bytes;
        for (name, count) in other.counts {
            *self.counts.entry(name).or_default() += count;
        }
        self
    }

    /// As much for `all` units as it is for some.
    fn scaled(self, some: usize, all: usize) -> Self {
        let scale = |n: u64| if some == all { n } else { (n as f64 * all as f64 / some.max(1) as f64).round() as u64 };
        let counts = self.counts.into_iter().map(|(name, count)| (name, scale(count))).collect();
        Sums { samples: scale(self.samples), counts, bytes: scale(self.bytes) }
    }

    /// `units`: all, done, read.
    fn progress(self, what: (&'static str, String), whole: bool, units: (usize, usize, usize), pace: Option<Pace>) -> Progress {
        let ((kind, name), (units, units_done, units_read)) = (what, units);
        let Pace { units_per_second, seconds_left, idle_seconds } = pace.unwrap_or_default();
        let each = self.samples as f64 / units_done.max(1) as f64;
        let samples_per_second = units_per_second.map(|rate| rate * each);
        let Sums { samples, counts, bytes } = self;
        Progress {
            kind,
            name,
            whole,
            units,
            units_done,
            samples,
            counts,
            bytes,
            units_read,
            units_per_second,
            samples_per_second,
            seconds_left,
            idle_seconds,
        }
    }
}

/// The sums of some records, scaled up to all; and how many were read.
async fn sums<'a, F>(records: &'a [Meta], each: impl Fn(&'a Meta) -> F) -> Result<(Sums, usize), DataError>
where
    F: Future<Output = Result<Sums, DataError>>,
{
    let (all, some) = (records.len(), records.len().min(MOST_READ));
    let spread = (0..some).map(|number| &records[number * all / some]);
    let read = stream::iter(spread).map(each).buffer_unordered(READ_AT_ONCE);
    let sums = read.try_fold(Sums::default(), |sums, more| async move { Ok(sums.add(more)) }).await?;
    Ok((sums.scaled(some, all), some))
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pace {
    units_per_second: Option<f64>,
    seconds_left: Option<f64>,
    idle_seconds: Option<f64>,
}

impl Pace {
    /// By when the records were written. The first of those in the window only tells when the time begins.
    fn of(records: &[Meta], units: usize, now_ms: u64) -> Pace {
        let mut times: Vec<u64> = records.iter().filter_map(|meta| meta.changed_ms).collect();
        times.sort_unstable();
        let Some(last) = times.last() else { return Pace::default() };
        let idle_seconds = Some(now_ms.saturating_sub(*last) as f64 / 1e3);
        let recent = times.partition_point(|time| *time < now_ms.saturating_sub(WINDOW_MS));
        let from = recent.min(times.len().saturating_sub(FEWEST));
        let (done, millis) = (times.len() - 1 - from, now_ms.max(*last) - times[from]);
        let units_per_second = (done > 0 && millis > 0).then(|| done as f64 * 1e3 / millis as f64);
        let left = units.saturating_sub(records.len()) as f64;
        Pace { units_per_second, seconds_left: units_per_second.map(|rate| left / rate), idle_seconds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(times: impl IntoIterator<Item = u64>) -> Vec<Meta> {
        let meta = |(at, time): (usize, u64)| Meta { key: format!("{at:05}"), bytes: 1, stamp: None, changed_ms: Some(time) };
        times.into_iter().enumerate().map(meta).collect()
    }

    #[test]
    fn the_rate_is_that_of_the_last_ten_minutes() {
        // One a second for an hour, and two a second in the last ten minutes.
        let slow = (0..3000).map(|second| second * 1000);
        let fast = (0..1200).map(|half| 3_000_000 + half * 500);
        let pace = Pace::of(&records(slow.chain(fast)), 5200, 3_600_000);
        assert!((pace.units_per_second.unwrap() - 2.0).abs() < 0.01, "{pace:?}");
        assert!((pace.seconds_left.unwrap() - 500.0).abs() < 3.0, "{pace:?}");
        assert_eq!(pace.idle_seconds, Some(0.5));
    }

    #[test]
    fn few_units_are_measured_over_the_last_eight_and_one_tells_nothing() {
        let hourly = records((0..20).map(|hour| hour * 3_600_000));
        let pace = Pace::of(&hourly, 30, 19 * 3_600_000);
        assert!((pace.units_per_second.unwrap() - 1.0 / 3600.0).abs() < 1e-9, "{pace:?}");
        assert_eq!(pace.seconds_left.map(f64::round), Some(36_000.0));
        assert_eq!(Pace::of(&hourly[..1], 30, 7_000), Pace { idle_seconds: Some(7.0), ..Pace::default() });
        assert_eq!(Pace::of(&[], 30, 7_000), Pace::default());
        // It falls while nothing comes.
        let later = Pace::of(&hourly, 30, 26 * 3_600_000);
        assert!((later.units_per_second.unwrap() - 0.5 / 3600.0).abs() < 1e-9, "{later:?}");
    }

    #[tokio::test]
    async fn of_very_many_records_some_are_read_and_the_sums_scaled() {
        let all = records(0..10_000);
        let one = |meta: &Meta| {
            let odd = meta.key.ends_with(['1', '3', '5', '7', '9']);
            async move { Ok(Sums { samples: 10, counts: Counts::from([("odd".into(), u64::from(odd))]), bytes: 7 }) }
        };
        let (sums, read) = sums(&all, one).await.unwrap();
        assert_eq!((read, sums.samples, sums.bytes), (MOST_READ, 100_000, 70_000));
        assert_eq!(sums.counts["odd"], 5_000);
        let (few, read) = super::sums(&all[..30], one).await.unwrap();
        assert_eq!((read, few.samples, few.counts["odd"]), (30, 300, 15));
    }
}
