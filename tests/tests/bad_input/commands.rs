//! `sample`, `forward`, `export`, `audit`, `status` on what they cannot use.

use super::{CONNECTOR, FAILED, PERMANENT, USAGE, cut, ella_refused, files, shared};
use anyhow::Result;
use ella_tests::{ella, try_ella};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;
use std::time::{Duration, Instant};

/// A tensor of zeros: its name, whether it holds integers, its shape.
type Spec<'a> = (&'a str, bool, &'a [usize]);

/// Writes tensors.
fn write_tensors(path: &Path, tensors: &[Spec]) -> Result<()> {
    let zeros = vec![0u8; 1 << 16];
    let view = |integer: bool, shape: &[usize]| {
        let (dtype, size) = if integer { (Dtype::I64, 8) } else { (Dtype::F32, 4) };
        TensorView::new(dtype, shape.to_vec(), &zeros[..size * shape.iter().product::<usize>()])
    };
    let views: Vec<_> = tensors.iter().map(|(name, integer, shape)| Ok((*name, view(*integer, shape)?))).collect::<Result<_>>()?;
    Ok(std::fs::write(path, safetensors::serialize(views, None)?)?)
}

#[test]
fn forward_names_the_input_and_its_rule() -> Result<()> {
    let shared = shared()?;
    let inputs = shared.path("inputs.safetensors");
    let outputs = shared.path("outputs.safetensors");
    let (features, steps): (Spec, Spec) = (("text_features", false, &[2, 5, 64]), ("timesteps", true, &[2]));
    let model = shared.path(CONNECTOR);
    let connector = ["forward", "connector", "--model", &model, "--inputs", &inputs, "--outputs", &outputs];
    let cases: [(&[Spec], &[&str]); 6] = [
        (&[features], &["tensor timesteps", "missing"]),
        (&[("text_features", false, &[2, 5, 32]), steps], &["text_features", "[B=2, S=5, 64]", "found [2, 5, 32]"]),
        (&[("text_features", false, &[10, 64]), steps], &["text_features", "found [10, 64]"]),
        (&[features, ("timesteps", true, &[3])], &["timesteps", "[B=2]", "found [3]"]),
        (&[features, ("timesteps", false, &[2])], &["timesteps", "integer", "F32"]),
        (&[features, steps, ("more", true, &[1])], &["no other", "found more"]),
    ];
    for (tensors, words) in cases {
        write_tensors(Path::new(&inputs), tensors)?;
        ella_refused(&connector, PERMANENT, &[words, &["inputs.safetensors"]].concat())?;
    }
    write_tensors(Path::new(&inputs), &[features, steps])?;
    ella_refused(&[&connector[..], &["--grad"]].concat(), PERMANENT, &["inputs.safetensors", "grad_output", "missing"])?;
    ella_refused(&[&connector[..], &["--heads", "7"]].concat(), USAGE, &["heads must be 8, with which it was trained", "found 7"])?;
    let unet = ["forward", "unet", "--model", &shared.path("models/base/unet"), "--inputs", &inputs, "--outputs", &outputs];
    ella_refused(&unet, PERMANENT, &["inputs.safetensors", "tensor sample", "missing"])?;
    ella_refused(&["forward", "unit", "--model", "m", "--inputs", "i", "--outputs", "o"], USAGE, &["unit", "unet"])?;
    cut(Path::new(&inputs))?;
    ella_refused(&connector, PERMANENT, &["inputs.safetensors", "cut short"])?;
    std::fs::write(&inputs, "no tensors here")?;
    ella_refused(&connector, PERMANENT, &["inputs.safetensors", "not a safetensors file"])?;
    std::fs::remove_file(&inputs)?;
    ella_refused(&connector, PERMANENT, &["inputs.safetensors", "not found"])?;
    assert!(!Path::new(&outputs).exists(), "outputs of a refused input");
    Ok(())
}

#[test]
fn sample_names_what_it_cannot_use() -> Result<()> {
    let shared = shared()?;
    let (base, text, connector) = (shared.path("models/base"), shared.path("models/text"), shared.path(CONNECTOR));
    let png = shared.path("sample.png");
    let refused = |connector: &str, base: &str, text: &str, more: &[&str], code: i32, words: &[&str]| {
        let models = ["sample", "--connector", connector, "--base", base, "--text", text, "--out", &png];
        ella_refused(&[&models[..], more].concat(), code, words)
    };
    let prompt = ["--prompt", "a red box"];
    let (nothing, other) = (shared.path("no-connector"), shared.path("models/text/model.safetensors"));
    refused(&nothing, &base, &text, &prompt, PERMANENT, &["no-connector", "not found"])?;
    refused(&other, &base, &text, &prompt, PERMANENT, &["models/text/model.safetensors", "holds no connector", "connector.latents"])?;
    refused(&connector, &text, &text, &prompt, PERMANENT, &["models/text/unet/config.json", "not found"])?;
    refused(&connector, &base, &base, &prompt, PERMANENT, &["models/base/config.json", "not found"])?;
    refused(&connector, &base, &text, &[], USAGE, &["--prompt"])?;
    refused(&connector, &base, &text, &[&prompt[..], &["--size", "13"]].concat(), USAGE, &["--size", "multiple", "13"])?;
    refused(&connector, &base, &text, &[&prompt[..], &["--guidance", "nan"]].concat(), USAGE, &["--guidance", "finite"])?;
    refused(&connector, &base, &text, &["--prompts", &shared.path("no-prompts.txt")], PERMANENT, &["no-prompts.txt", "cannot be read"])?;
    let latents = shared.path("latents.safetensors");
    let given = [&prompt[..], &["--latents", &latents]].concat();
    write_tensors(Path::new(&latents), &[("latents", false, &[1, 3, 8, 8])])?;
    refused(&connector, &base, &text, &given, PERMANENT, &["latents.safetensors", "[1, 4, h, w]", "[1, 3, 8, 8]"])?;
    write_tensors(Path::new(&latents), &[("noise", false, &[1, 4, 8, 8])])?;
    refused(&connector, &base, &text, &given, PERMANENT, &["latents.safetensors", "tensor latents", "missing"])?;
    assert!(!Path::new(&png).exists(), "a picture of refused input");
    Ok(())
}

#[test]
fn what_is_no_run_is_named_and_left_alone() -> Result<()> {
    let shared = shared()?;
    let before = files(&shared.world.path("data"))?;
    let out = shared.path("exported");
    for (folder, file) in [("data", "data/run.toml"), ("no-run", "no-run/run.toml")] {
        let folder = shared.path(folder);
        for command in [&["audit", &folder][..], &["export", &folder, "--out", &out]] {
            ella_refused(command, PERMANENT, &[file, "not found", "no run folder"])?;
        }
    }
    ella_refused(&["status", &shared.path("no-run")], PERMANENT, &["no-run/run.toml", "not found", "no run folder"])?;
    // A data set has a status too, and is left as it is.
    assert!(ella(&["status", &shared.path("data")])?.contains("48 samples"));
    assert!(files(&shared.world.path("data"))? == before && !Path::new(&out).exists());
    ella_refused(&["status", "http://127.0.0.1:1"], FAILED, &["127.0.0.1:1", "no coordinator answers"])?;
    ella_refused(&["audit", &shared.path("run.toml")], USAGE, &["run.toml", "a file is there", "expected a folder"])
}

#[test]
fn a_run_without_commits_and_a_place_that_cannot_be_written_are_named() -> Result<()> {
    let shared = shared()?;
    let empty = shared.copy("run", "run-without-commits")?;
    std::fs::remove_dir_all(empty.join("log"))?;
    let (empty, run) = (empty.display().to_string(), shared.path("run"));
    ella_refused(&["export", &empty, "--out", &shared.path("exported")], FAILED, &["run-without-commits", "no commit yet"])?;
    let below = format!("{}/c.safetensors", shared.path("run.toml"));
    ella_refused(&["export", &run, "--out", &below], PERMANENT, &["run.toml/c.safetensors", "cannot be written"])?;
    let elsewhere = try_ella(&["audit", &run, "--data", &shared.path("models"), "--json"])?;
    let audit: serde_json::Value = serde_json::from_slice(&elsewhere.stdout)?;
    assert_eq!((elsewhere.status.code(), &audit["ok"]), (Some(FAILED), &false.into()));
    assert!(audit["problems"].to_string().contains("models/manifest.json: not found"), "{audit}");
    Ok(())
}

#[test]
fn a_device_that_is_not_there_ends_the_run_soon() -> Result<()> {
    if Path::new("/dev/nvidiactl").exists() {
        println!("skipped: this machine has an NVIDIA device");
        return Ok(());
    }
    let shared = shared()?;
    let run = shared.world.run("on-a-gpu", 4, "")?;
    let begin = Instant::now();
    ella_refused(&run.train(&["workers.device=cuda"]), PERMANENT, &["workers.device", "no NVIDIA device"])?;
    assert!(begin.elapsed() < Duration::from_secs(30), "after {:?}", begin.elapsed());
    Ok(())
}

#[test]
fn damaged_metrics_do_not_fail_a_run_that_is_done() -> Result<()> {
    let shared = shared()?;
    let run = shared.copy("run", "run-bad-metrics")?;
    std::fs::write(run.join("metrics/000001-000001.jsonl"), "no metrics\n")?;
    let output = format!("run.output={}", run.display());
    for command in [shared.run.train(&[&output]), vec!["status".to_owned(), run.display().to_string()]] {
        let ended = try_ella(&command)?;
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(
            ended.status.success() && said.contains("run-bad-metrics/metrics/000001-000001.jsonl: 1 damaged line passed over"),
            "{said}"
        );
    }
    Ok(())
}
