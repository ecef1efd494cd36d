//! A diffusion model as people bring it, and its networks one by one.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::part::Part;
use crate::schedule::Schedule;
use crate::unet::UNet;
use crate::vae::Vae;

/// A diffusion model: a folder in diffusers' layout (`unet/`, `vae/`, `scheduler/`, and `text_encoder/` with `tokenizer/`).
#[derive(Debug)]
pub struct Base {
    path: PathBuf,
}

impl Base {
    /// Opens the model at `path`. Its networks are read when they are asked for.
    ///
    /// # Errors
    /// Nothing is there.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Ok(Base { path: path.into() });
        }
        Err(ModelError::MissingFile { file: path.into(), expected: "a folder in diffusers' layout".into() })
    }

    /// Where it is; what errors about the whole model name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the U-Net is loaded from.
    pub fn unet_part(&self) -> Result<Part> {
        Part::open(&self.path.join("unet"))
    }

    /// What the VAE is loaded from.
    pub fn vae_part(&self) -> Result<Part> {
        Part::open(&self.path.join("vae"))
    }

    /// The scheduler's configuration.
    pub fn scheduler(&self) -> Result<ConfigFile> {
        ConfigFile::open(&self.path.join("scheduler/scheduler_config.json"))
    }

    /// The U-Net, computing in `kind` on `device`.
    pub fn unet(&self, kind: Kind, device: Device) -> Result<UNet> {
        UNet::from_part(self.unet_part()?, kind, device)
    }

    /// The VAE, computing in `kind` on `device`; in float32 where its configuration says that float16 overflows.
    pub fn vae(&self, kind: Kind, device: Device) -> Result<Vae> {
        Vae::from_part(self.vae_part()?, kind, device)
    }

    /// The noise schedule.
    pub fn schedule(&self, device: Device) -> Result<Schedule> {
        Schedule::read(self.scheduler()?, device)
    }
}
