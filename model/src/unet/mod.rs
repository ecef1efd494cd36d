//! The frozen diffusion U-Net: diffusers' `UNet2DConditionModel` of the SD 1, SD 2 and SDXL kinds, driven by its `config.json`.
//!
//! Follows diffusers 0.42, `models/unets/unet_2d_condition.py`. Parameters never require gradients; gradients flow through the
//! activations to the text features, which is all that training a connector needs.

mod attention;
mod blocks;
mod checkpoint;
mod config;
mod resnet;
mod time;

use std::path::Path;

use tch::{Device, Kind, Tensor};

use self::blocks::{Condition, DownBlock, MidBlock, UpBlock};
use self::time::TimeEmbedding;
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, GroupNorm};
use crate::lora::{Lora, Merge};
use crate::params::{Compute, Params};
use crate::part::Part;

pub use self::checkpoint::{Checkpointed, Gradients};
pub use self::config::UNetConfig;
pub(crate) use self::resnet::{Downsample, Norm, Resnet, Upsample};
pub use self::time::{Added, AddedConfig};

/// The U-Net.
#[derive(Debug)]
pub struct UNet {
    config: UNetConfig,
    conv_in: Conv2d,
    time: TimeEmbedding,
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
        let (down, up) = (p.at("down_blocks"), p.at("up_blocks"));
        Ok(Self {
            conv_in: Conv2d::new(&p.at("conv_in"), config.in_channels, first, 3)?,
            time: TimeEmbedding::new(config, p)?,
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
        Self::from_part(Part::open(dir)?, kind, device)
    }

    /// Builds the network from what [`UNet::load`] finds in a folder, wherever it lies; errors as there.
    pub fn from_part(part: Part, kind: Kind, device: Device) -> Result<Self> {
        Self::from_part_with(part, &[], kind, device)
    }

    /// The same with `loras` merged into it.
    ///
    /// # Errors
    /// Those of [`UNet::load`]; a LoRA was made for another architecture.
    pub fn from_part_with(part: Part, loras: &[Lora], kind: Kind, device: Device) -> Result<Self> {
        Self::computing(part, loras, Compute::fastest(kind, device)?, kind, device)
    }

    /// [`UNet::from_part_with`], in a chosen way.
    pub fn computing(part: Part, loras: &[Lora], compute: Compute, kind: Kind, device: Device) -> Result<Self> {
        let config = UNetConfig::read(part.config)?;
        let p = Params::merged(part.weights, Merge::new(loras, &config)?, kind, device);
        p.compute_by(compute);
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
    ///
    /// # Errors
    /// An input does not fit, or the network needs [`Added`] conditions too.
    pub fn forward(&self, sample: &Tensor, timesteps: &Tensor, hidden_states: &Tensor) -> Result<Tensor> {
        self.forward_added(sample, timesteps, hidden_states, None)
    }

    /// [`UNet::forward`] with the further conditions of SDXL's kind.
    ///
    /// # Errors
    /// An input does not fit; conditions are missing that the network needs, or given to one that has no use for them.
    pub fn forward_added(&self, sample: &Tensor, timesteps: &Tensor, hidden_states: &Tensor, added: Option<&Added>) -> Result<Tensor> {
        // 0. centre, 1. time, 2. pre-process
        let Start { mut x, time, text } = self.start(sample, timesteps, hidden_states, added)?;
        let c = Condition { time: &time, text: &text };
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
        self.finish(&x)
    }

    /// What the blocks take, from inputs that are checked and cast to the network's kind.
    fn start(&self, sample: &Tensor, timesteps: &Tensor, hidden_states: &Tensor, added: Option<&Added>) -> Result<Start> {
        let batch = self.check(sample, timesteps, hidden_states)?;
        AddedConfig::check(self.config.added.as_ref(), added, batch)?;
        let kind = self.conv_in.kind();
        let mut x = sample.f_to_kind(kind)?;
        if self.config.center_input_sample {
            x = x.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?;
        }
        let time = self.time.forward(timesteps, added, kind)?;
        Ok(Start { x: self.conv_in.forward(&x)?, time, text: hidden_states.f_to_kind(kind)? })
    }

    /// The prediction, from what the last block made.
    fn finish(&self, x: &Tensor) -> Result<Tensor> {
        self.conv_out.forward(&self.conv_norm_out.activated(x, None)?)
    }

    /// The number of samples, if all inputs fit.
    fn check(&self, sample: &Tensor, timesteps: &Tensor, hidden_states: &Tensor) -> Result<i64> {
        let refuse = |what: &str, expected: String, x: &Tensor| Err(misshapen(what, expected, x));
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
            [b, _, d] if b == batch && d == width => Ok(batch),
            _ => refuse("hidden_states", format!("[{batch}, L, {width}]"), hidden_states),
        }
    }
}

/// What goes into the first block: its feature map [B, C, H, W], and the two parts of every block's [`Condition`].
struct Start {
    x: Tensor,
    time: Tensor,
    text: Tensor,
}

/// The error of an input of the wrong shape or kind.
fn misshapen(what: &str, expected: String, x: &Tensor) -> ModelError {
    ModelError::argument(what, expected, format!("{:?} {:?}", x.size(), x.kind()))
}
