//! `ella claims` on a few scenes and steps, as a black box: that every part is there and can be traced, not what the numbers are.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::fs;
use std::path::Path;

use common::ella;

#[test]
fn a_small_set_of_claims_is_measured_and_shown_and_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mini = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mini").display().to_string();
    let small = [
        "claims",
        "--json",
        "--quick",
        "--steps",
        "4",
        "--scenes",
        "256",
        "--prompts",
        "3",
        "--kinds",
        "mlp",
        "--mini",
        &mini,
        "--out",
        "out",
    ];
    let found = ella(dir.path(), &small).ok().json();
    let names: Vec<&str> = found["dense"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    for name in ["score", "entity", "attribute", "global", "other"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let out = dir.path().join("out");
    let run = "tsc-6-seed-1";
    for run in [run, "mlp-6-seed-1"] {
        assert!(found["losses"][run].as_f64().unwrap() > 0.0, "{run}");
    }
    for file in [
        &format!("runs/{run}.safetensors"),
        &format!("answers/{run}-dense.jsonl"),
        "answers/base-seed-1-short.jsonl",
        "claims.json",
        "report.html",
    ] {
        assert!(out.join(file).is_file(), "{file}");
    }
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    for part in [
        "a. Dense prompts",
        "b. Kinds of connectors",
        "c. What the connector looks at",
        "d. A LoRA",
        "e. Short prompts",
        "The scorer itself",
        run,
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("NaN"), "{page}");
    let kinds: Vec<&str> = found["attention"]["kinds"].as_array().unwrap().iter().map(|kind| kind[0].as_str().unwrap()).collect();
    assert!(kinds.contains(&"place") && kinds.contains(&"surface"), "{kinds:?}");

    // Again: what is there is not made anew, and says the same.
    let before = fs::metadata(out.join(format!("drawn/{run}/dense/generate.json"))).unwrap().modified().unwrap();
    let again = ella(dir.path(), &small).ok().json();
    assert_eq!((&again["dense"], &again["short"], &again["losses"]), (&found["dense"], &found["short"], &found["losses"]));
    assert_eq!(fs::metadata(out.join(format!("drawn/{run}/dense/generate.json"))).unwrap().modified().unwrap(), before);
    // Another recipe does not join it.
    ella(dir.path(), &["claims", "--quick", "--steps", "5", "--mini", &mini, "--out", "out"])
        .fails(2, &["out: holds claims of another recipe"]);
    ella(dir.path(), &["claims", "--quick", "--mini", "nowhere", "--out", "other"]).fails(4, &["nowhere/base/unet"]);
}
