//! `text.features = "ahead"`: the text encoder at work ahead of the steps (design.md §4 "Feed").
//!
//! It encodes whole shards, as `ella embed` does and to the same bytes, in the order in which the steps come to them, and writes them through
//! to their sidecars: the first epoch is the precompute. What is trained on is read back from there, so that it makes no difference who
//! encoded a shard, and when: in this run or before, on this worker or another. Two workers may be at one at once, for nobody leases it: a shard that
//! lies in lanes of both, or holds held-out samples, or is among the next epoch's first. Of what they make the first stays. On a GPU each thread has a
//! stream of low priority ([`super::side`]), and the encoder leaves its memory once every shard has its features.

use super::side::Side;
use super::{Captions, FeedError};
use crate::embed::ShardEncoder;
use crate::job::Tell;
use ella_dataset::{DataSet, FeatureSet, Features, Reading};
use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::Device;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Threads that make shards' features: one encodes while the other writes.
const THREADS: usize = 2;
/// The count of shards that could not be made ahead.
pub(super) const FAILED: &str = "failed_ahead";
/// How often the store is asked whether others have made what this worker has not.
const ASK: Duration = Duration::from_secs(60);
/// How often a wait for a shard that another thread makes looks whether it is over.
const LOOK: Duration = Duration::from_millis(100);

/// Features that are made as they are needed.
#[derive(Debug)]
pub struct Encoding {
    data: Arc<DataSet>,
    captions: Arc<Captions>,
    /// One for each column.
    features: Vec<Arc<Features>>,
    /// None once it has nothing to do any more.
    encoder: Mutex<Option<Arc<ShardEncoder>>>,
    /// When the store was last asked whether others have made the rest.
    asked: Mutex<Option<Instant>>,
    runtime: Handle,
    /// Shards that threads are at.
    busy: Mutex<HashSet<u32>>,
    freed: Condvar,
    /// Shards that could not be made ahead: they are left to the steps that need them.
    failed: Mutex<HashSet<u32>>,
    /// Threads that write what they have encoded.
    storing: AtomicUsize,
    tell: Tell,
    stop: CancellationToken,
}

/// A shard that the holder alone makes.
struct Claim<'a> {
    encoding: &'a Encoding,
    shard: u32,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.encoding.busy().remove(&self.shard);
        self.encoding.freed.notify_all();
    }
}

impl Encoding {
    /// Begins with what there is of the sidecars of the columns of captions, in their order. Blocks; call it outside of the runtime.
    pub(super) fn open(
        (data, captions): (&Arc<DataSet>, &Arc<Captions>),
        sets: Vec<FeatureSet>,
        encoder: ShardEncoder,
        runtime: &Handle,
    ) -> Result<Self, FeedError> {
        let mut features = Vec::new();
        for set in sets {
            if runtime.block_on(set.empty())?.is_none() {
                runtime.block_on(set.write_empty(encoder.embed_empty()?))?;
            }
            features.push(Arc::new(runtime.block_on(data.growing_features(set))?));
        }
        let stop = CancellationToken::new();
        Ok(Self {
            data: Arc::clone(data),
            captions: Arc::clone(captions),
            features,
            encoder: Mutex::new(Some(Arc::new(encoder))),
            asked: Mutex::default(),
            runtime: runtime.clone(),
            busy: Mutex::default(),
            freed: Condvar::new(),
            failed: Mutex::default(),
            storing: AtomicUsize::new(0),
            tell: Tell::new(stop.clone()),
            stop,
        })
    }

    /// The features of each column.
    pub fn features(&self) -> &[Arc<Features>] {
        &self.features
    }

    /// Captions that were encoded so far, those of unfinished shards among them.
    pub fn encoded(&self) -> u64 {
        self.tell.done()
    }

    /// Whether what was encoded is being written, for which the store has deadlines.
    pub(super) fn is_storing(&self) -> bool {
        self.storing.load(Relaxed) > 0
    }

    /// What came of the captions of finished shards, by name (KNOWN).
    pub(super) fn counts(&self) -> BTreeMap<String, u64> {
        self.tell.counts()
    }

    /// Has every thread give up soon.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }

    /// Writes the manifests of sidecars that are whole now.
    pub(super) fn finish(&self) -> Result<(), FeedError> {
        for features in &self.features {
            self.runtime.block_on(features.finish())?;
        }
        Ok(())
    }

    /// Returns when a shard has its features in every column: made here unless another thread is at it.
    pub(super) fn have(&self, shard: u32) -> Result<(), FeedError> {
        while !self.has(shard) {
            if self.stop.is_cancelled() {
                return Err(FeedError::Died);
            }
            match self.claim(shard) {
                Some(claim) => self.make(&claim)?,
                None => drop(self.freed.wait_timeout(self.busy(), LOOK).unwrap_or_else(PoisonError::into_inner)),
            }
        }
        Ok(())
    }

    fn has(&self, shard: u32) -> bool {
        self.features.iter().all(|features| features.has(shard as usize))
    }

    fn busy(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a shard that lacks features and that nobody is at.
    fn claim(&self, shard: u32) -> Option<Claim<'_>> {
        let mine = !self.has(shard) && self.busy().insert(shard);
        mine.then(|| Claim { encoding: self, shard })
    }

    /// Finds a shard's features in the store, or makes them.
    fn make(&self, claim: &Claim<'_>) -> Result<(), FeedError> {
        let shard = claim.shard as usize;
        for (column, features) in self.features.iter().enumerate() {
            if self.runtime.block_on(features.find(shard))? {
                continue;
            }
            let captions = self.runtime.block_on(self.captions.of_shard(&self.data, column, shard))?;
            let encoder = self.encoder().clone().ok_or(FeedError::Died)?;
            let (file, counts) = encoder.embed(&captions, |tokens| features.check_size(shard, tokens), &self.tell)?;
            self.storing.fetch_add(1, Relaxed);
            let stored = self.runtime.block_on(features.write(shard, captions.len() as u64, file, counts.clone()));
            self.storing.fetch_sub(1, Relaxed);
            stored?;
            counts.iter().for_each(|(name, count)| self.tell.count(name, *count));
        }
        Ok(())
    }

    fn encoder(&self) -> MutexGuard<'_, Option<Arc<ShardEncoder>>> {
        self.encoder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is in memory.
    pub(super) fn holds_encoder(&self) -> bool {
        self.encoder().is_some()
    }

    /// Lets the encoder go if every shard has its features now, whoever made them.
    fn rest(&self) {
        if !self.holds_encoder() || !self.is_whole() {
            return;
        }
        // Another thread may still hold it, at a shard that is there by now.
        drop(self.encoder().take());
        let _ = ella_cuda::memory::empty_cache();
        tracing::info!("every caption has its features: the text encoder leaves the memory");
    }

    fn is_whole(&self) -> bool {
        let missing = (0..self.data.manifest().shards.len()).find(|shard| !self.has(*shard as u32));
        let Some(first) = missing else { return true };
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_some_and(|asked| asked.elapsed() < ASK) {
            return false;
        }
        *asked = Some(Instant::now());
        // What the store does not answer now it may answer later.
        let there = |shard| self.features.iter().all(|features| self.runtime.block_on(features.find(shard)).unwrap_or(false));
        (first..self.data.manifest().shards.len()).all(there)
    }

    fn failed(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the shards that the lanes come to next, soonest first, for the steps that it is told; until there are no more of them.
    fn work(&self, mut plans: watch::Receiver<Plan>) {
        while plans.has_changed().is_ok() {
            let Plan { reading, step } = plans.borrow_and_update().clone();
            let planned = reading.shards(step).into_iter().filter(|shard| !self.failed().contains(shard));
            match planned.filter_map(|shard| self.claim(shard)).next() {
                Some(claim) => {
                    self.make_ahead(&claim);
                    continue;
                }
                None => self.rest(),
            }
            if self.runtime.block_on(plans.changed()).is_err() {
                return;
            }
        }
    }

    /// What fails is left to the step that needs it, which tries again.
    fn make_ahead(&self, claim: &Claim<'_>) {
        let Err(error) = self.make(claim) else { return };
        if !self.stop.is_cancelled() {
            tracing::warn!(shard = claim.shard, "features cannot be made ahead: {error}");
            self.tell.count(FAILED, 1);
            self.failed().insert(claim.shard);
        }
    }
}

/// What is read, and from which step on.
#[derive(Clone, Debug)]
struct Plan {
    reading: Reading,
    step: u64,
}

/// Threads that encode ahead of a feed, until this is dropped.
#[derive(Debug)]
pub(super) struct EncodingAhead {
    encoding: Arc<Encoding>,
    plan: Option<watch::Sender<Plan>>,
    threads: Vec<JoinHandle<()>>,
}

impl EncodingAhead {
    pub(super) fn start(encoding: &Arc<Encoding>, device: Device, reading: Reading, step: u64) -> Result<Self, FeedError> {
        let (plan, plans) = watch::channel(Plan { reading, step });
        let mut ahead = Self { encoding: Arc::clone(encoding), plan: Some(plan), threads: Vec::new() };
        for _ in 0..THREADS {
            let (encoding, plans) = (Arc::clone(encoding), plans.clone());
            let side = Side::new(device)?;
            let work = move || match side.enter() {
                Ok(_entered) => encoding.work(plans),
                Err(error) => tracing::warn!("features are not made ahead, but by the steps that need them: {error}"),
            };
            ahead.threads.push(std::thread::Builder::new().name("encode".into()).spawn(work).map_err(FeedError::Thread)?);
        }
        Ok(ahead)
    }

    /// Tells which step is being read.
    pub(super) fn at(&self, step: u64) {
        if let Some(plan) = &self.plan {
            plan.send_modify(|plan| plan.step = step);
        }
    }

    /// Other lanes are read from here on.
    pub(super) fn turn_to(&self, reading: Reading, step: u64) {
        if let Some(plan) = &self.plan {
            plan.send_replace(Plan { reading, step });
        }
    }
}

impl Drop for EncodingAhead {
    fn drop(&mut self) {
        self.encoding.stop();
        self.plan = None;
        for thread in self.threads.drain(..) {
            // A thread that has panicked left its shard to the step that needs it.
            let _ = thread.join();
        }
    }
}
