//! A lane that a GPU's memory does not hold, computed in pieces (`workers.split_on_oom`).
//!
//! A lane's gradient is a sum over its samples, so pieces give the same but for rounding: which is why it goes with `reduction = "fast"` alone.

use super::TrainError;
use super::lane::{LaneBatch, LaneGradient};
use crate::gpu::pieces::in_pieces;

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

    /// A lane's gradient by `compute`, and whether it was made of several.
    pub(super) fn gradient(
        &mut self,
        batch: &LaneBatch,
        compute: impl Fn(&LaneBatch) -> Result<LaneGradient, TrainError>,
    ) -> Result<(LaneGradient, bool), TrainError> {
        let total = usize::try_from(batch.len()).unwrap_or(0);
        let pieces = in_pieces(total, &mut self.most, self.allowed, |piece| {
            // Most lanes are whole.
            if piece.len() == total { compute(batch) } else { compute(&batch.narrow(piece.start as i64, piece.len() as i64)?) }
        })?;
        let is_split = pieces.len() > 1;
        let mut pieces = pieces.into_iter();
        // An empty lane has no gradient, and nobody asks for it.
        let mut sum = pieces.next().map_or_else(|| compute(batch), Ok)?;
        for piece in pieces {
            let _ = sum.grad.f_add_(&piece.grad)?;
            sum.loss_sum += piece.loss_sum;
            sum.forward += piece.forward;
            sum.backward += piece.backward;
        }
        Ok((sum, is_split))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::time::Duration;
    use tch::{Device, Kind, TchError, Tensor};

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

    /// The sum of a batch's features, on a GPU that holds so many samples.
    fn gradient(batch: &LaneBatch, room: i64) -> Result<LaneGradient, TrainError> {
        if batch.len() > room {
            return Err(TrainError::Torch(TchError::Torch("CUDA out of memory. Tried to allocate 2.00 GiB.".into())));
        }
        let grad = batch.features.sum_dim_intlist([0i64, 1].as_slice(), false, Kind::Float);
        let loss_sum = batch.timesteps.sum(Kind::Int64).int64_value(&[]) as f64;
        Ok(LaneGradient { grad, loss_sum, forward: Duration::from_secs(1), backward: Duration::from_secs(2) })
    }

    #[test]
    fn a_lane_in_pieces_has_the_gradient_of_the_whole() {
        let whole = gradient(&batch(7), 7).unwrap();
        for room in [7, 4, 2, 1] {
            let mut split = Split::new(true);
            let (found, is_split) = split.gradient(&batch(7), |piece| gradient(piece, room)).unwrap();
            assert_eq!((found.grad.equal(&whole.grad), found.loss_sum, is_split), (true, 21.0, room < 7));
            // The next lane is cut at once.
            let sizes = RefCell::default();
            let count = |piece: &LaneBatch| {
                let sizes: &RefCell<Vec<i64>> = &sizes;
                sizes.borrow_mut().push(piece.len());
                gradient(piece, room)
            };
            split.gradient(&batch(7), count).unwrap();
            assert!(sizes.borrow().iter().all(|size| *size <= room), "{sizes:?}");
        }
    }

    #[test]
    fn a_lane_that_does_not_fit_is_an_error_where_nothing_is_split() {
        let error = Split::new(false).gradient(&batch(4), |piece| gradient(piece, 2)).unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert!(Split::new(true).gradient(&batch(1), |piece| gradient(piece, 0)).is_err());
    }
}
