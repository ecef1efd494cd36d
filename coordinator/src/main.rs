//! The long-running coordinator process: reads a config, serves one run or job, and says by its exit code how it went.

use anyhow::Context;
use clap::{Parser, ValueEnum};
use ella_coordinator::core::Outcome;
use ella_coordinator::credentials::Credentials;
use ella_coordinator::shell::cluster::{Cluster, ClusterError};
use ella_coordinator::shell::{AccessControl, Addresses, Coordinator, Opened, Options, ProgressTo, RunError};
use ella_coordinator::{logs, trace};
use ella_proto::config::{Config, ConfigError, MOST_SECONDS, RunConfig};
use ella_proto::exit::Exit;
use ella_proto::stops::Stops;
use ella_store::Store;
use serde::Serialize;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::sync::mpsc;

/// How long the last spans of traces may take.
const FLUSH: Duration = Duration::from_secs(3);

/// Coordinates one training run, or one job of leased units. Exit codes: 0 done, 1 failed, 2 bad usage or config, 3 preempted and resumable, 4 do not retry.
#[derive(Debug, Parser)]
#[command(name = "ella-coordinator", version)]
struct Args {
    /// The run's config, or a job's: that has a [job] table.
    config: PathBuf,
    /// Overrides one key, as in --set train.optimizer.lr=1e-4. May be given more than once.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where workers and clients connect; port 0 takes any free one.
    #[arg(long, env = "ELLA_LISTEN", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_parser = ella_coordinator::listens)]
    listen: SocketAddr,
    /// Where people and probes look.
    #[arg(long, env = "ELLA_HTTP", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_parser = ella_coordinator::listens)]
    http: SocketAddr,
    /// Also write the addresses to this file, as JSON.
    #[arg(long, value_name = "PATH")]
    address_file: Option<PathBuf>,
    /// Certificates, and a token that lets everyone who shows it do everything.
    #[command(flatten)]
    credentials: Credentials,
    /// Who may do what, by a TOML file of [[allow]] tables (docs/security.md); certificates and tokens that it does not name may nothing.
    #[arg(long, value_name = "PATH", env = "ELLA_ACCESS")]
    access: Option<PathBuf>,
    /// Have the Kubernetes API review tokens of service accounts that were made for this audience.
    #[arg(long, value_name = "AUDIENCE", env = "ELLA_TOKEN_REVIEW")]
    token_review: Option<String>,
    /// Listen on addresses that other machines reach, even if nothing is asked of them.
    #[arg(long)]
    insecure: bool,
    /// How long the workers may take to commit and leave when told to, in seconds.
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    drain_timeout: u64,
    /// Go on to serve the status of a run or job that is done, or failed for good, until told to leave: for who starts it again whenever it ends.
    #[arg(long)]
    stay: bool,
    /// Told to leave, leave the workers to the coordinator that is started next; else they commit and leave first.
    #[arg(long)]
    hand_over: bool,
    /// Write how far it is as annotations of this object of the Kubernetes cluster, as in /apis/batch/v1/namespaces/NS/jobs/NAME.
    #[arg(long, value_name = "PATH", env = "ELLA_PROGRESS_TO")]
    progress_to: Option<String>,
    /// How the log on stderr looks.
    #[arg(long, value_enum, default_value_t = LogFormat::Text, env = "ELLA_LOG_FORMAT")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    logs::start(args.log_format.into());
    let run = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the async runtime could not start")
        .and_then(|runtime| {
            runtime.block_on(async {
                trace::start("ella-coordinator")?;
                let code = run(&args).await;
                trace::finish(FLUSH).await;
                code
            })
        });
    match run {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{}", said(&error));
            ExitCode::from(exit_code(&error))
        }
    }
}

impl From<LogFormat> for logs::Look {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// An error with its causes, each said once: many of ours name their cause themselves.
fn said(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        said if said.contains(&cause) => text,
        said => format!("{said}: {cause}"),
    })
}

fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<RunError>() {
        Some(error) => error.exit_code(),
        None if error.is::<ConfigError>() || error.is::<ClusterError>() || error.is::<trace::TraceError>() => Exit::Usage.code(),
        None => Exit::Failed.code(),
    }
}

async fn run(args: &Args) -> anyhow::Result<u8> {
    let (listen, http, drain_timeout) = (args.listen, args.http, Duration::from_secs(args.drain_timeout));
    let (token, tls) = (args.credentials.token_file.as_deref(), args.credentials.tls_files());
    let access = AccessControl::load(args.access.as_deref(), token, tls, args.token_review.as_deref())
        .map_err(RunError::from)?
        .insecure(args.insecure);
    let options = Options {
        listen,
        http,
        drain_timeout,
        access,
        stay: args.stay,
        hand_over: args.hand_over,
        progress_to: progress_to(args)?,
        ..Options::default()
    };
    // Before anything else: a container's first process is not ended by a signal that it does not catch.
    let mut stops = stops()?;
    let config = Config::load(&args.config, &args.set)?;
    // Before a term is claimed, which ends the coordinator that has the run.
    args.address_file.as_deref().map_or(Ok(()), try_address_file)?;
    let coordinator = tokio::select! {
        opened = open(&config, &options) => match opened? {
            Some(coordinator) => coordinator,
            None => return Ok(Exit::Done.code()),
        },
        Some(reason) = stops.recv() => {
            tracing::info!("{reason} while it started");
            return Ok(Outcome::Preempted { reason }.exit_code());
        }
    };
    announce(&Serving { addresses: coordinator.addresses(), fell_back: coordinator.fell_back() }, args.address_file.as_deref())?;
    let outcome = coordinator.run(stops).await?;
    Ok(outcome.exit_code())
}

/// What the config says is to be coordinated, unless it is a run that is done already.
async fn open(config: &Config, options: &Options) -> anyhow::Result<Option<Coordinator>> {
    match config {
        Config::Job(config) => Ok(Some(Coordinator::open_job(config, options).await?)),
        Config::Run(config) => open_run(config, options).await,
    }
}

/// Where the cluster's tools are told how far it is: what was asked for, and the TrainJob that this process belongs to.
fn progress_to(args: &Args) -> Result<Vec<ProgressTo>, ClusterError> {
    let annotated = args.progress_to.as_ref().map(|path| Ok::<_, ClusterError>(ProgressTo::annotations(Cluster::here()?, path)));
    Ok(annotated.transpose()?.into_iter().chain(ProgressTo::trainer()).collect())
}

/// The run, unless it is done already.
async fn open_run(config: &RunConfig, options: &Options) -> anyhow::Result<Option<Coordinator>> {
    let store = Store::open(&config.run.output).map_err(RunError::from).context("run.output")?;
    match Coordinator::open(config, store, options).await? {
        Opened::Ready(coordinator) => Ok(Some(*coordinator)),
        Opened::Done { step } => {
            tracing::info!(step, "the run is done already; {}", config.further());
            println!("{}", serde_json::json!({ "outcome": "done", "step": step }));
            Ok(None)
        }
    }
}

/// What a coordinator says of itself.
#[derive(Serialize)]
struct Serving {
    #[serde(flatten)]
    addresses: Addresses,
    /// Commits that turned out to be damaged, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    fell_back: Option<String>,
}

fn no_address_file(path: &Path) -> String {
    format!("{}: the addresses could not be written; choose another --address-file", path.display())
}

/// Whether the addresses can be written there, once they are known.
fn try_address_file(path: &Path) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    let folder = if path.is_dir() { Err(std::io::ErrorKind::IsADirectory.into()) } else { Ok(()) };
    folder.and_then(|()| std::fs::write(&partial, "")).and_then(|()| std::fs::remove_file(&partial)).with_context(|| no_address_file(path))
}

/// One line on stdout, and the same in a file that is never seen half-written.
fn announce(serving: &Serving, file: Option<&Path>) -> anyhow::Result<()> {
    let line = serde_json::to_string(serving)?;
    if let Some(path) = file {
        let partial = path.with_extension("partial");
        std::fs::write(&partial, &line).and_then(|()| std::fs::rename(&partial, path)).with_context(|| no_address_file(path))?;
    }
    let mut out = std::io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("stdout: the addresses could not be written")
}

/// Wishes that this process stops, in words.
fn stops() -> anyhow::Result<mpsc::Receiver<String>> {
    let (tell, receiver) = mpsc::channel(4);
    let mut stops = Stops::catch().context("signals can't be caught")?;
    tokio::spawn(async move { while tell.send(format!("the coordinator got {}", stops.next().await)).await.is_ok() {} });
    Ok(receiver)
}
