//! `ella inspect`: what a model's folder or file is, and whether ella can use it (reads headers and configurations, no tensor); or what is
//! in a prepared data set.

mod data;
mod look;
mod sheet;

use std::path::{Path, PathBuf};

use clap::Args;
use data::DataFacts;
use ella_dataset::DataSet;
use look::{Network, Report};

use crate::ui::{DONE, FAILED, Fail, Out, bytes, note};
use crate::whole;

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A prepared data set (path or URL); or a model: a folder in diffusers' layout or of one network, a single-file checkpoint, a
    /// connector, or a LoRA
    #[arg(value_name = "DATA|MODEL")]
    path: String,
    /// Also write a data set's contact sheet: pictures with captions and sizes, and histograms
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Also tell what a data set's captions are like, column by column, beside the ELLA paper's Table 1
    #[arg(long)]
    stats: bool,
    /// With --stats, count tokens too, special ones included, as this text encoder's tokenizer makes them (the paper's are CLIP's)
    #[arg(long, value_name = "MODEL", requires = "stats")]
    tokenizer: Option<String>,
}

impl Inspect {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let runtime = crate::runtime()?;
        if runtime.block_on(data::is_data(&self.path))? {
            return runtime.block_on(self.data(out));
        }
        if let Some(option) =
            [("--html", self.html.is_some()), ("--stats", self.stats)].iter().find_map(|(name, given)| given.then_some(name))
        {
            return Err(Fail::usage(format_args!("{}: {option} is for prepared data sets, and this is none", self.path)));
        }
        runtime.block_on(data::refuse_others(&self.path))?;
        let report = look::look(Path::new(&self.path))?;
        out.result(&report, || text(&report));
        Ok(if report.usable { DONE } else { FAILED })
    }
}

impl Inspect {
    async fn data(&self, out: Out) -> Result<u8, Fail> {
        let set = DataSet::open(&self.path).await?;
        let mut facts = DataFacts::of(&set).await?;
        if self.stats {
            facts.stats = data::stats(&set, self.tokenizer.as_deref()).await?;
        }
        if let Some(file) = &self.html {
            let page = sheet::page(&facts, &data::look(&set).await?);
            whole::write(file, page.as_bytes())?;
            note(format_args!("contact sheet: {}", file.display()));
        }
        out.result(&facts, || facts.text());
        Ok(DONE)
    }
}

fn text(report: &Report) -> String {
    let mut text = format!("{}: {}", report.path.display(), report.what);
    if let Some(prediction) = report.prediction_type {
        text += &format!(", predicts {prediction}");
    }
    let width = report.networks.iter().map(|network| network.name.len()).max().unwrap_or(0);
    for network in &report.networks {
        text += &format!("\n  {:width$}  {}", network.name, line(network));
    }
    for (field, value) in &report.trained {
        text += &format!("\n  {field}: {value}");
    }
    let notes = [("", &report.notes), ("missing: ", &report.missing), ("not used: ", &report.unused), ("problem: ", &report.problems)];
    for (label, notes) in notes {
        for note in notes {
            text += &format!("\n  {label}{note}");
        }
    }
    text + if report.usable { "\nella can use it" } else { "\nella cannot use it" }
}

fn line(network: &Network) -> String {
    let formats: Vec<&str> = network.dtypes.keys().map(String::as_str).collect();
    let millions = network.parameters as f64 / 1e6;
    format!("{}: {millions:.1} M parameters, {} of {}", network.what, bytes(network.bytes), formats.join(", "))
}
