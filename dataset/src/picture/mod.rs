//! One picture: decoded, judged, resized, cropped to its bucket, encoded again.
//!
//! Everything here is a pure function of the bytes, the key and the rules, so a prepared data set does not depend on threads. Of a picture
//! only the part is decoded that its crop needs, shrunk already where the format can; what that takes is known before, and bounded for
//! all threads together.

mod buckets;
mod coded;
mod encode;
mod frame;
mod gif;
mod jpeg;
mod memory;
mod phash;
mod png;
mod resample;
mod rules;
mod turbo;
mod webp;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fast_image_resize::Resizer;

pub use self::buckets::{SDXL_BUCKETS, buckets};
use self::coded::Coded;
pub use self::encode::{Encoding, encode};
use self::frame::{Frame, Part};
pub use self::rules::{Crop, PictureRules};
use crate::report::Refusal;

/// Buffers larger than this are not kept for the next picture, bytes.
const KEPT: usize = 16 << 20;

/// A picture cut to one of the sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// 8-bit RGB, row by row: `[height, width, 3]`.
    pub rgb: Vec<u8>,
    /// Width and height, pixels: one of the rules' sizes.
    pub size: (u32, u32),
    /// Width and height of the original, upright, pixels.
    pub original: (u32, u32),
    /// Left and top edge of the crop, in pixels of the resized picture (the smallest of its aspect ratio that covers `size`).
    pub crop: (u32, u32),
    /// Perceptual hash of the whole picture, if asked for: near-duplicates differ in few bits.
    pub phash: Option<u64>,
}

/// Decoders, encoders and buffers, kept from one picture to the next: one for every thread.
#[derive(Debug, Default)]
pub struct Scratch {
    decoder: Option<turbo::Decoder>,
    encoder: Option<turbo::Encoder>,
    resizer: Resizer,
    /// Decoded pixels.
    pixels: Vec<u8>,
    /// Encoded bytes.
    coded: Vec<u8>,
}

impl Scratch {
    /// Calls with this thread's own.
    pub fn of_thread<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
        thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
        SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
            Ok(mut scratch) => work(&mut scratch),
            // Called from within itself.
            Err(_) => work(&mut Scratch::default()),
        })
    }

    fn shrink(&mut self) {
        for buffer in [&mut self.pixels, &mut self.coded] {
            if buffer.capacity() > KEPT {
                *buffer = Vec::new();
            }
        }
        if self.resizer.size_of_internal_buffers() > KEPT {
            self.resizer.reset_internal_buffers();
        }
    }
}

/// Decodes and filters a JPEG, PNG, WebP or GIF picture, resizes it so that it just covers the size whose aspect ratio is nearest to its
/// own, and crops it to that.
///
/// The kind is told from the bytes, not from a file name. The picture is turned upright as its EXIF orientation says; grey is spread to RGB,
/// CMYK turned to it; transparent pixels are laid over white. `key` decides where a random crop lies.
///
/// Refused are pictures that break a rule ([`PictureRules`]), move ([`Refusal::ImageAnimated`]), are broken or cut off
/// ([`Refusal::ImageUndecodable`]), or need more than 192 MiB of memory ([`Refusal::ImageTooLarge`]). All threads together hold no more than that,
/// so this may wait for others.
pub fn cut(bytes: &[u8], key: &str, rules: &PictureRules, scratch: &mut Scratch) -> Result<Picture, Refusal> {
    // The decoders are other people's code fed with other people's bytes: a panic there is one more broken picture.
    let result = catch_unwind(AssertUnwindSafe(|| cut_unguarded(bytes, key, rules, scratch))).unwrap_or_else(|_| {
        *scratch = Scratch::default();
        Err(Refusal::ImageUndecodable)
    });
    scratch.shrink();
    result
}

/// Decodes a prepared image: 8-bit RGB `[height, width, 3]`, width and height. For readers of shards.
pub fn decode_rgb(bytes: &[u8]) -> Result<(Vec<u8>, u32, u32), Refusal> {
    let rules = PictureRules {
        sizes: &[],
        crop: Crop::Centre,
        min_edge: 1,
        max_aspect: None,
        min_area: None,
        max_area: None,
        max_pixels: u64::MAX,
        phash: false,
    };
    let picture = Scratch::of_thread(|scratch| cut(bytes, "", &rules, scratch))?;
    Ok((picture.rgb, picture.size.0, picture.size.1))
}

fn cut_unguarded(bytes: &[u8], key: &str, rules: &PictureRules, scratch: &mut Scratch) -> Result<Picture, Refusal> {
    let Scratch { decoder, resizer, pixels, .. } = scratch;
    let mut coded = coded::open(bytes, decoder)?;
    let (stored, turn) = (coded.size(), coded.orientation());
    let original = frame::upright(stored, turn);
    rules.judge(original)?;
    let size = buckets::nearest(rules.sizes, original).unwrap_or(original);
    let frame = Frame::new(stored, turn, size, rules.crop, key).ok_or(Refusal::ImageTooLarge)?;
    let part = part(&*coded, &frame, rules.phash);
    let _hold = memory::hold(coded.memory(&part) + resample::memory(&part, frame.size))?;
    coded.decode(&part, pixels)?;
    let phash = rules.phash.then(|| phash::phash(pixels, &part, turn, resizer)).transpose()?;
    let window = frame.within(&part);
    let rgb = match window.is_all_of(&part, frame.size) {
        true => std::mem::take(pixels),
        false => resample::resample(pixels, &part, window, frame.size, resizer)?,
    };
    let rgb = resample::turn(rgb, frame.size, turn)?;
    Ok(Picture { rgb, size, original, crop: frame.crop, phash })
}

/// What is decoded: what the result needs, or for a hash everything, as small as the result allows.
fn part(coded: &dyn Coded, frame: &Frame, everything: bool) -> Part {
    let shrink = frame.shrink(coded.shrinks());
    if everything { Part::whole(coded.size(), shrink) } else { coded.fit(frame.part(coded.size(), shrink)) }
}
