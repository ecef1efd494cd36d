//! A run's status as JSON: one form for `/api/v1/status` and `ella status --json`.

use ella_proto::v1;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a run is doing (see `RunStatus` in the wire contract).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The run folder.
    pub run_url: String,
    /// The coordinator's term.
    pub term: u64,
    /// The membership; 0 before the first.
    pub generation: u64,
    /// `waiting`, `starting`, `training`, `draining`, `done`, `preempted` or `failed`.
    pub phase: String,
    /// Why it waits, or why it failed; empty otherwise.
    pub reason: String,
    /// Applied steps.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Samples trained on since the run began.
    pub samples: u64,
    /// Loss of the newest step that this coordinator saw; null before the first, or if it is not finite.
    pub loss: Option<f64>,
    /// Throughput over the last steps.
    pub samples_per_second: f64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// The step of the newest commit; 0 if there is none.
    pub last_commit_step: u64,
    /// Commits written by this coordinator.
    pub commits: u64,
    /// Who takes part.
    pub workers: Vec<WorkerReport>,
    /// What was refused, retried or skipped, by name (KNOWN).
    pub counts: BTreeMap<String, u64>,
    /// Whether starting again would fail in the same way.
    pub permanent_failure: bool,
}

/// One worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// Its process's id in the run.
    pub worker_id: String,
    /// Its place.
    pub rank: u32,
    /// Its machine.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// What it computes on.
    pub device: String,
    /// Its newest known step.
    pub step: u64,
    /// Milliseconds since it was last heard of.
    pub silent_ms: u64,
    /// Seconds of its newest step, by what they were spent on.
    pub parts: Option<PartsReport>,
}

/// Seconds of one step, by what they were spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names of `StepParts`
pub struct PartsReport {
    pub data: f64,
    pub encode: f64,
    pub forward: f64,
    pub backward: f64,
    pub reduce: f64,
    pub update: f64,
    pub commit: f64,
}

impl From<v1::StepParts> for PartsReport {
    fn from(parts: v1::StepParts) -> Self {
        let v1::StepParts { data, encode, forward, backward, reduce, update, commit } = parts;
        Self { data, encode, forward, backward, reduce, update, commit }
    }
}

impl From<v1::WorkerStatus> for WorkerReport {
    fn from(worker: v1::WorkerStatus) -> Self {
        let v1::WorkerStatus { worker_id, rank, host, pid, device, step, parts, silent_ms } = worker;
        Self { worker_id, rank, host, pid, device, step, silent_ms, parts: parts.map(Into::into) }
    }
}

impl From<v1::RunStatus> for StatusReport {
    fn from(status: v1::RunStatus) -> Self {
        Self {
            run_url: status.run_url,
            term: status.term,
            generation: status.generation,
            phase: status.phase,
            reason: status.reason,
            step: status.step,
            steps: status.steps,
            samples: status.samples,
            loss: (status.step > 0 && status.loss.is_finite()).then_some(status.loss),
            samples_per_second: status.samples_per_second,
            epoch: status.epoch,
            last_commit_step: status.last_commit_step,
            commits: status.commits,
            workers: status.workers.into_iter().map(Into::into).collect(),
            counts: status.counts.into_iter().collect(),
            permanent_failure: status.permanent_failure,
        }
    }
}
