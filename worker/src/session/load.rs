//! What makes a rank: its models, data and threads, once; and for each generation its peers, and the state to go on from.

use super::WorkError;
use crate::commit::{Committer, Seat};
use crate::control::{Flags, Outbox};
use crate::device;
use crate::feed::{self, Captions, FeatureSource, Feed, FeedError, Parts, Sources};
use crate::leave;
use crate::memory::{Needs, Room};
use crate::models::Loaded;
use crate::reduce::{AbortHandle, Collective, CollectiveError, Listener, Membership, Nccl, Solo, Tcp};
use crate::train::Trainer;
use crate::train::cadence::Cadence;
use crate::train::graph::Graphs;
use crate::train::samples::Studio;
use crate::train::state::{StateError, TrainState, part_names};
use crate::witness;
use ella_dataset::ledger::{Ledger, Tally};
use ella_dataset::{CacheLimits, DataSet};
use ella_proto::config::RunConfig;
use ella_proto::v1::{Assign, Welcome};
use ella_store::{Commit, Limits, Store, StoreError};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

/// How long the next rank is called in vain at most: it listens since it began, and what does not pass within that is its address, or the network.
const UNREACHED: Duration = Duration::from_secs(30);
/// How long a name that does not resolve is asked for again, and how often.
const RESOLVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(500));
/// How long each of a name's addresses is tried, where it has several.
const TRIAL: Duration = Duration::from_secs(2);

/// Joins the other ranks of the generation. From here on, the end of the generation frees a rank that waits for others.
pub(super) fn connect(
    listener: &Listener,
    (assign, generation): (&Assign, u64),
    flags: &Flags,
    config: &RunConfig,
    device: Device,
) -> Result<Box<dyn Collective>, WorkError> {
    let session = assign.session.as_slice().try_into().map_err(|_| WorkError::Protocol("a session that is not 16 bytes"))?;
    let listener = listener.again()?;
    free_at_the_end(flags, listener.abort_handle());
    // Others may still be restoring.
    let patience = config.workers.start_timeout.duration();
    // The coordinator's patience began earlier: what it is to hear of the next rank must come well before its end.
    let unreached = (patience / 3).min(UNREACHED);
    // Who is alone calls nobody.
    let next = if assign.world == 1 { listener.address() } else { resolve(&assign.next, unreached, flags)? };
    let membership = Membership { rank: assign.rank, world: assign.world, next, session, generation };
    let ring: Box<dyn Collective> = Box::new(Tcp::connect_unless(listener, &membership, (patience, unreached))?);
    let mut collective = if device.is_cuda() { over_nccl(ring, patience, flags)? } else { ring };
    collective.set_timeout(config.workers.step_timeout.duration());
    // The handle may be another engine's now.
    free_at_the_end(flags, collective.abort_handle());
    Ok(collective)
}

/// Aborts what a rank does with others when its generation ends: on a thread of its own, for NCCL's abort may hang. Then only the end of the
/// process frees the GPU.
fn free_at_the_end(flags: &Flags, abort: AbortHandle) {
    flags.on_end(Box::new(move || {
        let abort = abort.clone();
        let freed = std::thread::Builder::new().name("abort".into()).spawn(move || {
            if let Err(error) = abort.abort() {
                tracing::error!("{error}; only the end of this process frees its device");
                leave(1);
            }
        });
        if let Err(error) = freed {
            tracing::error!("the generation cannot be ended: {error}");
            leave(1);
        }
    }));
}

/// Elements of the first sum: as many bytes as a bucket's, so that NCCL chooses the same way.
const FIRST_SUM: i64 = 4 << 20;

static TOLD_OF_NCCL: Once = Once::new();

/// The same ranks over NCCL, for tensors in GPU memory.
fn over_nccl(ring: Box<dyn Collective>, patience: Duration, flags: &Flags) -> Result<Box<dyn Collective>, WorkError> {
    let library = device::nccl().map_err(CollectiveError::from)?;
    TOLD_OF_NCCL.call_once(|| {
        if let Some(fault) = library.version().ok().and_then(device::nccl_fault) {
            tracing::warn!("{fault}");
        }
    });
    // NCCL takes memory of its own, which libtorch's allocator may hold from the generation before. What it still needs then is no reason to fail.
    let _ = ella_cuda::memory::empty_cache();
    let mut ranks = Nccl::connect_telling(ring, &library, 0, patience, |abort| free_at_the_end(flags, abort))?;
    ranks.set_timeout(patience);
    // NCCL connects at the first sum: now, and not where a step needs the most memory.
    let mut sum = Tensor::f_zeros([FIRST_SUM], (Kind::Int64, Device::Cuda(0))).map_err(CollectiveError::from)?;
    ranks.sum_tensor(&mut sum)?;
    Ok(Box::new(ranks))
}

/// The address of a peer, which may be given by host name. A name may be known a moment later than its worker is there.
fn resolve(peer: &str, patience: Duration, flags: &Flags) -> Result<SocketAddr, WorkError> {
    let until = Instant::now() + RESOLVE.0.min(patience);
    loop {
        let (message, passes) = match peer.to_socket_addrs().map(|found| answering(&found.collect::<Vec<_>>())) {
            Ok(Some(address)) => return Ok(address),
            Ok(None) => ("it has no address".to_owned(), true),
            Err(error) => (error.to_string(), error.kind() != ErrorKind::InvalidInput),
        };
        if !passes || flags.interrupted() || Instant::now() >= until {
            return Err(WorkError::Peer { peer: peer.to_owned(), message });
        }
        std::thread::sleep(RESOLVE.1.min(patience));
    }
}

/// Of a name's addresses the first that takes calls, else the first: a name often has one of IPv6 too, at which its worker does not listen.
fn answering(addresses: &[SocketAddr]) -> Option<SocketAddr> {
    let takes_calls = |address: &&SocketAddr| addresses.len() == 1 || TcpStream::connect_timeout(address, TRIAL).is_ok();
    addresses.iter().find(takes_calls).or(addresses.first()).copied()
}

/// Everything that a rank trains with, but for its place in a generation; the feed's and the committing thread running.
pub(super) fn assemble(
    config: &Arc<RunConfig>,
    loaded: Loaded,
    device: Device,
    (outbox, runtime): (&Outbox, &Handle),
    run: Store,
) -> Result<(Trainer, Option<Needs>), WorkError> {
    let Loaded { networks, state, vae, text, vae_weights, digest } = loaded;
    let limits = CacheLimits { bytes: config.data.memory_bytes, ..CacheLimits::default() };
    let store = Store::open(&config.data.path)?;
    let cache = runtime.block_on(feed::cache(&config.data, &store)).map_err(FeedError::from)?;
    let data = runtime.block_on(DataSet::open_through(store, limits, cache)).map_err(FeedError::from)?;
    let data = Arc::new(data);
    let needs = device.is_cuda().then(|| Needs::read(config, data.manifest())).transpose()?;
    if let Some(needs) = &needs {
        tell_plan(needs, device);
    }
    // The text encoder that reads its prompts is gone before the feed loads one.
    let studio = Studio::load(config, device)?;
    let captions = Arc::new(runtime.block_on(Captions::open(&data, &config.data.captions))?);
    let features = FeatureSource::open(config, (&data, &captions), (&text, device), runtime)?;
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
    let flags = outbox.flags().clone();
    let feed = Feed::start(sources, config.train.steps, move || device::set_threads(threads), flags.clone())
        .map_err(|source| WorkError::System { what: "a feeding thread", source })?;
    let patience = config.workers.start_timeout.duration();
    let committer = Committer::start(run, patience, outbox.clone(), runtime.clone())
        .map_err(|source| WorkError::System { what: "a committing thread", source })?;
    let trainer = Trainer {
        config: config.clone(),
        saved: state.step,
        state,
        networks,
        graphs: Graphs::new(device),
        feed,
        collective: Box::new(Solo::default()),
        committer,
        outbox: outbox.clone(),
        flags,
        cadence: Cadence::new(&config.checkpoint, Instant::now()),
        committing: Duration::ZERO,
        studio,
        drawing: Duration::ZERO,
        began: 0,
        behind: false,
        supplied: false,
        not_finite: 0,
        seat: Seat::default(),
    };
    Ok((trainer, needs))
}

/// What of the GPU's memory is planned for, against what there is.
fn tell_plan(needs: &Needs, device: Device) {
    let plan = needs.plan(needs.config.train.micro_batch as u64);
    let limit = needs.config.workers.gpu_memory.map(|most| most.0);
    match Room::look(device, limit).map(|room| room.total.min(limit.unwrap_or(u64::MAX))) {
        Some(there) if plan.bytes > there => {
            let would = needs.fit(there).of_the_batch.map(|samples| format!("train.micro_batch = {samples} would fit"));
            let would = would.unwrap_or_else(|| "no train.micro_batch would fit".to_owned());
            tracing::warn!(there, "the GPU's memory may not suffice: planned are {plan}; {would}");
        }
        _ => tracing::info!("of the GPU's memory, planned are {plan}"),
    }
}

/// The run's folder. What is saved there may take as long as the coordinator waits for a commit: whoever gave up sooner would take the state with it.
pub(super) fn run_store(url: &str, patience: Duration) -> Result<Store, StoreError> {
    let run = Store::open(url)?;
    let limits = run.limits();
    Ok(run.with_limits(Limits { overall: limits.overall.max(patience), ..limits }))
}

/// Fails on a machine whose folder is another one than the coordinator's: its share of each commit would be lost, and with it the commit (COMMIT).
pub(super) fn check_folder(run: &Store, welcome: &Welcome, runtime: &Handle) -> Result<(), WorkError> {
    runtime.block_on(witness::elsewhere(run, welcome, "run"))?.map_or(Ok(()), |what| Err(WorkError::Elsewhere(what)))
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
    state.ledger = ledger(commit)?;
    Ok(())
}

/// What was used up to a commit, by epoch.
fn ledger(commit: &Commit) -> Result<Ledger, WorkError> {
    let mut ledger = Ledger::default();
    for epoch in 0..=commit.ledger.last().map_or(0, |last| last.epoch) {
        let Some(used) = commit.of_epoch(epoch) else { continue };
        let bad = |_| WorkError::Protocol("a ledger hash that is not 32 hex digits");
        let hash = u128::from_str_radix(&used.hash, 16).map_err(bad)?;
        ledger.add_tally(epoch, &Tally { samples: used.samples, hash });
    }
    Ok(ledger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_store::{Digest, LedgerEpoch};

    /// It costs the generation at most, and is told as what it is.
    #[test]
    fn an_address_that_means_nothing_is_the_next_ranks_fault() {
        let flags = Flags::default();
        for peer in ["1.2.3.4:99999", "no port", "nosuch.invalid:4000"] {
            let error = resolve(peer, Duration::from_millis(10), &flags).unwrap_err();
            assert!(error.is_of_the_next() && error.spares_the_rank() && !error.is_permanent(), "{error}");
        }
        assert!(resolve("127.0.0.1:4000", Duration::ZERO, &flags).is_ok());
    }

    #[test]
    fn epochs_that_a_commit_does_not_list_are_restored_too() {
        let entry = |epoch, samples, hash: u128| LedgerEpoch { epoch, samples, hash: format!("{hash:032x}") };
        let digest = Digest::of(b"");
        let commit = Commit {
            step: 10,
            generation: 1,
            world: 1,
            folder: String::new(),
            parts: Vec::new(),
            config_digest: digest,
            data_digest: digest,
            models_digest: digest,
            epoch: 3,
            step_in_epoch: 1,
            ledger: vec![entry(0, 5, 77), entry(3, 2, 9)],
            state_digest: digest,
            computed_with: Default::default(),
        };
        let found: Vec<_> = ledger(&commit).unwrap().epochs().map(|(epoch, used)| (epoch, used.samples, used.hash)).collect();
        assert_eq!(found, [(0, 5, 77), (1, 5, 77), (2, 5, 77), (3, 2, 9)]);
    }

    /// A store that is away for minutes must not end every worker, and with them all that was trained since the last commit.
    #[test]
    fn a_commit_is_tried_for_as_long_as_the_coordinator_waits_for_it() {
        let overall = |minutes: u64| run_store("some/run", Duration::from_secs(60 * minutes)).unwrap().limits().overall;
        assert_eq!((overall(10), overall(1)), (Duration::from_secs(600), Limits::default().overall));
    }

    #[test]
    fn of_a_names_addresses_the_one_is_called_where_its_worker_listens() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let open = listener.local_addr().unwrap();
        assert_eq!(answering(&[closed, open]), Some(open));
        assert_eq!((answering(&[closed]), answering(&[closed, closed]), answering(&[])), (Some(closed), Some(closed), None));
    }
}
