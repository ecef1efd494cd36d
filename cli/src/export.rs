//! `ella export`: a run's newest connector, in the official key layout.

use std::path::{Path, PathBuf};

use clap::Args;
use ella_model::connector::{self, Connector, DEFAULT_HEADS};
use ella_proto::config::{Layers, Padding, RunConfig};
use ella_store::{Commit, Digest};
use ella_worker::draw::FILLED_UP;
use ella_worker::train::state::{CONNECTOR_FILE, EMA_FILE};
use serde_json::json;
use tch::Device;

use crate::forward::Dtype;
use crate::run::RunFolder;
use crate::ui::{DONE, Fail, Out};

/// What `ella sample` must be given to draw as the run was trained, where that is not its default.
fn flags(config: &RunConfig) -> Vec<String> {
    let (text, heads) = (&config.text, config.connector.heads);
    let flags = [
        (text.padding == Padding::None).then(|| ["--padding".to_owned(), "none".to_owned()]),
        (text.max_tokens != FILLED_UP).then(|| ["--max-tokens".to_owned(), text.max_tokens.to_string()]),
        (text.layers == Layers::Average).then(|| ["--layers".to_owned(), "average".to_owned()]),
        (heads as i64 != DEFAULT_HEADS).then(|| ["--heads".to_owned(), heads.to_string()]),
    ];
    flags.into_iter().flatten().flatten().collect()
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// The run's folder: a path or URL
    run: String,
    /// The safetensors file that is written
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The moving average of the weights instead of the weights
    #[arg(long)]
    ema: bool,
    /// Number format of the file; fp16 is that of the released connectors
    #[arg(long, value_parser = ["fp32", "fp16"], default_value = "fp32")]
    dtype: String,
}

impl Export {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let runtime = crate::runtime()?;
        let run = runtime.block_on(RunFolder::open(&self.run))?;
        let state = runtime.block_on(run.state())?;
        let commit = state.last_commit().ok_or_else(|| {
            Fail::failed(format_args!(
                "{}: the run has no commit yet; train it at least to its first one (checkpoint.every)",
                run.store.url()
            ))
        })?;
        let bytes = runtime.block_on(self.fetch(&run, commit))?;
        self.write(&bytes, run.config.connector.heads as i64)?;
        let (file, size) = Digest::of_file(&self.out).map_err(|error| Fail::io(&self.out, "read", &error))?;
        let flags = flags(&run.config);
        let made = json!({
            "step": commit.step, "ema": self.ema, "dtype": self.dtype, "file": self.out, "bytes": size, "blake3": file, "flags": flags,
        });
        out.result(&made, || {
            let what = if self.ema { "moving average" } else { "connector" };
            let made = format!("{} of step {} in {}: {}", what, commit.step, self.dtype, self.out.display());
            match flags.join(" ") {
                flags if flags.is_empty() => made,
                flags => format!("{made}\nthe file does not tell how it was trained: draw with {flags}"),
            }
        });
        Ok(DONE)
    }

    /// The commit's file, checked against the digest in its record (COMMIT).
    async fn fetch(&self, run: &RunFolder, commit: &Commit) -> Result<Vec<u8>, Fail> {
        let name = if self.ema { EMA_FILE } else { CONNECTOR_FILE };
        let folder = run.store.child(&commit.folder);
        let part = commit.parts.iter().find(|part| part.name == name);
        let part = part.ok_or_else(|| Fail::lasting(format_args!("{}: the commit's record names no {name}", folder.url())))?;
        Ok(folder.get_verified(name, &part.blake3, part.bytes).await?.to_vec())
    }

    /// Loads the bytes as the network they must be, and writes them in the number format asked for. The file appears whole or not at all.
    fn write(&self, bytes: &[u8], heads: i64) -> Result<(), Fail> {
        let folder = self.out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let partial =
            tempfile::Builder::new().suffix(".safetensors").tempfile_in(folder).map_err(|error| Fail::io(&self.out, "written", &error))?;
        std::fs::write(partial.path(), bytes).map_err(|error| Fail::io(&self.out, "written", &error))?;
        let dtype = if self.dtype == "fp16" { Dtype::Fp16 } else { Dtype::Fp32 };
        let network = Connector::load(partial.path(), heads, dtype.kind(), Device::Cpu)?;
        Ok(connector::save(&self.out, network.tensors(), dtype.kind())?)
    }
}
