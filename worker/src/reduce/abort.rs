//! Ending a blocked call from another thread.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Result;

/// Ends what a collective is doing, from any thread. The rank then answers [`Aborted`](super::CollectiveError::Aborted) for good, and its peers find it lost.
#[derive(Clone)]
pub struct AbortHandle(Arc<dyn Fn() -> Result<()> + Send + Sync>);

impl AbortHandle {
    pub(super) fn new(abort: impl Fn() -> Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(abort))
    }

    /// Ends the call that is under way, and every later one. Harmless when repeated.
    ///
    /// # Errors
    /// Only NCCL's abort can fail; where it times out, only the end of the process frees the GPU.
    pub fn abort(&self) -> Result<()> {
        (self.0)()
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AbortHandle")
    }
}

/// A flag that also wakes whoever polls: its file becomes readable when it is raised, and stays so.
#[derive(Debug)]
pub(super) struct Wake {
    raised: AtomicBool,
    raise: UnixStream,
    pub(super) file: UnixStream,
}

impl Wake {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let (raise, file) = UnixStream::pair()?;
        Ok(Arc::new(Self { raised: AtomicBool::new(false), raise, file }))
    }

    pub(super) fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    pub(super) fn handle(self: &Arc<Self>) -> AbortHandle {
        let wake = Arc::clone(self);
        AbortHandle::new(move || {
            wake.raised.store(true, Ordering::Release);
            // Fails only where it was done before.
            let _ = wake.raise.shutdown(Shutdown::Both);
            Ok(())
        })
    }
}
