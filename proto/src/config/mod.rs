//! A run's config: `RUN.toml`, with overrides; and a job's ([`JobConfig`]). Unknown keys are refused with the nearest known one; every
//! value is checked here, once, so that what carries a [`RunConfig`] may trust it.

mod check;
mod data;
mod error;
mod job;
pub mod job_keys;
mod keys;
mod networks;
mod run;
mod sample;
#[cfg(test)]
mod tests;
mod train;
mod units;
mod workers;

pub use data::{CaptionChoice, Data};
pub use error::ConfigError;
pub use job::{Config, JobConfig, JobKind, JobTable};
pub use networks::{Base, Connector, ConnectorDtype, ConnectorKind, Dtype, Features, Layers, Lora, Padding, Prediction, Text};
pub use run::{OnResume, Run, RunConfig};
pub use sample::{LONGEST_SIDE, Sample, Sampler, Size};
pub use train::{Checkpoint, Compression, Optimizer, Reduction, Schedule, ScheduleKind, Train};
pub use units::{Bytes, MOST_SECONDS, Millis};
pub use workers::{Device, Straggler, Workers};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The text of a config file.
fn text_of(path: &std::path::Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })
}

/// Reads a config of any kind from TOML text, with overrides of the form `section.key=value`; and how errors name its origin then. `full`
/// has every key that exists; a table that is empty there may hold any.
///
/// # Errors
/// No TOML, a key that does not exist (with the nearest that does), or a value of another type. Rules for values are the caller's.
pub fn read<T: Serialize + DeserializeOwned>(
    text: &str,
    origin: &str,
    overrides: &[String],
    full: &impl Serialize,
) -> Result<(T, String), ConfigError> {
    let syntax = |origin: &str, message: String| ConfigError::Syntax { origin: origin.to_owned(), message };
    let known = toml::Table::try_from(full).unwrap_or_default();
    let mut table: toml::Table = text.parse().map_err(|e| syntax(origin, words(text, &e)))?;
    keys::check(&table, &known, origin)?;
    if overrides.is_empty() {
        // Straight from the text, so that the parser's errors carry line and column.
        let config = toml::from_str(text).map_err(|e| syntax(origin, words(text, &e)))?;
        return Ok((config, origin.to_owned()));
    }
    for item in overrides {
        keys::set(&mut table, item)?;
        keys::check(&table, &known, &format!("--set {item}"))?;
    }
    let origin = format!("{origin} with --set");
    let config = table.try_into().map_err(|e: toml::de::Error| syntax(&origin, words("", &e)))?;
    Ok((config, origin))
}

/// A parser's error in one line: its words, and where.
fn words(text: &str, error: &toml::de::Error) -> String {
    let Some(span) = error.span() else { return error.to_string().trim_end().replace('\n', " ") };
    let before = text.get(..span.start).unwrap_or_default();
    let (line, column) = (before.matches('\n').count() + 1, before.rsplit('\n').next().unwrap_or_default().chars().count() + 1);
    format!("line {line}, column {column}: {}", error.message())
}
