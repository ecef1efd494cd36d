//! The control plane's decisions: a state machine without I/O, clock or randomness.
//!
//! It is a [`Machine`]: events and the time go in, effects come out. The shell owns sockets, store and clock, and nothing here knows of them.
//!
//! Invariants (checked after every event by the tests' `Oracle`):
//! - **M-1** no two members share a worker id or a device; all have one device kind; there are never more than the run needs.
//! - **M-2** once a generation is formed, its members hold the ranks 0, 1, … once each.
//! - **C-1** a commit record is appended only if every rank reported the same state at its step and every part is in the store (COMMIT).
//! - **C-2** the steps of appended commits rise.
//! - **C-3** `Committed` is sent only after the record stands in the log (persist before reply).
//! - **C-4** a folder is deleted only after the log gave it up, and never the newest commit's.
//! - **C-5** once the commit of the last step stands, no worker that goes fails the run: nothing is left to do.
//! - **P-1** after the outcome nothing is sent but refusals, and nothing is appended; the outcome is announced once.
//! - **P-2** until the outcome there is always a next deadline (LIVE).
//! - **P-3** time in which this process did not run is nobody's silence: a coordinator that was stopped and goes on finds its workers
//!   as it left them (LIVE).
//! - **T-1** what another term or generation says changes nothing but a counter (TERM, KNOWN).

mod commit;
mod failure;
mod membership;
mod phase;
mod progress;
mod status;
#[cfg(test)]
mod tests;
mod timing;

pub use commit::PARTS;
pub use failure::{Failure, Field, Loss, Than, Who};
pub use membership::Refusal;
pub(crate) use membership::{check_identity, device, shown};
pub use phase::{Outcome, Phase, Wait};
pub use timing::RankTiming;

use crate::job::JobNote;
use crate::machine::{Clock, Closed, ConnId, Counts, Effect, Event, Machine, Time};
use commit::Commits;
use ella_proto::ids::{Generation, Step, Term};
use ella_proto::v1::{self, FromWorker, RunStatus, ToWorker, from_worker, to_worker};
use ella_store::Commit;
use membership::Members;
use progress::Progress;

/// What the core must know of the run. Times are in milliseconds.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// What each worker is told on arrival. Its config digest and lease are the ones that hold.
    pub welcome: v1::Welcome,
    /// Workers must have this version.
    pub version: String,
    /// How many workers the run needs.
    pub workers: usize,
    /// Steps in all.
    pub steps: u64,
    /// How many commits stay.
    pub keep: usize,
    /// How long to wait for the workers to come, and again for them to load.
    pub start_timeout: u64,
    /// How long a commit, or the end of the run, may take once its first part is known.
    pub commit_timeout: u64,
    /// How long a drain may take.
    pub drain_timeout: u64,
    /// How long to wait for a better reason after a collective failed: the peer that caused it is found a moment later.
    pub blame_window: u64,
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
    /// A worker left before training began; its place is free again.
    Left { worker: String, why: String },
    /// The membership is complete.
    Generation { generation: u64, workers: Vec<String>, from_step: u64 },
    /// All ranks are loaded and agree; training begins.
    Started { generation: u64, step: u64 },
    /// A commit stands in the log.
    Committed { step: u64, folder: String, bytes: u64 },
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
    commits: Commits,
    progress: Progress,
    /// What all ranks reported when they were ready.
    agreed: Option<v1::Ready>,
    /// A collective failed; if no better reason is found by then, this is why the run failed.
    suspicion: Option<(Time, Failure)>,
    counts: Counts,
    effects: Vec<Effect>,
}

impl Machine for Core {
    fn handle(&mut self, now: Time, event: Event) -> Vec<Effect> {
        let (now, stopped) = self.clock.advance(now, self.deadline(), self.config.welcome.lease_ms / 4);
        self.counts.add_some("coordinator_stopped", usize::from(stopped));
        match event {
            Event::Message(conn, message) => self.message(now, conn, message),
            Event::Closed(conn, how) => self.closed(now, conn, how),
            Event::Appended(body) => self.appended(now, body),
            Event::Superseded(by) => self.fail(Failure::Superseded { by }),
            Event::AppendFailed(error) => self.fail(Failure::Append { error }),
            Event::Stop(reason) => self.stop(now, reason),
            Event::Leave(reason) => self.leave(reason),
            Event::Tick => {}
        }
        self.expire(now);
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
            phase: Phase::Waiting { until: now.after(config.start_timeout) },
            clock: Clock::new(now),
            members: Members::default(),
            progress: Progress::from_commit(last),
            commits: Commits::new(history.commits),
            agreed: None,
            suspicion: None,
            counts: Counts::default(),
            effects: Vec::new(),
            config,
        }
    }

    fn deadline(&self) -> Option<Time> {
        if self.phase.is_over() {
            return None;
        }
        let suspicion = self.suspicion.as_ref().map(|(until, _)| *until);
        let others = [self.phase.deadline(), suspicion];
        let silent = self.members.oldest_heard().map(|heard| heard.after(self.config.welcome.lease_ms));
        let commit = self.commits.oldest_pending().map(|since| since.after(self.config.commit_timeout));
        others.into_iter().chain([silent, commit]).flatten().min()
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
        if !self.members.heard(conn, now, message.term == self.term.0) {
            return self.refuse(conn, String::new(), Refusal::Malformed { rule: "the first message must be Hello" });
        }
        if message.term != self.term.0 {
            return self.counts.add("refused_other_term", 1);
        }
        if message.generation != self.generation.0 && is_of_generation(&body) {
            return self.counts.add("refused_other_generation", 1);
        }
        match body {
            B::Hello(_) => {}
            B::Heartbeat(beat) => self.beat(conn, beat),
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
        for conn in self.members.silent(now, self.config.welcome.lease_ms) {
            self.counts.add("leases_missed", 1);
            let silent_ms = self.config.welcome.lease_ms;
            self.lost(now, conn, Loss::Silent { silent_ms });
        }
        if self.suspicion.as_ref().is_some_and(|(until, _)| *until <= now)
            && let Some((_, failure)) = self.suspicion.take()
        {
            self.fail(failure);
        }
        if let Some(pending) = self.commits.overdue(now, self.config.commit_timeout, self.members.len()) {
            self.fail(pending);
        }
        self.phase_expired(now);
    }

    fn send(&mut self, conn: ConnId, body: to_worker::Body) {
        let message = ToWorker { term: self.term.0, generation: self.generation.0, body: Some(body) };
        self.effects.push(Effect::Send(conn, message));
    }

    fn send_all(&mut self, body: &to_worker::Body) {
        for conn in self.members.open() {
            self.send(conn, body.clone());
        }
    }

    fn note(&mut self, note: Note) {
        self.effects.push(Effect::Note(note));
    }

    fn last_commit(&self) -> Step {
        self.commits.last().map_or(Step(0), |commit| Step(commit.step))
    }
}

/// Whether a message speaks of a generation's work. The others speak of the worker itself, and may cross an `Assign` on the way.
fn is_of_generation(body: &from_worker::Body) -> bool {
    use from_worker::Body as B;
    match body {
        B::Ready(_) | B::Progress(_) | B::State(_) | B::Part(_) | B::Finished(_) => true,
        B::Failed(failed) => failed.kind() == v1::FailureKind::Collective,
        B::Hello(_) | B::Heartbeat(_) | B::LeaseRequest(_) | B::LeaseRenew(_) | B::LeaseThen(_) | B::LeaseDone(_) => false,
    }
}
