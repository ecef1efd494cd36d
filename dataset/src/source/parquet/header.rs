//! The headers of Parquet's pages: a struct in Thrift's compact protocol.
//!
//! <https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift>, `PageHeader`.

use std::collections::BTreeMap;
use std::io::{self, Read};

use parquet::basic::Encoding;

/// Structs lie in structs this deep at most (a page's header, its kind, its statistics).
const MOST_DEEP: u32 = 8;

/// A page's header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Bytes of the page when it is unpacked.
    pub(super) unpacked: u64,
    /// Bytes of the page as it lies there.
    pub(super) packed: u64,
    /// CRC-32 of the page as it lies there.
    pub(super) crc: Option<u32>,
}

/// What a page is.
#[derive(Debug)]
pub(super) enum Kind {
    Dictionary { values: u32, encoding: Encoding, is_sorted: bool },
    Data { values: u32, encoding: Encoding, def_levels: Encoding, rep_levels: Encoding },
    DataV2 { values: u32, nulls: u32, rows: u32, encoding: Encoding, def_bytes: u32, rep_bytes: u32, packed: bool },
    Other,
}

impl Header {
    pub(super) fn read(from: &mut impl Read) -> io::Result<Header> {
        let page = Struct::read(from, 0)?;
        let kind = match page.int(1)? {
            0 => {
                let data = page.inner(5)?;
                let (def_levels, rep_levels) = (data.encoding(3)?, data.encoding(4)?);
                Kind::Data { values: data.size(1)?, encoding: data.encoding(2)?, def_levels, rep_levels }
            }
            2 => {
                let dictionary = page.inner(7)?;
                let is_sorted = dictionary.bool(3).unwrap_or(false);
                Kind::Dictionary { values: dictionary.size(1)?, encoding: dictionary.encoding(2)?, is_sorted }
            }
            3 => {
                let data = page.inner(8)?;
                Kind::DataV2 {
                    values: data.size(1)?,
                    nulls: data.size(2)?,
                    rows: data.size(3)?,
                    encoding: data.encoding(4)?,
                    def_bytes: data.size(5)?,
                    rep_bytes: data.size(6)?,
                    packed: data.bool(7).unwrap_or(true),
                }
            }
            _ => Kind::Other,
        };
        let crc = page.int(4).ok().map(|crc| crc as u32);
        Ok(Header { kind, unpacked: page.size(2)?.into(), packed: page.size(3)?.into(), crc })
    }
}

/// The fields of a struct, by number, as far as they are looked at.
#[derive(Debug, Default)]
struct Struct(BTreeMap<i64, Value>);

#[derive(Debug)]
enum Value {
    Int(i64),
    Bool(bool),
    Struct(Struct),
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a page's header is broken: {what}"))
}

impl Struct {
    fn read(from: &mut impl Read, depth: u32) -> io::Result<Struct> {
        let (mut fields, mut id) = (Struct::default(), 0_i64);
        loop {
            let head = byte(from)?;
            if head == 0 {
                return Ok(fields);
            }
            id = if head >> 4 == 0 { zigzag(varint(from)?) } else { id.saturating_add(i64::from(head >> 4)) };
            if let Some(value) = Value::read(from, head & 15, depth)? {
                fields.0.insert(id, value);
            }
        }
    }

    fn int(&self, id: i64) -> io::Result<i64> {
        match self.0.get(&id) {
            Some(Value::Int(int)) => Ok(*int),
            _ => Err(invalid(&format!("no number in field {id}"))),
        }
    }

    fn size(&self, id: i64) -> io::Result<u32> {
        let size = self.int(id)?;
        u32::try_from(size).ok().filter(|size| *size <= i32::MAX as u32).ok_or_else(|| invalid(&format!("{size} in field {id}")))
    }

    fn bool(&self, id: i64) -> Option<bool> {
        match self.0.get(&id)? {
            Value::Bool(bool) => Some(*bool),
            _ => None,
        }
    }

    fn inner(&self, id: i64) -> io::Result<&Struct> {
        match self.0.get(&id) {
            Some(Value::Struct(fields)) => Ok(fields),
            _ => Err(invalid(&format!("no struct in field {id}"))),
        }
    }

    fn encoding(&self, id: i64) -> io::Result<Encoding> {
        Ok(match self.int(id)? {
            0 => Encoding::PLAIN,
            2 => Encoding::PLAIN_DICTIONARY,
            3 => Encoding::RLE,
            5 => Encoding::DELTA_BINARY_PACKED,
            6 => Encoding::DELTA_LENGTH_BYTE_ARRAY,
            7 => Encoding::DELTA_BYTE_ARRAY,
            8 => Encoding::RLE_DICTIONARY,
            9 => Encoding::BYTE_STREAM_SPLIT,
            other => return Err(invalid(&format!("encoding {other} is not known"))),
        })
    }
}

impl Value {
    /// Reads a value of a kind; none for those that are passed over.
    fn read(from: &mut impl Read, kind: u8, depth: u32) -> io::Result<Option<Value>> {
        match kind {
            1 | 2 => return Ok(Some(Value::Bool(kind == 1))),
            3 => return Ok(Some(Value::Int(i64::from(byte(from)?)))),
            4..=6 => return Ok(Some(Value::Int(zigzag(varint(from)?)))),
            7 => skip(from, 8)?,
            8 => {
                let bytes = varint(from)?;
                skip(from, bytes)?;
            }
            9 | 10 if depth < MOST_DEEP => {
                let head = byte(from)?;
                let count = if head >> 4 == 15 { varint(from)? } else { u64::from(head >> 4) };
                for _ in 0..count {
                    match head & 15 {
                        // In lists a bool has a byte of its own.
                        1 | 2 => skip(from, 1)?,
                        kind => drop(Value::read(from, kind, depth + 1)?),
                    }
                }
            }
            12 if depth < MOST_DEEP => return Ok(Some(Value::Struct(Struct::read(from, depth + 1)?))),
            kind => return Err(invalid(&format!("a value of kind {kind}"))),
        }
        Ok(None)
    }
}

fn byte(from: &mut impl Read) -> io::Result<u8> {
    let mut byte = [0];
    from.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn varint(from: &mut impl Read) -> io::Result<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = byte(from)?;
        number |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Ok(number);
        }
    }
    Err(invalid("a number of more than 64 bits"))
}

fn zigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

fn skip(from: &mut impl Read, bytes: u64) -> io::Result<()> {
    let passed = io::copy(&mut from.take(bytes), &mut io::sink())?;
    if passed == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
