//! `ella train`: a coordinator and its workers as processes of this machine, watched until the run is over.
//!
//! Nothing is trained here and nothing is kept here: when all of it is killed, the same command goes on from the last commit. When one
//! process is killed, it is started again ([`places`] says when), and the others go on meanwhile ([`watch`]).

mod alone;
mod begun;
mod places;
mod watch;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::children::{Children, Logs, Member, binary, ending};
use crate::gpus::Gpus;
use crate::metrics;
use clap::Args;
use ella_coordinator::client;
use ella_coordinator::credentials::Credentials;
use ella_coordinator::status::StatusReport;
use ella_model::ModelError;
use ella_proto::access::Access;
use ella_proto::config::{Device, RunConfig};
use ella_proto::stops::Stops;
use ella_store::Store;
use ella_worker::device::check_environment;
use ella_worker::hub::HubId;
use ella_worker::models;
use places::Places;
use serde::Serialize;
use watch::{LEAVING, Seen, Watch};
pub(crate) use watch::{Opened, first_line};

use crate::run::{ADDRESS, RUN_TOML, RunFolder};
use crate::status::outcome;
use crate::ui::{DONE, FAILED, Fail, Meter, NO_RETRY, Out, PREEMPTED, note, one_line};

#[derive(Debug, Args)]
pub(crate) struct Train {
    /// The run's config
    #[arg(value_name = "RUN.toml")]
    config: PathBuf,
    /// Override one key of the config, as in --set train.optimizer.lr=1e-4; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Only start workers, for the coordinator that runs at this address; RUN.toml is its run's, but for workers.count and workers.device
    #[arg(long, value_name = "URL")]
    coordinator: Option<String>,
    #[command(flatten)]
    credentials: Credentials,
    /// Start no process again that was killed: something else does it, or nothing
    #[arg(long)]
    no_restart: bool,
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
    /// Processes that this command started again.
    restarts: u32,
    /// What reading the data set through caches came to over the whole run, by name (KNOWN).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    read: BTreeMap<String, u64>,
}

/// Downloads models that are named by hub ids, here where progress is seen and no worker's deadline runs. Paths are the workers' matter.
pub(crate) fn have_models(config: &RunConfig) -> Result<(), Fail> {
    for (key, model) in config.models() {
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
        check_environment().map_err(Fail::usage)?;
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
        let gpus = Gpus::for_run(config.workers.count, config.workers.device)?;
        let access = self.credentials.unaddressed()?;
        let store = open("run.output", &config.run.output)?;
        open("data.path", &config.data.path)?;
        have_models(config)?;
        // This process's: the others end with it.
        let _alone = store.local_path().map(|run| alone::lock(&run, &config.run.output)).transpose()?;
        begun::tell(config);
        let logs = Logs { folder: store.local_path().map(|run| run.join("logs")), verbose: self.verbose };
        let mut stops = catch()?;
        let mut children = Children::default();
        let same = same_config(config).ok();
        let mut arguments = match &same {
            Some((_, path)) => vec![path.clone()],
            None => [vec![self.config.display().to_string()], self.set.iter().flat_map(|set| ["--set".to_owned(), set.clone()]).collect()]
                .concat(),
        };
        arguments.extend(self.credentials.arguments());
        let stdout = children.start("coordinator", &coordinator, &arguments, &logs)?;
        let opened = tokio::select! {
            opened = first_line(stdout) => opened,
            _ = stops.next() => None,
        };
        let (access, http) = match opened {
            Some(Opened::Serving { grpc, http, fell_back }) => {
                fell_back.iter().for_each(|told| note(format_args!("WARNING: {told}")));
                // Whoever comes in its place is found where it was, and does what it did.
                arguments.extend(["--listen".to_owned(), grpc.to_string(), "--http".to_owned(), http.to_string()]);
                children.arm(0, arguments);
                let access = Access { url: grpc.to_string(), ..access };
                (Access { url: access.full_url(), ..access }, http)
            }
            Some(Opened::Done { step }) => {
                children.reap(LEAVING).await;
                let trained = read(config, "done", 0).await?;
                out.result(&trained, || format!("{}: the run is done already, at step {step}; {}", trained.run, config.further()));
                return Ok(DONE);
            }
            None => return Err(self.refused(children).await),
        };
        let (grpc, scheme) = (access.url.clone(), if access.tls.is_some() { "https" } else { "http" });
        note(format_args!("run {}: coordinator at {grpc}, dashboard at {scheme}://{http}", store.url()));
        // For commands that are given the folder. That it can't be written is no reason not to train.
        let address = store.local_path().map(|run| run.join(ADDRESS));
        let _ = address.as_ref().map(|file| std::fs::write(file, &grpc));
        self.start_workers(&mut children, config, (&worker, &gpus), (&grpc, &logs))?;
        let watched = self.watch(config, &mut children, (access, true), &mut stops).await;
        let _ = address.as_ref().map(std::fs::remove_file);
        self.conclude(config, &children, watched, out).await
    }

    /// Workers for a coordinator that runs elsewhere.
    async fn join(&self, config: &RunConfig, url: &str, out: Out) -> Result<u8, Fail> {
        let worker = binary("ella-worker")?;
        let gpus = Gpus::for_run(config.workers.count, config.workers.device)?;
        let access = self.credentials.access(url)?;
        let status = client::status(&access).await?;
        if status.job.is_some() {
            return Err(Fail::usage(format_args!(
                "{url} coordinates a job, for {}, and no run: `ella-worker --coordinator {url}` works for it",
                status.run_url
            )));
        }
        let run = RunFolder::open(&status.run_url).await.map_err(|fail| {
            let message = format!("the run that {url} coordinates, whose folder every worker needs: {}", fail.message);
            Fail { message, ..fail }
        })?;
        of_the_run(config, &self.config, &run)?;
        have_models(config)?;
        let grpc = access.full_url();
        let mut stops = catch()?;
        let mut children = Children::default();
        self.start_workers(&mut children, config, (&worker, &gpus), (&grpc, &Logs { folder: None, verbose: self.verbose }))?;
        let Seen { last, restarts, killed } = self.watch(config, &mut children, (access.clone(), false), &mut stops).await;
        // The last steps may have come after the last poll; a coordinator stays a moment longer than its workers.
        let last = client::status(&access).await.ok().map(StatusReport::from).or(last);
        let code = worst(&children, killed);
        if code == DONE || code == PREEMPTED {
            let name = if code == DONE { "done" } else { "preempted" };
            let step = last_step(last.as_ref(), code);
            let workers = children.members().len();
            let done = serde_json::json!({ "outcome": name, "coordinator": grpc, "step": step, "workers": workers, "restarts": restarts });
            out.result(&done, || format!("{name} at step {step}: the workers for {grpc} have left"));
            return Ok(code);
        }
        Err(failure(&children, last.as_ref(), None, code))
    }

    fn start_workers(
        &self,
        children: &mut Children,
        config: &RunConfig,
        (worker, gpus): (&Path, &Gpus),
        (grpc, logs): (&str, &Logs),
    ) -> Result<(), Fail> {
        let mut arguments = ["--coordinator", grpc, "--device", device(config)].map(str::to_owned).to_vec();
        arguments.extend(self.credentials.arguments());
        for number in 0..config.workers.count {
            children.start_in(&format!("worker-{number}"), worker, (&arguments, &gpus.of_worker(number)), logs)?;
        }
        Ok(())
    }

    /// Watches the processes until the run is over here.
    async fn watch(&self, config: &RunConfig, children: &mut Children, (coordinator, owned): (Access, bool), stops: &mut Stops) -> Seen {
        let meter = if self.verbose { Meter::lines("train", config.train.steps) } else { Meter::new("train", config.train.steps) };
        let places = Places::new(children.members().len(), owned, self.no_restart);
        Watch::new(children, places, meter).run(coordinator, stops).await
    }

    /// Turns what is left into the result: the coordinator's exit code counts, and its reason is in the run's log.
    async fn conclude(&self, config: &RunConfig, children: &Children, Seen { last, restarts, killed }: Seen, out: Out) -> Result<u8, Fail> {
        // One that was killed had no say: it could not begin without a worker that had ended.
        let itself = children.members().first().filter(|coordinator| coordinator.ended.is_some_and(|status| status.code().is_some()));
        let code = itself.map_or_else(|| worst(children, killed), |coordinator| exit_code(coordinator, killed));
        let name = match code {
            DONE => "done",
            PREEMPTED => "preempted",
            _ => {
                let why = recorded(config, last.as_ref().map(|status| status.term)).await;
                return Err(failure(children, last.as_ref(), why, code));
            }
        };
        let trained = read(config, name, restarts).await?;
        keep_metrics(config).await;
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
        let code = match exit_code(coordinator, FAILED) {
            DONE => FAILED,
            code => code,
        };
        Fail { code, message: said.unwrap_or_else(|| format!("the coordinator did not open the run: {how}")) }
    }
}

/// Opens what a key names, without looking into it.
fn open(key: &str, place: &str) -> Result<Store, Fail> {
    Store::open(place).map_err(|error| {
        let fail = Fail::from(error);
        Fail { message: format!("{key}: {}", fail.message), ..fail }
    })
}

/// Workers that join take the run's config. Whoever means another is not to find out when it is trained.
fn of_the_run(config: &RunConfig, file: &Path, run: &RunFolder) -> Result<(), Fail> {
    let mut others = config.differences(&run.config);
    others.retain(|key| !["workers.count", "workers.device"].contains(&&**key));
    if others.is_empty() {
        return Ok(());
    }
    let (file, url, others) = (file.display(), run.store.url(), others.join(", "));
    let hint = format!("give a copy of {url}/{RUN_TOML}, or the same --set as the coordinator has");
    Err(Fail::usage(format_args!("{file}: the run that the coordinator has, {url}, is of another config: {others}; {hint}")))
}

fn catch() -> Result<Stops, Fail> {
    Stops::catch().map_err(|error| Fail::failed(format_args!("signals cannot be caught ({error})")))
}

/// Leaves the run's measurements as a table in its folder. It is made of what stays there, so that a failure is only told.
async fn keep_metrics(config: &RunConfig) {
    let kept = async { metrics::keep(&RunFolder::open(&config.run.output).await?).await };
    if let Err(fail) = kept.await {
        note(format_args!("metrics.parquet is not written: {}; ella metrics writes it later", fail.message));
    }
}

/// A file of the config as it was read, for coordinators: the run's own may be edited meanwhile, or be a pipe, which can be read once. It has no name
/// that a killed process would leave behind: the path that comes with it leads there while it is open.
fn same_config(config: &RunConfig) -> std::io::Result<(File, String)> {
    let mut file = tempfile::tempfile()?;
    file.write_all(config.to_toml().as_bytes())?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    // Where there is no /proc, the run's own file must do.
    File::open(&path).map(|_| (file, path))
}

/// As `ella-worker --device` has it.
pub(crate) fn device(config: &RunConfig) -> &'static str {
    match config.workers.device {
        Device::Auto => "auto",
        Device::Cpu => "cpu",
        Device::Cuda => "cuda",
    }
}

/// A process's exit code as ours; of one that was killed this.
fn exit_code(member: &Member, killed: u8) -> u8 {
    match member.ended.and_then(|status| status.code()) {
        Some(code) => u8::try_from(code).ok().filter(|code| *code <= NO_RETRY).unwrap_or(FAILED),
        None => killed,
    }
}

/// What all of them came to, where no one's word counts more than the others'.
fn worst(children: &Children, killed: u8) -> u8 {
    children.members().iter().map(|member| exit_code(member, killed)).max().unwrap_or(FAILED)
}

/// The step at which workers have left a run. One that is done is at its last, whether or not anyone saw it there.
fn last_step(last: Option<&StatusReport>, code: u8) -> u64 {
    last.map_or(0, |status| if code == DONE { status.step.max(status.steps) } else { status.step })
}

/// Why the newest coordinator ended, by the run's log; nothing of one that took the run over from this command's, whose term is given.
async fn recorded(config: &RunConfig, term: Option<u64>) -> Option<String> {
    let state = RunFolder::open(&config.run.output).await.ok()?.state().await.ok()?;
    Some(outcome(&state).1).filter(|reason| state.is_over() && !reason.is_empty() && term.is_none_or(|own| own == state.term))
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
async fn read(config: &RunConfig, outcome: &'static str, restarts: u32) -> Result<Trained, Fail> {
    let run = RunFolder::open(&config.run.output).await?;
    let state = run.state().await?;
    // The run is what its commits are, whatever became of its metrics.
    let metrics = run.metrics().await.unwrap_or_else(|fail| {
        note(&fail.message);
        Vec::new()
    });
    let last_commit_step = state.last_commit().map_or(0, |commit| commit.step);
    let loss = metrics.iter().rfind(|metric| metric.step <= last_commit_step).and_then(|metric| metric.loss);
    let mut read = BTreeMap::new();
    for (name, count) in metrics.iter().flat_map(|metric| &metric.read) {
        *read.entry(name.clone()).or_default() += count;
    }
    Ok(Trained {
        outcome,
        run: run.store.url().to_owned(),
        step: last_commit_step,
        steps: config.train.steps,
        loss,
        commits: state.commits.len(),
        last_commit_step,
        restarts,
        read,
    })
}

fn human(trained: &Trained) -> String {
    let Trained { outcome, run, step, steps, loss, commits, last_commit_step, restarts, read } = trained;
    let loss = loss.map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
    let next = if *outcome == "done" { "" } else { "; the same command resumes it" };
    let read: String = read.iter().map(|(name, count)| format!("\ncount    {name} {count}")).collect();
    let again = if *restarts == 0 { String::new() } else { format!("\nrestarts {restarts}") };
    format!(
        "{outcome} at step {step} of {steps}{loss}{next}\ncommits  {commits} kept, the newest of step {last_commit_step}{again}{read}\nrun      {run}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::USAGE;

    #[test]
    fn coordinators_read_the_config_as_often_as_they_like_from_a_file_without_a_name() {
        let config = "[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n";
        let config = RunConfig::parse(config, "x", &[]).unwrap();
        let (_open, path) = same_config(&config).unwrap();
        for _ in 0..2 {
            assert_eq!(std::fs::read_to_string(&path).unwrap(), config.to_toml());
        }
        assert!(!std::fs::read_link(&path).unwrap().exists(), "a kill would leave it behind");
    }

    #[test]
    fn workers_join_under_the_runs_own_config_only() {
        let parse = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(|item| (*item).to_owned()).collect();
            RunConfig::parse("[run]\noutput='r'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n", "x", &set).unwrap()
        };
        let run = RunFolder::new(Store::in_memory(), parse(&[]));
        let joins = |set: &[&str]| of_the_run(&parse(set), Path::new("x.toml"), &run);
        joins(&["workers.count=3", "workers.device=cpu"]).unwrap();
        let fail = joins(&["run.seed=4", "run.output=s", "train.steps=9", "workers.threads=2"]).unwrap_err();
        let words = "is of another config: run.output, run.seed, train.steps, workers.threads; give a copy of";
        assert!(fail.code == USAGE && fail.message.contains(words), "{}", fail.message);
    }

    #[test]
    fn a_run_that_is_done_is_at_its_last_step_though_the_last_status_was_of_one_before() {
        let seen = StatusReport { step: 8, steps: 9, ..StatusReport::default() };
        assert_eq!([DONE, PREEMPTED].map(|code| last_step(Some(&seen), code)), [9, 8]);
        assert_eq!(last_step(None, DONE), 0);
    }
}
