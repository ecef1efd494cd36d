//! A step's sum: the gradients of a rank's lanes, then of all ranks, and the step's own small sums with them.

use super::TrainError;
use super::stats::WORDS;
use crate::reduce::Collective;
use crate::reduce::fixed::{self, FixedError, FixedPoint};
use ella_proto::config::{Reduction, Train};
use tch::{Device, Kind, Tensor};

/// The gradient's sum over lanes, and then over ranks.
#[derive(Debug)]
pub(super) enum Sum {
    /// Integers `[P + WORDS]`: the gradient in fixed point, then the step's own sums.
    Exact(Tensor, FixedPoint),
    /// Floats `[P]`.
    Fast(Tensor),
}

impl Sum {
    /// Nothing yet, of so many parameters.
    pub(super) fn new(train: &Train, params: i64, device: Device) -> Result<Self, TrainError> {
        Ok(match train.reduction {
            Reduction::Exact => Self::Exact(fixed::zeros(params + WORDS as i64, device)?, FixedPoint::new(train.lanes() as u32)),
            Reduction::Fast => Self::Fast(Tensor::f_zeros([params], (Kind::Float, device))?),
        })
    }

    /// Adds one lane's gradient `[P]` float32.
    pub(super) fn add(&mut self, grad: &Tensor) -> Result<(), FixedError> {
        match self {
            Self::Exact(sum, fixed) => fixed.add(&mut sum.f_narrow(0, 0, grad.size()[0])?, grad),
            Self::Fast(sum) => sum.f_add_(grad).map(drop).map_err(FixedError::from),
        }
    }

    /// The gradient `[P]` float32 and the step's sums, over all ranks.
    pub(super) fn reduce(self, collective: &mut dyn Collective, mut words: [i64; WORDS]) -> Result<(Tensor, [i64; WORDS]), TrainError> {
        match self {
            Self::Exact(mut sum, _) => {
                let params = sum.size()[0] - WORDS as i64;
                sum.f_narrow(0, params, WORDS as i64)?.f_copy_(&Tensor::f_from_slice(&words)?)?;
                collective.sum_tensor(&mut sum)?;
                sum.f_narrow(0, params, WORDS as i64)?.f_to_device(Device::Cpu)?.f_copy_data(&mut words, WORDS)?;
                Ok((fixed::to_f32(&sum.f_narrow(0, 0, params)?)?, words))
            }
            Self::Fast(mut sum) => {
                collective.sum_tensor(&mut sum)?;
                collective.sum_i64(&mut words)?;
                Ok((sum, words))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reduce::InProcess;

    const PARAMS: i64 = 1000;

    /// What every rank of a world has in the end, with lanes dealt in this way.
    fn reduced(train: &Train, grads: &[Vec<f32>], dealt: &[&[usize]]) -> Vec<(Vec<f32>, [i64; WORDS])> {
        std::thread::scope(|scope| {
            let rank = |(mut ranks, lanes): (InProcess, &[usize])| {
                let mut sum = Sum::new(train, PARAMS, Device::Cpu).unwrap();
                lanes.iter().for_each(|lane| sum.add(&Tensor::from_slice(&grads[*lane])).unwrap());
                let (grad, words) = sum.reduce(&mut ranks, std::array::from_fn(|i| (lanes.len() * i) as i64)).unwrap();
                (Vec::try_from(grad).unwrap(), words)
            };
            let ranks = InProcess::group(dealt.len() as u32).into_iter().zip(dealt.iter().copied());
            let threads: Vec<_> = ranks.map(|each| scope.spawn(move || rank(each))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// SAME: exact sums are the same bits however lanes are dealt, a rank without a sample among them; fast ones are close.
    #[test]
    fn sums_do_not_depend_on_the_dealing() {
        let grads: Vec<Vec<f32>> = (0..4)
            .map(|lane| (0..PARAMS).map(|i| ((i * 37 + lane * 11) as f32).sin() * 10f32.powi((i % 9) as i32 - 6)).collect())
            .collect();
        let exact = Train { global_batch: 4, micro_batch: 1, reduction: Reduction::Exact, ..Train::default() };
        let fast = Train { reduction: Reduction::Fast, ..exact.clone() };
        let alone = reduced(&exact, &grads, &[&[0, 1, 2, 3]]).remove(0);
        for dealt in [&[&[0, 1][..], &[2, 3]][..], &[&[3], &[], &[1, 0, 2]], &[&[0], &[1], &[2], &[3]]] {
            for rank in reduced(&exact, &grads, dealt) {
                assert_eq!(rank, alone);
            }
            for (grad, words) in reduced(&fast, &grads, dealt) {
                assert_eq!(words, alone.1);
                assert!(grad.iter().zip(&alone.0).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs() + 1e-4));
            }
        }
        assert_eq!(alone.1[1], 4);
    }

    #[test]
    fn what_is_not_finite_is_refused_where_it_comes_in() {
        let mut sum = Sum::new(&Train::default(), 3, Device::Cpu).unwrap();
        let error = sum.add(&Tensor::from_slice(&[0f32, f32::NAN, 0.0])).unwrap_err();
        assert!(matches!(error, FixedError::Range { index: 1, .. }), "{error}");
    }
}
