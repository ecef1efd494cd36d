//! What a commit of the paper's connector costs (66.8 million parameters, with moments and moving average): `make bench`.
//!
//! Commits are made as in training, by the committing thread and into a folder; in turns with them the same files are written to the same disk
//! from the same memory by nothing but write and fsync. BENCH_FOLDER is on the disk to measure, with 3 GB free; without it, the folder of this
//! program is. Beside it, PyTorch's savers, if PEERS_PYTHON names a Python that has torch.

use anyhow::{Context as _, Result, ensure};
use ella_dataset::order::Position;
use ella_store::Store;
use ella_worker::commit::{Committer, Seat};
use ella_worker::control::{Era, Outbox};
use ella_worker::train::state::{Layout, Snapshot, TrainState, part_names};
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

const PARAMETERS: i64 = 66_800_000;
const BYTES: f64 = 16.0 * PARAMETERS as f64;
const ROUNDS: usize = 9;
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> Result<()> {
    let beside = std::env::current_exe()?.parent().context("no folder")?.to_owned();
    let folder = tempfile::tempdir_in(std::env::var_os("BENCH_FOLDER").map_or(beside, Into::into))?;
    measure(folder.path())?;
    match std::env::var("PEERS_PYTHON") {
        Ok(python) => peer(&python, folder.path()),
        Err(_) => {
            println!("torch.save and DCP's async_save: not measured; name a Python that has torch in PEERS_PYTHON");
            Ok(())
        }
    }
}

fn measure(folder: &Path) -> Result<()> {
    let mut state = state()?;
    let before = forget_the_most().and_then(|()| memory("VmRSS:"));
    let mut rounds = Rounds::new(folder)?;
    // The first one warms up.
    rounds.one(&mut state)?;
    rounds.times = Times::default();
    (0..ROUNDS).try_for_each(|_| rounds.one(&mut state))?;
    let copies = before.and_then(|before| Some((memory("VmHWM:")? - before) / BYTES));
    let snapshot = rounds.kept.take().context("no snapshot")?;
    let digests = spread((0..3).map(|_| timed(|| Ok(digest(&snapshot))).map(|(_, took)| took)).collect::<Result<_>>()?);
    let fresh = spread((0..3).map(|_| timed(|| Ok(state.snapshot(None)?)).map(|(_, took)| took)).collect::<Result<_>>()?);
    rounds.times.report(copies);
    println!("in new memory it would hold training up for {fresh}; its digests alone take {digests}");
    Ok(())
}

/// All of it random: zeros may be no memory at all.
fn state() -> Result<TrainState> {
    let random = || Tensor::f_rand([PARAMETERS], (Kind::Float, Device::Cpu));
    let layout = Arc::new(Layout::new(vec![("all".into(), vec![PARAMETERS])]));
    let mut state = TrainState::fresh(layout, random()?)?;
    (state.buffers.exp_avg, state.buffers.exp_avg_sq) = (random()?, random()?);
    Ok(state)
}

struct Rounds<'a> {
    folder: &'a Path,
    store: Store,
    runtime: tokio::runtime::Runtime,
    committer: Committer,
    kept: Option<Snapshot>,
    times: Times,
}

impl<'a> Rounds<'a> {
    fn new(folder: &'a Path) -> Result<Self> {
        let store = Store::open(&folder.display().to_string())?;
        let runtime = tokio::runtime::Runtime::new()?;
        let committer = Committer::start(store.clone(), PATIENCE, Outbox::new(Arc::default()), runtime.handle().clone())?;
        Ok(Self { folder, store, runtime, committer, kept: None, times: Times::default() })
    }

    /// One commit, and the same files written plainly; in every second round in the other order.
    fn one(&mut self, state: &mut TrainState) -> Result<()> {
        state.step += 1;
        let (snapshot, copy) = timed(|| Ok(state.snapshot(self.kept.take())?))?;
        let plain_first = state.step.is_multiple_of(2);
        if plain_first {
            self.plain(&snapshot)?;
        }
        let begin = Instant::now();
        self.committer.save(snapshot, Position { epoch: 0, step_in_epoch: 0 }, Seat { rank: 0, world: 1, era: Era::default() })?;
        self.times.blocked.push(copy + begin.elapsed());
        self.committer.settle()?;
        self.times.commit.push(begin.elapsed());
        let snapshot = self.committer.kept().context("the commit's memory did not come back")?;
        let saved = self.runtime.block_on(self.store.list("commits"))?;
        ensure!(saved.len() == part_names().len() && saved.iter().map(|file| file.bytes).sum::<u64>() as f64 > BYTES, "not all is saved");
        self.runtime.block_on(self.store.delete_prefix("commits"))?;
        if !plain_first {
            self.plain(&snapshot)?;
        }
        self.kept = Some(snapshot);
        Ok(())
    }

    fn plain(&mut self, snapshot: &Snapshot) -> Result<()> {
        let paths = part_names().map(|name| self.folder.join(name));
        let write = |(part, path)| {
            let mut file = File::create(path)?;
            snapshot.file(part).iter().try_for_each(|piece| file.write_all(piece))?;
            Ok(file.sync_all()?)
        };
        self.times.plain.push(timed(|| paths.iter().enumerate().try_for_each(write))?.1);
        paths.iter().try_for_each(|path| Ok(std::fs::remove_file(path)?))
    }
}

/// How long each took, round by round.
#[derive(Default)]
struct Times {
    blocked: Vec<Duration>,
    commit: Vec<Duration>,
    plain: Vec<Duration>,
}

impl Times {
    fn report(self, copies: Option<f64>) {
        let (blocked, commit, plain) = (spread(self.blocked), spread(self.commit), spread(self.plain));
        let memory = copies.map_or("not measured here".into(), |copies| format!("{copies:.2} copies of it"));
        println!("a commit of {:.2} GB, medians of {ROUNDS} (and all): it holds training up for {blocked}", BYTES / 1e9);
        println!("until its files are written, synced and digested: {commit}, {:.2} GB/s", commit.rate());
        println!("the disk, the same files by write and fsync, in turns with it: {plain}, {:.2} GB/s", plain.rate());
        println!("so at {:.2} of the disk's rate; memory besides the state: {memory}", commit.rate() / plain.rate());
    }
}

/// The median of some times, and the range of all.
struct Spread(Vec<Duration>);

fn spread(mut times: Vec<Duration>) -> Spread {
    times.sort();
    Spread(times)
}

impl Spread {
    fn median(&self) -> Duration {
        self.0[self.0.len() / 2]
    }

    /// GB/s.
    fn rate(&self) -> f64 {
        BYTES / self.median().as_secs_f64() / 1e9
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [median, least, most] = [self.median(), self.0[0], self.0[self.0.len() - 1]].map(|time| time.as_millis());
        write!(f, "{median} ms ({least} to {most})")
    }
}

/// This process's memory in bytes: `VmRSS:`, what is used, or `VmHWM:`, the most since it was last forgotten. None where the system doesn't tell.
fn memory(key: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    Some(1024.0 * line.trim().strip_suffix(" kB")?.parse::<f64>().ok()?)
}

fn forget_the_most() -> Option<()> {
    std::fs::write("/proc/self/clear_refs", "5").ok()
}

fn digest(snapshot: &Snapshot) -> Vec<(u64, blake3::Hash)> {
    (0..part_names().len()).map(|part| snapshot.digest(part)).collect()
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let begin = Instant::now();
    Ok((work()?, begin.elapsed()))
}

fn peer(python: &str, folder: &Path) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/commit_peer.py");
    let status = Command::new(python).arg(script).arg(folder).status().with_context(|| format!("{python} cannot be started"))?;
    ensure!(status.success(), "the peer's script failed");
    Ok(())
}
