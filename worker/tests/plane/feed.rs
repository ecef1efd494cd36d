//! ORDER, ONCE and NOISE as the feed keeps them; and that it does not matter where features and latents come from.

use crate::world::{EPOCH, LANES, RUNTIME, SCENES, config, difference, fed, gpu, open, order, parts, parts_on};
use ella_dataset::ledger::{KeyHash, Tally};
use ella_worker::feed::{FeedError, LaneInput, Sources, StepInput, lanes_of};
use ella_worker::noise::{SampleNoise, Stream};
use ella_worker::train::lane::LaneBatch;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

fn tensors(batch: &LaneBatch) -> Vec<Tensor> {
    let LaneBatch { latents, noise, timesteps, features, mask, time_ids } = batch;
    let each = [latents, noise, timesteps, features, time_ids].into_iter().chain(mask.as_ref());
    each.map(Tensor::shallow_clone).collect()
}

pub(crate) fn same(a: &LaneBatch, b: &LaneBatch) -> bool {
    tensors(a).iter().zip(tensors(b)).all(|(a, b)| *a == b)
}

fn batch(input: &LaneInput) -> &LaneBatch {
    input.batch.as_ref().unwrap()
}

#[test]
fn every_lane_gets_the_samples_of_the_order_and_an_epoch_each_sample_once() {
    let config = config(&[]);
    let (order, keys) = order(&config);
    assert_eq!(order.steps_per_epoch(), EPOCH);
    let mut feed = fed(&config, 0..LANES, 0..2 * EPOCH + 1);
    assert_eq!(feed.samples_per_epoch(), SCENES);
    let mut epochs = BTreeMap::<u64, Tally>::new();
    for step in 0..2 * EPOCH + 1 {
        let input = feed.next_step().unwrap();
        assert_eq!((input.epoch, input.step_samples), (step / EPOCH, order.batch_len(step)));
        for lane in &input.lanes {
            let expected = order.lane(step, lane.lane);
            let mut tally = Tally::default();
            expected.iter().for_each(|at| tally.add(KeyHash::of(&keys[at.index as usize])));
            assert_eq!(lane.tally, tally, "step {step}, lane {}", lane.lane);
            assert_eq!(lane.batch.as_ref().map_or(0, LaneBatch::len), expected.len() as i64);
            assert!(lane.batch.as_ref().is_none_or(|batch| !batch.is_empty()));
            epochs.entry(input.epoch).or_default().merge(&lane.tally);
        }
        if step % EPOCH == EPOCH - 1 {
            let mut last: Vec<u64> = input.lanes.iter().map(|lane| lane.tally.samples).collect();
            last.sort();
            assert_eq!(last, [0, 1, 1, 1]);
        }
    }
    assert_eq!(epochs[&0], epochs[&1]);
    assert_eq!(epochs[&0].samples, SCENES);
}

/// SAME begins here: a lane's tensors are the same bits whoever computes it, and wherever a resume begins.
#[test]
fn a_lanes_input_does_not_depend_on_how_lanes_are_dealt_nor_on_where_a_run_resumes() {
    let config = config(&["train.eval_every=3", "train.eval_samples=5"]);
    let steps = 0..EPOCH + 2;
    let whole: Vec<StepInput> = collect(&config, 0..LANES, steps.clone());
    for world in [2, 4] {
        let mut held_out = 0;
        for rank in 0..world {
            let lanes = lanes_of(rank, world, LANES);
            for (step, input) in (2..).zip(collect(&config, lanes, 2..steps.end)) {
                for lane in &input.lanes {
                    let other = &whole[step].lanes[lane.lane as usize];
                    assert_eq!((lane.tally, lane.dropped), (other.tally, other.dropped));
                    assert!(lane.batch.iter().zip(&other.batch).all(|(a, b)| same(a, b)), "step {step}, lane {}", lane.lane);
                }
                held_out += input.held_out.iter().map(LaneBatch::len).sum::<i64>();
            }
        }
        assert_eq!(held_out, 10, "five samples each before steps 4 and 7, whatever the world");
    }
}

/// Whoever had other lanes before, and made their samples ahead, has the new ones' next, and nothing of the old.
#[test]
fn lanes_that_are_dealt_anew_are_fed_from_the_step_that_is_asked_for() {
    let config = config(&["train.eval_every=3", "train.eval_samples=5"]);
    let whole = collect(&config, 0..LANES, 0..EPOCH);
    let mut feed = fed(&config, 0..1, 0..EPOCH);
    let mut taken = 0;
    for (lanes, first, take) in [(0..2, 0, 2), (1..LANES, 2, 0), (0..LANES, 2, 1), (2..3, 2, 3), (3..LANES, 5, 1)] {
        feed.deal(lanes.clone(), first);
        for (step, expected) in (first..).zip(&whole[first as usize..]).take(take) {
            let input = feed.next_step().unwrap();
            assert_eq!(input.lanes.iter().map(|lane| lane.lane).collect::<Vec<_>>(), lanes.clone().collect::<Vec<_>>());
            for lane in &input.lanes {
                let other = &expected.lanes[lane.lane as usize];
                assert_eq!(lane.tally, other.tally, "step {step}, lane {}", lane.lane);
                assert!(lane.batch.iter().zip(&other.batch).all(|(a, b)| same(a, b)), "step {step}, lane {}", lane.lane);
            }
            assert!(
                input.held_out.len() <= expected.held_out.len()
                    && (lanes.len() < LANES as usize || input.held_out.len() == expected.held_out.len())
            );
            taken += 1;
        }
    }
    assert_eq!(taken, 7);
}

pub(crate) fn collect(config: &ella_proto::config::RunConfig, lanes: std::ops::Range<u32>, steps: std::ops::Range<u64>) -> Vec<StepInput> {
    let mut feed = fed(config, lanes, steps.clone());
    steps.map(|_| feed.next_step().unwrap()).collect()
}

/// One epoch in lanes of one sample: what each key got.
fn by_key(set: &[&str], epoch: u64) -> BTreeMap<u128, (LaneBatch, i64)> {
    let set: Vec<&str> = ["train.micro_batch=1"].iter().chain(set).copied().collect();
    let config = config(&set);
    let lanes = config.train.lanes() as u64;
    let steps = SCENES.div_ceil(lanes);
    let inputs = collect(&config, 0..lanes as u32, epoch * steps..(epoch + 1) * steps);
    let lanes = inputs.into_iter().flat_map(|input| input.lanes);
    lanes.filter_map(|lane| Some((lane.tally.hash, (lane.batch?, lane.dropped)))).collect()
}

/// NOISE: keyed by seed, epoch and sample. Neither the batch's size nor the order has a part in it.
#[test]
fn a_samples_noise_timestep_and_dropout_depend_on_seed_epoch_and_sample_only() {
    let first = by_key(&["train.global_batch=4"], 0);
    let other = by_key(&["train.global_batch=8", "data.window=1"], 0);
    assert_eq!(first.len() as u64, SCENES);
    for (key, (batch, dropped)) in &first {
        let (there, dropped_there) = &other[key];
        assert!(same(batch, there) && dropped == dropped_there);
    }
    let dropped: i64 = first.values().map(|(_, dropped)| dropped).sum();
    assert!((3..22).contains(&dropped), "{dropped} of {SCENES} at a rate of 0.25");
    for changed in [by_key(&["train.global_batch=4"], 1), by_key(&["train.global_batch=4", "run.seed=4"], 0)] {
        let unlike = |field: fn(&LaneBatch) -> &Tensor| {
            first.iter().filter(|(key, (batch, _))| field(batch) != field(&changed[key].0)).count() as u64
        };
        assert_eq!(unlike(|b| &b.noise), SCENES);
        assert_eq!(unlike(|b| &b.latents), SCENES, "the posterior is drawn anew");
        assert!(unlike(|b| &b.timesteps) > SCENES - 5);
        assert!(first.iter().any(|(key, (_, dropped))| *dropped != changed[key].1));
    }
}

#[test]
fn held_out_batches_are_the_same_in_every_epoch_and_measured_before_the_last_step() {
    let config = config(&["train.eval_every=4", "train.eval_samples=5", "train.steps=15"]);
    let mut feed = fed(&config, 0..LANES, 0..15);
    let mut first: Option<Vec<LaneBatch>> = None;
    for step in 0..15 {
        let input = feed.next_step().unwrap();
        if ![0, 4, 8, 12, 14].contains(&step) {
            assert!(input.held_out.is_empty(), "step {step}");
            continue;
        }
        let first = first.get_or_insert_with(|| input.held_out.iter().map(LaneBatch::shallow_clone).collect());
        assert_eq!(input.held_out.iter().map(LaneBatch::len).collect::<Vec<_>>(), [2, 2, 1]);
        assert!(first.iter().zip(&input.held_out).all(|(a, b)| same(a, b)), "step {step}");
        let trained = input.lanes.iter().filter_map(|lane| lane.batch.as_ref());
        assert!(trained.zip(first.iter()).all(|(a, b)| a.noise != b.noise));
    }
}

#[test]
fn more_held_out_samples_than_there_are_is_all_of_them() {
    let config = config(&["train.eval_every=1", "train.eval_samples=1000"]);
    let input = fed(&config, 0..LANES, 0..1).next_step().unwrap();
    assert_eq!(input.held_out.iter().map(LaneBatch::len).sum::<i64>(), SCENES as i64);
}

/// Features from sidecars and from the encoder itself, in every format and under both padding rules.
#[test]
fn cached_and_inline_features_agree() {
    for (set, tolerance) in [("text.dtype=fp32", 1e-5), ("text.dtype=fp16", 1e-2), ("text.dtype=bf16", 5e-2), ("text.padding=none", 1e-5)] {
        let steps = EPOCH - 2..EPOCH;
        let cached = collect(&config(&[set]), 0..LANES, steps.clone());
        let inline = collect(&config(&[set, "text.features=inline"]), 0..LANES, steps);
        let mut dropped = 0;
        for (cached, inline) in cached.iter().flat_map(|i| &i.lanes).zip(inline.iter().flat_map(|i| &i.lanes)) {
            dropped += cached.dropped;
            assert_eq!((cached.tally, cached.dropped), (inline.tally, inline.dropped));
            let (Some(cached), Some(inline)) = (&cached.batch, &inline.batch) else { continue };
            assert_eq!((cached.features.kind(), cached.mask.is_some()), (inline.features.kind(), set.contains("none")));
            let own = match (&cached.mask, &inline.mask) {
                (Some(a), Some(b)) => {
                    assert_eq!(a, b);
                    a.unsqueeze(-1).to_kind(Kind::Float)
                }
                _ => Tensor::from(1f32),
            };
            let found = difference(&(&cached.features * &own), &(&inline.features * &own));
            assert!(found <= tolerance, "{set}: {found}");
        }
        assert!(dropped > 0, "dropped captions are among them");
    }
}

/// A caption's own positions are the same tokens under both rules; the encoder masks its padding.
#[test]
fn ragged_features_are_the_fixed_ones_without_their_padding() {
    let of = |set: &[&str]| collect(&config(set), 0..LANES, 0..1);
    let (fixed, ragged) = (of(&[]), of(&["text.padding=none"]));
    for (fixed, ragged) in fixed[0].lanes.iter().map(batch).zip(ragged[0].lanes.iter().map(batch)) {
        let mask = ragged.mask.as_ref().unwrap();
        let width = ragged.features.size()[1];
        assert!(width <= fixed.features.size()[1] && fixed.mask.is_none());
        let own = mask.unsqueeze(-1).to_kind(Kind::Float);
        let found = difference(&(&ragged.features * &own), &(fixed.features.narrow(1, 0, width) * &own));
        assert!(found < 1e-5, "{found}");
        assert_eq!(mask.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64).max().int64_value(&[]), width);
    }
}

#[test]
fn captions_cut_at_the_limit_are_counted_where_they_are_encoded() {
    let truncated = |tokens: &str| {
        let inputs = collect(&config(&["text.features=inline", tokens, "train.caption_dropout=0"]), 0..LANES, 0..1);
        inputs[0].lanes.iter().map(|lane| lane.truncated).sum::<i64>()
    };
    assert_eq!((truncated("text.max_tokens=4"), truncated("text.max_tokens=400")), (8, 0));
}

/// Latents from stored moments: mean + σ·ε, scaled, with the ε of seed, epoch and sample (paper §2: a sample, not the mean). All else is as
/// with pictures.
#[test]
fn latents_are_drawn_from_the_stored_moments() {
    let latents = format!("data.path={}", crate::world::text(crate::world::path("latents")));
    let config = config(&[&latents]);
    let pictures = by_key(&["train.global_batch=4"], 0);
    let moments = by_key(&["train.global_batch=4", &latents], 0);
    assert_eq!(pictures.len(), moments.len());
    for (key, stored) in rows(&config) {
        let hash = KeyHash::of(&key);
        let (batch, dropped) = &moments[&hash.0];
        let (there, dropped_there) = &pictures[&hash.0];
        assert_eq!((&batch.noise, &batch.timesteps, dropped), (&there.noise, &there.timesteps, dropped_there));
        let mut epsilon = vec![0f32; stored.len() / 2];
        SampleNoise::new(config.run.seed, 0, hash.0 as u64).normals(Stream::Posterior, &mut epsilon);
        let (mean, logvar) = stored.split_at(epsilon.len());
        let drawn = mean.iter().zip(logvar).zip(&epsilon).map(|((mean, logvar), e)| 0.18215 * (mean + (0.5 * logvar).exp() * e));
        let drawn = Tensor::from_slice(&drawn.collect::<Vec<f32>>()).reshape(batch.latents.size());
        let found = difference(&batch.latents, &drawn);
        assert!(found < 1e-6, "{key}: {found}");
    }
}

/// Keys and moments of a data set with latents.
fn rows(config: &ella_proto::config::RunConfig) -> Vec<(String, Vec<f32>)> {
    let data = open(config);
    let shards = (0..data.manifest().shards.len()).map(|shard| RUNTIME.block_on(data.shard(shard)).unwrap());
    let row = |row: ella_dataset::RowRef<'_>| (row.key.to_owned(), row.moments.unwrap().iter().map(|m| m.to_f32()).collect());
    shards.flat_map(|shard| shard.iter().map(row).collect::<Vec<_>>()).collect()
}

#[test]
fn latents_of_another_vae_are_refused_with_both_digests() {
    let latents = format!("data.path={}", crate::world::text(crate::world::path("latents")));
    let mut parts = parts(&config(&[&latents]));
    let found = std::mem::replace(&mut parts.vae_weights, "0".repeat(64));
    let error = Sources::new(parts).unwrap_err();
    assert!(matches!(error, FeedError::Unsuited { .. }) && error.is_permanent());
    let text = error.to_string();
    assert!(text.contains(&found) && text.contains(&"0".repeat(64)) && text.contains("--latents"), "{text}");
}

/// A byte flipped in a shard is an error that names the file, not a picture.
#[test]
fn a_damaged_shard_is_told_by_the_step_that_needs_it() {
    let config = config(&[]);
    let copy = crate::world::damaged_copy(&config, 0);
    let mut feed = fed(&crate::world::config(&[&format!("data.path={}", copy.path().display())]), 0..LANES, 0..EPOCH);
    let error = (0..EPOCH).find_map(|_| feed.next_step().err()).unwrap();
    assert!(matches!(error, FeedError::Data(_)) && error.is_permanent(), "{error}");
    assert!(error.to_string().contains(".arrow"), "{error}");
}

/// A shard that was lost, or whose copy was cut short, is told before the first step, whichever step needs it.
#[test]
fn a_lost_or_cut_shard_is_told_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&[&crate::world::oblong(folder.path())]);
    let shard = std::fs::read_dir(folder.path().join("data/shards")).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&shard).unwrap();
    let refused = |words: &str| {
        let error = Sources::new(parts(&config)).unwrap_err();
        let text = error.to_string();
        assert!(error.is_permanent() && text.contains(".arrow") && text.contains(words) && text.contains("ella prepare"), "{text}");
    };
    // Features are there before anything is lost.
    assert!(Sources::new(parts(&config)).is_ok());
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    refused("damaged");
    std::fs::remove_file(&shard).unwrap();
    refused("not found");
}

/// Height before width, of the picture as it came; the crop in pixels of the resized one; a dropped caption changes nothing.
#[test]
fn sdxl_is_told_the_sizes_and_crops_of_the_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&[&crate::world::oblong(dir.path()), "train.caption_dropout=0.5"]);
    let step = fed(&config, 0..LANES, 0..1).next_step().unwrap();
    let ids: Vec<Tensor> = step.lanes.iter().map(|lane| batch(lane).time_ids.shallow_clone()).collect();
    let mut rows: Vec<Vec<f32>> = Vec::try_from(Tensor::cat(&ids, 0).contiguous()).unwrap();
    rows.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let wide = vec![64.0, 96.0, 0.0, 8.0, 32.0, 32.0];
    // 32 × 53 after resizing.
    let high = vec![80.0, 48.0, 10.0, 0.0, 32.0, 32.0];
    assert_eq!(rows, [vec![wide; 4], vec![high; 4]].concat());
    assert!(step.lanes.iter().map(|lane| lane.dropped).sum::<i64>() > 0);
}

/// There input is made on a stream of its own, from memory that is used again: every lane is whole when the step's stream gets it.
#[test]
fn on_a_gpu_every_lane_is_what_it_is_on_the_processor() {
    let Some(device) = gpu() else { return };
    for set in ["text.features=cached", "text.features=inline", "text.features=ahead"] {
        let config = config(&[set]);
        let expected = collect(&config, 0..LANES, 0..2 * EPOCH);
        let sources = Sources::new(parts_on(&config, device)).unwrap();
        let mut feed =
            ella_worker::feed::Feed::start(sources, 2 * EPOCH, || ella_worker::device::set_threads(1), Default::default()).unwrap();
        feed.deal(0..LANES, 0);
        for expected in expected {
            let input = feed.next_step().unwrap();
            for (lane, other) in input.lanes.iter().zip(&expected.lanes) {
                let Some((found, other)) = lane.batch.as_ref().zip(other.batch.as_ref()) else { continue };
                for (a, b) in tensors(found).iter().zip(tensors(other)) {
                    let error = difference(&a.to_device(tch::Device::Cpu), &b);
                    assert!(error <= 1e-4, "{set}: step {}, lane {}: {error}", input.step, lane.lane);
                }
            }
        }
    }
}

/// A caption that is not there is another thing than one that chance dropped, though both are trained on as the empty one.
#[test]
fn samples_without_a_caption_are_counted_apart_from_dropped_ones() {
    let folder = tempfile::tempdir().unwrap();
    let data = crate::world::half_captioned(folder.path());
    for (dropout, expected) in [("0", (4, 0)), ("1", (4, 4))] {
        let dropout = format!("train.caption_dropout={dropout}");
        let config = config(&[&data, "data.captions=[{column=\"dense\"}]", "text.features=inline", &dropout]);
        let inputs = collect(&config, 0..LANES, 0..1);
        let sum = |count: fn(&LaneInput) -> i64| inputs[0].lanes.iter().map(count).sum::<i64>();
        assert_eq!((sum(|lane| lane.absent), sum(|lane| lane.dropped)), expected, "{dropout}");
    }
}
