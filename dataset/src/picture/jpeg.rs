//! JPEG: shrunk while decoding, in parts; grey, CMYK and YCCK among them.

use image::metadata::Orientation;

use super::coded::Coded;
use super::frame::Part;
use super::memory;
use super::turbo::{Channels, Decoder, Opened};
use crate::report::Refusal;

/// More than any progressive picture has in earnest (about 10); each costs a pass over the whole picture.
const MOST_SCANS: u16 = 100;

/// A decoder for [`open`], to be kept.
pub(super) fn decoder() -> Option<Decoder> {
    Decoder::new(MOST_SCANS, (memory::MOST >> 20) as u16)
}

/// Reads the header.
pub(super) fn open<'a>(bytes: &'a [u8], decoder: &'a mut Decoder) -> Result<Box<dyn Coded + 'a>, Refusal> {
    let markers = Markers::read(bytes).ok_or(Refusal::ImageUndecodable)?;
    let opened = decoder.open(bytes).filter(|opened| opened.header.usual).ok_or(Refusal::ImageUndecodable)?;
    Ok(Box::new(Jpeg { opened, markers }))
}

struct Jpeg<'a> {
    opened: Opened<'a>,
    markers: Markers,
}

impl Coded for Jpeg<'_> {
    fn size(&self) -> (u32, u32) {
        self.opened.header.size
    }

    fn orientation(&self) -> Orientation {
        self.markers.orientation
    }

    /// Those that have SIMD; the others take longer than decoding everything.
    fn shrinks(&self) -> &'static [u32] {
        &[1, 2, 4, 8]
    }

    fn fit(&self, part: Part) -> Part {
        match self.opened.header.sampling {
            Some(sampling) => part.aligned(sampling.unit.div_ceil(part.shrink), 1),
            None => Part::whole(self.size(), part.shrink),
        }
    }

    fn memory(&self, part: &Part) -> u64 {
        let header = &self.opened.header;
        let channels = header.channels.count() as u64;
        let pixels = u64::from(header.size.0) * u64::from(header.size.1);
        // Scans that each hold a bit of everything (progressive) or one component are put together before any pixel is made.
        let coefficients = if header.progressive || self.markers.scans_apart {
            header.sampling.map_or(channels as f64, |sampling| sampling.coefficients)
        } else {
            0.0
        };
        part.bytes(channels) + (pixels as f64 * coefficients) as u64 * 2
    }

    fn decode(&mut self, part: &Part, out: &mut Vec<u8>) -> Result<(), Refusal> {
        self.opened.decode(part, out).ok_or(Refusal::ImageUndecodable)?;
        if self.opened.header.channels == Channels::Cmyk {
            cmyk_to_rgb(out, self.markers.adobe);
        }
        Ok(())
    }
}

/// Inks to light, in place. Adobe writes inks inverted (0: full ink), and marks its files.
fn cmyk_to_rgb(pixels: &mut Vec<u8>, inverted: bool) {
    let light = |ink: u8| u32::from(if inverted { ink } else { 255 - ink });
    let count = pixels.len() / 4;
    for i in 0..count {
        let key = light(pixels[4 * i + 3]);
        for c in 0..3 {
            pixels[3 * i + c] = ((light(pixels[4 * i + c]) * key + 127) / 255) as u8;
        }
    }
    pixels.truncate(3 * count);
}

/// What stands in a JPEG's markers beside the picture itself.
struct Markers {
    orientation: Orientation,
    /// Whether Adobe's marker is there.
    adobe: bool,
    /// Whether the first scan lacks some of the components.
    scans_apart: bool,
}

impl Markers {
    /// Walks over the markers up to the first scan. None: there is none, and so no picture.
    fn read(bytes: &[u8]) -> Option<Markers> {
        let mut markers = Markers { orientation: Orientation::NoTransforms, adobe: false, scans_apart: false };
        let (mut rest, mut components) = (bytes.get(2..)?, None);
        loop {
            let [0xff, marker, after @ ..] = rest else { return None };
            // Markers may be filled up with any number of 0xff.
            if *marker == 0xff {
                rest = &rest[1..];
                continue;
            }
            let (block, next) = block(after)?;
            match marker {
                0xe1 if block.starts_with(b"Exif\0\0") => {
                    markers.orientation = Orientation::from_exif_chunk(&block[6..]).unwrap_or(markers.orientation);
                }
                0xee => markers.adobe |= block.starts_with(b"Adobe"),
                // Start of frame, of any kind; 0xc4, 0xc8 and 0xcc are tables.
                0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => components = block.get(5).copied(),
                0xda => {
                    markers.scans_apart = *block.first()? < components?;
                    return Some(markers);
                }
                _ => {}
            }
            rest = next;
        }
    }
}

/// A marker's block, told from its length, and what follows.
fn block(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)).checked_sub(2)?)
}
