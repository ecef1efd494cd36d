//! How fast samples are read: shuffled latents and T5-XL-shaped features (8 × 64 × 64 and 128 × 2048 numbers in float16, 576 KiB a sample)
//! from local disk into batches, side by side with MosaicML Streaming and litdata. `make bench-feed`.
//!
//! What counts: from the order to a batch in contiguous memory. CPU time is user and system time of the whole process; the three take turns
//! in one run, because machines are shared. `PEERS_PYTHON` names a Python that has both peers; without it ella is measured alone.

use anyhow::{Context as _, Result, anyhow, bail};
use ella_dataset::order::{BucketOrder, Order, OrderConfig, SampleRef};
use ella_dataset::{
    Ahead, Counts, DataSet, FeatureDtype, FeatureLayers, FeatureManifest, FeatureSet, FeatureSpec, FeatureWriter, Features, LatentSpec,
    Manifest, Padding, Reading, Row, SCHEMA, Settings, ShardEntry, ShardLayout, ShardWriter, write_file,
};
use ella_store::{Digest, Store};
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Runtime;

const BATCH: u32 = 32;
const WINDOW: u32 = 16;
const TOKENS: u32 = 128;
const CAPTION: &str = "caption";
const ROUNDS: usize = 5;

/// The shape of a data set's samples.
#[derive(Clone, Copy)]
struct Shape {
    /// Side of the pictures, pixels; a latent's is an eighth.
    side: u32,
    /// Width of a feature.
    width: u32,
    /// Rows of a shard.
    rows: usize,
}

/// SD 1.5's latents at 512 pixels and T5-XL's features.
const FULL: Shape = Shape { side: 512, width: 2048, rows: 256 };
/// As many rows as a shard of 128 MiB has under [`FULL`], but small ones.
const SMALL: Shape = Shape { side: 64, width: 16, rows: 2048 };

impl Shape {
    fn latent(self) -> usize {
        8 * (self.side as usize / 8).pow(2)
    }

    fn feature_bytes(self) -> usize {
        TOKENS as usize * self.width as usize * 2
    }

    fn sample_bytes(self) -> usize {
        self.latent() * 2 + self.feature_bytes()
    }

    fn spec(self) -> FeatureSpec {
        FeatureSpec {
            weights_digest: Digest::of(b"weights"),
            tokenizer_digest: Digest::of(b"tokenizer"),
            max_tokens: TOKENS,
            padding: Padding::Fixed,
            layers: FeatureLayers::Last,
            dtype: FeatureDtype::F16,
            width: self.width,
        }
    }

    /// A manifest of latents alone.
    fn manifest(self, shards: Vec<ShardEntry>) -> Manifest {
        let latents = LatentSpec { model: Digest::of(b"vae"), channels: 8, downscale: 8 };
        Manifest::new(Some(Settings { images: false, ..Settings::new(self.side) }), Some(latents), Vec::new(), shards)
    }

    async fn write_shard(self, store: &Store, number: usize, rows: usize) -> Result<ShardEntry> {
        let layout = ShardLayout { captions: vec![CAPTION.to_owned()], pictures: true, images: false, moments: Some(self.latent()) };
        let mut writer = ShardWriter::new(layout)?;
        for row in 0..rows {
            let index = number * self.rows + row;
            let bytes = noise(index as u64, self.latent() * 2);
            let moments = bytes.chunks_exact(2).map(|two| f16::from_le_bytes([two[0], two[1]])).collect();
            let caption = "a dense caption of a picture, in several clauses, that says what stands where. ".repeat(6);
            writer.push(Row { key: format!("{index:09}"), captions: vec![caption], original: (1024, 768), moments, ..Row::default() })?;
        }
        let entry = write_file(store, name(number, "shards/"), rows as u64, writer.finish()?).await?;
        Ok(ShardEntry { size: Some((self.side, self.side)), ..entry })
    }

    async fn write_features(self, set: &FeatureSet, number: usize, rows: u64) -> Result<ShardEntry> {
        let file = self.feature_file(number as u64, rows)?;
        Ok(set.write(number, rows, file, Counts::new()).await?)
    }

    fn feature_file(self, number: u64, rows: u64) -> Result<bytes::Bytes> {
        let mut writer = FeatureWriter::new(&self.spec())?;
        (0..rows).try_for_each(|row| writer.push(&noise(!number << 32 | row, self.feature_bytes()), TOKENS))?;
        Ok(writer.finish()?)
    }
}

fn name(shard: usize, folder: &str) -> String {
    format!("{folder}{shard:05}-0123456789ab-0000.arrow")
}

fn main() -> Result<()> {
    let samples = std::env::args().nth(1).map_or(Ok(4096), |text| text.parse())?;
    let folder = std::env::var("BENCH_FOLDER").map_or_else(|_| std::env::temp_dir().join("ella-bench-feed"), PathBuf::from);
    let bench = Bench { runtime: Runtime::new()?, folder, samples };
    println!(
        "{samples} samples of {} KiB in batches of {BATCH}, on {} cores",
        FULL.sample_bytes() / 1024,
        std::thread::available_parallelism()?
    );
    bench.order()?;
    bench.manifest()?;
    bench.write()?;
    if std::env::args().nth(2).is_some_and(|part| part == "cold") {
        return bench.cold();
    }
    let mut peers = bench.peers()?;
    bench.warm(&mut peers)?;
    bench.resume(&mut peers)?;
    drop(peers);
    bench.resume_at_scale()?;
    bench.cold()
}

struct Bench {
    runtime: Runtime,
    folder: PathBuf,
    samples: usize,
}

/// What reading some samples took.
#[derive(Clone, Copy, Debug, Default)]
struct Took {
    samples: f64,
    wall: f64,
    cpu: f64,
}

impl Took {
    fn per_core_second(&self) -> f64 {
        self.samples / self.cpu
    }
}

/// User and system time of this process, seconds.
fn cpu_seconds() -> f64 {
    // SAFETY: getrusage writes the struct it is given, for which zeroes are a value, and nothing else.
    let used = unsafe {
        let mut used: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut used);
        used
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(used.ru_utime) + seconds(used.ru_stime)
}

fn timed(read: impl FnOnce() -> Result<usize>) -> Result<Took> {
    let (wall, cpu) = (Instant::now(), cpu_seconds());
    let samples = read()? as f64;
    Ok(Took { samples, wall: wall.elapsed().as_secs_f64(), cpu: cpu_seconds() - cpu })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A line of `/proc/self/status`, in MiB.
fn status_mib(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).context("no such line")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib / 1024.0)
}

/// A batch's memory, used again and again as a feed's pinned memory is.
#[derive(Default)]
struct Batch {
    latents: Vec<u8>,
    features: Vec<u8>,
}

/// The data set, its features and its order, open.
struct Reader {
    data: Arc<DataSet>,
    features: Arc<Features>,
    order: Arc<BucketOrder>,
    shape: Shape,
}

impl Reader {
    async fn open(folder: &Path, shape: Shape, seed: u64) -> Result<Reader> {
        let data = Arc::new(DataSet::open(folder.to_str().context("a folder that is not UTF-8")?).await?);
        let features = Arc::new(data.features(&shape.spec(), CAPTION).await?);
        let order = Arc::new(BucketOrder::new(order_config(seed), &data.manifest().order_shards())?);
        Ok(Reader { data, features, order, shape })
    }

    /// Begins to read ahead of a step, as the feed does.
    fn start(&self, step: u64) -> Ahead {
        let (data, features, order) = (Arc::clone(&self.data), vec![Arc::clone(&self.features)], Arc::clone(&self.order));
        Ahead::start(&tokio::runtime::Handle::current(), Reading { data, features, order, lanes: 0..1 }, step)
    }

    /// Reads a step's samples into the batch, as the feed does.
    async fn step(&self, step: u64, ahead: &Ahead, batch: &mut Batch) -> Result<usize> {
        ahead.at(step);
        let samples = self.order.lane(step, 0);
        let (count, each) = (samples.len(), self.shape.latent() * 2);
        batch.latents.resize(count * each, 0);
        self.data
            .rows(&samples, |i, row| {
                let moments = row.moments.context("no moments")?;
                batch.latents[i * each..(i + 1) * each].copy_from_slice(bytemuck::cast_slice(moments.reinterpret_cast()));
                Ok::<_, anyhow::Error>(())
            })
            .await?;
        let at: Vec<Option<SampleRef>> = samples.into_iter().map(Some).collect();
        let longest = self.features.positions(&at).await?.into_iter().max().unwrap_or(0);
        let (parts, part): (Vec<usize>, _) = ((0..count).collect(), longest * self.shape.width as usize * 2);
        batch.features.resize(count * part, 0);
        self.features.copy(&at, &parts, part, &mut batch.features).await?;
        Ok(count)
    }

    async fn epoch(&self, epoch: u64, batch: &mut Batch) -> Result<usize> {
        let steps = self.order.steps_per_epoch();
        let (mut samples, ahead) = (0, self.start(epoch * steps));
        for step in epoch * steps..(epoch + 1) * steps {
            samples += self.step(step, &ahead, batch).await?;
        }
        Ok(samples)
    }
}

fn order_config(seed: u64) -> OrderConfig {
    OrderConfig { seed, lanes: 1, micro_batch: BATCH, window: WINDOW }
}

fn json(record: &impl serde::Serialize) -> Result<bytes::Bytes> {
    Ok(serde_json::to_vec_pretty(record)?.into())
}

/// Bytes without a pattern, that are all finite numbers.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..len / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state & 0x3bff_3bff_3bff_3bff).to_le_bytes()
    });
    words.collect()
}

impl Bench {
    fn ours(&self) -> PathBuf {
        self.folder.join("ella")
    }

    /// The order over a billion samples.
    fn order(&self) -> Result<()> {
        let rows = vec![10_000; 100_000];
        let config = OrderConfig { seed: 7, lanes: 256, micro_batch: 32, window: WINDOW };
        let (begin, before) = (Instant::now(), status_mib("RssAnon")?);
        let order = Order::new(config, &rows)?;
        let middle = order.steps_per_epoch() / 2;
        let mut seen = order.global(middle).concat().len();
        let (made, begin) = (begin.elapsed(), Instant::now());
        for step in middle..middle + 256 {
            seen += order.global(step).concat().len();
        }
        let nanoseconds = begin.elapsed().as_nanos() as f64 / seen as f64;
        let memory = status_mib("RssAnon")? - before;
        println!("order of 10^9 samples in 10^5 shards: first step {made:.1?}, then {nanoseconds:.0} ns a sample, {memory:.1} MiB");
        Ok(())
    }

    /// Opens a manifest of 10^5 shards.
    fn manifest(&self) -> Result<()> {
        let entry = |i: u32| ShardEntry {
            name: format!("shards/{i:05}-9f86d081884c-0000.arrow"),
            rows: 10_000,
            bytes: 1 << 27,
            blake3: Digest::of(&i.to_le_bytes()),
            size: Some((512, 512)),
        };
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("manifest.json"), json(&FULL.manifest((0..100_000).map(entry).collect()))?)?;
        let url = folder.path().to_str().context("not UTF-8")?;
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let begin = Instant::now();
            let data = self.runtime.block_on(DataSet::open(url))?;
            let digest = data.manifest().digest();
            times.push(begin.elapsed().as_secs_f64());
            std::hint::black_box(digest);
        }
        println!("a manifest of 10^5 shards, opened and digested: {:.0} ms", median(times) * 1e3);
        Ok(())
    }

    /// Makes the data set, and those of the peers, unless they are there.
    fn write(&self) -> Result<()> {
        let done = self.folder.join(format!("{}.done", self.samples));
        if done.exists() {
            return Ok(());
        }
        let _ = std::fs::remove_dir_all(&self.folder);
        self.runtime.block_on(write_ours(&self.ours(), self.samples))?;
        for peer in PEERS.iter().filter(|_| python().is_some()) {
            let to = self.folder.join(peer);
            println!("writing the data set of {peer}");
            let mut command = Command::new(python().context("no Python")?);
            command.arg(script()).args(["write", peer]).arg(&to).arg(self.samples.to_string()).stdout(Stdio::null()).stderr(Stdio::null());
            if !command.status()?.success() {
                bail!("{peer} could not write its data set: {command:?}");
            }
        }
        Ok(File::create(done).map(drop)?)
    }

    fn peers(&self) -> Result<Vec<Peer>> {
        let Some(python) = python() else { return Ok(Vec::new()) };
        PEERS.iter().map(|name| Peer::start(&python, name, &self.folder.join(name))).collect()
    }

    /// Everything in the page cache: samples per core-second.
    fn warm(&self, peers: &mut [Peer]) -> Result<()> {
        let reader = self.runtime.block_on(Reader::open(&self.ours(), FULL, 1))?;
        let mut memory = Batch::default();
        let mut epoch = |number| timed(|| self.runtime.block_on(reader.epoch(number, &mut memory)));
        let first = epoch(0)?;
        let (mut ours, mut theirs) = (Vec::new(), vec![Vec::new(); 2 * peers.len()]);
        for peer in peers.iter_mut() {
            peer.ask("epoch")?;
        }
        for round in 0..ROUNDS {
            ours.push(epoch(1 + round as u64)?);
            for (peer, times) in peers.iter_mut().zip(theirs.chunks_mut(2)) {
                times[0].push(peer.ask("epoch")?);
                times[1].push(peer.ask("samples")?);
            }
        }
        let rate = |times: &[Took]| median(times.iter().map(Took::per_core_second).collect());
        let ella = rate(&ours);
        println!("warm, every byte checked at this first reading: ella {:.0} samples per core-second", first.per_core_second());
        println!("warm: ella {ella:.0} samples per core-second, {:.0} MiB of its own memory", status_mib("RssAnon")?);
        for (peer, times) in peers.iter().zip(theirs.chunks(2)) {
            let (batches, alone) = (rate(&times[0]), rate(&times[1]));
            println!(
                "warm: {} {batches:.0} in batches, {alone:.0} without making batches: ella {:.1} and {:.1} times as many",
                peer.name,
                ella / batches,
                ella / alone
            );
        }
        Ok(())
    }

    /// The first batch after a resume in the middle of an epoch: everything is opened anew. Meanwhile the windows are opened too, as in a feed.
    fn resume(&self, peers: &mut [Peer]) -> Result<()> {
        let ours = FRACTIONS.repeat(ROUNDS).into_iter().map(|fraction| self.first_batch(&self.ours(), FULL, fraction));
        told("ella", &ours.collect::<Result<Vec<_>>>()?);
        for peer in peers {
            let mut times = Vec::new();
            for fraction in FRACTIONS {
                // Once before: what is to be measured is not the first time that Python runs this code.
                peer.ask(&format!("resume {fraction}"))?;
                times.push(peer.ask(&format!("resume {fraction}"))?);
            }
            told(peer.name, &times);
        }
        Ok(())
    }

    /// Opens the data set, its features and the order, and reads the first batch.
    fn first_batch(&self, folder: &Path, shape: Shape, fraction: f64) -> Result<Took> {
        let mut memory = Batch::default();
        timed(|| {
            self.runtime.block_on(async {
                let reader = Reader::open(folder, shape, 1).await?;
                let step = (reader.order.steps_per_epoch() as f64 * fraction) as u64;
                reader.step(step, &reader.start(step), &mut memory).await
            })
        })
    }

    /// The same in a data set of ten million samples, of which only those files hold anything that the first steps read.
    fn resume_at_scale(&self) -> Result<()> {
        let large = tempfile::tempdir_in(&self.folder)?;
        self.runtime.block_on(write_large(large.path(), SMALL, FRACTIONS[1]))?;
        let times = (0..3 * ROUNDS).map(|_| self.first_batch(large.path(), SMALL, FRACTIONS[1])).collect::<Result<Vec<_>>>()?;
        told("ella in 10^7 samples", &times);
        Ok(())
    }

    /// Nothing in the page cache: bytes per second, and those of reading the same files from end to end.
    fn cold(&self) -> Result<()> {
        let files = arrow_files(&self.ours())?;
        let (mut ours, mut whole, mut pieces, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS as u64 {
            forget(&files)?;
            whole.push(sequential(&files)?);
            forget(&files)?;
            pieces.push(scattered(&files)?);
            let mut memory = Batch::default();
            let took =
                timed(|| self.runtime.block_on(async { Reader::open(&self.ours(), FULL, 2).await?.epoch(round, &mut memory).await }))?;
            ours.push(took.samples * FULL.sample_bytes() as f64 / took.wall);
            cpu.push(took.per_core_second());
        }
        let [ours, whole, pieces] = [ours, whole, pieces].map(|rates| median(rates) / 1e6);
        println!("cold, every byte checked: ella {ours:.0} MB/s, {:.0} samples per core-second", median(cpu));
        println!("cold: the disk, in pieces of a sample's size: {pieces:.0} MB/s: ella has {:.2} of it", ours / pieces);
        println!("cold: the disk, from end to end through the page cache: {whole:.0} MB/s: ella has {:.2} of it", ours / whole);
        Ok(())
    }
}

const FRACTIONS: [f64; 5] = [0.21, 0.37, 0.5, 0.63, 0.84];

/// Prints what the first batches took.
fn told(who: &str, times: &[Took]) {
    let milliseconds = |of: fn(&Took) -> f64| times.iter().map(|took| of(took) * 1e3).collect::<Vec<_>>();
    let (wall, cpu) = (milliseconds(|took| took.wall), milliseconds(|took| took.cpu));
    let best = wall.iter().copied().fold(f64::MAX, f64::min);
    println!("first batch after a resume: {who} {:.1} ms, {best:.1} at best, {:.1} ms of CPU time", median(wall), median(cpu));
}

async fn write_ours(folder: &Path, samples: usize) -> Result<()> {
    println!("writing ella's data set");
    let store = Store::open(folder.to_str().context("not UTF-8")?)?;
    let mut shards = Vec::new();
    for (number, first) in (0..samples).step_by(FULL.rows).enumerate() {
        shards.push(FULL.write_shard(&store, number, FULL.rows.min(samples - first)).await?);
    }
    store.create("manifest.json", json(&FULL.manifest(shards))?).await?;
    let data = DataSet::open_store(store, Default::default()).await?;
    let set = data.begin_features(&FULL.spec(), CAPTION).await?;
    for (number, shard) in data.manifest().shards.iter().enumerate() {
        FULL.write_features(&set, number, shard.rows).await?;
    }
    set.write_empty(FULL.feature_file(u64::MAX >> 32, 1)?).await?;
    set.finish().await?;
    Ok(())
}

/// A data set of 10⁷ samples by its manifests; those files are whole that are read from one place in its first epoch on, the others empty.
async fn write_large(to: &Path, shape: Shape, fraction: f64) -> Result<()> {
    let store = Store::open(to.to_str().context("not UTF-8")?)?;
    let (count, rows) = (10_000_000 / shape.rows, shape.rows as u64);
    let size = Some((shape.side, shape.side));
    let order = BucketOrder::new(order_config(1), &vec![(size, rows); count])?;
    let step = (order.steps_per_epoch() as f64 * fraction) as u64;
    let read = order.lane_shards(step..step + 2, 0);
    let entry = |name, number: usize| ShardEntry { name, rows, bytes: 1 << 27, blake3: Digest::of(&number.to_le_bytes()), size };
    let mut shards: Vec<ShardEntry> = (0..count).map(|number| entry(name(number, "shards/"), number)).collect();
    for number in &read {
        shards[*number as usize] = shape.write_shard(&store, *number as usize, shape.rows).await?;
    }
    store.create("manifest.json", json(&shape.manifest(shards))?).await?;
    let data = DataSet::open_store(store.clone(), Default::default()).await?;
    let set = data.begin_features(&shape.spec(), CAPTION).await?;
    let folder = to.join("features").join(shape.spec().fingerprint().to_string()).join(CAPTION);
    let mut shards: Vec<ShardEntry> =
        (0..count).map(|number| ShardEntry { size: None, ..entry(name(number, ""), count + number) }).collect();
    for (number, shard) in shards.iter_mut().enumerate() {
        if read.contains(&(number as u32)) {
            *shard = shape.write_features(&set, number, rows).await?;
            continue;
        }
        for suffix in ["arrow", "json"] {
            File::create(folder.join(&shard.name).with_extension(suffix))?;
        }
    }
    let empty = set.write_empty(shape.feature_file(u64::MAX >> 32, 1)?).await?;
    let (data, spec) = (data.manifest().digest(), shape.spec());
    let manifest = FeatureManifest { schema: SCHEMA, data, spec, shards, extra: vec![empty], counts: Counts::new() };
    Ok(std::fs::write(folder.join("manifest.json"), json(&manifest)?)?)
}

/// Every Arrow file below a folder.
fn arrow_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(arrow_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "arrow") {
            files.push(path);
        }
    }
    Ok(files)
}

/// Drops files that nobody has mapped from the page cache.
fn forget(files: &[PathBuf]) -> Result<()> {
    for path in files {
        let file = File::open(path)?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

/// Bytes per second that the disk gives for pieces of a sample's size, in no order, past the page cache, by `READERS` threads at once.
fn scattered(files: &[PathBuf]) -> Result<f64> {
    const READERS: usize = 8;
    let piece = FULL.sample_bytes().next_multiple_of(ALIGNED);
    let mut places = Vec::new();
    for path in files {
        let pieces = std::fs::metadata(path)?.len() / piece as u64;
        places.extend((0..pieces).map(|number| (path, number * piece as u64)));
    }
    places.sort_by_key(|place| Digest::of(format!("{place:?}").as_bytes()).to_string());
    let begin = Instant::now();
    let read = |places: &[(&PathBuf, u64)]| -> Result<usize> {
        let mut memory = vec![0; piece + ALIGNED];
        let start = memory.as_ptr().align_offset(ALIGNED);
        for (path, at) in places {
            let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path)?;
            file.read_exact_at(&mut memory[start..start + piece], *at)?;
        }
        Ok(places.len() * piece)
    };
    let bytes = std::thread::scope(|scope| {
        let threads: Vec<_> = places.chunks(places.len().div_ceil(READERS)).map(|places| scope.spawn(move || read(places))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a reader died"))?).sum::<Result<usize>>()
    })?;
    Ok(bytes as f64 / begin.elapsed().as_secs_f64())
}

/// What reads past the page cache must be multiples of.
const ALIGNED: usize = 4096;

/// Bytes per second of reading files one after the other.
fn sequential(files: &[PathBuf]) -> Result<f64> {
    let (begin, mut bytes, mut buffer) = (Instant::now(), 0, vec![0; 4 << 20]);
    for path in files {
        let mut file = File::open(path)?;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                count => bytes += count,
            }
        }
    }
    Ok(bytes as f64 / begin.elapsed().as_secs_f64())
}

const PEERS: [&str; 2] = ["streaming", "litdata"];

fn python() -> Option<PathBuf> {
    std::env::var_os("PEERS_PYTHON").map(PathBuf::from)
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/feed_peer.py")
}

/// A peer's process, which answers questions one by one.
struct Peer {
    name: &'static str,
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start(python: &Path, name: &'static str, folder: &Path) -> Result<Peer> {
        let mut command = Command::new(python);
        command.arg(script()).args(["serve", name]).arg(folder).arg(BATCH.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let questions = child.stdin.take().context("no stdin")?;
        let answers = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Peer { name, child, questions, answers })
    }

    fn ask(&mut self, question: &str) -> Result<Took> {
        writeln!(self.questions, "{question}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let answer: serde_json::Value = serde_json::from_str(&line).with_context(|| format!("{} ended at `{question}`", self.name))?;
        let number = |key: &str| answer[key].as_f64().with_context(|| format!("no {key} in {line}"));
        Ok(Took { samples: number("samples")?, wall: number("wall")?, cpu: number("cpu")? })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
