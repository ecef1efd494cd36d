//! The state as clients see it.

use super::members::{Held, Member};
use super::{Core, Phase, Time};
use ella_proto::v1::{RunStatus, WorkerStatus};

impl Core {
    /// What the run is doing now.
    pub(super) fn run_status(&self, now: Time) -> RunStatus {
        let reason = match &self.phase {
            Phase::Over(outcome) => outcome.reason(),
            _ => self.wait().map_or_else(String::new, |wait| wait.to_string()),
        };
        let permanent_failure = matches!(&self.phase, Phase::Over(outcome) if outcome.is_permanent());
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
            counts: self.counts.to_map(),
            permanent_failure,
            job: None,
            samples_per_epoch: self.agreed.as_ref().map_or(0, |ready| ready.samples_per_epoch),
        }
    }

    fn worker_status(&self, now: Time) -> Vec<WorkerStatus> {
        let worker = |member: &Member| WorkerStatus {
            worker_id: member.hello.worker_id.clone(),
            rank: member.rank().unwrap_or_default().0,
            host: member.hello.host.clone(),
            pid: member.hello.pid,
            device: super::device(&member.hello),
            step: member.step,
            parts: member.parts,
            silent_ms: now.since(member.heard),
            state: state(member).to_owned(),
            leaving: member.parting.is_some(),
        };
        self.members.iter().map(|(_, member)| worker(member)).collect()
    }
}

/// The word of `WorkerStatus.state`.
fn state(member: &Member) -> &'static str {
    match member.held {
        Held::Loading => "loading",
        Held::Idle(_) => "spare",
        Held::Busy(Some(_)) => "rank",
        Held::Busy(None) => "returning",
    }
}
