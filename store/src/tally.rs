//! What the stores of this process did, all together (KNOWN): for whoever measures a process and not a store.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::error::{Operation, StoreError};
use crate::store::RetryCount;

type Counts = Mutex<BTreeMap<(Operation, &'static str), u64>>;

static RETRIED: Counts = Mutex::new(BTreeMap::new());
static FAILED: Counts = Mutex::new(BTreeMap::new());
static READ: AtomicU64 = AtomicU64::new(0);
static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// What this process's stores did since it began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreTotals {
    /// Attempts that were repeated.
    pub retried: Vec<RetryCount>,
    /// Calls that failed in the end. An object that is not there, or there already, is no failure.
    pub failed: Vec<RetryCount>,
    /// Bytes read. Local files that are mapped into memory are not read here.
    pub read_bytes: u64,
    /// Bytes of objects that were written.
    pub written_bytes: u64,
}

/// What the stores of this process did, all together.
pub fn totals() -> StoreTotals {
    let read = |counts: &Counts| {
        let counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(&(operation, reason), &count)| RetryCount { operation, reason, count }).collect()
    };
    StoreTotals { retried: read(&RETRIED), failed: read(&FAILED), read_bytes: READ.load(Relaxed), written_bytes: WRITTEN.load(Relaxed) }
}

fn add(counts: &Counts, operation: Operation, reason: &'static str) {
    *counts.lock().unwrap_or_else(PoisonError::into_inner).entry((operation, reason)).or_default() += 1;
}

pub(crate) fn retried(operation: Operation, reason: &'static str) {
    add(&RETRIED, operation, reason);
}

/// A call has failed for good.
pub(crate) fn failed(operation: Operation, error: &StoreError) {
    if !matches!(error, StoreError::NotFound { .. } | StoreError::AlreadyExists { .. }) {
        add(&FAILED, operation, error.kind());
    }
}

pub(crate) fn read(bytes: u64) {
    READ.fetch_add(bytes, Relaxed);
}

pub(crate) fn written(bytes: u64) {
    WRITTEN.fetch_add(bytes, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faulty::{Failure, Faults};
    use crate::{Limits, Store};
    use std::time::Duration;

    fn count(counts: &[RetryCount], operation: Operation, reason: &str) -> u64 {
        counts.iter().filter(|c| (c.operation, c.reason) == (operation, reason)).map(|c| c.count).sum()
    }

    /// Other tests of this process count too, so that only lower bounds hold.
    #[tokio::test]
    async fn what_stores_do_is_counted_over_the_process() {
        let before = totals();
        let limits = Limits { first_pause: Duration::from_millis(1), ..Limits::default() };
        let faults = Faults::new();
        let store = faults.inject(&Store::in_memory().with_limits(limits));
        store.put("a", vec![7; 1000].into()).await.unwrap();
        faults.push(Operation::Get, "a", Failure::Before, 2);
        assert_eq!(store.get("a").await.unwrap().len(), 1000);
        faults.push(Operation::Get, "a", Failure::Denied, 1);
        assert!(store.get("a").await.is_err() && store.get("missing").await.is_err());
        let after = totals();
        assert!(after.read_bytes >= before.read_bytes + 1000 && after.written_bytes >= before.written_bytes + 1000);
        let more =
            |now: &[RetryCount], then: &[RetryCount], reason| count(now, Operation::Get, reason) - count(then, Operation::Get, reason);
        assert!(more(&after.retried, &before.retried, "unavailable") >= 2);
        assert!(more(&after.failed, &before.failed, "permission") >= 1);
        assert_eq!(count(&after.failed, Operation::Get, "not found"), 0);
    }
}
