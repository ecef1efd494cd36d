//! What must hold of what came out.

use crate::kills::files;
use crate::proxy::Seen;
use anyhow::{Context as _, Result, ensure};
use ella_dataset::Manifest;
use ella_store::Store;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Objects read at once.
const READ_AT_ONCE: usize = 16;

/// Objects by name.
pub(crate) type Tree = BTreeMap<String, Vec<u8>>;

/// Everything below a folder or URL. Its own name in what it holds is made the same for all.
pub(crate) fn tree(url: &str) -> Result<Tree> {
    let store = Store::open(url)?;
    let mut tree = match store.local_path() {
        // As the file system has it: a store does not show what is half-written.
        Some(root) => files(&root).iter().map(|path| Ok((path.strip_prefix(&root)?.display().to_string(), std::fs::read(path)?))).collect(),
        None => tokio::runtime::Runtime::new()?.block_on(objects(&store)),
    }?;
    if let Some(config) = tree.get_mut("prepare.toml") {
        *config = String::from_utf8_lossy(config).replace(url, "DATA").into_bytes();
    }
    Ok(tree)
}

async fn objects(store: &Store) -> Result<Tree> {
    let listed = store.list("").await?;
    let read = |key: String| async move { Ok((key.clone(), store.get(&key).await?.to_vec())) };
    stream::iter(listed).map(|meta| read(meta.key)).buffer_unordered(READ_AT_ONCE).try_collect().await
}

/// Every object has the bytes of the calm run, and there is no other.
pub(crate) fn same(calm: &Tree, chaos: &Tree) -> Result<()> {
    let only = |of: &Tree, other: &Tree| of.keys().filter(|name| !other.contains_key(*name)).cloned().collect::<Vec<_>>();
    let (missing, more) = (only(calm, chaos), only(chaos, calm));
    ensure!(missing.is_empty() && more.is_empty(), "missing: {missing:?}; beyond the calm run's: {more:?}");
    let differ: Vec<_> = calm.iter().filter(|(name, bytes)| chaos.get(*name) != Some(bytes)).map(|(name, _)| name).collect();
    ensure!(differ.is_empty(), "other bytes than in the calm run: {differ:?}");
    Ok(())
}

/// The manifest's shards and the plan's units account for every object, each sample is there once, and there are so many.
pub(crate) fn accounted(tree: &Tree, samples: u64) -> Result<()> {
    let manifest: Manifest = serde_json::from_slice(tree.get("manifest.json").context("no manifest")?)?;
    let shards: BTreeSet<&str> = manifest.shards.iter().map(|shard| shard.name.as_str()).collect();
    ensure!(shards.len() == manifest.shards.len(), "the manifest names a shard twice");
    ensure!(manifest.samples == samples, "{} samples (expected {samples})", manifest.samples);
    let records = records(tree)?;
    let shard_of = |name: &str| name.strip_prefix("trees/").and_then(|name| name.strip_suffix(".obao6")).unwrap_or(name).to_owned();
    let own = ["plan.json", "prepare.toml", "manifest.json", "report.json", "duplicates.json"];
    let belongs = |name: &&String| {
        own.contains(&name.as_str()) || shards.contains(&*shard_of(name)) || records.contains(*name) || name.starts_with("features/")
    };
    let strangers: Vec<&String> = tree.keys().filter(|name| !belongs(name)).collect();
    ensure!(strangers.is_empty(), "nothing accounts for {strangers:?}");
    rows(tree, &manifest, samples)
}

/// The records of units, of which every part has one, and one more if it holds duplicates.
fn records(tree: &Tree) -> Result<BTreeSet<String>> {
    let json = |name: &str| -> Result<Value> { Ok(serde_json::from_slice(tree.get(name).with_context(|| format!("no {name}"))?)?) };
    let parts = json("plan.json")?["sources"].as_array().map_or(0, Vec::len);
    let duplicates = json("duplicates.json")?;
    let mut found = BTreeSet::new();
    for part in 0..parts {
        let prefix = format!("units/{part:05}-");
        let of: Vec<&String> = tree.keys().filter(|name| name.starts_with(&prefix) && name.ends_with(".json")).collect();
        let expected = 1 + usize::from(!duplicates["parts"][part.to_string()].is_null());
        ensure!(of.len() == expected, "part {part} has the records {of:?} (expected {expected})");
        found.extend(of.into_iter().cloned());
    }
    Ok(found)
}

/// Every row's key, by the records of the units whose shards the manifest names, is there once.
fn rows(tree: &Tree, manifest: &Manifest, samples: u64) -> Result<()> {
    let shards: BTreeSet<&str> = manifest.shards.iter().map(|shard| shard.name.as_str()).collect();
    let mut keys = BTreeSet::new();
    for (name, record) in tree.iter().filter(|(name, _)| name.starts_with("units/")) {
        let record: Value = serde_json::from_slice(record)?;
        let named = record["shards"].as_array().into_iter().flatten().filter_map(|shard| shard["name"].as_str());
        if !named.into_iter().any(|shard| shards.contains(shard)) {
            continue;
        }
        for key in record["keys"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            ensure!(keys.insert(key.to_owned()), "{name}: the sample {key} is there twice");
        }
    }
    ensure!(keys.len() as u64 == samples, "{} keys (expected {samples})", keys.len());
    Ok(())
}

/// No coordinator took a unit for done twice, or gave one up; the last one saw all done.
pub(crate) fn counted(said: &[Value]) -> Result<()> {
    for status in said {
        for count in ["units_done_before", "units_given_up"] {
            ensure!(status["counts"][count].as_u64().unwrap_or_default() == 0, "{count}: {}", status["counts"]);
        }
    }
    Ok(())
}

/// No object was made twice, and no upload in parts is left over.
pub(crate) fn once(seen: &[Seen]) -> Result<()> {
    let mut made = BTreeSet::new();
    for write in seen.iter().filter(|seen| seen.made()) {
        ensure!(made.insert(&write.target), "{} was made twice", write.target);
    }
    let parts: Vec<&Seen> =
        seen.iter().filter(|seen| ["uploads", "uploadId", "comp=block"].iter().any(|q| seen.target.contains(q))).collect();
    ensure!(parts.is_empty(), "an upload in parts, of which none is known to be whole: {parts:?}");
    Ok(())
}
