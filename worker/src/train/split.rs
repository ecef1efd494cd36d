//! A lane that a GPU's memory does not hold, computed in pieces (`workers.split_on_oom`).
//!
//! A lane's gradient is a sum over its samples, so pieces give the same but for rounding: which is why it goes with `reduction = "fast"` alone.
//!
//! A whole lane's gradient is added up, and sent, as it is made; what was told of it cannot be taken back. But the memory is fullest in the U-Net,
//! before the first stretch of the connector's gradient: a lane is computed again only if nothing was told of it yet. Pieces tell nothing until all of
//! them are there.

use super::TrainError;
use super::lane::{Follow, LaneBatch, LaneGradient, Networks};
use crate::gpu::fault::Fault;
use crate::gpu::pieces::in_pieces;
use std::ops::Range;
use tch::Tensor;

/// Where gradients come from.
pub(super) trait Source {
    /// A batch's gradient, told as it is made; returns the sum of the samples' losses.
    fn in_parts(&self, batch: &LaneBatch, follow: &mut dyn Follow) -> Result<Tensor, TrainError>;

    /// The same when it is done.
    fn whole(&self, batch: &LaneBatch) -> Result<LaneGradient, TrainError>;

    /// The places of a gradient's stretches, the first one's first.
    fn stretches(&self) -> Vec<Range<i64>>;
}

/// Of a step of so many samples.
impl Source for (&Networks, u64) {
    fn in_parts(&self, batch: &LaneBatch, follow: &mut dyn Follow) -> Result<Tensor, TrainError> {
        self.0.gradient_in_parts(batch, self.1, follow)
    }

    fn whole(&self, batch: &LaneBatch) -> Result<LaneGradient, TrainError> {
        self.0.gradient(batch, self.1)
    }

    fn stretches(&self) -> Vec<Range<i64>> {
        self.0.connector.segments().iter().map(|segment| segment.elements.clone()).collect()
    }
}

/// How a rank's lanes are split, if they are.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    allowed: bool,
    /// The most samples that were found to fit.
    most: usize,
}

impl Split {
    /// Nothing is split yet, or ever.
    pub fn new(allowed: bool) -> Self {
        Self { allowed, most: usize::MAX }
    }

    /// Computes a lane's gradient and tells it to `follow`. The sum of its samples' losses, and whether it was made in pieces.
    pub(super) fn gradient(
        &mut self,
        source: &dyn Source,
        batch: &LaneBatch,
        follow: &mut dyn Follow,
    ) -> Result<(Tensor, bool), TrainError> {
        let samples = usize::try_from(batch.len()).unwrap_or(0);
        if self.most >= samples {
            let mut listener = Listener { follow, told: false };
            match source.in_parts(batch, &mut listener) {
                Err(error) if self.allowed && samples > 1 && !listener.told && is_full(&error) => {
                    self.most = samples.div_ceil(2);
                    let _ = ella_cuda::memory::empty_cache();
                    tracing::warn!("the memory does not hold a lane of {samples}: from here on at most {} at once", self.most);
                }
                done => return Ok((done?, false)),
            }
        }
        let pieces =
            in_pieces(samples, &mut self.most, self.allowed, |piece| source.whole(&batch.narrow(piece.start as i64, piece.len() as i64)?))?;
        let LaneGradient { grad, loss_sum } = pieces.into_iter().map(Ok).reduce(added).unwrap_or_else(|| source.whole(batch))?;
        follow.forward_done()?;
        for Range { start, end } in source.stretches().into_iter().rev() {
            follow.part(start..end, &grad.f_narrow(0, start, end - start)?)?;
        }
        Ok((loss_sum, true))
    }
}

fn is_full(error: &TrainError) -> bool {
    Fault::of(error) == Some(Fault::OutOfMemory)
}

type Added = Result<LaneGradient, TrainError>;

fn added(a: Added, b: Added) -> Added {
    let (mut a, b) = (a?, b?);
    let _ = a.grad.f_add_(&b.grad)?;
    Ok(LaneGradient { loss_sum: a.loss_sum.f_add(&b.loss_sum)?, ..a })
}

/// Passes on what is told, and remembers that it was.
struct Listener<'a> {
    follow: &'a mut dyn Follow,
    told: bool,
}

impl Follow for Listener<'_> {
    fn forward_done(&mut self) -> Result<(), TrainError> {
        self.follow.forward_done()
    }

    fn part(&mut self, elements: Range<i64>, gradient: &Tensor) -> Result<(), TrainError> {
        self.told = true;
        self.follow.part(elements, gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use tch::{Device, Kind, TchError};

    fn batch(samples: i64) -> LaneBatch {
        let of = |shape: &[i64]| Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)).reshape(shape);
        LaneBatch {
            latents: of(&[samples, 4, 2, 2]),
            noise: of(&[samples, 4, 2, 2]),
            timesteps: Tensor::arange(samples, (Kind::Int64, Device::Cpu)),
            features: of(&[samples, 3, 2]),
            mask: Some(Tensor::ones([samples, 3], (Kind::Bool, Device::Cpu))),
            time_ids: of(&[samples, 6]),
        }
    }

    /// The sum of a batch's features, two stretches of one element, on a GPU that holds so many samples.
    struct Small {
        room: i64,
        /// How many were tried at once.
        tried: RefCell<Vec<i64>>,
        /// Whether its memory is full only after the first stretch.
        late: bool,
    }

    impl Small {
        fn new(room: i64) -> Self {
            Self { room, tried: RefCell::default(), late: false }
        }
    }

    impl Source for Small {
        fn in_parts(&self, batch: &LaneBatch, follow: &mut dyn Follow) -> Result<Tensor, TrainError> {
            follow.forward_done()?;
            if self.late {
                follow.part(1..2, &Tensor::zeros([1], (Kind::Float, Device::Cpu)))?;
            }
            let LaneGradient { grad, loss_sum } = self.whole(batch)?;
            follow.part(1..2, &grad.narrow(0, 1, 1))?;
            follow.part(0..1, &grad.narrow(0, 0, 1))?;
            Ok(loss_sum)
        }

        fn whole(&self, batch: &LaneBatch) -> Result<LaneGradient, TrainError> {
            self.tried.borrow_mut().push(batch.len());
            if batch.len() > self.room {
                return Err(TrainError::Torch(TchError::Torch("CUDA out of memory. Tried to allocate 2.00 GiB.".into())));
            }
            let grad = batch.features.sum_dim_intlist([0i64, 1].as_slice(), false, Kind::Float);
            Ok(LaneGradient { grad, loss_sum: batch.timesteps.sum(Kind::Float) })
        }

        fn stretches(&self) -> Vec<Range<i64>> {
            vec![0..1, 1..2]
        }
    }

    /// What was told of a lane.
    #[derive(Default)]
    struct Told {
        passes: usize,
        grad: Vec<(Range<i64>, f64)>,
    }

    impl Follow for Told {
        fn forward_done(&mut self) -> Result<(), TrainError> {
            self.passes += 1;
            Ok(())
        }

        fn part(&mut self, elements: Range<i64>, gradient: &Tensor) -> Result<(), TrainError> {
            self.grad.push((elements, gradient.double_value(&[0])));
            Ok(())
        }
    }

    #[test]
    fn a_lane_in_pieces_has_the_gradient_of_the_whole() {
        // Of 7 samples with 3 × 2 features: 0, 2, 4, … and 1, 3, 5, … of 42 numbers.
        let whole = [(1..2, 441.0), (0..1, 420.0)];
        for room in [7, 4, 2, 1] {
            let (mut split, source) = (Split::new(true), Small::new(room));
            for lane in 0..2 {
                let mut told = Told::default();
                let (loss, is_split) = split.gradient(&source, &batch(7), &mut told).unwrap();
                assert_eq!((loss.double_value(&[]), is_split), (21.0, room < 7));
                assert!(told.passes >= 1 && told.grad == whole, "lane {lane}: {:?}", told.grad);
                // The second lane is cut at once.
                assert!(lane == 0 || source.tried.borrow().iter().all(|size| *size <= room), "{:?}", source.tried);
                source.tried.borrow_mut().clear();
            }
        }
    }

    #[test]
    fn a_lane_is_not_computed_again_where_it_must_not_be() {
        // Nobody asked for it; one sample alone; or half of it was added up already.
        for (allowed, samples, late) in [(false, 4, false), (true, 1, false), (true, 4, true)] {
            let source = Small { late, ..Small::new(0) };
            let error = Split::new(allowed).gradient(&source, &batch(samples), &mut Told::default()).unwrap_err();
            assert!(error.to_string().contains("out of memory"), "{error}");
            assert_eq!(*source.tried.borrow(), [samples]);
        }
    }
}
