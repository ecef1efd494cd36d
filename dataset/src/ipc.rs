//! Arrow IPC files in memory or mapped: batches out of bytes without copying, columns by name.

use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_data::ArrayData;
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::{FileDecoder, read_footer_length};
use arrow_ipc::writer::FileWriter;
use arrow_ipc::{root_as_footer, root_as_message};
use arrow_schema::{ArrowError, DataType, SchemaRef};
use bytes::Bytes;

use crate::content::Content;
use crate::error::DataError;

/// Rows of a record batch at most.
pub(crate) const BATCH_ROWS: usize = 256;
/// A record batch is closed at this many bytes, well below where 32-bit offsets end.
pub(crate) const BATCH_BYTES: u64 = 64 << 20;
const TRAILER: usize = 10;
/// More than a footer takes, as a rule.
const FOOTER: usize = 16 << 10;
/// Buffers up to this size are read as a file is opened: keys, captions, offsets; larger ones hold what rows are read for.
const SMALL: usize = 4 << 20;
/// Parts that lie no further apart are asked of a disk as one.
const AROUND: usize = 64 << 10;
/// Parts of a file that lie no further apart are checked as one: Arrow pads its buffers.
const JOINED: usize = 64;

/// An Arrow IPC file that grows, in memory or on this machine's disk.
pub(crate) struct Writer {
    file: FileWriter<Sink>,
    schema: SchemaRef,
}

enum Sink {
    Memory(Vec<u8>),
    Disk(BufWriter<File>),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Memory(memory) => memory.write(bytes),
            Sink::Disk(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Sink::Memory(memory) => memory.flush(),
            Sink::Disk(file) => file.flush(),
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("schema", &self.schema).finish_non_exhaustive()
    }
}

impl Writer {
    pub(crate) fn new(schema: SchemaRef) -> Result<Writer, DataError> {
        let file = FileWriter::try_new(Sink::Memory(Vec::new()), &schema).map_err(unwritable)?;
        Ok(Writer { file, schema })
    }

    /// One that grows in a file without a name, which is gone when its bytes are let go of.
    pub(crate) fn on_disk(schema: SchemaRef) -> Result<Writer, DataError> {
        let sink = Sink::Disk(BufWriter::new(nameless()?));
        Ok(Writer { file: FileWriter::try_new(sink, &schema).map_err(unwritable)?, schema })
    }

    /// Appends a batch, its columns in the schema's order.
    pub(crate) fn write(&mut self, columns: Vec<ArrayRef>) -> Result<(), DataError> {
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns);
        batch.and_then(|batch| self.file.write(&batch)).map_err(unwritable)
    }

    pub(crate) fn finish(mut self) -> Result<Bytes, DataError> {
        self.file.finish().map_err(unwritable)?;
        match self.file.into_inner().map_err(unwritable)? {
            Sink::Memory(memory) => Ok(memory.into()),
            Sink::Disk(file) => mapped(file),
        }
    }
}

/// A file in the system's folder for temporary files that nobody else can see.
pub(crate) fn nameless() -> Result<File, DataError> {
    tempfile::tempfile().map_err(unspoolable)
}

/// The bytes of a nameless file.
pub(crate) fn mapped(file: BufWriter<File>) -> Result<Bytes, DataError> {
    let file = file.into_inner().map_err(|error| unspoolable(error.into_error()))?;
    if file.metadata().map_err(unspoolable)?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the file has no name and this is its only handle: nobody can change it.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(unspoolable)?;
    Ok(Bytes::from_owner(map))
}

pub(crate) fn unspoolable(source: io::Error) -> DataError {
    DataError::Temporary { folder: std::env::temp_dir(), source }
}

pub(crate) fn unwritable(error: ArrowError) -> DataError {
    DataError::Arrow { file: "file being written".into(), what: error.to_string() }
}

/// All batches of an Arrow IPC file. The arrays point into its bytes, which are not all checked yet. `columns`: name and type that every
/// batch must have.
pub(crate) fn batches(content: &Content, columns: &[(&str, DataType)]) -> Result<Vec<RecordBatch>, DataError> {
    let wrong = |what: String| DataError::Arrow { file: content.name().to_owned(), what };
    // Arrow checks most of what a damaged file may claim, and asserts the rest.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode(content)));
    let decoded = decoded.map_err(|_| wrong("it is damaged".into())).and_then(|decoded| decoded.map_err(|e| wrong(e.to_string())));
    // A file that is not the one that was written is told as that.
    let (batches, heads) = decoded.or_else(|error| content.check_all().and(Err(error)))?;
    heads.into_iter().try_for_each(|head| content.check(head))?;
    for batch in &batches {
        for (name, kind) in columns {
            let column = batch.column_by_name(name).ok_or_else(|| wrong(format!("column {name} is missing")))?;
            if column.data_type() != kind {
                return Err(wrong(format!("column {name}: expected {kind}, found {}", column.data_type())));
            }
            if column.null_count() > 0 {
                return Err(wrong(format!("column {name}: must have no nulls (found {})", column.null_count())));
            }
        }
    }
    Ok(batches)
}

/// The batches, and where in the file it is said what they are.
fn decode(content: &Content) -> Result<(Vec<RecordBatch>, Vec<Range<usize>>), ArrowError> {
    let damaged = |what: &str| ArrowError::ParseError(what.to_owned());
    let buffer = Buffer::from(content.bytes().clone());
    content.read_ahead(buffer.len().saturating_sub(FOOTER)..buffer.len());
    let end = buffer.len().checked_sub(TRAILER).ok_or_else(|| damaged("the file is too short"))?;
    let trailer = buffer[end..].try_into().map_err(|_| damaged("the file is too short"))?;
    let length = read_footer_length(trailer)?;
    let start = end.checked_sub(length).ok_or_else(|| damaged("the footer is longer than the file"))?;
    let footer = root_as_footer(&buffer[start..end]).map_err(|e| damaged(&format!("the footer is damaged: {e}")))?;
    let schema = footer.schema().ok_or_else(|| damaged("the footer has no schema"))?;
    let decoder = FileDecoder::new(Arc::new(try_fb_to_schema(schema)?), footer.version());
    let mut blocks = Vec::new();
    for block in footer.recordBatches().into_iter().flatten() {
        let range = || {
            let offset = usize::try_from(block.offset()).ok()?;
            let head = usize::try_from(block.metaDataLength()).ok()?;
            let length = head.checked_add(usize::try_from(block.bodyLength()).ok()?)?;
            (head >= 8 && offset.checked_add(length)? <= start).then_some((offset, head, length))
        };
        let (offset, head, length) = range().ok_or_else(|| damaged("a batch lies outside the file"))?;
        blocks.push((block, offset, head, length));
    }
    let heads = blocks.iter().map(|(_, offset, head, _)| *offset..offset + head).collect();
    joined(heads, AROUND).into_iter().for_each(|part| content.read_ahead(part));
    let small = blocks.iter().flat_map(|(_, offset, head, length)| small_buffers(&buffer[*offset..offset + length], *head, *offset));
    joined(small.collect(), AROUND).into_iter().for_each(|part| content.read_ahead(part));
    let (mut batches, mut heads) = (Vec::new(), Vec::new());
    heads.push(start..buffer.len());
    for (block, offset, head, length) in blocks {
        batches.extend(decoder.read_record_batch(block, &buffer.slice_with_length(offset, length))?);
        heads.push(offset..offset + head);
    }
    Ok((batches, heads))
}

/// Where the small buffers of a batch lie in the file, in which it begins at `offset`. What is damaged is left to who decodes it.
fn small_buffers(batch: &[u8], head: usize, offset: usize) -> Vec<Range<usize>> {
    // A continuation mark and the message's length come first.
    let message = root_as_message(&batch[8..head]).ok();
    let buffers = message.as_ref().and_then(|message| message.header_as_record_batch()?.buffers());
    let small = buffers.into_iter().flatten().filter_map(|buffer| {
        let start = head.checked_add(usize::try_from(buffer.offset()).ok()?)?;
        let len = usize::try_from(buffer.length()).ok().filter(|len| *len <= SMALL)?;
        let end = start.checked_add(len).filter(|end| *end <= batch.len())?;
        Some(offset + start..offset + end)
    });
    small.collect()
}

/// Where a batch's values lie in the file, all but the content of the columns `bulk`, which is large and checked row by row.
pub(crate) fn small_parts(content: &Content, batch: &RecordBatch, bulk: &[&str]) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    for (field, column) in batch.schema_ref().fields().iter().zip(batch.columns()) {
        buffers(&column.to_data(), bulk.contains(&field.name().as_str()), &mut |buffer| match content.range(buffer) {
            Some(part) => parts.push(part),
            // A copy that Arrow made.
            None => parts.push(0..content.bytes().len()),
        });
    }
    joined(parts, JOINED)
}

/// The parts in order, those that lie no further apart than `gap` as one.
fn joined(mut parts: Vec<Range<usize>>, gap: usize) -> Vec<Range<usize>> {
    parts.sort_by_key(|part| part.start);
    parts.dedup_by(|next, part| {
        let joined = next.start <= part.end + gap;
        part.end = if joined { part.end.max(next.end) } else { part.end };
        joined
    });
    parts
}

/// All of an array's buffers; of a bulk one only its offsets.
fn buffers(data: &ArrayData, bulk: bool, each: &mut impl FnMut(&[u8])) {
    let count = if bulk { 1 } else { usize::MAX };
    data.buffers().iter().take(count).for_each(|buffer| each(buffer));
    if let Some(nulls) = data.nulls() {
        each(nulls.buffer());
    }
    if !bulk {
        data.child_data().iter().for_each(|child| buffers(child, false, each));
    }
}

/// A column whose presence and type [`batches`] has checked.
pub(crate) fn column<T: Array + Clone + 'static>(file: &str, batch: &RecordBatch, name: &str) -> Result<T, DataError> {
    batch
        .column_by_name(name)
        .and_then(|column| column.as_any().downcast_ref::<T>())
        .cloned()
        .ok_or_else(|| DataError::Arrow { file: file.to_owned(), what: format!("column {name} is missing or of another type") })
}

/// Finds rows in batches of unequal length.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowIndex {
    starts: Vec<usize>,
    rows: usize,
}

impl RowIndex {
    pub(crate) fn push(&mut self, rows: usize) {
        self.starts.push(self.rows);
        self.rows += rows;
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Batch of a row, and the row within it.
    pub(crate) fn find(&self, row: usize) -> Option<(usize, usize)> {
        if row >= self.rows {
            return None;
        }
        let batch = self.starts.partition_point(|&start| start <= row) - 1;
        Some((batch, row - self.starts[batch]))
    }
}

#[cfg(test)]
mod tests {
    use arrow_array::{Float32Array, LargeListArray, StringArray};
    use arrow_buffer::OffsetBuffer;
    use arrow_schema::{Field, Schema};

    use super::*;

    /// What is checked as a file is opened was asked of the disk before, by the batch's head, and the bulk was not.
    #[test]
    fn a_batchs_head_says_where_its_small_buffers_lie() {
        let item = Arc::new(Field::new("item", DataType::Float32, false));
        let list = DataType::LargeList(Arc::clone(&item));
        let fields = vec![Field::new("key", DataType::Utf8, false), Field::new("features", list, false)];
        let mut writer = Writer::new(Arc::new(Schema::new(fields))).unwrap();
        for rows in [3usize, 200] {
            let keys: ArrayRef = Arc::new(StringArray::from_iter_values((0..rows).map(|row| format!("sample {row}"))));
            let numbers = Arc::new(Float32Array::from(vec![0.5; rows * 6000]));
            let offsets = OffsetBuffer::from_lengths(vec![6000; rows]);
            let features = LargeListArray::try_new(Arc::clone(&item), offsets, numbers, None).unwrap();
            writer.write(vec![keys, Arc::new(features)]).unwrap();
        }
        let content = Content::good("f", writer.finish().unwrap());
        let (batches, heads) = decode(&content).unwrap();
        let ends = heads.iter().skip(2).map(|head| head.start).chain([heads[0].start]);
        for ((batch, head), end) in batches.iter().zip(&heads[1..]).zip(ends) {
            let announced = small_buffers(&content.bytes()[head.start..end], head.len(), head.start);
            let within = |part: &Range<usize>| joined(announced.clone(), JOINED).iter().any(|a| a.start <= part.start && part.end <= a.end);
            let small = small_parts(&content, batch, &["features"]);
            assert!(!small.is_empty() && small.iter().all(within), "{small:?} of {announced:?}");
            let bulk = 4 * 6000 * batch.num_rows();
            assert_eq!(announced.iter().any(|part| part.len() >= bulk), bulk <= SMALL);
        }
        // A head that is no message is left to who decodes it.
        assert!(small_buffers(&[7; 64], 40, 0).is_empty());
    }
}
