//! The encoder half of T5, from a transformers folder (`config.json`, safetensors).
//!
//! Follows transformers' `modeling_t5.py`
//! (<https://github.com/huggingface/transformers/blob/main/src/transformers/models/t5/modeling_t5.py>).
//! Letters: B batch, S tokens, E `d_model`, H heads, K `d_kv`, F `d_ff`.

use std::path::Path;

use ella_cuda::fused;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::config::ConfigFile;
use crate::error::Result;
use crate::layers::{Embedding, Linear, RmsNorm, gelu, gelu_tanh, silu};
use crate::params::{Compute, Init, Params};
use crate::part::Part;
use crate::text::Hear;

/// Tensors that encoder-decoder checkpoints hold beside the encoder.
const NOT_ENCODER: [&str; 4] = ["decoder.*", "lm_head.weight", "shared.weight", "encoder.embed_tokens.weight"];

/// Fields of `config.json` that say nothing about the encoder's forward pass.
const IRRELEVANT: [&str; 28] = [
    "add_cross_attention",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout_rate",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "is_encoder_decoder",
    "label2id",
    "n_positions",
    "num_decoder_layers",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "scale_decoder_outputs",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
];

/// The nonlinearity of the feed-forward layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0).
    Relu,
    /// The tanh approximation of GELU (`gelu_new`).
    GeluTanh,
    /// The exact GELU.
    Gelu,
    /// SiLU.
    Silu,
}

/// The sizes of a T5 encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// Rows of the embedding table.
    pub vocab_size: i64,
    /// E.
    pub d_model: i64,
    /// K, independent of E / H.
    pub d_kv: i64,
    /// F.
    pub d_ff: i64,
    /// Blocks.
    pub num_layers: i64,
    /// H.
    pub num_heads: i64,
    /// Buckets of relative positions, both directions together.
    pub buckets: i64,
    /// From this distance on, positions share the last bucket.
    pub max_distance: i64,
    /// The norms' epsilon.
    pub eps: f64,
    /// The feed-forward nonlinearity.
    pub activation: Activation,
    /// Whether the feed-forward layer has a second, linear branch (T5 1.1).
    pub gated: bool,
}

impl T5Config {
    /// Of `google/flan-t5-xl`, whose features the released connectors take (paper §1.5).
    pub fn flan_t5_xl() -> Self {
        T5Config {
            vocab_size: 32128,
            d_model: 2048,
            d_kv: 64,
            d_ff: 5120,
            num_layers: 24,
            num_heads: 32,
            buckets: 32,
            max_distance: 128,
            eps: 1e-6,
            activation: Activation::GeluTanh,
            gated: true,
        }
    }

    /// Reads `config.json` in a transformers folder.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::read(ConfigFile::open(&folder.join("config.json"))?)
    }

    /// Reads every field that matters, and refuses those it does not know.
    pub fn read(c: ConfigFile) -> Result<Self> {
        c.only("model_type", &[json!("t5"), json!("mt5")])?;
        // `is_decoder` describes the model as a whole and the encoder part alike.
        c.only("is_decoder", &[json!(false)])?;
        c.only("use_cache", &[json!(true), json!(false)])?;
        let (activation, gated) = feed_forward(&c)?;
        let config = T5Config {
            vocab_size: c.size_or("vocab_size", 32128)?,
            d_model: c.size_or("d_model", 512)?,
            d_kv: c.size_or("d_kv", 64)?,
            d_ff: c.size_or("d_ff", 2048)?,
            num_layers: c.size_or("num_layers", 6)?,
            num_heads: c.size_or("num_heads", 8)?,
            buckets: c.size_or("relative_attention_num_buckets", 32)?,
            max_distance: c.size_or("relative_attention_max_distance", 128)?,
            eps: c.optional("layer_norm_epsilon", "a number", 1e-6)?,
            activation,
            gated,
        };
        if config.buckets % 4 != 0 {
            return Err(c.refuse("relative_attention_num_buckets", "a multiple of 4"));
        }
        if config.max_distance <= config.buckets / 4 {
            return Err(c.refuse("relative_attention_max_distance", "above a quarter of the buckets"));
        }
        if !(config.eps > 0.0 && config.eps < 1.0) {
            return Err(c.refuse("layer_norm_epsilon", "between 0 and 1"));
        }
        c.finish(&IRRELEVANT)?;
        Ok(config)
    }
}

/// `feed_forward_proj` is `ACT` or `gated-ACT`; `gated-gelu` means the tanh form, unless `dense_act_fn` says otherwise.
fn feed_forward(c: &ConfigFile) -> Result<(Activation, bool)> {
    let rule = "relu, gelu, gelu_new or silu, alone or behind \"gated-\"";
    let proj: String = c.optional("feed_forward_proj", rule, "relu".into())?;
    let (gated, name) = match proj.strip_prefix("gated-") {
        Some("gelu") => (true, "gelu_new"),
        Some(name) => (true, name),
        None => (false, proj.as_str()),
    };
    let activation = |name: &str| match name {
        "relu" => Some(Activation::Relu),
        "gelu_new" => Some(Activation::GeluTanh),
        "gelu" => Some(Activation::Gelu),
        "silu" | "swish" => Some(Activation::Silu),
        _ => None,
    };
    let mut found = activation(name).ok_or_else(|| c.refuse("feed_forward_proj", rule))?;
    if let Some(name) = c.get::<String>("dense_act_fn", "relu, gelu, gelu_new or silu")? {
        found = activation(&name).ok_or_else(|| c.refuse("dense_act_fn", "relu, gelu, gelu_new or silu"))?;
    }
    c.only("is_gated_act", &[json!(gated)])?;
    Ok((found, gated))
}

/// The encoder.
#[derive(Debug)]
pub struct T5 {
    config: T5Config,
    embedding: Embedding,
    bias: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    fused_attention: bool,
}

impl T5 {
    /// Builds the encoder from any source of parameters. A checkpoint's decoder is left aside.
    pub fn new(config: &T5Config, p: &Params) -> Result<Self> {
        let shared = if p.has("shared.weight") { p.at("shared") } else { p.at("encoder").at("embed_tokens") };
        let embedding = Embedding::new(&shared, config.vocab_size, config.d_model, 1.0)?;
        let blocks = p.at("encoder").at("block");
        let bias = blocks.at("0.layer.0.SelfAttention.relative_attention_bias");
        let bias = Embedding::new(&bias, config.buckets, config.num_heads, (config.d_model as f64).powf(-0.5))?;
        let blocks = (0..config.num_layers).map(|n| Block::new(&blocks.at(n).at("layer"), config)).collect::<Result<_>>()?;
        let norm = RmsNorm::new(&p.at("encoder").at("final_layer_norm"), config.d_model, config.eps)?;
        p.finish(&NOT_ENCODER)?;
        Ok(T5 { config: config.clone(), embedding, bias, blocks, norm, fused_attention: p.fused().attention })
    }

    /// Loads a transformers folder, computing in `kind`.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::from_part(Part::open(folder)?, kind, device)
    }

    /// Builds the encoder from what [`T5::load`] finds in a folder, wherever it lies.
    pub fn from_part(part: Part, kind: Kind, device: Device) -> Result<Self> {
        let config = T5Config::read(part.config)?;
        let p = Params::from_weights(part.weights, kind, device);
        p.compute_by(Compute::fastest(kind, device)?);
        Self::new(&config, &p)
    }

    /// The encoder's sizes.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// The last hidden state. Positions whose mask is 0 are not attended to, but have outputs of their own.
    ///
    /// # Shapes
    /// `input_ids` `[B, S]` i64 below `vocab_size`, `attention_mask` `[B, S]` i64 of 0 and 1; to `[B, S, E]` of the weights' kind.
    pub fn forward(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Result<Tensor> {
        self.forward_heard(input_ids, attention_mask, &mut |_| Ok(()))
    }

    /// [`T5::forward`], where `hear` is told what the blocks before the last one give.
    pub fn forward_heard(&self, input_ids: &Tensor, attention_mask: &Tensor, hear: Hear<'_>) -> Result<Tensor> {
        let (_, s) = input_ids.size2()?;
        let mut x = self.embedding.forward(input_ids)?; // [B, S, E]
        let kind = x.f_kind()?;
        let bias = self.position_bias(s, input_ids.device())?.f_to_kind(Kind::Float)?; // [1, H, S, S]
        let hidden = attention_mask.f_eq(0)?.f_unsqueeze(1)?.f_unsqueeze(1)?; // [B, 1, 1, S]
        let hidden = hidden.f_to_kind(Kind::Float)?.f_mul_scalar(lowest(kind))?;
        let bias = bias.f_add(&hidden)?; // [B, H, S, S]
        let bias = if self.fused_attention { bias.f_to_kind(kind)? } else { bias };
        for (n, block) in self.blocks.iter().enumerate() {
            if n > 0 {
                hear(&x)?;
            }
            x = block.forward(&x, &bias)?;
        }
        self.norm.forward(&x)
    }

    /// The learned bias of every pair of positions, `[1, H, S, S]`.
    fn position_bias(&self, s: i64, device: Device) -> Result<Tensor> {
        let positions = Tensor::f_arange(s, (Kind::Int64, device))?;
        let offset = positions.f_unsqueeze(0)?.f_sub(&positions.f_unsqueeze(1)?)?; // key - query
        let buckets = relative_buckets(&offset, self.config.buckets, self.config.max_distance)?;
        Ok(self.bias.forward(&buckets)?.f_permute([2, 0, 1])?.f_unsqueeze(0)?)
    }
}

/// The most negative number of a kind: what transformers adds to the scores of hidden positions.
fn lowest(kind: Kind) -> f64 {
    match kind {
        Kind::Half => -65504.0,
        // Finite in float32 arithmetic for bfloat16 too, whose range is the same.
        _ => f64::from(f32::MIN),
    }
}

/// Offsets (key − query) i64 to bucket numbers: the sign's half, near offsets one by one, far ones by logarithm.
fn relative_buckets(offset: &Tensor, buckets: i64, max_distance: i64) -> Result<Tensor> {
    let half = buckets / 2;
    let exact = half / 2;
    let side = offset.f_gt(0)?.f_to_kind(Kind::Int64)?.f_mul_scalar(half)?;
    let distance = offset.f_abs()?;
    // float32 step by step, as transformers does: the truncation below is sensitive to the last bit.
    let far = distance.f_to_kind(Kind::Float)?.f_div_scalar(exact)?.f_log()?;
    let far = far.f_div_scalar((max_distance as f64 / exact as f64).ln())?.f_mul_scalar(half - exact)?;
    // The logarithm of distance 0 is -inf, which has no integer; those places are not used.
    let far = far.f_clamp(0.0, half as f64)?.f_to_kind(Kind::Int64)?.f_add_scalar(exact)?.f_clamp_max(half - 1)?;
    Ok(far.f_where_self(&distance.f_ge(exact)?, &distance)?.f_add(&side)?)
}

/// Self-attention and feed-forward, each behind a norm and beside a residual.
#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    /// To queries, keys and values: three maps, or one of all of them where the attention is fused.
    qkv: Vec<Linear>,
    o: Linear,
    heads: i64,
    ff_norm: RmsNorm,
    ff: FeedForward,
}

impl Block {
    fn new(p: &Params, c: &T5Config) -> Result<Self> {
        let (attention, ff) = (p.at("0"), p.at("1"));
        let inner = c.num_heads * c.d_kv;
        let own = attention.at("SelfAttention");
        let project = |name: &str, std: f64| Linear::no_bias(&own.at(name), c.d_model, inner, Init::Normal { std });
        let out = Init::Normal { std: (inner as f64).powf(-0.5) };
        let q = project("q", ((c.d_model * c.d_kv) as f64).powf(-0.5))?;
        let (k, v) = (project("k", (c.d_model as f64).powf(-0.5))?, project("v", (c.d_model as f64).powf(-0.5))?);
        let apart = vec![q, k, v];
        Ok(Block {
            attention_norm: RmsNorm::new(&attention.at("layer_norm"), c.d_model, c.eps)?,
            qkv: if p.fused().attention { vec![Linear::joined(&apart)?] } else { apart },
            o: Linear::no_bias(&own.at("o"), inner, c.d_model, out)?,
            heads: c.num_heads,
            ff_norm: RmsNorm::new(&ff.at("layer_norm"), c.d_model, c.eps)?,
            ff: FeedForward::new(&ff.at("DenseReluDense"), c)?,
        })
    }

    /// `x` `[B, S, E]`, `bias` `[B, H, S, S]`, float32, or of `x`'s kind where the attention is fused.
    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let x = within_half(x.f_add(&self.attend(&self.attention_norm.forward(x)?, bias)?)?)?;
        within_half(x.f_add(&self.ff.forward(&self.ff_norm.forward(&x)?)?)?)
    }

    fn attend(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (b, s, _) = x.size3()?;
        let split = |x: &Tensor| x.f_unflatten(-1, [self.heads, -1])?.f_transpose(1, 2); // [B, H, S, K]
        // T5 does not scale the scores: its initial values do.
        let mixed = match &self.qkv[..] {
            [q, k, v] => {
                let (q, k, v) = (split(&q.forward(x)?)?, split(&k.forward(x)?)?, split(&v.forward(x)?)?);
                let scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_to_kind(Kind::Float)?.f_add(bias)?;
                scores.f_softmax(-1, Kind::Float)?.f_to_kind(v.f_kind()?)?.f_matmul(&v)?
            }
            all => {
                let parts = all[0].forward(x)?.f_chunk(3, -1)?;
                let (q, k, v) = (split(&parts[0])?, split(&parts[1])?, split(&parts[2])?);
                Tensor::f_scaled_dot_product_attention(&q, &k, &v, Some(bias), 0.0, false, Some(1.0), false)?
            }
        };
        self.o.forward(&mixed.f_transpose(1, 2)?.f_reshape([b, s, -1])?)
    }
}

/// In float16 an activation may overflow; transformers then clamps the whole tensor to ±(65504 − 1000), which is part of
/// the released connectors' contract (paper §1.5). Nothing happens where nothing overflowed, nor in other kinds.
fn within_half(x: Tensor) -> Result<Tensor> {
    if x.f_kind()? != Kind::Half {
        return Ok(x);
    }
    let limit = Tensor::f_full([1; 0], 65504.0, (Kind::Half, x.device()))?;
    let limit = limit.f_sub(&x.f_isinf()?.f_any()?.f_to_kind(Kind::Half)?.f_mul_scalar(1000.0)?)?;
    Ok(x.f_clamp_tensor(Some(limit.f_neg()?), Some(limit))?)
}

/// `wo(act(wi(x)))`, or `wo(act(wi_0(x)) · wi_1(x))` where gated.
#[derive(Debug)]
struct FeedForward {
    wi: Linear,
    gate: Option<Linear>,
    wo: Linear,
    activation: Activation,
    /// `wi` and `gate` are one map.
    fused: bool,
}

impl FeedForward {
    fn new(p: &Params, c: &T5Config) -> Result<Self> {
        let std = (c.d_model as f64).powf(-0.5);
        let input = |name: &str| Linear::no_bias(&p.at(name), c.d_model, c.d_ff, Init::Normal { std });
        let (wi, gate) = if c.gated { (input("wi_0")?, Some(input("wi_1")?)) } else { (input("wi")?, None) };
        let wo = Linear::no_bias(&p.at("wo"), c.d_ff, c.d_model, Init::Normal { std: (c.d_ff as f64).powf(-0.5) })?;
        let fused = p.fused().gate && c.gated && c.activation == Activation::GeluTanh && c.d_ff % 8 == 0;
        let (wi, gate) = match gate {
            Some(gate) if fused => (Linear::joined(&[wi, gate])?, None),
            gate => (wi, gate),
        };
        Ok(FeedForward { wi, gate, wo, activation: c.activation, fused })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.wi.forward(x)?;
        if self.fused {
            return self.wo.forward(&fused::gated_gelu(&hidden)?);
        }
        let mut hidden = match self.activation {
            Activation::Relu => hidden.f_relu()?,
            Activation::GeluTanh => gelu_tanh(&hidden)?,
            Activation::Gelu => gelu(&hidden)?,
            Activation::Silu => silu(&hidden)?,
        };
        if let Some(gate) = &self.gate {
            hidden = hidden.f_mul(&gate.forward(x)?)?;
        }
        self.wo.forward(&hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ModelError;
    use serde_json::{Map, Value};

    fn config(change: Value) -> Result<T5Config> {
        let mut fields: Map<String, Value> = serde_json::from_value(json!({
            "model_type": "t5", "vocab_size": 20, "d_model": 8, "d_kv": 3, "d_ff": 16, "num_layers": 2, "num_heads": 2,
            "feed_forward_proj": "gated-gelu", "is_gated_act": true, "dense_act_fn": "gelu_new", "architectures": ["X"],
        }))
        .unwrap();
        fields.extend(change.as_object().unwrap().clone());
        T5Config::read(ConfigFile::from_map(Path::new("config.json"), fields))
    }

    #[test]
    fn the_activation_follows_transformers_rules() {
        let read = |change| config(change).map(|c| (c.activation, c.gated));
        assert_eq!(read(json!({})).unwrap(), (Activation::GeluTanh, true));
        assert_eq!(
            read(json!({"feed_forward_proj": "relu", "is_gated_act": false, "dense_act_fn": null})).unwrap(),
            (Activation::Relu, false)
        );
        assert_eq!(read(json!({"feed_forward_proj": "gated-silu", "dense_act_fn": null})).unwrap().0, Activation::Silu);
    }

    #[test]
    fn unsupported_fields_are_refused_by_name() {
        for (field, change) in [
            ("model_type", json!({"model_type": "umt5"})),
            ("feed_forward_proj", json!({"feed_forward_proj": "gated-mish"})),
            ("is_gated_act", json!({"is_gated_act": false})),
            ("d_model", json!({"d_model": "8"})),
            ("layer_norm_epsilon", json!({"layer_norm_epsilon": -1})),
            ("rotary", json!({"rotary": true})),
        ] {
            assert!(matches!(config(change), Err(ModelError::Config { field: f, .. }) if f == field), "{field}");
        }
    }

    #[test]
    fn far_positions_share_buckets_and_directions_do_not() {
        let offsets = Tensor::from_slice(&[0i64, -1, 1, -7, -8, -127, -128, -1000, 1000]);
        let buckets: Vec<i64> = relative_buckets(&offsets, 32, 128).unwrap().try_into().unwrap();
        assert_eq!(buckets, [0, 1, 17, 7, 8, 15, 15, 15, 31]);
    }

    #[test]
    fn hidden_tokens_have_no_influence() {
        let t5 = T5::new(&config(json!({})).unwrap(), &Params::random(1, Kind::Float, Device::Cpu)).unwrap();
        let mask = Tensor::from_slice(&[1i64, 1, 0]).reshape([1, 3]);
        let run = |last: i64| t5.forward(&Tensor::from_slice(&[5i64, 1, last]).reshape([1, 3]), &mask).unwrap();
        assert!(run(0).narrow(1, 0, 2).equal(&run(9).narrow(1, 0, 2)));
    }

    #[test]
    fn overflow_in_half_is_clamped() {
        let x = Tensor::from_slice(&[1.0f32, f32::INFINITY, -f32::INFINITY, 65504.0]).to_kind(Kind::Half);
        let y: Vec<f32> = within_half(x).unwrap().to_kind(Kind::Float).try_into().unwrap();
        assert_eq!(y, [1.0, 64512.0, -64512.0, 64512.0]); // 64504 rounds to 64512 in float16
        let fine = Tensor::from_slice(&[65504.0f32]).to_kind(Kind::Half);
        assert!(within_half(fine.copy()).unwrap().equal(&fine));
    }
}
