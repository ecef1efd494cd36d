//! `[sample]`: pictures that a run draws as it trains.

use super::ConfigError;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most pictures of a step: their files have names of three digits.
pub(super) const MOST_PICTURES: u64 = 1000;
/// Longest side of a picture in pixels.
pub const LONGEST_SIDE: i64 = 1 << 14;

/// How a sampler steps from noise to picture, by the names of `ella sample`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sampler {
    /// DDIM without noise.
    #[default]
    #[serde(rename = "ddim")]
    Ddim,
    /// Euler.
    #[serde(rename = "euler")]
    Euler,
    /// Euler ancestral.
    #[serde(rename = "euler-a")]
    EulerAncestral,
    /// DPM-Solver++ (2M).
    #[serde(rename = "dpm++2m")]
    Dpm2M,
    /// The same with Karras's noise levels.
    #[serde(rename = "dpm++2m-karras")]
    Dpm2MKarras,
}

/// `[sample]`. It changes no trained bit, and may change when a run is resumed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sample {
    /// Draw after every so many steps; 0: never.
    pub every: u64,
    /// What to draw.
    pub prompts: Vec<String>,
    /// A file with a prompt on each line, instead. It is read where the config is, and its lines stand in `prompts` from then on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts_file: Option<PathBuf>,
    /// Pictures of each prompt.
    pub images: u32,
    /// Seed of each prompt's first picture; those of its next ones count up.
    pub seed: u64,
    /// Steps from noise to picture.
    pub steps: u32,
    /// How much the prompt counts beside the negative one; 1: no guidance.
    pub guidance: f64,
    /// Of a picture; left out: the base's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// How to step.
    pub sampler: Sampler,
    /// What not to draw; left out: the empty text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub negative: Option<String>,
    /// Draw with the moving average of the weights.
    pub average: bool,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            every: 0,
            prompts: Vec::new(),
            prompts_file: None,
            images: 1,
            seed: 0,
            steps: 50,
            guidance: 7.5,
            size: None,
            sampler: Sampler::Ddim,
            negative: None,
            average: true,
        }
    }
}

impl Sample {
    /// Whether the samples of this step are to be drawn.
    pub fn is_due(&self, step: u64) -> bool {
        step > 0 && self.every > 0 && step.is_multiple_of(self.every)
    }

    /// Reads `prompts_file` into `prompts`.
    pub(super) fn read_prompts(&mut self, origin: &str) -> Result<(), ConfigError> {
        let Some(file) = self.prompts_file.take() else { return Ok(()) };
        let wrong = |rule: String| {
            let (origin, found) = (origin.to_owned(), format!("{:?}", file.display().to_string()));
            ConfigError::Value { origin, key: "sample.prompts_file", rule, found }
        };
        if !self.prompts.is_empty() {
            return Err(wrong("sample.prompts is given too; leave out one of them".to_owned()));
        }
        self.prompts = lines_of(&file).map_err(|why| wrong(format!("it {why}")))?;
        Ok(())
    }
}

/// A file's lines that are not empty.
fn lines_of(file: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(file).map_err(|source| format!("cannot be read ({source})"))?;
    let lines: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if lines.is_empty() { Err("must have a prompt on each line, and has none".to_owned()) } else { Ok(lines) }
}

/// Width and height of a picture in pixels; in TOML a string such as `"768x512"`, or `"512"` for a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Pixels.
    pub width: i64,
    /// Pixels.
    pub height: i64,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let side = |text: &str| text.parse().map_err(|_| "expected WIDTHxHEIGHT in pixels, or one number for a square".to_owned());
        let (width, height) = text.split_once(['x', 'X', '×']).unwrap_or((text, text));
        Ok(Self { width: side(width)?, height: side(height)? })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|expected| serde::de::Error::custom(format!("\"{text}\" is not a size; {expected}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_squares_or_width_by_height() {
        assert_eq!("512".parse(), Ok(Size { width: 512, height: 512 }));
        assert_eq!("768x512".parse(), Ok(Size { width: 768, height: 512 }));
        for wrong in ["", "x", "5x", "5x5x5", "wide", "5.5"] {
            assert!(wrong.parse::<Size>().unwrap_err().contains("WIDTHxHEIGHT"), "{wrong}");
        }
    }

    #[test]
    fn steps_are_due_from_the_first_multiple_on() {
        let sample = Sample { every: 4, ..Sample::default() };
        assert_eq!((0..=9).filter(|step| sample.is_due(*step)).collect::<Vec<_>>(), [4, 8]);
        assert!((0..=9).all(|step| !Sample::default().is_due(step)));
    }
}
