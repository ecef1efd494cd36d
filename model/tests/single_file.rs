//! Single-file checkpoints against the folders that they were made from. `goldens/single_file.py` made the correspondence of names, which
//! diffusers' own conversion gives back; the tensors are made here.

// The lint's exception for tests does not reach their helper functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::folder;
use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::clip::{Clip, ClipConfig};
use ella_model::config::ConfigFile;
use ella_model::params::Params;
use ella_model::schedule::{Prediction, ScheduleConfig};
use ella_model::unet::{Added, UNet, UNetConfig};
use ella_model::vae::{Vae, VaeConfig};
use ella_model::weights;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const FLOAT: (Kind, Device) = (Kind::Float, CPU);

type Named = Vec<(String, Tensor)>;

/// The small model of a family in both forms.
struct Model {
    dir: tempfile::TempDir,
    tensors: Named,
}

impl Model {
    fn new(family: &str) -> Self {
        let golden = std::fs::read(folder("single-file").join(format!("{family}.json"))).unwrap();
        let golden: Value = serde_json::from_slice(&golden).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut parts = BTreeMap::new();
        for (part, config) in golden["configs"].as_object().unwrap() {
            let part_folder = dir.path().join("folder").join(part);
            std::fs::create_dir_all(&part_folder).unwrap();
            std::fs::write(part_folder.join("config.json"), config.to_string()).unwrap();
            let made = random(part, &part_folder);
            weights::save(&part_folder.join("model.safetensors"), &made).unwrap();
            parts.insert(part.clone(), made.into_iter().collect::<BTreeMap<_, _>>());
        }
        let get = |part: &Value, name: &Value| parts[part.as_str().unwrap()][name.as_str().unwrap()].shallow_clone();
        let stored = |key: &str, how: &Value| match how[2].as_str().unwrap() {
            "" => get(&how[0], &how[1]),
            "conv" => get(&how[0], &how[1]).unsqueeze(-1).unsqueeze(-1),
            "transpose" => get(&how[0], &how[1]).tr(),
            "pack" => Tensor::cat(&how[1].as_array().unwrap().iter().map(|name| get(&how[0], name)).collect::<Vec<_>>(), 0),
            other => panic!("{key}: {other}"),
        };
        let keys = golden["keys"].as_object().unwrap();
        let mut tensors: Named = keys.iter().map(|(key, how)| (key.clone(), stored(key, how))).collect();
        for (key, shape) in golden["extra"].as_object().unwrap() {
            let shape: Vec<i64> = serde_json::from_value(shape.clone()).unwrap();
            tensors.push((key.clone(), Tensor::ones(&shape, FLOAT)));
        }
        let model = Model { dir, tensors };
        weights::save(&model.file(), &model.tensors).unwrap();
        model
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("folder")
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("model.safetensors")
    }

    /// The single file with a change, as another file.
    fn edited(&self, change: impl Fn(&mut Named)) -> PathBuf {
        let mut tensors: Named = self.tensors.iter().map(|(key, tensor)| (key.clone(), tensor.shallow_clone())).collect();
        change(&mut tensors);
        let file = self.dir.path().join("edited.safetensors");
        weights::save(&file, &tensors).unwrap();
        file
    }
}

/// Random tensors of the network of a part.
fn random(part: &str, folder: &Path) -> Named {
    let p = Params::random(part.len() as u64, Kind::Float, CPU);
    match part {
        "unet" => drop(UNet::new(&UNetConfig::load(folder).unwrap(), &p).unwrap()),
        "vae" => drop(Vae::new(&VaeConfig::load(folder).unwrap(), &p).unwrap()),
        _ => drop(Clip::new(&ClipConfig::load(folder).unwrap(), &p).unwrap()),
    }
    p.taken()
}

#[track_caller]
fn equal(what: &str, a: &Tensor, b: &Tensor) {
    assert_eq!(a.size(), b.size(), "{what}");
    assert!(a.abs().max().double_value(&[]) > 0.0 && a.equal(b), "{what} differs");
}

#[test]
fn a_single_file_computes_what_its_folder_does() {
    for (family, pixels) in [("sd1", 512), ("sd2", 768), ("sdxl", 1024)] {
        let model = Model::new(family);
        let (file, folder) = (Base::open(&model.file()).unwrap(), Base::open(&model.folder()).unwrap());

        let bases = [&file, &folder];
        let [a, b] = bases.map(|base| base.unet(Kind::Float, CPU).unwrap());
        assert_eq!(a.config(), b.config(), "{family}");
        let (sample, t) = (Tensor::randn([2, 4, 8, 8], FLOAT), Tensor::from_slice(&[0i64, 999]));
        let states = Tensor::randn([2, 5, a.config().cross_attention_dim], FLOAT);
        let added = a.config().added.map(|added| Added {
            text_embeds: Tensor::randn([2, added.input_width - 6 * added.time_width], FLOAT),
            time_ids: Tensor::randn([2, 6], FLOAT),
        });
        let [x, y] = [&a, &b].map(|net| net.forward_added(&sample, &t, &states, added.as_ref()).unwrap());
        equal(&format!("{family} unet"), &x, &y);

        let [a, b] = bases.map(|base| base.vae(Kind::Float, CPU).unwrap());
        // The folder's says nothing of its pictures' size; a tile of a large picture is of the published model's.
        assert_eq!(a.config(), &VaeConfig { sample_size: pixels, ..b.config().clone() }, "{family}");
        let image = Tensor::randn([1, 3, 16, 16], FLOAT);
        let [x, y] = [&a, &b].map(|vae| vae.decode(&vae.encode(&image).unwrap().0).unwrap());
        equal(&format!("{family} vae"), &x, &y);

        let [a, b] = bases.map(|base| base.text_encoders().unwrap());
        assert_eq!((a.len(), b.len()), if family == "sdxl" { (2, 2) } else { (1, 1) });
        let ids = Tensor::from_slice(&[0i64, 5, 7, 98, 98, 98]).reshape([1, 6]);
        for (n, (a, b)) in a.into_iter().zip(b).enumerate() {
            let [x, y] =
                [a, b].map(|encoder| Clip::from_part(encoder.part, Kind::Float, CPU).unwrap().forward(&ids, &ids.ones_like()).unwrap());
            equal(&format!("{family} text {n}"), &x.last_hidden_state, &y.last_hidden_state);
            equal(&format!("{family} text {n} penultimate"), &x.penultimate_hidden_state, &y.penultimate_hidden_state);
            equal(&format!("{family} text {n} pooled"), &x.pooled, &y.pooled);
        }
    }
}

#[test]
fn what_the_u_net_predicts_is_told_by_marks_metadata_and_family() {
    let schedule = |file: &Path| ScheduleConfig::read(Base::open(file).unwrap().scheduler().unwrap()).unwrap();
    let (sd1, sd2) = (Model::new("sd1"), Model::new("sd2"));
    let published = schedule(&sd1.file());
    assert_eq!((published.prediction, published.beta_start, published.steps_offset), (Prediction::Epsilon, 0.00085, 1));
    assert_eq!(schedule(&sd2.file()).prediction, Prediction::Velocity);

    let mark = |key: &str, value: Tensor| {
        let key = key.to_owned();
        move |tensors: &mut Named| tensors.push((key.clone(), value.shallow_clone()))
    };
    let marked = schedule(&sd1.edited(mark("v_pred", Tensor::ones([0], FLOAT))));
    assert_eq!((marked.prediction, marked.rescale_betas_zero_snr), (Prediction::Velocity, false));
    let marked = schedule(&sd1.edited(mark("ztsnr", Tensor::ones([0], FLOAT))));
    assert_eq!((marked.prediction, marked.rescale_betas_zero_snr), (Prediction::Velocity, true));
    let of_512_pixels = sd2.edited(mark("global_step", Tensor::from(875_000i64)));
    assert_eq!(schedule(&of_512_pixels).prediction, Prediction::Epsilon);

    let said = |file: &Path, field: &str, value: &str| {
        let bytes = std::fs::read(file).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        header["__metadata__"][field] = value.into();
        let header = header.to_string();
        let all = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[8 + length..]].concat();
        let said = file.with_file_name("said.safetensors");
        std::fs::write(&said, all).unwrap();
        schedule(&said).prediction
    };
    assert_eq!(said(&sd1.file(), "modelspec.prediction_type", "v"), Prediction::Velocity);
    assert_eq!(said(&sd2.file(), "modelspec.prediction_type", "epsilon"), Prediction::Epsilon);
    assert_eq!(said(&sd2.file(), "modelspec.predict_key", "epsilon"), Prediction::Epsilon);
}

#[test]
fn files_of_other_kinds_are_refused_by_what_they_are() {
    let model = Model::new("sd1");
    let only = |keys: &[(&str, &[i64])]| {
        let tensors: Named = keys.iter().map(|(key, shape)| ((*key).to_owned(), Tensor::ones(*shape, FLOAT))).collect();
        let file = model.dir.path().join("other.safetensors");
        weights::save(&file, &tensors).unwrap();
        Base::open(&file).unwrap_err().to_string()
    };
    for (key, shape, what) in [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", &[4, 8][..], "a LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", &[4, 8], "a LoRA"),
        ("control_model.time_embed.0.weight", &[8, 4], "a ControlNet"),
        ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", &[8, 4], "an SD 3 model"),
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", &[8], "a Flux model"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", &[8], "a Flux model"),
        ("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", &[8], "SDXL's refiner"),
        ("connector.latents", &[4, 8], "an ELLA connector"),
        ("encoder.down.0.block.0.conv1.weight", &[8, 8, 3, 3], "a VAE on its own"),
        ("down_blocks.0.resnets.0.conv1.weight", &[8, 8, 3, 3], "without its config.json"),
        ("model.diffusion_model.input_blocks.0.0.weight", &[8, 9, 3, 3], "an in-painting model (9 channels"),
        ("first_stage_model.quant_conv.weight", &[8, 8, 1, 1], "a file without a U-Net"),
    ] {
        let error = only(&[(key, shape)]);
        assert!(error.contains("other.safetensors") && error.contains(what) && error.contains("is not supported; give"), "{key}: {error}");
    }
}

#[test]
fn what_is_missing_misshapen_or_left_over_is_named_by_the_files_own_key() {
    let model = Model::new("sd2");
    let unet = |file: &Path| Base::open(file).unwrap().unet(Kind::Float, CPU).unwrap_err();
    let text = |file: &Path| Base::open(file).unwrap().text_encoders().map(|found| found.len()).unwrap_err();

    let surplus = |key: &str| {
        let key = key.to_owned();
        model.edited(move |tensors| tensors.push((key.clone(), Tensor::ones([2], FLOAT))))
    };
    let error = Base::open(&surplus("cond_stage_model.adapter.weight")).unwrap_err();
    assert!(matches!(&error, ModelError::SurplusTensors { keys, .. } if keys == &["cond_stage_model.adapter.weight"]), "{error}");
    let error = unet(&surplus("model.diffusion_model.adapter.weight"));
    assert!(matches!(&error, ModelError::SurplusTensors { keys, .. } if keys == &["model.diffusion_model.adapter.weight"]), "{error}");
    let error = unet(&surplus("model.diffusion_model.middle_block.1.transformer_blocks.9.norm1.weight"));
    let key = "model.diffusion_model.middle_block.1.transformer_blocks.9.norm1.weight";
    assert!(matches!(&error, ModelError::SurplusTensors { keys, .. } if keys == &[key]), "{error}");

    let reshaped = |key: &'static str, shape: &'static [i64]| {
        model.edited(move |tensors| {
            tensors.retain(|(name, _)| name != key);
            tensors.push((key.to_owned(), Tensor::ones(shape, FLOAT)));
        })
    };
    let key = "model.diffusion_model.middle_block.0.in_layers.2.weight";
    let error = unet(&reshaped(key, &[3, 3]));
    assert!(matches!(&error, ModelError::WrongShape { key: named, found, .. } if named == key && found == &[3, 3]), "{error}");
    let key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight";
    for shape in [&[191, 64][..], &[]] {
        let error = text(&reshaped(key, shape));
        assert!(matches!(&error, ModelError::WrongShape { key: named, found, .. } if named == key && found == shape), "{error}");
    }

    let without = |key: &'static str| model.edited(move |tensors| tensors.retain(|(name, _)| !name.starts_with(key)));
    let error = unet(&without("model.diffusion_model.input_blocks.0.0.weight"));
    assert!(matches!(&error, ModelError::MissingTensor { key, .. } if key == "model.diffusion_model.input_blocks.0.0.weight"), "{error}");
    let error = Base::open(&without("first_stage_model.")).unwrap().vae(Kind::Float, CPU).unwrap_err();
    assert!(matches!(&error, ModelError::MissingTensor { key, .. } if key == "first_stage_model.encoder.conv_in.weight"), "{error}");
    assert!(Base::open(&without("cond_stage_model.")).unwrap().text_encoders().unwrap().is_empty());
}

/// The file's metadata belongs to its scheduler alone; the configuration names the file.
#[test]
fn an_inferred_configuration_names_the_file() {
    let model = Model::new("sd1");
    let config: ConfigFile = Base::open(&model.file()).unwrap().unet_part().unwrap().config;
    assert_eq!(config.file(), model.file());
}
