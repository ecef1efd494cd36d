//! Pictures as stored bytes.

use serde::{Deserialize, Serialize};

use super::turbo::Encoder;
use super::{Scratch, webp};
use crate::report::Refusal;

/// How pictures are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Encoding {
    /// Baseline JPEG with chroma subsampled 4:2:0.
    Jpeg {
        /// 1 to 100.
        quality: u8,
    },
    /// Lossy WebP: about a third fewer bytes, at many times the work.
    Webp {
        /// 0 to 100.
        quality: u8,
    },
}

/// Longest side of a JPEG picture, pixels: libjpeg's bound.
const LONGEST_JPEG: u32 = 65_500;

/// Encodes RGB pixels (`[height, width, 3]`, `size` being width and height). Refused is what the format cannot hold
/// ([`Refusal::ImageTooLarge`]), and pixels that are not of that size.
pub fn encode(rgb: &[u8], size: (u32, u32), encoding: Encoding, scratch: &mut Scratch) -> Result<Vec<u8>, Refusal> {
    match encoding {
        Encoding::Webp { quality } => webp::encode(rgb, size, quality),
        Encoding::Jpeg { .. } if size.0.max(size.1) > LONGEST_JPEG => Err(Refusal::ImageTooLarge),
        Encoding::Jpeg { quality } => {
            if scratch.encoder.is_none() {
                scratch.encoder = Encoder::new();
            }
            let encoder = scratch.encoder.as_mut().ok_or(Refusal::ImageTooLarge)?;
            let length = encoder.encode(rgb, size, quality, &mut scratch.coded).ok_or(Refusal::ImageUndecodable)?;
            Ok(scratch.coded[..length].to_vec())
        }
    }
}
