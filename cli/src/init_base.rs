//! `ella init-base`: random models to try things on, and the captions that their tokenizer learns from.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::PossibleValuesParser;
use ella_dataset::{DataSet, Field, MANIFEST, Sample, Source, captions_from_txt, scenes};
use ella_model::presets::{Preset, init_base};
use serde_json::json;

use crate::ui::{DONE, Fail, Out};

/// Scenes whose captions the tokenizer learns from if no others are given.
const SCENES: u64 = 2000;

#[derive(Debug, Args)]
pub(crate) struct InitBase {
    /// Shape of the models: nano and nano-sdxl train on two cores; sd15 and sdxl are those models' own
    #[arg(long, value_parser = PossibleValuesParser::new(Preset::NAMES.map(|(name, _)| name)))]
    preset: String,
    /// What the weights are drawn from; the same seed gives the same bytes
    #[arg(long, default_value_t = 7, value_name = "N")]
    seed: u64,
    /// What the tokenizer learns from: .txt files or folders of them, WebDataset tars, prepared data sets [default: captions of scenes]
    #[arg(long, num_args = 1.., value_name = "FILE|DIR")]
    captions: Vec<PathBuf>,
    /// Folder that gets `base/` and `text/`
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl InitBase {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let preset: Preset = self.preset.parse()?;
        let mut captions = Vec::new();
        for path in &self.captions {
            let before = captions.len();
            crate::runtime()?.block_on(read(path, &mut captions))?;
            if captions.len() == before {
                let expected = "expected .txt files, WebDataset tars with captions, or a prepared data set";
                return Err(Fail::lasting(format_args!("{}: no caption is there ({expected}); give another path", path.display())));
            }
        }
        if self.captions.is_empty() {
            captions.extend((0..SCENES).map(|index| scenes::scene(0, index).dense_caption()));
        }
        init_base(preset, self.seed, &captions, &self.out)?;
        let (base, text) = (self.out.join("base"), self.out.join("text"));
        let made = json!({ "preset": self.preset, "seed": self.seed, "captions": captions.len(), "base": base, "text": text });
        out.result(&made, || {
            let learned = captions.len();
            format!(
                "{}: random diffusion model\n{}: random text encoder, its tokenizer from {learned} captions",
                base.display(),
                text.display()
            )
        });
        Ok(DONE)
    }
}

/// Adds the captions that a file or folder holds, whatever its kind.
async fn read(path: &Path, captions: &mut Vec<String>) -> Result<(), Fail> {
    if path.is_dir() {
        read_folder(path, captions).await
    } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tar")) {
        read_tars(path, captions).await
    } else {
        let text = std::fs::read_to_string(path).map_err(|error| Fail::io(path, "read", &error))?;
        captions.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        Ok(())
    }
}

async fn read_folder(path: &Path, captions: &mut Vec<String>) -> Result<(), Fail> {
    if path.join(MANIFEST).is_file() {
        let data = DataSet::open(&path.display().to_string()).await?;
        for shard in 0..data.manifest().shards.len() {
            captions.extend(data.shard(shard).await?.iter().map(|row| row.caption.to_owned()));
        }
        return Ok(());
    }
    captions.extend(captions_from_txt(path)?.kept.into_iter().map(|(_, caption)| caption));
    let entries = std::fs::read_dir(path).map_err(|error| Fail::io(path, "read", &error))?;
    let has_tars = entries.flatten().any(|entry| entry.path().extension().is_some_and(|e| e == "tar"));
    if has_tars { read_tars(path, captions).await } else { Ok(()) }
}

async fn read_tars(path: &Path, captions: &mut Vec<String>) -> Result<(), Fail> {
    for source in Source::find(&path.display().to_string()).await? {
        let pieces = source.pieces().await?;
        let reading = tokio::task::spawn_blocking(move || {
            let mut found = Vec::new();
            for piece in &pieces {
                source.read(piece, &mut |sample| {
                    found.extend(caption(&sample));
                    true
                })?;
            }
            Ok::<_, ella_dataset::DataError>(found)
        });
        captions.extend(reading.await.map_err(Fail::failed)??);
    }
    Ok(())
}

/// A sample's caption, if it has a readable one; `ella prepare` is who counts those that do not.
fn caption(sample: &Sample) -> Option<String> {
    match sample.fields.get("txt").or_else(|| sample.fields.get("caption"))? {
        Field::Text(text) => Some(text.clone()),
        _ => None,
    }
}
