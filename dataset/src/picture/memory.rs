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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn threads_wait_for_one_another_and_together_hold_no_more_than_there_is() {
        assert!(matches!(hold(MOST + 1), Err(Refusal::ImageTooLarge)));
        let (now, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (now, most) = (&now, &most);
                scope.spawn(move || {
                    for round in 0..200 {
                        let bytes = MOST / (1 + (thread + round) % 5);
                        let _hold = hold(bytes).unwrap();
                        most.fetch_max(now.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                        now.fetch_sub(bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(most.into_inner(), MOST, "the whole was held at once, and never more");
        assert_eq!(*held(), 0);
    }
}
