//! One bound on the memory of all pictures that are being decoded, whatever the number of threads.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::report::Refusal;

/// Most bytes that pictures may need at once, and so the most that one may.
pub(super) const MOST: u64 = 192 << 20;

static HELD: Mutex<u64> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

/// Memory that one picture may use until this is dropped.
pub(super) struct Hold(u64);

/// Waits until so many bytes are free. More than there are at all is refused.
///
/// The wait ends: who holds memory only computes, takes no second hold, and gives it back however it ends.
pub(super) fn hold(bytes: u64) -> Result<Hold, Refusal> {
    if bytes > MOST {
        return Err(Refusal::ImageTooLarge);
    }
    let held = held();
    let mut held = FREED.wait_while(held, |held| *held + bytes > MOST).unwrap_or_else(PoisonError::into_inner);
    *held += bytes;
    Ok(Hold(bytes))
}

impl Drop for Hold {
    fn drop(&mut self) {
        *held() -= self.0;
        FREED.notify_all();
    }
}

fn held() -> MutexGuard<'static, u64> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}
