//! The variational autoencoder between pictures and latents: diffusers' `AutoencoderKL`, driven by its `config.json`.
//!
//! Follows diffusers 0.42, `models/autoencoders/autoencoder_kl.py`.

mod config;
mod network;
mod tiling;

use std::path::Path;

use tch::{Device, Kind, Tensor};

use self::network::{Decoder, Encoder};
use crate::error::{ModelError, Result};
use crate::layers::Conv2d;
use crate::params::{Compute, Params};
use crate::part::Part;

pub use self::config::VaeConfig;

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
        Self::computing(part, Compute::fastest(kind, device)?, kind, device)
    }

    /// [`Vae::from_part`] in a chosen way.
    pub fn computing(part: Part, compute: Compute, kind: Kind, device: Device) -> Result<Self> {
        let config = VaeConfig::read(part.config)?;
        let kind = if config.force_upcast && kind == Kind::Half { Kind::Float } else { kind };
        let p = Params::from_weights(part.weights, kind, device);
        p.compute_by(compute);
        let net = Self::new(&config, &p)?;
        p.finish(&[])?;
        Ok(net)
    }

    /// The configuration that it was made from.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// The kind that it computes in: not the one asked for where that was float16 and the configuration has `force_upcast`.
    pub fn kind(&self) -> Kind {
        self.decoder.conv_in.kind()
    }

    /// The distribution of latents that a picture stands for: (mean, log-variance clamped to −30..20), not yet scaled.
    ///
    /// # Shapes
    /// `image` [B, 3, H, W] in −1..1 → two of [B, 4, H/f, W/f] in the network's kind, with f the [`VaeConfig::downscale`].
    pub fn encode(&self, image: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check("image", image, self.config.in_channels)?;
        self.split(&self.moments(image)?)
    }

    /// The picture that a latent stands for, not clamped; the latent is already [unscaled](Vae::unscale).
    ///
    /// # Shapes
    /// `latent` [B, 4, h, w] → [B, 3, f·h, f·w] in the network's kind.
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor> {
        self.check("latent", latent, self.config.latent_channels)?;
        self.picture(latent)
    }

    /// Means and log-variances, one after the other and not clamped, of checked pictures.
    fn moments(&self, image: &Tensor) -> Result<Tensor> {
        let h = self.encoder.forward(&image.f_to_kind(self.kind())?)?;
        self.quant_conv.as_ref().map_or_else(|| Ok(h.shallow_clone()), |conv| conv.forward(&h))
    }

    /// Mean and clamped log-variance from [`Vae::moments`].
    fn split(&self, moments: &Tensor) -> Result<(Tensor, Tensor)> {
        let n = self.config.latent_channels;
        Ok((moments.f_narrow(1, 0, n)?, moments.f_narrow(1, n, n)?.f_clamp(-30.0, 20.0)?))
    }

    /// The pictures of checked latents.
    fn picture(&self, latent: &Tensor) -> Result<Tensor> {
        let z = latent.f_to_kind(self.kind())?;
        match &self.post_quant_conv {
            Some(conv) => self.decoder.forward(&conv.forward(&z)?),
            None => self.decoder.forward(&z),
        }
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
