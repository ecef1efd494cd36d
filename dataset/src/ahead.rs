//! Reading ahead of the steps: opens the shards and features of the windows that lanes are in and will be in next, so that no step waits
//! for a store; and has the system read the rows of the next steps, so that none waits for a disk.
//!
//! The latter goes on in a thread of its own: for the system it is half of the work of a cold read (pages are found, requests are queued), and
//! a feed that did it between two steps would leave the disk idle in the one half and itself in the other.

use std::collections::HashSet;
use std::future::ready;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use ella_store::Digest;
use futures::stream::{self, StreamExt};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::DataError;
use crate::order::BucketOrder;
use crate::set::{DataSet, Features};

/// Files that are fetched at once.
const CONCURRENT: usize = 4;
/// Bytes of rows that the system is asked to read before they are needed: what a fast disk gives while a step is assembled, several times.
const ROWS_AHEAD: u64 = 64 << 20;
/// Steps that these are in, at most: what was read too early may be forgotten again.
const STEPS_AHEAD: u64 = 16;

/// What is read, and in which order.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The data set.
    pub data: Arc<DataSet>,
    /// Its features that are read.
    pub features: Vec<Arc<Features>>,
    /// The order of its samples.
    pub order: Arc<BucketOrder>,
    /// The lanes that are read.
    pub lanes: Range<u32>,
}

/// Reads ahead in the background until it is dropped. What fails is left to the step that needs it, which tries again and tells.
#[derive(Debug)]
pub struct Ahead {
    step: watch::Sender<u64>,
    tasks: [JoinHandle<()>; 2],
}

impl Ahead {
    /// Starts at a step.
    pub fn start(runtime: &Handle, reading: Reading, step: u64) -> Ahead {
        let (step, steps) = watch::channel(step);
        let rows = runtime.spawn(read_rows(runtime.clone(), reading.clone(), steps.clone()));
        Ahead { step, tasks: [rows, runtime.spawn(run(reading, steps))] }
    }

    /// Tells which step is being read.
    pub fn at(&self, step: u64) {
        self.step.send_replace(step);
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn run(reading: Reading, mut steps: watch::Receiver<u64>) {
    loop {
        let step = *steps.borrow_and_update();
        reading.open(&reading.shards(step), || steps.has_changed().unwrap_or(true)).await;
        if steps.changed().await.is_err() {
            return;
        }
    }
}

/// Has the system read the rows of the next steps, a step at a time.
async fn read_rows(runtime: Handle, reading: Reading, mut steps: watch::Receiver<u64>) {
    let (depth, mut next) = (reading.steps_ahead(), 0);
    loop {
        let now = *steps.borrow_and_update();
        // What is being read needs no advice any more.
        next = now.max(next);
        while next <= now + depth && !steps.has_changed().unwrap_or(true) {
            let (reading, within, step) = (reading.clone(), runtime.clone(), next);
            let advised = tokio::task::spawn_blocking(move || within.block_on(reading.read_rows(step)));
            // What fails is told by the step that needs it.
            let _ = advised.await;
            next += 1;
        }
        if steps.changed().await.is_err() {
            return;
        }
    }
}

impl Reading {
    /// Over how many steps rows are read ahead.
    fn steps_ahead(&self) -> u64 {
        let features = self.features.iter().map(|features| features.bytes()).fold(0, u64::saturating_add);
        let bytes = self.data.manifest().shards.iter().map(|shard| shard.bytes).sum::<u64>().saturating_add(features);
        let samples = self.lanes.len() as u64 * u64::from(self.order.config().micro_batch);
        let step = u128::from(bytes) * u128::from(samples) / u128::from(self.order.samples().max(1));
        (u128::from(ROWS_AHEAD) / step.max(1)).clamp(1, u128::from(STEPS_AHEAD)) as u64
    }

    /// Has the system begin to read the rows of a step, where they are in mapped files.
    async fn read_rows(&self, step: u64) -> Result<(), DataError> {
        for lane in self.lanes.clone() {
            let samples = self.order.lane(step, lane);
            self.data.read_ahead(&samples).await?;
            for features in &self.features {
                features.read_ahead(&samples).await?;
            }
        }
        Ok(())
    }

    /// The shards of the windows that the lanes are in at a step, then those of their next ones, soonest first.
    pub fn shards(&self, step: u64) -> Vec<u32> {
        let mut windows: Vec<(u64, Vec<u32>)> = self.lanes.clone().flat_map(|lane| self.order.upcoming(step, lane)).collect();
        windows.sort_by_key(|(step, _)| *step);
        let mut seen = HashSet::new();
        windows.into_iter().flat_map(|(_, shards)| shards).filter(|shard| seen.insert(*shard)).collect()
    }

    /// Opens them in their order, as long as there is room without closing one of them, and the plan is not `stale`. What was begun is
    /// finished: a slow store would else never get anywhere.
    async fn open(&self, shards: &[u32], stale: impl Fn() -> bool) {
        let keep: HashSet<Digest> = shards.iter().flat_map(|shard| self.digests(*shard)).collect();
        let (keep, stop) = (&keep, &AtomicBool::new(false));
        let begun = stream::iter(shards.iter().copied()).take_while(|_| ready(!stop.load(Relaxed) && !stale()));
        let opening = begun.for_each_concurrent(CONCURRENT, |shard| async move {
            let opened = self.open_one(shard as usize, keep).await;
            stop.fetch_or(!matches!(opened, Ok(true)), Relaxed);
        });
        opening.await;
    }

    async fn open_one(&self, shard: usize, keep: &HashSet<Digest>) -> Result<bool, DataError> {
        let mut open = self.data.open_ahead(shard, keep).await?;
        for features in &self.features {
            open = open && features.open_ahead(shard, keep).await?;
        }
        Ok(open)
    }

    fn digests(&self, shard: u32) -> impl Iterator<Item = Digest> {
        let features = self.features.iter().map(move |features| features.file(shard as usize));
        std::iter::once(self.data.file(shard as usize)).chain(features).flatten().map(|file| file.entry.blake3)
    }
}
