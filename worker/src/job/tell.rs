//! What a unit tells while it is done.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

/// Takes a unit's progress from any thread. Never blocks for long.
#[derive(Debug, Default)]
pub struct Tell {
    samples: AtomicU64,
    counts: Mutex<BTreeMap<String, u64>>,
    stop: CancellationToken,
}

impl Tell {
    pub(crate) fn new(stop: CancellationToken) -> Self {
        Self { stop, ..Self::default() }
    }

    /// So many more samples are done, whatever came of them.
    pub fn samples(&self, n: u64) {
        self.samples.fetch_add(n, Relaxed);
    }

    /// So many more of the unit's samples came to this: `read`, `kept`, `refused.too_small` (KNOWN). They count once the unit is done.
    pub fn count(&self, name: &str, n: u64) {
        let mut counts = self.lock();
        match counts.get_mut(name) {
            Some(count) => *count += n,
            None => drop(counts.insert(name.to_owned(), n)),
        }
    }

    /// Whether this worker leaves: what blocks should look now and then, and give up.
    pub fn stopped(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Samples done so far.
    pub fn done(&self) -> u64 {
        self.samples.load(Relaxed)
    }

    /// What came of them so far.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.lock().clone()
    }

    pub(super) async fn stop(&self) {
        self.stop.cancelled().await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
