//! What makes networks fit: pictures one at a time and in tiles, as diffusers does.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Golden, folder, relative, tensors};
use ella_model::ModelError;
use ella_model::config::ConfigFile;
use ella_model::forward::{self, Net, Options};
use ella_model::params::{Layout, Params};
use ella_model::vae::{Vae, VaeConfig};
use ella_model::weights;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

#[track_caller]
fn within(what: &str, a: &Tensor, b: &Tensor, most: f64) {
    let error = relative(a, b);
    println!("{what}: {error:.1e}");
    assert!(error <= most, "{what}: relative error {error:.1e} exceeds {most:.0e}");
}

fn vae() -> (Vae, Golden) {
    (Vae::load(&folder("vae"), Kind::Float, CPU).unwrap(), Golden::open("vae"))
}

#[test]
fn tiles_equal_diffusers() {
    let (net, golden) = vae();
    for case in ["even", "odd"] {
        let get = |name: &str| golden.get(&format!("tiled.{case}.{name}"));
        let (mean, logvar) = net.encode_tiled(&get("image")).unwrap();
        within(&format!("{case} mean"), &mean, &get("mean"), 1e-5);
        within(&format!("{case} logvar"), &logvar, &get("logvar"), 1e-5);
        let image = net.decode_tiled(&get("latent")).unwrap();
        within(&format!("{case} decoded"), &image, &get("decoded"), 1e-5);
        // Else the golden would say nothing about tiles.
        assert!(relative(&net.decode(&get("latent")).unwrap(), &image) > 1e-2);
    }
}

#[test]
fn one_at_a_time_is_the_same_as_together() {
    let (net, golden) = vae();
    let (latent, image) = (golden.get("tiled.even.latent"), golden.get("even.image").narrow(3, 0, 16));
    within("decode_each", &net.decode_each(&latent).unwrap(), &net.decode(&latent).unwrap(), 1e-5);
    // No larger than a tile.
    let small = latent.narrow(2, 0, 4).narrow(3, 0, 4);
    within("decode_tiled", &net.decode_tiled(&small).unwrap(), &net.decode(&small).unwrap(), 1e-5);
    within("encode_tiled", &net.encode_tiled(&image).unwrap().0, &net.encode(&image).unwrap().0, 1e-5);
}

fn config(edit: impl Fn(&mut Value)) -> ConfigFile {
    let mut fields: Value = serde_json::from_slice(&std::fs::read(folder("vae").join("config.json")).unwrap()).unwrap();
    edit(&mut fields);
    ConfigFile::from_map(std::path::Path::new("config.json"), fields.as_object().unwrap().clone())
}

#[test]
fn sizes_of_tiles_are_read_and_refused() {
    for (value, expected) in [(json!(512), 512), (json!([768, 512]), 768), (Value::Null, 32)] {
        assert_eq!(VaeConfig::read(config(|c| c["sample_size"] = value.clone())).unwrap().sample_size, expected);
    }
    for value in [json!(0), json!("large"), json!([512]), json!([0, 512])] {
        let error = VaeConfig::read(config(|c| c["sample_size"] = value.clone())).unwrap_err();
        assert!(matches!(&error, ModelError::Config { field, .. } if field == "sample_size"), "{error}");
    }

    let uneven = VaeConfig::read(config(|c| c["sample_size"] = json!(20))).unwrap();
    let net = Vae::new(&uneven, &Params::random(1, Kind::Float, CPU)).unwrap();
    let error = net.decode_tiled(&Tensor::zeros([1, 4, 8, 8], (Kind::Float, CPU))).unwrap_err().to_string();
    assert!(error.contains("sample_size of 20") && error.contains("multiple of 16"), "{error}");

    // 38 is three strides of 12 and two pixels: half of a latent's.
    let (net, _) = vae();
    let error = net.encode_tiled(&Tensor::zeros([1, 3, 16, 38], (Kind::Float, CPU))).unwrap_err().to_string();
    assert!(error.contains("leave 0 or at least 4 when divided by 12"), "{error}");
    assert!(net.encode_tiled(&Tensor::zeros([1, 4, 16, 16], (Kind::Float, CPU))).is_err());
    assert!(net.decode_each(&Tensor::zeros([1, 3, 8, 8], (Kind::Float, CPU))).is_err());
}

fn run(net: Net, model: &str, inputs: &[(&str, Tensor)], options: Options<'_>) -> ella_model::Result<Vec<(String, Tensor)>> {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("in.safetensors"), dir.path().join("out.safetensors"));
    let inputs: Vec<_> = inputs.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone())).collect();
    weights::save(&from, &inputs).unwrap();
    assert_eq!(forward::forward(net, &folder(model), &from, &to, &options)?, options.kind);
    Ok(tensors(&to))
}

#[test]
fn forward_works_in_tiles_and_in_the_other_layout() {
    let golden = Golden::open("vae");
    let get = |name: &str| golden.get(&format!("tiled.odd.{name}"));
    let tiling = Options { tiling: true, ..Options::default() };
    for options in [tiling, Options { layout: Some(Layout::ChannelsLast), ..tiling }] {
        let encoded = run(Net::VaeEncode, "vae", &[("image", get("image"))], options).unwrap();
        for (name, tensor) in encoded {
            within(&name, &tensor, &get(&name), 1e-5);
        }
        let decoded = run(Net::VaeDecode, "vae", &[("latent", get("latent"))], options).unwrap();
        within("decoded", &decoded[0].1, &get("decoded"), 1e-5);
    }
    let refused = |net, options| {
        let error = run(net, "vae", &[("image", get("image"))], options).unwrap_err();
        assert!(matches!(error, ModelError::Unsupported { .. }), "{error}");
    };
    refused(Net::Unet, tiling);
    refused(Net::Text, Options { layout: Some(Layout::ChannelsLast), ..Options::default() });
}
