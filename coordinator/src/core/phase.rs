//! Where the run is, why it waits, and how it ends.

use super::{Core, Effect, Failure, Field, Note, Than, Time};
use crate::core::ConnId;
use ella_proto::ids::{Rank, Step};
use ella_proto::v1::{self, to_worker};
use ella_store::Body;
use std::fmt;

/// How a run ended, as far as this coordinator is concerned.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// All steps are applied and committed.
    Done,
    /// Told to leave; it can be resumed.
    Preempted {
        /// By whom, or why.
        reason: String,
    },
    /// It could not go on.
    Failed(Box<Failure>),
}

impl Outcome {
    /// The process's exit code (design.md §6).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed(_) => {
                if self.is_permanent() {
                    4
                } else {
                    1
                }
            }
            Self::Preempted { .. } => 3,
        }
    }

    /// Whether it failed, and would fail in the same way again.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Failed(failure) if failure.permanent())
    }

    /// As the wire says it.
    pub(crate) fn on_the_wire(&self) -> v1::Outcome {
        match self {
            Self::Done => v1::Outcome::Done,
            Self::Preempted { .. } => v1::Outcome::Preempted,
            Self::Failed(_) => v1::Outcome::Failed,
        }
    }

    /// One word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Preempted { .. } => "preempted",
            Self::Failed(_) => "failed",
        }
    }

    /// Why, in words; empty for a run that is done.
    pub fn reason(&self) -> String {
        match self {
            Self::Done => String::new(),
            Self::Preempted { reason } => reason.clone(),
            Self::Failed(failure) => failure.to_string(),
        }
    }

    fn record(&self) -> ella_store::Outcome {
        match self {
            Self::Done => ella_store::Outcome::Done,
            Self::Preempted { .. } => ella_store::Outcome::Preempted,
            Self::Failed(_) => ella_store::Outcome::Failed,
        }
    }
}

/// Where the run is.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// For workers to come.
    Waiting {
        /// It fails then.
        until: Time,
    },
    /// Ranks are assigned; workers load and restore.
    Starting {
        /// It fails then.
        until: Time,
    },
    /// Steps are being taken.
    Training,
    /// Workers were asked to commit and leave, or one of them is leaving.
    Draining {
        /// Why.
        reason: String,
        /// It fails then.
        until: Time,
    },
    /// All ranks have applied their last step; its commit is awaited.
    Closing {
        /// That step.
        step: Step,
        /// Why it is not the run's last step, if it is not.
        preempted: Option<String>,
        /// It fails then.
        until: Time,
    },
    /// The end is being recorded.
    Ending {
        /// What is recorded.
        outcome: Outcome,
        /// It fails then.
        until: Time,
    },
    /// The outcome is decided.
    Over(Outcome),
}

impl Phase {
    /// Whether the outcome is decided.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Over(_))
    }

    /// Whether ranks take steps, commit, or have just done so.
    pub(super) fn has_begun(&self) -> bool {
        matches!(self, Self::Training | Self::Draining { .. } | Self::Closing { .. })
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        match self {
            Self::Waiting { until }
            | Self::Starting { until }
            | Self::Draining { until, .. }
            | Self::Closing { until, .. }
            | Self::Ending { until, .. } => Some(*until),
            Self::Training | Self::Over(_) => None,
        }
    }

    /// The word of `RunStatus.phase`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting",
            Self::Starting { .. } => "starting",
            Self::Training | Self::Closing { preempted: None, .. } | Self::Ending { outcome: Outcome::Done, .. } => "training",
            Self::Draining { .. } | Self::Closing { .. } | Self::Ending { .. } => "draining",
            Self::Over(outcome) => outcome.name(),
        }
    }
}

/// Why the run waits.
#[derive(Clone, Debug, PartialEq)]
pub enum Wait {
    /// For workers to come.
    Workers {
        /// That are here.
        have: usize,
        /// That are needed.
        need: usize,
    },
    /// For ranks to load and restore.
    Loading {
        /// Not ready yet.
        ranks: Vec<Rank>,
    },
    /// For captions to be encoded, before the next step.
    Encoding {
        /// Whose.
        ranks: Vec<Rank>,
        /// That they have encoded.
        captions: u64,
    },
    /// For workers to reach a step boundary and commit.
    Boundary {
        /// Why they were asked to.
        reason: String,
    },
    /// For the last commit.
    LastCommit {
        /// Its step.
        step: Step,
    },
    /// For the end to be recorded.
    Record,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workers { have, need } => write!(f, "waiting for workers: {have} of {need} are here"),
            Self::Loading { ranks } => {
                let ranks: Vec<String> = ranks.iter().map(Rank::to_string).collect();
                write!(f, "waiting for ranks to load and restore: {}", ranks.join(", "))
            }
            Self::Encoding { ranks, captions } => {
                let ranks: Vec<String> = ranks.iter().map(Rank::to_string).collect();
                write!(f, "the next step waits for captions to be encoded: {captions} are, by ranks {}", ranks.join(", "))
            }
            Self::Boundary { reason } => write!(f, "waiting for the workers to commit and leave ({reason})"),
            Self::LastCommit { step } => write!(f, "waiting for the commit of step {step}"),
            Self::Record => f.write_str("waiting for the log to take the end's record"),
        }
    }
}

impl Core {
    /// Where the run is.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Why the run waits, if it does.
    pub fn wait(&self) -> Option<Wait> {
        match &self.phase {
            Phase::Waiting { .. } => Some(Wait::Workers { have: self.members.len(), need: self.config.workers }),
            Phase::Starting { .. } => Some(Wait::Loading { ranks: self.members.not_ready() }),
            Phase::Draining { reason, .. } => Some(Wait::Boundary { reason: reason.clone() }),
            Phase::Closing { step, .. } => Some(Wait::LastCommit { step: *step }),
            Phase::Ending { .. } => Some(Wait::Record),
            Phase::Training => self.members.encoding(),
            Phase::Over(_) => None,
        }
    }

    pub(super) fn phase_expired(&mut self, now: Time) {
        if self.phase.deadline().is_none_or(|until| now < until) {
            return;
        }
        let waited_ms = self.config.start_timeout;
        let failure = match &self.phase {
            Phase::Waiting { .. } => Failure::TooFew { have: self.members.len(), need: self.config.workers, waited_ms },
            Phase::Starting { .. } => match self.members.first_not_ready() {
                Some(who) => Failure::NotReady { who, waited_ms },
                None => return,
            },
            Phase::Draining { reason, .. } => Failure::DrainOverdue { reason: reason.clone(), waited_ms: self.config.drain_timeout },
            Phase::Closing { step, .. } => {
                Failure::NoLastCommit { step: *step, last: self.last_commit(), waited_ms: self.config.commit_timeout }
            }
            Phase::Ending { .. } => Failure::Append { error: format!("no answer within {} ms", self.config.commit_timeout) },
            Phase::Training | Phase::Over(_) => return,
        };
        self.fail(failure);
    }

    /// Asks the workers to commit and leave. What has not begun training has nothing to commit.
    pub(super) fn stop(&mut self, now: Time, reason: String) {
        match &self.phase {
            Phase::Waiting { .. } | Phase::Starting { .. } => {
                self.send_all(&to_worker::Body::Abort(v1::Abort { reason: reason.clone() }));
                self.end(now, Outcome::Preempted { reason });
            }
            Phase::Training => {
                self.drain(now, reason.clone());
                self.send_all(&to_worker::Body::Drain(v1::Drain { reason }));
            }
            Phase::Draining { .. } | Phase::Closing { .. } | Phase::Ending { .. } | Phase::Over(_) => {}
        }
    }

    /// Leaves now: what is not committed is lost, the last commit stays.
    pub(super) fn leave(&mut self, reason: String) {
        if !self.phase.is_over() {
            self.over(Outcome::Preempted { reason }, true);
        }
    }

    fn drain(&mut self, now: Time, reason: String) {
        self.note(Note::Draining { reason: reason.clone() });
        self.phase = Phase::Draining { reason, until: now.after(self.config.drain_timeout) };
    }

    /// A rank has applied its last step. Once all have, they must agree, and the last commit is awaited.
    pub(super) fn finished(&mut self, now: Time, conn: ConnId, finished: v1::Finished) {
        if !matches!(self.phase, Phase::Training | Phase::Draining { .. }) || !self.members.set_finished(conn, finished) {
            return self.counts.add("refused_out_of_turn", 1);
        }
        if finished.outcome() == v1::Outcome::Preempted && self.phase == Phase::Training {
            let reason = self.members.who(conn).map_or_else(String::new, |who| format!("{who} was told to leave"));
            self.drain(now, reason);
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
        let preempted = match &self.phase {
            _ if complete => None,
            Phase::Draining { reason, .. } => Some(reason.clone()),
            _ => Some("the workers left before the last step".into()),
        };
        self.phase = Phase::Closing { step, preempted, until: now.after(self.config.commit_timeout) };
        self.try_end(now);
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
    fn end(&mut self, now: Time, outcome: Outcome) {
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
        let reason = outcome.reason();
        let aborts = !matches!(self.phase, Phase::Ending { .. }) || matches!(outcome, Outcome::Failed(_));
        if aborts {
            self.send_all(&to_worker::Body::Abort(v1::Abort { reason: reason.clone() }));
        }
        for conn in self.members.close_all() {
            self.effects.push(Effect::Close(conn));
        }
        if record {
            self.effects.push(Effect::Append(self.end_record(&outcome)));
        }
        self.note(Note::Ended { outcome: outcome.name(), step: self.progress.step(), reason, permanent: outcome.is_permanent() });
        self.phase = Phase::Over(outcome.clone());
        self.effects.push(Effect::Finish(outcome));
    }

    /// A worker says that it can't go on. A broken collective is mostly someone else's fault: the one at fault has a moment to show.
    pub(super) fn worker_failed(&mut self, now: Time, conn: ConnId, failed: v1::Failed) {
        self.counts.add("workers_failed", 1);
        let kind = failed.kind();
        let Some(who) = self.members.set_failed(conn) else { return };
        let failure = Failure::Worker { who, kind, message: failed.message, permanent: failed.permanent };
        if kind != v1::FailureKind::Collective || failed.permanent {
            return self.fail(failure);
        }
        let (until, first) = self.suspicion.take().unwrap_or((now.after(self.config.blame_window), failure));
        if self.members.all_failed() {
            return self.fail(first);
        }
        self.suspicion = Some((until, first));
    }

    /// What a rank reports differs from what the run resumes from.
    pub(super) fn differs_from_start(
        &self,
        field: Field,
        values: &[(Rank, String)],
        expected: &str,
        from: Option<Step>,
    ) -> Option<Failure> {
        let (rank, found) = values.iter().find(|(_, found)| found != expected)?;
        Some(Failure::Differs {
            who: self.members.who_is(*rank)?,
            step: from.unwrap_or(Step(0)),
            field,
            expected: expected.to_owned(),
            found: found.clone(),
            than: from.map_or(Than::FreshStart, Than::Commit),
        })
    }
}
