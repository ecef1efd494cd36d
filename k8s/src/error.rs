//! Why nothing was rendered.

use crate::kustomize::KustomizeError;
use ella_proto::config::ConfigError;

/// Why nothing was rendered. Each names the field, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum RenderError {
    /// The config cannot be used anywhere.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A value that cannot be used in a cluster.
    #[error("`{field}` is {found}, but {rule}")]
    Field {
        /// The flag, or the config's key.
        field: String,
        /// Its value.
        found: String,
        /// The rule.
        rule: String,
    },
    /// A fault of our own files.
    #[error(transparent)]
    Kustomize(#[from] KustomizeError),
    /// What was rendered cannot be written.
    #[error("the manifests cannot be written as YAML ({0})")]
    Yaml(String),
}

pub(crate) fn field(field: &str, found: impl std::fmt::Display, rule: &str) -> RenderError {
    RenderError::Field { field: field.to_owned(), found: found.to_string(), rule: rule.to_owned() }
}
