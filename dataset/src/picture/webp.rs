//! WebP, both ways, by libwebp.

use std::ffi::c_int;

use image::metadata::Orientation;
use libwebp_sys as webp;

use super::coded::{Coded, rgba_over_white};
use super::frame::Part;
use crate::report::Refusal;

/// Longest side of a WebP picture, pixels.
const LONGEST: u32 = 16_383;

/// Reads the header.
pub(super) fn open<'a>(bytes: &'a [u8]) -> Result<Box<dyn Coded + 'a>, Refusal> {
    let mut config = webp::WebPDecoderConfig::new().map_err(|()| Refusal::ImageUndecodable)?;
    // SAFETY: reads `bytes.len()` bytes of `bytes` and writes to `config.input`.
    let status = unsafe { webp::WebPGetFeatures(bytes.as_ptr(), bytes.len(), &mut config.input) };
    let features = config.input;
    let whole = chunks(bytes).ok_or(Refusal::ImageUndecodable)?;
    match (u32::try_from(features.width), u32::try_from(features.height)) {
        _ if status != webp::VP8StatusCode::VP8_STATUS_OK => Err(Refusal::ImageUndecodable),
        _ if features.has_animation != 0 => Err(Refusal::ImageAnimated),
        (Ok(width @ 1..), Ok(height @ 1..)) => {
            let exif = whole.into_iter().find(|(name, _)| name == b"EXIF").map(|(_, exif)| exif);
            let turn = exif.and_then(|exif| Orientation::from_exif_chunk(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif)));
            let turn = turn.unwrap_or(Orientation::NoTransforms);
            let (alpha, lossless) = (features.has_alpha != 0, features.format == 2);
            Ok(Box::new(WebP { bytes, config, size: (width, height), alpha, lossless, turn }))
        }
        _ => Err(Refusal::ImageUndecodable),
    }
}

/// The chunks of a RIFF file by name. None: it ends before it says that it does.
fn chunks(bytes: &[u8]) -> Option<Vec<([u8; 4], &[u8])>> {
    let length = |bytes: &[u8]| bytes.first_chunk().map(|length| u32::from_le_bytes(*length) as usize);
    let (head, rest) = bytes.split_at_checked(8)?;
    let mut rest = rest.get(4..length(&head[4..])?)?;
    let mut chunks = Vec::new();
    while let Some((name, after)) = rest.split_first_chunk::<4>() {
        let (body, next) = after.get(4..)?.split_at_checked(length(after)?)?;
        chunks.push((*name, body));
        // Chunks of odd length are filled up by a byte.
        rest = next.get(body.len() % 2..).unwrap_or(&[]);
    }
    Some(chunks)
}

struct WebP<'a> {
    bytes: &'a [u8],
    config: webp::WebPDecoderConfig,
    size: (u32, u32),
    alpha: bool,
    lossless: bool,
    turn: Orientation,
}

impl WebP<'_> {
    fn channels(&self) -> u64 {
        if self.alpha { 4 } else { 3 }
    }
}

impl Coded for WebP<'_> {
    fn size(&self) -> (u32, u32) {
        self.size
    }

    fn orientation(&self) -> Orientation {
        self.turn
    }

    /// Chroma of lossy pictures is halved.
    fn fit(&self, part: Part) -> Part {
        part.aligned(2, 2)
    }

    fn memory(&self, part: &Part) -> u64 {
        // Lossless data, alpha too, is decoded whole: 32 bits a pixel, and the plane of alpha itself.
        let pixels = u64::from(self.size.0) * u64::from(self.size.1);
        part.bytes(self.channels()) + if self.lossless || self.alpha { pixels * 5 } else { u64::from(self.size.0) * 256 }
    }

    fn decode(&mut self, part: &Part, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let stride = part.width as usize * self.channels() as usize;
        let size = stride * part.height as usize;
        out.resize(size, 0);
        let options = &mut self.config.options;
        options.use_cropping = 1;
        [options.crop_left, options.crop_top, options.crop_width, options.crop_height] =
            [part.left, part.top, part.width, part.height].map(|pixels| pixels as c_int);
        let to = &mut self.config.output;
        to.colorspace = if self.alpha { webp::WEBP_CSP_MODE::MODE_RGBA } else { webp::WEBP_CSP_MODE::MODE_RGB };
        to.is_external_memory = 1;
        to.u.RGBA = webp::WebPRGBABuffer { rgba: out.as_mut_ptr(), stride: stride as c_int, size };
        // SAFETY: `config` was initialized by the library; it reads `bytes.len()` bytes of `bytes`, checks the part against the header, and
        // writes to `out` alone, whose size and stride it was told and checks too.
        let status = unsafe { webp::WebPDecode(self.bytes.as_ptr(), self.bytes.len(), &mut self.config) };
        if status != webp::VP8StatusCode::VP8_STATUS_OK {
            return Err(Refusal::ImageUndecodable);
        }
        if self.alpha {
            rgba_over_white(out);
        }
        Ok(())
    }
}

/// Encodes RGB pixels (`[height, width, 3]`), lossy, at a quality of 0 to 100.
pub(super) fn encode(rgb: &[u8], (width, height): (u32, u32), quality: u8) -> Result<Vec<u8>, Refusal> {
    if width.max(height) > LONGEST {
        return Err(Refusal::ImageTooLarge);
    }
    if width == 0 || height == 0 || rgb.len() as u64 != u64::from(width) * u64::from(height) * 3 {
        return Err(Refusal::ImageUndecodable);
    }
    let mut out = std::ptr::null_mut();
    let (width, height) = (width as c_int, height as c_int);
    // SAFETY: reads `height` rows of `width × 3` bytes of `rgb`, which has them.
    let length = unsafe { webp::WebPEncodeRGB(rgb.as_ptr(), width, height, width * 3, f32::from(quality), &mut out) };
    if length == 0 || out.is_null() {
        return Err(Refusal::ImageTooLarge);
    }
    // SAFETY: the library gave `length` bytes at `out`, ours alone.
    let encoded = unsafe { std::slice::from_raw_parts(out, length) }.to_vec();
    // SAFETY: allocated by the library, and freed once.
    unsafe { webp::WebPFree(out.cast()) };
    Ok(encoded)
}
