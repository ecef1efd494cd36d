//! What Prometheus is told, at `/metrics`: the text format 0.0.4, or OpenMetrics 1.0 for who asks for it.
//!
//! [`ALL`] is the one list of metrics: what is written, the reference in `docs/metrics.md`, and the tests of the dashboard and of the alert rules
//! are made from it. Names follow Prometheus' conventions: base units, `_total` for what only rises, `_info` for what is told by labels. Labels
//! have values of a known, small number: of ranks only the first [`MOST_RANKS`] are told one by one, and of larger worlds the least, the mean and
//! the most.
//!
//! All of it is a function of the [status](crate::status::StatusReport) and of what this process knows of itself; nothing is gathered here.

mod process;
mod run;
mod table;
mod text;

pub use process::{Usage, usage};
pub use run::{MOST_RANKS, render};
pub use table::*;
pub use text::Format;

/// What a metric's value does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It rises and falls.
    Gauge,
    /// It only rises, and begins anew with each coordinator.
    Counter,
    /// Counts by size, with their sum.
    Histogram,
    /// Always 1: the labels tell.
    Info,
}

/// What a metric speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// A run or a job.
    Any,
    /// A run.
    Run,
    /// A job of leased units.
    Job,
    /// The coordinator's own process.
    Process,
}

/// A label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// Its values, where all are known; else what they are, in a word.
    pub values: Values,
}

/// The values of a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// These.
    Of(&'static [&'static str]),
    /// Not known beforehand, but at most so many.
    Some {
        /// What they are.
        what: &'static str,
        /// How many at most.
        most: usize,
    },
}

/// A metric, as it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its name in the text format 0.0.4.
    pub name: &'static str,
    /// What its value does.
    pub kind: Kind,
    /// Its labels, beside those that the one who reads it adds.
    pub labels: &'static [Label],
    /// What it speaks of.
    pub of: Of,
    /// What it is, in a sentence.
    pub help: &'static str,
}

impl Metric {
    /// The base unit at the end of its name, if it has one.
    pub fn unit(&self) -> Option<&'static str> {
        let name = self.name.strip_suffix("_total").unwrap_or(self.name);
        ["seconds", "bytes", "ratio"].into_iter().find(|unit| name.strip_suffix(unit).is_some_and(|rest| rest.ends_with('_')))
    }

    /// The names under which its values are told.
    pub fn series(&self) -> Vec<String> {
        match self.kind {
            Kind::Histogram => ["_bucket", "_sum", "_count"].map(|suffix| format!("{}{suffix}", self.name)).to_vec(),
            _ => vec![self.name.to_owned()],
        }
    }
}
