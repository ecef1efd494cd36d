//! A worker's life: attach, be assigned, load, train, finish.

use crate::commit::{Committer, Place};
use crate::control::{Control, ControlError, Message, Outbox};
use crate::device::{self, NoDevice};
use crate::feed::{self, Feed, FeedError, FeatureSource, Parts, Sources, lanes_of};
use crate::models::{self, Loaded};
use crate::reduce::{Collective, CollectiveError, Listener, Membership, Nccl, Tcp};
use crate::text::{TextEncoder, TextIdentity, TextOptions};
use crate::train::state::{StateError, TrainState, part_names};
use crate::train::{Ending, TrainError, Trainer};
use ella_dataset::DataSet;
use ella_dataset::ledger::Tally;
use ella_model::ModelError;
use ella_proto::config::{ConfigError, Device as Choice, Features, RunConfig};
use ella_proto::v1::{Assign, Failed, FailureKind, Finished, Hello, Outcome, Ready, Welcome, from_worker};
use ella_store::{Commit, Store, StoreError};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tch::Device;
use tokio::runtime::Handle;

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
}

/// Why a worker ended without having finished.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// The control plane.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The coordinator's config cannot be used here.
    #[error("the coordinator's config: {0}")]
    Config(#[from] ConfigError),
    /// A model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data set.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// The run folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The commit to resume from.
    #[error("commit {folder}: {source}")]
    Restore {
        /// Its folder.
        folder: String,
        /// What is wrong with it.
        source: StateError,
    },
    /// The other workers.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Training.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A peer's address means nothing here.
    #[error("the worker at {peer} cannot be found: {message}")]
    Peer {
        /// The address as the peer gave it.
        peer: String,
        /// The resolver's words.
        message: String,
    },
    /// Something the coordinator should not have sent.
    #[error("the coordinator sent {0}, which makes no sense here")]
    Protocol(&'static str),
    /// libtorch's own error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// The operating system.
    #[error("the system refused {what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

impl WorkError {
    /// What to tell the coordinator: the kind, and whether starting again would fail in the same way.
    fn failure(&self) -> (FailureKind, bool) {
        match self {
            Self::Train(error) => error.failure(),
            Self::Feed(error) => (FailureKind::Input, error.is_permanent()),
            Self::Config(_) | Self::Model(_) | Self::Restore { .. } => (FailureKind::Input, true),
            Self::Store(error) => (FailureKind::Store, !error.is_retryable()),
            Self::Collective(_) => (FailureKind::Collective, false),
            _ => (FailureKind::Internal, false),
        }
    }

    /// Whether starting again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        self.failure().1
    }
}

/// Works for a coordinator until its run is over. Call it from a thread of its own, outside the runtime.
pub fn work(options: &Options, runtime: &Handle) -> Result<Ending, WorkError> {
    let device = device::set_up(options.device, 1)?;
    let listener = Listener::bind(options.listen)?;
    let hello = hello(options, device, &listener)?;
    let (control, welcome) = runtime.block_on(Control::attach(&options.coordinator, hello))?;
    spawn_signals(&control, runtime);
    let outbox = control.outbox();
    let result = attached(options, runtime, &control, &welcome, listener);
    if let Err(error) = &result {
        if control.flags.stopped().is_none() {
            let (kind, permanent) = error.failure();
            outbox.send(from_worker::Body::Failed(Failed { kind: kind.into(), message: error.to_string(), permanent }));
            // The message leaves with the stream; the coordinator answers by ending it.
            let _ = control.next("end of the run", Duration::from_secs(5));
        }
    }
    result
}

fn hello(options: &Options, device: Device, listener: &Listener) -> Result<Hello, WorkError> {
    let mut id = [0u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut id))
        .map_err(|source| WorkError::System { what: "random bytes", source })?;
    let address = listener.address();
    let peer_address = match &options.advertise {
        Some(host) => format!("{host}:{}", address.port()),
        None => address.to_string(),
    };
    Ok(Hello {
        worker_id: id.iter().map(|b| format!("{b:02x}")).collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        pid: std::process::id(),
        device_kind: device::kind_name(device).to_owned(),
        device_uuid: device::uuid(device).unwrap_or_default(),
        peer_address,
        config_digest: String::new(),
    })
}

/// SIGTERM and SIGINT ask for a commit at the next step boundary; a second one leaves at once, resumable.
fn spawn_signals(control: &Control, runtime: &Handle) {
    use tokio::signal::unix::{SignalKind, signal};
    let flags = control.flags.clone();
    runtime.spawn(async move {
        let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
            tracing::error!("signals cannot be watched: SIGTERM will end this worker without a commit");
            return;
        };
        loop {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            if flags.drain.swap(true, Ordering::Relaxed) {
                std::process::exit(3);
            }
            tracing::info!("signal: commit at the next step boundary, then leave");
        }
    });
}

fn attached(
    options: &Options,
    runtime: &Handle,
    control: &Control,
    welcome: &Welcome,
    listener: Listener,
) -> Result<Ending, WorkError> {
    let config = Arc::new(RunConfig::parse(&welcome.config_toml, "run.toml", &[])?);
    let patience = config.workers.start_timeout.duration();
    let assign = match control.next("assignment", patience)? {
        Message::Assign(assign) => assign,
        _ => return Err(WorkError::Protocol("something else than an assignment")),
    };
    let device = device::set_up(options.device, config.workers.threads)?;
    let store = Store::open(&welcome.run_url)?;
    let mut loaded = models::load(&config, device)?;
    if let Some(commit) = parse_commit(&assign)? {
        restore(&mut loaded.state, &commit, &store, runtime)?;
    }
    let world = assign.peers.len() as u32;
    let collective = connect(listener, &assign, control, &config, device)?;
    let place = Place { store, rank: assign.rank, world, term: control.flags.term() };
    let mut trainer = assemble(&config, loaded, device, (control, runtime), (collective, place))?;

    control.outbox().send(from_worker::Body::Ready(ready(&trainer)?));
    match control.next("start", patience)? {
        Message::Start(_) => {}
        _ => return Err(WorkError::Protocol("something else than a start")),
    }
    let trained = trainer.run().map_err(|error| match control.flags.stopped() {
        Some(reason) => TrainError::Stopped(reason),
        None => error,
    })?;
    finish(trainer, trained, control)
}

/// Joins the other ranks of the generation. From here on, the end of the run frees a rank that waits for others.
fn connect(
    listener: Listener,
    assign: &Assign,
    control: &Control,
    config: &RunConfig,
    device: Device,
) -> Result<Box<dyn Collective>, WorkError> {
    let session = assign.session.as_slice().try_into().map_err(|_| WorkError::Protocol("a session that is not 16 bytes"))?;
    let abort = listener.abort_handle();
    control.flags.on_stop(Box::new(move || drop(abort.abort())));
    let peers = resolve(&assign.peers)?;
    let membership = Membership { rank: assign.rank, peers: &peers, session, generation: control.flags.generation() };
    // Others may still be loading.
    let patience = config.workers.start_timeout.duration();
    let ring: Box<dyn Collective> = Box::new(Tcp::connect(listener, &membership, patience)?);
    let mut collective = if device.is_cuda() { over_nccl(ring, patience)? } else { ring };
    collective.set_timeout(config.workers.step_timeout.duration());
    // The handle may be another engine's now.
    let abort = collective.abort_handle();
    control.flags.on_stop(Box::new(move || drop(abort.abort())));
    Ok(collective)
}

/// The same ranks over NCCL, for tensors in GPU memory.
fn over_nccl(ring: Box<dyn Collective>, patience: Duration) -> Result<Box<dyn Collective>, WorkError> {
    let beside_libtorch = device::libtorch_folder().map(|lib| lib.join("../../nvidia/nccl/lib"));
    let library = nccl_rs::Library::load(beside_libtorch.as_slice()).map_err(CollectiveError::from)?;
    Ok(Box::new(Nccl::connect(ring, &library, 0, patience)?))
}

/// Addresses of peers, which may be given by host name.
fn resolve(peers: &[String]) -> Result<Vec<SocketAddr>, WorkError> {
    let resolved = |peer: &String| {
        let mut found = peer.to_socket_addrs().map_err(|source| WorkError::Peer { peer: peer.clone(), message: source.to_string() })?;
        found.next().ok_or_else(|| WorkError::Peer { peer: peer.clone(), message: "it has no address".to_owned() })
    };
    peers.iter().map(resolved).collect()
}

fn assemble(
    config: &Arc<RunConfig>,
    loaded: Loaded,
    device: Device,
    (control, runtime): (&Control, &Handle),
    (collective, place): (Box<dyn Collective>, Place),
) -> Result<Trainer, WorkError> {
    let Loaded { networks, state, vae, text, digest } = loaded;
    let data = runtime.block_on(DataSet::open(&config.data.path)).map_err(FeedError::from)?;
    let features = feature_source(config, &data, &text, device, runtime)?;
    let lanes = lanes_of(place.rank, place.world, config.train.lanes() as u32);
    let sources = Sources::new(Parts {
        config: config.clone(),
        data,
        features,
        vae,
        kind: networks.kind,
        timesteps: networks.schedule.config().num_train_timesteps as u32,
        device,
        runtime: runtime.clone(),
        models_digest: digest,
    })?;
    let threads = config.workers.threads;
    let steps = state.step..config.train.steps;
    let feed = Feed::start(sources, lanes, steps, move || device::set_threads(threads))
        .map_err(|source| WorkError::System { what: "a feeding thread", source })?;
    let outbox = control.outbox();
    let committer = Committer::start(place, outbox.clone(), runtime.clone())
        .map_err(|source| WorkError::System { what: "a committing thread", source })?;
    let flags = control.flags.clone();
    Ok(Trainer { config: config.clone(), state, networks, feed, collective, committer, outbox, flags })
}

/// Sidecars, complete before the first step, or the encoder itself.
fn feature_source(
    config: &RunConfig,
    data: &DataSet,
    text: &TextIdentity,
    device: Device,
    runtime: &Handle,
) -> Result<FeatureSource, WorkError> {
    if config.text.features == Features::Inline {
        let options = TextOptions {
            model: models::folder("text.model", &config.text.model)?,
            max_tokens: config.text.max_tokens,
            padding: config.text.padding,
            dtype: config.text.dtype,
        };
        let encoder = Box::new(TextEncoder::load(&options, device)?);
        return Ok(FeatureSource::Inline { encoder, padding: config.text.padding });
    }
    let spec = feed::spec(&config.text, text)?;
    let features = runtime.block_on(data.features(&spec)).map_err(FeedError::from)?;
    let empty = runtime.block_on(features.empty()).map_err(FeedError::from)?;
    Ok(FeatureSource::Cached { features: Box::new(features), empty })
}

fn parse_commit(assign: &Assign) -> Result<Option<Commit>, WorkError> {
    if assign.commit_json.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&assign.commit_json).map(Some).map_err(|_| WorkError::Protocol("a commit record of another version"))
}

/// Fills the state from a commit, each file checked against its digest (COMMIT).
fn restore(state: &mut TrainState, commit: &Commit, store: &Store, runtime: &Handle) -> Result<(), WorkError> {
    let folder = store.child(&commit.folder);
    let mut files: [bytes::Bytes; 3] = Default::default();
    for (file, name) in files.iter_mut().zip(part_names()) {
        let missing = || WorkError::Restore { folder: commit.folder.clone(), source: StateError::NoPart { file: name } };
        let part = commit.parts.iter().find(|p| p.name == name).ok_or_else(missing)?;
        *file = runtime.block_on(folder.get_verified(name, &part.blake3, part.bytes))?;
    }
    state.restore(&files).map_err(|source| WorkError::Restore { folder: commit.folder.clone(), source })?;
    state.step = commit.step;
    for epoch in &commit.ledger {
        let bad = |_| WorkError::Protocol("a ledger hash that is not 32 hex digits");
        let hash = u128::from_str_radix(&epoch.hash, 16).map_err(bad)?;
        state.ledger.add_tally(epoch.epoch, &Tally { samples: epoch.samples, hash });
    }
    Ok(())
}

fn ready(trainer: &Trainer) -> Result<Ready, WorkError> {
    let snapshot = trainer.state.snapshot()?;
    let digests: Vec<_> = (0..part_names().len()).map(|part| snapshot.digest(part)).collect();
    Ok(Ready {
        step: trainer.state.step,
        state_digest: snapshot.state_digest(&digests),
        data_digest: trainer.feed.identity().data.clone(),
        models_digest: trainer.feed.identity().models.clone(),
        samples_per_epoch: trainer.feed.samples_per_epoch(),
    })
}

/// Waits until the last commit's record stands, so that nobody leaves before the work is safe.
fn finish(mut trainer: Trainer, ending: Ending, control: &Control) -> Result<Ending, WorkError> {
    let step = trainer.state.step;
    trainer.committer.finish().map_err(TrainError::from)?;
    let outcome = match ending {
        Ending::Done => Outcome::Done,
        Ending::Preempted => Outcome::Preempted,
    };
    let outbox: Outbox = control.outbox();
    outbox.send(from_worker::Body::Finished(Finished { step, outcome: outcome.into() }));
    let patience = trainer.config.workers.orphan_timeout.duration();
    loop {
        if let Message::Committed(committed) = control.next("record of the last commit", patience)? {
            if committed.step >= step {
                return Ok(ending);
            }
        }
    }
}
