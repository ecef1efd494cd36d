//! How a GPU may round: the one place where libtorch's global choices are made, and why.
//!
//! | what | choice | because |
//! |---|---|---|
//! | TF32 in products and convolutions of float32 | off, unless `workers.tf32` | fp32 means fp32. libtorch's own default is on for convolutions, which costs 13 of 23 bits of mantissa and says so nowhere. It is part of a run's digest (SAME). |
//! | deterministic algorithms | with `train.reduction = "exact"` | SAME: the same bits over two runs on like GPUs. libtorch then takes attention's and cuDNN's deterministic kernels, and refuses an operation that has none. |
//! | cuDNN's search for the fastest algorithm, and our own between its attention and ours | only with `reduction = "fast"` | It takes what was fastest in this process today: another one may round elsewhere. |
//! | `CUBLAS_WORKSPACE_CONFIG=:4096:8` | always, before CUDA starts | cuBLAS gives the same bits only with workspaces of a fixed size, which it reads once, long before a run's config is known. It is what libtorch takes on Hopper anyway, 32 MiB, and elsewhere costs 24 MiB. |
//!
//! The rest follows from dtypes: frozen networks compute in `base.dtype`, norms and softmax in float32 at all times; weights that train, their
//! moments, their average, losses and gradients are float32, and sums over lanes too, or 64-bit fixed point. In float16 a lane's loss is
//! scaled by a power of two that follows from the batch alone (`train::lane`): nothing is searched for while training, so that a resume or another
//! worker scales as well (SAME).

use ella_proto::config::{Reduction, RunConfig};
use tch::Device;

/// The variable that cuBLAS reads when it starts, and its value.
pub const WORKSPACE: (&str, &str) = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8");

/// What is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Products and convolutions of float32 in TF32.
    pub tf32: bool,
    /// The same bits each time.
    pub deterministic: bool,
}

impl Precision {
    /// For features and latents, which are written once and must not depend on who computes them.
    pub const OF_FILES: Self = Self { tf32: false, deterministic: true };

    /// A run's.
    pub fn of(config: &RunConfig) -> Self {
        Self { tf32: config.workers.tf32, deterministic: config.train.reduction == Reduction::Exact }
    }

    /// Has this process compute so. On a processor nothing of it makes a difference, and nothing is changed.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn set(self, device: Device) -> Result<(), ella_cuda::Error> {
        if !device.is_cuda() {
            return Ok(());
        }
        ella_cuda::precision::set_tf32(self.tf32)?;
        ella_cuda::precision::set_deterministic(self.deterministic)?;
        ella_cuda::precision::set_benchmark(!self.deterministic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_runs_are_deterministic_and_tf32_is_asked_for() {
        let of = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(|item| (*item).to_owned()).collect();
            let toml = "[run]\noutput = \"o\"\n[base]\nmodel = \"b\"\n[text]\nmodel = \"t\"\n[data]\npath = \"d\"\n";
            Precision::of(&RunConfig::parse(toml, "run.toml", &set).unwrap())
        };
        assert_eq!(of(&[]), Precision { tf32: false, deterministic: true });
        assert_eq!(of(&["train.reduction=fast", "workers.tf32=true"]), Precision { tf32: true, deterministic: false });
        Precision { tf32: true, deterministic: false }.set(Device::Cpu).unwrap();
    }
}
