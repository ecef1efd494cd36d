//! What the golden tests share: where goldens lie, reading them, and how far a tensor is from its expected value.

// Every test program uses a part of this; and the lint's exception for tests does not reach helpers.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use ella_model::weights::Weights;
use tch::{Device, Kind, Tensor};

/// A golden's folder.
pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// The tensors of a golden file by name.
pub(crate) struct Golden(pub(crate) Weights);

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        // These networks are small: threads would spend their time waiting for each other.
        tch::set_num_threads(1);
        Golden(Weights::open(&folder(name).join("golden.safetensors")).unwrap())
    }

    pub(crate) fn get(&self, name: &str) -> Tensor {
        let (shape, kind) = self.0.describe(name).unwrap();
        self.0.load(name, shape, kind, Device::Cpu).unwrap()
    }
}

/// All tensors of a file.
pub(crate) fn tensors(path: &Path) -> Vec<(String, Tensor)> {
    let file = Golden(Weights::open(path).unwrap());
    file.0.names().map(|name| (name.to_owned(), file.get(name))).collect()
}

/// max|a − b| / max|b|, which must be a number.
pub(crate) fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let error = (&a - &b).abs().max().double_value(&[]) / b.abs().max().double_value(&[]);
    assert!(error.is_finite(), "not finite");
    error
}
