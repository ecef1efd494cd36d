//! `ella plan`: what a run will store, read and cost, and what it takes of a GPU's memory, before anything is rented.

mod cost;
mod memory;

use std::path::{Path, PathBuf};

use clap::Args;
use cost::{Assumed, Costs, Facts, GPUS, costs};
use ella_dataset::order::BucketOrder;
use ella_dataset::{DataSet, Manifest};
use ella_model::base::Base;
use ella_model::connector::{ConnectorConfig, ConnectorKind};
use ella_model::cost::{connector, t5, total, unet, vae_encoder};
use ella_model::part::Part;
use ella_model::text::TextConfig;
use ella_model::tokenizer::{Padding as Rule, TextTokenizer};
use ella_model::unet::UNetConfig;
use ella_model::vae::VaeConfig;
use ella_proto::config::{Bytes, Dtype, Features, Padding, RunConfig};
use ella_worker::feed::order_config;
use ella_worker::memory::Needs;
use ella_worker::models;
use memory::Memory;
use serde::Serialize;

use crate::ui::{DONE, Fail, Out};

/// Captions whose tokens are counted where rows differ in length.
const COUNTED: usize = 2000;

#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// The run's config; its data set must be prepared, and its models there
    #[arg(value_name = "RUN.toml")]
    config: PathBuf,
    /// Override one key of the config, as in --set train.steps=280000; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The GPU that would be rented: h200, h100, a100, l40s, l4, a10, 4090, v100 or t4 [default: h100, or the one whose --peak is given]
    #[arg(long)]
    gpu: Option<String>,
    /// The GPU's peak in TFLOP/s, for others than these
    #[arg(long, value_name = "TFLOPS")]
    peak: Option<f64>,
    /// The GPU's memory, as in 80GiB, for others than these
    #[arg(long, value_name = "BYTES")]
    gpu_memory: Option<Bytes>,
    /// Share of the peak that is reached (0.35: what the best published trainings of SD reach)
    #[arg(long, default_value_t = 0.35)]
    efficiency: f64,
    /// Price of a GPU-hour
    #[arg(long, default_value_t = 3.0, value_name = "PRICE")]
    gpu_hour: f64,
    /// Price of a GB stored for a month
    #[arg(long, default_value_t = 0.023, value_name = "PRICE")]
    gb_month: f64,
    /// How long features are kept
    #[arg(long, default_value_t = 1.0)]
    months: f64,
}

/// What the figures were made of, what was assumed, and the figures.
#[derive(Debug, Serialize)]
struct Planned {
    facts: Facts,
    assumed: Assumed,
    #[serde(flatten)]
    costs: Costs,
    memory: Memory,
}

impl Plan {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let config = RunConfig::load(&self.config, &self.set)?;
        let assumed = self.assumed()?;
        let runtime = crate::runtime()?;
        let data = runtime.block_on(DataSet::open(&config.data.path))?;
        let text = models::locate("text.model", &config.text.model)?;
        let base = models::locate("base.model", &config.base.model)?;
        let positions = match config.text.padding {
            Padding::Fixed => config.text.max_tokens as f64,
            Padding::None => runtime.block_on(average_tokens(&data, &columns(&config, data.manifest()), &text, config.text.max_tokens))?,
        };
        let room = match (data.store().local_path(), config.data.cache_bytes) {
            (Some(_), _) => None,
            (None, 0) => Some(("data.memory_bytes", config.data.memory_bytes)),
            (None, most) => Some(("data.cache_bytes", most)),
        };
        let facts = Facts { room, ..facts(&config, data.manifest(), (&text, positions), &base)? };
        let costs = costs(&facts, &assumed);
        let memory = Memory::of(&Needs::read(&config, data.manifest())?, self.gpu(), self.gpu_memory);
        let planned = Planned { facts, assumed, costs, memory };
        out.result(&planned, || table(&planned));
        Ok(DONE)
    }

    /// As it is named, or what is said of one that has no name.
    fn gpu(&self) -> &str {
        match (&self.gpu, self.peak) {
            (Some(gpu), _) => gpu,
            (None, Some(_)) => "a GPU of that peak",
            (None, None) => "h100",
        }
    }

    fn assumed(&self) -> Result<Assumed, Fail> {
        let known = GPUS.iter().find(|(name, _)| self.gpu().eq_ignore_ascii_case(name)).map(|(_, peak)| *peak);
        let names = || GPUS.map(|(name, _)| name).join(", ");
        let unknown = || Fail::usage(format_args!("--gpu {}: not known (known are {}); give its --peak in TFLOP/s", self.gpu(), names()));
        let peak = self.peak.or(known).ok_or_else(unknown)?;
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let (some, any) = ("more than 0", "0 or more");
        for (option, value, holds, rule) in [
            ("--peak", peak, positive(peak), some),
            ("--efficiency", self.efficiency, positive(self.efficiency) && self.efficiency <= 1.0, "more than 0, and 1 at most"),
            ("--gpu-hour", self.gpu_hour, self.gpu_hour >= 0.0, any),
            ("--gb-month", self.gb_month, self.gb_month >= 0.0, any),
            ("--months", self.months, self.months >= 0.0, any),
        ] {
            if !(holds && value.is_finite()) {
                return Err(Fail::usage(format_args!("{option} must be a number of {rule} (found {value})")));
            }
        }
        let gpu = self.gpu.as_ref().map_or_else(|| self.gpu().to_owned(), |gpu| gpu.to_lowercase());
        let efficiency = self.efficiency;
        Ok(Assumed { gpu, peak, efficiency, gpu_hour: self.gpu_hour, gb_month: self.gb_month, months: self.months })
    }
}

fn facts(config: &RunConfig, data: &Manifest, (text, positions): (&Path, f64), base: &Path) -> Result<Facts, Fail> {
    let part = Part::open(text)?;
    let parameters = parameters(&part);
    let text = TextConfig::read(part.config)?;
    let base = Base::open(base)?;
    let networks = Networks {
        unet: UNetConfig::read(base.unet_part()?.config)?,
        vae: VaeConfig::read(base.vae_part()?.config)?,
        positions: positions.round() as i64,
    };
    let connector = models::connector_config(config, &networks.unet, text.width())?;
    let train = &config.train;
    let order = BucketOrder::new(order_config(config), &data.order_shards()).map_err(Fail::failed)?;
    let average = |of: &dyn Fn(i64, i64) -> f64| {
        let shard = |size: Option<(u32, u32)>| size.map_or(0.0, |(width, height)| of(i64::from(height), i64::from(width)));
        data.shards.iter().map(|each| shard(each.size) * each.rows as f64).sum::<f64>() / data.samples.max(1) as f64
    };
    Ok(Facts {
        samples: data.samples,
        pixels: average(&|height, width| (height * width) as f64),
        shard_bytes: data.bytes,
        shards: data.shards.len() as u64,
        has_latents: data.latents.is_some(),
        columns: columns(config, data).len() as u64,
        caption_flop: caption_flop(&text, parameters, positions),
        text_width: text.width().unsigned_abs(),
        positions,
        number: if config.text.dtype == Dtype::Fp32 { 4 } else { 2 },
        vae_flop: average(&|height, width| total(&vae_encoder(&networks.vae, (height, width))).flops()),
        step_flop: average(&|height, width| networks.step_flop(&connector, (height, width))),
        steps: train.steps,
        steps_per_epoch: order.steps_per_epoch(),
        global_batch: train.global_batch as u64,
        lanes: train.lanes() as u64,
        workers: config.workers.count as u64,
        window: config.data.window as u64,
        features_cached: config.text.features != Features::Inline,
        room: None,
    })
}

/// What a step goes through.
struct Networks {
    unet: UNetConfig,
    vae: VaeConfig,
    /// Of a caption.
    positions: i64,
}

impl Networks {
    /// FLOP of a sample's step on a picture of (height, width).
    fn step_flop(&self, sizes: &ConnectorConfig, (height, width): (i64, i64)) -> f64 {
        let (down, positions) = (self.vae.downscale(), self.positions);
        let states = if sizes.kind == ConnectorKind::Mlp { positions } else { sizes.latents };
        let operations = unet(&self.unet, (height / down, width / down), states);
        total(&operations).flops() + total(&connector(sizes, positions)).flops()
    }
}

/// FLOP of a caption in a text encoder of so many parameters: T5's to the last one, of others without what attention does.
fn caption_flop(text: &TextConfig, parameters: u64, positions: f64) -> f64 {
    match text {
        TextConfig::T5(config) => total(&t5(config, positions.round() as i64)).flops(),
        _ => {
            let embedding = text.width().unsigned_abs() * text.vocab_size().unsigned_abs();
            2.0 * parameters.saturating_sub(embedding) as f64 * positions
        }
    }
}

fn parameters(part: &Part) -> u64 {
    part.weights.listing().map(|tensor| tensor.shape.iter().product::<i64>().unsigned_abs()).sum()
}

/// Tokens of an average caption of the columns that are trained on, counted on the first ones of each.
async fn average_tokens(data: &DataSet, columns: &[&str], text: &Path, most: usize) -> Result<f64, Fail> {
    let tokenizer = TextTokenizer::load(text, &TextConfig::load(text)?)?;
    let mut lengths = Vec::new();
    for column in columns {
        let mut counted = 0;
        for shard in 0..data.manifest().shards.len() {
            let captions = data.captions(column, shard).await?;
            let captions: Vec<String> = captions.into_iter().filter(|caption| !caption.is_empty()).take(COUNTED).collect();
            counted += captions.len();
            lengths.extend(tokenizer.encode(&captions, most, Rule::None)?.lengths);
            if counted >= COUNTED {
                break;
            }
        }
    }
    Ok(lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64)
}

/// The columns of captions that a run is trained on.
fn columns<'a>(config: &'a RunConfig, data: &'a Manifest) -> Vec<&'a str> {
    match config.data.captions.as_slice() {
        [] => data.captions.iter().map(|column| column.name.as_str()).collect(),
        named => named.iter().map(|choice| choice.column.as_str()).collect(),
    }
}

fn table(planned: &Planned) -> String {
    let Costs { figures, cheaper, why } = &planned.costs;
    let width = figures.iter().map(|figure| figure.name.len()).max().unwrap_or(0);
    let shown = figures.iter().map(|figure| figure.shown().len()).max().unwrap_or(0);
    let mut text = String::new();
    for figure in figures {
        text += &format!("{:width$}  {:>shown$}  = {}\n", figure.name, figure.shown(), figure.formula);
    }
    let what = if *cheaper == "cache" {
        "caching features (text.features = \"cached\" or \"ahead\")"
    } else {
        "recomputing them (text.features = \"inline\")"
    };
    text + &format!("cheaper: {what}: {why}\n") + &planned.memory.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        plan: Plan,
    }

    #[test]
    fn a_gpu_of_another_peak_is_not_named_for_one_that_it_is_none_of() {
        let of = |options: &[&str]| Typed::parse_from([&["ella", "run.toml"][..], options].concat()).plan.assumed().unwrap();
        assert_eq!([of(&[]).gpu, of(&["--gpu", "L4"]).gpu, of(&["--gpu", "x1", "--peak", "9"]).gpu], ["h100", "l4", "x1"]);
        let other = of(&["--peak", "100"]);
        assert_eq!((other.gpu.as_str(), other.peak), ("a GPU of that peak", 100.0));
    }
}
