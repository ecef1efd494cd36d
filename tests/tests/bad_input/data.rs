//! Training on a data set, or on features, that are damaged, incomplete or stale: said before a step is taken on them.

use super::{PERMANENT, cut, flip, shared};
use anyhow::{Context as _, Result};
use ella_tests::ella;
use std::path::{Path, PathBuf};

/// The files in a folder, sorted, whose name ends so.
fn ending(folder: &Path, with: &str) -> Result<Vec<PathBuf>> {
    let mut found: Vec<_> = std::fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    found.retain(|path| path.to_string_lossy().ends_with(with));
    found.sort();
    Ok(found)
}

/// The folder of the one encoder's features of the one column.
fn features(data: &Path) -> Result<PathBuf> {
    Ok(ending(&data.join("features"), "")?.pop().context("no features")?.join("caption"))
}

/// Trains on a copy of the data set with one thing done to it, which must be refused in these words.
#[track_caller]
fn refuses(name: &str, damage: impl FnOnce(&Path) -> Result<()>, words: &[&str]) -> Result<()> {
    let shared = shared()?;
    let data = shared.copy("data", &format!("data-{name}"))?;
    damage(&data)?;
    let folder = format!("data-{name}/");
    let words: Vec<&str> = words.iter().copied().chain([folder.as_str()]).collect();
    shared.train_refused(&format!("on-{name}"), &[&format!("data.path={}", data.display())], PERMANENT, &words)
}

#[test]
fn a_damaged_or_lost_shard_is_named() -> Result<()> {
    let shard = |data: &Path| -> Result<PathBuf> { ending(&data.join("shards"), ".arrow")?.pop().context("no shard") };
    refuses("flipped-shard", |data| flip(&shard(data)?), &["/shards/00001-", "damaged", "BLAKE3", "ella prepare"])?;
    refuses("cut-shard", |data| cut(&shard(data)?), &["/shards/00001-", "damaged", "ella prepare"])?;
    refuses("lost-shard", |data| Ok(std::fs::remove_file(shard(data)?)?), &["/shards/00001-", "not found", "ella prepare"])
}

#[test]
fn a_damaged_or_missing_manifest_is_named() -> Result<()> {
    let manifest = |data: &Path| data.join("manifest.json");
    refuses("garbage-manifest", |data| Ok(std::fs::write(manifest(data), "{}")?), &["manifest.json", "missing field"])?;
    refuses("lost-manifest", |data| Ok(std::fs::remove_file(manifest(data))?), &["manifest.json", "not found", "ella prepare"])
}

#[test]
fn missing_features_say_to_embed() -> Result<()> {
    refuses(
        "bare",
        |data| Ok(std::fs::remove_dir_all(data.join("features"))?),
        &["/features/", "no features", "none at all", "ella embed"],
    )?;
    let lose_one = |data: &Path| {
        let features = features(data)?;
        let lost = ending(&features, ".arrow")?.remove(0);
        std::fs::remove_file(features.join("manifest.json"))?;
        std::fs::remove_file(lost.with_extension("json"))?;
        Ok(std::fs::remove_file(lost)?)
    };
    refuses("half-embedded", lose_one, &["/features/", "1 of 3", "00000-", "ella embed"])?;

    // What the error advises helps.
    let shared = shared()?;
    let lost = |data: &Path| Ok(std::fs::remove_file(ending(&features(data)?, ".arrow")?.remove(1))?);
    refuses("lost-sidecar", lost, &["/features/", "1 of 3", "00001-", "ella embed"])?;
    let data = shared.path("data-lost-sidecar");
    ella(&["embed", &data, "--text", &shared.path("models/text"), "--max-tokens", "64"])?;
    let run = shared.world.run("on-mended", 1, "")?;
    ella(&run.train(&[&format!("data.path={data}")]))?;
    Ok(())
}

#[test]
fn damaged_features_are_named() -> Result<()> {
    let flip_one = |data: &Path| flip(&ending(&features(data)?, ".arrow")?[0]);
    refuses("flipped-sidecar", flip_one, &["/features/", "00000-", "damaged", "ella embed"])
}

#[test]
fn stale_features_say_what_differs() -> Result<()> {
    let shared = shared()?;
    shared.train_refused(
        "stale-tokens",
        &["text.max_tokens=32"],
        PERMANENT,
        &["/features/", "max_tokens expected 32, found 64", "ella embed"],
    )?;
    let other = shared.path("other-models");
    ella(&["init-base", "--preset", "nano", "--seed", "9", "--captions", &shared.path("data"), "--out", &other])?;
    let set = format!("text.model={other}/text");
    shared.train_refused("stale-model", &[&set], PERMANENT, &["/features/", "weights_digest expected", "ella embed"])
}

#[test]
fn a_data_set_without_pictures_or_without_anything_is_named() -> Result<()> {
    let shared = shared()?;
    let texts = shared.world.path("texts");
    std::fs::create_dir_all(&texts)?;
    std::fs::write(texts.join("a.txt"), "a red box")?;
    let captions = shared.path("captions");
    let embed = ["embed", &shared.path("texts"), "--text", &shared.path("models/text"), "--max-tokens", "64", "--out", &captions];
    ella(&embed)?;
    shared.train_refused("on-captions", &[&format!("data.path={captions}")], PERMANENT, &["captions", "captions only", "pictures"])?;
    let nowhere = shared.path("nowhere");
    shared.train_refused(
        "on-nothing",
        &[&format!("data.path={nowhere}")],
        PERMANENT,
        &["nowhere/manifest.json", "not found", "ella prepare"],
    )
}
