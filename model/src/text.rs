//! Text encoders of any family, told apart by `config.json`.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::clip::{Clip, ClipConfig, ClipOutput};
use crate::error::Result;
use crate::part::Part;
use crate::t5::{T5, T5Config};

/// The families of text encoders, and their sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum TextConfig {
    /// T5's encoder half.
    T5(T5Config),
    /// CLIP's text encoder.
    Clip(ClipConfig),
}

impl TextConfig {
    /// Reads the configuration of a transformers folder, whichever family it is of.
    ///
    /// # Errors
    /// A family that is not supported, or a field that its family refuses.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::read(crate::config::ConfigFile::open(&folder.join("config.json"))?)
    }

    /// Reads an opened configuration; errors as in [`TextConfig::load`].
    pub fn read(c: crate::config::ConfigFile) -> Result<Self> {
        let rule = "t5, mt5 or clip_text_model";
        match c.required::<String>("model_type", rule)?.as_str() {
            "t5" | "mt5" => Ok(Self::T5(T5Config::read(c)?)),
            "clip_text_model" => Ok(Self::Clip(ClipConfig::read(c)?)),
            _ => Err(c.refuse("model_type", rule)),
        }
    }

    /// Width E of the features.
    pub fn width(&self) -> i64 {
        match self {
            Self::T5(c) => c.d_model,
            Self::Clip(c) => c.hidden_size,
        }
    }

    /// Rows of the embedding table: ids are below it.
    pub fn vocab_size(&self) -> i64 {
        match self {
            Self::T5(c) => c.vocab_size,
            Self::Clip(c) => c.vocab_size,
        }
    }

    /// The longest text in tokens, where the family has a limit.
    pub fn max_positions(&self) -> Option<i64> {
        match self {
            Self::T5(_) => None,
            Self::Clip(c) => Some(c.max_positions),
        }
    }
}

/// A text encoder.
#[derive(Debug)]
pub enum Text {
    /// T5's encoder half.
    T5(T5),
    /// CLIP's text encoder.
    Clip(Clip),
}

/// What an encoder says of a batch of texts.
#[derive(Debug)]
pub enum TextOutput {
    /// `[B, S, E]`.
    States(Tensor),
    /// CLIP has more to say.
    Clip(ClipOutput),
}

impl TextOutput {
    /// The last hidden state `[B, S, E]`.
    pub fn last_hidden_state(self) -> Tensor {
        match self {
            Self::States(states) => states,
            Self::Clip(out) => out.last_hidden_state,
        }
    }
}

impl Text {
    /// Loads a transformers folder, computing in `kind`.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::from_part(Part::open(folder)?, kind, device)
    }

    /// Builds the encoder from what [`Text::load`] finds in a folder, wherever it lies.
    pub fn from_part(part: Part, kind: Kind, device: Device) -> Result<Self> {
        let p = |weights| crate::params::Params::from_weights(weights, kind, device);
        Ok(match TextConfig::read(part.config)? {
            TextConfig::T5(config) => Self::T5(T5::new(&config, &p(part.weights))?),
            TextConfig::Clip(config) => Self::Clip(Clip::new(&config, &p(part.weights))?),
        })
    }

    /// The family and its sizes.
    pub fn config(&self) -> TextConfig {
        match self {
            Self::T5(t5) => TextConfig::T5(t5.config().clone()),
            Self::Clip(clip) => TextConfig::Clip(clip.config().clone()),
        }
    }

    /// `input_ids` and `attention_mask` `[B, S]` i64, as each family's own forward takes them.
    pub fn forward(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Result<TextOutput> {
        Ok(match self {
            Self::T5(t5) => TextOutput::States(t5.forward(input_ids, attention_mask)?),
            Self::Clip(clip) => TextOutput::Clip(clip.forward(input_ids, attention_mask)?),
        })
    }
}
