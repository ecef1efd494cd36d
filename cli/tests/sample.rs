//! What the flags of `ella sample` do, as black boxes.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::path::{Path, PathBuf};

use common::{Ran, ella, untrained, untrained_pooled, world};
use ella_model::connector::ConnectorKind;
use ella_model::weights::Weights;
use image::RgbImage;
use serde_json::{Value, json};
use tch::{Device, Kind};

const LONG: &str = "A large red circle on the left of a small blue square, above two green triangles and a yellow star.";

/// Models, an untrained connector, and what draws with them in two steps.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = world();
        untrained(&dir.path().join("connector.safetensors"), ConnectorKind::Tsc, 64);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    fn run(&self, more: &[&str]) -> Ran {
        let models = ["--connector", "connector.safetensors", "--heads", "4", "--base", "models/base", "--text", "models/text"];
        ella(self.dir.path(), &[&["sample", "--json", "--steps", "2"], &models[..], more].concat())
    }

    /// One picture for each that is asked for, and what scripts are told.
    #[track_caller]
    fn draw(&self, more: &[&str]) -> (Vec<RgbImage>, Value) {
        let made = self.run(&[more, &["--out-dir", "each"]].concat()).ok().json();
        let read = |file: &Value| self.read(file.as_str().unwrap());
        (made["files"].as_array().unwrap().iter().map(read).collect(), made)
    }

    #[track_caller]
    fn one(&self, more: &[&str]) -> RgbImage {
        self.draw(&[&["--prompt", "a red circle"], more].concat()).0.remove(0)
    }

    fn read(&self, name: &str) -> RgbImage {
        image::open(self.path(name)).unwrap().into_rgb8()
    }
}

/// Equal but for rounding: convolutions over another number of pictures may differ in their last bits.
fn same(a: &RgbImage, b: &RgbImage) -> bool {
    a.dimensions() == b.dimensions() && a.iter().zip(b.iter()).all(|(a, b)| a.abs_diff(*b) <= 1)
}

fn text(file: &Path) -> String {
    let reader = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(file).unwrap())).read_info().unwrap();
    let info = reader.info();
    assert_eq!(info.uncompressed_latin1_text[0].keyword, "parameters");
    info.uncompressed_latin1_text[0].text.clone()
}

#[test]
fn a_picture_depends_on_its_own_seed_whatever_is_drawn_beside_it() {
    let world = World::new();
    let prompts = ["--prompt", "a red circle", "--prompt", LONG];
    let (many, made) = world.draw(&[&prompts[..], &["--images", "3", "--seed", "4", "--batch", "4"]].concat());
    let seeds: Vec<&Value> = made["pictures"].as_array().unwrap().iter().map(|picture| &picture["seed"]).collect();
    assert_eq!(seeds, [4, 5, 6, 4, 5, 6]);
    assert_eq!(made["pictures"][3], json!({ "prompt": LONG, "seed": 4 }));
    assert!((0..6).all(|i| (0..i).all(|j| !same(&many[i], &many[j]))), "two pictures are the same");
    let (few, _) = world.draw(&[&prompts[..], &["--images", "3", "--seed", "4", "--batch", "1"]].concat());
    assert!(many.iter().zip(&few).all(|(a, b)| same(a, b)));
    let (listed, _) = world.draw(&["--prompt", LONG, "--seeds", "6,9,4"]);
    assert!(same(&listed[0], &many[5]) && same(&listed[2], &many[3]) && !same(&listed[1], &many[4]));
    assert!(same(
        &world.one(&["--seed", "5", "--sampler", "euler-a"]),
        &world.draw(&[&prompts[..2], &["--seeds", "1,5", "--sampler", "euler-a"]].concat()).0[1]
    ));

    let parameters = text(&world.path("each/0000.png"));
    assert!(parameters.starts_with("a red circle\nSteps: 2, Sampler: euler-a, CFG scale: 7.5, Seed: 1, "), "{parameters}");
    let digest = Weights::open(&world.path("connector.safetensors")).unwrap().digest();
    assert!(parameters.contains(&digest) && made["connector"] == json!(digest), "{parameters}");
    world.run(&["--prompt", "a", "b", "--seeds", "1,2,3"]).fails(2, &["--seeds", "one for each picture", "found 3"]);
    world.run(&["--prompt", "a", "--seeds", "1", "--seed", "2"]).fails(2, &["--seed"]);
    world.run(&["--prompt", "a", "--seeds", "1,x"]).fails(2, &["--seeds", "x"]);
}

#[test]
fn texts_are_filled_up_or_taken_at_their_own_length() {
    let world = World::new();
    let (fixed, flexible) = (world.one(&[]), world.one(&["--padding", "none"]));
    assert!(!same(&fixed, &flexible));
    assert!(!same(&world.one(&["--padding", "none", "--negative-padding", "fixed"]), &flexible));
    assert!(!same(&world.one(&["--max-tokens", "40"]), &fixed));
    // Beside a longer prompt, and with a limit that it does not reach.
    let (both, _) = world.draw(&["--prompt", "a red circle", "--prompt", LONG, "--padding", "none"]);
    assert!(same(&both[0], &flexible) && same(&world.one(&["--padding", "none", "--max-tokens", "40"]), &flexible));

    let long = [LONG; 8].join(" ");
    let cut = |more: &[&str]| world.draw(&[&["--prompt", &long, "--prompt", "a star"], more].concat()).1["truncated"].clone();
    assert_eq!((cut(&[]), cut(&["--padding", "none"]), cut(&["--padding", "none", "--max-tokens", "16"])), (json!(1), json!(0), json!(1)));
    let human = ella(
        world.dir.path(),
        &[
            "sample",
            "--connector",
            "connector.safetensors",
            "--heads",
            "4",
            "--base",
            "models/base",
            "--text",
            "models/text",
            "--steps",
            "1",
        ]
        .into_iter()
        .chain(["--prompt", &long, "--negative", &long, "--compare"])
        .collect::<Vec<_>>(),
    );
    let said = human.ok().stdout;
    for expected in
        ["1 of 1 prompt cut at the text encoder's 128 tokens", "the negative prompt cut", "1 of 1 prompt cut at CLIP's 77 tokens"]
    {
        assert!(said.contains(expected), "{said}");
    }
}

/// Before anything is drawn.
#[test]
fn what_cannot_become_a_file_and_what_is_no_connector_is_said_first() {
    let world = World::new();
    std::fs::create_dir(world.path("folder.png")).unwrap();
    world.run(&["--prompt", "a", "--device", "cuda", "--out", "folder.png"]).fails(4, &["folder.png", "is a folder", "--out-dir"]);
    let models = ["--base", "models/base", "--text", "models/text", "--prompt", "a"];
    ella(world.dir.path(), &[&["sample", "--connector", "models"], &models[..]].concat()).fails(2, &["models", "a folder", "ella export"]);

    let config = world.path("models/base/vae/config.json");
    let wide = std::fs::read_to_string(&config).unwrap().replace("\"latent_channels\": 4", "\"latent_channels\": 16");
    std::fs::write(&config, wide).unwrap();
    world.run(&["--prompt", "a"]).fails(2, &["models/base", "in_channels", "latent_channels, 16"]);
}

#[test]
fn a_file_of_prompts_has_one_on_each_line_and_may_begin_with_a_mark() {
    let world = World::new();
    std::fs::write(world.path("prompts.txt"), "\u{feff}a red circle\r\n\r\n  \u{6f22}\u{5b57}  \n").unwrap();
    let (_, made) = world.draw(&["--prompts", "prompts.txt"]);
    let prompts: Vec<&Value> = made["pictures"].as_array().unwrap().iter().map(|picture| &picture["prompt"]).collect();
    assert_eq!(prompts, ["a red circle", "\u{6f22}\u{5b57}"]);
}

#[test]
fn guidance_sizes_and_number_formats() {
    let world = World::new();
    let plain = world.one(&["--guidance", "1"]);
    assert_eq!(plain, world.one(&["--guidance", "1", "--negative", "blue"]));
    let guided = world.one(&["--guidance", "3"]);
    assert!(!same(&plain, &guided) && !same(&guided, &world.one(&["--guidance", "3", "--negative", "blue"])));
    assert_eq!(world.draw(&["--prompt", ""]).0.len(), 1);

    for (size, expected) in [("128x64", (128, 64)), ("40", (40, 40)), ("72x40", (72, 40))] {
        assert_eq!(world.one(&["--size", size]).dimensions(), expected);
    }
    assert!(same(&world.one(&["--size", "64x64"]), &world.one(&[])));
    for wrong in ["60", "64x60", "0", "32768x8", "-8"] {
        world.run(&["--prompt", "a", &format!("--size={wrong}")]).fails(2, &["--size", "multiples of the VAE's 8"]);
    }
    world.run(&["--prompt", "a", "--size", "big"]).fails(2, &["--size", "WIDTHxHEIGHT"]);

    let whole = world.one(&["--guidance", "1", "--device", "cpu"]);
    let rough = world.one(&["--guidance", "1", "--device", "cpu", "--dtype", "bf16"]);
    let apart = whole.iter().zip(rough.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / whole.len() as f64;
    assert!(apart > 0.0 && apart < 10.0, "{apart}");
}

#[test]
fn the_bases_own_clip_stands_beside_the_connector() {
    let world = World::new();
    let ella_alone = world.one(&[]);
    let hybrid = world.one(&["--with-clip"]);
    assert!(!same(&hybrid, &ella_alone));
    assert!(same(&world.one(&["--clip-prompt", "a red circle"]), &hybrid) && !same(&world.one(&["--clip-prompt", "sks"]), &hybrid));

    let prompts = ["--prompt", "a red circle", "--prompt", LONG];
    let (each, made) = world.draw(&[&prompts[..], &["--compare"]].concat());
    assert_eq!(made["files"], json!(["each/0000-clip.png", "each/0000-ella.png", "each/0001-clip.png", "each/0001-ella.png"]));
    assert_eq!(made["compare"]["columns"], json!(["CLIP", "ELLA"]));
    assert!(same(&each[1], &ella_alone) && !same(&each[0], &each[1]) && !same(&each[0], &each[2]));
    assert!(
        !text(&world.path("each/0000-clip.png")).contains("Connector") && text(&world.path("each/0000-ella.png")).contains("Connector")
    );

    world.run(&[&prompts[..], &["--compare", "--out", "both.png"]].concat()).ok();
    let sheet = world.read("both.png");
    let holds = |x: u32, picture: &RgbImage| {
        let tall = sheet.height() - picture.height();
        (0..=tall).any(|y| same(&image::imageops::crop_imm(&sheet, x, y, picture.width(), picture.height()).to_image(), picture))
    };
    assert!(holds(2, &each[0]) && holds(68, &each[1]) && holds(2, &each[2]) && holds(68, &each[3]));
    assert_eq!(sheet.width(), 2 * 64 + 3 * 2);

    std::fs::remove_dir_all(world.path("models/base/tokenizer")).unwrap();
    world.run(&["--prompt", "a", "--compare"]).fails(4, &["models/base/tokenizer", "not found", "CLIP"]);
    std::fs::remove_dir_all(world.path("models/base/text_encoder")).unwrap();
    world.run(&["--prompt", "a", "--with-clip"]).fails(4, &["models/base/text_encoder", "not found", "--with-clip"]);
    world.run(&["--prompt", "a"]).ok();
}

/// The columns of the base's own CLIP are what diffusers' pipelines draw (model/goldens/pipelines.py).
#[test]
fn a_comparisons_clip_is_diffusers() {
    let world = World::new();
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens");
    for (name, pooled) in [("pipeline-sd15", None), ("pipeline-sdxl", Some(12))] {
        let base = goldens.join(name);
        untrained_pooled(&world.path("narrow.safetensors"), ConnectorKind::Tsc, 16, pooled);
        let settings: Value = serde_json::from_slice(&std::fs::read(base.join("prompts.json")).unwrap()).unwrap();
        let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let (steps, guidance, negative) = (word(&settings["steps"]), word(&settings["guidance"]), word(&settings["negative"]));
        let prompts: Vec<String> = settings["prompts"].as_array().unwrap().iter().map(word).collect();
        let (base_name, latents) = (base.display().to_string(), base.join("noise.safetensors").display().to_string());
        let pictures = Weights::open(&base.join("pictures.safetensors")).unwrap();
        for (case, negative) in [("", &["--negative", negative.as_str()][..]), (".none", &[])] {
            for sampler in ["ddim", "dpm++2m"] {
                let models = ["--connector", "narrow.safetensors", "--heads", "4", "--base", &base_name, "--text", "models/text"];
                let how = ["--steps", &steps, "--guidance", &guidance, "--sampler", sampler, "--latents", &latents, "--out-dir", "golden"];
                let what = ["--compare", "--prompt", &prompts[0], &prompts[1]];
                let made = ella(world.dir.path(), &[&["sample", "--json"], &models[..], &how, &what, negative].concat()).ok().json();
                assert_eq!((&made["compare"]["truncated"], &made["compare"]["max_tokens"]), (&json!(1), &json!(77)));
                let key = format!("{sampler}{case}");
                let shape = pictures.shape(&key).unwrap().to_vec();
                let expected = pictures.load(&key, &shape, Kind::Uint8, Device::Cpu).unwrap();
                let drawn: Vec<u8> = (0..2).flat_map(|i| world.read(&format!("golden/000{i}-clip.png")).into_raw()).collect();
                let expected = Vec::<u8>::try_from(expected.flatten(0, -1)).unwrap();
                assert_eq!(drawn.len(), expected.len());
                let worst = drawn.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                let apart = drawn.iter().zip(&expected).filter(|(a, b)| a != b).count();
                println!("{name} {key}: worst {worst}/255, {apart} of {} bytes differ", drawn.len());
                assert!(worst <= 1 && apart * 100 < drawn.len(), "{name} {key}: {worst}, {apart}");
            }
        }
    }
}
