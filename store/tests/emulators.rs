//! The suite on real servers: moto (S3) and azurite (Azure Blob), found as a user would, by the environment. `make test-stores` installs
//! both; where one is not installed its test says so and passes, unless `ELLA_TEST_STORES` is set.

#![cfg(feature = "cloud")]
#![allow(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

#[path = "support/emulator.rs"]
mod emulator;

use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ella_store::conformance::conformance;
use ella_store::{Created, Digest, DiskCache, Limits, Store, StoreError};
use emulator::Emulator;
use futures::future;

/// What a store's URL is given by to the process that tries it: a client reads its environment once.
const URL: &str = "ELLA_TEST_STORE";

/// Runs the test `name` anew, as a process that has the server's environment.
fn try_in_process(name: &str, server: &Emulator) {
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", name, "--nocapture"]).env(URL, &server.url).envs(server.environment.iter().cloned());
    assert!(process.status().unwrap().success(), "{name} failed: see above");
}

#[tokio::test]
async fn an_s3_server_conforms() {
    match std::env::var(URL) {
        Ok(url) => suite(&url).await,
        Err(_) => {
            let Some(server) = Emulator::s3() else { return };
            try_in_process("an_s3_server_conforms", &server);
        }
    }
}

#[tokio::test]
async fn an_azure_server_conforms() {
    match std::env::var(URL) {
        Ok(url) => suite(&url).await,
        Err(_) => {
            let Some(server) = Emulator::azure() else { return };
            try_in_process("an_azure_server_conforms", &server);
        }
    }
}

/// moto looks for an object and makes it in two steps, so that now and then two of racing creates win there. Three times in a row would be no chance.
const TRIES: usize = 3;

async fn conforms(store: &Store, tries: usize) {
    for attempt in 1..=tries {
        match conformance(&store.child(&format!("try-{attempt}"))).await {
            Ok(()) => return,
            Err(error) if attempt < tries && error.to_string().contains("racing creates") => println!("try {attempt}: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
}

async fn suite(url: &str) {
    let store = Store::open(url).unwrap();
    conforms(&store, if url.starts_with("s3:") { TRIES } else { 1 }).await;
    shard(&store).await;
    ranges(&store).await;
    bad_settings(&store).await;
    assert_eq!(store.retries(), 0, "{:?}", store.retry_report());
}

/// A shard of the usual size, created in one request, read whole, through a cache, and in ranges.
async fn shard(store: &Store) {
    let bytes: Bytes = (0..32_u32 << 20).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<_>>().into();
    let begun = Instant::now();
    assert_eq!(store.create("shard", bytes.clone()).await.unwrap(), Created::Yes);
    let created = begun.elapsed();
    assert_eq!(store.create("shard", bytes.clone()).await.unwrap(), Created::AlreadyThere);
    let (folder, digest) = (tempfile::tempdir().unwrap(), Digest::of(&bytes));
    let cache = DiskCache::open(folder.path(), 1 << 30).await.unwrap();
    let begun = Instant::now();
    assert!(cache.get(store, "shard", &digest, bytes.len() as u64).await.unwrap() == bytes);
    println!("a shard of 128 MiB: created in {created:?}, fetched into the cache in {:?}", begun.elapsed());
    assert!(cache.get(store, "shard", &digest, bytes.len() as u64).await.unwrap() == bytes);
    assert_eq!((cache.counts().misses, cache.counts().hits), (1, 1));
    store.delete("shard").await.unwrap();
}

async fn ranges(store: &Store) {
    let bytes: Bytes = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect::<Vec<_>>().into();
    store.put("ranged", bytes.clone()).await.unwrap();
    let parts = (0..64_u64).map(|i| store.get_range("ranged", i << 16..(i + 1) << 16));
    assert!(future::try_join_all(parts).await.unwrap().concat() == bytes);
    store.delete("ranged").await.unwrap();
}

/// What a user gets wrong, and whether the error says what to do.
async fn bad_settings(store: &Store) {
    let (scheme, _) = store.url().split_once("://").unwrap();
    let missing = Store::open(&format!("{scheme}://no-such-bucket/x")).unwrap();
    let error = missing.put("k", Bytes::new()).await.unwrap_err();
    assert!(error.to_string().contains("the bucket or container does not exist; create it first"), "{error}");
    assert!(missing.head("k").await.unwrap().is_none());
    // A user's whole run must not wait for a server that says no.
    let quick = Limits { overall: Duration::from_secs(5), ..store.limits() };
    let error = missing.with_limits(quick).get("k").await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
}
