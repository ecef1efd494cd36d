//! The blocks of the way down, the middle and the way up, with and without transformers.
//!
//! diffusers 0.42, `models/unets/unet_2d_blocks.py`: `(CrossAttn)DownBlock2D`, `UNetMidBlock2DCrossAttn`, `(CrossAttn)UpBlock2D`.

use ella_cuda::fused::Joined;
use tch::Tensor;

use super::UNetConfig;
use super::attention::Transformer;
use super::resnet::{Downsample, Norm, Resnet, Upsample};
use crate::error::{ModelError, Result};
use crate::params::Params;

/// What every block is told besides its feature map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Condition<'a> {
    /// The time embedding after its activation, [B, T].
    pub(crate) time: &'a Tensor,
    /// The text features, [B, L, D].
    pub(crate) text: &'a Tensor,
}

/// A residual block and, in blocks that have them, the transformer after it.
#[derive(Debug)]
struct Layer {
    resnet: Resnet,
    attention: Option<Transformer>,
}

/// Where a block is, and how many transformer layers follow each of its residual blocks, if any do.
#[derive(Clone, Copy, Debug)]
struct Place<'a> {
    level: usize,
    transformers: Option<&'a [i64]>,
}

impl Layer {
    /// The `i`-th layer of a block at `place.level`, with so many channels coming in from the layer before and from a skip.
    fn new(p: &Params, i: i64, input: (i64, i64), place: Place, config: &UNetConfig) -> Result<Self> {
        let Place { level, transformers } = place;
        let output = config.block_out_channels[level];
        let depth = transformers.map(|depths| depths[i as usize]);
        Ok(Self {
            resnet: Resnet::joining(&p.at("resnets").at(i), input, output, Some(config.time_embed_dim), norm(config))?,
            attention: depth.map(|depth| Transformer::new(&p.at("attentions").at(i), level, depth, config)).transpose()?,
        })
    }

    fn forward(&self, x: Joined, c: Condition) -> Result<Tensor> {
        let h = self.resnet.forward_joined(x, Some(c.time))?;
        match &self.attention {
            Some(attention) => attention.forward(&h, c.text),
            None => Ok(h),
        }
    }
}

fn norm(config: &UNetConfig) -> Norm {
    Norm { groups: config.norm_num_groups, eps: config.norm_eps }
}

/// One level of the way down: layers, then half the resolution, but for the last level.
#[derive(Debug)]
pub(crate) struct DownBlock {
    layers: Vec<Layer>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    /// The block at `level`.
    pub(crate) fn new(p: &Params, level: usize, config: &UNetConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let transformers = config.down_attention[level].then_some(config.down_transformers[level].as_slice());
        let place = Place { level, transformers };
        let input = |i| if i == 0 { channels[level.saturating_sub(1)] } else { channels[level] };
        let layer = |i| Layer::new(p, i, (input(i), 0), place, config);
        let halves = level < config.halvings();
        let half = || Downsample::new(&p.at("downsamplers").at(0), channels[level], config.downsample_padding);
        Ok(Self {
            layers: (0..config.layers_per_block[level]).map(layer).collect::<Result<_>>()?,
            downsample: halves.then(half).transpose()?,
        })
    }

    /// Whether it takes the text.
    pub(crate) fn attends(&self) -> bool {
        self.layers.iter().any(|layer| layer.attention.is_some())
    }

    /// The feature map one level down; what every layer made, and the smaller map, are pushed to `skips`.
    pub(crate) fn forward(&self, x: Tensor, c: Condition, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for layer in &self.layers {
            x = layer.forward(x.into(), c)?;
            skips.push(x.shallow_clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x)?;
            skips.push(x.shallow_clone());
        }
        Ok(x)
    }
}

/// The middle: two residual blocks around a transformer.
#[derive(Debug)]
pub(crate) struct MidBlock {
    first: Resnet,
    attention: Transformer,
    second: Resnet,
}

impl MidBlock {
    /// The middle of this U-Net.
    pub(crate) fn new(p: &Params, config: &UNetConfig) -> Result<Self> {
        let level = config.halvings();
        let channels = config.block_out_channels[level];
        let resnet = |i: i64| Resnet::new(&p.at("resnets").at(i), (channels, channels), Some(config.time_embed_dim), norm(config));
        let attention = Transformer::new(&p.at("attentions").at(0), level, config.mid_transformers, config)?;
        Ok(Self { first: resnet(0)?, attention, second: resnet(1)? })
    }

    /// [B, C, H, W] to the same shape.
    pub(crate) fn forward(&self, x: &Tensor, c: Condition) -> Result<Tensor> {
        let h = self.first.forward(x, Some(c.time))?;
        let h = self.attention.forward(&h, c.text)?;
        self.second.forward(&h, Some(c.time))
    }
}

/// One level of the way up: layers over the feature map beside what the way down left, then twice the resolution, but for the last.
#[derive(Debug)]
pub(crate) struct UpBlock {
    layers: Vec<Layer>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    /// The `i`-th block of the way up.
    pub(crate) fn new(p: &Params, i: usize, config: &UNetConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let level = config.halvings() - i;
        let below = channels[(level + 1).min(config.halvings())];
        let last = config.layers_per_block[level];
        // The last layer takes the map from before this level: the one above's, or the first convolution's.
        let skip = |j| if j == last { channels[level.saturating_sub(1)] } else { channels[level] };
        let input = |j| if j == 0 { below } else { channels[level] };
        let place = Place { level, transformers: config.up_attention[i].then_some(config.up_transformers[i].as_slice()) };
        let layer = |j| Layer::new(p, j, (input(j), skip(j)), place, config);
        let double = || Upsample::new(&p.at("upsamplers").at(0), channels[level]);
        Ok(Self { layers: (0..=last).map(layer).collect::<Result<_>>()?, upsample: (level > 0).then(double).transpose()? })
    }

    /// The feature map one level up. Takes its skips off the end of `skips`; the one that is last then gives the new size, which is not
    /// always the double: 9 halves to 5.
    pub(crate) fn forward(&self, x: Tensor, c: Condition, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        let mut x = x;
        for layer in &self.layers {
            let skip = skips.pop().ok_or_else(|| ModelError::argument("skips", "one for each layer", "none left"))?;
            x = layer.forward(Joined { first: x, second: Some(skip) }, c)?;
        }
        match (&self.upsample, skips.last()) {
            (Some(upsample), Some(next)) => {
                let (_, _, h, w) = next.size4()?;
                upsample.forward(&x, (h, w))
            }
            _ => Ok(x),
        }
    }
}
