//! What a run has been through, in bounded memory: its curves, where its ranks' time went, what happened. For people: the dashboard and
//! `ella top` show it, and no decision is taken by it.
//!
//! [`Past`] is fed with lines as a run folder's `metrics/`, `timing/` and `events/` hold them, by a coordinator as they come about and by
//! [`Reader`] from the folder.

mod counted;
mod curves;
mod event;
mod reader;
mod verdict;

pub use counted::Counted;
pub use curves::{Bucket, Curves, MOST_BUCKETS, Spread, View};
pub use event::{Events, Happening, Kind, newest_first};
pub use reader::{Gauge, Reader, term_of};
pub use verdict::{Rank, Timing, Timings, judge};

use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Problems that are remembered in words.
const MOST_PROBLEMS: usize = 8;

/// What was measured of one step, as `metrics/` keeps it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Point {
    /// Of the coordinator that kept it.
    #[serde(skip)]
    pub term: u64,
    /// When it was applied, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// The step, from 1.
    pub step: u64,
    /// Of this step.
    pub samples: u64,
    /// None: it is not finite.
    pub loss: Option<f64>,
    /// On held-out noise, where it was measured.
    #[serde(default)]
    pub held_out_loss: Option<f64>,
    /// Before clipping.
    #[serde(default)]
    pub grad_norm: Option<f64>,
    /// The learning rate.
    #[serde(default)]
    pub lr: Option<f64>,
    /// Seconds, by the rank that reports.
    #[serde(default)]
    pub step_seconds: f64,
    /// Samples that were skipped, by reason (KNOWN).
    #[serde(default)]
    pub skipped: BTreeMap<String, u64>,
    /// What reading and drawing came to, by name (KNOWN).
    #[serde(default)]
    pub read: BTreeMap<String, u64>,
}

impl Point {
    /// From a rank's message.
    pub fn of(term: u64, progress: &ella_proto::v1::Progress) -> Self {
        let finite = |value: f64| value.is_finite().then_some(value);
        Self {
            term,
            at_unix_ms: progress.at_unix_ms,
            step: progress.step,
            samples: progress.samples,
            loss: finite(progress.loss),
            held_out_loss: progress.held_out_loss.and_then(finite),
            grad_norm: finite(progress.grad_norm),
            lr: finite(progress.learning_rate),
            step_seconds: progress.step_seconds,
            skipped: progress.skipped.clone().into_iter().collect(),
            read: progress.read.clone().into_iter().collect(),
        }
    }
}

/// What a run has been through.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// What was measured of its steps.
    pub curves: Curves,
    /// Where its ranks' time went.
    pub timings: Timings,
    /// What happened.
    pub events: Events,
    /// Samples that were skipped, by reason (KNOWN).
    pub skipped: Counted,
    /// What reading and drawing came to, by name (KNOWN).
    pub read: Counted,
    /// What could not be taken in.
    pub faults: Faults,
    /// The first step from which this goes on, whatever was measured before, if an event says so.
    begun: Option<u64>,
}

/// What could not be read of a run's past (KNOWN).
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Faults {
    /// Lines that are none.
    pub damaged_lines: u64,
    /// Files that the store did not give.
    pub unread_files: u64,
    /// Folders that the store did not list when they were last asked for, and why. Nothing of them is lost to who asks again.
    pub unlisted: BTreeMap<&'static str, String>,
    /// The first lines and files of them, in words.
    pub problems: Vec<String>,
}

impl Faults {
    fn tell(&mut self, problem: impl FnOnce() -> String) {
        if self.problems.len() < MOST_PROBLEMS {
            self.problems.push(problem());
        }
    }

    fn add(&mut self, other: Self) {
        self.damaged_lines += other.damaged_lines;
        self.unread_files += other.unread_files;
        self.unlisted.extend(other.unlisted);
        other.problems.into_iter().for_each(|problem| self.tell(|| problem));
    }
}

impl Past {
    /// Takes in a step.
    pub fn measured(&mut self, point: &Point) {
        self.curves.add(point);
        self.skipped.add(point.step, &point.skipped);
        self.read.add(point.step, &point.read);
    }

    /// Takes in a line of `events/`, written in `term`. None if it is no event.
    pub fn happened(&mut self, term: u64, line: &Value) -> Option<Happening> {
        if let Some(step) = goes_on_from(line).filter(|_| self.curves.last().is_none_or(|last| last.term < term)) {
            self.begun = Some(self.begun.map_or(step, |begun| begun.min(step)));
            self.undo(step);
        }
        self.events.add(term, line)
    }

    /// Takes in all that came after.
    pub fn append(&mut self, later: Self) {
        let first = later.curves.first_step().map(|first| first.saturating_sub(1));
        if let Some(step) = later.begun.into_iter().chain(first).min() {
            self.undo(step);
        }
        self.curves.append(later.curves);
        self.timings.append(later.timings);
        self.events.append(later.events);
        self.skipped.append(later.skipped);
        self.read.append(later.read);
        self.faults.add(later.faults);
    }

    /// A coordinator has gone on from `step`, so that what another measured beyond it is not of this run any more.
    fn undo(&mut self, step: u64) {
        self.curves.undo(step);
        self.skipped.undo(step);
        self.read.undo(step);
    }
}

/// The step from which a run goes on by a line of `events/`, or at which it has ended.
fn goes_on_from(line: &Value) -> Option<u64> {
    match line["event"].as_str()? {
        "generation" => line["from_step"].as_u64(),
        "ended" => line["step"].as_u64(),
        _ => None,
    }
}
