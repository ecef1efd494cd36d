//! What can go wrong with a network, its files and its configuration.

use std::fmt::Display;
use std::path::PathBuf;

/// A result whose error is a [`ModelError`].
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

/// Why a network could not be read, built, run or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file or folder that must be there is not.
    #[error("{}: not found (expected {expected}); check the path", file.display())]
    MissingFile {
        /// The path that was looked for.
        file: PathBuf,
        /// What was expected there.
        expected: String,
    },
    /// The operating system refused to read a file.
    #[error("{}: cannot be read ({source}); check that it exists and its permissions", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The operating system refused to write a file.
    #[error("{}: cannot be written ({source}); check the folder's permissions and free space", file.display())]
    Unwritable {
        /// The file.
        file: PathBuf,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A safetensors file whose length is not what its header promises.
    #[error(
        "{}: is cut short or damaged ({rule}, found {found} bytes); copy or download it again", file.display()
    )]
    Truncated {
        /// The file.
        file: PathBuf,
        /// What the length should have been.
        rule: &'static str,
        /// The file's length in bytes.
        found: u64,
    },
    /// A file that does not start with a safetensors header.
    #[error("{}: is not a safetensors file ({reason}); give a file written by safetensors", file.display())]
    NotSafetensors {
        /// The file.
        file: PathBuf,
        /// What is wrong with its header.
        reason: String,
    },
    /// Weights kept as a Python pickle, which can run code when it is read.
    #[error(
        "{}: is a PyTorch pickle, which is refused because reading one can run code; convert it to safetensors \
         (save_pretrained(..., safe_serialization=True)) and give that", file.display()
    )]
    Pickle {
        /// The file.
        file: PathBuf,
    },
    /// A tensor that the network needs is not in its file.
    #[error("{}: tensor {key} is missing; the file does not hold this network, or was written incompletely", file.display())]
    MissingTensor {
        /// The file.
        file: PathBuf,
        /// The tensor's full name.
        key: String,
    },
    /// A tensor whose shape is not the one that the network's configuration asks for.
    #[error(
        "{}: tensor {key} has the wrong shape (expected {expected:?}, found {found:?}); \
         the configuration and the weights do not belong together", file.display()
    )]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor's full name.
        key: String,
        /// The shape asked for.
        expected: Vec<i64>,
        /// The shape in the file.
        found: Vec<i64>,
    },
    /// A tensor stored in a number format that cannot stand in for the one asked for.
    #[error("{}: tensor {key} has the wrong type (expected {expected}, found {found}); convert it", file.display())]
    WrongDtype {
        /// The file.
        file: PathBuf,
        /// The tensor's full name.
        key: String,
        /// The types accepted.
        expected: String,
        /// The type in the file.
        found: String,
    },
    /// Tensors in a file that no part of the network takes.
    #[error(
        "{}: {} that the network does not have (expected none, found {}); \
         the configuration and the weights do not belong together",
        file.display(), if keys.len() == 1 { "holds a tensor" } else { "holds tensors" }, some_of(keys)
    )]
    SurplusTensors {
        /// The file.
        file: PathBuf,
        /// Their names.
        keys: Vec<String>,
    },
    /// A file whose tensors are of no kind of connector.
    #[error(
        "{}: holds no connector (expected connector.latents and its fellows, or connector.linear_1 and connector.linear_2 for an mlp; \
         found {}); give a file that ella export wrote, or one in the official key layout",
        file.display(), if keys.is_empty() { "no tensor".to_owned() } else { some_of(keys) }
    )]
    NotConnector {
        /// The file.
        file: PathBuf,
        /// The names of its tensors.
        keys: Vec<String>,
    },
    /// A configuration file that is not the JSON object it should be.
    #[error("{}: {reason}; write it anew from the model's source", file.display())]
    NotConfig {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A field of a configuration file that is missing, out of range or unsupported.
    #[error("{}: field {field} must be {rule} (found {found}); change it, or use a model of a supported kind", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The field's name.
        field: String,
        /// What the field's value must be.
        rule: String,
        /// The value found, as JSON, or `nothing`.
        found: String,
    },
    /// An argument that the network cannot work with.
    #[error("{what} must be {expected} (found {found})")]
    Input {
        /// What was given: an input's name.
        what: String,
        /// What it must be.
        expected: String,
        /// What it was.
        found: String,
    },
    /// What a file holds, and a network cannot work with.
    #[error("{}: {what} must be {expected} (found {found})", file.display())]
    FileInput {
        /// The file.
        file: PathBuf,
        /// Which of its tensors.
        what: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A model that is named by where it is to be had from, and cannot be had.
    #[error("{reason}")]
    Unavailable {
        /// What was named, why it cannot be had, and what to do.
        reason: String,
        /// Whether the same may work at another time.
        passes: bool,
    },
    /// A part of a LoRA file that does not fit the U-Net.
    #[error("{}: {key} does not fit (expected {expected}, found {found}); take a LoRA that was made for a base like this one", file.display())]
    LoraMismatch {
        /// The LoRA's file.
        file: PathBuf,
        /// The tensor's name.
        key: String,
        /// What it should be for.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Models that were made for others than they are put together with.
    #[error("{}: {what} is {found}, but {other} has {expected}; the models do not belong together", file.display())]
    Mismatch {
        /// The model's file or folder.
        file: PathBuf,
        /// What of it does not fit.
        what: &'static str,
        /// What that is.
        found: i64,
        /// What it should fit.
        other: String,
        /// What that has.
        expected: i64,
    },
    /// Something asked for that ella does not do.
    #[error("{what} is not supported; {instead}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        instead: String,
    },
    /// A tokenizer file that could not be read, or that does not fit its encoder.
    #[error("{}: {reason}", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Numbers came out that no picture has.
    #[error("what was drawn is not finite, so it is no picture; lower the guidance, or compute in fp32 where fp16 overflows")]
    NotFinite,
    /// An operation that libtorch refused.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A fused operator's own error, or that of the variable that chooses them.
    #[error(transparent)]
    Fused(#[from] ella_cuda::Error),
}

impl ModelError {
    /// Whether what was asked for cannot be, whatever the files hold.
    pub fn is_usage(&self) -> bool {
        matches!(self, ModelError::Input { .. } | ModelError::Unsupported { .. })
    }

    /// Whether the same would fail again on this machine: a model that is not there, or cannot be used.
    pub fn is_permanent(&self) -> bool {
        match self {
            ModelError::Unreadable { source, .. } | ModelError::Unwritable { source, .. } => is_lasting(source),
            ModelError::Unavailable { passes, .. } => !passes,
            ModelError::Torch(_) | ModelError::Fused(_) => false,
            _ => true,
        }
    }

    /// The error of an argument that a network or schedule cannot work with.
    pub fn argument(what: impl Into<String>, expected: impl Display, found: impl Display) -> Self {
        ModelError::Input { what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }
}

/// Whether the system would say the same again: of a path that leads nowhere, or a right that somebody must give; not of room or a connection
/// that is missing.
pub fn is_lasting(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as E;
    let of_path =
        matches!(error.kind(), E::NotFound | E::NotADirectory | E::IsADirectory | E::InvalidInput | E::InvalidFilename | E::InvalidData);
    of_path || matches!(error.kind(), E::PermissionDenied | E::ReadOnlyFilesystem)
}

/// The first few names of a list, and how many more there are.
fn some_of(keys: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = keys[..keys.len().min(SHOWN)].join(", ");
    match keys.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
