//! A worker's training thread: generation after generation, step after step. It does what `ella-worker`'s `session` and `train` do.

use super::network::Node;
use super::ring::{Gain, Share, Sum, Words};
use super::save::Saver;
use super::truth::{State, Tally};
use super::worker::{Doing, Era, Exit, Mutant};
use super::world::{Happening, World};
use ella_proto::v1::{self, from_worker, to_worker};
use ella_store::Commit;
use std::ops::Range;

/// How long a worker that has failed waits until that has been heard.
const FAREWELL: u64 = 1_000;

/// What the thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    Loading,
    /// It obeys what its coordinator says.
    Obeying,
    Restoring,
    /// It waits for others, or for what is slow, but not beyond this time.
    Meeting(u64),
    Copying(u64),
    Starting(u64),
    Supplied,
    /// So many lanes are left to compute.
    Computing(u64),
    Reducing(u64),
    Saving(u64, Then),
    Settling(u64, Ending),
    Confessing(u64),
}

/// What follows a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Then {
    attended: bool,
    leaving: bool,
    boundary: bool,
}

/// How training ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Done,
    Preempted,
}

/// The place for which a commit is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seat {
    pub(super) rank: u32,
    pub(super) world: u32,
    pub(super) era: Era,
}

/// A worker's state and place.
pub(super) struct Rank {
    pub(super) at: At,
    pub(super) state: State,
    /// The state is whole.
    pub(super) holds: bool,
    /// It was ever changed.
    touched: bool,
    farewell: bool,
    /// The generation by its first word.
    era: Era,
    assign: v1::Assign,
    commit: Option<Commit>,
    pub(super) seat: Seat,
    ring: Option<usize>,
    mine: Words,
    /// The step of the newest commit, saved or being saved; and while its record does not stand.
    saved: u64,
    pub(super) saving: Option<u64>,
    pub(super) saver: Saver,
    token: u64,
    wakes_at: u64,
}

impl Rank {
    pub(super) fn new() -> Self {
        Self {
            at: At::Loading,
            state: State::fresh(),
            holds: false,
            touched: false,
            farewell: false,
            era: Era::default(),
            assign: v1::Assign::default(),
            commit: None,
            seat: Seat::default(),
            ring: None,
            mine: Words::default(),
            saved: 0,
            saving: None,
            saver: Saver::default(),
            token: 0,
            wakes_at: u64::MAX,
        }
    }
}

/// The lanes of a rank.
fn lanes_of(rank: u32, world: u32, lanes: u64) -> Range<u64> {
    let edge = |r: u32| u64::from(r) * lanes / u64::from(world.max(1));
    edge(rank)..edge(rank + 1)
}

impl World {
    /// The thread goes on after so long, and not before.
    pub(super) fn sleep(&mut self, w: usize, delay: u64) {
        let at = self.now + delay;
        let rank = &mut self.workers[w].rank;
        rank.token += 1;
        rank.wakes_at = at;
        let token = rank.token;
        self.at(at, Happening::Thread { worker: w, token });
    }

    /// The thread looks up within so long, if it waits.
    pub(super) fn nudge(&mut self, w: usize, within: u64) {
        let waits =
            matches!(self.workers[w].rank.at, At::Obeying | At::Starting(_) | At::Saving(..) | At::Settling(..) | At::Confessing(_));
        self.wake_within(w, waits, within);
    }

    /// A rank that waits in a collective is freed if its generation is over.
    pub(super) fn free_if_over(&mut self, w: usize) {
        let waits = matches!(self.workers[w].rank.at, At::Meeting(_) | At::Copying(_) | At::Reducing(_));
        let over = self.workers[w].interrupted();
        self.wake_within(w, waits && over, 4);
    }

    fn wake_within(&mut self, w: usize, waits: bool, within: u64) {
        let delay = 1 + self.random.below(within);
        if waits && self.workers[w].lives() && self.workers[w].rank.wakes_at > self.now + delay {
            self.sleep(w, delay);
        }
    }

    pub(super) fn thread(&mut self, w: usize, token: u64) {
        let worker = &mut self.workers[w];
        if !worker.lives() || worker.rank.token != token {
            return;
        }
        worker.rank.wakes_at = u64::MAX;
        if let Some(why) = worker.why {
            return self.exit_worker(w, why);
        }
        match worker.rank.at {
            At::Loading => {
                worker.rank.at = At::Obeying;
                self.idle(w, "");
            }
            At::Obeying => self.obey(w),
            At::Restoring => self.restored(w),
            At::Meeting(until) | At::Copying(until) | At::Reducing(until) => self.waits_for_others(w, until),
            At::Starting(until) => self.starting(w, until),
            At::Supplied => self.begin_step(w),
            At::Computing(left) => self.compute(w, left),
            At::Saving(until, then) => self.save(w, until, then),
            At::Settling(until, ending) => self.settle_saves(w, until, ending),
            At::Confessing(until) if self.now >= until => self.exit_worker(w, Exit::Failed),
            At::Confessing(until) => self.sleep(w, until - self.now),
        }
    }

    /// Waits for a place.
    fn idle(&mut self, w: usize, broken: &str) {
        self.idle_as(w, broken, false);
    }

    fn idle_as(&mut self, w: usize, broken: &str, next_unreached: bool) {
        let rank = &self.workers[w].rank;
        let step = rank.holds.then_some(rank.state.step);
        self.tell(|| format!("w{w} is idle with {step:?} {broken}"));
        self.say_idle(w, step, broken, next_unreached);
        self.nudge(w, 50);
    }

    fn obey(&mut self, w: usize) {
        while let Some((era, body)) = self.workers[w].inbox.pop_front() {
            match body {
                to_worker::Body::Assign(_) if self.workers[w].has_ended(era) => {
                    self.workers[w].enter(era);
                    self.idle(w, "");
                }
                to_worker::Body::Assign(assign) => return self.take_place(w, era, assign),
                to_worker::Body::Regroup(_) if std::mem::take(&mut self.workers[w].rank.farewell) => self.idle(w, ""),
                _ => {}
            }
        }
    }

    fn take_place(&mut self, w: usize, era: Era, assign: v1::Assign) {
        let worker = &mut self.workers[w];
        worker.enter(era);
        worker.doing = Doing::Entering;
        let rank = &mut worker.rank;
        rank.commit = serde_json::from_slice(&assign.commit_json).ok();
        let recorded = rank.commit.as_ref().map_or(0, |commit| commit.step);
        rank.seat = Seat { rank: assign.rank, world: assign.world, era };
        (rank.era, rank.assign, rank.farewell) = (era, assign, false);
        worker.committed = recorded;
        let needs_commit = rank.assign.source.is_none() && !(rank.holds && rank.state.step == recorded);
        rank.at = At::Restoring;
        let delay = if needs_commit && recorded > 0 { self.takes(self.store.log) + self.between(5, 200) } else { 1 };
        self.sleep(w, delay);
    }

    /// The state of the newest commit is there, or of a run that begins, or nothing is to be restored.
    fn restored(&mut self, w: usize) {
        if self.workers[w].rank.assign.source.is_none() {
            let rank = &mut self.workers[w].rank;
            match rank.commit.clone() {
                Some(commit) if rank.holds && rank.state.step == commit.step => {}
                Some(commit) => {
                    rank.touched = true;
                    let Some(state) = self.read_commit(&commit) else { return self.fail(w, v1::FailureKind::Input, true) };
                    self.workers[w].rank.state = state;
                    self.see("restores");
                }
                None if rank.touched && (rank.state.step > 0 || !rank.holds) => return self.fail(w, v1::FailureKind::Internal, false),
                None => {}
            }
            self.workers[w].rank.holds = true;
        }
        let (generation, assign) = (self.workers[w].rank.era.generation, self.workers[w].rank.assign.clone());
        let ring = self.ring_of(&assign.session, generation, assign.world as usize);
        self.workers[w].rank.ring = Some(ring);
        self.join(w, At::Meeting(self.now + self.setup.start_timeout), Share::Here);
    }

    /// Takes part in a collective.
    fn join(&mut self, w: usize, at: At, share: Share) {
        let worker = &mut self.workers[w];
        worker.rank.at = at;
        let (At::Meeting(until) | At::Copying(until) | At::Reducing(until)) = at else { return };
        let Some(ring) = worker.rank.ring else { return };
        if worker.interrupted() {
            return self.sleep(w, 1);
        }
        // Who calls the next rank in vain for a part of the time gives up.
        let patience = if matches!(at, At::Meeting(_)) { self.setup.start_timeout / 3 } else { until - self.now };
        self.sleep(w, patience);
        let entered = self.enter(ring, (self.workers[w].rank.seat.rank as usize, w), share);
        // Where another has this rank, the ring never closes.
        if !entered && !matches!(at, At::Meeting(_)) {
            self.broken(w, "a peer was lost");
        }
    }

    fn waits_for_others(&mut self, w: usize, until: u64) {
        if self.workers[w].interrupted() {
            self.broken(w, "aborted");
        } else if self.now >= until {
            self.see("collective timeouts");
            self.broken(w, "nothing came in time");
        } else if self.is_cut_from_next(w) {
            self.see("next ranks not reached");
            self.leave_generation(w, false);
            self.workers[w].rank.at = At::Obeying;
            self.idle_as(w, "the next rank was not reached", true);
            self.nudge(w, 50);
        } else {
            self.sleep(w, until - self.now);
        }
    }

    /// Whether the ring that this rank waits to close lacks its call to the next one. One that is merely late is called all the same.
    fn is_cut_from_next(&self, w: usize) -> bool {
        let rank = &self.workers[w].rank;
        let (Some(ring), At::Meeting(_)) = (rank.ring, rank.at) else { return false };
        let next = self.rings[ring].worker((rank.seat.rank as usize + 1) % rank.seat.world as usize);
        next.is_some_and(|next| next != w && self.heals_at(Node::Worker(w), Node::Worker(next)).is_some())
    }

    /// What this rank did with others has failed, and so its generation has ended.
    pub(super) fn broken(&mut self, w: usize, why: &str) {
        self.generation_over(w, why);
    }

    fn generation_over(&mut self, w: usize, broken: &str) {
        self.leave_generation(w, false);
        self.workers[w].rank.at = At::Obeying;
        self.idle(w, broken);
        self.nudge(w, 50);
    }

    /// Its connections tell the neighbours.
    pub(super) fn leave_generation(&mut self, w: usize, silently: bool) {
        let rank = &mut self.workers[w].rank;
        let place = (rank.seat.rank as usize, w);
        if let Some(ring) = rank.ring.take() {
            self.leave_ring(ring, place, silently);
        }
    }

    /// A collective has brought its result.
    pub(super) fn gained(&mut self, w: usize, gain: Gain) {
        match (self.workers[w].rank.at, gain) {
            (At::Meeting(_), _) => self.met(w),
            (At::Copying(_), Gain::State(state)) => self.copied(w, *state),
            (At::Reducing(_), Gain::Step(sum)) => self.stepped(w, &sum),
            _ => self.broken(w, "ranks disagree"),
        }
    }

    fn met(&mut self, w: usize) {
        let until = self.now + self.setup.step_timeout;
        let mutant = self.bugs.worker;
        let rank = &mut self.workers[w].rank;
        let Some(source) = rank.assign.source.filter(|_| rank.assign.copy) else { return self.ready(w) };
        let original = (rank.seat.rank == source).then(|| Box::new(rank.state.clone()));
        let had = rank.holds && rank.state.step == rank.assign.step;
        (rank.touched, rank.holds) = (true, had);
        if !had {
            // A copy that does not come to its end leaves it torn.
            rank.state.chain ^= 1 << 40;
            rank.holds = mutant == Some(Mutant::KeepsTornCopy);
        }
        self.join(w, At::Copying(until), Share::Copy(original));
    }

    fn copied(&mut self, w: usize, state: State) {
        let rank = &mut self.workers[w].rank;
        (rank.state, rank.holds) = (state, true);
        self.see("copies");
        if self.workers[w].rank.state.step == self.workers[w].rank.assign.step {
            self.ready(w);
        } else {
            self.fail(w, v1::FailureKind::Internal, false);
        }
    }

    fn ready(&mut self, w: usize) {
        let (samples_per_epoch, until) = (self.truth.samples_per_epoch(), self.now + self.setup.start_timeout);
        let worker = &mut self.workers[w];
        let rank = &mut worker.rank;
        worker.step = rank.state.step;
        rank.saved = rank.commit.as_ref().map_or(0, |commit| commit.step);
        rank.saving = None;
        let state_digest = if rank.assign.source.is_none() { rank.state.digest().to_string() } else { String::new() };
        let ready = v1::Ready {
            step: rank.state.step,
            state_digest,
            data_digest: self.setup.data.clone(),
            models_digest: self.setup.models.clone(),
            samples_per_epoch,
        };
        let (era, rank_, world) = (rank.era, rank.seat.rank, rank.seat.world);
        worker.doing = Doing::Placed(v1::Place { rank: rank_, world, ready: Some(ready.clone()), ..v1::Place::default() });
        worker.rank.at = At::Starting(until);
        self.say_of(w, era, from_worker::Body::Ready(ready));
        self.sleep(w, 1);
    }

    /// Waits until all ranks are ready.
    fn starting(&mut self, w: usize, until: u64) {
        while !self.workers[w].interrupted() && self.now < until {
            match self.workers[w].inbox.pop_front() {
                Some((_, to_worker::Body::Start(_))) => return self.start(w),
                Some((_, to_worker::Body::Assign(_))) => return self.fail(w, v1::FailureKind::Internal, false),
                Some(_) => {}
                None => return self.sleep(w, until - self.now),
            }
        }
        self.generation_over(w, "");
    }

    fn start(&mut self, w: usize) {
        let rank = &mut self.workers[w].rank;
        rank.touched = true;
        if rank.state.step >= self.setup.steps {
            // Its commit did not live to see its record.
            self.see("commits made anew");
            return self.commit(w, Then { attended: true, ..Then::default() });
        }
        self.next_step(w);
    }

    fn next_step(&mut self, w: usize) {
        self.workers[w].activity = v1::Activity::Data;
        self.workers[w].rank.at = At::Supplied;
        let delay = self.between(0, 4);
        self.sleep(w, delay);
    }

    /// Whoever coordinates now records what is committed after this step, if all ranks are found to have the same.
    fn begin_step(&mut self, w: usize) {
        let worker = &mut self.workers[w];
        if worker.interrupted() {
            return self.generation_over(w, "the generation was ended");
        }
        worker.activity = v1::Activity::Compute;
        let rank = &mut worker.rank;
        rank.seat.era = Era { term: worker.authority, ..worker.current };
        let (leaving, boundary) = (u64::from(worker.drain), u64::from(worker.at_boundary()));
        let rank = &mut self.workers[w].rank;
        rank.mine = Words { ranks: 1, leaving, boundary, ..Words::default() };
        let lanes = lanes_of(rank.seat.rank, rank.seat.world, self.setup.lanes);
        for lane in lanes.clone() {
            self.add_lane(w, lane);
        }
        if self.bugs.worker == Some(Mutant::TakesForeignLane) {
            self.add_lane(w, lanes.end % self.setup.lanes);
        }
        self.compute(w, lanes.end - lanes.start);
    }

    fn add_lane(&mut self, w: usize, lane: u64) {
        let rank = &mut self.workers[w].rank;
        let (gradient, tally): (u64, Tally) = self.truth.lane(&rank.state, lane);
        rank.mine.gradient = rank.mine.gradient.wrapping_add(gradient);
        rank.mine.tally.merge(tally);
    }

    /// Between lanes the rank sees whether its generation goes on.
    fn compute(&mut self, w: usize, left: u64) {
        if left > 0 {
            if self.workers[w].interrupted() {
                return self.generation_over(w, "the generation was ended");
            }
            self.workers[w].rank.at = At::Computing(left - 1);
            let (until, times) = self.workers[w].slow;
            let times = if until > self.now { times } else { 1 };
            let delay = times * self.between(self.setup.lane / 2, self.setup.lane);
            return self.sleep(w, delay);
        }
        self.workers[w].activity = v1::Activity::Reduce;
        let every = self.setup.every;
        let worker = &mut self.workers[w];
        let (applied, recorded) = (worker.rank.state.step, worker.committed);
        worker.rank.note_record(recorded);
        let due = worker.rank.saving.is_none() && applied / every > recorded / every;
        worker.rank.mine.due = u64::from(due && worker.rank.seat.rank == 0);
        let (number, term, words) = (applied + 1, worker.rank.seat.era.term, worker.rank.mine);
        let until = self.now + self.setup.step_timeout;
        self.join(w, At::Reducing(until), Share::Step { number, term, words });
    }

    /// All ranks' sums are there: the step is applied.
    fn stepped(&mut self, w: usize, sum: &Sum) {
        self.judge_step(w, sum);
        let (steps, every, mutant) = (self.setup.steps, self.setup.every, self.bugs.worker);
        let worker = &mut self.workers[w];
        let rank = &mut worker.rank;
        let number = rank.state.step + 1;
        rank.state.apply(self.truth.epoch(number), sum.words.gradient, sum.words.tally);
        worker.step = number;
        worker.activity = v1::Activity::Compute;
        let mut attended = rank.seat.era.term > 0 && sum.terms.iter().all(|term| *term == rank.seat.era.term);
        if mutant == Some(Mutant::CommitsWithoutAuthority) {
            (attended, rank.seat.era) = (true, Era { term: worker.term, ..worker.current });
        }
        let leaving = sum.words.leaving > 0 && number < steps;
        let boundary = sum.words.boundary > 0;
        let commits = attended && (leaving || number == steps || sum.words.due > 0 || number.is_multiple_of(every));
        let samples = if rank.seat.rank == 0 { sum.words.tally.samples } else { 0 };
        self.judge_state(w);
        self.see(if self.workers[w].is_unattended() { "steps without a coordinator" } else { "steps" });
        self.tell(|| format!("w{w} applied step {number}, terms {:?}", sum.terms));
        self.say_progress(w, v1::Progress { step: number, samples, ..v1::Progress::default() });
        let then = Then { attended, leaving, boundary };
        if commits { self.commit(w, then) } else { self.go_on(w, then) }
    }

    /// Hands what is not in a commit yet to one.
    fn commit(&mut self, w: usize, then: Then) {
        if self.workers[w].rank.state.step > self.workers[w].rank.saved {
            self.save(w, self.now + self.setup.start_timeout, then);
        } else {
            self.go_on(w, then);
        }
    }

    /// Waits only if two commits are still under way.
    fn save(&mut self, w: usize, until: u64, then: Then) {
        let worker = &mut self.workers[w];
        if worker.rank.saver.is_dead() {
            self.fail(w, v1::FailureKind::Store, false);
        } else if worker.rank.saver.has_room() {
            let step = worker.rank.state.step;
            (worker.rank.saved, worker.rank.saving) = (step, Some(step));
            self.take_snapshot(w);
            self.go_on(w, then);
        } else if worker.interrupted() {
            self.generation_over(w, "the generation ended before its commit was saved");
        } else if self.now >= until {
            self.fail(w, v1::FailureKind::Store, false);
        } else {
            worker.rank.at = At::Saving(until, then);
            self.sleep(w, until - self.now);
        }
    }

    fn go_on(&mut self, w: usize, then: Then) {
        let last = self.workers[w].rank.state.step >= self.setup.steps;
        let Then { attended, leaving, boundary } = then;
        if self.workers[w].rank.saver.is_dead() {
            return self.fail(w, v1::FailureKind::Store, false);
        }
        match () {
            () if last && attended => self.finish(w, Ending::Done),
            () if last => self.generation_over(w, ""),
            () if leaving && attended => self.finish(w, Ending::Preempted),
            () if boundary => self.generation_over(w, ""),
            () => self.next_step(w),
        }
    }

    /// It is in no ring any more: whoever coordinates next is told so.
    fn finish(&mut self, w: usize, ending: Ending) {
        self.leave_generation(w, false);
        self.workers[w].doing = Doing::Idle(Some(self.workers[w].rank.state.step));
        self.settle_saves(w, self.now + self.setup.start_timeout, ending);
    }

    /// Says farewell, once this rank's part of the last commit is saved.
    fn settle_saves(&mut self, w: usize, until: u64, ending: Ending) {
        let worker = &mut self.workers[w];
        if worker.rank.saver.is_dead() {
            self.fail(w, v1::FailureKind::Store, false);
        } else if worker.rank.saver.is_idle() {
            self.farewell(w, ending);
        } else if worker.interrupted() {
            self.generation_over(w, "the generation ended before its commit was saved");
        } else if self.now >= until {
            self.fail(w, v1::FailureKind::Store, false);
        } else {
            worker.rank.at = At::Settling(until, ending);
            self.sleep(w, until - self.now);
        }
    }

    fn farewell(&mut self, w: usize, ending: Ending) {
        let outcome = match ending {
            Ending::Done => v1::Outcome::Done,
            Ending::Preempted => v1::Outcome::Preempted,
        };
        let worker = &mut self.workers[w];
        let era = worker.rank.seat.era;
        if (worker.term, worker.current) != (era.term, era) {
            return self.generation_over(w, "its coordinator is gone");
        }
        worker.rank.farewell = true;
        worker.rank.at = At::Obeying;
        let finished = v1::Finished { step: worker.rank.state.step, outcome: outcome.into() };
        worker.doing = Doing::Finished(finished);
        self.tell(|| format!("w{w} says farewell: {outcome:?}"));
        self.say_of(w, era, from_worker::Body::Finished(finished));
        self.nudge(w, 50);
    }

    /// An error of this worker's own: it tells the coordinator, and ends.
    pub(super) fn fail(&mut self, w: usize, kind: v1::FailureKind, permanent: bool) {
        self.leave_generation(w, false);
        self.tell(|| format!("w{w} fails: {kind:?}"));
        self.see("failures");
        self.workers[w].doing = Doing::Failed;
        let failed = v1::Failed { kind: kind.into(), message: "it broke".into(), permanent };
        self.say_of_self(w, from_worker::Body::Failed(failed));
        self.workers[w].rank.at = At::Confessing(self.now + FAREWELL);
        self.sleep(w, FAREWELL);
    }
}
