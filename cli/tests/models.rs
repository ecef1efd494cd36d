//! forward and sample, as black boxes.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::path::Path;

use common::{ella, untrained, world};
use ella_model::connector::ConnectorKind;
use ella_model::weights::{self, Weights};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// An untrained connector that fits the nano models.
fn connector(here: &Path) {
    untrained(&here.join("connector.safetensors"), ConnectorKind::Tsc, 64);
}

fn noise(here: &Path, name: &str, shape: &[i64]) {
    let len: i64 = shape.iter().product();
    let numbers = Tensor::arange(len, (Kind::Float, Device::Cpu)).sin().reshape(shape);
    weights::save(&here.join(name), &[("latents".to_owned(), numbers)]).unwrap();
}

#[test]
fn forward_runs_a_network_on_a_files_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    connector(here);
    let inputs = [
        ("text_features".to_owned(), Tensor::ones([2, 5, 64], (Kind::Float, Device::Cpu))),
        ("timesteps".to_owned(), Tensor::from_slice(&[0i64, 999])),
        ("grad_output".to_owned(), Tensor::ones([2, 4, 64], (Kind::Float, Device::Cpu))),
    ];
    weights::save(&here.join("in.safetensors"), &inputs).unwrap();
    weights::save(&here.join("plain.safetensors"), &inputs[..2]).unwrap();
    let arguments =
        ["forward", "connector", "--model", "connector.safetensors", "--heads", "4", "--outputs", "out.safetensors", "--inputs"];
    let made = ella(here, &[&arguments[..], &["plain.safetensors", "--json"]].concat()).ok().json();
    assert_eq!(made, json!({ "net": "connector", "outputs": "out.safetensors" }));
    assert_eq!(Weights::open(&here.join("out.safetensors")).unwrap().shape("hidden_states").unwrap(), [2, 4, 64]);
    ella(here, &[&arguments[..], &["in.safetensors", "--grad"]].concat()).ok();
    let names: Vec<String> = Weights::open(&here.join("out.safetensors")).unwrap().names().map(str::to_owned).collect();
    assert!(names.contains(&"grad.text_features".to_owned()) && names.contains(&"grad.connector.latents".to_owned()));

    for (kind, states) in [(ConnectorKind::TscZero, 4), (ConnectorKind::Resampler, 4), (ConnectorKind::Mlp, 5)] {
        untrained(&here.join("connector.safetensors"), kind, 64);
        ella(here, &[&arguments[..], &["plain.safetensors"]].concat()).ok();
        assert_eq!(Weights::open(&here.join("out.safetensors")).unwrap().shape("hidden_states").unwrap(), [2, states, 64], "{kind:?}");
    }
    connector(here);

    ella(here, &[&arguments[..], &["in.safetensors", "--json"]].concat()).fails(4, &["in.safetensors", "grad_output"]);
    ella(here, &[&arguments[..], &["none.safetensors"]].concat()).fails(4, &["none.safetensors", "not found"]);
    ella(here, &["forward", "unit", "--model", "m", "--inputs", "i", "--outputs", "o", "--json"]).fails(2, &["unit", "unet"]);
    std::fs::write(here.join("cut.safetensors"), &std::fs::read(here.join("in.safetensors")).unwrap()[..600]).unwrap();
    ella(here, &[&arguments[..], &["cut.safetensors"]].concat()).fails(4, &["cut.safetensors", "cut short"]);
}

/// A LoRA of one layer, and of one layer of a text encoder.
fn lora(here: &Path) {
    let ones = |shape: [i64; 2]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let layers = [("lora_unet_time_embedding_linear_1", [128, 32]), ("lora_te_text_model_encoder_layers_0_mlp_fc1", [2, 2])];
    let both = layers.map(|(layer, [out, input])| {
        [(format!("{layer}.lora_down.weight"), ones([1, input])), (format!("{layer}.lora_up.weight"), ones([out, 1]))]
    });
    weights::save(&here.join("style.safetensors"), &both.into_iter().flatten().collect::<Vec<_>>()).unwrap();
}

#[test]
fn a_lora_changes_what_is_drawn_and_says_what_it_leaves_out() {
    let dir = world();
    let here = dir.path();
    connector(here);
    lora(here);
    let models = ["sample", "--connector", "connector.safetensors", "--base", "models/base", "--text", "models/text", "--heads", "4"];
    let rest = ["--steps", "2", "--max-tokens", "16", "--prompt", "a red circle"];
    let run = |more: &[&str]| ella(here, &[&models[..], &rest[..], more].concat());
    let picture = |name: &str| image::open(here.join(name)).unwrap().into_rgb8();
    run(&["--out", "plain.png"]).ok();
    let told = run(&["--out", "nothing.png", "--lora", "style.safetensors:0"]).ok().stderr;
    assert!(told.contains("style.safetensors: 2 tensors for the text encoder are not used"), "{told}");
    assert_eq!(picture("nothing.png"), picture("plain.png"));
    run(&["--out", "style.png", "--lora", "style.safetensors:0.8"]).ok();
    assert_ne!(picture("style.png"), picture("plain.png"));
    run(&["--out", "velocity.png", "--prediction", "v_prediction"]).ok();
    assert_ne!(picture("velocity.png"), picture("plain.png"));
    run(&["--prediction", "noise"]).fails(2, &["--prediction", "epsilon"]);
    run(&["--lora", "none.safetensors:0.8", "--json"]).fails(4, &["none.safetensors", "not found"]);
    run(&["--lora", "style.safetensors:inf", "--json"]).fails(2, &["--lora", "finite"]);
    weights::save(&here.join("other.safetensors"), &[("lora_unet_x.alpha".to_owned(), Tensor::from(1.0))]).unwrap();
    run(&["--lora", "other.safetensors", "--json"]).fails(4, &["other.safetensors", "lora_unet_x", "missing"]);

    let forward = ["forward", "text", "--model", "models/text", "--inputs", "style.safetensors", "--outputs", "out.safetensors"];
    ella(here, &[&forward[..], &["--lora", "style.safetensors", "--json"]].concat()).fails(2, &["--lora", "not supported"]);
}

#[test]
fn a_prompts_picture_does_not_depend_on_its_neighbours_but_on_sampler_kind_and_noise() {
    let dir = world();
    let here = dir.path();
    connector(here);
    let models = ["sample", "--connector", "connector.safetensors", "--base", "models/base", "--text", "models/text"];
    let rest = ["--heads", "4", "--steps", "2", "--max-tokens", "16", "--seed", "5"];
    let run = |more: &[&str]| ella(here, &[&models[..], &rest[..], more].concat());
    let read = |name: &str| image::open(here.join(name)).unwrap().into_rgb8();

    let made =
        run(&["--prompt", "a red circle", "--prompt", "a blue square", "--prompt", "a star", "--out", "three.png", "--json"]).ok().json();
    assert_eq!((&made["width"], &made["files"]), (&json!(64), &json!(["three.png"])));
    let grid = read("three.png");
    assert_eq!((grid.width(), grid.height()), (64 * 2 + 2, 64 * 2 + 2));
    run(&["--prompt", "a red circle", "--out", "one.png"]).ok();
    let one = read("one.png");
    assert!(one.enumerate_pixels().all(|(x, y, pixel)| grid.get_pixel(x, y).0.iter().zip(pixel.0).all(|(a, b)| a.abs_diff(b) <= 1)));
    run(&["--prompt", "a red circle", "--negative", "blue", "--guidance", "3", "--padding", "none", "--out-dir", "each"]).ok();
    assert_ne!(read("each/0000.png"), one);

    noise(here, "noise.safetensors", &[2, 4, 8, 16]);
    std::fs::write(here.join("prompts.txt"), "a red circle\n\na blue square\n").unwrap();
    let given = run(&["--prompts", "prompts.txt", "--latents", "noise.safetensors", "--out-dir", "wide", "--json"]).ok().json();
    assert_eq!((&given["width"], &given["height"], &given["files"][1]), (&json!(128), &json!(64), &json!("wide/0001.png")));

    for kind in [ConnectorKind::TscZero, ConnectorKind::Resampler, ConnectorKind::Mlp] {
        untrained(&here.join("connector.safetensors"), kind, 64);
        run(&["--prompt", "a red circle", "--out", "kind.png"]).ok();
        assert_ne!(read("kind.png"), one, "{kind:?}");
    }
    run(&["--prompt", "x", "--padding", "none", "--json"]).fails(2, &["mlp", "fixed"]);
    connector(here);

    let sampler = |name: &str, more: &[&str]| {
        let made = run(&[&["--prompt", "a red circle", "--sampler", name, "--out", "by.png", "--json"][..], more].concat());
        assert_eq!(made.ok().json()["sampler"], name);
        read("by.png")
    };
    let names = ["ddim", "euler", "euler-a", "dpm++2m", "dpm++2m-karras"];
    let drawn = names.map(|name| sampler(name, &[]));
    assert!((0..5).all(|i| (0..i).all(|j| drawn[i] != drawn[j])), "two samplers draw the same");
    // What a step adds belongs to the picture, not to its place among those drawn at once.
    let pair = sampler("euler-a", &["--prompt", "a star"]);
    assert!(drawn[2].enumerate_pixels().all(|(x, y, pixel)| pair.get_pixel(x, y).0.iter().zip(pixel.0).all(|(a, b)| a.abs_diff(b) <= 1)));
    noise(here, "single.safetensors", &[1, 4, 8, 8]);
    let seed = |name: &str| {
        run(&["--prompt", "x", "--sampler", name, "--latents", "single.safetensors", "--out", "by.png", "--json"]).ok().json()["pictures"]
            [0]["seed"]
            .clone()
    };
    assert_eq!((seed("euler"), seed("euler-a")), (json!(null), json!(5)));

    run(&["--prompt", "x", "--sampler", "heun", "--json"]).fails(2, &["--sampler", "heun", "dpm++2m-karras"]);
    let none = ["--heads", "4", "--prompt", "x", "--steps", "0", "--json"];
    ella(here, &[&models[..], &none[..]].concat()).fails(2, &["--steps", "from 1 to the timesteps"]);
    let many = ["--heads", "4", "--prompt", "x", "--sampler", "dpm++2m", "--steps", "1000", "--json"];
    ella(here, &[&models[..], &many[..]].concat()).fails(2, &["steps must be 1 to 999", "1000"]);
    run(&["--json"]).fails(2, &["--prompt"]);
    run(&["--prompt", "x", "--size", "60", "--json"]).fails(2, &["--size", "multiples of the VAE's 8", "60"]);
    run(&["--prompt", "x", "--seed", "-1"]).fails(2, &["--seed"]);
    run(&["--prompt", "x", "--out", "g.jpg"]).fails(2, &["--out g.jpg", ".png"]);
    run(&["--prompt", "x", "--guidance", "1e30", "--out", "huge.png"]).fails(4, &["not finite", "guidance"]);
    assert!(!here.join("huge.png").exists() && !here.join("g.jpg").exists());
    run(&["--prompt", "x", "--latents", "noise.safetensors", "--json"]).fails(4, &["noise.safetensors", "[1, 4, h, w]"]);
    run(&["--prompt", "x", "--out", "no/such/grid.png"]).fails(4, &["no/such/grid.png"]);
    let other = ["--heads", "4", "--prompt", "x", "--base", "models/base", "--text", "models/text", "--json"];
    ella(here, &[&["sample", "--connector", "models/text/model.safetensors"], &other[..]].concat())
        .fails(4, &["model.safetensors", "holds no connector", "connector.latents"]);
    untrained(&here.join("wide.safetensors"), ConnectorKind::Tsc, 32);
    ella(here, &[&["sample", "--connector", "wide.safetensors"], &other[..]].concat()).fails(4, &["wide.safetensors", "width is 32", "64"]);
}

#[test]
fn inspect_says_what_a_model_is_and_why_it_cannot_be_used() {
    let dir = world();
    let here = dir.path();
    connector(here);
    let look = |model: &str| ella(here, &["inspect", model, "--json"]);

    let base = look("models/base").ok().json();
    assert_eq!((&base["usable"], &base["prediction_type"]), (&json!(true), &json!("epsilon")));
    let names: Vec<_> = base["networks"].as_array().unwrap().iter().map(|network| network["name"].clone()).collect();
    assert_eq!((names, &base["missing"]), (vec![json!("unet"), json!("vae"), json!("text_encoder")], &json!([])));
    assert_eq!(base["networks"][0]["cross_attention_dim"], 64);
    let unet = Weights::open(&here.join("models/base/unet")).unwrap();
    let parameters: i64 = unet.listing().map(|tensor| tensor.shape.iter().product::<i64>()).sum();
    assert_eq!(base["networks"][0]["parameters"], parameters);
    assert_eq!(base["networks"][0]["dtypes"], json!({ "F32": 4 * parameters }));

    let text = look("models/text").ok().json();
    let what = text["what"].as_str().unwrap();
    assert!(what.contains("t5 text encoder of width 64, vocabulary of ") && what.contains("reads any length"), "{text}");
    let clip = base["networks"][2]["what"].as_str().unwrap();
    assert!(clip.contains("vocabulary of ") && clip.contains("reads at most "), "{clip}");
    untrained(&here.join("mlp.safetensors"), ConnectorKind::Mlp, 64);
    let mlp = look("mlp.safetensors").ok().json();
    assert_eq!(mlp["networks"][0]["what"], "connector", "it has neither layers nor latents");
    let trained = look("connector.safetensors").ok().json();
    assert!(trained["what"].as_str().unwrap().contains("ELLA connector, tsc: text width 64 to width 64"), "{trained}");
    let plain = ella(here, &["inspect", "models/base/vae"]).ok();
    assert!(plain.stdout.contains("VAE of 4 latent channels") && plain.stdout.ends_with("ella can use it\n"), "{plain:?}");

    let layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k";
    let factor = |name: &str, shape: [i64; 2]| (format!("{layer}.{name}.weight"), Tensor::ones(shape, (Kind::Float, Device::Cpu)));
    weights::save(&here.join("lora.safetensors"), &[factor("lora_down", [4, 768])]).unwrap();
    assert!(look("lora.safetensors").json()["problems"][0].as_str().unwrap().contains("up factor is missing"));
    weights::save(&here.join("lora.safetensors"), &[factor("lora_down", [4, 768]), factor("lora_up", [320, 4])]).unwrap();
    assert_eq!(look("lora.safetensors").ok().json()["what"], "a LoRA of rank 4 for SD 1.x");

    // What is wrong is read with the encoder and with its tokenizer, and is one problem.
    std::fs::create_dir(here.join("other")).unwrap();
    std::fs::write(here.join("other/config.json"), "{}").unwrap();
    std::fs::copy(here.join("models/text/model.safetensors"), here.join("other/model.safetensors")).unwrap();
    assert_eq!(look("other").json()["problems"].as_array().unwrap().len(), 1);
    std::fs::remove_file(here.join("models/base/scheduler/scheduler_config.json")).unwrap();
    std::fs::create_dir(here.join("models/base/safety_checker")).unwrap();
    std::fs::remove_dir_all(here.join("models/base/text_encoder")).unwrap();
    let broken = look("models/base");
    let report = broken.json();
    assert_eq!((broken.code, &report["usable"], &report["unused"]), (1, &json!(false), &json!(["safety_checker/"])));
    assert!(report["problems"][0].as_str().unwrap().contains("scheduler_config.json"), "{report}");
    assert!(report["missing"][0].as_str().unwrap().contains("text encoder"), "{report}");
    std::fs::write(here.join("model.ckpt"), "x").unwrap();
    let pickle = look("model.ckpt");
    assert!(pickle.code == 1 && pickle.json()["problems"][0].as_str().unwrap().contains("pickle"));
    look("nothing").fails(4, &["nothing", "not found"]);
}
