//! `text.features = "ahead"`, with real processes: workers that encode as they train, killed in the middle of it, end with the bytes of a run
//! on features that were embedded before, and with the sidecars that `ella embed` makes.

use anyhow::{Context as _, Result};
use ella_tests::{Files, World, ella, kill_group, spawn, wait_until};
use std::path::{Path, PathBuf};

const STEPS: u64 = 16;
/// An epoch has seven steps.
const SCENES: usize = 103;

/// The files of the only features of a data set, by name, those in folders too.
fn sidecar(data: &Path) -> Result<Files> {
    let only = |folder: PathBuf| -> Result<PathBuf> {
        let mut entries = std::fs::read_dir(&folder)?;
        Ok(entries.next().with_context(|| format!("{} is empty", folder.display()))??.path())
    };
    let mut files = Vec::new();
    let mut folders = vec![only(only(data.join("features"))?)?];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push((path.strip_prefix(data)?.display().to_string(), std::fs::read(&path)?));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn records(data: &Path) -> usize {
    sidecar(data).map_or(0, |files| files.iter().filter(|(name, _)| name.ends_with(".json") && name.contains("/0")).count())
}

#[test]
fn encoding_ahead_under_kills_trains_the_bytes_of_embedding_before() -> Result<()> {
    let world = World::new(SCENES)?;
    let before = world.run("before", STEPS, "[checkpoint]\nevery = 2\n")?;
    ella(&before.train(&["workers.count=1"]))?;
    let (trained, embedded) = (before.last_files()?, sidecar(&world.path("data"))?);
    let forget = || std::fs::remove_dir_all(world.path("data").join("features"));

    for (name, workers) in [("alone", "workers.count=1"), ("three", "workers.count=3")] {
        forget()?;
        let run = world.run(name, STEPS, "[checkpoint]\nevery = 2\n")?;
        let said = ella(&[run.train(&["text.features=ahead", workers]), vec!["--json".into()]].concat())?;
        let said: serde_json::Value = serde_json::from_str(&said)?;
        assert!(said["read"]["captions_embedded"].as_u64() >= Some(SCENES as u64), "{said}");
        assert!(run.last_files()? == trained, "{name}: other bytes");
        assert!(sidecar(&world.path("data"))? == embedded, "{name}: other features");
        ella(&["audit", &run.output.display().to_string()])?;
    }

    // Killed as soon as there is one record more, each time; at last it goes on, as a run on embedded features.
    forget()?;
    let run = world.run("killed", STEPS, "[checkpoint]\nevery = 2\n")?;
    for workers in ["workers.count=2", "workers.count=1", "workers.count=4"] {
        let had = records(&world.path("data"));
        let mut child = spawn(&run.train(&["text.features=ahead", workers]))?;
        wait_until("a shard's features", || records(&world.path("data")) > had || child.try_wait().is_ok_and(|status| status.is_some()))?;
        kill_group(child.id());
        child.wait()?;
        println!("killed {workers}: {had} records before, {} after", records(&world.path("data")));
    }
    ella(&run.train(&["text.features=ahead", "workers.count=2", &format!("train.steps={}", STEPS / 2)]))?;
    ella(&run.train(&["workers.count=2"]))?;
    assert!(run.last_files()? == trained, "killed: other bytes");
    assert!(sidecar(&world.path("data"))? == embedded, "killed: other features");
    Ok(())
}
