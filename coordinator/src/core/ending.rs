//! How a run ends: done, told to leave, or failed; and what is overdue.

use super::{ConnId, Core, Drain, Effect, Failure, Field, Loss, Note, Outcome, Phase, Time};
use ella_proto::ids::{Rank, Step};
use ella_proto::v1::{self, to_worker};
use ella_store::Body;

impl Core {
    pub(super) fn phase_expired(&mut self, now: Time) {
        let drains =
            matches!(self.phase, Phase::Waiting { .. } | Phase::Starting { .. } | Phase::Regrouping { .. } | Phase::Draining { .. });
        if let Some(drain) = self.drain.as_ref().filter(|drain| drains && drain.until <= now) {
            let (reason, waited_ms) = (drain.reason.clone(), self.config.drain_timeout);
            return self.fail(Failure::DrainOverdue { reason, waited_ms });
        }
        if self.phase.has_begun() && self.farewells_until.is_some_and(|until| until <= now) {
            // C-5: nothing is left to do, and to wait for ever would be worse than to leave without a word.
            return self.end(now, Outcome::Done);
        }
        if self.phase.deadline().is_none_or(|until| now < until) {
            return;
        }
        match &self.phase {
            Phase::Waiting { .. } => self.fail(self.missing()),
            Phase::Starting { .. } => self.start_expired(now),
            Phase::Regrouping { .. } => self.let_busy_go(now),
            Phase::Closing { step, .. } => {
                let (step, last, waited_ms) = (*step, self.last_commit(), self.closing_patience(*step));
                self.commit_overdue(now, Failure::NoLastCommit { step, last, waited_ms });
            }
            Phase::Ending { .. } => self.fail(self.log_silent()),
            Phase::Draining { .. } | Phase::Training | Phase::Over(_) => {}
        }
    }

    fn log_silent(&self) -> Failure {
        Failure::Append { error: format!("no answer within {} ms", self.config.commit_timeout) }
    }

    /// What a run lacks that has waited for workers in vain.
    fn missing(&self) -> Failure {
        let (have, need, waited_ms) = (self.attached(), self.need(), self.config.start_timeout);
        match self.loading().into_iter().next() {
            _ if self.commits.appending().is_some() && have >= need => self.log_silent(),
            Some(who) if have >= need => Failure::NotReady { who, waited_ms },
            _ if self.lineup.is_none() => Failure::TooFew { have, need, waited_ms },
            _ => Failure::TooFewLeft { have, need, waited_ms, last: self.last_loss.clone() },
        }
    }

    /// Ranks that are not ready in time are let go, if the others can go on without them.
    fn start_expired(&mut self, now: Time) {
        let late = self.members.not_ready();
        let Some(who) = late.first().and_then(|(_, conn)| self.members.who(*conn)) else { return };
        let waited_ms = self.config.start_timeout;
        let has_state = self.agreed.is_some() || self.lineup.as_ref().is_some_and(|lineup| lineup.source.is_some());
        if has_state && late.len() > 1 && late.len() == self.world() && self.fruitless == 0 {
            // All wait for each other in what they do together. Whoever is stuck does not leave that in time either, and is let go then.
            return self.end_generation(now, format!("no rank was ready within {waited_ms} ms (workers.start_timeout)"), true);
        }
        if !has_state || self.attached().saturating_sub(late.len()) < self.least() {
            return self.fail(Failure::NotReady { who, waited_ms });
        }
        for (_, conn) in late {
            self.let_go(now, conn, Loss::NotReady { waited_ms });
        }
    }

    /// A commit was not completed. Where a worker came back its messages may be lost, so another generation makes it anew.
    pub(super) fn commit_overdue(&mut self, now: Time, failure: Failure) {
        match self.lineup.as_ref().is_some_and(|lineup| lineup.shaken.is_some()) {
            true => self.end_generation(now, failure.to_string(), false),
            false => self.fail(failure),
        }
    }

    /// Asks the run to commit and leave. Where nothing is held that no commit has, it leaves at once.
    pub(super) fn stop(&mut self, now: Time, reason: String) {
        match self.phase {
            Phase::Training => self.begin_drain(now, reason),
            Phase::Waiting { .. } | Phase::Starting { .. } | Phase::Regrouping { .. } if self.drain.is_none() => {
                self.drain = Some(Drain { reason: reason.clone(), until: now.after(self.config.drain_timeout) });
                if self.has_nothing_to_commit() {
                    self.leave_resumable(now);
                }
                self.settle(now);
                if !matches!(self.phase, Phase::Ending { .. } | Phase::Over(_)) {
                    self.note(Note::Draining { reason });
                }
            }
            _ => {}
        }
    }

    /// Leaves now: what is not committed is lost, the last commit stays.
    pub(super) fn leave(&mut self, reason: String) {
        if !self.phase.is_over() {
            self.over(Outcome::Preempted { reason }, true);
        }
    }

    /// The whole run is to leave: this generation, or the next if none trains.
    pub(super) fn begin_drain(&mut self, now: Time, reason: String) {
        self.note_drain(now, reason.clone());
        if matches!(self.phase, Phase::Draining { .. }) {
            self.send_placed(&to_worker::Body::Drain(v1::Drain { reason }));
        }
    }

    fn note_drain(&mut self, now: Time, reason: String) {
        let until = now.after(self.config.drain_timeout);
        self.note(Note::Draining { reason: reason.clone() });
        if self.phase == Phase::Training {
            self.phase = Phase::Draining { reason: reason.clone(), until };
        }
        self.drain = Some(Drain { reason, until });
    }

    /// A rank has applied its last step. Once all have, they must agree, and the last commit is awaited.
    pub(super) fn finished(&mut self, now: Time, conn: ConnId, finished: v1::Finished) {
        let runs = matches!(self.phase, Phase::Training | Phase::Draining { .. });
        let Some(member) = self.members.get_mut(conn).filter(|member| runs && member.rank().is_some() && member.finished.is_none()) else {
            return self.counts.add("refused_out_of_turn", 1);
        };
        member.finished = Some(finished);
        if finished.outcome() == v1::Outcome::Preempted && self.phase == Phase::Training {
            let reason = self.members.who(conn).map_or_else(String::new, |who| format!("{who} was told to leave"));
            self.note_drain(now, reason);
        }
        if let Some(all) = self.members.all_finished() {
            self.close(now, &all);
        }
    }

    fn close(&mut self, now: Time, all: &[(Rank, v1::Finished)]) {
        let steps: Vec<_> = all.iter().map(|(rank, finished)| (*rank, finished.step.to_string())).collect();
        let outcomes: Vec<_> = all.iter().map(|(rank, finished)| (*rank, finished.outcome().as_str_name().to_owned())).collect();
        let step = Step(all[0].1.step);
        for (field, values) in [(Field::Step, steps), (Field::Outcome, outcomes)] {
            if let Some(failure) = self.members.disagreement(field, step, &values) {
                return self.fail(failure);
            }
        }
        let complete = step.0 >= self.config.steps;
        let preempted = match &self.drain {
            _ if complete => None,
            Some(drain) => Some(drain.reason.clone()),
            None => Some("the workers left before the last step".into()),
        };
        self.phase = Phase::Closing { step, preempted, until: now.after(self.closing_patience(step)) };
        self.try_end(now);
    }

    /// How long the last commit is waited for: not long, where a worker came back, so that what it said of that commit may be lost.
    fn closing_patience(&self, step: Step) -> u64 {
        let shaken = self.lineup.as_ref().is_some_and(|lineup| lineup.shaken.is_some());
        if shaken && !self.commits.is_reported(step, self.world()) { self.config.welcome.lease_ms } else { self.config.commit_timeout }
    }

    /// Ends the run if its last commit is recorded.
    pub(super) fn try_end(&mut self, now: Time) {
        let Phase::Closing { step, preempted, .. } = &self.phase else { return };
        if self.last_commit() != *step || self.commits.has_pending() {
            return;
        }
        let outcome = match preempted.clone() {
            None => Outcome::Done,
            Some(reason) => Outcome::Preempted { reason },
        };
        self.end(now, outcome);
    }

    /// Records the end; the outcome stands once the record does.
    pub(super) fn end(&mut self, now: Time, outcome: Outcome) {
        self.effects.push(Effect::Append(self.end_record(&outcome)));
        self.phase = Phase::Ending { outcome, until: now.after(self.config.commit_timeout) };
    }

    fn end_record(&self, outcome: &Outcome) -> Body {
        let step = match self.phase {
            Phase::Closing { step, .. } => step.0,
            _ => self.progress.step(),
        };
        Body::End { outcome: outcome.record(), step, reason: outcome.reason() }
    }

    /// The end's record stands.
    pub(super) fn end_recorded(&mut self) {
        if let Phase::Ending { outcome, .. } = &self.phase {
            let outcome = outcome.clone();
            self.over(outcome, false);
        }
    }

    /// Ends the run as failed: survivors are told at once, then the log. Only the first reason counts.
    pub(super) fn fail(&mut self, failure: Failure) {
        if !self.phase.is_over() {
            let record = !failure.is_of_log();
            self.over(failure.into(), record);
        }
    }

    fn over(&mut self, outcome: Outcome, record: bool) {
        self.keep_all_timing();
        self.write_last_down();
        let reason = outcome.reason();
        if let Some(word) = self.last_word(&outcome) {
            let conns = self.members.which(|member| member.finished.is_none() || matches!(word, to_worker::Body::Abort(_)));
            self.send_to(&conns, &word);
        }
        for conn in self.members.close_all() {
            self.close_stream(conn);
        }
        if record {
            self.effects.push(Effect::Append(self.end_record(&outcome)));
        }
        self.note(Note::Ended { outcome: outcome.name(), step: self.progress.step(), reason, permanent: outcome.is_permanent() });
        self.phase = Phase::Over(outcome.clone());
        self.effects.push(Effect::Finish(outcome));
    }

    /// What workers are told at the end. Those of a run that another coordinator has taken over go on to that one, and those of a run that
    /// is done are told so when they ask.
    fn last_word(&self, outcome: &Outcome) -> Option<to_worker::Body> {
        let reason = outcome.reason();
        match (outcome, &self.phase) {
            (Outcome::Failed(failure), _) if matches!(**failure, Failure::Superseded { .. }) => None,
            (Outcome::Preempted { .. }, Phase::Ending { .. }) => Some(to_worker::Body::Release(v1::Release { reason })),
            (Outcome::Done, Phase::Ending { .. }) => None,
            _ => Some(to_worker::Body::Abort(v1::Abort { reason, permanent: outcome.is_permanent() })),
        }
    }
}
