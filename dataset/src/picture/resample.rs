//! Resizing a part of a picture to pixels, and turning them upright.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{DynamicImage, RgbImage};

use super::frame::{Part, Window};
use crate::report::Refusal;

/// Resizes a window of RGB pixels to `size`: Catmull-Rom, widened where it shrinks, so that nothing aliases. Of the usual filters it lies
/// between area averaging and Lanczos, and near both.
pub(super) fn resample(rgb: &[u8], part: &Part, window: Window, size: (u32, u32), resizer: &mut Resizer) -> Result<Vec<u8>, Refusal> {
    let from = ImageRef::new(part.width, part.height, rgb, PixelType::U8x3).map_err(|_| Refusal::ImageUndecodable)?;
    let mut to = Image::new(size.0, size.1, PixelType::U8x3);
    let Window { left, top, width, height } = window;
    let how = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).crop(left, top, width, height);
    resizer.resize(&from, &mut to, &how).map_err(|_| Refusal::ImageUndecodable)?;
    Ok(to.into_vec())
}

/// Bytes that resizing needs beside what it reads: what it writes, and the picture between its two passes.
pub(super) fn memory(part: &Part, size: (u32, u32)) -> u64 {
    3 * u64::from(size.0) * (u64::from(size.1) + u64::from(part.height))
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
