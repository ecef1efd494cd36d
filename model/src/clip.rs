//! CLIP's text encoder, from a transformers folder (`config.json`, safetensors): `CLIPTextModel` (SD 1.5, SD 2, SDXL's first)
//! and `CLIPTextModelWithProjection` (SDXL's second).
//!
//! Follows transformers' `modeling_clip.py`
//! (<https://github.com/huggingface/transformers/blob/main/src/transformers/models/clip/modeling_clip.py>).
//! Letters: B batch, S tokens, E `hidden_size`, H heads, P width of the pooled output.

use std::path::Path;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::config::ConfigFile;
use crate::error::Result;
use crate::layers::{Embedding, LayerNorm, Linear, attend, causal, gelu};
use crate::params::{Init, Params};
use crate::part::Part;
use crate::text::{Hear, check_positions};

/// Tensors that checkpoints hold beside the text encoder: what older releases of transformers saved of the position
/// numbers, and the other half of a whole CLIP.
const NOT_ENCODER: [&str; 5] =
    ["text_model.embeddings.position_ids", "embeddings.position_ids", "vision_model.*", "visual_projection.weight", "logit_scale"];

/// Fields of `config.json` that say nothing about the forward pass.
const IRRELEVANT: [&str; 21] = [
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dropout",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_attention_mask",
    "use_cache",
];

/// The `eos_token_id` of configurations written before transformers 4.31, which names no token: see [`ClipConfig::end`].
const OLD_END: i64 = 2;

/// The nonlinearity of the feed-forward layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · σ(1.702 x)`, OpenAI's.
    QuickGelu,
    /// The exact GELU, OpenCLIP's.
    Gelu,
}

/// The sizes of a CLIP text encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Rows of the embedding table.
    pub vocab_size: i64,
    /// E.
    pub hidden_size: i64,
    /// Width inside the feed-forward layers.
    pub intermediate_size: i64,
    /// Blocks.
    pub num_layers: i64,
    /// H.
    pub num_heads: i64,
    /// The longest row in tokens.
    pub max_positions: i64,
    /// The norms' epsilon.
    pub eps: f64,
    /// The feed-forward nonlinearity.
    pub activation: Activation,
    /// The token whose first place in a row is pooled. Nothing where `eos_token_id` is 2, as old configurations have it
    /// wrongly: then the place of the row's largest id is pooled.
    pub end: Option<i64>,
    /// P, where the pooled output is projected.
    pub projection: Option<i64>,
}

impl ClipConfig {
    /// Reads `config.json` in a transformers folder.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::read(ConfigFile::open(&folder.join("config.json"))?)
    }

    /// Reads every field that matters, and refuses those it does not know.
    pub fn read(c: ConfigFile) -> Result<Self> {
        c.only("model_type", &[json!("clip_text_model")])?;
        for decoder in ["is_decoder", "is_encoder_decoder", "add_cross_attention"] {
            c.only(decoder, &[json!(false)])?;
        }
        let width = c.size_or("projection_dim", 512)?;
        let config = ClipConfig {
            vocab_size: c.size_or("vocab_size", 49408)?,
            hidden_size: c.size_or("hidden_size", 512)?,
            intermediate_size: c.size_or("intermediate_size", 2048)?,
            num_layers: c.size_or("num_hidden_layers", 12)?,
            num_heads: c.size_or("num_attention_heads", 8)?,
            max_positions: c.size_or("max_position_embeddings", 77)?,
            eps: c.optional("layer_norm_eps", "a number", 1e-5)?,
            activation: activation(&c)?,
            end: Some(c.optional("eos_token_id", "a whole number", 49407)?).filter(|&id| id != OLD_END),
            projection: projected(&c)?.then_some(width),
        };
        if config.hidden_size % config.num_heads != 0 {
            return Err(c.refuse("hidden_size", "a multiple of num_attention_heads"));
        }
        if !(config.eps > 0.0 && config.eps < 1.0) {
            return Err(c.refuse("layer_norm_eps", "between 0 and 1"));
        }
        if config.end.is_some_and(|id| !(0..config.vocab_size).contains(&id)) {
            return Err(c.refuse("eos_token_id", "an id below vocab_size"));
        }
        c.finish(&IRRELEVANT)?;
        Ok(config)
    }
}

fn activation(c: &ConfigFile) -> Result<Activation> {
    let rule = "quick_gelu or gelu";
    match c.optional("hidden_act", rule, "quick_gelu".to_owned())?.as_str() {
        "quick_gelu" => Ok(Activation::QuickGelu),
        "gelu" => Ok(Activation::Gelu),
        _ => Err(c.refuse("hidden_act", rule)),
    }
}

/// Whether the pooled output goes through a projection, which the name of the architecture decides.
fn projected(c: &ConfigFile) -> Result<bool> {
    let rule = "[\"CLIPTextModel\"] or [\"CLIPTextModelWithProjection\"]";
    let names: Vec<String> = c.optional("architectures", rule, vec!["CLIPTextModel".into()])?;
    match names.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["CLIPTextModel"] => Ok(false),
        ["CLIPTextModelWithProjection"] => Ok(true),
        _ => Err(c.refuse("architectures", rule)),
    }
}

/// What the encoder says of a batch of captions, in the weights' kind.
#[derive(Debug)]
pub struct ClipOutput {
    /// After all blocks and the final norm, `[B, S, E]`: what SD 1.5 and SD 2 condition on.
    pub last_hidden_state: Tensor,
    /// Before the last block and without the final norm, `[B, S, E]` (transformers' `hidden_states[-2]`): what SDXL conditions on.
    pub penultimate_hidden_state: Tensor,
    /// The last hidden state at the end token, projected where the encoder has a projection, `[B, P]` or `[B, E]`.
    pub pooled: Tensor,
}

/// The encoder.
#[derive(Debug)]
pub struct Clip {
    config: ClipConfig,
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    projection: Option<Linear>,
}

impl Clip {
    /// Builds the encoder from any source of parameters. Names may have the prefix `text_model.` or lack it: transformers
    /// has written both.
    pub fn new(config: &ClipConfig, p: &Params) -> Result<Self> {
        const TOKENS: &str = "embeddings.token_embedding.weight";
        let (prefixed, width) = (p.at("text_model"), config.hidden_size);
        let body = if prefixed.has(TOKENS) || !p.has(TOKENS) { prefixed } else { p.clone() };
        let embeddings = body.at("embeddings");
        let tokens = Embedding::new(&embeddings.at("token_embedding"), config.vocab_size, width, 0.02)?;
        let positions = Embedding::new(&embeddings.at("position_embedding"), config.max_positions, width, 0.02)?;
        let layers = body.at("encoder").at("layers");
        let blocks = (0..config.num_layers).map(|n| Block::new(&layers.at(n), config)).collect::<Result<_>>()?;
        let norm = LayerNorm::new(&body.at("final_layer_norm"), width, config.eps)?;
        let init = Init::Normal { std: (width as f64).powf(-0.5) };
        let project = |output| Linear::no_bias(&p.at("text_projection"), width, output, init);
        let projection = config.projection.map(project).transpose()?;
        p.finish(&NOT_ENCODER)?;
        Ok(Clip { config: config.clone(), tokens, positions, blocks, norm, projection })
    }

    /// Loads a transformers folder, computing in `kind`.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::from_part(Part::open(folder)?, kind, device)
    }

    /// Builds the encoder from what [`Clip::load`] finds in a folder, wherever it lies.
    pub fn from_part(part: Part, kind: Kind, device: Device) -> Result<Self> {
        let config = ClipConfig::read(part.config)?;
        let p = Params::from_weights(part.weights, kind, device);
        Self::new(&config, &p)
    }

    /// The encoder's sizes.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// A token sees itself and those before it whose mask is 1. diffusers' pipelines give CLIP no mask, which is all ones.
    /// As in transformers, a row without the end token is pooled at its first token.
    ///
    /// # Shapes
    /// `input_ids` `[B, S]` i64 below `vocab_size`, S at most `max_positions`; `attention_mask` `[B, S]` i64 of 0 and 1.
    pub fn forward(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Result<ClipOutput> {
        self.forward_heard(input_ids, attention_mask, &mut |_| Ok(()))
    }

    /// [`Clip::forward`], where `hear` is told what the blocks before the last one give.
    pub fn forward_heard(&self, input_ids: &Tensor, attention_mask: &Tensor, hear: Hear<'_>) -> Result<ClipOutput> {
        let s = check_positions(input_ids, self.config.max_positions)?;
        let places = Tensor::f_arange(s, (Kind::Int64, input_ids.device()))?;
        let mut x = self.tokens.forward(input_ids)?.f_add(&self.positions.forward(&places)?)?; // [B, S, E]
        let hidden = causal(attention_mask)?; // [B, 1, S, S]
        let mut before = x.shallow_clone();
        for (n, block) in self.blocks.iter().enumerate() {
            if n > 0 {
                hear(&x)?;
            }
            before = x;
            x = block.forward(&before, &hidden)?;
        }
        let last = self.norm.forward(&x)?;
        let pooled = self.pool(&last, input_ids)?;
        Ok(ClipOutput { last_hidden_state: last, penultimate_hidden_state: before, pooled })
    }

    /// `[B, S, E]` to `[B, P]`.
    fn pool(&self, states: &Tensor, input_ids: &Tensor) -> Result<Tensor> {
        let (b, _, e) = states.size3()?;
        let end = match self.config.end {
            Some(id) => input_ids.f_eq(id)?,
            None => input_ids.f_eq_tensor(&input_ids.f_amax([1i64], true)?)?,
        };
        // The first place of several: the token that pads may be the end token.
        let place = end.f_to_kind(Kind::Int)?.f_argmax(1, true)?.f_unsqueeze(2)?.f_expand([b, 1, e], false)?;
        let pooled = states.f_gather(1, &place, false)?.f_squeeze_dim(1)?; // [B, E]
        match &self.projection {
            Some(projection) => projection.forward(&pooled),
            None => Ok(pooled),
        }
    }
}

/// Self-attention and feed-forward, each behind a norm and beside a residual.
#[derive(Debug)]
struct Block {
    attention_norm: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    heads: i64,
    ff_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
}

impl Block {
    fn new(p: &Params, c: &ClipConfig) -> Result<Self> {
        let (attention, mlp, width) = (p.at("self_attn"), p.at("mlp"), c.hidden_size);
        let project = |name: &str| Linear::new(&attention.at(name), width, width);
        Ok(Block {
            attention_norm: LayerNorm::new(&p.at("layer_norm1"), width, c.eps)?,
            q: project("q_proj")?,
            k: project("k_proj")?,
            v: project("v_proj")?,
            out: project("out_proj")?,
            heads: c.num_heads,
            ff_norm: LayerNorm::new(&p.at("layer_norm2"), width, c.eps)?,
            fc1: Linear::new(&mlp.at("fc1"), width, c.intermediate_size)?,
            fc2: Linear::new(&mlp.at("fc2"), c.intermediate_size, width)?,
            activation: c.activation,
        })
    }

    /// `x` `[B, S, E]`, `hidden` `[B, 1, S, S]` bool.
    fn forward(&self, x: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let x = x.f_add(&self.attend(&self.attention_norm.forward(x)?, hidden)?)?;
        let inner = self.fc1.forward(&self.ff_norm.forward(&x)?)?;
        let inner = match self.activation {
            Activation::QuickGelu => inner.f_mul(&inner.f_mul_scalar(1.702)?.f_sigmoid()?)?,
            Activation::Gelu => gelu(&inner)?,
        };
        Ok(x.f_add(&self.fc2.forward(&inner)?)?)
    }

    fn attend(&self, x: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let (b, s, _) = x.size3()?;
        let split = |x: Tensor| -> Result<Tensor> {
            Ok(x.f_reshape([b, s, self.heads, -1])?.f_transpose(1, 2)?) // [B, H, S, E / H]
        };
        let (q, k, v) = (split(self.q.forward(x)?)?, split(self.k.forward(x)?)?, split(self.v.forward(x)?)?);
        self.out.forward(&attend(&q, &k, &v, hidden)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ModelError;
    use serde_json::{Map, Value};

    fn config(change: Value) -> Result<ClipConfig> {
        let mut fields: Map<String, Value> = serde_json::from_value(json!({
            "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": 20, "hidden_size": 8,
            "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 7,
            "hidden_act": "quick_gelu", "eos_token_id": 9, "projection_dim": 6, "torch_dtype": "float32",
        }))
        .unwrap();
        fields.extend(change.as_object().unwrap().clone());
        ClipConfig::read(ConfigFile::from_map(Path::new("config.json"), fields))
    }

    fn clip(change: Value) -> Clip {
        Clip::new(&config(change).unwrap(), &Params::random(1, Kind::Float, Device::Cpu)).unwrap()
    }

    fn row(values: &[i64]) -> Tensor {
        Tensor::from_slice(values).reshape([1, -1])
    }

    #[test]
    fn unsupported_fields_are_refused_by_name() {
        for (field, change) in [
            ("model_type", json!({"model_type": "clip"})),
            ("architectures", json!({"architectures": ["CLIPModel"]})),
            ("hidden_act", json!({"hidden_act": "relu"})),
            ("hidden_size", json!({"hidden_size": 9})),
            ("num_attention_heads", json!({"num_attention_heads": 0})),
            ("projection_dim", json!({"projection_dim": "6"})),
            ("layer_norm_eps", json!({"layer_norm_eps": -1})),
            ("eos_token_id", json!({"eos_token_id": 20})),
            ("eos_token_id", json!({"eos_token_id": [9, 10]})),
            ("is_decoder", json!({"is_decoder": true})),
            ("rotary", json!({"rotary": true})),
        ] {
            assert!(matches!(config(change), Err(ModelError::Config { field: f, .. }) if f == field), "{field}");
        }
    }

    #[test]
    fn later_and_hidden_tokens_have_no_influence() {
        let clip = clip(json!({}));
        let run = |ids: &[i64], mask: &[i64]| clip.forward(&row(ids), &row(mask)).unwrap().last_hidden_state;
        let (a, b) = (run(&[5, 1, 9, 3], &[1, 1, 1, 1]), run(&[5, 1, 9, 4], &[1, 1, 1, 1]));
        assert!(a.narrow(1, 0, 3).equal(&b.narrow(1, 0, 3)) && !a.equal(&b));
        let (a, b) = (run(&[5, 1, 9], &[1, 0, 1]), run(&[5, 2, 9], &[1, 0, 1]));
        assert!(a.select(1, 2).equal(&b.select(1, 2)) && !a.select(1, 1).equal(&b.select(1, 1)));
        assert!(bool::try_from(run(&[5, 1], &[0, 0]).isfinite().all()).unwrap());
    }

    #[test]
    fn the_end_token_decides_the_pooled_place() {
        let place = |end: i64, ids: &[i64]| {
            let out = clip(json!({"eos_token_id": end})).forward(&row(ids), &row(&vec![1; ids.len()])).unwrap();
            (0..ids.len() as i64).find(|&at| out.pooled.equal(&out.last_hidden_state.select(1, at)))
        };
        assert_eq!(place(9, &[5, 19, 9, 9, 9]), Some(2));
        assert_eq!(place(9, &[5, 19, 3]), Some(0));
        assert_eq!(place(2, &[2, 7, 19, 19, 9]), Some(2));
    }

    #[test]
    fn rows_that_are_too_long_are_refused() {
        let result = clip(json!({})).forward(&row(&[1; 8]), &row(&[1; 8]));
        assert!(matches!(result, Err(ModelError::Input { what, .. }) if what == "input_ids"));
    }
}
