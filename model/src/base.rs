//! A diffusion model as people bring it, and its networks one by one.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Device, Kind};

use crate::clip_tokenizer;
use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::ldm::Checkpoint;
use crate::lora::Lora;
use crate::part::Part;
use crate::schedule::{Prediction, Schedule};
use crate::tokenizer::TextTokenizer;
use crate::unet::UNet;
use crate::vae::Vae;

/// A diffusion model: a folder in diffusers' layout (`unet/`, `vae/`, `scheduler/`, and `text_encoder/` with `tokenizer/`), or a
/// single-file checkpoint of a community site ([`crate::ldm`]).
#[derive(Debug)]
pub struct Base {
    path: PathBuf,
    checkpoint: Option<Checkpoint>,
    prediction: Option<Prediction>,
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
    /// Nothing is there, or a file that is no checkpoint of a supported family.
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = match (path.is_dir(), path.is_file()) {
            (true, _) => None,
            (_, true) => Some(Checkpoint::open(path)?),
            _ => {
                let expected = "a folder in diffusers' layout, or a single-file checkpoint".into();
                return Err(ModelError::MissingFile { file: path.into(), expected });
            }
        };
        Ok(Base { path: path.into(), checkpoint, prediction: None })
    }

    /// The same model, taken to predict what is given here, whatever its scheduler's configuration or its file says.
    pub fn predicting(self, prediction: Option<Prediction>) -> Self {
        Base { prediction, ..self }
    }

    /// The single file that it is, if it is no folder.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref()
    }

    /// Where it is; what errors about the whole model name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the U-Net is loaded from.
    ///
    /// # Errors
    /// Its files are missing or damaged, or it is SDXL's refiner, which has other conditions than the base.
    pub fn unet_part(&self) -> Result<Part> {
        let index = self.path.join("model_index.json");
        if index.is_file() {
            let index = ConfigFile::open(&index)?;
            if index.value("requires_aesthetics_score") == Some(&Value::Bool(true)) {
                return Err(index.refuse("requires_aesthetics_score", "false or absent: SDXL's refiner is not supported"));
            }
        }
        self.checkpoint.as_ref().map_or_else(|| Part::open(&self.path.join("unet")), Checkpoint::unet)
    }

    /// What the VAE is loaded from.
    pub fn vae_part(&self) -> Result<Part> {
        self.checkpoint.as_ref().map_or_else(|| Part::open(&self.path.join("vae")), Checkpoint::vae)
    }

    /// The scheduler's configuration.
    pub fn scheduler(&self) -> Result<ConfigFile> {
        let in_folder = || ConfigFile::open(&self.path.join("scheduler/scheduler_config.json"));
        let config = self.checkpoint.as_ref().map_or_else(in_folder, Checkpoint::scheduler)?;
        Ok(match self.prediction {
            Some(prediction) => config.with("prediction_type", prediction.to_string().into()),
            None => config,
        })
    }

    /// The folder that its tokenizers lie in: its own, or the single file's.
    pub fn beside(&self) -> &Path {
        if self.checkpoint.is_some() { self.path.parent().unwrap_or(Path::new("")) } else { &self.path }
    }

    /// The base's own text encoders: one, or SDXL's two in the order in which their features are joined. A base may have none.
    /// A single file holds no tokenizer; it is looked for in `tokenizer/` and `tokenizer_2/` beside the file.
    ///
    /// # Errors
    /// An encoder's or a tokenizer's files are damaged or incomplete.
    pub fn text_encoders(&self) -> Result<Vec<TextEncoderPart>> {
        let folder = self.beside();
        let mut found = Vec::new();
        match &self.checkpoint {
            Some(checkpoint) => {
                for (part, (_, tokenizer)) in checkpoint.text_encoders()?.into_iter().zip(ENCODERS) {
                    found.push(TextEncoderPart { part, tokenizer: tokenizer_in(&folder.join(tokenizer))? });
                }
            }
            None => {
                for (encoder, tokenizer) in ENCODERS.map(|(encoder, tokenizer)| (folder.join(encoder), folder.join(tokenizer))) {
                    if encoder.is_dir() {
                        found.push(TextEncoderPart { part: Part::open(&encoder)?, tokenizer: tokenizer_in(&tokenizer)? });
                    }
                }
            }
        }
        Ok(found)
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

/// Folders of encoders, and of the tokenizers beside them.
const ENCODERS: [(&str, &str); 2] = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")];

fn tokenizer_in(folder: &Path) -> Result<Option<TextTokenizer>> {
    folder.is_dir().then(|| clip_tokenizer::load(folder)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prediction_can_be_said_and_the_refiner_is_refused() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("scheduler")).unwrap();
        let config = goldens.join("schedules/v-leading/scheduler_config.json");
        std::fs::copy(config, dir.path().join("scheduler/scheduler_config.json")).unwrap();
        let predicts = |said| Base::open(dir.path()).unwrap().predicting(said).schedule(Device::Cpu).unwrap().config().prediction;
        assert_eq!(predicts(None), Prediction::Velocity);
        assert_eq!(predicts(Some(Prediction::Epsilon)), Prediction::Epsilon);

        std::fs::write(dir.path().join("model_index.json"), r#"{"requires_aesthetics_score": true}"#).unwrap();
        let error = Base::open(dir.path()).unwrap().unet_part().unwrap_err().to_string();
        assert!(error.contains("model_index.json") && error.contains("refiner"), "{error}");
    }

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
