//! Arrow IPC files in memory or mapped: batches out of bytes without copying, columns by name.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::{FileDecoder, read_footer_length};
use arrow_ipc::root_as_footer;
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, DataType, SchemaRef};
use bytes::Bytes;

use crate::error::DataError;

/// Rows of a record batch at most.
pub(crate) const BATCH_ROWS: usize = 256;
/// A record batch is closed at this many bytes, well below where 32-bit offsets end.
pub(crate) const BATCH_BYTES: u64 = 64 << 20;
const TRAILER: usize = 10;

/// Maps a local file.
pub(crate) fn map(path: &Path) -> Result<Bytes, DataError> {
    let io = |source| DataError::Io { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    // SAFETY: prepared files are written once under their final name and never changed. Should someone truncate one
    // while it is mapped, the process gets a bus error; there is no way to map a file that excludes this.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(map))
}

/// An Arrow IPC file growing in memory.
pub(crate) struct Writer {
    file: FileWriter<Vec<u8>>,
    schema: SchemaRef,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("schema", &self.schema).finish_non_exhaustive()
    }
}

impl Writer {
    pub(crate) fn new(schema: SchemaRef) -> Result<Writer, DataError> {
        let file = FileWriter::try_new(Vec::new(), &schema).map_err(unwritable)?;
        Ok(Writer { file, schema })
    }

    /// Appends a batch, its columns in the schema's order.
    pub(crate) fn write(&mut self, columns: Vec<ArrayRef>) -> Result<(), DataError> {
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns);
        batch.and_then(|batch| self.file.write(&batch)).map_err(unwritable)
    }

    pub(crate) fn finish(mut self) -> Result<Bytes, DataError> {
        self.file.finish().map_err(unwritable)?;
        Ok(self.file.into_inner().map_err(unwritable)?.into())
    }
}

pub(crate) fn unwritable(error: ArrowError) -> DataError {
    DataError::Arrow { file: "file being written".into(), what: error.to_string() }
}

/// All batches of an Arrow IPC file. The arrays point into `bytes`. `columns`: name and type that every batch must have.
pub(crate) fn batches(file: &str, bytes: Bytes, columns: &[(&str, DataType)]) -> Result<Vec<RecordBatch>, DataError> {
    let wrong = |what: String| DataError::Arrow { file: file.to_owned(), what };
    // Arrow checks most of what a damaged file may claim, and asserts the rest.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode(bytes)));
    let batches = decoded.map_err(|_| wrong("it is damaged".into()))?.map_err(|e| wrong(e.to_string()))?;
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

fn decode(bytes: Bytes) -> Result<Vec<RecordBatch>, ArrowError> {
    let damaged = |what: &str| ArrowError::ParseError(what.to_owned());
    let buffer = Buffer::from(bytes);
    let end = buffer.len().checked_sub(TRAILER).ok_or_else(|| damaged("the file is too short"))?;
    let trailer = buffer[end..].try_into().map_err(|_| damaged("the file is too short"))?;
    let length = read_footer_length(trailer)?;
    let start = end.checked_sub(length).ok_or_else(|| damaged("the footer is longer than the file"))?;
    let footer = root_as_footer(&buffer[start..end]).map_err(|e| damaged(&format!("the footer is damaged: {e}")))?;
    let schema = footer.schema().ok_or_else(|| damaged("the footer has no schema"))?;
    let decoder = FileDecoder::new(Arc::new(try_fb_to_schema(schema)?), footer.version());
    let mut batches = Vec::new();
    for block in footer.recordBatches().into_iter().flatten() {
        let range = || {
            let offset = usize::try_from(block.offset()).ok()?;
            let head = usize::try_from(block.metaDataLength()).ok()?;
            let length = head.checked_add(usize::try_from(block.bodyLength()).ok()?)?;
            (head >= 8 && offset.checked_add(length)? <= start).then_some((offset, length))
        };
        let (offset, length) = range().ok_or_else(|| damaged("a batch lies outside the file"))?;
        batches.extend(decoder.read_record_batch(block, &buffer.slice_with_length(offset, length))?);
    }
    Ok(batches)
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
