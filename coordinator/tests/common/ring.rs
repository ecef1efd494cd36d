//! The collective of fake workers: a step is taken by all ranks of a generation, or by none.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};
use tokio::sync::Notify;

/// All rings of this process, by their generation's session.
static RINGS: LazyLock<Mutex<HashMap<Vec<u8>, Arc<Ring>>>> = LazyLock::new(Mutex::default);

/// What travels in a step's sums: it holds for all ranks if one wishes it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wishes {
    pub(super) boundary: bool,
    pub(super) drain: bool,
    /// A rank has no coordinator, so there can be no commit.
    pub(super) no_commit: bool,
}

#[derive(Debug, Default)]
struct Sums {
    arrived: u32,
    wishes: Wishes,
    round: u64,
    last: Wishes,
    broken: bool,
}

/// One generation's.
#[derive(Debug, Default)]
pub(super) struct Ring {
    sums: Mutex<Sums>,
    changed: Notify,
}

impl Ring {
    pub(super) fn of(session: &[u8]) -> Arc<Self> {
        Arc::clone(RINGS.lock().unwrap().entry(session.to_vec()).or_default())
    }

    /// Waits until all ranks have come so far; an error if one has left.
    pub(super) async fn sum(&self, world: u32, mine: Wishes) -> Result<Wishes, String> {
        let round = {
            let mut sums = self.sums.lock().unwrap();
            sums.arrived += 1;
            sums.wishes.boundary |= mine.boundary;
            sums.wishes.drain |= mine.drain;
            sums.wishes.no_commit |= mine.no_commit;
            if sums.arrived == world && !sums.broken {
                (sums.last, sums.arrived, sums.round) = (std::mem::take(&mut sums.wishes), 0, sums.round + 1);
                self.changed.notify_waiters();
                return Ok(sums.last);
            }
            sums.round
        };
        loop {
            let changed = self.changed.notified();
            {
                let sums = self.sums.lock().unwrap();
                if sums.round > round {
                    return Ok(sums.last);
                }
                if sums.broken {
                    return Err("a peer is gone".into());
                }
            }
            changed.await;
        }
    }

    /// A rank leaves: the others notice.
    pub(super) fn leave(&self) {
        self.sums.lock().unwrap().broken = true;
        self.changed.notify_waiters();
    }
}
