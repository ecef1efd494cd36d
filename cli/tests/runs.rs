//! train, status, audit, export, report, on one small run made by real processes.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::path::Path;

use common::collector::Collector;
use common::{Ran, ella, ella_with, world};
use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind};
use ella_model::weights::Weights;
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;

const CONFIG: &str = r#"
[run]
output = "run"
[base]
model = "models/base"
[text]
model = "models/text"
max_tokens = 24
features = "inline"
[data]
path = "data"
[connector]
layers = 1
heads = 4
latents = 4
[train]
steps = 7
global_batch = 4
micro_batch = 2
eval_every = 2
eval_samples = 4
[checkpoint]
every = 2
keep = 2
[workers]
count = 2
device = "cpu"
"#;

/// The binaries that `ella train` starts are built with the workspace; a test of this crate alone may lack them.
fn trained(here: &Path, collector: &Collector) -> Option<Ran> {
    let folder = Path::new(env!("CARGO_BIN_EXE_ella")).parent().unwrap();
    if !folder.join("ella-worker").is_file() || !folder.join("ella-coordinator").is_file() {
        println!("skipped: ella-coordinator and ella-worker are not built");
        return None;
    }
    std::fs::write(here.join("run.toml"), CONFIG).unwrap();
    let traced = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()), ("OTEL_TRACES_SAMPLER_ARG", "0.5")];
    Some(ella_with(here, &traced, &["train", "run.toml", "--json"]))
}

#[test]
fn a_run_is_trained_told_audited_exported_and_reported() {
    let dir = world();
    let here = dir.path();
    let collector = Collector::start();
    let Some(done) = trained(here, &collector) else { return };
    traces(&collector.spans());
    let done = done.ok().json();
    assert_eq!((&done["outcome"], &done["step"], &done["commits"]), (&json!("done"), &json!(7), &json!(2)));
    assert!(done["loss"].as_f64().unwrap() > 0.0);
    assert!(here.join("run/logs/coordinator.log").is_file() && here.join("run/logs/worker-1.log").is_file());

    let again = ella(here, &["train", "run.toml"]).ok();
    assert!(again.stdout.contains("done already, at step 7"), "{again:?}");
    let held = std::fs::File::open(here.join("run/logs/train.lock")).unwrap();
    held.lock().unwrap();
    ella(here, &["train", "run.toml", "--json"]).fails(1, &["run.output: run is being trained by process ", "ella top run"]);
    drop(held);
    // A pipe can be read once.
    let mut piped = std::process::Command::new(env!("CARGO_BIN_EXE_ella"));
    piped.args(["train", "/dev/stdin"]).current_dir(here).stdin(std::fs::File::open(here.join("run.toml")).unwrap());
    let piped = piped.output().unwrap();
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    let other = ella(here, &["train", "run.toml", "--set", "train.optimizer.lr=1.0", "--json"]);
    other.fails(2, &["another config", "train.optimizer.lr"]);

    let status = ella(here, &["status", "run", "--json"]).ok().json();
    assert_eq!((&status["outcome"], &status["last_commit_step"], &status["term"]), (&json!("done"), &json!(7), &json!(1)));
    assert_eq!(status["membership"], json!({ "generations": 1, "lost": 0, "joined": 0, "stragglers": 0 }));
    let text = ella(here, &["status", "run"]).ok().stdout;
    assert!(text.contains("step     7 of 7") && text.contains("workers  1 generation, 0 workers lost, 0 joined"), "{text}");
    ella(here, &["drain", "0", "run", "--json"]).fails(1, &["no `ella train`", "http://HOST:PORT"]);

    let audit = ella(here, &["audit", "run", "--json"]).ok().json();
    assert_eq!((&audit["ok"], &audit["problems"]), (&json!(true), &json!([])));
    // 16 samples in batches of 4: one epoch and three steps of the next.
    let epochs = json!([
        { "epoch": 0, "samples": 16, "expected": 16, "finished": true, "exact": true },
        { "epoch": 1, "samples": 12, "expected": 12, "finished": false, "exact": true },
    ]);
    assert_eq!(audit["epochs"], epochs);
    export(here);
    report(here, &audit);
    metrics(here);
    damage(here);
}

/// Each commit is one trace of coordinator and both ranks, though no message carries its id; every second step is one of both ranks.
fn traces(spans: &[(String, Span)]) {
    let named = |name: &str| spans.iter().filter(|(_, span)| span.name == name).collect::<Vec<_>>();
    let commits = named("commit");
    assert_eq!(commits.len(), 4, "after steps 2, 4, 6 and 7");
    for (service, commit) in commits {
        assert!(service.contains("ella-coordinator"), "{service}");
        for part in ["save", "snapshot"] {
            let of_it = |span: &Span| span.trace_id == commit.trace_id && span.parent_span_id == commit.span_id;
            let parts: Vec<_> = named(part).into_iter().filter(|(_, span)| of_it(span)).collect();
            assert!(parts.len() == 2 && parts.iter().all(|(service, _)| service.contains("ella-worker")), "{part}: {parts:?}");
        }
    }
    let (steps, ranks) = (named("step"), named("rank"));
    assert_eq!((steps.len(), ranks.len()), (3, 6), "steps 2, 4 and 6");
    for (_, rank) in ranks {
        assert!(steps.iter().any(|(_, step)| step.span_id == rank.parent_span_id && step.trace_id == rank.trace_id), "{rank:?}");
        let forward = named("forward").into_iter().filter(|(_, span)| span.parent_span_id == rank.span_id).count();
        assert_eq!(forward, 1);
    }
    assert_eq!(named("generation").len(), 1);
}

fn metrics(here: &Path) {
    let kept = std::fs::read(here.join("run/metrics.parquet")).unwrap();
    assert!(kept.starts_with(b"PAR1") && kept.ends_with(b"PAR1"), "written at the run's end");
    let made = ella(here, &["metrics", "run", "--json"]).ok().json();
    assert_eq!((&made["steps"], std::fs::read(here.join("run/metrics.parquet")).unwrap() == kept), (&json!(7), true));
    ella(here, &["metrics", "run", "--out", "m.csv"]).ok();
    let mode = |name: &str| std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(here.join(name)).unwrap().permissions());
    assert_eq!(mode("m.csv"), mode("run.toml"), "as readable as any other new file");
    let csv = std::fs::read_to_string(here.join("m.csv")).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    assert!(
        lines.len() == 8 && lines[0].starts_with("step,time,term,samples,loss,held_out_loss,grad_norm,lr,") && lines[7].starts_with("7,"),
        "{csv}"
    );
    let made = ella(here, &["metrics", "run", "--tensorboard", "tb", "--json"]).ok().json();
    assert!(here.join(made["file"].as_str().unwrap()).is_file() && made["pictures"] == 0, "{made}");
    ella(here, &["metrics", "run", "--out", "m.xlsx", "--json"]).fails(2, &["m.xlsx", ".parquet"]);
    ella(here, &["metrics", "run", "--out", "no/m.csv"]).fails(4, &["no/m.csv"]);
    ella(here, &["metrics", "data"]).fails(4, &["data/run.toml"]);
}

fn export(here: &Path) {
    let made = ella(here, &["export", "run", "--out", "c.safetensors", "--json"]).ok().json();
    assert_eq!((&made["step"], &made["file"]), (&json!(7), &json!("c.safetensors")));
    let bytes = std::fs::read(here.join("c.safetensors")).unwrap();
    assert_eq!((&made["bytes"], &made["blake3"]), (&json!(bytes.len()), &json!(ella_store::Digest::of(&bytes))));
    ella(here, &["export", "run", "--out", "again.safetensors"]).ok();
    assert!(std::fs::read(here.join("again.safetensors")).unwrap() == bytes, "other bytes of the same commit");
    ella(here, &["export", "run", "--out", "ema16.safetensors", "--ema", "--dtype", "fp16"]).ok();
    let sizes = ConnectorConfig { layers: 1, heads: 4, latents: 4, ..ConnectorConfig::new(ConnectorKind::Tsc, 64, 64) };
    let layout = Connector::layout(&sizes).unwrap();
    for file in ["c.safetensors", "ema16.safetensors"] {
        let weights = Weights::open(&here.join(file)).unwrap();
        assert_eq!(weights.names().count(), layout.len());
        for (name, shape) in &layout {
            assert_eq!(weights.shape(name).unwrap(), shape, "{name}");
        }
    }
    let half = Weights::open(&here.join("ema16.safetensors")).unwrap();
    assert_eq!(half.describe("connector.latents").unwrap().1, tch::Kind::Half);
    ella(here, &["export", "run", "--out", "no/c.safetensors", "--json"]).fails(4, &["no/c.safetensors"]);
    how_it_was_trained(here);
}

/// A commit's files and what is exported tell how they were trained, and who draws with them keeps to it.
fn how_it_was_trained(here: &Path) {
    let text = ella_model::part::Part::open(&here.join("models/text")).unwrap().fingerprint();
    let told = json!({
        "ella.heads": "4", "ella.padding": "fixed", "ella.max_tokens": "24", "ella.layers": "last", "ella.text": text, "ella.text_dtype": "fp32",
    });
    let commit = "run/commits/000000000007.1";
    for file in ["c.safetensors", "ema16.safetensors", &format!("{commit}/connector.safetensors"), &format!("{commit}/ema.safetensors")] {
        assert_eq!(ella(here, &["inspect", file, "--json"]).ok().json()["trained"], told, "{file}");
    }
    let shown = ella(here, &["inspect", "c.safetensors"]).ok().stdout;
    assert!(shown.contains("\n  ella.max_tokens: 24\n"), "{shown}");

    let models = ["sample", "--connector", "c.safetensors", "--base", "models/base", "--text", "models/text", "--steps", "2"];
    let draw = |more: &[&str]| ella(here, &[&models[..], &["--prompt", "a red circle", "--out", "drawn.png"], more].concat());
    let picture = || std::fs::read(here.join("drawn.png")).unwrap();
    let warned = |ran: Ran| ran.ok().stderr.lines().filter(|line| line.contains("WARNING")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(warned(draw(&[])), [""; 0]);
    let as_trained = picture();
    assert_eq!(warned(draw(&["--heads", "4", "--padding", "fixed", "--max-tokens", "24", "--layers", "last"])), [""; 0]);
    assert!(picture() == as_trained, "texts are read otherwise than in training");
    // Allowed without a warning: it changes little, but something.
    assert_eq!(warned(draw(&["--text-dtype", "bf16"])), [""; 0]);
    assert!(picture() != as_trained, "the text encoder's own dtype is passed over");
    draw(&["--heads", "8", "--json"]).fails(2, &["c.safetensors: connector heads must be 4, with which it was trained (found 8)"]);
    for (more, words) in [
        (["--padding", "none"], "c.safetensors was trained with padding fixed, and not none"),
        (["--max-tokens", "16"], "c.safetensors was trained with max_tokens 24, and not 16"),
        (["--layers", "average"], "c.safetensors was trained with layers last, and not average"),
    ] {
        let said = warned(draw(&more));
        assert!(said.len() == 1 && said[0].contains(words), "{said:?}");
    }
    ella(here, &["init-base", "--preset", "nano", "--seed", "9", "--captions", "data", "--out", "others"]).ok();
    let models = ["--connector", "c.safetensors", "--base", "models/base", "--text", "others/text", "--steps", "2"];
    std::fs::create_dir(here.join("prompts")).unwrap();
    std::fs::write(here.join("prompts/one.txt"), "a red circle").unwrap();
    let sample = &["sample", "--prompt", "a red circle", "--out", "drawn.png"][..];
    for what in [sample, &["dpg", "generate", "--prompts", "prompts", "--out", "grids"]] {
        let said = warned(ella(here, &[what, &models].concat()));
        let words = format!("was trained with the text encoder of fingerprint {}, and not ", &text[..12]);
        assert!(said.len() == 1 && said[0].contains(&words) && said[0].contains("(others/text)"), "{said:?}");
    }
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(here.join("grids/generate.json")).unwrap()).unwrap();
    let settings = &record["settings"];
    assert_eq!((&settings["heads"], &settings["max_tokens"], &settings["padding"]), (&json!(4), &json!(24), &json!("fixed")));
}

fn report(here: &Path, audit: &serde_json::Value) {
    std::fs::write(here.join("audit.json"), audit.to_string()).unwrap();
    image::RgbImage::new(2, 2).save(here.join("grid.png")).unwrap();
    let arguments = ["report", "run", "--out", "report.html", "--audit", "audit.json", "--samples", "grid.png", "--title", "Small"];
    let made = ella(here, &[&arguments[..], &["--json"]].concat()).ok().json();
    assert!(made["held_out_loss"]["ratio"].as_f64().unwrap() > 0.0, "{made}");
    let page = std::fs::read_to_string(here.join("report.html")).unwrap();
    for expected in ["<h1>Small</h1>", "data:image/png;base64,", "holds", "7 of 7", "<svg", "global_batch"] {
        assert!(page.contains(expected), "{expected}");
    }
    // A run may be named in more than one way, and is known by its id: another's audit says nothing about it.
    let at = here.join("run").display().to_string();
    ella(here, &["report", &at, "--out", "r.html", "--audit", "audit.json"]).ok();
    let mut other = audit.clone();
    (other["id"], other["run"]) = (json!("of-another"), json!("runs/other"));
    std::fs::write(here.join("other.json"), other.to_string()).unwrap();
    ella(here, &["report", "run", "--out", "r.html", "--audit", "other.json"]).fails(4, &["other.json", "another run, runs/other"]);
    let text = ella(here, &arguments).ok().stdout;
    assert!(text.contains("held-out loss") && text.contains("first tenth"), "{text}");
    ella(here, &["report", "run", "--out", "r.html", "--audit", "run.toml", "--json"]).fails(4, &["run.toml", "no audit's verdict"]);
    ella(here, &["report", "run", "--out", "r.html", "--samples", "run.toml"]).fails(4, &["run.toml", "not a PNG"]);
    ella(here, &["report", "run", "--out", "no/r.html"]).fails(4, &["no/r.html"]);
}

/// Each kind of damage fails the audit, which says what; put back, the audit holds again.
fn damage(here: &Path) {
    let complaint = |about: &[&str]| {
        let ran = ella(here, &["audit", "run", "--json"]);
        assert_eq!(ran.code, 1, "{ran:?}");
        let found = ran.json();
        let problems = found["problems"].to_string();
        assert_eq!(found["ok"], false);
        about.iter().for_each(|word| assert!(problems.contains(word), "expected {word}: {problems}"));
    };
    let folder = here.join("run/commits/000000000007.1");
    let part = folder.join("optimizer.safetensors");
    let good = std::fs::read(&part).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    std::fs::write(&part, flipped).unwrap();
    complaint(&["000000000007.1/optimizer.safetensors", "wrong bytes"]);
    ella(here, &["export", "run", "--out", "x.safetensors"]).ok(); // another part of that commit
    std::fs::write(&part, good).unwrap();

    let connector = folder.join("connector.safetensors");
    let good = std::fs::read(&connector).unwrap();
    std::fs::write(&connector, &good[..good.len() - 1]).unwrap();
    ella(here, &["export", "run", "--out", "x.safetensors", "--json"]).fails(4, &["connector.safetensors", "corrupt"]);
    std::fs::write(&connector, good).unwrap();

    std::fs::rename(&folder, here.join("aside")).unwrap();
    complaint(&["000000000007.1/connector.safetensors", "missing"]);
    std::fs::rename(here.join("aside"), &folder).unwrap();

    let record = here.join("run/log/000000000002.json");
    let kept = std::fs::read_to_string(&record).unwrap();
    std::fs::remove_file(&record).unwrap();
    complaint(&["log/000000000002.json", "missing"]);
    ella(here, &["status", "run", "--json"]).fails(4, &["log/000000000002.json"]);
    std::fs::write(&record, kept.replace("\"samples\": 16", "\"samples\": 15")).unwrap();
    complaint(&["ledger of epoch 0 has 15 samples", "expected 16"]);
    std::fs::write(&record, kept).unwrap();

    std::fs::rename(here.join("data"), here.join("moved")).unwrap();
    complaint(&["data set can't be read", "--data"]);
    ella(here, &["audit", "run", "--data", "moved"]).ok();
    std::fs::rename(here.join("moved"), here.join("data")).unwrap();

    std::fs::create_dir(here.join("run/commits/000000000009.1")).unwrap();
    let text = ella(here, &["audit", "run"]).ok().stdout;
    assert!(text.contains("000000000009.1: no record names it"), "{text}");
}

#[test]
fn what_is_no_run_or_config_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    for command in
        [&["audit", "x", "--json"][..], &["status", "x", "--json"], &["export", "x", "--out", "o"], &["report", "x", "--out", "o"]]
    {
        ella(here, command).fails(4, &["x/run.toml", "no run folder"]);
    }
    ella(here, &["status", "http://127.0.0.1:1", "--json"]).fails(1, &["127.0.0.1:1", "no coordinator"]);
    ella(here, &["drain", "0", "http://127.0.0.1:1", "--json"]).fails(1, &["127.0.0.1:1", "no coordinator"]);
    ella(here, &["drain", "0", "--json"]).fails(2, &["RUN|URL"]);
    let ever = u64::MAX.to_string();
    ella(here, &["drain", "0", "http://127.0.0.1:1", "--timeout", &ever, "--json"]).fails(2, &["--timeout", "0..=31536000"]);
    ella(here, &["why", "x", "--steps", "0", "--json"]).fails(2, &["--steps", "1.."]);
    ella(here, &["train", "gone.toml", "--json"]).fails(2, &["gone.toml", "cannot be read"]);
    std::fs::write(here.join("run.toml"), CONFIG).unwrap();
    ella(here, &["train", "run.toml", "--set", "train.step=3", "--json"]).fails(2, &["train.step", "train.steps"]);
    ella(here, &["train", "run.toml", "--set", "train.global_batch=3"]).fails(2, &["train.global_batch"]);
    std::fs::write(here.join("bad.toml"), "[run]\noutput = 3\n").unwrap();
    ella(here, &["train", "bad.toml", "--json"]).fails(2, &["bad.toml", "line 2"]);
    ella(here, &["train", "run.toml", "--coordinator", "http://127.0.0.1:1", "--json"]).fails(1, &["no coordinator"]);
    // Whatever is computed on, and before a folder is made.
    for variable in [("ELLA_FUSED", "foo"), ("ELLA_GRAPHS", "maybe")] {
        ella_with(here, &[variable], &["train", "run.toml", "--json"]).fails(2, &[variable.0, variable.1]);
    }
    assert!(!here.join("run").exists());
    ella(here, &["dance", "--json"]).fails(2, &["dance"]);
    assert!(ella(here, &["--help"]).ok().stdout.contains("Exit codes"));
    assert!(ella(here, &["--version"]).ok().stdout.starts_with("ella "));
    assert_eq!(ella(here, &[]).code, 2);
}

#[test]
fn a_run_that_cannot_load_its_models_says_why() {
    let dir = world();
    let here = dir.path();
    std::fs::remove_file(here.join("models/base/unet/diffusion_pytorch_model.safetensors")).unwrap();
    let Some(ran) = trained(here, &Collector::start()) else { return };
    ran.fails(4, &["models/base/unet"]);
}
