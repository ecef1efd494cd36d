//! The feed: the samples of a rank's lanes, step by step, ahead of the step that uses them (design.md §4 "Feed").
//!
//! One thread reads and decodes, and encodes what is not encoded ahead ([`Encoding`]); it stays at most `AHEAD` steps ahead. Meanwhile files are opened,
//! or fetched, for the windows that come next. Memory is bounded: `AHEAD` + 1 steps of assembled lanes, and `data.memory_bytes` of fetched files (mapped ones take none, local
//! or in this machine's cache).
//!
//! On a GPU all of that is on a stream of low priority, and so is what encodes ahead: the step's stream never waits for more than its own
//! input. There too `AHEAD` bounds it in bytes: the lanes that are ready lie in the GPU's memory, where [`crate::memory`] counts them.

mod assemble;
mod cache;
mod captions;
mod encoding;
mod features;
mod side;
mod staging;

pub use assemble::{Parts, Sources, order_config};
pub use cache::cache;
pub use captions::Captions;
pub use encoding::Encoding;
pub use features::{FeatureSource, spec, stored_kind};
pub use side::Mark;

use crate::control::Flags;
use crate::train::lane::LaneBatch;
use cache::Reads;
use ella_dataset::DataError;
use ella_dataset::ledger::Tally;
use ella_dataset::order::{BucketOrder, OrderError, Position};
use ella_model::ModelError;
use ella_store::digest::BadDigest;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Steps that are ready or being made ahead of the one that is computed.
pub const AHEAD: usize = 2;

/// Why there are no samples for a step.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The data set, or its features.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The order over it.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// A network that encodes.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// libtorch's own error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A GPU's streams.
    #[error("the GPU: {0}")]
    Gpu(#[from] ella_cuda::Error),
    /// A GPU's memory does not hold a batch of captions.
    #[error(
        "{said}; {batch} captions were encoded at once: fewer may fit (ella embed --batch), or let batches be halved (--split-on-oom, in a run workers.split_on_oom)"
    )]
    Batch {
        /// In libtorch's words.
        said: String,
        /// How many they were.
        batch: usize,
    },
    /// A row that cannot be used, though its shard is whole.
    #[error("{data}: sample `{key}`: {what}; prepare the data set again")]
    Row {
        /// The data set.
        data: String,
        /// The sample.
        key: String,
        /// What is wrong with it.
        what: String,
    },
    /// The data set does not suit the run.
    #[error("{data}: {what}")]
    Unsuited {
        /// The data set.
        data: String,
        /// Why, and what to do.
        what: String,
    },
    /// Features of no column at all.
    #[error("no column of captions is trained on; name one in data.captions")]
    NoColumn,
    /// A digest that is none.
    #[error(transparent)]
    Digest(#[from] BadDigest),
    /// The samples of a step did not come in time.
    #[error("no samples for the next step within {seconds} s (workers.step_timeout); look at the data set's store, or raise the timeout")]
    Late {
        /// The deadline.
        seconds: u64,
    },
    /// Nothing comes of what is done ahead of the steps.
    #[error(
        "for {seconds} s (workers.step_timeout) there were neither samples for the next step nor newly encoded captions; look at the data set's \
         store, or raise the timeout"
    )]
    Stalled {
        /// The deadline.
        seconds: u64,
    },
    /// A thread that works ahead.
    #[error("a thread cannot be started: {0}")]
    Thread(std::io::Error),
    /// The feeding thread is gone.
    #[error("the feeding thread has died")]
    Died,
}

impl FeedError {
    /// Whether a setting is at fault, whatever the data and models are.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Data(error) => error.is_usage(),
            Self::Model(error) => error.is_usage(),
            _ => false,
        }
    }

    /// Whether starting again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Data(error) => error.is_permanent(),
            Self::Model(error) => error.is_permanent(),
            Self::Torch(_)
            | Self::Gpu(_)
            | Self::Batch { .. }
            | Self::Late { .. }
            | Self::Stalled { .. }
            | Self::Thread(_)
            | Self::Died => false,
            _ => true,
        }
    }
}

/// One lane's samples, ready to compute.
#[derive(Debug)]
pub struct LaneInput {
    /// The lane.
    pub lane: u32,
    /// Its samples; `None` if the lane has none left in this epoch.
    pub batch: Option<LaneBatch>,
    /// Their keys, in the batch's order.
    pub keys: Vec<String>,
    /// The same as ONCE has them.
    pub tally: Tally,
    /// Captions replaced by the empty one by chance.
    pub dropped: i64,
    /// Samples without a caption in any of the columns: the empty one is taken.
    pub absent: i64,
    /// Captions cut at the token limit, where they were encoded for this step.
    pub truncated: i64,
}

/// All that one rank needs for one step.
#[derive(Debug)]
pub struct StepInput {
    /// Applied steps before it.
    pub step: u64,
    /// The step's epoch.
    pub epoch: u64,
    /// Samples of the whole global batch.
    pub step_samples: u64,
    /// This rank's lanes, in order.
    pub lanes: Vec<LaneInput>,
    /// This rank's share of the held-out samples, at steps that measure.
    pub held_out: Vec<LaneBatch>,
    /// Time spent in encoding, in the feeding thread.
    pub encode: Duration,
    /// Time that the step waited for this.
    pub waited: Duration,
    /// From where on it is there, on a GPU.
    pub(crate) made: Mark,
}

impl StepInput {
    /// Bytes of its tensors.
    fn bytes(&self) -> u64 {
        let batches = self.lanes.iter().filter_map(|lane| lane.batch.as_ref()).chain(&self.held_out);
        batches.flat_map(LaneBatch::tensors).map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    }

    /// Has the calling thread's stream come after the making of all this.
    fn hand_over(&self) -> Result<(), FeedError> {
        let lanes = self.lanes.iter().filter_map(|lane| lane.batch.as_ref());
        Ok(self.made.hand_over(lanes.chain(&self.held_out))?)
    }
}

/// What identifies the data of a run.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Digest of the data set's manifest.
    pub data: String,
    /// Digest of the frozen models.
    pub models: String,
}

/// Which lanes are read, from which step on.
#[derive(Clone, Debug)]
struct Deal {
    number: u64,
    lanes: Range<u32>,
    first: u64,
}

/// A step's samples, and the deal for which they were made.
#[derive(Debug)]
pub(crate) struct Made {
    deal: u64,
    input: Result<StepInput, FeedError>,
    _waiting: Waiting,
}

/// Samples that wait for their step: counted as long as this lives.
#[derive(Debug, Default)]
struct Waiting {
    bytes: u64,
    all: Arc<AtomicU64>,
}

impl Waiting {
    fn of(input: &Result<StepInput, FeedError>, all: &Arc<AtomicU64>) -> Self {
        let bytes = input.as_ref().map_or(0, StepInput::bytes);
        all.fetch_add(bytes, Relaxed);
        Self { bytes, all: Arc::clone(all) }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Relaxed);
    }
}

/// A running feed.
#[derive(Debug)]
pub struct Feed {
    ready: Receiver<Made>,
    deals: Sender<Deal>,
    /// The newest deal.
    deal: u64,
    /// Steps of a deal that have been sent.
    sent: Arc<Mutex<(u64, u64)>>,
    /// Steps of the newest deal that have been received.
    received: u64,
    order: Arc<BucketOrder>,
    identity: Identity,
    patience: Duration,
    flags: Arc<Flags>,
    reads: Reads,
    /// The next step's samples, if they have been received.
    next: Option<Result<StepInput, FeedError>>,
    encoding: Option<Arc<Encoding>>,
    /// How long the next step's samples have been awaited.
    waited: Duration,
    /// While they are: how many captions had been encoded when that last changed, and when it did.
    moved: Option<(u64, Instant)>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop_encoding();
    }
}

impl Feed {
    /// Starts a feed of the steps before `steps`. `set_up` runs first in the feeding thread. A step waits for its samples
    /// for the config's `step_timeout` (other ranks would not wait longer for this one), and not beyond the end of the generation.
    pub fn start(sources: Sources, steps: u64, set_up: impl FnOnce() + Send + 'static, flags: Arc<Flags>) -> std::io::Result<Self> {
        let (send, ready) = sync_channel(AHEAD.saturating_sub(1));
        let (deals, dealt) = channel();
        let patience = sources.patience();
        let order = sources.order();
        let identity = sources.identity().clone();
        let encoding = sources.encoding().cloned();
        let reads = Reads::of(sources.data(), encoding.as_ref());
        let sent = Arc::new(Mutex::new((0, 0)));
        let counted = Arc::clone(&sent);
        let waiting = Arc::clone(&flags.feed_bytes);
        let side = sources.side();
        std::thread::Builder::new().name("feed".into()).spawn(move || {
            set_up();
            let entered = side.enter();
            if let Err(error) = &entered {
                // Whoever waits finds that this thread is gone; all of it on the step's stream would be wrong.
                return tracing::error!("the feeding thread cannot have a stream of its own: {error}");
            }
            serve(sources, steps, &dealt, |deal, input| {
                let made = Made { deal, _waiting: Waiting::of(&input, &waiting), input };
                let there = send.send(made).is_ok();
                let mut sent = lock(&counted);
                if sent.0 == deal {
                    sent.1 += 1;
                }
                there
            });
        })?;
        let waited = Duration::ZERO;
        Ok(Self {
            ready,
            deals,
            deal: 0,
            sent,
            received: 0,
            order,
            identity,
            patience,
            flags,
            reads,
            next: None,
            encoding,
            waited,
            moved: None,
        })
    }

    /// From here on feeds these lanes, beginning with the step after `first` applied ones. What was made ahead for others is dropped.
    pub fn deal(&mut self, lanes: Range<u32>, first: u64) {
        self.deal += 1;
        *lock(&self.sent) = (self.deal, 0);
        (self.received, self.next, self.waited, self.moved) = (0, None, Duration::ZERO, None);
        // A thread that has died is found by whoever waits for it.
        drop(self.deals.send(Deal { number: self.deal, lanes, first }));
        // It may wait for room; or be so fast that what is there is of this deal already.
        while let Ok(made) = self.ready.try_recv() {
            if made.deal == self.deal {
                (self.received, self.next) = (1, Some(made.input));
                return;
            }
        }
    }

    /// The next step's samples. The stream that the calling thread is on may read them from here on: it is to be the step's.
    pub fn next_step(&mut self) -> Result<StepInput, FeedError> {
        let begin = Instant::now();
        let mut input = match self.next.take() {
            Some(there) => there?,
            None => self.receive(self.patience)?.ok_or(FeedError::Late { seconds: self.patience.as_secs() })??,
        };
        input.waited = std::mem::take(&mut self.waited) + begin.elapsed();
        self.moved = None;
        input.hand_over()?;
        Ok(input)
    }

    /// Waits for the next step's samples for at most `patience`. Whether they are there, or an error is.
    ///
    /// # Errors
    /// [`FeedError::Stalled`] if for the config's `step_timeout` no caption has been encoded ahead either.
    pub fn await_next(&mut self, patience: Duration) -> Result<bool, FeedError> {
        let begin = Instant::now();
        if self.next.is_none() {
            self.next = self.receive(patience)?;
        }
        self.waited += begin.elapsed();
        let encoded = self.encoded();
        let (before, since) = *self.moved.get_or_insert((encoded, begin));
        // What the store takes has deadlines of its own.
        if encoded != before || self.encoding.as_ref().is_some_and(|encoding| encoding.is_storing()) {
            self.moved = Some((encoded, Instant::now()));
        } else if self.next.is_none() && since.elapsed() > self.patience {
            return Err(FeedError::Stalled { seconds: self.patience.as_secs() });
        }
        Ok(self.next.is_some())
    }

    /// Whether the next step's samples are there already. They stay where they are.
    pub fn has_next(&self) -> bool {
        self.next.is_some() || *lock(&self.sent) > (self.deal, self.received)
    }

    fn receive(&mut self, patience: Duration) -> Result<Option<Result<StepInput, FeedError>>, FeedError> {
        let until = Instant::now() + patience;
        loop {
            match self.flags.receive(&self.ready, until.saturating_duration_since(Instant::now())) {
                Ok(Made { deal, input, .. }) if deal == self.deal => {
                    self.received += 1;
                    return Ok(Some(input));
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(FeedError::Died),
            }
        }
    }

    /// Captions encoded ahead so far.
    pub fn encoded(&self) -> u64 {
        self.encoding.as_ref().map_or(0, |encoding| encoding.encoded())
    }

    /// Whether an encoder for what is encoded ahead is in memory: it goes once all its features are there.
    pub fn holds_encoder(&self) -> bool {
        self.encoding.as_ref().is_some_and(|encoding| encoding.holds_encoder())
    }

    /// Has captions no longer encoded ahead.
    pub fn stop_encoding(&self) {
        self.encoding.iter().for_each(|encoding| encoding.stop());
    }

    /// Writes the manifests of sidecars that were made ahead and are whole now.
    pub fn finish_features(&self) -> Result<(), FeedError> {
        self.encoding.as_ref().map_or(Ok(()), |encoding| encoding.finish())
    }

    /// What reading through this machine's cache came to since the last call, by name (KNOWN).
    pub fn reads(&mut self) -> std::collections::HashMap<String, u64> {
        self.reads.news()
    }

    /// Where the data goes on after `step` steps.
    pub fn position(&self, step: u64) -> Position {
        self.order.position(step)
    }

    /// Samples in an epoch.
    pub fn samples_per_epoch(&self) -> u64 {
        self.order.samples()
    }

    /// What identifies the data.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

/// Sends the steps of one deal after the other, each until a step fails, until nobody listens any more.
fn serve(mut sources: Sources, steps: u64, deals: &Receiver<Deal>, mut send: impl FnMut(u64, Result<StepInput, FeedError>) -> bool) {
    let mut next = deals.recv().ok();
    while let Some(mut deal) = next.take() {
        // Only the newest is of interest.
        while let Ok(newer) = deals.try_recv() {
            deal = newer;
        }
        let number = deal.number;
        let mut failed = sources.start_ahead(&deal.lanes, deal.first).err();
        for step in deal.first..steps {
            let input = failed.take().map_or_else(|| sources.step(step, &deal.lanes), Err);
            let is_last = input.is_err();
            if !send(number, input) {
                return;
            }
            next = deals.try_recv().ok();
            if is_last || next.is_some() {
                break;
            }
        }
        next = next.or_else(|| deals.recv().ok());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The contiguous lanes that `rank` of `world` owns; sizes differ by at most one.
pub fn lanes_of(rank: u32, world: u32, lanes: u32) -> Range<u32> {
    let edge = |r: u32| (u64::from(r) * u64::from(lanes) / u64::from(world.max(1))) as u32;
    edge(rank)..edge(rank + 1)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use ella_dataset::order::OrderConfig;
    use std::sync::mpsc::SyncSender;

    /// What a feed sends.
    pub(crate) fn made(input: Result<StepInput, FeedError>) -> Made {
        Made { deal: 0, input, _waiting: Waiting::default() }
    }

    /// A feed of what a test sends, which is waited for so long.
    pub(crate) fn fed_by_hand(patience: Duration) -> (SyncSender<Made>, Feed) {
        let order = BucketOrder::new(OrderConfig { seed: 0, lanes: 1, micro_batch: 1, window: 1 }, &[((), 1)]).unwrap();
        let (send, ready) = sync_channel(1);
        let identity = Identity { data: String::new(), models: String::new() };
        let (order, flags, reads, sent, waited) = (Arc::new(order), Arc::default(), Reads::default(), Arc::default(), Duration::ZERO);
        let (deals, deal, received) = (channel().0, 0, 0);
        let (next, encoding, moved) = (None, None, None);
        let feed = Feed { ready, deals, deal, sent, received, order, identity, patience, flags, reads, next, encoding, waited, moved };
        (send, feed)
    }

    /// A step without a sample.
    pub(crate) fn nothing() -> StepInput {
        let (encode, waited) = (Duration::ZERO, Duration::ZERO);
        let made = Mark::default();
        StepInput { step: 0, epoch: 0, step_samples: 0, lanes: Vec::new(), held_out: Vec::new(), encode, waited, made }
    }

    /// ONCE: a rank that lost the first step of its lanes would train on the next one's samples in its place, and nobody would know.
    #[test]
    fn what_is_made_before_the_deal_has_returned_is_kept() {
        let (send, mut feed) = fed_by_hand(Duration::from_secs(5));
        // The thread is faster than who deals.
        let dealt = |epoch| Made { deal: 1, ..made(Ok(StepInput { epoch, ..nothing() })) };
        send.send(dealt(3)).unwrap();
        feed.deal(0..1, 7);
        assert!(feed.has_next());
        send.send(dealt(4)).unwrap();
        assert_eq!((feed.next_step().unwrap().epoch, feed.next_step().unwrap().epoch), (3, 4));
        // What was made for others is dropped.
        send.send(dealt(5)).unwrap();
        feed.deal(0..1, 9);
        assert!(feed.next.is_none() && feed.ready.try_recv().is_err());
    }

    #[test]
    fn samples_are_counted_as_long_as_they_wait() {
        use tch::{Device, Kind, Tensor};
        let zeros = |kind| Tensor::zeros([2, 8], (kind, Device::Cpu));
        let batch = LaneBatch {
            latents: zeros(Kind::Float),
            noise: zeros(Kind::Float),
            timesteps: zeros(Kind::Int64),
            features: zeros(Kind::Half),
            mask: None,
            time_ids: zeros(Kind::Float),
        };
        let all = Arc::new(AtomicU64::new(0));
        let input = Ok(StepInput { held_out: vec![batch], ..nothing() });
        let waiting = Waiting::of(&input, &all);
        assert_eq!(all.load(Relaxed), 16 * (4 + 4 + 8 + 2 + 4));
        drop((waiting, Waiting::of(&Err(FeedError::Died), &all)));
        assert_eq!(all.load(Relaxed), 0);
    }

    /// LIVE: neither a feed that hangs nor one whose thread has died is waited for in vain.
    #[test]
    fn samples_that_do_not_come_are_not_waited_for_for_ever() {
        let (send, mut feed) = fed_by_hand(Duration::from_millis(5));
        let late = feed.next_step().unwrap_err();
        assert!(matches!(late, FeedError::Late { .. }) && !late.is_permanent() && late.to_string().contains("workers.step_timeout"));
        send.send(made(Err(FeedError::Died))).unwrap();
        assert!(matches!(feed.next_step(), Err(FeedError::Died)));
        drop(send);
        assert!(matches!(feed.next_step(), Err(FeedError::Died)));
    }

    #[test]
    fn ranks_share_all_lanes_out_evenly() {
        for lanes in 1..40 {
            for world in 1..=lanes {
                let shares: Vec<_> = (0..world).map(|rank| lanes_of(rank, world, lanes)).collect();
                assert_eq!(shares.iter().flat_map(|s| s.clone()).collect::<Vec<_>>(), (0..lanes).collect::<Vec<_>>());
                let sizes = shares.iter().map(ExactSizeIterator::len);
                assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            }
        }
    }
}
