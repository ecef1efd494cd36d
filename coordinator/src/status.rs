//! The status of a run, or of a job, as JSON: one form for `/api/v1/status` and `ella status --json`.

use ella_proto::v1;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a run or a job is doing (see `RunStatus` in the wire contract).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The run folder; of a job, its data set.
    pub run_url: String,
    /// The coordinator's term; of a job, its session.
    pub term: u64,
    /// The membership; 0 before the first.
    pub generation: u64,
    /// `waiting`, `starting`, `training`, `regrouping`, `draining`, `done`, `preempted` or `failed`; of a job `waiting`, `working`, or how it
    /// ended.
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
    /// Samples of one epoch; 0 until the workers have told.
    #[serde(default)]
    pub samples_per_epoch: u64,
    /// The step of the newest commit; 0 if there is none.
    pub last_commit_step: u64,
    /// Commits written by this coordinator.
    pub commits: u64,
    /// Seconds since the newest commit of this coordinator, or since it began.
    #[serde(default)]
    pub commit_age_seconds: f64,
    /// Of the newest step, beside its loss; null before the first.
    #[serde(default)]
    pub newest: Option<NewestReport>,
    /// What only rises, since this coordinator began.
    #[serde(default)]
    pub totals: TotalsReport,
    /// How many workers the run begins with.
    #[serde(default)]
    pub workers_wanted: u32,
    /// Who takes part.
    pub workers: Vec<WorkerReport>,
    /// What was refused, retried or skipped, by name (KNOWN).
    pub counts: BTreeMap<String, u64>,
    /// Whether starting again would fail in the same way.
    pub permanent_failure: bool,
    /// Set if this is a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobReport>,
}

/// The newest step, beside its loss (see `Newest` in the wire contract). What is not finite is null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NewestReport {
    /// The gradient's norm, before clipping.
    pub grad_norm: Option<f64>,
    /// The learning rate.
    pub learning_rate: f64,
    /// What it took, by rank 0's clock.
    pub step_seconds: f64,
    /// Mean loss on the held-out noise, where that was measured last.
    pub held_out_loss: Option<f64>,
    /// Since it was told.
    pub age_seconds: f64,
}

/// Numbers that only rise (see `Totals` in the wire contract).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // the names of `Totals`
pub struct TotalsReport {
    pub steps: u64,
    pub step_seconds: f64,
    pub parts: PartsReport,
    pub step_buckets: Vec<u64>,
    pub samples: u64,
    pub commit_bytes: u64,
    pub commit_seconds: f64,
    pub workers_joined: u64,
    pub generations: u64,
    pub steps_missed: u64,
}

/// How a worker's process is (see `Vitals` in the wire contract).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names of `Vitals`
pub struct VitalsReport {
    pub memory_bytes: u64,
    pub cpu_seconds: f64,
    pub feed_bytes: u64,
    pub gpu_memory_used_bytes: u64,
    pub gpu_memory_total_bytes: u64,
    pub gpu_memory_allocated_bytes: u64,
    pub gpu_busy: Option<f64>,
}

/// A job (see `JobStatus` in the wire contract).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobReport {
    /// `prepare`, `embed`, `caption` or `draw`.
    pub kind: String,
    /// From 1.
    pub stage: u32,
    /// Units of this stage.
    pub units: u64,
    /// Of them, done.
    pub units_done: u64,
    /// Of them, given up.
    pub units_given_up: u64,
    /// Of them, held by workers.
    pub units_held: u64,
    /// Of all stages, those of held units included.
    pub samples: u64,
    /// Over the last minute.
    pub samples_per_second: f64,
    /// Over the last minute.
    pub units_per_second: f64,
    /// Until this stage ends, at that rate; null until it is known.
    pub seconds_left: Option<f64>,
    /// What came of the samples, by name, summed over the units that are done.
    pub results: BTreeMap<String, u64>,
    /// Who works.
    pub workers: Vec<JobWorkerReport>,
    /// Units that were given up, the first thousand.
    pub given_up: Vec<FailedUnitReport>,
}

/// One worker of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobWorkerReport {
    /// Of its stream.
    pub worker_id: String,
    /// Its machine.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// What it computes on.
    pub device: String,
    /// Units that it may hold at once; 0 while it loads.
    pub slots: u32,
    /// What it holds.
    pub held: Vec<HeldUnitReport>,
    /// Units that it has done.
    pub units_done: u64,
    /// Milliseconds since it was last heard of.
    pub silent_ms: u64,
    /// How its process is, once it has told.
    #[serde(default)]
    pub vitals: Option<VitalsReport>,
}

/// A unit in a worker's hands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldUnitReport {
    /// Its name.
    pub unit: String,
    /// Samples done so far.
    pub done: u64,
    /// Milliseconds since it was granted.
    pub held_ms: u64,
}

/// A unit that nobody could do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FailedUnitReport {
    /// Its name.
    pub unit: String,
    /// The last error.
    pub error: String,
    /// It would fail in the same way anywhere.
    pub permanent: bool,
}

/// One worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// Its process's id in the run.
    pub worker_id: String,
    /// `loading`, `spare`, `rank` or `returning` (see `WorkerStatus` in the wire contract).
    #[serde(default)]
    pub state: String,
    /// Its place; null if it has none.
    pub rank: Option<u32>,
    /// Whether it was asked to leave.
    #[serde(default)]
    pub leaving: bool,
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
    /// How its process is, once it has told.
    #[serde(default)]
    pub vitals: Option<VitalsReport>,
}

/// Seconds of one step, by what they were spent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names of `StepParts`
#[serde(default)]
pub struct PartsReport {
    pub data: f64,
    pub encode: f64,
    pub forward: f64,
    pub backward: f64,
    pub reduce: f64,
    pub update: f64,
    pub commit: f64,
    pub reduce_hidden: f64,
    #[serde(default)]
    pub draw: f64,
}

impl PartsReport {
    /// Each part's name and seconds, in the order of a step; the last two are beside it.
    pub fn named(&self) -> [(&'static str, f64); 9] {
        [
            ("data", self.data),
            ("forward", self.forward),
            ("backward", self.backward),
            ("reduce", self.reduce),
            ("update", self.update),
            ("commit", self.commit),
            ("draw", self.draw),
            ("reduce_hidden", self.reduce_hidden),
            ("encode", self.encode),
        ]
    }
}

impl From<v1::StepParts> for PartsReport {
    fn from(parts: v1::StepParts) -> Self {
        let v1::StepParts { data, encode, forward, backward, reduce, update, commit, reduce_hidden, draw } = parts;
        Self { data, encode, forward, backward, reduce, update, commit, reduce_hidden, draw }
    }
}

impl From<v1::Newest> for NewestReport {
    fn from(newest: v1::Newest) -> Self {
        let v1::Newest { grad_norm, learning_rate, step_seconds, held_out_loss, age_ms } = newest;
        let finite = |value: f64| Some(value).filter(|value| value.is_finite());
        let age_seconds = age_ms as f64 / 1000.0;
        Self { grad_norm: finite(grad_norm), learning_rate, step_seconds, held_out_loss: held_out_loss.and_then(finite), age_seconds }
    }
}

impl From<v1::Totals> for TotalsReport {
    fn from(totals: v1::Totals) -> Self {
        Self {
            steps: totals.steps,
            step_seconds: totals.step_seconds,
            parts: totals.parts.unwrap_or_default().into(),
            step_buckets: totals.step_buckets,
            samples: totals.samples,
            commit_bytes: totals.commit_bytes,
            commit_seconds: totals.commit_seconds,
            workers_joined: totals.workers_joined,
            generations: totals.generations,
            steps_missed: totals.steps_missed,
        }
    }
}

impl From<v1::Vitals> for VitalsReport {
    fn from(vitals: v1::Vitals) -> Self {
        Self {
            memory_bytes: vitals.memory_bytes,
            cpu_seconds: vitals.cpu_seconds,
            feed_bytes: vitals.feed_bytes,
            gpu_memory_used_bytes: vitals.gpu_memory_used_bytes,
            gpu_memory_total_bytes: vitals.gpu_memory_total_bytes,
            gpu_memory_allocated_bytes: vitals.gpu_memory_allocated_bytes,
            gpu_busy: vitals.gpu_busy,
        }
    }
}

impl From<v1::WorkerStatus> for WorkerReport {
    fn from(worker: v1::WorkerStatus) -> Self {
        let v1::WorkerStatus { worker_id, rank, host, pid, device, step, parts, silent_ms, state, leaving, vitals } = worker;
        let rank = (state == "rank").then_some(rank);
        Self {
            worker_id,
            state,
            rank,
            leaving,
            host,
            pid,
            device,
            step,
            silent_ms,
            parts: parts.map(Into::into),
            vitals: vitals.map(Into::into),
        }
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
            // What was resumed from has a step, and no loss until the next one.
            loss: (status.newest.is_some() && status.loss.is_finite()).then_some(status.loss),
            samples_per_second: status.samples_per_second,
            epoch: status.epoch,
            samples_per_epoch: status.samples_per_epoch,
            last_commit_step: status.last_commit_step,
            commits: status.commits,
            commit_age_seconds: status.commit_age_ms as f64 / 1000.0,
            newest: status.newest.map(Into::into),
            totals: status.totals.map(Into::into).unwrap_or_default(),
            workers_wanted: status.workers_wanted,
            workers: status.workers.into_iter().map(Into::into).collect(),
            counts: status.counts.into_iter().collect(),
            permanent_failure: status.permanent_failure,
            job: status.job.map(Into::into),
        }
    }
}

impl From<v1::JobStatus> for JobReport {
    fn from(job: v1::JobStatus) -> Self {
        Self {
            kind: job.kind,
            stage: job.stage,
            units: job.units,
            units_done: job.units_done,
            units_given_up: job.units_given_up,
            units_held: job.units_held,
            samples: job.samples,
            samples_per_second: job.samples_per_second,
            units_per_second: job.units_per_second,
            seconds_left: job.seconds_left,
            results: job.results.into_iter().collect(),
            workers: job.workers.into_iter().map(Into::into).collect(),
            given_up: job.given_up.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<v1::JobWorker> for JobWorkerReport {
    fn from(worker: v1::JobWorker) -> Self {
        let v1::JobWorker { worker_id, host, pid, device, slots, held, units_done, silent_ms, vitals } = worker;
        let vitals = vitals.map(Into::into);
        Self { worker_id, host, pid, device, slots, held: held.into_iter().map(Into::into).collect(), units_done, silent_ms, vitals }
    }
}

impl From<v1::HeldUnit> for HeldUnitReport {
    fn from(held: v1::HeldUnit) -> Self {
        let v1::HeldUnit { unit, done, held_ms } = held;
        Self { unit, done, held_ms }
    }
}

impl From<v1::FailedUnit> for FailedUnitReport {
    fn from(failed: v1::FailedUnit) -> Self {
        let v1::FailedUnit { unit, error, permanent } = failed;
        Self { unit, error, permanent }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_loss_before_the_first_step_after_a_resume() {
        let resumed = v1::RunStatus { step: 40, ..v1::RunStatus::default() };
        assert_eq!(StatusReport::from(resumed.clone()).loss, None);
        let stepped = v1::RunStatus { step: 41, loss: 0.5, newest: Some(v1::Newest::default()), ..resumed };
        assert_eq!(StatusReport::from(stepped).loss, Some(0.5));
    }

    #[test]
    fn every_part_of_a_step_has_its_name() {
        let parts = PartsReport { draw: 2.0, data: 1.0, ..PartsReport::default() };
        let written = serde_json::to_value(parts).unwrap();
        let named = parts.named().map(|(name, seconds)| (name.to_owned(), serde_json::Value::from(seconds)));
        assert_eq!(serde_json::Value::Object(named.into_iter().collect()), written);
    }
}
