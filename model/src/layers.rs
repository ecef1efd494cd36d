//! Layers that the networks share. Weight names are the checkpoints'; norms compute in float32 whatever the input's kind.

use ella_cuda::fused::{self, Joined};
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::params::{Init, Params};

/// `y = x Wᵀ + b`, weights `weight` `[out, in]` and `bias` `[out]`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// With a bias.
    pub fn new(p: &Params, input: i64, output: i64) -> Result<Self> {
        Self::with_init(p, input, output, (Init::KaimingUniform, Init::Uniform { bound: (input as f64).powf(-0.5) }))
    }

    /// With a bias, and chosen initial values for (weight, bias).
    pub fn with_init(p: &Params, input: i64, output: i64, init: (Init, Init)) -> Result<Self> {
        let weight = p.get("weight", &[output, input], init.0)?;
        Ok(Linear { weight, bias: Some(p.get("bias", &[output], init.1)?) })
    }

    /// Without a bias.
    pub fn no_bias(p: &Params, input: i64, output: i64, init: Init) -> Result<Self> {
        Ok(Linear { weight: p.get("weight", &[output, input], init)?, bias: None })
    }

    /// A 1×1 convolution's weights, `weight` `[out, in, 1, 1]` and `bias` `[out]`: over tokens `[.., in]` it is a linear map.
    pub fn pointwise(p: &Params, input: i64, output: i64) -> Result<Self> {
        let bound = (input as f64).powf(-0.5);
        let weight = p.get("weight", &[output, input, 1, 1], Init::KaimingUniform)?.f_view([output, input])?;
        Ok(Linear { weight, bias: Some(p.get("bias", &[output], Init::Uniform { bound })?) })
    }

    /// Several maps of one input, none with a bias, as one: what they make lies beside each other.
    pub(crate) fn joined(parts: &[Linear]) -> Result<Self> {
        let weights: Vec<&Tensor> = parts.iter().map(|part| &part.weight).collect();
        Ok(Linear { weight: Tensor::f_cat(&weights, 0)?, bias: None })
    }

    /// `[.., in]` to `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }
}

/// A square 2-D convolution with zero padding, weights `weight` `[out, in, k, k]` and `bias` `[out]`.
#[derive(Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
    fused: bool,
}

impl Conv2d {
    /// Kernel `kernel`, stride 1, and the padding that keeps an odd kernel's input size.
    pub fn new(p: &Params, input: i64, output: i64, kernel: i64) -> Result<Self> {
        Self::strided(p, (input, output), kernel, (1, kernel / 2))
    }

    /// With (input, output) channels and a chosen (stride, padding).
    pub fn strided(p: &Params, channels: (i64, i64), kernel: i64, steps: (i64, i64)) -> Result<Self> {
        let (input, output) = channels;
        let bound = ((input * kernel * kernel) as f64).powf(-0.5);
        Ok(Conv2d {
            weight: p.get("weight", &[output, input, kernel, kernel], Init::KaimingUniform)?,
            bias: p.get("bias", &[output], Init::Uniform { bound })?,
            stride: steps.0,
            padding: steps.1,
            fused: p.fused().conv,
        })
    }

    /// It as the sum of two convolutions, of the first `channels` of the input and of the others; the first has the bias.
    pub(crate) fn parted(&self, channels: i64) -> Result<[Self; 2]> {
        let rest = self.weight.size()[1] - channels;
        let part = |from, length, bias| -> Result<Self> {
            // Copied as they lie: a slice of channels is no block of memory.
            let weight = fused::channels_last(&self.weight.f_narrow(1, from, length)?)?;
            Ok(Conv2d { weight, bias, stride: self.stride, padding: self.padding, fused: self.fused })
        };
        Ok([part(0, channels, self.bias.shallow_clone())?, part(channels, rest, self.bias.f_zeros_like()?)?])
    }

    /// The weights `[out, in, k, k]`.
    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The kind that the weights are in, and inputs must be.
    pub fn kind(&self) -> Kind {
        self.weight.kind()
    }

    /// `[B, in, H, W]` to `[B, out, H', W']`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.fused {
            return Ok(self.unbiased(x)?.f_add(&self.offset()?)?);
        }
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        Ok(x.f_conv2d(&self.weight, Some(&self.bias), stride, padding, [1, 1], 1)?)
    }

    /// The same without the bias, as a fused operator: whatever comes next adds the [`bias`](Self::bias).
    pub(crate) fn unbiased(&self, x: &Tensor) -> Result<Tensor> {
        Ok(fused::frozen_conv2d(x, &self.weight, self.stride, self.padding)?)
    }

    /// The bias for a map: `[1, out, 1, 1]`.
    pub(crate) fn offset(&self) -> Result<Tensor> {
        Ok(self.bias.f_reshape([1, -1, 1, 1])?)
    }

    /// `[out]`, float32.
    pub(crate) fn bias(&self) -> Result<Tensor> {
        Ok(self.bias.f_to_kind(Kind::Float)?)
    }
}

/// Layer normalization over the last axis, in float32; weights `weight` and `bias` `[width]`, or none.
#[derive(Debug)]
pub struct LayerNorm {
    affine: Option<(Tensor, Tensor)>,
    width: i64,
    eps: f64,
    fused: bool,
}

impl LayerNorm {
    /// With a learned scale and shift.
    pub fn new(p: &Params, width: i64, eps: f64) -> Result<Self> {
        let affine = (p.get("weight", &[width], Init::Ones)?, p.get("bias", &[width], Init::Zeros)?);
        let fits = width % 8 == 0 && width <= fused::MOST_OF_ROW;
        Ok(LayerNorm { affine: Some(affine), width, eps, fused: fits && p.fused().norm })
    }

    /// The same, whose scale and shift take gradients: fused norms make none.
    pub(crate) fn trained(p: &Params, width: i64, eps: f64) -> Result<Self> {
        Ok(LayerNorm { fused: false, ..Self::new(p, width, eps)? })
    }

    /// Without parameters.
    pub fn plain(width: i64, eps: f64) -> Self {
        LayerNorm { affine: None, width, eps, fused: false }
    }

    /// `[.., width]` to the same shape and kind.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some((weight, bias)) = &self.affine
            && weight.f_kind()? == x.f_kind()?
        {
            if self.fused {
                return Ok(fused::layer_norm(x, None, (weight, bias), self.eps)?.1);
            }
            // libtorch computes it in float32 whatever the kind, and rounds once.
            return Ok(x.f_layer_norm([self.width], Some(weight), Some(bias), self.eps, false)?);
        }
        let (weight, bias) = float_pair(self.affine.as_ref())?;
        let y = x.f_to_kind(Kind::Float)?.f_layer_norm([self.width], weight.as_ref(), bias.as_ref(), self.eps, false)?;
        Ok(y.f_to_kind(x.f_kind()?)?)
    }

    /// `x` `[.., width]`, and its norm. What goes past the norm is to be taken from here: the gradients of both may come in one pass.
    pub(crate) fn past(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        match &self.affine {
            Some((weight, bias)) if self.fused => Ok(fused::layer_norm(x, None, (weight, bias), self.eps)?),
            _ => Ok((x.shallow_clone(), self.forward(x)?)),
        }
    }

    /// The same of the sum of two `[.., width]`.
    pub(crate) fn of_sum(&self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        if let Some((weight, bias)) = &self.affine
            && self.fused
        {
            return Ok(fused::layer_norm(a, Some(b), (weight, bias), self.eps)?);
        }
        let sum = a.f_add(b)?;
        let normed = self.forward(&sum)?;
        Ok((sum, normed))
    }
}

/// Group normalization over `[B, C, ...]` with weights `weight` and `bias` `[C]`, in float32.
#[derive(Debug)]
pub struct GroupNorm {
    affine: (Tensor, Tensor),
    groups: i64,
    eps: f64,
    fused: bool,
}

impl GroupNorm {
    /// `groups` must divide `channels`.
    pub fn new(p: &Params, channels: i64, groups: i64, eps: f64) -> Result<Self> {
        let affine = (p.get("weight", &[channels], Init::Ones)?, p.get("bias", &[channels], Init::Zeros)?);
        let fits = channels % 8 == 0 && channels <= fused::MOST_CHANNELS;
        Ok(GroupNorm { affine, groups, eps, fused: fits && p.fused().norm })
    }

    /// [B, C, H, W] to the same shape and kind.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.past(&x.shallow_clone().into(), None, false)?.1)
    }

    /// SiLU after the norm of `x` [B, C, H, W], to which `add` [B, C] float32 is added first.
    pub(crate) fn activated(&self, x: &Tensor, add: Option<&Tensor>) -> Result<Tensor> {
        Ok(self.past(&x.shallow_clone().into(), add, true)?.1)
    }

    /// `x`, and its norm as [`Self::activated`] or [`Self::forward`] has it. What goes past the norm is to be taken from here: the gradients of both may
    /// come in one pass.
    pub(crate) fn past(&self, x: &Joined, add: Option<&Tensor>, activate: bool) -> Result<(Joined, Tensor)> {
        let (weight, bias) = &self.affine;
        if self.fused {
            return Ok(fused::group_norm(x, (weight, bias), add, (self.groups, self.eps), activate)?);
        }
        let x = x.one()?;
        let kind = x.f_kind()?;
        let mut wide = x.f_to_kind(Kind::Float)?;
        if let Some(add) = add {
            wide = wide.f_add(&add.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let (weight, bias) = float_pair(Some(&self.affine))?;
        let y = wide.f_group_norm(self.groups, weight.as_ref(), bias.as_ref(), self.eps, false)?.f_to_kind(kind)?;
        Ok((x.into(), if activate { silu(&y)? } else { y }))
    }
}

/// T5's and LLaMA's norm: scaled by the root mean square over the last axis, in float32; no mean is taken off, nothing is added.
/// Weight `weight` `[width]`.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
    fused: bool,
}

impl RmsNorm {
    /// With a learned scale.
    pub fn new(p: &Params, width: i64, eps: f64) -> Result<Self> {
        let fits = width % 8 == 0 && width <= fused::MOST_CHANNELS;
        Ok(RmsNorm { weight: p.get("weight", &[width], Init::Ones)?, eps, fused: fits && p.fused().norm })
    }

    /// `[.., width]` to the same shape, in the weight's kind.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.fused {
            return Ok(fused::rms_norm(x, &self.weight, self.eps)?);
        }
        let wide = x.f_to_kind(Kind::Float)?;
        let mean = wide.f_square()?.f_mean_dim(-1i64, true, Kind::Float)?;
        let scaled = wide.f_mul(&mean.f_add_scalar(self.eps)?.f_rsqrt()?)?;
        Ok(scaled.f_to_kind(self.weight.f_kind()?)?.f_mul(&self.weight)?)
    }
}

/// Which keys a query of a causal text encoder does not see: later tokens, and those whose mask is 0.
///
/// # Shapes
/// `attention_mask` `[B, S]` of 0 and 1; to `[B, 1, S, S]` bool, queries before keys.
pub fn causal(attention_mask: &Tensor) -> Result<Tensor> {
    let (_, s) = attention_mask.size2()?;
    let places = Tensor::f_arange(s, (Kind::Int64, attention_mask.device()))?;
    let later = places.f_unsqueeze(0)?.f_gt_tensor(&places.f_unsqueeze(1)?)?; // [S, S], key after query
    let padding = attention_mask.f_eq(0)?.f_unsqueeze(1)?.f_unsqueeze(1)?; // [B, 1, 1, S]
    Ok(later.f_logical_or(&padding)?)
}

/// `softmax(q kᵀ / √K) v` for queries that see the keys not `hidden`, the softmax in float32.
///
/// # Shapes
/// `q`, `k` and `v` `[B, H, S, K]`, `hidden` `[B, 1, S, S]` bool; to `[B, S, H · K]`.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, hidden: &Tensor) -> Result<Tensor> {
    let (b, _, s, width) = q.size4()?;
    let scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_to_kind(Kind::Float)?.f_mul_scalar((width as f64).powf(-0.5))?;
    // Finite, so that a token that sees nothing gives no NaN.
    let scores = scores.f_masked_fill(hidden, f64::from(f32::MIN))?;
    let shares = scores.f_softmax(-1, Kind::Float)?.f_to_kind(v.f_kind()?)?;
    Ok(shares.f_matmul(v)?.f_transpose(1, 2)?.f_reshape([b, s, -1])?)
}

fn float_pair(affine: Option<&(Tensor, Tensor)>) -> Result<(Option<Tensor>, Option<Tensor>)> {
    Ok(match affine {
        None => (None, None),
        Some((weight, bias)) => (Some(weight.f_to_kind(Kind::Float)?), Some(bias.f_to_kind(Kind::Float)?)),
    })
}

/// A table of vectors, weight `weight` `[count, width]`.
#[derive(Debug)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// `count` vectors of `width`, initially normal with the given standard deviation.
    pub fn new(p: &Params, count: i64, width: i64, std: f64) -> Result<Self> {
        Ok(Embedding { weight: p.get("weight", &[count, width], Init::Normal { std })? })
    }

    /// Ids `[..]` (i64) to `[.., width]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(&self.weight, ids, -1, false, false)?)
    }
}

/// diffusers' `Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)`: `[B]` i64 to `[B, channels]` float32,
/// cosines first.
pub fn timestep_embedding(timesteps: &Tensor, channels: i64) -> Result<Tensor> {
    sinusoid(timesteps, channels, true, 0)
}

/// diffusers' `Timesteps` in general: `[B]` i64 to `[B, channels]` float32, cosines or sines first, frequencies from 1 down to
/// 10000^(-(n-1)/(n-shift)) for n = channels / 2. float32 whatever the network's kind, because lower precision cannot tell
/// 999 from 1000.
pub fn sinusoid(timesteps: &Tensor, channels: i64, cosines_first: bool, shift: i64) -> Result<Tensor> {
    let half = channels / 2;
    let device = timesteps.device();
    let steps = Tensor::f_arange(half, (Kind::Float, device))?;
    let frequencies = steps.f_mul_scalar(-(10_000f64.ln()))?.f_div_scalar((half - shift) as f64)?.f_exp()?;
    let angles = timesteps.f_to_kind(Kind::Float)?.f_unsqueeze(1)?.f_mul(&frequencies.f_unsqueeze(0)?)?; // [B, half]
    let (cos, sin) = (angles.f_cos()?, angles.f_sin()?);
    let embedding = Tensor::f_cat(&if cosines_first { [cos, sin] } else { [sin, cos] }, 1)?;
    Ok(if channels % 2 == 1 { embedding.f_constant_pad_nd([0, 1])? } else { embedding })
}

/// Σ a · b in float32. Its gradient by `a` is exactly `b`, in the kind of `a`: by this a gradient `b` that is at hand goes on through
/// whatever made `a`.
pub fn inner_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.f_to_kind(Kind::Float)?.f_mul(&b.f_to_kind(Kind::Float)?)?.f_sum(Kind::Float)?)
}

/// `x · σ(x)`.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_silu()?)
}

/// The exact GELU, by the error function.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_gelu("none")?)
}

/// The GELU's tanh approximation (transformers' `gelu_new`).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_gelu("tanh")?)
}
