//! LoRA files merged into U-Nets, against diffusers. `goldens/lora.py` made the files and the expected values.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{Golden, folder, relative, tensors};
use ella_model::lora::Lora;
use ella_model::part::Part;
use ella_model::unet::{Added, UNet};
use ella_model::weights;
use ella_model::{ModelError, Result};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const WEIGHT: f64 = 0.8;

fn file(name: &str) -> PathBuf {
    folder("lora").join(format!("{name}.safetensors"))
}

fn merged(unet: &str, loras: &[Lora], kind: Kind) -> Result<Tensor> {
    let net = UNet::from_part_with(Part::open(&folder(unet))?, loras, kind, CPU)?;
    let case = Golden::open(unet);
    let get = |name: &str| case.get(&format!("odd.{name}"));
    let added = || Added { text_embeds: get("text_embeds"), time_ids: get("time_ids") };
    let added = case.0.shape("odd.text_embeds").is_some().then(added);
    net.forward_added(&get("sample"), &get("timesteps"), &get("hidden_states"), added.as_ref())
}

#[track_caller]
fn equals_diffusers(case: &str, unet: &str, files: &[(&str, f64)]) {
    let expected = Golden::open("lora").get(case);
    let loras: Vec<Lora> = files.iter().map(|(name, weight)| Lora::open(&file(name), *weight).unwrap()).collect();
    let error = relative(&merged(unet, &loras, Kind::Float).unwrap(), &expected);
    println!("{case}: relative error {error:.2e}");
    assert!(error <= 1e-5, "{case}: relative error {error:.2e}");
}

#[test]
fn every_layout_merged_at_a_weight_gives_what_diffusers_gives() {
    // All layers of SD 1.5's kind, convolutions too, at three ranks.
    equals_diffusers("kohya", "unet-sd15", &[("kohya", WEIGHT)]);
    // All layers of SDXL's kind, under the original block names.
    equals_diffusers("sgm", "unet-sdxl", &[("sgm", WEIGHT)]);
    equals_diffusers("peft", "unet-sd15", &[("peft", WEIGHT)]);
    // Alpha by layer, and rank-stabilized, as the file's header says.
    equals_diffusers("peft-settings", "unet-sdxl", &[("peft-settings", WEIGHT)]);
    equals_diffusers("processors", "unet-sd15", &[("processors", WEIGHT)]);
}

#[test]
fn several_add_up() {
    equals_diffusers("two", "unet-sd15", &[("kohya", WEIGHT), ("peft", -0.5)]);
}

#[test]
fn a_decomposed_convolution_gives_what_its_three_convolutions_give() {
    equals_diffusers("mid", "unet-sd15", &[("mid", WEIGHT)]);
}

#[test]
fn a_weight_of_nothing_changes_nothing() {
    let nothing = Lora::open(&file("kohya"), 0.0).unwrap();
    let [with, without] = [&[nothing][..], &[]].map(|loras| merged("unet-sd15", loras, Kind::Float).unwrap());
    assert!(with.equal(&without));
}

#[test]
fn it_is_added_before_the_cast() {
    let lora = Lora::open(&file("kohya"), WEIGHT).unwrap();
    let y = merged("unet-sd15", &[lora], Kind::BFloat16).unwrap();
    assert_eq!(y.kind(), Kind::BFloat16);
    assert!(relative(&y, &Golden::open("lora").get("kohya")) < 5e-2);
}

#[test]
fn what_is_for_the_text_encoder_is_counted() {
    let lora = Lora::open(&file("kohya"), WEIGHT).unwrap();
    assert_eq!(lora.text_tensors(), 2);
    assert!(lora.unused().unwrap().ends_with("kohya.safetensors: 2 tensors for the text encoder are not used"));
    assert_eq!(Lora::open(&file("peft"), WEIGHT).unwrap().unused(), None);
}

#[test]
fn file_and_weight_are_its_fingerprint() {
    let print = |name: &str, weight| Lora::open(&file(name), weight).unwrap().fingerprint();
    assert_eq!(print("kohya", 0.8), print("kohya", 0.8));
    assert_ne!(print("kohya", 0.8), print("kohya", 0.9));
    assert_ne!(print("kohya", 0.8), print("peft", 0.8));
}

/// A file of these tensors.
fn write(here: &Path, tensors: &[(String, Tensor)]) -> PathBuf {
    let path = here.join("made.safetensors");
    weights::save(&path, tensors).unwrap();
    path
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
    let error = result.unwrap_err();
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "expected {word:?}: {text}");
    }
}

#[test]
fn a_lora_for_another_architecture_is_refused_with_file_tensor_expected_and_found() {
    let of = |name: &str| [Lora::open(&file(name), 1.0).unwrap()];
    // SDXL's has layers that SD 1.5 lacks, and the other way round.
    let error = merged("unet-sd15", &of("peft-settings"), Kind::Float).unwrap_err();
    assert!(matches!(&error, ModelError::LoraMismatch { .. }), "{error}");
    refused(merged("unet-sd15", &of("sgm"), Kind::Float), &["sgm.safetensors", "lora_unet_", "expected", "found"]);
    refused(merged("unet-sdxl", &of("kohya"), Kind::Float), &["kohya.safetensors", "lora_unet_", "expected", "found"]);
    // The same layers, of other widths.
    let dir = tempfile::tempdir().unwrap();
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, CPU));
    let layer = |end: &str| format!("lora_unet_conv_in.lora_{end}.weight");
    let wide = write(dir.path(), &[(layer("down"), ones(&[2, 9, 3, 3])), (layer("up"), ones(&[6, 2, 1, 1]))]);
    let words = ["made.safetensors", "lora_unet_conv_in.lora_down.weight", "expected shape [2, 4, 3, 3]", "found [2, 9, 3, 3]"];
    refused(merged("unet-sd15", &[Lora::open(&wide, 1.0).unwrap()], Kind::Float), &words);
    let ranks = write(dir.path(), &[(layer("down"), ones(&[2, 4, 3, 3])), (layer("up"), ones(&[6, 3, 1, 1]))]);
    refused(merged("unet-sd15", &[Lora::open(&ranks, 1.0).unwrap()], Kind::Float), &["lora_up.weight", "[6, 2]", "[6, 3, 1, 1]"]);
}

#[test]
fn what_is_not_whole_or_not_a_lora_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = |tensors: &[(&str, Tensor)]| {
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone())).collect();
        Lora::open(&write(dir.path(), &tensors), 1.0)
    };
    let one = Tensor::ones([1, 1], (Kind::Float, CPU));
    let with = |name| (name, one.shallow_clone());
    refused(open(&[]), &["made.safetensors", "found none"]);
    refused(open(&[with("lora_te_x.lora_up.weight")]), &["made.safetensors", "text encoders only"]);
    refused(open(&[with("lora_unet_conv_in.lora_up.weight")]), &["made.safetensors", "conv_in", "down factor", "missing"]);
    refused(open(&[with("lora_unet_conv_in.hada_w1_a")]), &["LoHa", "lora_unet_conv_in.hada_w1_a", "not supported"]);
    refused(open(&[with("conv_in.weight")]), &["conv_in.weight", "lora_A"]);
    refused(open(&[with("unet.conv_in.lora_A.weight"), with("conv_in.lora.down.weight")]), &["same under two names"]);
    refused(Lora::open(&dir.path().join("none.safetensors"), 1.0), &["none.safetensors", "not found"]);
    refused(Lora::open(&file("kohya"), f64::NAN), &["weight", "finite"]);
    // PEFT's own file needs its settings.
    refused(
        open(&[with("base_model.model.conv_in.lora_A.weight"), with("base_model.model.conv_in.lora_B.weight")]),
        &["adapter_config.json"],
    );

    // One layer under its two names, and an alpha that is no number.
    let conv = |name: &str, shape: &[i64]| (name.to_owned(), Tensor::ones(shape, (Kind::Float, CPU)));
    let pair =
        |base: &str| [conv(&format!("{base}.lora_down.weight"), &[1, 4, 3, 3]), conv(&format!("{base}.lora_up.weight"), &[6, 1, 1, 1])];
    let twice: Vec<_> = [pair("lora_unet_conv_in"), pair("lora_unet_input_blocks_0_0")].into_iter().flatten().collect();
    let path = write(dir.path(), &twice);
    refused(merged("unet-sd15", &[Lora::open(&path, 1.0).unwrap()], Kind::Float), &["conv_in once", "twice"]);
    let mut alpha: Vec<_> = pair("lora_unet_conv_in").into();
    alpha.push(conv("lora_unet_conv_in.alpha", &[2]));
    let path = write(dir.path(), &alpha);
    refused(merged("unet-sd15", &[Lora::open(&path, 1.0).unwrap()], Kind::Float), &["lora_unet_conv_in.alpha", "one finite number", "[2]"]);
}

#[test]
fn files_of_the_golden_hold_every_layer() {
    // The kohya file changes every linear map and convolution, so that no name is left untried.
    let weights: Vec<String> = tensors(&folder("unet-sd15").join("diffusion_pytorch_model.safetensors"))
        .into_iter()
        .filter(|(name, tensor)| name.ends_with(".weight") && tensor.dim() > 1)
        .map(|(name, _)| name)
        .collect();
    let ups = tensors(&file("kohya")).into_iter().filter(|(name, _)| name.starts_with("lora_unet_") && name.ends_with("up.weight")).count();
    assert_eq!(ups, weights.len());
}
