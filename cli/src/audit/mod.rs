//! `ella audit`: proof of ONCE and COMMIT from what lies in a run's folder and its data set.
//!
//! This file reads; [`proof`] judges what was read.

mod proof;

use std::collections::BTreeSet;

use clap::Args;
use ella_dataset::DataSet;
use ella_dataset::ledger::KeyHash;
use ella_dataset::order::BucketOrder;
use ella_proto::config::RunConfig;
use ella_store::{Record, RunState, Store, verify_commit};
use ella_worker::feed::{Captions, order_config};
use ella_worker::train::state::OPTIMIZER_FILE;
use proof::{Expected, History};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::run::RunFolder;
use crate::ui::{DONE, FAILED, Fail, Meter, Out, count};

#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// The run's folder: a path or URL
    run: String,
    /// The data set, if it is no longer where the run's config says
    #[arg(long, value_name = "PATH")]
    data: Option<String>,
}

/// What the audit found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    /// Nothing is wrong.
    pub(crate) ok: bool,
    pub(crate) run: String,
    /// The run's own mark, wherever it lies and however it is named: that of its log's first record.
    pub(crate) id: String,
    /// Of the newest commit.
    pub(crate) step: u64,
    pub(crate) records: usize,
    pub(crate) terms: usize,
    /// Steps up to it that changed nothing (`train.skip_nonfinite`), though their samples count as used.
    #[serde(default)]
    pub(crate) steps_left_out: u64,
    /// What the newest commit's ledger says of each epoch, beside what the data set says.
    pub(crate) epochs: Vec<Epoch>,
    /// Commits that were not given up.
    pub(crate) commits: Vec<CommitVerdict>,
    /// Commits given up by the keep rule; their records are checked, their files are gone.
    pub(crate) retired: usize,
    pub(crate) problems: Vec<String>,
    /// What is no problem, but worth knowing.
    pub(crate) notes: Vec<String>,
}

/// One epoch of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Epoch {
    pub(crate) epoch: u64,
    /// Samples used, by the ledger.
    pub(crate) samples: u64,
    /// Samples that the steps taken must have used.
    pub(crate) expected: u64,
    /// All of the data set was due.
    pub(crate) finished: bool,
    /// Count and multiset hash agree: each sample that was due was used exactly once.
    pub(crate) exact: bool,
}

/// One commit's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CommitVerdict {
    pub(crate) step: u64,
    pub(crate) folder: String,
    pub(crate) bytes: u64,
    /// Every part is there with its size and BLAKE3.
    pub(crate) whole: bool,
}

impl Audit {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let verdict = crate::runtime()?.block_on(judge(&self.run, self.data.as_deref()))?;
        out.result(&verdict, || text(&verdict));
        Ok(if verdict.ok { DONE } else { FAILED })
    }
}

/// Reads all that lies in a run's folder, and its data set's keys, and judges it.
pub(crate) async fn judge(run: &str, data: Option<&str>) -> Result<Verdict, Fail> {
    let run = RunFolder::open(run).await?;
    let mut verdict = Verdict { run: run.store.url().to_owned(), ..Verdict::default() };
    let records = match run.records().await {
        Ok(records) => records,
        Err(error) => {
            verdict.problems.push(error.to_string());
            readable(&run.store).await?
        }
    };
    let history = History::of(&records);
    verdict.id = id(&records);
    verdict.records = records.len();
    verdict.terms = history.terms;
    verdict.retired = history.state.retired.len().saturating_sub(history.damaged);
    if history.damaged > 0 {
        let what = count(history.damaged, "commit");
        verdict.notes.push(format!("{what} turned out to be damaged; the run went on from the one before"));
    }
    verdict.problems.extend(proof::log_problems(&history, &run.config));
    check_files(&run, &history.state, &mut verdict).await;
    leftovers(&run.store, &history, &mut verdict).await?;
    if let Some(last) = history.commits.last() {
        verdict.step = last.step;
        verdict.steps_left_out = left_out(&run.store, &last.folder, last.step).await.unwrap_or_default();
        if verdict.steps_left_out > 0 {
            let (left_out, all) = (verdict.steps_left_out, count(last.step as usize, "step"));
            let why = "their samples count as used, but a loss or gradient was not finite (train.skip_nonfinite); failed/ lists them";
            verdict.notes.push(format!("{left_out} of {all} changed nothing: {why}"));
        }
        let data = data.unwrap_or(&run.config.data.path);
        match expected(data, &run.config).await {
            Err(fail) => verdict
                .problems
                .push(format!("the data set can't be read, so ONCE is not proved: {}; --data names another place", fail.message)),
            Ok(expected) => proof::ledgers(&expected, &history.commits, &mut verdict),
        }
    }
    verdict.ok = verdict.problems.is_empty();
    Ok(verdict)
}

/// A run's own mark; none of one whose first record is gone.
pub(crate) fn id(records: &[Record]) -> String {
    records.first().filter(|first| first.seq == 0).map_or_else(String::new, |first| first.nonce.clone())
}

/// The records that can still be read in a damaged log.
async fn readable(store: &Store) -> Result<Vec<Record>, Fail> {
    let mut records = Vec::new();
    for file in store.list("log").await? {
        records.extend(serde_json::from_slice::<Record>(&store.get(&file.key).await?).ok());
    }
    Ok(records)
}

/// Reads every file of every commit that was not given up. A run that goes on gives some up meanwhile.
async fn check_files(run: &RunFolder, state: &RunState, verdict: &mut Verdict) {
    let store = &run.store;
    let mut meter = Meter::new("commits", state.commits.len() as u64);
    for (done, commit) in state.commits.iter().enumerate() {
        meter.at(done as u64, &commit.folder);
        let faults = verify_commit(store, commit).await.err().unwrap_or_default();
        if !faults.is_empty() && run.state().await.is_ok_and(|now| now.retired.contains(&commit.folder)) {
            verdict.retired += 1;
            continue;
        }
        let (whole, bytes) = (faults.is_empty(), commit.parts.iter().map(|part| part.bytes).sum());
        verdict.problems.extend(faults.iter().map(|fault| format!("{}: {fault}", store.url())));
        verdict.commits.push(CommitVerdict { step: commit.step, folder: commit.folder.clone(), bytes, whole });
    }
}

/// Steps up to a commit's that changed nothing: its optimizer tells in its header of how many updates its moments are. None if that can't be read.
async fn left_out(store: &Store, folder: &str, step: u64) -> Option<u64> {
    let file = format!("{folder}/{OPTIMIZER_FILE}");
    let length = store.get_range(&file, 0..8).await.ok()?;
    let end = u64::from_le_bytes(length[..].try_into().ok()?).checked_add(8)?;
    let header: Value = serde_json::from_slice(&store.get_range(&file, 8..end).await.ok()?).ok()?;
    step.checked_sub(header["__metadata__"]["updates"].as_str()?.parse().ok()?)
}

/// Folders that are not a commit, or not any more. A coordinator that died on the way to its record leaves one.
async fn leftovers(store: &Store, history: &History, verdict: &mut Verdict) -> Result<(), Fail> {
    let named: BTreeSet<&str> = history.commits.iter().map(|commit| commit.folder.as_str()).collect();
    for folder in store.folders("commits").await? {
        if history.state.retired.contains(&folder) {
            verdict.notes.push(format!("{folder}: given up, and not deleted yet"));
        } else if !named.contains(folder.as_str()) {
            verdict.notes.push(format!("{folder}: no record names it, so it is no commit"));
        }
    }
    Ok(())
}

/// What must have been used, from the data set's manifest and the keys in its shards (each checked against its digest).
async fn expected(data: &str, config: &RunConfig) -> Result<Expected, Fail> {
    let data = DataSet::open(data).await?;
    let manifest = data.manifest();
    let order = BucketOrder::new(order_config(config), &manifest.order_shards()).map_err(Fail::failed)?;
    // With the columns of captions that were added to it and trained on.
    let identity = Captions::open(&data, &config.data.captions).await.map_err(Fail::failed)?.identity(&data);
    let identity = identity.parse().map_err(Fail::failed)?;
    let mut keys = Vec::with_capacity(manifest.samples as usize);
    let mut meter = Meter::new("shards", manifest.shards.len() as u64);
    for shard in 0..manifest.shards.len() {
        meter.at(shard as u64, "");
        keys.extend(data.shard(shard).await?.iter().map(|row| KeyHash::of(row.key)));
    }
    Ok(Expected::new(order, keys, identity))
}

fn text(verdict: &Verdict) -> String {
    let mut text = format!("run      {}\nlog      {} of {}\n", verdict.run, count(verdict.records, "record"), count(verdict.terms, "term"));
    let whole = verdict.commits.iter().filter(|commit| commit.whole).count();
    let kept = verdict.commits.len();
    text += &format!("commits  {whole} of {kept} whole (every part's size and BLAKE3), {} given up by the keep rule\n", verdict.retired);
    for group in verdict.epochs.chunk_by(|a, b| a.finished && b.finished && a.exact && b.exact) {
        text += &epochs_line(group);
    }
    for note in &verdict.notes {
        text += &format!("note     {note}\n");
    }
    for problem in &verdict.problems {
        text += &format!("PROBLEM  {problem}\n");
    }
    let (stands, left_out) = (format!("verdict  step {} stands on whole commits", verdict.step), verdict.steps_left_out);
    text + &match (verdict.problems.len(), left_out) {
        (0, 0) => format!("{stands}, and every sample was used exactly as it was due"),
        (0, _) => {
            format!("{stands}, and every sample came exactly as it was due, but {} changed nothing", count(left_out as usize, "step"))
        }
        (n, _) => format!("verdict  {}", count(n, "problem")),
    }
}

fn epochs_line(group: &[Epoch]) -> String {
    let (Some(first), Some(last)) = (group.first(), group.last()) else { return String::new() };
    let name =
        if first.epoch == last.epoch { format!("epoch {}", first.epoch) } else { format!("epochs {} to {}", first.epoch, last.epoch) };
    let found = match (first.exact, first.finished) {
        (true, true) => format!("all {} samples, each exactly once", first.expected),
        (true, false) => format!("{} samples so far: exactly those that were due, each once", first.expected),
        (false, _) => format!("{} samples, which are not the {} that were due", first.samples, first.expected),
    };
    format!("{name:8} {found}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_changed_nothing_are_told_of() {
        let (store, read) = (Store::in_memory(), crate::runtime().unwrap());
        let file = format!("c/{OPTIMIZER_FILE}");
        let mut found = |header: &str| {
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 9]].concat();
            read.block_on(async {
                store.put(&file, bytes.into()).await.unwrap();
                left_out(&store, "c", 30).await
            })
        };
        assert_eq!(found(r#"{"__metadata__":{"step":"30","updates":"1"}}"#), Some(29));
        assert_eq!([r#"{"__metadata__":{"updates":"31"}}"#, "{}", "none"].map(&mut found), [None; 3]);

        let shown = |steps_left_out| text(&Verdict { step: 30, steps_left_out, ..Verdict::default() });
        assert!(shown(0).ends_with("every sample was used exactly as it was due"));
        assert!(shown(29).ends_with("every sample came exactly as it was due, but 29 steps changed nothing"));
    }
}
