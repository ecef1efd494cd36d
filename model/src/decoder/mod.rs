//! LLaMA-family decoders as encoders of text, from a transformers folder (`config.json`, safetensors): LLaMA and TinyLlama
//! (`model_type` llama), Qwen 2 and 2.5 (qwen2), Qwen 3 (qwen3).
//!
//! Qwen is the current small family beside LLaMA: its weights are free to fetch and under Apache-2.0, its tokenizer is a plain
//! byte-level `tokenizer.json`, and its network is LLaMA's with biases (qwen2) or norms (qwen3) on queries and keys, so that one
//! module serves all three. Nothing is generated: `lm_head` is left aside, and there is no cache of keys and values.
//!
//! Follows transformers' `modeling_llama.py`, `modeling_qwen2.py` and `modeling_qwen3.py`
//! (<https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py>).
//! Letters: B batch, S tokens, E `hidden_size`, H heads, G heads of keys and values, K `head_dim`, F `intermediate_size`.

mod config;
mod rope;

use std::path::Path;

use tch::{Device, Kind, Tensor};

pub use config::DecoderConfig;
pub use rope::{Rope, Scaling};
use rope::{Rotation, rotate};

use crate::error::Result;
use crate::layers::{Embedding, Linear, RmsNorm, attend, causal, silu};
use crate::params::{Init, Params};
use crate::part::Part;
use crate::text::{Hear, check_positions};

/// Tensors that checkpoints hold beside what encodes: the head that predicts the next token, and rotary frequencies, which older
/// releases of transformers saved.
const NOT_ENCODER: [&str; 2] = ["lm_head.weight", "*rotary_emb.inv_freq"];

/// Initial values of the linear maps, as transformers' `initializer_range` has them.
const INIT: Init = Init::Normal { std: 0.02 };

/// The decoder without its head.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    tokens: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
}

impl Decoder {
    /// Builds the decoder from any source of parameters. Names may have the prefix `model.` (saved with a head) or lack it
    /// (saved without).
    pub fn new(config: &DecoderConfig, p: &Params) -> Result<Self> {
        const TOKENS: &str = "embed_tokens.weight";
        let prefixed = p.at("model");
        let body = if prefixed.has(TOKENS) || !p.has(TOKENS) { prefixed } else { p.clone() };
        let tokens = Embedding::new(&body.at("embed_tokens"), config.vocab_size, config.hidden_size, 0.02)?;
        let layers = body.at("layers");
        let blocks = (0..config.num_layers).map(|n| Block::new(&layers.at(n), config)).collect::<Result<_>>()?;
        let norm = RmsNorm::new(&body.at("norm"), config.hidden_size, config.eps)?;
        p.finish(&NOT_ENCODER)?;
        Ok(Decoder { config: config.clone(), tokens, blocks, norm })
    }

    /// Loads a transformers folder, computing in `kind`.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let part = Part::open(folder)?;
        Self::new(&DecoderConfig::read(part.config)?, &Params::from_weights(part.weights, kind, device))
    }

    /// The decoder's sizes.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The last hidden state, after the final norm. A token sees itself and those before it whose mask is 1; positions whose mask
    /// is 0 have outputs of their own. Rows are padded on the right: positions count from a row's beginning.
    ///
    /// # Shapes
    /// `input_ids` `[B, S]` i64 below `vocab_size`, S at most `max_positions`; `attention_mask` `[B, S]` i64 of 0 and 1; to
    /// `[B, S, E]` of the weights' kind.
    pub fn forward(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Result<Tensor> {
        self.forward_heard(input_ids, attention_mask, &mut |_| Ok(()))
    }

    /// [`Decoder::forward`], where `hear` is told what the blocks before the last one give.
    pub fn forward_heard(&self, input_ids: &Tensor, attention_mask: &Tensor, hear: Hear<'_>) -> Result<Tensor> {
        let s = check_positions(input_ids, self.config.max_positions)?;
        let mut x = self.tokens.forward(input_ids)?; // [B, S, E]
        let rotation = self.config.rope.rotation(s, self.config.head_dim, (x.f_kind()?, x.device()))?;
        let hidden = causal(attention_mask)?; // [B, 1, S, S]
        for (n, block) in self.blocks.iter().enumerate() {
            if n > 0 {
                hear(&x)?;
            }
            x = block.forward(&x, &rotation, &hidden)?;
        }
        self.norm.forward(&x)
    }
}

fn linear(p: &Params, input: i64, output: i64, bias: bool) -> Result<Linear> {
    if bias { Linear::with_init(p, input, output, (INIT, Init::Zeros)) } else { Linear::no_bias(p, input, output, INIT) }
}

/// Self-attention and feed-forward, each behind a norm and beside a residual.
#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    ff_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(p: &Params, c: &DecoderConfig) -> Result<Self> {
        let (mlp, width, inner) = (p.at("mlp"), c.hidden_size, c.intermediate_size);
        Ok(Block {
            attention_norm: RmsNorm::new(&p.at("input_layernorm"), width, c.eps)?,
            attention: Attention::new(&p.at("self_attn"), c)?,
            ff_norm: RmsNorm::new(&p.at("post_attention_layernorm"), width, c.eps)?,
            gate: linear(&mlp.at("gate_proj"), width, inner, c.mlp_bias)?,
            up: linear(&mlp.at("up_proj"), width, inner, c.mlp_bias)?,
            down: linear(&mlp.at("down_proj"), inner, width, c.mlp_bias)?,
        })
    }

    /// `x` `[B, S, E]`, `hidden` `[B, 1, S, S]` bool.
    fn forward(&self, x: &Tensor, rotation: &Rotation, hidden: &Tensor) -> Result<Tensor> {
        let x = x.f_add(&self.attention.forward(&self.attention_norm.forward(x)?, rotation, hidden)?)?;
        let y = self.ff_norm.forward(&x)?;
        let inner = silu(&self.gate.forward(&y)?)?.f_mul(&self.up.forward(&y)?)?;
        Ok(x.f_add(&self.down.forward(&inner)?)?)
    }
}

/// Attention in which several heads of queries share one of keys and values.
#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    /// Of each head's queries and keys, in qwen3.
    norms: Option<(RmsNorm, RmsNorm)>,
    heads: i64,
    kv_heads: i64,
}

impl Attention {
    fn new(p: &Params, c: &DecoderConfig) -> Result<Self> {
        let project = |name: &str, heads: i64| linear(&p.at(name), c.hidden_size, heads * c.head_dim, c.qkv_bias);
        let norm = |name: &str| RmsNorm::new(&p.at(name), c.head_dim, c.eps);
        Ok(Attention {
            q: project("q_proj", c.num_heads)?,
            k: project("k_proj", c.num_kv_heads)?,
            v: project("v_proj", c.num_kv_heads)?,
            out: linear(&p.at("o_proj"), c.num_heads * c.head_dim, c.hidden_size, c.out_bias)?,
            norms: if c.head_norms { Some((norm("q_norm")?, norm("k_norm")?)) } else { None },
            heads: c.num_heads,
            kv_heads: c.num_kv_heads,
        })
    }

    fn forward(&self, x: &Tensor, rotation: &Rotation, hidden: &Tensor) -> Result<Tensor> {
        let (b, s, _) = x.size3()?;
        let split = |x: Tensor, heads: i64| x.f_reshape([b, s, heads, -1]); // [B, S, heads, K]
        let (mut q, mut k) = (split(self.q.forward(x)?, self.heads)?, split(self.k.forward(x)?, self.kv_heads)?);
        if let Some((q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        let v = split(self.v.forward(x)?, self.kv_heads)?.f_transpose(1, 2)?; // [B, G, S, K]
        let (q, k) = (rotate(&q.f_transpose(1, 2)?, rotation)?, rotate(&k.f_transpose(1, 2)?, rotation)?);
        self.out.forward(&attend(&q, &self.spread(&k)?, &self.spread(&v)?, hidden)?)
    }

    /// Every head of keys or values as often as heads of queries share it: `[B, G, S, K]` to `[B, H, S, K]`.
    fn spread(&self, x: &Tensor) -> Result<Tensor> {
        let (b, g, s, k) = x.size4()?;
        Ok(x.f_unsqueeze(2)?.f_expand([b, g, self.heads / g, s, k], false)?.f_reshape([b, self.heads, s, k])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigFile;
    use serde_json::json;

    #[test]
    fn later_and_hidden_tokens_have_no_influence() {
        let fields = json!({
            "model_type": "llama", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        let config = DecoderConfig::read(ConfigFile::from_map(Path::new("config.json"), fields.as_object().unwrap().clone())).unwrap();
        let decoder = Decoder::new(&config, &Params::random(1, Kind::Float, Device::Cpu)).unwrap();
        let run = |ids: [i64; 4], mask: [i64; 4]| {
            let row = |values: &[i64]| Tensor::from_slice(values).reshape([1, -1]);
            decoder.forward(&row(&ids), &row(&mask)).unwrap()
        };
        let whole = run([3, 4, 5, 6], [1; 4]);
        assert!(whole.narrow(1, 0, 3).equal(&run([3, 4, 5, 7], [1; 4]).narrow(1, 0, 3)));
        assert!(!whole.narrow(1, 3, 1).equal(&run([3, 9, 5, 6], [1; 4]).narrow(1, 3, 1)));
        let padded = |pad: i64| run([3, 4, pad, 6], [1, 1, 0, 1]);
        assert!(padded(5).narrow(1, 3, 1).equal(&padded(8).narrow(1, 3, 1)));
        let nothing = run([3, 4, 5, 6], [0; 4]);
        assert_eq!(nothing.isfinite().all().int64_value(&[]), 1);
    }
}
