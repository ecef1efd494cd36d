//! The state as clients see it.

use super::workers::Worker;
use super::{GivenUp, JobCore};
use crate::machine::{ConnId, Time};
use ella_proto::v1::{FailedUnit, HeldUnit, JobStatus, JobWorker, RunStatus, Totals};
use std::collections::BTreeMap;

/// Units that were given up, as many as are listed.
const MOST_LISTED: usize = 1_000;

impl JobCore {
    /// What the job is doing now.
    pub(super) fn run_status(&self, now: Time) -> RunStatus {
        let (phase, reason) = match (&self.outcome, self.alone) {
            (Some(outcome), _) => (outcome.name(), outcome.reason()),
            (None, Some(since)) => ("waiting", self.why_alone(now, since)),
            (None, None) => ("working", String::new()),
        };
        RunStatus {
            run_url: self.settings.welcome.run_url.clone(),
            term: self.settings.session,
            phase: phase.to_owned(),
            reason,
            counts: self.counts.to_map(),
            permanent_failure: self.outcome.as_ref().is_some_and(crate::core::Outcome::is_permanent),
            job: Some(self.job_status(now)),
            totals: Some(Totals { workers_joined: self.joined, ..Totals::default() }),
            ..RunStatus::default()
        }
    }

    fn why_alone(&self, now: Time, since: Time) -> String {
        let left = self.settings.start_timeout.saturating_sub(now.since(since)).div_ceil(1000);
        format!("there is no worker; the job fails in {left} s if none comes (job.start_timeout)")
    }

    fn job_status(&self, now: Time) -> JobStatus {
        let stage = self.units.stage();
        let units_per_second = self.unit_rate.per_second(now);
        let mut held = BTreeMap::<ConnId, Vec<HeldUnit>>::new();
        for lease in self.units.leases() {
            let unit = HeldUnit { unit: lease.unit.to_string(), done: lease.done, held_ms: now.since(lease.since) };
            held.entry(lease.holder).or_default().push(unit);
        }
        let worker = |(conn, worker)| worker_status(now, worker, held.remove(&conn).unwrap_or_default());
        let left = (stage.units - stage.done - stage.given_up) as f64;
        JobStatus {
            kind: self.settings.kind.clone(),
            stage: stage.number,
            units: stage.units as u64,
            units_done: stage.done as u64,
            units_given_up: stage.given_up as u64,
            units_held: self.units.leases().count() as u64,
            samples: self.samples_now(),
            samples_per_second: self.sample_rate.per_second(now),
            units_per_second,
            seconds_left: (units_per_second > 0.0 && self.outcome.is_none()).then(|| left / units_per_second),
            results: self.results.to_map(),
            workers: self.workers.iter().map(worker).collect(),
            given_up: self.units.given_up().into_iter().take(MOST_LISTED).map(Into::into).collect(),
        }
    }
}

fn worker_status(now: Time, worker: &Worker, held: Vec<HeldUnit>) -> JobWorker {
    JobWorker {
        worker_id: worker.hello.worker_id.clone(),
        host: worker.hello.host.clone(),
        pid: worker.hello.pid,
        device: crate::core::device(&worker.hello),
        slots: worker.slots,
        held,
        units_done: worker.units_done,
        silent_ms: now.since(worker.heard),
        vitals: worker.vitals,
    }
}

impl From<GivenUp> for FailedUnit {
    fn from(given_up: GivenUp) -> Self {
        let GivenUp { unit, error, permanent } = given_up;
        Self { unit, error, permanent }
    }
}
