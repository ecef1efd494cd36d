//! COMMIT, the worker's part: a snapshot's digests go to the coordinator, and this rank's share of its files to the store, in the
//! background. The coordinator writes the record.

use crate::control::Outbox;
use crate::train::state::{Snapshot, part_names};
use ella_dataset::order::Position;
use ella_proto::v1::{LedgerEpoch, PartSaved, StateDigest, from_worker};
use ella_store::{Store, StoreError, commit_folder};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

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
}

/// Saves snapshots, one after the other, while training goes on.
#[derive(Debug)]
pub struct Committer {
    jobs: Option<SyncSender<(Snapshot, Position)>>,
    thread: Option<JoinHandle<Result<(), CommitError>>>,
}

impl Committer {
    /// Starts the committing thread.
    pub fn start(place: Place, outbox: Outbox, runtime: tokio::runtime::Handle) -> std::io::Result<Self> {
        let (jobs, queue) = sync_channel(1);
        let thread = std::thread::Builder::new().name("commit".into()).spawn(move || serve(&queue, &place, &outbox, &runtime))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Hands a snapshot over. `position` is where the data goes on after it. Waits only if two commits are still under way, and then
    /// no longer than the store's own deadlines let the first of them take.
    pub fn save(&mut self, snapshot: Snapshot, position: Position) -> Result<(), CommitError> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send((snapshot, position)).is_ok());
        if sent { Ok(()) } else { Err(self.finish().err().unwrap_or(CommitError::Died)) }
    }

    /// Whether the thread has given up: its error is [`Self::finish`]'s.
    pub fn has_failed(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for what is under way: no longer than the store's deadlines allow.
    pub fn finish(&mut self) -> Result<(), CommitError> {
        self.jobs = None;
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(CommitError::Died),
        }
    }
}

fn serve(
    queue: &Receiver<(Snapshot, Position)>,
    place: &Place,
    outbox: &Outbox,
    runtime: &tokio::runtime::Handle,
) -> Result<(), CommitError> {
    for (snapshot, position) in queue {
        let step = snapshot.step;
        save(&snapshot, position, place, outbox, runtime).map_err(|source| CommitError::Store { step, source })?;
    }
    Ok(())
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
