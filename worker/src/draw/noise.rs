//! The size of the pictures, and the noise that they start from.

use std::path::Path;

use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::rng::CounterRng;
use ella_model::unet::UNetConfig;
use ella_model::vae::VaeConfig;
use ella_model::weights::Weights;
use tch::{Device, Kind, Tensor};

use super::Shot;
use crate::models::check_latents;
use ella_proto::config::{LONGEST_SIDE, Size};

/// Why there is no noise for what is asked for.
#[derive(Debug, thiserror::Error)]
pub enum NoiseError {
    /// A size that the VAE has not. The setting's name comes before it.
    #[error("width and height must be multiples of the VAE's {downscale}, up to {LONGEST_SIDE} (found {found})")]
    Size {
        /// Pixels of a latent's side.
        downscale: i64,
        /// What was asked for.
        found: i64,
    },
    /// A file's noise is for other pictures.
    #[error(
        "{file}: tensor latents has the wrong shape (expected [{pictures}, {channels}, h, w], a row for each picture, found {found:?})"
    )]
    Shape {
        /// The file.
        file: String,
        /// How many.
        pictures: usize,
        /// The base's.
        channels: i64,
        /// What it has.
        found: Vec<i64>,
    },
    /// The base, or the file.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Where the first noise comes from.
#[derive(Debug)]
pub enum Noise {
    /// Drawn from each picture's seed; the shape `[C, h, w]`.
    Seeded([i64; 3]),
    /// A row for each picture, `[pictures, C, h, w]`.
    Given(Tensor),
}

impl Noise {
    /// Drawn from seeds, for pictures of `size` or of the base's own.
    ///
    /// # Errors
    /// See [`NoiseError`].
    pub fn seeded(base: &Base, size: Option<Size>) -> Result<Self, NoiseError> {
        let (unet, vae) = configs(base)?;
        let (own, downscale) = (unet.sample_size, vae.downscale());
        let Some(size) = size else { return Ok(Self::Seeded([unet.in_channels, own, own])) };
        if let Some(found) = [size.width, size.height].into_iter().find(|&side| side < 1 || side % downscale != 0 || side > LONGEST_SIDE) {
            return Err(NoiseError::Size { downscale, found });
        }
        Ok(Self::Seeded([unet.in_channels, size.height / downscale, size.width / downscale]))
    }

    /// The tensor `latents` in a file, for so many pictures.
    ///
    /// # Errors
    /// See [`NoiseError`].
    pub fn given(base: &Base, file: &Path, pictures: usize) -> Result<Self, NoiseError> {
        let (weights, channels) = (Weights::open(file)?, configs(base)?.0.in_channels);
        let shape = weights.describe("latents")?.0.to_vec();
        let count = pictures as i64;
        if !matches!(shape[..], [b, c, h, w] if b == count && c == channels && h > 0 && w > 0) {
            return Err(NoiseError::Shape { file: file.display().to_string(), pictures, channels, found: shape });
        }
        Ok(Self::Given(weights.load("latents", &shape, Kind::Float, Device::Cpu)?))
    }

    /// Height and width of the pictures in latents.
    pub fn size(&self) -> (i64, i64) {
        match self {
            Self::Seeded([_, h, w]) => (*h, *w),
            Self::Given(all) => (all.size()[2], all.size()[3]),
        }
    }

    /// The noise `[b, C, h, w]` of the pictures from the one of number `first` on. A seeded picture's depends on its seed only.
    ///
    /// # Errors
    /// libtorch's.
    pub fn rows(&self, first: usize, shots: &[Shot]) -> Result<Tensor, ModelError> {
        match self {
            Self::Seeded(shape) => normal(shots, "noise", shape),
            Self::Given(all) => Ok(all.f_narrow(0, first as i64, shots.len() as i64)?),
        }
    }
}

/// The base's U-Net and VAE, whose latents have equally many channels.
fn configs(base: &Base) -> Result<(UNetConfig, VaeConfig), ModelError> {
    let (unet, vae) = (UNetConfig::read(base.unet_part()?.config)?, VaeConfig::read(base.vae_part()?.config)?);
    check_latents(&unet, &vae, base.path())?;
    Ok((unet, vae))
}

/// Normal noise, a row of the given shape for each picture; it depends on the picture's seed and the name only.
pub(super) fn normal(shots: &[Shot], name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
    let len = shape.iter().product::<i64>() as usize;
    let numbers: Vec<f32> = shots.iter().flat_map(|shot| CounterRng::new(shot.seed, name).normal(len, 1.0)).collect();
    let shape = [&[shots.len() as i64], shape].concat();
    Ok(Tensor::f_from_slice(&numbers)?.f_reshape(shape)?)
}
