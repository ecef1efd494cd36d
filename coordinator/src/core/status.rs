//! The state as clients see it.

use super::{Core, Outcome, Phase, Time};
use ella_proto::v1::{RunStatus, WorkerStatus};

impl Core {
    /// What the run is doing now.
    pub fn status(&self, now: Time) -> RunStatus {
        let now = self.clock.read(now);
        let reason = match &self.phase {
            Phase::Over(outcome) => outcome.reason(),
            _ => self.wait().map_or_else(String::new, |wait| wait.to_string()),
        };
        let permanent_failure = matches!(&self.phase, Phase::Over(Outcome::Failed(failure)) if failure.permanent());
        RunStatus {
            run_url: self.config.welcome.run_url.clone(),
            term: self.term.0,
            generation: self.generation.0,
            phase: self.phase.name().to_owned(),
            reason,
            step: self.progress.step(),
            steps: self.config.steps,
            samples: self.progress.samples(),
            loss: self.progress.loss(),
            samples_per_second: self.progress.rate(),
            epoch: self.progress.epoch(),
            last_commit_step: self.last_commit().0,
            commits: self.commits.written(),
            workers: self.worker_status(now),
            counts: self.all_counts(),
            permanent_failure,
        }
    }

    fn worker_status(&self, now: Time) -> Vec<WorkerStatus> {
        let worker = |member: &super::membership::Member| WorkerStatus {
            worker_id: member.hello.worker_id.clone(),
            rank: member.rank.unwrap_or_default().0,
            host: member.hello.host.clone(),
            pid: member.hello.pid,
            device: member.device(),
            step: member.step,
            parts: member.parts,
            silent_ms: now.since(member.heard),
        };
        self.members.iter().map(|(_, member)| worker(member)).collect()
    }

    /// The counters, and the leased units by place where there are any.
    fn all_counts(&self) -> std::collections::HashMap<String, u64> {
        let names = ["units_waiting", "units_held", "units_finished", "units_abandoned"];
        let units = names.into_iter().zip(self.leases.sizes()).filter(|(_, n)| *n > 0).map(|(name, n)| (name.to_owned(), n as u64));
        self.counts.0.iter().map(|(name, n)| (name.clone(), *n)).chain(units).collect()
    }
}
