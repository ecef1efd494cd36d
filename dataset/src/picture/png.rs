//! PNG: row by row, so that only the part that is needed is held. Every colour type and depth.

use std::io::Cursor;

use image::metadata::Orientation;
use png::{BitDepth, ColorType, Decoder, DecodingError, Limits, Reader, Transformations};

use super::coded::{Coded, over_white};
use super::frame::Part;
use super::memory;
use crate::report::Refusal;

/// Reads the header.
pub(super) fn open<'a>(bytes: &'a [u8]) -> Result<Box<dyn Coded + 'a>, Refusal> {
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), Limits { bytes: memory::MOST as usize });
    // Palettes to colours, a transparent colour to alpha, and at least 8 bits.
    decoder.set_transformations(Transformations::EXPAND);
    decoder.set_ignore_text_chunk(true);
    let reader = decoder.read_info().map_err(refusal)?;
    if reader.info().animation_control.is_some_and(|animation| animation.num_frames > 1) {
        return Err(Refusal::ImageAnimated);
    }
    let line = reader.output_line_size(reader.info().width).ok_or(Refusal::ImageTooLarge)?;
    let late = reader.info().exif_metadata.is_none().then(|| late_exif(bytes)).flatten();
    Ok(Box::new(Png { line, reader, late }))
}

/// The EXIF data behind the picture's own, where they may stand too: the decoder sees them only once it has decoded all, and then it is too late to
/// turn what is cropped. Only the chunks' headers are looked at.
fn late_exif(bytes: &[u8]) -> Option<&[u8]> {
    let mut rest = bytes.get(8..)?;
    loop {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (kind, after) = after.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let data = after.get(..length)?;
        if kind == b"eXIf" {
            let sum = after.get(length..length + 4)?;
            let sound = crc32fast::hash(&[&kind[..], data].concat()).to_be_bytes() == *sum;
            return sound.then_some(data);
        }
        rest = after.get(length + 4..)?;
    }
}

fn refusal(error: DecodingError) -> Refusal {
    match error {
        DecodingError::LimitsExceeded => Refusal::ImageTooLarge,
        _ => Refusal::ImageUndecodable,
    }
}

struct Png<'a> {
    reader: Reader<Cursor<&'a [u8]>>,
    /// Bytes of a decoded row.
    line: usize,
    /// EXIF data behind the picture's own.
    late: Option<&'a [u8]>,
}

impl Coded for Png<'_> {
    fn size(&self) -> (u32, u32) {
        self.reader.info().size()
    }

    fn orientation(&self) -> Orientation {
        let exif = self.reader.info().exif_metadata.as_deref().or(self.late);
        exif.and_then(Orientation::from_exif_chunk).unwrap_or(Orientation::NoTransforms)
    }

    fn memory(&self, part: &Part) -> u64 {
        // A few rows in the decoder; interlaced pictures come in seven passes, and so whole.
        let rows = if self.reader.info().interlaced { self.size().1 } else { 4 };
        part.bytes(3) + self.line as u64 * u64::from(rows)
    }

    fn decode(&mut self, part: &Part, out: &mut Vec<u8>) -> Result<(), Refusal> {
        out.clear();
        let columns = Columns::of(part, self.reader.output_color_type());
        if self.reader.info().interlaced {
            let mut whole = vec![0; self.line * self.size().1 as usize];
            self.reader.next_frame(&mut whole).map_err(refusal)?;
            let rows = whole.chunks_exact(self.line).skip(part.top as usize).take(part.height as usize);
            rows.for_each(|row| columns.push(row, out));
        } else {
            for y in 0..self.size().1 {
                let row = self.reader.next_row().map_err(refusal)?.ok_or(Refusal::ImageUndecodable)?;
                if (part.top..part.top + part.height).contains(&y) {
                    columns.push(row.data(), out);
                }
            }
        }
        // Checksums and the end: a picture that was cut off is not taken.
        self.reader.finish().map_err(refusal)
    }
}

/// The pixels of a row that are wanted, and how they are coded.
struct Columns {
    left: usize,
    width: usize,
    channels: usize,
    deep: bool,
}

impl Columns {
    fn of(part: &Part, (colour, depth): (ColorType, BitDepth)) -> Columns {
        Columns { left: part.left as usize, width: part.width as usize, channels: colour.samples(), deep: depth == BitDepth::Sixteen }
    }

    /// Appends a row as RGB.
    fn push(&self, row: &[u8], out: &mut Vec<u8>) {
        let from = self.left * self.channels..(self.left + self.width) * self.channels;
        if self.deep {
            // The nearest of 256 levels.
            let narrow = |two: &[u8]| ((u32::from(u16::from_be_bytes([two[0], two[1]])) + 128) / 257) as u8;
            let row: Vec<u8> = row[2 * from.start..2 * from.end].chunks_exact(2).map(narrow).collect();
            self.push_bytes(&row, out);
        } else {
            self.push_bytes(&row[from], out);
        }
    }

    fn push_bytes(&self, row: &[u8], out: &mut Vec<u8>) {
        match self.channels {
            1 => out.extend(row.iter().flat_map(|&grey| [grey; 3])),
            2 => out.extend(row.chunks_exact(2).flat_map(|p| [over_white(p[0], p[1]); 3])),
            3 => out.extend_from_slice(row),
            _ => out.extend(row.chunks_exact(4).flat_map(|p| [0, 1, 2].map(|c| over_white(p[c], p[3])))),
        }
    }
}
