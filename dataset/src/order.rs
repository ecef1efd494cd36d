//! ORDER: which samples make up global step *s*, as a pure function of (seed, manifest, *s*).
//!
//! Every epoch permutes the shards; the rows of the permuted shards, end to end, are cut into one equal segment per
//! lane; within a segment rows are permuted inside windows of consecutive shards. Step *s* takes the next `micro_batch`
//! samples of every lane. So a lane has at most `window` shards open at a time, a resume is one integer, and which rank
//! runs which lane is of no account. Both permutations are `Permutation`s: no list of samples exists anywhere; the
//! only tables are the shards' prefix sums.

mod buckets;
mod permutation;

use std::{
    collections::HashSet,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

pub use buckets::BucketOrder;
use permutation::Permutation;

use crate::mix;

/// Keeps the keys of the two kinds of permutation apart.
const SHARDS: u64 = 1;
const ROWS: u64 = 2;

/// What the order depends on besides the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrderConfig {
    /// The run's seed.
    pub seed: u64,
    /// The parts of a global batch: `global_batch / micro_batch`.
    pub lanes: u32,
    /// Samples that a lane takes in a step.
    pub micro_batch: u32,
    /// How many consecutive shards of the permuted sequence are shuffled together.
    pub window: u32,
}

/// Why no order can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// A setting that must be positive is zero.
    #[error("order: {field} is 0 (expected at least 1)")]
    Zero {
        /// Which setting.
        field: &'static str,
    },
    /// There is nothing to order.
    #[error("order: the data set has no sample (in {shards} shards); prepare one that has")]
    Empty {
        /// How many shards, all without rows.
        shards: usize,
    },
    /// A shard has more rows than 32 bits can number.
    #[error("order: shard {shard} has {rows} rows (expected at most {max}); prepare with smaller shards", max = u32::MAX)]
    ShardTooLarge {
        /// Which shard, in manifest order.
        shard: usize,
        /// Its rows.
        rows: u64,
    },
    /// There are more shards than 32 bits can number.
    #[error("order: {shards} shards (expected at most {max}); prepare with larger shards", max = u32::MAX)]
    TooManyShards {
        /// How many.
        shards: usize,
    },
}

/// About how many of a data set's bytes are in `shards` shards the lanes of one worker read from at a time: those of each lane's window, and one
/// that is read ahead. What a cache holds at least, lest it fetches the same again and again.
pub fn open_bytes(bytes: u64, shards: usize, lanes: usize, window: usize) -> u64 {
    let open = lanes.saturating_mul(window.saturating_add(1)).min(shards);
    u64::try_from(u128::from(bytes) * open as u128 / shards.max(1) as u128).unwrap_or(u64::MAX)
}

/// Where a global step lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The epoch, from 0.
    pub epoch: u64,
    /// The step within the epoch, from 0.
    pub step_in_epoch: u64,
}

/// One sample of the data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SampleRef {
    /// The shard, in manifest order.
    pub shard: u32,
    /// The row within the shard.
    pub row: u32,
    /// The row within the whole data set, in manifest order.
    pub index: u64,
}

/// The order of a data set's samples.
#[derive(Debug)]
pub struct Order {
    config: OrderConfig,
    /// First global row of every shard in manifest order, then the number of all rows.
    bases: Vec<u64>,
    /// The epochs in use: prefetching looks over an epoch's end while steps still finish it.
    epochs: Mutex<[Option<Arc<Epoch>>; 2]>,
}

/// The permuted shards of one epoch.
#[derive(Debug)]
struct Epoch {
    number: u64,
    /// The shards in the order of this epoch.
    shards: Vec<u32>,
    /// First position of every one of them in the epoch's sequence, then the number of all rows.
    starts: Vec<u64>,
}

/// Shards of a lane that are shuffled together.
struct Window {
    /// Within the lane, from 0.
    index: u64,
    /// Positions in the epoch's shard order.
    shards: Range<usize>,
    /// Positions in the epoch's sequence that belong to the lane.
    rows: Range<u64>,
}

impl Order {
    /// The order over shards of so many rows, which are given in manifest order.
    ///
    /// # Errors
    /// [`OrderError`] for a zero setting, a data set without samples, or counts beyond 32 bits.
    pub fn new(config: OrderConfig, shard_rows: &[u64]) -> Result<Self, OrderError> {
        let settings = [("lanes", config.lanes), ("micro_batch", config.micro_batch), ("window", config.window)];
        if let Some((field, _)) = settings.into_iter().find(|(_, value)| *value == 0) {
            return Err(OrderError::Zero { field });
        }
        let shards = shard_rows.len();
        if u32::try_from(shards).is_err() {
            return Err(OrderError::TooManyShards { shards });
        }
        let too_large = |rows: &u64| u32::try_from(*rows).is_err();
        if let Some(shard) = shard_rows.iter().position(too_large) {
            return Err(OrderError::ShardTooLarge { shard, rows: shard_rows[shard] });
        }
        let bases = prefix_sums(shard_rows.iter().copied());
        if bases[shards] == 0 {
            return Err(OrderError::Empty { shards });
        }
        Ok(Self { config, bases, epochs: Mutex::new([None, None]) })
    }

    /// The settings it was made with.
    pub fn config(&self) -> OrderConfig {
        self.config
    }

    /// Samples in the data set, and so in an epoch.
    pub fn samples(&self) -> u64 {
        self.bases[self.bases.len() - 1]
    }

    /// Steps in an epoch: the last ones may be short, none is empty.
    pub fn steps_per_epoch(&self) -> u64 {
        self.samples().div_ceil(self.lanes()).div_ceil(self.micro_batch())
    }

    /// The epoch and the step within it of a global step.
    pub fn position(&self, step: u64) -> Position {
        let steps = self.steps_per_epoch();
        Position { epoch: step / steps, step_in_epoch: step % steps }
    }

    /// How many samples a global step has, over all lanes.
    pub fn batch_len(&self, step: u64) -> u64 {
        let done = self.position(step).step_in_epoch * self.micro_batch();
        let taken = |segment: u64| segment.saturating_sub(done).min(self.micro_batch());
        let (short, longer) = (self.samples() / self.lanes(), self.samples() % self.lanes());
        (self.lanes() - longer) * taken(short) + longer * taken(short + 1)
    }

    /// The sample of a number in manifest order, if there is one.
    pub fn sample_at(&self, index: u64) -> Option<SampleRef> {
        if index >= self.samples() {
            return None;
        }
        let shard = last_start(&self.bases, index);
        Some(SampleRef { shard: shard as u32, row: (index - self.bases[shard]) as u32, index })
    }

    /// The samples of one lane in a global step: `micro_batch` of them, fewer at the epoch's end, where a lane may
    /// have none. A lane that does not exist has none either.
    pub fn lane(&self, step: u64, lane: u32) -> Vec<SampleRef> {
        let Position { epoch, step_in_epoch } = self.position(step);
        let (epoch, segment) = (self.epoch(epoch), self.segment(lane));
        let start = segment.start + step_in_epoch * self.micro_batch();
        let end = segment.end.min(start + self.micro_batch());
        let mut samples = Vec::with_capacity(end.saturating_sub(start) as usize);
        let mut next = start;
        while next < end {
            let window = epoch.window(&segment, self.config.window, next);
            let key = mix::key(&[ROWS, self.config.seed, epoch.number, u64::from(lane), window.index]);
            let rows = Permutation::new(key, window.rows.end - window.rows.start);
            let stop = end.min(window.rows.end);
            samples.extend((next..stop).map(|position| {
                let row = window.rows.start + rows.apply(position - window.rows.start);
                self.sample(&epoch, &window, row)
            }));
            next = stop;
        }
        samples
    }

    /// The samples of a global step, lane by lane.
    pub fn global(&self, step: u64) -> Vec<Vec<SampleRef>> {
        (0..self.config.lanes).map(|lane| self.lane(step, lane)).collect()
    }

    /// The shards that a lane may read in these global steps, each once, in the order in which their windows open.
    /// A window's shards are all named: its rows are drawn from all of them.
    pub fn lane_shards(&self, steps: Range<u64>, lane: u32) -> Vec<u32> {
        let (segment, mut seen, mut shards) = (self.segment(lane), HashSet::new(), Vec::new());
        let mut step = steps.start;
        while step < steps.end {
            let Position { epoch, step_in_epoch } = self.position(step);
            let epoch = self.epoch(epoch);
            let count = (steps.end - step).min(self.steps_per_epoch() - step_in_epoch);
            let mut next = segment.start + step_in_epoch * self.micro_batch();
            let end = segment.end.min(next + count * self.micro_batch());
            while next < end {
                let window = epoch.window(&segment, self.config.window, next);
                let read = window.shards.filter(|at| epoch.starts[*at] < epoch.starts[*at + 1]);
                shards.extend(read.map(|at| epoch.shards[at]).filter(|shard| seen.insert(*shard)));
                next = window.rows.end;
            }
            step += count;
        }
        shards
    }

    /// The first later step at which a lane reads from another window than it begins this step in.
    pub fn next_window(&self, step: u64, lane: u32) -> u64 {
        let Position { epoch, step_in_epoch } = self.position(step);
        let (epoch_end, segment) = (step - step_in_epoch + self.steps_per_epoch(), self.segment(lane));
        let start = segment.start + step_in_epoch * self.micro_batch();
        if start >= segment.end {
            return epoch_end;
        }
        let window = self.epoch(epoch).window(&segment, self.config.window, start);
        if window.rows.end == segment.end {
            return epoch_end;
        }
        // The step that takes the next window's first row, which may be this very step.
        let reached = step - step_in_epoch + (window.rows.end - segment.start) / self.micro_batch();
        reached.max(step + 1)
    }

    fn lanes(&self) -> u64 {
        u64::from(self.config.lanes)
    }

    fn micro_batch(&self) -> u64 {
        u64::from(self.config.micro_batch)
    }

    /// The part of an epoch's sequence that a lane takes: empty beyond the last lane.
    fn segment(&self, lane: u32) -> Range<u64> {
        let cut = |lane: u64| {
            let share = u128::from(lane.min(self.lanes())) * u128::from(self.samples());
            (share / u128::from(self.lanes())) as u64
        };
        cut(u64::from(lane))..cut(u64::from(lane) + 1)
    }

    /// The shard order of an epoch, made at its first use.
    fn epoch(&self, number: u64) -> Arc<Epoch> {
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(epoch) = epochs.iter().flatten().find(|epoch| epoch.number == number) {
            return Arc::clone(epoch);
        }
        let epoch = Arc::new(self.make_epoch(number));
        epochs.swap(0, 1);
        epochs[0] = Some(Arc::clone(&epoch));
        epoch
    }

    fn make_epoch(&self, number: u64) -> Epoch {
        let count = self.bases.len() as u64 - 1;
        let order = Permutation::new(mix::key(&[SHARDS, self.config.seed, number]), count);
        let shards: Vec<u32> = (0..count).map(|at| order.apply(at) as u32).collect();
        let rows = shards.iter().map(|shard| self.bases[*shard as usize + 1] - self.bases[*shard as usize]);
        Epoch { number, starts: prefix_sums(rows), shards }
    }

    fn sample(&self, epoch: &Epoch, window: &Window, position: u64) -> SampleRef {
        let at = window.shards.start + last_start(&epoch.starts[window.shards.clone()], position);
        let (shard, row) = (epoch.shards[at], position - epoch.starts[at]);
        SampleRef { shard, row: row as u32, index: self.bases[shard as usize] + row }
    }
}

impl Epoch {
    /// The window of a lane's `segment` around `position`. A lane's windows are counted from its first shard.
    fn window(&self, segment: &Range<u64>, width: u32, position: u64) -> Window {
        let (count, width) = (self.shards.len(), width as usize);
        let starts = &self.starts[..count];
        let first = last_start(starts, segment.start);
        let index = (last_start(starts, position) - first) / width;
        let shards = first + index * width..count.min(first + (index + 1) * width);
        let rows = segment.start.max(self.starts[shards.start])..segment.end.min(self.starts[shards.end]);
        Window { index: index as u64, shards, rows }
    }
}

/// The shard that holds `position`: the last one that starts at or before it, so one without rows is never it.
fn last_start(starts: &[u64], position: u64) -> usize {
    starts.partition_point(|start| *start <= position).saturating_sub(1)
}

/// 0, then the sums of the first 1, 2, … counts. Below 2^32 counts below 2^32 cannot overflow.
fn prefix_sums(counts: impl Iterator<Item = u64>) -> Vec<u64> {
    let sums = counts.scan(0, |sum, count| {
        *sum += count;
        Some(*sum)
    });
    std::iter::once(0).chain(sums).collect()
}

#[cfg(test)]
mod tests;
