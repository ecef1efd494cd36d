use std::{collections::HashSet, time::Instant};

use proptest::prelude::*;

use super::*;

fn config(seed: u64, lanes: u32, micro_batch: u32, window: u32) -> OrderConfig {
    OrderConfig { seed, lanes, micro_batch, window }
}

fn order(config: OrderConfig, rows: &[u64]) -> Order {
    Order::new(config, rows).unwrap()
}

/// One lane's samples of one epoch, in order.
fn lane_epoch(order: &Order, epoch: u64, lane: u32) -> Vec<SampleRef> {
    let steps = order.steps_per_epoch();
    (epoch * steps..(epoch + 1) * steps).flat_map(|step| order.lane(step, lane)).collect()
}

fn epoch_indices(order: &Order, epoch: u64) -> Vec<u64> {
    (0..order.config.lanes).flat_map(|lane| lane_epoch(order, epoch, lane)).map(|sample| sample.index).collect()
}

prop_compose! {
    fn any_order()(
        seed: u64,
        lanes in 1_u32..9,
        micro_batch in 1_u32..7,
        window in 1_u32..6,
        rows in prop::collection::vec(0_u64..25, 1..14).prop_filter("a sample", |rows| rows.iter().sum::<u64>() > 0),
    ) -> (OrderConfig, Vec<u64>) {
        (config(seed, lanes, micro_batch, window), rows)
    }
}

proptest! {
    #[test]
    fn an_epoch_uses_every_sample_once((config, rows) in any_order(), epoch in 0_u64..4) {
        let order = order(config, &rows);
        let mut used = epoch_indices(&order, epoch);
        used.sort_unstable();
        prop_assert_eq!(used, (0..rows.iter().sum()).collect::<Vec<u64>>());
    }

    #[test]
    fn a_sample_names_its_row_three_ways((config, rows) in any_order(), step in 0_u64..50) {
        let order = order(config, &rows);
        prop_assert_eq!(order.sample_at(order.samples()), None);
        for sample in order.global(step).concat() {
            let before: u64 = rows[..sample.shard as usize].iter().sum();
            prop_assert!(u64::from(sample.row) < rows[sample.shard as usize]);
            prop_assert_eq!(sample.index, before + u64::from(sample.row));
            prop_assert_eq!(order.sample_at(sample.index), Some(sample));
        }
    }

    #[test]
    fn batch_len_counts_the_step_and_no_step_is_empty((config, rows) in any_order(), step in 0_u64..200) {
        let order = order(config, &rows);
        let lanes = order.global(step);
        prop_assert_eq!(order.batch_len(step), lanes.iter().map(Vec::len).sum::<usize>() as u64);
        prop_assert!(order.batch_len(step) > 0);
        prop_assert!(lanes.iter().all(|lane| lane.len() <= config.micro_batch as usize));
    }

    /// A step asked for alone, on a fresh order, in any turn, equals the same step of a run through: resume is one
    /// integer; and lanes asked for one by one, in any dealing to ranks, are the global step.
    #[test]
    fn a_resume_or_another_dealing_changes_nothing((config, rows) in any_order(), steps in prop::collection::vec(0_u64..120, 1..6)) {
        let through = order(config, &rows);
        let all: Vec<_> = (0..120).map(|step| through.global(step)).collect();
        for step in steps {
            let resumed = order(config, &rows);
            let mut lanes: Vec<_> = (0..config.lanes).rev().map(|lane| resumed.lane(step, lane)).collect();
            lanes.reverse();
            prop_assert_eq!(&lanes, &all[step as usize]);
        }
    }

    /// A lane stays in its segment of the permuted shards, with at most `window` shards open, opened in order.
    #[test]
    fn lanes_and_windows_bound_what_is_open((config, rows) in any_order(), epoch in 0_u64..3) {
        let order = order(config, &rows);
        let plan = order.make_epoch(epoch);
        for lane in 0..config.lanes {
            let segment = order.segment(lane);
            let samples = lane_epoch(&order, epoch, lane);
            prop_assert_eq!(samples.len() as u64, segment.end - segment.start);
            let first = last_start(&plan.starts[..rows.len()], segment.start);
            let mut window = 0;
            for sample in samples {
                let at = plan.shards.iter().position(|shard| *shard == sample.shard).unwrap();
                let position = plan.starts[at] + u64::from(sample.row);
                prop_assert!(segment.contains(&position), "row of another lane");
                let its = (at - first) / config.window as usize;
                prop_assert!(its >= window, "an earlier window was opened again");
                window = its;
            }
        }
    }

    #[test]
    fn lane_shards_names_what_is_read((config, rows) in any_order(), start in 0_u64..60, count in 0_u64..20) {
        let order = order(config, &rows);
        for lane in 0..config.lanes {
            let named = order.lane_shards(start..start + count, lane);
            let set: HashSet<u32> = named.iter().copied().collect();
            prop_assert_eq!(set.len(), named.len());
            prop_assert!(named.iter().all(|shard| rows[*shard as usize] > 0));
            let read: HashSet<u32> = (start..start + count).flat_map(|step| order.lane(step, lane)).map(|s| s.shard).collect();
            prop_assert!(read.is_subset(&set));
        }
        let epoch = 0..order.steps_per_epoch();
        let all: HashSet<u32> = (0..config.lanes).flat_map(|lane| order.lane_shards(epoch.clone(), lane)).collect();
        prop_assert_eq!(all.len(), rows.iter().filter(|rows| **rows > 0).count());
    }

    /// Until its next window a lane needs no shard beyond its window's; then it does, or another epoch begins.
    #[test]
    fn the_next_window_is_where_other_shards_begin((config, rows) in any_order(), step in 0_u64..60) {
        let order = order(config, &rows);
        for lane in 0..config.lanes {
            let next = order.next_window(step, lane);
            let epoch_ends = order.position(step).epoch < order.position(next).epoch;
            prop_assert!(next > step && (!epoch_ends || order.position(next).step_in_epoch == 0));
            let through: HashSet<u32> = order.lane_shards(step..next, lane).into_iter().collect();
            let own: HashSet<u32> = order.lane_shards(step..step + 1, lane).into_iter().collect();
            prop_assert_eq!(&through, &own, "no other shards before it");
            let then: HashSet<u32> = order.lane_shards(next..next + 1, lane).into_iter().collect();
            prop_assert!(epoch_ends || next == step + 1 || !then.is_subset(&own));
        }
    }

    #[test]
    fn segments_differ_by_at_most_one((config, rows) in any_order()) {
        let order = order(config, &rows);
        let lengths: Vec<u64> = (0..config.lanes).map(|lane| order.segment(lane)).map(|s| s.end - s.start).collect();
        prop_assert!(lengths.iter().max().unwrap() - lengths.iter().min().unwrap() <= 1);
        prop_assert_eq!(lengths.iter().sum::<u64>(), order.samples());
    }
}

#[test]
fn epochs_seeds_and_lanes_differ() {
    let rows = [40; 10];
    let first = order(config(1, 4, 8, 4), &rows);
    let zero = epoch_indices(&first, 0);
    assert_ne!(zero, epoch_indices(&first, 1));
    assert_ne!(zero, epoch_indices(&order(config(2, 4, 8, 4), &rows), 0));
    // With one shard both lanes hold equally long segments of it, yet draw their rows differently.
    let one = order(config(1, 2, 50, 1), &[100]);
    let rows: Vec<Vec<u32>> = one.global(0).iter().map(|lane| lane.iter().map(|s| s.row % 50).collect()).collect();
    assert_ne!(rows[0], rows[1]);
}

/// The order is part of what a run is: whoever changes it changes every run that is to be resumed.
#[test]
fn the_sequence_is_pinned() {
    let order = order(config(7, 2, 4, 2), &[5, 0, 3, 9, 2]);
    let steps: Vec<Vec<Vec<u64>>> =
        (0..6).map(|step| order.global(step).iter().map(|lane| lane.iter().map(|s| s.index).collect()).collect()).collect();
    assert_eq!(order.steps_per_epoch(), 3);
    assert_eq!(steps, PINNED);
    let big = super::Order::new(config(0x5eed, 64, 8, 16), &vec![9_973; 1000]).unwrap();
    let mut hash = blake3::Hasher::new();
    for step in [0, 1, 999, big.steps_per_epoch() - 1, big.steps_per_epoch(), 1_000_000] {
        big.global(step).concat().iter().for_each(|sample| {
            hash.update(&sample.index.to_le_bytes());
        });
    }
    assert_eq!(hash.finalize().to_hex().as_str(), PINNED_DIGEST);
}

const PINNED_DIGEST: &str = "be3b3b3c169c3eb924d17eb6aac057fd105bfca63615adf6603c3f714c63d287";
const PINNED: &[&[&[u64]]] = &[
    &[&[9, 11, 4, 8], &[12, 16, 5, 15]],
    &[&[2, 3, 0, 10], &[6, 7, 14, 13]],
    &[&[1], &[17, 18]],
    &[&[17, 1, 2, 0], &[11, 15, 7, 13]],
    &[&[4, 18, 3, 6], &[16, 12, 9, 10]],
    &[&[5], &[8, 14]],
];

#[test]
fn one_sample_and_more_lanes_than_samples_work() {
    let one = order(config(3, 8, 4, 2), &[0, 1, 0]);
    assert_eq!((one.samples(), one.steps_per_epoch(), one.batch_len(5)), (1, 1, 1));
    assert_eq!(one.global(5).concat(), [SampleRef { shard: 1, row: 0, index: 0 }]);
    assert_eq!(one.position(5), Position { epoch: 5, step_in_epoch: 0 });
    assert_eq!(one.lane_shards(0..9, 7), [1]);
    let few = order(config(3, 8, 4, 2), &[2, 1]);
    assert_eq!(few.steps_per_epoch(), 1);
    assert_eq!(few.global(0).iter().filter(|lane| lane.is_empty()).count(), 5);
}

#[test]
fn a_lane_beyond_the_last_has_nothing() {
    let order = order(config(3, 2, 4, 2), &[10, 10]);
    assert!(order.lane(0, 2).is_empty() && order.lane(0, u32::MAX).is_empty());
    assert!(order.lane_shards(0..3, 2).is_empty());
}

#[test]
fn what_cannot_be_ordered_is_refused_by_name() {
    let refuse = |config, rows: &[u64]| Order::new(config, rows).unwrap_err();
    assert_eq!(refuse(config(1, 0, 1, 1), &[1]), OrderError::Zero { field: "lanes" });
    assert_eq!(refuse(config(1, 1, 0, 1), &[1]), OrderError::Zero { field: "micro_batch" });
    assert_eq!(refuse(config(1, 1, 1, 0), &[1]), OrderError::Zero { field: "window" });
    assert_eq!(refuse(config(1, 1, 1, 1), &[]), OrderError::Empty { shards: 0 });
    assert_eq!(refuse(config(1, 1, 1, 1), &[0, 0]), OrderError::Empty { shards: 2 });
    let rows = u64::from(u32::MAX) + 1;
    assert_eq!(refuse(config(1, 1, 1, 1), &[1, rows]), OrderError::ShardTooLarge { shard: 1, rows });
}

#[test]
fn a_billion_samples_in_a_hundred_thousand_shards_are_no_burden() {
    let rows: Vec<u64> = (0..100_000).map(|shard| 10_000 + shard % 3 - 1).collect();
    let start = Instant::now();
    let order = order(config(11, 256, 32, 16), &rows);
    let first = order.global(0);
    let made = start.elapsed();
    let start = Instant::now();
    let steps = 100_u64;
    let seen: u64 = (0..steps).map(|step| order.global(step * 977).concat().len() as u64).sum();
    println!("first step {made:?}; then {} ns a sample", start.elapsed().as_nanos() as u64 / seen);
    assert_eq!(seen, steps * 256 * 32);
    assert_eq!(first.concat().iter().map(|s| s.index).collect::<HashSet<_>>().len(), 256 * 32);
    assert_eq!(order.lane_shards(0..1, 17).len(), 16);
    // The far end, and the next epoch.
    let last = order.steps_per_epoch() - 1;
    assert_eq!(order.global(last).concat().len() as u64, order.batch_len(last));
    assert_eq!(order.position(last + 1), Position { epoch: 1, step_in_epoch: 0 });
}
