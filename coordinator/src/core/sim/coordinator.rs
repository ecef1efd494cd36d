//! A coordinator's process: the real core, and what the shell does around it (driver, keeper, the opening of a run).

use super::network::{Node, Packet};
use super::store::Fate;
use super::world::{Happening, World};
use crate::core::tests::Oracle;
use crate::core::{Core, Failure, History, Note, Outcome};
use crate::machine::{Closed, ConnId, Effect, Event, Machine, Time};
use ella_proto::ids::Term;
use ella_proto::v1::{FromWorker, from_worker};
use ella_store::{Body, Record, RunState};
use std::collections::{BTreeMap, VecDeque};

/// Appends that fail are tried so often; the keeper goes by the time.
const TRIES: u32 = 3;
/// Messages that may wait to be sent to one worker, with what its sockets hold.
const OUTGOING: usize = 128;
/// How long a process waits for its log after its driver has ended.
const WIND_DOWN: u64 = 30_000;

/// Where a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Opening,
    Serving,
    /// Only the log is waited for.
    Leaving,
    Gone,
}

/// What is asked of the log.
#[allow(clippy::large_enum_variant)] // a few at a time
#[derive(Debug)]
pub(super) enum Attempt {
    Claim { seq: u64 },
    Append { body: Body },
}

/// What the log answers.
#[allow(clippy::large_enum_variant)] // a few at a time
#[derive(Debug)]
pub(super) enum Answer {
    Claimed {
        created: bool,
        seq: u64,
    },
    Created(Body),
    Taken(Body, Record),
    /// Whether it was written is unknown.
    Failed(Option<Body>),
}

#[allow(clippy::large_enum_variant)]
enum Work {
    Append(Body),
    Delete(Vec<String>),
}

/// The one task that writes the log.
#[derive(Default)]
struct Keeper {
    queue: VecDeque<Work>,
    busy: bool,
    tries: u32,
    next: u64,
    broken: bool,
}

/// A process.
pub(super) struct Coordinator {
    pub(super) stage: Stage,
    pub(super) frozen_until: u64,
    pub(super) core: Option<Core>,
    pub(super) outcome: Option<Outcome>,
    pub(super) streams: BTreeMap<ConnId, usize>,
    pub(super) term: u64,
    oracle: Option<Oracle>,
    began: u64,
    next_conn: u64,
    keeper: Keeper,
    /// When it is woken next.
    armed: u64,
    /// Wakes at one time.
    wakes: (u64, u32),
}

impl Coordinator {
    /// Whether the process lives.
    pub(super) fn lives(&self) -> bool {
        self.stage != Stage::Gone
    }
}

/// Whether an event is too common to be shown.
fn is_routine(event: &Event) -> bool {
    let beats = |message: &FromWorker| matches!(message.body, Some(from_worker::Body::Heartbeat(_) | from_worker::Body::Progress(_)));
    matches!(event, Event::Tick) || matches!(event, Event::Message(_, message) if beats(message))
}

fn nonce(c: usize) -> String {
    format!("c{c}")
}

impl World {
    /// Starts a process.
    pub(super) fn spawn_coordinator(&mut self) {
        self.coordinators.push(Coordinator {
            stage: Stage::Opening,
            frozen_until: 0,
            core: None,
            outcome: None,
            streams: BTreeMap::new(),
            term: 0,
            oracle: None,
            began: 0,
            next_conn: 0,
            keeper: Keeper::default(),
            armed: u64::MAX,
            wakes: (0, 0),
        });
        let coordinator = self.coordinators.len() - 1;
        self.see("coordinators");
        let delay = self.between(10, 400);
        self.after(delay, Happening::Open { coordinator });
    }

    /// Reads the log, and claims the next term if the run is not complete.
    pub(super) fn open(&mut self, c: usize) {
        if self.coordinators[c].stage != Stage::Opening {
            return;
        }
        let state = self.log_state();
        if state.is_done() {
            return self.gone(c, Some(Outcome::Done));
        }
        let seq = self.store.records.len() as u64;
        self.attempt(c, Attempt::Claim { seq });
    }

    fn attempt(&mut self, c: usize, attempt: Attempt) {
        let delay = self.takes(self.store.log);
        self.after(delay, Happening::Put { coordinator: c, attempt: Box::new(attempt) });
    }

    /// A conditional put reaches the store. It does so even if who sent it is stopped or dead by now.
    pub(super) fn put(&mut self, c: usize, attempt: Attempt) {
        if !self.coordinators[c].lives() && self.random.chance(2) {
            return;
        }
        let fate = self.fate(self.store.log);
        let body = match &attempt {
            Attempt::Claim { .. } => Body::Term(self.setup.term_record()),
            Attempt::Append { body } => body.clone(),
        };
        let (seq, term) = match attempt {
            Attempt::Claim { seq } => (seq, self.log_state().term + 1),
            Attempt::Append { .. } => (self.coordinators[c].keeper.next, self.coordinators[c].term),
        };
        let record = Record { seq, term, nonce: nonce(c), at_unix_ms: self.now, body: body.clone() };
        let created = fate != Fate::Refused && self.create(record);
        if created && matches!(attempt, Attempt::Claim { .. }) {
            self.coordinators[c].term = term;
        }
        let answer = match (fate, attempt) {
            (Fate::Done, Attempt::Claim { seq }) => Answer::Claimed { created, seq },
            (Fate::Done, Attempt::Append { .. }) if created => Answer::Created(body),
            (Fate::Done, Attempt::Append { .. }) => Answer::Taken(body, self.store.records[seq as usize].clone()),
            (_, Attempt::Claim { .. }) => Answer::Failed(None),
            (_, Attempt::Append { .. }) => {
                self.see(if created { "records whose answer was lost" } else { "puts that failed" });
                Answer::Failed(Some(body))
            }
        };
        let delay = self.takes(self.store.log);
        self.after(delay, Happening::Answer { coordinator: c, answer: Box::new(answer) });
    }

    pub(super) fn answer(&mut self, c: usize, answer: Answer) {
        if !self.coordinators[c].lives() {
            return;
        }
        match answer {
            Answer::Claimed { created: true, seq } => self.claimed(c, seq),
            Answer::Claimed { created: false, .. } => self.open(c),
            Answer::Failed(None) => self.gone(c, None),
            Answer::Created(body) => {
                self.coordinators[c].keeper.next += 1;
                self.appended(c, body);
            }
            Answer::Taken(body, found) => self.taken(c, body, &found),
            Answer::Failed(Some(body)) => self.append_failed(c, body),
        }
    }

    /// The term is this process's. What earlier terms left behind is deleted before it serves.
    fn claimed(&mut self, c: usize, seq: u64) {
        self.coordinators[c].keeper.next = seq + 1;
        let delay = self.between(1, 50);
        self.after(delay, Happening::Serve { coordinator: c });
    }

    pub(super) fn serve(&mut self, c: usize) {
        if self.coordinators[c].stage != Stage::Opening {
            return;
        }
        let (next, term) = (self.coordinators[c].keeper.next, self.coordinators[c].term);
        let state = RunState::from_records(&self.store.records[..next as usize]);
        if self.store.records.len() as u64 == next {
            self.judge_commits(&state);
            let leftovers = self.leftovers(&state, term);
            self.remove_folders(&leftovers);
        }
        if state.last_commit().is_some_and(|commit| commit.step >= self.setup.steps) {
            let body = Body::End { outcome: ella_store::Outcome::Done, step: self.setup.steps, reason: String::new() };
            self.coordinators[c].keeper.busy = true;
            return self.attempt(c, Attempt::Append { body });
        }
        let history = History { term: Term(term), commits: state.commits };
        let oracle = Oracle::new(&history);
        let mut core = Core::new(self.setup.core_config(c), history, Time(0));
        core.mutation = self.bugs.core;
        self.tell(|| format!("c{c} serves in term {term}"));
        let now = self.now;
        let coordinator = &mut self.coordinators[c];
        (coordinator.core, coordinator.oracle, coordinator.began) = (Some(core), Some(oracle), now);
        coordinator.stage = Stage::Serving;
        self.arm(c);
    }

    fn append_failed(&mut self, c: usize, body: Body) {
        let keeper = &mut self.coordinators[c].keeper;
        keeper.tries += 1;
        if keeper.tries < TRIES {
            return self.attempt(c, Attempt::Append { body });
        }
        keeper.broken = true;
        self.see("appends given up");
        self.kept(c, Event::AppendFailed("the store fails".into()));
    }

    /// The number is taken: by an own record whose answer was lost, or by another coordinator.
    fn taken(&mut self, c: usize, body: Body, found: &Record) {
        if found.nonce == nonce(c) {
            self.coordinators[c].keeper.next += 1;
            self.see("own records found");
            return if found.body == body { self.appended(c, body) } else { self.attempt(c, Attempt::Append { body }) };
        }
        self.coordinators[c].keeper.broken = true;
        self.see("superseded");
        self.kept(c, Event::Superseded(Term(found.term)));
        let over = self.coordinators[c].core.as_ref().is_none_or(|core| core.phase.is_over());
        assert!(over, "TERM: a superseded coordinator goes on");
    }

    fn appended(&mut self, c: usize, body: Body) {
        self.kept(c, Event::Appended(body));
    }

    /// The keeper has done a piece of work, and takes up the next.
    fn kept(&mut self, c: usize, event: Event) {
        let keeper = &mut self.coordinators[c].keeper;
        (keeper.busy, keeper.tries) = (false, 0);
        match self.coordinators[c].stage {
            Stage::Serving => self.feed(c, event),
            Stage::Opening => {
                let done = matches!(event, Event::Appended(_)).then_some(Outcome::Done);
                return self.gone(c, done);
            }
            Stage::Leaving | Stage::Gone => {}
        }
        self.keep(c);
    }

    fn keep(&mut self, c: usize) {
        let coordinator = &mut self.coordinators[c];
        let keeper = &mut coordinator.keeper;
        if keeper.busy || !matches!(coordinator.stage, Stage::Serving | Stage::Leaving) {
            return;
        }
        match keeper.queue.pop_front().filter(|_| !keeper.broken) {
            Some(Work::Append(body)) => {
                keeper.busy = true;
                self.attempt(c, Attempt::Append { body });
            }
            Some(Work::Delete(folders)) => {
                keeper.busy = true;
                let delay = self.takes(self.store.log);
                self.after(delay, Happening::Delete { coordinator: c, folders });
            }
            None if coordinator.stage == Stage::Leaving => self.gone_as_decided(c),
            None => {}
        }
    }

    pub(super) fn delete(&mut self, c: usize, folders: &[String]) {
        if self.coordinators[c].lives() {
            self.remove_folders(folders);
            self.see("deletes");
            self.coordinators[c].keeper.busy = false;
            self.keep(c);
        }
    }

    /// A deadline of the core.
    pub(super) fn wake(&mut self, c: usize) {
        let now = self.now;
        let coordinator = &mut self.coordinators[c];
        if coordinator.armed > now || coordinator.stage != Stage::Serving {
            return;
        }
        coordinator.armed = u64::MAX;
        coordinator.wakes = if coordinator.wakes.0 == now { (now, coordinator.wakes.1 + 1) } else { (now, 1) };
        assert!(coordinator.wakes.1 < 5, "P-2: a deadline comes again and again");
        self.feed(c, Event::Tick);
    }

    fn arm(&mut self, c: usize) {
        let coordinator = &mut self.coordinators[c];
        let Some(deadline) = coordinator.core.as_ref().and_then(Machine::next_deadline) else { return };
        let at = (coordinator.began + deadline.0).max(self.now);
        if at < coordinator.armed {
            coordinator.armed = at;
            self.at(at, Happening::Wake { coordinator: c });
        }
    }

    /// The driver: one event in, effects out; streams that are stuck are closed then.
    pub(super) fn feed(&mut self, c: usize, event: Event) {
        let mut next = Some(event);
        let mut stuck = Vec::new();
        while let Some(event) = next {
            if let Event::Closed(conn, _) = &event {
                self.coordinators[c].streams.remove(conn);
            }
            if !is_routine(&event) {
                self.tell(|| format!("c{c} <- {event:?}"));
            }
            let effects = self.handle(c, event);
            for effect in effects {
                self.carry_out(c, effect, &mut stuck);
            }
            next = stuck.pop().map(|conn| Event::Closed(conn, Closed::Stuck));
        }
        self.arm(c);
        self.keep(c);
    }

    fn handle(&mut self, c: usize, event: Event) -> Vec<Effect> {
        let blind = self.bugs.blind;
        let coordinator = &mut self.coordinators[c];
        let (Some(core), Some(oracle)) = (&mut coordinator.core, &mut coordinator.oracle) else { return Vec::new() };
        let now = Time(self.now - coordinator.began);
        let effects = core.handle(now, event.clone());
        if !blind {
            oracle.check(core, now, &event, &effects);
        }
        effects
    }

    fn carry_out(&mut self, c: usize, effect: Effect, stuck: &mut Vec<ConnId>) {
        match effect {
            Effect::Send(conn, message) => {
                let Some(&stream) = self.coordinators[c].streams.get(&conn) else { return };
                let worker = self.streams[stream].worker;
                self.tell(|| format!("c{c} -> w{worker}: {:?}", message.body));
                if self.streams[stream].down.len() >= OUTGOING {
                    self.close_conn(c, conn);
                    stuck.push(conn);
                } else {
                    self.send_down(stream, Packet::Said(message));
                }
            }
            Effect::Close(conn) => self.close_conn(c, conn),
            Effect::Append(body) => self.coordinators[c].keeper.queue.push_back(Work::Append(body)),
            Effect::DeleteFolders(folders) => self.coordinators[c].keeper.queue.push_back(Work::Delete(folders)),
            Effect::Note(note) => self.note(c, &note),
            Effect::Finish(outcome) => {
                self.coordinators[c].outcome = Some(outcome);
                let linger = self.between(100, 1_100);
                self.after(linger, Happening::Close { coordinator: c });
            }
            Effect::Metric(_) | Effect::Timing(_) => {}
        }
    }

    /// What was sent before still goes out.
    fn close_conn(&mut self, c: usize, conn: ConnId) {
        if let Some(stream) = self.coordinators[c].streams.remove(&conn) {
            self.send_down(stream, Packet::Fin);
        }
    }

    fn note(&mut self, c: usize, note: &Note) {
        self.tell(|| format!("c{c} notes {note:?}"));
        let text = serde_json::to_value(note).unwrap();
        let event = text["event"].as_str().unwrap_or_default();
        self.see(&format!("note {event}"));
        let adopted = self.coordinators[c].core.as_ref().and_then(|core| core.lineup.as_ref()?.adopted).is_some();
        match note {
            Note::Ended { outcome, .. } => self.see(&format!("ended {outcome}")),
            Note::Committed { .. } if adopted => self.see("commits after adoption"),
            _ => {}
        }
    }

    /// What a worker sends arrives.
    pub(super) fn arrive_up(&mut self, stream: usize, packet: Packet<FromWorker>) {
        let (c, conn) = (self.streams[stream].coordinator, self.streams[stream].conn);
        if self.coordinators[c].stage != Stage::Serving {
            return;
        }
        let known = self.coordinators[c].streams.get(&conn) == Some(&stream);
        match packet {
            Packet::Fin if known => self.feed(c, Event::Closed(conn, Closed::Gone)),
            Packet::Said(message) if matches!(message.body, Some(from_worker::Body::Hello(_))) && conn == ConnId(0) => {
                let coordinator = &mut self.coordinators[c];
                coordinator.next_conn += 1;
                let conn = ConnId(coordinator.next_conn);
                coordinator.streams.insert(conn, stream);
                self.streams[stream].conn = conn;
                self.feed(c, Event::Message(conn, message));
            }
            // What was read before the stream was closed is taken in after that.
            Packet::Said(message) if known || (conn != ConnId(0) && self.random.chance(4)) => self.say(c, conn, message),
            _ => {}
        }
    }

    fn say(&mut self, c: usize, conn: ConnId, message: FromWorker) {
        if message.term != self.coordinators[c].term && self.is_member(c, conn) {
            self.say_of_another_term(c, conn, message);
        } else {
            self.feed(c, Event::Message(conn, message));
        }
    }

    fn is_member(&self, c: usize, conn: ConnId) -> bool {
        let core = self.coordinators[c].core.as_ref();
        core.and_then(|core| core.members.get(conn)).is_some_and(|member| member.open)
    }

    /// T-1: it changes nothing but a counter.
    fn say_of_another_term(&mut self, c: usize, conn: ConnId, message: FromWorker) {
        self.see("messages of another term");
        self.feed(c, Event::Tick);
        let look = |world: &Self| {
            let core = world.coordinators[c].core.as_ref();
            core.map(|core| format!("{:?} {:?} {:?} {:?}", core.phase, core.generation, core.members, core.commits))
        };
        if !self.is_member(c, conn) {
            return;
        }
        let before = look(self);
        let told = format!("{message:?}");
        self.feed(c, Event::Message(conn, message));
        assert_eq!(before, look(self), "T-1: {told}");
    }

    pub(super) fn repeat_up(&mut self, stream: usize, message: FromWorker) {
        let (worker, c) = (self.streams[stream].worker, self.streams[stream].coordinator);
        if self.heals_at(Node::Worker(worker), Node::Coordinator(c)).is_none() {
            self.see("duplicates");
            self.arrive_up(stream, Packet::Said(message));
        }
    }

    /// An old message of a worker comes on its newest stream. Only another term's: within a term no stream repeats what another has brought.
    pub(super) fn echo(&mut self, worker: usize, message: FromWorker) {
        let Some(stream) = self.workers[worker].stream() else { return };
        let (c, conn) = (self.streams[stream].coordinator, self.streams[stream].conn);
        if self.coordinators[c].frozen_until <= self.now && self.coordinators[c].term != message.term && conn != ConnId(0) {
            self.see("echoes");
            self.arrive_up(stream, Packet::Said(message));
        }
    }

    /// The outcome has had time to be read.
    pub(super) fn close_driver(&mut self, c: usize) {
        if self.coordinators[c].stage != Stage::Serving {
            return;
        }
        self.coordinators[c].stage = Stage::Leaving;
        for (_, stream) in std::mem::take(&mut self.coordinators[c].streams) {
            self.send_down(stream, Packet::Fin);
        }
        self.after(WIND_DOWN, Happening::CutOff { coordinator: c });
        self.keep(c);
    }

    pub(super) fn cut_off(&mut self, c: usize) {
        if self.coordinators[c].lives() {
            self.gone_as_decided(c);
        }
    }

    fn gone_as_decided(&mut self, c: usize) {
        let outcome = self.coordinators[c].outcome.clone();
        self.gone(c, outcome);
    }

    /// The process is gone. `silently`: with its machine, so that nobody is told.
    pub(super) fn kill_coordinator(&mut self, c: usize, silently: bool) {
        self.tell(|| format!("c{c} dies"));
        self.leave_counts(c);
        let coordinator = &mut self.coordinators[c];
        coordinator.stage = Stage::Gone;
        let streams = std::mem::take(&mut coordinator.streams);
        for stream in streams.into_values().filter(|_| !silently) {
            self.send_down(stream, Packet::Fin);
        }
    }

    fn gone(&mut self, c: usize, outcome: Option<Outcome>) {
        self.kill_coordinator(c, false);
        let superseded = matches!(&outcome, Some(Outcome::Failed(failure)) if matches!(**failure, Failure::Superseded { .. }));
        self.coordinator_ended(c, outcome, superseded);
    }

    fn leave_counts(&mut self, c: usize) {
        let counts = self.coordinators[c].core.as_mut().map(|core| std::mem::take(&mut core.counts)).unwrap_or_default();
        for (name, n) in counts.0 {
            self.see_many(&format!("count {name}"), n);
        }
    }
}
