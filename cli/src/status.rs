//! `ella status`: what a run is doing (asked of its coordinator), or what became of it (read from its folder).

use clap::Args;
use ella_coordinator::client;
use ella_coordinator::status::StatusReport;
use ella_store::RunState;
use serde::Serialize;

use crate::run::{Metric, RunFolder, samples};
use crate::ui::{DONE, Fail, Out};

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// A run's folder (path or URL), or its coordinator's address, http://HOST:PORT
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
            out.result(&status, || live(&status));
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
    for (name, count) in &status.counts {
        text += &format!("count    {name} {count}\n");
    }
    text
}
