//! `config.json` of diffusers' `AutoencoderKL`: what is supported, what is refused.

use std::path::Path;

use serde_json::{Value, json};

use crate::config::ConfigFile;
use crate::error::Result;
use crate::unet::Norm;

/// ε of every group norm: fixed in the reference.
pub(super) const EPS: f64 = 1e-6;

/// The shape of an autoencoder, from `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Channels of a picture going in.
    pub in_channels: i64,
    /// Channels of a picture coming out.
    pub out_channels: i64,
    /// Channels of a latent.
    pub latent_channels: i64,
    /// Channels of each block; each but the last halves the picture.
    pub block_out_channels: Vec<i64>,
    /// Residual blocks in each block of the encoder; the decoder has one more.
    pub layers_per_block: i64,
    /// Groups of the group norms.
    pub norm_num_groups: i64,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// The diffusion model's latents are (latent − shift) · scaling.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift_factor: f64,
    /// Height and width of the pictures that it was trained on: a tile's.
    pub sample_size: i64,
    /// Whether float16 overflows in this network, so that it is to compute in float32 instead.
    pub force_upcast: bool,
}

impl VaeConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// A field is missing, out of range, unknown, or asks for something unsupported: named with file, rule and value.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::read(ConfigFile::open(&dir.join("config.json"))?)
    }

    /// Reads an opened configuration; errors as in [`VaeConfig::load`].
    pub fn read(c: ConfigFile) -> Result<Self> {
        let switch = |field, default| c.optional(field, "true or false", default);
        c.only("_class_name", &[json!("AutoencoderKL")])?;
        c.only("act_fn", &[json!("silu"), json!("swish")])?;
        for field in ["latents_mean", "latents_std"] {
            if c.value(field).is_some() {
                return Err(c.refuse(field, "null or absent"));
            }
        }
        let channels = "a list of numbers of channels, one for each block";
        let block_out_channels: Vec<i64> = c.required("block_out_channels", channels)?;
        let config = Self {
            in_channels: c.size_or("in_channels", 3)?,
            out_channels: c.size_or("out_channels", 3)?,
            latent_channels: c.size_or("latent_channels", 4)?,
            layers_per_block: c.size_or("layers_per_block", 1)?,
            norm_num_groups: c.size_or("norm_num_groups", 32)?,
            mid_block_add_attention: switch("mid_block_add_attention", true)?,
            use_quant_conv: switch("use_quant_conv", true)?,
            use_post_quant_conv: switch("use_post_quant_conv", true)?,
            scaling_factor: c.optional("scaling_factor", "a number", 0.18215)?,
            shift_factor: c.optional("shift_factor", "a number or null", 0.0)?,
            sample_size: sample_size(&c)?,
            // Configurations from before this field are of networks that work in float16.
            force_upcast: switch("force_upcast", false)?,
            block_out_channels,
        };
        if config.block_out_channels.is_empty() || config.block_out_channels.iter().any(|n| !(1..=1 << 20).contains(n)) {
            return Err(c.refuse("block_out_channels", channels));
        }
        if let Some(n) = config.block_out_channels.iter().find(|&n| n % config.norm_num_groups != 0) {
            return Err(c.refuse("norm_num_groups", &format!("a divisor of block_out_channels, of which one is {n}")));
        }
        if !config.scaling_factor.is_normal() {
            return Err(c.refuse("scaling_factor", "a number other than 0"));
        }
        for (field, kind) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
            let n = config.block_out_channels.len();
            let rule = format!("a list of {n} times {kind}, as long as block_out_channels");
            let types: Vec<Value> = c.required(field, &rule)?;
            if types != vec![json!(kind); n] {
                return Err(c.refuse(field, &rule));
            }
        }
        c.finish(&[])?;
        Ok(config)
    }

    /// How many pixels a latent's pixel stands for, in each direction.
    pub fn downscale(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    pub(super) fn norm(&self) -> Norm {
        Norm { groups: self.norm_num_groups, eps: EPS }
    }

    /// The deepest block's channels.
    pub(super) fn deepest(&self) -> i64 {
        self.block_out_channels[self.block_out_channels.len() - 1]
    }
}

/// One number, or height and width, of which the reference takes the first.
fn sample_size(c: &ConfigFile) -> Result<i64> {
    let (field, rule) = ("sample_size", "a whole number of at least 1, or two of them");
    let first = match c.value(field) {
        Some(Value::Array(_)) => c.required::<[i64; 2]>(field, rule)?[0],
        _ => c.optional(field, rule, 32)?,
    };
    // No picture is larger than the bound.
    if (1..=1 << 20).contains(&first) { Ok(first) } else { Err(c.refuse(field, rule)) }
}
