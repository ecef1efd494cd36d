//! A bound in bytes on what is held in memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Memory in use: now, at most so far, and at most at any time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes held now.
    pub held: u64,
    /// The most that were held at once.
    pub peak: u64,
    /// The most that may be. A single file that is larger is held alone.
    pub limit: u64,
}

/// A room of so many bytes, of which shares are taken.
#[derive(Debug)]
pub(crate) struct Room {
    memory: Mutex<Memory>,
    /// Told when there may be more room.
    pub(crate) freed: Notify,
}

/// Bytes taken of a room, until this is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    room: Arc<Room>,
    bytes: u64,
}

impl Room {
    pub(crate) fn new(limit: u64) -> Arc<Room> {
        Arc::new(Room { memory: Mutex::new(Memory { limit, ..Memory::default() }), freed: Notify::new() })
    }

    pub(crate) fn memory(&self) -> Memory {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A share, if it fits. One that fits in no way is given while there is no other.
    pub(crate) fn take(self: &Arc<Self>, bytes: u64) -> Option<Share> {
        let mut memory = self.lock();
        let held = memory.held.checked_add(bytes)?;
        if held > memory.limit && memory.held > 0 {
            return None;
        }
        memory.held = held;
        memory.peak = memory.peak.max(held);
        Some(Share { room: Arc::clone(self), bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.lock().held -= self.bytes;
        self.room.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_never_exceed_the_room_but_for_one_that_is_larger() {
        let room = Room::new(10);
        let (a, b) = (room.take(6).unwrap(), room.take(4).unwrap());
        assert!(room.take(1).is_none() && room.take(u64::MAX).is_none());
        drop(a);
        assert!(room.take(7).is_none());
        drop(b);
        let all = room.take(30).unwrap();
        assert!(room.take(1).is_none());
        drop(all);
        assert_eq!(room.memory(), Memory { held: 0, peak: 30, limit: 10 });
    }
}
