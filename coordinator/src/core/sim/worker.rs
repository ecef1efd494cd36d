//! A worker's process, its control plane: the stream to a coordinator, or to the next one, and the flags that its training thread looks at.
//! It does what `ella-worker`'s `control` does.

use super::network::{Node, Packet, Stream};
use super::rank::Rank;
use super::world::{Happening, World};
use crate::machine::ConnId;
use ella_proto::v1::{self, FromWorker, ToWorker, from_worker, to_worker};
use std::collections::VecDeque;

/// The first and the longest pause between two tries to reach a coordinator, and how long one may take.
const PAUSES: (u64, u64) = (50, 2_000);
const ANSWER: u64 = 2_000;
/// How long a new worker looks for a coordinator.
const PATIENCE: u64 = 10_000;
/// Questions in a row that a coordinator may leave unanswered.
const PROBES: u32 = 4;

/// A bug of a worker, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutant {
    /// It reports commits of a generation that its coordinator does not know.
    CommitsWithoutAuthority,
    /// It takes a state that it could not copy to the end for a whole one.
    KeepsTornCopy,
    /// It computes another rank's lane beside its own.
    TakesForeignLane,
}

/// A generation of a term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Era {
    pub(super) term: u64,
    pub(super) generation: u64,
}

/// What it does in the run, as a coordinator must know it.
#[derive(Clone, Debug)]
pub(super) enum Doing {
    Loading,
    Idle(Option<u64>),
    /// It takes a place, and what it holds may change: the next coordinator is told once that has ended.
    Entering,
    Placed(v1::Place),
    Finished(v1::Finished),
    Failed,
}

/// Its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Away,
    Opening(usize),
    Live(usize),
    /// Its part in the run is over.
    Closed,
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Done,
    Preempted,
    Failed,
    /// It was killed.
    Killed,
}

/// A process.
pub(super) struct Worker {
    pub(super) hello: v1::Hello,
    pub(super) frozen_until: u64,
    pub(super) exit: Option<Exit>,
    /// Its steps take so many times as long until then.
    pub(super) slow: (u64, u64),
    link: Link,
    /// No coordinator has welcomed it yet.
    first: bool,
    pause: u64,
    seeks_until: u64,
    unanswered: u32,
    // The outbox.
    pub(super) term: u64,
    generation: u64,
    /// The newest term that has welcomed it.
    newest: u64,
    pub(super) doing: Doing,
    assigned: Era,
    // The flags.
    pub(super) drain: bool,
    pub(super) parting: bool,
    pub(super) step: u64,
    pub(super) committed: u64,
    pub(super) authority: u64,
    pub(super) activity: v1::Activity,
    pub(super) current: Era,
    ended: Era,
    last_step: Era,
    pub(super) why: Option<Exit>,
    pub(super) inbox: VecDeque<(Era, to_worker::Body)>,
    pub(super) rank: Rank,
}

impl Worker {
    fn new(n: usize) -> Self {
        let hello = v1::Hello {
            worker_id: format!("w{n}"),
            version: "1".into(),
            host: format!("h{n}"),
            pid: n as u32,
            device_kind: "cpu".into(),
            peer_address: format!("w{n}:4000"),
            ..v1::Hello::default()
        };
        Self {
            hello,
            frozen_until: 0,
            exit: None,
            slow: (0, 1),
            link: Link::Away,
            first: true,
            pause: PAUSES.0,
            seeks_until: 0,
            unanswered: 0,
            term: 0,
            generation: 0,
            newest: 0,
            doing: Doing::Loading,
            assigned: Era::default(),
            drain: false,
            parting: false,
            step: 0,
            committed: 0,
            authority: 0,
            activity: v1::Activity::Unspecified,
            current: Era::default(),
            ended: Era::default(),
            last_step: Era::default(),
            why: None,
            inbox: VecDeque::new(),
            rank: Rank::new(),
        }
    }

    /// Whether the process lives.
    pub(super) fn lives(&self) -> bool {
        self.exit.is_none()
    }

    /// The stream on which it was welcomed.
    pub(super) fn stream(&self) -> Option<usize> {
        if let Link::Live(stream) = self.link { Some(stream) } else { None }
    }

    /// Its models are loaded, and it has not failed.
    pub(super) fn has_loaded(&self) -> bool {
        !matches!(self.doing, Doing::Loading | Doing::Failed)
    }

    /// It is in a generation that no coordinator attends to.
    pub(super) fn is_unattended(&self) -> bool {
        self.authority == 0
    }

    /// Whether its generation, or its part in the run, was ended from outside.
    pub(super) fn interrupted(&self) -> bool {
        self.why.is_some() || self.ended >= self.current && self.ended != Era::default()
    }

    /// Whether a generation was ended before it was entered.
    pub(super) fn has_ended(&self, era: Era) -> bool {
        self.ended >= era
    }

    pub(super) fn at_boundary(&self) -> bool {
        self.last_step >= self.current && self.last_step != Era::default()
    }

    /// It enters a generation at its coordinator's word.
    pub(super) fn enter(&mut self, era: Era) {
        (self.current, self.authority) = (era, era.term);
    }

    /// Its place, as it is now.
    fn place(&self) -> Option<v1::Place> {
        let Doing::Placed(place) = &self.doing else { return None };
        let Era { term, generation } = self.current;
        Some(v1::Place { term, generation, step: self.step, ..place.clone() })
    }

    fn heard(&mut self, era: Era, assigned: bool) -> bool {
        let again = assigned && era <= self.assigned;
        if era.term != self.term || era.generation < self.generation || again {
            return false;
        }
        self.generation = era.generation;
        if assigned {
            self.assigned = era;
        }
        true
    }
}

impl World {
    /// Starts a process.
    pub(super) fn spawn_worker(&mut self) {
        let worker = self.workers.len();
        self.workers.push(Worker::new(worker));
        self.workers[worker].seeks_until = self.now + PATIENCE;
        self.see("workers");
        let delay = self.between(1, 300);
        self.after(delay, Happening::Attach { worker });
    }

    /// Says what must arrive, if there is a coordinator.
    fn put_out(&mut self, w: usize, generation: u64, body: from_worker::Body) {
        let worker = &self.workers[w];
        let Link::Live(stream) = worker.link else { return };
        let message = FromWorker { term: worker.term, generation, body: Some(body) };
        self.send_up(stream, Packet::Said(message));
    }

    /// Says what speaks of this worker.
    pub(super) fn say_of_self(&mut self, w: usize, body: from_worker::Body) {
        self.put_out(w, self.workers[w].generation, body);
    }

    /// Says what is of a generation: its coordinator only has use for it.
    pub(super) fn say_of(&mut self, w: usize, era: Era, body: from_worker::Body) {
        if self.workers[w].term == era.term {
            self.put_out(w, era.generation, body);
        }
    }

    pub(super) fn say_progress(&mut self, w: usize, progress: v1::Progress) {
        if let Doing::Placed(_) = self.workers[w].doing {
            let generation = self.workers[w].current.generation;
            self.put_out(w, generation, from_worker::Body::Progress(progress));
        }
    }

    /// It waits for a place: it says so now, or to the next coordinator. Nothing if a new place has been given already.
    pub(super) fn say_idle(&mut self, w: usize, step: Option<u64>, broken: &str, next_unreached: bool) {
        let worker = &mut self.workers[w];
        worker.activity = v1::Activity::Unspecified;
        worker.doing = Doing::Idle(step);
        if worker.assigned <= worker.current {
            let generation = if worker.current.term == worker.term { worker.current.generation } else { worker.generation };
            self.put_out(
                w,
                generation,
                from_worker::Body::Idle(v1::Idle { step, broken: broken.to_owned(), next_unreached, ..v1::Idle::default() }),
            );
        }
    }

    /// It looks for a coordinator.
    pub(super) fn attach(&mut self, w: usize) {
        if !self.workers[w].lives() || self.workers[w].link != Link::Away {
            return;
        }
        let Some(c) = self.pick_coordinator() else { return self.attach_failed(w) };
        let stream = self.streams.len();
        self.streams.push(Stream::new(w, c, ConnId(0)));
        self.workers[w].link = Link::Opening(stream);
        let (answer, left) = (ANSWER, self.workers[w].seeks_until.saturating_sub(self.now));
        self.after(answer.min(left), Happening::Late { worker: w, stream });
        let hello = v1::Hello { place: self.workers[w].place(), ..self.workers[w].hello.clone() };
        self.tell(|| format!("w{w} greets c{c}: {:?}", hello.place));
        self.send_up(stream, Packet::Said(FromWorker { term: 0, generation: 0, body: Some(from_worker::Body::Hello(hello)) }));
    }

    /// Whoever is behind the address: the newest one, mostly.
    fn pick_coordinator(&mut self) -> Option<usize> {
        let alive: Vec<usize> = (0..self.coordinators.len()).filter(|c| self.coordinators[*c].lives()).collect();
        let newest = *alive.last()?;
        let strays = self.now < self.setup.faults_until && self.random.chance(5);
        Some(if strays { alive[self.random.below(alive.len() as u64) as usize] } else { newest })
    }

    pub(super) fn late(&mut self, w: usize, stream: usize) {
        if self.workers[w].link == Link::Opening(stream) {
            self.send_up(stream, Packet::Fin);
            self.attach_failed(w);
        }
    }

    /// It tries again after a pause, but not for ever.
    fn attach_failed(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        worker.link = Link::Away;
        if !worker.first && worker.parting {
            return self.stop(w, Exit::Preempted);
        }
        if self.now + worker.pause >= worker.seeks_until {
            self.see("orphans");
            return self.stop(w, Exit::Failed);
        }
        let pause = worker.pause;
        worker.pause = (2 * pause).min(PAUSES.1);
        self.after(pause, Happening::Attach { worker: w });
    }

    /// What a coordinator sends arrives.
    pub(super) fn arrive_down(&mut self, stream: usize, packet: Packet<ToWorker>) {
        let w = self.streams[stream].worker;
        if !self.workers[w].lives() {
            return;
        }
        match (self.workers[w].link, packet) {
            (Link::Opening(open), Packet::Said(message)) if open == stream => self.answered(w, stream, message),
            (Link::Opening(open), Packet::Fin) if open == stream => self.attach_failed(w),
            (Link::Live(live), Packet::Said(message)) if live == stream => {
                let era = Era { term: message.term, generation: message.generation };
                self.take(w, era, message.body.unwrap());
            }
            (Link::Live(live), Packet::Fin) if live == stream => self.stream_gone(w),
            _ => {}
        }
    }

    /// The first answer on a stream.
    fn answered(&mut self, w: usize, stream: usize, message: ToWorker) {
        match message.body.unwrap() {
            // TERM: one that was superseded, and does not know it yet.
            to_worker::Body::Welcome(_) if message.term < self.workers[w].newest => {
                self.see("welcomes of an older term");
                self.send_up(stream, Packet::Fin);
                self.attach_failed(w);
            }
            to_worker::Body::Welcome(_) => self.welcomed(w, stream, Era { term: message.term, generation: message.generation }),
            to_worker::Body::Refused(refused) => {
                self.send_up(stream, Packet::Fin);
                self.refused(w, &refused);
            }
            _ => {
                self.send_up(stream, Packet::Fin);
                self.attach_failed(w);
            }
        }
    }

    fn refused(&mut self, w: usize, refused: &v1::Refused) {
        use v1::RefusedReason as R;
        self.tell(|| format!("w{w} is refused: {}", refused.detail));
        self.see(&format!("refused {:?}", refused.reason()));
        match (refused.reason(), refused.outcome()) {
            (R::Superseded, _) if !self.workers[w].first => self.attach_failed(w),
            (R::RunOver, v1::Outcome::Done) => self.stop(w, Exit::Done),
            (R::RunOver, v1::Outcome::Preempted) => self.stop(w, Exit::Preempted),
            (R::RunOver | R::Superseded, _) => self.stop(w, Exit::Failed),
            // It is here already, on a stream that is not known to have ended.
            (reason, _) => panic!("LIVE: worker {w} was refused: {reason:?}"),
        }
    }

    /// A coordinator has taken it in. What that did not hear of with the greeting, it is told now.
    fn welcomed(&mut self, w: usize, stream: usize, era: Era) {
        let worker = &mut self.workers[w];
        (worker.link, worker.pause, worker.unanswered) = (Link::Live(stream), PAUSES.0, 0);
        (worker.term, worker.generation, worker.newest) = (era.term, era.generation, era.term);
        let told = match worker.doing {
            Doing::Idle(step) => Some(step),
            Doing::Finished(finished) => Some(Some(finished.step)),
            _ => None,
        };
        if let Some(step) = told {
            worker.doing = Doing::Idle(step);
            self.put_out(w, era.generation, from_worker::Body::Idle(v1::Idle { step, broken: String::new(), ..v1::Idle::default() }));
        }
        if std::mem::replace(&mut self.workers[w].first, false) {
            let loads = self.between(100, self.setup.load);
            self.sleep(w, loads);
        }
        self.after(0, Happening::Beat { worker: w, stream });
        self.after(self.setup.orphan / 2 / u64::from(PROBES), Happening::Probe { worker: w, stream });
        if self.workers[w].parting {
            self.say_of_self(w, from_worker::Body::Leaving(v1::Leaving {}));
        }
    }

    pub(super) fn beat(&mut self, w: usize, stream: usize) {
        let worker = &self.workers[w];
        if !worker.lives() || worker.link != Link::Live(stream) {
            return;
        }
        let beat = v1::Heartbeat { step: worker.step, encoding: None, activity: worker.activity.into(), ..v1::Heartbeat::default() };
        self.say_of_self(w, from_worker::Body::Heartbeat(beat));
        self.after(self.setup.lease / 4, Happening::Beat { worker: w, stream });
    }

    /// It asks whether the coordinator still answers.
    pub(super) fn probe(&mut self, w: usize, stream: usize) {
        if !self.workers[w].lives() || self.workers[w].link != Link::Live(stream) {
            return;
        }
        let c = self.streams[stream].coordinator;
        let answers = self.coordinators[c].core.is_some()
            && self.coordinators[c].lives()
            && self.coordinators[c].frozen_until <= self.now
            && self.heals_at(Node::Worker(w), Node::Coordinator(c)).is_none();
        let worker = &mut self.workers[w];
        worker.unanswered = if answers { 0 } else { worker.unanswered + 1 };
        if worker.unanswered == PROBES {
            self.send_up(stream, Packet::Fin);
            return self.stream_gone(w);
        }
        self.after(self.setup.orphan / 2 / u64::from(PROBES), Happening::Probe { worker: w, stream });
    }

    /// Its stream has ended. Training goes on, and another coordinator is looked for.
    fn stream_gone(&mut self, w: usize) {
        let orphan = self.setup.orphan;
        let worker = &mut self.workers[w];
        (worker.authority, worker.term, worker.link) = (0, 0, Link::Away);
        if !matches!(worker.doing, Doing::Placed(_)) {
            // A generation of which this rank is not ready ends with its stream.
            self.end(w, self.workers[w].assigned, false);
        }
        let worker = &mut self.workers[w];
        match worker.doing {
            Doing::Finished(finished) if worker.committed >= finished.step => {
                let done = finished.outcome() == v1::Outcome::Done;
                self.stop(w, if done { Exit::Done } else { Exit::Preempted })
            }
            Doing::Failed => self.stop(w, Exit::Failed),
            _ => {
                (worker.seeks_until, worker.pause) = (self.now + orphan, PAUSES.0);
                self.see("streams lost");
                self.attach(w);
            }
        }
    }

    pub(super) fn repeat_down(&mut self, stream: usize, message: ToWorker) {
        let (w, c) = (self.streams[stream].worker, self.streams[stream].coordinator);
        let live = self.workers[w].link == Link::Live(stream) && self.heals_at(Node::Worker(w), Node::Coordinator(c)).is_none();
        if live {
            self.see("duplicates");
            self.arrive_down(stream, Packet::Said(message));
        }
    }

    /// Takes in one message: what concerns the step path at once, as flags; then for the inbox.
    fn take(&mut self, w: usize, era: Era, body: to_worker::Body) {
        use to_worker::Body as B;
        let worker = &mut self.workers[w];
        if !worker.heard(era, matches!(body, B::Assign(_))) {
            return self.see("messages of another era");
        }
        match &body {
            B::Drain(_) => worker.drain = true,
            B::Abort(_) | B::Refused(_) => return self.stop(w, Exit::Failed),
            B::Release(_) => return self.stop(w, Exit::Preempted),
            B::Adopted(_) => {
                let renumbered = worker.current.generation != era.generation;
                (worker.current, worker.authority) = (era, era.term);
                self.see(if renumbered { "adopted under another number" } else { "adopted" });
            }
            B::Committed(commit) => worker.committed = worker.committed.max(commit.step),
            B::Regroup(regroup) => self.end(w, era, regroup.at_boundary),
            // A coordinator gives a place only to who is in none, as far as it knows: what this worker is in is over.
            B::Assign(_) => self.end(w, Era { generation: era.generation - 1, ..era }, false),
            _ => {}
        }
        self.workers[w].inbox.push_back((era, body));
        self.nudge(w, 50);
    }

    /// The coordinator ends a generation: at once, or with the next step.
    fn end(&mut self, w: usize, era: Era, at_boundary: bool) {
        let worker = &mut self.workers[w];
        let which = if at_boundary { &mut worker.last_step } else { &mut worker.ended };
        *which = era.max(*which);
        self.free_if_over(w);
    }

    /// Its part in the run is over. Only the first reason counts.
    pub(super) fn stop(&mut self, w: usize, why: Exit) {
        self.tell(|| format!("w{w} is to end: {why:?}"));
        let worker = &mut self.workers[w];
        worker.why.get_or_insert(why);
        (worker.authority, worker.term) = (0, 0);
        if let Link::Live(stream) | Link::Opening(stream) = std::mem::replace(&mut worker.link, Link::Closed) {
            self.send_up(stream, Packet::Fin);
        }
        if self.workers[w].first {
            return self.exit_worker(w, why);
        }
        self.free_if_over(w);
        self.nudge(w, 50);
    }

    /// It is asked to leave (SIGTERM).
    pub(super) fn terminate(&mut self, w: usize) {
        if !std::mem::replace(&mut self.workers[w].parting, true) {
            self.say_of_self(w, from_worker::Body::Leaving(v1::Leaving {}));
        }
    }

    /// The process ends, and its connections with it; `Killed` by the death of its machine tells nobody.
    pub(super) fn exit_worker(&mut self, w: usize, exit: Exit) {
        self.leave_generation(w, false);
        self.bury(w, exit, false);
    }

    /// The process is killed, or its machine is lost, which tells nobody.
    pub(super) fn kill_worker(&mut self, w: usize, silently: bool) {
        self.leave_generation(w, silently);
        self.bury(w, Exit::Killed, silently);
    }

    fn bury(&mut self, w: usize, exit: Exit, silently: bool) {
        self.tell(|| format!("w{w} ends: {exit:?}"));
        self.see(&format!("exit {exit:?}"));
        let worker = &mut self.workers[w];
        worker.exit.get_or_insert(exit);
        if let Link::Live(stream) | Link::Opening(stream) = std::mem::replace(&mut worker.link, Link::Closed)
            && !silently
        {
            self.send_up(stream, Packet::Fin);
        }
        self.abandon_upload(w);
    }
}
