//! Latents for prepared data sets: the VAE of a base model, as the data set's encoder.

use std::error::Error;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use ella_dataset::{LatentEncoder, LatentSpec};
use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::part::Part;
use ella_model::vae::Vae;
use half::f16;
use tch::{Device, Kind, Tensor};

use crate::device;
use crate::prepare::PrepareError;

/// Pictures encoded at once.
const BATCH: usize = 8;

/// A VAE's encoder.
#[derive(Debug)]
pub struct VaeLatents {
    vae: Mutex<Vae>,
    spec: LatentSpec,
    device: Device,
    threads: usize,
}

impl VaeLatents {
    /// Loads the VAE of the base model in `model` (its folder `vae/`, a single file's part, or a VAE's own folder) onto a device, to compute
    /// with so many threads.
    ///
    /// # Errors
    /// If it can't be loaded.
    pub fn load(model: &Path, device: Device, threads: usize) -> Result<Self, PrepareError> {
        let own = model.is_dir() && !model.join("vae").is_dir();
        let part = if own { Part::open(model)? } else { Base::open(model)?.vae_part()? };
        let digest = part.weights.digest();
        let vae = Vae::from_part(part, Kind::Float, device)?;
        let (channels, downscale) = (vae.config().latent_channels, vae.config().downscale() as u32);
        let spec = LatentSpec { model: digest.parse()?, channels: 2 * channels as u32, downscale };
        Ok(Self { vae: Mutex::new(vae), spec, device, threads })
    }

    /// `rgb` `[count, height, width, 3]` to moments `[count, channels, h, w]`: means, then log-variances, not scaled.
    fn moments(&self, rgb: &[u8], count: usize, (width, height): (u32, u32)) -> Result<Vec<f16>, ModelError> {
        // The calling thread is one of a pool.
        device::set_threads(self.threads);
        let shape = [count as i64, i64::from(height), i64::from(width), 3];
        let pictures = Tensor::f_from_slice(rgb)?.f_reshape(shape)?.f_permute([0, 3, 1, 2])?.f_to_device(self.device)?;
        let pictures = pictures.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1.0)?;
        let vae = self.vae.lock().unwrap_or_else(PoisonError::into_inner);
        let (mean, logvar) = tch::no_grad(|| vae.encode(&pictures))?;
        let both = Tensor::f_cat(&[mean, logvar], 1)?.f_to_kind(Kind::Half)?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut numbers = vec![f16::ZERO; both.numel()];
        let len = numbers.len();
        both.f_copy_data(&mut numbers, len)?;
        Ok(numbers)
    }
}

impl LatentEncoder for VaeLatents {
    fn spec(&self) -> LatentSpec {
        self.spec.clone()
    }

    fn batch(&self) -> usize {
        BATCH
    }

    fn encode(&self, rgb: &[u8], count: usize, size: (u32, u32)) -> Result<Vec<f16>, Box<dyn Error + Send + Sync>> {
        Ok(self.moments(rgb, count, size)?)
    }
}
