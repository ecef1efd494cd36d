//! One run as it is shown: its past, and how far restoring that is.

use ella_store::Store;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::history::{Faults, Gauge, Past, Reader};

/// A run's past, which is restored in the background while what happens is already taken down.
#[derive(Debug)]
pub(super) struct RunView {
    store: Option<Store>,
    past: Mutex<Past>,
    gauge: Arc<Gauge>,
    restoring: AtomicBool,
}

/// How much of the past there is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Restored {
    restoring: bool,
    files_read: u64,
    files: u64,
    #[serde(flatten)]
    faults: Faults,
}

impl RunView {
    /// Of a run in `store`, or of a job, which has no past. With `below`, earlier terms' lines are restored: the others come by themselves.
    /// Gives also what restores it.
    pub(super) fn new(store: Option<Store>, below: Option<u64>) -> (Arc<Self>, Option<Reader>) {
        let reader = store.clone().map(|store| Reader::new(store, below));
        let gauge = reader.as_ref().map_or_else(Arc::default, Reader::gauge);
        let restoring = AtomicBool::new(reader.is_some());
        (Arc::new(Self { store, past: Mutex::default(), gauge, restoring }), reader)
    }

    pub(super) fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Readers copy what they need, and give it back at once: the driver may be waiting.
    pub(super) fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what was before, and joins to it what happened meanwhile.
    pub(super) async fn restore(&self, mut reader: Reader) {
        let mut before = Past::default();
        reader.read(&mut before).await;
        let mut past = self.past();
        before.append(std::mem::take(&mut *past));
        *past = before;
        self.restoring.store(false, Relaxed);
    }

    pub(super) fn restored(&self) -> Restored {
        Restored {
            restoring: self.restoring.load(Relaxed),
            files_read: self.gauge.done.load(Relaxed),
            files: self.gauge.total.load(Relaxed),
            faults: self.past().faults.clone(),
        }
    }
}
