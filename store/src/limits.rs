//! Deadlines and retries (LIVE, KNOWN).

use std::future::Future;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::{Instant, sleep, timeout};

use crate::error::{Place, StoreError};
use crate::store::Store;
use crate::tally;

/// How long a call may take. A call that moves bytes gets more time in proportion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// One attempt, or one chunk of a stream.
    pub attempt: Duration,
    /// All attempts and the pauses between them.
    pub overall: Duration,
    /// The same where no connection was ever made: the address is more likely wrong than its server away.
    pub first_contact: Duration,
    /// The slowest transfer that is still waited for.
    pub bytes_per_second: u64,
    /// The pause before the first retry; it doubles, with jitter. A store that says how long to wait (`Retry-After`) is left alone
    /// for that long besides, or the call given up if its deadline comes first.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            attempt: Duration::from_secs(20),
            overall: Duration::from_secs(90),
            first_contact: Duration::from_secs(15),
            bytes_per_second: 1 << 20,
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(10),
        }
    }
}

impl Limits {
    /// The deadline of one attempt that moves `bytes`.
    pub(crate) fn attempt_for(&self, bytes: u64) -> Duration {
        self.attempt.saturating_add(self.transfer(bytes))
    }

    /// The deadline of a whole call that moves `bytes`.
    pub(crate) fn overall_for(&self, bytes: u64) -> Duration {
        self.overall.saturating_add(self.transfer(bytes).saturating_mul(3))
    }

    fn transfer(&self, bytes: u64) -> Duration {
        Duration::from_secs(bytes / self.bytes_per_second.max(1))
    }

    /// Starts counting retries of one call that moves `bytes`.
    pub(crate) fn retries(&self, bytes: u64) -> Retries {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(self.first_pause)
            .with_max_delay(self.longest_pause)
            .without_max_times()
            .with_jitter()
            .build();
        let begun = Instant::now();
        Retries { pauses: Box::new(pauses), begun, deadline: begun + self.overall_for(bytes), contact: begun + self.first_contact }
    }
}

/// The store asks to be left alone for a while: a reply's `Retry-After`.
#[derive(Debug, thiserror::Error)]
#[error("the store is busy (status {status}) and asks to wait {after:?}")]
pub(crate) struct Throttled {
    pub(crate) status: u16,
    pub(crate) after: Duration,
}

/// The retries left to one call.
pub(crate) struct Retries {
    pub(crate) pauses: Box<dyn Iterator<Item = Duration> + Send + Sync>,
    begun: Instant,
    deadline: Instant,
    /// The deadline as long as no connection was ever made.
    contact: Instant,
}

impl std::fmt::Debug for Retries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Retries").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Retries {
    /// Time left before the call's overall deadline.
    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Pauses before the next attempt, or gives the error back if there is to be none.
    pub(crate) async fn pause(&mut self, store: &Store, place: Place<'_>, error: StoreError) -> Result<(), StoreError> {
        let ends = |error: StoreError| {
            tally::failed(place.operation, &error);
            Err(error)
        };
        if !error.is_retryable() {
            return ends(error);
        }
        let deadline = if error.is_unreachable() && !store.is_met() { self.contact.min(self.deadline) } else { self.deadline };
        let left = deadline.saturating_duration_since(Instant::now());
        // Jitter on top of what the store asks for: else all that it sent away come back at once.
        let asked = error.retry_after().unwrap_or_default();
        let Some(pause) = self.pauses.next().map(|pause| asked.saturating_add(pause)).filter(|pause| *pause < left) else {
            return ends(error);
        };
        tracing::warn!(%error, ?pause, "store call is retried");
        store.count_retry(place.operation, error.kind());
        sleep(pause).await;
        Ok(())
    }
}

/// Runs `attempt` (given its number from 0) until it succeeds, cannot be retried, or the deadline passes.
pub(crate) async fn retrying<T, F, Fut>(store: &Store, place: Place<'_>, bytes: u64, mut attempt: F) -> Result<T, StoreError>
where
    F: FnMut(u32) -> Fut,
    Fut: Future<Output = Result<T, StoreError>>,
{
    let limits = store.limits();
    let mut retries = limits.retries(bytes);
    let mut number = 0;
    loop {
        let (whole, left) = (limits.attempt_for(bytes), retries.left());
        let error = match timeout(whole.min(left), attempt(number)).await {
            Ok(Ok(value)) => {
                store.meet();
                return Ok(value);
            }
            Ok(Err(error)) => error,
            // Of the last attempt only a rest was waited for, which says nothing of how long the store has been silent.
            Err(_) if left < whole => place.timeout(Duration::from_millis(retries.begun.elapsed().as_millis() as u64)),
            Err(_) => place.timeout(whole),
        };
        if !error.is_retryable() {
            store.meet();
        }
        retries.pause(store, place, error).await?;
        number += 1;
    }
}
