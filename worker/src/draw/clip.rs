//! The base's own CLIP: one text encoder, or SDXL's two, asked as diffusers' `StableDiffusionPipeline` and `StableDiffusionXLPipeline`
//! (0.42) ask theirs.

use ella_model::ModelError;
use ella_model::base::{Base, TextEncoderPart};
use ella_model::clip::Clip;
use ella_model::config::ConfigFile;
use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_model::unet::UNetConfig;
use tch::{Device, Kind, Tensor};

use super::told::ClipTold;

/// The base's text encoders with their tokenizers.
#[derive(Debug)]
pub struct BaseText {
    encoders: Vec<(Clip, TextTokenizer)>,
    /// Whether the base is of SDXL's kind, which takes other states of two encoders, and the pooled text.
    two: bool,
    zeros_for_nothing: bool,
    device: Device,
}

impl BaseText {
    /// Loads them, whose states are for a U-Net of this configuration.
    ///
    /// # Errors
    /// The base lacks one of them, a tokenizer does not fit its encoder, or they do not fit the U-Net.
    pub fn load(base: &Base, unet: &UNetConfig, (kind, device): (Kind, Device)) -> Result<Self, ModelError> {
        let (parts, two) = (base.text_encoders()?, unet.added.is_some());
        let expected = if two { &["text_encoder", "text_encoder_2"][..] } else { &["text_encoder"] };
        if let Some(missing) = expected.get(parts.len()) {
            let expected = "the base's own CLIP, which --compare, --with-clip, --clip-prompt and --only-clip ask".to_owned();
            return Err(ModelError::MissingFile { file: base.path().join(missing), expected });
        }
        let load = |TextEncoderPart { part, tokenizer }: TextEncoderPart| -> Result<(Clip, TextTokenizer), ModelError> {
            let tokenizer = tokenizer.ok_or_else(|| ModelError::MissingFile {
                file: base.beside().join("tokenizer"),
                expected: format!("the tokenizer of {}'s own CLIP, and tokenizer_2/ for SDXL's second", base.path().display()),
            })?;
            let clip = Clip::from_part(part, kind, device)?;
            tokenizer.check_vocabulary(clip.config().vocab_size)?;
            Ok((clip, tokenizer))
        };
        let encoders = parts.into_iter().take(expected.len()).map(load).collect::<Result<_, _>>()?;
        let own = Self { encoders, two, zeros_for_nothing: two && forces_zeros(base)?, device };
        if own.width() != unet.cross_attention_dim {
            let (what, other) = ("the width of its own CLIP's states", "its U-Net".to_owned());
            let (found, expected) = (own.width(), unet.cross_attention_dim);
            return Err(ModelError::Mismatch { file: base.path().to_owned(), what, found, other, expected });
        }
        Ok(own)
    }

    /// Width D of the states.
    pub fn width(&self) -> i64 {
        self.encoders.iter().map(|(clip, _)| clip.config().hidden_size).sum()
    }

    /// The longest text in tokens, start and end among them.
    pub fn most_tokens(&self) -> usize {
        self.encoders.iter().map(|(clip, _)| clip.config().max_positions as usize).min().unwrap_or(0)
    }

    /// Whether a negative prompt that is not given at all stands for zeros, not for the empty text.
    pub fn zeros_for_nothing(&self) -> bool {
        self.zeros_for_nothing
    }

    /// Whether a text is too long for it.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn cuts(&self, text: &str) -> Result<bool, ModelError> {
        for (clip, tokenizer) in &self.encoders {
            if !tokenizer.encode(&[text], clip.config().max_positions as usize, Padding::None)?.truncated.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What CLIP says of a text, and whether the text was too long for it.
    ///
    /// # Errors
    /// libtorch's, or the tokenizer's.
    pub fn tell(&self, text: &str) -> Result<(ClipTold, bool), ModelError> {
        let (mut states, mut pooled, mut cut) = (Vec::new(), None, false);
        for (clip, tokenizer) in &self.encoders {
            let tokens = tokenizer.encode(&[text], clip.config().max_positions as usize, Padding::Fixed)?;
            let (ids, mask) = tokens.tensors(self.device)?;
            // The pipelines mask nothing: padding counts.
            let said = tch::no_grad(|| clip.forward(&ids, &mask.f_ones_like()?))?;
            states.push(if self.two { said.penultimate_hidden_state } else { said.last_hidden_state });
            pooled = self.two.then_some(said.pooled);
            cut |= !tokens.truncated.is_empty();
        }
        let plain = |x: Tensor| x.f_squeeze_dim(0)?.f_to_kind(Kind::Float);
        let told = ClipTold { states: plain(Tensor::f_cat(&states, 2)?)?, pooled: pooled.map(plain).transpose()? };
        Ok((told, cut))
    }
}

/// SDXL's setting, as `model_index.json` has it.
fn forces_zeros(base: &Base) -> Result<bool, ModelError> {
    let file = base.path().join("model_index.json");
    if !file.is_file() {
        return Ok(true);
    }
    ConfigFile::open(&file)?.optional("force_zeros_for_empty_prompt", "true or false", true)
}
