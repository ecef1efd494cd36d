//! What must hold of a run's records, and of the data set that they speak of. Nothing here reads a file.

use ella_dataset::ledger::{KeyHash, Tally};
use ella_dataset::order::{BucketOrder, SampleRef};
use ella_proto::config::RunConfig;
use ella_store::{Body, Commit, Digest, Outcome, Record, RunState};

use super::{Epoch, Verdict};

/// Every commit that the log ever named, given up or not, in the log's order; but for those that were given up for what came before them, because
/// they were damaged.
#[derive(Debug)]
pub(super) struct History {
    pub(super) state: RunState,
    pub(super) commits: Vec<Commit>,
    pub(super) terms: usize,
    /// Commits that were damaged.
    pub(super) damaged: usize,
}

impl History {
    pub(super) fn of(records: &[Record]) -> Self {
        let (mut commits, mut terms, mut damaged) = (Vec::<Commit>::new(), 0, 0);
        for record in records {
            match &record.body {
                Body::Commit(commit) => commits.push(commit.clone()),
                // The keep rule gives up old ones only.
                Body::Retire { commits: given_up } => {
                    while commits.last().is_some_and(|newest| given_up.contains(&newest.folder)) {
                        commits.pop();
                        damaged += 1;
                    }
                }
                Body::Term(_) => terms += 1,
                Body::End { .. } => {}
            }
        }
        Self { state: RunState::from_records(records), commits, terms, damaged }
    }
}

/// What is wrong with the records among themselves, and beside the config in the run's folder.
pub(super) fn log_problems(history: &History, config: &RunConfig) -> Vec<String> {
    let Some(last) = history.commits.last() else {
        if history.damaged > 0 {
            return vec!["every commit was given up, the newest too: the run can't be resumed".to_owned()];
        }
        return vec!["the log names no commit, so there is nothing to prove; train to the first one".to_owned()];
    };
    let mut problems = Vec::new();
    if let Some(ended) = history.state.ended.as_ref().filter(|ended| ended.outcome == Outcome::Done && ended.step != last.step) {
        problems.push(format!("the log says that the run was done at step {}, but its last commit is of step {}", ended.step, last.step));
    }
    let digest = config.digest();
    for commit in history.commits.iter().filter(|commit| commit.config_digest.to_string() != digest) {
        let found = commit.config_digest;
        problems.push(format!("{}: trained under another config than run.toml's (expected digest {digest}, found {found})", commit.folder));
    }
    for pair in history.commits.windows(2) {
        if pair[0].models_digest != pair[1].models_digest {
            let (folder, expected, found) = (&pair[1].folder, pair[0].models_digest, pair[1].models_digest);
            problems
                .push(format!("{folder}: trained through other frozen models than the commit before (expected {expected}, found {found})"));
        }
        problems.extend(step_back(&pair[0], &pair[1]));
    }
    problems
}

/// A later commit holds what an earlier one does, and more.
fn step_back(earlier: &Commit, later: &Commit) -> Option<String> {
    if later.step <= earlier.step {
        return Some(format!("{}: comes after the commit of step {} in the log (expected a later step)", later.folder, earlier.step));
    }
    // Between the epochs that either lists nothing changes.
    let listed = earlier.ledger.iter().chain(&later.ledger).map(|entry| entry.epoch);
    let samples = |commit: &Commit, epoch| commit.of_epoch(epoch).map_or(0, |used| used.samples);
    let both = |epoch| (epoch, samples(earlier, epoch), samples(later, epoch));
    let (epoch, had, found) = listed.map(both).find(|(_, had, found)| found < had)?;
    let folder = &later.folder;
    Some(format!("{folder}: its ledger has {found} samples of epoch {epoch}, fewer than the {had} of step {}'s", earlier.step))
}

/// What the data set says must have been used.
#[derive(Debug)]
pub(super) struct Expected {
    order: BucketOrder,
    keys: Vec<KeyHash>,
    whole: Tally,
    data: Digest,
}

impl Expected {
    /// `keys` of all samples, in the manifest's order.
    pub(super) fn new(order: BucketOrder, keys: Vec<KeyHash>, data: Digest) -> Self {
        let mut whole = Tally::default();
        keys.iter().for_each(|key| whole.add(*key));
        Self { order, keys, whole, data }
    }

    /// Adds what the steps `from..to` of an epoch use (ORDER).
    fn add_steps(&self, tally: &mut Tally, epoch: u64, steps: std::ops::Range<u64>) {
        let first = epoch * self.order.steps_per_epoch();
        let samples = steps.flat_map(|step| samples_of(&self.order, first + step));
        samples.filter_map(|sample| self.keys.get(sample.index as usize)).for_each(|key| tally.add(*key));
    }
}

/// A step's samples, of all lanes.
fn samples_of(order: &BucketOrder, step: u64) -> impl Iterator<Item = SampleRef> {
    (0..order.config().lanes).flat_map(move |lane| order.lane(step, lane))
}

/// The epoch that is under way: what its first steps use. Commits come in the order of their steps, so no step is walked twice.
#[derive(Debug, Default)]
struct Partial {
    epoch: u64,
    steps: u64,
    tally: Tally,
}

impl Partial {
    fn advance(&mut self, expected: &Expected, epoch: u64, steps: u64) -> Tally {
        if epoch != self.epoch || steps < self.steps {
            *self = Self { epoch, ..Self::default() };
        }
        expected.add_steps(&mut self.tally, epoch, self.steps..steps);
        self.steps = steps;
        self.tally
    }
}

/// Holds every commit's ledger against the data set, given-up commits' too, and keeps the newest one's epochs (ONCE).
pub(super) fn ledgers(expected: &Expected, commits: &[Commit], verdict: &mut Verdict) {
    let mut partial = Partial::default();
    for commit in commits {
        if commit.data_digest != expected.data {
            let (data, found) = (expected.data, commit.data_digest);
            verdict
                .problems
                .push(format!("{}: trained on another data set (expected manifest digest {data}, found {found})", commit.folder));
            continue;
        }
        let position = expected.order.position(commit.step);
        if (commit.epoch, commit.step_in_epoch) != (position.epoch, position.step_in_epoch) {
            let (epoch, step) = (position.epoch, position.step_in_epoch);
            let found = format!("epoch {}, step {}", commit.epoch, commit.step_in_epoch);
            verdict
                .problems
                .push(format!("{}: its data position is wrong (expected epoch {epoch}, step {step}, found {found})", commit.folder));
        }
        let due = partial.advance(expected, position.epoch, position.step_in_epoch);
        let epochs = epochs(expected, commit, position.epoch, due);
        for epoch in epochs.iter().filter(|epoch| !epoch.exact) {
            let Epoch { epoch, samples, expected, .. } = epoch;
            let what = if samples == expected { "samples that are not those that were due" } else { "samples" };
            verdict.problems.push(format!("{}: its ledger of epoch {epoch} has {samples} {what} (expected {expected})", commit.folder));
        }
        verdict.epochs = epochs;
    }
}

/// Each epoch of a commit's ledger beside what was due: all of the finished ones, `due` of epoch `current`, nothing of later ones.
fn epochs(expected: &Expected, commit: &Commit, current: u64, due: Tally) -> Vec<Epoch> {
    let found = |epoch: u64| {
        let entry = commit.of_epoch(epoch)?;
        Some(Tally { samples: entry.samples, hash: u128::from_str_radix(&entry.hash, 16).ok()? })
    };
    let last = commit.ledger.iter().map(|entry| entry.epoch).max().unwrap_or_default();
    let verdict = |epoch: u64| {
        let finished = epoch < current;
        let wanted = if finished {
            expected.whole
        } else if epoch == current {
            due
        } else {
            Tally::default()
        };
        let used = found(epoch).unwrap_or_default();
        Epoch { epoch, samples: used.samples, expected: wanted.samples, finished, exact: used == wanted }
    };
    // An entry far beyond any epoch that can be due would make a list without end.
    let listed = (0..=current).chain((last > current).then_some(last));
    listed.map(verdict).filter(|epoch| epoch.expected > 0 || epoch.samples > 0).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ella_dataset::order::OrderConfig;
    use ella_store::{LedgerEpoch, Part, RunLog, Store, Term};

    use super::super::check_files;
    use super::*;
    use crate::run::RunFolder;

    const CONFIG: OrderConfig = OrderConfig { seed: 3, lanes: 2, micro_batch: 2, window: 2 };

    fn order() -> BucketOrder {
        BucketOrder::new(CONFIG, &[((), 10), ((), 7), ((), 6)]).unwrap()
    }

    fn keys() -> Vec<KeyHash> {
        (0..23).map(|n| KeyHash::of(&format!("key {n}"))).collect()
    }

    fn expected() -> Expected {
        Expected::new(order(), keys(), Digest::of(b"data"))
    }

    fn config() -> RunConfig {
        RunConfig::parse("[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n", "x", &[]).unwrap()
    }

    /// The commit that a faithful run makes at `step`.
    fn commit(step: u64) -> Commit {
        commit_of(&order(), step)
    }

    fn commit_of(order: &BucketOrder, step: u64) -> Commit {
        let keys = keys();
        let mut tallies = BTreeMap::<u64, Tally>::new();
        for s in 0..step {
            for sample in samples_of(order, s) {
                tallies.entry(order.position(s).epoch).or_default().add(keys[sample.index as usize]);
            }
        }
        let position = order.position(step);
        Commit {
            step,
            generation: 1,
            world: 1,
            folder: ella_store::commit_folder(step, 1, 1),
            parts: vec![Part { name: "connector.safetensors".into(), bytes: 1, blake3: Digest::of(b"x") }],
            config_digest: config().digest().parse().unwrap(),
            data_digest: Digest::of(b"data"),
            models_digest: Digest::of(b"models"),
            epoch: position.epoch,
            step_in_epoch: position.step_in_epoch,
            ledger: tallies
                .into_iter()
                .map(|(epoch, tally)| LedgerEpoch { epoch, samples: tally.samples, hash: format!("{:032x}", tally.hash) })
                .collect(),
            state_digest: Digest::of(b"state"),
            computed_with: Default::default(),
        }
    }

    #[test]
    fn a_commit_that_is_given_up_while_files_are_read_is_no_problem() {
        let dir = tempfile::tempdir().unwrap();
        let verdict = crate::runtime().unwrap().block_on(async {
            let run = RunFolder::new(Store::open(dir.path().to_str().unwrap()).unwrap(), config());
            let term = Term { host: "h".into(), version: "1".into(), config_digest: Digest::of(b"") };
            let (mut log, _) = RunLog::claim(&run.store, term, "n", 1).await.unwrap();
            let commits = [commit(1), commit(2)];
            for commit in &commits {
                log.append(Body::Commit(commit.clone()), 2).await.unwrap();
            }
            let before = run.state().await.unwrap();
            log.append(Body::Retire { commits: vec![commits[0].folder.clone()] }, 3).await.unwrap();
            let mut verdict = Verdict::default();
            check_files(&run, &before, &mut verdict).await;
            verdict
        });
        let judged: Vec<_> = verdict.commits.iter().map(|commit| (commit.step, commit.whole)).collect();
        assert_eq!((judged, verdict.retired), (vec![(2, false)], 1));
        assert!(verdict.problems.iter().all(|problem| problem.contains("000000000002")), "{:?}", verdict.problems);
    }

    fn judged(commits: &[Commit]) -> Verdict {
        let mut verdict = Verdict::default();
        ledgers(&expected(), commits, &mut verdict);
        verdict
    }

    fn history(commits: &[Commit]) -> History {
        let record = |seq: u64, body| Record { seq, term: 1, nonce: "n".into(), at_unix_ms: 0, body };
        let term = Term { host: "h".into(), version: "1".into(), config_digest: Digest::of(b"c") };
        let bodies = commits.iter().cloned().map(Body::Commit);
        let records: Vec<_> = std::iter::once(Body::Term(term)).chain(bodies).enumerate().map(|(n, body)| record(n as u64, body)).collect();
        History::of(&records)
    }

    #[test]
    fn a_faithful_run_is_exact_in_every_epoch_and_at_every_commit() {
        // 23 samples in two lanes of two: six steps an epoch, the last one short.
        let commits: Vec<_> = [2, 5, 6, 7, 14].map(commit).to_vec();
        let verdict = judged(&commits);
        assert_eq!(verdict.problems, Vec::<String>::new());
        let epochs: Vec<_> = verdict.epochs.iter().map(|e| (e.samples, e.expected, e.finished, e.exact)).collect();
        assert_eq!(epochs, [(23, 23, true, true), (23, 23, true, true), (8, 8, false, true)]);
        assert!(log_problems(&history(&commits), &config()).is_empty());
    }

    /// Pictures of two sizes: 13 and 10 samples make four and three steps, where 23 of one size make six.
    #[test]
    fn every_size_has_steps_of_its_own() {
        let order = || BucketOrder::new(CONFIG, &[('a', 10), ('b', 7), ('a', 3), ('b', 3)]).unwrap();
        let commits: Vec<_> = [3, 7, 16].map(|step| commit_of(&order(), step)).to_vec();
        let mut verdict = Verdict::default();
        ledgers(&Expected::new(order(), keys(), Digest::of(b"data")), &commits, &mut verdict);
        assert_eq!(verdict.problems, Vec::<String>::new());
        let finished: Vec<_> = verdict.epochs.iter().map(|e| (e.samples, e.finished)).collect();
        assert_eq!(finished[..2], [(23, true), (23, true)]);
        assert!(finished.len() == 3 && !finished[2].1 && verdict.epochs[2].exact);
        assert!(!judged(&commits).problems.is_empty(), "as one size it would be another order");
    }

    #[test]
    fn a_commit_at_an_epochs_end_has_no_partial_epoch() {
        let verdict = judged(&[commit(12)]);
        assert!(verdict.problems.is_empty());
        assert_eq!(verdict.epochs.len(), 2);
    }

    /// As workers tell it: of epochs that are alike the first.
    #[test]
    fn an_epoch_that_is_not_listed_counts_as_the_one_before_it() {
        let mut commits = [commit(14), commit(15)];
        commits.iter_mut().for_each(|commit| drop(commit.ledger.remove(1)));
        let verdict = judged(&commits);
        assert_eq!(verdict.problems, Vec::<String>::new());
        assert!(verdict.epochs.len() == 3 && verdict.epochs.iter().all(|epoch| epoch.exact));
        assert!(log_problems(&history(&commits), &config()).is_empty());
    }

    #[test]
    fn any_edit_of_a_ledger_is_found() {
        type Edit = fn(&mut Commit);
        let edits: [(&str, Edit); 6] = [
            ("a sample more", |c| c.ledger[0].samples += 1),
            ("another hash", |c| c.ledger[0].hash = c.ledger[0].hash.chars().rev().collect()),
            ("an epoch left out", |c| drop(c.ledger.remove(0))),
            ("an epoch too many", |c| c.ledger.push(LedgerEpoch { epoch: 1 << 60, samples: 1, hash: "0".repeat(32) })),
            ("another position", |c| c.step_in_epoch += 1),
            ("another data set", |c| c.data_digest = Digest::of(b"other")),
        ];
        for (what, edit) in edits {
            let mut edited = commit(8);
            edit(&mut edited);
            let verdict = judged(&[edited]);
            assert_eq!(verdict.problems.len(), 1, "{what}: {:?}", verdict.problems);
            assert!(verdict.problems[0].contains("000000000008.1"), "{what}: {:?}", verdict.problems);
        }
    }

    #[test]
    fn swapping_one_sample_for_another_keeps_the_count_and_is_found() {
        let mut swapped = commit(8);
        let (used, other) = (KeyHash::of("key 0"), KeyHash::of("key 1"));
        let hash = u128::from_str_radix(&swapped.ledger[0].hash, 16).unwrap().wrapping_sub(used.0).wrapping_add(other.0);
        swapped.ledger[0].hash = format!("{hash:032x}");
        let verdict = judged(&[swapped]);
        assert!(verdict.problems[0].contains("not those that were due"), "{:?}", verdict.problems);
        assert!(!verdict.epochs[0].exact);
    }

    #[test]
    fn an_error_in_a_given_up_commit_is_found_though_later_ones_are_right() {
        let mut early = commit(3);
        early.ledger[0].samples -= 1;
        let verdict = judged(&[early, commit(9)]);
        assert_eq!(verdict.problems.len(), 1);
        assert!(verdict.epochs.iter().all(|epoch| epoch.exact));
    }

    #[test]
    fn records_that_contradict_each_other_are_named() {
        assert!(log_problems(&history(&[]), &config())[0].contains("no commit"));
        let back = log_problems(&history(&[commit(8), commit(3)]), &config());
        assert!(back[0].contains("after the commit of step 8"), "{back:?}");
        let mut shrunk = commit(9);
        shrunk.ledger[0].samples = 1;
        let shrunk = log_problems(&history(&[commit(8), shrunk]), &config());
        assert!(shrunk[0].contains("fewer than the 23"), "{shrunk:?}");
        let mut other = commit(8);
        other.config_digest = Digest::of(b"other");
        let other = log_problems(&history(&[other]), &config());
        assert!(other[0].contains("another config"), "{other:?}");
        let mut models = commit(9);
        models.models_digest = Digest::of(b"other");
        let models = log_problems(&history(&[commit(8), models]), &config());
        assert!(models[0].contains("other frozen models"), "{models:?}");
        let mut early_end = history(&[commit(8)]);
        early_end.state.ended = Some(ella_store::Ended { term: 1, outcome: Outcome::Done, step: 9, reason: String::new(), at_unix_ms: 0 });
        assert!(log_problems(&early_end, &config())[0].contains("done at step 9"));
    }
}
