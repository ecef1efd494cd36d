//! LoRA files on the command line.

use std::str::FromStr;

use clap::Args;
use ella_model::lora::Lora;
use ella_proto::config;
use ella_worker::models;

use crate::ui::{Fail, note};

/// LoRA files to merge.
#[derive(Debug, Args)]
pub(crate) struct Loras {
    /// Merge a LoRA into the U-Net, at a weight other than 1 as in style.safetensors:0.8; may be given more than once
    #[arg(long = "lora", value_name = "FILE[:WEIGHT]")]
    named: Vec<Named>,
}

/// A file and its weight.
#[derive(Clone, Debug, PartialEq)]
struct Named {
    file: String,
    weight: f64,
}

impl FromStr for Named {
    type Err = String;

    /// What follows the last colon is the weight if it is a number; else it is of the file's name.
    fn from_str(text: &str) -> Result<Self, String> {
        let (file, weight) = match text.rsplit_once(':').map(|(file, weight)| (file, weight.parse::<f64>())) {
            Some((file, Ok(weight))) => (file, weight),
            _ => (text, 1.0),
        };
        match (file.is_empty(), weight.is_finite()) {
            (false, true) => Ok(Self { file: file.to_owned(), weight }),
            (true, _) => Err("names no file".to_owned()),
            (_, false) => Err("the weight must be a finite number".to_owned()),
        }
    }
}

impl Loras {
    /// Opens them, and tells what of them is not used (KNOWN).
    pub(crate) fn open(&self) -> Result<Vec<Lora>, Fail> {
        let open = |named: &Named| {
            let lora = Lora::open(&models::locate("--lora", &named.file)?, named.weight)?;
            if let Some(unused) = lora.unused() {
                note(unused);
            }
            Ok(lora)
        };
        self.named.iter().map(open).collect()
    }

    /// As a config names them.
    pub(crate) fn config(&self) -> Vec<config::Lora> {
        self.named.iter().map(|named| config::Lora { file: named.file.clone(), weight: named.weight }).collect()
    }

    /// Each as it was named, its weight always there.
    pub(crate) fn named(&self) -> impl Iterator<Item = String> {
        self.named.iter().map(|named| format!("{}:{}", named.file, named.weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_follows_the_last_colon() {
        let read = |text: &str| text.parse::<Named>().map(|named| (named.file, named.weight));
        assert_eq!(read("a.safetensors"), Ok(("a.safetensors".to_owned(), 1.0)));
        assert_eq!(read("a.safetensors:0.8"), Ok(("a.safetensors".to_owned(), 0.8)));
        assert_eq!(read("a:b.safetensors:-1"), Ok(("a:b.safetensors".to_owned(), -1.0)));
        assert_eq!(read("a:b.safetensors"), Ok(("a:b.safetensors".to_owned(), 1.0)));
        assert!(read(":0.5").is_err() && read("a:inf").is_err());
    }
}
