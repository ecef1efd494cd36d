//! Tensors through operations on host memory: in place where they lie there, through a copy where they do not.

use half::slice::HalfBitsSliceExt as _;
use tch::{Device, Kind, Tensor};

use super::{Collective, CollectiveError, Result};
use crate::device::bytes_of;

/// Sums a tensor over all ranks.
pub(super) fn sum_in_host_memory<C: Collective + ?Sized>(ranks: &mut C, tensor: &mut Tensor) -> Result<()> {
    check_sum(tensor)?;
    in_host_memory(tensor, |kind, bytes| match kind {
        Kind::Int64 => ranks.sum_i64(bytemuck::cast_slice_mut(bytes)),
        Kind::BFloat16 => ranks.sum_bf16(bytemuck::cast_slice_mut::<u8, u16>(bytes).reinterpret_cast_mut()),
        _ => ranks.sum_f32(bytemuck::cast_slice_mut(bytes)),
    })
}

/// Copies rank `root`'s tensor to all ranks.
pub(super) fn broadcast_in_host_memory<C: Collective + ?Sized>(ranks: &mut C, root: u32, tensor: &mut Tensor) -> Result<()> {
    check_contiguous(tensor)?;
    in_host_memory(tensor, |_, bytes| ranks.broadcast(root, bytes))
}

/// Refuses what cannot be summed.
pub(super) fn check_sum(tensor: &Tensor) -> Result<()> {
    check_contiguous(tensor)?;
    match tensor.f_kind()? {
        Kind::Float | Kind::BFloat16 | Kind::Int64 => Ok(()),
        other => Err(refused(tensor, "dtype f32, bf16 or i64", format!("{other:?}"))),
    }
}

fn check_contiguous(tensor: &Tensor) -> Result<()> {
    if tensor.is_contiguous() {
        return Ok(());
    }
    Err(refused(tensor, "a contiguous tensor (call contiguous() first)", format!("strides {:?}", tensor.stride())))
}

pub(super) fn refused(tensor: &Tensor, expected: &'static str, found: String) -> CollectiveError {
    CollectiveError::Tensor { shape: tensor.size(), expected, found }
}

fn in_host_memory(tensor: &mut Tensor, work: impl FnOnce(Kind, &mut [u8]) -> Result<()>) -> Result<()> {
    let kind = tensor.f_kind()?;
    if tensor.device() == Device::Cpu {
        return work(kind, bytes_of(tensor, kind));
    }
    let mut staged = tensor.f_to_device(Device::Cpu)?;
    work(kind, bytes_of(&mut staged, kind))?;
    let _no_grad = tch::no_grad_guard();
    Ok(tensor.f_copy_(&staged)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reduce::{InProcess, Solo};

    /// Runs `work` on two ranks and returns what each made of its tensor.
    fn on_two(tensors: [Tensor; 2], work: fn(&mut InProcess, &mut Tensor) -> Result<()>) -> Vec<Tensor> {
        std::thread::scope(|scope| {
            let ranks = InProcess::group(2).into_iter().zip(tensors);
            let started: Vec<_> = ranks
                .map(|(mut rank, mut tensor)| {
                    scope.spawn(move || {
                        work(&mut rank, &mut tensor).expect("both take part");
                        tensor
                    })
                })
                .collect();
            started.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    #[test]
    fn sums_tensors_in_place_of_all_kinds_and_any_shape() {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Int64] {
            for shape in [vec![], vec![0], vec![3], vec![2, 3, 5]] {
                let n: i64 = shape.iter().product();
                let a = Tensor::arange(n, (kind, Device::Cpu)).reshape(&shape);
                let b = &a * 10;
                let sum = &a + &b;
                let at = a.data_ptr();
                let got = on_two([a, b], |rank, tensor| rank.sum_tensor(tensor));
                assert!(got.iter().all(|tensor| *tensor == sum), "{kind:?} {shape:?}");
                assert_eq!(got[0].data_ptr(), at);
            }
        }
    }

    #[test]
    fn broadcasts_tensors_of_any_dtype() {
        for kind in [Kind::Float, Kind::Half, Kind::Int64, Kind::Bool] {
            let [a, b] = [0, 1].map(|x| Tensor::full([3, 2], x, (kind, Device::Cpu)));
            let root = b.copy();
            let got = on_two([a, b], |rank, tensor| rank.broadcast_tensor(1, tensor));
            assert!(got.iter().all(|tensor| *tensor == root), "{kind:?}");
        }
    }

    #[test]
    fn a_view_of_part_of_a_tensor_leaves_the_rest_alone() {
        let [a, b] = [1, 2].map(|x| Tensor::full([5], x, (Kind::Float, Device::Cpu)));
        let got = on_two([a, b], |rank, tensor| rank.sum_tensor(&mut tensor.narrow(0, 1, 3)));
        assert_eq!(Vec::<f32>::try_from(&got[0]).expect("f32"), [1.0, 3.0, 3.0, 3.0, 1.0]);
        assert_eq!(Vec::<f32>::try_from(&got[1]).expect("f32"), [2.0, 3.0, 3.0, 3.0, 2.0]);
    }

    #[test]
    fn what_cannot_be_summed_is_refused_with_its_shape() {
        let transposed = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).tr();
        let halves = Tensor::zeros([4], (Kind::Half, Device::Cpu));
        for (mut tensor, shape) in [(transposed, vec![3, 2]), (halves, vec![4])] {
            match Solo::default().sum_tensor(&mut tensor) {
                Err(CollectiveError::Tensor { shape: found, .. }) => assert_eq!(found, shape),
                other => panic!("expected a refusal, found {other:?}"),
            }
        }
    }
}
