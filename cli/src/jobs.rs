//! Leased work from the command line: alone in this process, by several worker processes of this machine under a coordinator, or joined to
//! a job that is coordinated elsewhere.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ella_coordinator::client;
use ella_coordinator::core::Outcome;
use ella_coordinator::credentials::Credentials;
use ella_coordinator::shell::{AccessControl, Coordinator, Options};
use ella_coordinator::status::{JobReport, StatusReport};
use ella_proto::access::Access;
use ella_proto::config::{Device, JobConfig, JobTable};
use ella_proto::stops::Stops;
use ella_proto::v1::RunStatus;
use ella_worker::job::{JobEnd, kinds, run_leased, run_local};
use ella_worker::train::Ending;
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::children::{Children, Logs, binary};
use crate::gpus::Gpus;
use crate::ui::{DONE, FAILED, Fail, Meter, NO_RETRY, Out, PREEMPTED, USAGE, note, shell, span};
use crate::whole;

/// How often the coordinator is asked for the status.
const POLL: Duration = Duration::from_millis(250);
/// How long workers may take to leave once the job is over.
const LEAVING: Duration = Duration::from_secs(10);
/// How long threads that block may take to end once the work is over.
const ENDING: Duration = Duration::from_secs(5);
/// Errors that are named.
const NAMED: usize = 5;
/// How many processes may die for each that was asked for, before the job is given up.
const DEATHS: usize = 3;

/// Who does the work.
#[derive(Clone, Debug, Args)]
pub(crate) struct Who {
    /// Let so many worker processes of this machine share the work, under a coordinator; others may join and leave
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    workers: Option<u32>,
    /// Where that coordinator listens
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", requires = "workers", value_parser = ella_coordinator::listens)]
    listen: SocketAddr,
    /// Let it listen on an address that other machines reach, even if nothing is asked of them
    #[arg(long, requires = "workers")]
    insecure: bool,
    /// Join the job that is coordinated at this address, whatever it is, and leave when it is over
    #[arg(long, value_name = "URL", conflicts_with = "workers")]
    coordinator: Option<String>,
    /// Do nothing, but write the job's config to a file: `ella-coordinator FILE` coordinates it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["workers", "coordinator"])]
    write_job: Option<PathBuf>,
    #[command(flatten)]
    credentials: Credentials,
}

/// What became of a job.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Its last status; none where somebody else coordinates it, or nothing was done.
    pub(crate) status: Option<StatusReport>,
    pub(crate) code: u8,
}

impl Who {
    /// This process alone.
    pub(crate) fn here() -> Self {
        let (listen, credentials) = (SocketAddr::from(([127, 0, 0, 1], 0)), Credentials::default());
        Self { workers: None, listen, insecure: false, coordinator: None, write_job: None, credentials }
    }

    /// Whether the work is another's: joined to, or only described.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.coordinator.is_some() || self.write_job.is_some()
    }

    /// Whether the work is that of a job which another command began.
    pub(crate) fn is_joined(&self) -> bool {
        self.coordinator.is_some()
    }

    /// How many processes of this machine do the work.
    pub(crate) fn workers(&self) -> u32 {
        self.workers.unwrap_or(1)
    }

    /// Does a job.
    pub(crate) fn run(&self, config: &JobConfig, device: Device) -> Result<Ran, Fail> {
        let runtime = crate::runtime()?;
        if let Some(file) = &self.write_job {
            whole::write(file, config.to_toml().as_bytes())?;
            return Ok(Ran { status: None, code: DONE });
        }
        let ran = match (&self.coordinator, self.workers) {
            (Some(url), _) => self.credentials.access(url).map_err(Fail::from).and_then(|access| join(&runtime, access, device)),
            (None, Some(count)) => runtime.block_on(many(config, count, self, device)),
            (None, None) => alone(&runtime, config, device),
        };
        // What is being written may come to its end. A thread that hangs in a file's opening, on a network's disk perhaps, never does.
        runtime.shutdown_timeout(ENDING);
        ran
    }

    /// Gives the result of work that has none of its own, with its exit code: it was only described, is another's, or was stopped.
    pub(crate) fn conclude(&self, ran: &Ran, config: &JobConfig, out: Out) -> u8 {
        let outcome = if ran.code == DONE { "done" } else { "preempted" };
        let JobTable { kind, data, .. } = &config.job;
        let kind = kind.name();
        match (&self.write_job, &self.coordinator) {
            // A pipe, /dev/stdout perhaps, has the job and nothing beside it.
            (Some(file), _) if !file.is_file() && !out.json => {}
            (Some(file), _) => out.result(&json!({ "job": file.display().to_string(), "kind": kind, "data": data }), || {
                let file = file.display().to_string();
                format!("{file}: run `ella-coordinator {}`, and workers with --coordinator", shell(&file))
            }),
            (None, Some(url)) => {
                out.result(&json!({ "outcome": outcome, "coordinator": url }), || format!("{outcome}: the job that {url} coordinates"));
            }
            (None, None) => {
                let job = ran.status.as_ref().and_then(|status| status.job.as_ref());
                let (units, units_done) = job.map_or((0, 0), |job| (job.units, job.units_done));
                let stopped = json!({ "outcome": outcome, "kind": kind, "data": data, "units": units, "units_done": units_done });
                out.result(&stopped, || format!("{outcome} at {units_done} of {units} units; the same command goes on where it was"));
            }
        }
        ran.code
    }
}

/// From now on SIGTERM, SIGINT and SIGHUP give back what is in hand; a second wish leaves at once. They are waited for on a thread of their own, until
/// the process ends: a second wish must be heard also while the work's threads come to their end.
fn watch_signals(stop: CancellationToken) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
    let caught = {
        let _within = runtime.enter();
        Stops::catch()
    };
    if let Ok(stops) = caught {
        std::thread::spawn(move || runtime.block_on(stop_on_signals(stops, stop)));
    }
}

async fn stop_on_signals(mut stops: Stops, stop: CancellationToken) {
    loop {
        stops.next().await;
        if stop.is_cancelled() {
            ella_worker::leave(PREEMPTED);
        }
        stop.cancel();
    }
}

fn code(ended: Result<Ending, JobEnd>) -> Result<u8, Fail> {
    match ended {
        Ok(Ending::Done) => Ok(DONE),
        Ok(Ending::Preempted) => Ok(PREEMPTED),
        Err(error) => Err(Fail { code: if error.is_permanent() { NO_RETRY } else { FAILED }, message: error.to_string() }),
    }
}

/// Names what could not be done, where a job failed for that: units are of no interest to people.
fn told(fail: Fail, last: Option<&StatusReport>) -> Fail {
    let given_up = last.and_then(|status| status.job.as_ref()).map_or(&[][..], |job| &job.given_up);
    let mut errors: Vec<String> = given_up.iter().map(|unit| unit.error.clone()).collect();
    errors.sort();
    errors.dedup();
    let more = errors.len().saturating_sub(NAMED);
    errors.truncate(NAMED);
    match (errors.is_empty(), more) {
        (true, _) => fail,
        (_, 0) => Fail { message: errors.join("; also "), ..fail },
        (_, more) => Fail { message: format!("{}; and {more} more", errors.join("; also ")), ..fail },
    }
}

fn alone(runtime: &Runtime, config: &JobConfig, device: Device) -> Result<Ran, Fail> {
    let stop = CancellationToken::new();
    watch_signals(stop.clone());
    let mut shown = Shown::new(config);
    let ended = runtime.block_on(async {
        let making = config.clone();
        let making = tokio::task::spawn_blocking(move || kinds::make(&making, device));
        // Looking for sources and models may take long, or for ever.
        let made = tokio::select! {
            made = making => made,
            () = stop.cancelled() => return Ok(PREEMPTED),
        };
        match made.map_err(Fail::failed)? {
            Ok(job) => code(run_local(config, job, 1, stop, &mut |status| shown.show(status)).await),
            Err(error) => Err(error.into()),
        }
    });
    Ok(Ran { code: ended.map_err(|fail| told(fail, shown.last.as_ref()))?, status: shown.last })
}

fn join(runtime: &Runtime, access: Access, device: Device) -> Result<Ran, Fail> {
    let stop = CancellationToken::new();
    watch_signals(stop.clone());
    let ended = runtime.block_on(run_leased(access, 1, stop, move |config| kinds::make(config, device)));
    Ok(Ran { status: None, code: code(ended)? })
}

/// A coordinator in this process, and workers in their own. One that dies is followed by another.
async fn many(config: &JobConfig, count: u32, who: &Who, device: Device) -> Result<Ran, Fail> {
    let (listen, credentials) = (who.listen, &who.credentials);
    let control = AccessControl::load(None, credentials.token_file.as_deref(), credentials.tls_files(), None);
    let options = Options { listen, access: control.map_err(Fail::usage)?.insecure(who.insecure), ..Options::default() };
    let mut access = credentials.unaddressed()?;
    let opened = Coordinator::open_job(config, &options).await;
    let coordinator = opened.map_err(|error| Fail { code: error.exit_code(), message: error.to_string() })?;
    access.url = reachable(coordinator.addresses().grpc).to_string();
    access.url = access.full_url();
    let (http, scheme) = (coordinator.addresses().http, if access.tls.is_some() { "https" } else { "http" });
    let joins = [vec!["--coordinator".to_owned(), access.url.clone()], credentials.arguments()].concat();
    note(format_args!("coordinator {} (page {scheme}://{http}); more workers: ella-worker {}", access.url, joins.join(" ")));
    let (stops, stopping) = mpsc::channel(2);
    let stop = CancellationToken::new();
    watch_signals(stop.clone());
    let mut serving = tokio::spawn(coordinator.run(stopping));
    let mut workers = Workers::start(joins, count, device)?;
    let mut shown = Shown::new(config);
    let mut ticks = tokio::time::interval(POLL);
    // Why no worker takes the place of the last one that ended.
    let mut given_up = None;
    let outcome = loop {
        tokio::select! {
            outcome = &mut serving => break outcome.map_err(Fail::failed)?.map_err(Fail::failed)?,
            () = stop.cancelled(), if !stops.is_closed() => {
                // Nobody listens any more only when the job is over.
                let _ = stops.try_send("asked to stop by a signal".to_owned());
                workers.children.signal(libc::SIGTERM);
            }
            at = workers.children.next_end() => {
                // Whoever ends because the job is over leaves nothing to do.
                let over = stop.is_cancelled() || given_up.is_some() || serving.is_finished() || is_over(client::status(&access).await.ok());
                if !over && let Some(fail) = workers.replace(at).await? {
                    let _ = stops.try_send(fail.message.clone());
                    given_up = Some(fail);
                }
            },
            _ = ticks.tick() => if let Ok(status) = client::status(&access).await {
                shown.show(&status.into());
            },
        }
    };
    workers.children.reap(LEAVING).await;
    let code = match (&outcome, given_up) {
        (Outcome::Done, _) => DONE,
        (Outcome::Preempted { .. }, Some(fail)) => return Err(fail),
        (Outcome::Preempted { reason }, None) => {
            note(format_args!("stopped ({reason})"));
            PREEMPTED
        }
        _ => {
            let fail = Fail { code: outcome.exit_code(), message: format!("the job failed: {}", outcome.reason()) };
            return Err(told(fail, shown.last.as_ref()));
        }
    };
    Ok(Ran { status: shown.last, code })
}

/// Whether a status is that of a job whose outcome is decided.
fn is_over(status: Option<RunStatus>) -> bool {
    status.is_some_and(|status| matches!(status.phase.as_str(), "done" | "failed" | "preempted"))
}

/// Where this machine reaches what listens there: an address that stands for all of a machine's is none to call.
fn reachable(listens: SocketAddr) -> SocketAddr {
    match (listens.ip().is_unspecified(), listens.is_ipv4()) {
        (false, _) => listens,
        (true, true) => (Ipv4Addr::LOCALHOST, listens.port()).into(),
        (true, false) => (Ipv6Addr::LOCALHOST, listens.port()).into(),
    }
}

/// The worker processes of a job.
struct Workers {
    children: Children,
    arguments: Vec<String>,
    program: PathBuf,
    deaths_left: usize,
}

impl Workers {
    /// Of which each joins by these arguments.
    fn start(joins: Vec<String>, count: u32, device: Device) -> Result<Self, Fail> {
        let (count, gpus) = (count as usize, Gpus::for_job(count as usize, device));
        let device = serde_json::to_value(device).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default();
        let arguments = [joins, vec!["--device".to_owned(), device]].concat();
        let mut workers = Self { children: Children::default(), arguments, program: binary("ella-worker")?, deaths_left: DEATHS * count };
        (0..count).try_for_each(|number| workers.add(&gpus.of_worker(number)))?;
        Ok(workers)
    }

    fn add(&mut self, environment: &[(String, String)]) -> Result<(), Fail> {
        let name = format!("worker-{}", self.children.members().len());
        let logs = Logs { folder: None, verbose: false };
        self.children.start_in(&name, &self.program, (&self.arguments, environment), &logs).map(|_| ())
    }

    /// Starts another in the place of one that died; or says why no more are: it would end in the same way, or too many have.
    async fn replace(&mut self, at: usize) -> Result<Option<Fail>, Fail> {
        let Some(status) = self.children.members()[at].ended.filter(|status| !status.success()) else { return Ok(None) };
        let why = self.children.last_words(at).await;
        let name = &self.children.members()[at].name;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        if let Some(code) = code.filter(|code| [USAGE, NO_RETRY].contains(code)) {
            return Ok(Some(Fail { code, message: format!("{name} cannot work ({why}), nor could another in its place") }));
        }
        if self.deaths_left == 0 {
            let message = format!("workers die again and again, the last: {why}; the same command goes on where it was");
            return Ok(Some(Fail::failed(message)));
        }
        self.deaths_left -= 1;
        note(format_args!("{name} is gone ({why}); another takes its place"));
        let environment = self.children.members()[at].environment().to_vec();
        self.add(&environment).map(|()| None)
    }
}

/// How far a job has come, for people.
struct Shown {
    meter: Meter,
    last: Option<StatusReport>,
}

impl Shown {
    fn new(config: &JobConfig) -> Self {
        Self { meter: Meter::new(config.job.kind.name(), 0), last: None }
    }

    fn show(&mut self, status: &StatusReport) {
        if let Some(job) = &status.job {
            self.meter.of(job.units);
            self.meter.at(job.units_done, &message(job));
        }
        self.last = Some(status.clone());
    }
}

fn message(job: &JobReport) -> String {
    let mut text = format!("stage {}; {} samples, {:.1}/s", job.stage, job.samples, job.samples_per_second);
    for (name, count) in &job.results {
        if let Some(why) = name.strip_prefix("refused.") {
            text += &format!(", {count} {why}");
        } else if name == "trimmed" || name.starts_with("retried.") {
            text += &format!(", {count} {}", name.replace('.', " "));
        }
    }
    if let Some(left) = job.seconds_left {
        text += &format!(", {} left", span(left));
    }
    text
}
