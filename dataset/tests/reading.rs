//! Reading as a feed does: rows here and there, each byte checked before its use, windows fetched ahead within a bound of memory.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ella_dataset::order::{BucketOrder, OrderConfig, SampleRef};
use ella_dataset::{
    Ahead, CacheLimits, Counts, DataError, DataSet, FeatureDtype, FeatureLayers, FeatureSpec, FeatureSpool, Features, LatentSpec, Manifest,
    Padding, Reading, Row, Settings, ShardEntry, ShardLayout, ShardWriter, write_file,
};
use ella_store::faulty::{Failure, Faults};
use ella_store::{Digest, DiskCache, Limits, Operation, Store};
use half::f16;
use tempfile::TempDir;
use tokio::runtime::Handle;

const SIDE: u32 = 256;
/// 8 × 32 × 32: 16 KiB a row.
const NUMBERS: usize = 8 * 32 * 32;
const ROWS: usize = 12;
const LANES: u32 = 2;

fn spec(padding: Padding) -> FeatureSpec {
    let (weights_digest, tokenizer_digest) = (Digest::of(b"weights"), Digest::of(b"tokenizer"));
    FeatureSpec {
        weights_digest,
        tokenizer_digest,
        max_tokens: 8,
        padding,
        layers: FeatureLayers::Last,
        dtype: FeatureDtype::F16,
        width: 2048,
    }
}

fn moment(index: usize) -> f16 {
    f16::from_bits(index as u16)
}

fn tokens(index: usize) -> u32 {
    1 + index as u32 % 8
}

fn features(spec: &FeatureSpec, index: usize) -> Vec<u8> {
    vec![1 + (index % 200) as u8; spec.stored_tokens(tokens(index)) as usize * spec.token_bytes()]
}

/// A data set of latents with its features.
async fn write(store: &Store, shards: usize, spec: &FeatureSpec) {
    let layout = ShardLayout { captions: vec!["caption".into()], pictures: true, images: false, moments: Some(NUMBERS) };
    let mut entries = Vec::new();
    for shard in 0..shards {
        let mut writer = ShardWriter::new(layout.clone()).unwrap();
        for index in shard * ROWS..(shard + 1) * ROWS {
            let row = Row { key: index.to_string(), captions: vec![format!("caption {index}")], ..Row::default() };
            writer.push(Row { moments: vec![moment(index); NUMBERS], ..row }).unwrap();
        }
        let entry = write_file(store, format!("shards/{shard:05}.arrow"), ROWS as u64, writer.finish().unwrap()).await.unwrap();
        entries.push(ShardEntry { size: Some((SIDE, SIDE)), ..entry });
    }
    let latents = LatentSpec { model: Digest::of(b"vae"), channels: 8, downscale: 8 };
    let settings = Settings { images: false, ..Settings::new(SIDE) };
    let manifest = Manifest::new(Some(settings), Some(latents), Vec::new(), entries);
    store.create("manifest.json", serde_json::to_vec(&manifest).unwrap().into()).await.unwrap();
    let data = DataSet::open_store(store.clone(), CacheLimits::default()).await.unwrap();
    let set = data.begin_features(spec, "caption").await.unwrap();
    for shard in 0..shards {
        let mut spool = FeatureSpool::new(spec, ROWS).unwrap();
        for row in (0..ROWS).rev() {
            let index = shard * ROWS + row;
            spool.put(row, &features(spec, index), tokens(index)).unwrap();
        }
        set.write(shard, ROWS as u64, spool.finish().unwrap(), Counts::new()).await.unwrap();
    }
    let mut empty = FeatureSpool::new(spec, 1).unwrap();
    empty.put(0, &features(spec, 0), 1).unwrap();
    set.write_empty(empty.finish().unwrap()).await.unwrap();
    set.finish().await.unwrap();
}

fn local(dir: &TempDir) -> Store {
    Store::open(dir.path().to_str().unwrap()).unwrap()
}

fn sample(index: usize) -> SampleRef {
    SampleRef { shard: (index / ROWS) as u32, row: (index % ROWS) as u32, index: index as u64 }
}

async fn open(store: &Store, limits: CacheLimits, spec: &FeatureSpec) -> (Arc<DataSet>, Arc<Features>) {
    let data = DataSet::open_store(store.clone(), limits).await.unwrap();
    let features = data.features(spec, "caption").await.unwrap();
    (Arc::new(data), Arc::new(features))
}

/// The rows of these samples, all that they should be.
async fn read(data: &DataSet, sidecar: &Features, at: &[SampleRef]) -> Result<(), DataError> {
    let mut seen = vec![0; at.len()];
    data.rows(at, |i, row| {
        seen[i] += 1;
        let index = at[i].index as usize;
        assert_eq!((row.key, row.caption), (index.to_string().as_str(), format!("caption {index}").as_str()));
        assert!(row.moments.unwrap().iter().all(|number| *number == moment(index)));
        Ok::<_, DataError>(())
    })
    .await?;
    assert!(seen.iter().all(|times| *times == 1));
    let wanted: Vec<_> = at.iter().copied().map(Some).collect();
    let (parts, spec) = ((0..at.len()).collect::<Vec<_>>(), sidecar.spec());
    let positions = sidecar.positions(&wanted).await?;
    let part = spec.token_bytes() * positions.iter().max().copied().unwrap_or(0);
    let mut out = vec![0xff; part * at.len()];
    sidecar.copy(&wanted, &parts, part, &mut out).await?;
    for (slot, sample) in out.chunks(part).zip(at) {
        let own = features(spec, sample.index as usize);
        assert!(slot.starts_with(&own) && slot[own.len()..].iter().all(|byte| *byte == 0));
    }
    Ok(())
}

#[tokio::test]
async fn rows_come_in_any_order_ragged_ones_padded_with_zeroes() {
    for padding in [Padding::Fixed, Padding::None] {
        let (dir, spec) = (TempDir::new().unwrap(), spec(padding));
        write(&local(&dir), 3, &spec).await;
        let (data, features) = open(&local(&dir), CacheLimits::default(), &spec).await;
        let at: Vec<_> = [30, 2, 17, 2, 35, 0, 11, 12].into_iter().map(sample).collect();
        data.read_ahead(&at).await.unwrap();
        features.read_ahead(&at).await.unwrap();
        read(&data, &features, &at).await.unwrap();
        assert_eq!(data.memory().peak, 0, "local files are mapped");
        let beyond = SampleRef { shard: 2, row: ROWS as u32, index: 0 };
        assert!(matches!(data.rows(&[beyond], |_, _| Ok::<_, DataError>(())).await, Err(DataError::Row { .. })));
        let small = features.copy(&[Some(sample(7))], &[0], 16, &mut [0; 16]).await;
        assert!(matches!(small, Err(DataError::FeatureRow { .. })));
    }
}

/// Nobody digests a whole file to read a row of it; yet a damaged byte is never given out.
#[tokio::test]
async fn damage_is_told_by_the_row_that_it_is_in() {
    let (dir, spec) = (TempDir::new().unwrap(), spec(Padding::Fixed));
    write(&local(&dir), 1, &spec).await;
    let folder = local(&dir).child(&format!("features/{}/caption", spec.fingerprint())).local_path().unwrap();
    // Rows of 16 and 32 KiB, in pieces of 64 KiB that are neither the first row's nor the footer's.
    for (path, row) in [(dir.path().join("shards/00000.arrow"), 7), (folder.join("00000.arrow"), 9)] {
        let (data, features) = open(&local(&dir), CacheLimits::default(), &spec).await;
        read(&data, &features, &[sample(0), sample(row)]).await.unwrap();
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = good.len() - (80 << 10);
        bad[at] ^= 1;
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, &bad).unwrap();
        let (data, features) = open(&local(&dir), CacheLimits::default(), &spec).await;
        read(&data, &features, &[sample(0)]).await.unwrap();
        let error = read(&data, &features, &[sample(0), sample(row)]).await.unwrap_err();
        let DataError::Digest { file, found, .. } = &error else { panic!("{error}") };
        assert!(file.ends_with("00000.arrow") && *found == Digest::of(&bad));
        let whole = data.shard(0).await.err().or(features.shard(0).await.err());
        assert!(matches!(whole, Some(DataError::Digest { .. })), "who asks for all is told of all");
        std::fs::write(&path, &good).unwrap();
    }
}

/// The trees only save work: without them the same bytes are read, and the same damage found.
#[tokio::test]
async fn without_trees_files_are_checked_when_they_are_opened() {
    let (dir, spec) = (TempDir::new().unwrap(), spec(Padding::Fixed));
    write(&local(&dir), 2, &spec).await;
    std::fs::remove_dir_all(dir.path().join("trees")).unwrap();
    let path = dir.path().join("shards/00001.arrow");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 4096;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (data, features) = open(&local(&dir), CacheLimits::default(), &spec).await;
    read(&data, &features, &[sample(3)]).await.unwrap();
    assert!(matches!(read(&data, &features, &[sample(ROWS)]).await, Err(DataError::Digest { .. })));
}

/// A data set that is not on this machine, and what its largest file takes.
async fn far(shards: usize, spec: &FeatureSpec) -> (Store, u64) {
    let store = Store::in_memory();
    write(&store, shards, spec).await;
    let (data, _) = open(&store, CacheLimits::default(), spec).await;
    let features = data.begin_features(spec, "caption").await.unwrap().finish().await.unwrap();
    let files = data.manifest().shards.iter().chain(&features.shards);
    let largest = files.map(|entry| entry.bytes).max().unwrap();
    (store, largest)
}

fn reading(data: &Arc<DataSet>, features: &Arc<Features>, window: u32) -> (Arc<BucketOrder>, Reading) {
    let config = OrderConfig { seed: 5, lanes: LANES, micro_batch: 4, window };
    let order = Arc::new(BucketOrder::new(config, &data.manifest().order_shards()).unwrap());
    let (data, features) = (Arc::clone(data), vec![Arc::clone(features)]);
    (Arc::clone(&order), Reading { data, features, order, lanes: 0..LANES })
}

/// Its share of the memory is that of the file recorded. A body that was asked for would break off, again and again.
#[tokio::test(start_paused = true)]
async fn a_file_larger_than_recorded_is_refused_before_it_is_fetched() {
    let spec = spec(Padding::None);
    let (store, _) = far(1, &spec).await;
    let bytes = store.head("shards/00000.arrow").await.unwrap().unwrap().bytes;
    store.put("shards/00000.arrow", vec![0; 4 << 20].into()).await.unwrap();
    let faults = Faults::new();
    faults.push(Operation::Get, "shards", Failure::CutAt(0), u32::MAX);
    let (data, _) = open(&faults.inject(&store), CacheLimits::default(), &spec).await;
    let error = data.shard(0).await.unwrap_err();
    let expected = format!("/shards/00000.arrow: corrupt (expected {bytes} bytes, found {} bytes)", 4 << 20);
    assert!(matches!(error, DataError::Store(_)) && error.to_string().contains(&expected), "{error}");
    assert!(data.memory().peak <= bytes && data.memory().held == 0, "{:?}", data.memory());
}

/// Whatever the size of the data set, and however slow and unsound its store: never more in memory than the bound.
#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_within_its_bound() {
    let spec = spec(Padding::None);
    let (store, largest) = far(24, &spec).await;
    let faults = Faults::new();
    faults.push(Operation::Get, "0007", Failure::Before, 2).push(
        Operation::Get,
        "shards/0001",
        Failure::Slow(Duration::from_millis(20)),
        9,
    );
    let quick = Limits { first_pause: Duration::from_millis(1), ..Limits::default() };
    let store = faults.inject(&store.with_limits(quick));
    // Less than two windows take, and less than one.
    for files in [14, 5, 1] {
        let limits = CacheLimits { bytes: files * largest, ..CacheLimits::default() };
        let (data, features) = open(&store, limits, &spec).await;
        let (order, reading) = reading(&data, &features, 3);
        let ahead = Ahead::start(&Handle::current(), reading, 0);
        let mut seen = HashMap::<u64, u32>::new();
        for step in 0..order.steps_per_epoch() {
            ahead.at(step);
            for lane in 0..LANES {
                let at = order.lane(step, lane);
                read(&data, &features, &at).await.unwrap();
                at.iter().for_each(|sample| *seen.entry(sample.index).or_default() += 1);
            }
        }
        assert!(seen.len() as u64 == order.samples() && seen.values().all(|times| *times == 1));
        let memory = data.memory();
        assert!(memory.peak > 0 && memory.peak <= limits.bytes, "{memory:?}");
    }
    assert!(faults.is_spent());
}

/// What a lane needs, and will need in its next window, is there before it is wanted.
#[tokio::test(flavor = "multi_thread")]
async fn windows_are_fetched_before_they_are_needed() {
    let spec = spec(Padding::Fixed);
    let (store, _) = far(24, &spec).await;
    let (data, features) = open(&store, CacheLimits::default(), &spec).await;
    let (order, reading) = reading(&data, &features, 3);
    let ahead = Ahead::start(&Handle::current(), reading, 0);
    let mut shards = HashSet::new();
    for step in 0..order.steps_per_epoch() {
        ahead.at(step);
        let wanted = |lane| order.upcoming(step, lane).into_iter().flat_map(|(_, shards)| shards);
        // With room for all, none of those that were opened before is closed.
        shards.extend((0..LANES).flat_map(wanted));
        let opened = async {
            while (data.opened().ahead as usize) < 2 * shards.len() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), opened).await.unwrap();
        for lane in 0..LANES {
            read(&data, &features, &order.lane(step, lane)).await.unwrap();
        }
    }
    assert_eq!((data.opened().wanted, data.opened().ahead), (0, 48));
}

/// What holds soon, though not while other tasks are at work.
async fn eventually(holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap();
}

/// Bytes that this process has mapped of files in a folder, those included that have lost their name.
fn mapped(folder: &std::path::Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let own = maps.lines().filter(|line| line.contains(folder.to_str().unwrap()));
    let bytes = |line: &str| {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        u64::from_str_radix(to, 16).unwrap() - u64::from_str_radix(from, 16).unwrap()
    };
    own.map(bytes).sum()
}

/// A cache on disk takes the place of memory: shared by who reads the same data set, bounded in what it holds and in what is kept open of
/// it, and never trusted.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_on_disk_is_shared_bounded_and_checked() {
    let spec = &spec(Padding::Fixed);
    let (store, largest) = far(24, spec).await;
    let dir = TempDir::new().unwrap();
    let through = |bound: u64| {
        let (store, folder) = (store.clone(), dir.path().to_owned());
        async move {
            let cache = DiskCache::open(folder, bound).await.unwrap();
            let data = DataSet::open_through(store, CacheLimits::default(), Some(cache)).await.unwrap();
            let features = data.features(spec, "caption").await.unwrap();
            (Arc::new(data), Arc::new(features))
        }
    };
    // Smaller than all windows, by two that know nothing of each other.
    let bound = 9 * largest;
    let (one, other) = (through(bound).await, through(bound).await);
    let (order, ahead) = reading(&one.0, &one.1, 2);
    let ahead = Ahead::start(&Handle::current(), ahead, 0);
    for step in 0..order.steps_per_epoch() {
        ahead.at(step);
        for (lane, (data, features)) in [&one, &other].into_iter().enumerate() {
            read(data, features, &order.lane(step, lane as u32)).await.unwrap();
        }
        // Files come and go while the folder is listed.
        let sizes = || std::fs::read_dir(dir.path().join("objects")).unwrap().filter_map(|file| Some(file.ok()?.metadata().ok()?.len()));
        eventually(|| sizes().sum::<u64>() <= bound).await;
        assert!(mapped(dir.path()) <= 2 * (bound + (24 << 12)), "each keeps no more open than the cache may hold");
    }
    drop(ahead);
    let counts = [&one, &other].map(|(data, _)| data.cache().unwrap());
    assert!(counts.iter().all(|counts| counts.bypassed.is_empty() && counts.corrupt == 0), "{counts:?}");
    assert!(counts.iter().map(|counts| counts.evicted).sum::<u64>() > 0 && counts.iter().all(|counts| counts.hits + counts.misses > 0));
    assert_eq!((one.0.memory().peak, other.0.memory().peak), (0, 0));
    drop((one, other));
    eventually(|| mapped(dir.path()) == 0).await;

    // Room for all: the second fetches nothing, but for what the disk has damaged.
    let (data, features) = through(100 * largest).await;
    let all: Vec<_> = (0..24 * ROWS).map(sample).collect();
    read(&data, &features, &all).await.unwrap();
    let damaged = dir.path().join("objects").join(data.manifest().shards[7].blake3.to_string());
    drop((data, features));
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    let (data, features) = through(100 * largest).await;
    read(&data, &features, &all).await.unwrap();
    read(&data, &features, &all).await.unwrap();
    let counts = data.cache().unwrap();
    assert_eq!((counts.hits, counts.misses, counts.corrupt), (47, 1, 1));
    data.read_ahead(&all).await.unwrap();
    features.read_ahead(&all).await.unwrap();
}

/// LIVE: a store that does not answer is an error in time, and no other file waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_is_not_waited_for_for_ever() {
    let spec = spec(Padding::Fixed);
    let (store, _) = far(2, &spec).await;
    let short = Duration::from_millis(100);
    let limits = Limits { attempt: short, overall: 2 * short, first_contact: short, ..Limits::default() };
    let faults = Faults::new();
    let store = faults.inject(&store.with_limits(limits));
    let (data, features) = open(&store, CacheLimits::default(), &spec).await;
    faults.push(Operation::Get, "shards/00000", Failure::Hang, 1000);
    let error = tokio::time::timeout(Duration::from_secs(30), read(&data, &features, &[sample(0)])).await.unwrap().unwrap_err();
    assert!(matches!(error, DataError::Store(_)), "{error}");
    read(&data, &features, &[sample(ROWS)]).await.unwrap();
}

/// Files that others hold leave no room: told after a while, with what to do.
#[tokio::test(start_paused = true)]
async fn no_room_is_an_error_in_time() {
    let spec = spec(Padding::Fixed);
    let (store, largest) = far(2, &spec).await;
    let (data, _) = open(&store, CacheLimits { bytes: largest, ..CacheLimits::default() }, &spec).await;
    let held = data.shard(0).await.unwrap();
    let error = data.shard(1).await.unwrap_err();
    assert!(matches!(error, DataError::Crowded { .. }) && error.to_string().contains("data.memory_bytes"), "{error}");
    drop(held);
    data.shard(1).await.unwrap();
}
