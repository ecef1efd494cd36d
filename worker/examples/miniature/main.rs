//! Trains the miniature in `mini/` from nothing: a small latent diffusion model that draws well and reads short captions only, a text encoder that reads
//! long ones, and the detector by which pictures of its world are scored.
//!
//! `cargo run --release -p ella-worker --example miniature`. It may be stopped at any time; the same command goes on. Stages follow each other: `vae`,
//! `detector`, `clip`, `unet`, `text`, `lora`. A stage whose folder below `--work` is removed is done anew. Each writes what it learnt to `--out`, and what it saw on the
//! way to `log.jsonl` in its folder; the logs of the weights in the repository are in `mini/record/`.

mod detector;
mod learner;
mod lora;
mod reading;
mod scenes;
mod unet;
mod vae;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use ella_model::presets::{Preset, init_base};
use ella_model::weights;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::learner::Course;

#[derive(Debug, Parser)]
struct Options {
    /// Folder of the trained networks
    #[arg(long, default_value = "mini")]
    out: PathBuf,
    /// Folder of what has been learnt so far
    #[arg(long, default_value = "target/miniature")]
    work: PathBuf,
    /// Stages to run, in this order
    #[arg(long, value_delimiter = ',', default_value = "vae,detector,clip,unet,text,lora")]
    stages: Vec<String>,
    /// Updates of every stage as a share of the usual number
    #[arg(long, default_value_t = 1.0)]
    share: f64,
    /// libtorch's threads [default: all cores]
    #[arg(long)]
    threads: Option<i32>,
}

/// Where things are.
pub(crate) struct Place {
    out: PathBuf,
    work: PathBuf,
    pub(crate) device: Device,
}

impl Place {
    /// In the folder of trained networks.
    pub(crate) fn out(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }

    /// In the folder of what is being learnt.
    pub(crate) fn work(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    /// In the folder of configurations and tokenizers, beside random weights.
    pub(crate) fn shape(&self, name: &str) -> PathBuf {
        self.work.join("shape").join(name)
    }
}

/// Captions that the tokenizers learn from.
const CAPTIONS: u64 = 5000;

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(threads) = options.threads {
        tch::set_num_threads(threads);
    }
    let place = Place { out: options.out, work: options.work, device: Device::cuda_if_available() };
    if !place.shape("text/tokenizer.json").is_file() {
        let captions: Vec<String> = scenes::scenes(scenes::LEARNT, 0..CAPTIONS).iter().map(|scene| scene.dense_caption()).collect();
        init_base(Preset::Mini, 7, &captions, &place.work("shape"))?;
    }
    copy_configurations(&place)?;
    let course = |steps: u64, batch, lr| Course { steps: ((steps as f64 * options.share) as u64).max(1), batch, lr };
    for stage in &options.stages {
        match stage.as_str() {
            "vae" => vae::train(&place, course(3500, 32, 1.5e-3)),
            "detector" => detector::train(&place, course(1500, 64, 2e-3)),
            "clip" => reading::train_clip(&place, course(1200, 256, 1e-3)),
            "unet" => unet::train(&place, course(4000, 128, 1e-3)),
            "lora" => lora::train(&place, course(400, 64, 1e-3)),
            "text" => reading::train_text(&place, course(3000, 128, 1e-3)),
            other => anyhow::bail!("--stages: {other} is none (expected vae, detector, clip, unet, text or lora)"),
        }
        .with_context(|| format!("stage {stage}"))?;
    }
    Ok(())
}

/// What tells programs the networks' shapes, beside the weights to come.
fn copy_configurations(place: &Place) -> Result<()> {
    let files = [
        "base/model_index.json",
        "base/scheduler/scheduler_config.json",
        "base/unet/config.json",
        "base/vae/config.json",
        "base/text_encoder/config.json",
        "base/tokenizer/vocab.json",
        "base/tokenizer/merges.txt",
        "base/tokenizer/tokenizer_config.json",
        "text/config.json",
        "text/tokenizer.json",
        "text/tokenizer_config.json",
    ];
    for file in files.into_iter().filter(|file| !place.out(file).is_file()) {
        write(&place.out(file), &fs::read(place.shape(file))?)?;
    }
    Ok(())
}

/// Writes a network in float16, and changes fields of its configuration.
pub(crate) fn save_network(place: &Place, folder: &str, name: &str, tensors: &[(String, Tensor)], fields: &[(&str, Value)]) -> Result<()> {
    let file = place.out(folder).join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).with_context(|| file.display().to_string())?)?;
    for (field, value) in fields {
        config[*field] = value.clone();
    }
    write_json(&file, &config)?;
    let halves = tensors.iter().map(|(name, tensor)| Ok((name.clone(), tensor.f_to_kind(Kind::Half)?))).collect::<Result<Vec<_>>>()?;
    Ok(weights::save(&place.out(folder).join(format!("{name}.safetensors")), &halves)?)
}

pub(crate) fn write_json(file: &Path, value: &Value) -> Result<()> {
    write(file, format!("{value:#}\n").as_bytes())
}

fn write(file: &Path, bytes: &[u8]) -> Result<()> {
    file.parent().map_or(Ok(()), fs::create_dir_all)?;
    fs::write(file, bytes).with_context(|| file.display().to_string())
}

/// Pictures `[N, 3, S, S]` in −1…1 as one file, eight in a row.
pub(crate) fn sheet(pictures: &Tensor, file: &Path) -> Result<()> {
    let (count, _, height, width) = pictures.size4()?;
    let rows =
        pictures.f_view([count / 8, 8, 3, height, width])?.f_permute([2, 0, 3, 1, 4])?.f_reshape([3, count / 8 * height, 8 * width])?;
    let bytes = rows.f_add_scalar(1.0)?.f_mul_scalar(127.5)?.f_clamp(0.0, 255.0)?.f_to_kind(Kind::Uint8)?;
    Ok(tch::vision::image::save(&bytes.f_to_device(Device::Cpu)?, file)?)
}
