//! The U-Nets of SD 2 and SDXL against diffusers. `goldens/diffusion.py` made the expected values.
//!
//! The relative error of a tensor is max|a − b| / max|b|.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Golden, folder};
use ella_model::config::ConfigFile;
use ella_model::forward::{self, Net, Options};
use ella_model::params::Params;
use ella_model::schedule::{Schedule, ScheduleConfig};
use ella_model::unet::{Added, UNet, UNetConfig};
use ella_model::weights::{self, Weights};
use ella_model::{ModelError, Result};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const UNETS: [&str; 3] = ["unet-sd2", "unet-sdxl", "unet-uneven"];

impl Golden {
    /// The conditions of a case, where the network takes them.
    fn added(&self, case: &str) -> Option<Added> {
        self.0.shape(&format!("{case}.text_embeds"))?;
        let get = |name| self.get(&format!("{case}.{name}"));
        Some(Added { text_embeds: get("text_embeds"), time_ids: get("time_ids") })
    }
}

#[track_caller]
fn within(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.size(), b.size(), "{what}");
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let error = (&a - &b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]);
    println!("{what}: relative error {error:.2e} (at most {tolerance:.0e})");
    assert!(error <= tolerance, "{what}: relative error {error:.2e} exceeds {tolerance:.0e}");
}

/// Output and gradient of the text features, of every network and case.
fn equal_diffusers(kind: Kind, value: f64, gradient: f64) {
    for name in UNETS {
        let (net, golden) = (UNet::load(&folder(name), kind, CPU).unwrap(), Golden::open(name));
        for case in ["even", "odd"] {
            let get = |name: &str| golden.get(&format!("{case}.{name}"));
            let states = get("hidden_states").set_requires_grad(true);
            let y = net.forward_added(&get("sample"), &get("timesteps"), &states, golden.added(case).as_ref()).unwrap();
            assert_eq!(y.kind(), kind);
            (y.to_kind(Kind::Float) * get("grad_output")).sum(Kind::Float).backward();
            within(&format!("{name} {case} {kind:?} output"), &y.detach(), &get("output"), value);
            within(&format!("{name} {case} {kind:?} gradient"), &states.grad(), &get("grad.hidden_states"), gradient);
        }
    }
}

#[test]
fn values_and_gradients_equal_diffusers() {
    equal_diffusers(Kind::Float, 1e-5, 1e-4);
}

#[test]
fn in_bfloat16_they_stay_near() {
    // The bounds within which the reference's own bfloat16 stays on these goldens (goldens/diffusion.py).
    equal_diffusers(Kind::BFloat16, 2e-2, 5e-2);
}

#[test]
fn in_float16_they_stay_nearer() {
    equal_diffusers(Kind::Half, 1e-2, 2e-2);
}

#[test]
fn the_loss_of_v_prediction_equals_diffusers() {
    let (net, golden) = (UNet::load(&folder("unet-sd2"), Kind::Float, CPU).unwrap(), Golden::open("unet-sd2"));
    let schedule = Schedule::load(&folder("schedules/v-leading"), CPU).unwrap();
    let get = |name: &str| golden.get(&format!("v.{name}"));
    let (x0, noise, t) = (get("x0"), get("noise"), get("timesteps"));
    let states = get("hidden_states").set_requires_grad(true);
    let predicted = net.forward(&schedule.add_noise(&x0, &noise, &t).unwrap(), &t, &states).unwrap();
    let error = predicted - schedule.target(&x0, &noise, &t).unwrap();
    let loss = error.square().mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float);
    loss.sum(Kind::Float).backward();
    within("v-prediction loss", &loss.detach(), &get("loss"), 1e-5);
    within("v-prediction gradient", &states.grad(), &get("grad.hidden_states"), 1e-4);
}

/// Training a pooled head needs gradients through the added conditions too.
#[test]
fn gradients_reach_the_pooled_text() {
    let (net, golden) = (UNet::load(&folder("unet-sdxl"), Kind::Float, CPU).unwrap(), Golden::open("unet-sdxl"));
    let get = |name: &str| golden.get(&format!("odd.{name}"));
    let text_embeds = get("text_embeds").set_requires_grad(true);
    let added = Added { text_embeds: text_embeds.shallow_clone(), time_ids: get("time_ids") };
    let y = net.forward_added(&get("sample"), &get("timesteps"), &get("hidden_states"), Some(&added)).unwrap();
    y.square().sum(Kind::Float).backward();
    let by_sample = text_embeds.grad().abs().sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    assert!(by_sample.min().double_value(&[]) > 0.0);
}

fn config(value: Value) -> ConfigFile {
    match value {
        Value::Object(fields) => ConfigFile::from_map(Path::new("unet/config.json"), fields),
        other => panic!("not an object: {other}"),
    }
}

/// (tensors, parameters) of the network of a configuration, without making them.
fn size_of(json: &str) -> (usize, usize) {
    let p = Params::shapes();
    UNet::new(&UNetConfig::read(config(serde_json::from_str(json).unwrap())).unwrap(), &p).unwrap();
    (p.taken().len(), p.taken().iter().map(|(_, tensor)| tensor.numel()).sum())
}

#[test]
fn sizes_of_sd2_and_sdxl_are_those_published() {
    // unet/config.json of stabilityai/stable-diffusion-2-1.
    let sd2 = r#"{
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.10.0.dev0", "act_fn": "silu",
        "attention_head_dim": [5, 10, 20, 20], "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false,
        "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "dual_cross_attention": false, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": null,
        "only_cross_attention": false, "out_channels": 4, "sample_size": 96,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "upcast_attention": true, "use_linear_projection": true
    }"#;
    assert_eq!(size_of(sd2), (686, 865_910_724));

    // unet/config.json of stabilityai/stable-diffusion-xl-base-1.0.
    let sdxl = r#"{
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
        "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": false,
        "class_embed_type": null, "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "cross_attention_dim": 2048, "cross_attention_norm": null,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
        "dual_cross_attention": false, "encoder_hid_dim": null, "encoder_hid_dim_type": null, "flip_sin_to_cos": true,
        "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": null,
        "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
        "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
        "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
        "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": null, "time_embedding_act_fn": null,
        "time_embedding_dim": null, "time_embedding_type": "positional", "timestep_post_act": null,
        "transformer_layers_per_block": [1, 2, 10], "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": null, "use_linear_projection": true
    }"#;
    assert_eq!(size_of(sdxl), (1680, 2_567_463_684));
}

#[test]
fn depths_of_transformers_are_read_by_block_and_by_layer() {
    let sdxl = UNetConfig::load(&folder("unet-sdxl")).unwrap();
    assert_eq!(sdxl.down_transformers, [[1], [2], [3]]);
    assert_eq!((sdxl.mid_transformers, sdxl.up_transformers), (3, vec![vec![3, 3], vec![2, 2], vec![1, 1]]));
    let uneven = UNetConfig::load(&folder("unet-uneven")).unwrap();
    assert_eq!(uneven.down_transformers, [[1, 1], [2, 1]]);
    assert_eq!((uneven.mid_transformers, uneven.up_transformers), (2, vec![vec![1, 2, 1], vec![2, 2, 2]]));
}

/// The configuration of a golden network, with a field changed.
fn edited(name: &str, field: &str, value: &Value) -> ConfigFile {
    let mut fields: Value = serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap();
    fields[field] = value.clone();
    config(fields)
}

/// Asserts that a configuration is refused for `field`, and that the message holds the value found.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, field: &str, found: &str) {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, ModelError::Config { field: named, .. } if named == field), "expected {field}: {text}");
    assert!(text.contains(&format!("(found {found})")), "{text}");
}

#[test]
fn configurations_beyond_support_are_refused_by_field_and_value() {
    let reverse = "reverse_transformer_layers_per_block";
    for (name, field, value) in [
        // In-painting, editing by instruction, depth, upscaling.
        ("unet-sd2", "in_channels", json!(9)),
        ("unet-sdxl", "in_channels", json!(9)),
        ("unet-sdxl", "in_channels", json!(8)),
        ("unet-sd2", "in_channels", json!(5)),
        ("unet-sd2", "in_channels", json!(7)),
        // Other kinds of conditions.
        ("unet-sdxl", "addition_embed_type", json!("text")),
        ("unet-sdxl", "addition_embed_type", json!("image")),
        ("unet-sdxl", "addition_embed_type", json!(1)),
        ("unet-sdxl", "addition_time_embed_dim", json!(2)),
        ("unet-sdxl", "addition_time_embed_dim", json!("wide")),
        ("unet-sdxl", "projection_class_embeddings_input_dim", json!(8)),
        ("unet-sdxl", "projection_class_embeddings_input_dim", json!(0)),
        ("unet-sd2", "addition_time_embed_dim", json!(8)),
        ("unet-sd2", "projection_class_embeddings_input_dim", json!(58)),
        ("unet-sd2", "num_class_embeds", json!(1000)),
        ("unet-sd2", "class_embed_type", json!("projection")),
        ("unet-sd2", "class_embeddings_concat", json!(true)),
        ("unet-sd2", "encoder_hid_dim", json!(768)),
        ("unet-sd2", "encoder_hid_dim_type", json!("text_proj")),
        ("unet-sd2", "time_cond_proj_dim", json!(256)),
        // Other kinds of blocks.
        ("unet-sd2", "attention_type", json!("gated")),
        ("unet-sd2", "cross_attention_norm", json!("group_norm")),
        ("unet-sd2", "dual_cross_attention", json!(true)),
        ("unet-sd2", "mid_block_only_cross_attention", json!(true)),
        ("unet-sd2", "num_attention_heads", json!([1, 2, 3])),
        ("unet-sd2", "only_cross_attention", json!([true, true, false])),
        // Depths that do not fit the blocks.
        ("unet-sdxl", "transformer_layers_per_block", json!([1, 2])),
        ("unet-sdxl", "transformer_layers_per_block", json!([1, 2, 0])),
        ("unet-sdxl", "transformer_layers_per_block", json!([1, 2, [3, 3]])),
        ("unet-sdxl", "transformer_layers_per_block", json!("deep")),
        ("unet-sdxl", reverse, json!([1, 2])),
        ("unet-sdxl", reverse, json!(2)),
        ("unet-uneven", reverse, json!([[1, 2], 2])),
        ("unet-uneven", reverse, json!([[1, 2, -1], 2])),
        ("unet-uneven", reverse, json!(null)),
    ] {
        refused(UNetConfig::read(edited(name, field, &value)), field, &value.to_string());
    }
    for field in ["addition_time_embed_dim", "projection_class_embeddings_input_dim"] {
        refused(UNetConfig::read(edited("unet-sdxl", field, &Value::Null)), field, "null");
    }
    let class = json!({"_class_name": "KarrasVeScheduler"});
    refused(ScheduleConfig::read(config(class)), "_class_name", "\"KarrasVeScheduler\"");
}

#[test]
fn added_conditions_missing_surplus_or_misshapen_are_named() {
    let floats = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, CPU));
    let (x, t, h) = (floats(&[2, 4, 8, 8]), Tensor::from_slice(&[0i64, 999]), floats(&[2, 3, 10]));
    let added = |text: &[i64], ids: &[i64]| Some(Added { text_embeds: floats(text), time_ids: floats(ids) });
    let error = |net: &UNet, added: Option<Added>| net.forward_added(&x, &t, &h, added.as_ref()).unwrap_err().to_string();

    let sdxl = UNet::load(&folder("unet-sdxl"), Kind::Float, CPU).unwrap();
    let missing = "text_embeds and time_ids must be given, because the U-Net's addition_embed_type is \"text_time\" (found neither)";
    assert_eq!(error(&sdxl, None), missing);
    assert_eq!(sdxl.forward(&x, &t, &h).unwrap_err().to_string(), missing);
    assert_eq!(error(&sdxl, added(&[2, 9], &[2, 6])), "text_embeds must be [2, 10] beside time_ids [2, 6] (found [2, 9] Float)");
    assert_eq!(error(&sdxl, added(&[1, 10], &[2, 6])), "text_embeds must be [2, 10] beside time_ids [2, 6] (found [1, 10] Float)");
    assert_eq!(error(&sdxl, added(&[2, 10], &[12])), "time_ids must be [2, 6] (found [12] Float)");
    assert_eq!(error(&sdxl, added(&[2, 10], &[1, 6])), "time_ids must be [2, 6] (found [1, 6] Float)");
    assert_eq!(error(&sdxl, added(&[2, 10], &[2, 0])), "time_ids must be [2, 6] (found [2, 0] Float)");
    assert_eq!(error(&sdxl, added(&[2, 10], &[2, 8])), "time_ids must be [2, N] with N at most 7 (found [2, 8] Float)");

    let sd2 = UNet::load(&folder("unet-sd2"), Kind::Float, CPU).unwrap();
    let surplus = "text_embeds and time_ids must be left out, because the U-Net has no addition_embed_type (found both)";
    assert_eq!(error(&sd2, added(&[2, 10], &[2, 6])), surplus);
}

/// Runs `ella forward unet` on these tensors, with gradients; its outputs.
fn run(model: &str, inputs: &[(String, Tensor)], kind: Kind) -> Result<Vec<Tensor>> {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    weights::save(&from, inputs).unwrap();
    forward::forward(Net::Unet, &folder(model), &from, &to, &Options { grad: true, kind, ..Options::default() })?;
    let outputs = Weights::open(&to).unwrap();
    let get = |name: &str| outputs.load(name, outputs.shape(name).unwrap(), Kind::Float, CPU).unwrap();
    Ok(["sample", "grad.hidden_states"].map(get).into())
}

#[test]
fn forward_takes_the_added_conditions() {
    let golden = Golden::open("unet-sdxl");
    let names = ["sample", "timesteps", "hidden_states", "text_embeds", "time_ids", "grad_output"];
    let inputs = || Vec::from(names.map(|name| (name.to_owned(), golden.get(&format!("odd.{name}")))));
    let expected = ["output", "grad.hidden_states"].map(|name| golden.get(&format!("odd.{name}")));
    // Sizes are whole numbers: both ways to write them mean the same, and bfloat16 does not round them.
    let mut whole = inputs();
    whole[4].1 = whole[4].1.to_kind(Kind::Int64);
    for (inputs, kind, bounds) in
        [(inputs(), Kind::Float, [1e-5, 1e-4]), (whole, Kind::Float, [1e-5, 1e-4]), (inputs(), Kind::BFloat16, [2e-2, 5e-2])]
    {
        let outputs = run("unet-sdxl", &inputs, kind).unwrap();
        for (i, what) in ["output", "gradient"].into_iter().enumerate() {
            within(&format!("forward {kind:?} {what}"), &outputs[i], &expected[i], bounds[i]);
        }
    }

    for name in ["text_embeds", "time_ids"] {
        let without: Vec<_> = inputs().into_iter().filter(|(known, _)| known != name).collect();
        let error = run("unet-sdxl", &without, Kind::Float).unwrap_err();
        assert!(matches!(&error, ModelError::MissingTensor { key, .. } if key == name), "{error}");
    }
    let error = run("unet-sd2", &inputs(), Kind::Float).unwrap_err();
    assert!(matches!(&error, ModelError::FileInput { found, .. } if found == "text_embeds"), "{error}");
}
