//! What this machine's device makes of ella's own networks and of its step: correctness, images a second, tokens a second, where the time
//! goes. `bench/gpu.sh` runs it part by part and puts the results together; by hand: `bench_gpu train --micro-batch 32`.
//!
//! Each part prints a table, or with `--json` one object on standard output. What cannot be had here is in it as `"skipped": "reason"`, and
//! is no failure. Data and weights are random, never zeros. `--preset nano --device cpu` tries every part in seconds.

mod attention;
mod batches;
mod check;
mod embed;
mod gpu;
mod inline;
mod kernels;
mod networks;
mod profile;
mod timing;
mod train;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use ella_cuda::speed;
use ella_model::params::Compute;
use ella_model::presets::Preset;
use ella_model::t5::T5Config;
use ella_proto::config::{Device as Choice, Reduction};
use ella_worker::device;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tch::{Device, Kind};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Part {
    /// Networks on the device against the processor's and against goldens; the same bits twice; a sum by NCCL
    Check,
    /// The step, with cached latents and features
    Train,
    /// The text encoder
    Embed,
    /// The step with features, and with latents too, made when they are needed
    Inline,
    /// One step by kernel family
    Profile,
    /// Attention by itself, by libtorch and by kernels of our own
    Attention,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sizes {
    /// Stable Diffusion 1.5 at 512², Flan-T5-XL
    Sd15,
    /// To try it on a processor
    Nano,
}

#[derive(Debug, Parser)]
#[command(about = "What this machine's device makes of ella's networks and step")]
struct Arguments {
    part: Part,
    #[arg(long, default_value = "sd15")]
    preset: Sizes,
    /// auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = choice)]
    device: Choice,
    /// Images that pass the networks at once; captions, for embed
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    micro_batch: u32,
    /// About how long each thing is measured, after its warm-up
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    seconds: f64,
    /// How gradients are summed: fast, or exact with deterministic kernels
    #[arg(long, default_value = "fast", value_parser = reduction)]
    reduction: Reduction,
    /// Intra-op threads on a processor
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// The goldens' folder; left out: check has random networks only
    #[arg(long)]
    goldens: Option<PathBuf>,
    /// One object on standard output
    #[arg(long)]
    json: bool,
}

fn choice(name: &str) -> Result<Choice, String> {
    match name {
        "auto" => Ok(Choice::Auto),
        "cpu" => Ok(Choice::Cpu),
        "cuda" => Ok(Choice::Cuda),
        _ => Err("auto, cpu or cuda".to_owned()),
    }
}

fn reduction(name: &str) -> Result<Reduction, String> {
    match name {
        "fast" => Ok(Reduction::Fast),
        "exact" => Ok(Reduction::Exact),
        _ => Err("fast or exact".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|seconds: &f64| (0.01..=3600.0).contains(seconds)).ok_or_else(|| "a number from 0.01 to 3600".to_owned())
}

/// What every part is told.
#[derive(Clone, Copy, Debug)]
struct Setting {
    sizes: Sizes,
    device: Device,
    /// What frozen networks compute in: bf16, as on a GPU; float32 on a processor, whose bf16 is slow.
    kind: Kind,
    reduction: Reduction,
    micro_batch: i64,
    measure: Duration,
}

impl Setting {
    /// For tests, on a processor.
    #[cfg(test)]
    fn nano(measure: Duration) -> Self {
        Self { sizes: Sizes::Nano, device: Device::Cpu, kind: Kind::Float, reduction: Reduction::Fast, micro_batch: 2, measure }
    }

    fn preset(&self) -> Preset {
        match self.sizes {
            Sizes::Sd15 => Preset::Sd15,
            Sizes::Nano => Preset::Nano,
        }
    }

    /// Height and width of latents: those of 512² pictures, or of 64².
    fn latent(&self) -> i64 {
        match self.sizes {
            Sizes::Sd15 => 64,
            Sizes::Nano => 8,
        }
    }

    fn text(&self) -> Result<T5Config> {
        Ok(match self.sizes {
            Sizes::Sd15 => T5Config::flan_t5_xl(),
            Sizes::Nano => Preset::Nano.text()?,
        })
    }
}

/// Positions of a caption.
const TOKENS: i64 = 128;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // SAFETY: no thread has been started yet.
    unsafe { device::set_environment() };
    // What is said of a GPU that does not start, or of lanes that are not recorded.
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let device = device::set_up(arguments.device, arguments.threads)?;
    let _stream = device::own_stream(device)?;
    tch::manual_seed(1);
    let kind = if device.is_cuda() { Kind::BFloat16 } else { Kind::Float };
    let setting = Setting {
        sizes: arguments.preset,
        device,
        kind,
        reduction: arguments.reduction,
        micro_batch: arguments.micro_batch.into(),
        measure: Duration::from_secs_f64(arguments.seconds),
    };
    let mut result = run(arguments.part, &setting, arguments.goldens.as_deref())?;
    describe(&mut result, &setting, arguments.threads);
    match arguments.json {
        true => println!("{}", Value::Object(result)),
        false => print!("{}", table(&result, 0)),
    }
    Ok(())
}

/// A part that runs out of memory is skipped, as one whose means are missing is.
fn run(part: Part, setting: &Setting, goldens: Option<&std::path::Path>) -> Result<Map<String, Value>> {
    let result = match part {
        Part::Check => check::run(setting, goldens),
        Part::Train => train::run(setting),
        Part::Embed => embed::run(setting),
        Part::Inline => inline::run(setting),
        Part::Profile => profile::run(setting),
        Part::Attention => attention::run(setting),
    };
    let value = match result {
        Err(error) if format!("{error:#}").contains("out of memory") => {
            let batch = setting.micro_batch;
            json!({ "skipped": format!("a micro-batch of {batch} does not fit this device's memory"), "micro_batch": batch })
        }
        other => other?,
    };
    Ok(match value {
        Value::Object(fields) => fields,
        other => Map::from_iter([("result".to_owned(), other)]),
    })
}

fn describe(result: &mut Map<String, Value>, setting: &Setting, threads: usize) {
    let fused = std::env::var("ELLA_FUSED").ok();
    let taken = Compute::fastest(setting.kind, setting.device).map(|compute| compute.fused.names()).unwrap_or_default();
    let fields = [
        ("preset", json!(format!("{:?}", setting.sizes).to_lowercase())),
        ("device", json!(device::kind_name(setting.device))),
        ("dtype", json!(networks::kind_name(setting.kind))),
        ("threads", json!(threads)),
        ("ella_fused", json!(fused)),
        ("fused", json!(taken)),
        ("said_of_fused", json!(ella_cuda::said())),
        ("timed", json!(speed::measured(setting.kind).iter().map(ToString::to_string).collect::<Vec<_>>())),
    ];
    result.extend(fields.map(|(name, value)| (name.to_owned(), value)));
}

/// Fields below each other, objects in lists a line each.
fn table(fields: &Map<String, Value>, indent: usize) -> String {
    let mut text = String::new();
    for (name, value) in fields {
        match value {
            Value::Object(inner) => text += &format!("{:indent$}{name}:\n{}", "", table(inner, indent + 2)),
            Value::Array(items) if items.iter().any(Value::is_object) => {
                text += &format!("{:indent$}{name}:\n", "");
                text.extend(items.iter().map(|item| format!("{:indent$}  {item}\n", "")));
            }
            other => text += &format!("{:indent$}{name}: {other}\n", ""),
        }
    }
    text
}
