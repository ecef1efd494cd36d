//! The units in a worker's hands: begun when they are granted, renewed, reported. They outlive the stream that they came by.

use super::{Job, JobError, Tell};
use crate::control::Link;
use ella_coordinator::trace::{self, About, Trace};
use ella_proto::v1::{FromWorker, LeaseDone, LeaseGrant, LeaseRenew, LeaseThen, from_worker};
use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Bytes of unit names in one message, of which a coordinator takes a MiB.
const MOST_NAMES: usize = 256 << 10;
/// Bytes of an error in a message.
const MOST_ERROR: usize = 8 << 10;
/// How long units may take to notice that they are not wanted any more.
const LETTING_GO: Duration = Duration::from_secs(5);

type Done = Result<Vec<String>, JobError>;

/// A lease, by the coordinator that granted it.
struct Lease {
    id: u64,
    session: u64,
    tell: Arc<Tell>,
}

pub(super) struct Hand {
    job: Arc<dyn Job>,
    pub(super) slots: u32,
    /// Only so many units are done at once, whatever is granted.
    permits: Arc<Semaphore>,
    leases: BTreeMap<String, Lease>,
    tasks: JoinSet<(String, Done)>,
    stop: CancellationToken,
}

impl Hand {
    pub(super) fn new(job: Box<dyn Job>, slots: u32) -> Self {
        let permits = Arc::new(Semaphore::new(slots as usize));
        Self { job: job.into(), slots, permits, leases: BTreeMap::new(), tasks: JoinSet::new(), stop: CancellationToken::new() }
    }

    /// Begins a unit. One that is in hand already, from before a stream broke, goes on under the new lease.
    pub(super) fn take(&mut self, grant: LeaseGrant, session: u64) {
        let LeaseGrant { unit, lease_id } = grant;
        if let Some(lease) = self.leases.get_mut(&unit) {
            (lease.id, lease.session) = (lease_id, session);
            return;
        }
        let tell = Arc::new(Tell::new(self.stop.child_token()));
        let (job, permits, handle, told, name) = (self.job.clone(), self.permits.clone(), Handle::current(), tell.clone(), unit.clone());
        // On a thread of its own, so that a unit that blocks holds up neither renewals nor other units.
        self.tasks.spawn_blocking(move || {
            let begin = Instant::now();
            let done = catch_unwind(AssertUnwindSafe(|| handle.block_on(one(&*job, &name, &told, &permits))));
            let done = done.unwrap_or_else(|panic| Err(JobError::passing(panicked(&*panic))));
            trace_unit(&name, (session, lease_id), begin.elapsed(), &done);
            (name, done)
        });
        self.leases.insert(unit, Lease { id: lease_id, session, tell });
    }

    /// The next unit that has ended; never, if none is in hand.
    pub(super) async fn next(&mut self) -> (String, Done) {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(ended)) => return ended,
                // A unit's panic is caught where it happens: this is the runtime's end.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Says how a unit ended, if this coordinator granted it. False if it does not read.
    pub(super) fn report(&mut self, link: &Link, (unit, done): (String, Done)) -> bool {
        let Some(lease) = self.leases.remove(&unit) else { return true };
        if lease.session != link.term {
            tracing::info!(unit, "done, for a coordinator that is gone: the next one finds its output");
            return true;
        }
        messages(unit, &lease, done).into_iter().all(|body| say(link, body))
    }

    /// Says how far every unit is. False if the coordinator does not read.
    pub(super) fn renew(&self, link: &Link) -> bool {
        let mine = self.leases.values().filter(|lease| lease.session == link.term);
        let renew = |lease: &Lease| LeaseRenew { lease_id: lease.id, done: lease.tell.done() };
        mine.map(renew).all(|renew| say(link, from_worker::Body::LeaseRenew(renew)))
    }

    /// Gives up what is in hand, and waits a moment for it to be let go.
    pub(super) async fn let_go(mut self) {
        self.stop.cancel();
        let ends = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(LETTING_GO, ends).await.is_err() {
            tracing::warn!("units do not end within {LETTING_GO:?}; they are cut off");
        }
    }
}

impl Drop for Hand {
    /// A worker that is dropped leaves no unit behind that waits for ever.
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn one(job: &dyn Job, unit: &str, tell: &Tell, permits: &Semaphore) -> Done {
    let work = async {
        // The semaphore is never closed.
        let _permit = permits.acquire().await;
        job.unit(unit, tell).await
    };
    tokio::select! {
        biased;
        () = tell.stop() => Err(JobError::passing("this worker leaves")),
        done = work => done,
    }
}

/// Tells of a unit as a trace, from its grant on.
fn trace_unit(unit: &str, (session, lease): (u64, u64), took: Duration, done: &Done) {
    if trace::is_on(None) {
        let span = Trace::of(About::Unit, unit, &[session, lease]).root().took(SystemTime::now() - took, took);
        let span = span.with("ella.unit", unit.to_owned()).with("ella.lease", lease.cast_signed());
        trace::tell(span.failed(done.as_ref().err().map(|error| error.message.clone())));
    }
}

fn panicked(panic: &(dyn Any + Send)) -> String {
    let words = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the worker broke: {}", words.unwrap_or("a panic without words"))
}

/// Sends without waiting. False if the coordinator is gone, or reads nothing.
pub(super) fn say(link: &Link, body: from_worker::Body) -> bool {
    link.out.try_send(FromWorker { term: link.term, generation: 0, body: Some(body) }).is_ok()
}

/// How a unit ended, in as many messages as its followers need.
fn messages(unit: String, lease: &Lease, done: Done) -> Vec<from_worker::Body> {
    let (then, error, permanent) = match done {
        Ok(then) => (then, String::new(), false),
        // An empty error would mean that there is none.
        Err(JobError { message, permanent, .. }) if message.is_empty() => (Vec::new(), "it failed without a word".to_owned(), permanent),
        Err(JobError { message, permanent, .. }) => (Vec::new(), clipped(message), permanent),
    };
    let mut parts = parts(then);
    let last = parts.pop().unwrap_or_default();
    let counts = lease.tell.counts().into_iter().collect();
    let done = LeaseDone { lease_id: lease.id, unit, error, permanent, then: last, done: lease.tell.done(), counts };
    let then = parts.into_iter().map(|units| from_worker::Body::LeaseThen(LeaseThen { lease_id: lease.id, units }));
    then.chain([from_worker::Body::LeaseDone(done)]).collect()
}

fn clipped(mut text: String) -> String {
    let end = (0..=MOST_ERROR.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.truncate(end);
    text
}

/// Names in order, cut where a message is full.
fn parts(names: Vec<String>) -> Vec<Vec<String>> {
    let mut parts: Vec<Vec<String>> = Vec::new();
    let mut bytes = MOST_NAMES;
    for name in names {
        // Of the wire: the text, its tag and its length.
        let size = name.len() + 6;
        if bytes + size > MOST_NAMES {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(part) = parts.last_mut() {
            part.push(name);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lease() -> Lease {
        Lease { id: 3, session: 1, tell: Arc::new(Tell::default()) }
    }

    proptest! {
        #[test]
        fn followers_are_cut_into_messages_that_fit_and_none_is_lost(lengths in prop::collection::vec(0usize..60_000, 0..60)) {
            let names: Vec<String> = lengths.iter().map(|n| "u".repeat(*n)).collect();
            let parts = parts(names.clone());
            prop_assert!(parts.iter().all(|part| part.iter().map(|name| name.len() + 6).sum::<usize>() <= MOST_NAMES && !part.is_empty()));
            prop_assert_eq!(parts.concat(), names);
        }
    }

    #[test]
    fn an_error_is_never_empty_and_never_too_long() {
        for (message, bytes) in [(String::new(), 24), ("é".repeat(MOST_ERROR), MOST_ERROR)] {
            let said = messages("u".into(), &lease(), Err(JobError::permanent(message)));
            let [from_worker::Body::LeaseDone(done)] = said.as_slice() else { panic!("{said:?}") };
            assert_eq!((done.error.len(), done.permanent), (bytes, true));
        }
    }
}
