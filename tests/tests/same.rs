//! SAME and ONCE, with real processes: the trained bytes do not depend on the number of workers, nor on kills and resumes; and the
//! audit proves that every sample was used as it must.

use anyhow::Result;
use ella_tests::{Files, Run, World, ella, kill_group, spawn, try_ella, wait_until};
use std::time::Duration;

const STEPS: u64 = 24;
/// Not a multiple of the global batch, so that epochs end in partial batches; 3.6 epochs in all.
const SCENES: usize = 103;

fn finished(world: &World, name: &str, workers: usize) -> Result<Files> {
    let run = world.run(name, STEPS, "[checkpoint]\nevery = 4\n")?;
    ella(&run.train(&[&format!("workers.count={workers}")]))?;
    ella(&["audit", &run.output.display().to_string()])?;
    run.last_files()
}

/// Kills everything at moments given by a seed, resuming each time with another number of workers.
fn harassed(world: &World, seed: u64) -> Result<(Run, Files)> {
    let run = world.run(&format!("harassed-{seed}"), STEPS, "[checkpoint]\nevery = 2\n")?;
    let mut random = seed;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for kill in 0..5u64 {
        let workers = [1, 2, 4, 3][next(4) as usize];
        let mut child = spawn(&run.train(&[&format!("workers.count={workers}")]))?;
        // At least one commit each time, so that five kills are five different places; then a random while.
        let have = run.commits().map_or(0, |c| c.len());
        wait_until("a commit", || run.commits().is_ok_and(|c| c.len() > have) || child.try_wait().is_ok_and(|s| s.is_some()))?;
        std::thread::sleep(Duration::from_millis(next(120)));
        kill_group(child.id());
        child.wait()?;
        println!("kill {kill} of seed {seed}: {workers} workers, after the commit of step {}", run.last_commit()?.step);
    }
    ella(&run.train(&["workers.count=2"]))?;
    let files = run.last_files()?;
    Ok((run, files))
}

#[test]
fn the_trained_bytes_depend_on_neither_workers_nor_kills() -> Result<()> {
    let world = World::new(SCENES)?;
    let alone = finished(&world, "one", 1)?;
    assert_eq!(
        alone.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["connector.safetensors", "ema.safetensors", "optimizer.safetensors"]
    );
    for workers in [2, 4] {
        assert!(finished(&world, &format!("w{workers}"), workers)? == alone, "{workers} workers trained other bytes than one");
    }
    let (run, files) = harassed(&world, 11)?;
    assert!(files == alone, "a run that was killed five times trained other bytes");

    let audit = ella(&["audit", &run.output.display().to_string(), "--json"])?;
    let audit: serde_json::Value = serde_json::from_str(&audit)?;
    assert_eq!(audit["ok"], true, "{audit}");
    let finished: Vec<_> = audit["epochs"].as_array().into_iter().flatten().filter(|e| e["samples"] == SCENES as u64).collect();
    assert_eq!(finished.len() as u64, STEPS / (SCENES as u64).div_ceil(16), "{audit}");

    audit_sees_damage(&run)
}

/// A removed commit, a flipped byte, a missing record: each fails the audit, which says what.
fn audit_sees_damage(run: &Run) -> Result<()> {
    let folder = run.output.display().to_string();
    let complains = |about: &str| -> Result<()> {
        let output = try_ella(&["audit", &folder])?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(about), "expected {about}, got: {said}");
        Ok(())
    };
    let commit = run.last_commit()?;
    let path = run.output.join(&commit.folder);

    let file = path.join("ema.safetensors");
    let good = std::fs::read(&file)?;
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    std::fs::write(&file, &bad)?;
    complains("ema.safetensors")?;
    std::fs::write(&file, &good)?;

    let aside = run.output.join("aside");
    std::fs::rename(&path, &aside)?;
    complains(&commit.folder)?;
    std::fs::rename(&aside, &path)?;

    let record = run.output.join("log/000000000002.json");
    let kept = std::fs::read(&record)?;
    std::fs::remove_file(&record)?;
    complains("000000000002")?;
    std::fs::write(&record, kept)?;
    ella(&["audit", &folder])?;
    Ok(())
}

/// The numbers of one of the last commit's files, without the header, which tells the step.
fn numbers(run: &Run, file: usize) -> Result<Vec<u8>> {
    let (_, bytes) = run.last_files()?.swap_remove(file);
    let header = u64::from_le_bytes(bytes[..8].try_into()?) as usize;
    Ok(bytes[8 + header..].to_vec())
}

/// A run that begins from a connector has its weights, whatever the seed; it resumes from its own commits, and only beside the same file.
#[test]
fn a_run_begins_from_a_connector() -> Result<()> {
    let world = World::new(40)?;
    let first = world.run("first", 3, "")?;
    ella(&first.train(&["workers.count=1"]))?;
    let exported = world.path("first.safetensors").display().to_string();
    ella(&["export", &first.output.display().to_string(), "--out", &exported])?;

    // A rate of 0 leaves weights as they are.
    let from = format!("connector.from={exported}");
    let still = world.run("still", 1, "")?;
    ella(&still.train(&["workers.count=2", "run.seed=9", "train.optimizer.lr=0", &from]))?;
    let [connector, average] = [0, 1].map(|file| numbers(&still, file));
    let (connector, average) = (connector?, average?);
    assert!(connector == numbers(&first, 0)?, "other weights than those that the run began from");
    assert!(average == connector, "the moving average does not begin with the weights");

    let trains = world.run("trains", 4, "[checkpoint]\nevery = 2\n")?;
    ella(&trains.train(&["workers.count=1", &from, "train.steps=2"]))?;
    ella(&trains.train(&["workers.count=2", &from]))?;
    let whole = world.run("whole", 4, "[checkpoint]\nevery = 2\n")?;
    ella(&whole.train(&["workers.count=1", &from]))?;
    assert!(trains.last_files()? == whole.last_files()?, "a resumed run trained other bytes");
    let other = try_ella(&trains.train(&["workers.count=1", "train.steps=6"]))?;
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(!other.status.success() && said.contains("the models that the run began with") && said.contains("connector.from"), "{said}");
    Ok(())
}

/// A resume reads every byte of its commit first. One that is damaged is given up, loudly, for the one before; the end is the same.
#[test]
fn a_damaged_commit_is_given_up_for_the_one_before() -> Result<()> {
    let world = World::new(40)?;
    let calm = world.run("calm", STEPS, "[checkpoint]\nevery = 4\n")?;
    ella(&calm.train(&["workers.count=1"]))?;
    let run = world.run("damaged", STEPS, "[checkpoint]\nevery = 4\n")?;
    ella(&run.train(&["workers.count=2", "train.steps=14"]))?;
    let commit = run.last_commit()?;
    assert_eq!(commit.step, 14);
    let file = run.output.join(&commit.folder).join("optimizer.safetensors");
    let mut bytes = std::fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes)?;
    let output = try_ella(&run.train(&["workers.count=2"]))?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("WARNING") && said.contains("step 14 is damaged"), "{said}");
    assert!(said.contains("optimizer.safetensors"), "{said}");
    assert!(run.last_files()? == calm.last_files()?, "other bytes");
    let audit = ella(&["audit", &run.output.display().to_string()])?;
    assert!(audit.contains("damaged"), "{audit}");
    Ok(())
}

/// Commits by the clock are when they are, and the trained bytes do not know of them.
#[test]
fn commits_by_the_clock_change_no_byte() -> Result<()> {
    let world = World::new(40)?;
    let calm = world.run("calm", STEPS, "")?;
    ella(&calm.train(&["workers.count=1"]))?;
    let run = world.run("clock", STEPS, "[checkpoint]\nmax_lost_work = \"60ms\"\n")?;
    ella(&run.train(&["workers.count=3"]))?;
    let steps: Vec<u64> = run.commits()?.iter().map(|commit| commit.step).collect();
    assert!(steps.len() > 2 && steps.last() == Some(&STEPS), "{steps:?}");
    assert!(run.last_files()? == calm.last_files()?, "other bytes");
    let folder = run.output.display().to_string();
    ella(&["audit", &folder])?;
    let why: serde_json::Value = serde_json::from_str(&ella(&["why", &folder, "--json"])?)?;
    let ranks = why["ranks"].as_array().cloned().unwrap_or_default();
    let steps: Vec<_> = ranks.iter().map(|rank| (rank["rank"].as_u64(), rank["steps"].as_u64())).collect();
    assert_eq!(steps, [0, 1, 2].map(|rank| (Some(rank), Some(STEPS))), "{why}");
    assert!(ranks.iter().all(|rank| rank["parts"]["commit"].as_f64() > Some(0.0)), "{why}");
    assert!(why["verdict"].as_str().is_some_and(|verdict| verdict.contains("of a step") || verdict.contains("of each step")), "{why}");
    Ok(())
}
