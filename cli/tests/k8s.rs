//! `ella k8s`, as far as it needs no cluster.
#![allow(clippy::unwrap_used)]

mod common;

use common::ella;
use std::path::Path;

const RUN: &str =
    "[run]\noutput = \"runs/first\"\n[base]\nmodel = \"models/base\"\n[text]\nmodel = \"models/text\"\n[data]\npath = \"data\"\n";

/// A run's folder as `ella train` leaves it, as far as saves are read from it: two commits, the second after 50 s.
fn run_folder(folder: &Path) {
    for part in ["events", "metrics"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
    }
    std::fs::write(folder.join("run.toml"), RUN).unwrap();
    let event =
        |step: u64, at: u64| format!("{{\"at_unix_ms\":{at},\"event\":\"committed\",\"step\":{step},\"folder\":\"f\",\"bytes\":1}}\n");
    let metric =
        |step: u64, at: u64| format!("{{\"at_unix_ms\":{at},\"step\":{step},\"samples\":{step},\"loss\":0.5,\"lr\":0.1,\"parts\":null}}\n");
    std::fs::write(folder.join("events/000001-000001.jsonl"), event(1, 2_000) + &event(2, 53_000)).unwrap();
    std::fs::write(folder.join("metrics/000001-000001.jsonl"), metric(1, 1_000) + &metric(2, 3_000)).unwrap();
}

#[test]
fn a_run_is_rendered_for_people_and_for_scripts() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    std::fs::write(here.join("run.toml"), RUN).unwrap();
    let yaml = ella(here, &["k8s", "render", "run.toml", "--overlay", "local", "--set", "workers.count=3"]).ok().stdout;
    assert!(yaml.starts_with("apiVersion: v1\nkind: Namespace\n") && yaml.contains("\n  completions: 3\n"), "{yaml}");
    let result = ella(here, &["k8s", "render", "run.toml", "--overlay", "local", "--out", "first.yaml", "--json"]).ok().json();
    assert_eq!((&result["name"], &result["namespace"]), (&"first".into(), &"ella".into()));
    let written = std::fs::read_to_string(here.join("first.yaml")).unwrap();
    assert_eq!(written.matches("\nkind: ").count(), result["objects"].as_array().unwrap().len());
}

#[test]
fn workers_have_as_long_as_the_saves_of_an_earlier_run_took() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    std::fs::write(here.join("run.toml"), RUN).unwrap();
    run_folder(&here.join("earlier"));
    let yaml = ella(here, &["k8s", "render", "run.toml", "--overlay", "local", "--save-of", "earlier"]).ok().stdout;
    assert!(yaml.contains("terminationGracePeriodSeconds: 180\n"), "30 s and thrice 50: {yaml}");
    ella(here, &["k8s", "render", "run.toml", "--overlay", "local", "--save-of", "none"]).fails(4, &["this is no run folder"]);
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    std::fs::write(here.join("run.toml"), RUN).unwrap();
    ella(here, &["k8s", "render", "none.toml"]).fails(2, &["none.toml"]);
    ella(here, &["k8s", "render", "run.toml"]).fails(2, &["`run.output` is \"runs/first\"", "--volume"]);
    ella(here, &["k8s", "render", "run.toml", "--overlay", "locl"]).fails(2, &["`--overlay` is locl"]);
    ella(here, &["k8s", "render", "run.toml", "--image", "worker=ella-worker:latest"]).fails(2, &["a tag other than latest"]);
    ella(here, &["k8s", "render", "run.toml", "--image", "trainer=x:1"]).fails(2, &["`--image` is of trainer"]);
    ella(here, &["k8s", "render", "run.toml", "--volume", "/srv"]).fails(2, &["nfs:SERVER:/FOLDER"]);
    ella(here, &["k8s", "render", "run.toml", "--egress", "0"]).fails(2, &["--egress", "1..=65535"]);
    if cfg!(not(feature = "k8s-client")) {
        ella(here, &["k8s", "cancel", "first"]).fails(2, &["ella k8s cancel: this build has no client", "--features k8s-client"]);
    }
}
