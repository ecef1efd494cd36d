//! The decisions of a job of order-free work: a state machine without I/O, clock or randomness, beside the run's ([`crate::core`]).
//!
//! A job is a set of units in stages. The first stage is the unit `plan`. A unit that is done may name units that follow; they are
//! released when the whole stage is done, and the job is done when a stage ends that named none. Workers come and go at any time, in any
//! number. A job needs no log: units are idempotent and their outputs' store is the memory, so a new coordinator starts at `plan`, which
//! names only what is missing. Instead of a term it has a random session.
//!
//! Invariants (checked after every event by the tests' `Oracle`):
//! - **J-1** a unit is in exactly one place: named, waiting, held, done or given up.
//! - **J-2** a unit is held under one lease; its holder is here, and holds no more units than it asked for.
//! - **J-3** units of a stage are released only when all of the stage before are done.
//! - **J-4** what is done stays done, and the job is done only if all that was ever named is.
//! - **J-5** after the outcome nothing is sent but refusals; the outcome is announced once.
//! - **J-6** until the outcome there is always a next deadline (LIVE), and time in which this process did not run is nobody's silence.
//! - **J-7** what another session says changes nothing but a counter (TERM, KNOWN).

mod failure;
mod lease;
mod progress;
mod status;
#[cfg(test)]
mod tests;
mod units;
mod workers;

pub use failure::{GivenUp, JobFailure};

use crate::core::{Note, Outcome, Refusal};
use crate::machine::{Clock, ConnId, Counts, Effect, Event, Machine, Time};
use ella_proto::v1::{self, FromWorker, RunStatus, ToWorker, from_worker, to_worker};
use progress::Rate;
use units::Units;
use workers::Workers;

/// The first stage's only unit.
pub const PLAN: &str = "plan";
/// Most units that one worker may hold at once; more is cut to this.
pub const MOST_SLOTS: u32 = 32;
/// Characters that are kept of an error.
const MOST_TEXT: usize = 2_000;

/// What the core must know of the job. Times are in milliseconds.
#[derive(Clone, Debug)]
pub struct JobSettings {
    /// What each worker is told on arrival. Its config digest and lease are the ones that hold.
    pub welcome: v1::Welcome,
    /// Workers must have this version.
    pub version: String,
    /// What the units do, in a word.
    pub kind: String,
    /// How long there may be no worker.
    pub start_timeout: u64,
    /// A random number, never 0: this incarnation's.
    pub session: u64,
}

/// Something that happened to a job, for people.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)] // the fields say what they are
pub enum JobNote {
    /// A worker was taken in.
    Joined { worker: String, host: String, pid: u32, workers: usize },
    /// A worker is gone; what it held waits again.
    Gone { worker: String, why: String, requeued: usize },
    /// A worker could not do a unit.
    UnitFailed { unit: String, worker: String, error: String, permanent: bool, given_up: bool },
    /// A stage begins.
    Stage { stage: u32, units: usize },
    /// The outcome.
    Over { outcome: &'static str, stage: u32, reason: String, permanent: bool },
}

/// The state machine of one incarnation of a job's coordinator.
#[derive(Debug)]
pub struct JobCore {
    settings: JobSettings,
    outcome: Option<Outcome>,
    clock: Clock,
    workers: Workers,
    /// Since then all have been heard of; perhaps since later.
    all_heard: Time,
    /// Since when there has been no worker.
    alone: Option<Time>,
    units: Units,
    /// What was refused, retried or lost.
    counts: Counts,
    /// Workers that were taken in.
    joined: u64,
    /// What came of the samples.
    results: Counts,
    /// Of the units that are done.
    samples: u64,
    sample_rate: Rate,
    unit_rate: Rate,
    effects: Vec<Effect>,
}

/// Signs of life: they move deadlines away, and nothing else.
fn is_routine(event: &Event) -> bool {
    use from_worker::Body as B;
    matches!(event, Event::Message(_, FromWorker { body: Some(B::Heartbeat(_) | B::LeaseRenew(_)), .. }))
}

impl Machine for JobCore {
    fn handle(&mut self, now: Time, event: Event) -> Vec<Effect> {
        let (now, stopped) = self.clock.advance(now, self.deadline(), self.settings.welcome.lease_ms / 4);
        self.counts.add_some("coordinator_stopped", usize::from(stopped));
        let routine = is_routine(&event);
        match event {
            Event::Message(conn, message) => self.message(now, conn, message),
            Event::Closed(conn, how) => self.closed(now, conn, how),
            Event::Stop(reason) | Event::Leave(reason) => self.end(Outcome::Preempted { reason }),
            // A job's workers come and go as they like: none needs to be asked.
            Event::Drain { .. } => self.counts.add("refused_of_a_run", 1),
            // The log's events: a job has none.
            Event::Tick | Event::Appended(_) | Event::PartUnseen { .. } | Event::Superseded(_) => {}
            Event::AppendFailed(_) | Event::LogGone(_) => {}
        }
        // Most of what thousands of workers say changes nothing that all of them must be looked at for.
        if self.outcome.is_none() && (!routine || self.deadline().is_some_and(|at| at <= now)) {
            self.expire(now);
            self.step(now);
        }
        std::mem::take(&mut self.effects)
    }

    fn next_deadline(&self) -> Option<Time> {
        self.deadline().map(|at| at.after(self.clock.stopped))
    }

    fn status(&self, now: Time) -> RunStatus {
        self.run_status(self.clock.read(now))
    }
}

impl JobCore {
    /// A coordinator that waits for workers.
    pub fn new(settings: JobSettings, now: Time) -> Self {
        Self {
            outcome: None,
            clock: Clock::new(now),
            workers: Workers::default(),
            all_heard: now,
            alone: Some(now),
            units: Units::new(PLAN, settings.welcome.lease_ms),
            counts: Counts::default(),
            joined: 0,
            results: Counts::default(),
            samples: 0,
            sample_rate: Rate::new(now),
            unit_rate: Rate::new(now),
            effects: Vec::new(),
            settings,
        }
    }

    fn deadline(&self) -> Option<Time> {
        if self.outcome.is_some() {
            return None;
        }
        let alone = self.alone.map(|since| since.after(self.settings.start_timeout));
        let silent = (!self.workers.is_empty()).then(|| self.all_heard.after(self.settings.welcome.lease_ms));
        [alone, silent, self.units.deadline()].into_iter().flatten().min()
    }

    fn message(&mut self, now: Time, conn: ConnId, message: FromWorker) {
        use from_worker::Body as B;
        let Some(body) = message.body else { return self.counts.add("refused_empty", 1) };
        if let B::Hello(hello) = body {
            return self.hello(now, conn, hello);
        }
        if self.outcome.is_some() {
            return self.counts.add("refused_after_the_end", 1);
        }
        let of_session = message.term == self.settings.session;
        if !self.workers.heard(conn, now, of_session) {
            return self.refuse(conn, String::new(), &Refusal::Malformed { rule: "the first message must be Hello" });
        }
        if !of_session {
            return self.counts.add("refused_other_session", 1);
        }
        match body {
            B::LeaseRequest(request) => self.workers.ask(conn, request.slots.min(MOST_SLOTS)),
            B::LeaseRenew(renew) => self.lease_renew(now, conn, renew),
            B::LeaseThen(then) => self.lease_then(conn, then),
            B::LeaseDone(done) => self.lease_done(now, conn, done),
            B::Finished(_) => self.left(now, conn),
            B::Failed(failed) => self.worker_failed(now, conn, failed),
            B::Heartbeat(beat) => self.beat(conn, &beat),
            B::Hello(_) => {}
            B::Ready(_) | B::Progress(_) | B::State(_) | B::Part(_) | B::Idle(_) | B::Leaving(_) => self.counts.add("refused_of_a_run", 1),
        }
    }

    /// Acts upon what is overdue.
    fn expire(&mut self, now: Time) {
        let expired = self.units.expire(now);
        self.counts.add_some("leases_expired", expired);
        self.look_for_silent(now);
        if self.alone.is_some_and(|since| now.since(since) >= self.settings.start_timeout) {
            self.end(JobFailure::NoWorker { waited_ms: self.settings.start_timeout }.into());
        }
    }

    /// Ends the stage if it is over, and deals what waits to whoever is free.
    fn step(&mut self, now: Time) {
        if self.outcome.is_none() && self.units.stage_is_over() {
            self.next_stage(now);
        }
        if self.outcome.is_none() {
            self.deal(now);
        }
    }

    fn next_stage(&mut self, now: Time) {
        let units = self.units.given_up();
        if !units.is_empty() {
            let stage = self.units.stage();
            return self.end(JobFailure::GivenUp { stage: stage.number, of: stage.units, units }.into());
        }
        if !self.units.release() {
            return self.end(Outcome::Done);
        }
        let stage = self.units.stage();
        self.unit_rate = Rate::new(now);
        self.note(JobNote::Stage { stage: stage.number, units: stage.units });
    }

    fn end(&mut self, outcome: Outcome) {
        if self.outcome.is_some() {
            return;
        }
        let (reason, permanent) = (outcome.reason(), outcome.is_permanent());
        let over = v1::JobOver { outcome: outcome.on_the_wire().into(), reason: reason.clone(), permanent };
        for conn in self.workers.remove_all() {
            self.send(conn, to_worker::Body::JobOver(over.clone()));
            self.effects.push(Effect::Close(conn));
        }
        self.note(JobNote::Over { outcome: outcome.name(), stage: self.units.stage().number, reason, permanent });
        self.outcome = Some(outcome.clone());
        self.effects.push(Effect::Finish(outcome));
    }

    fn send(&mut self, conn: ConnId, body: to_worker::Body) {
        let message = ToWorker { term: self.settings.session, generation: 0, body: Some(body) };
        self.effects.push(Effect::Send(conn, message));
    }

    fn note(&mut self, note: JobNote) {
        self.effects.push(Effect::Note(Note::Job(note)));
    }
}

impl From<JobFailure> for Outcome {
    fn from(failure: JobFailure) -> Self {
        crate::core::Failure::Job(failure).into()
    }
}
