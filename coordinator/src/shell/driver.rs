//! The one task that owns the state machine: inputs in, effects out, in order.

use super::dashboard::Recorder;
use super::guard::Strangers;
use super::journal::{self, Journal};
use super::keeper::Work;
use crate::core::{Note, Outcome};
use crate::machine::{Closed, ConnId, Effect, Event, Machine, Time};
use ella_proto::v1::{RunStatus, ToWorker};
use ella_store::Store;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long streams may take to close after the outcome, beyond the linger.
const CLOSING: Duration = Duration::from_secs(1);

/// What other tasks tell the driver.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // some hundred bytes each, in a short queue
pub(super) enum Input {
    /// A worker's stream was opened; its messages follow.
    Opened(ConnId, Stream),
    /// Something happened.
    Event(Event),
    /// Someone asks for the status.
    Status(oneshot::Sender<RunStatus>),
    /// Someone asks whether it is there.
    Alive(oneshot::Sender<()>),
    /// Something that does not concern the machine is to be told to people.
    Note(Note),
    /// This process is to leave, and nobody else: the coordinator that follows takes the workers over.
    HandOver(String),
}

/// The driver's end of a worker's stream.
#[derive(Debug)]
pub(super) struct Stream {
    /// Bounded: a worker that does not read is closed, not waited for. Boxed, as a queue has room for dozens from the start, and there are
    /// thousands of queues.
    pub(super) outgoing: mpsc::Sender<Box<ToWorker>>,
    /// Ends the reading half.
    pub(super) gate: CancellationToken,
}

/// A run's memory: where effects go that outlive this process.
pub(super) struct Outlets {
    /// To the log, in order. Unbounded, so that driver and keeper never wait for each other; there are a few per commit.
    pub(super) work: mpsc::UnboundedSender<Work>,
    pub(super) journal: Journal,
    pub(super) store: Store,
}

/// The outcome, and until when it is told to whoever asks: to the end of the process, if no time is given.
struct Over {
    outcome: Outcome,
    until: Option<Instant>,
}

pub(super) struct Driver {
    machine: Box<dyn Machine>,
    inbox: mpsc::Receiver<Input>,
    /// A job has none.
    outlets: Option<Outlets>,
    /// What people look at. A job in this process has none.
    recorder: Option<Arc<Recorder>>,
    /// Who never came as far as the inbox.
    strangers: Arc<Strangers>,
    /// How often the cluster's tools could not be told how far it is.
    untold: Arc<AtomicU64>,
    /// For whom the status is as the driver ends.
    last_word: Option<oneshot::Sender<RunStatus>>,
    streams: BTreeMap<ConnId, Stream>,
    began: Instant,
    linger: Duration,
    /// Whether an outcome that another start would not change is served until this process is told to leave.
    stays: bool,
    over: Option<Over>,
    /// Streams that turned out not to be read, to be told to the machine.
    stuck: Vec<ConnId>,
}

impl Driver {
    pub(super) fn new(machine: Box<dyn Machine>, inbox: mpsc::Receiver<Input>, outlets: Option<Outlets>, linger: Duration) -> Self {
        let (strangers, untold, streams, stuck) = (Arc::default(), Arc::default(), BTreeMap::new(), Vec::new());
        let (recorder, last_word) = (None, None);
        Self {
            machine,
            inbox,
            outlets,
            recorder,
            strangers,
            untold,
            last_word,
            streams,
            began: Instant::now(),
            linger,
            stays: false,
            over: None,
            stuck,
        }
    }

    /// Has it stay after an outcome that another start would not change; `done`: the machine's run is done already.
    pub(super) fn staying(self, stays: bool, done: bool) -> Self {
        let over = done.then_some(Over { outcome: Outcome::Done, until: None });
        Self { stays, over, ..self }
    }

    /// Has its status say how many these were.
    pub(super) fn with_strangers(self, strangers: Arc<Strangers>) -> Self {
        Self { strangers, ..self }
    }

    /// Has what happens taken down for people.
    pub(super) fn with_recorder(self, recorder: Arc<Recorder>) -> Self {
        Self { recorder: Some(recorder), ..self }
    }

    /// Has its status say how often progress could not be told.
    pub(super) fn with_untold(self, untold: Arc<AtomicU64>) -> Self {
        Self { untold, ..self }
    }

    /// Has its last status given to this; not if it leaves a run that goes on, of which the coordinator that follows tells.
    pub(super) fn with_last_word(self, last_word: oneshot::Sender<RunStatus>) -> Self {
        Self { last_word: Some(last_word), ..self }
    }

    /// Runs until the outcome is decided and has had time to be read.
    pub(super) async fn run(mut self, shutdown: CancellationToken) -> Outcome {
        loop {
            if let Some(over) = self.over.take_if(|over| over.until.is_some_and(|at| Instant::now() >= at)) {
                if let Some(last_word) = self.last_word.take() {
                    drop(last_word.send(self.status()));
                }
                return over.outcome;
            }
            let (wake, serves) = (self.wake(), self.over.as_ref().is_none_or(|over| over.until.is_none()));
            let input = tokio::select! {
                biased;
                () = shutdown.cancelled(), if serves => Input::Event(Event::Leave("the coordinator broke".into())),
                Some(input) = self.inbox.recv() => input,
                () = tokio::time::sleep_until(wake) => Input::Event(Event::Tick),
            };
            match input {
                Input::Opened(conn, stream) => drop(self.streams.insert(conn, stream)),
                Input::Status(reply) => drop(reply.send(self.status())),
                Input::Alive(reply) => drop(reply.send(())),
                Input::Event(event) => self.handle(event),
                Input::Note(note) => self.note(&note),
                Input::HandOver(reason) => self.hand_over(reason),
            }
        }
    }

    /// Leaves without a word to the workers, as a death would, but with everything written that is known: they train on and look for the
    /// coordinator that follows.
    fn hand_over(&mut self, reason: String) {
        if self.over.is_none() {
            self.last_word = None;
        }
        let outcome = self.over.take().map_or(Outcome::Preempted { reason }, |over| over.outcome);
        self.over = Some(Over { outcome, until: Some(Instant::now()) });
        for stream in std::mem::take(&mut self.streams).into_values() {
            stream.gate.cancel();
        }
    }

    fn handle(&mut self, event: Event) {
        if let (Event::Stop(_) | Event::Leave(_), Some(over)) = (&event, &mut self.over) {
            over.until = Some(over.until.unwrap_or_else(Instant::now));
        }
        if let Event::Closed(conn, _) = &event {
            self.streams.remove(conn);
        }
        let mut next = Some(event);
        while let Some(event) = next {
            for effect in self.machine.handle(self.now(), event) {
                self.carry_out(effect);
            }
            next = self.stuck.pop().map(|conn| Event::Closed(conn, Closed::Stuck));
        }
        // Once the workers are gone too, only the linger is waited for.
        if let Some(Over { until: Some(at), .. }) = &mut self.over
            && self.streams.is_empty()
        {
            *at = (*at).min(Instant::now() + self.linger);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Send(conn, message) => {
                if self.streams.get(&conn).is_some_and(|stream| stream.outgoing.try_send(Box::new(message)).is_err()) {
                    self.close(conn);
                    self.stuck.push(conn);
                }
            }
            Effect::Close(conn) => self.close(conn),
            Effect::Append(body) => self.work(Work::Append(body)),
            Effect::DeleteFolders(folders) => self.work(Work::Delete(folders)),
            Effect::Metric(progress) => {
                if let Some(outlets) = &self.outlets {
                    outlets.journal.metric(&progress);
                }
                self.record(|recorder| recorder.measured(&progress));
            }
            Effect::Timing(timing) => {
                if let Some(outlets) = &self.outlets {
                    outlets.journal.timing(&timing);
                }
                self.record(|recorder| recorder.timed(&timing));
            }
            Effect::Note(note) => self.note(&note),
            Effect::Finish(outcome) => {
                let final_word = outcome == Outcome::Done || outcome.is_permanent();
                let until = (!(self.stays && final_word)).then(|| Instant::now() + self.linger + CLOSING);
                self.over = Some(Over { outcome, until });
            }
        }
    }

    fn work(&self, work: Work) {
        if let Some(outlets) = &self.outlets {
            // No receiver: the log is lost, which the machine is told.
            drop(outlets.work.send(work));
        }
    }

    fn note(&self, note: &Note) {
        match &self.outlets {
            Some(outlets) => outlets.journal.note(note),
            None => journal::log(note),
        }
        self.record(|recorder| recorder.noted(note));
    }

    fn record(&self, take_down: impl FnOnce(&Recorder)) {
        self.recorder.as_deref().map(take_down).unwrap_or_default();
    }

    /// Ends both halves of a stream; what was sent before still goes out.
    fn close(&mut self, conn: ConnId) {
        if let Some(stream) = self.streams.remove(&conn) {
            stream.gate.cancel();
        }
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn wake(&self) -> Instant {
        let deadline = self.machine.next_deadline().map(|at| self.began + Duration::from_millis(at.0));
        let over = self.over.as_ref().and_then(|over| over.until);
        deadline.into_iter().chain(over).min().unwrap_or_else(|| Instant::now() + Duration::from_secs(60))
    }

    /// The machine's status, with what the shell counts.
    fn status(&self) -> RunStatus {
        let mut status = self.machine.status(self.now());
        let mut own = self.strangers.counts();
        own.push(("progress_pushes_failed", self.untold.load(Relaxed)));
        if let Some(outlets) = &self.outlets {
            own.extend(outlets.journal.counts());
            own.push(("store_retries", outlets.store.retries()));
        }
        // The machine counts under some of the same names: what is refused on a stream, and what before it.
        for (name, n) in own.into_iter().filter(|(_, n)| *n > 0) {
            *status.counts.entry(name.to_owned()).or_default() += n;
        }
        status
    }
}
