//! Resizing a part of a picture to pixels, and turning them upright.

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};

use super::frame::{Part, Window};
use crate::report::Refusal;

/// Resizes a window of RGB pixels to `size`: Catmull-Rom, widened where it shrinks, so that nothing aliases. Of the usual filters it lies
/// between area averaging and Lanczos, and near both.
///
/// In two calls, down and then across: in one, fast_image_resize 6.1 keeps too few columns between its two passes where the outermost
/// pixel of a window comes to lie upon a pixel of the original, and reads beyond them.
pub(super) fn resample(rgb: &[u8], part: &Part, window: Window, size: (u32, u32), resizer: &mut Resizer) -> Result<Vec<u8>, Refusal> {
    let is_kept = |from: f64, length: f64, to: u32| from == from.round() && length == f64::from(to);
    if is_kept(window.left, window.width, size.0) || is_kept(window.top, window.height, size.1) {
        return pass(rgb, (part.width, part.height), window, size, resizer);
    }
    let down = Window { left: 0.0, width: f64::from(part.width), ..window };
    let between = pass(rgb, (part.width, part.height), down, (part.width, size.1), resizer)?;
    let across = Window { top: 0.0, height: f64::from(size.1), ..window };
    pass(&between, (part.width, size.1), across, size, resizer)
}

/// Of pixels whose type is known here: of those that are known when it runs, resizing would be compiled for a dozen types.
fn pass(rgb: &[u8], of: (u32, u32), window: Window, size: (u32, u32), resizer: &mut Resizer) -> Result<Vec<u8>, Refusal> {
    let from = TypedImageRef::<U8x3>::from_buffer(of.0, of.1, rgb).map_err(|_| Refusal::ImageUndecodable)?;
    let mut bytes = vec![0; size.0 as usize * size.1 as usize * 3];
    let mut to = TypedImage::<U8x3>::from_buffer(size.0, size.1, &mut bytes).map_err(|_| Refusal::ImageUndecodable)?;
    let Window { left, top, width, height } = window;
    let how = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).crop(left, top, width, height);
    resizer.resize_typed(&from, &mut to, &how).map_err(|_| Refusal::ImageUndecodable)?;
    Ok(bytes)
}

/// Bytes that resizing needs beside what it reads: what it writes, and the picture between its two passes.
pub(super) fn memory(part: &Part, size: (u32, u32)) -> u64 {
    3 * u64::from(size.1) * (u64::from(size.0) + u64::from(part.width))
}

/// Turns RGB pixels upright.
pub(super) fn turn(rgb: Vec<u8>, size: (u32, u32), turn: Orientation) -> Result<Vec<u8>, Refusal> {
    if turn == Orientation::NoTransforms {
        return Ok(rgb);
    }
    let picture = RgbImage::from_raw(size.0, size.1, rgb).ok_or(Refusal::ImageUndecodable)?;
    let mut picture = DynamicImage::from(picture);
    picture.apply_orientation(turn);
    Ok(picture.into_rgb8().into_raw())
}
