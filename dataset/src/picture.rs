//! One picture: decoded, judged, resized, cropped to a square, encoded again.
//!
//! Everything here is a pure function of the bytes and the rules, so a prepared data set does not depend on threads.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};
use jpeg_encoder::{ColorType, Encoder};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::report::Refusal;

/// What a picture must satisfy, and what becomes of it.
#[derive(Clone, Copy, Debug)]
pub struct PictureRules {
    /// Side of the square that results, pixels.
    pub resolution: u32,
    /// Smallest accepted length of the shorter side, pixels.
    pub min_edge: u32,
    /// Most pixels (width × height) that are decoded: a bound against decompression bombs.
    pub max_pixels: u64,
}

/// A picture cut to `resolution` × `resolution`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// 8-bit RGB, row by row: `[resolution, resolution, 3]`.
    pub rgb: Vec<u8>,
    /// Width and height of the original, upright, pixels.
    pub original: (u32, u32),
    /// Left and top edge of the square, in pixels of the resized picture (short side = resolution).
    pub crop: (u32, u32),
}

/// Decodes, filters, resizes (Lanczos3) and centre-crops a JPEG, PNG or WebP picture. The kind is told from the
/// bytes, not from a file name. It is turned upright as its EXIF orientation says; grey is spread to RGB; transparent pixels are laid over white.
pub fn cut(bytes: &[u8], rules: &PictureRules, resizer: &mut Resizer) -> Result<Picture, Refusal> {
    // The decoders are other people's code fed with other people's bytes: a panic there is one more broken picture.
    catch_unwind(AssertUnwindSafe(|| {
        let (rgb, original) = decode(bytes, rules)?;
        square(rgb, original, rules, resizer)
    }))
    .unwrap_or_else(|_| {
        *resizer = Resizer::new();
        Err(Refusal::ImageUndecodable)
    })
}

/// Encodes `side` × `side` RGB as a baseline JPEG (chroma subsampled 4:2:0 below quality 90, not at all from 90 on).
pub fn encode_jpeg(rgb: &[u8], side: u32, quality: u8) -> Result<Vec<u8>, Refusal> {
    let side = u16::try_from(side).map_err(|_| Refusal::ImageTooLarge)?;
    let mut out = Vec::with_capacity(rgb.len() / 8);
    Encoder::new(&mut out, quality).encode(rgb, side, side, ColorType::Rgb).map_err(|_| Refusal::ImageUndecodable)?;
    Ok(out)
}

/// Decodes a prepared image: 8-bit RGB `[height, width, 3]`, width and height. For readers of shards.
pub fn decode_rgb(bytes: &[u8]) -> Result<(Vec<u8>, u32, u32), Refusal> {
    let rules = PictureRules { resolution: 1, min_edge: 1, max_pixels: 1 << 28 };
    let (rgb, (width, height)) = catch_unwind(|| decode(bytes, &rules)).unwrap_or(Err(Refusal::ImageUndecodable))?;
    Ok((rgb, width, height))
}

type Rgb = (Vec<u8>, (u32, u32));

fn decode(bytes: &[u8], rules: &PictureRules) -> Result<Rgb, Refusal> {
    if bytes.starts_with(&[0xff, 0xd8]) { decode_jpeg(bytes, rules) } else { decode_other(bytes, rules) }
}

/// Judges the size that a header claims, before any pixel is decoded.
fn judge(width: u32, height: u32, rules: &PictureRules) -> Result<(), Refusal> {
    if width == 0 || height == 0 {
        Err(Refusal::ImageUndecodable)
    } else if width.min(height) < rules.min_edge {
        Err(Refusal::MinEdge)
    } else if u64::from(width) * u64::from(height) > rules.max_pixels {
        Err(Refusal::ImageTooLarge)
    } else {
        Ok(())
    }
}

fn decode_jpeg(bytes: &[u8], rules: &PictureRules) -> Result<Rgb, Refusal> {
    // A lenient decoder fills what is missing with grey. Strict mode sees most truncations; the end marker, which
    // cannot occur inside coded data, shows the rest.
    if !bytes.windows(2).rev().any(|pair| pair == [0xff, 0xd9]) {
        return Err(Refusal::ImageUndecodable);
    }
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|_| Refusal::ImageUndecodable)?;
    let info = decoder.info().ok_or(Refusal::ImageUndecodable)?;
    let size = (u32::from(info.width), u32::from(info.height));
    judge(size.0, size.1, rules)?;
    let rgb = decoder.decode().map_err(|_| Refusal::ImageUndecodable)?;
    let (rgb, size) = exact(rgb, size)?;
    match decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif)) {
        None | Some(Orientation::NoTransforms) => Ok((rgb, size)),
        Some(turned) => {
            let mut picture = DynamicImage::from(RgbImage::from_raw(size.0, size.1, rgb).ok_or(Refusal::ImageUndecodable)?);
            picture.apply_orientation(turned);
            let size = (picture.width(), picture.height());
            exact(picture.into_rgb8().into_raw(), size)
        }
    }
}

fn decode_other(bytes: &[u8], rules: &PictureRules) -> Result<Rgb, Refusal> {
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|_| Refusal::ImageUndecodable)?;
    let mut limits = Limits::no_limits();
    // 16-bit RGBA, and as much again for what the decoder needs itself.
    limits.max_alloc = Some(rules.max_pixels.saturating_mul(16));
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|_| Refusal::ImageUndecodable)?;
    let (width, height) = decoder.dimensions();
    judge(width, height, rules)?;
    let turned = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|_| Refusal::ImageUndecodable)?;
    picture.apply_orientation(turned);
    let size = (picture.width(), picture.height());
    let rgb = if picture.color().has_alpha() { over_white(picture) } else { picture.into_rgb8().into_raw() };
    exact(rgb, size)
}

fn over_white(picture: DynamicImage) -> Vec<u8> {
    let blend = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    let rgba = picture.into_rgba8();
    rgba.pixels().flat_map(|p| [0, 1, 2].map(|c| blend(p.0[c], p.0[3]))).collect()
}

fn exact(rgb: Vec<u8>, size: (u32, u32)) -> Result<Rgb, Refusal> {
    let wanted = u64::from(size.0) * u64::from(size.1) * 3;
    if rgb.len() as u64 == wanted { Ok((rgb, size)) } else { Err(Refusal::ImageUndecodable) }
}

fn square(rgb: Vec<u8>, original: (u32, u32), rules: &PictureRules, resizer: &mut Resizer) -> Result<Picture, Refusal> {
    let side = rules.resolution;
    let short = original.0.min(original.1);
    let scaled = |edge: u32| {
        let (edge, side, short) = (u64::from(edge), u64::from(side), u64::from(short));
        u32::try_from((edge * side * 2 + short) / (short * 2)).map_err(|_| Refusal::ImageTooLarge)
    };
    let (width, height) = (scaled(original.0)?, scaled(original.1)?);
    // A long, thin strip grows beyond the bound when its short side is raised to the resolution.
    if (width, height) != original && u64::from(width) * u64::from(height) > rules.max_pixels {
        return Err(Refusal::ImageTooLarge);
    }
    let crop = ((width - side) / 2, (height - side) / 2);
    let resized = if (width, height) == original {
        rgb
    } else {
        let from = ImageRef::new(original.0, original.1, &rgb, PixelType::U8x3).map_err(|_| Refusal::ImageUndecodable)?;
        let mut to = Image::new(width, height, PixelType::U8x3);
        let how = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
        resizer.resize(&from, &mut to, &how).map_err(|_| Refusal::ImageUndecodable)?;
        to.into_vec()
    };
    let (stride, row) = (width as usize * 3, side as usize * 3);
    let start = crop.0 as usize * 3;
    let mut rgb = Vec::with_capacity(row * side as usize);
    for line in resized.chunks_exact(stride).skip(crop.1 as usize).take(side as usize) {
        rgb.extend_from_slice(&line[start..start + row]);
    }
    Ok(Picture { rgb, original, crop })
}
