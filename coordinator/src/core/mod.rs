//! The control plane's decisions: a state machine without I/O, clock or randomness.
//!
//! It is a [`Machine`]: events and the time go in, effects come out. The shell owns sockets, store and clock, and nothing here knows of them.
//!
//! A run goes through generations: each is a membership, formed of workers that wait for a place, and ended when its members change. The
//! state stays with the workers; the newest is copied to those that lack it, and a commit is read only where nobody has one.
//!
//! Invariants (checked after every event by the tests' `Oracle`):
//! - **M-1** no two members share a worker id or a device; all have one device kind.
//! - **M-2** while a generation runs, those that have a place in it hold the ranks 0, 1, … once each.
//! - **G-1** a place is assigned only while nobody who is here has one: all have left the generation before.
//! - **G-2** the numbers of generations rise, also above those of a generation that outlived the coordinator before.
//! - **G-3** the state that a generation begins from is never older than the last commit, and all its ranks are told of the same source,
//!   step, session and peers.
//! - **G-4** training begins only after all ranks of the generation were ready.
//! - **C-1** a commit record is appended only if every rank of its generation reported the same state at its step and that every part is in the
//!   store, where the shell has seen it (COMMIT).
//! - **C-2** the steps of appended commits rise.
//! - **C-3** `Committed` is sent only after the record stands in the log (persist before reply).
//! - **C-4** a folder is deleted only after the log gave it up, and never the newest commit's.
//! - **C-5** once the commit of the last step stands, no worker that goes fails the run: nothing is left to do.
//! - **P-1** after the outcome nothing is sent but refusals, and nothing is appended; the outcome is announced once.
//! - **P-2** until the outcome there is always a next deadline, and none that has passed (LIVE).
//! - **P-3** time in which this process did not run is nobody's silence: a coordinator that was stopped and goes on finds its workers
//!   as it left them (LIVE).
//! - **T-1** what another term or generation says changes nothing but a counter (TERM, KNOWN).

mod adoption;
mod apart;
mod attach;
mod commit;
mod ending;
mod failure;
mod generation;
mod leaving;
mod like;
mod loss;
mod members;
mod phase;
mod progress;
mod ready;
mod refusal;
#[cfg(test)]
mod sim;
mod status;
mod straggler;
#[cfg(test)]
mod tests;
mod timing;
mod wait;

pub use apart::Unreached;
pub use commit::PARTS;
pub use failure::{Failure, Field, Loss, Than, Who};
pub use phase::{Outcome, Phase};
pub(crate) use progress::step_bounds;
pub use refusal::{KindOf, Refusal};
pub(crate) use refusal::{check_identity, device, shown};
pub use timing::RankTiming;
pub use wait::Wait;

use crate::job::JobNote;
use crate::machine::{Clock, Closed, ConnId, Counts, Effect, Event, Machine, Time};
use adoption::Returning;
use apart::{Apart, Bar};
use commit::Commits;
use ella_proto::ids::{Generation, Step, Term};
use ella_proto::v1::{self, FromWorker, RunStatus, ToWorker, from_worker, to_worker};
use ella_store::Commit;
use generation::Lineup;
use like::Computes;
use members::Members;
use progress::Progress;
use std::collections::{BTreeMap, BTreeSet};
use straggler::Pace;

/// What the core must know of the run. Times are in milliseconds.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// What each worker is told on arrival. Its config digest and lease are the ones that hold.
    pub welcome: v1::Welcome,
    /// Workers must have this version.
    pub version: String,
    /// How many workers the run begins with.
    pub workers: usize,
    /// With how many it goes on.
    pub min: usize,
    /// With how many it trains at most; more are spares.
    pub max: usize,
    /// How long a worker that comes while training goes on waits for others to join with it.
    pub join_window: u64,
    /// Whether ranks that others wait for are let go at once.
    pub straggler_evict: bool,
    /// Steps in all.
    pub steps: u64,
    /// How many commits stay.
    pub keep: usize,
    /// The kind of device that the config names, if it names one.
    pub device: Option<String>,
    /// How long to wait for the workers to come, again for them to load, and again for them to get ready.
    pub start_timeout: u64,
    /// How long a commit, or the end of the run, may take once its first part is known.
    pub commit_timeout: u64,
    /// How long a drain may take.
    pub drain_timeout: u64,
    /// Random bytes of this incarnation, from which each generation's session is made.
    pub session: [u8; 16],
}

/// What the log says of the past.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// This incarnation's term, already claimed.
    pub term: Term,
    /// Commits that were not given up, oldest first.
    pub commits: Vec<Commit>,
}

/// Something that happened, for the run's journal.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[allow(missing_docs)] // the fields say what they are
pub enum Note {
    /// A worker was taken in.
    Attached { worker: String, device: String, have: usize, need: usize },
    /// A worker was turned away.
    Refused { worker: String, why: String },
    /// Someone did not show the coordinator's token.
    Stranger { peer: String, why: String },
    /// A worker left that had no place, or was asked to leave.
    Left { worker: String, why: String },
    /// A worker was lost; the others go on, if they are enough.
    Lost { worker: String, rank: Option<u32>, why: String },
    /// A generation is formed, by rank.
    Generation { generation: u64, workers: Vec<String>, from_step: u64 },
    /// A generation that outlived its coordinator goes on, by rank.
    Adopted { generation: u64, workers: Vec<String>, step: u64 },
    /// A generation is over, or is to be after its next step.
    Regroup { generation: u64, reason: String, at_boundary: bool },
    /// The others wait for a rank far longer than for any step before.
    Straggler { worker: String, rank: u32, activity: &'static str, waited_ms: u64 },
    /// A rank may compute other bits than the others, or than the commit that it resumes from.
    Unlike { worker: String, how: String },
    /// All ranks are loaded and agree; training begins.
    Started { generation: u64, step: u64 },
    /// A commit stands in the log.
    Committed { step: u64, generation: u64, folder: String, bytes: u64, took_ms: u64 },
    /// Commits were given up by the keep rule.
    Retired { folders: Vec<String> },
    /// A commit is not what its record says: the run goes on from the one before.
    Damaged { step: u64, folder: String, what: String },
    /// The run was asked to leave.
    Draining { reason: String },
    /// The outcome.
    Ended { outcome: &'static str, step: u64, reason: String, permanent: bool },
    /// It happened to a job.
    #[serde(untagged)]
    Job(JobNote),
}

/// The state machine of one coordinator incarnation.
#[derive(Debug)]
pub struct Core {
    config: CoreConfig,
    term: Term,
    generation: Generation,
    phase: Phase,
    clock: Clock,
    members: Members,
    /// Since then all have been heard of; perhaps since later.
    all_heard: Time,
    /// Streams that were closed from here; what was sent on them before still comes.
    closed: BTreeSet<ConnId>,
    commits: Commits,
    progress: Progress,
    pace: Pace,
    /// The newest generation that this incarnation formed or adopted.
    lineup: Option<Lineup>,
    /// Whether a generation that outlived the coordinator before may still go on.
    adopts: bool,
    /// The one of which ranks have come back, while others are awaited.
    returning: Option<Returning>,
    /// When those that wait for a place are taken in.
    join_at: Option<Time>,
    /// The whole run is to leave. It survives generations.
    drain: Option<Drain>,
    /// The last step's commit stands; who has not said farewell by then never will.
    farewells_until: Option<Time>,
    /// Generations in a row that made no step.
    fruitless: u32,
    /// Since the last that trained, ranks did not reach each other.
    apart: Option<Apart>,
    /// Who did not reach whom, though both had trained, and in which words.
    cuts: BTreeMap<(ConnId, ConnId), String>,
    /// By machine, where workers came from that others did not reach.
    bars: BTreeMap<String, Bar>,
    /// Before then no generation is formed.
    paused_until: Option<Time>,
    last_loss: Option<(Who, Loss)>,
    /// What all ranks reported when they were ready last.
    agreed: Option<v1::Ready>,
    /// What rank 0 computes with, of those that trained last.
    computed_with: Option<Computes>,
    counts: Counts,
    /// Workers that were taken in, and generations that were formed.
    joined: u64,
    formed: u64,
    effects: Vec<Effect>,
    #[cfg(test)]
    mutation: Option<Mutation>,
}

/// A bug that is built into a core on purpose, to see that its tests find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    /// It takes in what other terms say.
    SkipsTermCheck,
    /// It records a commit before its last part is in the store.
    RecordsBeforeParts,
    /// It gives two workers the same rank.
    DealsTwice,
}

/// Signs of life and measurements: they move deadlines away, and nothing else.
fn is_routine(event: &Event) -> bool {
    use from_worker::Body as B;
    matches!(event, Event::Message(_, FromWorker { body: Some(B::Heartbeat(_) | B::Progress(_)), .. }))
}

/// That the whole run is to commit and leave.
#[derive(Clone, Debug)]
struct Drain {
    reason: String,
    /// It fails then.
    until: Time,
}

impl Machine for Core {
    fn handle(&mut self, now: Time, event: Event) -> Vec<Effect> {
        let (now, stopped) = self.clock.advance(now, self.deadline(), self.config.welcome.lease_ms / 4);
        self.counts.add_some("coordinator_stopped", usize::from(stopped));
        let routine = is_routine(&event);
        match event {
            Event::Message(conn, message) => self.message(now, conn, message),
            Event::Closed(conn, how) => self.closed(now, conn, how),
            Event::Appended(body) => self.appended(now, body),
            Event::PartUnseen { step, part, why } => self.part_unseen(now, (Step(step), &part), why),
            Event::Superseded(by) => self.fail(Failure::Superseded { by }),
            Event::AppendFailed(error) => self.fail(Failure::Append { error }),
            Event::LogGone(error) => self.fail(Failure::LogGone { error }),
            Event::Stop(reason) => self.stop(now, reason),
            Event::Drain { worker, reason } => self.drain_worker(now, &worker, reason),
            Event::Leave(reason) => self.leave(reason),
            Event::Tick => {}
        }
        // Most of what thousands of workers say changes nothing that all of them must be looked at for.
        if !routine || self.deadline().is_some_and(|at| at <= now) {
            self.expire(now);
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

impl Core {
    /// A coordinator that has just claimed its term and waits for workers.
    pub fn new(config: CoreConfig, history: History, now: Time) -> Self {
        let last = history.commits.last();
        Self {
            term: history.term,
            generation: Generation(0),
            phase: Phase::Waiting { until: now.after(config.start_timeout), here: false },
            clock: Clock::new(now),
            members: Members::default(),
            all_heard: now,
            closed: BTreeSet::new(),
            progress: Progress::from_commit(last),
            commits: Commits::new(history.commits),
            pace: Pace::default(),
            lineup: None,
            adopts: true,
            returning: None,
            join_at: None,
            drain: None,
            farewells_until: None,
            fruitless: 0,
            apart: None,
            cuts: BTreeMap::new(),
            bars: BTreeMap::new(),
            paused_until: None,
            last_loss: None,
            agreed: None,
            computed_with: None,
            counts: Counts::default(),
            joined: 0,
            formed: 0,
            effects: Vec::new(),
            config,
            #[cfg(test)]
            mutation: None,
        }
    }

    /// One of a run that is done: it tells so, and nothing else.
    pub fn done(config: CoreConfig, history: History, now: Time) -> Self {
        Self { phase: Phase::Over(Outcome::Done), ..Self::new(config, history, now) }
    }

    /// Whether this bug is built in. None ever is outside tests.
    fn is_mutated(&self, mutation: Mutation) -> bool {
        #[cfg(test)]
        return self.mutation == Some(mutation);
        #[cfg(not(test))]
        return matches!(mutation, _ if false);
    }

    fn deadline(&self) -> Option<Time> {
        if self.phase.is_over() {
            return None;
        }
        let silent = (!self.members.is_empty()).then(|| self.all_heard.after(self.config.welcome.lease_ms));
        let returning = self.returning.as_ref().map(|returning| returning.until);
        let drain = self.drain.as_ref().map(|drain| drain.until).filter(|_| !self.phase.is_ending());
        let commit = self.commit_due().map(|(at, _)| at);
        let pace = self.pace.alarm.filter(|_| self.phase == Phase::Training);
        let farewells = self.farewells_until.filter(|_| self.phase.has_begun());
        let deadlines = [self.phase.deadline(), self.paused_until, farewells, silent, returning, drain, commit, pace, self.join_deadline()];
        deadlines.into_iter().chain(self.bars.values().map(|bar| bar.until)).flatten().min()
    }

    fn message(&mut self, now: Time, conn: ConnId, message: FromWorker) {
        use from_worker::Body as B;
        let Some(body) = message.body else { return self.counts.add("refused_empty", 1) };
        if let B::Hello(hello) = body {
            return self.hello(now, conn, hello);
        }
        if self.phase.is_over() {
            return self.counts.add("refused_after_the_end", 1);
        }
        if self.closed.contains(&conn) {
            return self.counts.add("refused_after_goodbye", 1);
        }
        if !self.members.heard(conn, now, message.term == self.term.0) {
            return self.refuse(conn, String::new(), Refusal::Malformed { rule: "the first message must be Hello" });
        }
        if message.term != self.term.0 && !self.is_mutated(Mutation::SkipsTermCheck) {
            return self.counts.add("refused_other_term", 1);
        }
        let of_generation = message.generation == self.generation.0;
        // A worker without a place says that it is idle whatever it was in before.
        let judged = is_of_generation(&body) && !is_missed(&body) || (matches!(body, B::Idle(_)) && self.members.rank(conn).is_some());
        if judged && !of_generation {
            return self.counts.add("refused_other_generation", 1);
        }
        match body {
            B::Hello(_) => {}
            B::Heartbeat(beat) => self.beat(now, conn, beat, of_generation),
            B::Idle(idle) => self.idle(now, conn, idle),
            B::Leaving(_) => self.leaving(now, conn, "it was told to leave".to_owned()),
            B::Ready(ready) => self.ready(now, conn, ready),
            B::Progress(progress) => self.measured(now, conn, progress),
            B::State(digest) => self.state(now, conn, digest),
            B::Part(part) => self.part(now, conn, part),
            B::Finished(finished) => self.finished(now, conn, finished),
            B::Failed(failed) => self.worker_failed(now, conn, failed),
            B::LeaseRequest(_) | B::LeaseRenew(_) | B::LeaseThen(_) | B::LeaseDone(_) => self.counts.add("refused_of_a_job", 1),
        }
    }

    /// Acts upon what is overdue.
    fn expire(&mut self, now: Time) {
        if self.phase.is_over() {
            return;
        }
        self.silent(now);
        self.adoption_expired(now);
        self.pause_expired(now);
        self.watch_pace(now);
        let overdue = self.commit_due().filter(|(at, _)| *at <= now);
        if let Some(lacking) = overdue.and_then(|(_, step)| self.commits.lacking(step, self.world(), now)) {
            self.commit_overdue(now, lacking);
        }
        self.phase_expired(now);
        self.part_with(now);
        self.take_in(now);
    }

    fn send(&mut self, conn: ConnId, body: to_worker::Body) {
        let message = ToWorker { term: self.term.0, generation: self.generation.0, body: Some(body) };
        self.effects.push(Effect::Send(conn, message));
    }

    /// Ends a member's stream.
    fn close_stream(&mut self, conn: ConnId) {
        self.closed.insert(conn);
        self.effects.push(Effect::Close(conn));
    }

    fn send_to(&mut self, conns: &[ConnId], body: &to_worker::Body) {
        for conn in conns {
            self.send(*conn, body.clone());
        }
    }

    /// To the ranks of the newest generation, in their order.
    fn send_placed(&mut self, body: &to_worker::Body) {
        let placed = self.members.placed().into_iter().filter(|(_, _, member)| member.open);
        let conns: Vec<ConnId> = placed.map(|(_, conn, _)| conn).collect();
        self.send_to(&conns, body);
    }

    fn note(&mut self, note: Note) {
        self.effects.push(Effect::Note(note));
    }

    fn last_commit(&self) -> Step {
        self.commits.last().map_or(Step(0), |commit| Step(commit.step))
    }
}

/// A step that is told of later, by who is in another generation by now.
fn is_missed(body: &from_worker::Body) -> bool {
    matches!(body, from_worker::Body::Progress(progress) if progress.missed)
}

/// Whether a message speaks of a generation's work. The others speak of the worker itself, and may cross an `Assign` on the way.
fn is_of_generation(body: &from_worker::Body) -> bool {
    use from_worker::Body as B;
    match body {
        B::Ready(_) | B::Progress(_) | B::State(_) | B::Part(_) | B::Finished(_) => true,
        B::Hello(_) | B::Heartbeat(_) | B::Failed(_) | B::Idle(_) | B::Leaving(_) => false,
        B::LeaseRequest(_) | B::LeaseRenew(_) | B::LeaseThen(_) | B::LeaseDone(_) => false,
    }
}
