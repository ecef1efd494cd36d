//! The control plane at scale: so many workers, each with a connection of its own, under one coordinator on one core. Prints what heartbeats, metrics
//! and questions whether it is there cost it, its memory, and how long a death takes to be told to all survivors. `make bench-scale`, or with numbers
//! of workers.
//!
//! The workers follow the protocol, and train nothing; all of them are in this process, on the other cores.

use anyhow::{Context as _, Result, ensure};
use ella_proto::v1::coordinator_client::CoordinatorClient;
use ella_proto::v1::from_worker::Body as Say;
use ella_proto::v1::to_worker::Body as Told;
use ella_proto::v1::{self, FromWorker, Hello, StatusRequest};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;

/// How long a count is measured.
const WINDOW: Duration = Duration::from_secs(10);
const LEASE: Duration = Duration::from_secs(10);
/// Every rank tells of a step so often.
const STEP: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(300);
/// What every worker says of its process.
const VITALS: v1::Vitals = v1::Vitals {
    memory_bytes: 40 << 30,
    cpu_seconds: 1e5,
    feed_bytes: 64 << 20,
    gpu_memory_used_bytes: 70 << 30,
    gpu_memory_total_bytes: 80 << 30,
    gpu_memory_allocated_bytes: 60 << 30,
    gpu_busy: Some(0.9),
};
/// Each worker asks so often in `workers.orphan_timeout` whether its coordinator is there.
const ASKS: u32 = 8;
/// Connections that are opened at once.
const OPENING: usize = 64;

fn main() -> Result<()> {
    let counts: Vec<usize> = std::env::args().skip(1).map(|text| Ok(text.parse()?)).collect::<Result<_>>()?;
    let counts = if counts.is_empty() { vec![100, 1_000, 10_000] } else { counts };
    more_files()?;
    println!("workers   all attached and ready   messages/s   one core   memory   a death told to the first, half, all of the survivors");
    for count in counts {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let measured = runtime.block_on(measure(count))?;
        runtime.shutdown_background();
        let Measured { ready, messages, busy, memory, told } = measured;
        let [first, half, all] = told.map(|time| time.as_secs_f64() * 1000.0);
        println!(
            "{count:>7} {:>22.1} s {messages:>12.0} {:>9.1} % {memory:>5.0} MB   {first:.1}, {half:.1}, {all:.1} ms",
            ready.as_secs_f64(),
            100.0 * busy
        );
    }
    Ok(())
}

struct Measured {
    ready: Duration,
    messages: f64,
    busy: f64,
    memory: f64,
    told: [Duration; 3],
}

/// Both ends of every connection are files.
fn more_files() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write this one struct.
    let set = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
    };
    ensure!(set == 0, "the limit of open files cannot be raised: {}", std::io::Error::last_os_error());
    Ok(())
}

/// A coordinator on the first core.
struct Coordinator {
    child: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Coordinator {
    fn start(workers: usize) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("run.toml");
        let text = format!(
            "[run]\noutput = \"{}\"\n[base]\nmodel = \"m\"\n[text]\nmodel = \"t\"\n[data]\npath = \"d\"\n\
             [train]\nsteps = 1000000000\nglobal_batch = {workers}\nmicro_batch = 1\n\
             [workers]\ncount = {workers}\nlease = \"{}s\"\nstart_timeout = \"600s\"\n",
            folder.path().join("run").display(),
            LEASE.as_secs()
        );
        std::fs::write(&config, text)?;
        let own = std::env::current_exe()?;
        let binary = own.ancestors().skip(1).take(2).map(|folder| folder.join("ella-coordinator")).find(|path| path.is_file());
        let mut command = Command::new(binary.context("ella-coordinator is not built: run `make build` first")?);
        command.arg(config).stdout(Stdio::piped()).stderr(Stdio::null()).env("TOKIO_WORKER_THREADS", "1");
        // SAFETY: between fork and exec only a system call is made, on a value of its own.
        unsafe { command.pre_exec(on_first_core) };
        let mut child = command.spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line)?;
        let addresses: serde_json::Value = serde_json::from_str(&line).context("the coordinator did not say where it listens")?;
        let url = format!("http://{}", addresses["grpc"].as_str().context("no gRPC address")?);
        Ok(Self { child, url, _folder: folder })
    }

    /// Seconds of processor time so far.
    fn seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| -> Result<f64> { Ok(fields.get(at).context("a short stat")?.parse()?) };
        // SAFETY: reads a constant of the system.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
        Ok((ticks(11)? + ticks(12)?) / per_second)
    }

    fn memory(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
        Ok(line.split_whitespace().nth(1).context("no number")?.parse::<f64>()? / 1024.0)
    }
}

fn on_first_core() -> std::io::Result<()> {
    // SAFETY: the set is a plain value, and the calls write to it or read it, or take a number.
    let set = unsafe {
        // It ends with the benchmark, however that ends.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let mut cores: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut cores);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const cores)
    };
    if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// What all workers count.
#[derive(Default)]
struct Shared {
    started: AtomicU64,
    said: AtomicU64,
    /// The count is measured: what ends now ends with its coordinator.
    over: AtomicBool,
}

async fn measure(count: usize) -> Result<Measured> {
    let coordinator = Coordinator::start(count)?;
    let shared = Arc::new(Shared::default());
    let (told, mut tells) = mpsc::unbounded_channel();
    let (opening, begin) = (Arc::new(Semaphore::new(OPENING)), Instant::now());
    let victim = CancellationToken::new();
    let (step, steps) = watch::channel(0);
    for number in 0..count {
        let worker = Worker {
            number,
            url: coordinator.url.clone(),
            shared: shared.clone(),
            told: told.clone(),
            dies: if number == count / 2 { victim.clone() } else { CancellationToken::new() },
            steps: steps.clone(),
        };
        let opening = opening.clone();
        tokio::spawn(async move {
            let shared = worker.shared.clone();
            if let Err(error) = worker.run(opening).await
                && !shared.over.load(Relaxed)
            {
                eprintln!("worker {number}: {error:#}");
            }
        });
    }
    let all_started = |generations: u64| {
        let shared = shared.clone();
        async move {
            while shared.started.load(Relaxed) < generations {
                ensure!(begin.elapsed() < PATIENCE, "{} of {generations} workers were ready in time", shared.started.load(Relaxed));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        }
    };
    all_started(count as u64).await?;
    let ready = begin.elapsed();
    let stepping = tokio::spawn(async move {
        for number in 1.. {
            tokio::time::sleep(STEP).await;
            if step.send(number).is_err() {
                return;
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (said, seconds, from) = (shared.said.load(Relaxed), coordinator.seconds()?, Instant::now());
    tokio::time::sleep(WINDOW).await;
    let (said, seconds, took) = (shared.said.load(Relaxed) - said, coordinator.seconds()? - seconds, from.elapsed().as_secs_f64());
    let died = Instant::now();
    victim.cancel();
    let mut times = Vec::new();
    while times.len() + 1 < count {
        let at: Instant = tokio::time::timeout(PATIENCE, tells.recv()).await?.context("all workers have ended")?;
        times.push(at - died);
    }
    times.sort_unstable();
    // The survivors go on.
    all_started(2 * count as u64 - 1).await?;
    stepping.abort();
    shared.over.store(true, Relaxed);
    let memory = coordinator.memory()?;
    let told = [times[0], times[times.len() / 2], times[times.len() - 1]];
    Ok(Measured { ready, messages: said as f64 / took, busy: seconds / took, memory, told })
}

/// Asks as workers do, until the coordinator is gone.
async fn ask(mut client: CoordinatorClient<Channel>, every: Duration, shared: Arc<Shared>) {
    while client.status(StatusRequest { alive: true }).await.is_ok() {
        shared.said.fetch_add(1, Relaxed);
        tokio::time::sleep(every).await;
    }
}

struct Worker {
    number: usize,
    url: String,
    shared: Arc<Shared>,
    /// When it is told that a generation is over.
    told: mpsc::UnboundedSender<Instant>,
    dies: CancellationToken,
    steps: watch::Receiver<u64>,
}

impl Worker {
    async fn run(mut self, opening: Arc<Semaphore>) -> Result<()> {
        let permit = opening.acquire_owned().await?;
        let mut client = CoordinatorClient::connect(self.url.clone()).await?;
        let (out, outgoing) = mpsc::channel(64);
        let number = self.number;
        let hello = Hello {
            worker_id: format!("{number:032x}"),
            version: env!("CARGO_PKG_VERSION").into(),
            host: format!("node-{}", number / 8),
            pid: number as u32 + 1,
            device_kind: "cpu".into(),
            peer_address: format!("10.{}.{}.{}:4000", number >> 16, (number >> 8) & 255, number & 255),
            ..Hello::default()
        };
        out.send(FromWorker { term: 0, generation: 0, body: Some(Say::Hello(hello)) }).await?;
        let mut incoming = client.attach(ReceiverStream::new(outgoing)).await?.into_inner();
        drop(permit);
        let (mut term, mut generation, mut step, mut training) = (0, 0, 0, false);
        let offset = Duration::from_micros(2_500_000 * (number as u64 % 997) / 997);
        let mut beats = tokio::time::interval_at(tokio::time::Instant::now() + offset, LEASE / 4);
        let mut _asking = None;
        loop {
            let say = tokio::select! {
                () = self.dies.cancelled() => return Ok(()),
                message = incoming.message() => {
                    let message = message?.context("the stream ended")?;
                    (term, generation) = (message.term, message.generation);
                    match message.body.context("an empty message")? {
                        Told::Welcome(welcome) => {
                            let asking = ask(client.clone(), Duration::from_millis(welcome.orphan_ms) / ASKS, self.shared.clone());
                            _asking = Some(AbortOnDropHandle::new(tokio::spawn(asking)));
                            Say::Idle(v1::Idle::default())
                        }
                        Told::Assign(assign) => {
                            step = assign.step;
                            let digest = "0".repeat(64);
                            let (data_digest, models_digest) = (digest.clone(), digest.clone());
                            let state_digest = if assign.source.is_some() { String::new() } else { digest };
                            Say::Ready(v1::Ready { step, state_digest, data_digest, models_digest, samples_per_epoch: 1 << 40 })
                        }
                        Told::Start(_) => {
                            training = true;
                            self.shared.started.fetch_add(1, Relaxed);
                            continue;
                        }
                        Told::Regroup(_) => {
                            training = false;
                            // The count may be complete.
                            let _ = self.told.send(Instant::now());
                            Say::Idle(v1::Idle { step: Some(step), broken: String::new(), ..v1::Idle::default() })
                        }
                        _ => continue,
                    }
                }
                _ = beats.tick() => Say::Heartbeat(v1::Heartbeat { step, vitals: Some(VITALS), ..v1::Heartbeat::default() }),
                changed = self.steps.changed() => {
                    changed?;
                    if !training {
                        continue;
                    }
                    step += 1;
                    let parts = Some(v1::StepParts { forward: 0.5, reduce: 0.5, ..v1::StepParts::default() });
                    Say::Progress(v1::Progress { step, samples: 1, loss: 0.5, step_seconds: 1.0, parts, ..v1::Progress::default() })
                }
            };
            self.shared.said.fetch_add(1, Relaxed);
            out.send(FromWorker { term, generation, body: Some(say) }).await?;
        }
    }
}
