//! Model folders that lack something, hold something else, or were cut: the file, and the tensor or field, are named.

use super::{CONNECTOR, PERMANENT, cut, ella_refused, shared};
use anyhow::{Context as _, Result};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::path::Path;

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";

/// A tensor of the text encoder.
const LAST_NORM: &str = "encoder.final_layer_norm.weight";

/// Rewrites a safetensors file: `change` gives each tensor its new shape, or none to leave it out.
fn rewrite(path: &Path, change: impl Fn(&str, &[usize]) -> Option<Vec<usize>>) -> Result<()> {
    let bytes = std::fs::read(path)?;
    let mut kept = Vec::new();
    for (name, tensor) in SafeTensors::deserialize(&bytes)?.tensors() {
        if let Some(shape) = change(&name, tensor.shape()) {
            let len = shape.iter().product::<usize>() * tensor.dtype().bitsize() / 8;
            kept.push((name, TensorView::new(tensor.dtype(), shape, &tensor.data()[..len])?));
        }
    }
    Ok(std::fs::write(path, safetensors::serialize(kept, None)?)?)
}

fn drop_tensor(path: &Path, lost: &str) -> Result<()> {
    rewrite(path, |name, shape| (name != lost).then(|| shape.to_vec()))
}

/// Halves a tensor's first dimension.
fn shrink_tensor(path: &Path, small: &str) -> Result<()> {
    let half = |shape: &[usize]| std::iter::once(shape[0] / 2).chain(shape[1..].iter().copied()).collect();
    rewrite(path, |name, shape| Some(if name == small { half(shape) } else { shape.to_vec() }))
}

/// Sets a field of a JSON file.
fn set_field(path: &Path, field: &str, value: serde_json::Value) -> Result<()> {
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(path)?)?;
    *json.get_mut(field).with_context(|| format!("{} has no {field}", path.display()))? = value;
    Ok(std::fs::write(path, json.to_string())?)
}

/// Trains with a copy of the base model to which one thing was done.
#[track_caller]
fn base_refused(name: &str, damage: impl FnOnce(&Path) -> Result<()>, words: &[&str]) -> Result<()> {
    let shared = shared()?;
    let base = shared.copy("models/base", &format!("base-{name}"))?;
    damage(&base)?;
    shared.train_refused(&format!("through-{name}"), &[&format!("base.model={}", base.display())], PERMANENT, words)
}

/// Embeds with a copy of the text model to which one thing was done.
#[track_caller]
fn text_refused(name: &str, damage: impl FnOnce(&Path) -> Result<()>, words: &[&str]) -> Result<()> {
    let shared = shared()?;
    let text = shared.copy("models/text", &format!("text-{name}"))?;
    damage(&text)?;
    ella_refused(&["embed", &shared.path("data"), "--text", &text.display().to_string()], PERMANENT, words)
}

#[test]
fn training_names_what_a_base_model_lacks() -> Result<()> {
    base_refused("lacks", |base| drop_tensor(&base.join(UNET), "conv_in.weight"), &["base-lacks/unet", "conv_in.weight", "missing"])?;
    let shrink = |base: &Path| shrink_tensor(&base.join(VAE), "encoder.conv_in.bias");
    base_refused("shrunk", shrink, &["base-shrunk/vae", "encoder.conv_in.bias", "wrong shape", "expected [", "found ["])?;
    base_refused("cut", |base| cut(&base.join(UNET)), &["base-cut/unet/diffusion_pytorch_model.safetensors", "cut short"])?;
    let lose = |base: &Path| Ok(std::fs::remove_dir_all(base.join("scheduler"))?);
    base_refused("no-scheduler", lose, &["base-no-scheduler/scheduler/scheduler_config.json", "not found"])
}

#[test]
fn training_names_a_model_that_is_not_there() -> Result<()> {
    let shared = shared()?;
    let nowhere = format!("base.model={}", shared.path("no-such-base"));
    shared.train_refused("through-nothing", &[&nowhere], PERMANENT, &["no-such-base", "not found", "base.model"])?;
    let hub = "text.model=org/no-such-model/x";
    shared.train_refused("through-a-hub", &[hub], PERMANENT, &["org/no-such-model/x", "text.model", "hub id"])?;
    let swapped = format!("base.model={}", shared.path("models/text"));
    shared.train_refused("text-as-base", &[&swapped], PERMANENT, &["models/text/unet/config.json", "not found"])
}

#[test]
fn a_text_model_that_is_not_whole_is_named() -> Result<()> {
    let config = |text: &Path| text.join("config.json");
    let weights = |text: &Path| text.join("model.safetensors");
    let lose = |text: &Path| Ok(std::fs::remove_file(text.join("tokenizer.json"))?);
    text_refused("no-tokenizer", lose, &["text-no-tokenizer", "tokenizer.json", "not found"])?;
    let garbage = |text: &Path| Ok(std::fs::write(text.join("tokenizer.json"), "{}")?);
    text_refused("bad-tokenizer", garbage, &["text-bad-tokenizer/tokenizer.json", "not a tokenizer"])?;
    let garbage = |text: &Path| Ok(std::fs::write(config(text), "{\"d_model\": ")?);
    text_refused("garbage", garbage, &["text-garbage/config.json", "not JSON"])?;
    let unknown = |text: &Path| set_field(&config(text), "feed_forward_proj", "swish-9".into());
    text_refused("unknown", unknown, &["text-unknown/config.json", "feed_forward_proj", "swish-9", "relu"])?;
    text_refused("zero", |text| set_field(&config(text), "num_heads", 0.into()), &["text-zero/config.json", "num_heads", "at least 1"])?;
    let kind = |text: &Path| set_field(&config(text), "model_type", "bert".into());
    text_refused("bert", kind, &["text-bert/config.json", "model_type", "bert"])?;
    text_refused("lacks", |text| drop_tensor(&weights(text), LAST_NORM), &["text-lacks", LAST_NORM, "missing"])?;
    let shrink = |text: &Path| shrink_tensor(&weights(text), LAST_NORM);
    text_refused("shrunk", shrink, &["text-shrunk/model.safetensors", LAST_NORM, "wrong shape"])?;
    text_refused("cut", |text| cut(&weights(text)), &["text-cut/model.safetensors", "cut short"])?;
    text_refused("empty", |text| Ok(std::fs::write(weights(text), "")?), &["text-empty/model.safetensors", "found 0 bytes"])?;
    let garbage = |text: &Path| Ok(std::fs::write(weights(text), [0xff; 100])?);
    text_refused("no-safetensors", garbage, &["text-no-safetensors/model.safetensors", "not a safetensors file"])
}

#[test]
fn settings_that_a_base_model_does_not_bear_are_named() -> Result<()> {
    let shared = shared()?;
    shared.train_refused("heads", &["connector.heads=7"], PERMANENT, &["heads", "divisor of the width 64", "found 7"])?;
    shared.train_refused("width", &["connector.width=32"], PERMANENT, &["connector.width", "cross_attention_dim, 64", "found 32"])
}

#[test]
fn a_connector_that_training_cannot_begin_from_is_named() -> Result<()> {
    let shared = shared()?;
    let from = |name: &str, file: &str, further: &[&str], words: &[&str]| {
        let file = format!("connector.from={file}");
        shared.train_refused(name, &[&[file.as_str()], further].concat(), PERMANENT, words)
    };
    let connector = shared.path(CONNECTOR);
    from("begin-nowhere", &shared.path("no-such.safetensors"), &[], &["no-such.safetensors", "not found", "connector.from"])?;
    from("begin-folder", &shared.path("models/base"), &[], &["models/base", "not a folder", "connector.from"])?;
    from("begin-base", &shared.path(&format!("models/base/{UNET}")), &[], &["unet", "connector"])?;
    from(
        "other-kind",
        &connector,
        &["connector.kind=\"resampler\""],
        &["connector.safetensors", "connector.kind", "resampler", "found tsc"],
    )?;
    from(
        "other-layers",
        &connector,
        &["connector.layers=5"],
        &["connector.safetensors", "connector layers of connector.from", "must be 5", "found 1"],
    )?;
    from(
        "other-latents",
        &connector,
        &["connector.latents=3"],
        &["connector.safetensors", "connector latents of connector.from", "must be 3", "found 8"],
    )
}

#[test]
fn a_base_models_settings_are_checked_before_its_weights() -> Result<()> {
    let shared = shared()?;
    let sample = |name: &str, file: &str, field: &str, value: serde_json::Value, words: &[&str]| -> Result<()> {
        let base = shared.copy("models/base", &format!("base-{name}"))?;
        set_field(&base.join(file), field, value)?;
        let (base, connector) = (base.display().to_string(), shared.path(CONNECTOR));
        let text = shared.path("models/text");
        ella_refused(&["sample", "--connector", &connector, "--base", &base, "--text", &text, "--prompt", "a box"], PERMANENT, words)
    };
    sample("act", "unet/config.json", "act_fn", "tanhexp".into(), &["base-act/unet/config.json", "act_fn", "tanhexp", "silu"])?;
    sample("groups", "unet/config.json", "norm_num_groups", 0.into(), &["base-groups/unet/config.json", "norm_num_groups", "at least 1"])?;
    sample("scale", "vae/config.json", "scaling_factor", "x".into(), &["base-scale/vae/config.json", "scaling_factor", "number"])?;
    let words = ["base-betas/scheduler/scheduler_config.json", "beta_schedule", "odd", "scaled_linear"];
    sample("betas", "scheduler/scheduler_config.json", "beta_schedule", "odd".into(), &words)
}
