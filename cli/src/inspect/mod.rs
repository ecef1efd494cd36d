//! `ella inspect`: what a model's folder or file is, and whether ella can use it. Reads headers and configurations, no tensor.

mod look;

use std::path::PathBuf;

use clap::Args;
use look::{Network, Report};

use crate::ui::{DONE, FAILED, Fail, Out, bytes};

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A model: a folder in diffusers' layout or of one network, a single-file checkpoint, a connector, or a LoRA
    #[arg(value_name = "MODEL")]
    model: PathBuf,
}

impl Inspect {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let report = look::look(&self.model)?;
        out.result(&report, || text(&report));
        Ok(if report.usable { DONE } else { FAILED })
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
