//! The frozen text encoder: captions to features.

use crate::device;
use ella_model::ModelError;
use ella_model::part::Part;
use ella_model::text::{Layers as Taken, Text, TextConfig};
use ella_model::tokenizer::{Padding as Rule, TextTokenizer};
use ella_proto::config::{Dtype, Layers, Padding};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// What decides which features a caption gets.
#[derive(Clone, Debug)]
pub struct TextOptions {
    /// A folder in transformers' layout.
    pub model: PathBuf,
    /// Longest caption in tokens.
    pub max_tokens: usize,
    /// Padding rule.
    pub padding: Padding,
    /// Which layers features are made of.
    pub layers: Layers,
    /// Compute format of the encoder.
    pub dtype: Dtype,
}

/// Features of some captions.
#[derive(Debug)]
pub struct Rows {
    /// `[B, S, E]`, in the encoder's compute format.
    pub features: Tensor,
    /// Each caption's own tokens, before padding.
    pub tokens: Vec<usize>,
    /// How many captions were cut at `max_tokens`.
    pub truncated: usize,
}

impl Rows {
    /// `[B, S]` bool, true where a token is.
    pub fn mask(&self) -> Result<Tensor, tch::TchError> {
        let device = self.features.device();
        let tokens: Vec<i64> = self.tokens.iter().map(|t| *t as i64).collect();
        let places = Tensor::f_arange(self.features.size()[1], (Kind::Int64, device))?;
        places.f_unsqueeze(0)?.f_less_tensor(&Tensor::f_from_slice(&tokens)?.f_to_device(device)?.f_unsqueeze(1)?)
    }
}

/// Encoder and tokenizer.
#[derive(Debug)]
pub struct TextEncoder {
    network: Text,
    tokenizer: TextTokenizer,
    options: TextOptions,
    device: Device,
}

impl TextEncoder {
    /// Loads both, and checks that they fit each other and `max_tokens` before the weights are read.
    pub fn load(options: &TextOptions, device: Device) -> Result<Self, ModelError> {
        let config = TextConfig::load(&options.model)?;
        config.check_max_tokens(options.max_tokens, &options.model)?;
        let tokenizer = TextTokenizer::load(&options.model, &config)?;
        let network = Text::load(&options.model, device::kind(options.dtype), device)?;
        Ok(Self { network, tokenizer, options: options.clone(), device })
    }

    /// Width E of the features.
    pub fn width(&self) -> i64 {
        self.network.config().width()
    }

    /// Encodes captions in one batch.
    pub fn encode<S: AsRef<str>>(&self, captions: &[S]) -> Result<Rows, ModelError> {
        self.encode_as(captions, self.options.padding, self.options.max_tokens)
    }

    /// [`TextEncoder::encode`] with a padding rule and a limit of its own.
    pub fn encode_as<S: AsRef<str>>(&self, captions: &[S], padding: Padding, max_tokens: usize) -> Result<Rows, ModelError> {
        let rule = match padding {
            Padding::Fixed => Rule::Fixed,
            Padding::None => Rule::None,
        };
        let encoded = self.tokenizer.encode(captions, max_tokens, rule)?;
        let (ids, mask) = encoded.tensors(self.device)?;
        let layers = match self.options.layers {
            Layers::Last => Taken::Last,
            Layers::Average => Taken::Average,
        };
        let features = tch::no_grad(|| self.network.features(&ids, &mask, layers))?;
        Ok(Rows { features, tokens: encoded.lengths, truncated: encoded.truncated.len() })
    }

    /// How many of these captions lose their end at `max_tokens`.
    pub fn cuts<S: AsRef<str>>(&self, captions: &[S], max_tokens: usize) -> Result<usize, ModelError> {
        Ok(self.tokenizer.encode(captions, max_tokens, Rule::None)?.truncated.len())
    }

    /// How many tokens each caption has before padding, and at most `max_tokens`.
    pub fn lengths<S: AsRef<str>>(&self, captions: &[S]) -> Result<Vec<usize>, ModelError> {
        Ok(self.tokenizer.encode(captions, self.options.max_tokens, Rule::None)?.lengths)
    }
}

/// What identifies the features of a model under given options, read without loading the encoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextIdentity {
    /// BLAKE3 of the weights and the configuration, lower-case hex.
    pub weights_digest: String,
    /// The tokenizer's digest, lower-case hex.
    pub tokenizer_digest: String,
    /// Width E of the features.
    pub width: i64,
}

/// Reads a text model's identity.
///
/// # Errors
/// Its files are not there or not sound, its tokenizer does not fit, or it cannot take captions of `max_tokens` tokens.
pub fn identity(model: &Path, max_tokens: usize) -> Result<TextIdentity, ModelError> {
    let part = Part::open(model)?;
    let weights_digest = part.fingerprint();
    let config = TextConfig::read(part.config)?;
    config.check_max_tokens(max_tokens, model)?;
    let tokenizer_digest = TextTokenizer::load(model, &config)?.digest().to_owned();
    Ok(TextIdentity { weights_digest, tokenizer_digest, width: config.width() })
}
