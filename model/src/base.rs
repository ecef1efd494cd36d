//! A diffusion model as people bring it, and its networks one by one.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use crate::clip_tokenizer;
use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::lora::Lora;
use crate::part::Part;
use crate::schedule::Schedule;
use crate::tokenizer::TextTokenizer;
use crate::unet::UNet;
use crate::vae::Vae;

/// A diffusion model: a folder in diffusers' layout (`unet/`, `vae/`, `scheduler/`, and `text_encoder/` with `tokenizer/`).
#[derive(Debug)]
pub struct Base {
    path: PathBuf,
}

/// One of a base's own text encoders, and what makes token ids for it.
#[derive(Debug)]
pub struct TextEncoderPart {
    /// What [`crate::clip::Clip`] is loaded from.
    pub part: Part,
    /// Its tokenizer, where one lies beside it.
    pub tokenizer: Option<TextTokenizer>,
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

    /// The base's own text encoders: one, or SDXL's two in the order in which their features are joined. A base may have none.
    ///
    /// # Errors
    /// An encoder's or a tokenizer's files are damaged or incomplete.
    pub fn text_encoders(&self) -> Result<Vec<TextEncoderPart>> {
        let one = |(encoder, tokenizer): (&str, &str)| {
            let folder = self.path.join(encoder);
            let read = || -> Result<TextEncoderPart> {
                let tokenizer = self.path.join(tokenizer).is_dir().then(|| clip_tokenizer::load(&folder)).transpose()?;
                Ok(TextEncoderPart { part: Part::open(&folder)?, tokenizer })
            };
            folder.is_dir().then(read)
        };
        [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")].into_iter().filter_map(one).collect()
    }

    /// The U-Net, computing in `kind` on `device`.
    pub fn unet(&self, kind: Kind, device: Device) -> Result<UNet> {
        self.unet_with(&[], kind, device)
    }

    /// The U-Net with `loras` merged into it.
    pub fn unet_with(&self, loras: &[Lora], kind: Kind, device: Device) -> Result<UNet> {
        UNet::from_part_with(self.unet_part()?, loras, kind, device)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_folders_text_encoders_come_with_the_tokenizers_beside_them() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let dir = tempfile::tempdir().unwrap();
        let base = Base::open(dir.path()).unwrap();
        assert!(base.text_encoders().unwrap().is_empty());
        for (golden, name) in [("clip-l", "text_encoder"), ("clip-g", "text_encoder_2"), ("clip-tokenizer-l", "tokenizer")] {
            std::os::unix::fs::symlink(goldens.join(golden), dir.path().join(name)).unwrap();
        }
        let found = base.text_encoders().unwrap();
        assert_eq!(found.iter().map(|one| one.tokenizer.is_some()).collect::<Vec<_>>(), [true, false]);
        assert!(
            found.iter().zip(["text_encoder", "text_encoder_2"]).all(|(one, name)| one
                .part
                .config
                .file()
                .starts_with(dir.path().join(name)))
        );
    }
}
