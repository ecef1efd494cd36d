//! The networks: `[base]`, `[text]` and `[connector]`.

use serde::{Deserialize, Serialize};

/// Number formats of frozen networks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    #[default]
    Fp32,
    /// IEEE half.
    Fp16,
    /// bfloat16.
    Bf16,
}

/// `[base]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// A folder in diffusers' layout, a single-file checkpoint, or a hub id.
    pub model: String,
    /// Compute format of the frozen networks.
    #[serde(default)]
    pub dtype: Dtype,
    /// What the U-Net predicts, where the model's files do not say it, or wrongly; left out: what they say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// LoRA files that are merged into the U-Net; left out: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<Lora>,
}

/// What a U-Net predicts, by diffusers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity.
    VPrediction,
    /// The image.
    Sample,
}

/// One of `base.loras`: a LoRA file, and how much of it counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// A safetensors file: a path, or `org/name/file.safetensors` on the hub.
    pub file: String,
    /// What its changes are multiplied by.
    #[serde(default = "Lora::weight")]
    pub weight: f64,
}

impl Lora {
    fn weight() -> f64 {
        1.0
    }
}

/// How captions become rows of equal or unequal length (design.md §4, "Padding is part of the meaning").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// Every caption has `max_tokens` positions; padding is attended, as in the released weights.
    #[default]
    Fixed,
    /// Ragged rows; the connector masks what is not there.
    None,
}

/// Which of the text encoder's layers the features are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layers {
    /// The last hidden state, as in the released weights.
    #[default]
    Last,
    /// The layer-normalized average over all layers (arXiv 2506.08210).
    Average,
}

/// Where features come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Features {
    /// From complete sidecars (`ella embed`).
    #[default]
    Cached,
    /// Computed for each step, and dropped.
    Inline,
    /// Computed ahead of the steps and written through to sidecars: the first epoch is `ella embed`.
    Ahead,
}

/// `[text]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// A folder in transformers' layout, or a hub id.
    pub model: String,
    /// Longest caption in tokens; longer ones are cut, and counted.
    #[serde(default = "Text::max_tokens")]
    pub max_tokens: usize,
    /// Padding rule.
    #[serde(default)]
    pub padding: Padding,
    /// Which layers features are made of.
    #[serde(default)]
    pub layers: Layers,
    /// Where features come from.
    #[serde(default)]
    pub features: Features,
    /// Compute format of the text encoder.
    #[serde(default)]
    pub dtype: Dtype,
}

impl Text {
    fn max_tokens() -> usize {
        128
    }
}

/// The kinds of connector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectorKind {
    /// The timestep-aware semantic connector, AdaLN (paper §3.1).
    #[default]
    Tsc,
    /// The same with gates, AdaLN-Zero (paper §1.2).
    TscZero,
    /// Perceiver blocks that know no timestep.
    Resampler,
    /// Two linear maps of each token (LLaVA's): it has no layers, heads or latents, and the U-Net sees as many states as tokens.
    Mlp,
}

/// The formats that the connector computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectorDtype {
    /// 32-bit floats.
    Fp32,
    /// bfloat16 for matrix products and attention; weights, their gradients and moments, norms and sums stay float32.
    Bf16,
}

/// `[connector]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Connector {
    /// Which one.
    pub kind: ConnectorKind,
    /// Channels; must be the base's `cross_attention_dim`, which it is if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// Perceiver blocks; of an `mlp` this and the next two mean nothing.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Learned queries: the sequence length that the U-Net sees.
    pub latents: usize,
    /// What it computes in; left out: bfloat16 if the base does, else float32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<ConnectorDtype>,
    /// A connector's file, or the hub id of one, whose weights training begins from; left out: random ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

impl Default for Connector {
    fn default() -> Self {
        Self { kind: ConnectorKind::Tsc, width: None, layers: 6, heads: 8, latents: 64, dtype: None, from: None }
    }
}
