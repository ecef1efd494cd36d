//! `ella status`: what a run or a job is doing (asked of its coordinator), or how far it is and what became of it (read from its folder or
//! its data set's).

use clap::Args;
use ella_coordinator::client;
use ella_coordinator::credentials::Credentials;
use ella_coordinator::status::{JobReport, StatusReport};
use ella_dataset::{Progress, progress};
use ella_proto::access::Access;
use ella_store::{RunState, Store, StoreError};
use ella_worker::grids::RECORD;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::run::{self, Membership, Metric, RUN_TOML, RunFolder, samples};
use crate::ui::{DONE, Fail, Out, bytes, span};

/// Characters of a worker's id that are shown.
pub(crate) const SHOWN: usize = 8;

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// A run's folder, a data set's, being prepared, embedded or captioned, or whole, or a folder of grids (path or URL); or the address of a
    /// run's or job's coordinator, http://HOST:PORT
    #[arg(value_name = "RUN|DATA|URL", required_unless_present = "coordinator")]
    what: Option<String>,
    #[command(flatten)]
    asked: Asked,
}

/// Whom to ask, beside an argument `what`, which may be an address or a folder; and what is shown there.
#[derive(Debug, Args)]
pub(crate) struct Asked {
    /// Ask the coordinator at this address
    #[arg(long, value_name = "URL", conflicts_with = "what")]
    coordinator: Option<String>,
    #[command(flatten)]
    pub(crate) credentials: Credentials,
}

/// A data set by its folder.
#[derive(Debug, Serialize)]
struct DataStatus {
    data: String,
    /// Preparing first, then every encoder's features, then every added column of captions.
    work: Vec<Progress>,
}

/// A folder of grids (`ella dpg generate`).
#[derive(Debug, PartialEq, Serialize)]
struct GridStatus {
    grids: String,
    /// Of a tile.
    resolution: u32,
    prompts: usize,
    /// Prompts whose grid is there.
    drawn: usize,
}

/// A run by its folder.
#[derive(Debug, Serialize)]
struct FolderStatus {
    run_url: String,
    term: u64,
    /// `done`, `preempted` or `failed`, as the newest coordinator recorded it; `open` if it has not, or was killed.
    outcome: &'static str,
    reason: String,
    last_commit_step: u64,
    commits: usize,
    /// Steps in all.
    steps: u64,
    /// The newest step that was measured, or committed.
    step: u64,
    samples: u64,
    loss: Option<f64>,
    /// The newest that was measured on held-out noise.
    held_out_loss: Option<f64>,
    /// The newest step whose samples are all in the folder.
    sampled_step: Option<u64>,
    membership: Membership,
    /// What was skipped, refused and read, as the folder has it; a coordinator counts more (KNOWN).
    counts: BTreeMap<String, u64>,
    /// Lines of the folder's that could not be read.
    damaged_lines: usize,
}

impl Asked {
    /// The coordinator, where what was given is its address and no folder.
    pub(crate) fn coordinator(&self, what: Option<&str>) -> Result<Option<Access>, Fail> {
        let is_url = |what: &&str| what.starts_with("http://") || what.starts_with("https://");
        match self.coordinator.as_deref().or(what.filter(is_url)) {
            Some(url) => Ok(Some(self.credentials.access(url)?)),
            None => Ok(None),
        }
    }
}

impl Status {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let runtime = crate::runtime()?;
        let folder_or_url = self.what.as_deref().unwrap_or_default();
        if let Some(access) = self.asked.coordinator(self.what.as_deref())? {
            let status = StatusReport::from(runtime.block_on(client::status(access))?);
            out.result(&status, || match &status.job {
                Some(job) => live_job(&status, job),
                None => live(&status),
            });
        } else if let Some(status) = runtime.block_on(read_data(folder_or_url))? {
            out.result(&status, || data(&status));
        } else if let Some(status) = runtime.block_on(read_grids(folder_or_url))? {
            out.result(&status, || grids(&status));
        } else {
            let status = runtime.block_on(read(folder_or_url))?;
            out.result(&status, || folder(&status));
        }
        Ok(DONE)
    }
}

/// None: a run is there, or no data set.
async fn read_data(url: &str) -> Result<Option<DataStatus>, Fail> {
    let store = run::store(url)?;
    if store.head(RUN_TOML).await?.is_some() {
        return Ok(None);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let work = progress(&store, u64::try_from(now).unwrap_or(u64::MAX)).await?;
    Ok(work.map(|work| DataStatus { data: store.url().to_owned(), work }))
}

/// None: no grids are there.
async fn read_grids(url: &str) -> Result<Option<GridStatus>, Fail> {
    /// What is of interest here of the record.
    #[derive(Deserialize)]
    struct Record {
        resolution: u32,
        images: BTreeMap<String, IgnoredAny>,
    }
    let store = Store::open(url)?;
    if store.head(RUN_TOML).await?.is_some() {
        return Ok(None);
    }
    let text = match store.get(RECORD).await {
        Err(StoreError::NotFound { .. }) => return Ok(None),
        read => read?,
    };
    let wrong = |error| Fail::lasting(format_args!("{}/{RECORD}: {error}; restore it from a copy", store.url()));
    let Record { resolution, images } = serde_json::from_slice(&text).map_err(wrong)?;
    let files = store.files("").await?;
    let drawn = files.iter().filter_map(|file| file.key.strip_suffix(".png")).filter(|name| images.contains_key(*name)).count();
    Ok(Some(GridStatus { grids: store.url().to_owned(), resolution, prompts: images.len(), drawn }))
}

async fn read(url: &str) -> Result<FolderStatus, Fail> {
    let store = Store::open(url)?;
    if store.head(RUN_TOML).await?.is_none() {
        let hint = "this is no run folder, no data set and no folder of grids. A job that waits for its first worker has written nothing yet: \
                    `ella status --coordinator URL` asks whoever coordinates it";
        return Err(Fail::lasting(format_args!("{}/{RUN_TOML}: not found; {hint}", store.url())));
    }
    let run = RunFolder::open(url).await?;
    let state = run.state().await?;
    let metrics = run.metrics().await?;
    let samples = samples(&state, &metrics);
    let events = run.events().await?;
    let (membership, counts) = (Membership::of(&events), run::counts(&metrics, &events));
    let Metric { step, loss, .. } = metrics.last().cloned().unwrap_or_default();
    let held_out_loss = metrics.iter().rev().find_map(|metric| metric.held_out_loss);
    let (outcome, reason) = outcome(&state);
    let last_commit_step = state.last_commit().map_or(0, |commit| commit.step);
    // A copy may have the commits alone.
    let step = step.max(last_commit_step);
    let sampled_step = run.sampled_steps().await?.into_iter().rfind(|drawn| *drawn <= step);
    let (steps, commits) = (run.config.train.steps, state.commits.len());
    let (run_url, damaged_lines) = (run.store.url().to_owned(), run.damaged_lines());
    Ok(FolderStatus {
        run_url,
        term: state.term,
        outcome,
        reason,
        last_commit_step,
        commits,
        steps,
        step,
        samples,
        loss,
        held_out_loss,
        sampled_step,
        membership,
        counts,
        damaged_lines,
    })
}

/// How the newest coordinator ended, and why.
pub(crate) fn outcome(state: &RunState) -> (&'static str, String) {
    use ella_store::Outcome;
    match state.ended.as_ref().filter(|_| state.is_over()) {
        None => ("open", "its coordinator runs, or was killed".to_owned()),
        Some(ended) => {
            let name = match ended.outcome {
                Outcome::Done => "done",
                Outcome::Preempted => "preempted",
                Outcome::Failed => "failed",
            };
            (name, ended.reason.clone())
        }
    }
}

fn data(status: &DataStatus) -> String {
    let mut text = format!("data     {}\n", status.data);
    for work in &status.work {
        let Progress { kind, name, whole, units, units_done, samples, counts, units_read, .. } = work;
        let name = if name.is_empty() { String::new() } else { format!(" {name}") };
        let state = match (whole, units_done < units) {
            (true, _) => "whole",
            (false, true) => "under way",
            (false, false) => "all units are done, its manifest is not written yet",
        };
        let sums = if units_read < units_done { format!(", reckoned from {units_read} units") } else { String::new() };
        text += &format!("{kind:<8}{name} {state}: {units_done} of {units} units done, {samples} samples, {}{sums}\n", bytes(work.bytes));
        if let (Some(units), Some(samples), Some(left), false) = (work.units_per_second, work.samples_per_second, work.seconds_left, whole)
        {
            let idle = work.idle_seconds.unwrap_or_default();
            text += &format!("         {:.2} units/s, {samples:.1} samples/s, {} left; the last {} ago\n", units, span(left), span(idle));
        }
        text += &counts.iter().map(|(name, count)| format!("         {name} {count}\n")).collect::<String>();
    }
    text
}

fn grids(status: &GridStatus) -> String {
    let GridStatus { grids, resolution, prompts, drawn } = status;
    let state = if drawn < prompts { "under way, or was stopped: the same command goes on" } else { "all are there" };
    format!(
        "grids    {grids}\ndrawn    {drawn} of {prompts}, of 2×2 tiles of {resolution}×{resolution}: {state}\nmade     as {grids}/{RECORD} has it"
    )
}

fn folder(status: &FolderStatus) -> String {
    let FolderStatus { run_url, term, outcome, reason, last_commit_step, commits, steps, step, samples, membership, .. } = status;
    let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    let loss = status.loss.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
    let held_out = status.held_out_loss.map_or_else(String::new, |loss| format!(", on held-out noise {loss:.4}"));
    let drawn = status.sampled_step.map_or_else(String::new, |step| format!("\ndrawn    samples up to step {step}"));
    let newest = if *commits == 0 { String::new() } else { format!(", the newest of step {last_commit_step}") };
    let damaged = if status.damaged_lines == 0 { String::new() } else { format!("count    damaged_lines {}", status.damaged_lines) };
    format!(
        "run      {run_url}\noutcome  {outcome}{reason}\nterm     {term}\nstep     {step} of {steps}, {samples} samples{loss}{held_out}\n\
         commits  {commits} kept{newest}\nworkers  {membership}{drawn}\n{}{damaged}",
        counts("count", &status.counts)
    )
}

fn live(status: &StatusReport) -> String {
    let StatusReport { run_url, term, generation, phase, reason, step, steps, samples, loss, samples_per_second, epoch, .. } = status;
    let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    let loss = loss.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
    let mut text = format!(
        "run      {run_url}\nphase    {phase}{reason}\nterm     {term}, generation {generation}\n\
         step     {step} of {steps}, epoch {epoch}, {samples} samples, {samples_per_second:.1}/s{loss}\n\
         commits  {} by this coordinator, the newest of step {}\n",
        status.commits, status.last_commit_step
    );
    for worker in &status.workers {
        let silent = worker.silent_ms as f64 / 1000.0;
        let (host, pid, device) = (&worker.host, worker.pid, &worker.device);
        let place = worker.rank.map_or_else(|| worker.state.clone(), |rank| format!("rank {rank}"));
        // Enough of it for `ella drain`.
        let id: String = worker.worker_id.chars().take(SHOWN).collect();
        text += &format!("worker   {id}, {place}, {host} pid {pid}, {device}, step {}, heard {silent:.1} s ago\n", worker.step);
    }
    text + &counts("count", &status.counts)
}

fn live_job(status: &StatusReport, job: &JobReport) -> String {
    let JobReport { kind, stage, units, units_done, units_held, units_given_up, samples, samples_per_second, .. } = job;
    let reason = if status.reason.is_empty() { String::new() } else { format!(" ({})", status.reason) };
    let left = job.seconds_left.map_or_else(String::new, |left| format!(", {} left", span(left)));
    let mut text = format!(
        "job      {kind} {}\nphase    {}{reason}\nstage    {stage}: {units_done} of {units} units done, {units_held} held, \
         {units_given_up} given up{left}\nsamples  {samples}, {samples_per_second:.1}/s\n",
        status.run_url, status.phase
    );
    for worker in &job.workers {
        let silent = worker.silent_ms as f64 / 1000.0;
        let held: Vec<String> = worker.held.iter().map(|held| format!("{} ({} samples)", held.unit, held.done)).collect();
        let held = if held.is_empty() { "nothing".to_owned() } else { held.join(", ") };
        let (host, pid, device, done) = (&worker.host, worker.pid, &worker.device, worker.units_done);
        text += &format!("worker   {host} pid {pid}, {device}, {done} units done, holds {held}, heard {silent:.1} s ago\n");
    }
    for unit in &job.given_up {
        text += &format!("given up {}: {}\n", unit.unit, unit.error);
    }
    text + &counts("result", &job.results) + &counts("count", &status.counts)
}

fn counts(what: &str, counts: &BTreeMap<String, u64>) -> String {
    // Every run has these, and nothing is wrong with them.
    let asked = |name: &str| if name == "skipped_captions_dropped" { ", as train.caption_dropout asks" } else { "" };
    counts.iter().map(|(name, count)| format!("{what:<8} {name} {count}{}\n", asked(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_coordinator::status::{FailedUnitReport, HeldUnitReport, JobWorkerReport};
    use ella_proto::config::RunConfig;
    use ella_store::{Body, Commit, Digest, Part, RunLog, Term};

    /// Only `log/` was copied beside `run.toml`; then what was measured after the commit, with a line that is none.
    #[test]
    fn a_folder_is_at_its_newest_commit_at_least_and_tells_what_it_counts() {
        let dir = tempfile::tempdir().unwrap();
        let url = dir.path().to_str().unwrap();
        crate::runtime().unwrap().block_on(async {
            let store = Store::open(url).unwrap();
            let config = RunConfig::parse("[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n", "x", &[]).unwrap();
            store.put(RUN_TOML, config.to_toml().into()).await.unwrap();
            let term = Term { host: "h".into(), version: "1".into(), config_digest: Digest::of(b"") };
            let (mut log, _) = RunLog::claim(&store, term, "n", 1).await.unwrap();
            let commit = Commit {
                step: 60,
                generation: 1,
                world: 1,
                folder: ella_store::commit_folder(60, 1, 1),
                parts: vec![Part { name: "connector.safetensors".into(), bytes: 1, blake3: Digest::of(b"x") }],
                config_digest: Digest::of(b""),
                data_digest: Digest::of(b""),
                models_digest: Digest::of(b""),
                epoch: 0,
                step_in_epoch: 60,
                ledger: Vec::new(),
                state_digest: Digest::of(b""),
                computed_with: Default::default(),
            };
            log.append(Body::Commit(commit), 2).await.unwrap();
            let status = read(url).await.unwrap();
            assert_eq!((status.step, status.loss), (60, None));
            let line = r#"{"at_unix_ms":1,"step":61,"samples":4,"loss":0.5,"skipped":{"captions_dropped":1,"nonfinite":3}}"#;
            store.put("metrics/000001-000001.jsonl", format!("{line}\n{{\"at").into()).await.unwrap();
            let status = read(url).await.unwrap();
            assert_eq!((status.step, status.damaged_lines), (61, 1));
            let shown = folder(&status);
            let counted = "\ncount    skipped_captions_dropped 1, as train.caption_dropout asks\ncount    skipped_nonfinite 3\ncount    damaged_lines 1";
            assert!(shown.ends_with(counted), "{shown}");
        });
    }

    #[test]
    fn a_folder_of_grids_is_known_with_how_many_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let url = dir.path().to_str().unwrap();
        crate::runtime().unwrap().block_on(async {
            assert_eq!(read_grids(url).await.unwrap(), None);
            let store = Store::open(url).unwrap();
            let record = r#"{"made_by":"ella","resolution":64,"images":{"a":{"prompt":"x","seeds":[1]},"b":{"prompt":"y","seeds":[2]}}}"#;
            store.put(RECORD, record.into()).await.unwrap();
            store.put("a.png", "png".into()).await.unwrap();
            store.put("other.png", "png".into()).await.unwrap();
            let status = read_grids(url).await.unwrap().unwrap();
            assert_eq!((status.drawn, status.prompts, status.resolution), (1, 2, 64));
            assert!(grids(&status).contains("\ndrawn    1 of 2, of 2×2 tiles of 64×64: under way"), "{}", grids(&status));
        });
    }

    #[test]
    fn a_job_is_shown_as_a_job() {
        let held = vec![HeldUnitReport { unit: "b.tar".into(), done: 7, held_ms: 1_000 }];
        let (host, device) = ("h".to_owned(), "cpu".to_owned());
        let workers =
            vec![JobWorkerReport { host, pid: 5, device, slots: 1, held, units_done: 2, silent_ms: 300, ..JobWorkerReport::default() }];
        let job = JobReport {
            kind: "prepare".into(),
            stage: 2,
            units: 9,
            units_done: 4,
            units_held: 1,
            units_given_up: 1,
            samples: 70,
            samples_per_second: 3.5,
            seconds_left: Some(90.0),
            results: [("kept".to_owned(), 60)].into(),
            workers,
            given_up: vec![FailedUnitReport { unit: "a.tar".into(), error: "truncated".into(), permanent: true }],
            ..JobReport::default()
        };
        let counts = [("units_retried".to_owned(), 1)].into();
        let status = StatusReport { run_url: "data/a".into(), phase: "working".into(), counts, ..StatusReport::default() };
        let expected = "job      prepare data/a\nphase    working\n\
                        stage    2: 4 of 9 units done, 1 held, 1 given up, 1 min 30 s left\n\
                        samples  70, 3.5/s\n\
                        worker   h pid 5, cpu, 2 units done, holds b.tar (7 samples), heard 0.3 s ago\n\
                        given up a.tar: truncated\nresult   kept 60\ncount    units_retried 1\n";
        assert_eq!(live_job(&status, &job), expected);
    }

    #[test]
    fn a_data_set_is_shown_by_its_work() {
        let whole = Progress {
            kind: "prepare",
            name: String::new(),
            whole: true,
            units: 3,
            units_done: 3,
            samples: 30,
            counts: [("kept".to_owned(), 28), ("refused.area".to_owned(), 2)].into(),
            bytes: 2048,
            units_read: 3,
            units_per_second: None,
            samples_per_second: None,
            seconds_left: None,
            idle_seconds: None,
        };
        let begun = Progress {
            kind: "caption",
            name: "dense".into(),
            whole: false,
            units: 9000,
            units_done: 3000,
            counts: [("captioned".to_owned(), 7)].into(),
            units_read: 2000,
            units_per_second: Some(0.5),
            samples_per_second: Some(5.0),
            seconds_left: Some(12_000.0),
            idle_seconds: Some(3.0),
            ..whole.clone()
        };
        let expected = "data     d\nprepare  whole: 3 of 3 units done, 30 samples, 2.0 KiB\n         kept 28\n         refused.area 2\n\
                        caption  dense under way: 3000 of 9000 units done, 30 samples, 2.0 KiB, reckoned from 2000 units\n         \
                        0.50 units/s, 5.0 samples/s, 3 h 20 min left; the last 3.0 s ago\n         captioned 7\n";
        assert_eq!(data(&DataStatus { data: "d".into(), work: vec![whole, begun] }), expected);
    }
}
