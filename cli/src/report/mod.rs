//! `ella report`: a run on one page that needs nothing else. Every number comes from the run's folder.

mod chart;
mod facts;
mod numbers;
mod page;
mod samples;

use std::path::PathBuf;

use base64::Engine;
pub(crate) use chart::short;
use clap::Args;
use facts::Facts;
pub(crate) use page::{date, document, escape, scroll};
use serde_json::json;

use crate::audit::Verdict;
use crate::ui::{DONE, Fail, Out};
use crate::whole;

#[derive(Debug, Args)]
pub(crate) struct Report {
    /// The run's folder: a path or URL
    run: String,
    /// The HTML file that is written
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// A PNG of pictures drawn with the connector (`ella sample`)
    #[arg(long, value_name = "PNG")]
    samples: Option<PathBuf>,
    /// The audit's verdict (`ella audit RUN --json`)
    #[arg(long, value_name = "JSON")]
    audit: Option<PathBuf>,
    /// The page's title
    #[arg(long, default_value = "ELLA training run")]
    title: String,
}

impl Report {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let mut facts = crate::runtime()?.block_on(Facts::read(&self.run))?;
        facts.title.clone_from(&self.title);
        facts.audit = self.audit.as_ref().map(|file| read_audit(file, &facts)).transpose()?;
        facts.samples = self.samples.as_ref().map(read_png).transpose()?;
        let numbers = facts.numbers();
        let page = page::page(&facts, &numbers);
        whole::write(&self.out, page.as_bytes())?;
        let held_out =
            numbers.held_out.map(|tenths| json!({ "first_tenth": tenths.first, "last_tenth": tenths.last, "ratio": tenths.ratio() }));
        let training =
            numbers.training.map(|tenths| json!({ "first_tenth": tenths.first, "last_tenth": tenths.last, "ratio": tenths.ratio() }));
        let made = json!({
            "report": self.out, "step": numbers.step, "held_out_loss": held_out, "training_loss": training,
            "samples_per_second": numbers.samples_per_second, "terms": facts.terms.len(), "commits": facts.commits.len(),
        });
        out.result(&made, || {
            let line = |name: &str, tenths: Option<numbers::Tenths>| match tenths {
                Some(t) => {
                    format!("{name}  {:.4} over the first tenth of the steps, {:.4} over the last: ×{:.3}\n", t.first, t.last, t.ratio())
                }
                None => String::new(),
            };
            format!(
                "{}{}report         {}",
                line("held-out loss", numbers.held_out),
                line("training loss", numbers.training),
                self.out.display()
            )
        });
        Ok(DONE)
    }
}

fn read_audit(file: &PathBuf, facts: &Facts) -> Result<Verdict, Fail> {
    let text = std::fs::read_to_string(file).map_err(|error| Fail::io(file, "read", &error))?;
    let hint = "give the output of `ella audit RUN --json`";
    let bad = |error| Fail::lasting(format_args!("{}: is no audit's verdict ({error}); {hint}", file.display()));
    let verdict: Verdict = serde_json::from_str(&text).map_err(bad)?;
    if verdict.id == facts.id {
        return Ok(verdict);
    }
    let (file, other, this) = (file.display(), &verdict.run, &facts.run);
    Err(Fail::lasting(format_args!("{file}: is the audit of another run, {other}; give the output of `ella audit {this} --json`")))
}

/// A PNG's bytes, ready to stand in a page.
fn read_png(file: &PathBuf) -> Result<String, Fail> {
    let bytes = std::fs::read(file).map_err(|error| Fail::io(file, "read", &error))?;
    if !bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return Err(Fail::lasting(format_args!("{}: is not a PNG; give what `ella sample` wrote", file.display())));
    }
    Ok(base64::engine::general_purpose::STANDARD.encode(bytes))
}
