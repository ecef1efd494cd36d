//! The commands that add to a data set and tell of it, as people type them: `caption`, `status`, `inspect`, `plan`, `verify`.

mod captioning;
mod endpoint;
mod looking;

use anyhow::{Context as _, Result};
use ella_dataset::DataSet;
use ella_tests::ella;
use std::path::Path;

/// Renders scenes and prepares them, a few to each shard. Gives the data set's path.
fn prepared(folder: &Path, scenes: usize) -> Result<String> {
    let (tars, data) = (folder.join("scenes").display().to_string(), folder.join("data").display().to_string());
    ella(&["scenes", "--out", &tars, "--count", &scenes.to_string(), "--seed", "4", "--size", "64", "--per-tar", "8"])?;
    ella(&["prepare", &tars, "--out", &data, "--resolution", "64"])?;
    Ok(data)
}

/// A command's one JSON object.
fn json(arguments: &[&str]) -> Result<serde_json::Value> {
    let out = ella(&[arguments, &["--json"]].concat())?;
    serde_json::from_str(&out).with_context(|| out)
}

/// The captions of a column, in the order of the rows.
fn captions(data: &str, column: &str) -> Result<Vec<String>> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let data = DataSet::open(data).await?;
        let mut all = Vec::new();
        for shard in 0..data.manifest().shards.len() {
            all.extend(data.captions(column, shard).await?);
        }
        Ok(all)
    })
}
