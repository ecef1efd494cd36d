//! What must always be true of the run as a whole, judged by what everyone does. What a single core says is judged by the core's own
//! `Oracle`.

use super::ring::Sum;
use super::schedule::Verdict;
use super::world::World;
use crate::core::PARTS;
use ella_store::{Body, Commit, Outcome, Record, RunState};

impl World {
    /// A step is about to be applied by a rank: what made it up.
    pub(super) fn judge_step(&self, w: usize, sum: &Sum) {
        let rank = &self.workers[w].rank;
        let number = rank.state.step + 1;
        assert!(sum.numbers.iter().all(|step| *step == number), "ORDER: worker {w} takes step {number}, its peers {:?}", sum.numbers);
        assert_eq!(sum.words.ranks, u64::from(rank.seat.world), "ONCE: ranks in step {number}");
        assert_eq!(sum.words.tally.samples, self.truth.step_samples(number), "ONCE: samples of step {number}");
    }

    /// A rank has applied a step: its state is what training must come to.
    pub(super) fn judge_state(&self, w: usize) {
        let state = &self.workers[w].rank.state;
        let truth = self.truth.state(state.step);
        assert_eq!(state.ledger, truth.ledger, "ONCE: the ledger of worker {w} after step {}", state.step);
        assert_eq!(state.chain, truth.chain, "SAME: the state of worker {w} after step {}", state.step);
    }

    /// A record is about to stand in the log.
    pub(super) fn judge_record(&self, record: &Record) {
        let last = self.store.records.last();
        assert_eq!(record.seq, self.store.records.len() as u64, "TERM: numbers are contiguous");
        match (&record.body, last) {
            (Body::Term(_), _) => assert!(last.is_none_or(|last| record.term > last.term), "TERM: terms rise"),
            (body, None) => panic!("TERM: {body:?} before a term"),
            (body, Some(last)) => {
                let holder = (last.term, &last.nonce);
                assert_eq!((record.term, &record.nonce), holder, "TERM: {body:?} of who does not hold the log");
            }
        }
        match &record.body {
            Body::Commit(commit) => self.judge_commit(commit, record.term),
            Body::Retire { commits } => self.judge_retire(commits),
            Body::End { outcome: Outcome::Done, .. } => {
                let last = self.log_state().last_commit().map(|commit| commit.step);
                assert_eq!(last, Some(self.setup.steps), "COMMIT: done without the last step's commit");
            }
            Body::End { .. } | Body::Term(_) => {}
        }
    }

    fn judge_commit(&self, commit: &Commit, term: u64) {
        let mut records = self.store.records.iter().rev();
        let before = records.find_map(|record| if let Body::Commit(commit) = &record.body { Some((commit, record.term)) } else { None });
        if let Some((last, of)) = before {
            assert!(commit.step > last.step, "COMMIT: steps rise: {} after {}", commit.step, last.step);
            let rises = (term, commit.generation) >= (of, last.generation);
            assert!(rises, "SPLIT: generation {} of term {term} after {} of {of}", commit.generation, last.generation);
        }
        let truth = self.truth.state(commit.step);
        assert_eq!(commit.state_digest, truth.digest(), "SAME: the commit of step {}", commit.step);
        assert_eq!(commit.ledger, truth.recorded(), "ONCE: the ledger of the commit of step {}", commit.step);
        assert_eq!((commit.epoch, commit.step_in_epoch), self.truth.position(commit.step), "ORDER: where the commit goes on");
        let ranks = self.snapshots.get(&(term, commit.generation, commit.step)).map_or(0, |ranks| ranks.len());
        assert_eq!(ranks, commit.world as usize, "SPLIT: ranks of generation {} that took step {}", commit.generation, commit.step);
        self.judge_parts(commit);
    }

    /// Every part is in the store, with the bytes that the truth has.
    fn judge_parts(&self, commit: &Commit) {
        let names: Vec<&str> = commit.parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names, PARTS, "COMMIT: the parts that the record of step {} names", commit.step);
        let folder = self.store.folders.get(&commit.folder);
        for (part, expected) in commit.parts.iter().zip(self.truth.state(commit.step).parts()) {
            let found = folder.and_then(|folder| folder.get(part.name.as_str())).map(|found| found.blake3);
            assert_eq!(found, Some(part.blake3), "COMMIT: {}/{} in the store", commit.folder, part.name);
            assert_eq!(part.blake3, expected, "SAME: {}/{}", commit.folder, part.name);
        }
    }

    fn judge_retire(&self, folders: &[String]) {
        let newest = self.log_state().last_commit().map(|commit| commit.folder.clone());
        assert!(newest.is_none_or(|newest| !folders.contains(&newest)), "COMMIT: the newest commit is given up");
    }

    /// A coordinator has its term: the commit to go on from is whole.
    pub(super) fn judge_commits(&self, state: &RunState) {
        if let Some(commit) = state.last_commit() {
            self.judge_parts(commit);
        }
    }

    /// A worker restores a commit. Only one whose coordinator was superseded may find it gone.
    pub(super) fn judge_restore(&self, commit: &Commit, chain: Option<u64>) -> Option<()> {
        let is_live = self.log_state().commits.iter().any(|live| live.folder == commit.folder);
        assert!(chain.is_some() || !is_live, "COMMIT: {} is restored, and is not whole", commit.folder);
        assert!(chain.is_none_or(|chain| chain == self.truth.state(commit.step).chain), "SAME: {} is restored", commit.folder);
        chain.map(drop)
    }

    /// The run is over, and everyone has left.
    pub(super) fn judge_end(&self, verdict: Verdict) {
        let state = self.log_state();
        if verdict == Verdict::Done {
            assert!(state.is_done(), "COMMIT: done, and the log does not say so");
            let last = state.last_commit().map(|commit| (commit.step, commit.state_digest));
            let steps = self.setup.steps;
            assert_eq!(last, Some((steps, self.truth.state(steps).digest())), "SAME: the final state");
        }
        self.judge_commits(&state);
    }
}
