//! `ella init-base`: random models to try things on, and the captions that their tokenizer learns from.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::PossibleValuesParser;
use ella_dataset::{DataSet, Field, MANIFEST, Sample, Source, captions_from_txt, scenes};
use ella_model::presets::{Preset, init_base};
use serde_json::json;

use crate::ui::{DONE, Fail, Out, count};

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
    /// Folder that gets `base/` and `text/`; files of other bytes that are there already are not replaced
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
        let (base, text) = (self.out.join("base"), self.out.join("text"));
        if base.exists() || text.exists() {
            // A model that somebody trained may be there: what is made is looked at first.
            let made = tempfile::tempdir_in(&self.out).map_err(|error| Fail::io(&self.out, "written", &error))?;
            init_base(preset, self.seed, &captions, made.path())?;
            join(made.path(), &self.out)?;
        } else {
            init_base(preset, self.seed, &captions, &self.out)?;
        }
        let made = json!({ "preset": self.preset, "seed": self.seed, "captions": captions.len(), "base": base, "text": text });
        out.result(&made, || {
            let learned = count(captions.len(), "caption");
            format!("{}: random diffusion model\n{}: random text encoder, its tokenizer from {learned}", base.display(), text.display())
        });
        Ok(DONE)
    }
}

/// Has a folder's files stand in another, where files of the same names and bytes may be already.
fn join(made: &Path, out: &Path) -> Result<(), Fail> {
    let (mut files, mut folders) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        let failed = |error: &std::io::Error| Fail::io(made.join(&folder), "read", error);
        for entry in std::fs::read_dir(made.join(&folder)).map_err(|error| failed(&error))? {
            let entry = entry.map_err(|error| failed(&error))?;
            let name = folder.join(entry.file_name());
            if entry.path().is_dir() { folders.push(name) } else { files.push(name) }
        }
    }
    files.sort();
    let mut new = Vec::new();
    for file in files {
        let there = out.join(&file);
        match same(&made.join(&file), &there) {
            Ok(true) => {}
            Ok(false) => {
                return Err(Fail::lasting(format_args!(
                    "{}: is there already, with other bytes than this model's; nothing was written: give another --out, or remove it",
                    there.display()
                )));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => new.push(file),
            Err(error) => return Err(Fail::io(&there, "read", &error)),
        }
    }
    for file in new {
        let there = out.join(&file);
        let folder = there.parent().unwrap_or(out);
        let moved = std::fs::create_dir_all(folder).and_then(|()| std::fs::rename(made.join(&file), &there));
        moved.map_err(|error| Fail::io(&there, "written", &error))?;
    }
    Ok(())
}

/// Whether two files hold the same bytes.
fn same(one: &Path, other: &Path) -> std::io::Result<bool> {
    let (one, other) = (File::open(one)?, File::open(other)?);
    if one.metadata()?.len() != other.metadata()?.len() {
        return Ok(false);
    }
    let (mut one, mut other) = (BufReader::with_capacity(1 << 20, one), BufReader::with_capacity(1 << 20, other));
    loop {
        let (a, b) = (one.fill_buf()?, other.fill_buf()?);
        let n = a.len().min(b.len());
        if n == 0 {
            return Ok(a.len() == b.len());
        }
        if a[..n] != b[..n] {
            return Ok(false);
        }
        one.consume(n);
        other.consume(n);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_with_other_bytes_is_named_and_kept() {
        let (made, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let put = |folder: &Path, name: &str, text: &str| {
            std::fs::create_dir_all(folder.join(name).parent().unwrap()).unwrap();
            std::fs::write(folder.join(name), text).unwrap();
        };
        let make = || {
            put(made.path(), "base/unet/config.json", "same");
            put(made.path(), "text/model.safetensors", "random");
        };
        make();
        put(out.path(), "base/unet/config.json", "same");
        put(out.path(), "text/model.safetensors", "traind");
        let fail = join(made.path(), out.path()).unwrap_err();
        assert!(fail.code == crate::ui::NO_RETRY && fail.message.contains("text/model.safetensors"), "{}", fail.message);
        assert_eq!(std::fs::read(out.path().join("text/model.safetensors")).unwrap(), b"traind");
        // What was begun is gone on with.
        std::fs::remove_file(out.path().join("text/model.safetensors")).unwrap();
        for _ in 0..2 {
            make();
            join(made.path(), out.path()).unwrap();
            assert_eq!(std::fs::read(out.path().join("text/model.safetensors")).unwrap(), b"random");
        }
    }
}
