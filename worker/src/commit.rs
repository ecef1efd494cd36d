//! COMMIT, the worker's part: a snapshot's digests go to the coordinator, and this rank's share of its files to the store, in the
//! background. The coordinator writes the record. Samples go the same way (`crate::album`).

use crate::album::{self, Album, Page};
use crate::control::{Era, Flags, Outbox};
use crate::train::state::{Snapshot, part_names};
use ella_coordinator::trace::{self, About, Trace};
use ella_dataset::order::Position;
use ella_proto::samples::Index;
use ella_proto::v1::{LedgerEpoch, PartSaved, StateDigest, from_worker};
use ella_store::{Store, StoreError, commit_folder};
use futures::future::join_all;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// A commit could not be saved. Training must not go on as if it had.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The store refused a file.
    #[error("the commit of step {step} cannot be saved: {source}")]
    Store {
        /// Which commit.
        step: u64,
        /// The store's error.
        source: StoreError,
    },
    /// It takes too long.
    #[error("a commit is not saved after {seconds} s (workers.start_timeout); look at the store, or raise the timeout")]
    Late {
        /// The deadline.
        seconds: u64,
    },
    /// The committing thread is gone.
    #[error("the committing thread has died")]
    Died,
    /// Its generation ended first: it will not be recorded.
    #[error("the generation ended before its commit was saved")]
    Interrupted,
}

/// The rank for which a commit is made, in its generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// This rank.
    pub rank: u32,
    /// All ranks.
    pub world: u32,
    /// The term under which the commit is made, and the generation.
    pub era: Era,
}

impl Seat {
    /// Tells of this rank's part of a commit, as a trace: it has just been done, and took so long.
    pub(crate) fn tell(&self, run: &str, step: u64, part: &'static str, took: Duration, error: Option<String>) {
        if trace::is_on(None) {
            let trace = Trace::of(About::Commit, run, &[self.era.term, self.era.generation, step]);
            let span = trace.within(part, self.rank.into()).took(SystemTime::now() - took, took);
            trace::tell(span.with("ella.rank", i64::from(self.rank)).failed(error));
        }
    }
}

/// Commits that may be under way while training goes on: one being saved, and one waiting. Each has a copy of the state in memory, from which
/// its files are written: so there is one copy, and a second one only as long as a commit is taken before the last one is saved.
const UNDER_WAY: usize = 2;

struct Job {
    snapshot: Snapshot,
    position: Position,
    seat: Seat,
}

/// What is stored in its turn.
enum Turn {
    Commit(Box<Job>),
    Page(Page),
}

/// Saves snapshots, one after the other, while training goes on.
#[derive(Debug)]
pub struct Committer {
    jobs: Option<Sender<Turn>>,
    /// The snapshot of each commit that is saved, or came to nothing, whose memory may be used again, and none for each picture; closed when the
    /// thread has ended.
    saved: Receiver<Option<Snapshot>>,
    /// One of them. Of two that are not needed, one is given back to the system.
    kept: Option<Snapshot>,
    under_way: usize,
    /// Pictures under way.
    pages: usize,
    pictures: Arc<album::Counts>,
    thread: Option<JoinHandle<Result<(), CommitError>>>,
    flags: Arc<Flags>,
    patience: Duration,
    store: Store,
    runtime: tokio::runtime::Handle,
}

impl Committer {
    /// Starts the committing thread, into the run folder `store`. One commit may take `patience`: the coordinator does not wait longer.
    pub fn start(store: Store, patience: Duration, outbox: Outbox, runtime: tokio::runtime::Handle) -> std::io::Result<Self> {
        let (jobs, queue) = channel::<Turn>();
        let (tell, saved) = channel();
        let flags = outbox.flags().clone();
        let (run, handle) = (store.clone(), runtime.clone());
        let pictures = Arc::new(album::Counts::default());
        let (counts, mut album) = (pictures.clone(), Album::new(store.clone(), runtime.clone()));
        let serve = move || {
            for turn in queue {
                let job = match turn {
                    Turn::Commit(job) => job,
                    Turn::Page(page) => {
                        album.keep(page, &counts);
                        let _ = tell.send(None);
                        continue;
                    }
                };
                let step = job.snapshot.step;
                // Of a generation that is over nobody would record it.
                if outbox.flags().era() == job.seat.era {
                    let begin = Instant::now();
                    // After the run's last step no report of another one comes, and its line is written down with this commit.
                    counts.tell(&outbox, job.seat.era, step);
                    let saved = save(&job, &store, &outbox, &runtime);
                    let error = saved.as_ref().err().map(ToString::to_string);
                    job.seat.tell(store.url(), step, "save", begin.elapsed(), error);
                    saved.map_err(|source| CommitError::Store { step, source })?;
                }
                // Nobody waits any more when the run has ended.
                let _ = tell.send(Some(job.snapshot));
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("commit".into()).spawn(serve)?;
        Ok(Self {
            jobs: Some(jobs),
            saved,
            kept: None,
            under_way: 0,
            pages: 0,
            pictures,
            thread: Some(thread),
            flags,
            patience,
            store: run,
            runtime: handle,
        })
    }

    /// Hands a snapshot over. `position` is where the data goes on after it. Waits only if two commits are still under way, and not
    /// beyond the end of the generation.
    pub fn save(&mut self, snapshot: Snapshot, position: Position, seat: Seat) -> Result<(), CommitError> {
        self.take_back();
        while self.under_way == UNDER_WAY {
            self.one_more()?;
        }
        if !self.send(Turn::Commit(Box::new(Job { snapshot, position, seat }))) {
            return Err(self.failure());
        }
        self.under_way += 1;
        Ok(())
    }

    /// Whether a commit can be handed over without a wait; waits for that, but no longer than `patience`, and not beyond the end of the generation.
    ///
    /// # Errors
    /// The thread has given up.
    pub(crate) fn has_room(&mut self, patience: Duration) -> Result<bool, CommitError> {
        let until = Instant::now() + patience;
        self.take_back();
        while self.under_way == UNDER_WAY {
            match self.flags.receive(&self.saved, until.saturating_duration_since(Instant::now())) {
                Ok(done) => self.done(done),
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => return Err(self.failure()),
            }
        }
        Ok(true)
    }

    fn send(&self, turn: Turn) -> bool {
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(turn).is_ok())
    }

    /// Hands a picture over, which is stored before commits that are handed over later. If too much waits already, it is given up.
    pub(crate) fn keep(&mut self, page: Page) {
        let (step, bytes) = (page.step, page.png.len() as u64);
        if self.pictures.waiting.load(Ordering::Relaxed) + bytes > album::MOST_WAITING {
            tracing::warn!(step, number = page.number, "a sample is given up: the store is far behind");
            return self.give_up(1);
        }
        self.pictures.waiting.fetch_add(bytes, Ordering::Relaxed);
        self.pages += usize::from(self.send(Turn::Page(page)));
    }

    /// So many pictures are not to come.
    pub(crate) fn give_up(&self, pictures: usize) {
        self.pictures.give_up(pictures);
    }

    /// What became of pictures since the last call, by name (KNOWN).
    pub fn pictures(&self) -> HashMap<String, u64> {
        self.pictures.news()
    }

    /// Tells the coordinator of that, where no step's report will.
    pub(crate) fn tell_pictures(&self, outbox: &Outbox, era: Era, step: u64) {
        self.pictures.tell(outbox, era, step);
    }

    /// Whether all pictures of a step stand in the run folder, made in this way. A store that does not answer soon has none.
    pub(crate) fn has_samples(&self, index: &Index) -> bool {
        album::is_there(&self.store, &self.runtime, index)
    }

    /// Deletes what was drawn of a step with other settings.
    pub(crate) fn clear_samples(&self, index: &Index) {
        album::clear(&self.store, &self.runtime, index);
    }

    /// Puts a small file into the run folder, and waits for it.
    ///
    /// # Errors
    /// The store's.
    pub fn put(&self, key: &str, bytes: Vec<u8>) -> Result<(), StoreError> {
        self.runtime.block_on(self.store.put(key, bytes.into()))
    }

    /// The run folder's URL.
    pub(crate) fn run(&self) -> &str {
        self.store.url()
    }

    /// A snapshot that is saved, if there is one: its memory is free.
    pub fn kept(&mut self) -> Option<Snapshot> {
        self.take_back();
        self.kept.take()
    }

    fn take_back(&mut self) {
        while let Ok(done) = self.saved.try_recv() {
            self.done(done);
        }
    }

    fn done(&mut self, snapshot: Option<Snapshot>) {
        match snapshot {
            Some(snapshot) => {
                self.under_way -= 1;
                self.kept = Some(snapshot);
            }
            None => self.pages -= 1,
        }
    }

    /// An error if the thread has given up.
    pub fn check(&mut self) -> Result<(), CommitError> {
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished) { Err(self.failure()) } else { Ok(()) }
    }

    /// Waits for what is under way, but not beyond the end of the generation.
    pub fn settle(&mut self) -> Result<(), CommitError> {
        while self.under_way + self.pages > 0 {
            self.one_more()?;
        }
        self.check()
    }

    /// Waits until one more commit or picture is saved.
    fn one_more(&mut self) -> Result<(), CommitError> {
        match self.flags.receive(&self.saved, self.patience) {
            Ok(done) => {
                self.done(done);
                Ok(())
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.failure()),
            Err(RecvTimeoutError::Timeout) if self.flags.interrupted() => Err(CommitError::Interrupted),
            Err(RecvTimeoutError::Timeout) => Err(CommitError::Late { seconds: self.patience.as_secs() }),
        }
    }

    /// Why the thread has ended.
    fn failure(&mut self) -> CommitError {
        self.jobs = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => error,
            _ => CommitError::Died,
        }
    }
}

/// Saves this rank's share of the files, and tells the coordinator.
fn save(job: &Job, store: &Store, outbox: &Outbox, runtime: &tokio::runtime::Handle) -> Result<(), StoreError> {
    let Job { snapshot, seat: Seat { rank, world, era }, .. } = job;
    let folder = store.child(&commit_folder(snapshot.step, era.term, era.generation));
    let files = part_names().into_iter().enumerate().map(|(part, name)| (part, name, snapshot.file(part)));
    let share: Vec<_> = files.filter(|(part, ..)| *part as u32 % world == *rank).collect();
    // None is given up because another failed: a cloud would keep what it had of it.
    let uploads = || join_all(share.iter().map(|(_, name, file)| folder.upload(name, file)));
    let upload = || runtime.block_on(uploads()).into_iter().collect::<Result<(), StoreError>>();
    // All at once: a disk has nothing to do while digests are made, or while a file goes into the system's memory, from which it is synced.
    let digests = std::thread::scope(|scope| {
        let upload = scope.spawn(upload);
        let digests = part_names().iter().enumerate().map(|(part, _)| snapshot.digest(part)).collect::<Vec<_>>();
        outbox.send(*era, from_worker::Body::State(state(job, &digests)));
        upload.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(|()| digests)
    })?;
    for (part, name, _) in &share {
        let (bytes, hash) = digests[*part];
        let blake3 = hash.to_hex().to_string();
        outbox.send(*era, from_worker::Body::Part(PartSaved { step: snapshot.step, name: (*name).to_owned(), bytes, blake3 }));
    }
    Ok(())
}

/// What all ranks must say alike.
fn state(Job { snapshot, position, .. }: &Job, digests: &[(u64, blake3::Hash)]) -> StateDigest {
    let (last, mut before) = (snapshot.ledger.epochs().last(), None);
    // As `Commit::of_epoch` reads it: of a small data set a run has more epochs than a message holds.
    let ledger = snapshot.ledger.epochs().filter(|entry| before.replace(entry.1) != Some(entry.1) || Some(*entry) == last);
    StateDigest {
        step: snapshot.step,
        digest: snapshot.state_digest(digests),
        ledger: ledger.map(|(epoch, t)| LedgerEpoch { epoch, samples: t.samples, hash: format!("{:032x}", t.hash) }).collect(),
        epoch: position.epoch,
        step_in_epoch: position.step_in_epoch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::unread;
    use crate::train::state::{Layout, TrainState};
    use ella_dataset::ledger::Tally;
    use ella_proto::v1::FromWorker;
    use ella_store::Operation;
    use ella_store::faulty::{Failure, Faults};
    use tokio::sync::mpsc;

    const START: Position = Position { epoch: 0, step_in_epoch: 0 };

    fn snapshot(step: u64) -> Snapshot {
        let layout = Arc::new(Layout::new(vec![("a".into(), vec![3])]));
        let mut state = TrainState::fresh(layout, tch::Tensor::from_slice(&[1f32, 2.0, 3.0])).unwrap();
        state.step = step;
        state.snapshot(None).unwrap()
    }

    struct Bench {
        runtime: tokio::runtime::Runtime,
        store: Store,
        faults: Faults,
    }

    impl Bench {
        fn new() -> Self {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let faults = Faults::new();
            let store = faults.inject(&Store::in_memory());
            Self { runtime, store, faults }
        }

        fn start(&self, patience_ms: u64) -> (Committer, Arc<Flags>, mpsc::Receiver<FromWorker>) {
            let (outbox, queue) = unread();
            let flags = outbox.flags().clone();
            let patience = Duration::from_millis(patience_ms);
            (Committer::start(self.store.clone(), patience, outbox, self.runtime.handle().clone()).unwrap(), flags, queue)
        }
    }

    const ERA: Era = Era { term: 4, generation: 1 };
    const ALONE: Seat = Seat { rank: 0, world: 1, era: ERA };

    #[test]
    fn each_rank_saves_its_share_and_all_tell_the_same_state() {
        let bench = Bench::new();
        let mut states = Vec::new();
        let mut names = Vec::new();
        for rank in 0..2 {
            let (mut committer, _, mut queue) = bench.start(60_000);
            (1..=3).for_each(|step| committer.save(snapshot(step), START, Seat { rank, world: 2, era: ERA }).unwrap());
            committer.settle().unwrap();
            committer.settle().unwrap();
            assert!(committer.kept().is_some_and(|snapshot| snapshot.step == 3), "its memory may be used again");
            let mut digests = Vec::new();
            while let Ok(message) = queue.try_recv() {
                match message.body.unwrap() {
                    from_worker::Body::State(state) => digests.push(state),
                    from_worker::Body::Part(part) => names.push(format!("{}/{}", commit_folder(part.step, 4, 1), part.name)),
                    other => panic!("{other:?}"),
                }
            }
            states.push(digests);
        }
        assert_eq!(states[0], states[1]);
        assert_eq!((states[0].len(), names.len()), (3, 9));
        for name in names {
            assert!(bench.runtime.block_on(bench.store.head(&name)).unwrap().is_some(), "{name}");
        }
    }

    /// Else a run could commit no more after some 25,000 epochs: the coordinator takes messages of a MiB.
    #[test]
    fn of_epochs_that_are_alike_the_first_is_told() {
        let told = |epochs: &[(u64, u64)]| {
            let mut snapshot = snapshot(9);
            for (epoch, samples) in epochs {
                snapshot.ledger.add_tally(*epoch, &Tally { samples: *samples, hash: 7 });
            }
            let ledger = state(&Job { snapshot, position: START, seat: ALONE }, &[]).ledger;
            ledger.into_iter().map(|told| (told.epoch, told.samples)).collect::<Vec<_>>()
        };
        let many: Vec<_> = (0..30_000).map(|epoch| (epoch, 2)).chain([(30_000, 1)]).collect();
        assert_eq!((told(&many), told(&many[..3])), (vec![(0, 2), (30_000, 1)], vec![(0, 2), (2, 2)]));
        assert_eq!(told(&[(0, 2), (1, 2), (2, 3), (3, 2), (4, 2)]), [(0, 2), (2, 3), (3, 2), (4, 2)]);
    }

    /// Who asks first is held up no longer than it says; what is stored meanwhile makes room.
    #[test]
    fn there_is_room_for_two_commits_and_again_when_one_is_stored() {
        let bench = Bench::new();
        bench.faults.push(Operation::Put, "", Failure::Slow(Duration::from_millis(300)), 1);
        let (mut committer, _, _queue) = bench.start(10_000);
        for step in [1, 2] {
            assert!(committer.has_room(Duration::ZERO).unwrap());
            committer.save(snapshot(step), START, ALONE).unwrap();
        }
        assert!(!committer.has_room(Duration::ZERO).unwrap());
        assert!(committer.has_room(Duration::from_secs(60)).unwrap());
    }

    /// LIVE: a store that hangs holds training up only when two commits are under way, and then no longer than the deadline.
    #[test]
    fn a_store_that_hangs_is_not_waited_for_for_ever() {
        let bench = Bench::new();
        bench.faults.push(Operation::Put, "", Failure::Hang, 1);
        let (mut committer, _, _queue) = bench.start(20);
        let begin = Instant::now();
        committer.save(snapshot(1), START, ALONE).unwrap();
        committer.save(snapshot(2), START, ALONE).unwrap();
        let error = committer.save(snapshot(3), START, ALONE).unwrap_err();
        assert!(matches!(error, CommitError::Late { .. }) && begin.elapsed() >= Duration::from_millis(20), "{error}");
        assert!(error.to_string().contains("workers.start_timeout"));
    }

    #[test]
    fn the_end_of_the_generation_frees_who_waits_for_a_commit() {
        let bench = Bench::new();
        bench.faults.push(Operation::Put, "", Failure::Hang, 1);
        let (mut committer, flags, _queue) = bench.start(600_000);
        committer.save(snapshot(1), START, ALONE).unwrap();
        flags.end(ERA, false);
        let begin = Instant::now();
        assert!(matches!(committer.settle(), Err(CommitError::Interrupted)) && begin.elapsed() < Duration::from_secs(60));
    }

    /// It would be recorded by nobody, and the next generation's commits wait behind it.
    #[test]
    fn a_commit_of_a_generation_that_is_over_is_not_begun() {
        let bench = Bench::new();
        let (mut committer, flags, mut queue) = bench.start(60_000);
        let next = Era { term: 4, generation: 2 };
        flags.enter(next);
        committer.save(snapshot(1), START, ALONE).unwrap();
        committer.save(snapshot(2), START, Seat { era: next, ..ALONE }).unwrap();
        committer.settle().unwrap();
        let told = std::iter::from_fn(|| queue.try_recv().ok()).map(|message| (message.generation, message.body.unwrap()));
        let steps = told.map(|(generation, body)| match body {
            from_worker::Body::State(state) => (generation, state.step),
            from_worker::Body::Part(part) => (generation, part.step),
            other => panic!("{other:?}"),
        });
        assert_eq!(steps.collect::<Vec<_>>(), [(2, 2); 4]);
        assert_eq!(bench.runtime.block_on(bench.store.folders("commits")).unwrap(), [commit_folder(2, 4, 2)]);
    }

    #[test]
    fn what_the_store_refuses_is_told_with_the_step_and_ends_all_later_commits() {
        let bench = Bench::new();
        bench.faults.push(Operation::Put, "ema", Failure::Denied, 1);
        let (mut committer, _, _queue) = bench.start(60_000);
        committer.save(snapshot(7), START, ALONE).unwrap();
        let error = committer.settle().unwrap_err();
        assert!(matches!(error, CommitError::Store { step: 7, .. }) && error.to_string().contains("ema.safetensors"), "{error}");
        assert!(committer.check().is_err() && committer.save(snapshot(8), START, ALONE).is_err());
    }
}
