//! Reading ahead of the steps: opens the shards and features of the windows that lanes are in and will be in next, so that no step waits
//! for a store.

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
    task: JoinHandle<()>,
}

impl Ahead {
    /// Starts at a step.
    pub fn start(runtime: &Handle, reading: Reading, step: u64) -> Ahead {
        let (step, steps) = watch::channel(step);
        Ahead { step, task: runtime.spawn(run(reading, steps)) }
    }

    /// Tells which step is being read.
    pub fn at(&self, step: u64) {
        self.step.send_replace(step);
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.task.abort();
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

impl Reading {
    /// The shards of the windows that the lanes are in at a step, then those of their next ones, soonest first.
    fn shards(&self, step: u64) -> Vec<u32> {
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
