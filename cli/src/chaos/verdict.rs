//! What became of a run under faults, held against what must hold (design.md §1). Here files are read; nothing is started.

use std::collections::BTreeMap;
use std::path::Path;

use ella_proto::config::RunConfig;
use ella_store::commit::parse_folder;
use ella_store::{Body, Commit, Record as Entry, RunLog, RunState, Store};
use serde::Serialize;
use serde_json::Value;

use super::trial::{End, Outcome, Record};
use crate::audit;
use crate::run::{Metric, RunFolder};
use crate::ui::Fail;

/// A worker that went so long before its coordinator did, or so long after, in milliseconds, need not be told of by either: the next coordinator
/// never knew it. Half an orphan's timeout longer, in which workers do not notice that a coordinator hangs.
const UNSEEN: u64 = 6_000;
/// A worker may end so long before its coordinator has written that the run has failed.
const LAST_WORDS: u64 = 1_000;

/// Whether one thing that must hold did.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Invariant {
    pub(super) holds: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) problems: Vec<String>,
}

/// What became of one seed.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Verdict {
    pub(super) seed: u64,
    pub(super) ok: bool,
    /// `done`, `failed` or `stuck`.
    pub(super) outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) why: Option<String>,
    pub(super) invariants: BTreeMap<&'static str, Invariant>,
    pub(super) steps: u64,
    pub(super) seconds: f64,
    /// By kind.
    pub(super) faults: BTreeMap<&'static str, usize>,
    /// The run was over before them.
    pub(super) faults_left: usize,
    pub(super) generations: usize,
    pub(super) regroups: usize,
    pub(super) adoptions: usize,
    /// Workers that were lost, as their coordinators tell it.
    pub(super) losses: usize,
    pub(super) terms: usize,
    pub(super) commits: usize,
    pub(super) store_retries: usize,
    pub(super) longest_stall_ms: u64,
    /// How processes ended, and how many did so.
    pub(super) exits: BTreeMap<String, usize>,
    /// Ends that no fault asked for.
    pub(super) unasked: Vec<String>,
    /// What was done, and when.
    pub(super) told: Vec<String>,
    pub(super) logs: String,
    pub(super) replay: String,
}

/// What a run without faults came to.
#[derive(Clone, Debug)]
pub(super) struct Calm {
    pub(super) commit: Commit,
}

impl Calm {
    /// The newest commit of a run that is complete at `config`'s steps; none if it is not.
    pub(super) async fn of(config: &RunConfig) -> Result<Option<Self>, Fail> {
        let Ok(run) = RunFolder::open(&config.run.output).await else { return Ok(None) };
        let state = run.state().await?;
        let last = state.last_commit().filter(|commit| state.is_done() && commit.step == config.train.steps);
        Ok(last.map(|commit| Self { commit: commit.clone() }))
    }
}

/// What is known of a run before it is judged.
#[derive(Debug)]
pub(super) struct Tried<'a> {
    pub(super) seed: u64,
    pub(super) config: &'a RunConfig,
    pub(super) record: Record,
    /// The folder of its processes' logs.
    pub(super) logs: &'a Path,
    pub(super) stall_ms: u64,
    pub(super) replay: String,
}

/// Something that a coordinator told, in the run's folder or in its own log.
#[derive(Debug)]
struct Events {
    kept: Vec<Value>,
    logged: Vec<Value>,
}

impl Events {
    async fn read(run: Option<&RunFolder>, logs: &Path) -> Self {
        let kept = match run {
            Some(run) => run.lines("events").await.unwrap_or_default().into_iter().map(|(_, event)| event).collect(),
            None => Vec::new(),
        };
        let logged =
            lines(logs, "coordinator").filter_map(|line| serde_json::from_str(line.get(line.find("{\"event\"")?..)?).ok()).collect();
        Self { kept, logged }
    }

    fn count(&self, name: &str) -> usize {
        self.logged.iter().filter(|event| event["event"] == name).count()
    }
}

/// The lines of all logs whose names begin so.
fn lines(folder: &Path, name: &str) -> impl Iterator<Item = String> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mine = |path: &std::path::PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name));
    let mut files: Vec<_> = files.filter(mine).collect();
    files.sort();
    let text = files.into_iter().map(|path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned());
    text.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
}

/// Judges it.
pub(super) async fn judge(tried: Tried<'_>, calm: &Calm) -> Result<Verdict, Fail> {
    let Tried { seed, config, record, logs, stall_ms, replay } = tried;
    let store = Store::open(&config.run.output)?;
    let run = RunFolder::open(&config.run.output).await.ok();
    let records = RunLog::read(&store).await;
    let known = records.as_ref().map_or(&[][..], Vec::as_slice);
    let state = RunState::from_records(known);
    let events = Events::read(run.as_ref(), logs).await;
    let terms = known.iter().filter(|record| matches!(record.body, Body::Term(_))).count();
    let commits = known.iter().filter(|record| matches!(record.body, Body::Commit(_))).count();
    let audit = audit::judge(&config.run.output, None).await;
    let paces = Paces::read(run.as_ref(), &record).await;

    let mut invariants = BTreeMap::new();
    let mut says = |name, problems: Vec<String>| invariants.insert(name, Invariant { holds: problems.is_empty(), problems });
    says("SAME", same(state.last_commit(), calm, config.train.steps));
    match &audit {
        Ok(audit) => {
            let (files, others): (Vec<_>, Vec<_>) = audit.problems.iter().cloned().partition(|problem| problem.contains(store.url()));
            says("ONCE", others);
            let strays = strays(&store, &state, known).await?;
            says("COMMIT", files.into_iter().chain(strays).collect());
        }
        Err(fail) => {
            says("ONCE", vec![fail.message.clone()]);
            says("COMMIT", vec![fail.message.clone()]);
        }
    }
    says("TERM", records.as_ref().err().map(ToString::to_string).into_iter().chain(too_few_terms(terms, record.served)).collect());
    says("LIVE", live(&record, &paces, stall_ms));
    says("KNOWN", untold(&record, &events, UNSEEN + config.workers.orphan_timeout.0 / 2));

    let (outcome, why) = match &record.outcome {
        Outcome::Done => ("done", None),
        Outcome::Failed(why) => ("failed", Some(why.clone())),
        Outcome::Stuck(why) => ("stuck", Some(why.clone())),
    };
    let ok = outcome == "done" && invariants.values().all(|invariant| invariant.holds);
    let retried = lines(logs, "").filter(|line| line.contains("store call is retried")).count();
    let unasked = record.ends.iter().filter(|end| !end.asked).map(|end| format!("{}: {}", end.name, end.why)).collect();
    Ok(Verdict {
        seed,
        ok,
        outcome,
        why,
        invariants,
        steps: state.last_commit().map_or(0, |commit| commit.step),
        seconds: record.seconds,
        faults: record.faults,
        faults_left: record.left,
        generations: events.count("generation"),
        regroups: events.count("regroup"),
        adoptions: events.count("adopted"),
        losses: events.count("lost"),
        terms,
        commits,
        store_retries: retried,
        longest_stall_ms: paces.longest(),
        exits: record.exits,
        unasked,
        told: record.told,
        logs: logs.display().to_string(),
        replay,
    })
}

fn commit_of(body: &Body) -> Option<&Commit> {
    if let Body::Commit(commit) = body { Some(commit) } else { None }
}

/// SAME: the bytes of the last step are those of the run without faults.
fn same(last: Option<&Commit>, calm: &Calm, steps: u64) -> Vec<String> {
    let Some(last) = last.filter(|commit| commit.step == steps) else {
        return vec![format!(
            "there is no commit of step {steps} to compare; the last is of step {}",
            last.map_or(0, |commit| commit.step)
        )];
    };
    let calm = &calm.commit;
    let inputs = [("data set", last.data_digest, calm.data_digest), ("models", last.models_digest, calm.models_digest)];
    if let Some((what, ..)) = inputs.iter().find(|(_, found, expected)| found != expected) {
        return vec![format!("the {what} changed since the run without faults was trained; delete its folder, and this one's")];
    }
    let digest = |commit: &Commit, name: &str| commit.parts.iter().find(|part| part.name == name).map(|part| part.blake3);
    let other = |part: &&ella_store::Part| digest(last, &part.name) != Some(part.blake3);
    let told = |part: &ella_store::Part| {
        let found = digest(last, &part.name).map_or_else(|| "nothing".to_owned(), |found| found.to_string());
        format!("{}: other bytes than without faults (expected blake3 {}, found {found})", part.name, part.blake3)
    };
    calm.parts.iter().filter(other).map(told).collect()
}

/// COMMIT: folders that no record names, and that the last coordinator found when it began: it should have deleted them. What it saved itself
/// may be a commit that it did not come to; and what a worker of the one before saved after that is for the next to delete.
async fn strays(store: &Store, state: &RunState, records: &[Entry]) -> Result<Vec<String>, Fail> {
    let named: Vec<&str> = records.iter().filter_map(|record| commit_of(&record.body)).map(|commit| commit.folder.as_str()).collect();
    let began = records.iter().filter(|record| matches!(record.body, Body::Term(_))).map(|record| record.at_unix_ms).max();
    let mut strays = Vec::new();
    for folder in store.folders("commits").await? {
        let is_old = parse_folder(&folder).is_none_or(|(_, term)| term < state.term);
        if !is_old || named.contains(&folder.as_str()) || state.retired.contains(&folder) {
            continue;
        }
        let files = store.list(&folder).await?;
        if files.iter().filter_map(|file| file.changed_ms).max() <= began {
            strays.push(format!("{folder}: no record names it, and a later coordinator has not deleted it"));
        }
    }
    Ok(strays)
}

/// TERM: whoever served has begun a term.
fn too_few_terms(terms: usize, served: usize) -> Option<String> {
    (terms < served).then(|| format!("{served} coordinators served, and the log has {terms} terms"))
}

/// When steps were applied, as far as it was seen: milliseconds since 1970, and the step.
#[derive(Debug, Default)]
struct Paces(Vec<(u64, u64)>);

impl Paces {
    /// From what the workers said when, and where that was lost with a coordinator, from when the status first had it.
    async fn read(run: Option<&RunFolder>, record: &Record) -> Self {
        let measured: Vec<(u64, Metric)> = match run {
            Some(run) => run.lines("metrics").await.unwrap_or_default(),
            None => Vec::new(),
        };
        let mut paces: Vec<(u64, u64)> = measured.into_iter().map(|(_, metric)| (metric.at_unix_ms, metric.step)).collect();
        let seen = paces.iter().map(|(_, step)| *step).collect::<std::collections::BTreeSet<_>>();
        paces.extend(record.steps.iter().filter(|(_, step)| !seen.contains(step)));
        paces.sort_unstable();
        Self(paces)
    }

    /// Stretches without a step: from when to when, after which step. Where steps between were not seen, they are taken to have come evenly.
    fn stretches(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        self.0.windows(2).map(|pair| {
            let steps = pair[1].1.saturating_sub(pair[0].1).max(1);
            (pair[0].0, pair[0].0 + (pair[1].0 - pair[0].0) / steps, pair[0].1)
        })
    }

    fn longest(&self) -> u64 {
        self.stretches().map(|(from, to, _)| to - from).max().unwrap_or_default()
    }
}

/// LIVE: training stands still for no longer than is allowed, beyond the times of the faults that fall together with it.
fn live(record: &Record, paces: &Paces, stall_ms: u64) -> Vec<String> {
    let mut problems: Vec<String> = match &record.outcome {
        Outcome::Stuck(why) => vec![why.clone()],
        _ => Vec::new(),
    };
    for (from, to, step) in paces.stretches() {
        let excused: u64 = record.spans.iter().filter(|(begin, end)| *begin < to && *end > from).map(|(begin, end)| end - begin).sum();
        if to - from > stall_ms + excused {
            let (found, allowed) = (to - from, stall_ms + excused);
            problems.push(format!(
                "no step for {found} ms after step {step} (allowed: {allowed} ms, of which the faults' own times {excused})"
            ));
        }
    }
    problems
}

/// KNOWN: workers that went while the run was going on, and that nobody told of.
fn untold(record: &Record, events: &Events, unseen: u64) -> Vec<String> {
    let coordinators: Vec<u64> = record.ends.iter().filter(|end| end.is_coordinator).map(|end| end.at_ms).collect();
    let lost = record.ends.iter().filter(|end| !end.is_coordinator).filter_map(|end| Some((end, record.ids.get(&end.pid)?)));
    let is_told = |(end, id): &(&End, &String)| {
        let names = |event: &Value| {
            matches!(event["event"].as_str(), Some("lost" | "left" | "refused")) && event["worker"].as_str() == Some(id.as_str())
        };
        let without = |event: &Value| {
            let workers = event["workers"].as_array();
            event["at_unix_ms"].as_u64() >= Some(end.at_ms) && workers.is_some_and(|all| all.iter().all(|one| one.as_str() != Some(id)))
        };
        // What becomes of the workers of a run that has failed is told with that.
        let with_the_run = |event: &Value| {
            let at = event["at_unix_ms"].as_u64().unwrap_or_default();
            event["event"] == "ended" && (at.saturating_sub(LAST_WORDS)..at + unseen).contains(&end.at_ms)
        };
        let is_unseen = coordinators.iter().any(|at| at.abs_diff(end.at_ms) <= unseen);
        events.kept.iter().chain(&events.logged).any(names)
            || events.kept.iter().any(with_the_run)
            || is_unseen && events.kept.iter().any(without)
    };
    let told = |(end, id): (&End, &String)| format!("{} ({}, worker {id}) went, and no event tells of it", end.name, end.why);
    lost.filter(|lost| !is_told(lost)).map(told).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record { served: 1, seconds: 1.0, ..Record::new() }
    }

    fn end(pid: u32, at_ms: u64, is_coordinator: bool) -> End {
        End { name: format!("p{pid}"), pid, is_coordinator, asked: true, at_ms, why: "ended by signal 9".into() }
    }

    fn commit(step: u64, part: &[u8]) -> Commit {
        let digest = ella_store::Digest::of(b"x");
        let parts = [("connector.safetensors", part), ("ema.safetensors", b"e"), ("optimizer.safetensors", b"o")];
        let part = |(name, bytes): (&str, &[u8])| ella_store::Part { name: name.into(), bytes: 1, blake3: ella_store::Digest::of(bytes) };
        Commit {
            step,
            generation: 1,
            world: 1,
            folder: ella_store::commit_folder(step, 1, 1),
            parts: parts.map(part).to_vec(),
            config_digest: digest,
            data_digest: digest,
            models_digest: digest,
            epoch: 0,
            step_in_epoch: step,
            ledger: Vec::new(),
            state_digest: digest,
            computed_with: Default::default(),
        }
    }

    #[test]
    fn one_other_byte_is_not_the_same_and_says_in_which_file() {
        let calm = Calm { commit: commit(9, b"good") };
        assert!(same(Some(&commit(9, b"good")), &calm, 9).is_empty());
        let other = same(Some(&commit(9, b"bad")), &calm, 9);
        assert!(other.len() == 1 && other[0].starts_with("connector.safetensors: "), "{other:?}");
        assert!(same(Some(&commit(8, b"good")), &calm, 9)[0].contains("the last is of step 8"));
        assert!(same(None, &calm, 9)[0].contains("no commit of step 9"));
        let changed = Commit { data_digest: ella_store::Digest::of(b"y"), ..commit(9, b"good") };
        assert!(same(Some(&changed), &calm, 9)[0].contains("the data set changed"));
    }

    /// A commit folder of a coordinator that has had a successor must be gone; the last one's may be there.
    #[test]
    fn folders_that_no_record_names_are_strays_if_they_are_old() {
        let dir = tempfile::tempdir().unwrap();
        let found = crate::runtime().unwrap().block_on(async {
            let store = Store::open(dir.path().to_str().unwrap()).unwrap();
            for folder in ["commits/000000000009.1", "commits/000000000007.1-2", "commits/000000000008.2", "commits/x"] {
                store.put(&format!("{folder}/ema.safetensors"), "e".into()).await.unwrap();
            }
            let term = ella_store::Term { host: "h".into(), version: "1".into(), config_digest: ella_store::Digest::of(b"c") };
            let record = |seq, term, at_unix_ms, body| Entry { seq, term, nonce: "n".into(), at_unix_ms, body };
            let log = |second| {
                let first = record(0, 1, 1, Body::Term(term.clone()));
                [first, record(1, 1, 2, Body::Commit(commit(9, b"good"))), record(2, 2, second, Body::Term(term.clone()))]
            };
            let judged = async |records: &[Entry]| strays(&store, &RunState::from_records(records), records).await.unwrap();
            assert_eq!(judged(&log(3)).await, Vec::<String>::new(), "written after the second began");
            judged(&log(u64::MAX)).await
        });
        let named: Vec<&str> = found.iter().filter_map(|told| told.split(':').next()).collect();
        assert_eq!(named, ["commits/000000000007.1-2", "commits/x"]);
    }

    #[test]
    fn a_stall_is_excused_by_the_faults_that_fall_into_it_and_by_no_others() {
        let paces = Paces(vec![(0, 1), (100, 2), (3_100, 3), (3_300, 5)]);
        assert_eq!(paces.longest(), 3_000);
        let mut record = record();
        assert_eq!(live(&record, &paces, 2_000).len(), 1);
        assert!(live(&record, &paces, 3_000).is_empty());
        record.spans.push((3_200, 9_000));
        assert_eq!(live(&record, &paces, 2_000).len(), 1, "it came later");
        record.spans.push((50, 1_100));
        assert!(live(&record, &paces, 2_000).is_empty());
        record.outcome = Outcome::Stuck("no step".into());
        assert_eq!(live(&record, &paces, 2_000), ["no step"]);
    }

    #[test]
    fn who_went_is_told_of_by_name_or_by_the_next_coordinator_that_lacks_it() {
        let mut record = record();
        record.ids = [(7, "a".to_owned()), (8, "b".to_owned())].into();
        record.ends = vec![end(7, 1_000, false), end(8, 2_000, false), end(9, 2_000, false)];
        let lost = serde_json::json!({ "event": "lost", "worker": "a", "at_unix_ms": 1_100 });
        let formed = serde_json::json!({ "event": "generation", "workers": ["a", "c"], "at_unix_ms": 2_500 });
        let mut events = Events { kept: vec![formed], logged: vec![lost] };
        assert_eq!(untold(&record, &events, UNSEEN).len(), 1, "b's coordinator lived");
        record.ends.push(end(1, 2_100, true));
        assert!(untold(&record, &events, UNSEEN).is_empty(), "{:?}", untold(&record, &events, UNSEEN));
        events.logged.clear();
        assert!(untold(&record, &events, UNSEEN)[0].contains("worker a"));
    }
}
