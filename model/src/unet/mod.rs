//! The frozen diffusion U-Net: diffusers' `UNet2DConditionModel` of the SD kind, driven by its `config.json`.
//!
//! Follows diffusers 0.42, `models/unets/unet_2d_condition.py`. Parameters never require gradients; gradients flow through the
//! activations to the text features, which is all that training a connector needs.

mod attention;
mod blocks;
mod config;
mod resnet;

use std::path::Path;

use tch::{Device, Kind, Tensor};

use self::blocks::{Condition, DownBlock, MidBlock, UpBlock};
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, GroupNorm, Linear, silu, sinusoid};
use crate::params::Params;
use crate::weights::Weights;

pub(crate) use self::attention::attend;
pub use self::config::UNetConfig;
pub(crate) use self::resnet::{Downsample, Norm, Resnet, Upsample};

/// The U-Net.
#[derive(Debug)]
pub struct UNet {
    config: UNetConfig,
    conv_in: Conv2d,
    time_embedding: (Linear, Linear),
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet {
    /// Builds the network from parameters that are named as in diffusers' checkpoints.
    pub fn new(config: &UNetConfig, p: &Params) -> Result<Self> {
        let blocks = 0..config.block_out_channels.len();
        let first = config.block_out_channels[0];
        let time = p.at("time_embedding");
        let (down, up) = (p.at("down_blocks"), p.at("up_blocks"));
        Ok(Self {
            conv_in: Conv2d::new(&p.at("conv_in"), config.in_channels, first, 3)?,
            time_embedding: (
                Linear::new(&time.at("linear_1"), first, config.time_embed_dim)?,
                Linear::new(&time.at("linear_2"), config.time_embed_dim, config.time_embed_dim)?,
            ),
            down_blocks: blocks.clone().map(|i| DownBlock::new(&down.at(i), i, config)).collect::<Result<_>>()?,
            mid_block: MidBlock::new(&p.at("mid_block"), config)?,
            up_blocks: blocks.map(|i| UpBlock::new(&up.at(i), i, config)).collect::<Result<_>>()?,
            conv_norm_out: GroupNorm::new(&p.at("conv_norm_out"), first, config.norm_num_groups, config.norm_eps)?,
            conv_out: Conv2d::new(&p.at("conv_out"), first, config.out_channels, 3)?,
            config: config.clone(),
        })
    }

    /// Loads the folder `dir` (`config.json` and weights), computing in `kind` on `device`.
    ///
    /// # Errors
    /// A file is missing or damaged, the configuration unsupported, or tensors are missing, misshapen or left over.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        let config = UNetConfig::load(dir)?;
        let p = Params::from_weights(Weights::open(dir)?, kind, device);
        let net = Self::new(&config, &p)?;
        p.finish(&[])?;
        Ok(net)
    }

    /// The configuration that it was made from.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// Predicts ε or v, whichever the network was taught. Inputs are cast to the network's kind; the output is of that kind.
    ///
    /// # Shapes
    /// `sample` [B, Cin, H, W] of any H and W, `timesteps` `[B]` i64 or float32, `hidden_states` [B, L, D] with D the `cross_attention_dim`;
    /// returns [B, Cout, H, W].
    pub fn forward(&self, sample: &Tensor, timesteps: &Tensor, hidden_states: &Tensor) -> Result<Tensor> {
        self.check(sample, timesteps, hidden_states)?;
        let kind = self.conv_in.kind();
        let text = hidden_states.f_to_kind(kind)?;

        // 0. centre
        let mut x = sample.f_to_kind(kind)?;
        if self.config.center_input_sample {
            x = x.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?;
        }

        // 1. time; every residual block would activate it, so it is done once
        let UNetConfig { flip_sin_to_cos, freq_shift, .. } = self.config;
        let t = sinusoid(timesteps, self.config.block_out_channels[0], flip_sin_to_cos, freq_shift)?.f_to_kind(kind)?;
        let time = silu(&self.time_embedding.1.forward(&silu(&self.time_embedding.0.forward(&t)?)?)?)?;
        let c = Condition { time: &time, text: &text };

        // 2. pre-process
        let mut x = self.conv_in.forward(&x)?;
        let mut skips = vec![x.shallow_clone()];

        // 3. down
        for block in &self.down_blocks {
            x = block.forward(x, c, &mut skips)?;
        }

        // 4. mid
        x = self.mid_block.forward(&x, c)?;

        // 5. up
        for block in &self.up_blocks {
            x = block.forward(x, c, &mut skips)?;
        }

        // 6. post-process
        self.conv_out.forward(&silu(&self.conv_norm_out.forward(&x)?)?)
    }

    fn check(&self, sample: &Tensor, timesteps: &Tensor, hidden_states: &Tensor) -> Result<()> {
        let refuse =
            |what: &str, expected: String, x: &Tensor| Err(ModelError::argument(what, expected, format!("{:?} {:?}", x.size(), x.kind())));
        let channels = self.config.in_channels;
        let batch = match sample.size()[..] {
            [batch, c, _, _] if c == channels => batch,
            _ => return refuse("sample", format!("[B, {channels}, H, W]"), sample),
        };
        if timesteps.size() != [batch] || !matches!(timesteps.kind(), Kind::Int64 | Kind::Float) {
            return refuse("timesteps", format!("[{batch}] Int64 or Float"), timesteps);
        }
        let width = self.config.cross_attention_dim;
        match hidden_states.size()[..] {
            [b, _, d] if b == batch && d == width => Ok(()),
            _ => refuse("hidden_states", format!("[{batch}, L, {width}]"), hidden_states),
        }
    }
}
