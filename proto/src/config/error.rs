//! Why a config cannot be used.

use std::path::PathBuf;

/// Why a config cannot be used. Each names the key, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: cannot be read ({source}); give the path of a run's or job's TOML file")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{origin}: {message}")]
    Syntax {
        /// The file, or the override.
        origin: String,
        /// The parser's words, with line and column.
        message: String,
    },
    /// A job's config where a run's is expected.
    #[error("{origin}: this is a job's config, for `ella-coordinator {origin}` and workers with --coordinator; expected a run's")]
    OfJob {
        /// The file.
        origin: String,
    },
    /// No key of this name exists.
    #[error("{origin}: unknown key `{key}`{}", nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// The file, or the override.
        origin: String,
        /// The key, with its section.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
    },
    /// A value outside its rule.
    #[error("{origin}: `{key}` is {found}, but {rule}")]
    Value {
        /// The file, and whether keys of it were overridden.
        origin: String,
        /// The key, with its section.
        key: &'static str,
        /// The rule.
        rule: String,
        /// The value.
        found: String,
    },
}
