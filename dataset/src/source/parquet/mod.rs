//! Parquet files whose rows hold pictures, as img2dataset and `datasets` write them, or name them.
//!
//! Values are decoded by the `parquet` crate; pages are read here ([`page`]), for common writers put a thousand pictures into one
//! page, and memory is to be bounded whatever the size of a page or row group. The crate may panic on damaged files: every call that
//! looks at their bytes is guarded.

mod column;
mod header;
mod layout;
mod page;
mod spill;
mod unpack;

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData};
use tokio::runtime::Handle;

use self::column::Columns;
use self::layout::Layout;
use super::fetch::{Pictures, data_error};
use super::sample::Sample;
use super::{Piece, PieceRead, Source};
use crate::error::DataError;

/// Row groups are put together into pieces of this size.
const PIECE_BYTES: u64 = 256 << 20;
/// Files with a larger description of their row groups are refused.
const MAX_FOOTER_BYTES: u64 = 256 << 20;
/// The bytes that a Parquet file begins and ends with.
const MAGIC: &[u8] = b"PAR1";
/// Length of the footer, and the magic.
const TAIL_BYTES: u64 = 8;

/// Puts consecutive row groups together.
pub(super) async fn pieces(source: &Source) -> Result<Vec<Piece>, DataError> {
    let meta = footer(source).await?;
    Layout::of(source, meta.file_metadata().schema_descr())?;
    let pieces = put_together(groups(source, &meta)?.into_iter().map(|(_, group)| group));
    if pieces.is_empty() { Err(source.corrupt(source.bytes, "holds no rows (expected samples)")) } else { Ok(pieces) }
}

fn put_together(groups: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for group in groups {
        match pieces.last_mut() {
            Some(piece) if span(&piece.bytes, &group.bytes) <= PIECE_BYTES => {
                *piece = Piece { rows: piece.rows.start..group.rows.end, bytes: together(&piece.bytes, &group.bytes) };
            }
            _ => pieces.push(group),
        }
    }
    pieces
}

/// Reads a piece's row groups. Blocks.
pub(super) fn read(source: &Source, piece: &Piece, each: &mut dyn FnMut(Sample) -> bool) -> Result<Option<PieceRead>, DataError> {
    let meta = Handle::current().block_on(footer(source))?;
    let layout = Layout::of(source, meta.file_metadata().schema_descr())?;
    let mut pictures = Pictures::new(source);
    let mut next = piece.rows.start;
    for (index, place) in groups(source, &meta)? {
        if place.rows.start != next || next >= piece.rows.end {
            continue;
        }
        next = place.rows.end;
        let mut columns = Columns::open(source, &layout, &meta, index)?;
        for row in place.rows {
            let (sample, path) = columns.next(row)?;
            if !pictures.push(sample, path.as_deref(), each)? {
                return Ok(None);
            }
        }
    }
    if next != piece.rows.end {
        return Err(source.changed(&format!("row groups of rows {:?}", piece.rows), "other row groups"));
    }
    Ok(pictures.flush(each)?.then(|| pictures.tally.finish(piece.bytes.end - piece.bytes.start)))
}

/// What a file says of its row groups and columns.
async fn footer(source: &Source) -> Result<ParquetMetaData, DataError> {
    if source.bytes < MAGIC.len() as u64 + TAIL_BYTES {
        return Err(source.corrupt(0, "is no Parquet file, or a truncated one (expected a footer)"));
    }
    let end = source.bytes - TAIL_BYTES;
    let tail = source.store.get_range(&source.key, end..source.bytes).await?;
    let (bytes, magic) = tail.split_first_chunk::<4>().unwrap_or((&[0; 4], b""));
    match magic {
        MAGIC => {}
        b"PARE" => return Err(source.corrupt(end, "is encrypted; decrypt it first")),
        _ => return Err(source.corrupt(end, "is no Parquet file, or a truncated one (expected PAR1 at its end)")),
    }
    let bytes = u64::from(u32::from_le_bytes(*bytes));
    if bytes > end || bytes > MAX_FOOTER_BYTES {
        return Err(source.corrupt(end, &format!("is corrupt (its footer is said to have {bytes} bytes)")));
    }
    let footer = source.store.get_range(&source.key, end - bytes..end).await?;
    guarded(source, end - bytes, "footer", || ParquetMetaDataReader::decode_metadata(&footer))
}

/// The row groups that have rows, by their number, with the rows and bytes of each.
fn groups(source: &Source, meta: &ParquetMetaData) -> Result<Vec<(usize, Piece)>, DataError> {
    let (mut groups, mut row) = (Vec::new(), 0_u64);
    for (index, group) in meta.row_groups().iter().enumerate() {
        let wrong = |what: &str| source.corrupt(source.bytes, &format!("is corrupt (row group {index}: {what})"));
        let rows = u64::try_from(group.num_rows()).map_err(|_| wrong("fewer than no rows"))?;
        let end = row.checked_add(rows).ok_or_else(|| wrong("more rows than can be counted"))?;
        let bytes = (0..group.num_columns())
            .map(|column| chunk(group, column).filter(|chunk| chunk.end <= source.bytes))
            .reduce(|a, b| Some(together(&a?, &b?)))
            .flatten()
            .ok_or_else(|| wrong("columns outside the file"))?;
        if rows > 0 {
            groups.push((index, Piece { rows: row..end, bytes }));
        }
        row = end;
    }
    Ok(groups)
}

/// Where in the file a column of a row group lies.
fn chunk(group: &RowGroupMetaData, column: usize) -> Option<Range<u64>> {
    let column = group.columns().get(column)?;
    // Some writers put 0 where there is no dictionary.
    let dictionary = column.dictionary_page_offset().filter(|offset| *offset > 0);
    let start = u64::try_from(dictionary.map_or(column.data_page_offset(), |at| at.min(column.data_page_offset()))).ok()?;
    Some(start..start.checked_add(u64::try_from(column.compressed_size()).ok()?)?)
}

fn together(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.min(b.start)..a.end.max(b.end)
}

fn span(a: &Range<u64>, b: &Range<u64>) -> u64 {
    let both = together(a, b);
    both.end - both.start
}

/// Calls the library on bytes that may be damaged: its errors and panics become ours.
fn guarded<T>(source: &Source, offset: u64, place: &str, call: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, DataError> {
    let corrupt = |what: String| source.corrupt(offset, &format!("cannot be read ({place}: {what})"));
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(ParquetError::External(error))) => match error.downcast::<io::Error>() {
            Ok(error) => Err(data_error(*error, |e| corrupt(e.to_string()))),
            Err(error) => Err(corrupt(error.to_string())),
        },
        Ok(Err(error)) => Err(corrupt(error.to_string())),
        Err(_) => Err(corrupt("it cannot be decoded".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_groups_are_put_together_up_to_a_size() {
        let mib = |range: Range<u64>| range.start << 20..range.end << 20;
        let group = |rows, bytes| Piece { rows, bytes: mib(bytes) };
        let groups = [group(0..1, 0..100), group(1..3, 100..256), group(3..4, 256..257), group(4..5, 257..900), group(5..6, 900..901)];
        let pieces = [group(0..3, 0..256), group(3..4, 256..257), group(4..5, 257..900), group(5..6, 900..901)];
        assert_eq!(put_together(groups), pieces);
    }
}
