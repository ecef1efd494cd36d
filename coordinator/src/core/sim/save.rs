//! A worker's committing thread: it reports a snapshot's digests and uploads this rank's share of the files, one commit after the other, as
//! `ella-worker`'s `commit` does.

use super::rank::{Rank, Seat};
use super::store::{Fate, Part};
use super::truth::State;
use super::world::{Happening, World};
use crate::core::PARTS;
use ella_proto::v1::{self, from_worker};
use ella_store::{Commit, commit_folder};
use std::collections::VecDeque;

/// Commits that may be under way while training goes on.
const UNDER_WAY: usize = 2;
/// After so long the store gives an upload up.
const DEADLINE: u64 = 6_000;

#[derive(Clone, Debug)]
struct Job {
    state: State,
    seat: Seat,
}

/// What the thread is at.
#[derive(Clone, Copy, Debug)]
enum Stage {
    Digesting,
    Uploading { part: usize, fate: Fate },
}

/// The thread.
#[derive(Debug, Default)]
pub(super) struct Saver {
    queue: VecDeque<Job>,
    current: Option<(Job, Stage)>,
    dead: bool,
    token: u64,
}

impl Saver {
    pub(super) fn is_dead(&self) -> bool {
        self.dead
    }

    fn under_way(&self) -> usize {
        self.queue.len() + usize::from(self.current.is_some())
    }

    pub(super) fn has_room(&self) -> bool {
        self.under_way() < UNDER_WAY
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way() == 0
    }
}

impl Rank {
    /// A commit whose record stands is no longer being saved.
    pub(super) fn note_record(&mut self, recorded: u64) {
        if self.saving.is_some_and(|saving| recorded >= saving) {
            self.saving = None;
        }
    }
}

impl World {
    pub(super) fn take_snapshot(&mut self, w: usize) {
        let rank = &mut self.workers[w].rank;
        let (state, seat) = (rank.state.clone(), rank.seat);
        self.snapshots.entry((seat.era.term, seat.era.generation, state.step)).or_default().insert(seat.rank);
        self.workers[w].rank.saver.queue.push_back(Job { state, seat });
        self.see("snapshots");
        self.next_job(w);
    }

    fn next_job(&mut self, w: usize) {
        loop {
            let worker = &mut self.workers[w];
            let saver = &mut worker.rank.saver;
            if saver.current.is_some() || saver.dead {
                return;
            }
            let Some(job) = saver.queue.pop_front() else { return };
            // Of a generation that is over nobody would record it.
            if worker.current == job.seat.era {
                saver.current = Some((job, Stage::Digesting));
                let delay = self.between(1, 30);
                return self.saver_sleeps(w, delay);
            }
            self.see("snapshots of a generation that is over");
        }
    }

    fn saver_sleeps(&mut self, w: usize, delay: u64) {
        let saver = &mut self.workers[w].rank.saver;
        saver.token += 1;
        let token = saver.token;
        self.after(delay, Happening::Commit { worker: w, token });
    }

    pub(super) fn committer(&mut self, w: usize, token: u64) {
        let worker = &mut self.workers[w];
        if !worker.lives() || worker.rank.saver.token != token {
            return;
        }
        let Some((job, stage)) = worker.rank.saver.current.clone() else { return };
        match stage {
            Stage::Digesting => {
                self.report(w, &job);
                self.upload_from(w, job, 0);
            }
            Stage::Uploading { part, fate } => self.uploaded(w, job, part, fate),
        }
    }

    fn report(&mut self, w: usize, job: &Job) {
        let (epoch, step_in_epoch) = self.truth.position(job.state.step);
        let digest = v1::StateDigest {
            step: job.state.step,
            digest: job.state.digest().to_string(),
            ledger: job.state.reported(),
            epoch,
            step_in_epoch,
        };
        self.say_of(w, job.seat.era, from_worker::Body::State(digest));
    }

    /// Uploads this rank's next part, if there is one.
    fn upload_from(&mut self, w: usize, job: Job, from: usize) {
        let mine = (from..PARTS.len()).find(|part| *part as u32 % job.seat.world == job.seat.rank);
        let saver = &mut self.workers[w].rank.saver;
        let Some(part) = mine else {
            saver.current = None;
            self.next_job(w);
            return self.nudge(w, 2);
        };
        let weather = self.store.uploads;
        let fate = self.fate(weather);
        let takes = self.takes(weather) + self.between(5, 60);
        let fate = if takes > DEADLINE { Fate::Refused } else { fate };
        self.workers[w].rank.saver.current = Some((job, Stage::Uploading { part, fate }));
        self.saver_sleeps(w, takes.min(DEADLINE));
    }

    fn put_part(&mut self, job: &Job, part: usize) {
        let Seat { era, .. } = job.seat;
        let folder = commit_folder(job.state.step, era.term, era.generation);
        let file = Part { blake3: job.state.parts()[part], chain: job.state.chain };
        self.store.folders.entry(folder).or_default().insert(PARTS[part], file);
    }

    fn uploaded(&mut self, w: usize, job: Job, part: usize, fate: Fate) {
        if fate != Fate::Refused {
            self.put_part(&job, part);
        }
        if fate != Fate::Done {
            self.see("uploads that failed");
            self.workers[w].rank.saver.dead = true;
            return self.nudge(w, 2);
        }
        let blake3 = job.state.parts()[part].to_string();
        let saved = v1::PartSaved { step: job.state.step, name: PARTS[part].to_owned(), bytes: 5, blake3 };
        self.say_of(w, job.seat.era, from_worker::Body::Part(saved));
        self.upload_from(w, job, part + 1);
    }

    /// The process is gone. What it was uploading may be in the store all the same.
    pub(super) fn abandon_upload(&mut self, w: usize) {
        if let Some((job, Stage::Uploading { part, .. })) = self.workers[w].rank.saver.current.take()
            && self.random.chance(2)
        {
            self.put_part(&job, part);
        }
    }

    /// The state that a commit holds; none if a file of it is missing, or is not as recorded.
    pub(super) fn read_commit(&mut self, commit: &Commit) -> Option<State> {
        let folder = self.store.folders.get(&commit.folder);
        let read = |part: &ella_store::Part| folder?.get(part.name.as_str()).filter(|found| found.blake3 == part.blake3);
        let files: Option<Vec<&Part>> = commit.parts.iter().map(read).collect();
        let chain = files.as_ref().and_then(|files| Some(files.first()?.chain));
        self.judge_restore(commit, chain)?;
        let ledger = self.truth.state(commit.step).ledger.clone();
        Some(State { step: commit.step, chain: chain?, ledger })
    }
}
