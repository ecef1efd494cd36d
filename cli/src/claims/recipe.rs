//! How much of everything.

use clap::ValueEnum;
use serde::Serialize;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// Two linear maps of each token
    Mlp,
    /// One perceiver block that knows no time
    #[serde(rename = "resampler-1")]
    #[value(name = "resampler-1")]
    Resampler1,
    /// Six of them
    #[serde(rename = "resampler-6")]
    #[value(name = "resampler-6")]
    Resampler6,
    /// Six that a gate from the timestep opens
    TscZero,
    /// Six whose norms know the timestep: ELLA's
    Tsc,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [Self::Mlp, Self::Resampler1, Self::Resampler6, Self::TscZero, Self::Tsc];

    /// As the paper's Table 6 calls it.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Mlp => "MLP",
            Self::Resampler1 => "Resampler × 1",
            Self::Resampler6 => "Resampler × 6",
            Self::TscZero => "TSC, AdaLN-Zero",
            Self::Tsc => "TSC",
        }
    }

    /// The score on DPG-Bench that the paper's Table 6 gives it.
    pub(super) fn in_paper(self) -> f64 {
        match self {
            Self::Mlp => 62.55,
            Self::Resampler1 => 66.39,
            Self::Resampler6 => 70.27,
            Self::TscZero => 70.43,
            Self::Tsc => 72.91,
        }
    }

    /// Its name in `connector.kind`, and its blocks.
    pub(super) fn settings(self) -> (&'static str, u32) {
        match self {
            Self::Mlp => ("mlp", 6),
            Self::Resampler1 => ("resampler", 1),
            Self::Resampler6 => ("resampler", 6),
            Self::TscZero => ("tsc-zero", 6),
            Self::Tsc => ("tsc", 6),
        }
    }

    /// How captions become rows. Each at its own length, as the miniature's encoder learnt to read them; but an MLP makes a state of every position, all of
    /// which the U-Net attends to, so its rows must be filled up.
    pub(super) fn padding(self) -> &'static str {
        if self == Self::Mlp { "fixed" } else { "none" }
    }

    /// The name of its training from a seed.
    pub(super) fn run(self, seed: u64) -> String {
        let (kind, layers) = self.settings();
        format!("{kind}-{layers}-seed-{seed}")
    }
}

/// The name of the base's own pictures, from the noise of a seed.
pub(super) fn base_run(seed: u64) -> String {
    format!("base-seed-{seed}")
}

/// The same with a LoRA.
pub(super) fn with_lora(run: &str) -> String {
    format!("{run}-lora")
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Recipe {
    /// Scenes that connectors are trained on.
    pub(super) scenes: u64,
    /// Updates of each.
    pub(super) steps: u64,
    /// Samples in an update.
    pub(super) batch: u64,
    pub(super) lr: f64,
    pub(super) kinds: Vec<Kind>,
    /// Of trainings, and of the noise that their pictures are drawn from.
    pub(super) seeds: Vec<u64>,
    /// Dense prompts, and as many short ones; four pictures of each.
    pub(super) prompts: u64,
    /// How pictures are drawn.
    pub(super) sampling_steps: u32,
    pub(super) guidance: f64,
}

impl Recipe {
    pub(super) fn full() -> Self {
        Self {
            scenes: 24_000,
            steps: 600,
            batch: 128,
            lr: 3e-3,
            kinds: Kind::ALL.to_vec(),
            seeds: vec![1, 2, 3],
            prompts: 80,
            sampling_steps: 20,
            guidance: 3.0,
        }
    }

    pub(super) fn quick() -> Self {
        Self { scenes: 16_000, steps: 600, kinds: vec![Kind::Tsc], seeds: vec![1], prompts: 40, ..Self::full() }
    }
}
