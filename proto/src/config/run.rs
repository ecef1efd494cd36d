//! A whole run's config, and what of it may change when the run is resumed.

use super::{
    Base, Checkpoint, ConfigError, Connector, ConnectorDtype, Data, Device, Dtype, Features, Sample, ScheduleKind, Text, Train, Workers,
    check, keys, read, text_of,
};
use serde::{Deserialize, Serialize};

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
const BY_CONTENT: [&str; 5] = ["base.model", "base.loras", "text.model", "connector.from", "data.path"];
/// What of it changes bits are the kinds of devices that workers do compute on, which commits tell.
const DEVICE: &str = "workers.device";

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

impl RunConfig {
    /// The models that it names, each by its key.
    pub fn models(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let loras = self.base.loras.iter().map(|lora| ("base.loras", lora.file.as_str()));
        let from = self.connector.from.iter().map(|file| ("connector.from", file.as_str()));
        [("base.model", self.base.model.as_str()), ("text.model", &self.text.model)].into_iter().chain(loras).chain(from)
    }

    /// Reads a config file and applies overrides of the form `section.key=value`.
    pub fn load(path: &std::path::Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let (text, origin) = (text_of(path)?, path.display().to_string());
        if super::job::is_job(&text) { Err(ConfigError::OfJob { origin }) } else { Self::parse(&text, &origin, overrides) }
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

    /// All keys in which two configs differ.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let [own, theirs] = [self, other].map(|config| serde_json::to_value(config).unwrap_or_default());
        keys::differences(&own, &theirs)
    }

    /// Whether `key`, written with its section, may have another value when this run is resumed. Of two keys that depends on the config itself:
    /// `train.steps` (on the schedule), and `text.features` (two of its values are as good as each other).
    pub fn on_resume(&self, key: &str) -> OnResume {
        if BY_CONTENT.contains(&key) {
            return OnResume::SameContent;
        }
        if key == DEVICE {
            return OnResume::Free;
        }
        let mut all = keys::full();
        all.train.schedule.kind = self.train.schedule.kind;
        let bound = key.split('.').try_fold(&all.binding(), |table, name| table.get(name)).is_some();
        if bound { OnResume::Same } else { OnResume::Free }
    }

    /// How to train further once this run is done.
    pub fn further(&self) -> &'static str {
        match self.on_resume("train.steps") {
            OnResume::Free => "raise train.steps to go on",
            _ => "its schedule ends with train.steps; another run can go on from what it trained (connector.from)",
        }
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
        // As where nothing is said of it.
        value["workers"]["device"] = serde_json::to_value(Device::Auto).unwrap_or_default();
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
