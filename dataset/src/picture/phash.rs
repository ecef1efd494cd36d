//! A perceptual hash: near-duplicates differ in few bits.

use fast_image_resize::Resizer;
use image::metadata::Orientation;

use super::frame::{Part, Window};
use super::resample;
use crate::report::Refusal;

/// Side of the small picture that is hashed.
const SIDE: usize = 32;
/// Frequencies each way that make the hash.
const LOW: usize = 8;

/// The hash of a whole picture, upright: shrunk to 32 × 32 grey pixels, whose DCT's 8 × 8 lowest frequencies (but the mean) give a bit
/// each: above their median or not. Robust to re-encoding and resizing, not to cropping, turning and mirroring.
pub(super) fn phash(rgb: &[u8], part: &Part, turn: Orientation, resizer: &mut Resizer) -> Result<u64, Refusal> {
    let all = Window { left: 0.0, top: 0.0, width: f64::from(part.width), height: f64::from(part.height) };
    let size = (SIDE as u32, SIDE as u32);
    let small = resample::turn(resample::resample(rgb, part, all, size, resizer)?, size, turn)?;
    let grey: Vec<f64> =
        small.chunks_exact(3).map(|p| 0.299 * f64::from(p[0]) + 0.587 * f64::from(p[1]) + 0.114 * f64::from(p[2])).collect();
    Ok(bits(&low_frequencies(&grey)))
}

/// The DCT-II of `[SIDE, SIDE]` numbers, its frequencies 0 to LOW each way, `[LOW, LOW]`; unscaled, as only the order matters.
fn low_frequencies(grey: &[f64]) -> Vec<f64> {
    // Bits must not differ between machines, as those of the system's cosine may.
    let wave = |k: usize, x: usize| libm::cos(std::f64::consts::PI * (k * (2 * x + 1)) as f64 / (2 * SIDE) as f64);
    let waves: Vec<Vec<f64>> = (0..LOW).map(|k| (0..SIDE).map(|x| wave(k, x)).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut out = Vec::with_capacity(LOW * LOW);
    for across in &waves {
        let rows: Vec<f64> = grey.chunks_exact(SIDE).map(|row| dot(row, across)).collect();
        out.extend(waves.iter().map(|down| dot(&rows, down)));
    }
    out
}

fn bits(frequencies: &[f64]) -> u64 {
    let mut sorted = frequencies[1..].to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    frequencies.iter().fold(0, |bits, &frequency| bits << 1 | u64::from(frequency > median))
}
