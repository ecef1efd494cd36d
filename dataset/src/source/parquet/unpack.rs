//! Unpacking of pages as streams, so that a page of any size takes little memory.
//!
//! Snappy's and LZ4's plain blocks have libraries, but none that streams: both are runs of literals and of copies from what was
//! unpacked before, decoded here. Formats: <https://github.com/google/snappy/blob/main/format_description.txt>,
//! <https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md>.

use std::io::{self, Read};

use flate2::read::MultiGzDecoder;
use parquet::basic::Compression;

/// How far back a copy may reach. LZ4's cannot reach further than 64 KiB; those of Snappy's writers do not.
const REACH: usize = 1 << 20;
/// What is unpacked in one go.
const STEP: usize = 256 << 10;

/// The unpacked bytes of a page.
pub(super) fn unpacked<'a>(packing: Compression, from: &'a mut (dyn Read + Send)) -> io::Result<Box<dyn Read + Send + 'a>> {
    Ok(match packing {
        Compression::UNCOMPRESSED => Box::new(from),
        Compression::SNAPPY => Box::new(Blocks::snappy(io::BufReader::new(from))?),
        Compression::LZ4_RAW => Box::new(Blocks::new(io::BufReader::new(from), Format::Lz4)),
        Compression::GZIP(_) => Box::new(MultiGzDecoder::new(from)),
        Compression::ZSTD(_) => Box::new(zstd::stream::read::Decoder::new(from)?),
        Compression::LZO => return Err(unknown("LZO")),
        Compression::BROTLI(_) => return Err(unknown("Brotli")),
        Compression::LZ4 => return Err(unknown("LZ4 in Hadoop's framing")),
    })
}

fn unknown(packing: &str) -> io::Error {
    let what = format!("it is packed with {packing}, which is not read; write the file anew with zstd or snappy");
    io::Error::new(io::ErrorKind::Unsupported, what)
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Snappy,
    Lz4,
}

/// What a block tells to do next, in bytes.
#[derive(Clone, Copy, Debug)]
enum Element {
    Literal(usize),
    Copy { back: usize, bytes: usize },
    End,
}

/// A stream of literals and copies.
struct Blocks<R> {
    from: R,
    format: Format,
    /// What was unpacked last: as far as copies reach, and what is not yet read.
    window: Vec<u8>,
    read: usize,
    /// What of the current element is still to be done.
    todo: Element,
    /// In LZ4: a copy follows the literal; what the token says of its length.
    follows: Option<usize>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a packed page is broken: {what}"))
}

impl<R: Read> Blocks<R> {
    fn new(from: R, format: Format) -> Blocks<R> {
        Blocks { from, format, window: Vec::new(), read: 0, todo: Element::Literal(0), follows: None }
    }

    /// Snappy says first how much there will be; the page's header has said so already.
    fn snappy(mut from: R) -> io::Result<Blocks<R>> {
        while next_byte(&mut from)?.ok_or(io::ErrorKind::UnexpectedEof)? >= 128 {}
        Ok(Blocks::new(from, Format::Snappy))
    }

    fn element(&mut self) -> io::Result<Element> {
        match self.format {
            Format::Snappy => self.snappy_element(),
            Format::Lz4 => self.lz4_element(),
        }
    }

    fn snappy_element(&mut self) -> io::Result<Element> {
        let Some(tag) = next_byte(&mut self.from)? else { return Ok(Element::End) };
        let high = usize::from(tag >> 2);
        Ok(match tag & 3 {
            0 if high < 60 => Element::Literal(high + 1),
            0 => Element::Literal(self.little_endian(high - 59)? + 1),
            1 => Element::Copy { back: (high >> 3) << 8 | self.little_endian(1)?, bytes: 4 + (high & 7) },
            2 => Element::Copy { back: self.little_endian(2)?, bytes: high + 1 },
            _ => Element::Copy { back: self.little_endian(4)?, bytes: high + 1 },
        })
    }

    /// A sequence is a literal and, but for the last one, a copy.
    fn lz4_element(&mut self) -> io::Result<Element> {
        if let Some(short) = self.follows.take() {
            let Some(low) = next_byte(&mut self.from)? else { return Ok(Element::End) };
            let back = usize::from(low) | self.little_endian(1)? << 8;
            return Ok(Element::Copy { back, bytes: self.lz4_length(short)? + 4 });
        }
        let Some(token) = next_byte(&mut self.from)? else { return Ok(Element::End) };
        self.follows = Some(usize::from(token & 15));
        Ok(Element::Literal(self.lz4_length(usize::from(token >> 4))?))
    }

    fn lz4_length(&mut self, short: usize) -> io::Result<usize> {
        let mut length = short;
        let mut more = short == 15;
        while more {
            let byte = self.little_endian(1)?;
            length = length.checked_add(byte).ok_or_else(|| invalid("an endless length"))?;
            more = byte == 255;
        }
        Ok(length)
    }

    fn little_endian(&mut self, bytes: usize) -> io::Result<usize> {
        let mut number = [0; 8];
        self.from.read_exact(&mut number[..bytes])?;
        Ok(u64::from_le_bytes(number) as usize)
    }

    /// Unpacks more into the window, after what is no longer needed was dropped from it.
    fn step(&mut self) -> io::Result<()> {
        if self.window.len() >= 4 * REACH {
            self.window.drain(..self.window.len() - REACH);
            self.read = self.window.len();
        }
        let enough = self.window.len() + STEP;
        while self.window.len() < enough {
            self.todo = match self.todo {
                Element::Literal(0) | Element::Copy { bytes: 0, .. } => self.element()?,
                Element::Literal(bytes) => Element::Literal(bytes - self.literal(bytes.min(STEP))?),
                Element::Copy { back, bytes } => Element::Copy { back, bytes: bytes - self.copy(back, bytes)? },
                Element::End => break,
            };
        }
        Ok(())
    }

    fn literal(&mut self, bytes: usize) -> io::Result<usize> {
        let found = self.from.by_ref().take(bytes as u64).read_to_end(&mut self.window)?;
        if found == bytes { Ok(bytes) } else { Err(invalid("it ends within a literal")) }
    }

    /// Copies at most `back` bytes: where a copy overlaps itself, no more are there yet.
    fn copy(&mut self, back: usize, bytes: usize) -> io::Result<usize> {
        let from = self.window.len().checked_sub(back).filter(|_| back > 0);
        let from = from.ok_or_else(|| invalid("a copy from before its start, or from too far back"))?;
        let bytes = bytes.min(back);
        self.window.extend_from_within(from..from + bytes);
        Ok(bytes)
    }
}

fn next_byte(from: &mut impl Read) -> io::Result<Option<u8>> {
    let mut byte = [0];
    Ok(if from.read(&mut byte)? == 0 { None } else { Some(byte[0]) })
}

impl<R: Read> Read for Blocks<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.read == self.window.len() {
            self.step()?;
        }
        let n = buf.len().min(self.window.len() - self.read);
        buf[..n].copy_from_slice(&self.window[self.read..self.read + n]);
        self.read += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unpack(packing: Compression, mut packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        // A bound, for broken bytes may stand for very many.
        unpacked(packing, &mut packed)?.take(64 << 20).read_to_end(&mut out)?;
        Ok(out)
    }

    fn snappy(bytes: &[u8]) -> Vec<u8> {
        snap::raw::Encoder::new().compress_vec(bytes).unwrap()
    }

    #[test]
    fn large_blocks_are_unpacked_as_their_libraries_packed_them() {
        // Noise, repetition near and far, long runs: more than the window, with copies across its end.
        let noise: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let all = [&noise[..], &noise[noise.len() - 40_000..], &vec![7; 3_000_000], &noise[..2_000_000], b"end"].concat();
        assert!(unpack(Compression::SNAPPY, &snappy(&all)).unwrap() == all);
        assert!(unpack(Compression::LZ4_RAW, &lz4_flex::block::compress(&all)).unwrap() == all);
    }

    #[test]
    fn other_packings_are_refused_by_name() {
        let error = unpack(Compression::LZO, b"").unwrap_err().to_string();
        assert!(error.contains("LZO") && error.contains("zstd"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn blocks_are_unpacked(parts in prop::collection::vec(("[ab]{0,9}", 0usize..300), 0..12)) {
            let bytes: Vec<u8> = parts.iter().flat_map(|(text, n)| text.as_bytes().repeat(*n)).collect();
            prop_assert_eq!(&unpack(Compression::SNAPPY, &snappy(&bytes)).unwrap(), &bytes);
            prop_assert_eq!(&unpack(Compression::LZ4_RAW, &lz4_flex::block::compress(&bytes)).unwrap(), &bytes);
        }

        #[test]
        fn broken_blocks_are_errors_or_other_bytes_but_never_a_panic(at in 0usize..200, to: u8, noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut packed = snappy(b"some text, some text, and some more text of that kind");
            let at = at % packed.len();
            packed[at] = to;
            let _ = unpack(Compression::SNAPPY, &packed);
            for packing in [Compression::SNAPPY, Compression::LZ4_RAW, Compression::GZIP(Default::default()), Compression::ZSTD(Default::default())] {
                let _ = unpack(packing, &noise);
            }
        }
    }
}
