//! `ella export`: a run's newest connector, in the official key layout.

use std::path::PathBuf;

use clap::Args;
use ella_model::connector::Connector;
use ella_model::weights::encode_telling;
use ella_proto::config::RunConfig;
use ella_store::{Commit, Digest};
use ella_worker::train::state::{CONNECTOR_FILE, EMA_FILE};
use ella_worker::trained::Trained;
use serde_json::json;
use tch::Device;

use crate::forward::Dtype;
use crate::run::RunFolder;
use crate::ui::{DONE, Fail, Out};
use crate::whole;

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
        let bytes = self.made_of(&runtime.block_on(self.fetch(&run, commit))?, &run.config)?;
        let (file, size, digest) = (&self.out, whole::write(&self.out, &bytes)?, Digest::of(&bytes));
        let made = json!({ "step": commit.step, "ema": self.ema, "dtype": self.dtype, "file": file, "bytes": size, "blake3": digest });
        out.result(&made, || {
            let what = if self.ema { "moving average" } else { "connector" };
            format!("{} of step {} in {}: {}", what, commit.step, self.dtype, self.out.display())
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

    /// Loads a commit's bytes as the network they must be; as a file in the number format asked for, with how it was trained.
    fn made_of(&self, bytes: &[u8], config: &RunConfig) -> Result<Vec<u8>, Fail> {
        let read = whole::partial(&self.out)?;
        std::fs::write(read.path(), bytes).map_err(|error| Fail::io(&self.out, "written", &error))?;
        let kind = if self.dtype == "fp16" { Dtype::Fp16 } else { Dtype::Fp32 }.kind();
        let weights = Connector::open(read.path())?;
        // Which text encoder the run had only the commit knows; those of earlier versions tell nothing.
        let trained = Trained::by(config, Trained::told(&weights)?.text);
        let network = Connector::from_weights(weights, trained.heads, kind, Device::Cpu)?;
        Ok(encode_telling(&self.out, network.tensors(), &trained.fields())?)
    }
}
