//! Residual blocks and the two changes of resolution, shared by the U-Net and the VAE.
//!
//! diffusers 0.42: `models/resnet.py` (`ResnetBlock2D`), `models/downsampling.py`, `models/upsampling.py`.

use ella_cuda::fused::{self, Joined};
use ella_cuda::resize::{FrozenDouble, FrozenHalf};
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::layers::{Conv2d, GroupNorm, Linear};
use crate::params::Params;

/// What group norms need besides their channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    /// Groups; they divide every number of channels.
    pub(crate) groups: i64,
    /// Added to the variance.
    pub(crate) eps: f64,
}

/// How the input comes to the sum at a block's end.
#[derive(Debug)]
enum Shortcut {
    /// As it is.
    Same,
    /// By a 1 × 1 convolution.
    Convolved(Conv2d),
    /// By one for each of two maps that stay apart.
    Apart([Conv2d; 2]),
}

/// Two normalized convolutions around a residual; the time embedding is added between them, if there is one.
#[derive(Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Shortcut,
    fused: bool,
}

impl Resnet {
    /// (input, output) channels; `time` is the width of the time embedding, if there is one.
    pub(crate) fn new(p: &Params, channels: (i64, i64), time: Option<i64>, norm: Norm) -> Result<Self> {
        Self::joining(p, (channels.0, 0), channels.1, time, norm)
    }

    /// The same over a feature map and a skip beside each other, of so many channels.
    pub(crate) fn joining(p: &Params, input: (i64, i64), output: i64, time: Option<i64>, norm: Norm) -> Result<Self> {
        let (first, skip) = input;
        let (input, fused) = (first + skip, p.fused().conv && output % 8 == 0);
        let shortcut = || -> Result<Shortcut> {
            let conv = Conv2d::new(&p.at("conv_shortcut"), input, output, 1)?;
            let apart = skip > 0 && fused && p.fused().norm && first % 8 == 0 && skip % 8 == 0 && input <= fused::MOST_CHANNELS;
            Ok(if apart { Shortcut::Apart(conv.parted(first)?) } else { Shortcut::Convolved(conv) })
        };
        Ok(Self {
            norm1: GroupNorm::new(&p.at("norm1"), input, norm.groups, norm.eps)?,
            conv1: Conv2d::new(&p.at("conv1"), input, output, 3)?,
            time_emb_proj: time.map(|width| Linear::new(&p.at("time_emb_proj"), width, output)).transpose()?,
            norm2: GroupNorm::new(&p.at("norm2"), output, norm.groups, norm.eps)?,
            conv2: Conv2d::new(&p.at("conv2"), output, output, 3)?,
            shortcut: if input == output { Shortcut::Same } else { shortcut()? },
            fused,
        })
    }

    /// `x` [B, in, H, W] and the activated time embedding [B, T] to [B, out, H, W].
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        self.forward_joined(x.shallow_clone().into(), time)
    }

    /// The same of a map that may come in two parts.
    pub(crate) fn forward_joined(&self, x: Joined, time: Option<&Tensor>) -> Result<Tensor> {
        let x = if matches!(self.shortcut, Shortcut::Apart(_)) { x } else { x.one()?.into() };
        let time = match (&self.time_emb_proj, time) {
            (Some(project), Some(time)) => Some(project.forward(time)?), // [B, out]
            _ => None,
        };
        if self.fused {
            return self.forward_fused(&x, time);
        }
        let (x, h) = self.norm1.past(&x, None, true)?;
        let mut h = self.conv1.forward(&h)?;
        if let Some(time) = time {
            h = h.f_add(&time.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let (x, h) = (x.one()?, self.conv2.forward(&self.norm2.activated(&h, None)?)?);
        Ok(match &self.shortcut {
            Shortcut::Convolved(conv) => conv.forward(&x)?.f_add(&h)?,
            _ => x.f_add(&h)?,
        })
    }

    /// The same with every bias, and the time, in the operator after it.
    fn forward_fused(&self, x: &Joined, time: Option<Tensor>) -> Result<Tensor> {
        let (x, h) = self.norm1.past(x, None, true)?;
        let h = self.conv1.unbiased(&h)?;
        let bias = self.conv1.bias()?;
        let add = match time {
            Some(time) => time.f_to_kind(Kind::Float)?.f_add(&bias)?,
            None => bias.f_unsqueeze(0)?.f_expand([h.size()[0], -1], false)?.f_contiguous()?,
        };
        let h = self.conv2.unbiased(&self.norm2.activated(&h, Some(&add))?)?;
        let bias = self.conv2.bias()?;
        Ok(match (&self.shortcut, &x.second) {
            (Shortcut::Apart([first, other]), Some(second)) => {
                let (a, b) = (first.unbiased(&x.first)?, other.unbiased(second)?);
                fused::add_biased(&a, &b, Some(&h), &bias.f_add(&first.bias()?)?)?
            }
            (Shortcut::Convolved(conv), _) => fused::add_biased(&conv.unbiased(&x.one()?)?, &h, None, &bias.f_add(&conv.bias()?)?)?,
            _ => fused::add_biased(&x.one()?, &h, None, &bias)?,
        })
    }
}

/// A convolution of stride 2.
#[derive(Debug)]
pub(crate) struct Downsample {
    conv: Conv2d,
    padding: i64,
    half: Option<FrozenHalf>,
}

impl Downsample {
    /// `padding` is 1, or 0 for one row below and one column to the right.
    pub(crate) fn new(p: &Params, channels: i64, padding: i64) -> Result<Self> {
        let conv = Conv2d::strided(&p.at("conv"), (channels, channels), 3, (2, padding))?;
        let fused = p.fused().resize && channels % 8 == 0 && padding == 1;
        Ok(Self { half: fused.then(|| FrozenHalf::new(conv.weight())).transpose()?, conv, padding })
    }

    /// [B, C, H, W] to [B, C, ⌈H/2⌉, ⌈W/2⌉] (padding 1) or [B, C, ⌊H/2⌋, ⌊W/2⌋] (padding 0).
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.size4()?;
        match &self.half {
            Some(half) if h % 2 == 0 && w % 2 == 0 => Ok(half.forward(x)?.f_add(&self.conv.offset()?)?),
            _ if self.padding == 0 => self.conv.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?),
            _ => self.conv.forward(x),
        }
    }
}

/// Nearest neighbours, then a convolution.
#[derive(Debug)]
pub(crate) struct Upsample {
    conv: Conv2d,
    double: Option<FrozenDouble>,
}

impl Upsample {
    /// `channels` in and out.
    pub(crate) fn new(p: &Params, channels: i64) -> Result<Self> {
        let conv = Conv2d::new(&p.at("conv"), channels, channels, 3)?;
        let bias = conv.bias()?;
        let fused = p.fused().resize && channels % 8 == 0;
        Ok(Self { double: fused.then(|| FrozenDouble::new(conv.weight(), &bias)).transpose()?, conv })
    }

    /// [B, C, H, W] to [B, C, H', W'] with the given (H', W').
    pub(crate) fn forward(&self, x: &Tensor, size: (i64, i64)) -> Result<Tensor> {
        let (_, _, h, w) = x.size4()?;
        match &self.double {
            Some(double) if size == (2 * h, 2 * w) => Ok(double.forward(x)?),
            _ => self.conv.forward(&x.f_upsample_nearest2d([size.0, size.1], None, None)?),
        }
    }
}
