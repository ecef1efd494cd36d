//! `ella status`: what a run or a job is doing (asked of its coordinator), or what became of it (read from its folder).

use clap::Args;
use ella_coordinator::client;
use ella_coordinator::status::{JobReport, StatusReport};
use ella_store::RunState;
use serde::Serialize;
use std::collections::BTreeMap;

use crate::run::{Metric, RunFolder, samples};
use crate::ui::{DONE, Fail, Out, span};

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// A run's folder (path or URL), or the address of a run's or job's coordinator, http://HOST:PORT
    run: String,
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
    /// The newest step that was measured.
    step: u64,
    samples: u64,
    loss: Option<f64>,
}

impl Status {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let runtime = crate::runtime()?;
        if self.run.starts_with("http://") || self.run.starts_with("https://") {
            let status = StatusReport::from(runtime.block_on(client::status(&self.run))?);
            out.result(&status, || match &status.job {
                Some(job) => live_job(&status, job),
                None => live(&status),
            });
        } else {
            let status = runtime.block_on(read(&self.run))?;
            out.result(&status, || folder(&status));
        }
        Ok(DONE)
    }
}

async fn read(url: &str) -> Result<FolderStatus, Fail> {
    let run = RunFolder::open(url).await?;
    let state = run.state().await?;
    let metrics = run.metrics().await?;
    let samples = samples(&state, &metrics);
    let Metric { step, loss, .. } = metrics.last().cloned().unwrap_or_default();
    let (outcome, reason) = outcome(&state);
    let last_commit_step = state.last_commit().map_or(0, |commit| commit.step);
    let (steps, commits) = (run.config.train.steps, state.commits.len());
    let run_url = run.store.url().to_owned();
    Ok(FolderStatus { run_url, term: state.term, outcome, reason, last_commit_step, commits, steps, step, samples, loss })
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

fn folder(status: &FolderStatus) -> String {
    let FolderStatus { run_url, term, outcome, reason, last_commit_step, commits, steps, step, samples, loss } = status;
    let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    let loss = loss.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
    format!(
        "run      {run_url}\noutcome  {outcome}{reason}\nterm     {term}\nstep     {step} of {steps}, {samples} samples{loss}\n\
         commits  {commits} kept, the newest of step {last_commit_step}"
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
        let (rank, host, pid, device) = (worker.rank, &worker.host, worker.pid, &worker.device);
        text += &format!("worker   rank {rank}, {host} pid {pid}, {device}, step {}, heard {silent:.1} s ago\n", worker.step);
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
    counts.iter().map(|(name, count)| format!("{what:<8} {name} {count}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_coordinator::status::{FailedUnitReport, HeldUnitReport, JobWorkerReport};

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
}
