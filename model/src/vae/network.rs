//! The two halves of the autoencoder: diffusers 0.42, `models/autoencoders/vae.py` (`Encoder`, `Decoder`), `models/unets/unet_2d_blocks.py`
//! (`DownEncoderBlock2D`, `UpDecoderBlock2D`, `UNetMidBlock2D`).

use ella_cuda::speed::attend;
use tch::Tensor;

use super::VaeConfig;
use super::config::EPS;
use crate::error::Result;
use crate::layers::{Conv2d, GroupNorm, Linear};
use crate::params::Params;
use crate::unet::{Downsample, Norm, Resnet, Upsample};

/// Pictures to moments.
#[derive(Debug)]
pub(super) struct Encoder {
    pub(super) conv_in: Conv2d,
    down_blocks: Vec<(Vec<Resnet>, Option<Downsample>)>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(super) fn new(p: &Params, config: &VaeConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let mut down_blocks = Vec::new();
        for (level, &output) in channels.iter().enumerate() {
            let p = p.at("down_blocks").at(level);
            let resnets = resnets(&p, config.layers_per_block, (channels[level.saturating_sub(1)], output), config.norm())?;
            let halve = (level + 1 < channels.len()).then(|| Downsample::new(&p.at("downsamplers").at(0), output, 0));
            down_blocks.push((resnets, halve.transpose()?));
        }
        let deepest = config.deepest();
        Ok(Self {
            conv_in: Conv2d::new(&p.at("conv_in"), config.in_channels, channels[0], 3)?,
            down_blocks,
            mid_block: MidBlock::new(&p.at("mid_block"), config)?,
            conv_norm_out: GroupNorm::new(&p.at("conv_norm_out"), deepest, config.norm_num_groups, EPS)?,
            conv_out: Conv2d::new(&p.at("conv_out"), deepest, 2 * config.latent_channels, 3)?,
        })
    }

    pub(super) fn forward(&self, image: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(image)?;
        for (resnets, downsample) in &self.down_blocks {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(downsample) = downsample {
                x = downsample.forward(&x)?;
            }
        }
        let x = self.mid_block.forward(&x)?;
        self.conv_out.forward(&self.conv_norm_out.activated(&x, None)?)
    }
}

/// Latents to pictures.
#[derive(Debug)]
pub(super) struct Decoder {
    pub(super) conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<(Vec<Resnet>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    pub(super) fn new(p: &Params, config: &VaeConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (first, deepest) = (channels[0], config.deepest());
        let mut up_blocks = Vec::new();
        let mut input = deepest;
        for (i, &output) in channels.iter().rev().enumerate() {
            let p = p.at("up_blocks").at(i);
            let resnets = resnets(&p, config.layers_per_block + 1, (input, output), config.norm())?;
            let double = (i + 1 < channels.len()).then(|| Upsample::new(&p.at("upsamplers").at(0), output));
            up_blocks.push((resnets, double.transpose()?));
            input = output;
        }
        Ok(Self {
            conv_in: Conv2d::new(&p.at("conv_in"), config.latent_channels, deepest, 3)?,
            mid_block: MidBlock::new(&p.at("mid_block"), config)?,
            up_blocks,
            conv_norm_out: GroupNorm::new(&p.at("conv_norm_out"), first, config.norm_num_groups, EPS)?,
            conv_out: Conv2d::new(&p.at("conv_out"), first, config.out_channels, 3)?,
        })
    }

    pub(super) fn forward(&self, latent: &Tensor) -> Result<Tensor> {
        let mut x = self.mid_block.forward(&self.conv_in.forward(latent)?)?;
        for (resnets, upsample) in &self.up_blocks {
            for resnet in resnets {
                x = resnet.forward(&x, None)?;
            }
            if let Some(upsample) = upsample {
                let (_, _, h, w) = x.size4()?;
                x = upsample.forward(&x, (2 * h, 2 * w))?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.activated(&x, None)?)
    }
}

/// `count` residual blocks, the first of which changes the number of channels.
fn resnets(p: &Params, count: i64, channels: (i64, i64), norm: Norm) -> Result<Vec<Resnet>> {
    let (input, output) = channels;
    (0..count).map(|i| Resnet::new(&p.at("resnets").at(i), (if i == 0 { input } else { output }, output), None, norm)).collect()
}

/// Two residual blocks, with attention between them if the configuration has it.
#[derive(Debug)]
struct MidBlock {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl MidBlock {
    fn new(p: &Params, config: &VaeConfig) -> Result<Self> {
        let n = config.deepest();
        let resnet = |i: i64| Resnet::new(&p.at("resnets").at(i), (n, n), None, config.norm());
        let attention = config.mid_block_add_attention.then(|| Attention::new(&p.at("attentions").at(0), n, config.norm()));
        Ok(Self { first: resnet(0)?, attention: attention.transpose()?, second: resnet(1)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            h = attention.forward(&h)?;
        }
        self.second.forward(&h, None)
    }
}

/// One head of attention over a feature map's pixels, beside a residual.
#[derive(Debug)]
struct Attention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    fn new(p: &Params, channels: i64, norm: Norm) -> Result<Self> {
        // Checkpoints from before diffusers 0.12, SD 1.5's among them, have other names.
        let old = p.has("query.weight") && !p.has("to_q.weight");
        let linear = |now: &str, before: &str| Linear::new(&p.at(if old { before } else { now }), channels, channels);
        Ok(Self {
            group_norm: GroupNorm::new(&p.at("group_norm"), channels, norm.groups, norm.eps)?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.group_norm.forward(x)?.f_flatten(2, 3)?.f_transpose(1, 2)?; // [B, HW, C]
        let y = attend(&self.to_q.forward(&h)?, &self.to_k.forward(&h)?, &self.to_v.forward(&h)?, 1)?;
        let y = self.to_out.forward(&y)?.f_transpose(1, 2)?; // [B, C, HW]
        Ok(x.f_add(&y.f_reshape(x.size())?)?)
    }
}
