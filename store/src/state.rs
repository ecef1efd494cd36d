//! What the log's records say together.

use std::collections::BTreeSet;

use crate::record::{Body, Commit, Outcome, Record};

/// The state of a run by its log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunState {
    /// The newest term; 0 before the first.
    pub term: u64,
    /// Commits that were not retired, in the order of the log.
    pub commits: Vec<Commit>,
    /// Folders of retired commits; they are deleted, or are to be.
    pub retired: BTreeSet<String>,
    /// The newest end, if any coordinator ended in good order.
    pub ended: Option<Ended>,
}

/// How a coordinator ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its term.
    pub term: u64,
    /// How.
    pub outcome: Outcome,
    /// The last applied step.
    pub step: u64,
    /// In words.
    pub reason: String,
    /// When, in milliseconds since 1970.
    pub at_unix_ms: u64,
}

impl RunState {
    /// Folds the records, which are whole and in order as [`crate::RunLog::read`] gives them.
    pub fn from_records(records: &[Record]) -> Self {
        let mut state = Self::default();
        for record in records {
            state.apply(record);
        }
        state
    }

    /// Takes in the next record.
    pub fn apply(&mut self, record: &Record) {
        self.term = record.term;
        match &record.body {
            Body::Term(_) => {}
            Body::Commit(commit) => self.commits.push(commit.clone()),
            Body::Retire { commits } => {
                self.commits.retain(|commit| !commits.contains(&commit.folder));
                self.retired.extend(commits.iter().cloned());
            }
            Body::End { outcome, step, reason } => {
                let (term, at_unix_ms) = (record.term, record.at_unix_ms);
                self.ended = Some(Ended { term, outcome: *outcome, step: *step, reason: reason.clone(), at_unix_ms });
            }
        }
    }

    /// The newest commit that was not retired.
    pub fn last_commit(&self) -> Option<&Commit> {
        self.commits.last()
    }

    /// Whether the newest coordinator has ended.
    pub fn is_over(&self) -> bool {
        self.ended.as_ref().is_some_and(|ended| ended.term == self.term)
    }

    /// Whether the run is complete: some coordinator said so.
    pub fn is_done(&self) -> bool {
        self.ended.as_ref().is_some_and(|ended| ended.outcome == Outcome::Done)
    }
}
