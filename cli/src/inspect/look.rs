//! Finding out what a model is, by building its networks from headers alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::config::ConfigFile;
use ella_model::connector::{Connector, ConnectorKind, HEADS_FIELD};
use ella_model::lora::Lora;
use ella_model::part::Part;
use ella_model::schedule::{Prediction, ScheduleConfig};
use ella_model::text::{Text, TextConfig};
use ella_model::tokenizer::TextTokenizer;
use ella_model::unet::{UNet, UNetConfig};
use ella_model::vae::Vae;
use ella_model::weights::Weights;
use ella_worker::trained::Trained;
use serde::Serialize;
use tch::{Device, Kind};

const CPU: Device = Device::Cpu;

/// Folders of a pipeline that ella reads.
const READ: [&str; 7] = ["unet", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"];

/// What a model is.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) path: PathBuf,
    /// In words: the family, and in which form it lies there.
    pub(super) what: String,
    /// epsilon, v_prediction or sample, of a diffusion model.
    pub(super) prediction_type: Option<&'static str>,
    pub(super) networks: Vec<Network>,
    /// What a connector's file tells of how it was trained.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) trained: BTreeMap<String, String>,
    /// What else there is to say.
    pub(super) notes: Vec<String>,
    /// What such a model could have and this one has not; it can be used without.
    pub(super) missing: Vec<String>,
    /// What is there and ella does not read.
    pub(super) unused: Vec<String>,
    /// Why it cannot be used.
    pub(super) problems: Vec<String>,
    pub(super) usable: bool,
}

/// One of its networks.
#[derive(Debug, Serialize)]
pub(super) struct Network {
    pub(super) name: String,
    /// In words: its kind and what its sizes are told by.
    pub(super) what: String,
    pub(super) parameters: u64,
    /// On disk.
    pub(super) bytes: u64,
    /// Bytes by number format on disk.
    pub(super) dtypes: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cross_attention_dim: Option<i64>,
}

impl Network {
    fn new(name: &str, what: impl Into<String>, weights: &Weights) -> Self {
        let (mut parameters, mut bytes, mut dtypes) = (0, 0, BTreeMap::new());
        for tensor in weights.listing() {
            parameters += tensor.shape.iter().product::<i64>().unsigned_abs();
            bytes += tensor.bytes;
            *dtypes.entry(format!("{:?}", tensor.dtype)).or_default() += tensor.bytes;
        }
        Network { name: name.to_owned(), what: what.into(), parameters, bytes, dtypes, cross_attention_dim: None }
    }
}

/// Finds out what `path` is. What cannot be used is a report that says why.
///
/// # Errors
/// Nothing is there.
pub(super) fn look(path: &Path) -> Result<Report, ModelError> {
    let mut report = Report {
        path: path.to_owned(),
        what: "unknown".into(),
        prediction_type: None,
        networks: Vec::new(),
        trained: BTreeMap::new(),
        notes: Vec::new(),
        missing: Vec::new(),
        unused: Vec::new(),
        problems: Vec::new(),
        usable: false,
    };
    if path.is_file() {
        report.file();
    } else if path.join("config.json").is_file() {
        report.network_folder();
    } else if path.is_dir() {
        report.pipeline();
    } else {
        return Err(ModelError::MissingFile { file: path.into(), expected: "a model's folder or file".into() });
    }
    report.usable = report.problems.is_empty();
    Ok(report)
}

impl Report {
    fn file(&mut self) {
        let weights = match Weights::open(self.path.as_path()) {
            Ok(weights) => weights,
            Err(error) => return self.problem(&error),
        };
        if let Some(rank) = lora_rank(&weights) {
            self.what = format!("a LoRA of rank {rank} for {}", lora_target(&weights));
            self.networks.push(Network::new("lora", "low-rank changes", &weights));
            match Lora::open(&self.path, 1.0) {
                Ok(lora) => self.notes.extend(lora.unused()),
                Err(error) => self.problem(&error),
            }
        } else if weights.names().any(|name| name.starts_with("connector.")) {
            self.connector(weights);
        } else {
            match Base::open(&self.path) {
                Ok(base) => self.base(&base, "a single-file checkpoint"),
                Err(error) => self.problem(&error),
            }
        }
    }

    fn connector(&mut self, weights: Weights) {
        let mut network = Network::new("connector", "connector", &weights);
        match Trained::told(&weights) {
            Ok(trained) => self.trained = trained.fields(),
            Err(error) => self.problem(&error),
        }
        // Where the file does not tell the heads: every number of channels has one.
        let heads = if self.trained.contains_key(HEADS_FIELD) { None } else { Some(1) };
        match Connector::from_weights(weights.without_values(), heads, Kind::Float, CPU) {
            Ok(connector) => {
                let c = connector.config();
                self.what = format!("an ELLA connector, {}: text width {} to width {}", c.kind.name(), c.text_width, c.width);
                // Of maps of each token the sizes are of no meaning.
                if c.kind != ConnectorKind::Mlp {
                    network.what = format!("{} layers, {} latents", c.layers, c.latents);
                }
                network.cross_attention_dim = Some(c.width);
            }
            Err(error) => self.problem(&error),
        }
        self.networks.push(network);
    }

    /// A folder that holds one network.
    fn network_folder(&mut self) {
        let part = match Part::open(&self.path) {
            Ok(part) => part,
            Err(error) => return self.problem(&error),
        };
        let class = text_field(&part.config, "_class_name");
        match class.as_deref() {
            Some("UNet2DConditionModel") => self.unet(part),
            Some("AutoencoderKL") => self.vae(part),
            Some(_) => self.problem(&part.config.refuse("_class_name", "\"UNet2DConditionModel\" or \"AutoencoderKL\"")),
            None => {
                let folder = self.path.clone();
                let tokenizer = TextConfig::load(&folder).and_then(|config| TextTokenizer::load(&folder, &config));
                let tokenizer = tokenizer.map_err(|error| self.problem(&error)).ok();
                self.text("text", part, tokenizer.as_ref());
            }
        }
        self.what = self.networks.first().map_or("unknown".into(), |network| format!("a folder of one network, {}", network.what));
    }

    fn pipeline(&mut self) {
        if !READ.iter().any(|folder| self.path.join(folder).is_dir()) {
            let hint = "for a folder of sources, `ella prepare` makes a data set, which can be inspected";
            let path = self.path.display();
            return self.problems.push(format!("{path}: no folder of a model is there, such as unet/, and no config.json; {hint}"));
        }
        match Base::open(&self.path) {
            Ok(base) => self.base(&base, "a folder in diffusers' layout"),
            Err(error) => self.problem(&error),
        }
        let folders = std::fs::read_dir(&self.path).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
        let names = folders.filter_map(|entry| entry.file_name().into_string().ok());
        self.unused =
            names.filter(|name| !READ.contains(&name.as_str()) && !name.starts_with('.')).map(|name| format!("{name}/")).collect();
        self.unused.sort();
    }

    fn base(&mut self, base: &Base, form: &str) {
        self.what = form.to_owned();
        match base.unet_part() {
            Ok(part) => self.unet(part),
            Err(error) => self.problem(&error),
        }
        let family = match (base.checkpoint(), self.networks.first()) {
            (Some(checkpoint), _) => Some(checkpoint.family().name()),
            (None, unet) => unet.and_then(|unet| unet.what.strip_suffix(" U-Net")).and_then(known),
        };
        if let Some(family) = family {
            self.what = format!("{family}, {form}");
        }
        match base.vae_part() {
            Ok(part) => self.vae(part),
            Err(error) => self.problem(&error),
        }
        match base.scheduler().and_then(ScheduleConfig::read) {
            Ok(schedule) => self.prediction_type = Some(prediction(schedule.prediction)),
            Err(error) => self.problem(&error),
        }
        match base.text_encoders() {
            Ok(encoders) => {
                if encoders.is_empty() {
                    self.missing.push("a text encoder of its own: no comparison with the base as it is".into());
                }
                for (n, one) in encoders.into_iter().enumerate() {
                    let name = if n == 0 { "text_encoder".to_owned() } else { format!("text_encoder_{}", n + 1) };
                    if one.tokenizer.is_none() {
                        self.missing.push(format!("the tokenizer of {name}: no comparison with the base as it is"));
                    }
                    self.text(&name, one.part, one.tokenizer.as_ref());
                }
            }
            Err(error) => self.problem(&error),
        }
    }

    fn unet(&mut self, part: Part) {
        let mut network = Network::new("unet", "U-Net", &part.weights);
        match UNet::from_part(without_values(part), Kind::Float, CPU) {
            Ok(unet) => {
                network.what = unet_kind(unet.config());
                network.cross_attention_dim = Some(unet.config().cross_attention_dim);
            }
            Err(error) => self.problem(&error),
        }
        self.networks.push(network);
    }

    fn vae(&mut self, part: Part) {
        let mut network = Network::new("vae", "VAE", &part.weights);
        match Vae::from_part(without_values(part), Kind::Float, CPU) {
            Ok(vae) => {
                network.what = format!("VAE of {} latent channels, scaling {}", vae.config().latent_channels, vae.config().scaling_factor)
            }
            Err(error) => self.problem(&error),
        }
        self.networks.push(network);
    }

    fn text(&mut self, name: &str, part: Part, tokenizer: Option<&TextTokenizer>) {
        let mut network = Network::new(name, "text encoder", &part.weights);
        let family = text_field(&part.config, "model_type").unwrap_or_default();
        let checked = Text::from_part(without_values(part), Kind::Float, CPU).and_then(|text| {
            let config = text.config();
            let length =
                config.max_positions().map_or_else(|| "reads any length".to_owned(), |most| format!("reads at most {most} tokens"));
            network.what = format!("{family} text encoder of width {}, vocabulary of {}, {length}", config.width(), config.vocab_size());
            tokenizer.map_or(Ok(()), |tokenizer| tokenizer.check_vocabulary(config.vocab_size()))
        });
        if let Err(error) = checked {
            self.problem(&error);
        }
        self.networks.push(network);
    }

    fn problem(&mut self, error: &ModelError) {
        // What two readings of a file find is one problem.
        let problem = error.to_string();
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}

fn without_values(part: Part) -> Part {
    Part { weights: part.weights.without_values(), ..part }
}

fn text_field(config: &ConfigFile, field: &str) -> Option<String> {
    config.value(field).and_then(|value| value.as_str()).map(str::to_owned)
}

fn prediction(prediction: Prediction) -> &'static str {
    match prediction {
        Prediction::Epsilon => "epsilon",
        Prediction::Velocity => "v_prediction",
        Prediction::Sample => "sample",
    }
}

/// The family that a U-Net of these sizes is of, or its kind.
fn unet_kind(config: &UNetConfig) -> String {
    let family = match (config.added.is_some(), config.use_linear_projection, config.cross_attention_dim) {
        (false, false, 768) => "SD 1.x",
        (false, true, 1024) => "SD 2.x",
        (true, true, 2048) => "SDXL",
        (added, _, width) => return format!("U-Net of cross_attention_dim {width}{}", if added { " with pooled text" } else { "" }),
    };
    format!("{family} U-Net")
}

fn known(family: &str) -> Option<&'static str> {
    ["SD 1.x", "SD 2.x", "SDXL"].into_iter().find(|name| *name == family)
}

/// The rank of a LoRA, if it is one: the rows of the first of its matrices that lead down.
fn lora_rank(weights: &Weights) -> Option<i64> {
    const DOWN: [&str; 3] = [".lora_down.weight", ".lora_A.weight", ".lora.down.weight"];
    let down = weights.listing().find(|tensor| DOWN.iter().any(|end| tensor.name.ends_with(end)))?;
    down.shape.first().copied()
}

/// The family whose cross-attention a LoRA's matrices fit.
fn lora_target(weights: &Weights) -> &'static str {
    let names = |part: &str| weights.names().any(|name| name.contains(part));
    let down = |tensor: &ella_model::weights::Listed<'_>| {
        ["attn2_to_k.lora_down.weight", "attn2.to_k.lora_A.weight", "attn2.to_k.lora.down.weight"]
            .iter()
            .any(|end| tensor.name.ends_with(end))
    };
    let width = weights.listing().find(down).and_then(|tensor| tensor.shape.get(1).copied());
    match width {
        Some(768) => "SD 1.x",
        Some(1024) => "SD 2.x",
        Some(2048) => "SDXL",
        _ if names("lora_te2") || names("text_encoder_2.") => "SDXL",
        _ => "a base that its keys do not tell",
    }
}
