//! What one network is loaded from: its configuration and its tensors, wherever they lie.

use std::path::Path;

use crate::config::ConfigFile;
use crate::error::Result;
use crate::weights::Weights;

/// A network's configuration and tensors.
#[derive(Debug)]
pub struct Part {
    /// `config.json`, or what stands for it.
    pub config: ConfigFile,
    /// The tensors, under the names of diffusers and transformers.
    pub weights: Weights,
}

impl Part {
    /// Opens a folder in the layout of diffusers and transformers: `config.json` beside safetensors.
    ///
    /// # Errors
    /// A file is missing, damaged, or not of the kind that it should be.
    pub fn open(folder: &Path) -> Result<Self> {
        Ok(Part { config: ConfigFile::open(&folder.join("config.json"))?, weights: Weights::open(folder)? })
    }

    /// BLAKE3 over weights and configuration, as lower-case hex: the same weights under another configuration are another network.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.weights.digest().as_bytes()).update(self.config.text().as_bytes());
        hasher.finalize().to_hex().to_string()
    }
}
