//! The run's folder: its log, of records that are created only if absent, and the parts of its commits.

use super::world::World;
use ella_store::{Body, Digest, Record, RunState};
use std::collections::{BTreeMap, BTreeSet};

/// How the store behaves for a time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weather {
    pub(super) until: u64,
    /// How long an operation takes at most, in milliseconds.
    pub(super) slow: u64,
    /// One in so many is not done; 0: none.
    pub(super) refused: u64,
    /// One in so many is done, and its answer is lost; 0: none.
    pub(super) lost: u64,
}

/// A file, as far as it matters: its digest, and the state that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) blake3: Digest,
    pub(super) chain: u64,
}

/// What is kept.
#[derive(Debug, Default)]
pub(super) struct Store {
    pub(super) records: Vec<Record>,
    pub(super) folders: BTreeMap<String, BTreeMap<&'static str, Part>>,
    pub(super) log: Weather,
    pub(super) uploads: Weather,
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Done,
    Refused,
    /// It is done, and nobody hears of it.
    Unheard,
}

impl World {
    /// What becomes of an operation in this weather.
    pub(super) fn fate(&mut self, weather: Weather) -> Fate {
        let mut befalls = |one_in: u64| weather.until > self.now && one_in > 0 && self.random.chance(one_in);
        match (befalls(weather.refused), befalls(weather.lost)) {
            (true, _) => Fate::Refused,
            (_, true) => Fate::Unheard,
            _ => Fate::Done,
        }
    }

    /// How long it takes.
    pub(super) fn takes(&mut self, weather: Weather) -> u64 {
        let most = if weather.until > self.now { weather.slow.max(20) } else { 20 };
        self.between(1, most)
    }

    /// Creates a record if its number is free.
    pub(super) fn create(&mut self, record: Record) -> bool {
        if self.store.records.len() as u64 > record.seq {
            return false;
        }
        self.judge_record(&record);
        self.tell(|| format!("log {}: {:?}", record.seq, record.body));
        self.store.records.push(record);
        true
    }

    pub(super) fn log_state(&self) -> RunState {
        RunState::from_records(&self.store.records)
    }

    /// Deletes folders that a coordinator has no use for.
    pub(super) fn remove_folders(&mut self, folders: &[String]) {
        let newest = self.store.records.iter().rev().find_map(|record| match &record.body {
            Body::Commit(commit) => Some(commit.folder.clone()),
            _ => None,
        });
        for folder in folders {
            assert_ne!(Some(folder), newest.as_ref(), "COMMIT: the newest commit was deleted");
            self.store.folders.remove(folder);
        }
    }

    /// Folders that no record names, or that were given up.
    pub(super) fn leftovers(&self, state: &RunState, term: u64) -> Vec<String> {
        let live: BTreeSet<&str> = state.commits.iter().map(|commit| commit.folder.as_str()).collect();
        let term_of = |folder: &str| folder.split_once('.').and_then(|(_, rest)| rest.split('-').next()?.parse::<u64>().ok());
        let is_left = |folder: &&String| {
            state.retired.contains(*folder) || (term_of(folder).is_some_and(|of| of < term) && !live.contains(folder.as_str()))
        };
        self.store.folders.keys().filter(is_left).cloned().collect()
    }
}
