//! GIF: taken if it stands still.

use std::io::Cursor;

use image::codecs::gif::GifDecoder;
use image::{AnimationDecoder, ImageDecoder};

use super::coded::{Coded, rgba_over_white};
use super::frame::Part;
use crate::report::Refusal;

/// Reads the header.
pub(super) fn open<'a>(bytes: &'a [u8]) -> Result<Box<dyn Coded + 'a>, Refusal> {
    let decoder = GifDecoder::new(Cursor::new(bytes)).map_err(|_| Refusal::ImageUndecodable)?;
    Ok(Box::new(Gif { size: decoder.dimensions(), bytes }))
}

struct Gif<'a> {
    size: (u32, u32),
    bytes: &'a [u8],
}

impl Coded for Gif<'_> {
    fn size(&self) -> (u32, u32) {
        self.size
    }

    fn fit(&self, part: Part) -> Part {
        Part::whole(self.size, part.shrink)
    }

    /// Two frames of RGBA and what they are laid on.
    fn memory(&self, part: &Part) -> u64 {
        part.bytes(4 * 4)
    }

    fn decode(&mut self, _: &Part, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let decoder = GifDecoder::new(Cursor::new(self.bytes)).map_err(|_| Refusal::ImageUndecodable)?;
        let mut frames = decoder.into_frames();
        let frame = frames.next().and_then(Result::ok).ok_or(Refusal::ImageUndecodable)?;
        match frames.next() {
            None => {}
            Some(Ok(_)) => return Err(Refusal::ImageAnimated),
            Some(Err(_)) => return Err(Refusal::ImageUndecodable),
        }
        *out = frame.into_buffer().into_raw();
        rgba_over_white(out);
        Ok(())
    }
}
