//! Ranks as threads of one process, for tests: every rank lays its data on a table, and when all have, each adds up for itself in rank order.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use half::bf16;
use half::slice::HalfFloatSliceExt as _;

use super::error::Steps;
use super::{AbortHandle, Collective, CollectiveError, DEFAULT_TIMEOUT, Op, OpKind, Result, add_bf16};

/// What one rank laid down.
type Share = (Op, Arc<[u8]>);

/// One rank of a group of threads.
#[derive(Debug)]
pub struct InProcess {
    rank: u32,
    world: u32,
    table: Arc<Table>,
    steps: Steps,
    timeout: Duration,
}

#[derive(Debug)]
struct Table {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    round: u64,
    shares: Vec<Option<Share>>,
    /// The shares of the round before this one. Nobody can still need older ones: a round begins when all have taken part in the last.
    full: Arc<Vec<Share>>,
    gone: Vec<bool>,
    aborted: Vec<bool>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, rank: u32, mark: impl FnOnce(&mut State, usize)) {
        let mut state = self.lock();
        mark(&mut state, rank as usize);
        state.gone[rank as usize] = true;
        self.changed.notify_all();
    }
}

impl InProcess {
    /// Makes a whole group, rank by rank.
    pub fn group(world: u32) -> Vec<Self> {
        let n = world as usize;
        let state = State { round: 0, shares: vec![None; n], full: Arc::default(), gone: vec![false; n], aborted: vec![false; n] };
        let table = Arc::new(Table { state: Mutex::new(state), changed: Condvar::new() });
        let rank = |rank| Self { rank, world, table: Arc::clone(&table), steps: Steps::default(), timeout: DEFAULT_TIMEOUT };
        (0..world).map(rank).collect()
    }

    /// Lays down this rank's bytes and returns all ranks'.
    fn exchange(&mut self, kind: OpKind, elements: usize, bytes: &[u8]) -> Result<Arc<Vec<Share>>> {
        if self.table.lock().aborted[self.rank as usize] {
            return Err(CollectiveError::Aborted);
        }
        let op = self.steps.begin(kind, elements)?;
        let all = self.lay_down(op, bytes.into()).and_then(|all| self.compare(op, all));
        all.inspect_err(|error| {
            self.steps.fail(error);
            self.table.leave(self.rank, |_, _| ());
        })
    }

    fn lay_down(&self, op: Op, bytes: Arc<[u8]>) -> Result<Arc<Vec<Share>>> {
        let began = Instant::now();
        let mut state = self.table.lock();
        let round = state.round;
        state.shares[self.rank as usize] = Some((op, bytes));
        if state.shares.iter().all(Option::is_some) {
            let shares = state.shares.iter_mut().filter_map(Option::take).collect();
            (state.full, state.round) = (Arc::new(shares), round + 1);
            self.table.changed.notify_all();
        }
        while state.round == round {
            if state.aborted[self.rank as usize] {
                return Err(CollectiveError::Aborted);
            }
            let missing = |rank: &usize| state.shares[*rank].is_none();
            if let Some(rank) = (0..self.world as usize).find(|rank| state.gone[*rank] && missing(rank)) {
                return Err(CollectiveError::PeerLost { rank: rank as u32, op, reason: "its thread left".into() });
            }
            let elapsed = began.elapsed();
            let Some(left) = self.timeout.checked_sub(elapsed).filter(|left| !left.is_zero()) else {
                let waiting_for = (0..self.world as usize).find(missing).unwrap_or(0) as u32;
                return Err(CollectiveError::Timeout { rank: self.rank, waiting_for, op, elapsed });
            };
            state = self.table.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Arc::clone(&state.full))
    }

    fn compare(&self, ours: Op, all: Arc<Vec<Share>>) -> Result<Arc<Vec<Share>>> {
        match all.iter().position(|(theirs, _)| *theirs != ours) {
            Some(peer) => Err(CollectiveError::Mismatch { rank: self.rank, peer: peer as u32, ours, theirs: all[peer].0 }),
            None => Ok(all),
        }
    }

    fn sum<T: bytemuck::Pod>(&mut self, kind: OpKind, data: &mut [T], add: fn(T, T) -> T) -> Result<()> {
        let all = self.exchange(kind, data.len(), bytemuck::cast_slice(data))?;
        bytemuck::cast_slice_mut(data).copy_from_slice(&all[0].1);
        for (_, bytes) in &all[1..] {
            let each = bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned);
            data.iter_mut().zip(each).for_each(|(sum, x)| *sum = add(*sum, x));
        }
        Ok(())
    }
}

impl Collective for InProcess {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn sum_i64(&mut self, data: &mut [i64]) -> Result<()> {
        self.sum(OpKind::SumI64, data, i64::wrapping_add)
    }

    fn sum_f32(&mut self, data: &mut [f32]) -> Result<()> {
        self.sum(OpKind::SumF32, data, |a, b| a + b)
    }

    fn sum_bf16(&mut self, data: &mut [bf16]) -> Result<()> {
        let add = |a, b| add_bf16(bf16::from_bits(a), bf16::from_bits(b)).to_bits();
        self.sum(OpKind::SumBf16, data.reinterpret_cast_mut(), add)
    }

    fn broadcast(&mut self, root: u32, data: &mut [u8]) -> Result<()> {
        if root >= self.world {
            return Err(CollectiveError::Rank { rank: root, world: self.world });
        }
        let all = self.exchange(OpKind::Broadcast { root }, data.len(), data)?;
        data.copy_from_slice(&all[root as usize].1);
        Ok(())
    }

    fn barrier(&mut self) -> Result<()> {
        self.exchange(OpKind::Barrier, 0, &[]).map(drop)
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn abort_handle(&self) -> AbortHandle {
        let (table, rank) = (Arc::clone(&self.table), self.rank);
        AbortHandle::new(move || {
            table.leave(rank, |state, rank| state.aborted[rank] = true);
            Ok(())
        })
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.table.leave(self.rank, |_, _| ());
    }
}
