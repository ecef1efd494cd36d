//! What `ella scenes --prompts` writes, and what `ella dpg look` finds in pictures of it, as black boxes.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Ran, ella};
use ella_dataset::scenes::{Scene, Suite, Telling, World, scene_of};
use image::RgbImage;

/// The detector that comes with the repository.
fn detector() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../mini/detector")
}

/// Prompts of scenes, and a folder for their pictures.
fn suite(count: &str) -> (tempfile::TempDir, Suite) {
    let dir = tempfile::tempdir().unwrap();
    ella(dir.path(), &["scenes", "--world", "mini", "--prompts", "--count", count, "--seed", "5", "--out", "suite"]).ok();
    fs::create_dir(dir.path().join("grids")).unwrap();
    let suite = Suite::read(&dir.path().join("suite")).unwrap();
    (dir, suite)
}

/// A grid of one picture four times.
fn grid(dir: &Path, key: &str, scene: &Scene) {
    const SIDE: u32 = 64;
    let tile = RgbImage::from_raw(SIDE, SIDE, scene.render(SIDE)).unwrap();
    let grid = RgbImage::from_fn(2 * SIDE, 2 * SIDE, |x, y| *tile.get_pixel(x % SIDE, y % SIDE));
    grid.save(dir.join(format!("grids/{key}.png"))).unwrap();
}

#[track_caller]
fn look(dir: &Path, prompts: &str, more: &[&str]) -> Ran {
    let detector = detector().display().to_string();
    let of = [
        "dpg",
        "look",
        "--json",
        "--suite",
        "suite",
        "--prompts",
        prompts,
        "--images",
        "grids",
        "--detector",
        &detector,
        "--out",
        "answers.jsonl",
    ];
    ella(dir, &[&of[..], more].concat())
}

/// The correct score of the answers.
fn score(dir: &Path, prompts: &str) -> f64 {
    let csv = format!("suite/{prompts}.csv");
    let scored = ella(dir, &["dpg", "score", "--json", "--mode", "correct", "--csv", &csv, "--answers", "answers.jsonl"]).ok().json();
    scored["correct"]["score"]["value"].as_f64().unwrap()
}

#[test]
fn pictures_of_the_scenes_themselves_get_nearly_all_and_those_of_others_little() {
    let (dir, suite) = suite("40");
    for (key, scene) in suite.scenes() {
        grid(dir.path(), &key, &scene);
    }
    for telling in Telling::ALL {
        let found = look(dir.path(), telling.name(), &[]).ok().json();
        let asked: usize = suite.scenes().map(|(_, scene)| telling.questions(&scene).len()).sum();
        assert_eq!(found["answers"], 4 * asked);
        let value = score(dir.path(), telling.name());
        assert!(value > 97.0, "{} {value}", telling.name());
        let accuracy = found["accuracy"].as_array().unwrap();
        assert!(accuracy[0]["style"] == "rendered" && accuracy[0]["questions"].as_f64().unwrap() > 0.98, "{accuracy:?}");
    }
    for ((key, _), index) in suite.scenes().zip(1000..) {
        grid(dir.path(), &key, &scene_of(World::Mini, 5, index));
    }
    look(dir.path(), "dense", &[]).ok();
    let value = score(dir.path(), "dense");
    assert!(value < 45.0, "{value}");
}

#[test]
fn prompts_without_a_picture_are_told_and_count_as_nothing() {
    let (dir, suite) = suite("4");
    let scenes: Vec<_> = suite.scenes().collect();
    grid(dir.path(), &scenes[0].0, &scenes[0].1);
    let found = look(dir.path(), "dense", &[]).ok().json();
    assert_eq!(found["missing"], serde_json::json!(scenes[1..].iter().map(|(key, _)| key).collect::<Vec<_>>()));
    let value = score(dir.path(), "dense");
    assert!((20.0..=25.0).contains(&value), "{value}");
}

#[test]
fn what_cannot_be_looked_at_is_refused_by_name() {
    let (dir, suite) = suite("2");
    look(dir.path(), "dense", &[]).fails(4, &["grids: has no grid of any prompt of suite", "ella dpg generate"]);
    let (key, scene) = suite.scenes().next().unwrap();
    let file = dir.path().join(format!("grids/{key}.png"));
    RgbImage::new(64, 32).save(&file).unwrap();
    look(dir.path(), "dense", &[]).fails(4, &[&key, "is 64×32, not two rows of two square tiles"]);
    fs::write(&file, "no picture").unwrap();
    look(dir.path(), "dense", &[]).fails(4, &[&key]);
    grid(dir.path(), &key, &scene);
    look(dir.path(), "dense", &["--detector", "nowhere"]).fails(2, &["--detector"]);
    fs::write(dir.path().join("suite/suite.json"), "{}").unwrap();
    look(dir.path(), "dense", &[]).fails(4, &["suite/suite.json", "ella scenes --prompts"]);
}

#[test]
fn a_range_of_objects_is_kept_and_one_beyond_the_world_refused() {
    let dir = tempfile::tempdir().unwrap();
    let scenes =
        |more: &[&str]| ella(dir.path(), &[&["scenes", "--world", "mini", "--count", "8", "--out", "tars", "--json"], more].concat());
    assert_eq!(scenes(&["--objects", "2-2"]).ok().json()["objects"], 16);
    scenes(&["--objects", "3-5"]).fails(2, &["objects is 3 to 5"]);
    scenes(&["--objects", "two"]).fails(2, &["expected two numbers, as in 1-4"]);
}
