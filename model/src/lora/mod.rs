//! LoRA files, merged into the U-Net when it is loaded: W + weight · (alpha / rank) · up · down, in float32.
//!
//! Reads what kohya's scripts and LyCORIS' LoCon write (`lora_unet_…`, under diffusers' block names or the original ones), and what
//! diffusers and PEFT write, old and new. diffusers 0.42: `loaders/lora_conversion_utils.py`, `loaders/lora_base.py`; PEFT's
//! `tuners/lora/layer.py` for the scale.

mod key;
mod merge;
mod names;
mod scale;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) use self::merge::Merge;

use self::key::{Key, Role};
use self::scale::Scale;
use crate::error::{ModelError, Result};
use crate::weights::Weights;

/// A LoRA file, and how much of it counts.
#[derive(Clone, Debug)]
pub struct Lora {
    weights: Weights,
    weight: f64,
    layers: BTreeMap<String, Layer>,
    scale: Scale,
    text_tensors: usize,
}

/// The names of one layer's tensors in the file.
#[derive(Clone, Debug, Default)]
struct Layer {
    down: String,
    up: String,
    mid: Option<String>,
    alpha: Option<String>,
}

impl Lora {
    /// Opens a safetensors file; `weight` is what its changes are multiplied by, 1 for all of them.
    ///
    /// # Errors
    /// The file is missing or damaged, of another kind than LoRA, holds nothing for a U-Net, or lacks one of a layer's two factors.
    pub fn open(file: &Path, weight: f64) -> Result<Self> {
        if !weight.is_finite() {
            return Err(ModelError::argument(format!("{}: the LoRA's weight", file.display()), "a finite number", weight));
        }
        let weights = Weights::open(file)?;
        let mut layers = BTreeMap::<String, [Option<String>; 4]>::new();
        let mut text_tensors = 0;
        for name in weights.names() {
            match Key::parse(name, weights.path())? {
                Key::Text => text_tensors += 1,
                Key::Layer(layer, role) => {
                    let slot = &mut layers.entry(layer).or_default()[role as usize];
                    if let Some(other) = slot.replace(name.to_owned()) {
                        let reason = format!("holds {name} and {other}, which are the same under two names");
                        return Err(ModelError::NotSafetensors { file: file.into(), reason });
                    }
                }
            }
        }
        if layers.is_empty() {
            let expected = "tensors such as lora_unet_….lora_down.weight or unet.….lora_A.weight".to_owned();
            let found = if text_tensors == 0 { "none" } else { "some for text encoders only" };
            return Err(ModelError::LoraMismatch { file: file.into(), key: "the U-Net's part".into(), expected, found: found.into() });
        }
        let layers = layers.into_iter().map(|(name, slots)| Ok((name, Layer::whole(slots, file)?))).collect::<Result<_>>()?;
        Ok(Lora { scale: Scale::read(&weights)?, weights, weight, layers, text_tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.weights.path()
    }

    /// How many tensors of the file are for text encoders. They are not used: a connector stands in for the base's text encoder.
    pub fn text_tensors(&self) -> usize {
        self.text_tensors
    }

    /// What a user must be told: which part of the file is not used, if any is not.
    pub fn unused(&self) -> Option<String> {
        let path = self.path().display();
        match self.text_tensors {
            0 => None,
            1 => Some(format!("{path}: 1 tensor for the text encoder is not used")),
            n => Some(format!("{path}: {n} tensors for the text encoder are not used")),
        }
    }

    /// BLAKE3 over the file and the weight, as lower-case hex: what a run that trains through it is bound to.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.weights.digest().as_bytes()).update(&self.weight.to_le_bytes());
        hasher.finalize().to_hex().to_string()
    }

    fn file(&self) -> PathBuf {
        self.path().into()
    }
}

impl Layer {
    /// A layer that has what it needs.
    fn whole([down, up, mid, alpha]: [Option<String>; 4], file: &Path) -> Result<Self> {
        let present = [&down, &up, &mid, &alpha].into_iter().flatten().next().cloned().unwrap_or_default();
        let missing = |role: Role| ModelError::MissingTensor { file: file.into(), key: format!("{present}'s {} factor", role.word()) };
        Ok(Layer { down: down.ok_or_else(|| missing(Role::Down))?, up: up.ok_or_else(|| missing(Role::Up))?, mid, alpha })
    }
}
