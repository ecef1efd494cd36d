//! Pictures of many aspect ratios, with two columns of captions of which each sample and epoch takes one: prepared, embedded and trained by
//! the commands that people type. Every step has pictures of one size, and the trained bytes depend on neither workers nor kills.

use anyhow::{Context as _, Result};
use ella_dataset::{DataSet, Encoding, Scratch, encode};
use ella_tests::{Run, World, ella, kill_group, spawn, wait_until};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const STEPS: u64 = 18;
const PICTURES: u32 = 45;

/// Soft shapes under a slope of light, as photographs have them, and a little grain.
fn photograph(width: u32, height: u32, number: u32) -> Vec<u8> {
    let wave = |at: u32, of: u32, turns: f32, channel: u32| {
        let phase = (number * 37 + channel * 91) as f32 / 50.0;
        (at as f32 / of as f32 * turns + phase).sin()
    };
    let value = |x: u32, y: u32, channel: u32| {
        let grain = ((x * 7 + y * 13 + channel * 5) % 11) as f32;
        128.0 + 50.0 * wave(x, width, 6.0, channel) + 40.0 * wave(y, height, 4.0, channel) + grain
    };
    (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |channel| value(x, y, channel) as u8))).collect()
}

/// A tar of such pictures, wide, high and square. Every fifth has no short caption.
fn write_tar(to: &Path) -> Result<()> {
    let mut tar = tar::Builder::new(std::fs::File::create(to)?);
    for number in 0..PICTURES {
        let (width, height) = [(400, 130), (150, 500), (300, 300), (560, 150)][number as usize % 4];
        let picture = photograph(width, height, number);
        let coded = Scratch::of_thread(|scratch| encode(&picture, (width, height), Encoding::Jpeg { quality: 90 }, scratch));
        let mut captions =
            serde_json::json!({ "dense": format!("Photograph number {number}, with soft shapes of many colours in {width} columns.") });
        if !number.is_multiple_of(5) {
            captions["short"] = format!("photograph {number}").into();
        }
        for (name, bytes) in [("jpg", coded.map_err(anyhow::Error::msg)?), ("json", serde_json::to_vec(&captions)?)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("{number:04}.{name}"), bytes.as_slice())?;
        }
    }
    Ok(tar.finish()?)
}

/// Shards by size.
fn sizes(data: &str) -> Result<BTreeMap<(u32, u32), u64>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let data = runtime.block_on(DataSet::open(data))?;
    let manifest = data.manifest();
    assert_eq!(manifest.captions.iter().map(|c| (c.name.as_str(), c.weight)).collect::<Vec<_>>(), [("dense", 0.7), ("short", 0.3)]);
    let mut sizes = BTreeMap::new();
    for shard in &manifest.shards {
        *sizes.entry(shard.size.context("a shard without a size")?).or_default() += shard.rows;
    }
    Ok(sizes)
}

#[test]
fn buckets_and_weighted_captions_train_the_same_bytes_whoever_trains() -> Result<()> {
    let world = World::new(8)?;
    let (tar, data) = (world.path("photographs.tar"), world.path("buckets").display().to_string());
    write_tar(&tar)?;
    let captions = ["--caption", "dense=dense:0.7", "--caption", "short=short:0.3"];
    let tar = tar.display().to_string();
    ella(&[&["prepare", &tar, "--out", &data, "--resolution", "128", "--buckets", "64", "--bucket-aspect", "4"][..], &captions].concat())?;
    let sizes = sizes(&data)?;
    assert_eq!(sizes.values().sum::<u64>(), u64::from(PICTURES));
    assert!(sizes.len() >= 3 && sizes.keys().all(|(width, height)| width % 64 == 0 && height % 64 == 0), "{sizes:?}");
    ella(&["embed", &data, "--text", &world.path("models/text").display().to_string(), "--max-tokens", "64"])?;
    ella(&["verify", &data])?;

    let data = format!("data.path={data}");
    let train = |run: &Run, set: &[&str]| run.train(&[&[data.as_str()], set].concat());
    let alone = world.run("alone", STEPS, "[checkpoint]\nevery = 3\n")?;
    ella(&train(&alone, &["workers.count=1"]))?;
    let same = alone.last_files()?;
    let two = world.run("two", STEPS, "[checkpoint]\nevery = 3\n")?;
    ella(&train(&two, &["workers.count=2"]))?;
    assert!(two.last_files()? == same, "two workers trained other bytes than one");

    let killed = world.run("killed", STEPS, "[checkpoint]\nevery = 2\n")?;
    let mut child = spawn(&train(&killed, &["workers.count=2"]))?;
    wait_until("a commit", || killed.commits().is_ok_and(|c| !c.is_empty()) || child.try_wait().is_ok_and(|s| s.is_some()))?;
    kill_group(child.id());
    child.wait()?;
    println!("killed after the commit of step {}", killed.last_commit()?.step);
    ella(&train(&killed, &["workers.count=3"]))?;
    assert!(killed.last_files()? == same, "a run that was killed trained other bytes");

    for run in [&alone, &two, &killed] {
        let audit: serde_json::Value = serde_json::from_str(&ella(&["audit", &run.output.display().to_string(), "--json"])?)?;
        assert_eq!(audit["ok"], true, "{audit}");
        let epochs: BTreeSet<_> = audit["epochs"].as_array().into_iter().flatten().filter_map(|epoch| epoch["samples"].as_u64()).collect();
        assert!(epochs.contains(&u64::from(PICTURES)), "an epoch was finished: {audit}");
    }

    // What is trained on is part of the result: other weights, other bytes.
    let dense = world.run("dense", STEPS, "[checkpoint]\nevery = 18\n")?;
    ella(&train(&dense, &["workers.count=2", "data.captions=[{column=\"dense\"}]"]))?;
    assert!(dense.last_files()? != same, "the short captions made no difference");
    Ok(())
}
