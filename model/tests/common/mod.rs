//! What the golden tests share: where goldens lie, reading, copying and damaging them, and how far a tensor is from its expected value.

// Every test program uses a part of this; and the lint's exception for tests does not reach helpers.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_model::weights::Weights;
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

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

/// A copy of a golden folder whose files a test may change.
pub(crate) fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(folder(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// Changes a JSON file in a copy.
pub(crate) fn edit(dir: &TempDir, file: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.path().join(file);
    let mut json = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// Tries 150 damaged forms of one file in a copy of a golden: bytes cut off, taken out and changed, always the same ones.
pub(crate) fn garbled(name: &str, file: &str, attempt: impl Fn(&Path)) {
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let (dir, sound) = (copy(name), fs::read(folder(name).join(file)).unwrap());
    for _ in 0..150 {
        let mut bytes = sound.clone();
        for _ in 0..1 + next(3) {
            let at = next(bytes.len());
            match next(4) {
                0 => bytes.truncate(at.max(1)),
                1 => drop(bytes.remove(at)),
                2 => bytes[at] = next(256) as u8,
                // Digits, quotes and brackets break structure and numbers more often than any byte does.
                _ => bytes[at] = b"0123456789-\"[]{},: "[next(19)],
            }
        }
        fs::write(dir.path().join(file), bytes).unwrap();
        attempt(dir.path());
    }
}

/// Holds a tokenizer against the ids that transformers gives the captions of a golden.
pub(crate) fn check_ids(name: &str, tokenizer: &TextTokenizer) {
    let text = std::fs::read_to_string(folder(name).join("captions.json")).unwrap();
    let captions: serde_json::Value = serde_json::from_str(&text).unwrap();
    let max_tokens = captions["max_tokens"].as_u64().unwrap() as usize;
    let rows: Vec<(String, Vec<i64>, usize)> = serde_json::from_value(captions["rows"].clone()).unwrap();
    let texts: Vec<&str> = rows.iter().map(|(text, ..)| text.as_str()).collect();
    let found = tokenizer.encode(&texts, max_tokens, Padding::Fixed).unwrap();
    for (row, (text, ids, length)) in rows.iter().enumerate() {
        let at = row * max_tokens..(row + 1) * max_tokens;
        assert_eq!(&found.ids[at.clone()], &ids[..], "{name}: {text:?}");
        // Where transformers gives the empty caption no token, we give it a padding token.
        let length = (*length).max(1);
        assert_eq!((found.lengths[row], found.mask[at].iter().sum::<i64>()), (length, length as i64), "{name}: {text:?}");
    }
    println!("{name}: {} captions, {} cut", rows.len(), found.truncated.len());
    assert!(!found.truncated.is_empty());
}
