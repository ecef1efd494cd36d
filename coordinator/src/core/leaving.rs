//! Workers that were asked to leave (SIGTERM, `drain`): they go as soon as others go on without them, or the whole run leaves.

use super::members::{Held, Member};
use super::{ConnId, Core, Failure, Note, Phase, Time};
use ella_proto::ids::Step;
use ella_proto::v1::{self, to_worker};

impl Core {
    /// A client asks one worker to leave.
    pub(super) fn drain_worker(&mut self, now: Time, worker_id: &str, reason: String) {
        match self.members.conn_of(worker_id) {
            Some(conn) if !self.phase.is_over() => self.leaving(now, conn, reason),
            _ => self.counts.add("refused_unknown_worker", 1),
        }
    }

    /// A worker is to leave, by its own word or a client's.
    pub(super) fn leaving(&mut self, now: Time, conn: ConnId, reason: String) {
        if let Some(member) = self.members.get_mut(conn).filter(|member| member.open) {
            member.parting.get_or_insert(reason);
        }
        self.settle(now);
    }

    /// While a generation runs: who is in it leaves at the next boundary if enough others go on, else the whole run leaves. Who is not in
    /// it leaves at once.
    pub(super) fn part_with(&mut self, now: Time) {
        if !matches!(self.phase, Phase::Starting { .. } | Phase::Training) {
            return;
        }
        for conn in self.members.which(|member| member.parting.is_some() && !member.is_busy()) {
            self.release(conn);
        }
        let parting = |member: &Member| member.parting.is_some() && member.rank().is_some();
        if self.phase != Phase::Training || !self.members.any(parting) {
            return;
        }
        let goes_on = |member: &Member| member.parting.is_none() && member.rank().is_some();
        let others = self.members.which(|member| goes_on(member) || self.is_to_join(member));
        let first = self.members.which(parting).first().and_then(|conn| self.members.get(*conn));
        let reason = first.map_or_else(String::new, told_to_leave);
        let has_heirs = self.members.any(goes_on) || self.config.max > 1;
        if has_heirs && others.len() >= self.least() {
            self.ask_boundary(reason);
        } else {
            self.begin_drain(now, reason);
        }
    }

    /// While no generation runs: those that were asked to leave go, unless what they hold is nowhere else. Then one of them takes part in one
    /// more generation, so that others get it; or the run leaves with it, if too few others are here.
    pub(super) fn release_parting(&mut self, now: Time) {
        let last = self.last_commit();
        let mut parting = self.members.which(|member| member.parting.is_some());
        let holds = |member: &Member| member.state(last).is_some_and(|step| step > last);
        let only_holder = self.members.which(holds).into_iter().all(|conn| parting.contains(&conn));
        let holder = self.members.which(|member| member.parting.is_some() && holds(member)).first().copied().filter(|_| only_holder);
        let heirs = self.members.which(|member| self.is_to_join(member)).len();
        let has_heirs = heirs >= self.least() && self.config.max > 1;
        if let (Some(member), None) = (holder.and_then(|conn| self.members.get_mut(conn)), &self.drain) {
            member.bequeaths = has_heirs;
            if has_heirs {
                parting.retain(|conn| Some(*conn) != holder);
            } else {
                let reason = told_to_leave(member);
                self.begin_drain(now, reason);
            }
        }
        if self.drain.is_none() {
            parting.into_iter().for_each(|conn| self.release(conn));
        }
    }

    /// Lets a worker go in good order.
    fn release(&mut self, conn: ConnId) {
        let Some(member) = self.members.remove(conn) else { return };
        let reason = member.parting.unwrap_or_default();
        self.send(conn, to_worker::Body::Release(v1::Release { reason: reason.clone() }));
        self.close_stream(conn);
        self.counts.add("workers_released", 1);
        self.note(Note::Left { worker: member.hello.worker_id, why: reason });
    }

    /// There is nothing to commit: everyone leaves, and the run can be resumed.
    pub(super) fn leave_resumable(&mut self, now: Time) {
        let reason = self.drain.as_ref().map_or_else(String::new, |drain| drain.reason.clone());
        // A record on its way to the log gets there.
        let (last, step) = (self.commits.appending().max(Some(self.last_commit())).unwrap_or_default(), Step(self.progress.step()));
        if step > last && !self.members.any(|member| member.state(last).is_some()) {
            // All who held what was applied since are gone: that is no good order.
            return self.fail(Failure::StepsLost { reason, last, steps: step.0 - last.0 });
        }
        for conn in self.members.close_all() {
            self.send(conn, to_worker::Body::Release(v1::Release { reason: reason.clone() }));
            self.close_stream(conn);
        }
        self.end(now, super::Outcome::Preempted { reason });
    }

    /// Whether a stop has anything to commit, if it finds the run with its ranks not yet training.
    pub(super) fn has_nothing_to_commit(&self) -> bool {
        let from = self.lineup.as_ref().filter(|lineup| lineup.source.is_some()).map(|lineup| lineup.from);
        let starts = matches!(self.phase, Phase::Starting { .. });
        starts && from.is_none_or(|from| from <= self.last_commit()) && !self.members.any(|member| matches!(member.held, Held::Busy(None)))
    }
}

fn told_to_leave(member: &Member) -> String {
    format!("{} was told to leave", member.who())
}
