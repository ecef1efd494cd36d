//! What `ella dpg generate` writes, goes on with, and refuses, as a black box.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{Ran, ella, untrained, world};
use ella_model::connector::ConnectorKind;
use image::RgbImage;
use serde_json::{Value, json};

const PROMPTS: [(&str, &str); 5] = [
    ("0", "A large red circle on the left of a small blue square, above two green triangles and a yellow star."),
    ("partiprompts97", "a café at night"),
    ("stanford1", "a dog"),
    ("vrd2", "three cups on a table"),
    ("whoops3", "a snowman in the desert"),
];

/// Models, an untrained connector, and prompts.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self { dir: world() };
        untrained(&world.path("connector.safetensors"), ConnectorKind::Tsc, 64);
        std::fs::create_dir(world.path("prompts")).unwrap();
        for (name, text) in PROMPTS {
            world.prompt(name, text.as_bytes());
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn prompt(&self, name: &str, text: &[u8]) {
        std::fs::write(self.path(&format!("prompts/{name}.txt")), text).unwrap();
    }

    #[track_caller]
    fn run(&self, more: &[&str]) -> Ran {
        ella(self.dir.path(), &[&["dpg", "generate", "--json", "--base", "models/base", "--steps", "2"], more].concat())
    }

    /// By the connector, into a folder.
    #[track_caller]
    fn draw(&self, out: &str, more: &[&str]) -> Ran {
        let by = ["--connector", "connector.safetensors", "--heads", "4", "--text", "models/text", "--out", out];
        let prompts: &[&str] = if more.contains(&"--prompts") { &[] } else { &["--prompts", "prompts"] };
        self.run(&[&by[..], prompts, more].concat())
    }

    fn files(&self, out: &str) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(self.path(out)).unwrap().map(|entry| entry.unwrap());
        entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
    }

    fn record(&self, out: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(out).join("generate.json")).unwrap()).unwrap()
    }
}

fn tile(grid: &Path, number: u32, side: u32) -> RgbImage {
    let grid = image::open(grid).unwrap().into_rgb8();
    assert_eq!(grid.dimensions(), (2 * side, 2 * side));
    image::imageops::crop_imm(&grid, number % 2 * side, number / 2 * side, side, side).to_image()
}

/// Equal but for rounding: convolutions over another number of pictures may differ in their last bits.
fn same(a: &RgbImage, b: &RgbImage) -> bool {
    a.dimensions() == b.dimensions() && a.iter().zip(b.iter()).all(|(a, b)| a.abs_diff(*b) <= 1)
}

#[test]
fn grids_hold_what_ella_sample_draws_from_the_seeds_that_are_told() {
    let world = World::new();
    let made = world.draw("out", &["--seed", "5"]).ok().json();
    assert_eq!((&made["resolution"], &made["prompts"], &made["tiles"]), (&json!(64), &json!(5), &json!(20)));
    assert_eq!(
        (&made["drawn"], &made["there"], &made["truncated"], &made["clip_truncated"]),
        (&json!(5), &json!(0), &json!(0), &Value::Null)
    );
    let names: Vec<String> = world.files("out").into_keys().collect();
    assert_eq!(names, ["0.png", "generate.json", "partiprompts97.png", "stanford1.png", "vrd2.png", "whoops3.png"]);

    let record = world.record("out");
    assert_eq!(record["tiles"], json!([[0, 0], [64, 0], [0, 64], [64, 64]]));
    assert_eq!(
        (&record["settings"]["seed"], &record["settings"]["steps"], &record["settings"]["sampler"]),
        (&json!(5), &json!(2), &json!("ddim"))
    );
    let digest = |file: &str| ella_model::weights::Weights::open(&world.path(file)).unwrap().digest();
    assert_eq!(record["settings"]["connector"], json!(digest("connector.safetensors")));
    let (name, text) = PROMPTS[0];
    assert_eq!(record["images"][name]["prompt"], json!(text));
    let seeds: Vec<String> = record["images"][name]["seeds"].as_array().unwrap().iter().map(|seed| seed.to_string()).collect();
    let models = ["--connector", "connector.safetensors", "--heads", "4", "--base", "models/base", "--text", "models/text", "--steps", "2"];
    let what = ["--prompt", text, "--seeds", &seeds.join(","), "--out-dir", "each"];
    ella(world.dir.path(), &[&["sample", "--json"], &models[..], &what].concat()).ok();
    for number in 0..4 {
        let alone = image::open(world.path(&format!("each/000{number}.png"))).unwrap().into_rgb8();
        assert!(same(&tile(&world.path("out/0.png"), number, 64), &alone), "tile {number}");
        assert!((0..number).all(|other| !same(&tile(&world.path("out/0.png"), other, 64), &alone)), "two tiles are the same");
    }
    let file = std::fs::File::open(world.path("out/partiprompts97.png")).unwrap();
    let reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().unwrap();
    let told = &reader.info().uncompressed_latin1_text[0];
    assert!(
        told.keyword == "parameters" && told.text.starts_with("a café at night\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: "),
        "{told:?}"
    );
    assert_eq!(told.text.matches("Connector: ").count(), 4);
}

#[test]
fn base_and_connector_draw_from_the_same_noise() {
    let world = World::new();
    world.prompt("long", PROMPTS[0].1.repeat(9).as_bytes());
    let by_connector = world.draw("ella", &[]).ok().json();
    let by_clip = world.run(&["--prompts", "prompts", "--out", "clip", "--only-clip"]).ok().json();
    assert_eq!((&by_clip["connector"], &by_clip["truncated"], &by_clip["clip_truncated"]), (&Value::Null, &Value::Null, &json!(1)));
    assert_eq!(by_connector["truncated"], json!(1));
    let (ella_s, clip_s) = (world.record("ella"), world.record("clip"));
    assert_eq!(ella_s["images"], clip_s["images"]);
    assert_eq!(clip_s["settings"]["connector"], Value::Null);
    assert!(clip_s["settings"]["clip"].is_string() && ella_s["settings"]["clip"].is_null());
    // What `ella sample --compare` calls CLIP.
    let seed = clip_s["images"]["vrd2"]["seeds"][2].to_string();
    let models = ["--connector", "connector.safetensors", "--heads", "4", "--base", "models/base", "--text", "models/text", "--steps", "2"];
    let what = ["--compare", "--prompt", PROMPTS[3].1, "--seeds", &seed, "--out-dir", "each"];
    ella(world.dir.path(), &[&["sample", "--json"], &models[..], &what].concat()).ok();
    for (whose, folder) in [("clip", "clip"), ("ella", "ella")] {
        let alone = image::open(world.path(&format!("each/0000-{whose}.png"))).unwrap().into_rgb8();
        assert!(same(&tile(&world.path(&format!("{folder}/vrd2.png")), 2, 64), &alone), "{whose}");
    }
    let hybrid = world.draw("both", &["--with-clip", "--size", "32"]).ok().json();
    assert_eq!((&hybrid["resolution"], &hybrid["clip_truncated"]), (&json!(32), &json!(1)));
    assert_eq!(image::open(world.path("both/0.png")).unwrap().into_rgb8().dimensions(), (64, 64));
}

#[test]
fn what_is_there_and_whole_is_not_drawn_again_and_all_else_comes_out_as_before() {
    let world = World::new();
    let batch = ["--batch", "8"];
    world.draw("out", &batch).ok();
    let all = world.files("out");
    let stamp = |name: &str| std::fs::metadata(world.path(name)).unwrap().modified().unwrap();
    let untouched = stamp("out/0.png");
    std::fs::remove_file(world.path("out/vrd2.png")).unwrap();
    let half = &all["whoops3.png"][..all["whoops3.png"].len() / 2];
    std::fs::write(world.path("out/whoops3.png"), half).unwrap();
    std::fs::write(world.path("out/stanford1.png#1"), "left by a killed writer").unwrap();
    let made = world.draw("out", &batch).ok().json();
    assert_eq!((&made["drawn"], &made["there"], &made["replaced"]), (&json!(1), &json!(3), &json!(1)));
    assert!(world.files("out") == all, "other bytes");
    assert_eq!(stamp("out/0.png"), untouched);
    let made = world.draw("out", &batch).ok().json();
    assert_eq!((&made["drawn"], &made["there"], &made["replaced"]), (&json!(0), &json!(5), &json!(0)));
    // The same prompts from a list are the same set.
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let rows = |(name, text): (&str, &str)| format!("{name},{0},is it?\n{name},{0},where?\n", quoted(text));
    let list: String = PROMPTS.map(rows).concat();
    std::fs::write(world.path("q.csv"), format!("item_id,text,question_natural_language\n{list}")).unwrap();
    let made = world.draw("out", &["--batch", "8", "--prompts", "./q.csv"]).ok().json();
    assert_eq!((&made["drawn"], &made["there"]), (&json!(0), &json!(5)));
}

#[test]
fn a_folder_of_other_settings_is_refused_by_the_settings_name() {
    let world = World::new();
    world.draw("out", &[]).ok();
    let all = world.files("out");
    for (more, name) in [
        (&["--guidance", "3"][..], "`guidance` 7.5, and not 3.0"),
        (&["--seed", "1"], "`seed` 0, and not 1"),
        (&["--sampler", "euler"], "`sampler` \"ddim\", and not \"euler\""),
        (&["--size", "32"], "`size` 64, and not 32"),
        (&["--padding", "none"], "`max_tokens`"),
        (&["--negative", "blur"], "`negative` null, and not \"blur\""),
        (&["--batch", "8"], "`batch` 4, and not 8"),
        (&["--with-clip"], "`clip`"),
        (&["--threads", "2"], "`threads` 1, and not 2"),
    ] {
        world.draw("out", more).fails(4, &["out/generate.json", name, "choose another folder"]);
    }
    world.run(&["--prompts", "prompts", "--out", "out", "--only-clip"]).fails(4, &["generate.json", "`clip` null"]);
    world.prompt("another", b"a cat");
    world.draw("out", &[]).fails(4, &["generate.json", "`prompts`"]);
    std::fs::remove_file(world.path("prompts/another.txt")).unwrap();
    untrained(&world.path("connector.safetensors"), ConnectorKind::TscZero, 64);
    world.draw("out", &[]).fails(4, &["generate.json", "`connector`"]);
    assert!(world.files("out") == all);
    std::fs::create_dir(world.path("album")).unwrap();
    std::fs::write(world.path("album/holiday.png"), "mine").unwrap();
    world.draw("album", &[]).fails(4, &["album/generate.json", "is not there, and pictures are"]);
    std::fs::write(world.path("album/generate.json"), "{}").unwrap();
    world.draw("album", &[]).fails(4, &["album/generate.json", "is no record"]);
}

#[test]
fn input_that_cannot_be_used_is_named_before_anything_is_drawn() {
    let world = World::new();
    let refused = |code: i32, more: &[&str], words: &[&str]| {
        world.draw("bad", more).fails(code, words);
        assert!(!world.path("bad").exists(), "{more:?}");
    };
    std::fs::create_dir(world.path("none")).unwrap();
    refused(4, &["--prompts", "none"], &["none", "no prompt is there"]);
    refused(4, &["--prompts", "gone"], &["gone", "is no folder"]);
    refused(4, &["--prompts", "gone.csv"], &["gone.csv", "not found"]);
    refused(2, &["--size", "64x32"], &["`size` is 64x32", "square"]);
    refused(2, &["--size", "60"], &["`size` is 60x60", "multiples of the VAE's 8"]);
    refused(2, &["--guidance", "nan"], &["`guidance` is NaN"]);
    refused(2, &["--seed", "9223372036854775808"], &["--seed"]);
    refused(2, &["--only-clip"], &["--only-clip", "cannot be used with"]);
    world.run(&["--prompts", "prompts", "--out", "bad", "--only-clip", "--text-dtype", "bf16"]).fails(2, &["--only-clip", "--text-dtype"]);
    let heads = ["--prompts", "prompts", "--out", "bad", "--connector", "connector.safetensors", "--heads", "7", "--text", "models/text"];
    world.run(&heads).fails(2, &["connector heads", "a divisor of the width"]);
    refused(4, &["--lora", "gone.safetensors"], &["gone.safetensors", "not found"]);
    world.run(&["--prompts", "prompts", "--out", "bad"]).fails(2, &["--connector"]);
    world.run(&["--prompts", "prompts", "--out", "bad", "--connector", "connector.safetensors"]).fails(2, &["--text"]);
    untrained(&world.path("narrow.safetensors"), ConnectorKind::Tsc, 16);
    let narrow = ["--prompts", "prompts", "--out", "bad", "--connector", "narrow.safetensors", "--heads", "4", "--text", "models/text"];
    world.run(&narrow).fails(4, &["narrow.safetensors", "the connector's width is 16", "do not belong together"]);
    world.prompt("broken", b"caf\xe9");
    refused(4, &[], &["prompts/broken.txt", "is not UTF-8"]);
    std::fs::rename(world.path("prompts/broken.txt"), world.path("prompts/v1.5.txt")).unwrap();
    refused(4, &[], &["prompts/v1.5.txt", "\"v1.5\" has a dot"]);
    std::fs::remove_file(world.path("prompts/v1.5.txt")).unwrap();
    world.prompt("blank", b"\n");
    refused(4, &[], &["prompts/blank.txt", "is empty"]);
    std::fs::remove_file(world.path("prompts/blank.txt")).unwrap();
    std::fs::remove_dir_all(world.path("models/base/text_encoder")).unwrap();
    world.run(&["--prompts", "prompts", "--out", "bad", "--only-clip"]).fails(4, &["models/base/text_encoder", "--only-clip"]);
    std::fs::write(world.path("file"), "").unwrap();
    world.draw("file", &[]).fails(2, &["file: a file is there (expected a folder"]);
}

#[test]
fn a_job_can_be_written_for_others_to_coordinate() {
    let world = World::new();
    let text = |more: &[&str]| {
        let ran = world.draw("s3://bucket/grids", &[&["--write-job", "job.toml"], more].concat());
        assert_eq!(ran.code, 0, "{ran:?}");
        std::fs::read_to_string(world.path("job.toml")).unwrap()
    };
    let written = text(&["--lora", "style.safetensors:0.8", "--size", "512"]);
    for words in ["kind = \"draw\"", "data = \"s3://bucket/grids\"", "prompts = \"prompts\"", "size = \"512x512\"", "weight = 0.8"] {
        assert!(written.contains(words), "{written}");
    }
}
