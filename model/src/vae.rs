//! The variational autoencoder between pictures and latents: diffusers' `AutoencoderKL`, driven by its `config.json`.
//!
//! Follows diffusers 0.42, `models/autoencoders/{autoencoder_kl,vae}.py`. Tiling and slicing are left to the caller.

use std::path::Path;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::layers::{Conv2d, GroupNorm, Linear, silu};
use crate::params::Params;
use crate::part::Part;
use crate::unet::{Downsample, Norm, Resnet, Upsample, attend};

/// ε of every group norm: fixed in the reference.
const EPS: f64 = 1e-6;

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
        // sample_size is a default for callers who name no size.
        c.finish(&["sample_size"])?;
        Ok(config)
    }

    /// How many pixels a latent's pixel stands for, in each direction.
    pub fn downscale(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    fn norm(&self) -> Norm {
        Norm { groups: self.norm_num_groups, eps: EPS }
    }

    /// The deepest block's channels.
    fn deepest(&self) -> i64 {
        self.block_out_channels[self.block_out_channels.len() - 1]
    }
}

/// The autoencoder.
#[derive(Debug)]
pub struct Vae {
    config: VaeConfig,
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
}

impl Vae {
    /// Builds the network from parameters that are named as in diffusers' checkpoints.
    pub fn new(config: &VaeConfig, p: &Params) -> Result<Self> {
        let pointwise = |name, n| Conv2d::new(&p.at(name), n, n, 1);
        let latent = config.latent_channels;
        Ok(Self {
            encoder: Encoder::new(&p.at("encoder"), config)?,
            quant_conv: config.use_quant_conv.then(|| pointwise("quant_conv", 2 * latent)).transpose()?,
            post_quant_conv: config.use_post_quant_conv.then(|| pointwise("post_quant_conv", latent)).transpose()?,
            decoder: Decoder::new(&p.at("decoder"), config)?,
            config: config.clone(),
        })
    }

    /// Loads the folder `dir` (`config.json` and weights), computing in `kind` on `device`; in float32 where the configuration says that
    /// float16 overflows.
    ///
    /// # Errors
    /// A file is missing or damaged, the configuration unsupported, or tensors are missing, misshapen or left over.
    pub fn load(dir: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::from_part(Part::open(dir)?, kind, device)
    }

    /// Builds the network from what [`Vae::load`] finds in a folder, wherever it lies; errors as there.
    pub fn from_part(part: Part, kind: Kind, device: Device) -> Result<Self> {
        let config = VaeConfig::read(part.config)?;
        let kind = if config.force_upcast && kind == Kind::Half { Kind::Float } else { kind };
        let p = Params::from_weights(part.weights, kind, device);
        let net = Self::new(&config, &p)?;
        p.finish(&[])?;
        Ok(net)
    }

    /// The configuration that it was made from.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// The distribution of latents that a picture stands for: (mean, log-variance clamped to −30..20), not yet scaled.
    ///
    /// # Shapes
    /// `image` [B, 3, H, W] in −1..1 → two of [B, 4, H/f, W/f] in the network's kind, with f the [`VaeConfig::downscale`].
    pub fn encode(&self, image: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check("image", image, self.config.in_channels)?;
        let mut h = self.encoder.forward(&image.f_to_kind(self.encoder.conv_in.kind())?)?;
        if let Some(conv) = &self.quant_conv {
            h = conv.forward(&h)?;
        }
        let n = self.config.latent_channels;
        Ok((h.f_narrow(1, 0, n)?, h.f_narrow(1, n, n)?.f_clamp(-30.0, 20.0)?))
    }

    /// The picture that a latent stands for, not clamped; the latent is already [unscaled](Vae::unscale).
    ///
    /// # Shapes
    /// `latent` [B, 4, h, w] → [B, 3, f·h, f·w] in the network's kind.
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        self.check("latent", latent, self.config.latent_channels)?;
        let mut z = latent.f_to_kind(self.decoder.conv_in.kind())?;
        if let Some(conv) = &self.post_quant_conv {
            z = conv.forward(&z)?;
        }
        self.decoder.forward(&z)
    }

    /// From the encoder's latents to the diffusion model's: (latent − shift) · scaling.
    pub fn scale(&self, latent: &Tensor) -> Result<Tensor> {
        Ok(latent.f_sub_scalar(self.config.shift_factor)?.f_mul_scalar(self.config.scaling_factor)?)
    }

    /// From the diffusion model's latents to the decoder's: latent / scaling + shift.
    pub fn unscale(&self, latent: &Tensor) -> Result<Tensor> {
        Ok(latent.f_div_scalar(self.config.scaling_factor)?.f_add_scalar(self.config.shift_factor)?)
    }

    fn check(&self, what: &str, x: &Tensor, channels: i64) -> Result<()> {
        match x.size()[..] {
            [_, c, _, _] if c == channels => Ok(()),
            _ => Err(ModelError::argument(what, format!("[B, {channels}, H, W]"), format!("{:?}", x.size()))),
        }
    }
}

#[derive(Debug)]
struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<(Vec<Resnet>, Option<Downsample>)>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(p: &Params, config: &VaeConfig) -> Result<Self> {
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

    fn forward(&self, image: &Tensor) -> Result<Tensor> {
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
        self.conv_out.forward(&silu(&self.conv_norm_out.forward(&x)?)?)
    }
}

#[derive(Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<(Vec<Resnet>, Option<Upsample>)>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(p: &Params, config: &VaeConfig) -> Result<Self> {
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

    fn forward(&self, latent: &Tensor) -> Result<Tensor> {
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
        self.conv_out.forward(&silu(&self.conv_norm_out.forward(&x)?)?)
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
