//! Leased work by real processes that are killed: the bytes are those of a calm run, no unit's output is there twice, nothing is left over.

use anyhow::{Context as _, Result, ensure};
use ella_tests::{Dice, Files, World, binary, children_of, ella, exists, lead, signal, spawn, try_ella, wait};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

/// Every file below a folder but the records that tell where sources were read, by name.
fn tree(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next)? {
            let path = entry?.path();
            let name = path.strip_prefix(folder)?.display().to_string();
            match path.is_dir() {
                true => folders.push(path),
                false if name == "prepare.toml" => {}
                false => drop(found.insert(name, std::fs::read(&path)?)),
            }
        }
    }
    Ok(found)
}

/// Kills a command's workers at random until so many are dead or it has ended.
fn harass(child: &mut Child, kills: usize, dice: &mut Dice) -> Result<usize> {
    let begin = Instant::now();
    let mut killed = 0;
    while killed < kills && child.try_wait()?.is_none() && begin.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(20 + dice.below(120)));
        let workers = children_of(child.id(), "ella-worker");
        if let Some(victim) = workers.get(dice.below(workers.len() as u64) as usize) {
            signal(*victim, libc::SIGKILL);
            killed += 1;
        }
    }
    Ok(killed)
}

fn same(calm: &Path, other: &Path) -> Result<()> {
    let (calm, other) = (tree(calm)?, tree(other)?);
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    ensure!(names(&calm) == names(&other), "other files: {:?} and {:?}", names(&calm), names(&other));
    let differs = calm.iter().find(|(name, bytes)| other.get(*name) != Some(bytes) && !name.starts_with("units/"));
    ensure!(differs.is_none(), "{} differs", differs.map_or("", |(name, _)| name));
    Ok(())
}

#[test]
fn a_data_set_prepared_under_kills_has_the_bytes_of_a_calm_run() -> Result<()> {
    let world = World::new(8)?;
    let at = |name: &str| world.path(name).display().to_string();
    ella(&["scenes", "--out", &at("tars"), "--count", "480", "--seed", "5", "--size", "64", "--per-tar", "12"])?;
    let prepare = |out: &str, more: &[&str]| -> Vec<String> {
        let fixed = ["prepare", &at("tars"), "--out", &at(out), "--resolution", "64", "--threads", "1"].map(str::to_owned);
        fixed.into_iter().chain(more.iter().map(|s| (*s).to_owned())).collect()
    };
    ella(&prepare("calm", &[]))?;
    let mut dice = Dice::new(11);
    let mut child = spawn(&prepare("killed", &["--workers", "3"]))?;
    let killed = harass(&mut child, 8, &mut dice)?;
    let output = wait(child)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(killed > 0, "the job was over before anyone was killed");
    same(&world.path("calm"), &world.path("killed"))
}

#[test]
fn workers_that_cannot_work_end_the_job_with_their_code_and_words() -> Result<()> {
    let world = World::new(8)?;
    let at = |name: &str| world.path(name).display().to_string();
    let prepare = |out: &str, more: &[&str], slots: &str| -> Result<Output> {
        let mut command = Command::new(binary("ella")?);
        command.args(["prepare", &at("scenes"), "--out", &at(out), "--resolution", "64", "--workers", "2"]).args(more);
        command.env("ELLA_SLOTS", slots);
        wait(lead(command)?)
    };
    let output = prepare("none", &[], "0")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && said.contains("--slots") && !said.contains("takes its place"), "{said}");
    // Whoever ends because the job is over leaves nothing to do for another.
    let output = prepare("failed", &["--where", "width>10000000"], "1")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(4) && said.contains("no sample was kept") && !said.contains("takes its place"), "{said}");
    Ok(())
}

#[test]
fn a_job_that_was_killed_whole_goes_on_with_the_same_command() -> Result<()> {
    let world = World::new(8)?;
    let at = |name: &str| world.path(name).display().to_string();
    ella(&["scenes", "--out", &at("tars"), "--count", "240", "--seed", "6", "--size", "64", "--per-tar", "12"])?;
    let prepare = |out: &str| ["prepare".to_owned(), at("tars"), "--out".into(), at(out), "--resolution".into(), "64".into()];
    ella(&prepare("calm"))?;
    let child = spawn(&prepare("killed"))?;
    // As soon as some parts are done.
    let units = world.path("killed/units");
    ella_tests::wait_until("the first parts", || units.read_dir().is_ok_and(|files| files.count() > 2))?;
    ella_tests::kill_group(child.id());
    wait(child)?;
    ensure!(!exists(world.path("killed/manifest.json")), "it was over before it was killed");
    ella(&prepare("killed"))?;
    same(&world.path("calm"), &world.path("killed"))?;
    // Once more, there is nothing to do.
    ella(&prepare("killed"))?;
    same(&world.path("calm"), &world.path("killed"))
}

#[test]
fn features_are_shared_out_among_workers_and_come_out_the_same() -> Result<()> {
    let world = World::new(96)?;
    let at = |name: &str| world.path(name).display().to_string();
    let embed = |more: &[&str]| -> Vec<String> {
        let fixed = ["embed", &at("data"), "--text", &at("models/text"), "--max-tokens", "32", "--padding", "none"].map(str::to_owned);
        fixed.into_iter().chain(more.iter().map(|s| (*s).to_owned())).collect()
    };
    let mut child = spawn(&embed(&["--workers", "2"]))?;
    harass(&mut child, 1, &mut Dice::new(3))?;
    let output = wait(child)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let features: Files = tree(&world.path("data/features"))?.into_iter().collect();
    std::fs::remove_dir_all(world.path("data/features"))?;
    ella(&embed(&[]))?;
    let alone: Files = tree(&world.path("data/features"))?.into_iter().collect();
    // The world's own features, of other settings, are gone with the folder.
    let made =
        |files: Files, of: &Files| -> Files { files.into_iter().filter(|(name, _)| of.iter().any(|(own, _)| own == name)).collect() };
    ensure!(!alone.is_empty() && made(features, &alone) == alone, "the features depend on who made them");
    Ok(())
}

#[test]
fn damage_is_named_and_made_good_again() -> Result<()> {
    let world = World::new(64)?;
    let data = world.path("data");
    let at = data.display().to_string();
    ella(&["verify", &at])?;
    let calm = tree(&data)?;
    let shard = calm.keys().find(|name| name.starts_with("shards/")).context("no shard")?.clone();
    let feature = calm.keys().find(|name| name.starts_with("features/") && name.ends_with("-0000.arrow")).context("no features")?.clone();
    for file in [&shard, &feature] {
        let mut bytes = std::fs::read(data.join(file))?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(data.join(file), bytes)?;
    }
    let found = try_ella(&["verify", &at, "--json"])?;
    ensure!(found.status.code() == Some(1), "damage must fail: {:?}", found.status);
    let said: serde_json::Value = serde_json::from_slice(&found.stdout)?;
    let damaged: Vec<&str> = said["damaged"].as_array().context("no list")?.iter().filter_map(|d| d["file"].as_str()).collect();
    ensure!(damaged == [shard.as_str(), feature.as_str()], "{damaged:?}");
    try_ella(&["verify", &at, "--repair"])?;
    ella(&["embed", &at, "--text", &world.path("models/text").display().to_string(), "--max-tokens", "64"])?;
    ella(&["verify", &at])?;
    ensure!(tree(&data)? == calm, "the repaired data set is not the one that was");
    Ok(())
}

/// A world with prompts and a connector, and the command that draws them into a folder.
fn prompts(world: &World, count: usize) -> Result<()> {
    std::fs::create_dir(world.path("prompts"))?;
    for number in 0..count {
        let text = format!("{} red circles beside {number} blue squares", number % 7);
        std::fs::write(world.path(&format!("prompts/item{number:03}.txt")), text)?;
    }
    let run = world.run("short", 1, "")?;
    ella(&run.train(&[]))?;
    ella(&["export", &world.path("short").display().to_string(), "--out", &world.path("connector.safetensors").display().to_string()])?;
    Ok(())
}

fn generate(world: &World, out: &str, more: &[&str]) -> Vec<String> {
    let at = |name: &str| world.path(name).display().to_string();
    let (prompts, out, connector, base, text) = (at("prompts"), at(out), at("connector.safetensors"), at("models/base"), at("models/text"));
    let fixed = ["dpg", "generate", "--prompts", &prompts, "--out", &out, "--connector", &connector, "--base", &base, "--text", &text];
    let how = ["--max-tokens", "64", "--batch", "8", "--json"];
    let steps: &[&str] = if more.contains(&"--steps") { &[] } else { &["--steps", "4"] };
    fixed.iter().chain(&how).chain(steps).chain(more).map(|argument| (*argument).to_owned()).collect()
}

fn counts(output: &Output) -> Result<[u64; 3]> {
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(["drawn", "there", "replaced"].map(|name| said[name].as_u64().unwrap_or(u64::MAX)))
}

#[test]
fn grids_come_out_the_same_whoever_draws_them_and_whoever_is_killed() -> Result<()> {
    let world = World::new(64)?;
    prompts(&world, 33)?;
    ensure!(counts(&try_ella(&generate(&world, "calm", &[]))?)? == [33, 0, 0]);
    let calm = tree(&world.path("calm"))?;
    ensure!(calm.len() == 34);
    let mut child = spawn(&generate(&world, "two", &["--workers", "2"]))?;
    let killed = harass(&mut child, 3, &mut Dice::new(5))?;
    counts(&wait(child)?)?;
    ensure!(killed > 0, "the job was over before anyone was killed");
    ensure!(tree(&world.path("two"))? == calm, "the grids depend on who drew them");

    // Killed as a whole, and gone on with by others.
    let child = spawn(&generate(&world, "whole", &[]))?;
    ella_tests::wait_until("the first grids", || world.path("whole").read_dir().is_ok_and(|files| files.count() > 5))?;
    ella_tests::kill_group(child.id());
    wait(child)?;
    let before = world.path("whole").read_dir()?.count();
    ensure!(before < 34, "it was over before it was killed");
    let [drawn, there, replaced] = counts(&try_ella(&generate(&world, "whole", &["--workers", "2"]))?)?;
    ensure!(drawn > 0 && there > 3 && drawn + there == 33 && replaced == 0, "{drawn} drawn, {there} there, {replaced} replaced");
    ensure!(tree(&world.path("whole"))? == calm, "the grids depend on what was there before");
    Ok(())
}

#[test]
fn who_is_told_to_leave_leaves_soon_and_another_goes_on() -> Result<()> {
    let world = World::new(64)?;
    prompts(&world, 12)?;
    let child = spawn(&generate(&world, "out", &["--steps", "500"]))?;
    ella_tests::wait_until("the record", || exists(world.path("out/generate.json")))?;
    signal(child.id(), libc::SIGTERM);
    let begin = Instant::now();
    let output = wait(child)?;
    ensure!(output.status.code() == Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(begin.elapsed() < Duration::from_secs(8), "it took {:?} to leave", begin.elapsed());
    // Nothing was drawn by those steps: others are free to take their place.
    ensure!(counts(&try_ella(&generate(&world, "out", &[]))?)? == [12, 0, 0]);
    Ok(())
}
