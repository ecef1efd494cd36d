//! `ella prepare`: sources to a prepared data set.

use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use ella_dataset::{LatentEncoder, PrepareOptions, REPORT, Report, Settings, Source, prepare};
use ella_store::Store;
use ella_worker::models;

use crate::latents::VaeLatents;
use crate::ui::{DONE, Fail, Meter, Out};

#[derive(Debug, Args)]
pub(crate) struct Prepare {
    /// WebDataset tars, or folders of them: paths or URLs
    #[arg(required = true, value_name = "SRC")]
    sources: Vec<String>,
    /// Where the data set goes: a path or URL
    #[arg(long, value_name = "DST")]
    out: String,
    /// Side of the square pictures, in pixels
    #[arg(long, default_value_t = 512)]
    resolution: u32,
    /// Smallest accepted length of an original's shorter side, in pixels [default: the resolution, so that nothing is enlarged]
    #[arg(long, value_name = "N")]
    min_edge: Option<u32>,
    /// Fewest words in a caption
    #[arg(long, default_value_t = 1, value_name = "N")]
    min_caption_words: u32,
    /// Most words in a caption
    #[arg(long, value_name = "N")]
    max_caption_words: Option<u32>,
    /// Field of the .json file that holds the caption [default: the .txt file if there is one, else the field `caption`]
    #[arg(long, value_name = "F")]
    caption_field: Option<String>,
    /// JPEG quality of the stored pictures
    #[arg(long, default_value_t = 95)]
    quality: u8,
    /// A shard is closed at this size
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    shard_mib: u64,
    /// Put the source's name before every key, for sources that number their samples alike
    #[arg(long)]
    key_prefix: bool,
    /// Threads that decode and encode pictures [default: one for every core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Also store latents, made by this base model's VAE: a folder, or a hub id
    #[arg(long, value_name = "MODEL")]
    latents: Option<String>,
}

impl Prepare {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let settings = self.settings();
        settings.check()?;
        let store = Store::open(&self.out)?;
        let latents = match &self.latents {
            Some(model) => {
                Some(Arc::new(VaeLatents::load(&models::locate("--latents", model)?, self.resolution)?) as Arc<dyn LatentEncoder>)
            }
            None => None,
        };
        let report = crate::runtime()?.block_on(async {
            let mut sources = Vec::new();
            for source in &self.sources {
                sources.extend(Source::find(source).await?);
            }
            let meter = Mutex::new(Meter::new("prepare", sources.iter().map(Source::bytes).sum()));
            let progress = Arc::new(move |p: &ella_dataset::Progress| {
                let message =
                    format!("bytes of sources, {} of {} done; {} samples read, {} kept", p.sources_done, p.sources, p.read, p.kept);
                meter.lock().unwrap_or_else(PoisonError::into_inner).at(p.bytes_done, &message);
            });
            let options = PrepareOptions { threads: self.threads, latents, progress: Some(progress) };
            prepare(&sources, &store, &settings, &options).await
        })?;
        out.result(&report, || table(&report, store.url()));
        Ok(DONE)
    }

    fn settings(&self) -> Settings {
        Settings {
            min_edge: self.min_edge.unwrap_or(self.resolution),
            min_caption_words: self.min_caption_words,
            max_caption_words: self.max_caption_words,
            caption_field: self.caption_field.clone(),
            jpeg_quality: self.quality,
            // 0 and what is too large to be bytes are refused as out of range.
            shard_bytes: self.shard_mib.saturating_mul(1 << 20),
            key_prefix: self.key_prefix,
            ..Settings::new(self.resolution)
        }
    }
}

/// Counts by reason, and where the whole list is.
pub(crate) fn table(report: &Report, url: &str) -> String {
    let mut text = format!("{:>8}  read\n{:>8}  kept\n{:>8}  refused\n", report.read, report.kept, report.read - report.kept);
    for (why, keys) in &report.refused {
        text += &format!("{:>8}    {why}\n", keys.len());
    }
    if !report.refused.is_empty() {
        text += &format!("every refused key with its reason: {url}/{REPORT}\n");
    }
    text + &format!("data set: {url}")
}
