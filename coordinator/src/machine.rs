//! What the shell knows of a state machine: events and the time go in, effects come out, to be carried out in their order. The run's
//! ([`crate::core`]) and the job's ([`crate::job`]) are such machines; this is what they share. No I/O, clock or randomness here either.

use crate::core::{Note, Outcome, RankTiming};
use ella_proto::ids::Term;
use ella_proto::v1::{self, FromWorker, RunStatus, ToWorker};
use ella_store::Body;
use std::collections::{BTreeMap, HashMap};

/// A state machine that a [`crate::shell::Coordinator`] can serve.
pub trait Machine: std::fmt::Debug + Send {
    /// Takes in one event and gives what must be done, in order. Deadlines that have passed are acted upon too.
    fn handle(&mut self, now: Time, event: Event) -> Vec<Effect>;

    /// When [`Machine::handle`] must be called at the latest ([`Event::Tick`]); nothing once the outcome is decided.
    fn next_deadline(&self) -> Option<Time>;

    /// The state as clients see it.
    fn status(&self, now: Time) -> RunStatus;
}

/// Milliseconds since this coordinator began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

impl Time {
    pub(crate) fn after(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }

    pub(crate) fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One stream of one worker process. Numbers rise in the order in which streams were opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The worker closed it, or its process or the network died.
    Gone,
    /// It sent what is no message.
    Malformed,
    /// It sent a message larger than allowed.
    Oversized,
    /// It never said who it is.
    Silent,
    /// It did not read what it was sent.
    Stuck,
}

impl Closed {
    /// The counter's name (KNOWN), if it is not how streams mostly end.
    pub(crate) fn counter(self) -> Option<&'static str> {
        match self {
            Self::Malformed => Some("refused_unreadable"),
            Self::Oversized => Some("refused_oversized"),
            Self::Silent => Some("refused_silent"),
            Self::Stuck => Some("workers_stuck"),
            Self::Gone => None,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A message came.
    Message(ConnId, FromWorker),
    /// A stream ended.
    Closed(ConnId, Closed),
    /// The record stands in the log, which only a run has.
    Appended(Body),
    /// The log's next number was taken by this term (TERM).
    Superseded(Term),
    /// The record could not be appended; retries are spent.
    AppendFailed(String),
    /// The record could not be appended, because the log is not there any more.
    LogGone(String),
    /// The record of a commit was not appended, because a part of it is not in the run's folder.
    PartUnseen {
        /// The commit's.
        step: u64,
        /// The part's name.
        part: String,
        /// What was found, and what to do: to be said of the worker that had saved it.
        why: String,
    },
    /// Someone asks the run to commit and leave.
    Stop(String),
    /// Someone asks one worker of a run to leave; the others go on.
    Drain {
        /// Which.
        worker: String,
        /// Why.
        reason: String,
    },
    /// Leave at once.
    Leave(String),
    /// Time has passed.
    Tick,
}

/// What to do, in the order given.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send to a worker.
    Send(ConnId, ToWorker),
    /// End a worker's stream, after what was sent before.
    Close(ConnId),
    /// Append to the log, a commit only if its parts are seen in the store; answered by [`Event::Appended`], [`Event::PartUnseen`],
    /// [`Event::Superseded`], [`Event::AppendFailed`] or [`Event::LogGone`]. Appends are in order.
    Append(Body),
    /// Delete these commit folders. The log has given them up; a failure costs space only.
    DeleteFolders(Vec<String>),
    /// Keep a step's measurements.
    Metric(v1::Progress),
    /// Keep where a rank's time went.
    Timing(RankTiming),
    /// Keep what happened, for people.
    Note(Note),
    /// The run's outcome is decided; come back no more than to say so.
    Finish(Outcome),
}

/// The sum of numbers that a worker sent: any that 64 bits hold.
pub(crate) fn total(numbers: impl IntoIterator<Item = u64>) -> u64 {
    numbers.into_iter().fold(0, u64::saturating_add)
}

/// Counters by name (KNOWN). Names that come from outside are bounded in number and length.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(pub(crate) BTreeMap<String, u64>);

/// Names beyond this many are counted together.
pub(crate) const MOST_NAMES: usize = 128;

impl Counts {
    pub(crate) fn add(&mut self, name: &str, n: u64) {
        let fits = name.len() <= 64 && (self.0.contains_key(name) || self.0.len() < MOST_NAMES);
        let count = self.0.entry(if fits { name } else { "other" }.to_owned()).or_default();
        *count = count.saturating_add(n);
    }

    /// As the wire has them.
    pub(crate) fn to_map(&self) -> HashMap<String, u64> {
        self.0.iter().map(|(name, n)| (name.clone(), *n)).collect()
    }

    pub(crate) fn add_some(&mut self, name: &str, n: usize) {
        if n > 0 {
            self.add(name, n as u64);
        }
    }
}

/// The core's own time: the shell's, less what passed while this process was stopped. The shell comes back at every deadline, so
/// coming much too late means that it could not run, and that what workers sent meanwhile still waits to be read (P-3).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    last: Time,
    pub(crate) stopped: u64,
}

impl Clock {
    pub(crate) fn new(now: Time) -> Self {
        Self { last: now, stopped: 0 }
    }

    pub(crate) fn read(&self, now: Time) -> Time {
        Time(now.0.saturating_sub(self.stopped)).max(self.last)
    }

    /// The time now, and whether this process was stopped since the last event.
    pub(crate) fn advance(&mut self, now: Time, deadline: Option<Time>, patience: u64) -> (Time, bool) {
        let at = self.read(now);
        let stopped = deadline.is_some_and(|deadline| at > deadline.after(patience));
        if stopped {
            self.stopped += at.since(self.last);
        } else {
            self.last = at;
        }
        (self.last, stopped)
    }
}
