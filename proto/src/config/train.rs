//! How it is trained, and when that is committed: `[train]` and `[checkpoint]`.

use super::Millis;
use serde::{Deserialize, Serialize};

/// How lane gradients are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// In 64-bit fixed point: the sum does not depend on how lanes are dealt (SAME).
    #[default]
    Exact,
    /// In float32, in the engine's order.
    Fast,
}

/// What the gradient's sum goes over the wire in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As it is summed.
    #[default]
    None,
    /// bfloat16: half the bytes of float32. Each rank's sum is rounded once, and each addition on the way once more.
    Bf16,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Train {
    /// Optimizer updates in all.
    pub steps: u64,
    /// Samples per step.
    pub global_batch: usize,
    /// Samples per lane. `global_batch / micro_batch` is the number of lanes, and the most workers that there can be.
    pub micro_batch: usize,
    /// How lane gradients are summed: `exact` gives the same bytes for any number of workers.
    pub reduction: Reduction,
    /// What the sum goes over the wire in; `none` where the reduction is exact.
    pub compression: Compression,
    /// At most so many steps in a row whose loss or gradient is not finite are left out and counted, before the run stops for one. The samples of each
    /// are listed in the run's folder, in `failed/`.
    pub skip_nonfinite: usize,
    /// Probability that a caption is replaced by the empty one, for classifier-free guidance.
    pub caption_dropout: f64,
    /// Largest gradient norm; 0 turns clipping off.
    pub grad_clip: f64,
    /// Decay of the exponential moving average of the weights; in the first steps less: at most (1 + step) / (10 + step).
    pub ema_decay: f64,
    /// Min-SNR weighting (arXiv 2303.09556); left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snr_gamma: Option<f64>,
    /// Make the U-Net's gradient block by block: a second forward pass for the memory of one block's activations.
    pub gradient_checkpointing: bool,
    /// Measure the loss on held-out noise before the first step, every so many steps, and before the last; 0: never.
    pub eval_every: u64,
    /// On so many samples: the first of the data set.
    pub eval_samples: usize,
    /// AdamW.
    pub optimizer: Optimizer,
    /// Learning rate over steps.
    pub schedule: Schedule,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            steps: 1000,
            global_batch: 32,
            micro_batch: 8,
            reduction: Reduction::Exact,
            compression: Compression::None,
            skip_nonfinite: 0,
            caption_dropout: 0.1,
            grad_clip: 1.0,
            ema_decay: 0.9999,
            snr_gamma: None,
            gradient_checkpointing: false,
            eval_every: 50,
            eval_samples: 16,
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
        }
    }
}

impl Train {
    /// How many lanes the global batch has.
    pub fn lanes(&self) -> usize {
        self.global_batch / self.micro_batch
    }
}

/// `[train.optimizer]`: AdamW (arXiv 1711.05101), as `torch.optim.AdamW` computes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Peak learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decays of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self { lr: 1e-4, weight_decay: 0.01, betas: [0.9, 0.999], eps: 1e-8 }
    }
}

/// How the learning rate goes after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays.
    #[default]
    Constant,
    /// Half a cosine, down to zero at the last step.
    Cosine,
}

/// `[train.schedule]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// What comes after the warm-up.
    pub kind: ScheduleKind,
    /// Steps over which the rate rises linearly from zero.
    pub warmup: u64,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Commit every so many steps; left out: 100, unless `max_lost_work` says how often. The last step is committed in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Commit so often, by the measured time of a save, that no more work than this is lost; of a store that takes longer the workers' logs tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_lost_work: Option<Millis>,
    /// How many of the newest commits stay.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every: None, max_lost_work: None, keep: 3 }
    }
}

impl Checkpoint {
    /// Every how many steps to commit; none: by the clock only.
    pub fn steps(&self) -> Option<u64> {
        self.every.or_else(|| self.max_lost_work.is_none().then_some(100))
    }
}
