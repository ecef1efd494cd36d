//! Closed, Failed, silence: what becomes of the others when a worker is gone.

use super::members::Member;
use super::{Closed, ConnId, Core, Failure, Loss, Note, Phase, Time};
use ella_proto::v1::{self, to_worker};

/// Characters that are kept of a worker's words.
pub(super) const MOST_TEXT: usize = 2_000;

impl Core {
    pub(super) fn closed(&mut self, now: Time, conn: ConnId, how: Closed) {
        if let Some(name) = how.counter() {
            self.counts.add(name, 1);
        }
        self.lost(now, conn, how.into());
        self.closed.remove(&conn);
    }

    pub(super) fn silent(&mut self, now: Time) {
        let silent_ms = self.config.welcome.lease_ms;
        if now.since(self.all_heard) < silent_ms {
            return;
        }
        for conn in self.members.which(|member| now.since(member.heard) >= silent_ms) {
            self.counts.add("leases_missed", 1);
            self.lost(now, conn, Loss::Silent { silent_ms });
        }
        self.all_heard = self.members.oldest_heard().unwrap_or(now);
    }

    /// Ends a worker's part in the run.
    pub(super) fn let_go(&mut self, now: Time, conn: ConnId, how: Loss) {
        if self.members.get(conn).is_some_and(|member| member.open) {
            self.send(conn, to_worker::Body::Release(v1::Release { reason: how.to_string() }));
            self.lost(now, conn, how);
        }
    }

    /// A member is gone. The others go on without it; if its work was done, or the run's last commit stands, as if nothing had happened
    /// (C-5).
    pub(super) fn lost(&mut self, now: Time, conn: ConnId, how: Loss) {
        let Some(member) = self.members.get(conn).filter(|member| member.open) else { return };
        let (who, placed, has_done) = (member.who(), member.rank().is_some(), self.has_done_its_work(member));
        self.close_stream(conn);
        if let Some(member) = self.members.get_mut(conn) {
            member.open = false;
        }
        if has_done {
            return;
        }
        if placed && self.phase.has_begun() && self.last_commit().0 >= self.config.steps {
            self.counts.add("workers_left", 1);
            return self.says_nothing_more(now, conn);
        }
        self.keep_timing(conn, true);
        self.members.remove(conn);
        let (worker, why) = (who.worker_id.clone(), how.to_string());
        if placed || how.is_own_fault() {
            self.counts.add("workers_lost", 1);
            self.note(Note::Lost { worker, rank: who.rank.map(|rank| rank.0), why });
        } else {
            self.counts.add("workers_left", 1);
            self.note(Note::Left { worker, why });
        }
        if placed {
            let why = format!("{who} was lost: {how}");
            self.last_loss = Some((who, how));
            self.weaken();
            self.end_generation(now, why, false);
        } else {
            self.settle(now);
        }
    }

    /// Whether a member has reported all that there is to report, or the end is being recorded.
    pub(super) fn has_done_its_work(&self, member: &Member) -> bool {
        let all_reported = matches!(self.phase, Phase::Closing { .. }) && !self.commits.lacks_reports(self.generation, self.world());
        let last = self.last_commit().0;
        let has_done = |finished: v1::Finished| self.phase.has_begun() && (all_reported || finished.step <= last);
        matches!(self.phase, Phase::Ending { .. } | Phase::Over(_)) || member.finished.is_some_and(has_done)
    }

    /// The last step's commit stands: that this rank has applied it is known, whether it says so or not (C-5).
    pub(super) fn says_nothing_more(&mut self, now: Time, conn: ConnId) {
        let finished = v1::Finished { step: self.last_commit().0, outcome: v1::Outcome::Done.into() };
        self.finished(now, conn, finished);
    }

    /// A worker says that it cannot go on. The run can, if enough others remain and would not fail in the same way.
    pub(super) fn worker_failed(&mut self, now: Time, conn: ConnId, failed: v1::Failed) {
        self.counts.add("workers_failed", 1);
        let Some(member) = self.members.get(conn).filter(|member| member.open) else { return };
        let (kind, permanent) = (failed.kind(), failed.permanent);
        let message: String = failed.message.chars().take(MOST_TEXT).collect();
        let others = self.members.which(|_| true).len() - 1;
        let begun = self.lineup.is_some() || self.members.any(|member| member.is_busy() || member.state(self.last_commit()).is_some());
        let too_few = others < self.least();
        let fatal = match permanent {
            // What one machine lacks, others may have.
            true if kind == v1::FailureKind::Machine => too_few || !begun,
            true => member.is_busy() || !begun,
            // It may come back, as one that was killed may. The store is everybody's: who starts the run again waits for it better.
            false => too_few && (!begun || kind == v1::FailureKind::Store),
        };
        let all_done = self.phase.has_begun() && self.last_commit().0 >= self.config.steps;
        if fatal && !all_done && !self.has_done_its_work(member) {
            return self.fail(Failure::Worker { who: member.who(), kind, message, permanent });
        }
        self.lost(now, conn, Loss::Failed { kind, message });
    }
}
