//! Training: the loop, and one step of it. Everything that is trained lies in flat buffers: one collective, one update, one file each.

pub mod lane;
pub mod optimizer;
pub mod state;
pub mod stats;

use crate::commit::{CommitError, Committer};
use crate::control::{Flags, Outbox};
use crate::feed::{Feed, FeedError, StepInput};
use crate::reduce::fixed::{self, FixedError, FixedPoint};
use crate::reduce::{Collective, CollectiveError};
use ella_dataset::ledger::LedgerError;
use ella_model::ModelError;
use ella_proto::config::{Reduction, RunConfig, Train};
use ella_proto::v1::{FailureKind, Progress, StepParts};
use lane::Networks;
use state::TrainState;
use stats::{StepStats, WORDS};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Why training stopped short.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// libtorch's own error.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// A network's error.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The data's error.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// A peer is gone, or late, or does something else.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A gradient outside what `exact` reduction holds, or not finite.
    #[error("step {step}, lane {lane}: {source}; lower train.optimizer.lr, or look at the samples of this step")]
    Gradient {
        /// The step.
        step: u64,
        /// The lane.
        lane: u32,
        /// What is wrong with it.
        source: FixedError,
    },
    /// The sums of a step cannot be formed.
    #[error(transparent)]
    Sum(#[from] FixedError),
    /// The summed gradient is not finite.
    #[error("step {step}: the gradient's norm is {norm}; lower train.optimizer.lr, or look at the samples of this step")]
    NotFinite {
        /// The step.
        step: u64,
        /// The norm.
        norm: f64,
    },
    /// The ranks' sums do not make sense.
    #[error("step {step}: {source}")]
    Ledger {
        /// The step.
        step: u64,
        /// What is wrong.
        source: LedgerError,
    },
    /// A commit could not be saved.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The run was ended from outside.
    #[error("{0}")]
    Stopped(String),
}

impl TrainError {
    /// What to tell the coordinator: the kind, and whether starting again would fail in the same way.
    pub fn failure(&self) -> (FailureKind, bool) {
        match self {
            Self::Torch(_) | Self::Sum(_) => (FailureKind::Internal, false),
            Self::Model(_) => (FailureKind::Input, true),
            Self::Feed(error) => (FailureKind::Input, error.is_permanent()),
            Self::Collective(_) | Self::Stopped(_) => (FailureKind::Collective, false),
            // The same step gives the same numbers (SAME), so a restart would end here again.
            Self::Gradient { .. } | Self::NotFinite { .. } | Self::Ledger { .. } => (FailureKind::Numeric, true),
            Self::Commit(_) => (FailureKind::Store, false),
        }
    }
}

/// How training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All steps are applied.
    Done,
    /// It was asked to leave; what was done is committed.
    Preempted,
}

/// One rank's training.
#[derive(Debug)]
pub struct Trainer {
    /// The run's config.
    pub config: Arc<RunConfig>,
    /// What is trained.
    pub state: TrainState,
    /// The networks; the connector's tensors are views into the state.
    pub networks: Networks,
    /// The samples of this rank's lanes.
    pub feed: Feed,
    /// The other ranks.
    pub collective: Box<dyn Collective>,
    /// Saves.
    pub committer: Committer,
    /// Tells the coordinator.
    pub outbox: Outbox,
    /// What the coordinator, or a signal, asks for.
    pub flags: Arc<Flags>,
}

impl Trainer {
    /// Trains until the last step, or until a rank is asked to leave.
    pub fn run(&mut self) -> Result<Ending, TrainError> {
        while self.state.step < self.config.train.steps {
            let input = self.feed.next()?;
            let stats = self.step(input)?;
            let step = self.state.step;
            let leaving = stats.leaving > 0;
            if leaving || step.is_multiple_of(self.config.checkpoint.every) || step == self.config.train.steps {
                self.committer.save(self.state.snapshot()?, self.feed.position(step))?;
            }
            if leaving {
                return Ok(Ending::Preempted);
            }
            if self.committer.has_failed() {
                self.committer.finish()?;
            }
        }
        Ok(Ending::Done)
    }

    /// Applies one step and returns its sums over all ranks.
    fn step(&mut self, input: StepInput) -> Result<StepStats, TrainError> {
        let begin = Instant::now();
        let mut times = Times { data: input.waited, encode: input.encode, ..Times::default() };
        let number = self.state.step + 1;
        let mut mine = StepStats::of_one_rank(self.flags.drain.load(Ordering::Relaxed));
        for batch in &input.held_out {
            mine.add_held_out(self.networks.evaluate(batch)?, batch.len());
        }
        let mut sum = Sum::new(&self.config.train, self.state.layout.total(), self.state.buffers.params.device())?;
        for lane in &input.lanes {
            mine.tally.merge(&lane.tally);
            mine.dropped += lane.dropped;
            mine.truncated += lane.truncated;
            let Some(batch) = &lane.batch else { continue };
            let gradient = self.networks.gradient(batch, input.step_samples)?;
            mine.add_loss(gradient.loss_sum);
            times.forward += gradient.forward;
            times.backward += gradient.backward;
            sum.add(&gradient.grad).map_err(|source| TrainError::Gradient { step: number, lane: lane.lane, source })?;
        }
        let reducing = Instant::now();
        let (mut grad, words) = sum.reduce(self.collective.as_mut(), mine.words())?;
        times.reduce = reducing.elapsed();
        let all = StepStats::from_words(&words).map_err(|source| TrainError::Ledger { step: number, source })?;

        let updating = Instant::now();
        let norm = optimizer::clip(&mut grad, self.config.train.grad_clip)?;
        if !norm.is_finite() {
            return Err(TrainError::NotFinite { step: number, norm });
        }
        optimizer::update(&mut self.state.buffers, &grad, &self.config.train, number)?;
        self.state.step = number;
        self.state.ledger.add_tally(input.epoch, &all.tally);
        self.flags.step.store(number, Ordering::Relaxed);
        times.update = updating.elapsed();
        self.report(&all, norm, begin.elapsed() + input.waited, &times);
        Ok(all)
    }

    fn report(&self, all: &StepStats, norm: f64, took: Duration, times: &Times) {
        let step = self.state.step;
        let mut skipped = std::collections::HashMap::new();
        for (name, count) in [("captions_dropped", all.dropped), ("captions_truncated", all.truncated)] {
            if count > 0 {
                skipped.insert(name.to_owned(), count as u64);
            }
        }
        self.outbox.progress(Progress {
            step,
            samples: all.tally.samples,
            loss: all.mean_loss(),
            grad_norm: norm,
            learning_rate: optimizer::learning_rate(&self.config.train, step),
            step_seconds: took.as_secs_f64(),
            parts: Some(times.parts()),
            skipped,
            held_out_loss: all.mean_held_out(),
            at_unix_ms: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
        });
    }
}

/// The gradient's sum over lanes, and then over ranks.
enum Sum {
    /// Integers `[P + WORDS]`: the gradient in fixed point, then the step's own sums.
    Exact(Tensor, FixedPoint),
    /// Floats `[P]`.
    Fast(Tensor),
}

impl Sum {
    fn new(train: &Train, params: i64, device: Device) -> Result<Self, TrainError> {
        Ok(match train.reduction {
            Reduction::Exact => Self::Exact(fixed::zeros(params + WORDS as i64, device)?, FixedPoint::new(train.lanes() as u32)),
            Reduction::Fast => Self::Fast(Tensor::f_zeros([params], (Kind::Float, device))?),
        })
    }

    fn add(&mut self, grad: &Tensor) -> Result<(), FixedError> {
        match self {
            Self::Exact(sum, fixed) => fixed.add(&mut sum.f_narrow(0, 0, grad.size()[0])?, grad),
            Self::Fast(sum) => Ok(drop(sum.f_add_(grad)?)),
        }
    }

    /// The gradient `[P]` float32 and the step's sums, over all ranks.
    fn reduce(self, collective: &mut dyn Collective, mut words: [i64; WORDS]) -> Result<(Tensor, [i64; WORDS]), TrainError> {
        match self {
            Self::Exact(mut sum, _) => {
                let params = sum.size()[0] - WORDS as i64;
                sum.f_narrow(0, params, WORDS as i64)?.f_copy_(&Tensor::f_from_slice(&words)?)?;
                collective.sum_tensor(&mut sum)?;
                sum.f_narrow(0, params, WORDS as i64)?.f_to_device(Device::Cpu)?.f_copy_data(&mut words, WORDS)?;
                Ok((fixed::to_f32(&sum.f_narrow(0, 0, params)?)?, words))
            }
            Self::Fast(mut sum) => {
                collective.sum_tensor(&mut sum)?;
                collective.sum_i64(&mut words)?;
                Ok((sum, words))
            }
        }
    }
}

/// Where the time of a step went.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    data: Duration,
    encode: Duration,
    forward: Duration,
    backward: Duration,
    reduce: Duration,
    update: Duration,
}

impl Times {
    fn parts(&self) -> StepParts {
        StepParts {
            data: self.data.as_secs_f64(),
            encode: self.encode.as_secs_f64(),
            forward: self.forward.as_secs_f64(),
            backward: self.backward.as_secs_f64(),
            reduce: self.reduce.as_secs_f64(),
            update: self.update.as_secs_f64(),
            commit: 0.0,
        }
    }
}
