//! The core by value: given, when, then exactly these effects. Every event passes the [`Oracle`], which checks the invariants that the
//! core's documentation names.

mod adopt;
mod apart;
mod attach;
mod commit;
mod finish;
mod join;
mod leave;
mod loss;
mod oracle;
mod progress;
mod random;
mod ready;
mod regroup;
mod straggle;
mod term;

use super::*;
use crate::machine::MOST_NAMES;
use ella_proto::v1::{Hello, from_worker, to_worker};
use ella_store::{Body, Digest};
pub(super) use oracle::Oracle;
use std::collections::{BTreeMap, BTreeSet};

/// The machines' promise, kept by a look at their sources: nothing in them reaches for a clock, a socket, a file or a random number.
#[test]
fn the_machines_do_no_io() {
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files =
        |folder: &str| std::fs::read_dir(source.join(folder)).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let sources = files("core").chain(files("job")).chain([source.join("machine.rs")]);
    for path in sources {
        let text = std::fs::read_to_string(&path).unwrap();
        for word in ["tokio", "tonic", "SystemTime", "Instant", "std::fs", "std::net", "std::env", "RandomState", "HashMap::new"] {
            assert!(!text.contains(word), "{}: {word}", path.display());
        }
    }
}

pub(super) const TERM: u64 = 3;
const LEASE: u64 = 1_000;

pub(super) fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

pub(super) fn hex(text: &str) -> String {
    digest(text).to_string()
}

pub(super) fn config(workers: usize) -> CoreConfig {
    CoreConfig {
        welcome: v1::Welcome {
            run_url: "/runs/a".into(),
            config_toml: "[run]".into(),
            config_digest: hex("config"),
            heartbeat_ms: LEASE / 4,
            lease_ms: LEASE,
            orphan_ms: 5_000,
            step_timeout_ms: 5_000,
            ..v1::Welcome::default()
        },
        version: "1".into(),
        workers,
        min: 1,
        max: 8,
        join_window: 2_000,
        straggler_evict: false,
        steps: 10,
        keep: 2,
        device: None,
        start_timeout: 10_000,
        commit_timeout: 20_000,
        drain_timeout: 5_000,
        session: [7; 16],
    }
}

pub(super) fn hello(n: u64) -> Hello {
    Hello {
        worker_id: format!("w{n}"),
        version: "1".into(),
        host: format!("h{n}"),
        pid: n as u32,
        device_kind: "cpu".into(),
        device_uuid: String::new(),
        peer_address: format!("10.0.0.{n}:4000"),
        config_digest: String::new(),
        place: None,
        computes: Default::default(),
    }
}

/// A place in a generation of before.
pub(super) fn place(term: u64, generation: u64, rank: u32, world: u32, step: u64) -> v1::Place {
    v1::Place { term, generation, rank, world, step, ready: Some(ready(0)) }
}

pub(super) fn conn(n: u64) -> ConnId {
    ConnId(n)
}

pub(super) fn who(n: u64, rank: Option<u32>) -> Who {
    Who { worker_id: format!("w{n}"), rank: rank.map(ella_proto::ids::Rank), host: format!("h{n}"), pid: n as u32 }
}

pub(super) fn commit_at(step: u64, term: u64) -> Commit {
    let part = |name: &str| ella_store::Part { name: name.to_owned(), bytes: 5, blake3: digest(name) };
    Commit {
        step,
        generation: 1,
        world: 2,
        folder: ella_store::commit_folder(step, term, 1),
        parts: PARTS.map(part).to_vec(),
        config_digest: digest("config"),
        data_digest: digest("data"),
        models_digest: digest("models"),
        epoch: 0,
        step_in_epoch: step,
        ledger: vec![ella_store::LedgerEpoch { epoch: 0, samples: step * 4, hash: "0".repeat(32) }],
        state_digest: digest(&format!("state {step}")),
        computed_with: [("device".to_owned(), "cpu".to_owned())].into(),
    }
}

pub(super) fn ready(step: u64) -> v1::Ready {
    v1::Ready {
        step,
        state_digest: hex(&format!("state {step}")),
        data_digest: hex("data"),
        models_digest: hex("models"),
        samples_per_epoch: 100,
    }
}

/// What a rank reports that has its state from another, or kept it.
pub(super) fn ready_to_go_on(step: u64) -> v1::Ready {
    v1::Ready { state_digest: String::new(), ..ready(step) }
}

pub(super) fn idle(step: Option<u64>) -> from_worker::Body {
    from_worker::Body::Idle(v1::Idle { step, broken: String::new(), ..v1::Idle::default() })
}

pub(super) fn broken(step: u64, why: &str) -> from_worker::Body {
    from_worker::Body::Idle(v1::Idle { step: Some(step), broken: why.into(), ..v1::Idle::default() })
}

pub(super) fn progress(step: u64, samples: u64) -> v1::Progress {
    v1::Progress { step, samples, loss: 0.5, ..v1::Progress::default() }
}

pub(super) fn state(step: u64) -> from_worker::Body {
    from_worker::Body::State(v1::StateDigest {
        step,
        digest: hex(&format!("state {step}")),
        ledger: vec![v1::LedgerEpoch { epoch: 0, samples: step * 4, hash: "0".repeat(32) }],
        epoch: 0,
        step_in_epoch: step,
    })
}

pub(super) fn part(step: u64, index: usize) -> from_worker::Body {
    let name = PARTS[index];
    from_worker::Body::Part(v1::PartSaved { step, name: name.to_owned(), bytes: 5, blake3: hex(name) })
}

pub(super) fn done(step: u64) -> from_worker::Body {
    from_worker::Body::Finished(v1::Finished { step, outcome: v1::Outcome::Done.into() })
}

pub(super) fn preempted(step: u64) -> from_worker::Body {
    from_worker::Body::Finished(v1::Finished { step, outcome: v1::Outcome::Preempted.into() })
}

/// A core under test, with its own time.
pub(super) struct Run {
    pub(super) core: Core,
    pub(super) now: Time,
    oracle: Oracle,
}

impl Run {
    pub(super) fn new(config: CoreConfig, commits: Vec<Commit>) -> Self {
        let history = History { term: Term(TERM), commits };
        let oracle = Oracle::new(&history);
        Self { core: Core::new(config, history, Time(0)), now: Time(0), oracle }
    }

    /// Two workers, both in, neither ready.
    pub(super) fn assigned(commits: Vec<Commit>) -> Self {
        Self::new(config(2), commits).both_in()
    }

    pub(super) fn both_in(mut self) -> Self {
        self.come(1);
        self.come(2);
        self
    }

    /// A worker attaches and has loaded at once; what that brings about is given.
    pub(super) fn come(&mut self, n: u64) -> Vec<Effect> {
        self.hello(n);
        self.say(n, idle(None))
    }

    /// A worker attaches that holds a state.
    pub(super) fn come_with(&mut self, n: u64, step: u64) -> Vec<Effect> {
        self.hello(n);
        self.say(n, idle(Some(step)))
    }

    /// These say that they are ready, at a step whose state a rank holds.
    pub(super) fn go_on(&mut self, step: u64, ranks: &[u64]) -> Vec<Effect> {
        ranks.iter().map(|n| self.say(*n, from_worker::Body::Ready(ready_to_go_on(step)))).last().unwrap_or_default()
    }

    /// A stream ends.
    pub(super) fn close(&mut self, n: u64) -> Vec<Effect> {
        self.event(Event::Closed(conn(n), Closed::Gone))
    }

    /// Two workers that train.
    pub(super) fn training(commits: Vec<Commit>) -> Self {
        let from = commits.last().map_or(0, |commit| commit.step);
        Self::assigned(commits).both_ready(from)
    }

    /// Two workers that train for so many steps.
    pub(super) fn training_for(steps: u64) -> Self {
        Self::new(CoreConfig { steps, ..config(2) }, vec![]).both_in().both_ready(0)
    }

    pub(super) fn both_ready(mut self, from: u64) -> Self {
        self.say(1, from_worker::Body::Ready(ready(from)));
        self.say(2, from_worker::Body::Ready(ready(from)));
        assert_eq!(self.core.phase(), &Phase::Training);
        self
    }

    pub(super) fn event(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.core.handle(self.now, event.clone());
        self.oracle.check(&self.core, self.now, &event, &effects);
        effects
    }

    pub(super) fn hello(&mut self, n: u64) -> Vec<Effect> {
        self.hello_as(n, hello(n))
    }

    pub(super) fn hello_as(&mut self, n: u64, hello: Hello) -> Vec<Effect> {
        let message = FromWorker { term: 0, generation: 0, body: Some(from_worker::Body::Hello(hello)) };
        self.event(Event::Message(conn(n), message))
    }

    pub(super) fn say(&mut self, n: u64, body: from_worker::Body) -> Vec<Effect> {
        let message = FromWorker { term: TERM, generation: self.core.generation.0, body: Some(body) };
        self.event(Event::Message(conn(n), message))
    }

    pub(super) fn beat(&mut self, n: u64) {
        assert_eq!(self.say(n, from_worker::Body::Heartbeat(v1::Heartbeat::default())), vec![]);
    }

    /// Goes to the next deadline while the other workers keep beating.
    pub(super) fn until(&mut self, at: u64, beating: &[u64]) -> Vec<Effect> {
        let mut effects = Vec::new();
        while self.now < Time(at) {
            self.now = Time(at.min(self.now.0 + LEASE / 4));
            for n in beating {
                if self.core.phase().is_over() {
                    return effects;
                }
                effects.extend(self.say(*n, from_worker::Body::Heartbeat(v1::Heartbeat::default())));
            }
            effects.extend(self.event(Event::Tick));
        }
        effects
    }

    /// Both ranks report a commit's state and save its parts; what the last message brings about is given.
    pub(super) fn report_commit(&mut self, step: u64) -> Vec<Effect> {
        self.say(1, state(step));
        self.say(1, part(step, 0));
        self.say(2, state(step));
        self.say(2, part(step, 1));
        self.say(1, part(step, 2))
    }

    /// A commit, recorded.
    pub(super) fn commit(&mut self, step: u64) -> Vec<Effect> {
        assert_eq!(self.report_commit(step), vec![Effect::Append(Body::Commit(commit_at(step, TERM)))]);
        self.event(Event::Appended(Body::Commit(commit_at(step, TERM))))
    }

    pub(super) fn count(&self, name: &str) -> u64 {
        self.core.status(self.now).counts.get(name).copied().unwrap_or(0)
    }

    pub(super) fn to(&self, n: u64, body: to_worker::Body) -> Effect {
        Effect::Send(conn(n), ToWorker { term: TERM, generation: self.core.generation.0, body: Some(body) })
    }

    pub(super) fn regroup(&self, n: u64, reason: &str) -> Effect {
        self.to(n, to_worker::Body::Regroup(v1::Regroup { at_boundary: false, reason: reason.into() }))
    }

    pub(super) fn boundary(&self, n: u64, reason: &str) -> Effect {
        self.to(n, to_worker::Body::Regroup(v1::Regroup { at_boundary: true, reason: reason.into() }))
    }

    pub(super) fn drain(&self, n: u64, reason: &str) -> Effect {
        self.to(n, to_worker::Body::Drain(v1::Drain { reason: reason.into() }))
    }

    pub(super) fn release(&self, n: u64, reason: &str) -> Effect {
        self.to(n, to_worker::Body::Release(v1::Release { reason: reason.into() }))
    }

    /// Places in the newest generation: worker, source, step, and whether the state is to be copied.
    pub(super) fn places(&self, effects: &[Effect]) -> Vec<(u64, Option<u32>, u64, bool)> {
        let place = |effect: &Effect| match effect {
            Effect::Send(ConnId(n), ToWorker { body: Some(to_worker::Body::Assign(assign)), generation, .. }) => {
                assert_eq!(*generation, self.core.generation.0);
                Some((*n, assign.source, assign.step, assign.copy))
            }
            _ => None,
        };
        effects.iter().filter_map(place).collect()
    }

    pub(super) fn abort(&self, n: u64, reason: &str) -> Effect {
        let permanent = matches!(self.core.phase(), Phase::Over(outcome) if outcome.is_permanent());
        self.to(n, to_worker::Body::Abort(v1::Abort { reason: reason.into(), permanent }))
    }

    /// The failure that the run has ended with.
    pub(super) fn failure(&self) -> Failure {
        match self.core.phase() {
            Phase::Over(Outcome::Failed(failure)) => (**failure).clone(),
            other => panic!("the run has not failed: {other:?}"),
        }
    }
}
