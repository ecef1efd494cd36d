//! Every kind of store under the one suite, and what is particular to local folders.

#![allow(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::fs;

use bytes::Bytes;
use ella_store::conformance::conformance;
use ella_store::{Created, Digest, Store, StoreError};

fn local() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("not yet/run").to_str().unwrap()).unwrap();
    (dir, store)
}

#[tokio::test]
async fn memory_conforms() {
    conformance(&Store::in_memory()).await.unwrap();
}

#[tokio::test]
async fn a_folder_of_a_memory_store_conforms() {
    let root = Store::in_memory();
    let child = root.child("some/run");
    assert_eq!(child.url(), "memory:///some/run");
    conformance(&child).await.unwrap();
    root.put("other", Bytes::new()).await.unwrap();
    conformance(&child).await.unwrap();
}

#[tokio::test]
async fn a_local_folder_conforms() {
    let (dir, store) = local();
    assert!(!dir.path().join("not yet").exists(), "opening creates nothing");
    conformance(&store).await.unwrap();
    conformance(&store.child("deeper")).await.unwrap();
}

/// `ELLA_TEST_STORE=s3://bucket/empty-folder cargo test -p ella-store`, with the cloud's usual variables, tries a real bucket.
#[tokio::test]
async fn a_store_named_in_the_environment_conforms() {
    let Ok(url) = std::env::var("ELLA_TEST_STORE") else {
        println!("skipped: ELLA_TEST_STORE names no bucket to try");
        return;
    };
    let store = Store::open(&url).unwrap();
    conformance(&store).await.unwrap();
    assert_eq!(store.retries(), 0, "{:?}", store.retry_report());
}

#[tokio::test]
async fn a_local_folder_with_an_odd_name_conforms() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a b", "100%", "%41", "x~y", "h#1", "\u{fc}", "[x]{y}", "a?b&c"] {
        let path = dir.path().join(name);
        let store = Store::open(path.to_str().unwrap()).unwrap();
        store.put("k", Bytes::from_static(b"v")).await.unwrap();
        assert_eq!(fs::read(path.join("k")).unwrap(), b"v", "{name}");
        assert_eq!(store.local_path().unwrap(), path);
        assert_eq!(store.list("").await.unwrap()[0].key, "k", "{name}");
        assert_eq!(store.child(name).local_path().unwrap(), path.join(name));
    }
}

#[tokio::test]
async fn memory_stores_are_apart_and_clones_share() {
    let (one, two) = (Store::in_memory(), Store::in_memory());
    one.clone().put("k", Bytes::new()).await.unwrap();
    assert!(one.head("k").await.unwrap().is_some());
    assert!(two.head("k").await.unwrap().is_none());
    assert!(one.local_path().is_none());
}

/// What a writer leaves that was killed half-way is neither listed nor in the way, and goes with its folder.
#[tokio::test]
async fn half_written_files_are_invisible_and_go_with_their_folder() {
    let (_dir, store) = local();
    let path = store.local_path().unwrap();
    fs::create_dir_all(path.join("commits/1")).unwrap();
    fs::write(path.join("commits/1/part#1"), b"half").unwrap();
    assert!(store.list("").await.unwrap().is_empty());
    assert_eq!(store.folders("commits").await.unwrap(), ["commits/1"]);
    assert_eq!(store.create("commits/1/part", Bytes::from_static(b"whole")).await.unwrap(), Created::Yes);
    assert_eq!(store.get("commits/1/part").await.unwrap(), "whole");
    store.delete_prefix("commits/1").await.unwrap();
    assert!(!path.join("commits/1").exists());
}

#[tokio::test]
async fn a_file_where_a_folder_should_be_is_an_error_that_names_it() {
    let (_dir, store) = local();
    store.put("a", Bytes::from_static(b"file")).await.unwrap();
    let error = store.put("a/b", Bytes::new()).await.unwrap_err();
    assert!(error.to_string().contains("not yet/run/a/b: put failed"), "{error}");
    assert!(!error.is_retryable());
    let error = store.get("a/b").await.unwrap_err();
    assert!(error.to_string().contains("/a/b: "), "{error}");
}

#[tokio::test]
async fn a_refusal_names_the_file_and_what_to_check() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, store) = local();
    store.put("a", Bytes::from_static(b"x")).await.unwrap();
    let path = store.local_path().unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o555)).unwrap();
    let put = store.put("b", Bytes::new()).await;
    let free = fs::write(path.join("c"), b"").is_ok();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    match put {
        // The superuser writes wherever it likes; there the file system has nothing to refuse.
        Ok(()) => assert!(free),
        Err(error) => {
            assert!(matches!(error, StoreError::Permission { .. }), "{error:?}");
            assert!(error.to_string().contains("/b: put refused") && error.to_string().contains("permissions"), "{error}");
        }
    }
    let error = Store::open("/proc/self/ella").unwrap().put("x", Bytes::new()).await.unwrap_err();
    assert!(error.to_string().starts_with("/proc/self/ella/x: "), "{error}");
}

#[tokio::test]
async fn a_file_on_disk_has_the_digest_of_its_bytes() {
    let (_dir, store) = local();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    store.put("f", bytes.clone().into()).await.unwrap();
    let found = Digest::of_file(store.local_path().unwrap().join("f")).unwrap();
    assert_eq!(found, (Digest::of(&bytes), 3_000_000));
    fs::write(store.local_path().unwrap().join("f"), b"flipped").unwrap();
    let error = store.get_verified("f", &found.0, found.1).await.unwrap_err();
    assert!(error.to_string().contains("expected 3000000 bytes, found 7 bytes"), "{error}");
}

/// `flock` tells who lives: what a writer needs stays, what nobody holds goes.
#[tokio::test(start_paused = true)]
async fn a_sweep_spares_the_files_of_writers_that_live() {
    let (_dir, store) = local();
    store.put("shards/a", Bytes::from_static(b"x")).await.unwrap();
    let folder = store.local_path().unwrap().join("shards");
    for name in ["b#1", "b#22", "c#", "d#x"] {
        fs::write(folder.join(name), b"half").unwrap();
    }
    let half = ["shards/b#1", "shards/b#22"];
    assert_eq!(store.half_written("shards").await.unwrap(), half);

    let writer = fs::File::open(&folder).unwrap();
    writer.lock_shared().unwrap();
    assert_eq!(store.sweep("shards").await.unwrap(), 0);
    assert_eq!(store.half_written("shards").await.unwrap(), half);
    // Writers don't hinder each other.
    store.put("shards/e", Bytes::new()).await.unwrap();

    drop(writer);
    assert_eq!(store.sweep("shards").await.unwrap(), 2);
    assert!(store.half_written("shards").await.unwrap().is_empty());
    assert!(["a", "e", "c#", "d#x"].iter().all(|name| folder.join(name).exists()));
    assert_eq!((store.sweep("nowhere").await.unwrap(), store.sweep("").await.unwrap()), (0, 0));
}

#[tokio::test]
async fn a_writer_waits_while_its_folder_is_swept() {
    let (_dir, store) = local();
    store.put("a", Bytes::new()).await.unwrap();
    let sweeper = fs::File::open(store.local_path().unwrap()).unwrap();
    sweeper.lock().unwrap();
    let write = tokio::spawn({
        let store = store.clone();
        async move { store.create("b", Bytes::from_static(b"v")).await }
    });
    // It has had every chance to write.
    for _ in 0..100 {
        assert_eq!(store.list("").await.unwrap().len(), 1);
        assert!(store.half_written("").await.unwrap().is_empty());
    }
    assert!(!write.is_finished());
    drop(sweeper);
    assert_eq!(write.await.unwrap().unwrap(), Created::Yes);
}

/// Opening a pipe that nobody writes to never ends.
#[tokio::test]
async fn a_pipe_is_no_object() {
    let dir = tempfile::tempdir().unwrap();
    assert!(std::process::Command::new("mkfifo").arg(dir.path().join("pipe")).status().unwrap().success());
    let store = ella_store::Store::open(dir.path().to_str().unwrap()).unwrap();
    for error in [store.get("pipe").await.unwrap_err(), store.head("pipe").await.unwrap_err()] {
        assert!(error.is_permanent() && error.to_string().contains("a pipe, socket or device (expected a file)"), "{error}");
    }
}
