//! How this process is, for heartbeats: memory, processor time, its GPU; and what its stores did since that was told last (KNOWN).

mod nvml;

use crate::device;
use ella_proto::v1::Vitals;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use tch::Device;

/// The GPU that this process computes on, with its UUID, if it is one.
static GPU: OnceLock<(Device, String)> = OnceLock::new();
/// What that GPU was last seen to be.
static SEEN: Seen<OfGpu> = Seen::new(OfGpu { told: nvml::Told { used: 0, total: 0, busy: None }, allocated: 0 });
/// What was told of the stores, which are counted over the process.
static TOLD: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

/// How a GPU is.
#[derive(Clone, Copy, Debug, PartialEq)]
struct OfGpu {
    told: nvml::Told,
    /// Bytes of tensors, by libtorch's allocator.
    allocated: u64,
}

/// What was last seen of something that a look at may be held up by.
#[derive(Debug)]
struct Seen<T> {
    last: Mutex<T>,
    /// Somebody looks.
    looking: AtomicBool,
}

impl<T: Copy + Send> Seen<T> {
    const fn new(first: T) -> Self {
        Self { last: Mutex::new(first), looking: AtomicBool::new(false) }
    }

    fn last(&self) -> T {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a thread look, for the next to ask, unless one looks still.
    fn look_again(&'static self, look: impl FnOnce() -> T + Send + 'static) {
        if self.looking.swap(true, Ordering::AcqRel) {
            return;
        }
        // A thread of its own: what is blocked in the runtime's would hold up the end of the process.
        let looks = std::thread::Builder::new().name("vitals".into()).spawn(move || {
            let seen = look();
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = seen;
            self.looking.store(false, Ordering::Release);
        });
        if looks.is_err() {
            self.looking.store(false, Ordering::Release);
        }
    }
}

/// This process computes on this device.
pub(crate) fn computes_on(device: Device) {
    if let Some(uuid) = device::uuid(device) {
        // Whatever came first stays: a process has one.
        let _ = GPU.set((device, uuid));
        // So that the first heartbeat has something to tell.
        look_at_gpu();
    }
}

/// The allocator's numbers are behind the lock that it holds while it gives memory back, for which it waits for all that the device has to do.
fn look_at_gpu() {
    let Some((device, uuid)) = GPU.get() else { return };
    SEEN.look_again(|| OfGpu {
        told: nvml::look(uuid).unwrap_or_default(),
        allocated: ella_cuda::memory::counters(*device).unwrap_or_default().allocated,
    });
}

/// How this process is now, and its GPU as it was last seen, which is a heartbeat ago or longer: nothing here waits for a device. `feed_bytes` of
/// samples wait for their step.
pub(crate) fn look(feed_bytes: u64) -> Vitals {
    let usage = ella_coordinator::metrics::usage().unwrap_or_default();
    let vitals = Vitals { memory_bytes: usage.memory_bytes, cpu_seconds: usage.cpu_seconds, feed_bytes, ..Vitals::default() };
    let OfGpu { told, allocated } = SEEN.last();
    look_at_gpu();
    Vitals {
        gpu_memory_used_bytes: told.used,
        gpu_memory_total_bytes: told.total,
        gpu_memory_allocated_bytes: allocated,
        gpu_busy: told.busy,
        ..vitals
    }
}

/// What the stores did since the last call, by name.
pub(crate) fn news() -> HashMap<String, u64> {
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    let mut news = HashMap::new();
    for (name, count) in store_counts() {
        let before = told.entry(name.clone()).or_default();
        if count > *before {
            news.insert(name, count - *before);
            *before = count;
        }
    }
    news
}

/// What could not be told after all, for the next time.
pub(crate) fn untold(news: &HashMap<String, u64>) {
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, count) in news {
        told.entry(name.clone()).and_modify(|told| *told = told.saturating_sub(*count));
    }
}

fn store_counts() -> Vec<(String, u64)> {
    let totals = ella_store::totals();
    let named = |what: &str, counts: &[ella_store::RetryCount]| {
        let name = |count: &ella_store::RetryCount| format!("store_{what}_{}_{}", count.operation, count.reason.replace(' ', "_"));
        counts.iter().map(|count| (name(count), count.count)).collect::<Vec<_>>()
    };
    let bytes = [("store_read_bytes".to_owned(), totals.read_bytes), ("store_written_bytes".to_owned(), totals.written_bytes)];
    [named("retried", &totals.retried), named("failed", &totals.failed), bytes.to_vec()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_tells_how_it_is() {
        let vitals = look(7);
        assert!(vitals.memory_bytes > 1 << 20 && vitals.feed_bytes == 7);
        assert!(vitals.gpu_busy.is_none() && vitals.gpu_memory_total_bytes == 0, "a GPU that nothing was computed on");
    }

    /// A heartbeat that waited would be late, and its rank lost.
    #[test]
    fn a_look_that_hangs_holds_up_nobody_and_what_was_last_seen_is_told_meanwhile() {
        static HANGS: Seen<u64> = Seen::new(7);
        let (free, hung) = std::sync::mpsc::channel();
        HANGS.look_again(move || hung.recv().unwrap());
        for _ in 0..3 {
            HANGS.look_again(|| unreachable!("one looks still"));
            assert_eq!(HANGS.last(), 7);
        }
        free.send(8).unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while HANGS.looking.load(Ordering::Acquire) && std::time::Instant::now() < until {
            std::thread::yield_now();
        }
        assert_eq!(HANGS.last(), 8);
    }

    #[test]
    fn what_stores_did_is_told_bit_by_bit_and_again_if_it_was_not_heard() {
        const NAME: &str = "store_written_bytes";
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let store = ella_store::Store::in_memory();
        news();
        runtime.block_on(store.put("a", vec![1; 5000].into())).unwrap();
        let told = news();
        // Other tests of this process write too.
        assert!(told[NAME] >= 5000);
        untold(&told);
        assert!(news()[NAME] >= told[NAME]);
    }
}
