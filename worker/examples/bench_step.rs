//! What all that makes a run elastic adds to a step that nothing goes wrong in: `make bench`.
//!
//! One worker of a real coordinator takes steps in two ways, in turn, with the same buffers, networks, samples and collective. One is the real
//! loop. The other is what a plain trainer does: samples, gradients, their sum, the update. While it takes these, the coordinator is stopped (SIGSTOP).
//! What goes by the second, not by the step (heartbeats, the supervisor's pulse, the coordinator's clock) is measured for itself, with no steps.

use anyhow::{Context as _, Result, anyhow, ensure};
use ella_proto::config::Device as Choice;
use ella_worker::control::Flags;
use ella_worker::reduce::fixed::{self, FixedPoint};
use ella_worker::session::{Options, work_by};
use ella_worker::supervise::{self, Pulse, Side};
use ella_worker::train::{Halt, TrainError, Trainer, optimizer};
use ella_worker::{device, leave};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Device;
use tokio::runtime::Runtime;

/// Pairs of windows, and the steps of each window that count, after some that don't.
const ROUNDS: usize = 40;
const STEPS: usize = 25;
const SETTLING: usize = 3;
/// How long it is looked at what goes by the second.
const IDLE: Duration = Duration::from_secs(10);
/// Steps at the connector's true size.
const WIDE_STEPS: usize = 12;

fn main() {
    // SAFETY: no thread has been started yet.
    let side = unsafe {
        device::set_environment();
        supervise::fork(Duration::from_secs(60))
    };
    let done = match side {
        Ok(Side::Supervisor(code)) => leave(code),
        Ok(Side::Worker(pulse)) => bench(pulse),
        Err(error) => Err(error.into()),
    };
    // As a worker leaves: threads that feed are still there.
    if let Err(error) = done {
        eprintln!("{error:#}");
        leave(1);
    }
    leave(0)
}

fn bench(pulse: Pulse) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.spawn(pulse.beat());
    let folder = tempfile::tempdir()?;
    let nano = run(&folder.path().join("nano"), "nano", "global_batch = 2\nmicro_batch = 2")?;
    let found = attached(&nano, &runtime, compare)?;
    let wide = run(&folder.path().join("wide"), "nano-wide", "global_batch = 1\nmicro_batch = 1")?;
    let mut wide = attached(&wide, &runtime, |trainer, _| (0..WIDE_STEPS).map(|_| real(trainer)).collect::<Result<Vec<_>>>())?;
    found.print(median(&mut wide));
    Ok(())
}

/// A data set, models of a preset, and a run of one worker on them.
fn run(folder: &Path, preset: &str, batch: &str) -> Result<PathBuf> {
    let path = |name: &str| folder.join(name).display().to_string();
    let (tars, data, models, text) = (path("scenes"), path("data"), path("models"), path("models/text"));
    ella(&["scenes", "--out", &tars, "--count", "96", "--seed", "1", "--size", "64", "--per-tar", "32"])?;
    ella(&["prepare", &tars, "--out", &data, "--resolution", "64"])?;
    ella(&["init-base", "--preset", preset, "--seed", "1", "--captions", &data, "--out", &models])?;
    ella(&["embed", &data, "--text", &text, "--max-tokens", "32"])?;
    let config = folder.join("run.toml");
    let text = format!(
        "[run]\noutput = \"{}\"\n[base]\nmodel = \"{models}/base\"\n[text]\nmodel = \"{text}\"\nmax_tokens = 32\n[data]\npath = \"{data}\"\n\
         [train]\nsteps = 1000000\n{batch}\neval_every = 0\n[checkpoint]\nevery = 1000000\n[workers]\ncount = 1\n",
        path("run")
    );
    std::fs::write(&config, text)?;
    Ok(config)
}

/// One of the binaries that `make build` leaves in the folder above the examples'.
fn binary(name: &str) -> Result<Command> {
    let own = std::env::current_exe()?;
    let path = own.ancestors().nth(2).map(|folder| folder.join(name)).filter(|path| path.is_file());
    Ok(Command::new(path.with_context(|| format!("{name} is missing: run `make build` first"))?))
}

fn ella(arguments: &[&str]) -> Result<()> {
    let output = binary("ella")?.args(arguments).output()?;
    ensure!(output.status.success(), "ella {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What is measured in the place of a run's training, by a worker as real as any. `measure` is told the coordinator's process.
fn attached<T>(config: &Path, runtime: &Runtime, mut measure: impl FnMut(&mut Trainer, u32) -> Result<T>) -> Result<T> {
    let mut coordinator = binary("ella-coordinator")?.arg(config).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut line = String::new();
    BufReader::new(coordinator.stdout.take().context("no stdout")?).read_line(&mut line)?;
    let addresses: serde_json::Value = serde_json::from_str(&line).context("the coordinator did not say where it listens")?;
    let options = Options {
        coordinator: format!("http://{}", addresses["grpc"].as_str().context("no gRPC address")?).into(),
        listen: ([127, 0, 0, 1], 0).into(),
        advertise: None,
        device: Choice::Cpu,
        slots: 1,
        patience: Duration::from_secs(10),
    };
    let (flags, mut found) = (Arc::<Flags>::default(), None);
    let mut train = |trainer: &mut Trainer| {
        found = Some(measure(trainer, coordinator.id()));
        // It is to leave, and nobody is left to ask.
        flags.parting.cancel();
        drop(coordinator.kill());
        Ok::<_, TrainError>(Halt::Boundary)
    };
    let ended = work_by(&mut train, &options, flags.clone(), runtime.handle());
    coordinator.kill()?;
    coordinator.wait()?;
    found.unwrap_or_else(|| Err(anyhow!("the worker did not train: {ended:?}")))
}

/// One step of the real loop. The run always ends with the next one, whose commit has been made; so each can be timed.
fn real(trainer: &mut Trainer) -> Result<f64> {
    let last = trainer.state.step + 1;
    (Arc::make_mut(&mut trainer.config).train.steps, trainer.saved) = (last, last);
    let begin = Instant::now();
    trainer.run()?;
    Ok(begin.elapsed().as_secs_f64())
}

/// The same step without a coordinator, a ledger, or others that may come and go.
fn bare(trainer: &mut Trainer) -> Result<f64> {
    let begin = Instant::now();
    let Trainer { config, state, networks, feed, collective, .. } = trainer;
    let input = feed.next_step()?;
    let (mut sum, lanes) = (fixed::zeros(state.layout.total(), Device::Cpu)?, FixedPoint::new(config.train.lanes() as u32));
    for batch in input.lanes.iter().filter_map(|lane| lane.batch.as_ref()) {
        let _ = lanes.add(&mut sum, &networks.gradient(batch, input.step_samples)?.grad)?;
    }
    collective.sum_tensor(&mut sum)?;
    let mut grad = fixed::to_f32(&sum)?;
    let norm = optimizer::square_norm(&grad)?.f_double_value(&[])?.sqrt();
    optimizer::clip(&mut grad, norm, config.train.grad_clip)?;
    state.step += 1;
    optimizer::update(&mut state.buffers, &grad, &config.train, state.step)?;
    // What a step leaves behind is part of it.
    drop((input, sum, grad));
    Ok(begin.elapsed().as_secs_f64())
}

/// A window's steps, in seconds.
#[derive(Clone, Copy, Default)]
struct Window {
    /// How long one takes, in the median.
    step: f64,
    /// Processor time of this process for one, whichever thread has used it.
    cpu: f64,
}

#[derive(Default)]
struct Found {
    /// Of the real loop and of the bare one.
    rounds: Vec<[Window; 2]>,
    /// The coordinator's processor time for a step.
    coordinator: f64,
    /// That of this process, its supervisor and the coordinator in a second without steps.
    idle: f64,
}

fn compare(trainer: &mut Trainer, coordinator: u32) -> Result<Found> {
    let mut found = Found::default();
    let all = [std::process::id(), std::os::unix::process::parent_id(), coordinator];
    let spent = || all.into_iter().map(cpu).sum::<Result<f64>>();
    // By then samples are there, and none are made.
    std::thread::sleep(Duration::from_secs(1));
    let before = spent()?;
    std::thread::sleep(IDLE);
    found.idle = (spent()? - before) / IDLE.as_secs_f64();

    let began = cpu(coordinator)?;
    for round in 0..ROUNDS {
        let mut pair = [Window::default(); 2];
        for side in [round % 2, 1 - round % 2] {
            signal(coordinator, [libc::SIGCONT, libc::SIGSTOP][side]);
            pair[side] = window(trainer, [real, bare][side])?;
        }
        found.rounds.push(pair);
    }
    signal(coordinator, libc::SIGCONT);
    found.coordinator = (cpu(coordinator)? - began) / (ROUNDS * (SETTLING + STEPS)) as f64;
    Ok(found)
}

fn window(trainer: &mut Trainer, step: fn(&mut Trainer) -> Result<f64>) -> Result<Window> {
    (0..SETTLING).try_for_each(|_| step(trainer).map(drop))?;
    let before = cpu(std::process::id())?;
    let mut times = (0..STEPS).map(|_| step(trainer)).collect::<Result<Vec<_>>>()?;
    Ok(Window { step: median(&mut times), cpu: (cpu(std::process::id())? - before) / STEPS as f64 })
}

impl Found {
    /// What the real loop adds to the bare one: the median over rounds, and the bounds within which it lies in 95 of 100 cases, whatever the
    /// distribution.
    fn added(&self, of: fn(&Window) -> f64) -> (f64, f64, f64) {
        let mut differences: Vec<f64> = self.rounds.iter().map(|[real, bare]| of(real) - of(bare)).collect();
        let (middle, away) = (median(&mut differences), (0.98 * (ROUNDS as f64).sqrt()).ceil() as usize);
        (middle, differences[ROUNDS / 2 - away], differences[ROUNDS / 2 + away])
    }

    fn print(&self, wide: f64) {
        let told = |(middle, low, high): (f64, f64, f64)| format!("{:+.0} µs ({:+.0} to {:+.0})", middle * 1e6, low * 1e6, high * 1e6);
        let (added, cpu) = (self.added(|window| window.step), self.added(|window| window.cpu));
        let step = median(&mut self.rounds.iter().map(|[_, bare]| bare.step).collect::<Vec<_>>());
        println!(
            "fault-free overhead on a step, {ROUNDS} pairs of {STEPS} steps of the real loop and of a bare one in turn: {} beside {:.1} ms; processor \
             time of all threads: {}; of the coordinator: {:.0} µs",
            told(added),
            step * 1e3,
            told(cpu),
            self.coordinator * 1e6,
        );
        // What goes by the second is taken to hold up the step for all of its time.
        let share = |step: f64, added: f64| 100.0 * (added / step + self.idle);
        let shares = [step, wide, 0.060].map(|step| format!("{:.2} % (at most {:.2} %)", share(step, added.0), share(step, added.2)));
        println!(
            "  with {:.0} µs of processor time by the second, steps or none, that is {} of this step; {} of one with 66.8 million parameters, which \
             takes {:.0} ms here; {} of one of 60 ms (reckoned)",
            self.idle * 1e6,
            shares[0],
            shares[1],
            wide * 1e3,
            shares[2],
        );
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Seconds of processor time that a process has used, in all its threads.
fn cpu(process: u32) -> Result<f64> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls only write the values that they are given.
    let read = unsafe { libc::clock_getcpuclockid(process as i32, &raw mut clock) == 0 && libc::clock_gettime(clock, &raw mut time) == 0 };
    ensure!(read, "the processor time of process {process} cannot be read");
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

fn signal(process: u32, signal: i32) {
    // SAFETY: takes numbers; the child has not been waited for, so its number is still its own.
    unsafe { libc::kill(process as i32, signal) };
}
