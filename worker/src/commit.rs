//! COMMIT, the worker's part: a snapshot's digests go to the coordinator, and this rank's share of its files to the store, in the
//! background. The coordinator writes the record.

use crate::control::{Flags, Outbox};
use crate::train::state::{Snapshot, part_names};
use ella_dataset::order::Position;
use ella_proto::v1::{LedgerEpoch, PartSaved, StateDigest, from_worker};
use ella_store::{Store, StoreError, commit_folder};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

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
}

/// Whose files go where.
#[derive(Clone, Debug)]
pub struct Place {
    /// The run folder.
    pub store: Store,
    /// This rank.
    pub rank: u32,
    /// All ranks.
    pub world: u32,
    /// The coordinator's term: part of the folder's name.
    pub term: u64,
    /// How long one commit may take. The coordinator does not wait longer.
    pub patience: Duration,
}

/// Commits that may be under way while training goes on: one being saved, and one waiting.
const UNDER_WAY: usize = 2;

/// Saves snapshots, one after the other, while training goes on.
#[derive(Debug)]
pub struct Committer {
    jobs: Option<Sender<(Snapshot, Position)>>,
    /// The snapshot of each commit that is saved, whose memory may be used again; closed when the thread has ended.
    saved: Receiver<Snapshot>,
    kept: Vec<Snapshot>,
    under_way: usize,
    thread: Option<JoinHandle<Result<(), CommitError>>>,
    flags: Arc<Flags>,
    patience: Duration,
}

impl Committer {
    /// Starts the committing thread.
    pub fn start(place: Place, outbox: Outbox, runtime: tokio::runtime::Handle) -> std::io::Result<Self> {
        let (jobs, queue) = channel::<(Snapshot, Position)>();
        let (tell, saved) = channel();
        let (flags, patience) = (outbox.flags().clone(), place.patience);
        let serve = move || {
            for (snapshot, position) in queue {
                let step = snapshot.step;
                save(&snapshot, position, &place, &outbox, &runtime).map_err(|source| CommitError::Store { step, source })?;
                // Nobody waits any more when the run has ended.
                let _ = tell.send(snapshot);
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("commit".into()).spawn(serve)?;
        Ok(Self { jobs: Some(jobs), saved, kept: Vec::new(), under_way: 0, thread: Some(thread), flags, patience })
    }

    /// Hands a snapshot over. `position` is where the data goes on after it. Waits only if two commits are still under way, and not
    /// beyond the end of the run.
    pub fn save(&mut self, snapshot: Snapshot, position: Position) -> Result<(), CommitError> {
        self.take_back();
        if self.under_way == UNDER_WAY && self.one_more()? {
            self.under_way -= 1;
        }
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send((snapshot, position)).is_ok());
        if !sent {
            return Err(self.finish().err().unwrap_or(CommitError::Died));
        }
        self.under_way += 1;
        Ok(())
    }

    /// A snapshot that is saved, if there is one: its memory is free.
    pub fn kept(&mut self) -> Option<Snapshot> {
        self.take_back();
        self.kept.pop()
    }

    fn take_back(&mut self) {
        while let Ok(snapshot) = self.saved.try_recv() {
            self.under_way -= 1;
            self.kept.push(snapshot);
        }
    }

    /// Whether the thread has given up: its error is [`Self::finish`]'s.
    pub fn has_failed(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for what is under way, but not beyond the end of the run.
    pub fn finish(&mut self) -> Result<(), CommitError> {
        self.jobs = None;
        while self.one_more()? {}
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(CommitError::Died),
        }
    }

    /// Waits until one more commit is saved; false once the thread has ended.
    fn one_more(&mut self) -> Result<bool, CommitError> {
        match self.flags.receive(&self.saved, self.patience) {
            Ok(snapshot) => {
                self.kept.push(snapshot);
                Ok(true)
            }
            Err(RecvTimeoutError::Disconnected) => Ok(false),
            Err(RecvTimeoutError::Timeout) => Err(CommitError::Late { seconds: self.patience.as_secs() }),
        }
    }
}

fn save(
    snapshot: &Snapshot,
    position: Position,
    place: &Place,
    outbox: &Outbox,
    runtime: &tokio::runtime::Handle,
) -> Result<(), StoreError> {
    let names = part_names();
    let digests: Vec<_> = (0..names.len()).map(|part| snapshot.digest(part)).collect();
    let ledger = snapshot.ledger.epochs();
    outbox.send(from_worker::Body::State(StateDigest {
        step: snapshot.step,
        digest: snapshot.state_digest(&digests),
        ledger: ledger.map(|(epoch, t)| LedgerEpoch { epoch, samples: t.samples, hash: format!("{:032x}", t.hash) }).collect(),
        epoch: position.epoch,
        step_in_epoch: position.step_in_epoch,
    }));
    let folder = place.store.child(&commit_folder(snapshot.step, place.term));
    for (part, name) in names.iter().enumerate().filter(|(part, _)| *part as u32 % place.world == place.rank) {
        runtime.block_on(folder.upload(name, snapshot.file(part)))?;
        let (bytes, hash) = digests[part];
        let blake3 = hash.to_hex().to_string();
        outbox.send(from_worker::Body::Part(PartSaved { step: snapshot.step, name: (*name).to_owned(), bytes, blake3 }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ControlError, unread};
    use crate::train::state::{Layout, TrainState};
    use ella_proto::v1::FromWorker;
    use ella_store::Operation;
    use ella_store::faulty::{Failure, Faults};
    use std::time::Instant;
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
            let store = faults.inject(&Store::open("memory://").unwrap());
            Self { runtime, store, faults }
        }

        fn start(&self, rank: u32, world: u32, patience_ms: u64) -> (Committer, Arc<Flags>, mpsc::Receiver<FromWorker>) {
            let patience = Duration::from_millis(patience_ms);
            let place = Place { store: self.store.clone(), rank, world, term: 4, patience };
            let (outbox, queue) = unread();
            let flags = outbox.flags().clone();
            (Committer::start(place, outbox, self.runtime.handle().clone()).unwrap(), flags, queue)
        }
    }

    #[test]
    fn each_rank_saves_its_share_and_all_tell_the_same_state() {
        let bench = Bench::new();
        let mut states = Vec::new();
        let mut names = Vec::new();
        for rank in 0..2 {
            let (mut committer, _, mut queue) = bench.start(rank, 2, 60_000);
            (1..=3).for_each(|step| committer.save(snapshot(step), START).unwrap());
            committer.finish().unwrap();
            committer.finish().unwrap();
            assert!(committer.kept().is_some_and(|snapshot| snapshot.step == 3), "its memory may be used again");
            let mut digests = Vec::new();
            while let Ok(message) = queue.try_recv() {
                match message.body.unwrap() {
                    from_worker::Body::State(state) => digests.push(state),
                    from_worker::Body::Part(part) => names.push(format!("{}/{}", commit_folder(part.step, 4), part.name)),
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

    /// LIVE: a store that hangs holds training up only when two commits are under way, and then no longer than the deadline.
    #[test]
    fn a_store_that_hangs_is_not_waited_for_for_ever() {
        let bench = Bench::new();
        bench.faults.push(Operation::Put, "", Failure::Hang, 1);
        let (mut committer, _, _queue) = bench.start(0, 1, 20);
        let begin = Instant::now();
        committer.save(snapshot(1), START).unwrap();
        committer.save(snapshot(2), START).unwrap();
        let error = committer.save(snapshot(3), START).unwrap_err();
        assert!(matches!(error, CommitError::Late { .. }) && begin.elapsed() >= Duration::from_millis(20), "{error}");
        assert!(error.to_string().contains("workers.start_timeout"));
    }

    #[test]
    fn the_end_of_the_run_frees_who_waits_for_a_commit() {
        let bench = Bench::new();
        bench.faults.push(Operation::Put, "", Failure::Hang, 1);
        let (mut committer, flags, _queue) = bench.start(0, 1, 600_000);
        committer.save(snapshot(1), START).unwrap();
        flags.stop(ControlError::Aborted("another worker was lost".into()));
        let begin = Instant::now();
        assert!(committer.finish().is_err() && begin.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn what_the_store_refuses_is_told_with_the_step_and_ends_all_later_commits() {
        let bench = Bench::new();
        bench.faults.push(Operation::Put, "ema", Failure::Denied, 1);
        let (mut committer, _, _queue) = bench.start(0, 1, 60_000);
        committer.save(snapshot(7), START).unwrap();
        let error = committer.finish().unwrap_err();
        assert!(matches!(error, CommitError::Store { step: 7, .. }) && error.to_string().contains("ema.safetensors"), "{error}");
        assert!(committer.has_failed() && committer.save(snapshot(8), START).is_err());
    }
}
