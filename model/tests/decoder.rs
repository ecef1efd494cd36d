//! Decoders, averaged layers and decoders' tokenizers against transformers (values within 1e-5 in float32, ids one by one), and what
//! bad files are told. `goldens/decoder.py` made the goldens.

#![allow(clippy::unwrap_used)] // helpers of tests may panic as tests do

mod common;

use std::fs;
use std::path::Path;

use common::{copy, edit, folder as golden, garbled, relative, tensors};
use ella_model::decoder::Decoder;
use ella_model::forward::{Net, Options, forward};
use ella_model::text::{Layers, TextConfig};
use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_model::weights;
use ella_model::{ModelError, Result, decoder_tokenizer};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

const DECODERS: [&str; 5] = ["llama-gqa", "llama-mha", "llama3", "qwen2", "qwen3"];
const TOKENIZERS: [&str; 3] = ["llama-tokenizer", "llama-tokenizer-new", "qwen-tokenizer"];

/// What `ella forward text` gives on a golden's inputs.
fn run(folder: &Path, inputs: &Path, kind: Kind, layers: Layers) -> Vec<(String, Tensor)> {
    let dir = tempfile::tempdir().unwrap();
    let outputs = dir.path().join("outputs.safetensors");
    forward(Net::Text, folder, inputs, &outputs, &Options { kind, layers, ..Options::default() }).unwrap();
    tensors(&outputs)
}

/// The worst relative error of the decoder in `folder` on every shape of the golden `name`, the averaged layers' among them.
fn worst(name: &str, folder: &Path, kind: Kind) -> f64 {
    let mut worst = 0f64;
    for shape in 0..3 {
        let file = |what: &str| golden(name).join(format!("{what}-{shape}.safetensors"));
        let (found, expected) = (run(folder, &file("inputs"), kind, Layers::Average), tensors(&file("outputs")));
        assert_eq!(found.len(), 2);
        for ((key, found), (name, expected)) in found.iter().zip(&expected) {
            assert_eq!((key, found.kind()), (name, kind));
            worst = worst.max(relative(found, expected));
        }
    }
    println!("{name} in {kind:?}: {worst:.1e}");
    worst
}

#[test]
fn the_decoders_agree_with_transformers() {
    for name in DECODERS {
        assert!(worst(name, &golden(name), Kind::Float) <= 1e-5, "{name}");
    }
}

#[test]
fn lower_precision_stays_near() {
    for name in DECODERS {
        assert!(worst(name, &golden(name), Kind::Half) <= 2e-2, "{name}");
        assert!(worst(name, &golden(name), Kind::BFloat16) <= 2e-2, "{name}");
    }
}

#[test]
fn averaged_layers_of_t5_and_clip_agree_with_transformers() {
    for name in ["t5-gated", "t5-relu", "clip-l", "clip-g"] {
        let shapes = if name.starts_with("t5") { vec![String::new()] } else { (0..4).map(|shape| format!("-{shape}")).collect() };
        for shape in shapes {
            let file = |what: &str| golden(name).join(format!("{what}{shape}.safetensors"));
            let found = run(&golden(name), &file("inputs"), Kind::Float, Layers::Average);
            let found = &found.iter().find(|(key, _)| key == "features").unwrap().1;
            let error = relative(found, &tensors(&file("average"))[0].1);
            println!("{name}{shape}: {error:.1e}");
            assert!(error <= 1e-5, "{name}{shape}");
            let last = run(&golden(name), &file("inputs"), Kind::Float, Layers::Last);
            assert!(last.iter().all(|(key, _)| key != "features"));
        }
    }
}

#[test]
fn layers_are_averaged_of_text_encoders_only() {
    let options = Options { layers: Layers::Average, heads: Some(4), ..Options::default() };
    let (folder, dir) = (golden("tsc-4-heads"), tempfile::tempdir().unwrap());
    let outputs = dir.path().join("out.safetensors");
    let result = forward(Net::Connector, &folder.join("connector.safetensors"), &folder.join("inputs.safetensors"), &outputs, &options);
    assert!(matches!(result, Err(ModelError::Unsupported { what, .. }) if what.contains("--layers")));
}

/// A T5 that overflows float16: transformers clamps it, and so do we. Without clamping nothing of it would be a number.
#[test]
fn an_overflowing_t5_is_clamped_as_in_transformers() {
    let folder = golden("t5-overflow");
    let found = run(&folder, &folder.join("inputs.safetensors"), Kind::Half, Layers::Last);
    let error = relative(&found[0].1, &tensors(&folder.join("outputs.safetensors"))[0].1);
    println!("t5-overflow: {error:.1e}");
    assert!(error <= 2e-2);
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
    for name in DECODERS {
        let bare = |key: &str| key.strip_prefix("model.").unwrap_or(key).to_owned();
        let bared = reweigh(name, |all| all.iter_mut().for_each(|(key, _)| *key = bare(key)));
        let prefixed = reweigh(name, |all| {
            all.retain(|(key, _)| key != "lm_head.weight");
            all.iter_mut().for_each(|(key, _)| *key = format!("model.{}", bare(key)));
            let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
            all.push(("lm_head.weight".into(), zeros(&[50, 24])));
            all.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), zeros(&[4])));
        });
        for dir in [bared, prefixed] {
            assert!(worst(name, dir.path(), Kind::Float) <= 1e-5, "{name}");
        }
    }
}

#[test]
fn weights_and_configs_that_do_not_fit_are_named() {
    let load = |dir: &TempDir| Decoder::load(dir.path(), Kind::Float, Device::Cpu).map(|_| ());
    let missing = load(&reweigh("qwen2", |all| all.retain(|(key, _)| !key.ends_with("layers.1.self_attn.k_proj.bias"))));
    assert!(matches!(missing, Err(ModelError::MissingTensor { key, .. }) if key == "model.layers.1.self_attn.k_proj.bias"));
    let surplus = load(&reweigh("llama3", |all| all.push(("score.weight".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu))))));
    assert!(matches!(surplus, Err(ModelError::SurplusTensors { keys, .. }) if keys == ["score.weight"]));
    let changed = |name: &str, field: &str, value: Value| {
        let dir = copy(name);
        edit(&dir, "config.json", |config| config[field] = value);
        load(&dir)
    };
    let biases = changed("llama3", "attention_bias", json!(false));
    assert!(matches!(biases, Err(ModelError::SurplusTensors { keys, .. }) if keys.iter().all(|key| key.contains("self_attn"))));
    let shape = changed("qwen3", "head_dim", json!(12));
    assert!(matches!(shape, Err(ModelError::WrongShape { key, .. }) if key == "model.layers.0.self_attn.q_proj.weight"));
    for (field, value) in [("model_type", json!("gemma")), ("use_sliding_window", json!(true)), ("mystery", json!(1))] {
        assert!(matches!(changed("qwen3", field, value), Err(ModelError::Config { field: found, .. }) if found == field), "{field}");
    }
}

#[test]
fn rows_longer_than_the_positions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = dir.path().join("in.safetensors");
    let ones = || Tensor::ones([1, 65], (Kind::Int64, Device::Cpu));
    weights::save(&inputs, &[("input_ids".into(), ones()), ("attention_mask".into(), ones())]).unwrap();
    let result = forward(Net::Text, &golden("qwen3"), &inputs, &dir.path().join("out"), &Options::default());
    assert!(matches!(result, Err(ModelError::Input { what, .. }) if what == "input_ids"));
    for (name, limit) in [("qwen3", 64), ("clip-l", 11)] {
        let config = TextConfig::load(&golden(name)).unwrap();
        config.check_max_tokens(limit, &golden(name)).unwrap();
        let error = config.check_max_tokens(limit + 1, &golden(name)).unwrap_err().to_string();
        assert!(
            error.contains("text.max_tokens") && error.contains(&format!("at most {limit}")) && error.contains("config.json"),
            "{error}"
        );
    }
    TextConfig::load(&golden("t5-gated")).unwrap().check_max_tokens(1 << 16, &golden("t5-gated")).unwrap();
}

#[test]
fn captions_get_the_ids_that_transformers_gives_them() {
    for name in TOKENIZERS {
        common::check_ids(name, &decoder_tokenizer::load(&golden(name)).unwrap());
    }
}

#[test]
fn an_empty_caption_of_qwen_is_one_padding_token() {
    let found = decoder_tokenizer::load(&golden("qwen-tokenizer")).unwrap().encode(&["", "a"], 8, Padding::None).unwrap();
    assert_eq!((found.lengths, found.width, found.mask), (vec![1, 1], 1, vec![1, 1]));
    let beginning = decoder_tokenizer::load(&golden("llama-tokenizer")).unwrap().encode(&[""], 8, Padding::None).unwrap();
    assert_eq!((beginning.ids, beginning.lengths), (vec![1], vec![1]));
}

#[test]
fn rows_are_filled_up_with_the_token_that_the_settings_name() {
    let last = |dir: &TempDir| *decoder_tokenizer::load(dir.path()).unwrap().encode(&["a"], 9, Padding::Fixed).unwrap().ids.last().unwrap();
    let dir = copy("llama-tokenizer");
    let digest = || decoder_tokenizer::load(dir.path()).unwrap().digest().to_owned();
    let before = digest();
    assert_eq!(last(&dir), 2, "the end token, where no padding token is named");
    edit(&dir, "tokenizer_config.json", |config| config["pad_token"] = json!({"content": "<unk>", "lstrip": false}));
    assert_eq!(last(&dir), 0);
    assert_ne!(digest(), before, "another padding token makes other features");
    edit(&dir, "tokenizer_config.json", |config| config["pad_token"] = json!(null));
    fs::write(dir.path().join("special_tokens_map.json"), "{\"pad_token\": \"<s>\"}").unwrap();
    assert_eq!(last(&dir), 1);
}

#[test]
fn damaged_tokenizers_are_told_why() {
    let refused = |file: &str, change: &dyn Fn(&mut Value), says: &str| {
        let dir = copy("llama-tokenizer");
        edit(&dir, file, change);
        let error = decoder_tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(says), "{file}, {says}: {error}");
    };
    let settings = "tokenizer_config.json";
    refused(settings, &|config| config["pad_token"] = json!("[PAD]"), "pad_token");
    refused(settings, &|config| config["pad_token"] = json!(7), "pad_token");
    refused(settings, &|config| config["eos_token"] = json!(null), "expected pad_token or eos_token");
    refused(settings, &|config| config["add_bos_token"] = json!(false), "add_bos_token");
    refused(settings, &|config| config["add_eos_token"] = json!(true), "add_eos_token");
    refused(settings, &|config| config["split_special_tokens"] = json!(true), "split_special_tokens");
    refused("tokenizer.json", &|json| json["model"]["merges"] = json!([["a", "quite another piece"]]), "is not a tokenizer");
    refused("tokenizer.json", &|json| json["model"] = json!(1), "is not a tokenizer");
    refused("tokenizer.json", &|json| json["decoder"] = json!(1), "is not a tokenizer");
    let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": "damaged"});
    refused("tokenizer.json", &|json| json["normalizer"] = precompiled.clone(), "is not a tokenizer");
    let dir = copy("llama-tokenizer");
    fs::rename(dir.path().join("tokenizer.json"), dir.path().join("tokenizer.model")).unwrap();
    assert!(matches!(decoder_tokenizer::load(dir.path()), Err(ModelError::Tokenizer { reason, .. }) if reason.contains("convert")));
    fs::remove_file(dir.path().join("tokenizer.model")).unwrap();
    assert!(matches!(decoder_tokenizer::load(dir.path()), Err(ModelError::MissingFile { .. })));
}

#[test]
fn each_family_has_its_tokenizer_which_must_fit_the_vocabulary() {
    let load = |model: &str, tokenizer: &str, vocab_size: i64| {
        let dir = copy(model);
        edit(&dir, "config.json", |config| config["vocab_size"] = json!(vocab_size));
        for entry in fs::read_dir(golden(tokenizer)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        TextTokenizer::load(dir.path(), &TextConfig::load(dir.path()).unwrap()).map(|tokenizer| tokenizer.vocab_size())
    };
    for (model, tokenizer) in [("qwen3", "qwen-tokenizer"), ("llama-gqa", "llama-tokenizer"), ("clip-l", "clip-tokenizer-l")] {
        let size = load(model, tokenizer, 1000).unwrap();
        assert_eq!(load(model, tokenizer, size).unwrap(), size);
        let small: Result<i64> = load(model, tokenizer, size - 1);
        assert!(matches!(small, Err(ModelError::Tokenizer { reason, .. }) if reason.contains(&format!("found {size}"))), "{model}");
    }
    assert!(matches!(load("t5-gated", "qwen-tokenizer", 1000), Err(ModelError::Tokenizer { reason, .. }) if reason.contains("<pad>")));
    assert!(matches!(load("clip-l", "qwen-tokenizer", 1000), Err(ModelError::Tokenizer { reason, .. }) if reason.contains("CLIP kind")));
}

#[test]
fn garbled_tokenizers_and_configs_never_panic() {
    for (name, file) in [("qwen-tokenizer", "tokenizer.json"), ("llama-tokenizer", "tokenizer_config.json")] {
        garbled(name, file, |folder| {
            if let Ok(tokenizer) = decoder_tokenizer::load(folder) {
                let _ = tokenizer.encode(&["a red circle!", "é<|endoftext|>"], 5, Padding::Fixed);
            }
        });
    }
    for name in ["llama3", "qwen2", "qwen3"] {
        garbled(name, "config.json", |folder| drop(Decoder::load(folder, Kind::Float, Device::Cpu)));
    }
}
