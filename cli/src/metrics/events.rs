//! A table, and pictures, as an event file of TensorBoard: records of `TFRecord`, each an `Event` of TensorFlow's protocol buffers. Of those
//! messages only what is needed is written here: <https://github.com/tensorflow/tensorboard/tree/master/tensorboard/compat/proto>.

use std::io::Write;
use std::path::Path;

use ella_coordinator::metrics::PARTS;
use ella_proto::samples;
use ella_store::Store;

use super::table::{Table, Values};
use crate::ui::{Fail, note};

/// Pictures that are taken over: of more, the newest steps'.
const MOST_PICTURES: usize = 2_000;

/// Where a picture lies that the run drew.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Picture {
    pub(super) step: u64,
    /// Its number among those of its step.
    pub(super) number: u64,
    pub(super) key: String,
}

/// An event file on its way to where it is written, record by record: its pictures may be larger than memory.
#[derive(Debug)]
pub(super) struct Records<'a, W> {
    into: W,
    /// For errors.
    path: &'a Path,
    /// Written so far.
    bytes: u64,
}

impl<'a, W: Write> Records<'a, W> {
    pub(super) fn new(into: W, path: &'a Path) -> Self {
        Self { into, path, bytes: 0 }
    }

    /// One record of a `TFRecord` file: its length and its bytes, each with a checksum.
    fn add(&mut self, bytes: &[u8]) -> Result<(), Fail> {
        let length = (bytes.len() as u64).to_le_bytes();
        let (length_sum, sum) = (masked(crc32c(&length)).to_le_bytes(), masked(crc32c(bytes)).to_le_bytes());
        for part in [&length[..], &length_sum, bytes, &sum] {
            self.into.write_all(part).map_err(|error| Fail::io(self.path, "written", &error))?;
            self.bytes += part.len() as u64;
        }
        Ok(())
    }

    /// The bytes that were written.
    pub(super) fn end(mut self) -> Result<u64, Fail> {
        self.into.flush().map_err(|error| Fail::io(self.path, "written", &error))?;
        Ok(self.bytes)
    }
}

/// The pictures in a run's folder, `samples/STEP/NUMBER.png`.
pub(super) async fn pictures(store: &Store) -> Result<Vec<Picture>, Fail> {
    let mut found = Vec::new();
    for file in store.list(samples::FOLDER).await? {
        if let Some((step, number)) = place(&file.key) {
            found.push(Picture { step, number, key: file.key });
        }
    }
    found.sort_unstable();
    if found.len() > MOST_PICTURES {
        note(format_args!("of {} pictures the newest {MOST_PICTURES} are taken", found.len()));
        found.drain(..found.len() - MOST_PICTURES);
    }
    Ok(found)
}

/// The step and the number of a picture by its key.
fn place(key: &str) -> Option<(u64, u64)> {
    let (folder, file) = key.strip_prefix("samples/")?.split_once('/')?;
    Some((samples::step_of(folder)?, file.strip_suffix(".png")?.parse().ok()?))
}

/// Writes the whole file; pictures are read from `store` one after the other.
pub(super) async fn write<W: Write>(table: &Table, (store, pictures): (&Store, &[Picture]), into: &mut Records<'_, W>) -> Result<(), Fail> {
    let times = match table.column("time") {
        Some(Values::Time(times)) => times.as_slice(),
        _ => &[],
    };
    let seconds = |row: usize| times.get(row).map_or(0.0, |millis| *millis as f64 / 1000.0);
    into.add(&[fixed64(1, seconds(0).to_bits()), text(3, b"brain.Event:2")].concat())?;
    let curves = curves(table);
    let steps = match table.column("step") {
        Some(Values::Whole(steps)) => steps.as_slice(),
        _ => &[],
    };
    let mut next = pictures.iter().peekable();
    for (row, step) in steps.iter().enumerate() {
        let mut summary = Vec::new();
        for (tag, value) in &curves {
            if let Some(value) = value(row) {
                let scalar = [text(1, tag.as_bytes()), fixed32(2, (value as f32).to_bits())].concat();
                summary.extend(text(1, &scalar));
            }
        }
        into.add(&event(seconds(row), *step, &summary))?;
        while let Some(picture) = next.next_if(|picture| picture.step.cast_signed() <= *step) {
            into.add(&drawn(seconds(row), picture, &store.get(&picture.key).await?))?;
        }
    }
    let last = times.len().saturating_sub(1);
    for picture in next {
        into.add(&drawn(seconds(last), picture, &store.get(&picture.key).await?))?;
    }
    Ok(())
}

type Curve<'a> = (String, Box<dyn Fn(usize) -> Option<f64> + 'a>);

/// What is drawn, by tag: the part before the slash is a group.
fn curves(table: &Table) -> Vec<Curve<'_>> {
    let real = |column: &str| match table.column(column) {
        Some(Values::Real(values)) => Some(values),
        _ => None,
    };
    let mut curves: Vec<Curve<'_>> = Vec::new();
    let named = [
        ("loss/train", "loss"),
        ("loss/held_out", "held_out_loss"),
        ("optimizer/grad_norm", "grad_norm"),
        ("optimizer/learning_rate", "lr"),
        ("step/seconds", "step_seconds"),
    ];
    let parts = PARTS.iter().map(|part| (format!("step_parts/{part}"), format!("seconds.{part}")));
    for (tag, column) in named.map(|(tag, column)| (tag.to_owned(), column.to_owned())).into_iter().chain(parts) {
        if let Some(values) = real(&column) {
            curves.push((tag, Box::new(move |row| values.get(row).copied().flatten())));
        }
    }
    if let (Some(Values::Whole(samples)), Some(seconds)) = (table.column("samples"), real("step_seconds")) {
        let rate = move |row: usize| Some(samples[row] as f64 / seconds[row].filter(|seconds| *seconds > 0.0)?);
        curves.push(("step/samples_per_second".to_owned(), Box::new(rate)));
    }
    curves
}

/// `Event` with a `Summary`.
fn event(seconds: f64, step: i64, summary: &[u8]) -> Vec<u8> {
    [fixed64(1, seconds.to_bits()), varint_field(2, step.cast_unsigned()), text(5, summary)].concat()
}

/// `Event` with a picture.
fn drawn(seconds: f64, Picture { step, number, .. }: &Picture, png: &[u8]) -> Vec<u8> {
    let (width, height) = size(png).unwrap_or_default();
    let image = [varint_field(1, height.into()), varint_field(2, width.into()), varint_field(3, 3), text(4, png)].concat();
    let value = [text(1, format!("samples/{number:03}").as_bytes()), text(4, &image)].concat();
    event(seconds, step.cast_signed(), &text(1, &value))
}

/// Width and height by a PNG's header.
fn size(png: &[u8]) -> Option<(u32, u32)> {
    let number = |at: usize| Some(u32::from_be_bytes(png.get(at..at + 4)?.try_into().ok()?));
    Some((number(16)?, number(20)?))
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn varint_field(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn fixed64(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3 | 1), value.to_le_bytes().to_vec()].concat()
}

fn fixed32(field: u64, value: u32) -> Vec<u8> {
    [varint(field << 3 | 5), value.to_le_bytes().to_vec()].concat()
}

/// A string, bytes or a message.
fn text(field: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), which no dependency here has.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut at = 0;
        while at < 256 {
            let (mut crc, mut bit) = (at as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[at] = crc;
            at += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::table;
    use super::*;

    #[test]
    fn checksums_are_those_of_the_format() {
        // RFC 3720, B.4.
        assert_eq!((crc32c(b"123456789"), crc32c(&[0; 32]), crc32c(&[0xff; 32])), (0xe306_9283, 0x8a91_36aa, 0x62a8_ab43));
    }

    /// A message's fields: numbers, and the bytes of what has a length.
    #[derive(Debug, PartialEq)]
    enum Field<'a> {
        Number(u64, u64),
        Bytes(u64, &'a [u8]),
    }

    fn number(bytes: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let (first, rest) = bytes.split_first().unwrap();
            (*bytes, value, shift) = (rest, value | u64::from(first & 0x7f) << shift, shift + 7);
            if first & 0x80 == 0 {
                return value;
            }
        }
    }

    fn fields(mut bytes: &[u8]) -> Vec<Field<'_>> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = number(&mut bytes);
            let mut take = |count: usize| {
                let (taken, rest) = bytes.split_at(count);
                bytes = rest;
                taken
            };
            fields.push(match key & 7 {
                0 => Field::Number(key >> 3, number(&mut bytes)),
                1 => Field::Number(key >> 3, u64::from_le_bytes(take(8).try_into().unwrap())),
                5 => Field::Number(key >> 3, u32::from_le_bytes(take(4).try_into().unwrap()).into()),
                2 => {
                    let length = number(&mut bytes) as usize;
                    let (taken, rest) = bytes.split_at(length);
                    bytes = rest;
                    Field::Bytes(key >> 3, taken)
                }
                kind => panic!("wire type {kind}"),
            });
        }
        fields
    }

    fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let (length, sum) = (&bytes[..8], u32::from_le_bytes(bytes[8..12].try_into().unwrap()));
            assert_eq!(sum, masked(crc32c(length)));
            let end = 12 + u64::from_le_bytes(length.try_into().unwrap()) as usize;
            assert_eq!(u32::from_le_bytes(bytes[end..end + 4].try_into().unwrap()), masked(crc32c(&bytes[12..end])));
            records.push(&bytes[12..end]);
            bytes = &bytes[end + 4..];
        }
        records
    }

    #[test]
    fn an_event_file_is_read_back() {
        let png = [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".as_slice(), &[0, 0, 0, 9, 0, 0, 0, 5]].concat();
        let (mut file, key) = (Vec::<u8>::new(), "samples/000000000002/001.png");
        let size = crate::runtime().unwrap().block_on(async {
            let store = Store::in_memory();
            store.put(key, png.clone().into()).await.unwrap();
            let mut records = Records::new(&mut file, Path::new("x"));
            write(&table(), (&store, &[Picture { step: 2, number: 1, key: key.into() }]), &mut records).await.unwrap();
            records.end().unwrap()
        });
        assert_eq!(size, file.len() as u64);
        let records = records(&file);
        assert_eq!(records.len(), 4);
        assert_eq!(fields(records[0])[1], Field::Bytes(3, b"brain.Event:2"));
        let second = fields(records[2]);
        assert_eq!(second[..2], [Field::Number(1, 3.0_f64.to_bits()), Field::Number(2, 2)]);
        let Field::Bytes(5, summary) = second[2] else { panic!("{second:?}") };
        let scalars: Vec<_> = fields(summary)
            .iter()
            .map(|value| match value {
                Field::Bytes(1, value) => match &fields(value)[..] {
                    [Field::Bytes(1, tag), Field::Number(2, bits)] => {
                        (String::from_utf8(tag.to_vec()).unwrap(), f32::from_bits(u32::try_from(*bits).unwrap()))
                    }
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            })
            .collect();
        let wanted = [("loss/held_out", 0.75), ("optimizer/grad_norm", 1.5), ("step/seconds", 2.0), ("step/samples_per_second", 1.5)];
        assert_eq!(scalars, wanted.map(|(tag, value)| (tag.to_owned(), value)));
        let picture = fields(records[3]);
        let Field::Bytes(5, summary) = picture[2] else { panic!("{picture:?}") };
        let Field::Bytes(1, value) = fields(summary)[0] else { panic!("no value") };
        let [Field::Bytes(1, tag), Field::Bytes(4, image)] = fields(value)[..] else { panic!("no picture") };
        assert_eq!(
            (tag, fields(image)),
            (b"samples/001".as_slice(), vec![Field::Number(1, 5), Field::Number(2, 9), Field::Number(3, 3), Field::Bytes(4, &png)])
        );
    }

    #[test]
    fn pictures_are_found_by_step_and_number() {
        let runtime = crate::runtime().unwrap();
        let found = runtime.block_on(async {
            let store = Store::in_memory();
            for key in [
                "samples/000000000400/001.png",
                "samples/000000000020/000.png",
                "samples/000000000020/index.json",
                "samples/20/002.png",
                "samples/x.png",
            ] {
                store.put(key, vec![1].into()).await.unwrap();
            }
            pictures(&store).await.unwrap()
        });
        assert_eq!(found.iter().map(|picture| (picture.step, picture.number)).collect::<Vec<_>>(), [(20, 0), (400, 1)]);
    }
}
