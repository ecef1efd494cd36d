//! Operators in one kernel, or a few, where libtorch takes many: what they save is passes over feature maps. Weights get no gradient; activations do. All but
//! [`ada_layer_norm`] are of frozen networks.
//!
//! All compute in float32 and take float32, bfloat16 or float16. Maps are `[B, C, H, W]` with a pixel's channels beside each other (channels-last; another
//! layout is turned into it), C a multiple of 8. Norms need at most [`MOST_CHANNELS`], or [`MOST_OF_ROW`].

use std::ffi::c_int;

use tch::{Device, Kind, Tensor};

use crate::ops::{self, returned};
use crate::speed::{self, Attention};
use crate::{Error, Result, gpu};

/// The most channels of a group norm, and of [`rms_norm`].
pub const MOST_CHANNELS: i64 = 4096;
/// The most channels of a layer norm, whose rows stay on the chip.
pub const MOST_OF_ROW: i64 = 1280;

/// Which operators a network takes from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fused {
    /// [`group_norm`], with the activation after it and what is added before it; [`layer_norm`], with the residual before it; [`ada_layer_norm`],
    /// with the cast after it; [`rms_norm`].
    pub norm: bool,
    /// [`frozen_conv2d`], and its bias in whatever comes next.
    pub conv: bool,
    /// [`FrozenDouble`](crate::resize::FrozenDouble) and [`FrozenHalf`](crate::resize::FrozenHalf).
    pub resize: bool,
    /// [`geglu`] and [`gated_gelu`].
    pub gate: bool,
    /// One product for the queries, keys and values of an attention; and a text encoder's scores stay on the chip, as a U-Net's always do.
    pub attention: bool,
    /// [`few_keys`], where it [fits](fits_few_keys).
    pub cross: bool,
    /// [`pixels`], where it [fits](fits_pixels).
    pub pixels: bool,
    /// [`adamw`] and [`square_norm`], in one pass over memory each.
    pub update: bool,
    /// Of `cross` and `pixels` only what is not slower than libtorch's attention, where both were [timed](speed::measure).
    pub timed: bool,
}

pub(crate) type Switch = fn(&mut Fused) -> &mut bool;

/// The names in `ELLA_FUSED`, and the switches that they stand for.
pub(crate) const SWITCHES: [(&str, Switch); 8] = [
    ("norm", |f| &mut f.norm),
    ("conv", |f| &mut f.conv),
    ("resize", |f| &mut f.resize),
    ("gate", |f| &mut f.gate),
    ("attention", |f| &mut f.attention),
    ("cross", |f| &mut f.cross),
    ("pixels", |f| &mut f.pixels),
    ("update", |f| &mut f.update),
];

impl Fused {
    /// None of them: libtorch's own operators only.
    pub const NONE: Self = Self {
        norm: false,
        conv: false,
        resize: false,
        gate: false,
        attention: false,
        cross: false,
        pixels: false,
        update: false,
        timed: false,
    };
    /// All of them.
    pub const ALL: Self =
        Self { norm: true, conv: true, resize: true, gate: true, attention: true, cross: true, pixels: true, update: true, timed: false };
    /// Those that a GPU takes unless it is told otherwise.
    pub const USUAL: Self = Self { timed: true, ..Self::ALL };

    /// What the environment variable `ELLA_FUSED` says: `all`, `none`, names beside commas, or names with a minus before each, which are left out of the usual
    /// ones; nothing if it is not set.
    ///
    /// # Errors
    /// A name that is none.
    pub fn from_env() -> Result<Option<Self>> {
        std::env::var("ELLA_FUSED").ok().map(|value| Self::parse(&value)).transpose()
    }

    /// Those of them that there are in `kind` on `device`: a GPU's [`few_keys`] and [`pixels`] take 16 bits, the one compute capability 8 or newer, the
    /// other 9.0; and none that was found wrong on it ([`load`](crate::load)).
    #[must_use]
    pub fn on(self, kind: Kind, device: Device) -> Self {
        if !device.is_cuda() {
            return self;
        }
        let of = |fits: fn((c_int, c_int)) -> bool| kind != Kind::Float && gpu::capability().is_none_or(fits);
        let (cross, pixels) = (of(|capability| capability >= (8, 0)), of(|capability| capability == (9, 0)));
        Self { cross: self.cross && cross, pixels: self.pixels && pixels, ..self }.without(gpu::wrong().unwrap_or(Self::NONE))
    }

    /// The names of those that are on.
    #[must_use]
    pub fn names(mut self) -> Vec<&'static str> {
        SWITCHES.into_iter().filter(|(_, switch)| *switch(&mut self)).map(|(name, _)| name).collect()
    }

    /// Whether attention to so many keys, by heads of `width` channels in `kind`, is [`few_keys`]'s.
    #[must_use]
    pub fn takes_few_keys(self, keys: i64, width: i64, kind: Kind) -> bool {
        self.cross && fits_few_keys(keys, width) && !(self.timed && speed::lost(Attention::FewKeys, width, kind))
    }

    /// Whether attention of pixels to themselves, by heads of `width` channels in `kind`, is [`pixels`]'s.
    #[must_use]
    pub fn takes_pixels(self, width: i64, kind: Kind) -> bool {
        self.pixels && fits_pixels(width) && !(self.timed && speed::lost(Attention::Pixels, width, kind))
    }

    /// Whether [`adamw`] and [`square_norm`] are taken for weights on `device`: on a GPU that does not give something else with them, if they are wanted.
    ///
    /// # Errors
    /// Of `ELLA_FUSED`.
    pub fn updates(device: Device) -> Result<bool> {
        Ok(device.is_cuda() && crate::is_loaded() && Self::from_env()?.unwrap_or(Self::USUAL).on(Kind::Float, device).update)
    }

    fn without(mut self, mut others: Self) -> Self {
        for (_, switch) in SWITCHES {
            *switch(&mut self) &= !*switch(&mut others);
        }
        self
    }

    fn parse(value: &str) -> Result<Self> {
        match value {
            "all" => return Ok(Self::ALL),
            "none" | "" => return Ok(Self::NONE),
            _ => {}
        }
        let less = value.trim_start().starts_with('-');
        let mut fused = if less { Self::USUAL } else { Self::NONE };
        for name in value.split(',').map(str::trim) {
            let bare = if less { name.strip_prefix('-') } else { Some(name) };
            let Some((_, switch)) = SWITCHES.iter().find(|(known, _)| bare == Some(*known)) else {
                let known = SWITCHES.map(|(known, _)| known).join(", ");
                return Err(Error(format!(
                    "ELLA_FUSED: `{name}` is no fused operator (expected all, none, some of {known}, or some of them with a minus before each)"
                )));
            };
            *switch(&mut fused) = !less;
        }
        Ok(fused)
    }
}

/// A feature map `[B, C, H, W]`, or two of one kind and size of which the second's channels follow the first's; each in multiples of 8.
#[derive(Debug)]
pub struct Joined {
    /// The map, or its first channels.
    pub first: Tensor,
    /// Its others.
    pub second: Option<Tensor>,
}

impl From<Tensor> for Joined {
    fn from(first: Tensor) -> Self {
        Self { first, second: None }
    }
}

impl Joined {
    /// The map as one tensor.
    ///
    /// # Errors
    /// Two maps that do not fit.
    pub fn one(&self) -> Result<Tensor> {
        match &self.second {
            Some(second) => Ok(Tensor::f_cat(&[&self.first, second], 1)?),
            None => Ok(self.first.shallow_clone()),
        }
    }
}

/// The same values `[A, B, C, D]`, those of B beside each other.
///
/// # Errors
/// libtorch's own.
pub fn channels_last(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?)
}

/// `x`, and `act(groupnorm(x + add) · γ + β)`, statistics over each of `groups` groups of channels and all pixels. Who needs `x` beside the norm takes it from
/// here: then both gradients are added up in one pass.
///
/// # Shapes
/// `x` of C channels, `gamma` and `beta` `[C]` of its kind, `add` `[B, C]` float32, which may want a gradient; to `x`'s parts and `[B, C, H, W]`. `activate`:
/// SiLU.
///
/// # Errors
/// A shape or kind that it does not take; CUDA's own.
pub fn group_norm(
    x: &Joined,
    (gamma, beta): (&Tensor, &Tensor),
    add: Option<&Tensor>,
    (groups, eps): (i64, f64),
    activate: bool,
) -> Result<(Joined, Tensor)> {
    let Joined { first, second } = x;
    let size = first.size();
    let channels = size.get(1).copied().unwrap_or(0) + second.as_ref().map_or(0, |second| second.size().get(1).copied().unwrap_or(0));
    let fits = |tensor: &Tensor| tensor.f_kind().ok() == first.f_kind().ok() && tensor.size() == [channels];
    if !fits(gamma) || !fits(beta) {
        let found = format!("{:?} {:?} and {:?} {:?}", gamma.kind(), gamma.size(), beta.kind(), beta.size());
        return Err(Error(format!("a fused group norm takes {channels} weights of its input's kind {:?}, not {found}", first.kind())));
    }
    if let Some(second) = second
        && (second.f_kind().ok() != first.f_kind().ok()
            || second.dim() != 4
            || [second.size()[0], second.size()[2], second.size()[3]] != [size[0], size[2], size[3]])
    {
        let found = format!("{:?} {:?}", second.kind(), second.size());
        return Err(Error(format!("a fused group norm joins maps of one kind and size, not {:?} {size:?} and {found}", first.kind())));
    }
    if let Some(add) = add
        && (add.kind() != Kind::Float || !add.is_contiguous() || add.size() != [size[0], channels])
    {
        return Err(Error(format!("a fused group norm adds float32 [B, C], not {:?} {:?}", add.kind(), add.size())));
    }
    let (activate, mut made) = (c_int::from(activate), [std::ptr::null_mut(); 3]);
    // SAFETY: all tensors are alive while they are borrowed, null stands for none, and as many tensors are made as there is room for.
    ops::check(unsafe {
        let (gamma, beta) = (gamma.as_ptr(), beta.as_ptr());
        ops::ella_group_norm(first.as_ptr(), pointer(second.as_ref()), gamma, beta, pointer(add), groups, eps, activate, made.as_mut_ptr())
    })?;
    let [y, first, other] = made;
    let second = second.as_ref().map(|_| returned(other)).transpose()?;
    Ok((Joined { first: returned(first)?, second }, returned(y)?))
}

/// Null for none.
fn pointer(tensor: Option<&Tensor>) -> *const torch_sys::C_tensor {
    tensor.map_or(std::ptr::null(), |tensor| tensor.as_ptr())
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

/// Whether [`few_keys`] takes so many keys, and heads of so many channels: up to 64 keys, and the heads of SD 1.5, SD 2 and SDXL.
#[must_use]
pub fn fits_few_keys(keys: i64, width: i64) -> bool {
    (1..=64).contains(&keys) && [40, 64, 80, 160].contains(&width)
}

/// `softmax(q kᵀ / √d) v` of every head, of few keys: what is kept for the gradient is what goes in, and queries are read once on every way.
///
/// # Shapes
/// `q` `[B, N, H d]`, `kv` `[B, L, 2 H d]`, keys before values; to `[B, N, H d]`. See [`fits_few_keys`].
///
/// # Errors
/// A shape or kind that it does not take; CUDA's own.
pub fn few_keys(q: &Tensor, kv: &Tensor, heads: i64) -> Result<Tensor> {
    // SAFETY: both tensors are alive while they are borrowed.
    returned(unsafe { ops::ella_few_keys(q.as_ptr(), kv.as_ptr(), heads) })
}

/// Whether [`pixels`] takes heads of so many channels: those that others fill up most.
#[must_use]
pub fn fits_pixels(width: i64) -> bool {
    [40, 80].contains(&width)
}

/// `softmax(q kᵀ / √d) v` of every head, of a map's pixels to themselves. What is kept for the gradient is what goes in, what comes out, and a number
/// for each pixel and head.
///
/// # Shapes
/// `qkv` `[B, N, 3 H d]`: queries, keys, values; to `[B, N, H d]`. See [`fits_pixels`].
///
/// # Errors
/// A shape or kind that it does not take; CUDA's own.
pub fn pixels(qkv: &Tensor, heads: i64) -> Result<Tensor> {
    // SAFETY: the tensor is alive while it is borrowed.
    returned(unsafe { ops::ella_pixels(qkv.as_ptr(), heads) })
}

/// `s = x + more` (or x), and `layernorm(s) · γ + β` over the last axis: (s, norm). Who needs `s` beside the norm takes it from here: then both gradients are
/// added up in one pass.
///
/// # Shapes
/// `x` and `more` `[.., D]`, D a multiple of 8 up to [`MOST_OF_ROW`], `gamma` and `beta` `[D]` of their kind; two of `x`'s shape and kind.
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
    let (more, [mut sum, mut y]) = (pointer(more), [std::ptr::null_mut(); 2]);
    // SAFETY: all tensors are alive while they are borrowed, null stands for nothing to add, and the pointers are to live pointers.
    ops::check(unsafe { ops::ella_add_layer_norm(x.as_ptr(), more, gamma.as_ptr(), beta.as_ptr(), eps, &raw mut sum, &raw mut y) })?;
    Ok((returned(sum)?, returned(y)?))
}

/// `layernorm(x) · (1 + scale) + shift` over the last axis, in `kind`, each sample by its own scale and shift (AdaLN). All that goes in may want a gradient; what is
/// kept for it is what goes in, and two numbers a row.
///
/// # Shapes
/// `x` `[B, N, D]` of `kind` or float32, D a multiple of 8 up to [`MOST_OF_ROW`]; `lead` `[B, 2D]` float32, shifts before scales; to `x`'s shape.
///
/// # Errors
/// A shape or kind that it does not take; CUDA's own.
pub fn ada_layer_norm(x: &Tensor, lead: &Tensor, eps: f64, kind: Kind) -> Result<Tensor> {
    let number = match kind {
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::BFloat16 => 15,
        _ => return Err(Error(format!("a fused adaptive norm makes float32, bfloat16 or float16, not {kind:?}"))),
    };
    // SAFETY: both tensors are alive while they are borrowed.
    returned(unsafe { ops::ella_ada_layer_norm(x.as_ptr(), lead.as_ptr(), eps, number) })
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

/// `a + b + more + bias`.
///
/// # Shapes
/// `a`, `b` and `more` `[B, C, H, W]`, `bias` `[C]` float32; to the same shape.
///
/// # Errors
/// A shape or kind that it does not take.
pub fn add_biased(a: &Tensor, b: &Tensor, more: Option<&Tensor>, bias: &Tensor) -> Result<Tensor> {
    let kinds: Vec<_> = [Some(a), Some(b), more].into_iter().flatten().map(Tensor::kind).collect();
    if bias.f_kind().ok() != Some(Kind::Float) || kinds.iter().any(|kind| *kind != a.kind()) {
        return Err(Error(format!("a fused residual takes maps of one kind and a float32 bias, not {kinds:?} and {:?}", bias.kind())));
    }
    // SAFETY: all tensors are alive while they are borrowed, and null stands for none.
    returned(unsafe { ops::ella_add_biased(a.as_ptr(), b.as_ptr(), pointer(more), bias.as_ptr()) })
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
        let fits = tensor.f_kind().ok() == Some(Kind::Float) && tensor.is_contiguous();
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

/// `Σ x²`, `[]` float64 on `x`'s device, in one pass over memory.
///
/// # Shapes
/// `x` `[P]` float32, contiguous.
///
/// # Errors
/// A tensor of another kind; CUDA's own.
pub fn square_norm(x: &Tensor) -> Result<Tensor> {
    if x.f_kind().ok() != Some(Kind::Float) || !x.is_contiguous() {
        return Err(Error(format!("a sum of squares takes contiguous float32 numbers, not {:?} {:?}", x.kind(), x.size())));
    }
    // SAFETY: the tensor is alive while it is borrowed.
    let sums = returned(unsafe { ops::ella_square_sums(x.as_ptr()) })?;
    Ok(sums.f_sum(Kind::Double)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_has_what_it_takes_and_what_is_not_wrong() {
        assert_eq!(Fused::ALL.on(Kind::Float, Device::Cpu), Fused::ALL);
        assert_eq!(Fused::ALL.on(Kind::Float, Device::Cuda(0)), Fused { cross: false, pixels: false, ..Fused::ALL });
        let found = Fused::USUAL.without(Fused { norm: true, cross: true, ..Fused::NONE });
        assert_eq!(found, Fused { norm: false, cross: false, ..Fused::USUAL });
        assert_eq!(found.without(Fused::NONE), found);
        assert!(!Fused::updates(Device::Cpu).unwrap());
    }

    #[test]
    fn switches_are_read_by_name() {
        assert_eq!(Fused::parse("all").unwrap(), Fused::ALL);
        assert_eq!(Fused::parse("none").unwrap(), Fused::NONE);
        assert_eq!(Fused::parse("norm, attention").unwrap(), Fused { norm: true, attention: true, ..Fused::NONE });
        assert_eq!(Fused::parse("-norm, -cross").unwrap(), Fused { norm: false, cross: false, ..Fused::USUAL });
        assert_eq!(Fused::parse("-update").unwrap(), Fused { update: false, ..Fused::USUAL });
        for (value, named) in [("norm,gelu", "`gelu`"), ("-norm,gate", "`gate`"), ("norm,-gate", "`-gate`"), ("-", "`-`")] {
            let error = Fused::parse(value).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("some of norm, conv"), "{error}");
        }
    }
}
