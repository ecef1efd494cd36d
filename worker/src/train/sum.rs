//! A step's sum: the gradients of a rank's lanes, then of all ranks, and the step's own small sums with them.
//!
//! Nothing here waits for a GPU but [`Sum::settle`]. What is wrong with a loss or a gradient is therefore not seen when it comes in: it is kept
//! out of the sum, and counted in the words that all ranks sum. So all ranks know of it at the same step, before any of them has updated anything, and
//! none is taken for lost because it stopped alone. Only then does each look for what it was ([`Lane::fault`]).

use super::TrainError;
use super::stats::{self, Losses, REFUSED_LANES, StepStats, WORDS};
use crate::reduce::Collective;
use crate::reduce::fixed::{self, FixedError, FixedPoint, LeftOut};
use ella_proto::config::{Compression, Reduction, Train};
use std::ops::Range;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Room for the words before the gradient, so that this begins where memory is best read.
const HEAD: i64 = WORDS.next_multiple_of(32) as i64;

/// A gradient's stretch of fewer bytes waits for the next one before its sum begins. The time of a small all-reduce is that of its hops, whatever its
/// size: about 10 µs for each of the twice 63 of a ring of 64 ranks, in which a link of 25 GB/s moves this much to and fro. So it costs no more than
/// twice what its transfer takes, and where hops are shorter, less. A block of the released connector has 21 MB in bfloat16, and 85 in fixed point: it
/// is not cut further.
const BUCKET: i64 = 16 << 20;

/// A lane that was added.
#[derive(Debug)]
pub(super) struct Lane {
    /// Which.
    pub(super) lane: u32,
    /// Sum of its samples' losses, `[]` float32.
    loss: Tensor,
    /// Where each stretch of its gradient begins, and what of it was left out.
    left_out: Vec<(i64, Tensor)>,
}

/// What is wrong with a lane.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fault {
    /// Sum of its samples' losses.
    pub(super) loss: f64,
    /// The first element of its gradient that was left out: its index and value.
    pub(super) element: Option<(usize, f32)>,
}

impl Lane {
    /// Its loss, and its gradient's first element that was left out. Waits for the device.
    pub(super) fn fault(&self) -> Result<Fault, tch::TchError> {
        let mut first: Option<(usize, f32)> = None;
        for (offset, told) in &self.left_out {
            // Stretches come the last first.
            if let Some(LeftOut { index, value, .. }) = LeftOut::read(told)? {
                first = Some((*offset as usize + index, value));
            }
        }
        Ok(Fault { loss: self.loss.f_double_value(&[])?, element: first })
    }
}

/// What all ranks know after a step's sums.
#[derive(Debug)]
pub(super) struct Reduced {
    /// `[P]` float32.
    pub(super) grad: Tensor,
    /// The step's sums `[WORDS]` int64, on the device.
    pub(super) words: Tensor,
    /// This rank's lanes.
    pub(super) lanes: Vec<Lane>,
    /// How long the device was at sums beside other work; waiting for other ranks counts.
    pub(super) beside: Duration,
}

/// The gradient's sum over lanes, and then over ranks.
#[derive(Debug)]
pub(super) struct Sum {
    /// `[P]`: int64 in fixed point, or float32.
    grad: Tensor,
    /// `[WORDS]` int64.
    words: Tensor,
    /// Int64 `[HEAD + P]`, of which both are views: for `exact`.
    whole: Option<(Tensor, FixedPoint)>,
    /// Whether sums go over the wire in bfloat16.
    compressed: bool,
    /// What goes over it then, and its place.
    staged: Vec<(Range<i64>, Tensor)>,
    /// The stretches that are summed over ranks at a time, the gradient's last first.
    buckets: Vec<Range<i64>>,
    /// How many of them have been begun.
    begun: usize,
    lanes: Vec<Lane>,
    /// What was left out of the present lane.
    left_out: Vec<(i64, Tensor)>,
    /// How long this thread was held up by sums that were begun.
    pub(super) held: Duration,
}

impl Sum {
    /// Nothing yet. `segments`: the places of the gradient's stretches, which cover it in order.
    pub(super) fn new(train: &Train, segments: &[Range<i64>], device: Device) -> Result<Self, TrainError> {
        Self::in_buckets(train, segments, device, BUCKET)
    }

    /// With buckets of so many bytes at least.
    fn in_buckets(train: &Train, segments: &[Range<i64>], device: Device, least: i64) -> Result<Self, TrainError> {
        let params = segments.last().map_or(0, |last| last.end);
        let compressed = train.compression == Compression::Bf16;
        let (grad, words, whole) = match train.reduction {
            Reduction::Exact => {
                let whole = fixed::zeros(HEAD + params, device)?;
                let (words, grad) = (whole.f_narrow(0, 0, WORDS as i64)?, whole.f_narrow(0, HEAD, params)?);
                (grad, words, Some((whole, FixedPoint::new(train.lanes() as u32))))
            }
            Reduction::Fast => (Tensor::f_zeros([params], (Kind::Float, device))?, fixed::zeros(WORDS as i64, device)?, None),
        };
        let element = if whole.is_some() { 8 } else { 4 - 2 * i64::from(compressed) };
        let buckets = buckets(segments, least / element);
        let (staged, lanes, left_out) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { grad, words, whole, compressed, staged, buckets, begun: 0, lanes, left_out, held: Duration::ZERO })
    }

    /// Adds a stretch of the present lane's gradient, float32.
    pub(super) fn add(&mut self, elements: Range<i64>, gradient: &Tensor) -> Result<(), FixedError> {
        let mut place = self.grad.f_narrow(0, elements.start, elements.end - elements.start)?;
        match &self.whole {
            Some((_, fixed)) => self.left_out.push((elements.start, fixed.add(&mut place, gradient)?)),
            None => drop(place.f_add_(gradient)?),
        }
        Ok(())
    }

    /// The present lane has been added. `loss`: the sum over its samples, `[]` float32.
    pub(super) fn end_lane(&mut self, lane: u32, loss: &Tensor, samples: i64) -> Result<(), TrainError> {
        Losses::TRAINED.add(&self.words, loss, samples)?;
        let left_out = std::mem::take(&mut self.left_out);
        let mut elements = left_out.iter().map(|(_, told)| told.f_narrow(0, 0, 1));
        if let Some(first) = elements.next() {
            let all = elements.try_fold(first?, |sum, more| sum.f_add(&more?))?;
            stats::add_word(&self.words, REFUSED_LANES, &all.f_gt(0.0)?)?;
        }
        // A copy: the next lane may be computed in the same memory.
        self.lanes.push(Lane { lane, loss: loss.f_mul_scalar(1.0)?, left_out });
        Ok(())
    }

    /// Adds a held-out batch's loss, the sum over its samples.
    pub(super) fn add_held_out(&self, loss: &Tensor, samples: i64) -> Result<(), TrainError> {
        Ok(Losses::HELD_OUT.add(&self.words, loss, samples)?)
    }

    /// Of this rank's last lane, everything from the element `low` on has been added: sums over ranks begin where a bucket is full. The last one
    /// waits for the words, which go with it.
    pub(super) fn finished(&mut self, low: i64, collective: &mut dyn Collective) -> Result<(), TrainError> {
        while self.begun + 1 < self.buckets.len() && self.buckets[self.begun].start >= low {
            self.begin_next(collective)?;
        }
        Ok(())
    }

    fn begin_next(&mut self, collective: &mut dyn Collective) -> Result<(), TrainError> {
        let began = Instant::now();
        let Range { start, end } = self.buckets[self.begun];
        self.begun += 1;
        let place = self.grad.f_narrow(0, start, end - start)?;
        match &self.whole {
            // The words lie before the first parameter.
            Some((whole, _)) if start == 0 => collective.begin_sum(whole.f_narrow(0, 0, HEAD + end)?)?,
            None if self.compressed => {
                let short = place.f_to_kind(Kind::BFloat16)?;
                self.staged.push((start..end, short.shallow_clone()));
                collective.begin_sum(short)?;
            }
            _ => collective.begin_sum(place)?,
        }
        self.held += began.elapsed();
        Ok(())
    }

    /// Begins all sums over ranks that have not been begun, with what this rank's processor knows of the step.
    pub(super) fn begin_rest(&mut self, collective: &mut dyn Collective, mine: &StepStats) -> Result<(), TrainError> {
        let _ = self.words.f_add_(&to_device(&mine.words(), self.words.device())?)?;
        while self.begun < self.buckets.len() {
            self.begin_next(collective)?;
        }
        if self.whole.is_none() {
            let began = Instant::now();
            collective.begin_sum(self.words.shallow_clone())?;
            self.held += began.elapsed();
        }
        Ok(())
    }

    /// Returns when the sums over ranks are there.
    pub(super) fn settle(self, collective: &mut dyn Collective) -> Result<Reduced, TrainError> {
        let beside = collective.settle()?;
        for (Range { start, end }, short) in &self.staged {
            self.grad.f_narrow(0, *start, end - start)?.f_copy_(short)?;
        }
        let grad = if self.whole.is_some() { fixed::to_f32(&self.grad)? } else { self.grad };
        Ok(Reduced { grad, words: self.words, lanes: self.lanes, beside })
    }
}

/// The words on the device; a GPU takes them from pinned memory when it comes to it, and is not waited for.
fn to_device(words: &[i64; WORDS], device: Device) -> Result<Tensor, tch::TchError> {
    let words = Tensor::f_from_slice(words)?;
    match device {
        Device::Cpu => Ok(words),
        _ => words.f_internal_pin_memory(device)?.f_to_device_(device, Kind::Int64, true, false),
    }
}

/// Stretches of at least so many elements, made of whole segments, from the last on; what is left at the beginning may be shorter.
fn buckets(segments: &[Range<i64>], least: i64) -> Vec<Range<i64>> {
    let mut end = segments.last().map_or(0, |last| last.end);
    let mut buckets = Vec::new();
    for start in segments.iter().map(|segment| segment.start).rev() {
        if end - start >= least || start == 0 {
            buckets.push(start..end);
            end = start;
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reduce::{InProcess, Solo};

    const PARAMS: i64 = 1000;
    const SEGMENTS: [Range<i64>; 4] = [0..300, 300..320, 320..700, 700..PARAMS];

    /// What one rank has in the end.
    type Kept = (Vec<f32>, [i64; WORDS], Vec<Fault>);

    fn add_lane(sum: &mut Sum, lane: usize, grad: &[f32], mut after: impl FnMut(&mut Sum, i64)) {
        for part in SEGMENTS.into_iter().rev() {
            sum.add(part.clone(), &Tensor::from_slice(&grad[part.start as usize..part.end as usize])).unwrap();
            after(sum, part.start);
        }
        sum.end_lane(lane as u32, &Tensor::from(1.5f32 + lane as f32), 2).unwrap();
    }

    fn kept(reduced: &Reduced) -> Kept {
        let words: Vec<i64> = Vec::try_from(&reduced.words).unwrap();
        let faults = reduced.lanes.iter().map(|lane| lane.fault().unwrap()).collect();
        (Vec::try_from(&reduced.grad).unwrap(), words.try_into().unwrap(), faults)
    }

    /// What every rank of a world has in the end, with lanes dealt in this way and buckets of so many bytes.
    fn reduced(train: &Train, grads: &[Vec<f32>], dealt: &[&[usize]], bucket: i64) -> Vec<Kept> {
        std::thread::scope(|scope| {
            let rank = |(mut ranks, lanes): (InProcess, &[usize])| {
                let mut sum = Sum::in_buckets(train, &SEGMENTS, Device::Cpu, bucket).unwrap();
                for lane in lanes {
                    let is_last = lanes.last() == Some(lane);
                    add_lane(&mut sum, *lane, &grads[*lane], |sum, low| {
                        if is_last {
                            sum.finished(low, &mut ranks).unwrap();
                        }
                    });
                }
                let mut mine = StepStats::of_one_rank(None);
                mine.dropped = lanes.len() as i64;
                sum.begin_rest(&mut ranks, &mine).unwrap();
                kept(&sum.settle(&mut ranks).unwrap())
            };
            let ranks = InProcess::group(dealt.len() as u32).into_iter().zip(dealt.iter().copied());
            let threads: Vec<_> = ranks.map(|each| scope.spawn(move || rank(each))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn lanes() -> Vec<Vec<f32>> {
        let element = |lane: i64, i: i64| ((i * 37 + lane * 11) as f32).sin() * 10f32.powi((i % 9) as i32 - 6);
        (0..4).map(|lane| (0..PARAMS).map(|i| element(lane, i)).collect()).collect()
    }

    fn train(reduction: Reduction, compression: Compression) -> Train {
        Train { global_batch: 4, micro_batch: 1, reduction, compression, ..Train::default() }
    }

    const DEALT: [&[&[usize]]; 3] = [&[&[0, 1], &[2, 3]], &[&[3], &[], &[1, 0, 2]], &[&[0], &[1], &[2], &[3]]];

    /// SAME: exact sums are the same bits however lanes are dealt and the gradient is cut, a rank without a sample among them; fast ones are
    /// close, and the same bits on all ranks and every time.
    #[test]
    fn sums_depend_on_neither_the_dealing_nor_the_buckets() {
        let (exact, fast) = (train(Reduction::Exact, Compression::None), train(Reduction::Fast, Compression::None));
        let grads = lanes();
        let alone = reduced(&exact, &grads, &[&[0, 1, 2, 3]], BUCKET).remove(0);
        for dealt in DEALT {
            for bucket in [1, 2_000, BUCKET] {
                for (grad, words, _) in reduced(&exact, &grads, dealt, bucket) {
                    assert_eq!((grad, words[0]), (alone.0.clone(), alone.1[0]), "{dealt:?}, {bucket}");
                }
                let [once, again] = [0; 2].map(|_| reduced(&fast, &grads, dealt, bucket));
                assert_eq!(once, again);
                for (grad, words, _) in &once {
                    let stats = StepStats::from_words(words).unwrap();
                    assert_eq!((stats.ranks, stats.dropped, stats.lost, stats.refused_lanes), (dealt.len() as i64, 4, 0, 0));
                    assert!(grad.iter().zip(&once[0].0).all(|(a, b)| a.to_bits() == b.to_bits()));
                    assert!(grad.iter().zip(&alone.0).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs() + 1e-4));
                }
            }
        }
    }

    /// Rounded once by each rank and once by each addition after the first: off by at most N · 2⁻⁸ of the absolute sum over N ranks.
    #[test]
    fn compressed_sums_are_within_their_rounding_with_the_same_bits_on_all_ranks() {
        let grads = lanes();
        for dealt in DEALT {
            let ranks = reduced(&train(Reduction::Fast, Compression::Bf16), &grads, dealt, 1_000);
            let bound = dealt.len() as f64 * 2f64.powi(-8) * 1.02;
            for (i, sum) in ranks[0].0.iter().enumerate() {
                assert!(ranks.iter().all(|rank| rank.0[i].to_bits() == sum.to_bits()));
                let (exact, size) = grads.iter().map(|grad| f64::from(grad[i])).fold((0.0, 0.0), |(e, s), x| (e + x, s + x.abs()));
                assert!((f64::from(*sum) - exact).abs() <= bound * size, "{dealt:?}, element {i}: {sum}, exactly {exact}");
            }
        }
        let sum = Sum::in_buckets(&train(Reduction::Fast, Compression::Bf16), &SEGMENTS, Device::Cpu, 1).unwrap();
        assert_eq!(sum.buckets.len(), 4);
        // What goes over the wire has half of float32's bytes.
        let mut sum = sum;
        sum.begin_next(&mut Solo::default()).unwrap();
        assert_eq!((sum.staged[0].0.clone(), sum.staged[0].1.kind(), sum.staged[0].1.numel()), (700..1000, Kind::BFloat16, 300));
    }

    #[test]
    fn buckets_are_whole_segments_from_the_end_on_and_cover_everything() {
        assert_eq!(buckets(&SEGMENTS, 1), [700..1000, 320..700, 300..320, 0..300]);
        assert_eq!(buckets(&SEGMENTS, 350), [320..1000, 0..320]);
        let one = |segments: &[Range<i64>], least, expected| {
            let found = buckets(segments, least);
            assert!(found.len() == 1 && found[0] == expected, "{found:?}");
        };
        one(&SEGMENTS, 10_000, 0..1000);
        one(&SEGMENTS[..1], 0, 0..300);
        // A block of the released connector is one, in bfloat16 too.
        let block = 10_628_352;
        assert_eq!(buckets(&[0..block, block..2 * block], BUCKET / 2).len(), 2);
    }

    /// All ranks learn that there is something, and the one that has it, what: the first bad element, wherever in the gradient.
    #[test]
    fn what_is_not_finite_is_kept_out_and_known_to_all_ranks() {
        let exact = train(Reduction::Exact, Compression::None);
        let mut grads = lanes();
        (grads[2][710], grads[2][310], grads[2][999]) = (f32::INFINITY, f32::NAN, -1e30);
        for dealt in DEALT {
            let ranks = reduced(&exact, &grads, dealt, 1_000);
            for (grad, words, _) in &ranks {
                assert_eq!(StepStats::from_words(words).unwrap().refused_lanes, 1);
                assert!(grad.iter().all(|x| x.is_finite()) && *grad == ranks[0].0);
            }
            let faults: Vec<_> = ranks.iter().flat_map(|(.., faults)| faults).filter_map(|fault| fault.element).collect();
            assert!(matches!(faults[..], [(310, value)] if value.is_nan()), "{faults:?}");
        }
        let mut sum = Sum::new(&exact, &SEGMENTS, Device::Cpu).unwrap();
        sum.end_lane(0, &Tensor::from(f32::NAN), 2).unwrap();
        sum.add_held_out(&Tensor::from(0.5f32), 3).unwrap();
        sum.begin_rest(&mut Solo::default(), &StepStats::default()).unwrap();
        let (_, words, faults) = kept(&sum.settle(&mut Solo::default()).unwrap());
        let stats = StepStats::from_words(&words).unwrap();
        assert_eq!((stats.lost, stats.refused_lanes, stats.held_out_samples), (2, 0, 3));
        assert!(faults[0].loss.is_nan());
    }
}
