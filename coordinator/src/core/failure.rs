//! Why a run failed: typed, and put into words at the edge only.

use super::wait::activity_text;
use super::{Outcome, Unreached};
use crate::job::JobFailure;
use crate::machine::Closed;
use ella_proto::ids::{Rank, Step, Term};
use ella_proto::v1;
use std::fmt;

/// A worker, as people look for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// Its process's id in the run.
    pub worker_id: String,
    /// Its place, once it has one.
    pub rank: Option<Rank>,
    /// Its machine.
    pub host: String,
    /// Its process there.
    pub pid: u32,
}

impl Who {
    pub(crate) fn of(hello: &v1::Hello, rank: Option<Rank>) -> Self {
        let v1::Hello { worker_id, host, pid, .. } = hello;
        Self { worker_id: worker_id.clone(), rank, host: host.clone(), pid: *pid }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { worker_id, rank, host, pid } = self;
        match rank {
            Some(rank) => write!(f, "worker {worker_id} (rank {rank}, host {host}, pid {pid})"),
            None => write!(f, "worker {worker_id} (host {host}, pid {pid})"),
        }
    }
}

/// How a worker was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its stream ended: the process or the network died.
    StreamClosed,
    /// Nothing was heard for this long.
    Silent {
        /// Milliseconds.
        silent_ms: u64,
    },
    /// It sent what cannot be read.
    Unreadable,
    /// It did not read what it was sent.
    Stuck,
    /// It attached again, and had left its generation.
    Replaced,
    /// It was not ready in time.
    NotReady {
        /// Milliseconds.
        waited_ms: u64,
    },
    /// It did not leave its generation in time.
    NotIdle {
        /// Milliseconds.
        waited_ms: u64,
    },
    /// The others waited for it far longer than for any step before.
    Straggler {
        /// What it was at.
        activity: v1::Activity,
        /// Milliseconds.
        waited_ms: u64,
    },
    /// It said that it could not go on.
    Failed {
        /// Of what kind.
        kind: v1::FailureKind,
        /// In its words.
        message: String,
    },
    /// It and its neighbour in the ring did not reach each other.
    Unreached(Box<Unreached>),
    /// It came later, and reads other data or models than the run was trained on.
    Differs {
        /// What.
        field: Field,
        /// As the run has it.
        expected: String,
        /// As it has it.
        found: String,
    },
}

impl Loss {
    /// Whether a worker that had no place is lost, and has not merely gone.
    pub(super) fn is_own_fault(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::NotIdle { .. } | Self::Unreached(_))
    }
}

impl From<Closed> for Loss {
    fn from(how: Closed) -> Self {
        match how {
            Closed::Malformed | Closed::Oversized => Self::Unreadable,
            Closed::Stuck => Self::Stuck,
            Closed::Gone | Closed::Silent => Self::StreamClosed,
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StreamClosed => f.write_str("its stream closed"),
            Self::Silent { silent_ms } => write!(f, "nothing was heard from it for {silent_ms} ms (its lease)"),
            Self::Unreadable => f.write_str("it sent what is no message of this protocol"),
            Self::Stuck => f.write_str("it stopped reading what it was sent"),
            Self::Replaced => f.write_str("it attached again, and had left its generation"),
            Self::NotReady { waited_ms } => write!(f, "it was not ready within {waited_ms} ms (workers.start_timeout)"),
            Self::NotIdle { waited_ms } => write!(f, "it did not stop within {waited_ms} ms of being told to (workers.step_timeout)"),
            Self::Straggler { activity, waited_ms } => {
                write!(f, "the others waited for it for {waited_ms} ms, and it {}", activity_text(*activity))
            }
            Self::Failed { kind, message } => write!(f, "it failed ({}): {message}", kind_text(*kind)),
            Self::Unreached(unreached) => unreached.fmt(f),
            Self::Differs { field, expected, found } => {
                write!(f, "its {field} is {found}, and the run's is {expected}; start it with the data and models of this run")
            }
        }
    }
}

/// What ranks report and must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Applied steps.
    Step,
    /// Digest of weights, optimizer and EMA.
    State,
    /// Digest of the data set's manifest.
    Data,
    /// Fingerprint of the frozen models.
    Models,
    /// Samples in one epoch.
    SamplesPerEpoch,
    /// Epoch and step in it.
    Position,
    /// What was trained on.
    Ledger,
    /// How training ended.
    Outcome,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Step => "step",
            Self::State => "state digest",
            Self::Data => "data set digest",
            Self::Models => "models' fingerprint",
            Self::SamplesPerEpoch => "samples per epoch",
            Self::Position => "position in the data",
            Self::Ledger => "ledger of used samples",
            Self::Outcome => "outcome",
        })
    }
}

/// What a rank's report differs from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Than {
    /// What most ranks (of two: rank 0) report.
    Others,
    /// The commit that the run resumes from.
    Commit(Step),
    /// A run that begins anew.
    FreshStart,
    /// The state that a rank holds, of which the others are to have a copy.
    Survivor,
}

/// Why a run failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// Too few workers came.
    #[error(
        "only {have} of {need} workers came within {waited_ms} ms (workers.start_timeout); start the missing ones, or lower workers.count"
    )]
    TooFew {
        /// That came.
        have: usize,
        /// That the run needs.
        need: usize,
        /// Milliseconds.
        waited_ms: u64,
    },
    /// Some ranks did not load in time.
    #[error("{who} was not ready within {waited_ms} ms (workers.start_timeout); look at its log, or raise the timeout")]
    NotReady {
        /// The first that is missing.
        who: Who,
        /// Milliseconds.
        waited_ms: u64,
    },
    /// Too few workers are left.
    #[error(
        "only {have} of the {need} workers that training needs (workers.min) are left, and no others came within {waited_ms} ms \
         (workers.start_timeout){}; start the run again to resume from its last commit",
        last.as_ref().map_or_else(String::new, |(who, how)| format!("; the last to be lost was {who}: {how}"))
    )]
    TooFewLeft {
        /// That are left.
        have: usize,
        /// That are needed.
        need: usize,
        /// Milliseconds.
        waited_ms: u64,
        /// Who was lost last, and how.
        last: Option<(Who, Loss)>,
    },
    /// Two ranks cannot train together, and too few are left without them.
    #[error(
        "{by} does not reach {who} at {address}, so that they cannot train together; check the --advertise and --listen of the latter, and the \
         ports between the two. Its words: {words}"
    )]
    Unreached {
        /// Who is not reached.
        who: Who,
        /// Who calls it.
        by: Who,
        /// Where.
        address: String,
        /// The caller's.
        words: String,
    },
    /// Generation after generation makes no step.
    #[error("training makes no progress: {generations} generations in a row ended at step {step}, where they began; the last one: {why}")]
    NoProgress {
        /// How many.
        generations: u32,
        /// The step.
        step: Step,
        /// Why the last one ended.
        why: String,
    },
    /// A worker reported that it can't go on.
    #[error("{who} failed ({}): {message}", kind_text(*kind))]
    Worker {
        /// Which.
        who: Who,
        /// Of what kind.
        kind: v1::FailureKind,
        /// In its words.
        message: String,
        /// Whether it will fail in the same way again.
        permanent: bool,
    },
    /// A rank reports another value than it should (SAME).
    #[error("{who} at step {step} has another {field} (expected {expected} {}, found {found}); {}", than_text(*than), advice(*field))]
    Differs {
        /// Which.
        who: Who,
        /// At which applied step.
        step: Step,
        /// What.
        field: Field,
        /// As it must be.
        expected: String,
        /// As this rank has it.
        found: String,
        /// Where the expected value is from.
        than: Than,
    },
    /// A member sent a value of the wrong form.
    #[error("{who} sent a malformed {field} ({found}); worker and coordinator must be of one build")]
    Malformed {
        /// Which.
        who: Who,
        /// What.
        field: Field,
        /// As sent.
        found: String,
    },
    /// Two ranks saved different bytes under one name.
    #[error(
        "{who} saved {name} of step {step} with other bytes than before (expected {expected}, found {found}); the ranks' states differ"
    )]
    PartDiffers {
        /// The later one.
        who: Who,
        /// The commit.
        step: Step,
        /// The file.
        name: String,
        /// Digest saved first.
        expected: String,
        /// Digest saved later.
        found: String,
    },
    /// A commit was begun and not completed.
    #[error(
        "the commit of step {step} was not complete within {waited_ms} ms: {lacks} did not come; look at the workers' logs and the store"
    )]
    CommitOverdue {
        /// Its step.
        step: Step,
        /// What has not come, in words.
        lacks: String,
        /// Milliseconds.
        waited_ms: u64,
    },
    /// All ranks have finished, but the last commit or the end's record did not come.
    #[error("all ranks finished at step {step}, but its commit did not follow within {waited_ms} ms (the last one is of step {last})")]
    NoLastCommit {
        /// The last applied step.
        step: Step,
        /// The newest commit.
        last: Step,
        /// Milliseconds.
        waited_ms: u64,
    },
    /// The workers did not leave in time.
    #[error(
        "the workers did not commit and leave within {waited_ms} ms of the stop ({reason}); start the run again to resume from its last commit"
    )]
    DrainOverdue {
        /// Why they were to leave.
        reason: String,
        /// Milliseconds.
        waited_ms: u64,
    },
    /// The run was told to leave when nobody was left who held its state.
    #[error(
        "told to leave ({reason}) when all workers were gone: what was applied since the last commit (of step {last}) is lost, {steps} steps; start the \
         run again to go on from that commit"
    )]
    StepsLost {
        /// Why it was to leave.
        reason: String,
        /// The newest commit.
        last: Step,
        /// Applied since.
        steps: u64,
    },
    /// Another coordinator has the run (TERM).
    #[error("superseded: the coordinator of term {by} has taken over this run, so this one stops")]
    Superseded {
        /// Its term.
        by: Term,
    },
    /// The log refuses (COMMIT).
    #[error("the run's log could not be written: {error}; start the run again once the store is well")]
    Append {
        /// The store's words.
        error: String,
    },
    /// The log is not there any more (COMMIT).
    #[error("{error}")]
    LogGone {
        /// What is missing.
        error: String,
    },
    /// A job's own reasons.
    #[error(transparent)]
    Job(#[from] JobFailure),
}

impl Failure {
    /// Whether the run would fail in the same way if it were started again.
    pub fn permanent(&self) -> bool {
        match self {
            Self::Worker { permanent, .. } => *permanent,
            Self::Job(failure) => failure.permanent(),
            Self::Differs { .. } | Self::Malformed { .. } | Self::PartDiffers { .. } | Self::NoProgress { .. } | Self::LogGone { .. } => {
                true
            }
            // Started again it would take the run back, and be started against for ever.
            Self::Superseded { .. } => true,
            Self::TooFew { .. }
            | Self::TooFewLeft { .. }
            | Self::NotReady { .. }
            | Self::Unreached { .. }
            | Self::CommitOverdue { .. }
            | Self::NoLastCommit { .. }
            | Self::DrainOverdue { .. }
            | Self::StepsLost { .. }
            | Self::Append { .. } => false,
        }
    }

    /// Whether the log is out of reach, so that not even the end can be recorded.
    pub(super) fn is_of_log(&self) -> bool {
        matches!(self, Self::Superseded { .. } | Self::Append { .. } | Self::LogGone { .. })
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self::Failed(Box::new(failure))
    }
}

fn kind_text(kind: v1::FailureKind) -> &'static str {
    match kind {
        v1::FailureKind::Collective => "a collective broke",
        v1::FailureKind::Input => "input",
        v1::FailureKind::Store => "store",
        v1::FailureKind::Numeric => "numbers",
        v1::FailureKind::Machine => "its machine",
        v1::FailureKind::Internal | v1::FailureKind::Unspecified => "internal",
    }
}

fn than_text(than: Than) -> String {
    match than {
        Than::Others => "like the other ranks".into(),
        Than::Commit(step) => format!("as in the commit of step {step}"),
        Than::FreshStart => "of a fresh start".into(),
        Than::Survivor => "like the rank that holds the newest state".into(),
    }
}

pub(super) fn advice(field: Field) -> &'static str {
    match field {
        Field::Data => "all workers, and every resume, must read the data set that the run began with",
        Field::Models => {
            "all workers, and every resume, must load the models that the run began with: base, LoRAs, text, and connector.from"
        }
        _ => "ranks must compute the same bits: look for unlike hardware or builds, or for memory errors",
    }
}
