//! A run's config: `RUN.toml`, with overrides; and a job's ([`JobConfig`]). Unknown keys are refused with the nearest known one; every
//! value is checked here, once, so that what carries a [`RunConfig`] may trust it.

mod check;
mod job;
mod keys;
mod sample;
mod units;

pub use job::{Config, JobConfig, JobKind, JobTable};
pub use sample::{LONGEST_SIDE, Sample, Sampler, Size};
pub use units::{Bytes, Millis};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Why a config cannot be used. Each names the key, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: cannot be read ({source}); give the path of a run's or job's TOML file")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{origin}: {message}")]
    Syntax {
        /// The file, or the override.
        origin: String,
        /// The parser's words, with line and column.
        message: String,
    },
    /// No key of this name exists.
    #[error("{origin}: unknown key `{key}`{}", nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// The file, or the override.
        origin: String,
        /// The key, with its section.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
    },
    /// A value outside its rule.
    #[error("{origin}: `{key}` is {found}, but {rule}")]
    Value {
        /// The file, and whether keys of it were overridden.
        origin: String,
        /// The key, with its section.
        key: &'static str,
        /// The rule.
        rule: String,
        /// The value.
        found: String,
    },
}

/// A whole run's config (design.md §6).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Where the run lives, and its seed.
    pub run: Run,
    /// The frozen diffusion model.
    pub base: Base,
    /// The frozen text encoder.
    pub text: Text,
    /// The data set.
    pub data: Data,
    /// What is trained.
    #[serde(default)]
    pub connector: Connector,
    /// How it is trained.
    #[serde(default)]
    pub train: Train,
    /// When commits are made, and how many are kept.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// What is drawn as it trains.
    #[serde(default)]
    pub sample: Sample,
    /// The processes that train.
    #[serde(default)]
    pub workers: Workers,
}

/// Models and data count by what is in their files, which commits bind, not by where they lie.
const BY_CONTENT: [&str; 4] = ["base.model", "base.loras", "text.model", "data.path"];

/// Whether a key may have another value when a run is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnResume {
    /// It may: it changes no trained bit.
    Free,
    /// It may name another place that has the same content.
    SameContent,
    /// It may not.
    Same,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The run folder: a path, or a URL such as `s3://bucket/runs/mine`.
    pub output: String,
    /// Seeds order, noise, dropout and the connector's first values.
    #[serde(default)]
    pub seed: u64,
}

/// Number formats of frozen networks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit floats.
    #[default]
    Fp32,
    /// IEEE half.
    Fp16,
    /// bfloat16.
    Bf16,
}

/// `[base]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// A folder in diffusers' layout, a single-file checkpoint, or a hub id.
    pub model: String,
    /// Compute format of the frozen networks.
    #[serde(default)]
    pub dtype: Dtype,
    /// What the U-Net predicts, where the model's files do not say it, or wrongly; left out: what they say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
    /// LoRA files that are merged into the U-Net; left out: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<Lora>,
}

/// What a U-Net predicts, by diffusers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity.
    VPrediction,
    /// The image.
    Sample,
}

/// One of `base.loras`: a LoRA file, and how much of it counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// A safetensors file: a path, or `org/name/file.safetensors` on the hub.
    pub file: String,
    /// What its changes are multiplied by.
    #[serde(default = "Lora::weight")]
    pub weight: f64,
}

impl Lora {
    fn weight() -> f64 {
        1.0
    }
}

/// How captions become rows of equal or unequal length (design.md §4, "Padding is part of the meaning").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// Every caption has `max_tokens` positions; padding is attended, as in the released weights.
    #[default]
    Fixed,
    /// Ragged rows; the connector masks what is not there.
    None,
}

/// Which of the text encoder's layers the features are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layers {
    /// The last hidden state, as in the released weights.
    #[default]
    Last,
    /// The layer-normalized average over all layers (arXiv 2506.08210).
    Average,
}

/// Where features come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Features {
    /// From complete sidecars (`ella embed`).
    #[default]
    Cached,
    /// Computed for each step, and dropped.
    Inline,
    /// Computed ahead of the steps and written through to sidecars: the first epoch is `ella embed`.
    Ahead,
}

/// `[text]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Text {
    /// A folder in transformers' layout, or a hub id.
    pub model: String,
    /// Longest caption in tokens; longer ones are cut, and counted.
    #[serde(default = "Text::max_tokens")]
    pub max_tokens: usize,
    /// Padding rule.
    #[serde(default)]
    pub padding: Padding,
    /// Which layers features are made of.
    #[serde(default)]
    pub layers: Layers,
    /// Where features come from.
    #[serde(default)]
    pub features: Features,
    /// Compute format of the text encoder.
    #[serde(default)]
    pub dtype: Dtype,
}

impl Text {
    fn max_tokens() -> usize {
        128
    }
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A prepared data set: URL or path.
    pub path: String,
    /// How many consecutive shards are shuffled together (ORDER).
    #[serde(default = "Data::window")]
    pub window: usize,
    /// Columns of captions, of which each sample's is chosen anew in every epoch (NOISE); left out: the data set's own, by its weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub captions: Vec<CaptionChoice>,
    /// Most bytes of shards and features that a worker holds in memory, those read ahead included. Mapped files count nothing: local ones, and
    /// those in the cache.
    #[serde(default = "Data::memory_bytes")]
    pub memory_bytes: u64,
    /// Where each worker's machine keeps what it fetches of a data set that is not on it, each file once, checked by its digest; left out:
    /// `~/.cache/ella/data` (below `XDG_CACHE_HOME`, if that is set).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Most bytes that this cache holds, for all processes of a machine together; 0: there is none.
    #[serde(default = "Data::cache_bytes")]
    pub cache_bytes: u64,
}

/// One of `data.captions`: a column, and how often it is taken relative to the others that a sample has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionChoice {
    /// The column's name in the data set: one of its own, or one that was added.
    pub column: String,
    /// Its weight.
    #[serde(default = "CaptionChoice::weight")]
    pub weight: f64,
}

impl CaptionChoice {
    fn weight() -> f64 {
        1.0
    }
}

impl Data {
    fn window() -> usize {
        16
    }

    fn memory_bytes() -> u64 {
        2 << 30
    }

    fn cache_bytes() -> u64 {
        50 << 30
    }
}

/// The kinds of connector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectorKind {
    /// The timestep-aware semantic connector, AdaLN (paper §3.1).
    #[default]
    Tsc,
    /// The same with gates, AdaLN-Zero (paper §1.2).
    TscZero,
    /// Perceiver blocks that know no timestep.
    Resampler,
    /// Two linear maps of each token (LLaVA's): it has no layers, heads or latents, and the U-Net sees as many states as tokens.
    Mlp,
}

/// The formats that the connector computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectorDtype {
    /// 32-bit floats.
    Fp32,
    /// bfloat16 for matrix products and attention; weights, their gradients and moments, norms and sums stay float32.
    Bf16,
}

/// `[connector]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Connector {
    /// Which one.
    pub kind: ConnectorKind,
    /// Channels; must be the base's `cross_attention_dim`, which it is if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// Perceiver blocks; of an `mlp` this and the next two mean nothing.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Learned queries: the sequence length that the U-Net sees.
    pub latents: usize,
    /// What it computes in; left out: bfloat16 if the base does, else float32 ([`RunConfig::connector_dtype`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<ConnectorDtype>,
}

impl Default for Connector {
    fn default() -> Self {
        Self { kind: ConnectorKind::Tsc, width: None, layers: 6, heads: 8, latents: 64, dtype: None }
    }
}

/// How lane gradients are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// In 64-bit fixed point: the sum does not depend on how lanes are dealt (SAME).
    #[default]
    Exact,
    /// In float32, in the engine's order.
    Fast,
}

/// What the gradient's sum goes over the wire in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As it is summed.
    #[default]
    None,
    /// bfloat16: half the bytes of float32. Each rank's sum is rounded once, and each addition on the way once more.
    Bf16,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Optimizer updates in all.
    pub steps: u64,
    /// Samples per step.
    pub global_batch: usize,
    /// Samples per lane. `global_batch / micro_batch` is the number of lanes, and the most workers that there can be.
    pub micro_batch: usize,
    /// How lane gradients are summed: `exact` gives the same bytes for any number of workers.
    pub reduction: Reduction,
    /// What the sum goes over the wire in; `none` where the reduction is exact.
    pub compression: Compression,
    /// At most so many steps in a row whose loss or gradient is not finite are left out and counted, before the run stops for one. The samples of each
    /// are listed in the run's folder, in `failed/`.
    pub skip_nonfinite: usize,
    /// Probability that a caption is replaced by the empty one, for classifier-free guidance.
    pub caption_dropout: f64,
    /// Largest gradient norm; 0 turns clipping off.
    pub grad_clip: f64,
    /// Decay of the exponential moving average of the weights.
    pub ema_decay: f64,
    /// Min-SNR weighting (arXiv 2303.09556); left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snr_gamma: Option<f64>,
    /// Make the U-Net's gradient block by block: a second forward pass for the memory of one block's activations.
    pub gradient_checkpointing: bool,
    /// Measure the loss on held-out noise before the first step, every so many steps, and before the last; 0: never.
    pub eval_every: u64,
    /// On so many samples: the first of the data set.
    pub eval_samples: usize,
    /// AdamW.
    pub optimizer: Optimizer,
    /// Learning rate over steps.
    pub schedule: Schedule,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            steps: 1000,
            global_batch: 32,
            micro_batch: 8,
            reduction: Reduction::Exact,
            compression: Compression::None,
            skip_nonfinite: 0,
            caption_dropout: 0.1,
            grad_clip: 1.0,
            ema_decay: 0.9999,
            snr_gamma: None,
            gradient_checkpointing: false,
            eval_every: 50,
            eval_samples: 16,
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
        }
    }
}

impl Train {
    /// How many lanes the global batch has.
    pub fn lanes(&self) -> usize {
        self.global_batch / self.micro_batch
    }
}

/// `[train.optimizer]`: AdamW (arXiv 1711.05101), as `torch.optim.AdamW` computes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Peak learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decays of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { lr: 1e-4, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1e-8 }
    }
}

/// How the learning rate goes after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays.
    #[default]
    Constant,
    /// Half a cosine, down to zero at the last step.
    Cosine,
}

/// `[train.schedule]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// What comes after the warm-up.
    pub kind: ScheduleKind,
    /// Steps over which the rate rises linearly from zero.
    pub warmup: u64,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Commit every so many steps; left out: 100, unless `max_lost_work` says how often. The last step is committed in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Commit so often, by the measured time of a save, that no more work than this is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_lost_work: Option<Millis>,
    /// How many of the newest commits stay.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: None, max_lost_work: None, keep: 3 }
    }
}

impl Checkpoint {
    /// Every how many steps to commit; none: by the clock only.
    pub fn steps(&self) -> Option<u64> {
        self.every.or_else(|| self.max_lost_work.is_none().then_some(100))
    }
}

/// Where workers compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The GPU if there is one.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What becomes of a rank that others wait for much longer than for any before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Straggler {
    /// It is named; past `workers.step_timeout` it is let go.
    #[default]
    Warn,
    /// It is let go at once.
    Evict,
}

/// `[workers]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// How many a run begins with; `ella train` starts so many.
    pub count: usize,
    /// Training goes on while there are at least so many.
    pub min: usize,
    /// More than so many are spares, as are more than there are lanes; absent: only those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<usize>,
    /// How long workers that come while training goes on wait for others to join with them.
    pub join_window: Millis,
    /// What becomes of a rank that others wait for much longer than for any before.
    pub straggler: Straggler,
    /// Where they compute.
    pub device: Device,
    /// Intra-op threads of each: part of SAME, as it changes the order of sums inside a kernel.
    pub threads: usize,
    /// Whether a GPU may round float32 to 10 bits of mantissa in matrix products and convolutions: faster, and part of SAME.
    pub tf32: bool,
    /// The most that each takes of its GPU's memory, which leaves the rest to others there; absent: all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<Bytes>,
    /// Whether a lane that runs out of a GPU's memory is computed again in halves. Only with `train.reduction = "fast"`.
    pub split_on_oom: bool,
    /// A worker not heard of for this long is lost.
    pub lease: Millis,
    /// A worker that has been without a coordinator for this long (it is gone, stopped, or cut off) stops itself.
    pub orphan_timeout: Millis,
    /// A collective that waits for this long has failed.
    pub step_timeout: Millis,
    /// How long the coordinator waits for the workers to come, and for them to load; and how long a commit may take.
    pub start_timeout: Millis,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            count: 1,
            min: 1,
            max: None,
            join_window: Millis(2_000),
            straggler: Straggler::Warn,
            device: Device::Auto,
            threads: 1,
            tf32: false,
            gpu_memory: None,
            split_on_oom: false,
            lease: Millis(10_000),
            orphan_timeout: Millis(60_000),
            step_timeout: Millis(120_000),
            start_timeout: Millis(600_000),
        }
    }
}

impl RunConfig {
    /// Reads a config file and applies overrides of the form `section.key=value`.
    pub fn load(path: &std::path::Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Self::parse(&text_of(path)?, &path.display().to_string(), overrides)
    }

    /// Parses TOML text. `origin` names it in errors.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let (mut config, origin): (Self, String) = read(text, origin, overrides, &keys::full())?;
        config.sample.read_prompts(&origin)?;
        check::values(&config, &origin)?;
        Ok(config)
    }

    /// What the connector computes in. float16 has too little range for gradients that nobody scales: with a base in it the connector stays in float32.
    pub fn connector_dtype(&self) -> ConnectorDtype {
        let by_base = if self.base.dtype == Dtype::Bf16 { ConnectorDtype::Bf16 } else { ConnectorDtype::Fp32 };
        self.connector.dtype.unwrap_or(by_base)
    }

    /// The effective config, as it stands in the run folder.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    /// BLAKE3 over what determines the trained bits: everything but places, commits, samples, the number of workers and their timeouts.
    /// A run resumes only under the same digest (SAME).
    pub fn digest(&self) -> String {
        blake3::hash(&self.binding_json()).to_hex().to_string()
    }

    /// The keys in which two configs differ among those that [`Self::digest`] covers.
    pub fn binding_differences(&self, other: &Self) -> Vec<String> {
        keys::differences(&self.binding(), &other.binding())
    }

    /// Whether `key`, written with its section, may have another value when this run is resumed. Of two keys that depends on the config itself:
    /// `train.steps` (on the schedule), and `text.features` (two of its values are as good as each other).
    pub fn on_resume(&self, key: &str) -> OnResume {
        if BY_CONTENT.contains(&key) {
            return OnResume::SameContent;
        }
        let mut all = keys::full();
        all.train.schedule.kind = self.train.schedule.kind;
        let bound = key.split('.').try_fold(&all.binding(), |table, name| table.get(name)).is_some();
        if bound { OnResume::Same } else { OnResume::Free }
    }

    fn binding(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        // Models count by what is in their files, which commits bind.
        for path in BY_CONTENT.iter().chain(&["run.output"]) {
            keys::remove(&mut value, path);
        }
        for path in ["data.memory_bytes", "data.cache", "data.cache_bytes"] {
            keys::remove(&mut value, path);
        }
        for path in [
            "checkpoint",
            "sample",
            "train.eval_every",
            "train.eval_samples",
            "workers.count",
            "workers.min",
            "workers.max",
            "workers.join_window",
            "workers.straggler",
            "workers.gpu_memory",
            // Of a reduction that promises no bits.
            "workers.split_on_oom",
        ] {
            keys::remove(&mut value, path);
        }
        for timeout in ["lease", "orphan_timeout", "step_timeout", "start_timeout"] {
            keys::remove(&mut value, &format!("workers.{timeout}"));
        }
        // Features that are made ahead are those that `ella embed` makes.
        if self.text.features == Features::Ahead {
            value["text"]["features"] = serde_json::to_value(Features::Cached).unwrap_or_default();
        }
        if self.train.schedule.kind == ScheduleKind::Constant {
            keys::remove(&mut value, "train.steps");
        }
        value
    }

    fn binding_json(&self) -> Vec<u8> {
        self.binding().to_string().into_bytes()
    }
}

/// The text of a config file.
fn text_of(path: &std::path::Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })
}

/// Reads a config of any kind from TOML text, with overrides of the form `section.key=value`; and how errors name its origin then. `full`
/// has every key that exists; a table that is empty there may hold any.
///
/// # Errors
/// No TOML, a key that does not exist (with the nearest that does), or a value of another type. Rules for values are the caller's.
pub fn read<T: Serialize + DeserializeOwned>(
    text: &str,
    origin: &str,
    overrides: &[String],
    full: &impl Serialize,
) -> Result<(T, String), ConfigError> {
    let syntax = |origin: &str, message: String| ConfigError::Syntax { origin: origin.to_owned(), message };
    let known = toml::Table::try_from(full).unwrap_or_default();
    let mut table: toml::Table = text.parse().map_err(|e| syntax(origin, words(text, &e)))?;
    keys::check(&table, &known, origin)?;
    if overrides.is_empty() {
        // Straight from the text, so that the parser's errors carry line and column.
        let config = toml::from_str(text).map_err(|e| syntax(origin, words(text, &e)))?;
        return Ok((config, origin.to_owned()));
    }
    for item in overrides {
        keys::set(&mut table, item)?;
        keys::check(&table, &known, &format!("--set {item}"))?;
    }
    let origin = format!("{origin} with --set");
    let config = table.try_into().map_err(|e: toml::de::Error| syntax(&origin, words("", &e)))?;
    Ok((config, origin))
}

/// A parser's error in one line: its words, and where.
fn words(text: &str, error: &toml::de::Error) -> String {
    let Some(span) = error.span() else { return error.to_string().trim_end().replace('\n', " ") };
    let before = text.get(..span.start).unwrap_or_default();
    let (line, column) = (before.matches('\n').count() + 1, before.rsplit('\n').next().unwrap_or_default().chars().count() + 1);
    format!("line {line}, column {column}: {}", error.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        [run]
        output = "runs/a"
        [base]
        model = "m"
        [text]
        model = "t"
        [data]
        path = "d"
    "#;

    fn parse(extra: &str, set: &[&str]) -> Result<RunConfig, ConfigError> {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        RunConfig::parse(&format!("{SMALL}\n{extra}"), "run.toml", &set)
    }

    #[test]
    fn the_effective_config_reads_back_as_itself() {
        let config = parse("[train]\nsnr_gamma = 5.0", &["workers.count=4", "workers.lease=\"250ms\""]).unwrap();
        assert_eq!(RunConfig::parse(&config.to_toml(), "x", &[]).unwrap(), config);
        assert_eq!(config.workers.count, 4);
        assert_eq!(config.workers.lease, Millis(250));
        assert_eq!(config.train.lanes(), 4);
        let config = parse("", &["base.loras=[{file=\"a.safetensors\"},{file=\"b.safetensors\",weight=0.8}]"]).unwrap();
        assert_eq!(config.base.loras.iter().map(|lora| lora.weight).collect::<Vec<_>>(), [1.0, 0.8]);
        assert_eq!(RunConfig::parse(&config.to_toml(), "x", &[]).unwrap(), config);
    }

    #[test]
    fn a_url_with_a_secret_is_refused_without_telling_it() {
        for key in ["run.output", "base.model", "text.model", "data.path"] {
            for url in [
                "s3://user:hunter2@bucket/a",
                "https://hunter2@host",
                "s3://bucket/a?sig=hunter2",
                "az://c/a#hunter2",
                "s3://user:hunter2/more@bucket/a",
                "https://user:hunter2?more@host/a",
            ] {
                let said = parse("", &[&format!("{key}={url}")]).unwrap_err().to_string();
                assert!(said.contains(key) && said.contains("environment") && !said.contains("hunter2"), "{said}");
            }
        }
        for place in ["s3://bucket/a", "runs/what?#1", "org/name@main", "http://host:80/a@b", "http://[::1]/a@b"] {
            assert_eq!(parse("", &[&format!("data.path={place}")]).unwrap().data.path, place);
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest() {
        let text = |e: ConfigError| e.to_string();
        assert_eq!(text(parse("[train]\nstep = 3", &[]).unwrap_err()), "run.toml: unknown key `train.step`; did you mean `train.steps`?");
        assert_eq!(
            text(parse("[train.optimiser]\nlr = 1.0", &[]).unwrap_err()),
            "run.toml: unknown key `train.optimiser`; did you mean `train.optimizer`?"
        );
        assert_eq!(
            text(parse("", &["worker.count=3"]).unwrap_err()),
            "--set worker.count=3: unknown key `worker`; did you mean `workers`?"
        );
        assert_eq!(text(parse("", &["data.cahce_bytes=1"]).unwrap_err()).rsplit('`').nth(1), Some("data.cache_bytes"));
        assert_eq!(text(parse("[zzzzzzzzz]", &[]).unwrap_err()), "run.toml: unknown key `zzzzzzzzz`");
        assert_eq!(text(parse("[trian]", &[]).unwrap_err()), "run.toml: unknown key `trian`; did you mean `train`?");
    }

    #[test]
    fn values_out_of_range_name_key_rule_and_value() {
        for (toml, key) in [
            ("[train]\nsteps = 0", "train.steps"),
            ("[train]\nglobal_batch = 30", "train.global_batch"),
            ("[train]\ncompression = \"bf16\"", "train.compression"),
            ("[connector]\ndtype = \"fp16\"", "bf16"),
            ("[train]\ncaption_dropout = 1.5", "train.caption_dropout"),
            ("[train]\ncaption_dropout = nan", "train.caption_dropout"),
            ("[train.optimizer]\nlr = -1.0", "train.optimizer.lr"),
            ("[train.optimizer]\nbetas = [0.9, 1.0]", "train.optimizer.betas"),
            ("[train.optimizer]\neps = 0.0", "train.optimizer.eps"),
            ("[workers]\ncount = 9", "workers.count"),
            ("[workers]\nmin = 0", "workers.min"),
            ("[workers]\ncount = 2\nmin = 3", "workers.min"),
            ("[workers]\ncount = 2\nmax = 1", "workers.max"),
            ("[workers]\nthreads = 100000", "workers.threads"),
            ("[workers]\ngpu_memory = \"1MiB\"", "workers.gpu_memory"),
            ("[workers]\nsplit_on_oom = true", "workers.split_on_oom"),
            ("[sample]\nevery = 5", "sample.prompts"),
            ("[sample]\nprompts_file = \"/no/such/file\"", "sample.prompts_file"),
            ("[sample]\nprompts = [\"a\"]\nprompts_file = \"p\"", "sample.prompts_file"),
            ("[sample]\nimages = 0", "sample.images"),
            ("[sample]\nsteps = 0", "sample.steps"),
            ("[sample]\nguidance = nan", "sample.guidance"),
            ("[sample]\nsize = \"0x64\"", "sample.size"),
            ("[sample]\nsize = \"64x20000\"", "sample.size"),
            ("[sample]\nsampler = \"dpm\"", "dpm++2m"),
            ("[sample]\nprompts = [\"a\", \"b\"]\nimages = 501", "sample.images"),
            ("[checkpoint]\nkeep = 0", "checkpoint.keep"),
            ("[checkpoint]\nmax_lost_work = \"0s\"", "checkpoint.max_lost_work"),
            ("[checkpoint]\nevery = 0", "checkpoint.every"),
            ("[connector]\nkind = \"ada\"", "tsc-zero"),
            ("[[base.loras]]\nfile = \"x\"\nweight = inf", "base.loras"),
            ("[[base.loras]]\nfile = \"x\"\nwieght = 1.0", "wieght"),
        ] {
            let error = parse(toml, &[]).unwrap_err().to_string();
            assert!(error.contains(&format!("`{key}`")), "{toml}: {error}");
        }
        let error = parse("[train]\nsteps = \"many\"", &[]).unwrap_err().to_string();
        assert_eq!(error, "run.toml: line 12, column 9: invalid type: string \"many\", expected u64");
        let error = parse("[train\nsteps = 3", &[]).unwrap_err().to_string();
        assert!(error.starts_with("run.toml: line 11, column 7: ") && !error.contains('\n'), "{error}");
        let error = parse("", &["train.steps=many"]).unwrap_err().to_string();
        assert_eq!(error, "run.toml with --set: invalid type: string \"many\", expected u64 in `train.steps`");
        let error = parse("", &["text.max_tokens=100000"]).unwrap_err().to_string();
        assert_eq!(error, "run.toml with --set: `text.max_tokens` is 100000, but it must lie from 1 to 65536");
        let error = parse("", &["train.steps=0"]).unwrap_err().to_string();
        assert_eq!(error, "run.toml with --set: `train.steps` is 0, but it must be 1 or more");
        let error = parse("", &["workers.gpu_memory=lots"]).unwrap_err().to_string();
        assert!(error.contains("\"lots\" is not a size; write one such as"), "{error}");
        let error = parse("", &["train.steps"]).unwrap_err().to_string();
        assert!(error.contains("section.key=value"), "{error}");
    }

    #[test]
    fn prompts_of_a_file_stand_in_the_effective_config() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.txt");
        std::fs::write(&file, "a red circle\n\n  two stars \n").unwrap();
        let set = [format!("sample.prompts_file={}", file.display()), "sample.every=5".to_owned(), "sample.size=64x32".to_owned()];
        let config = parse("", &set.each_ref().map(String::as_str)).unwrap();
        assert_eq!(
            (config.sample.prompts.clone(), &config.sample.prompts_file),
            (vec!["a red circle".to_owned(), "two stars".to_owned()], &None)
        );
        assert_eq!(RunConfig::parse(&config.to_toml(), "x", &[]).unwrap(), config);
        std::fs::write(&file, "\n").unwrap();
        let error = parse("", &[&set[0]]).unwrap_err().to_string();
        assert!(error.contains("`sample.prompts_file`") && error.contains("has none"), "{error}");
        let error = parse("[sample]\nsize = \"wide\"", &[]).unwrap_err().to_string();
        assert!(error.contains("line 12") && error.contains("\"wide\" is not a size; expected WIDTHxHEIGHT"), "{error}");
        let error = parse("[sample]\nprompt = [\"a\"]", &[]).unwrap_err().to_string();
        assert_eq!(error, "run.toml: unknown key `sample.prompt`; did you mean `sample.prompts`?");
    }

    #[test]
    fn captions_are_chosen_by_column_and_weight() {
        let config = parse("", &["data.captions=[{column=\"dense\",weight=0.7},{column=\"short\"}]"]).unwrap();
        assert_eq!(
            config.data.captions.iter().map(|c| (c.column.as_str(), c.weight)).collect::<Vec<_>>(),
            [("dense", 0.7), ("short", 1.0)]
        );
        assert_ne!(config.digest(), parse("", &[]).unwrap().digest(), "what is trained on depends on it");
        for bad in ["[{column=\"a\",weight=-1.0}]", "[{column=\"a\",weight=0.0}]", "[{column=\"a\"},{column=\"a\"}]", "[{column=\"\"}]"] {
            let error = parse("", &[&format!("data.captions={bad}")]).unwrap_err().to_string();
            assert!(error.contains("`data.captions`"), "{error}");
        }
    }

    #[test]
    fn every_kind_of_connector_is_read_and_an_mlp_wants_rows_of_one_length() {
        for (name, kind) in [
            ("tsc", ConnectorKind::Tsc),
            ("tsc-zero", ConnectorKind::TscZero),
            ("resampler", ConnectorKind::Resampler),
            ("mlp", ConnectorKind::Mlp),
        ] {
            assert_eq!(parse(&format!("[connector]\nkind = \"{name}\""), &[]).unwrap().connector.kind, kind);
            let ragged = parse("", &[&format!("connector.kind={name}"), "text.padding=none"]).map_err(|error| error.to_string());
            match kind {
                ConnectorKind::Mlp => assert!(ragged.unwrap_err().contains("`text.padding` is \"none\"")),
                _ => assert_eq!(ragged.unwrap().connector.kind, kind),
            }
        }
    }

    #[test]
    fn the_digest_binds_what_determines_the_bits_and_nothing_else() {
        let base = parse("", &[]).unwrap();
        for free in ["data.cache=/tmp/x", "data.cache_bytes=0", "data.memory_bytes=9"] {
            assert_eq!(parse("", &[free]).unwrap().digest(), base.digest(), "{free}");
        }
        for free in [
            "workers.count=2",
            "run.output=x",
            "checkpoint.every=7",
            "checkpoint.keep=1",
            "train.steps=5",
            "workers.lease=1s",
            "workers.max=2",
            "workers.straggler=evict",
            "workers.join_window=0s",
            "workers.gpu_memory=40GiB",
        ] {
            assert_eq!(parse("", &[free]).unwrap().digest(), base.digest(), "{free}");
            assert_eq!(base.on_resume(free.split('=').next().unwrap()), OnResume::Free, "{free}");
        }
        let sampled = parse("[sample]\nevery = 5\nprompts = [\"a\"]", &[]).unwrap();
        assert_eq!(sampled.digest(), base.digest(), "what is drawn changes no trained bit");
        let ahead = parse("", &["text.features=ahead"]).unwrap();
        assert_eq!(ahead.digest(), base.digest(), "a run that began so may go on with the features that it made");
        for bound in [
            "workers.threads=2",
            "workers.tf32=true",
            "text.features=inline",
            "run.seed=1",
            "train.micro_batch=4",
            "text.padding=none",
            "text.layers=average",
            "train.optimizer.lr=1",
            "data.window=2",
            "connector.kind=mlp",
        ] {
            let other = parse("", &[bound]).unwrap();
            assert_ne!(other.digest(), base.digest(), "{bound}");
            let key = bound.split('=').next().unwrap();
            assert_eq!(base.binding_differences(&other), vec![key.to_owned()]);
            assert_eq!(base.on_resume(key), OnResume::Same, "{key}");
        }
        let fast = parse("", &["train.reduction=fast"]).unwrap();
        assert_eq!(parse("", &["train.reduction=fast", "workers.split_on_oom=true"]).unwrap().digest(), fast.digest());
        let cosine = parse("", &["train.schedule.kind=cosine"]).unwrap();
        assert_ne!(parse("", &["train.schedule.kind=cosine", "train.steps=9"]).unwrap().digest(), cosine.digest());
        assert_eq!(cosine.on_resume("train.steps"), OnResume::Same);
        assert_eq!(base.on_resume("text.model"), OnResume::SameContent);
    }
}
