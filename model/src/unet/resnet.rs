//! Residual blocks and the two changes of resolution, shared by the U-Net and the VAE.
//!
//! diffusers 0.42: `models/resnet.py` (`ResnetBlock2D`), `models/downsampling.py`, `models/upsampling.py`.

use ella_cuda::fused;
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

/// Two normalized convolutions around a residual; the time embedding is added between them, if there is one.
#[derive(Debug)]
pub(crate) struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    fused: bool,
}

impl Resnet {
    /// (input, output) channels; `time` is the width of the time embedding, if there is one.
    pub(crate) fn new(p: &Params, channels: (i64, i64), time: Option<i64>, norm: Norm) -> Result<Self> {
        let (input, output) = channels;
        Ok(Self {
            norm1: GroupNorm::new(&p.at("norm1"), input, norm.groups, norm.eps)?,
            conv1: Conv2d::new(&p.at("conv1"), input, output, 3)?,
            time_emb_proj: time.map(|width| Linear::new(&p.at("time_emb_proj"), width, output)).transpose()?,
            norm2: GroupNorm::new(&p.at("norm2"), output, norm.groups, norm.eps)?,
            conv2: Conv2d::new(&p.at("conv2"), output, output, 3)?,
            conv_shortcut: (input != output).then(|| Conv2d::new(&p.at("conv_shortcut"), input, output, 1)).transpose()?,
            fused: p.fused().conv && output % 8 == 0,
        })
    }

    /// `x` [B, in, H, W] and the activated time embedding [B, T] to [B, out, H, W].
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let time = match (&self.time_emb_proj, time) {
            (Some(project), Some(time)) => Some(project.forward(time)?), // [B, out]
            _ => None,
        };
        if self.fused {
            return self.forward_fused(x, time);
        }
        let (x, h) = self.norm1.past(x, None, true)?;
        let mut h = self.conv1.forward(&h)?;
        if let Some(time) = time {
            h = h.f_add(&time.f_unsqueeze(-1)?.f_unsqueeze(-1)?)?;
        }
        let h = self.conv2.forward(&self.norm2.activated(&h, None)?)?;
        Ok(match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(&x)?.f_add(&h)?,
            None => x.f_add(&h)?,
        })
    }

    /// The same with every bias, and the time, in the operator after it.
    fn forward_fused(&self, x: &Tensor, time: Option<Tensor>) -> Result<Tensor> {
        let (x, h) = self.norm1.past(x, None, true)?;
        let h = self.conv1.unbiased(&h)?;
        let bias = self.conv1.bias()?;
        let add = match time {
            Some(time) => time.f_to_kind(Kind::Float)?.f_add(&bias)?,
            None => bias.f_unsqueeze(0)?.f_expand([x.size()[0], -1], false)?.f_contiguous()?,
        };
        let h = self.conv2.unbiased(&self.norm2.activated(&h, Some(&add))?)?;
        let bias = self.conv2.bias()?;
        Ok(match &self.conv_shortcut {
            Some(shortcut) => fused::add_biased(&shortcut.unbiased(&x)?, &h, &bias.f_add(&shortcut.bias()?)?)?,
            None => fused::add_biased(&x, &h, &bias)?,
        })
    }
}

/// A convolution of stride 2.
#[derive(Debug)]
pub(crate) struct Downsample {
    conv: Conv2d,
    padding: i64,
}

impl Downsample {
    /// `padding` is 1, or 0 for one row below and one column to the right.
    pub(crate) fn new(p: &Params, channels: i64, padding: i64) -> Result<Self> {
        Ok(Self { conv: Conv2d::strided(&p.at("conv"), (channels, channels), 3, (2, padding))?, padding })
    }

    /// [B, C, H, W] to [B, C, ⌈H/2⌉, ⌈W/2⌉] (padding 1) or [B, C, ⌊H/2⌋, ⌊W/2⌋] (padding 0).
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.padding {
            0 => self.conv.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?),
            _ => self.conv.forward(x),
        }
    }
}

/// Nearest neighbours, then a convolution.
#[derive(Debug)]
pub(crate) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    /// `channels` in and out.
    pub(crate) fn new(p: &Params, channels: i64) -> Result<Self> {
        Ok(Self { conv: Conv2d::new(&p.at("conv"), channels, channels, 3)? })
    }

    /// [B, C, H, W] to [B, C, H', W'] with the given (H', W').
    pub(crate) fn forward(&self, x: &Tensor, size: (i64, i64)) -> Result<Tensor> {
        self.conv.forward(&x.f_upsample_nearest2d([size.0, size.1], None, None)?)
    }
}
