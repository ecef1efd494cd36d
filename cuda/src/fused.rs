//! Operators of frozen networks in one kernel, or a few, where libtorch takes many: what they save is passes over feature maps. Weights get no
//! gradient; activations do.
//!
//! All compute in float32 and take float32, bfloat16 or float16. Maps are `[B, C, H, W]` with a pixel's channels beside each other (channels-last; another
//! layout is turned into it), C a multiple of 8. Norms need at most [`MOST_CHANNELS`].

use std::ffi::c_int;

use tch::Tensor;

use crate::ops::{self, returned};
use crate::{Error, Result};

/// The most channels of a norm.
pub const MOST_CHANNELS: i64 = 4096;

/// Which operators a network takes from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fused {
    /// [`group_norm`], with the activation after it and what is added before it.
    pub norm: bool,
    /// [`frozen_conv2d`], and its bias in whatever comes next.
    pub conv: bool,
    /// [`geglu`].
    pub geglu: bool,
    /// One product for the queries, keys and values of an attention.
    pub qkv: bool,
}

/// The names in `ELLA_FUSED`, and the switches that they stand for.
const SWITCHES: [(&str, fn(&mut Fused) -> &mut bool); 4] =
    [("norm", |f| &mut f.norm), ("conv", |f| &mut f.conv), ("geglu", |f| &mut f.geglu), ("qkv", |f| &mut f.qkv)];

impl Fused {
    /// None of them: libtorch's own operators only.
    pub const NONE: Self = Self { norm: false, conv: false, geglu: false, qkv: false };
    /// All of them.
    pub const ALL: Self = Self { norm: true, conv: true, geglu: true, qkv: true };

    /// What the environment variable `ELLA_FUSED` says: `all`, `none`, or names beside commas; nothing if it is not set.
    ///
    /// # Errors
    /// A name that is none.
    pub fn from_env() -> Result<Option<Self>> {
        std::env::var("ELLA_FUSED").ok().map(|value| Self::parse(&value)).transpose()
    }

    fn parse(value: &str) -> Result<Self> {
        match value {
            "all" => return Ok(Self::ALL),
            "none" | "" => return Ok(Self::NONE),
            _ => {}
        }
        let mut fused = Self::NONE;
        for name in value.split(',') {
            let Some((_, switch)) = SWITCHES.iter().find(|(known, _)| *known == name.trim()) else {
                let known = SWITCHES.map(|(known, _)| known).join(", ");
                return Err(Error(format!("ELLA_FUSED: `{name}` is no fused operator (expected all, none, or some of {known})")));
            };
            *switch(&mut fused) = true;
        }
        Ok(fused)
    }
}

/// `act(groupnorm(x + add) · γ + β)`, statistics over each of `groups` groups of channels and all pixels.
///
/// # Shapes
/// `x` `[B, C, H, W]`, `gamma` and `beta` `[C]` of its kind, `add` `[B, C]` float32, which may want a gradient; to `x`'s shape and kind. `activate`: SiLU.
///
/// # Errors
/// A shape or kind that it does not take; CUDA's own.
pub fn group_norm(x: &Tensor, (gamma, beta): (&Tensor, &Tensor), add: Option<&Tensor>, (groups, eps): (i64, f64), activate: bool) -> Result<Tensor> {
    let kinds = [gamma.f_kind(), beta.f_kind()].map(|kind| kind.ok());
    if kinds != [x.f_kind().ok(); 2] {
        return Err(Error(format!("a fused group norm takes weights of its input's kind {:?}, not {kinds:?}", x.kind())));
    }
    if let Some(add) = add
        && (add.kind() != tch::Kind::Float || !add.is_contiguous() || add.size() != x.size()[..2])
    {
        return Err(Error(format!("a fused group norm adds float32 [B, C], not {:?} {:?}", add.kind(), add.size())));
    }
    let none = std::ptr::null();
    let add = add.map_or(none, Tensor::as_ptr);
    // SAFETY: all tensors are alive while they are borrowed, and null stands for nothing to add.
    returned(unsafe { ops::ella_group_norm(x.as_ptr(), gamma.as_ptr(), beta.as_ptr(), add, groups, eps, c_int::from(activate)) })
}

/// A convolution without bias, whose gradient needs nothing of its input but the size: that is not kept.
///
/// # Shapes
/// `x` `[B, C, H, W]`, `weight` `[D, C, k, k]`; to `[B, D, H', W']`.
///
/// # Errors
/// Shapes that do not fit.
pub fn frozen_conv2d(x: &Tensor, weight: &Tensor, stride: i64, padding: i64) -> Result<Tensor> {
    // SAFETY: both tensors are alive while they are borrowed.
    returned(unsafe { ops::ella_frozen_conv2d(x.as_ptr(), weight.as_ptr(), stride, padding) })
}

/// The values times the exact GELU of the gates.
///
/// # Shapes
/// `[.., 2D]`, values then gates, to `[.., D]`; D a multiple of 8.
///
/// # Errors
/// A shape or kind that it does not take.
pub fn geglu(both: &Tensor) -> Result<Tensor> {
    // SAFETY: the tensor is alive while it is borrowed.
    returned(unsafe { ops::ella_geglu(both.as_ptr()) })
}

/// `a + b + bias`.
///
/// # Shapes
/// `a` and `b` `[B, C, H, W]`, `bias` `[C]` float32; to the same shape.
///
/// # Errors
/// A shape or kind that it does not take.
pub fn add_biased(a: &Tensor, b: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if bias.f_kind().ok() != Some(tch::Kind::Float) || a.f_kind().ok() != b.f_kind().ok() {
        return Err(Error(format!("a fused residual takes maps of one kind and a float32 bias, not {:?}, {:?} and {:?}", a.kind(), b.kind(), bias.kind())));
    }
    // SAFETY: all tensors are alive while they are borrowed.
    returned(unsafe { ops::ella_add_biased(a.as_ptr(), b.as_ptr(), bias.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_read_by_name() {
        assert_eq!(Fused::parse("all").unwrap(), Fused::ALL);
        assert_eq!(Fused::parse("none").unwrap(), Fused::NONE);
        assert_eq!(Fused::parse("norm, qkv").unwrap(), Fused { norm: true, qkv: true, ..Fused::NONE });
        let error = Fused::parse("norm,gelu").unwrap_err().to_string();
        assert!(error.contains("`gelu`") && error.contains("geglu"), "{error}");
    }
}
