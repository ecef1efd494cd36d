//! Text encoders of any family, told apart by `config.json`, and the features that connectors take from them.
//! Letters: B batch, S tokens, E width.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::clip::{Clip, ClipConfig, ClipOutput};
use crate::config::ConfigFile;
use crate::decoder::{Decoder, DecoderConfig};
use crate::error::{ModelError, Result};
use crate::layers::LayerNorm;
use crate::params::{Compute, Params};
use crate::part::Part;
use crate::t5::{T5, T5Config};

/// The families of text encoders, and their sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum TextConfig {
    /// T5's encoder half.
    T5(T5Config),
    /// CLIP's text encoder.
    Clip(ClipConfig),
    /// A decoder of the LLaMA family.
    Decoder(DecoderConfig),
}

impl TextConfig {
    /// Reads the configuration of a transformers folder, whichever family it is of.
    ///
    /// # Errors
    /// A family that is not supported, or a field that its family refuses.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::read(ConfigFile::open(&folder.join("config.json"))?)
    }

    /// Reads an opened configuration; errors as in [`TextConfig::load`].
    pub fn read(c: ConfigFile) -> Result<Self> {
        let rule = format!("t5, mt5, clip_text_model, {}", DecoderConfig::FAMILIES.join(", "));
        match c.required::<String>("model_type", &rule)?.as_str() {
            "t5" | "mt5" => Ok(Self::T5(T5Config::read(c)?)),
            "clip_text_model" => Ok(Self::Clip(ClipConfig::read(c)?)),
            family if DecoderConfig::FAMILIES.contains(&family) => Ok(Self::Decoder(DecoderConfig::read(c)?)),
            _ => Err(c.refuse("model_type", &rule)),
        }
    }

    /// Width E of the features.
    pub fn width(&self) -> i64 {
        match self {
            Self::T5(c) => c.d_model,
            Self::Clip(c) => c.hidden_size,
            Self::Decoder(c) => c.hidden_size,
        }
    }

    /// Rows of the embedding table: ids are below it.
    pub fn vocab_size(&self) -> i64 {
        match self {
            Self::T5(c) => c.vocab_size,
            Self::Clip(c) => c.vocab_size,
            Self::Decoder(c) => c.vocab_size,
        }
    }

    /// The longest text in tokens, where the family has a limit.
    pub fn max_positions(&self) -> Option<i64> {
        match self {
            Self::T5(_) => None,
            Self::Clip(c) => Some(c.max_positions),
            Self::Decoder(c) => Some(c.max_positions),
        }
    }

    /// Refuses captions of up to `max_tokens` tokens where the encoder, of the folder `model`, has fewer positions.
    pub fn check_max_tokens(&self, max_tokens: usize, model: &Path) -> Result<()> {
        match self.max_positions() {
            Some(limit) if max_tokens as i64 > limit => {
                let rule = format!("at most {limit}, the max_position_embeddings of {}", model.join("config.json").display());
                Err(ModelError::argument("text.max_tokens", rule, max_tokens))
            }
            _ => Ok(()),
        }
    }
}

/// Which layers the features are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layers {
    /// The last hidden state, as in the ELLA paper.
    #[default]
    Last,
    /// The layer-normalized average over all layers, which "A Comprehensive Study of Decoder-Only LLMs for Text-to-Image Generation"
    /// (<https://arxiv.org/abs/2506.08210>) found better than the last layer of decoders.
    ///
    /// That is the mean over n = 1 … N of `LayerNorm(h_n)`, without learned scale or shift, over the width, ε = 1e-5, in float32.
    /// `h_n` is what block n of N gives, but for `h_N` the network's own output, after its final norm (for T5 and decoders,
    /// transformers' `hidden_states[1:]`). The embeddings, `hidden_states[0]`, are no layer's work and stay out.
    /// This is our reading of the paper's text; its code was not at hand.
    Average,
}

/// Who is told the hidden states `[B, S, E]` on the way through an encoder.
pub type Hear<'a> = &'a mut dyn FnMut(&Tensor) -> Result<()>;

/// The tokens S of `input_ids` `[B, S]`, refused where there are more than `max_positions`.
pub(crate) fn check_positions(input_ids: &Tensor, max_positions: i64) -> Result<i64> {
    let (_, s) = input_ids.size2()?;
    if s <= max_positions {
        return Ok(s);
    }
    Err(ModelError::argument("input_ids", format!("at most {max_positions} tokens long"), s))
}

/// A text encoder.
#[derive(Debug)]
pub enum Text {
    /// T5's encoder half.
    T5(T5),
    /// CLIP's text encoder.
    Clip(Clip),
    /// A decoder of the LLaMA family.
    Decoder(Decoder),
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
        Self::computing(part, Compute::fastest(kind, device)?, kind, device)
    }

    /// [`Text::from_part`] in a chosen way.
    pub fn computing(part: Part, compute: Compute, kind: Kind, device: Device) -> Result<Self> {
        let p = |weights| {
            let p = Params::from_weights(weights, kind, device);
            p.compute_by(compute);
            p
        };
        Ok(match TextConfig::read(part.config)? {
            TextConfig::T5(config) => Self::T5(T5::new(&config, &p(part.weights))?),
            TextConfig::Clip(config) => Self::Clip(Clip::new(&config, &p(part.weights))?),
            TextConfig::Decoder(config) => Self::Decoder(Decoder::new(&config, &p(part.weights))?),
        })
    }

    /// The family and its sizes.
    pub fn config(&self) -> TextConfig {
        match self {
            Self::T5(t5) => TextConfig::T5(t5.config().clone()),
            Self::Clip(clip) => TextConfig::Clip(clip.config().clone()),
            Self::Decoder(decoder) => TextConfig::Decoder(decoder.config().clone()),
        }
    }

    /// `input_ids` and `attention_mask` `[B, S]` i64, as each family's own forward takes them.
    pub fn forward(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Result<TextOutput> {
        self.forward_heard(input_ids, attention_mask, &mut |_| Ok(()))
    }

    /// The features of the chosen layers, from the same inputs: `[B, S, E]` of the weights' kind.
    pub fn features(&self, input_ids: &Tensor, attention_mask: &Tensor, layers: Layers) -> Result<Tensor> {
        if layers == Layers::Last {
            return Ok(self.forward(input_ids, attention_mask)?.last_hidden_state());
        }
        let norm = LayerNorm::plain(self.config().width(), 1e-5);
        let (mut sum, mut count) = (Tensor::f_zeros([1; 0], (Kind::Float, input_ids.device()))?, 0);
        let mut add = |state: &Tensor| -> Result<()> {
            sum = sum.f_add(&norm.forward(&state.f_to_kind(Kind::Float)?)?)?;
            count += 1;
            Ok(())
        };
        let last = self.forward_heard(input_ids, attention_mask, &mut add)?.last_hidden_state();
        add(&last)?;
        Ok(sum.f_div_scalar(count)?.f_to_kind(last.f_kind()?)?)
    }

    fn forward_heard(&self, input_ids: &Tensor, attention_mask: &Tensor, hear: Hear<'_>) -> Result<TextOutput> {
        Ok(match self {
            Self::T5(t5) => TextOutput::States(t5.forward_heard(input_ids, attention_mask, hear)?),
            Self::Clip(clip) => TextOutput::Clip(clip.forward_heard(input_ids, attention_mask, hear)?),
            Self::Decoder(decoder) => TextOutput::States(decoder.forward_heard(input_ids, attention_mask, hear)?),
        })
    }
}
