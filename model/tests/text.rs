//! The text side against goldens (values within 1e-5, gradients within 1e-4, float32), through the code that `ella forward` runs; and
//! what bad files and inputs are told. `goldens/text.py` made the goldens.

#![allow(clippy::unwrap_used)] // helpers of tests may panic as tests do

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use common::{folder as golden, relative, tensors};
use ella_model::connector::Connector;
use ella_model::forward::{Net, Options, forward};
use ella_model::t5::T5;
use ella_model::weights::{self, Weights};
use ella_model::{ModelError, Result};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

/// Runs the golden and returns the worst relative error of (values, gradients).
fn compare(name: &str, net: Net, model: &str, options: &Options) -> (f64, f64) {
    let (folder, dir) = (golden(name), tempfile::tempdir().unwrap());
    let outputs = dir.path().join("outputs.safetensors");
    let model = if model.is_empty() { folder.clone() } else { folder.join(model) };
    forward(net, &model, &folder.join("inputs.safetensors"), &outputs, options).unwrap();
    let (found, expected) = (tensors(&outputs), tensors(&folder.join("outputs.safetensors")));
    let names = |list: &[(String, Tensor)]| list.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected), "{name}");
    let (mut values, mut gradients) = ((0.0, ""), (0.0, ""));
    let most = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
    let largest = expected.iter().filter(|(key, _)| key.starts_with("grad.")).map(|(_, tensor)| most(tensor)).fold(0.0, f64::max);
    for ((key, found), (_, expected)) in found.iter().zip(&expected) {
        let worst = if key.starts_with("grad.") { &mut gradients } else { &mut values };
        // What is 0 but for rounding, such as the gradient of a bias of all keys, is compared with the other gradients.
        let error =
            if key.starts_with("grad.") && most(expected) < 1e-6 * largest { most(found) / largest } else { relative(found, expected) };
        if error > worst.0 || error.is_nan() {
            *worst = (error, key);
        }
    }
    println!("{name}: values {:.1e} ({}), gradients {:.1e} ({})", values.0, values.1, gradients.0, gradients.1);
    (values.0, gradients.0)
}

#[test]
fn the_connectors_agree_with_the_reference_modules() {
    let tscs = [("tsc-8-heads", 8), ("tsc-4-heads", 4), ("tsc-half", 2), ("tsc-zero", 4)];
    let pooled = [("tsc-pooled", 4), ("mlp-pooled", 2)];
    for (name, heads) in tscs.into_iter().chain([("resampler", 8), ("resampler-1-block", 2), ("mlp", 8)]).chain(pooled) {
        let options = Options { grad: true, heads: Some(heads), ..Options::default() };
        let (values, gradients) = compare(name, Net::Connector, "connector.safetensors", &options);
        assert!(values <= 1e-5 && gradients <= 1e-4, "{name}");
    }
}

#[test]
fn the_t5_encoder_agrees_with_transformers() {
    for name in ["t5-gated", "t5-relu"] {
        let (values, _) = compare(name, Net::Text, "", &Options::default());
        assert!(values <= 1e-5, "{name}");
    }
}

#[test]
fn lower_precision_stays_near() {
    // transformers itself is 0.15 off in bfloat16 here: the golden's large weights make sharp attention.
    for (kind, limit) in [(Kind::Half, 2e-2), (Kind::BFloat16, 1.6e-1)] {
        let options = Options { kind, ..Options::default() };
        let (folder, dir) = (golden("t5-gated"), tempfile::tempdir().unwrap());
        let outputs = dir.path().join("outputs.safetensors");
        forward(Net::Text, &folder, &folder.join("inputs.safetensors"), &outputs, &options).unwrap();
        let found = &tensors(&outputs)[0].1;
        assert_eq!(found.kind(), kind);
        let error = relative(&found.to_kind(Kind::Float), &tensors(&folder.join("outputs.safetensors"))[0].1);
        println!("t5-gated in {kind:?}: {error:.1e}");
        assert!(error < limit);
    }
}

/// A connector's file whose tensors or bytes were changed.
struct Damaged {
    dir: TempDir,
}

impl Damaged {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(golden("tsc-4-heads/connector.safetensors"), dir.path().join("c.safetensors")).unwrap();
        Damaged { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("c.safetensors")
    }

    fn tensors(self, change: impl FnOnce(&mut Vec<(String, Tensor)>)) -> Self {
        let mut all = tensors(&self.path());
        change(&mut all);
        weights::save(&self.path(), &all).unwrap();
        self
    }

    fn bytes(self, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = fs::read(self.path()).unwrap();
        change(&mut bytes);
        fs::write(self.path(), bytes).unwrap();
        self
    }

    fn error(&self) -> ModelError {
        let error = Connector::load(&self.path(), 4, Kind::Float, Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("c.safetensors"), "{error}");
        error
    }
}

#[test]
fn damaged_files_are_told_apart() {
    let cut = Damaged::new().bytes(|bytes| bytes.truncate(5000));
    assert!(matches!(cut.error(), ModelError::Truncated { found: 5000, .. }));
    let stub = Damaged::new().bytes(|bytes| bytes.truncate(100));
    assert!(matches!(stub.error(), ModelError::Truncated { found: 100, .. }));
    let empty = Damaged::new().bytes(Vec::clear);
    assert!(matches!(empty.error(), ModelError::Truncated { found: 0, .. }));
    let garbage = Damaged::new().bytes(|bytes| bytes[8..40].fill(b'#'));
    assert!(matches!(garbage.error(), ModelError::NotSafetensors { .. }));
    let pickle = Damaged::new().bytes(|bytes| bytes[..4].copy_from_slice(b"PK\x03\x04"));
    assert!(matches!(pickle.error(), ModelError::Pickle { .. }));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let missing = Damaged::new().tensors(|all| all.retain(|(name, _)| name != "connector.perceiver_blocks.0.mlp.c_fc.bias"));
    assert!(matches!(missing.error(), ModelError::MissingTensor { key, .. } if key == "connector.perceiver_blocks.0.mlp.c_fc.bias"));
    let surplus = Damaged::new().tensors(|all| all.push(("proj_out.weight".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)))));
    assert!(matches!(surplus.error(), ModelError::SurplusTensors { keys, .. } if keys == ["proj_out.weight"]));
    let change = |key: &'static str, change: fn(&Tensor) -> Tensor| {
        Damaged::new().tensors(move |all| {
            let slot = all.iter_mut().find(|(name, _)| name == key).unwrap();
            slot.1 = change(&slot.1);
        })
    };
    let shape = change("connector.proj_in.bias", |tensor| tensor.narrow(0, 0, 31));
    assert!(matches!(
        shape.error(),
        ModelError::WrongShape { key, expected, found, .. } if key == "connector.proj_in.bias" && expected == [32] && found == [31]
    ));
    let flat = change("connector.latents", |tensor| tensor.flatten(0, 1));
    assert!(matches!(flat.error(), ModelError::WrongShape { key, .. } if key == "connector.latents"));
    let kind = change("connector.proj_in.bias", |tensor| tensor.to_kind(Kind::Int64));
    assert!(matches!(kind.error(), ModelError::WrongDtype { found, .. } if found == "I64"));
}

#[test]
fn folders_without_safetensors_are_told_why() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Weights::open(&dir.path().join("absent.safetensors")), Err(ModelError::MissingFile { .. })));
    assert!(matches!(Weights::open(dir.path()), Err(ModelError::MissingFile { .. })));
    fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02").unwrap();
    assert!(matches!(Weights::open(dir.path()), Err(ModelError::Pickle { .. })));
    assert!(matches!(Weights::open(&dir.path().join("pytorch_model.bin")), Err(ModelError::Pickle { .. })));
}

#[test]
fn shards_are_read_as_one_and_checked_against_their_index() {
    let (folder, dir) = (golden("t5-gated"), tempfile::tempdir().unwrap());
    let at = |name: &str| dir.path().join(name);
    fs::copy(folder.join("config.json"), at("config.json")).unwrap();
    let all = tensors(&folder.join("model.safetensors"));
    let copy = |part: &[(String, Tensor)]| part.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect::<Vec<_>>();
    let half = all.len() / 2;
    weights::save(&at("a.safetensors"), &copy(&all[..half])).unwrap();
    weights::save(&at("b.safetensors"), &copy(&all[half..])).unwrap();
    let index = |moved: usize| {
        let entry = |(at, (name, _)): (usize, &(String, Tensor))| {
            (name.clone(), serde_json::json!(if at < half + moved { "a.safetensors" } else { "b.safetensors" }))
        };
        let map: serde_json::Map<_, _> = all.iter().enumerate().map(entry).collect();
        fs::write(at("model.safetensors.index.json"), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    };
    index(0);
    T5::load(dir.path(), Kind::Float, Device::Cpu).unwrap();
    index(1);
    assert!(matches!(Weights::open(dir.path()), Err(ModelError::MissingTensor { key, .. }) if key == all[half].0));
    fs::write(at("model.safetensors.index.json"), r#"{"weight_map": {"x": "../../secret"}}"#).unwrap();
    assert!(matches!(Weights::open(dir.path()), Err(ModelError::NotConfig { .. })));
}

#[test]
fn files_that_cannot_be_written_are_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let one = || ("x".to_owned(), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
    assert!(matches!(weights::save(&dir.path().join("no/folder.safetensors"), &[one()]), Err(ModelError::Unwritable { .. })));
    let twice = weights::save(&dir.path().join("twice.safetensors"), &[one(), one()]);
    assert!(matches!(twice, Err(ModelError::NotSafetensors { reason, .. }) if reason.contains("twice")));
    let complex = ("z".to_owned(), Tensor::zeros([2], (Kind::ComplexFloat, Device::Cpu)));
    assert!(weights::save(&dir.path().join("complex.safetensors"), &[complex]).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_is_encoded_is_what_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    // A transposed view: its bytes lie in another order than its values.
    let views = [("b".to_owned(), Tensor::arange(6, (Kind::Half, Device::Cpu)).reshape([2, 3]).tr()), ("a".to_owned(), Tensor::from(3i64))];
    weights::save(&path, &views).unwrap();
    assert_eq!(fs::read(&path).unwrap(), weights::encode(&path, &views).unwrap());
    let back = tensors(&path);
    assert!(back[0].1.equal(&views[1].1) && back[1].1.equal(&views[0].1));

    // Fields of metadata, in an order of no chance, and the tensors where readers want them.
    let fields: BTreeMap<String, String> = (0..9).map(|n| (format!("ella.{n}"), format!("\"{n}\" é"))).collect();
    let telling = weights::encode_telling(&path, &views, &fields).unwrap();
    assert!((0..9).all(|_| weights::encode_telling(&path, &views, &fields).unwrap() == telling));
    fs::write(&path, &telling).unwrap();
    let read = Weights::open(&path).unwrap();
    assert!(fields.iter().all(|(name, value)| read.metadata(name) == Some(value)) && read.metadata("format") == Some("pt"));
    assert!(telling[0].is_multiple_of(8) && tensors(&path).iter().zip(&back).all(|(a, b)| a.0 == b.0 && a.1.equal(&b.1)));
}

#[test]
fn a_fingerprint_is_that_of_the_file_and_changes_with_any_byte() {
    let sound = Weights::open(&Damaged::new().path()).unwrap().digest();
    let changed = Damaged::new().bytes(|bytes| *bytes.last_mut().unwrap() ^= 1);
    assert_eq!(sound, blake3::hash(&fs::read(golden("tsc-4-heads/connector.safetensors")).unwrap()).to_hex().to_string());
    assert_ne!(sound, Weights::open(&changed.path()).unwrap().digest());
}

#[test]
fn a_bad_config_names_its_field() {
    let (folder, dir) = (golden("t5-gated"), tempfile::tempdir().unwrap());
    fs::copy(folder.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let text = fs::read_to_string(folder.join("config.json")).unwrap();
    let load = |text: &str| {
        fs::write(dir.path().join("config.json"), text).unwrap();
        T5::load(dir.path(), Kind::Float, Device::Cpu).map(|_| ())
    };
    load(&text).unwrap();
    let of = |field: &str, result: Result<()>| {
        assert!(matches!(result, Err(ModelError::Config { field: f, file, .. }) if f == field && file.ends_with("config.json")), "{field}");
    };
    of("num_heads", load(&text.replace("\"num_heads\": 4", "\"num_heads\": 0")));
    of("feed_forward_proj", load(&text.replace("gated-gelu", "gated-tanh")));
    of("mystery", load(&text.replacen('{', "{\"mystery\": 1,", 1)));
    assert!(matches!(load("[]"), Err(ModelError::NotConfig { .. })));
    assert!(matches!(load(&text.replace("\"d_kv\": 3", "\"d_kv\": 4")), Err(ModelError::WrongShape { .. })));
}

/// Runs the connector's golden on changed inputs.
fn with_inputs(options: &Options, change: impl FnOnce(&mut Vec<(String, Tensor)>)) -> Result<()> {
    let (folder, dir) = (golden("tsc-4-heads"), tempfile::tempdir().unwrap());
    let mut all = tensors(&folder.join("inputs.safetensors"));
    change(&mut all);
    let inputs = dir.path().join("inputs.safetensors");
    weights::save(&inputs, &all).unwrap();
    forward(Net::Connector, &folder.join("connector.safetensors"), &inputs, &dir.path().join("out.safetensors"), options).map(|_| ())
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let options = Options { grad: true, heads: Some(4), ..Options::default() };
    let set = |name: &'static str, value: Tensor| {
        with_inputs(&options, move |all| {
            all.retain(|(known, _)| known != name);
            all.push((name.to_owned(), value));
        })
    };
    let float = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let about = |name: &str, result: Result<()>| match result {
        Err(ModelError::FileInput { what, .. }) => assert!(what.contains(name), "{what}"),
        other => panic!("{name}: {other:?}"),
    };
    about("text_features", set("text_features", float(&[2, 33, 11])));
    about("timesteps", set("timesteps", Tensor::from_slice(&[1i64, 2, 3])));
    about("timesteps", set("timesteps", Tensor::from_slice(&[1i64, -2])));
    about("grad_output", set("grad_output", float(&[2, 8, 32])));
    about("inputs", set("more", float(&[1])));
    assert!(matches!(set("timesteps", float(&[2])), Err(ModelError::WrongDtype { .. })));
    let missing = with_inputs(&options, |all| all.retain(|(name, _)| name != "grad_output"));
    assert!(matches!(missing, Err(ModelError::MissingTensor { key, .. }) if key == "grad_output"));
    about("inputs", with_inputs(&Options { grad: false, ..options }, |_| ()));
    assert!(matches!(with_inputs(&Options { heads: Some(5), ..options }, |_| ()), Err(ModelError::Input { .. })));
}

#[test]
fn ids_beyond_the_vocabulary_and_gradients_of_frozen_nets_are_refused() {
    let (folder, dir) = (golden("t5-gated"), tempfile::tempdir().unwrap());
    let (inputs, outputs) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let ids = Tensor::from_slice(&[3i64, 40]).reshape([1, 2]);
    weights::save(&inputs, &[("input_ids".into(), ids), ("attention_mask".into(), Tensor::ones([1, 2], (Kind::Int64, Device::Cpu)))])
        .unwrap();
    let run = |options: &Options| forward(Net::Text, &folder, &inputs, &outputs, options);
    assert!(matches!(run(&Options::default()), Err(ModelError::FileInput { what, .. }) if what.contains("input_ids")));
    assert!(matches!(run(&Options { grad: true, ..Options::default() }), Err(ModelError::Unsupported { .. })));
    assert!(!outputs.exists());
    assert!("vae".parse::<Net>().is_err() && "vae-encode".parse::<Net>().is_ok());
}
