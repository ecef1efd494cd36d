//! Reading every byte again: what is damaged is named, and what is sound is not.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{files, good_tar, small, sources, store, threads};
use ella_dataset::{
    CaptionSet, CaptionSpec, Counts, DataSet, FeatureDtype, FeatureLayers, FeatureSpec, FeatureWriter, Inventory, Made, Padding, Settings,
    Source, Verified, prepare,
};
use ella_store::faulty::Faults;
use ella_store::{Digest, Operation, Store};
use tempfile::TempDir;

fn spec() -> FeatureSpec {
    let (weights_digest, tokenizer_digest) = (Digest::of(b"weights"), Digest::of(b"tokenizer"));
    FeatureSpec {
        weights_digest,
        tokenizer_digest,
        max_tokens: 2,
        padding: Padding::Fixed,
        layers: FeatureLayers::Last,
        dtype: FeatureDtype::F32,
        width: 3,
    }
}

fn features(rows: u64) -> bytes::Bytes {
    let mut writer = FeatureWriter::new(&spec()).unwrap();
    for row in 0..rows {
        writer.push(&[row as u8; 24], 1).unwrap();
    }
    writer.finish().unwrap()
}

/// A data set with features of its own captions and of an added column.
async fn whole(dir: &TempDir) -> (TempDir, Vec<Source>) {
    let out = TempDir::new().unwrap();
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 20)), ("b.tar", &good_tar(50, 7))]).await;
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let added = CaptionSpec { column: "dense".into(), made_by: serde_json::json!({"model": "m"}) };
    let captions = CaptionSet::begin(&store(&out), data.shared_manifest(), added).await.unwrap();
    for (shard, entry) in data.manifest().shards.iter().enumerate() {
        let rows = entry.rows as usize;
        let made = vec![Made { caption: format!("dense {shard}"), ..Made::default() }; rows];
        captions.write(shard, &vec!["key".to_owned(); rows], &made).await.unwrap();
    }
    captions.finish().await.unwrap();
    for column in ["caption", "dense"] {
        let set = data.begin_features(&spec(), column).await.unwrap();
        for (shard, entry) in data.manifest().shards.iter().enumerate() {
            set.write(shard, entry.rows, features(entry.rows), Counts::new()).await.unwrap();
        }
        set.write_empty(features(1)).await.unwrap();
        set.finish().await.unwrap();
    }
    (out, sources)
}

async fn verify(out: &TempDir) -> Verified {
    Inventory::of(&store(out)).await.unwrap().verify(|_| {}).await.unwrap()
}

fn arrow_files(folder: &Path) -> Vec<String> {
    files(folder).into_iter().map(|(name, _)| name).filter(|name| name.ends_with(".arrow")).collect()
}

#[tokio::test]
async fn a_sound_data_set_has_no_damage_and_all_its_bytes_are_read() {
    let (out, _) = whole(&TempDir::new().unwrap()).await;
    let read = AtomicU64::new(0);
    let inventory = Inventory::of(&store(&out)).await.unwrap();
    let verified = inventory.verify(|bytes| _ = read.fetch_add(bytes, Ordering::Relaxed)).await.unwrap();
    let names = arrow_files(out.path());
    let bytes: u64 = names.iter().map(|name| out.path().join(name).metadata().unwrap().len()).sum();
    assert_eq!(verified, Verified { files: names.len(), bytes, damaged: vec![], stray: vec![] });
    assert_eq!((read.into_inner(), inventory.bytes()), (bytes, bytes));
}

#[tokio::test]
async fn every_damaged_file_is_named_with_what_is_wrong() {
    let (out, _) = whole(&TempDir::new().unwrap()).await;
    let names = arrow_files(out.path());
    for part in ["shards/", "features/", "captions/dense/", "/dense/empty.arrow", "/caption/empty.arrow"] {
        assert!(names.iter().any(|name| name.contains(part)), "{part}");
    }
    type Change = fn(&Path, &[u8]);
    let changes: [(Change, &str); 4] = [
        (
            |path, bytes| {
                std::fs::write(path, [&bytes[..bytes.len() / 2], &[bytes[bytes.len() / 2] ^ 1], &bytes[bytes.len() / 2 + 1..]].concat())
                    .unwrap()
            },
            "digest is wrong",
        ),
        (|path, bytes| std::fs::write(path, &bytes[..bytes.len() - 9]).unwrap(), "bytes (expected"),
        (|path, _| std::fs::write(path, b"").unwrap(), "it has 0 bytes (expected"),
        (|path, _| std::fs::remove_file(path).unwrap(), "it is missing"),
    ];
    for name in &names {
        let path = out.path().join(name);
        let bytes = std::fs::read(&path).unwrap();
        for (change, what) in changes {
            change(&path, &bytes);
            let damaged = verify(&out).await.damaged;
            let [damage] = damaged.as_slice() else { panic!("{name}: {damaged:?}") };
            assert!(damage.file == *name && damage.what.contains(what), "{name}: {damage:?}");
            std::fs::write(&path, &bytes).unwrap();
        }
    }
    // Several at once, in the order of the inventory.
    for name in &names {
        std::fs::remove_file(out.path().join(name)).unwrap();
    }
    assert_eq!(verify(&out).await.damaged.len(), names.len());
}

#[tokio::test]
async fn half_written_files_are_named_wherever_they_are() {
    let (out, _) = whole(&TempDir::new().unwrap()).await;
    let features = format!("features/{}/caption", spec().fingerprint());
    let stray = [
        "captions/dense/00000-x.arrow#2".to_owned(),
        format!("{features}/empty.json#7"),
        "manifest.json#1".to_owned(),
        "shards/00000-x.arrow#12".to_owned(),
        "units/00000-x.json#3".to_owned(),
    ];
    for name in &stray {
        std::fs::write(out.path().join(name), b"half").unwrap();
    }
    // Others' files are not ours to judge.
    std::fs::write(out.path().join("notes#v"), b"").unwrap();
    let mut found = verify(&out).await.stray;
    found.sort();
    assert_eq!(found, stray);
}

#[tokio::test]
async fn what_a_writer_left_goes_too_when_the_one_who_finished_was_killed_before_it_swept() {
    let (out, _) = whole(&TempDir::new().unwrap()).await;
    let features = format!("features/{}/caption", spec().fingerprint());
    for name in ["captions/dense/00000-x.arrow#2".to_owned(), format!("{features}/empty.json#7")] {
        std::fs::write(out.path().join(name), b"half").unwrap();
    }
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let added = CaptionSpec { column: "dense".into(), made_by: serde_json::json!({"model": "m"}) };
    CaptionSet::begin(&store(&out), data.shared_manifest(), added).await.unwrap().finish().await.unwrap();
    data.begin_features(&spec(), "caption").await.unwrap().finish().await.unwrap();
    assert_eq!(verify(&out).await.stray, Vec::<String>::new());
}

#[tokio::test]
async fn who_comes_late_to_a_sidecar_writes_nothing_that_a_kill_could_leave_half_written() {
    let (out, _) = whole(&TempDir::new().unwrap()).await;
    let (data, faults) = (DataSet::open(out.path().to_str().unwrap()).await.unwrap(), Faults::new());
    let added = CaptionSpec { column: "dense".into(), made_by: serde_json::json!({"model": "m"}) };
    CaptionSet::begin(&faults.inject(&store(&out)), data.shared_manifest(), added).await.unwrap();
    let seen = faults.seen();
    assert!(!seen.is_empty() && seen.iter().all(|(operation, _)| *operation != Operation::Create), "{seen:?}");
}

#[tokio::test]
async fn damaged_shards_are_deleted_and_made_anew() {
    let dir = TempDir::new().unwrap();
    let (out, sources) = whole(&dir).await;
    let before = files(out.path());
    let shards: Vec<_> = arrow_files(out.path()).into_iter().filter(|name| name.starts_with("shards/")).collect();
    for name in [&shards[0], &shards[shards.len() - 1]] {
        std::fs::write(out.path().join(name), vec![7; out.path().join(name).metadata().unwrap().len() as usize]).unwrap();
    }
    let inventory = Inventory::of(&store(&out)).await.unwrap();
    let damaged = inventory.verify(|_| {}).await.unwrap().damaged;
    assert_eq!(damaged.len(), 2);
    inventory.delete(&damaged).await.unwrap();
    prepare(&sources, &store(&out), &small(), &threads(2)).await.unwrap();
    assert_eq!(files(out.path()), before);
    assert_eq!(verify(&out).await.damaged, vec![]);
}

#[tokio::test]
async fn sidecars_that_are_not_whole_count_as_far_as_they_are() {
    let (dir, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = sources(dir.path(), &[("a.tar", &good_tar(0, 20))]).await;
    prepare(&sources, &store(&out), &Settings { shard_bytes: 4000, ..small() }, &threads(1)).await.unwrap();
    let data = DataSet::open(out.path().to_str().unwrap()).await.unwrap();
    let set = data.begin_features(&spec(), "caption").await.unwrap();
    let rows = data.manifest().shards[1].rows;
    let entry = set.write(1, rows, features(rows), Counts::new()).await.unwrap();
    assert_eq!(verify(&out).await.files, data.manifest().shards.len() + 1);
    let name = format!("features/{}/caption/{}", spec().fingerprint(), entry.name);
    std::fs::remove_file(out.path().join(&name)).unwrap();
    let damaged = verify(&out).await.damaged;
    assert_eq!(damaged.iter().map(|damage| damage.file.as_str()).collect::<Vec<_>>(), [name.as_str()]);
}

#[tokio::test]
async fn no_data_set_is_an_error() {
    let error = Inventory::of(&Store::in_memory()).await.unwrap_err().to_string();
    assert!(error.contains("manifest.json: not found"), "{error}");
}

#[tokio::test]
async fn what_was_put_aside_comes_back_unless_it_was_made_anew() {
    let (out, _) = whole(&TempDir::new().unwrap()).await;
    let shards: Vec<_> = arrow_files(out.path()).into_iter().filter(|name| name.starts_with("shards/")).collect();
    let (first, second, third) = (out.path().join(&shards[0]), out.path().join(&shards[1]), out.path().join(&shards[2]));
    std::fs::write(&first, b"damaged").unwrap();
    std::fs::write(&second, b"too").unwrap();
    std::fs::remove_file(&third).unwrap();
    let before = files(out.path());
    let inventory = Inventory::of(&store(&out)).await.unwrap();
    let damaged = inventory.verify(|_| {}).await.unwrap().damaged;
    assert_eq!(damaged.len(), 3);
    inventory.put_aside(&damaged).await.unwrap();
    assert!(!first.exists() && !second.exists());
    // A repair that was killed is begun again.
    inventory.put_aside(&damaged).await.unwrap();
    inventory.put_back(&damaged).await.unwrap();
    assert_eq!(files(out.path()), before);

    inventory.put_aside(&damaged).await.unwrap();
    std::fs::write(&first, b"made anew").unwrap();
    inventory.put_back(&damaged).await.unwrap();
    assert_eq!((std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap()), (b"made anew".to_vec(), b"too".to_vec()));
    assert!(!out.path().join("damaged").exists());

    inventory.put_aside(&damaged).await.unwrap();
    inventory.forget(&damaged).await.unwrap();
    assert!(!out.path().join("damaged").exists());
}
