//! What a worker of a run takes of its GPU's memory, by arithmetic before anything is loaded, and the largest micro-batch that fits.
//!
//! Every part has its formula. What only a GPU can tell is assumed, and says so: the context of CUDA, the workspaces of its libraries, and what the
//! allocator loses between blocks.
//!
//! Lanes are counted as large as the data set's largest, each recorded shape too ([`crate::train::graph`]). What is computed beside recorded lanes in
//! the plain way is not counted: a lane whose shape is not recorded, and held-out samples' forward pass. It would at most be the activations once more,
//! and where there is no room for that, recordings are given up.

use crate::device;
use crate::feed::AHEAD;
use crate::gpu::fault::{Fault, first_line};
use crate::models;
use crate::train::graph;
use ella_cuda::fused::Fused;
use ella_dataset::Manifest;
use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind};
use ella_model::memory::{Figure, Pass, connector_activations, unet_activations, unet_checkpointed, unet_resized, unet_workspace};
use ella_model::params::Compute;
use ella_model::part::Part;
use ella_model::text::TextConfig;
use ella_model::unet::UNetConfig;
use ella_model::vae::VaeConfig;
use ella_proto::config::{ConnectorDtype, Dtype, Features, Padding, Reduction, RunConfig};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use tch::Device;

/// The memory of a process on a GPU before its first tensor: CUDA's context with libtorch's kernels.
const CONTEXT: u64 = 600 << 20;
/// Workspaces: cuBLAS's 32 MiB, as CUBLAS_WORKSPACE_CONFIG says, and cuDNN's.
const LIBRARIES: u64 = (32 + 256) << 20;
/// Share of all tensors that lies idle between blocks.
const IDLE: f64 = 0.05;
/// Most channels of a VAE's widest feature map times its bytes, at every pixel: the encoder's first level, a norm in float32 and what goes in and out.
const VAE_CHANNELS: u64 = 128;

/// Sizes that the arithmetic is over.
#[derive(Clone, Debug)]
pub struct Needs {
    /// The run's config.
    pub config: RunConfig,
    /// The frozen U-Net.
    pub unet: UNetConfig,
    /// Its parameters.
    pub unet_parameters: u64,
    /// What is trained.
    pub connector: ConnectorConfig,
    /// Its parameters.
    pub connector_parameters: u64,
    /// The VAE's parameters.
    pub vae_parameters: u64,
    /// Whether pictures are encoded in the feed: the data set has no latents.
    pub encodes_pictures: bool,
    /// The text encoder's parameters.
    pub text_parameters: u64,
    /// Height and width of the largest latents.
    pub latents: (u64, u64),
    /// Pixels of a latent's side.
    pub downscale: u64,
    /// Which operators are fused.
    pub fused: Fused,
    /// Shapes of lanes that are recorded; 0 if none is to be.
    pub recorded: u64,
}

/// A plan: every part, and their sum.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// For which micro-batch.
    pub micro_batch: u64,
    /// What takes memory.
    pub parts: Vec<Figure>,
    /// All of it.
    pub bytes: u64,
}

/// The micro-batches that fit a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// The GPU's memory in bytes, or what a worker may take of it.
    pub memory: u64,
    /// The largest that fits; none if not even one sample does.
    pub largest: Option<u64>,
    /// The largest of those that divide `train.global_batch` into lanes for all workers.
    pub of_the_batch: Option<u64>,
}

impl Needs {
    /// Reads what a run's models and data set say of themselves. No weights are loaded.
    ///
    /// # Errors
    /// A model that is not there, or is refused.
    pub fn read(config: &RunConfig, data: &Manifest) -> Result<Self, ModelError> {
        let base = Base::open(&models::locate("base.model", &config.base.model)?)?;
        let (unet, vae) = (base.unet_part()?, base.vae_part()?);
        let text = Part::open(&models::locate("text.model", &config.text.model)?)?;
        let [unet_parameters, vae_parameters, text_parameters] = [&unet, &vae, &text].map(parameters);
        let (unet, text) = (UNetConfig::read(unet.config)?, TextConfig::read(text.config)?);
        let connector = models::connector_config(config, &unet, text.width())?;
        let downscale = VaeConfig::read(vae.config)?.downscale().unsigned_abs();
        let sizes = data.shards.iter().filter_map(|shard| shard.size).map(|(width, height)| (u64::from(height), u64::from(width)));
        let (height, width) = sizes.max_by_key(|(height, width)| height * width).unwrap_or_default();
        let mut config = config.clone();
        // No more are held out than there are.
        config.train.eval_samples = config.train.eval_samples.min(usize::try_from(data.samples).unwrap_or(usize::MAX));
        Ok(Self {
            connector_parameters: count(&connector)?,
            unet,
            unet_parameters,
            connector,
            vae_parameters,
            encodes_pictures: data.latents.is_none(),
            text_parameters,
            latents: (height / downscale.max(1), width / downscale.max(1)),
            downscale,
            fused: Compute::fastest(device::kind(config.base.dtype), Device::Cuda(0))?.fused,
            recorded: if graph::is_wanted() { shapes(&config, &data.order_shards()) } else { 0 },
            config,
        })
    }

    /// What a worker takes with lanes of so many samples.
    pub fn plan(&self, micro_batch: u64) -> Plan {
        let mut parts = self.fixed();
        parts.extend(self.of_a_lane(micro_batch));
        parts.push(self.staged(micro_batch));
        parts.extend(self.of_recorded(micro_batch));
        parts.extend(self.of_a_sample());
        let tensors: u64 = parts.iter().map(|part| part.bytes).sum();
        let idle = (tensors as f64 * IDLE) as u64;
        parts.push(figure("between the allocator's blocks", idle, format!("{:.0} % of the above, assumed", 100.0 * IDLE)));
        parts.push(figure("CUDA's context and libraries", CONTEXT + LIBRARIES, "600 MiB + 32 MiB + 256 MiB, assumed".to_owned()));
        Plan { micro_batch, bytes: parts.iter().map(|part| part.bytes).sum(), parts }
    }

    /// The largest micro-batches that fit into so many bytes.
    pub fn fit(&self, memory: u64) -> Fit {
        let train = &self.config.train;
        let (batch, workers) = (train.global_batch as u64, self.config.workers.count as u64);
        // What a micro-batch takes rises with it.
        let fits = |samples: u64| self.plan(samples).bytes <= memory;
        let (mut low, mut high) = (0, 1);
        while high < 1 << 20 && fits(high) {
            (low, high) = (high, 2 * high);
        }
        while high - low > 1 {
            let middle = low.midpoint(high);
            if fits(middle) { low = middle } else { high = middle }
        }
        let divides = |samples: &u64| batch.is_multiple_of(*samples) && batch / samples >= workers;
        Fit { memory, largest: Some(low).filter(|low| *low > 0), of_the_batch: (1..=low.min(batch)).rev().find(divides) }
    }

    /// What does not depend on the batch.
    fn fixed(&self) -> Vec<Figure> {
        let (number, params) = (bytes(self.config.base.dtype), self.connector_parameters);
        let weights = |name: &str, parameters: u64, number: u64| {
            figure(name, parameters * number, format!("{parameters} parameters × {number} bytes"))
        };
        let sum = if self.config.train.reduction == Reduction::Exact { 8 } else { 4 };
        let mut parts = vec![
            weights("U-Net", self.unet_parameters, number),
            weights("VAE", self.vae_parameters, number),
            figure("weights, moments and average", 16 * params, format!("{params} parameters × 4 buffers × 4 bytes")),
            figure("the step's sum", sum * params, format!("{params} parameters × {sum} bytes (train.reduction)")),
            figure("the step's gradient", 4 * params, format!("{params} parameters × 4 bytes, once it is summed")),
        ];
        if self.fused.resize {
            parts.push(unet_resized(&self.unet, device::kind(self.config.base.dtype)));
        }
        if self.config.connector_dtype() == ConnectorDtype::Bf16 {
            parts.push(weights("the connector's weights as it computes", params, 2));
        }
        if self.config.train.eval_every > 0 {
            let (samples, workers, each) = (self.config.train.eval_samples as u64, self.config.workers.count as u64, self.input_bytes());
            let formula = format!("{samples} samples (train.eval_samples) / {workers} × {each} bytes: features, latents, noise");
            parts.push(figure("held-out samples, which stay", samples.div_ceil(workers) * each, formula));
        }
        if self.config.text.features != Features::Cached {
            let number = bytes(self.config.text.dtype);
            parts.push(weights("text encoder, until all features are there", self.text_parameters, number));
        }
        parts
    }

    /// What the step holds of one lane.
    fn of_a_lane(&self, samples: u64) -> Vec<Figure> {
        let RunConfig { base, text, connector, train, .. } = &self.config;
        let states = if self.connector.kind == ConnectorKind::Mlp { text.max_tokens } else { connector.latents } as u64;
        let pass = Pass { samples, size: self.latents, states, kind: device::kind(base.dtype), fused: self.fused };
        let kept = if train.gradient_checkpointing { unet_checkpointed(&self.unet, pass) } else { unet_activations(&self.unet, pass) };
        let mut parts: Vec<Figure> = kept.into_iter().map(|part| Figure { name: format!("kept of {}", part.name), ..part }).collect();
        let number = if self.config.connector_dtype() == ConnectorDtype::Bf16 { 2 } else { 4 };
        let connector = connector_activations(&self.connector, (samples, text.max_tokens as u64), number, self.fused);
        parts.push(Figure { name: format!("kept of the {}", connector.name), ..connector });
        parts.push(unet_workspace(&self.unet, pass));
        if self.encodes_pictures {
            let (height, width) = (self.latents.0 * self.downscale, self.latents.1 * self.downscale);
            let each = VAE_CHANNELS * (4 + 2 * bytes(base.dtype));
            let formula = format!("{samples} samples × {height} × {width} pixels × {each} bytes: its first level");
            parts.push(figure("the VAE at work", samples * height * width * each, formula));
        }
        if text.features != Features::Cached {
            let at_once = if text.features == Features::Inline { samples } else { crate::embed::BATCH as u64 };
            let (tokens, width) = (text.max_tokens as u64, self.connector.text_width.unsigned_abs());
            let each = 16 * width * bytes(text.dtype);
            let formula = format!("{at_once} captions × {tokens} tokens × 16 × {width} × {} bytes", bytes(text.dtype));
            parts.push(figure("the text encoder at work", at_once * tokens * each, formula));
        }
        parts
    }

    /// What recorded lanes keep beside the activations, whose memory they share and never give back.
    fn of_recorded(&self, samples: u64) -> Vec<Figure> {
        let (shapes, params, each) = (self.recorded, self.connector_parameters, self.input_bytes());
        if shapes == 0 {
            return Vec::new();
        }
        let mut parts = vec![
            figure("gradients of recorded lanes", shapes * 4 * params, format!("{shapes} shapes × {params} parameters × 4 bytes")),
            figure("samples of recorded lanes", shapes * samples * each, format!("{shapes} shapes × {samples} samples × {each} bytes")),
        ];
        // Otherwise it has the memory that the activations had.
        if self.config.train.reduction == Reduction::Exact {
            let formula = format!("{params} parameters × 8 bytes, while it is made float32 (train.reduction)");
            parts.push(figure("the step's sum in float64", 8 * params, formula));
        }
        parts
    }

    /// What drawing a sample takes between steps, beside what recorded lanes keep (`sample.every`).
    fn of_a_sample(&self) -> Vec<Figure> {
        let RunConfig { base, connector, sample, text, .. } = &self.config;
        if sample.every == 0 {
            return Vec::new();
        }
        let (number, own) = (bytes(base.dtype), self.unet.sample_size.unsigned_abs() * self.downscale);
        let (width, height) = sample.size.map_or((own, own), |size| (size.width.unsigned_abs(), size.height.unsigned_abs()));
        let states = if self.connector.kind == ConnectorKind::Mlp { text.max_tokens } else { connector.latents } as u64;
        let (samples, size) = (1 + u64::from(sample.guidance != 1.0), (height / self.downscale.max(1), width / self.downscale.max(1)));
        let unet = unet_workspace(&self.unet, Pass { samples, size, states, kind: device::kind(base.dtype), fused: self.fused }).bytes;
        // One picture at a time, whose widest maps have twice the encoder's channels.
        let each = 2 * VAE_CHANNELS * (4 + 2 * number);
        let formula = format!("{height} × {width} pixels × {each} bytes: the decoder's last level; or the U-Net's, {unet}");
        vec![
            figure(
                "the VAE that draws samples",
                self.vae_parameters * number,
                format!("{} parameters × {number} bytes", self.vae_parameters),
            ),
            figure("drawing a sample", unet.max(height * width * each), formula),
        ]
    }

    /// The steps that lie ready on the device.
    fn staged(&self, samples: u64) -> Figure {
        let RunConfig { train, workers, .. } = &self.config;
        let lanes = (train.global_batch as u64 / samples.max(1)).max(1).div_ceil(workers.count as u64);
        let (steps, each) = (AHEAD as u64 + 1, self.input_bytes());
        let formula = format!("{steps} steps × {lanes} lanes × {samples} samples × {each} bytes: features, latents, noise");
        figure("input that is ready", steps * lanes * samples * each, formula)
    }

    /// A sample's features, and its latents and noise in float32.
    fn input_bytes(&self) -> u64 {
        let text = &self.config.text;
        let features = text.max_tokens as u64 * self.connector.text_width.unsigned_abs() * bytes(text.dtype);
        features + 2 * self.latents.0 * self.latents.1 * self.unet.in_channels.unsigned_abs() * 4
    }
}

impl fmt::Display for Plan {
    /// The parts that matter, largest first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<(&str, u64)> = Vec::new();
        for part in &self.parts {
            // Blocks are one part here.
            let name = if part.name.starts_with("kept of ") { "activations" } else { &part.name };
            match parts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, bytes)) => *bytes += part.bytes,
                None => parts.push((name, part.bytes)),
            }
        }
        parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        let parts: Vec<String> = parts.iter().map(|(name, bytes)| format!("{name} {}", gib(*bytes))).collect();
        write!(f, "{} for train.micro_batch = {} ({})", gib(self.bytes), self.micro_batch, parts.join(", "))
    }
}

/// A GPU's memory when it was full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of the device.
    pub total: u64,
    /// That nobody had.
    pub free: u64,
    /// That this process had, by libtorch's allocator.
    pub mine: u64,
    /// The most that it may have (`workers.gpu_memory`).
    pub limit: Option<u64>,
}

impl Room {
    /// As the driver and the allocator tell; none if they do not.
    pub fn look(device: Device, limit: Option<u64>) -> Option<Self> {
        let (free, total) = crate::gpu::memory(device)?;
        let mine = ella_cuda::memory::counters(device).map_or(0, |counters| counters.reserved);
        Some(Self { total, free, mine, limit })
    }

    /// What other processes had, beyond this one's context.
    fn others(&self) -> u64 {
        self.total.saturating_sub(self.free + self.mine + CONTEXT)
    }

    /// What a worker can count on.
    fn usable(&self) -> u64 {
        (self.total - self.others().min(self.total)).min(self.limit.unwrap_or(u64::MAX))
    }

    /// Whether the same would fail again: it does not come of others, who may leave.
    fn is_ours_alone(&self) -> bool {
        self.limit.is_some() || self.others() < self.total / 10
    }
}

/// A GPU's memory was full: what was planned, what there was, and what would fit.
#[derive(Debug, thiserror::Error)]
#[error("{said}; {planned}{there}{advice}")]
pub struct OutOfMemory {
    /// libtorch's own words.
    said: String,
    planned: String,
    there: String,
    advice: String,
    permanent: bool,
}

impl OutOfMemory {
    /// Makes the error of an error that tells of it, if it does.
    pub fn of(error: &impl fmt::Display, needs: Option<&Needs>, room: Option<Room>) -> Option<Self> {
        if Fault::of(error) != Some(Fault::OutOfMemory) {
            return None;
        }
        let there = room.map_or_else(String::new, |room| {
            let Room { total, free, mine, limit } = room;
            let limit = limit.map(|limit| format!(", of at most {} (workers.gpu_memory)", gib(limit))).unwrap_or_default();
            format!(
                "of the GPU's {} this process had {}{limit}, others {}, and {} were free; ",
                gib(total),
                gib(mine),
                gib(room.others()),
                gib(free)
            )
        });
        let planned = needs.map_or_else(String::new, |needs| {
            let plan = needs.plan(needs.config.train.micro_batch as u64);
            format!("planned were {plan}; ")
        });
        let advice = needs.zip(room).map_or_else(|| Fault::OutOfMemory.hint().to_owned(), |(needs, room)| advice(needs, room));
        let permanent = room.is_some_and(|room| room.is_ours_alone());
        Some(Self { said: first_line(error), planned, there, advice, permanent })
    }

    /// Whether the same config on the same GPU fails again.
    pub fn is_permanent(&self) -> bool {
        self.permanent
    }
}

/// What would fit: less than what was tried, whatever the arithmetic says of that.
fn advice(needs: &Needs, room: Room) -> String {
    let tried = needs.config.train.micro_batch as u64;
    let fitting = |needs: &Needs| {
        let fit = needs.fit(room.usable());
        let below = (1..tried.min(fit.largest.unwrap_or(0) + 1)).rev();
        let batch = needs.config.train.global_batch as u64;
        below.into_iter().find(|samples| batch.is_multiple_of(*samples))
    };
    match fitting(needs) {
        Some(samples) => format!("train.micro_batch = {samples} would fit"),
        None if !needs.config.train.gradient_checkpointing => {
            let mut saving = needs.clone();
            saving.config.train.gradient_checkpointing = true;
            let fits = saving.fit(room.usable()).largest.is_some();
            let with = if fits {
                "train.gradient_checkpointing = true would fit"
            } else {
                "not even train.gradient_checkpointing = true would fit"
            };
            format!("no smaller train.micro_batch would fit; {with}")
        }
        None => "nothing smaller would fit: use a GPU with more memory".to_owned(),
    }
}

/// How many shapes of lanes come often enough to be recorded, at most, as far as the sizes and rows of a data set's shards tell: for each size the full
/// lane, and those that its epochs end with, if there are enough epochs.
fn shapes(config: &RunConfig, shards: &[(Option<(u32, u32)>, u64)]) -> u64 {
    if config.text.padding == Padding::None {
        // A lane's longest caption is in its shape.
        return graph::MOST as u64;
    }
    let (lanes, micro_batch) = (config.train.lanes() as u64, config.train.micro_batch as u64);
    let mut sizes: BTreeMap<_, u64> = BTreeMap::new();
    for (size, rows) in shards {
        *sizes.entry(size).or_default() += rows;
    }
    // Each lane has as many rows of a size, some have one more.
    let full = |rows: u64| rows / lanes / micro_batch;
    let last = |rows: u64| u64::from(!(rows / lanes).is_multiple_of(micro_batch)) + u64::from(!rows.is_multiple_of(lanes));
    let of_all = |count: &dyn Fn(u64) -> u64| sizes.values().map(|rows| count(*rows)).sum::<u64>();
    let epoch = of_all(&|rows| full(rows) + last(rows).min(1));
    let ends = if config.train.steps >= epoch * u64::from(graph::RECORD_AT) { of_all(&last) } else { 0 };
    (of_all(&|rows| full(rows).min(1)) + ends).min(graph::MOST as u64)
}

fn figure(name: &str, bytes: u64, formula: String) -> Figure {
    Figure { name: name.to_owned(), bytes, formula }
}

fn bytes(dtype: Dtype) -> u64 {
    device::kind(dtype).elt_size_in_bytes() as u64
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

fn parameters(part: &Part) -> u64 {
    part.weights.listing().map(|tensor| tensor.shape.iter().product::<i64>().unsigned_abs()).sum()
}

fn count(config: &ConnectorConfig) -> Result<u64, ModelError> {
    Ok(Connector::layout(config)?.iter().map(|(_, shape)| shape.iter().product::<i64>().unsigned_abs()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_model::config::ConfigFile;
    use std::path::Path;

    const GIB: u64 = 1 << 30;

    /// SD 1.5 at 512² with features of T5-XL, as the paper trains it.
    fn paper(set: &[&str]) -> Needs {
        let set: Vec<String> = set.iter().map(|item| (*item).to_owned()).collect();
        let toml = "[run]\noutput = \"o\"\n[base]\nmodel = \"b\"\ndtype = \"bf16\"\n[text]\nmodel = \"t\"\ndtype = \"bf16\"\n[data]\npath = \"d\"\n\
                    [train]\nglobal_batch = 256\nmicro_batch = 32\n";
        let config = RunConfig::parse(toml, "run.toml", &set).unwrap();
        let json = serde_json::json!({
            "_class_name": "UNet2DConditionModel", "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 8, "cross_attention_dim": 768,
        });
        let serde_json::Value::Object(fields) = json else { unreachable!() };
        let unet = UNetConfig::read(ConfigFile::from_map(Path::new("unet/config.json"), fields)).unwrap();
        let connector = models::connector_config(&config, &unet, 2048).unwrap();
        Needs {
            connector_parameters: count(&connector).unwrap(),
            config,
            unet,
            unet_parameters: 859_520_964,
            connector,
            vae_parameters: 83_653_863,
            encodes_pictures: false,
            text_parameters: 1_222_655_488,
            latents: (64, 64),
            downscale: 8,
            fused: Fused::NONE,
            recorded: 1,
        }
    }

    fn part(plan: &Plan, name: &str) -> u64 {
        plan.parts.iter().find(|part| part.name == name).map_or(0, |part| part.bytes)
    }

    #[test]
    fn every_part_is_what_a_hand_reckons() {
        let needs = paper(&[]);
        let plan = needs.plan(32);
        assert_eq!(needs.connector_parameters, 66_820_608, "6 layers of 768 from features of 2048");
        assert_eq!(part(&plan, "U-Net"), 2 * 859_520_964);
        assert_eq!(part(&plan, "weights, moments and average"), 16 * 66_820_608);
        assert_eq!(part(&plan, "the step's sum"), 8 * 66_820_608);
        assert_eq!(part(&paper(&["train.reduction=fast"]).plan(32), "the step's sum"), 4 * 66_820_608);
        // 3 steps of 8 lanes of 32: 512 KiB of features, 64 KiB each of latents and noise.
        assert_eq!(part(&plan, "input that is ready"), 3 * 8 * 32 * (512 + 128) * 1024);
        // 16 of them, unless the config says otherwise.
        let held_out = |set: &[&str]| part(&paper(set).plan(32), "held-out samples, which stay");
        assert_eq!(held_out(&[]), 16 * (512 + 128) * 1024);
        assert_eq!(held_out(&["train.eval_samples=4097", "workers.count=2"]), 2049 * (512 + 128) * 1024);
        assert_eq!(held_out(&["train.eval_every=0"]), 0);
        // A shape's gradient and lane, and the sum of 8 bytes as it is made one of 4.
        let of_recorded = ["gradients of recorded lanes", "samples of recorded lanes", "the step's sum in float64"];
        assert_eq!(of_recorded.map(|name| part(&plan, name)), [4 * 66_820_608, 32 * (512 + 128) * 1024, 8 * 66_820_608]);
        let more = Needs { recorded: 3, ..paper(&["train.reduction=fast"]) }.plan(32);
        assert_eq!(of_recorded.map(|name| part(&more, name)), [12 * 66_820_608, 3 * 32 * (512 + 128) * 1024, 0]);
        let off = Needs { recorded: 0, ..paper(&[]) }.plan(32);
        assert_eq!(of_recorded.map(|name| part(&off, name)), [0; 3]);
        assert_eq!(part(&plan, "text encoder, until all features are there"), 0);
        let ahead = paper(&["text.features=ahead"]).plan(32);
        assert_eq!(part(&ahead, "text encoder, until all features are there"), 2 * 1_222_655_488);
        assert_eq!(plan.bytes, plan.parts.iter().map(|part| part.bytes).sum::<u64>());
        assert_eq!(part(&plan, "drawing a sample") + part(&plan, "the VAE that draws samples"), 0);
        let draws = paper(&["sample.every=100", "sample.prompts=[\"a\"]", "sample.size=512x512"]).plan(32);
        assert_eq!(
            (part(&draws, "the VAE that draws samples"), part(&draws, "drawing a sample")),
            (2 * 83_653_863, 512 * 512 * 2 * 128 * 8)
        );
        // 0.8 GB of the U-Net are kept for each sample; the connector's, what is at work and what lies idle come to a tenth and more.
        let sample = (needs.plan(33).bytes - plan.bytes) as f64;
        assert!((0.85e9..1.1e9).contains(&sample), "{sample}");
        assert!(plan.parts.iter().all(|part| !part.formula.is_empty()));
    }

    /// 256 samples a step, in 8 lanes of 32.
    #[test]
    fn shapes_are_those_that_come_thrice() {
        let of = |set: &[&str], sizes: &[(u32, u64)]| {
            let shards: Vec<_> = sizes.iter().map(|(width, rows)| (Some((*width, 512)), *rows)).collect();
            shapes(&paper(set).config, &shards)
        };
        let (one, thrice) = (["train.steps=8"], ["train.steps=9"]);
        assert_eq!(of(&thrice, &[(512, 256), (512, 512)]), 1, "an epoch of three full steps");
        // Two full steps, and one in which a lane has 10 samples, another 11.
        assert_eq!((of(&one, &[(512, 512 + 84)]), of(&thrice, &[(512, 512 + 84)])), (1, 3));
        assert_eq!(of(&thrice, &[(512, 512 + 4)]), 2, "some lanes have none of the last step");
        assert_eq!(of(&thrice, &[(512, 256), (640, 256), (768, 3)]), 3, "of the last size no lane is ever full");
        let many: Vec<_> = (1..=20).map(|n| (64 * n, 256)).collect();
        assert_eq!((of(&[], &many), of(&["text.padding=none"], &many[..1])), (8, 8));
    }

    #[test]
    fn the_largest_micro_batch_fits_and_the_next_does_not() {
        for set in [&[][..], &["train.gradient_checkpointing=true"], &["base.dtype=fp32"], &["workers.count=8"]] {
            let needs = paper(set);
            for memory in [16 * GIB, 40 * GIB, 80 * GIB] {
                let fit = needs.fit(memory);
                let largest = fit.largest.unwrap();
                assert!(needs.plan(largest).bytes <= memory && needs.plan(largest + 1).bytes > memory, "{fit:?}");
                let usable = fit.of_the_batch.unwrap();
                assert!(usable <= largest && 256 % usable == 0 && 256 / usable >= needs.config.workers.count as u64, "{fit:?}");
            }
            assert_eq!(needs.fit(2 * GIB), Fit { memory: 2 * GIB, largest: None, of_the_batch: None });
        }
        let (plain, fused) = (paper(&[]), Needs { fused: Fused::ALL, ..paper(&[]) });
        assert!(plain.fit(80 * GIB).largest < fused.fit(80 * GIB).largest);
        assert!(plain.fit(80 * GIB).largest < paper(&["train.gradient_checkpointing=true"]).fit(80 * GIB).largest);
    }

    const FULL: &str = "libtorch: Internal torch error: CUDA out of memory. Tried to allocate 2.50 GiB.\nException raised from malloc";

    #[test]
    fn a_full_gpu_is_told_with_what_was_planned_what_there_was_and_what_would_fit() {
        let needs = paper(&["train.micro_batch=128"]);
        let room = Room { total: 79 * GIB, free: GIB, mine: 77 * GIB, limit: None };
        let error = OutOfMemory::of(&FULL, Some(&needs), Some(room)).unwrap();
        let text = error.to_string();
        for words in [
            "Tried to allocate 2.50 GiB.; planned were ",
            " for train.micro_batch = 128 (activations ",
            "of the GPU's 79.0 GiB this process had 77.0 GiB, others 0.4 GiB, and 1.0 GiB were free",
            "train.micro_batch = 64 would fit",
        ] {
            assert!(text.contains(words), "{text}");
        }
        assert!(!text.contains("Exception raised") && error.is_permanent());
        // Less than was tried, though the arithmetic has it fit.
        let small = OutOfMemory::of(&FULL, Some(&paper(&["train.micro_batch=8"])), Some(room)).unwrap().to_string();
        assert!(small.contains("train.micro_batch = 4 would fit"), "{small}");
        let none = OutOfMemory::of(&FULL, Some(&paper(&["train.micro_batch=1"])), Some(room)).unwrap().to_string();
        assert!(none.contains("no smaller train.micro_batch would fit; train.gradient_checkpointing = true would fit"), "{none}");
    }

    /// Others may leave: then it is worth another try.
    #[test]
    fn it_is_permanent_only_where_nobody_else_has_the_memory() {
        let room = Room { total: 79 * GIB, free: GIB, mine: 40 * GIB, limit: None };
        let error = OutOfMemory::of(&FULL, Some(&paper(&[])), Some(room)).unwrap();
        assert!(!error.is_permanent() && error.to_string().contains("others 37.4 GiB"), "{error}");
        let limited = Room { limit: Some(40 * GIB), ..room };
        let error = OutOfMemory::of(&FULL, Some(&paper(&[])), Some(limited)).unwrap();
        assert!(error.is_permanent() && error.to_string().contains("of at most 40.0 GiB (workers.gpu_memory)"), "{error}");
        let unknown = OutOfMemory::of(&FULL, None, None).unwrap();
        assert!(!unknown.is_permanent() && unknown.to_string().contains("use a smaller train.micro_batch"), "{unknown}");
        assert!(OutOfMemory::of(&"CUDA error: unspecified launch failure", None, None).is_none());
    }
}
