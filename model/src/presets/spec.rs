//! The presets' configurations, as their folders hold them.

use std::str::FromStr;

use serde_json::{Value, json};
use tch::Kind;

use crate::error::{ModelError, Result};

/// The shapes that random models come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Small enough to train on with two cores: 8×8 latents of 64×64 pictures, cross-attention width 64, a CLIP and a T5 of
    /// width 64. float32.
    Nano,
    /// As small, and of SDXL's kind: transformers of unequal depth, linear projections, two CLIPs, pooled text of width 32, and the sizes
    /// of pictures.
    NanoSdxl,
    /// What the miniature in `mini/` was trained from: 8×8 latents of 64×64 pictures, cross-attention at both resolutions, a CLIP that reads 32
    /// tokens. It predicts velocities, so that where there is most noise, and the text decides, there is most to learn. float32.
    Mini,
    /// As nano, with states of Stable Diffusion 1.5's width made from features of flan-t5-xl's: the connector between them has its true size
    /// (66.8 million parameters), and all else costs next to nothing.
    NanoWide,
    /// Stable Diffusion 1.5's U-Net, VAE and CLIP in their true shapes (1.07 billion parameters), and a T5 of flan-t5-small's shape, since
    /// flan-t5-xl's alone is 1.2 billion. float16 on disk (2.2 GB).
    Sd15,
    /// SDXL's U-Net, VAE and two CLIPs in their true shapes (3.47 billion parameters), and the same T5. float16 on disk (7.0 GB).
    Sdxl,
}

impl Preset {
    /// All presets, by the names that the command line knows them by.
    pub const NAMES: [(&'static str, Preset); 6] = [
        ("nano", Preset::Nano),
        ("mini", Preset::Mini),
        ("nano-sdxl", Preset::NanoSdxl),
        ("nano-wide", Preset::NanoWide),
        ("sd15", Preset::Sd15),
        ("sdxl", Preset::Sdxl),
    ];

    pub(super) fn spec(self) -> Spec {
        match self {
            Preset::Nano => nano(),
            Preset::Mini => mini(),
            Preset::NanoSdxl => nano_sdxl(),
            Preset::NanoWide => nano_wide(),
            Preset::Sd15 => sd15(),
            Preset::Sdxl => sdxl(),
        }
    }
}

impl FromStr for Preset {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self> {
        let found = Preset::NAMES.iter().find(|(known, _)| *known == name).map(|(_, preset)| *preset);
        found.ok_or_else(|| ModelError::argument("preset", Preset::NAMES.map(|(known, _)| known).join(", "), name))
    }
}

/// A preset in full: configurations as their folders hold them, the vocabulary to train, and the kind on disk.
pub(super) struct Spec {
    pub(super) model_index: Value,
    pub(super) scheduler: Value,
    pub(super) unet: Value,
    pub(super) vae: Value,
    /// One text encoder of CLIP's kind, or SDXL's two; without the ids of their special tokens, which the vocabulary decides.
    pub(super) clips: Vec<Value>,
    pub(super) text: Value,
    /// Tokens of each tokenizer.
    pub(super) vocabulary: usize,
    pub(super) kind: Kind,
}

fn nano() -> Spec {
    Spec {
        model_index: model_index("StableDiffusionPipeline"),
        scheduler: scheduler(),
        unet: json!({
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 4, "block_out_channels": [32, 64],
            "center_input_sample": false, "cross_attention_dim": 64, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 1,
            "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 8, "out_channels": 4, "sample_size": 8,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }),
        vae: vae_config(&[8, 16, 16, 16], 1, 4, 64),
        clips: vec![clip_config([64, 128, 2, 4], 1024, "float32")],
        text: t5_config([64, 16, 128, 2, 4], 1024, "float32"),
        vocabulary: 1024,
        kind: Kind::Float,
    }
}

fn mini() -> Spec {
    let mut clip = clip_config([128, 256, 4, 4], 1024, "float32");
    clip["max_position_embeddings"] = json!(32);
    let mut scheduler = scheduler();
    scheduler["prediction_type"] = json!("v_prediction");
    Spec {
        scheduler,
        unet: json!({
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 4, "block_out_channels": [48, 96],
            "center_input_sample": false, "cross_attention_dim": 128,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 1,
            "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 16, "out_channels": 4, "sample_size": 8,
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        }),
        vae: vae_config(&[8, 16, 32, 64], 1, 4, 64),
        clips: vec![clip],
        text: t5_config([128, 32, 256, 4, 4], 1024, "float32"),
        ..nano()
    }
}

fn nano_sdxl() -> Spec {
    Spec {
        model_index: model_index("StableDiffusionXLPipeline"),
        scheduler: scheduler_sdxl(),
        unet: json!({
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "attention_head_dim": [2, 4], "block_out_channels": [32, 64],
            "center_input_sample": false, "cross_attention_dim": 64, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 1,
            "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 8, "out_channels": 4,
            "projection_class_embeddings_input_dim": 80, "sample_size": 8, "transformer_layers_per_block": [1, 2],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
        }),
        vae: vae_sdxl(vae_config(&[8, 16, 16, 16], 1, 4, 64)),
        clips: vec![clip_config([24, 48, 2, 4], 1024, "float32"), clip_pooled(clip_config([40, 80, 2, 4], 1024, "float32"), 32)],
        ..nano()
    }
}

fn nano_wide() -> Spec {
    let mut spec = nano();
    spec.unet["cross_attention_dim"] = json!(768);
    spec.clips = vec![clip_config([768, 768, 1, 12], 1024, "float32")];
    spec.text = t5_config([2048, 64, 128, 1, 2], 1024, "float32");
    spec
}

fn sd15() -> Spec {
    Spec {
        model_index: model_index("StableDiffusionPipeline"),
        scheduler: scheduler(),
        unet: json!({
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false, "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
            "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        }),
        vae: vae_config(&[128, 256, 512, 512], 2, 32, 512),
        clips: vec![clip_l()],
        text: t5_config([512, 64, 1024, 8, 6], 32128, "float16"),
        vocabulary: 8000,
        kind: Kind::Half,
    }
}

fn sdxl() -> Spec {
    Spec {
        model_index: model_index("StableDiffusionXLPipeline"),
        scheduler: scheduler_sdxl(),
        unet: json!({
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
            "center_input_sample": false, "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
            "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
            "projection_class_embeddings_input_dim": 2816, "sample_size": 128, "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
        }),
        vae: vae_sdxl(vae_config(&[128, 256, 512, 512], 2, 32, 1024)),
        clips: vec![clip_l(), clip_pooled(clip_config([1280, 5120, 32, 20], 49408, "float16"), 1280)],
        ..sd15()
    }
}

fn vae_config(channels: &[i64], layers: i64, groups: i64, size: i64) -> Value {
    json!({
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; channels.len()], "in_channels": 3, "latent_channels": 4,
        "layers_per_block": layers, "norm_num_groups": groups, "out_channels": 3, "sample_size": size,
        "scaling_factor": 0.18215, "up_block_types": vec!["UpDecoderBlock2D"; channels.len()],
    })
}

/// With what tells SDXL's VAE from Stable Diffusion's.
fn vae_sdxl(mut config: Value) -> Value {
    config["scaling_factor"] = json!(0.13025);
    config["force_upcast"] = json!(true);
    config
}

/// `sizes`: hidden, intermediate, layers, heads.
fn clip_config(sizes: [i64; 4], vocab_size: i64, dtype: &str) -> Value {
    let [hidden, intermediate, layers, heads] = sizes;
    json!({
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": vocab_size, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": hidden, "torch_dtype": dtype,
    })
}

fn clip_l() -> Value {
    clip_config([768, 3072, 12, 12], 49408, "float16")
}

/// With what tells SDXL's second text encoder from its first.
fn clip_pooled(mut config: Value, width: i64) -> Value {
    config["architectures"] = json!(["CLIPTextModelWithProjection"]);
    config["hidden_act"] = json!("gelu");
    config["projection_dim"] = json!(width);
    config
}

/// `sizes`: d_model, d_kv, d_ff, layers, heads.
fn t5_config(sizes: [i64; 5], vocab_size: i64, dtype: &str) -> Value {
    let [d_model, d_kv, d_ff, layers, heads] = sizes;
    json!({
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": vocab_size, "d_model": d_model, "d_kv": d_kv,
        "d_ff": d_ff, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new",
        "is_gated_act": true, "is_encoder_decoder": true, "use_cache": true, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0, "tie_word_embeddings": false, "torch_dtype": dtype,
    })
}

/// Stable Diffusion 1.5's own.
fn scheduler() -> Value {
    json!({
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
        "clip_sample": false,
    })
}

/// SDXL 1.0's own.
fn scheduler_sdxl() -> Value {
    json!({
        "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "clip_sample": false, "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "sample_max_value": 1.0, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading",
        "trained_betas": null, "use_karras_sigmas": false,
    })
}

fn model_index(pipeline: &str) -> Value {
    let sdxl = pipeline == "StableDiffusionXLPipeline";
    let scheduler = if sdxl { "EulerDiscreteScheduler" } else { "PNDMScheduler" };
    let mut index = json!({
        "_class_name": pipeline, "_diffusers_version": "0.42.1", "feature_extractor": [null, null],
        "scheduler": ["diffusers", scheduler], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    });
    if sdxl {
        index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
        index["tokenizer_2"] = json!(["transformers", "CLIPTokenizer"]);
        index["force_zeros_for_empty_prompt"] = json!(true);
    } else {
        index["requires_safety_checker"] = json!(false);
        index["safety_checker"] = json!([null, null]);
    }
    index
}

pub(super) fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": 512, "clean_up_tokenization_spaces": false,
    })
}
