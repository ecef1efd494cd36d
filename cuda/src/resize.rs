//! Changes of resolution in frozen networks, by fewer products than libtorch's operators take; see `cpp/ops.cpp` for the arithmetic. Maps and gradients are as
//! [`fused`](crate::fused) has them.

use tch::Tensor;

use crate::fused::channels_last;
use crate::ops::{self, returned};
use crate::{Error, Result};

/// A 3 × 3 convolution of a map of twice the size, in which every number stands four times (nearest neighbours): by what is left of its products where those
/// of the same number are one. Without a gradient of its weights.
#[derive(Debug)]
pub struct FrozenDouble {
    /// `[4 C, D, 2, 2]`.
    weight: Tensor,
    /// `[D, C, 4, 4]`: the gradient by the input is a convolution of stride 2 with it.
    back: Tensor,
    /// `[C]` float32.
    bias: Tensor,
}

impl FrozenDouble {
    /// From the convolution's `weight` `[C, D, 3, 3]` and `bias` `[C]`; C a multiple of 8.
    ///
    /// # Errors
    /// A shape that it does not take; libtorch's own.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let ((c, d), kind) = (square(weight)?, weight.f_kind()?);
        // Of the upper and the lower pixel of a pair, and the row before and behind the border that it is at: which of the three rows of weights.
        let rows = [[[1., 0., 0.], [0., 1., 1.]], [[1., 1., 0.], [0., 0., 1.]]];
        let quarters = summed(weight, &rows)?; // [2, 2, C, D, 2, 2]
        // From the input's pixel: the rows 2 i - 1 to 2 i + 2 of the output that it is in, and as what.
        let back = summed(weight, &[[[0., 0., 1.], [0., 1., 1.], [1., 1., 0.], [1., 0., 0.]]])?;
        Ok(Self {
            weight: channels_last(&quarters.f_reshape([4 * c, d, 2, 2])?.f_to_kind(kind)?)?,
            back: channels_last(&back.f_reshape([c, d, 4, 4])?.f_transpose(0, 1)?.f_to_kind(kind)?)?,
            bias: bias.f_to_kind(tch::Kind::Float)?,
        })
    }

    /// `[B, D, H, W]` to `[B, C, 2H, 2W]`.
    ///
    /// # Errors
    /// A shape that does not fit; CUDA's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // SAFETY: all tensors are alive while they are borrowed.
        returned(unsafe { ops::ella_frozen_double(x.as_ptr(), self.weight.as_ptr(), self.back.as_ptr(), self.bias.as_ptr()) })
    }
}

/// A 3 × 3 convolution of stride 2 and padding 1 without bias, whose gradient is four small convolutions in one. Without a gradient of its weights.
#[derive(Debug)]
pub struct FrozenHalf {
    /// `[C, D, 3, 3]`.
    weight: Tensor,
    /// `[4 D, C, 2, 2]`.
    back: Tensor,
}

impl FrozenHalf {
    /// From the convolution's `weight` `[C, D, 3, 3]`; D a multiple of 8.
    ///
    /// # Errors
    /// A shape that it does not take; libtorch's own.
    pub fn new(weight: &Tensor) -> Result<Self> {
        let (c, d) = square(weight)?;
        // Of the upper and the lower pixel of a pair: which row of weights the output's row at it takes, and the row behind.
        let rows = [[[0., 1., 0.], [0., 0., 0.]], [[0., 0., 1.], [1., 0., 0.]]];
        let back = summed(weight, &rows)?.f_transpose(2, 3)?; // [2, 2, D, C, 2, 2]
        let back = channels_last(&back.f_reshape([4 * d, c, 2, 2])?.f_to_kind(weight.f_kind()?)?)?;
        Ok(Self { weight: weight.shallow_clone(), back })
    }

    /// `[B, D, H, W]`, H and W even, to `[B, C, H/2, W/2]`.
    ///
    /// # Errors
    /// A shape that does not fit; CUDA's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // SAFETY: all tensors are alive while they are borrowed.
        returned(unsafe { ops::ella_frozen_half(x.as_ptr(), self.weight.as_ptr(), self.back.as_ptr()) })
    }
}

/// The channels (C, D) of a weight `[C, D, 3, 3]`.
fn square(weight: &Tensor) -> Result<(i64, i64)> {
    match weight.size()[..] {
        [c, d, 3, 3] => Ok((c, d)),
        _ => Err(Error(format!("a fused change of resolution takes weights [C, D, 3, 3], not {:?}", weight.size()))),
    }
}

/// Sums of the weights `[C, D, 3, 3]` by `rows` `[P, K, 3]` of shares, for rows and columns alike: `[P, P, C, D, K, K]` float32.
fn summed<const K: usize>(weight: &Tensor, rows: &[[[f32; 3]; K]]) -> Result<Tensor> {
    let (places, wide) = (rows.len() as i64, weight.f_to_kind(tch::Kind::Float)?);
    let shares = Tensor::f_from_slice(rows.as_flattened().as_flattened())?.f_view([places, K as i64, 3])?.f_to_device(weight.device())?;
    Ok(Tensor::f_einsum("pax,qby,cdxy->pqcdab", &[&shares, &shares, &wide], None::<i64>)?)
}
