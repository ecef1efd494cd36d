//! `ella embed`: the text encoder's features of every caption.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use clap::{Args, ValueEnum};
use ella_dataset::{DataSet, MANIFEST, Report, captions_from_txt, prepare_captions};
use ella_proto::config::{self, JobConfig, JobKind, JobTable};
use ella_store::Store;
use ella_worker::embed::EmbedSettings;
use ella_worker::models;
use serde_json::json;

use crate::forward::Dtype;
use crate::jobs::Who;
use crate::prepare::table_of;
use crate::ui::{DONE, Fail, Out, note, span};

#[derive(Debug, Args)]
pub(crate) struct Embed {
    /// A prepared data set (path or URL), or a folder of .txt files, one caption each
    data: String,
    /// The text encoder: a folder in transformers' layout, or a hub id (org/name, org/name@revision)
    #[arg(long, value_name = "MODEL")]
    text: String,
    /// Longest caption in tokens; longer ones are cut, and counted
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    max_tokens: u32,
    /// Whether the positions after a caption's end count: fixed (as in the released weights) or none
    #[arg(long, value_enum, default_value_t = Padding::Fixed)]
    padding: Padding,
    /// Which of the encoder's layers the features are made of
    #[arg(long, value_enum, default_value_t = Layers::Last)]
    layers: Layers,
    /// What to compute in, and to store
    #[arg(long, value_enum, default_value_t = Dtype::Fp32)]
    dtype: Dtype,
    /// Most captions that go through the encoder at once
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    /// Threads that compute
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: u32,
    /// Take no more than so much of a GPU's memory, as in 20GiB: others may work there too
    #[arg(long, value_name = "BYTES")]
    gpu_memory: Option<config::Bytes>,
    /// Halve batches that run out of a GPU's memory; the features' last bits may differ then
    #[arg(long)]
    split_on_oom: bool,
    /// A column of captions to embed, the data set's own or an added one; may be given more than once [default: all of its own]
    #[arg(long = "caption", value_name = "COLUMN")]
    captions: Vec<String>,
    /// Where the data set of a folder of .txt files goes
    #[arg(long, value_name = "DST")]
    out: Option<String>,
    #[command(flatten)]
    who: Who,
}

/// What becomes of the positions after a caption's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Padding {
    /// They are stored, and attended to
    Fixed,
    /// They are left out
    None,
}

impl From<Padding> for config::Padding {
    fn from(padding: Padding) -> Self {
        match padding {
            Padding::Fixed => Self::Fixed,
            Padding::None => Self::None,
        }
    }
}

/// Which of the text encoder's layers the features are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layers {
    /// The last one, as in the released weights
    Last,
    /// The layer-normalized average over all
    Average,
}

impl From<Layers> for config::Layers {
    fn from(layers: Layers) -> Self {
        match layers {
            Layers::Last => Self::Last,
            Layers::Average => Self::Average,
        }
    }
}

impl From<Layers> for ella_model::text::Layers {
    fn from(layers: Layers) -> Self {
        match layers {
            Layers::Last => Self::Last,
            Layers::Average => Self::Average,
        }
    }
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// The GPU if there is one
    Auto,
    /// The processor
    Cpu,
    /// An NVIDIA GPU
    Cuda,
}

impl From<Device> for config::Device {
    fn from(device: Device) -> Self {
        match device {
            Device::Auto => Self::Auto,
            Device::Cpu => Self::Cpu,
            Device::Cuda => Self::Cuda,
        }
    }
}

impl From<Dtype> for config::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Fp32 => Self::Fp32,
            Dtype::Fp16 => Self::Fp16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl Embed {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let mut settings = self.settings();
        if self.who.is_elsewhere() {
            if self.out.is_some() {
                return Err(Fail::usage(
                    "--out: with --write-job and --coordinator no data set is made of .txt files; leave these off and give --workers N, which \
                     makes it and lets others join",
                ));
            }
            let config = JobConfig::new(JobTable::new(JobKind::Embed, self.data.clone()), &settings)?;
            return Ok(self.who.conclude(&self.who.run(&config, self.device.into())?, &config, out));
        }
        let runtime = crate::runtime()?;
        let (url, captions) = runtime.block_on(self.data_set())?;
        if let Some(report) = captions.as_ref().filter(|report| !report.refused.is_empty()) {
            note(table_of(report, &url));
        }
        let begin = Instant::now();
        // Whoever does the work on this machine finds the model there.
        let model = models::locate("--text", &self.text)?;
        settings.text = model.display().to_string();
        let spec = settings.spec(&model)?;
        let config = JobConfig::new(JobTable::new(JobKind::Embed, url.clone()), &settings)?;
        let ran = self.who.run(&config, self.device.into())?;
        if ran.code != DONE {
            return Ok(self.who.conclude(&ran, &config, out));
        }
        let results = ran.status.and_then(|status| status.job).map(|job| job.results).unwrap_or_default();
        let captions_there = runtime.block_on(DataSet::open(&url))?.manifest().samples;
        let seconds = begin.elapsed().as_secs_f64();
        let done = Embedded { captions: captions_there, results, max_tokens: self.max_tokens.into(), seconds };
        let fingerprint = spec.fingerprint().to_string();
        out.result(&done.json(&url, &fingerprint, captions.as_ref()), || done.text(&url, &fingerprint));
        Ok(DONE)
    }

    fn settings(&self) -> EmbedSettings {
        EmbedSettings {
            text: self.text.clone(),
            max_tokens: self.max_tokens as usize,
            padding: self.padding.into(),
            layers: self.layers.into(),
            dtype: self.dtype.into(),
            captions: self.captions.clone(),
            batch: self.batch as usize,
            threads: self.threads as usize,
            gpu_memory: self.gpu_memory,
            split_on_oom: self.split_on_oom,
        }
    }

    /// Where the data set is, and for a folder of .txt files what became of them.
    async fn data_set(&self) -> Result<(String, Option<Report>), Fail> {
        let folder = Path::new(&self.data);
        let prepared = self.data.contains("://") || folder.join(MANIFEST).is_file();
        let out = match (&self.out, prepared) {
            (None, true) => return Ok((self.data.clone(), None)),
            (None, false) if folder.is_dir() && captions_from_txt(folder)?.kept.is_empty() => {
                let hint = "expected a prepared data set (run `ella prepare`), or .txt files";
                return Err(Fail::lasting(format_args!("{}: no {MANIFEST} and no .txt files are there; {hint}", self.data)));
            }
            (None, false) if folder.is_dir() => {
                return Err(Fail::usage(format_args!("{}: a folder of .txt files needs --out DST for its data set", self.data)));
            }
            (None, false) => {
                return Err(Fail::lasting(format_args!("{}: not found (expected a data set or a folder of .txt files)", self.data)));
            }
            (Some(_), true) => {
                return Err(Fail::usage(format_args!("{}: --out is for folders of .txt files; this is a data set", self.data)));
            }
            (Some(out), false) => out,
        };
        let store = Store::open(out)?;
        let name = folder.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        let captions = captions_from_txt(folder)?;
        let report = prepare_captions(captions, name.as_deref().unwrap_or("captions"), &store).await?;
        Ok((out.clone(), Some(report)))
    }
}

/// What was embedded.
struct Embedded {
    captions: u64,
    /// Counts of the units that were done now, by name.
    results: BTreeMap<String, u64>,
    max_tokens: u64,
    seconds: f64,
}

impl Embedded {
    fn count(&self, name: &str) -> u64 {
        self.results.get(name).copied().unwrap_or(0)
    }

    /// What padding costs: 1 would be none. None where nothing was embedded now.
    fn per_kept(&self) -> Option<f64> {
        self.per_token(self.count("tokens_computed"))
    }

    /// What it would cost to pad every caption to the most tokens.
    fn per_kept_if_padded(&self) -> Option<f64> {
        self.per_token(self.count("embedded") * self.max_tokens)
    }

    fn per_token(&self, computed: u64) -> Option<f64> {
        let kept = self.count("tokens_kept");
        (kept > 0).then(|| computed as f64 / kept as f64)
    }

    fn rate(&self) -> f64 {
        self.count("embedded") as f64 / self.seconds.max(1e-9)
    }

    fn json(&self, url: &str, fingerprint: &str, captions: Option<&Report>) -> serde_json::Value {
        json!({
            "data": url, "fingerprint": fingerprint, "captions": self.captions, "embedded": self.count("embedded"),
            "absent": self.count("absent"), "truncated": self.count("truncated"), "tokens_kept": self.count("tokens_kept"),
            "tokens_computed": self.count("tokens_computed"), "tokens_computed_per_token_kept": self.per_kept(),
            "tokens_per_token_kept_if_padded": self.per_kept_if_padded(), "seconds": self.seconds,
            "captions_per_second": self.rate(), "refused": captions.map(|report| &report.refused),
        })
    }

    fn text(&self, url: &str, fingerprint: &str) -> String {
        let mut text = format!("{:>8}  samples\n{:>8}  captions embedded now", self.captions, self.count("embedded"));
        if let (Some(ratio), Some(padded)) = (self.per_kept(), self.per_kept_if_padded()) {
            text += &format!(", in {}: {:.1} captions/s", span(self.seconds), self.rate());
            text += &format!(
                "\n{:>8}  cut at the token limit\n{:>8}  tokens, {ratio:.2} computed for each one kept ({padded:.2} if all were padded to {})",
                self.count("truncated"),
                self.count("tokens_kept"),
                self.max_tokens
            );
        }
        text + &format!("\nfeatures: {}/features/{fingerprint}", url.trim_end_matches('/'))
    }
}
