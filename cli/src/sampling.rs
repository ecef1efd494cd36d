//! The flags of whatever draws pictures: how texts are read, and how pictures are drawn from noise.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use ella_model::sampler::Method;
use ella_model::schedule::Prediction;
use ella_worker::trained::Trained;

use crate::embed::{Device, Layers, Padding};
use crate::forward::Dtype;

/// How texts are read.
#[derive(Clone, Debug, Args)]
pub(crate) struct HowRead {
    /// fixed: prompts are filled up or cut to --max-tokens, and all positions count, as the released weights were trained.
    /// none: each prompt at its own length (the paper's flexible length) [default: as the connector's file says that it was trained;
    /// fixed if it does not]
    #[arg(long, value_enum, help_heading = "How texts are read", hide_possible_values = true)]
    pub(crate) padding: Option<Padding>,
    /// The same for the negative prompt [default: as --padding]
    #[arg(long, value_enum, value_name = "PADDING", help_heading = "How texts are read", hide_possible_values = true)]
    pub(crate) negative_padding: Option<Padding>,
    /// Longest prompt in tokens [default: as the connector's file says; if it does not, 128 with padding fixed; with none, as long as the
    /// text encoder takes, up to 2048]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536), help_heading = "How texts are read")]
    pub(crate) max_tokens: Option<u32>,
    /// Which of the text encoder's layers are taken [default: as the connector's file says; last if it does not]
    #[arg(long, value_enum, help_heading = "How texts are read")]
    pub(crate) layers: Option<Layers>,
    /// What the text encoder computes in [default: as the connector's file says; if it does not, as --dtype]
    #[arg(long, value_enum, value_name = "DTYPE", help_heading = "How texts are read")]
    pub(crate) text_dtype: Option<Dtype>,
    /// Beside the connector's states, let the U-Net attend to those of the base's own CLIP: for names and trigger words
    #[arg(long, help_heading = "How texts are read")]
    pub(crate) with_clip: bool,
}

impl HowRead {
    /// As it may contradict what a connector's file tells.
    pub(crate) fn asked(&self) -> Trained {
        let (padding, max_tokens) = (self.padding.map(Into::into), self.max_tokens.map(|n| n as usize));
        let (layers, text_dtype) = (self.layers.map(Into::into), self.text_dtype.map(Into::into));
        Trained { padding, max_tokens, layers, text_dtype, ..Trained::default() }
    }
}

/// How pictures are drawn.
#[derive(Clone, Debug, Args)]
pub(crate) struct HowDrawn {
    /// How to step from noise to picture
    #[arg(long, default_value_t = Method::Ddim, value_parser = method(), help_heading = "How to draw")]
    pub(crate) sampler: Method,
    /// Steps from noise to picture
    #[arg(long, default_value_t = 50, value_parser = steps, help_heading = "How to draw")]
    pub(crate) steps: u32,
    /// How much the prompt counts beside the negative one; 1 is no guidance, in half the time
    #[arg(long, default_value_t = 7.5, help_heading = "How to draw")]
    pub(crate) guidance: f64,
    /// What the base predicts, where its files do not say it, or wrongly
    #[arg(long, value_parser = prediction(), help_heading = "How to draw")]
    pub(crate) prediction: Option<Prediction>,
    /// Pictures drawn at once
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "How to draw")]
    pub(crate) batch: u32,
    /// What the frozen networks compute in; a VAE that overflows in fp16 stays in fp32
    #[arg(long, value_enum, default_value_t = Dtype::Fp32, help_heading = "How to draw")]
    pub(crate) dtype: Dtype,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Auto, help_heading = "How to draw")]
    pub(crate) device: Device,
    /// The connector's attention heads [default: as its file says; 8 if it does not]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "How to draw")]
    pub(crate) heads: Option<u32>,
}

/// Reads a number of steps, of which the base knows how many there may be.
fn steps(text: &str) -> Result<u32, String> {
    let steps = text.parse().ok().filter(|steps| *steps >= 1);
    steps.ok_or_else(|| "must be from 1 to the timesteps that the base was trained with, mostly 1000".to_owned())
}

/// Reads what a base predicts; `--help` and errors list all there is.
fn prediction() -> impl TypedValueParser<Value = Prediction> {
    PossibleValuesParser::new(Prediction::NAMES.map(|(name, _)| name)).try_map(|name| name.parse::<Prediction>())
}

/// Reads a sampler's name, likewise.
fn method() -> impl TypedValueParser<Value = Method> {
    PossibleValuesParser::new(Method::NAMES.map(|(name, _)| name)).try_map(|name| name.parse::<Method>())
}
