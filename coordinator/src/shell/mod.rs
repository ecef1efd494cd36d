//! A state machine's connection to the world: gRPC for workers and clients, HTTP for people and probes, the store for memory.
//!
//! One task, the driver, owns the machine; all others send it inputs and carry out its effects. Every task is tracked, and the first
//! error ends them all.

mod access;
pub mod cluster;
mod dashboard;
mod door;
mod driver;
mod error;
mod flood;
mod gate;
mod grpc;
mod guard;
mod http;
mod journal;
mod keeper;
mod limits;
mod local;
mod mark;
mod porch;
mod push;
mod review;
mod spans;
mod start;

pub use access::{AccessControl, AccessError};
pub use error::RunError;
pub use local::LocalJob;
pub use push::ProgressTo;

use crate::core::{Core, CoreConfig, History, Note, Outcome};
use crate::job::{JobCore, JobSettings};
use crate::logs;
use crate::machine::{Event, Machine, Time};
use dashboard::{Dashboard, Recorder};
use door::Room;
use driver::{Driver, Input};
use ella_proto::access::tls::{self, Clients, Reloaded};
use ella_proto::config::{Device, JobConfig, RunConfig, Straggler};
use ella_proto::ids::Term;
use ella_proto::v1::Welcome;
use ella_store::{RunLog, RunState, Store};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use guard::{Guard, Strangers};
use mark::Mark;
use rustls::ServerConfig;
use start::{Damaged, GivenUp};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Inputs that may wait for the driver before senders are held back.
const INPUTS: usize = 1024;
/// How long tasks may take to end after the driver has: the store's own deadlines are shorter, mostly.
const WIND_DOWN: Duration = Duration::from_secs(30);
/// How long peers may take to close their connections then. One that is stopped never does, and who ends this process does not wait for long.
const HANGING_UP: Duration = Duration::from_secs(3);

/// How a coordinator is run, beyond the run's own config.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where workers and clients connect. Port 0: any free one.
    pub listen: SocketAddr,
    /// Where people and probes look.
    pub http: SocketAddr,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// How long the final status stays readable.
    pub linger: Duration,
    /// Whether it goes on to serve the final status of a run or job that is done, or failed for good, until it is told to leave.
    pub stay: bool,
    /// Whether, told to leave, it leaves its workers to the coordinator that follows, and does not ask them to commit and leave.
    pub hand_over: bool,
    /// Where the cluster's tools are told how far it is.
    pub progress_to: Vec<ProgressTo>,
    /// Who may do what. Without rules whoever reaches it may do everything, and it listens on loopback addresses only.
    pub access: AccessControl,
}

impl Default for Options {
    fn default() -> Self {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            listen: local,
            http: local,
            drain_timeout: Duration::from_secs(300),
            linger: Duration::from_secs(1),
            stay: false,
            hand_over: false,
            progress_to: Vec::new(),
            access: AccessControl::default(),
        }
    }
}

/// Where a coordinator listens.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Addresses {
    /// For workers and clients.
    pub grpc: SocketAddr,
    /// For people and probes.
    pub http: SocketAddr,
}

/// What opening a run comes to.
#[derive(Debug)]
pub enum Opened {
    /// It waits for workers.
    Ready(Box<Coordinator>),
    /// Its log says that it is complete.
    Done {
        /// The last applied step.
        step: u64,
    },
}

/// A coordinator that holds its ports and its run's newest term, or a job, and has not begun to serve.
#[derive(Debug)]
pub struct Coordinator {
    machine: Box<dyn Machine>,
    /// Of a run: how long an append to its log is tried, too.
    memory: Option<((RunLog, Duration), Store)>,
    /// The run's folder and newest term, for people to look at.
    shown: Option<(Store, u64)>,
    given_up: GivenUp,
    /// Of a job.
    mark: Option<Mark>,
    grpc: TcpListener,
    http: TcpListener,
    addresses: Addresses,
    linger: Duration,
    stay: bool,
    hand_over: bool,
    /// The run was complete when it was opened: only that is told.
    done: bool,
    progress_to: Vec<ProgressTo>,
    access: AccessControl,
    /// Of both ports, if there are certificates.
    tls: Option<[Arc<Reloaded<ServerConfig>>; 2]>,
}

impl Coordinator {
    /// Opens the run in `store` (`run.output` is not looked at) and claims its next term. A run that is complete is left alone; with
    /// [`Options::stay`] that is served.
    ///
    /// # Errors
    /// If the run has another config, its store or log can't be used, its last commit is damaged, or an address is taken.
    pub fn open<'a>(config: &'a RunConfig, store: Store, options: &'a Options) -> BoxFuture<'a, Result<Opened, RunError>> {
        // A box, here and below: what is in a future is compiled once more by every program that awaits it, and a box in this crate alone.
        Self::open_run(config, store, options).boxed()
    }

    async fn open_run(config: &RunConfig, store: Store, options: &Options) -> Result<Opened, RunError> {
        // All that may be wrong here is found before a term is claimed, which ends the coordinator that has the run.
        let doors = Doors::open(options).await?;
        let mut core_config = core_config(config, store.url(), options)?;
        let (log, state, given_up) = match start::open_run(config, &store).await? {
            start::Run::Done { step, .. } if !options.stay => return Ok(Opened::Done { step }),
            start::Run::Done { state, .. } => {
                let term = state.term;
                let history = History { term: Term(term), commits: state.commits };
                let core = Core::done(core_config, history, Time(0));
                let run = Self::with(Box::new(core), None, doors, options);
                return Ok(Opened::Ready(Box::new(Self { done: true, shown: Some((store, term)), ..run })));
            }
            start::Run::Claimed { log, state, given_up } => (log, state, given_up),
        };
        (core_config.welcome.witness_file, core_config.welcome.witness) = log.claim_record();
        let core = Core::new(core_config, history(&log, *state), Time(0));
        let memory = ((log, config.workers.start_timeout.duration()), store);
        let run = Self::with(Box::new(core), Some(memory), doors, options);
        Ok(Opened::Ready(Box::new(Self { given_up, ..run })))
    }

    /// Opens a job. Its units' outputs are its only memory, so there is nothing to claim. While it is served, a file in its folder has workers see
    /// whether theirs is the same.
    ///
    /// # Errors
    /// If an address is taken.
    pub async fn open_job(config: &JobConfig, options: &Options) -> Result<Self, RunError> {
        let doors = Doors::open(options).await?;
        logs::in_run(&config.job.data);
        let (mut settings, mark) = (job_settings(config), Mark::leave(config).await);
        if let Some(mark) = &mark {
            mark.tell(&mut settings.welcome);
        }
        let job = Self::with(Box::new(JobCore::new(settings, Time(0))), None, doors, options);
        Ok(Self { mark, ..job })
    }

    fn with(machine: Box<dyn Machine>, memory: Option<((RunLog, Duration), Store)>, doors: Doors, options: &Options) -> Self {
        let Doors { grpc, http, addresses, tls } = doors;
        let Options { linger, stay, hand_over, .. } = *options;
        let (given_up, done, access, progress_to) = (GivenUp::default(), false, options.access.clone(), options.progress_to.clone());
        let shown = memory.as_ref().map(|((log, _), store)| (store.clone(), log.term()));
        let mark = None;
        Self { machine, memory, shown, given_up, mark, grpc, http, addresses, linger, stay, hand_over, done, progress_to, access, tls }
    }

    /// What to tell people of commits that were given up because they are damaged, if any were.
    pub fn fell_back(&self) -> Option<String> {
        let told = |Damaged { step, what, .. }: &Damaged| format!("the commit of step {step} is damaged ({what})");
        let all: Vec<String> = self.given_up.damaged.iter().map(told).collect();
        (!all.is_empty()).then(|| format!("{}; training goes on from the commit before", all.join("; ")))
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until the outcome is decided, or with [`Options::stay`] until told to leave. The first reason from `stops` asks a run's workers to commit and leave, a second one ends
    /// the run at once. A job has nothing to commit: the first ends it.
    ///
    /// # Errors
    /// If a server or task of this process breaks; what befalls the run or job is an [`Outcome`].
    pub fn run(self, stops: mpsc::Receiver<String>) -> BoxFuture<'static, Result<Outcome, RunError>> {
        self.serve(stops).boxed()
    }

    async fn serve(self, stops: mpsc::Receiver<String>) -> Result<Outcome, RunError> {
        let shutdown = CancellationToken::new();
        let (inputs, inbox) = mpsc::channel(INPUTS);
        let mut tasks = JoinSet::new();
        let (run, term) = self.shown.unzip();
        let (recorder, past) = Recorder::new(run, term.unwrap_or_default());
        let outlets = self.memory.map(|(log, store)| {
            let (journal, journal_task) = journal::journal(store.clone(), log.0.term());
            let (work, keeper_task) = keeper::keeper(log, store.clone(), inputs.clone());
            tasks.spawn(async move { keeper_task.await.map(|()| None) });
            let GivenUp { damaged, retired } = self.given_up;
            for Damaged { step, folder, what } in damaged {
                journal.note(&Note::Damaged { step, folder, what });
            }
            if !retired.is_empty() {
                journal.note(&Note::Retired { folders: retired });
            }
            tasks.spawn(async move { journal_task.await.map(|()| None) });
            driver::Outlets { work, journal, store }
        });
        let strangers = Arc::<Strangers>::default();
        let untold = Arc::<AtomicU64>::default();
        let driver = Driver::new(self.machine, inbox, outlets, self.linger).staying(self.stay, self.done);
        let driver = driver.with_strangers(strangers.clone()).with_untold(untold.clone()).with_recorder(recorder.clone());
        let (last_word, heard) = oneshot::channel();
        let driver = driver.with_last_word(last_word);
        let guard = Guard::new(self.access, strangers.clone(), inputs.clone());
        let [for_grpc, for_http] = self.tls.map_or([None, None], |both| both.map(Some));
        watch_reloads(&strangers, &guard, [&for_grpc, &for_http]);
        let room = Arc::<Room>::default();
        let callers = door::open(self.grpc, for_grpc, (guard.clone(), room.clone()), shutdown.clone());
        let visitors = door::open(self.http, for_http, (guard.clone(), room), shutdown.clone());
        let dashboard = Dashboard::new(inputs.clone(), &recorder, shutdown.clone());
        let token = shutdown.clone();
        tasks.spawn(async move { Ok(Some(driver.run(token).await)) });
        tasks.spawn(hung_up(grpc::serve(callers, guard.clone(), shutdown.clone()), shutdown.clone()));
        tasks.spawn(hung_up(porch::serve(http::router(inputs.clone(), dashboard), visitors, guard, shutdown.clone()), shutdown.clone()));
        let (told, until) = (inputs.clone(), shutdown.clone());
        tasks.spawn(async move {
            recorder.keep(past, told, until).await;
            Ok(None)
        });
        if !self.progress_to.is_empty() {
            tasks.spawn(push::push(self.progress_to, inputs.clone(), untold, heard, shutdown.clone()));
        }
        tasks.spawn(forward_stops(stops, self.hand_over, inputs, shutdown.clone()));
        let outcome = supervise(tasks, shutdown).await;
        if let Some(mark) = self.mark {
            mark.remove().await;
        }
        outcome
    }
}

/// Serves until all peers have closed their connections after `shutdown`, but for those that do not.
async fn hung_up(
    serving: impl Future<Output = Result<Option<Outcome>, RunError>>,
    shutdown: CancellationToken,
) -> Result<Option<Outcome>, RunError> {
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(HANGING_UP).await;
    };
    tokio::select! {
        served = serving => served,
        () = overdue => {
            tracing::warn!("some peers have not closed their connections within {HANGING_UP:?}: a process that is stopped, or a network that is cut");
            Ok(None)
        }
    }
}

/// Waits for all tasks. The first outcome or error wins, and ends the others.
async fn supervise(mut tasks: JoinSet<Result<Option<Outcome>, RunError>>, shutdown: CancellationToken) -> Result<Outcome, RunError> {
    let mut first = None;
    let all = async {
        while let Some(ended) = tasks.join_next().await {
            match ended.map_err(|e| RunError::Task(e.to_string())).and_then(|result| result) {
                Ok(None) => continue,
                Ok(Some(outcome)) => {
                    first.get_or_insert(Ok(outcome));
                }
                Err(error) => {
                    tracing::error!("{error}");
                    first.get_or_insert(Err(error));
                }
            }
            shutdown.cancel();
        }
    };
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(WIND_DOWN).await;
    };
    tokio::select! {
        () = all => {}
        () = overdue => tracing::warn!("tasks did not end within {WIND_DOWN:?}; they are cut off"),
    }
    first.unwrap_or(Err(RunError::NoOutcome))
}

async fn forward_stops(
    mut stops: mpsc::Receiver<String>,
    hand_over: bool,
    inputs: mpsc::Sender<Input>,
    shutdown: CancellationToken,
) -> Result<Option<Outcome>, RunError> {
    let mut asked = false;
    while let Some(Some(reason)) = shutdown.run_until_cancelled(stops.recv()).await {
        let input = match (hand_over, asked) {
            (true, _) => Input::HandOver(reason),
            (false, false) => Input::Event(Event::Stop(reason)),
            (false, true) => Input::Event(Event::Leave(reason)),
        };
        asked = true;
        if inputs.send(input).await.is_err() {
            break;
        }
    }
    Ok(None)
}

/// Both ports, held, and what is to be shown on them.
struct Doors {
    grpc: TcpListener,
    http: TcpListener,
    addresses: Addresses,
    tls: Option<[Arc<Reloaded<ServerConfig>>; 2]>,
}

impl Doors {
    async fn open(options: &Options) -> Result<Self, RunError> {
        let tls = certificates(&options.access)?;
        let (grpc, http) = (bind(options.listen, &options.access).await?, bind(options.http, &options.access).await?);
        let addresses = Addresses { grpc: local_address(&grpc)?, http: local_address(&http)? };
        Ok(Self { grpc, http, addresses, tls })
    }
}

fn core_config(config: &RunConfig, run_url: &str, options: &Options) -> Result<CoreConfig, RunError> {
    let workers = &config.workers;
    Ok(CoreConfig {
        welcome: Welcome {
            run_url: run_url.to_owned(),
            config_toml: config.to_toml(),
            config_digest: config.digest(),
            heartbeat_ms: (workers.lease.0 / 4).max(1),
            lease_ms: workers.lease.0,
            orphan_ms: workers.orphan_timeout.0,
            step_timeout_ms: workers.step_timeout.0,
            ..Welcome::default()
        },
        version: env!("CARGO_PKG_VERSION").to_owned(),
        workers: workers.count,
        min: workers.min,
        max: workers.max.unwrap_or(config.train.lanes()).min(config.train.lanes()),
        join_window: workers.join_window.0,
        straggler_evict: workers.straggler == Straggler::Evict,
        steps: config.train.steps,
        keep: config.checkpoint.keep,
        device: match workers.device {
            Device::Auto => None,
            Device::Cpu => Some("cpu".to_owned()),
            Device::Cuda => Some("cuda".to_owned()),
        },
        start_timeout: workers.start_timeout.0,
        commit_timeout: workers.start_timeout.0,
        drain_timeout: u64::try_from(options.drain_timeout.as_millis()).unwrap_or(u64::MAX),
        session: start::secret()?,
    })
}

fn job_settings(config: &JobConfig) -> JobSettings {
    let job = &config.job;
    JobSettings {
        welcome: Welcome {
            run_url: job.data.clone(),
            config_toml: config.to_toml(),
            config_digest: config.digest(),
            heartbeat_ms: (job.lease.0 / 4).max(1),
            lease_ms: job.lease.0,
            orphan_ms: job.orphan_timeout.0,
            step_timeout_ms: 0,
            ..Welcome::default()
        },
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kind: job.kind.to_string(),
        start_timeout: job.start_timeout.0,
        session: start::session(),
    }
}

fn history(log: &RunLog, state: RunState) -> History {
    History { term: Term(log.term()), commits: state.commits }
}

/// The TLS configs of the gRPC and the HTTP port. Browsers and probes have no certificates to show.
fn certificates(access: &AccessControl) -> Result<Option<[Arc<Reloaded<ServerConfig>>; 2]>, RunError> {
    if access.tls().is_empty() {
        return Ok(None);
    }
    let clients = if access.needs_certificates() { Clients::Required } else { Clients::Optional };
    let grpc = tls::server(access.tls(), clients, "h2").map_err(AccessError::from)?;
    let http = tls::server(access.tls(), Clients::Optional, "http/1.1").map_err(AccessError::from)?;
    Ok(Some([grpc, http].map(Arc::new)))
}

/// Has files that become such that will not do counted: tokens', and certificates', of which both ports read the same.
fn watch_reloads(strangers: &Strangers, guard: &Guard, tls: [&Option<Arc<Reloaded<ServerConfig>>>; 2]) {
    let access = guard.access.clone();
    strangers.watch(move || access.failed_reloads());
    if let Some(tls) = tls[0].clone() {
        strangers.watch(move || tls.failed_reloads());
    }
}

/// Nobody else's machine is let in unasked.
async fn bind(address: SocketAddr, access: &AccessControl) -> Result<TcpListener, RunError> {
    if !address.ip().to_canonical().is_loopback() {
        match (access.is_on(), access.is_insecure(), access.tls().is_empty()) {
            (false, false, _) => return Err(RunError::Unguarded { address }),
            (false, true, _) => tracing::warn!("{address}: --insecure: whoever reaches this address may attach, stop and drain"),
            (true, _, true) => tracing::warn!("{address}: without --tls-cert, tokens cross the network in clear text"),
            (true, _, false) => {}
        }
    }
    TcpListener::bind(address).await.map_err(|source| RunError::Bind { address, source })
}

fn local_address(listener: &TcpListener) -> Result<SocketAddr, RunError> {
    listener.local_addr().map_err(|source| RunError::Bind { address: SocketAddr::from(([0, 0, 0, 0], 0)), source })
}
