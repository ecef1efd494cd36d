//! What all picture formats have in common.

use image::metadata::Orientation;

use super::frame::Part;
use super::turbo::Decoder;
use super::{gif, jpeg, png, webp};
use crate::report::Refusal;

/// A picture whose header has been read, and whose pixels have not.
pub(super) trait Coded {
    /// Width and height as stored, pixels.
    fn size(&self) -> (u32, u32);

    /// How it is to be turned.
    fn orientation(&self) -> Orientation {
        Orientation::NoTransforms
    }

    /// How many times smaller it can be decoded at little cost.
    fn shrinks(&self) -> &'static [u32] {
        &[1]
    }

    /// The smallest part that can be decoded and holds this one.
    fn fit(&self, part: Part) -> Part {
        part
    }

    /// Bytes that decoding a part needs, its pixels among them.
    fn memory(&self, part: &Part) -> u64;

    /// Decodes a part that [`fit`](Coded::fit) gave: RGB, `[height, width, 3]`, in place of what `out` holds.
    fn decode(&mut self, part: &Part, out: &mut Vec<u8>) -> Result<(), Refusal>;
}

/// Reads a picture's header. The kind is told from the bytes.
pub(super) fn open<'a>(bytes: &'a [u8], decoder: &'a mut Option<Decoder>) -> Result<Box<dyn Coded + 'a>, Refusal> {
    match bytes {
        [0xff, 0xd8, ..] => {
            if decoder.is_none() {
                *decoder = jpeg::decoder();
            }
            jpeg::open(bytes, decoder.as_mut().ok_or(Refusal::ImageTooLarge)?)
        }
        [0x89, b'P', b'N', b'G', ..] => png::open(bytes),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp::open(bytes),
        [b'G', b'I', b'F', b'8', ..] => gif::open(bytes),
        _ => Err(Refusal::ImageUndecodable),
    }
}

/// A channel of a transparent pixel over white.
pub(super) fn over_white(value: u8, alpha: u8) -> u8 {
    let (value, alpha) = (u32::from(value), u32::from(alpha));
    ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
}

/// RGBA pixels over white as RGB, in place.
pub(super) fn rgba_over_white(pixels: &mut Vec<u8>) {
    let count = pixels.len() / 4;
    for i in 0..count {
        let alpha = pixels[4 * i + 3];
        for c in 0..3 {
            pixels[3 * i + c] = over_white(pixels[4 * i + c], alpha);
        }
    }
    pixels.truncate(3 * count);
}
