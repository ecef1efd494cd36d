//! How a picture was made, in the words that other programs read too.

use ella_model::sampler::Method;
use ella_proto::config::{Layers, Padding};

/// Of what, and how.
#[derive(Clone, Debug)]
pub struct Made<'a> {
    /// What was to be drawn.
    pub prompt: &'a str,
    /// What was not.
    pub negative: Option<&'a str>,
    /// From noise to picture.
    pub steps: u32,
    /// The sampler.
    pub sampler: Method,
    /// How much the prompt counted.
    pub guidance: f64,
    /// What its noise was drawn from.
    pub seed: u64,
    /// The file that its first noise is of, if it is of one.
    pub noise: Option<String>,
    /// The base, as it was named.
    pub base: &'a str,
    /// Merged into its U-Net: file and weight.
    pub loras: Vec<String>,
    /// What read the prompt; none for the base's own CLIP.
    pub by: Option<Reader<'a>>,
}

/// A text encoder and the connector behind it.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    /// The text encoder, as it was named.
    pub text: &'a str,
    /// Which of its layers.
    pub layers: Layers,
    /// How texts are filled up.
    pub padding: Padding,
    /// The connector: a digest, or a step of a run.
    pub connector: String,
}

impl std::fmt::Display for Made<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { prompt, negative, steps, sampler, guidance, seed, noise, base, loras, by } = self;
        f.write_str(prompt)?;
        if let Some(negative) = negative.filter(|text| !text.is_empty()) {
            write!(f, "\nNegative prompt: {negative}")?;
        }
        write!(f, "\nSteps: {steps}, Sampler: {sampler}, CFG scale: {guidance}, Seed: {seed}")?;
        if let Some(file) = noise {
            write!(f, ", Noise: {file}")?;
        }
        write!(f, ", Base: {base}")?;
        loras.iter().try_for_each(|named| write!(f, ", LoRA: {named}"))?;
        let Some(Reader { text, layers, padding, connector }) = by else { return Ok(()) };
        let layers = if *layers == Layers::Last { "last" } else { "average" };
        let padding = if *padding == Padding::Fixed { "fixed" } else { "none" };
        write!(f, ", Text: {text}, Layers: {layers}, Padding: {padding}, Connector: {connector}")
    }
}
