//! Text encoders of other families than T5: a CLIP and a decoder, cached and inline, to the same gradient.

use crate::gradient::{batches, sum_of_lanes};
use crate::world::{config, difference, embedded, load, text};
use ella_model::ModelError;
use ella_model::weights::{Weights, save};
use ella_worker::models;
use std::path::Path;
use tch::Device;
use tempfile::TempDir;

/// The golden encoder `model` with the golden `tokenizer`, its table of tokens repeated until every id has a row.
fn folder(model: &str, tokenizer: &str) -> TempDir {
    const TIMES: i64 = 16;
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens");
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(goldens.join(tokenizer)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let mut settings: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(goldens.join(model).join("config.json")).unwrap()).unwrap();
    settings["vocab_size"] = (settings["vocab_size"].as_i64().unwrap() * TIMES).into();
    std::fs::write(dir.path().join("config.json"), settings.to_string()).unwrap();
    let weights = Weights::open(&goldens.join(model)).unwrap();
    let tensors: Vec<_> = weights
        .names()
        .map(|name| {
            let (shape, kind) = weights.describe(name).unwrap();
            let tensor = weights.load(name, shape, kind, Device::Cpu).unwrap();
            let table = name.ends_with("embed_tokens.weight") || name.ends_with("token_embedding.weight");
            (name.to_owned(), if table { tensor.repeat([TIMES, 1]) } else { tensor })
        })
        .collect();
    save(&dir.path().join("model.safetensors"), &tensors).unwrap();
    dir
}

#[test]
fn clip_and_decoders_train_alike_from_cached_and_inline_features() {
    for (model, tokenizer, most) in
        [("clip-l", "clip-tokenizer-l", 11), ("qwen3", "qwen-tokenizer", 64), ("llama-gqa", "llama-tokenizer", 64)]
    {
        let dir = folder(model, tokenizer);
        let model_key = format!("text.model={}", text(dir.path()));
        let tokens = format!("text.max_tokens={most}");
        let gradient = |layers: &str, features: &str| {
            let config = config(&[&model_key, &tokens, "text.padding=none", layers, features]);
            sum_of_lanes(&load(&config).networks, &batches(&config, 0), 8)
        };
        let mut of_layers = Vec::new();
        for layers in ["text.layers=last", "text.layers=average"] {
            let (cached, inline) = (gradient(layers, "text.features=cached"), gradient(layers, "text.features=inline"));
            let found = difference(&cached.0, &inline.0);
            assert!(found < 1e-4 && (cached.1 - inline.1).abs() < 1e-5 * inline.1, "{model}, {layers}: {found}");
            assert!(inline.1.is_finite());
            of_layers.push(inline.0);
        }
        assert!(difference(&of_layers[0], &of_layers[1]) > 1e-3, "{model}: other layers are other features");
        let report = embedded(&config(&[&model_key, &tokens, "text.padding=none"]));
        assert_eq!(report.get("embedded"), None, "what training read was cached");

        let above = config(&[&model_key, &format!("text.max_tokens={}", most + 1)]);
        let error = models::load(&above, Device::Cpu).unwrap_err();
        assert!(
            matches!(&error, ModelError::Input { what, expected, .. } if what == "text.max_tokens" && expected.contains(&format!("at most {most}"))),
            "{error}"
        );
    }
}
