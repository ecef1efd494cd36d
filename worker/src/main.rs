//! `ella-worker`: one process that trains its share of a run, or does units of a job, whichever its coordinator has. Containers start it;
//! `ella train` starts it on a laptop.

use clap::Parser;
use ella_coordinator::credentials::Credentials;
use ella_coordinator::{logs, trace};
use ella_proto::config::{Device, MOST_SECONDS};
use ella_proto::exit::Exit;
use ella_proto::stops::Stops;
use ella_worker::control::Flags;
use ella_worker::device;
use ella_worker::job::MOST_SLOTS;
use ella_worker::leave;
use ella_worker::session::{Options, advertised, work};
use ella_worker::supervise::{self, Side};
use ella_worker::train::Ending;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often it is looked whether this worker's part in the run is over, and how long it may take to leave then.
const LOOK: Duration = Duration::from_millis(500);
const LEAVING: Duration = Duration::from_secs(30);
/// How long the last spans of traces may take.
const FLUSH: Duration = Duration::from_secs(3);

/// Train one share of a run under a coordinator, or do units of its job.
///
/// Exit codes: 0 done, 1 failed, 2 bad usage, 3 preempted and resumable, 4 failed in a way that a restart would repeat.
#[derive(Debug, Parser)]
#[command(name = "ella-worker", version)]
struct Arguments {
    /// The coordinator's gRPC address, http://host:port or https://host:port
    #[arg(long, env = "ELLA_COORDINATOR")]
    coordinator: String,
    #[command(flatten)]
    credentials: Credentials,
    /// Where this worker's collective listens; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", env = "ELLA_LISTEN", value_parser = ella_coordinator::listens)]
    listen: SocketAddr,
    /// Where other workers reach this one, if not where it listens: HOST, or HOST:PORT if the port is another one too (a NodePort, a proxy)
    /// [default: where it listens; if that is on all addresses (0.0.0.0), at this machine's towards the coordinator]
    #[arg(long, value_name = "HOST[:PORT]", env = "ELLA_ADVERTISE", value_parser = advertised)]
    advertise: Option<String>,
    /// Where to compute
    #[arg(long, default_value = "auto", env = "ELLA_DEVICE", value_parser = device)]
    device: Device,
    /// Units of a job that are done at once
    #[arg(long, default_value_t = 1, env = "ELLA_SLOTS", value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_SLOTS)))]
    slots: u32,
    /// Seconds to try again while no coordinator answers: it may start after its workers
    #[arg(
        long, default_value_t = 60, value_name = "SECONDS", env = "ELLA_CONNECT_TIMEOUT",
        value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS)
    )]
    connect_timeout: u64,
    /// Seconds without any sign of life from this process, after which a second one that watches it ends it
    #[arg(
        long, default_value_t = 60, value_name = "SECONDS", env = "ELLA_STUCK_TIMEOUT",
        value_parser = clap::value_parser!(u64).range(3..=MOST_SECONDS)
    )]
    stuck_timeout: u64,
    /// How log lines look
    #[arg(long, default_value = "text", env = "ELLA_LOG_FORMAT", value_parser = ["text", "json"])]
    log_format: String,
}

fn device(text: &str) -> Result<Device, String> {
    match text {
        "auto" => Ok(Device::Auto),
        "cpu" => Ok(Device::Cpu),
        "cuda" => Ok(Device::Cuda),
        _ => Err("expected auto, cpu or cuda".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // SAFETY: no thread has been started yet.
    let side = unsafe {
        device::set_environment();
        supervise::fork(Duration::from_secs(arguments.stuck_timeout))
    };
    let pulse = match side {
        Ok(Side::Worker(pulse)) => pulse,
        Ok(Side::Supervisor(code)) => leave(code),
        Err(error) => {
            eprintln!("ERROR the worker cannot be supervised: {error}");
            return ExitCode::FAILURE;
        }
    };
    logs::start(if arguments.log_format == "json" { logs::Look::Json } else { logs::Look::Text });
    if let Err(why) = device::check_environment() {
        tracing::error!("{why}");
        return ExitCode::from(Exit::Usage.code());
    }
    let coordinator = match arguments.credentials.access(&arguments.coordinator) {
        Ok(access) => access,
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::from(Exit::Usage.code());
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let traced = {
        let _within = runtime.enter();
        trace::start("ella-worker")
    };
    if let Err(error) = traced {
        tracing::error!("{error}");
        return ExitCode::from(Exit::Usage.code());
    }
    let flags = Arc::new(Flags::default());
    runtime.spawn(watch_signals(flags.clone()));
    runtime.spawn(pulse.beat());
    runtime.spawn(end_when_stuck(flags.clone()));
    let Arguments { listen, advertise, device, slots, connect_timeout, .. } = arguments;
    let patience = Duration::from_secs(connect_timeout);
    let ending = work(&Options { coordinator, listen, advertise, device, slots, patience }, flags, runtime.handle());
    runtime.block_on(trace::finish(FLUSH));
    // What a store still does for a worker that has failed is not waited for.
    runtime.shutdown_background();
    leave(
        match ending {
            Ok(Ending::Done) => Exit::Done,
            Ok(Ending::Preempted) => Exit::Preempted,
            Err(error) => {
                tracing::error!("{error}");
                Exit::of(error.is_usage(), error.is_permanent())
            }
        }
        .code(),
    )
}

/// Ends the process where a device call does not return: it computes for far longer than ever before, or its part in the run is over and it does
/// not leave.
async fn end_when_stuck(flags: Arc<Flags>) {
    while flags.stopped().is_none() {
        if let Some(took) = flags.hangs() {
            tracing::error!(
                "it has computed for {:.0} s on end, longer than workers.step_timeout and ten times the longest before (before its first step, than \
                 workers.start_timeout): something in it hangs",
                took.as_secs_f64()
            );
            leave(Exit::Failed.code());
        }
        tokio::time::sleep(LOOK).await;
    }
    tokio::time::sleep(LEAVING).await;
    tracing::error!("its part in the run is over, and it has not left within {} s: something in it hangs", LEAVING.as_secs());
    leave(Exit::Failed.code());
}

/// SIGTERM, SIGINT and SIGHUP have this worker leave at the next step boundary, or give back a job's units. A second wish, or one before the first step,
/// when there is nothing to lose, leaves at once: resumable.
async fn watch_signals(flags: Arc<Flags>) {
    let Ok(mut stops) = Stops::catch() else {
        tracing::error!("signals cannot be watched: SIGTERM will end this worker without a commit");
        return;
    };
    loop {
        stops.next().await;
        if flags.parting.is_cancelled() || !flags.working.load(Ordering::Relaxed) {
            leave(Exit::Preempted.code());
        }
        flags.parting.cancel();
        tracing::info!("signal: leave at the next step boundary, with a commit unless others go on, or give back what is in hand");
    }
}
