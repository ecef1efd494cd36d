//! A communicator, and the handle that aborts it.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::cuda::{Event, Stream};
use crate::sys::{self, Comm, Config, Nccl, RawId};
use crate::{Error, Library, UniqueId};

/// How long a dropped communicator may take to finish before it is left behind.
const CLOSE: Duration = Duration::from_secs(5);

/// The element types that are reduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 64-bit integer; sums wrap.
    I64,
}

impl Dtype {
    /// `ncclDataType_t`.
    fn code(self) -> c_int {
        match self {
            Self::I64 => 4,
            Self::F32 => 7,
            Self::Bf16 => 9,
        }
    }
}

/// Device memory that a collective works on, in place.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// The first element, in the memory of the communicator's device.
    pub ptr: *mut c_void,
    /// The number of elements; the same on all ranks.
    pub count: usize,
    /// Their type; the same on all ranks.
    pub dtype: Dtype,
}

/// One rank's place among the ranks that reduce together. Dropping it finishes what is under way, within five seconds, and never panics.
#[derive(Debug)]
pub struct Communicator {
    shared: Arc<Shared>,
    rank: u32,
    world: u32,
}

impl Communicator {
    /// Joins the communicator `id` as `rank` of `world`, on the calling thread's current device. All ranks must do so within `timeout`.
    ///
    /// # Errors
    /// [`Error::Timeout`] when a rank stays away; [`Error::Nccl`], [`Error::BadRank`].
    pub fn init(library: &Library, id: &UniqueId, place: (u32, u32), timeout: Duration) -> Result<Self, Error> {
        Self::init_telling(library, id, place, timeout, |_| ())
    }

    /// The same, where `begun` gets the handle that aborts it before the other ranks are waited for.
    ///
    /// # Errors
    /// As for [`Communicator::init`]; [`Error::Aborted`].
    pub fn init_telling(
        library: &Library,
        id: &UniqueId,
        (rank, world): (u32, u32),
        timeout: Duration,
        begun: impl FnOnce(AbortHandle),
    ) -> Result<Self, Error> {
        let bad = Error::BadRank { rank, world };
        let (Ok(n), Ok(r)) = (c_int::try_from(world), c_int::try_from(rank)) else { return Err(bad) };
        if rank >= world {
            return Err(bad);
        }
        let call = "ncclCommInitRankConfig";
        let mut comm: Comm = std::ptr::null_mut();
        let mut config = Config::non_blocking();
        // SAFETY: both pointers are to live values; NCCL copies the configuration before it returns, and does not keep `&mut comm`:
        // a non-blocking call has stored the handle when it returns.
        let code = unsafe { (library.table().comm_init_rank_config)(&raw mut comm, n, RawId(id.0), r, &raw mut config) };
        let shared =
            Shared { library: library.clone(), comm: Mutex::new(Handle(comm)), aborting: Mutex::new(()), aborted: AtomicBool::new(false) };
        let new = Self { shared: Arc::new(shared), rank, world };
        let started = library.check(call, code, comm);
        begun(new.abort_handle());
        started.and_then(|()| new.shared.settle(call, Instant::now() + timeout)).inspect_err(|_| new.give_up())?;
        Ok(new)
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// The number of ranks.
    pub fn world(&self) -> u32 {
        self.world
    }

    /// A handle that ends, from any thread, whatever this communicator is doing.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(Arc::clone(&self.shared))
    }

    /// Puts a sum over all ranks on `stream`, in place, and returns when it is there, not when it is done: record an event and
    /// [`wait`](Self::wait) for it.
    ///
    /// # Errors
    /// [`Error::Nccl`], [`Error::Timeout`], [`Error::Aborted`].
    ///
    /// # Safety
    /// `buffer` is valid for reads and writes, and nothing else touches it outside `stream`'s order, until the event is done or the communicator is aborted.
    pub unsafe fn all_reduce(&self, buffer: Buffer, stream: Stream, deadline: Instant) -> Result<(), Error> {
        let Buffer { ptr, count, dtype } = buffer;
        self.shared.begin("ncclAllReduce", deadline, |nccl, comm| {
            // SAFETY: the caller's contract for the buffer; `comm` is alive and held by the lock.
            unsafe { (nccl.all_reduce)(ptr, ptr, count, dtype.code(), sys::SUM, comm, stream.raw()) }
        })
    }

    /// Puts a copy of `root`'s buffer to all ranks on `stream`; otherwise as [`all_reduce`](Self::all_reduce).
    ///
    /// # Errors
    /// [`Error::Nccl`], [`Error::Timeout`], [`Error::Aborted`], [`Error::BadRank`].
    ///
    /// # Safety
    /// As for [`all_reduce`](Self::all_reduce).
    pub unsafe fn broadcast(&self, buffer: Buffer, root: u32, stream: Stream, deadline: Instant) -> Result<(), Error> {
        let Buffer { ptr, count, dtype } = buffer;
        let bad = Error::BadRank { rank: root, world: self.world };
        let root = c_int::try_from(root).ok().filter(|_| root < self.world).ok_or(bad)?;
        self.shared.begin("ncclBroadcast", deadline, |nccl, comm| {
            // SAFETY: the caller's contract for the buffer; `comm` is alive and held by the lock.
            unsafe { (nccl.broadcast)(ptr, ptr, count, dtype.code(), root, comm, stream.raw()) }
        })
    }

    /// Waits for `event`, watching meanwhile for errors that NCCL finds in the background (a peer that died), and for an abort.
    ///
    /// # Errors
    /// [`Error::Nccl`], [`Error::Cuda`], [`Error::Timeout`], [`Error::Aborted`]. The work may still be on the device then: abort before its memory is freed.
    pub fn wait(&self, event: &Event, deadline: Instant) -> Result<(), Error> {
        let call = "collective";
        poll(call, deadline, || {
            self.shared.in_progress(call)?;
            event.is_done()
        })
    }

    /// Leaves behind what cannot be finished; the caller already has the error that matters.
    fn give_up(&self) {
        if let Err(error) = self.abort_handle().abort(CLOSE) {
            tracing::warn!(%error, rank = self.rank, "a communicator could not be aborted");
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.shared.aborted.load(Ordering::Acquire) || self.shared.lock().0.is_null() {
            return;
        }
        let shared = Arc::clone(&self.shared);
        if let Err(error) = bounded("ncclCommFinalize", CLOSE, move || shared.finalize(Instant::now() + CLOSE)) {
            tracing::warn!(%error, rank = self.rank, "a communicator did not finish; aborting it");
            self.give_up();
        }
    }
}

/// Aborts a [`Communicator`] from any thread.
#[derive(Clone, Debug)]
pub struct AbortHandle(Arc<Shared>);

impl AbortHandle {
    /// Ends everything that the communicator is doing, on the device too, and gives it back. Calls that wait on it return [`Error::Aborted`] at once.
    /// Harmless when repeated, or when the communicator is gone: whoever comes second waits for the first, so that nothing runs any more for either.
    ///
    /// # Errors
    /// [`Error::Timeout`] when NCCL does not come back: only the end of the process helps then. [`Error::Nccl`].
    pub fn abort(&self, timeout: Duration) -> Result<(), Error> {
        // First the flag: a thread that polls sees it and leaves, whatever becomes of NCCL's own abort.
        self.0.aborted.store(true, Ordering::Release);
        let shared = Arc::clone(&self.0);
        bounded("ncclCommAbort", timeout, move || {
            let _one = shared.aborting.lock().unwrap_or_else(PoisonError::into_inner);
            let comm = std::mem::replace(&mut shared.lock().0, std::ptr::null_mut());
            if comm.is_null() {
                return Ok(());
            }
            // SAFETY: the handle was alive and was taken out of its place under the lock: no other thread is inside a call
            // on it (calls hold the lock) and none will find it again.
            let code = unsafe { (shared.library.table().comm_abort)(comm) };
            shared.library.check("ncclCommAbort", code, std::ptr::null_mut())
        })
    }
}

/// NCCL's handle; null once it was given back.
#[derive(Debug)]
struct Handle(Comm);

// SAFETY: NCCL takes a communicator from any thread, one at a time; the mutex around this sees to that.
unsafe impl Send for Handle {}

/// What the owner and the abort handles share.
#[derive(Debug)]
struct Shared {
    library: Library,
    /// Held for the length of each call into NCCL, never between polls.
    comm: Mutex<Handle>,
    /// Held for as long as NCCL takes to abort.
    aborting: Mutex<()>,
    aborted: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Handle> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one call under the lock.
    fn call(&self, name: &'static str, f: impl FnOnce(&Nccl, Comm) -> c_int) -> Result<(), Error> {
        let comm = self.lock();
        if comm.0.is_null() || self.aborted.load(Ordering::Acquire) {
            return Err(Error::Aborted { call: name });
        }
        let code = f(self.library.table(), comm.0);
        self.library.check(name, code, comm.0)
    }

    /// Begins something and waits until it is under way on the device: before that, no event may be recorded behind it.
    fn begin(&self, name: &'static str, deadline: Instant, f: impl FnOnce(&Nccl, Comm) -> c_int) -> Result<(), Error> {
        self.call(name, f)?;
        self.settle(name, deadline)
    }

    fn settle(&self, name: &'static str, deadline: Instant) -> Result<(), Error> {
        poll(name, deadline, || Ok(!self.in_progress(name)?))
    }

    /// Whether NCCL is still busy in the background; its error, if it found one there.
    fn in_progress(&self, name: &'static str) -> Result<bool, Error> {
        let mut state = sys::SUCCESS;
        // SAFETY: `comm` is alive and held by the lock; the pointer is to a live integer, which the call fills.
        self.call("ncclCommGetAsyncError", |nccl, comm| unsafe { (nccl.comm_get_async_error)(comm, &raw mut state) })?;
        self.call(name, |_, _| state)?;
        Ok(state == sys::IN_PROGRESS)
    }

    fn finalize(&self, deadline: Instant) -> Result<(), Error> {
        // SAFETY: `comm` is alive and held by the lock.
        self.begin("ncclCommFinalize", deadline, |nccl, comm| unsafe { (nccl.comm_finalize)(comm) })?;
        let mut handle = self.lock();
        let comm = std::mem::replace(&mut handle.0, std::ptr::null_mut());
        if comm.is_null() {
            return Ok(());
        }
        // SAFETY: the handle was alive and was taken out of its place under the lock, which is still held: this is its last use.
        let code = unsafe { (self.library.table().comm_destroy)(comm) };
        self.library.check("ncclCommDestroy", code, std::ptr::null_mut())
    }
}

/// Asks until the answer is yes: eagerly at first, since most things take microseconds, then without burning the processor.
fn poll(call: &'static str, deadline: Instant, mut done: impl FnMut() -> Result<bool, Error>) -> Result<(), Error> {
    let began = Instant::now();
    for asked in 0_u64.. {
        if done()? {
            return Ok(());
        }
        if Instant::now() >= deadline {
            break;
        }
        if asked < 256 {
            thread::yield_now();
        } else {
            thread::sleep(Duration::from_micros(50));
        }
    }
    Err(Error::Timeout { call, elapsed: began.elapsed() })
}

/// Runs what may hang on a thread of its own, and waits for it only so long.
fn bounded(call: &'static str, timeout: Duration, work: impl FnOnce() -> Result<(), Error> + Send + 'static) -> Result<(), Error> {
    let (done, wait) = mpsc::channel();
    let began = Instant::now();
    thread::Builder::new().name(call.into()).spawn(move || done.send(work())).map_err(|source| Error::Thread { call, source })?;
    wait.recv_timeout(timeout).unwrap_or_else(|_| Err(Error::Timeout { call, elapsed: began.elapsed() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_ends_at_the_answer_the_error_or_the_deadline() {
        let later = Instant::now() + Duration::from_secs(60);
        let mut asked = 0;
        poll("x", later, || {
            asked += 1;
            Ok(asked == 300)
        })
        .expect("the 300th answer is yes");
        assert!(matches!(poll("x", later, || Err(Error::Aborted { call: "x" })), Err(Error::Aborted { .. })));
        assert!(matches!(poll("x", Instant::now(), || Ok(false)), Err(Error::Timeout { call: "x", .. })));
    }

    /// Whoever aborts second comes back when nothing runs any more, and not before: memory is given back then.
    #[test]
    fn a_second_abort_waits_for_the_first() {
        static BEGUN: AtomicBool = AtomicBool::new(false);
        static DONE: AtomicBool = AtomicBool::new(false);
        unsafe extern "C" fn slow_abort(_: Comm) -> c_int {
            BEGUN.store(true, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(200));
            DONE.store(true, Ordering::SeqCst);
            sys::SUCCESS
        }
        let handle = |comm: usize| {
            let table = sys::fake(slow_abort);
            let comm = Mutex::new(Handle(comm as Comm));
            AbortHandle(Arc::new(Shared { library: Library::of(table), comm, aborting: Mutex::new(()), aborted: AtomicBool::new(false) }))
        };
        let first = handle(1);
        let second = first.clone();
        let aborting = thread::spawn(move || first.abort(CLOSE));
        while !BEGUN.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        second.abort(CLOSE).expect("it was aborted");
        assert!(DONE.load(Ordering::SeqCst));
        aborting.join().expect("no panic").expect("it aborted");
    }

    #[test]
    fn work_that_hangs_is_left_behind() {
        let (release, held) = mpsc::channel::<()>();
        let hung = bounded("x", Duration::from_millis(1), move || {
            let _ = held.recv();
            Ok(())
        });
        assert!(matches!(hung, Err(Error::Timeout { call: "x", .. })));
        drop(release);
        assert!(bounded("x", Duration::from_secs(60), || Ok(())).is_ok());
    }
}
