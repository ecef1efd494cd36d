//! From an assignment to a rank that is ready to train: its peers, models, data, and the commit to resume from.

use super::WorkError;
use crate::commit::{Committer, Place};
use crate::control::Control;
use crate::device;
use crate::feed::{self, Captions, FeatureSource, Feed, FeedError, Parts, Sources, lanes_of};
use crate::models::Loaded;
use crate::reduce::{Collective, CollectiveError, Listener, Membership, Nccl, Tcp};
use crate::train::Trainer;
use crate::train::cadence::Cadence;
use crate::train::state::{StateError, TrainState, part_names};
use ella_dataset::ledger::Tally;
use ella_dataset::{CacheLimits, DataSet};
use ella_proto::config::RunConfig;
use ella_proto::v1::Assign;
use ella_store::{Commit, Store};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::Device;
use tokio::runtime::Handle;

/// Joins the other ranks of the generation. From here on, the end of the run frees a rank that waits for others.
pub(super) fn connect(
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

/// Everything that a rank trains with, the feed and the committing thread running.
pub(super) fn assemble(
    config: &Arc<RunConfig>,
    loaded: Loaded,
    device: Device,
    (control, runtime): (&Control, &Handle),
    (collective, place): (Box<dyn Collective>, Place),
) -> Result<Trainer, WorkError> {
    let Loaded { networks, state, vae, text, vae_weights, digest } = loaded;
    let limits = CacheLimits { bytes: config.data.memory_bytes, ..CacheLimits::default() };
    let store = Store::open(&config.data.path)?;
    let cache = runtime.block_on(feed::cache(&config.data, &store)).map_err(FeedError::from)?;
    let data = runtime.block_on(DataSet::open_through(store, limits, cache)).map_err(FeedError::from)?;
    let data = Arc::new(data);
    let captions = Arc::new(runtime.block_on(Captions::open(&data, &config.data.captions))?);
    let features = FeatureSource::open(config, (&data, &captions), (&text, device), runtime)?;
    let lanes = lanes_of(place.rank, place.world, config.train.lanes() as u32);
    let sources = Sources::new(Parts {
        config: config.clone(),
        data,
        captions,
        features,
        vae,
        vae_weights,
        timesteps: networks.schedule.config().num_train_timesteps as u32,
        device,
        runtime: runtime.clone(),
        models_digest: digest.to_string(),
    })?;
    let threads = config.workers.threads;
    let steps = state.step..config.train.steps;
    let flags = control.flags.clone();
    let feed = Feed::start(sources, lanes, steps, move || device::set_threads(threads), flags.clone())
        .map_err(|source| WorkError::System { what: "a feeding thread", source })?;
    let outbox = control.outbox();
    let committer = Committer::start(place, outbox.clone(), runtime.clone())
        .map_err(|source| WorkError::System { what: "a committing thread", source })?;
    let (saved, cadence) = (state.step, Cadence::new(&config.checkpoint, Instant::now()));
    let config = config.clone();
    Ok(Trainer {
        config,
        state,
        networks,
        feed,
        collective,
        committer,
        outbox,
        flags,
        cadence,
        committing: Duration::ZERO,
        saved,
        supplied: false,
    })
}

/// The commit to resume from; none for a fresh start.
pub(super) fn parse_commit(assign: &Assign) -> Result<Option<Commit>, WorkError> {
    if assign.commit_json.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&assign.commit_json).map(Some).map_err(|_| WorkError::Protocol("a commit record of another version"))
}

/// Fills the state from a commit, each file checked against its digest (COMMIT).
pub(super) fn restore(state: &mut TrainState, commit: &Commit, store: &Store, runtime: &Handle) -> Result<(), WorkError> {
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
