//! The local cache: one process, several at once, killed ones, full ones, and what damages it.

#![cfg(feature = "cloud")]
#![allow(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ella_store::{CacheCounts, Digest, DiskCache, Limits, Store, StoreError};
use futures::future;
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{Manners, Reply, Server};

const MIB: usize = 1 << 20;

/// The object `i`, of `len` bytes.
fn object(i: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ i) as u8).collect()
}

/// A server with the objects `/0`, `/1`, … of these sizes, a store over it, and an empty folder.
struct Fixture {
    folder: tempfile::TempDir,
    server: Arc<Server>,
    store: Store,
    objects: Vec<Vec<u8>>,
}

impl Fixture {
    async fn new(sizes: &[usize]) -> Self {
        let server = Server::start([], Manners::GOOD).await;
        let objects: Vec<_> = sizes.iter().enumerate().map(|(i, &len)| object(i, len)).collect();
        for (i, bytes) in objects.iter().enumerate() {
            server.keep(&format!("/{i}"), bytes);
        }
        let store = Store::open(&server.url).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), server, store, objects }
    }

    fn folder(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    async fn cache(&self, bound: usize) -> DiskCache {
        DiskCache::open(self.folder(), bound as u64).await.unwrap()
    }

    async fn get(&self, cache: &DiskCache, i: usize) -> bytes::Bytes {
        let bytes = &self.objects[i];
        let got = cache.get(&self.store, &i.to_string(), &Digest::of(bytes), bytes.len() as u64).await.unwrap();
        assert!(got == bytes, "object {i}");
        got
    }

    fn path(&self, i: usize) -> PathBuf {
        self.folder().join("objects").join(Digest::of(&self.objects[i]).to_string())
    }

    fn cached(&self) -> Vec<usize> {
        (0..self.objects.len()).filter(|&i| self.path(i).exists()).collect()
    }

    fn held(&self) -> usize {
        self.cached().iter().map(|&i| self.objects[i].len()).sum()
    }

    fn fetches(&self) -> usize {
        self.server.requests().len()
    }

    /// Starts this test anew as another process, which gets `wanted` through the cache (see [`play`]).
    fn process(&self, test: &str, bound: usize, wanted: &[usize]) -> Child {
        self.command(Command::new(std::env::current_exe().unwrap()), test, bound, wanted)
    }

    fn command(&self, mut program: Command, test: &str, bound: usize, wanted: &[usize]) -> Child {
        let wanted: Vec<_> = wanted.iter().map(|&i| json!([i.to_string(), Digest::of(&self.objects[i]), self.objects[i].len()])).collect();
        let role = json!({"folder": self.folder(), "bound": bound, "url": self.server.url, "wanted": wanted});
        program.args(["--exact", test, "--nocapture"]).env(ROLE, role.to_string()).stdout(Stdio::piped()).spawn().unwrap()
    }
}

const ROLE: &str = "ELLA_CACHE_TEST_ROLE";

/// In a process that [`Fixture::process`] started: gets what it is told to, and prints the counts.
async fn play() -> bool {
    let Ok(role) = std::env::var(ROLE) else { return false };
    let role: Value = serde_json::from_str(&role).unwrap();
    let store = Store::open(role["url"].as_str().unwrap()).unwrap();
    let cache = DiskCache::open(role["folder"].as_str().unwrap(), role["bound"].as_u64().unwrap()).await.unwrap();
    for wanted in role["wanted"].as_array().unwrap() {
        let digest: Digest = wanted[1].as_str().unwrap().parse().unwrap();
        let got = cache.get(&store, wanted[0].as_str().unwrap(), &digest, wanted[2].as_u64().unwrap()).await.unwrap();
        assert_eq!(Digest::of(&got), digest);
    }
    let CacheCounts { hits, misses, evicted, bypassed, .. } = cache.counts();
    println!("\ncounts {}", json!({"hits": hits, "misses": misses, "evicted": evicted, "bypassed": bypassed}));
    true
}

fn counts(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("counts "));
    serde_json::from_str(line.unwrap_or_else(|| panic!("the process failed: {text}"))).unwrap()
}

async fn finished(child: Child) -> Value {
    counts(&tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap())
}

fn entries(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[tokio::test]
async fn an_object_is_fetched_once_and_given_from_disk_then() {
    let fixture = Fixture::new(&[3 * MIB + 5, 0]).await;
    let cache = fixture.cache(10 * MIB).await;
    for _ in 0..3 {
        fixture.get(&cache, 0).await;
        fixture.get(&cache, 1).await;
    }
    assert_eq!(fixture.fetches(), 2);
    let expected = CacheCounts { hits: 4, misses: 2, fetched_bytes: (3 * MIB + 5) as u64, ..CacheCounts::default() };
    assert_eq!(cache.counts(), expected);
    assert_eq!((fixture.cached(), entries(&fixture.folder().join("fill"))), (vec![0, 1], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_want_one_object_fetch_it_once() {
    let fixture = Fixture::new(&[3 * MIB]).await;
    let (cache, other) = (fixture.cache(10 * MIB).await, fixture.cache(10 * MIB).await);
    future::join_all((0..16).map(|i| fixture.get(if i % 2 == 0 { &cache } else { &other }, 0))).await;
    assert_eq!(fixture.fetches(), 1);
    assert_eq!(cache.counts().hits + other.counts().hits, 15);
}

#[tokio::test]
async fn processes_that_want_one_object_fetch_it_once() {
    if play().await {
        return;
    }
    let fixture = Fixture::new(&[3 * MIB, 5 * MIB]).await;
    let name = "processes_that_want_one_object_fetch_it_once";
    let processes: Vec<_> = (0..4).map(|_| fixture.process(name, 20 * MIB, &[0, 1])).collect();
    let counts = future::join_all(processes.into_iter().map(finished)).await;
    let sum = |what: &str| counts.iter().map(|counts| counts[what].as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("misses"), sum("hits"), fixture.fetches()), (2, 6, 2), "{counts:?}");
    assert_eq!(entries(&fixture.folder().join("fill")), 0);
}

#[tokio::test]
async fn what_a_killed_process_was_fetching_is_fetched_by_the_next() {
    if play().await {
        return;
    }
    for next in [0, 1] {
        let fixture = Fixture::new(&[3 * MIB, 5]).await;
        fixture.server.plan([Reply::Held]);
        let mut killed = fixture.process("what_a_killed_process_was_fetching_is_fetched_by_the_next", 10 * MIB, &[0]);
        fixture.server.seen(1).await;
        killed.kill().unwrap();
        killed.wait().unwrap();
        assert_eq!(entries(&fixture.folder().join("fill")), 1, "it was half-way");
        let cache = fixture.cache(10 * MIB).await;
        let fetched = fixture.get(&cache, next);
        tokio::time::timeout(Duration::from_secs(20), fetched).await.unwrap();
        assert_eq!((fixture.cached(), entries(&fixture.folder().join("fill"))), (vec![next], 0));
        assert_eq!((cache.counts().misses, fixture.fetches()), (1, 2));
    }
}

#[tokio::test]
async fn a_stopped_process_is_waited_for_until_the_deadline() {
    if play().await {
        return;
    }
    let fixture = Fixture::new(&[3 * MIB]).await;
    fixture.server.plan([Reply::Held]);
    let mut stuck = fixture.process("a_stopped_process_is_waited_for_until_the_deadline", 10 * MIB, &[0]);
    fixture.server.seen(1).await;
    let cache = fixture.cache(10 * MIB).await;
    let quick = Limits { overall: Duration::from_millis(200), bytes_per_second: u64::MAX, ..Limits::default() };
    let bytes = &fixture.objects[0];
    let got = cache.get(&fixture.store.with_limits(quick), "0", &Digest::of(bytes), bytes.len() as u64).await.unwrap();
    assert!(got == bytes);
    assert_eq!(cache.counts().bypassed, BTreeMap::from([("waited too long", 1)]));
    stuck.kill().unwrap();
    stuck.wait().unwrap();
}

#[tokio::test]
async fn the_least_recently_used_are_evicted_and_stay_readable() {
    let fixture = Fixture::new(&[40_000, 40_000, 40_000, 90_000]).await;
    let cache = fixture.cache(100_000).await;
    let first = fixture.get(&cache, 0).await;
    fixture.get(&cache, 1).await;
    // The clock of file times is too coarse for a test to wait for.
    let used = |i: usize, seconds| {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        File::open(fixture.path(i)).unwrap().set_times(FileTimes::new().set_accessed(time)).unwrap();
    };
    used(0, 1);
    used(1, 2);
    fixture.get(&cache, 0).await; // used now
    fixture.get(&cache, 2).await;
    assert_eq!(fixture.cached(), [0, 2]);
    fixture.get(&cache, 3).await;
    assert_eq!(fixture.cached(), [3]);
    assert!(first == fixture.objects[0], "what was evicted is still readable");
    let counts = cache.counts();
    assert_eq!((counts.hits, counts.misses, counts.evicted, counts.evicted_bytes), (1, 4, 3, 120_000));
}

#[tokio::test]
async fn a_smaller_bound_evicts_at_once_and_foreign_files_are_left_alone() {
    let fixture = Fixture::new(&[40_000, 40_000]).await;
    let cache = fixture.cache(100_000).await;
    fixture.get(&cache, 0).await;
    fixture.get(&cache, 1).await;
    let foreign = ["objects/notes.txt", "fill/notes.txt", "notes.txt"].map(|name| fixture.folder().join(name));
    foreign.iter().for_each(|path| fs::write(path, b"mine").unwrap());
    let smaller = fixture.cache(50_000).await;
    assert_eq!((fixture.cached().len(), smaller.counts().evicted), (1, 1));
    assert_eq!(fixture.cache(0).await.counts().evicted, 1);
    assert!(foreign.iter().all(|path| path.exists()));
}

#[tokio::test]
async fn an_object_above_the_bound_is_read_past_the_cache() {
    let fixture = Fixture::new(&[40_000, 100_001]).await;
    let cache = fixture.cache(100_000).await;
    fixture.get(&cache, 0).await;
    fixture.get(&cache, 1).await;
    assert_eq!(fixture.cached(), [0]);
    assert_eq!(cache.counts().bypassed, BTreeMap::from([("larger than the cache", 1)]));
}

#[tokio::test]
async fn a_damaged_copy_is_found_and_fetched_anew() {
    let fixture = Fixture::new(&[MIB, MIB]).await;
    let mut flipped = fixture.objects[0].clone();
    flipped[MIB / 2] ^= 1;
    let cache = fixture.cache(10 * MIB).await;
    for (i, damage) in [flipped, fixture.objects[0][..MIB - 1].to_vec(), vec![]].into_iter().enumerate() {
        fixture.get(&cache, 0).await;
        // As a failing disk would: not through the map that someone may have of it.
        let path = fixture.path(0);
        fs::remove_file(&path).unwrap();
        fs::write(&path, damage).unwrap();
        let in_this_process = i % 2 == 0;
        let cache = if in_this_process { cache.clone() } else { fixture.cache(10 * MIB).await };
        let before = cache.counts();
        fixture.get(&cache, 0).await;
        let after = cache.counts();
        assert_eq!((after.corrupt - before.corrupt, after.misses - before.misses), (1, 1), "{i}");
        assert_eq!(fs::read(&path).unwrap(), fixture.objects[0]);
    }
}

#[tokio::test]
async fn a_stores_object_that_is_another_never_enters_the_cache() {
    let fixture = Fixture::new(&[MIB, MIB - 1, MIB + 1, MIB]).await;
    let cache = fixture.cache(10 * MIB).await;
    let wanted = Digest::of(&fixture.objects[0]);
    for other in ["1", "2", "3"] {
        let error = cache.get(&fixture.store, other, &wanted, MIB as u64).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
        assert!(error.to_string().starts_with(&format!("{}/{other}: corrupt (expected ", fixture.server.url)), "{error}");
    }
    let error = cache.get(&fixture.store, "4", &wanted, MIB as u64).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    assert_eq!(entries(&fixture.folder().join("fill")) + entries(&fixture.folder().join("objects")), 0);
    assert_eq!(cache.counts(), CacheCounts::default());
}

/// On a disk of its own, of 8 MiB, with a bound of ten times that.
#[tokio::test]
async fn a_full_disk_is_made_room_on_or_read_past() {
    if play().await {
        return;
    }
    let fixture = Fixture::new(&[3 * MIB, 3 * MIB, 3 * MIB, 9 * MIB]).await;
    fs::create_dir_all(fixture.folder()).unwrap();
    let on_a_disk_of_its_own = |program: &Path| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", "mount -t tmpfs -o size=8m none \"$0\" && exec \"$@\""]).arg(fixture.folder()).arg(program);
        command
    };
    if !on_a_disk_of_its_own(Path::new("true")).status().is_ok_and(|status| status.success()) {
        println!("skipped: this machine does not let the test mount a small disk");
        return;
    }
    let program = on_a_disk_of_its_own(&std::env::current_exe().unwrap());
    let child = fixture.command(program, "a_full_disk_is_made_room_on_or_read_past", 80 * MIB, &[0, 1, 2, 3, 0]);
    let counts = finished(child).await;
    assert_eq!(counts["bypassed"], json!({"disk full": 1}), "{counts}");
}

#[tokio::test]
async fn processes_that_evict_at_once_keep_the_bound_and_do_not_empty_the_cache() {
    if play().await {
        return;
    }
    let sizes: Vec<usize> = (0..32).map(|i| 30_000 + 1_000 * (i % 7)).collect();
    let (fixture, bound) = (Fixture::new(&sizes).await, 200_000);
    let name = "processes_that_evict_at_once_keep_the_bound_and_do_not_empty_the_cache";
    let processes: Vec<_> = (0..4).map(|p| fixture.process(name, bound, &(p * 8..p * 8 + 8).collect::<Vec<_>>())).collect();
    let counts = future::join_all(processes.into_iter().map(finished)).await;
    let misses: u64 = counts.iter().map(|counts| counts["misses"].as_u64().unwrap()).sum();
    assert_eq!(misses, 32, "{counts:?}");
    // Of what fits, at most each other process's object under way was given up in vain.
    assert!(fixture.held() <= bound && fixture.held() > bound - 4 * 36_000, "{} bytes: {counts:?}", fixture.held());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_for_is_given_and_the_bound_holds(
        sizes in prop::collection::vec(0..60_000usize, 1..8),
        bound in 0..150_000usize,
        asked in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fixture = Fixture::new(&sizes).await;
            let caches = [fixture.cache(bound).await, fixture.cache(bound).await];
            for (index, second) in &asked {
                fixture.get(&caches[usize::from(*second)], index.index(sizes.len())).await;
                assert!(fixture.held() <= bound);
            }
            let counts = caches.map(|cache| cache.counts());
            let sum = |of: fn(&CacheCounts) -> u64| counts.iter().map(of).sum::<u64>();
            let bypassed = sum(|counts| counts.bypassed.values().sum());
            assert_eq!(sum(|counts| counts.hits + counts.misses) + bypassed, asked.len() as u64);
            assert_eq!(sum(|counts| counts.fetched_bytes) - sum(|counts| counts.evicted_bytes), fixture.held() as u64);
        });
    }
}
