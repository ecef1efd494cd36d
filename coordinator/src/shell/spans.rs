//! The coordinator's part of a run's traces, made of what it notes.

use crate::core::Note;
use crate::trace::{self, About, Trace};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// What is under way.
#[derive(Debug)]
pub(super) struct Spans {
    run: String,
    term: u64,
    change: Mutex<Change>,
}

/// A change of members.
#[derive(Debug, Default)]
struct Change {
    /// Since when, and why.
    begun: Option<(SystemTime, String)>,
    formed: Option<(SystemTime, Vec<String>)>,
}

impl Spans {
    pub(super) fn new(run: String, term: u64) -> Self {
        Self { run, term, change: Mutex::default() }
    }

    pub(super) fn noted(&self, note: &Note) {
        if !trace::is_on(None) {
            return;
        }
        let mut change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let now = SystemTime::now();
        match note {
            Note::Lost { worker, why, .. } => drop(change.begun.get_or_insert_with(|| (now, format!("{worker}: {why}")))),
            Note::Regroup { reason, .. } => drop(change.begun.get_or_insert_with(|| (now, reason.clone()))),
            Note::Generation { workers, .. } => change.formed = Some((now, workers.clone())),
            Note::Started { generation, step } => self.started((*generation, *step), std::mem::take(&mut change), now),
            Note::Committed { step, generation, bytes, took_ms, .. } => self.committed((*generation, *step), *bytes, *took_ms, now),
            _ => {}
        }
    }

    /// A generation began to train: what led to it, and what it took to get ready.
    fn started(&self, (generation, step): (u64, u64), change: Change, now: SystemTime) {
        let Some((formed, workers)) = change.formed else { return };
        let trace = Trace::of(About::Generation, &self.run, &[self.term, generation]);
        let (begun, why) = change.begun.unwrap_or((formed, "the run begins".to_owned()));
        let since = |from: SystemTime, to: SystemTime| to.duration_since(from).unwrap_or_default();
        let root = trace.root().took(begun, since(begun, now)).with("ella.run", self.run.clone());
        let root = root.with("ella.term", self.term.cast_signed()).with("ella.generation", generation.cast_signed());
        let root = root.with("ella.step", step.cast_signed()).with("ella.reason", why).with_all("ella.workers", &workers);
        root.parts(&[("regroup", since(begun, formed)), ("get ready", since(formed, now))]).into_iter().for_each(trace::tell);
        trace::tell(root);
    }

    /// The ranks tell what they did for it, within this.
    fn committed(&self, (generation, step): (u64, u64), bytes: u64, took_ms: u64, now: SystemTime) {
        let took = Duration::from_millis(took_ms);
        let trace = Trace::of(About::Commit, &self.run, &[self.term, generation, step]);
        let root = trace.root().took(now - took, took).with("ella.run", self.run.clone()).with("ella.step", step.cast_signed());
        let root = root.with("ella.term", self.term.cast_signed()).with("ella.generation", generation.cast_signed());
        trace::tell(root.with("ella.bytes", bytes.cast_signed()));
    }
}
