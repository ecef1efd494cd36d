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
    /// [`group_norm`], with the activation after it and what is added before it; [`layer_norm`], with the residual before it; [`rms_norm`].
    pub norm: bool,
    /// [`frozen_conv2d`], and its bias in whatever comes next.
    pub conv: bool,
    /// [`geglu`] and [`gated_gelu`].
    pub gate: bool,
    /// One product for the queries, keys and values of an attention; and a text encoder's scores stay on the chip, as a U-Net's always do.
    pub attention: bool,
}

type Switch = fn(&mut Fused) -> &mut bool;

/// The names in `ELLA_FUSED`, and the switches that they stand for.
const SWITCHES: [(&str, Switch); 4] =
    [("norm", |f| &mut f.norm), ("conv", |f| &mut f.conv), ("gate", |f| &mut f.gate), ("attention", |f| &mut f.attention)];

impl Fused {
    /// None of them: libtorch's own operators only.
    pub const NONE: Self = Self { norm: false, conv: false, gate: false, attention: false };
    /// All of them.
    pub const ALL: Self = Self { norm: true, conv: true, gate: true, attention: true };

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

/// `x`, and `act(groupnorm(x + add) · γ + β)`, statistics over each of `groups` groups of channels and all pixels. Who needs `x` beside the norm takes it from
/// here: then both gradients are added up in one pass.
///
/// # Shapes
/// `x` `[B, C, H, W]`, `gamma` and `beta` `[C]` of its kind, `add` `[B, C]` float32, which may want a gradient; two of `x`'s shape and kind. `activate`: SiLU.
///
/// # Errors
/// A shape or kind that it does not take; CUDA's own.
pub fn group_norm(
    x: &Tensor,
    (gamma, beta): (&Tensor, &Tensor),
    add: Option<&Tensor>,
    (groups, eps): (i64, f64),
    activate: bool,
) -> Result<(Tensor, Tensor)> {
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
    let (activate, [mut past, mut y]) = (c_int::from(activate), [std::ptr::null_mut(); 2]);
    // SAFETY: all tensors are alive while they are borrowed, null stands for nothing to add, and the pointers are to live pointers.
    ops::check(unsafe {
        ops::ella_group_norm(x.as_ptr(), gamma.as_ptr(), beta.as_ptr(), add, groups, eps, activate, &raw mut past, &raw mut y)
    })?;
    Ok((returned(past)?, returned(y)?))
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

/// `s = x + more` (or x), and `layernorm(s) · γ + β` over the last axis: (s, norm). Who needs `s` beside the norm takes it from here: then both gradients are
/// added up in one pass.
///
/// # Shapes
/// `x` and `more` `[.., D]`, D a multiple of 8 up to [`MOST_CHANNELS`], `gamma` and `beta` `[D]` of their kind; two of `x`'s shape and kind.
///
/// # Errors
/// A shape or kind that it does not take; CUDA's own.
pub fn layer_norm(x: &Tensor, more: Option<&Tensor>, (gamma, beta): (&Tensor, &Tensor), eps: f64) -> Result<(Tensor, Tensor)> {
    let width = x.size().last().copied().unwrap_or(0);
    for tensor in [gamma, beta] {
        if tensor.f_kind().ok() != x.f_kind().ok() || tensor.size() != [width] {
            let found = format!("{:?} {:?}", tensor.kind(), tensor.size());
            return Err(Error(format!(
                "a fused layer norm of {:?} {:?} takes weights of its kind and width, not {found}",
                x.kind(),
                x.size()
            )));
        }
    }
    if more.is_some_and(|more| more.f_kind().ok() != x.f_kind().ok()) {
        return Err(Error(format!("a fused residual takes two tensors of one kind, not {:?} and another", x.kind())));
    }
    let (more, [mut sum, mut y]) = (more.map_or(std::ptr::null(), Tensor::as_ptr), [std::ptr::null_mut(); 2]);
    // SAFETY: all tensors are alive while they are borrowed, null stands for nothing to add, and the pointers are to live pointers.
    ops::check(unsafe { ops::ella_add_layer_norm(x.as_ptr(), more, gamma.as_ptr(), beta.as_ptr(), eps, &raw mut sum, &raw mut y) })?;
    Ok((returned(sum)?, returned(y)?))
}

/// `x / √(mean(x²) + ε) · weight` over the last axis, rounded to `x`'s kind before the weight: T5's and LLaMA's norm. Without a gradient.
///
/// # Shapes
/// `x` `[.., D]`, D a multiple of 8 up to [`MOST_CHANNELS`], `weight` `[D]` of its kind; to `x`'s shape and kind.
///
/// # Errors
/// A shape or kind that it does not take; a gradient is wanted.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if weight.f_kind().ok() != x.f_kind().ok() || weight.size() != x.size()[x.dim().saturating_sub(1)..] {
        let found = format!("{:?} {:?}", weight.kind(), weight.size());
        return Err(Error(format!("a fused norm of {:?} {:?} takes a weight of its kind and width, not {found}", x.kind(), x.size())));
    }
    // SAFETY: both tensors are alive while they are borrowed.
    returned(unsafe { ops::ella_rms_norm(x.as_ptr(), weight.as_ptr(), eps) })
}

/// The GELU (tanh approximation) of the gates times the values. Without a gradient.
///
/// # Shapes
/// `[.., 2D]`, gates then values, to `[.., D]`; D a multiple of 8.
///
/// # Errors
/// A shape or kind that it does not take; a gradient is wanted.
pub fn gated_gelu(both: &Tensor) -> Result<Tensor> {
    // SAFETY: the tensor is alive while it is borrowed.
    returned(unsafe { ops::ella_gated_gelu(both.as_ptr()) })
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
        return Err(Error(format!(
            "a fused residual takes maps of one kind and a float32 bias, not {:?}, {:?} and {:?}",
            a.kind(),
            b.kind(),
            bias.kind()
        )));
    }
    // SAFETY: all tensors are alive while they are borrowed.
    returned(unsafe { ops::ella_add_biased(a.as_ptr(), b.as_ptr(), bias.as_ptr()) })
}

/// One update of AdamW with decoupled weight decay, as `torch.optim.AdamW` has it, and of a moving average of the weights.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// What the gradient is multiplied by first: less than 1 where it is clipped.
    pub scale: f64,
    /// The learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decays of the moments.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// The moments' bias corrections, 1 - βᵗ.
    pub corrections: [f64; 2],
    /// The average's decay.
    pub ema_decay: f64,
}

/// Updates weights, moments and average in one pass over memory.
///
/// # Shapes
/// `[weights, first moments, second moments, average]` and `grad`, each `[P]` float32, contiguous, on one device.
///
/// # Errors
/// A tensor of another kind, length or device; CUDA's own.
pub fn adamw([params, first, second, ema]: [&mut Tensor; 4], grad: &Tensor, by: &AdamW) -> Result<()> {
    for tensor in [&*params, first, second, ema, grad] {
        let fits = tensor.f_kind().ok() == Some(tch::Kind::Float) && tensor.is_contiguous();
        if !fits || (tensor.numel(), tensor.device()) != (params.numel(), params.device()) {
            let found = format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
            return Err(Error(format!("an update takes five contiguous float32 buffers of one length, not {found}")));
        }
    }
    let rates = [
        by.scale,
        1.0 - by.lr * by.weight_decay,
        1.0 - by.betas[0],
        by.betas[1],
        1.0 - by.betas[1],
        by.corrections[1].sqrt(),
        by.eps,
        by.lr / by.corrections[0],
        1.0 - by.ema_decay,
    ]
    .map(|rate| rate as f32);
    let [p, g, m, v, ema] = [&*params, grad, first, second, ema].map(Tensor::as_ptr);
    // SAFETY: all tensors are alive while they are borrowed, four of them by this alone, and of one length (checked above); `rates` are as many
    // numbers as the function reads.
    ops::check(unsafe { ops::ella_adamw(p, g, m, v, ema, rates.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_read_by_name() {
        assert_eq!(Fused::parse("all").unwrap(), Fused::ALL);
        assert_eq!(Fused::parse("none").unwrap(), Fused::NONE);
        assert_eq!(Fused::parse("norm, attention").unwrap(), Fused { norm: true, attention: true, ..Fused::NONE });
        let error = Fused::parse("norm,gelu").unwrap_err().to_string();
        assert!(error.contains("`gelu`") && error.contains("gate"), "{error}");
    }
}
