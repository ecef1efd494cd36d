//! What a decoder's `config.json` says: transformers' `LlamaConfig`, `Qwen2Config` and `Qwen3Config`, and older forms of them.

use std::path::Path;

use serde_json::json;

use super::rope::Rope;
use crate::config::ConfigFile;
use crate::error::Result;

/// Fields of `config.json` that say nothing about the hidden states. `sliding_window` and `max_window_layers` count only under
/// `use_sliding_window`, which is refused.
const IRRELEVANT: [&str; 25] = [
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_sequence_length",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sliding_window",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// The sizes of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding table.
    pub vocab_size: i64,
    /// E.
    pub hidden_size: i64,
    /// F.
    pub intermediate_size: i64,
    /// Blocks.
    pub num_layers: i64,
    /// H.
    pub num_heads: i64,
    /// G, which divides H.
    pub num_kv_heads: i64,
    /// K, even; not always E / H.
    pub head_dim: i64,
    /// The longest row in tokens.
    pub max_positions: i64,
    /// The norms' epsilon.
    pub eps: f64,
    /// Rotary positions.
    pub rope: Rope,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the projection out of the attention has a bias.
    pub out_bias: bool,
    /// Whether the feed-forward layers have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys of each head are normalized (qwen3).
    pub head_norms: bool,
}

impl DecoderConfig {
    /// The values of `model_type` that this module reads.
    pub const FAMILIES: [&str; 3] = ["llama", "qwen2", "qwen3"];

    /// Reads `config.json` in a transformers folder.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::read(ConfigFile::open(&folder.join("config.json"))?)
    }

    /// Reads every field that matters, and refuses those it does not know.
    pub fn read(c: ConfigFile) -> Result<Self> {
        let rule = Self::FAMILIES.join(" or ");
        let family: String = c.required("model_type", &rule)?;
        if !Self::FAMILIES.contains(&family.as_str()) {
            return Err(c.refuse("model_type", &rule));
        }
        c.only("hidden_act", &[json!("silu")])?;
        let (vocab_size, intermediate_size) = (c.size("vocab_size")?, c.size("intermediate_size")?);
        let (hidden_size, num_layers) = (c.size("hidden_size")?, c.size("num_hidden_layers")?);
        let (num_heads, num_kv_heads) = heads(&c, &family)?;
        let max_positions = c.size_or("max_position_embeddings", if family == "llama" { 2048 } else { 32_768 })?;
        let (qkv_bias, out_bias, mlp_bias) = biases(&c, &family)?;
        if family != "llama" {
            windows(&c)?;
        }
        let config = DecoderConfig {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim: head_dim(&c, &family, hidden_size, num_heads)?,
            max_positions,
            eps: c.optional("rms_norm_eps", "a number", 1e-6)?,
            rope: Rope::read(&c, max_positions)?,
            qkv_bias,
            out_bias,
            mlp_bias,
            head_norms: family == "qwen3",
        };
        if !(config.eps > 0.0 && config.eps < 1.0) {
            return Err(c.refuse("rms_norm_eps", "between 0 and 1"));
        }
        c.finish(&IRRELEVANT)?;
        Ok(config)
    }
}

/// (H, G).
fn heads(c: &ConfigFile, family: &str) -> Result<(i64, i64)> {
    let heads = c.size("num_attention_heads")?;
    // LLaMA's configurations before grouped queries lack the field; Qwen's never do.
    let kv_heads = if family == "llama" { c.size_or("num_key_value_heads", heads)? } else { c.size("num_key_value_heads")? };
    if heads % kv_heads == 0 { Ok((heads, kv_heads)) } else { Err(c.refuse("num_key_value_heads", "a divisor of num_attention_heads")) }
}

/// K.
fn head_dim(c: &ConfigFile, family: &str, hidden_size: i64, heads: i64) -> Result<i64> {
    let (given, default) = (c.value("head_dim").is_some(), if family == "qwen3" { 128 } else { hidden_size / heads });
    if !given && family != "qwen3" && hidden_size % heads != 0 {
        return Err(c.refuse("hidden_size", "a multiple of num_attention_heads"));
    }
    let width = if given { c.size("head_dim")? } else { default };
    match (width % 2, given) {
        (0, _) => Ok(width),
        (_, true) => Err(c.refuse("head_dim", "even")),
        (_, false) => Err(c.refuse("hidden_size", "an even multiple of num_attention_heads")),
    }
}

/// Whether (queries, keys and values; attention's output; feed-forward layers) have biases.
fn biases(c: &ConfigFile, family: &str) -> Result<(bool, bool, bool)> {
    let flag = |field: &str| c.optional(field, "true or false", false);
    Ok(match family {
        "qwen2" => (true, false, false),
        "qwen3" => (flag("attention_bias")?, flag("attention_bias")?, false),
        _ => (flag("attention_bias")?, flag("attention_bias")?, flag("mlp_bias")?),
    })
}

/// Refuses attention to nearby tokens only.
fn windows(c: &ConfigFile) -> Result<()> {
    c.only("use_sliding_window", &[json!(false)])?;
    c.only("use_mrope", &[json!(false)])?;
    let rule = "a list of \"full_attention\"";
    let types: Vec<String> = c.optional("layer_types", rule, Vec::new())?;
    if types.iter().all(|kind| kind == "full_attention") { Ok(()) } else { Err(c.refuse("layer_types", rule)) }
}

#[cfg(test)]
mod tests {
    use super::super::rope::Scaling;
    use super::*;
    use crate::error::ModelError;
    use serde_json::{Map, Value};

    fn config(family: &str, change: Value) -> Result<DecoderConfig> {
        let mut fields: Map<String, Value> = serde_json::from_value(json!({
            "model_type": family, "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "architectures": ["LlamaForCausalLM"],
        }))
        .unwrap();
        fields.extend(change.as_object().unwrap().clone());
        DecoderConfig::read(ConfigFile::from_map(Path::new("config.json"), fields))
    }

    #[test]
    fn old_and_new_forms_of_rotary_settings_are_the_same() {
        let rope = |change| config("llama", change).unwrap().rope;
        let plain = |theta| Rope { theta, scaling: Scaling::None };
        assert_eq!(rope(json!({})), plain(1e4));
        assert_eq!(rope(json!({"rope_theta": 5e5, "rope_scaling": null})), plain(5e5));
        assert_eq!(rope(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})), plain(5e5));
        let linear = rope(json!({"rope_theta": 9, "rope_scaling": {"type": "linear", "factor": 2.0}}));
        assert_eq!(linear, Rope { theta: 9.0, scaling: Scaling::Linear { factor: 2.0 } });
        assert_eq!(linear, rope(json!({"rope_parameters": {"rope_theta": 9.0, "rope_type": "linear", "factor": 2}})));
        let given = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, context: 77.0 };
        assert_eq!(rope(json!({"max_position_embeddings": 77, "rope_scaling": given})).scaling, scaling);
    }

    #[test]
    fn each_family_has_its_own_defaults() {
        let llama = config("llama", json!({"num_key_value_heads": null})).unwrap();
        assert_eq!((llama.num_kv_heads, llama.head_dim, llama.max_positions, llama.qkv_bias), (4, 4, 2048, false));
        let qwen2 = config("qwen2", json!({"sliding_window": 4096, "use_sliding_window": false})).unwrap();
        assert_eq!((qwen2.head_dim, qwen2.qkv_bias, qwen2.out_bias, qwen2.head_norms), (4, true, false, false));
        let qwen3 = config("qwen3", json!({"layer_types": ["full_attention", "full_attention"]})).unwrap();
        assert_eq!((qwen3.head_dim, qwen3.qkv_bias, qwen3.head_norms), (128, false, true));
    }

    #[test]
    fn unsupported_fields_are_refused_by_name() {
        for (family, field, change) in [
            ("mistral", "model_type", json!({})),
            ("llama", "hidden_act", json!({"hidden_act": "gelu"})),
            ("llama", "num_key_value_heads", json!({"num_key_value_heads": 3})),
            ("qwen2", "num_key_value_heads", json!({"num_key_value_heads": null})),
            ("llama", "hidden_size", json!({"hidden_size": 18})),
            ("llama", "hidden_size", json!({"hidden_size": 12})),
            ("llama", "head_dim", json!({"head_dim": 3})),
            ("llama", "rms_norm_eps", json!({"rms_norm_eps": 2})),
            ("llama", "attention_bias", json!({"attention_bias": "yes"})),
            ("llama", "rope_theta", json!({"rope_theta": -1})),
            ("llama", "partial_rotary_factor", json!({"partial_rotary_factor": 0.5})),
            ("llama", "rope_scaling.rope_type", json!({"rope_scaling": {"rope_type": "yarn", "factor": 4}})),
            ("llama", "rope_scaling.type", json!({"rope_scaling": {"type": "dynamic", "factor": 4}})),
            ("llama", "rope_parameters.factor", json!({"rope_parameters": {"rope_type": "linear", "factor": 0}})),
            ("llama", "rope_parameters.beta", json!({"rope_parameters": {"rope_type": "default", "beta": 1}})),
            ("llama", "rope_scaling", json!({"rope_scaling": {}, "rope_parameters": {}})),
            ("llama", "rope_parameters", json!({"rope_parameters": 7})),
            ("llama", "use_sliding_window", json!({"use_sliding_window": true})),
            ("qwen2", "use_sliding_window", json!({"use_sliding_window": true})),
            ("qwen3", "layer_types", json!({"layer_types": ["full_attention", "sliding_attention"]})),
            ("qwen3", "mystery", json!({"mystery": 1})),
        ] {
            let error = config(family, change).unwrap_err();
            assert!(matches!(&error, ModelError::Config { field: f, .. } if f == field), "{field}: {error}");
        }
    }
}
