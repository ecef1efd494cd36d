//! The diffusion side against diffusers: U-Net, VAE, noise schedules and DDIM. `goldens/diffusion.py` made the expected values.
//!
//! The relative error of a tensor is max|a − b| / max|b|.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Golden, folder, relative};
use ella_model::config::ConfigFile;
use ella_model::params::Params;
use ella_model::sampler::{Ddim, Sampler};
use ella_model::schedule::{Prediction, Schedule, ScheduleConfig, Spacing};
use ella_model::unet::{UNet, UNetConfig};
use ella_model::vae::{Vae, VaeConfig};
use ella_model::weights::{self, Weights};
use ella_model::{ModelError, Result};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const UNETS: [&str; 2] = ["unet-sd15", "unet-linear"];
const SCHEDULES: [&str; 5] = ["sd15", "v-trailing", "v-leading", "linear-linspace", "cosine-trailing"];
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

#[track_caller]
fn within(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let error = relative(a, b);
    println!("{what}: relative error {error:.2e} (at most {tolerance:.0e})");
    assert!(error <= tolerance, "{what}: relative error {error:.2e} exceeds {tolerance:.0e}");
}

/// One case of a U-Net golden: the output, and the gradient of the text features.
fn run_unet(net: &UNet, golden: &Golden, case: &str) -> (Tensor, Tensor) {
    let input = |name: &str| golden.get(&format!("{case}.{name}"));
    let hidden = input("hidden_states").set_requires_grad(true);
    let y = net.forward(&input("sample"), &input("timesteps"), &hidden).unwrap();
    (y.to_kind(Kind::Float) * input("grad_output")).sum(Kind::Float).backward();
    (y.detach(), hidden.grad())
}

#[test]
fn unet_values_and_gradients_equal_diffusers() {
    for name in UNETS {
        let net = UNet::load(&folder(name), Kind::Float, CPU).unwrap();
        let golden = Golden::open(name);
        for case in ["even", "odd"] {
            let (y, grad) = run_unet(&net, &golden, case);
            within(&format!("{name} {case} output"), &y, &golden.get(&format!("{case}.output")), 1e-5);
            within(&format!("{name} {case} gradient"), &grad, &golden.get(&format!("{case}.grad.hidden_states")), 1e-4);
        }
    }
}

#[test]
fn unet_in_16_bits_stays_near() {
    for (name, kind) in UNETS.iter().flat_map(|name| [(name, Kind::BFloat16), (name, Kind::Half)]) {
        let net = UNet::load(&folder(name), kind, CPU).unwrap();
        let golden = Golden::open(name);
        for case in ["even", "odd"] {
            let (y, grad) = run_unet(&net, &golden, case);
            assert_eq!((y.kind(), grad.kind()), (kind, Kind::Float));
            // The bounds within which the reference's own bfloat16 stays on these goldens (goldens/diffusion.py).
            within(&format!("{name} {case} {kind:?} output"), &y, &golden.get(&format!("{case}.output")), 2e-2);
            within(&format!("{name} {case} {kind:?} gradient"), &grad, &golden.get(&format!("{case}.grad.hidden_states")), 5e-2);
        }
    }
}

#[test]
fn unet_parameters_are_frozen() {
    let p = Params::random(1, Kind::Float, CPU);
    let config = UNetConfig::load(&folder("unet-sd15")).unwrap();
    let net = UNet::new(&config, &p).unwrap();
    let golden = Golden::open("unet-sd15");
    let (_, grad) = run_unet(&net, &golden, "odd");
    assert!(grad.abs().max().double_value(&[]) > 0.0);
    assert!(p.taken().iter().all(|(_, tensor)| !tensor.requires_grad()));
}

fn parameters(p: &Params) -> i64 {
    p.taken().iter().map(|(_, tensor)| tensor.numel() as i64).sum()
}

#[test]
fn sizes_of_sd15_are_those_published() {
    // config.json of runwayml/stable-diffusion-v1-5, unet and vae.
    let unet = json!({
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    });
    let p = Params::shapes();
    UNet::new(&UNetConfig::read(config(unet)).unwrap(), &p).unwrap();
    assert_eq!((p.taken().len(), parameters(&p)), (686, 859_520_964));

    let vae = json!({
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
    });
    let p = Params::shapes();
    Vae::new(&VaeConfig::read(config(vae)).unwrap(), &p).unwrap();
    assert_eq!((p.taken().len(), parameters(&p)), (248, 83_653_863));
}

fn check_vae(net: &Vae, tolerance: f64) {
    let golden = Golden::open("vae");
    for case in ["even", "odd"] {
        let tensor = |name: &str| golden.get(&format!("{case}.{name}"));
        let (mean, logvar) = net.encode(&tensor("image")).unwrap();
        within(&format!("vae {case} mean"), &mean, &tensor("mean"), tolerance);
        within(&format!("vae {case} logvar"), &logvar, &tensor("logvar"), tolerance);
        within(&format!("vae {case} decoded"), &net.decode(&tensor("latent")).unwrap(), &tensor("decoded"), tolerance);
    }
}

#[test]
fn vae_equals_diffusers() {
    let net = Vae::load(&folder("vae"), Kind::Float, CPU).unwrap();
    check_vae(&net, 1e-5);
    let latent = Golden::open("vae").get("even.latent");
    within("vae scaling", &net.scale(&latent).unwrap(), &(&latent * 0.18215), 1e-6);
    within("vae unscaling", &net.unscale(&net.scale(&latent).unwrap()).unwrap(), &latent, 1e-6);
}

#[test]
fn vae_in_bfloat16_stays_near() {
    check_vae(&Vae::load(&folder("vae"), Kind::BFloat16, CPU).unwrap(), 2e-2);
}

#[test]
fn vae_reads_the_old_names_of_attention() {
    let dir = copy_of(
        "vae",
        |_| {},
        |tensors| {
            for (name, _) in tensors.iter_mut() {
                for (now, before) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
                    *name = name.replace(&format!("attentions.0.{now}."), &format!("attentions.0.{before}."));
                }
            }
        },
    );
    check_vae(&Vae::load(dir.path(), Kind::Float, CPU).unwrap(), 1e-5);
}

#[test]
fn vae_honours_what_float16_cannot_do() {
    let dir = copy_of("vae", |config| config["force_upcast"] = json!(true), |_| {});
    let image = Golden::open("vae").get("even.image");
    for (asked, computed) in [(Kind::Half, Kind::Float), (Kind::BFloat16, Kind::BFloat16)] {
        let net = Vae::load(dir.path(), asked, CPU).unwrap();
        assert_eq!((net.kind(), net.encode(&image).unwrap().0.kind()), (computed, computed));
    }
}

fn schedule(name: &str) -> (Schedule, Golden) {
    let name = format!("schedules/{name}");
    (Schedule::load(&folder(&name), CPU).unwrap(), Golden::open(&name))
}

#[test]
fn schedules_equal_diffusers() {
    for name in SCHEDULES {
        let (schedule, golden) = schedule(name);
        let tensor = |name: &str| golden.get(name);
        within(&format!("{name} table"), &Tensor::from_slice(schedule.alphas_cumprod()), &tensor("alphas_cumprod"), 1e-6);
        let (x0, noise, t) = (tensor("x0"), tensor("noise"), tensor("t"));
        within(&format!("{name} noisy"), &schedule.add_noise(&x0, &noise, &t).unwrap(), &tensor("noisy"), 1e-6);
        within(&format!("{name} target"), &schedule.target(&x0, &noise, &t).unwrap(), &tensor("target"), 1e-6);
        within(&format!("{name} min-SNR"), &schedule.min_snr_weights(&t, 5.0).unwrap(), &tensor("min_snr"), 1e-5);
        let half = schedule.add_noise(&x0.to_kind(Kind::BFloat16), &noise.to_kind(Kind::BFloat16), &t).unwrap();
        assert_eq!(half.kind(), Kind::BFloat16);
    }
}

#[test]
fn schedules_fall_from_image_to_noise() {
    for name in SCHEDULES {
        let (schedule, _) = schedule(name);
        let table = schedule.alphas_cumprod();
        assert!(table.windows(2).all(|pair| pair[0] > pair[1]), "{name}");
        assert!(table[0] > 0.99 && table[table.len() - 1] < 0.01, "{name}");
        if schedule.config().rescale_betas_zero_snr {
            assert_eq!(table[table.len() - 1], 0.0, "{name}");
        }
    }
}

#[test]
fn ddim_timesteps_equal_diffusers() {
    for name in SCHEDULES {
        let (schedule, golden) = schedule(name);
        for count in (1..=60).chain([100, 250, 333, 500]) {
            let expected: Vec<f32> = Vec::try_from(golden.get(&format!("timesteps.{count}")).to_kind(Kind::Float)).unwrap();
            assert_eq!(Ddim::new(&schedule, count).unwrap().timesteps(), expected, "{name}, {count} steps");
        }
    }
}

#[test]
fn ddim_latents_equal_diffusers_over_twenty_steps() {
    for name in SCHEDULES {
        let (schedule, golden) = schedule(name);
        let expected = golden.get("sequence");
        let mut sampler = Ddim::new(&schedule, 20).unwrap();
        let mut x = expected.get(0);
        for (i, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
            let output = (&x * 0.7 + f64::from(t) / 1000.0).tanh();
            x = sampler.step(&output, i, &x, &mut || panic!("DDIM takes no noise")).unwrap();
            let error = relative(&x, &expected.get(i as i64 + 1));
            assert!(error <= 1e-4, "{name}, step {i}: relative error {error:.2e}");
        }
        within(&format!("{name} last latent"), &x, &expected.get(20), 1e-4);
    }
}

// Bad input: each error names the file, the key or field, what was expected and what was found.

fn config(value: Value) -> ConfigFile {
    match value {
        Value::Object(fields) => ConfigFile::from_map(Path::new("config.json"), fields),
        other => panic!("not an object: {other}"),
    }
}

/// A copy of a golden model's folder with its configuration and tensors edited.
fn copy_of(name: &str, edit: impl Fn(&mut Value), tensors: impl Fn(&mut Vec<(String, Tensor)>)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let source = Golden(Weights::open(&folder(name)).unwrap());
    let mut all: Vec<_> = source.0.names().map(|name| (name.to_owned(), source.get(name))).collect();
    tensors(&mut all);
    weights::save(&dir.path().join(WEIGHTS), &all).unwrap();
    dir
}

fn load_unet(edit: impl Fn(&mut Value), tensors: impl Fn(&mut Vec<(String, Tensor)>)) -> Result<UNet> {
    UNet::load(copy_of("unet-sd15", edit, tensors).path(), Kind::Float, CPU)
}

#[test]
fn tensors_missing_misshapen_or_left_over_are_named() {
    let key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight";
    let error = load_unet(|_| {}, |all| all.retain(|(name, _)| name != key)).unwrap_err();
    assert!(matches!(&error, ModelError::MissingTensor { key: found, .. } if found == key), "{error}");

    let error = load_unet(|config| config["cross_attention_dim"] = json!(11), |_| {}).unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, ModelError::WrongShape { expected, found, .. } if expected[1] == 11 && found[1] == 10), "{error}");
    assert!(text.contains(WEIGHTS) && text.contains("attn2.to_k.weight"), "{text}");

    let error = load_unet(|_| {}, |all| all.push(("class_embedding.weight".into(), Tensor::zeros([1], (Kind::Float, CPU))))).unwrap_err();
    assert!(matches!(&error, ModelError::SurplusTensors { keys, .. } if keys == &["class_embedding.weight"]), "{error}");

    let edit = |all: &mut Vec<(String, Tensor)>| all.retain(|(name, _)| !name.starts_with("decoder.mid_block.attentions.0.to_v"));
    let error = Vae::load(copy_of("vae", |_| {}, edit).path(), Kind::Float, CPU).unwrap_err();
    assert!(matches!(&error, ModelError::MissingTensor { key, .. } if key == "decoder.mid_block.attentions.0.to_v.weight"), "{error}");
}

/// Asserts that a configuration is refused for `field`, and that the message holds the value found.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, field: &str, value: &Value) {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, ModelError::Config { field: found, .. } if found == field), "expected {field}: {text}");
    assert!(text.contains("config.json") && text.contains(&value.to_string()), "{text}");
}

fn edited(name: &str, field: &str, value: &Value) -> ConfigFile {
    let file = if name.starts_with("schedules/") { "scheduler_config.json" } else { "config.json" };
    let mut fields: Value = serde_json::from_slice(&std::fs::read(folder(name).join(file)).unwrap()).unwrap();
    fields[field] = value.clone();
    config(fields)
}

#[test]
fn unet_configurations_beyond_support_are_refused_by_field() {
    for (field, value) in [
        ("_class_name", json!("SD3Transformer2DModel")),
        ("act_fn", json!("mish")),
        ("addition_embed_type", json!("text_image")),
        ("attention_head_dim", json!([2, 2])),
        ("attention_head_dim", json!(3)),
        ("block_out_channels", json!([4, 8, -12])),
        ("block_out_channels", json!([])),
        ("class_embed_type", json!("timestep")),
        ("cross_attention_dim", json!([10, 10, 10])),
        ("down_block_types", json!(["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D"])),
        ("down_block_types", json!(["CrossAttnDownBlock2D", "DownBlock2D"])),
        ("downsample_padding", json!(2)),
        ("encoder_hid_dim", json!(768)),
        ("freq_shift", json!(-1)),
        ("in_channels", json!(0)),
        ("in_channels", json!(9)),
        ("layers_per_block", json!("two")),
        ("mid_block_type", json!("UNetMidBlock2D")),
        ("norm_eps", json!(0)),
        ("norm_num_groups", json!(3)),
        ("only_cross_attention", json!(true)),
        ("resnet_time_scale_shift", json!("scale_shift")),
        ("reverse_transformer_layers_per_block", json!([[1]])),
        ("time_embedding_type", json!("fourier")),
        ("up_block_types", json!(["UpBlock2D"])),
        ("use_linear_projection", json!("yes")),
        ("a_field_of_tomorrow", json!(1)),
    ] {
        refused(UNetConfig::read(edited("unet-sd15", field, &value)), field, &value);
    }
}

#[test]
fn vae_configurations_beyond_support_are_refused_by_field() {
    for (field, value) in [
        ("act_fn", json!("relu")),
        ("block_out_channels", json!([8, 12])),
        ("block_out_channels", json!([])),
        ("down_block_types", json!(["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"])),
        ("latents_mean", json!([0.0])),
        ("norm_num_groups", json!(5)),
        ("scaling_factor", json!(0)),
        ("up_block_types", json!("UpDecoderBlock2D")),
        ("a_field_of_tomorrow", json!(1)),
    ] {
        // A list that is too short shows in the lists that should be as long.
        let (named, found) = match (field, value.as_array().map(Vec::len)) {
            ("block_out_channels", Some(2)) => ("down_block_types", json!(vec!["DownEncoderBlock2D"; 3])),
            _ => (field, value.clone()),
        };
        refused(VaeConfig::read(edited("vae", field, &value)), named, &found);
    }
}

#[test]
fn schedule_configurations_beyond_support_are_refused_by_field() {
    for (field, value) in [
        ("_class_name", json!("FlowMatchEulerDiscreteScheduler")),
        ("beta_end", json!(1.5)),
        ("beta_schedule", json!("sigmoid")),
        ("beta_start", json!(0)),
        ("num_train_timesteps", json!(1)),
        ("final_sigmas_type", json!("half")),
        ("interpolation_type", json!("log_linear")),
        ("prediction_type", json!("flow_prediction")),
        ("rescale_betas_zero_snr", json!(true)),
        ("sigma_max", json!(80)),
        ("steps_offset", json!(-1)),
        ("thresholding", json!(true)),
        ("timestep_spacing", json!("log")),
        ("timestep_type", json!("continuous")),
        ("trained_betas", json!([0.1])),
        ("use_flow_sigmas", json!(true)),
        ("a_field_of_tomorrow", json!(1)),
    ] {
        refused(ScheduleConfig::read(edited("schedules/sd15", field, &value)), field, &value);
    }
}

/// What else diffusers writes of the solvers that community models come with, of which only the noise schedule counts.
#[test]
fn configurations_of_other_solvers_give_their_noise_schedule() {
    let solver = json!({
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "dynamic_thresholding_ratio": 0.995, "lower_order_final": true,
        "num_train_timesteps": 1000, "prediction_type": "v_prediction", "sample_max_value": 1.0, "solver_order": 2, "steps_offset": 1,
        "thresholding": false, "timestep_spacing": "leading", "trained_betas": null, "use_karras_sigmas": true,
    });
    let dir = tempfile::tempdir().unwrap();
    let betas = |class: &str, more: &str| {
        // As Python writes it, which is not always JSON.
        let text = format!("{{\"_class_name\": \"{class}\", {more}, {}", &solver.to_string()[1..]);
        std::fs::write(dir.path().join("scheduler_config.json"), text).unwrap();
        let read = ScheduleConfig::load(dir.path()).unwrap_or_else(|error| panic!("{class}: {error}"));
        (read.beta_start, read.beta_end, read.prediction, read.spacing, read.steps_offset)
    };
    let dpm =
        "\"algorithm_type\": \"dpmsolver++\", \"lambda_min_clipped\": -Infinity, \"solver_type\": \"midpoint\", \"variance_type\": null";
    let unipc = "\"predict_x0\": true, \"disable_corrector\": [], \"solver_p\": null, \"solver_type\": \"bh2\"";
    for (class, more) in [
        ("DPMSolverMultistepScheduler", dpm),
        ("DPMSolverSinglestepScheduler", dpm),
        ("DEISMultistepScheduler", "\"algorithm_type\": \"deis\", \"solver_type\": \"logrho\""),
        ("UniPCMultistepScheduler", unipc),
        ("LMSDiscreteScheduler", "\"use_beta_sigmas\": false"),
    ] {
        assert_eq!(betas(class, more), (0.00085, 0.012, Prediction::Velocity, Some(Spacing::Leading), 1), "{class}");
    }
}

#[test]
fn absent_scheduler_fields_have_the_defaults_of_the_class() {
    let read = |class: &str| ScheduleConfig::read(config(json!({"_class_name": class}))).unwrap();
    assert_eq!((read("DDIMScheduler").clip_sample, read("DDIMScheduler").set_alpha_to_one), (Some(1.0), true));
    assert_eq!((read("PNDMScheduler").clip_sample, read("PNDMScheduler").set_alpha_to_one), (None, false));
    assert_eq!((read("EulerDiscreteScheduler").clip_sample, read("EulerDiscreteScheduler").set_alpha_to_one), (None, true));
    assert_eq!(read("EulerDiscreteScheduler").spacing, None);
}

#[test]
fn inputs_of_wrong_shape_are_named() {
    let net = UNet::load(&folder("unet-sd15"), Kind::Float, CPU).unwrap();
    let floats = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, CPU));
    let (x, t, h) = (floats(&[2, 4, 8, 8]), Tensor::from_slice(&[0i64, 999]), floats(&[2, 3, 10]));
    let what = |x: &Tensor, t: &Tensor, h: &Tensor| match net.forward(x, t, h) {
        Err(ModelError::Input { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what(&floats(&[2, 4, 8]), &t, &h), "sample");
    assert_eq!(what(&x, &Tensor::from_slice(&[0i64]), &h), "timesteps");
    assert_eq!(what(&x, &t.to_kind(Kind::BFloat16), &h), "timesteps");
    assert_eq!(what(&x, &t, &floats(&[2, 3, 11])), "hidden_states");
    assert_eq!(what(&x, &t, &floats(&[1, 3, 10])), "hidden_states");

    let vae = Vae::load(&folder("vae"), Kind::Float, CPU).unwrap();
    assert!(matches!(vae.encode(&floats(&[1, 4, 8, 8])), Err(ModelError::Input { what, .. }) if what == "image"));
    assert!(matches!(vae.decode(&floats(&[1, 3, 8, 8])), Err(ModelError::Input { what, .. }) if what == "latent"));
}

#[test]
fn timesteps_and_steps_out_of_range_are_refused() {
    let (schedule, golden) = schedule("sd15");
    let (x0, noise) = (golden.get("x0"), golden.get("noise"));
    assert!(schedule.add_noise(&x0, &noise, &Tensor::from_slice(&[0i64, 1, 2, 1000])).is_err());
    // One timestep for each sample, and no other number.
    assert!(
        matches!(schedule.add_noise(&x0, &noise, &Tensor::from_slice(&[0i64])), Err(ModelError::Input { what, .. }) if what == "timesteps")
    );
    // 1000 steps with an offset of 1 would ask for timestep 1000.
    for steps in [0, 1001, 1000] {
        assert!(matches!(Ddim::new(&schedule, steps), Err(ModelError::Input { what, .. }) if what == "steps"), "{steps}");
    }
    let mut sampler = Ddim::new(&schedule, 4).unwrap();
    let result = sampler.step(&noise, 4, &x0, &mut || panic!("DDIM takes no noise"));
    assert!(matches!(result, Err(ModelError::Input { what, .. }) if what == "index"));
}
