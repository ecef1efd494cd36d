//! The core by value: given, when, then exactly these effects. Every event passes the [`Oracle`], which checks the invariants that the
//! job's documentation names.

mod end;
mod lease;
mod random;
mod worker;

use super::*;
use crate::machine::Closed;
use std::collections::{BTreeMap, BTreeSet};

pub(super) const SESSION: u64 = 77;
pub(super) const LEASE: u64 = 1_000;
pub(super) const START: u64 = 10_000;

pub(super) fn settings() -> JobSettings {
    JobSettings {
        welcome: v1::Welcome {
            run_url: "data/a".into(),
            config_toml: "[job]".into(),
            config_digest: "c0ffee".into(),
            heartbeat_ms: LEASE / 4,
            lease_ms: LEASE,
            orphan_ms: 5_000,
            step_timeout_ms: 0,
            ..v1::Welcome::default()
        },
        version: "1".into(),
        kind: "prepare".into(),
        start_timeout: START,
        session: SESSION,
    }
}

pub(super) fn hello(n: u64) -> v1::Hello {
    v1::Hello { worker_id: format!("w{n}"), version: "1".into(), host: format!("h{n}"), pid: n as u32, ..v1::Hello::default() }
}

pub(super) fn conn(n: u64) -> ConnId {
    ConnId(n)
}

pub(super) fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub(super) fn done(lease_id: u64, unit: &str, then: &[&str]) -> from_worker::Body {
    from_worker::Body::LeaseDone(v1::LeaseDone { lease_id, unit: unit.into(), then: names(then), ..v1::LeaseDone::default() })
}

pub(super) fn failed(lease_id: u64, unit: &str, error: &str, permanent: bool) -> from_worker::Body {
    let (unit, error) = (unit.into(), error.into());
    from_worker::Body::LeaseDone(v1::LeaseDone { lease_id, unit, error, permanent, ..v1::LeaseDone::default() })
}

pub(super) fn ask(slots: u32) -> from_worker::Body {
    from_worker::Body::LeaseRequest(v1::LeaseRequest { slots })
}

pub(super) fn to(n: u64, body: to_worker::Body) -> Effect {
    Effect::Send(conn(n), ToWorker { term: SESSION, generation: 0, body: Some(body) })
}

pub(super) fn grant(n: u64, lease_id: u64, unit: &str) -> Effect {
    to(n, to_worker::Body::LeaseGrant(v1::LeaseGrant { unit: unit.into(), lease_id }))
}

pub(super) fn note(note: JobNote) -> Effect {
    Effect::Note(Note::Job(note))
}

/// A core under test, with its own time.
pub(super) struct Job {
    pub(super) core: JobCore,
    pub(super) now: Time,
    oracle: Oracle,
}

impl Job {
    pub(super) fn new() -> Self {
        Self { core: JobCore::new(settings(), Time(0)), now: Time(0), oracle: Oracle::default() }
    }

    /// Workers 1 and 2, with a slot each, at the second stage. Of its units, 1 holds the first and 2 the second, if there are so many.
    pub(super) fn planned(units: &[&str]) -> Self {
        let mut job = Self::new();
        job.hello(1);
        job.say(1, ask(1));
        job.say(1, done(1, PLAN, units));
        job.hello(2);
        job.say(2, ask(1));
        job
    }

    pub(super) fn event(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.core.handle(self.now, event);
        self.oracle.check(&self.core, &effects);
        effects
    }

    pub(super) fn hello(&mut self, n: u64) -> Vec<Effect> {
        self.say_as(0, n, from_worker::Body::Hello(hello(n)))
    }

    pub(super) fn say(&mut self, n: u64, body: from_worker::Body) -> Vec<Effect> {
        self.say_as(SESSION, n, body)
    }

    pub(super) fn say_as(&mut self, term: u64, n: u64, body: from_worker::Body) -> Vec<Effect> {
        self.event(Event::Message(conn(n), FromWorker { term, generation: 0, body: Some(body) }))
    }

    pub(super) fn close(&mut self, n: u64) -> Vec<Effect> {
        self.event(Event::Closed(conn(n), Closed::Gone))
    }

    /// Time passes; these workers give signs of life, and come back at every deadline as the shell does.
    pub(super) fn until(&mut self, at: u64, alive: &[u64]) -> Vec<Effect> {
        let mut effects = Vec::new();
        while self.now.0 < at {
            let next = self.core.next_deadline().map_or(at, |next| next.0.min(at)).min(self.now.0 + LEASE / 4);
            self.now = Time(next.max(self.now.0 + 1));
            for n in alive {
                effects.extend(self.say(*n, from_worker::Body::Heartbeat(v1::Heartbeat::default())));
            }
            effects.extend(self.event(Event::Tick));
        }
        effects
    }

    pub(super) fn count(&self, name: &str) -> u64 {
        self.core.status(self.now).counts.get(name).copied().unwrap_or(0)
    }

    pub(super) fn status(&self) -> v1::JobStatus {
        self.core.status(self.now).job.unwrap()
    }

    pub(super) fn outcome(&self) -> Outcome {
        self.core.outcome.clone().unwrap()
    }
}

/// Checks the named invariants after every event.
#[derive(Default)]
struct Oracle {
    done: BTreeSet<String>,
    stage: BTreeMap<u32, usize>,
    finished: bool,
}

impl Oracle {
    fn check(&mut self, core: &JobCore, effects: &[Effect]) {
        core.units.check();
        if core.outcome.is_none() {
            for lease in core.units.leases() {
                let holder = core.workers.iter().find(|(conn, _)| *conn == lease.holder);
                assert!(holder.is_some(), "J-2: {} is held by nobody", lease.unit);
            }
        }
        let was_over = self.finished;
        for effect in effects {
            self.check_effect(core, effect, was_over);
        }
        self.check_done(core);
        assert_eq!(core.outcome.is_some(), self.finished, "J-5: the outcome is announced once, when it is decided");
        assert_eq!(core.next_deadline().is_some(), !self.finished, "J-6");
    }

    fn check_effect(&mut self, core: &JobCore, effect: &Effect, was_over: bool) {
        match effect {
            Effect::Send(_, ToWorker { body: Some(to_worker::Body::Refused(_)), .. }) => {}
            Effect::Send(conn, ToWorker { body: Some(to_worker::Body::LeaseGrant(granted)), .. }) => {
                assert!(!was_over, "J-5: a grant after the outcome");
                let slots = core.workers.iter().find(|(other, _)| other == conn).map(|(_, worker)| worker.slots);
                let held = core.units.laden().get(conn).copied().unwrap_or(0);
                assert!(slots.is_none_or(|slots| held <= slots as usize), "J-2: {held} of {slots:?} for {}", granted.unit);
            }
            Effect::Send(..) => assert!(!was_over, "J-5: {effect:?} after the outcome"),
            Effect::Note(Note::Job(JobNote::Stage { stage, units })) => {
                assert_eq!(*stage as usize, self.stage.len() + 2, "J-3: stages follow each other");
                self.stage.insert(*stage, *units);
            }
            Effect::Finish(outcome) => {
                assert!(!self.finished, "J-5: a second outcome");
                self.finished = true;
                assert!(*outcome != Outcome::Done || core.units.all_done(), "J-4");
            }
            Effect::Close(_) | Effect::Note(_) => {}
            Effect::Append(_) | Effect::DeleteFolders(_) | Effect::Metric(_) | Effect::Timing(_) => panic!("a job has no log: {effect:?}"),
        }
    }

    fn check_done(&mut self, core: &JobCore) {
        let now = core.units.done_names();
        assert!(self.done.is_subset(&now), "J-4: {:?} is no longer done", self.done.difference(&now));
        self.done = now;
    }
}
