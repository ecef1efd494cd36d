//! Running the built binary as people and scripts do.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses some of it; helpers of tests are tests

pub(crate) mod collector;

use std::path::Path;
use std::process::{Command, Stdio};

use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind, save};
use tch::{Device, Kind};

/// What a run of `ella` left behind.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// The one JSON object on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        let value: serde_json::Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert!(value.is_object() && self.stdout.trim_end().lines().count() == 1, "{self:?}");
        value
    }

    /// It succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// It failed with this code, and one line that says all of these things, the same for scripts if they asked.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        let said: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("ella: ")).collect();
        assert_eq!(said.len(), 1, "{self:?}");
        for word in words {
            assert!(said[0].contains(word), "expected {word:?}: {self:?}");
        }
        if self.stdout.is_empty() {
            return;
        }
        assert_eq!(self.json()["error"], said[0].strip_prefix("ella: ").unwrap());
    }
}

/// Runs `ella` in a folder.
#[track_caller]
pub(crate) fn ella(folder: &Path, arguments: &[&str]) -> Ran {
    ella_with(folder, &[], arguments)
}

/// The same with variables set in its environment.
#[track_caller]
pub(crate) fn ella_with(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ella"));
    let command = command.args(arguments).envs(variables.iter().copied()).current_dir(folder).stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A folder with small tars, a data set of 16 samples, and random nano models.
pub(crate) fn world() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    ella(dir.path(), &["scenes", "--out", "tars", "--count", "16", "--size", "64", "--per-tar", "8"]).ok();
    ella(dir.path(), &["prepare", "tars", "--out", "data", "--resolution", "64"]).ok();
    ella(dir.path(), &["init-base", "--preset", "nano", "--captions", "data", "--out", "models"]).ok();
    dir
}

/// Writes an untrained connector of 4 heads, for text of the nano models' width.
pub(crate) fn untrained(file: &Path, kind: ConnectorKind, width: i64) {
    untrained_pooled(file, kind, width, None);
}

/// The same with a pooled head, for a base of SDXL's kind.
pub(crate) fn untrained_pooled(file: &Path, kind: ConnectorKind, width: i64, pooled: Option<i64>) {
    let config = ConnectorConfig { layers: 1, latents: 4, heads: 4, pooled, ..ConnectorConfig::new(kind, width, 64) };
    save(file, Connector::init(&config, 3, Device::Cpu).unwrap().tensors(), Kind::Float).unwrap();
}
