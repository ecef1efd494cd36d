//! The text encoders: CLIP in transformers' names below a prefix, or OpenCLIP in its own.
//!
//! diffusers 0.42, `loaders/single_file_utils.py`: `convert_ldm_clip_checkpoint`, `convert_open_clip_checkpoint`.

use serde_json::{Value, json};

use super::{Family, size, swap};
use crate::error::Result;
use crate::weights::Weights;

/// Channels of a head in every one of these encoders.
const HEAD_CHANNELS: i64 = 64;

const OUTER: [(&str, &str); 3] = [
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
];

const INNER: [(&str, &str); 6] = [
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("attn.in_proj_", "self_attn.in_proj_"),
];

/// How an encoder is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// transformers' `CLIPTextModel`.
    Transformers,
    /// OpenCLIP's, whose second to last layer's states are wanted: SD 2's. Its last layer goes unused, as in diffusers.
    OpenWithoutLast,
    /// OpenCLIP's with its projection: SDXL's.
    OpenProjected,
}

/// An encoder that checkpoints of a family hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoder {
    /// Before its keys.
    pub(super) prefix: &'static str,
    layout: Layout,
}

/// The encoders of a family, in the order in which their features are joined.
pub(super) fn encoders(family: Family) -> &'static [Encoder] {
    match family {
        Family::Sd1 => &[Encoder { prefix: "cond_stage_model.transformer.", layout: Layout::Transformers }],
        Family::Sd2 => &[Encoder { prefix: "cond_stage_model.model.", layout: Layout::OpenWithoutLast }],
        Family::Sdxl => &[
            Encoder { prefix: "conditioner.embedders.0.transformer.", layout: Layout::Transformers },
            Encoder { prefix: "conditioner.embedders.1.model.", layout: Layout::OpenProjected },
        ],
    }
}

/// Keys beside the encoders that other programs write, and that make no features.
pub(super) fn beside(family: Family) -> &'static [&'static str] {
    match family {
        Family::Sd1 => &["cond_stage_model.text_projection*"],
        Family::Sd2 => &[],
        Family::Sdxl => &["conditioner.embedders.0.text_projection*"],
    }
}

/// The width of SDXL's pooled text.
pub(super) fn pooled_width(weights: &Weights) -> Option<i64> {
    weights.shape("conditioner.embedders.1.model.text_projection").and_then(|shape| shape.get(1).copied())
}

impl Encoder {
    /// The tensors under transformers' names. `raw` has the file's names below the encoder's prefix.
    pub(super) fn named(&self, raw: &Weights) -> Result<Weights> {
        let keep = |key: &str| format!("{}{key}", self.prefix);
        if self.layout == Layout::Transformers {
            let without = |key: &str| key == "text_projection.weight" || key == "logit_scale";
            return raw.renamed(|key| (!without(key)).then(|| key.to_owned()));
        }
        let blocks = (0..).take_while(|n| raw.shape(&format!("transformer.resblocks.{n}.ln_1.weight")).is_some()).count();
        let projected = self.layout == Layout::OpenProjected;
        let used = if projected { blocks } else { blocks.saturating_sub(1) };
        let rename = |key: &str| match key {
            "text_projection" => projected.then(|| "text_projection.weight".to_owned()),
            "logit_scale" | "attn_mask" => None,
            _ => match block(key) {
                Some((n, _)) if n >= used && n < blocks => None,
                Some((n, rest)) => Some(format!("{}.{rest}", layer(n))),
                None => Some(swap(key, &OUTER).unwrap_or_else(|| keep(key))),
            },
        };
        let mut weights = raw.renamed(rename)?;
        for n in 0..used {
            let attention = format!("{}.self_attn", layer(n));
            for kind in ["weight", "bias"] {
                let parts = ["q", "k", "v"].map(|part| format!("{attention}.{part}_proj.{kind}"));
                let packed = format!("{attention}.in_proj_{kind}");
                if weights.shape(&packed).is_some() {
                    weights.split(&packed, &parts)?;
                }
            }
        }
        if weights.shape("text_projection.weight").is_some() {
            weights.transpose("text_projection.weight")?;
        }
        Ok(weights)
    }

    /// The configuration that transformers would have; `weights` is what [`Encoder::named`] gives.
    ///
    /// # Errors
    /// A tensor that tells a size is missing.
    pub(super) fn config(&self, weights: &Weights) -> Result<Value> {
        let prefixed = weights.names().any(|name| name.starts_with("text_model."));
        let body = if prefixed { "text_model." } else { "" };
        let layer = |n: usize| format!("{body}encoder.layers.{n}.mlp.fc1.weight");
        let size = |key: &str, axis| size(weights, "", key, axis);
        let tokens = format!("{body}embeddings.token_embedding.weight");
        let hidden = size(&tokens, 1)?;
        let projected = self.layout == Layout::OpenProjected;
        let projection = if projected { size("text_projection.weight", 0)? } else { hidden };
        let layers = (0..).take_while(|&n| weights.shape(&layer(n)).is_some()).count();
        Ok(json!({
            "architectures": [if projected { "CLIPTextModelWithProjection" } else { "CLIPTextModel" }],
            "model_type": "clip_text_model",
            "hidden_act": if self.layout == Layout::Transformers { "quick_gelu" } else { "gelu" },
            "hidden_size": hidden,
            "intermediate_size": size(&layer(0), 0)?,
            "num_hidden_layers": layers,
            "num_attention_heads": (hidden / HEAD_CHANNELS).max(1),
            "max_position_embeddings": size(&format!("{body}embeddings.position_embedding.weight"), 0)?,
            "vocab_size": size(&tokens, 0)?,
            "projection_dim": projection,
            // As published: the place of a row's largest id is pooled, which is the end token's.
            "eos_token_id": 2,
        }))
    }
}

fn layer(n: usize) -> String {
    format!("text_model.encoder.layers.{n}")
}

/// Which of OpenCLIP's blocks a key belongs to, and transformers' name of it there.
fn block(key: &str) -> Option<(usize, String)> {
    let (n, rest) = key.strip_prefix("transformer.resblocks.")?.split_once('.')?;
    Some((n.parse().ok()?, swap(rest, &INNER)?))
}
