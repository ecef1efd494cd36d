//! A base of SDXL's kind, as people use it: trained with two workers, killed and resumed, audited, exported, run and sampled.

use anyhow::Result;
use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind, save};
use ella_model::weights::{self, Weights};
use ella_tests::{Run, World, ella, exists, kill_group, spawn, try_ella, wait_until};
use std::path::Path;
use tch::{Device, Kind, Tensor};

const STEPS: u64 = 16;

fn said(path: impl AsRef<Path>) -> String {
    path.as_ref().display().to_string()
}

/// Trained with two workers that are killed after a commit, and with one more at the second go.
fn harassed(world: &World, base: &str) -> Result<Run> {
    let run = world.run("harassed", STEPS, "[checkpoint]\nevery = 2\n")?;
    let mut child = spawn(&run.train(&[base, "workers.count=2"]))?;
    wait_until("a commit", || run.commits().is_ok_and(|c| !c.is_empty()) || child.try_wait().is_ok_and(|s| s.is_some()))?;
    kill_group(child.id());
    child.wait()?;
    println!("killed after the commit of step {}", run.last_commit()?.step);
    ella(&run.train(&[base, "workers.count=3"]))?;
    Ok(run)
}

#[test]
fn a_base_of_sdxl_s_kind_is_trained_exported_and_sampled() -> Result<()> {
    let world = World::new(40)?;
    let models = world.path("sdxl");
    ella(&["init-base", "--preset", "nano-sdxl", "--seed", "1", "--captions", &said(world.path("data")), "--out", &said(&models)])?;
    let base = format!("base.model={}", said(models.join("base")));
    let alone = world.run("alone", STEPS, "[checkpoint]\nevery = 2\n")?;
    ella(&alone.train(&[&base, "workers.count=1"]))?;
    let run = harassed(&world, &base)?;
    assert!(run.last_files()? == alone.last_files()?, "two workers, killed and resumed, trained other bytes than one");
    ella(&["audit", &said(&run.output)])?;
    ella(&["report", &said(&run.output), "--out", &said(world.path("report.html"))])?;

    let file = world.path("connector.safetensors");
    for set in [&["--dtype", "fp16"][..], &["--ema"], &[]] {
        ella(&[&["export", &said(&run.output), "--out", &said(&file)], set].concat())?;
        assert_eq!(Connector::load(&file, 8, Kind::Float, Device::Cpu)?.config().pooled, Some(32));
    }
    forward(&world, &file)?;
    sample(&world, &models, &file)
}

fn forward(world: &World, file: &Path) -> Result<()> {
    let (inputs, outputs) = (world.path("in.safetensors"), world.path("out.safetensors"));
    let floats = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let mut tensors = vec![
        ("text_features".to_owned(), floats(&[2, 5, 64])),
        ("timesteps".to_owned(), Tensor::from_slice(&[0i64, 999])),
        ("grad_output".to_owned(), floats(&[2, 8, 64])),
    ];
    // Without a weight of its own the pooled text counts for nothing.
    for counts in [false, true] {
        if counts {
            tensors.push(("grad_output.pooled".to_owned(), floats(&[2, 32])));
        }
        weights::save(&inputs, &tensors)?;
        ella(&["forward", "connector", "--model", &said(file), "--grad", "--inputs", &said(&inputs), "--outputs", &said(&outputs)])?;
        let found = Weights::open(&outputs)?;
        assert_eq!(found.describe("pooled")?.0, [2, 32]);
        let gradient = found.load("grad.pool.c_proj.weight", &[32, 64], Kind::Float, Device::Cpu)?;
        assert_eq!(gradient.abs().max().double_value(&[]) > 0.0, counts);
    }
    Ok(())
}

fn sample(world: &World, models: &Path, file: &Path) -> Result<()> {
    let (base, text) = (said(models.join("base")), said(models.join("text")));
    let sample = |connector: &Path, base: &str| {
        let (connector, out) = (said(connector), said(world.path("grid.png")));
        let models = ["sample", "--connector", &connector, "--base", base, "--text", &text, "--max-tokens", "64"];
        try_ella(&[&models[..], &["--steps", "3", "--prompt", "a red circle", "--out", &out]].concat())
    };
    let drawn = sample(file, &base)?;
    assert!(drawn.status.success() && exists(world.path("grid.png")), "{drawn:?}");

    // A base and a connector of which only one knows a pooled text.
    let plain = world.path("plain.safetensors");
    let config = ConnectorConfig { layers: 1, latents: 8, ..ConnectorConfig::new(ConnectorKind::Tsc, 64, 64) };
    save(&plain, Connector::init(&config, 1, Device::Cpu)?.tensors(), Kind::Float)?;
    for (connector, base, words) in [(&plain, &base, "is 0, but"), (&file.to_owned(), &said(world.path("models/base")), "is 32, but")] {
        let refused = sample(connector, base)?;
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(4), "{error}");
        assert!(error.contains("pooled text") && error.contains(words), "{error}");
    }
    Ok(())
}
