//! ORDER over pictures of several sizes: all samples of a step, on every lane, are of one size, so that they stack into one tensor and
//! no rank waits for another's larger pictures.
//!
//! The shards of one size are a *group* with an [`Order`] of its own. An epoch is all steps of all groups, spread evenly: step *i* of
//! the *n* steps of a group lies at time (*i* + *u*) / *n*, where *u* in 0…1 is drawn anew for every group and epoch, and steps are
//! taken in order of time. So a resume is one integer still, and nothing is listed: which step is the *s*-th is found by counting.

use std::ops::Range;

use super::{Order, OrderConfig, OrderError, Position, SampleRef};
use crate::mix;

/// Keeps these keys apart from those of the permutations.
const SPREAD: u64 = 3;
/// The unit of *u*.
const ONE: u128 = 1 << 32;

/// The shards of one size.
#[derive(Debug)]
struct Group {
    order: Order,
    /// Each shard's number in the manifest, and the number of its first row in the data set.
    shards: Vec<(u32, u64)>,
    /// Each shard's rows.
    rows: Vec<u64>,
    /// Steps in an epoch.
    steps: u64,
}

/// The order of a data set's samples, step by step of one picture size.
#[derive(Debug)]
pub struct BucketOrder {
    config: OrderConfig,
    groups: Vec<Group>,
    samples: u64,
    steps: u64,
}

impl BucketOrder {
    /// The order over shards in manifest order, each with its pictures' size (all alike where there is only one) and its rows.
    ///
    /// # Errors
    /// As [`Order::new`].
    pub fn new<S: PartialEq + Copy>(config: OrderConfig, shards: &[(S, u64)]) -> Result<Self, OrderError> {
        let mut sizes: Vec<S> = Vec::new();
        for (size, rows) in shards {
            if *rows > 0 && !sizes.contains(size) {
                sizes.push(*size);
            }
        }
        if sizes.is_empty() {
            return Err(OrderError::Empty { shards: shards.len() });
        }
        let groups = sizes.iter().map(|size| Group::new(config, shards, *size)).collect::<Result<Vec<_>, _>>()?;
        let samples = shards.iter().map(|(_, rows)| rows).sum();
        let steps = groups.iter().map(|group| group.steps).sum();
        Ok(Self { config, groups, samples, steps })
    }

    /// The settings it was made with.
    pub fn config(&self) -> OrderConfig {
        self.config
    }

    /// Samples in the data set, and so in an epoch.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Steps in an epoch: each size's last ones may be short, none is empty.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps
    }

    /// The epoch and the step within it of a global step.
    pub fn position(&self, step: u64) -> Position {
        Position { epoch: step / self.steps, step_in_epoch: step % self.steps }
    }

    /// How many samples a global step has, over all lanes.
    pub fn batch_len(&self, step: u64) -> u64 {
        let (group, step) = self.find(step);
        group.order.batch_len(step)
    }

    /// The samples of one lane in a global step, all of one size: `micro_batch` of them, fewer or none at the end of a size's epoch.
    pub fn lane(&self, step: u64, lane: u32) -> Vec<SampleRef> {
        let (group, step) = self.find(step);
        group.order.lane(step, lane).into_iter().map(|sample| group.in_manifest(sample)).collect()
    }

    /// The shards that a lane may read in these global steps, each once.
    pub fn lane_shards(&self, steps: Range<u64>, lane: u32) -> Vec<u32> {
        let mut shards = Vec::new();
        for ((group, from), to) in self.groups.iter().zip(self.taken(steps.start)).zip(self.taken(steps.end)) {
            let read = group.order.lane_shards(from..to, lane);
            shards.extend(read.into_iter().filter_map(|shard| group.shards.get(shard as usize)).map(|(shard, _)| *shard));
        }
        shards
    }

    /// The sample of a number in manifest order, if there is one.
    pub fn sample_at(&self, index: u64) -> Option<SampleRef> {
        let mut found = self.groups.iter().filter_map(|group| group.sample_at(index));
        found.next()
    }

    /// The windows that a lane is in at a step or will be in next, of every size: the step that first needs each, and its shards.
    pub fn upcoming(&self, step: u64, lane: u32) -> Vec<(u64, Vec<u32>)> {
        let mut windows = Vec::new();
        for (at, (group, own)) in self.groups.iter().zip(self.taken(step)).enumerate() {
            for start in [own, group.order.next_window(own, lane)] {
                let shards = group.order.lane_shards(start..start + 1, lane);
                windows.push((self.global(at, start), shards.into_iter().map(|shard| group.shards[shard as usize].0).collect()));
            }
        }
        windows
    }

    /// The global step of a group's own step.
    fn global(&self, group: usize, own: u64) -> u64 {
        let steps = self.groups[group].steps;
        let (epoch, at) = (own / steps, own % steps);
        epoch * self.steps + self.spread(epoch).rank(group, at)
    }

    /// How many steps each group has taken, over all epochs, before a global step.
    fn taken(&self, step: u64) -> Vec<u64> {
        let Position { epoch, step_in_epoch } = self.position(step);
        let spread = self.spread(epoch);
        let (by, at) = spread.find(step_in_epoch);
        self.groups.iter().enumerate().map(|(group, own)| epoch * own.steps + spread.before(group, by, at)).collect()
    }

    /// The group that takes a global step, and the group's own number of it.
    fn find(&self, step: u64) -> (&Group, u64) {
        let Position { epoch, step_in_epoch } = self.position(step);
        let (group, at) = self.spread(epoch).find(step_in_epoch);
        let group = &self.groups[group];
        (group, epoch * group.steps + at)
    }

    fn spread(&self, epoch: u64) -> Spread {
        let offset = |at: usize| mix::key(&[SPREAD, self.config.seed, epoch, at as u64]) >> 32;
        Spread { groups: self.groups.iter().enumerate().map(|(at, group)| (group.steps, offset(at))).collect() }
    }
}

impl Group {
    fn new<S: PartialEq + Copy>(config: OrderConfig, all: &[(S, u64)], size: S) -> Result<Self, OrderError> {
        let (mut shards, mut rows, mut base) = (Vec::new(), Vec::new(), 0);
        for (number, (own, count)) in all.iter().enumerate() {
            if *own == size {
                let number = u32::try_from(number).map_err(|_| OrderError::TooManyShards { shards: all.len() })?;
                shards.push((number, base));
                rows.push(*count);
            }
            base += count;
        }
        // A lane of its own key in every group would be possible; equal keys do no harm, as groups share no row.
        let order = Order::new(config, &rows)?;
        let steps = order.steps_per_epoch();
        Ok(Self { order, shards, rows, steps })
    }

    fn sample_at(&self, index: u64) -> Option<SampleRef> {
        let last = self.shards.partition_point(|(_, base)| *base <= index).checked_sub(1)?;
        // Shards without rows begin where the next one does.
        let (shard, base) = self.shards[last];
        let row = u32::try_from(index - base).ok().filter(|row| u64::from(*row) < self.rows[last])?;
        Some(SampleRef { shard, row, index })
    }

    fn in_manifest(&self, sample: SampleRef) -> SampleRef {
        let (shard, base) = self.shards[sample.shard as usize];
        SampleRef { shard, row: sample.row, index: base + u64::from(sample.row) }
    }
}

/// How one epoch's steps are spread over time: steps and offset *u* of every group.
struct Spread {
    groups: Vec<(u64, u64)>,
}

impl Spread {
    /// The group of the epoch's step `step`, and which of the group's own steps it is.
    fn find(&self, step: u64) -> (usize, u64) {
        // Each group's steps lie evenly: before any time each has taken its share of all, but for one step.
        let (total, away) = (self.groups.iter().map(|(steps, _)| u128::from(*steps)).sum::<u128>().max(1), self.groups.len() as u64);
        for (group, (steps, _)) in self.groups.iter().enumerate() {
            let share = |step: u64| (u128::from(step) * u128::from(*steps) / total) as u64;
            let (mut low, mut high) = (share(step.saturating_sub(away)).saturating_sub(1), (share(step + away) + 2).min(*steps));
            while low < high {
                let middle = low + (high - low) / 2;
                if self.rank(group, middle) < step { low = middle + 1 } else { high = middle }
            }
            if low < *steps && self.rank(group, low) == step {
                return (group, low);
            }
        }
        (0, 0)
    }

    /// How many of the epoch's steps come before step `at` of a group.
    fn rank(&self, group: usize, at: u64) -> u64 {
        (0..self.groups.len()).map(|other| self.before(other, group, at)).sum()
    }

    /// How many steps of `other` come before step `at` of `group`. At equal times the group of the lower number is first.
    fn before(&self, other: usize, group: usize, at: u64) -> u64 {
        if other == group {
            return at;
        }
        let ((own_steps, own_offset), (steps, offset)) = (self.groups[group], self.groups[other]);
        // (i + u') / n' < (at + u) / n, in units of u: i ONE + u' < (at ONE + u) n' / n.
        let time = (u128::from(at) * ONE + u128::from(own_offset)) * u128::from(steps);
        let own_steps = u128::from(own_steps);
        let last = if other < group { Some(time / own_steps) } else { time.div_ceil(own_steps).checked_sub(1) };
        let count = last.and_then(|last| last.checked_sub(u128::from(offset))).map_or(0, |room| room / ONE + 1);
        u64::try_from(count).unwrap_or(u64::MAX).min(steps)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(lanes: u32, micro_batch: u32, window: u32) -> OrderConfig {
        OrderConfig { seed: 11, lanes, micro_batch, window }
    }

    proptest! {
        /// ONCE, and one size a step: whatever the sizes, an epoch has every sample once.
        #[test]
        fn an_epoch_has_every_sample_once_and_a_step_one_size(
            shards in prop::collection::vec((0u8..5, 0u64..40), 1..30),
            lanes in 1u32..5, micro_batch in 1u32..5, window in 1u32..4, epoch in 0u64..3,
        ) {
            let total: u64 = shards.iter().map(|(_, rows)| rows).sum();
            prop_assume!(total > 0);
            let order = BucketOrder::new(config(lanes, micro_batch, window), &shards).unwrap();
            let mut seen = vec![false; total as usize];
            for step in epoch * order.steps_per_epoch()..(epoch + 1) * order.steps_per_epoch() {
                prop_assert_eq!(order.position(step).epoch, epoch);
                let samples: Vec<_> = (0..lanes).flat_map(|lane| order.lane(step, lane)).collect();
                prop_assert_eq!(samples.len() as u64, order.batch_len(step));
                prop_assert!(!samples.is_empty());
                let size = shards[samples[0].shard as usize].0;
                for sample in samples {
                    let before: u64 = shards[..sample.shard as usize].iter().map(|(_, rows)| rows).sum();
                    prop_assert_eq!(sample.index, before + u64::from(sample.row));
                    prop_assert!(u64::from(sample.row) < shards[sample.shard as usize].1);
                    prop_assert_eq!(shards[sample.shard as usize].0, size);
                    prop_assert!(!std::mem::replace(&mut seen[sample.index as usize], true), "twice");
                }
            }
            prop_assert!(seen.iter().all(|seen| *seen));
        }

        /// Every sample is found by its number, and what a step reads was among the windows that were upcoming.
        #[test]
        fn samples_are_found_by_number_and_windows_are_upcoming(
            shards in prop::collection::vec((0u8..3, 0u64..9), 1..20), step in 0u64..60, lane in 0u32..3,
        ) {
            let total: u64 = shards.iter().map(|(_, rows)| rows).sum();
            prop_assume!(total > 0);
            let order = BucketOrder::new(config(3, 2, 2), &shards).unwrap();
            let mut index = 0;
            for (shard, (_, rows)) in (0..).zip(&shards) {
                for row in 0..*rows as u32 {
                    prop_assert_eq!(order.sample_at(index), Some(SampleRef { shard, row, index }));
                    index += 1;
                }
            }
            prop_assert_eq!(order.sample_at(total), None);
            let upcoming = order.upcoming(step, lane);
            let read = order.lane(step, lane);
            prop_assert!(upcoming.iter().all(|(at, _)| *at >= step));
            prop_assert!(read.iter().all(|sample| upcoming.iter().any(|(_, shards)| shards.contains(&sample.shard))));
        }

        /// What a lane reads in some steps is among the shards named for them.
        #[test]
        fn the_shards_of_a_range_cover_what_is_read(
            shards in prop::collection::vec((0u8..3, 1u64..9), 1..20), from in 0u64..40, count in 0u64..20, lane in 0u32..3,
        ) {
            let order = BucketOrder::new(config(3, 2, 2), &shards).unwrap();
            let named = order.lane_shards(from..from + count, lane);
            for step in from..from + count {
                prop_assert!(order.lane(step, lane).iter().all(|sample| named.contains(&sample.shard)));
            }
        }
    }

    #[test]
    fn each_step_is_found_however_unlike_the_numbers_of_steps_are() {
        let spread = Spread { groups: vec![(1, 5), (3_000_000, ONE as u64 - 1), (7, 0), (5_000, 77), (100, 1 << 31), (1, 0)] };
        for (group, (steps, _)) in spread.groups.iter().enumerate() {
            for at in [0, 1, steps / 3, steps / 2, steps - 1].into_iter().filter(|at| at < steps) {
                assert_eq!(spread.find(spread.rank(group, at)), (group, at));
            }
        }
    }

    #[test]
    fn with_one_size_it_is_the_plain_order() {
        let rows = [5, 0, 7, 3, 9];
        let plain = Order::new(config(2, 3, 2), &rows).unwrap();
        let buckets = BucketOrder::new(config(2, 3, 2), &rows.map(|rows| ((), rows))).unwrap();
        assert_eq!(plain.steps_per_epoch(), buckets.steps_per_epoch());
        for step in 0..3 * plain.steps_per_epoch() {
            for lane in 0..2 {
                assert_eq!(plain.lane(step, lane), buckets.lane(step, lane));
            }
        }
    }

    #[test]
    fn sizes_are_spread_evenly_over_an_epoch_and_otherwise_in_the_next() {
        let shards = [(0, 1000), (1, 100), (2, 10)];
        let order = BucketOrder::new(config(1, 1, 1), &shards).unwrap();
        let sizes = |epoch: u64| -> Vec<i32> {
            (epoch * 1110..(epoch + 1) * 1110).map(|step| shards[order.lane(step, 0)[0].shard as usize].0).collect()
        };
        let first = sizes(0);
        for (size, rows) in shards {
            for end in [111, 555, 999] {
                let share = first[..end].iter().filter(|s| **s == size).count() as f64;
                let even = rows as f64 * end as f64 / 1110.0;
                assert!((share - even).abs() <= 3.0, "size {size}: {share} of the first {end}, {even} would be even");
            }
        }
        assert_ne!(first, sizes(1));
    }

    #[test]
    fn a_data_set_without_rows_has_no_order() {
        assert_eq!(BucketOrder::new(config(1, 1, 1), &[(0, 0), (1, 0)]).unwrap_err(), OrderError::Empty { shards: 2 });
    }
}
