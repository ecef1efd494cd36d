//! `ella train`: a coordinator and its workers as processes of this machine, watched until the run is over.
//!
//! Nothing is trained here and nothing is kept here: when all of it is killed, the same command goes on from the last commit.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::children::{Children, Logs, Member, binary, ending};
use clap::Args;
use ella_coordinator::client;
use ella_coordinator::status::StatusReport;
use ella_model::ModelError;
use ella_proto::config::{Device, RunConfig};
use ella_store::Store;
use ella_worker::hub::HubId;
use ella_worker::models;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::ChildStdout;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::run::RunFolder;
use crate::status::outcome;
use crate::ui::{DONE, FAILED, Fail, Meter, NO_RETRY, Out, PREEMPTED, note, one_line};

/// How long a coordinator may take to open the run.
const OPENING: Duration = Duration::from_secs(300);
/// How often the coordinator is asked for the status.
const POLL: Duration = Duration::from_millis(250);
/// How long the others may take to leave once one process has ended against expectation: the coordinator looks for whom to blame.
const AFTERMATH: Duration = Duration::from_secs(45);
/// The same where not all workers had come: the run can't begin without the one that ended, and nobody else knows why it did.
const NOT_BEGUN: Duration = Duration::from_secs(5);
/// How long workers may take to leave once their coordinator has.
const LEAVING: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(crate) struct Train {
    /// The run's config
    #[arg(value_name = "RUN.toml")]
    config: PathBuf,
    /// Override one key of the config, as in --set train.lr=1e-4; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Only start workers, for the coordinator that runs at this address
    #[arg(long, value_name = "URL")]
    coordinator: Option<String>,
    /// Show what the processes log
    #[arg(short, long)]
    verbose: bool,
}

/// What became of the run.
#[derive(Debug, Serialize)]
struct Trained {
    outcome: &'static str,
    run: String,
    step: u64,
    steps: u64,
    loss: Option<f64>,
    /// Commits that the run keeps.
    commits: usize,
    last_commit_step: u64,
    /// What reading the data set through caches came to over the whole run, by name (KNOWN).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    read: BTreeMap<String, u64>,
}

/// The coordinator's one line on stdout.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Opened {
    Serving { grpc: SocketAddr, http: SocketAddr, fell_back: Option<String> },
    Done { step: u64 },
}

/// Downloads models that are named by hub ids, here where progress is seen and no worker's deadline runs. Paths are the workers' matter.
pub(crate) fn have_models(config: &RunConfig) -> Result<(), Fail> {
    let loras = config.base.loras.iter().map(|lora| ("base.loras", &lora.file));
    for (key, model) in [("base.model", &config.base.model), ("text.model", &config.text.model)].into_iter().chain(loras) {
        if HubId::parse(model).is_none() {
            continue;
        }
        models::locate(key, model).map_err(|error| {
            let code = if matches!(error, ModelError::Unavailable { passes: true, .. }) { FAILED } else { NO_RETRY };
            Fail { code, message: error.to_string() }
        })?;
    }
    Ok(())
}

impl Train {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let config = RunConfig::load(&self.config, &self.set)?;
        // One thread: the kernel ties the children's lives to that of the thread which started them.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Fail::failed(format_args!("the async runtime cannot be started ({error})")))?;
        runtime.block_on(async {
            match &self.coordinator {
                None => self.whole(&config, out).await,
                Some(url) => self.join(&config, url, out).await,
            }
        })
    }

    /// A coordinator and workers.
    async fn whole(&self, config: &RunConfig, out: Out) -> Result<u8, Fail> {
        let (coordinator, worker) = (binary("ella-coordinator")?, binary("ella-worker")?);
        have_models(config)?;
        let store = Store::open(&config.run.output)?;
        let logs = Logs { folder: store.local_path().map(|run| run.join("logs")), verbose: self.verbose };
        let mut signals = Signals::new()?;
        let mut children = Children::default();
        let mut arguments = vec![self.config.display().to_string()];
        arguments.extend(self.set.iter().flat_map(|set| ["--set".to_owned(), set.clone()]));
        let stdout = children.start("coordinator", &coordinator, &arguments, &logs)?;
        let opened = tokio::select! {
            opened = first_line(stdout) => opened,
            () = signals.next() => None,
        };
        let (grpc, http) = match opened {
            Some(Opened::Serving { grpc, http, fell_back }) => {
                fell_back.iter().for_each(|told| note(format_args!("WARNING: {told}")));
                (format!("http://{grpc}"), http)
            }
            Some(Opened::Done { step }) => {
                children.reap(LEAVING).await;
                let trained = read(config, "done").await?;
                out.result(&trained, || format!("{}: the run is done already, at step {step}; raise train.steps to go on", trained.run));
                return Ok(DONE);
            }
            None => return Err(self.refused(children).await),
        };
        note(format_args!("run {}: coordinator at {grpc}, status page at http://{http}", store.url()));
        start_workers(&mut children, config, &worker, (&grpc, &logs))?;
        let last = self.watch(config, &mut children, (&grpc, true), &mut signals).await;
        self.conclude(config, &children, last, out).await
    }

    /// Workers for a coordinator that runs elsewhere.
    async fn join(&self, config: &RunConfig, url: &str, out: Out) -> Result<u8, Fail> {
        let worker = binary("ella-worker")?;
        client::status(url).await?;
        have_models(config)?;
        let grpc = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let mut signals = Signals::new()?;
        let mut children = Children::default();
        start_workers(&mut children, config, &worker, (&grpc, &Logs { folder: None, verbose: self.verbose }))?;
        let last = self.watch(config, &mut children, (&grpc, false), &mut signals).await;
        let code = children.members().iter().map(exit_code).max().unwrap_or(FAILED);
        if code == DONE || code == PREEMPTED {
            let name = if code == DONE { "done" } else { "preempted" };
            let step = last.as_ref().map_or(0, |status| status.step);
            let done = serde_json::json!({ "outcome": name, "coordinator": grpc, "step": step, "workers": children.members().len() });
            out.result(&done, || format!("{name} at step {step}: the workers for {grpc} have left"));
            return Ok(code);
        }
        Err(failure(&children, last.as_ref(), None, code))
    }

    /// Shows progress and passes signals on until every process has ended.
    async fn watch(
        &self,
        config: &RunConfig,
        children: &mut Children,
        (grpc, owned): (&str, bool),
        signals: &mut Signals,
    ) -> Option<StatusReport> {
        let (send, mut status) = watch::channel(None);
        let poll = tokio::spawn(poll(grpc.to_owned(), send));
        let mut meter = if self.verbose { Meter::lines("train", config.train.steps) } else { Meter::new("train", config.train.steps) };
        let mut begun = false;
        let mut asked = 0;
        let mut polled = true;
        let mut deadline: Option<Instant> = None;
        while !children.all_ended() {
            tokio::select! {
                changed = status.changed(), if polled => {
                    polled = changed.is_ok();
                    if let Some(report) = status.borrow_and_update().as_ref() {
                        show(report, &mut meter, &mut begun);
                    }
                }
                at = children.next_end() => {
                    // A worker that has left in good order is not waited on; any other end is the beginning of the run's.
                    let early = children.members()[at].ended.is_some_and(|status| !matches!(status.code(), Some(0 | 3)));
                    let waiting = status.borrow().as_ref().is_none_or(|status| status.phase == "waiting");
                    let patience = match (owned && at == 0, early) {
                        (true, _) => Some(LEAVING),
                        (false, true) => Some(if waiting { NOT_BEGUN } else { AFTERMATH }),
                        (false, false) => None,
                    };
                    deadline = patience.map(|patience| Instant::now() + patience).into_iter().chain(deadline).min();
                }
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    deadline = None;
                    children.signal(libc::SIGKILL);
                }
                () = signals.next() => {
                    asked += 1;
                    match (asked, owned) {
                        (1, true) => children.signal_one(0, libc::SIGTERM),
                        (1, false) => children.signal(libc::SIGTERM),
                        _ => children.signal(libc::SIGKILL),
                    }
                    note(if asked == 1 { "leaving after a commit; once more to leave at once" } else { "leaving at once" });
                }
            }
        }
        poll.abort();
        children.reap(LEAVING).await;
        status.borrow().clone()
    }

    /// Turns what is left into the result: the coordinator's exit code counts, and its reason is in the run's log.
    async fn conclude(&self, config: &RunConfig, children: &Children, last: Option<StatusReport>, out: Out) -> Result<u8, Fail> {
        let code = children.members().first().map_or(FAILED, exit_code);
        let name = match code {
            DONE => "done",
            PREEMPTED => "preempted",
            _ => return Err(failure(children, last.as_ref(), recorded(config).await, code)),
        };
        let trained = read(config, name).await?;
        out.result(&trained, || human(&trained));
        Ok(code)
    }

    /// The coordinator ended, or was asked to, before it served.
    async fn refused(&self, mut children: Children) -> Fail {
        children.signal(libc::SIGTERM);
        children.reap(LEAVING).await;
        let Some(coordinator) = children.members().first() else { return Fail::failed("the coordinator did not start") };
        let said = coordinator.last_error().or_else(|| coordinator.last_lines().pop());
        let how = coordinator.ended.map_or_else(String::new, ending);
        let code = match exit_code(coordinator) {
            DONE => FAILED,
            code => code,
        };
        Fail { code, message: said.unwrap_or_else(|| format!("the coordinator did not open the run: {how}")) }
    }
}

/// As `ella-worker --device` has it.
pub(crate) fn device(config: &RunConfig) -> &'static str {
    match config.workers.device {
        Device::Auto => "auto",
        Device::Cpu => "cpu",
        Device::Cuda => "cuda",
    }
}

fn start_workers(children: &mut Children, config: &RunConfig, worker: &std::path::Path, (grpc, logs): (&str, &Logs)) -> Result<(), Fail> {
    let device = device(config);
    for number in 0..config.workers.count {
        let arguments = ["--coordinator", grpc, "--device", device].map(str::to_owned);
        children.start(&format!("worker-{number}"), worker, &arguments, logs)?;
    }
    Ok(())
}

/// What the coordinator says first; none if it ends, says something else, or takes too long.
pub(crate) async fn first_line(stdout: Option<ChildStdout>) -> Option<Opened> {
    let mut line = String::new();
    let mut reader = BufReader::new(stdout?);
    timeout(OPENING, reader.read_line(&mut line)).await.ok()?.ok()?;
    serde_json::from_str(&line).ok()
}

/// Asks for the status again and again. What is not answered is not shown; the processes' ends decide.
async fn poll(grpc: String, to: watch::Sender<Option<StatusReport>>) {
    let mut ticks = tokio::time::interval(POLL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Ok(status) = client::status(&grpc).await
            && to.send(Some(status.into())).is_err()
        {
            return;
        }
    }
}

fn show(status: &StatusReport, meter: &mut Meter, begun: &mut bool) {
    if status.phase == "waiting" || status.phase == "starting" {
        return meter.at(status.step, &format!("{} {}", status.phase, status.reason));
    }
    if !*begun {
        *begun = true;
        meter.starts_at(status.step);
    }
    let loss = status.loss.map_or_else(String::new, |loss| format!("loss {loss:.4}  "));
    let draining = if status.phase == "draining" { "  leaving after a commit" } else { "" };
    let commit = if status.commits == 0 { String::new() } else { format!(", the last at step {}", status.last_commit_step) };
    let (rate, commits) = (status.samples_per_second, status.commits);
    let waits = if status.phase == "training" && !status.reason.is_empty() { format!("  {}", status.reason) } else { String::new() };
    meter.at(status.step, &format!("{loss}{rate:.1} samples/s  {commits} commits{commit}{draining}{waits}"));
}

/// SIGTERM and SIGINT.
struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn new() -> Result<Self, Fail> {
        let caught = |kind| signal(kind).map_err(|error| Fail::failed(format_args!("signals cannot be caught ({error})")));
        Ok(Self { term: caught(SignalKind::terminate())?, int: caught(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! { _ = self.term.recv() => {}, _ = self.int.recv() => {} }
    }
}

/// A process's exit code as ours: one that was killed has failed.
fn exit_code(member: &Member) -> u8 {
    let code = member.ended.and_then(|status| status.code());
    code.and_then(|code| u8::try_from(code).ok()).filter(|code| *code <= NO_RETRY).unwrap_or(FAILED)
}

/// Why the newest coordinator ended, by the run's log.
async fn recorded(config: &RunConfig) -> Option<String> {
    let state = RunFolder::open(&config.run.output).await.ok()?.state().await.ok()?;
    Some(outcome(&state).1).filter(|reason| state.is_over() && !reason.is_empty())
}

/// One line that says why. Where nothing says it, the last words of those that ended badly come before.
fn failure(children: &Children, last: Option<&StatusReport>, recorded: Option<String>, code: u8) -> Fail {
    let ended_badly = |member: &&Member| !matches!(member.ended.and_then(|status| status.code()), Some(0 | 3));
    let bad: Vec<&Member> = children.members().iter().filter(ended_badly).collect();
    let seen = last.filter(|status| status.phase == "failed" && !status.reason.is_empty()).map(|status| status.reason.clone());
    let why = recorded.or(seen).or_else(|| bad.iter().find_map(|member| member.last_error()));
    let why = why.unwrap_or_else(|| {
        for member in &bad {
            member.last_lines().iter().for_each(|line| note(format_args!("[{}] {line}", member.name)));
        }
        "the run ended before it was done; the same command resumes it".to_owned()
    });
    let ends: Vec<String> = bad.iter().map(|m| format!("{}: {}", m.name, m.ended.map_or_else(String::new, ending))).collect();
    Fail { code, message: format!("{} ({})", one_line(&why), ends.join(", ")) }
}

/// What the run's folder says once the run has ended.
async fn read(config: &RunConfig, outcome: &'static str) -> Result<Trained, Fail> {
    let run = RunFolder::open(&config.run.output).await?;
    let state = run.state().await?;
    // The run is what its commits are, whatever became of its metrics.
    let metrics = run.metrics().await.unwrap_or_else(|fail| {
        note(&fail.message);
        Vec::new()
    });
    let last = metrics.last().cloned().unwrap_or_default();
    let mut read = BTreeMap::new();
    for (name, count) in metrics.iter().flat_map(|metric| &metric.read) {
        *read.entry(name.clone()).or_default() += count;
    }
    let last_commit_step = state.last_commit().map_or(0, |commit| commit.step);
    Ok(Trained {
        outcome,
        run: run.store.url().to_owned(),
        step: last_commit_step,
        steps: config.train.steps,
        loss: last.loss,
        commits: state.commits.len(),
        last_commit_step,
        read,
    })
}

fn human(trained: &Trained) -> String {
    let Trained { outcome, run, step, steps, loss, commits, last_commit_step, read } = trained;
    let loss = loss.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
    let next = if *outcome == "done" { "" } else { "; the same command resumes it" };
    let read: Vec<String> = read.iter().map(|(name, count)| format!("{name} {count}")).collect();
    let read = if read.is_empty() { String::new() } else { format!("\nread     {}", read.join(", ")) };
    format!(
        "{outcome} at step {step} of {steps}{loss}{next}\ncommits  {commits} kept, the newest of step {last_commit_step}{read}\nrun      {run}"
    )
}
