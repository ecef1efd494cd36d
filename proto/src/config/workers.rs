//! `[workers]`: the processes that train.

use super::{Bytes, Millis};
use serde::{Deserialize, Serialize};

/// Where workers compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The GPU if there is one.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What becomes of a rank that others wait for much longer than for any before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Straggler {
    /// It is named; past `workers.step_timeout` it is let go.
    #[default]
    Warn,
    /// It is let go at once.
    Evict,
}

/// `[workers]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// How many a run begins with; `ella train` starts so many.
    pub count: usize,
    /// Training goes on while there are at least so many.
    pub min: usize,
    /// More than so many are spares, as are more than there are lanes; absent: only those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<usize>,
    /// How long workers that come while training goes on wait for others to join with them.
    pub join_window: Millis,
    /// What becomes of a rank that others wait for much longer than for any before.
    pub straggler: Straggler,
    /// Where they compute. A run goes on with the kind of device that its last commit was trained on; with another one only if that is named here.
    pub device: Device,
    /// Intra-op threads of each: part of SAME, as it changes the order of sums inside a kernel.
    pub threads: usize,
    /// Whether a GPU may round float32 to 10 bits of mantissa in matrix products and convolutions: faster, and part of SAME.
    pub tf32: bool,
    /// The most that each takes of its GPU's memory, which leaves the rest to others there; absent: all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<Bytes>,
    /// Whether a lane that runs out of a GPU's memory is computed again in halves. Only with `train.reduction = "fast"`.
    pub split_on_oom: bool,
    /// A worker not heard of for this long is lost.
    pub lease: Millis,
    /// A worker that has been without a coordinator for this long (it is gone, stopped, or cut off) stops itself.
    pub orphan_timeout: Millis,
    /// A collective that waits for this long has failed.
    pub step_timeout: Millis,
    /// How long the coordinator waits for the workers to come, and for them to load; and how long a commit may take.
    pub start_timeout: Millis,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            count: 1,
            min: 1,
            max: None,
            join_window: Millis(2_000),
            straggler: Straggler::Warn,
            device: Device::Auto,
            threads: 1,
            tf32: false,
            gpu_memory: None,
            split_on_oom: false,
            lease: Millis(10_000),
            orphan_timeout: Millis(60_000),
            step_timeout: Millis(120_000),
            start_timeout: Millis(600_000),
        }
    }
}
