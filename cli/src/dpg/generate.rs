//! `ella dpg generate`: every prompt of a set as a grid of four pictures, by a connector or by the base's own CLIP.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::Args;
use ella_dataset::Prompts;
use ella_model::sampler::Method;
use ella_model::schedule::Prediction;
use ella_proto::config::{self, JobConfig, JobKind, JobTable, Sampler, Size};
use ella_store::Store;
use ella_worker::grids::{DRAWN, DrawSettings, Found, RECORD, REPLACED, Record, THERE};
use ella_worker::trained::Trained;
use serde_json::json;

use super::TILES;
use crate::jobs::Who;
use crate::lora::Loras;
use crate::sampling::{HowDrawn, HowRead};
use crate::ui::{DONE, Fail, Out, note, span};

#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// What to draw: a folder of .txt files, a prompt each, whose names without .txt name the grids; or a .csv file with the columns item_id
    /// and text. A path or URL
    #[arg(long, value_name = "DIR|CSV", required_unless_present = "coordinator", default_value = "", hide_default_value = true)]
    prompts: String,
    /// Where the grids go, one ITEM_ID.png for each prompt, and generate.json, which says how they are made: a path or URL
    #[arg(long, value_name = "DIR", required_unless_present = "coordinator", default_value = "", hide_default_value = true)]
    out: String,
    /// The trained connector: a safetensors file, or org/name/file.safetensors on the hub
    #[arg(long, value_name = "FILE", required_unless_present_any = ["only_clip", "coordinator"], requires = "text")]
    connector: Option<String>,
    /// Draw by the base's own CLIP, without a connector: what a connector is compared with
    #[arg(long, conflicts_with_all = ["connector", "text", "with_clip", "padding", "negative_padding", "max_tokens", "layers", "text_dtype", "heads"])]
    only_clip: bool,
    /// The diffusion model: a folder, a single-file checkpoint, or a hub id
    #[arg(long, value_name = "MODEL", required_unless_present = "coordinator", default_value = "", hide_default_value = true)]
    base: String,
    #[command(flatten)]
    loras: Loras,
    /// The text encoder that the connector was trained with: a folder, or a hub id
    #[arg(long, value_name = "MODEL", requires = "connector")]
    text: Option<String>,

    /// What not to draw [default: the empty text]
    #[arg(long, value_name = "N", help_heading = "What to draw")]
    negative: Option<String>,
    /// What each tile's own seed follows from, with its prompt's name and its place in the grid: the same with and without a connector
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64), help_heading = "What to draw")]
    seed: u64,
    /// Side of a tile in pixels, a multiple of the VAE's 8 [default: the base's own]
    #[arg(long, value_name = "PIXELS", help_heading = "What to draw")]
    size: Option<Size>,

    #[command(flatten)]
    read: HowRead,
    #[command(flatten)]
    how: HowDrawn,
    /// Threads that compute, of each worker; the pictures' last bits depend on it
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "How to draw")]
    threads: u32,
    #[command(flatten)]
    who: Who,
}

impl Generate {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let (settings, device) = (self.settings(), self.how.device.into());
        let config = JobConfig::new(JobTable::new(JobKind::Draw, self.out.clone()), &settings)?;
        if self.who.is_elsewhere() {
            return Ok(self.who.conclude(&self.who.run(&config, device)?, &config, out));
        }
        let (begin, store) = (Instant::now(), self.check(&settings)?);
        let ran = self.who.run(&config, device)?;
        if ran.code != DONE {
            return Ok(self.who.conclude(&ran, &config, out));
        }
        let results = ran.status.and_then(|status| status.job).map(|job| job.results).unwrap_or_default();
        let missing = || Fail::failed(format_args!("{}/{RECORD}: is gone; run the same command again", store.url()));
        let record = crate::runtime()?.block_on(Record::read(&store))?.ok_or_else(missing)?;
        let made = Generated { out: store.url(), record: &record, results, seconds: begin.elapsed().as_secs_f64() };
        out.result(&made.json(), || made.text());
        Ok(DONE)
    }

    /// What can be known to be wrong before minutes of work, and before workers are started; and where the grids go.
    fn check(&self, settings: &DrawSettings) -> Result<Store, Fail> {
        settings.check("ella dpg generate")?;
        let store = Store::open(&self.out)?;
        crate::runtime()?.block_on(Prompts::read(&self.prompts))?;
        // Whoever does the work on this machine finds the models there.
        Found::find(settings)?.otherwise().for_each(|told| note(format_args!("WARNING: {told}")));
        Ok(store)
    }

    fn settings(&self) -> DrawSettings {
        let (read, how) = (&self.read, &self.how);
        let Trained { padding, max_tokens, layers, text_dtype, .. } = read.asked();
        DrawSettings {
            prompts: self.prompts.clone(),
            base: self.base.clone(),
            loras: self.loras.config(),
            connector: self.connector.clone(),
            heads: how.heads,
            text: self.text.clone(),
            with_clip: read.with_clip,
            padding,
            negative_padding: read.negative_padding.map(Into::into),
            max_tokens,
            layers,
            text_dtype,
            negative: self.negative.clone(),
            seed: self.seed,
            size: self.size,
            sampler: sampler(how.sampler),
            steps: how.steps,
            guidance: how.guidance,
            prediction: how.prediction.map(prediction),
            batch: how.batch as usize,
            dtype: how.dtype.into(),
            threads: self.threads as usize,
        }
    }
}

/// As a config names it.
fn sampler(method: Method) -> Sampler {
    match method {
        Method::Ddim => Sampler::Ddim,
        Method::Euler => Sampler::Euler,
        Method::EulerAncestral => Sampler::EulerAncestral,
        Method::Dpm2M => Sampler::Dpm2M,
        Method::Dpm2MKarras => Sampler::Dpm2MKarras,
    }
}

/// As a config names it.
fn prediction(prediction: Prediction) -> config::Prediction {
    match prediction {
        Prediction::Epsilon => config::Prediction::Epsilon,
        Prediction::Velocity => config::Prediction::VPrediction,
        Prediction::Sample => config::Prediction::Sample,
    }
}

/// What was drawn.
struct Generated<'a> {
    out: &'a str,
    record: &'a Record,
    /// Counts of the units that were done now, by name.
    results: BTreeMap<String, u64>,
    seconds: f64,
}

impl Generated<'_> {
    fn count(&self, name: &str) -> u64 {
        self.results.get(name).copied().unwrap_or(0)
    }

    fn json(&self) -> serde_json::Value {
        let Record { resolution, images, cut, settings, .. } = self.record;
        json!({
            "out": self.out, "record": format!("{}/{RECORD}", self.out), "resolution": resolution, "prompts": images.len(),
            "tiles": images.len() * usize::from(TILES), DRAWN: self.count(DRAWN), THERE: self.count(THERE), REPLACED: self.count(REPLACED),
            "connector": settings.connector, "truncated": cut.text, "clip_truncated": cut.clip, "seconds": self.seconds,
        })
    }

    fn text(&self) -> String {
        let Record { resolution, images, cut, .. } = self.record;
        let (drawn, replaced) = (self.count(DRAWN), self.count(REPLACED));
        let mut text = format!("{:>8}  grids of 2×2 tiles of {resolution}×{resolution}", images.len());
        text += &format!("\n{drawn:>8}  drawn now, in {}\n{:>8}  there already", span(self.seconds), self.count(THERE));
        if replaced > 0 {
            text += &format!("\n{replaced:>8}  there, damaged, and drawn again");
        }
        for (whose, cut) in [("the text encoder", cut.text), ("CLIP", cut.clip)] {
            if let Some(cut) = cut.filter(|cut| *cut > 0) {
                text += &format!("\n{cut:>8}  {} cut at {whose}'s longest", if cut == 1 { "prompt" } else { "prompts" });
            }
        }
        text + &format!("\nfor a scorer: --resolution {resolution}\ngrids: {}\nhow they are made: {0}/{RECORD}", self.out)
    }
}
