//! Reading a run's folder: its config, its log, its metrics. For the commands that look at runs; none of them changes one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use ella_proto::config::RunConfig;
use ella_proto::samples::{self, Index};
use ella_store::{LogError, Record, RunLog, RunState, Store, StoreError};
use futures::{StreamExt, stream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ui::{Fail, count, note};

/// The effective config's name in a run folder.
pub(crate) const RUN_TOML: &str = "run.toml";
/// Where `ella train` writes its coordinator's address, in a run folder of this machine, for as long as it runs.
pub(crate) const ADDRESS: &str = "logs/coordinator.address";
/// Files that are read at the same time: a run that went on for days has tens of thousands.
const READS: usize = 32;

/// A run folder, which is surely one.
#[derive(Debug)]
pub(crate) struct RunFolder {
    pub(crate) store: Store,
    /// The run's effective config.
    pub(crate) config: RunConfig,
    /// Lines that are none, by file (KNOWN).
    damaged: Mutex<BTreeMap<String, usize>>,
}

/// Opens what is to be a run's folder.
pub(crate) fn store(url: &str) -> Result<Store, Fail> {
    Store::open(url).map_err(|error| {
        let fail = Fail::from(error);
        // Its config, most likely.
        let hint = if Path::new(url).is_file() { "; of a run, give the folder that its config names as `run.output`" } else { "" };
        Fail { message: fail.message + hint, ..fail }
    })
}

impl RunFolder {
    /// Opens a run folder by path or URL.
    pub(crate) async fn open(url: &str) -> Result<Self, Fail> {
        let store = store(url)?;
        let bytes = match store.get(RUN_TOML).await {
            Err(StoreError::NotFound { .. }) => {
                let hint = "this is no run folder: give what `run.output` names in the run's config";
                return Err(Fail::lasting(format_args!("{}/{RUN_TOML}: not found; {hint}", store.url())));
            }
            // A coordinator's address, most likely.
            Err(error) if url.starts_with("http") => {
                let hint = "this reads a run's folder: give what `run.output` names in the run's config";
                let fail = Fail::from(error);
                return Err(Fail { message: format!("{}; {hint}", fail.message), ..fail });
            }
            read => read?,
        };
        let origin = format!("{}/{RUN_TOML}", store.url());
        let text =
            String::from_utf8(bytes.to_vec()).map_err(|_| Fail::lasting(format_args!("{origin}: is not UTF-8; restore it from a copy")))?;
        let config = RunConfig::parse(&text, &origin, &[])
            .map_err(|error| Fail::lasting(format_args!("{error}; restore {RUN_TOML} from a copy")))?;
        Ok(Self::new(store, config))
    }

    pub(crate) fn new(store: Store, config: RunConfig) -> Self {
        Self { store, config, damaged: Mutex::default() }
    }

    /// The log, checked as [`RunLog::read`] does.
    pub(crate) async fn records(&self) -> Result<Vec<Record>, LogError> {
        RunLog::read(&self.store).await
    }

    /// What the log says.
    pub(crate) async fn state(&self) -> Result<RunState, Fail> {
        Ok(RunState::from_records(&self.records().await?))
    }

    /// The steps that were measured, in order. A step that was computed again after a resume is there once, as it was last, and one that a
    /// resume has undone is not there.
    pub(crate) async fn metrics(&self) -> Result<Vec<Metric>, Fail> {
        let lines = self.lines("metrics").await?;
        Ok(that_count(lines, &resumed(&self.events().await?)))
    }

    /// What happened, each with the term that wrote it.
    pub(crate) async fn events(&self) -> Result<Vec<(u64, Value)>, Fail> {
        self.lines("events").await
    }

    /// The steps whose samples are all there, in order.
    pub(crate) async fn sampled_steps(&self) -> Result<Vec<u64>, Fail> {
        let files = self.store.list(samples::FOLDER).await?;
        let indices = files.iter().filter_map(|file| file.key.strip_suffix(samples::INDEX)?.strip_suffix('/'));
        Ok(indices.filter_map(samples::step_of).collect())
    }

    /// What the index of a step's samples says.
    pub(crate) async fn samples(&self, step: u64) -> Result<Index, Fail> {
        let key = format!("{}/{}", samples::folder(step), samples::INDEX);
        let wrong =
            |error| Fail::lasting(format_args!("{}/{key}: {error}; delete the folder, and its step is not shown", self.store.url()));
        serde_json::from_slice(&self.store.get(&key).await?).map_err(wrong)
    }

    /// The lines of the files in one of the run's folders, in order, each with the term that wrote it. They are for people, so one that cannot be
    /// read, as at the end of a file that was cut off, is told of, counted and passed over.
    pub(crate) async fn lines<T: DeserializeOwned>(&self, folder: &str) -> Result<Vec<(u64, T)>, Fail> {
        let files = self.store.list(folder).await?.into_iter().map(|file| file.key);
        let files = files.filter_map(|key| Some((key.strip_prefix(folder).and_then(term_of)?, key)));
        let read = |(term, key): (u64, String)| async move { (term, self.store.get(&key).await, key) };
        let mut read = stream::iter(files).map(read).buffered(READS);
        let mut lines = Vec::new();
        while let Some((term, text, key)) = read.next().await {
            let text = text?;
            let (mut damaged, mut first) = (0, None);
            for (number, line) in text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
                match serde_json::from_slice(line) {
                    Ok(line) => lines.push((term, line)),
                    Err(error) => {
                        damaged += 1;
                        first.get_or_insert((number + 1, error));
                    }
                }
            }
            if let Some((number, error)) = first {
                self.passed_over(&key, damaged, &format!("line {number}: {error}"));
            }
        }
        Ok(lines)
    }

    /// Tells of a file's damaged lines, once however often it is read.
    fn passed_over(&self, key: &str, lines: usize, first: &str) {
        let before = self.damaged.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned(), lines);
        if before != Some(lines) {
            let (url, lines) = (self.store.url(), count(lines, "damaged line"));
            note(format_args!(
                "WARNING: {url}/{key}: {lines} passed over ({first}); the file was cut or changed, or another version of ella wrote it"
            ));
        }
    }

    /// Lines that could not be read, of all that was read so far.
    pub(crate) fn damaged_lines(&self) -> usize {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }
}

/// What was skipped, refused and found damaged, and what reading came to, by name, as far as a run's folder holds it (KNOWN): by its metrics
/// and its events.
pub(crate) fn counts(metrics: &[Metric], events: &[(u64, Value)]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    let skipped = metrics.iter().flat_map(|metric| &metric.skipped).map(|(reason, n)| (format!("skipped_{reason}"), *n));
    let read = metrics.iter().flat_map(|metric| &metric.read).map(|(name, n)| (name.clone(), *n));
    let told = events.iter().filter_map(|(_, event)| match event["event"].as_str()? {
        "refused" => Some("workers_refused"),
        // The first of each address in an hour.
        "stranger" => Some("strangers_told_of"),
        "damaged" => Some("commits_damaged"),
        _ => None,
    });
    for (name, n) in skipped.chain(read).chain(told.map(|name| (name.to_owned(), 1))) {
        *counts.entry(name).or_default() += n;
    }
    counts
}

/// From which steps coordinators went on, each with its term. That at which the last one ended is such a step too, unless another has gone on.
fn resumed(events: &[(u64, Value)]) -> Vec<(u64, u64)> {
    let (mut resumed, mut ended) = (Vec::new(), None);
    for (term, event) in events {
        match event["event"].as_str() {
            Some("generation") => {
                resumed.extend(event["from_step"].as_u64().map(|step| (*term, step)));
                ended = None;
            }
            Some("adopted") => ended = None,
            Some("ended") => ended = event["step"].as_u64().map(|step| (*term, step)),
            _ => {}
        }
    }
    resumed.extend(ended);
    resumed
}

/// What was measured without what was undone. Lines are in the order of their terms; in a term, those of steps that nobody had listened to
/// may come after later ones.
fn that_count(lines: Vec<(u64, Metric)>, resumed: &[(u64, u64)]) -> Vec<Metric> {
    let bound = |term: u64| resumed.iter().filter(|(of, _)| *of > term).map(|(_, step)| *step).min().unwrap_or(u64::MAX);
    let mut steps = BTreeMap::<u64, Metric>::new();
    let mut newest = (0, bound(0));
    for (term, metric) in lines {
        if term != newest.0 {
            newest = (term, bound(term));
        }
        if metric.step > newest.1 {
            continue;
        }
        // What an earlier term, or this one before it went back, has measured from here on is undone.
        let mut later = steps.split_off(&metric.step);
        if later.get(&metric.step).is_none_or(|before| before.term != term) {
            later.retain(|_, other| other.term == term);
            steps.append(&mut later);
        }
        steps.insert(metric.step, Metric { term, ..metric });
    }
    steps.into_values().collect()
}

/// Samples trained on so far: exactly up to the newest commit (its ledger's), and as measured after it.
pub(crate) fn samples(state: &RunState, metrics: &[Metric]) -> u64 {
    let (step, counted) = state.last_commit().map_or((0, 0), |c| (c.step, c.samples()));
    counted + metrics.iter().filter(|metric| metric.step > step).map(|metric| metric.samples).sum::<u64>()
}

/// How often the membership changed, and for whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Membership {
    pub(crate) generations: usize,
    /// Workers that were lost.
    pub(crate) lost: usize,
    /// Workers that came while the run went on.
    pub(crate) joined: usize,
    /// Steps that waited much longer than usual for a rank.
    pub(crate) stragglers: usize,
}

impl Membership {
    /// By the run's events.
    pub(crate) fn of(events: &[(u64, Value)]) -> Self {
        let mut sums = Self::default();
        let mut before: Option<(u64, BTreeSet<&str>)> = None;
        for (term, event) in events {
            match event["event"].as_str() {
                Some("lost") => sums.lost += 1,
                Some("straggler") => sums.stragglers += 1,
                // An adopted generation goes on: it is none of its own.
                Some(name @ ("generation" | "adopted")) => {
                    sums.generations += usize::from(name == "generation");
                    let workers = event["workers"].as_array().map(|workers| workers.iter().filter_map(Value::as_str).collect());
                    // Those that a coordinator begins with have not joined.
                    if let (Some((of, before)), Some(workers)) = (&before, &workers)
                        && of == term
                    {
                        sums.joined += BTreeSet::difference(workers, before).count();
                    }
                    before = workers.map(|workers| (*term, workers));
                }
                _ => {}
            }
        }
        sums
    }
}

impl fmt::Display for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generations, lost, joined, stragglers } = *self;
        write!(f, "{}, {} lost, {joined} joined", count(generations, "generation"), count(lost, "worker"))?;
        if stragglers > 0 { write!(f, ", {} waited for", count(stragglers, "straggler")) } else { Ok(()) }
    }
}

/// The term in a name like `/000003-000001.jsonl`. Names of later terms sort later.
fn term_of(name: &str) -> Option<u64> {
    name.strip_prefix('/')?.strip_suffix(".jsonl")?.split_once('-')?.0.parse().ok()
}

/// One step, as the coordinator kept it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(crate) struct Metric {
    /// Of the coordinator that wrote it.
    #[serde(skip)]
    pub(crate) term: u64,
    pub(crate) at_unix_ms: u64,
    pub(crate) step: u64,
    /// Of this step.
    pub(crate) samples: u64,
    /// `null` stands for a number that is not finite.
    pub(crate) loss: Option<f64>,
    #[serde(default)]
    pub(crate) held_out_loss: Option<f64>,
    #[serde(default)]
    pub(crate) grad_norm: Option<f64>,
    #[serde(default)]
    pub(crate) lr: Option<f64>,
    #[serde(default)]
    pub(crate) step_seconds: f64,
    #[serde(default)]
    pub(crate) parts: Option<Parts>,
    /// Since the step before, by reason (KNOWN).
    #[serde(default)]
    pub(crate) skipped: BTreeMap<String, u64>,
    /// What reading the data set through caches came to since the step before, by name (KNOWN).
    #[serde(default)]
    pub(crate) read: BTreeMap<String, u64>,
}

/// Seconds of one step, by what they were spent on.
pub(crate) type Parts = BTreeMap<String, f64>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_of_a_resumed_run_are_those_that_count() {
        let dir = tempfile::tempdir().unwrap();
        let config = RunConfig::parse("[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n", "x", &[]).unwrap();
        let line = |step: u64, loss: f64| {
            format!("{{\"at_unix_ms\":1,\"step\":{step},\"samples\":{step},\"loss\":{loss},\"lr\":0.1,\"parts\":null}}\n")
        };
        let metrics = crate::runtime().unwrap().block_on(async {
            let store = Store::open(dir.path().to_str().unwrap()).unwrap();
            store.put(RUN_TOML, config.to_toml().into()).await.unwrap();
            store.put("metrics/000001-000001.jsonl", (line(1, 5.0) + &line(2, 4.0) + &line(3, 3.0)).into()).await.unwrap();
            store.put("metrics/000002-000001.jsonl", (line(3, 2.0) + &line(4, 1.0)).into()).await.unwrap();
            RunFolder::open(dir.path().to_str().unwrap()).await.unwrap().metrics().await.unwrap()
        });
        let seen: Vec<_> = metrics.iter().map(|m| (m.term, m.step, m.loss.unwrap())).collect();
        assert_eq!(seen, [(1, 1, 5.0), (1, 2, 4.0), (2, 3, 2.0), (2, 4, 1.0)]);
    }

    #[test]
    fn many_files_are_read_at_the_same_time_and_kept_in_order() {
        use ella_store::{Operation, faulty};
        use std::time::Duration;
        crate::runtime().unwrap().block_on(async {
            let store = Store::in_memory();
            for file in 1..=100 {
                store.put(&format!("events/000001-{file:06}.jsonl"), format!("{file}\n").into()).await.unwrap();
            }
            let faults = faulty::Faults::new();
            let run = RunFolder::new(faults.inject(&store), config());
            faults.push(Operation::Get, "000001-000001", faulty::Failure::Slow(Duration::from_millis(100)), 1);
            let lines: Vec<(u64, u64)> = run.lines("events").await.unwrap();
            assert_eq!(lines, (1..=100).map(|line| (1, line)).collect::<Vec<_>>());
            faults.push(Operation::Get, "000001-000001", faulty::Failure::Hang, 1);
            let before = faults.seen().len();
            let reading = tokio::time::timeout(Duration::from_millis(100), run.lines::<u64>("events")).await;
            let asked = faults.seen().split_off(before).into_iter().filter(|(operation, _)| *operation == Operation::Get).count();
            assert_eq!((reading.is_err(), asked), (true, READS), "whatever becomes of the first");
        });
    }

    #[test]
    fn steps_that_a_resume_undid_do_not_count() {
        let lines = |terms: &[(u64, std::ops::RangeInclusive<u64>)]| -> Vec<(u64, Metric)> {
            let lines = terms.iter().flat_map(|(term, steps)| steps.clone().map(move |step| (*term, step)));
            lines.map(|(term, step)| (term, Metric { step, ..Metric::default() })).collect()
        };
        let seen = |lines, resumed: &[(u64, u64)]| -> Vec<(u64, u64)> {
            that_count(lines, resumed).iter().map(|metric| (metric.term, metric.step)).collect()
        };
        let all = |term: u64, steps: std::ops::RangeInclusive<u64>| steps.map(move |step| (term, step)).collect::<Vec<_>>();
        // Killed at step 155 without a commit, resumed, and stopped at step 22.
        assert_eq!(seen(lines(&[(1, 1..=155), (2, 1..=22)]), &[]), all(2, 1..=22));
        // Resumed from a commit of step 100, and nothing was measured yet.
        assert_eq!(seen(lines(&[(1, 1..=155)]), &[(1, 0), (2, 100)]), all(1, 1..=100));
        // In one term: the others went on from a commit; and another coordinator was told late of what it had missed.
        assert_eq!(seen(lines(&[(1, 1..=9), (1, 5..=6)]), &[(1, 0), (1, 4)]), all(1, 1..=6));
        assert_eq!(seen(lines(&[(1, 1..=4), (2, 7..=9), (2, 5..=6)]), &[]), [all(1, 1..=4), all(2, 5..=9)].concat());
    }

    #[test]
    fn a_coordinator_that_ended_is_the_last_word_unless_another_goes_on() {
        let event = |term: u64, text: &str| (term, serde_json::from_str::<Value>(text).unwrap());
        let mut events = vec![
            event(1, r#"{"event":"generation","workers":[],"from_step":0}"#),
            event(2, r#"{"event":"ended","outcome":"preempted","step":4}"#),
        ];
        assert_eq!(resumed(&events), [(1, 0), (2, 4)]);
        events.push(event(3, r#"{"event":"adopted","workers":[],"step":9}"#));
        assert_eq!(resumed(&events), [(1, 0)]);
    }

    #[test]
    fn workers_join_a_run_that_goes_on() {
        let event = |term: u64, text: &str| (term, serde_json::from_str::<Value>(text).unwrap());
        let events = [
            event(1, r#"{"event":"generation","generation":1,"workers":["a","b"],"from_step":0}"#),
            event(1, r#"{"event":"lost","worker":"b","rank":1,"why":"gone"}"#),
            event(1, r#"{"event":"generation","generation":2,"workers":["a"],"from_step":7}"#),
            event(1, r#"{"event":"generation","generation":3,"workers":["a","c"],"from_step":9}"#),
            event(2, r#"{"event":"adopted","generation":3,"workers":["a","c"],"step":12}"#),
            event(2, r#"{"event":"straggler","worker":"c","rank":1,"activity":"compute","waited_ms":900}"#),
            event(2, r#"{"event":"generation","generation":4,"workers":["a","c","d"],"from_step":14}"#),
            event(3, r#"{"event":"generation","generation":1,"workers":["e","f"],"from_step":20}"#),
        ];
        let sums = Membership::of(&events);
        assert_eq!(sums, Membership { generations: 5, lost: 1, joined: 2, stragglers: 1 });
        assert_eq!(sums.to_string(), "5 generations, 1 worker lost, 2 joined, 1 straggler waited for");
    }

    #[test]
    fn whoever_gives_a_config_is_told_to_give_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(RUN_TOML);
        std::fs::write(&file, "").unwrap();
        let fail = store(file.to_str().unwrap()).unwrap_err();
        assert!(fail.message.ends_with("give the folder that its config names as `run.output`"), "{}", fail.message);
    }

    fn config() -> RunConfig {
        RunConfig::parse("[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n", "x", &[]).unwrap()
    }

    #[test]
    fn damaged_lines_are_counted_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        crate::runtime().unwrap().block_on(async {
            let store = Store::open(dir.path().to_str().unwrap()).unwrap();
            let line = |step: u64| format!("{{\"at_unix_ms\":1,\"step\":{step},\"samples\":4,\"loss\":1.0}}\n");
            store.put("metrics/000001-000001.jsonl", (line(1) + &line(2) + "{\"at_unix_ms\":1,\"st").into()).await.unwrap();
            store.put("events/000001-000001.jsonl", "{\"event\":\"lost\"}\n{\"eve".into()).await.unwrap();
            let run = RunFolder::new(store, config());
            for _ in 0..2 {
                assert_eq!(run.metrics().await.unwrap().iter().map(|metric| metric.step).collect::<Vec<_>>(), [1, 2]);
                assert_eq!((run.events().await.unwrap().len(), run.damaged_lines()), (1, 2));
            }
        });
    }

    #[test]
    fn what_a_folder_holds_of_skips_refusals_and_reads_is_summed() {
        let metric = |skipped: u64| Metric {
            skipped: [("nonfinite".to_owned(), skipped)].into(),
            read: [("cache_hits".to_owned(), 10)].into(),
            ..Metric::default()
        };
        let events = ["refused", "refused", "damaged", "lost", "stranger"].map(|name| (1, serde_json::json!({"event": name})));
        let counts: Vec<(String, u64)> = counts(&[metric(2), metric(3)], &events).into_iter().collect();
        let expected =
            [("cache_hits", 20), ("commits_damaged", 1), ("skipped_nonfinite", 5), ("strangers_told_of", 1), ("workers_refused", 2)];
        assert_eq!(counts, expected.map(|(name, n)| (name.to_owned(), n)));
    }
}
