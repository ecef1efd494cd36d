//! A worker's life: attach, be assigned, load, train, finish; or, if it finds itself in a job, do units until that is over.

mod error;
mod load;

pub use error::WorkError;

use crate::commit::Place;
use crate::control::{self, Control, Flags, Link, Message};
use crate::device;
use crate::job;
use crate::models;
use crate::reduce::Listener;
use crate::train::state::part_names;
use crate::train::{Ending, TrainError, Trainer};
use ella_proto::config::{Config, Device as Choice, RunConfig};
use ella_proto::v1::{Failed, Finished, Hello, Outcome, Ready, Welcome, from_worker};
use ella_store::Store;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tch::Device;
use tokio::runtime::Handle;

/// How long a worker that has failed waits for the coordinator to end its stream: by then its message has been read.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a worker is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The coordinator's URL, `http://host:port`.
    pub coordinator: String,
    /// Where this worker's collective listens; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The host that other workers reach it by, if not the one it listens on.
    pub advertise: Option<String>,
    /// Where to compute.
    pub device: Choice,
    /// Units of a job that are done at once.
    pub slots: u32,
    /// How long to try again while no coordinator answers.
    pub patience: Duration,
}

/// Works for a coordinator until its run or job is over. Call it from a thread of its own, outside the runtime. Cancel `flags.drain` to
/// have a run commit and leave, or to leave a job.
pub fn work(options: &Options, flags: Arc<Flags>, runtime: &Handle) -> Result<Ending, WorkError> {
    let device = device::set_up(options.device, 1)?;
    let listener = Listener::bind(options.listen)?;
    let hello = hello(options, device, &listener)?;
    let link = match runtime.block_on(Link::open_patiently(&options.coordinator, &hello, options.patience)) {
        Ok(link) => link,
        Err(error) => return Ok(error.ending()?),
    };
    // What is neither is taken for a run's, and told to the coordinator as such.
    if let Ok(Config::Job(config)) = Config::parse(&link.welcome.config_toml, "the coordinator's config", &[]) {
        flags.working.store(true, Ordering::Relaxed);
        let choice = options.device;
        let leased = job::Leased { url: options.coordinator.clone(), slots: options.slots, stop: flags.drain.clone() };
        return Ok(runtime.block_on(leased.work(link, move || job::kinds::make(&config, choice)))?);
    }
    let (control, welcome) = {
        let _within = runtime.enter();
        Control::over(link, flags)
    };
    let result = attached(options, runtime, &control, &welcome, listener);
    let unread = control.flags.dropped_progress.load(Ordering::Relaxed);
    if unread > 0 {
        tracing::warn!(unread, "messages of progress were dropped while the coordinator did not read");
    }
    match (result, control.flags.stopped()) {
        (Ok(ending), _) => Ok(ending),
        // What the end of the run did to this rank is not its reason.
        (Err(error), Some(why)) => {
            tracing::info!("interrupted: {error}");
            Err(why.into())
        }
        (Err(error), None) => {
            confess(&control, &error);
            Err(error)
        }
    }
}

/// Tells the coordinator why this worker leaves, and waits until it has heard: it answers by ending the stream.
fn confess(control: &Control, error: &WorkError) {
    let (kind, permanent) = error.failure();
    control.outbox().send(from_worker::Body::Failed(Failed { kind: kind.into(), message: error.to_string(), permanent }));
    let until = Instant::now() + FAREWELL;
    while control.next("end of the run", until.saturating_duration_since(Instant::now())).is_ok() {}
}

fn hello(options: &Options, device: Device, listener: &Listener) -> Result<Hello, WorkError> {
    let address = listener.address();
    let peer_address = match &options.advertise {
        Some(host) => format!("{host}:{}", address.port()),
        None => address.to_string(),
    };
    let identity = control::identity().map_err(|source| WorkError::System { what: "random bytes", source })?;
    Ok(Hello {
        device_kind: device::kind_name(device).to_owned(),
        device_uuid: device::uuid(device).unwrap_or_default(),
        peer_address,
        ..identity
    })
}

fn attached(options: &Options, runtime: &Handle, control: &Control, welcome: &Welcome, listener: Listener) -> Result<Ending, WorkError> {
    let config = Arc::new(RunConfig::parse(&welcome.config_toml, "run.toml", &[])?);
    let device = device::set_up(options.device, config.workers.threads)?;
    check_device(&config, device)?;
    let patience = config.workers.start_timeout.duration();
    let assign = match control.next("assignment", patience)? {
        Message::Assign(assign) => assign,
        _ => return Err(WorkError::Protocol("something else than an assignment")),
    };
    let store = Store::open(&welcome.run_url)?;
    let mut loaded = models::load(&config, device)?;
    if let Some(commit) = load::parse_commit(&assign)? {
        load::restore(&mut loaded.state, &commit, &store, runtime)?;
    }
    let world = assign.peers.len() as u32;
    let collective = load::connect(listener, &assign, control, &config, device)?;
    let place = Place { store, rank: assign.rank, world, term: control.flags.term(), patience };
    let resumed = loaded.state.step;
    let mut trainer = load::assemble(&config, loaded, device, (control, runtime), (collective, place))?;

    control.outbox().send(from_worker::Body::Ready(ready(&trainer)?));
    match control.next("start", patience)? {
        Message::Start(_) => {}
        _ => return Err(WorkError::Protocol("something else than a start")),
    }
    control.flags.working.store(true, Ordering::Relaxed);
    let ending = trainer.run()?;
    finish(trainer, ending, resumed, control)
}

/// The device that the run asks for is the one that this worker has told the coordinator of (SAME).
fn check_device(config: &RunConfig, device: Device) -> Result<(), WorkError> {
    let wanted = match config.workers.device {
        Choice::Auto => return Ok(()),
        Choice::Cpu => "cpu",
        Choice::Cuda => "cuda",
    };
    let found = device::kind_name(device);
    if wanted == found { Ok(()) } else { Err(WorkError::OtherDevice { wanted, found }) }
}

fn ready(trainer: &Trainer) -> Result<Ready, WorkError> {
    let snapshot = trainer.state.snapshot(None)?;
    let digests: Vec<_> = (0..part_names().len()).map(|part| snapshot.digest(part)).collect();
    Ok(Ready {
        step: trainer.state.step,
        state_digest: snapshot.state_digest(&digests),
        data_digest: trainer.feed.identity().data.clone(),
        models_digest: trainer.feed.identity().models.clone(),
        samples_per_epoch: trainer.feed.samples_per_epoch(),
    })
}

/// Waits until the last commit's record stands, so that nobody leaves before the work is safe, and then for the end of the stream: a
/// coordinator ends it once it has read all farewells. To a worker that left before, its own could still be on the way, and the
/// coordinator would take it for lost.
///
/// A rank that left before it applied a step has nothing to save.
fn finish(mut trainer: Trainer, ending: Ending, resumed: u64, control: &Control) -> Result<Ending, WorkError> {
    let step = trainer.state.step;
    // What is encoded from here on would only delay the commit.
    trainer.feed.stop_encoding();
    trainer.committer.finish().map_err(TrainError::from)?;
    let outcome = match ending {
        Ending::Done => Outcome::Done,
        Ending::Preempted => Outcome::Preempted,
    };
    control.outbox().send(from_worker::Body::Finished(Finished { step, outcome: outcome.into() }));
    if ending == Ending::Done
        && trainer.collective.rank() == 0
        && let Err(error) = trainer.feed.finish_features()
    {
        tracing::warn!("features that were encoded ahead lack their manifest, which the next run writes: {error}");
    }
    // Others may still be saving their files: the coordinator gives them this long, and then ends the run itself.
    let patience = trainer.config.workers.start_timeout.duration() + FAREWELL;
    let mut committed = step == resumed;
    loop {
        match control.next("end of the run", patience) {
            Ok(Message::Committed(commit)) => committed |= commit.step >= step,
            Ok(_) => {}
            // Whatever became of the coordinator, the work is safe.
            Err(_) if committed => return Ok(ending),
            Err(error) => return Err(error.into()),
        }
    }
}
