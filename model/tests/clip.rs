//! CLIP's text encoders and tokenizer against transformers (values within 1e-5 in float32, ids one by one), and what bad files
//! are told. `goldens/clip.py` made the goldens.

#![allow(clippy::unwrap_used)] // helpers of tests may panic as tests do

mod common;

use std::fs;
use std::path::Path;

use common::{copy, edit, folder as golden, garbled, tensors};
use ella_model::clip::Clip;
use ella_model::forward::{Net, Options, forward};
use ella_model::tokenizer::Padding;
use ella_model::weights::{self};
use ella_model::{ModelError, Result, clip_tokenizer};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

const ENCODERS: [&str; 3] = ["clip-l", "clip-h", "clip-g"];
const TOKENIZERS: [&str; 2] = ["clip-tokenizer-l", "clip-tokenizer-g"];

/// Runs the encoder in `folder` on every shape of the golden `name`: the worst error of each output, relative to its largest value.
fn worst(name: &str, folder: &Path, kind: Kind) -> Vec<(String, f64)> {
    let (from, dir) = (golden(name), tempfile::tempdir().unwrap());
    let mut worst: Vec<(String, f64)> = Vec::new();
    for shape in 0..4 {
        let outputs = dir.path().join("outputs.safetensors");
        let options = Options { kind, ..Options::default() };
        forward(Net::Text, folder, &from.join(format!("inputs-{shape}.safetensors")), &outputs, &options).unwrap();
        let (found, expected) = (tensors(&outputs), tensors(&from.join(format!("outputs-{shape}.safetensors"))));
        assert_eq!(found.len(), 3);
        for ((key, found), (name, expected)) in found.iter().zip(&expected) {
            assert_eq!((key, found.size(), found.kind()), (name, expected.size(), kind));
            let error = ((found.to_kind(Kind::Float) - expected).abs().max() / expected.abs().max()).double_value(&[]);
            assert!(!error.is_nan());
            match worst.iter_mut().find(|(known, _)| known == key) {
                Some((_, known)) => *known = known.max(error),
                None => worst.push((key.clone(), error)),
            }
        }
    }
    println!("{name} in {kind:?}: {worst:.8?}");
    worst
}

#[test]
fn the_encoders_agree_with_transformers() {
    for name in ENCODERS {
        assert!(worst(name, &golden(name), Kind::Float).iter().all(|(_, error)| *error <= 1e-5), "{name}");
    }
}

#[test]
fn lower_precision_stays_near() {
    for name in ENCODERS {
        assert!(worst(name, &golden(name), Kind::Half).iter().all(|(_, error)| *error <= 2e-2), "{name}");
        assert!(worst(name, &golden(name), Kind::BFloat16).iter().all(|(_, error)| *error <= 2e-2), "{name}");
    }
}

/// Rewrites the weights of a copy.
fn reweigh(name: &str, change: impl FnOnce(&mut Vec<(String, Tensor)>)) -> TempDir {
    let dir = copy(name);
    let path = dir.path().join("model.safetensors");
    let mut all = tensors(&path);
    change(&mut all);
    weights::save(&path, &all).unwrap();
    dir
}

#[test]
fn both_key_layouts_and_harmless_tensors_are_read() {
    const PREFIX: &str = "text_model.";
    for name in ENCODERS {
        let bare = reweigh(name, |all| {
            for (key, _) in all.iter_mut() {
                *key = key.strip_prefix(PREFIX).unwrap_or(key).to_owned();
            }
        });
        let prefixed = reweigh(name, |all| {
            for (key, _) in all.iter_mut().filter(|(key, _)| !key.starts_with(PREFIX) && !key.starts_with("text_projection")) {
                *key = format!("{PREFIX}{key}");
            }
            all.push(("text_model.embeddings.position_ids".into(), Tensor::arange(11, (Kind::Int64, Device::Cpu)).unsqueeze(0)));
            all.push(("vision_model.post_layernorm.bias".into(), Tensor::zeros([4], (Kind::Float, Device::Cpu))));
        });
        for dir in [bare, prefixed] {
            assert!(worst(name, dir.path(), Kind::Float).iter().all(|(_, error)| *error <= 1e-5), "{name}");
        }
    }
}

#[test]
fn weights_and_configs_that_do_not_fit_are_named() {
    let load = |dir: &TempDir| Clip::load(dir.path(), Kind::Float, Device::Cpu).map(|_| ());
    let missing = load(&reweigh("clip-g", |all| all.retain(|(key, _)| !key.ends_with("encoder.layers.1.mlp.fc2.bias"))));
    assert!(matches!(missing, Err(ModelError::MissingTensor { key, .. }) if key.ends_with("encoder.layers.1.mlp.fc2.bias")));
    let empty = load(&reweigh("clip-l", |all| all.retain(|(key, _)| !key.ends_with("token_embedding.weight"))));
    assert!(matches!(empty, Err(ModelError::MissingTensor { key, .. }) if key.ends_with("embeddings.token_embedding.weight")));
    let changed = |field: &str, value: Value| {
        let dir = copy("clip-g");
        edit(&dir, "config.json", |config| config[field] = value);
        load(&dir)
    };
    let surplus = changed("architectures", json!(["CLIPTextModel"]));
    assert!(matches!(surplus, Err(ModelError::SurplusTensors { keys, .. }) if keys == ["text_projection.weight"]));
    let shape = changed("projection_dim", json!(21));
    assert!(matches!(shape, Err(ModelError::WrongShape { key, .. }) if key == "text_projection.weight"));
    for (field, value) in [("hidden_act", json!("gelu_new")), ("num_hidden_layers", json!(0)), ("mystery", json!(1))] {
        assert!(matches!(changed(field, value), Err(ModelError::Config { field: found, .. }) if found == field), "{field}");
    }
}

#[test]
fn unknown_families_of_text_encoders_are_refused_by_their_field() {
    let dir = copy("clip-l");
    let run = |change: fn(&mut Value)| {
        edit(&dir, "config.json", change);
        forward(Net::Text, dir.path(), &golden("clip-l/inputs-0.safetensors"), &dir.path().join("out"), &Options::default()).map(|_| ())
    };
    let refused = |result: Result<()>| matches!(result, Err(ModelError::Config { field, rule, .. }) if field == "model_type" && rule.contains("clip_text_model"));
    assert!(refused(run(|config| config["model_type"] = json!("bert"))));
    assert!(refused(run(|config| drop(config.as_object_mut().unwrap().remove("model_type")))));
    assert!(refused(run(|config| config["model_type"] = json!(["t5"]))));
    assert!(!dir.path().join("out").exists());
}

#[test]
fn rows_longer_than_the_positions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = dir.path().join("in.safetensors");
    let ones = || Tensor::ones([1, 12], (Kind::Int64, Device::Cpu));
    weights::save(&inputs, &[("input_ids".into(), ones()), ("attention_mask".into(), ones())]).unwrap();
    let result = forward(Net::Text, &golden("clip-l"), &inputs, &dir.path().join("out"), &Options::default());
    assert!(matches!(result, Err(ModelError::Input { what, .. }) if what == "input_ids"));
}

#[test]
fn captions_get_the_ids_that_transformers_gives_them() {
    for name in TOKENIZERS {
        common::check_ids(name, &clip_tokenizer::load(&golden(name)).unwrap());
    }
}

#[test]
fn a_tokenizer_is_found_beside_its_encoder_and_told_from_others() {
    let dir = tempfile::tempdir().unwrap();
    for (encoder, tokenizer, from) in [("text_encoder", "tokenizer", TOKENIZERS[0]), ("text_encoder_2", "tokenizer_2", TOKENIZERS[1])] {
        fs::create_dir(dir.path().join(encoder)).unwrap();
        fs::rename(copy(from).keep(), dir.path().join(tokenizer)).unwrap();
    }
    let digest = |folder: &str| clip_tokenizer::load(&dir.path().join(folder)).unwrap().digest().to_owned();
    assert_eq!(digest("text_encoder"), digest("tokenizer"));
    assert_eq!(digest("text_encoder_2"), digest("tokenizer_2"));
    assert_ne!(digest("tokenizer"), digest("tokenizer_2"));
}

#[test]
fn a_tokenizer_larger_than_the_encoder_is_refused() {
    let tokenizer = clip_tokenizer::load(&golden(TOKENIZERS[0])).unwrap();
    let n = tokenizer.vocab_size();
    tokenizer.check_vocabulary(n).unwrap();
    let error = tokenizer.check_vocabulary(n - 1).unwrap_err().to_string();
    assert!(error.contains("vocab.json") && error.contains(&format!("found {n}")), "{error}");
}

#[test]
fn added_tokens_keep_their_ids() {
    let dir = copy(TOKENIZERS[0]);
    let size = clip_tokenizer::load(dir.path()).unwrap().vocab_size();
    let list = |id: i64| {
        edit(&dir, "tokenizer_config.json", |config| config["added_tokens_decoder"] = json!({id.to_string(): {"content": "<cat-toy>"}}));
        clip_tokenizer::load(dir.path())
    };
    let found = list(size).unwrap().encode(&["a <cat-toy>"], 77, Padding::None).unwrap();
    assert_eq!(found.ids[found.width - 2], size);
    assert!(matches!(list(size + 5), Err(ModelError::Tokenizer { reason, .. }) if reason.contains("<cat-toy>")));
    edit(&dir, "tokenizer_config.json", |config| config["added_tokens_decoder"] = json!({"x": {"content": "<cat-toy>"}}));
    assert!(matches!(clip_tokenizer::load(dir.path()), Err(ModelError::Config { field, .. }) if field == "added_tokens_decoder"));
}

#[test]
fn the_special_tokens_map_goes_before_the_settings() {
    let dir = copy(TOKENIZERS[0]);
    let last = || *clip_tokenizer::load(dir.path()).unwrap().encode(&["a dog"], 77, Padding::Fixed).unwrap().ids.last().unwrap();
    assert_ne!(last(), 0);
    edit(&dir, "special_tokens_map.json", |map| map["pad_token"] = json!("!"));
    assert_eq!(last(), 0);
    edit(&dir, "tokenizer_config.json", |config| config["added_tokens_decoder"] = json!({}));
    assert_ne!(last(), 0);
    edit(&dir, "tokenizer_config.json", |config| config["pad_token"] = json!("!"));
    assert_eq!(last(), 0);
}

#[test]
fn damaged_tokenizers_are_told_why() {
    let refused = |from: &str, file: &str, change: &dyn Fn(&Path), says: &str| {
        let dir = copy(from);
        change(&dir.path().join(file));
        let error = clip_tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(says), "{file}, {says}: {error}");
    };
    let (old, new) = (TOKENIZERS[0], TOKENIZERS[1]);
    let write = |text: &'static str| move |path: &Path| fs::write(path, text).unwrap();
    let set = |pointer: &'static str, value: Value| {
        move |path: &Path| {
            let mut json: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
            *json.pointer_mut(pointer).unwrap() = value.clone();
            fs::write(path, json.to_string()).unwrap();
        }
    };
    refused(old, "merges.txt", &|path| fs::remove_file(path).unwrap(), "not found");
    refused(old, "merges.txt", &write("a b c\n"), "two pieces");
    refused(old, "vocab.json", &write("{\"a\":"), "not JSON");
    refused(old, "vocab.json", &write("[]"), "not an object");
    refused(old, "vocab.json", &write("{\"<|startoftext|>\": 0, \"<|endoftext|>\": 1}"), "merge");
    refused(old, "vocab.json", &set("/a", json!(-1)), "is not a tokenizer");
    refused(old, "added_tokens.json", &write("{\"<cat-toy>\": 600}"), "convert");
    refused(old, "special_tokens_map.json", &set("/pad_token", json!("[PAD]")), "pad_token");
    refused(old, "special_tokens_map.json", &set("/bos_token", json!(7)), "bos_token");
    refused(old, "special_tokens_map.json", &write("{\"additional_special_tokens\": [\"<cat-toy>\"]}"), "additional_special_tokens");
    refused(old, "tokenizer_config.json", &set("/do_lower_case", json!(false)), "do_lower_case");
    refused(old, "tokenizer_config.json", &set("/tokenizer_class", json!("T5Tokenizer")), "tokenizer_class");
    refused(new, "tokenizer.json", &set("/model/end_of_word_suffix", json!(null)), "CLIP kind");
    refused(new, "tokenizer.json", &set("/model/type", json!("Unigram")), "CLIP kind");
    refused(new, "tokenizer.json", &set("/model/merges", json!([["a"]])), "merges");
    refused(new, "tokenizer.json", &set("/model/merges", json!([["a", "quite another piece"]])), "merge");
    refused(new, "tokenizer.json", &set("/model", json!([])), "CLIP kind");
    refused(new, "tokenizer.json", &set("/added_tokens", json!([1])), "added tokens");
    let nothing = tempfile::tempdir().unwrap();
    assert!(matches!(clip_tokenizer::load(nothing.path()), Err(ModelError::MissingFile { .. })));
}

#[test]
fn garbled_tokenizers_and_configs_never_panic() {
    let files = [
        (TOKENIZERS[0], ["vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"].as_slice()),
        (TOKENIZERS[1], &["tokenizer.json", "tokenizer_config.json"]),
    ];
    for (name, files) in files {
        for file in files {
            garbled(name, file, |folder| {
                if let Ok(tokenizer) = clip_tokenizer::load(folder) {
                    let _ = tokenizer.encode(&["a red circle!", "é<|endoftext|>"], 5, Padding::Fixed);
                }
            });
        }
    }
    garbled("clip-l", "config.json", |folder| drop(Clip::load(folder, Kind::Float, Device::Cpu)));
}
