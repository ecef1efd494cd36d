//! What a picture must satisfy, judged from its header alone.

use serde::{Deserialize, Serialize};

use crate::report::Refusal;

/// Where a picture is cropped that is longer one way than its bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Crop {
    /// In the middle.
    #[default]
    Centre,
    /// Anywhere, decided by the seed and the sample's key alone.
    Random {
        /// Another seed crops elsewhere.
        seed: u64,
    },
}

/// What a picture must satisfy, and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct PictureRules<'a> {
    /// Widths and heights, pixels, that a picture may come out as: one square, or the buckets. None at all: it keeps its own.
    pub sizes: &'a [(u32, u32)],
    /// Where it is cropped.
    pub crop: Crop,
    /// Smallest accepted length of the original's shorter side, pixels.
    pub min_edge: u32,
    /// Largest accepted ratio of the original's longer side to its shorter one.
    pub max_aspect: Option<f64>,
    /// Smallest accepted area of the original, pixels.
    pub min_area: Option<u64>,
    /// Largest accepted area of the original, pixels.
    pub max_area: Option<u64>,
    /// Most pixels (width × height) that are decoded: a bound against decompression bombs.
    pub max_pixels: u64,
    /// Whether the perceptual hash is computed. The whole picture is decoded for it, not only what the crop needs.
    pub phash: bool,
}

impl PictureRules<'_> {
    /// Judges the upright size that a header claims, before any pixel is decoded.
    pub(super) fn judge(&self, (width, height): (u32, u32)) -> Result<(), Refusal> {
        let (short, long) = (width.min(height), width.max(height));
        let area = u64::from(width) * u64::from(height);
        if area == 0 {
            Err(Refusal::ImageUndecodable)
        } else if short < self.min_edge {
            Err(Refusal::MinEdge)
        } else if self.max_aspect.is_some_and(|most| f64::from(long) > most * f64::from(short)) {
            Err(Refusal::Aspect)
        } else if self.min_area.is_some_and(|least| area < least) || self.max_area.is_some_and(|most| area > most) {
            Err(Refusal::Area)
        } else if area > self.max_pixels {
            Err(Refusal::ImageTooLarge)
        } else {
            Ok(())
        }
    }
}
