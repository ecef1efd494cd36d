//! `ella metrics`: what a run measured, as one table for pandas and others, or for TensorBoard. The run's journal (`metrics/*.jsonl`) stays what
//! counts; this is made of it, whole, and can be made again at any time.

mod events;
mod parquet;
mod table;

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use clap::Args;
use ella_store::Store;
use serde_json::json;

use crate::run::RunFolder;
use crate::ui::{DONE, Fail, Out, bytes, count};
use crate::whole::{appear, partial, write};
use table::Table;

/// The table's name in a run folder.
const FILE: &str = "metrics.parquet";

#[derive(Debug, Args)]
pub(crate) struct Metrics {
    /// The run's folder: a path or URL
    run: String,
    /// The file that is written, by its ending .parquet, .csv or .jsonl; without this, metrics.parquet in the run's folder
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write event files for TensorBoard into this folder instead, with the pictures that the run drew
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    tensorboard: Option<PathBuf>,
}

/// How a table is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Parquet,
    Csv,
    Jsonl,
}

impl Form {
    fn of(path: &Path) -> Result<Self, Fail> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("parquet") => Ok(Self::Parquet),
            Some("csv") => Ok(Self::Csv),
            Some("jsonl") => Ok(Self::Jsonl),
            _ => Err(Fail::usage(format_args!("--out {}: the ending must be .parquet, .csv or .jsonl", path.display()))),
        }
    }

    fn bytes(self, table: &Table) -> Result<Vec<u8>, Fail> {
        match self {
            Self::Parquet => {
                parquet::bytes(table).map_err(|error| Fail::failed(format_args!("the table cannot be written as Parquet ({error})")))
            }
            Self::Csv => Ok(table.csv().into_bytes()),
            Self::Jsonl => Ok(table.jsonl().into_bytes()),
        }
    }
}

impl Metrics {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let form = self.out.as_deref().map(Form::of).transpose()?;
        let runtime = crate::runtime()?;
        let run = runtime.block_on(RunFolder::open(&self.run))?;
        if let Some(folder) = &self.tensorboard {
            return runtime.block_on(tensorboard(&run, folder, out));
        }
        let table = runtime.block_on(measured(&run))?;
        let (file, size) = match (&self.out, form) {
            (Some(path), Some(form)) => (path.display().to_string(), write(path, &form.bytes(&table)?)?),
            _ => (format!("{}/{FILE}", run.store.url()), runtime.block_on(put(&run.store, &table))?),
        };
        let (steps, columns) = (table.rows, table.columns.len());
        let made = json!({ "file": file, "bytes": size, "steps": steps, "columns": columns });
        out.result(&made, || format!("{}, {}, {} in {file}", count(steps, "step"), count(columns, "column"), bytes(size as u64)));
        Ok(DONE)
    }
}

/// Writes `metrics.parquet` into a run's folder, if anything was measured. Readers see the old one or the new one.
pub(crate) async fn keep(run: &RunFolder) -> Result<(), Fail> {
    let metrics = run.metrics().await?;
    if metrics.is_empty() { Ok(()) } else { put(&run.store, &Table::of(&metrics)).await.map(drop) }
}

async fn put(store: &Store, table: &Table) -> Result<usize, Fail> {
    let bytes = Form::Parquet.bytes(table)?;
    let size = bytes.len();
    store.put(FILE, bytes.into()).await?;
    Ok(size)
}

async fn measured(run: &RunFolder) -> Result<Table, Fail> {
    let metrics = run.metrics().await?;
    if metrics.is_empty() {
        return Err(Fail::failed(format_args!("{}/metrics: nothing was measured yet; train the run first", run.store.url())));
    }
    Ok(Table::of(&metrics))
}

async fn tensorboard(run: &RunFolder, folder: &Path, out: Out) -> Result<u8, Fail> {
    let table = measured(run).await?;
    let pictures = events::pictures(&run.store).await?;
    std::fs::create_dir_all(folder).map_err(|error| Fail::io(folder, "made", &error))?;
    // TensorBoard takes what has this in its name. The same name again: it replaces what was made of this run before.
    let path = folder.join("events.out.tfevents.0000000000.ella");
    let mut partial = partial(&path)?;
    let mut records = events::Records::new(BufWriter::new(&mut partial), &path);
    events::write(&table, (&run.store, &pictures), &mut records).await?;
    let size = records.end()?;
    appear(partial, &path)?;
    let made = json!({ "file": path, "bytes": size, "steps": table.rows, "pictures": pictures.len() });
    out.result(&made, || {
        let (steps, pictures) = (count(table.rows, "step"), count(pictures.len(), "picture"));
        format!("{steps} and {pictures}, {} in {}", bytes(size), path.display())
    });
    Ok(DONE)
}
