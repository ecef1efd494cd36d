//! `ella embed`: the text encoder's features of every caption.

use std::path::Path;

use clap::{Args, ValueEnum};
use ella_dataset::{DataSet, MANIFEST, Report, captions_from_txt, prepare_captions};
use ella_proto::config;
use ella_store::Store;
use ella_worker::embed::{EmbedReport, embed};
use ella_worker::text::{TextEncoder, TextOptions, identity};
use ella_worker::{device, feed, models};
use serde_json::json;

use crate::forward::Dtype;
use crate::prepare::table;
use crate::ui::{DONE, Fail, Meter, Out, note, span};

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
    /// Where the data set of a folder of .txt files goes
    #[arg(long, value_name = "DST")]
    out: Option<String>,
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
        let runtime = crate::runtime()?;
        let model = models::locate("--text", &self.text)?;
        let device = device::set_up(self.device.into(), self.threads as usize)?;
        let (url, captions) = runtime.block_on(self.data_set())?;
        if let Some(report) = captions.as_ref().filter(|report| !report.refused.is_empty()) {
            note(table(report, &url));
        }
        let data = runtime.block_on(DataSet::open(&url))?;
        let (dtype, padding, layers) = (self.dtype.into(), self.padding.into(), self.layers.into());
        let options = TextOptions { model: model.clone(), max_tokens: self.max_tokens as usize, padding, layers, dtype };
        let encoder = TextEncoder::load(&options, device)?;
        let text = config::Text {
            model: self.text.clone(),
            max_tokens: options.max_tokens,
            padding,
            layers,
            features: config::Features::Cached,
            dtype,
        };
        let spec = feed::spec(&text, &identity(&model, options.max_tokens)?)?;
        let mut meter = Meter::new("embed", data.manifest().samples);
        let mut begun = false;
        let mut progress = |done| {
            if !begun {
                meter.starts_at(done);
                begun = true;
            }
            meter.at(done, "captions");
        };
        let done = embed(&data, &encoder, &spec, self.batch as usize, (runtime.handle(), &mut progress))?;
        drop(meter);
        let fingerprint = spec.fingerprint().to_string();
        out.result(&self.json(&done, &url, &fingerprint, captions.as_ref()), || human(&done, &url, &fingerprint));
        Ok(DONE)
    }

    /// Where the data set is, and for a folder of .txt files what became of them.
    async fn data_set(&self) -> Result<(String, Option<Report>), Fail> {
        let folder = Path::new(&self.data);
        let prepared = self.data.contains("://") || folder.join(MANIFEST).is_file();
        let out = match (&self.out, prepared) {
            (None, true) => return Ok((self.data.clone(), None)),
            (None, false) if folder.is_dir() && captions_from_txt(folder)?.kept.is_empty() => {
                let hint = "expected a prepared data set (run `ella prepare`), or .txt files";
                return Err(Fail::failed(format_args!("{}: no {MANIFEST} and no .txt files are there; {hint}", self.data)));
            }
            (None, false) if folder.is_dir() => {
                return Err(Fail::usage(format_args!("{}: a folder of .txt files needs --out DST for its data set", self.data)));
            }
            (None, false) => {
                return Err(Fail::failed(format_args!("{}: not found (expected a data set or a folder of .txt files)", self.data)));
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

    fn json(&self, done: &EmbedReport, url: &str, fingerprint: &str, captions: Option<&Report>) -> serde_json::Value {
        json!({
            "data": url, "fingerprint": fingerprint, "captions": done.captions, "embedded": done.embedded, "truncated": done.truncated,
            "tokens_kept": done.tokens_kept, "tokens_computed": done.tokens_computed,
            "tokens_computed_per_token_kept": per_kept(done), "seconds": done.took.as_secs_f64(), "captions_per_second": rate(done),
            "refused": captions.map(|report| &report.refused),
        })
    }
}

/// What padding costs: 1 would be none. Null where nothing was embedded now.
fn per_kept(done: &EmbedReport) -> Option<f64> {
    (done.tokens_kept > 0).then(|| done.tokens_computed as f64 / done.tokens_kept as f64)
}

fn rate(done: &EmbedReport) -> f64 {
    done.embedded as f64 / done.took.as_secs_f64().max(1e-9)
}

fn human(done: &EmbedReport, url: &str, fingerprint: &str) -> String {
    let mut text = format!("{:>8}  captions\n{:>8}  embedded now", done.captions, done.embedded);
    if let Some(ratio) = per_kept(done) {
        text += &format!(", in {}: {:.1} captions/s", span(done.took.as_secs_f64()), rate(done));
        text += &format!(
            "\n{:>8}  cut at the token limit\n{:>8}  tokens, {ratio:.2} computed for each one kept",
            done.truncated, done.tokens_kept
        );
    }
    text + &format!("\nfeatures: {}/features/{fingerprint}", url.trim_end_matches('/'))
}
