//! Scores that others have published, as they were read in the sources named. All are of mPLUG's answers. The categories beside the score come
//! from the official script, in which they count the last tile alone and, in several processes, are mixed up: they are worth little. So are
//! differences of one or two points of the score: people who tried to reproduce published ones were off by as much and more
//! (FoundationVision/Infinity issue 103, JiuhaiChen/BLIP3o issues 46 and 48).

/// The categories of the first level, in the order of the published tables.
pub(super) const LEVEL1: [&str; 5] = ["global", "entity", "attribute", "relation", "other"];

/// Prompts of DPG-Bench itself.
pub(super) const PROMPTS: usize = 1065;

/// Where scores were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment, Table 4.
    Paper,
    /// The README of HiDream-ai/HiDream-O1-Image: its own models' and, copied, those of others.
    HiDream,
    /// The README of THUDM/CogView4.
    CogView4,
    /// nnnth/UniLIP issue 4.
    UniLip,
}

impl Source {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Paper => "arXiv 2403.05135, Table 4",
            Self::HiDream => "HiDream-O1-Image README, self-reported or copied",
            Self::CogView4 => "CogView4 README, self-reported",
            Self::UniLip => "nnnth/UniLIP issue 4",
        }
    }
}

/// One model's scores, in per cent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Published {
    pub(super) model: &'static str,
    pub(super) score: f64,
    /// In the order of [`LEVEL1`].
    pub(super) level1: Option<[f64; 5]>,
    pub(super) source: Source,
}

const fn of(model: &'static str, score: f64, level1: [f64; 5], source: Source) -> Published {
    Published { model, score, level1: Some(level1), source }
}

const fn alone(model: &'static str, score: f64, source: Source) -> Published {
    Published { model, score, level1: None, source }
}

use Source::{CogView4, HiDream, Paper, UniLip};

/// From the lowest score to the highest.
pub(super) const TABLE: [Published; 26] = [
    of("SD v1.5", 63.18, [74.63, 74.23, 75.39, 73.49, 67.81], Paper),
    of("SD v2", 68.09, [77.67, 78.13, 74.91, 80.72, 80.66], Paper),
    of("PixArt-α", 71.11, [74.97, 79.32, 78.60, 82.57, 76.96], Paper),
    of("Playground v2", 74.54, [83.61, 79.91, 82.67, 80.62, 81.22], Paper),
    of("Lumina-Next", 74.63, [82.82, 88.65, 86.44, 80.53, 81.82], HiDream),
    of("SDXL", 74.65, [83.27, 82.43, 80.91, 86.76, 80.41], Paper),
    of("ELLA SD1.5", 74.91, [84.03, 84.61, 83.48, 84.03, 80.79], Paper),
    of("Hunyuan-DiT", 78.87, [84.59, 80.59, 88.01, 74.36, 86.41], HiDream),
    of("ELLA SDXL", 80.23, [85.90, 85.34, 86.67, 86.16, 87.41], Paper),
    of("Emu3-Gen", 80.60, [85.21, 86.68, 86.84, 90.22, 83.15], HiDream),
    of("DALL-E 3", 83.50, [90.97, 89.61, 88.39, 90.58, 89.83], Paper),
    of("FLUX.1-dev", 83.84, [74.35, 90.00, 88.96, 90.87, 88.33], HiDream),
    of("SD3-Medium", 84.08, [87.90, 91.01, 88.83, 80.70, 88.68], HiDream),
    of("Janus-Pro-7B", 84.19, [86.90, 88.90, 89.40, 89.32, 89.48], HiDream),
    alone("UniLIP-1B", 84.22, UniLip),
    alone("UniLIP-3B", 84.63, UniLip),
    of("Z-Image-Turbo", 84.86, [91.29, 89.59, 90.14, 92.16, 88.68], HiDream),
    of("CogView4-6B", 85.13, [83.85, 90.35, 91.17, 91.14, 87.29], CogView4),
    of("GPT Image 1", 85.15, [88.89, 88.94, 89.84, 92.63, 90.96], HiDream),
    of("HiDream-I1", 85.89, [76.44, 90.22, 89.48, 93.74, 91.83], HiDream),
    of("GPT Image 2", 85.98, [87.27, 91.91, 90.85, 91.59, 91.58], HiDream),
    of("FLUX.2-dev", 87.57, [92.20, 91.36, 93.28, 93.52, 89.72], HiDream),
    of("Qwen-Image", 88.32, [91.32, 91.56, 92.02, 94.31, 92.73], HiDream),
    of("Seedream 4.0", 88.63, [87.17, 92.41, 92.29, 93.33, 95.48], HiDream),
    of("HiDream-O1-Image", 89.83, [95.15, 92.32, 93.74, 92.88, 90.25], HiDream),
    of("HiDream-O1-Image-Pro", 90.30, [94.97, 95.42, 92.59, 90.82, 89.50], HiDream),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_in_range() {
        assert!(TABLE.is_sorted_by(|a, b| a.score <= b.score));
        let all = TABLE.iter().flat_map(|row| row.level1.into_iter().flatten().chain([row.score]));
        assert!(all.into_iter().all(|score| (50.0..100.0).contains(&score)));
    }
}
