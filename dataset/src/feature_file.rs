//! One file of features: Arrow IPC, columns `tokens` (u32: a caption's own tokens) and `features` (list of f16, f32, or u16
//! holding the bits of bf16: all stored positions of the row, `[positions, width]`).

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, LargeListArray, UInt32Array, make_array};
use arrow_buffer::{Buffer, OffsetBuffer};
use arrow_data::ArrayData;
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use bytes::Bytes;

use crate::content::Content;
use crate::error::DataError;
use crate::features::{FeatureDtype, FeatureSpec};
use crate::ipc::{self, BATCH_BYTES, BATCH_ROWS, RowIndex, unwritable};

fn number(dtype: FeatureDtype) -> DataType {
    match dtype {
        FeatureDtype::F16 => DataType::Float16,
        // Arrow has no bfloat16: the bits, as they are.
        FeatureDtype::Bf16 => DataType::UInt16,
        FeatureDtype::F32 => DataType::Float32,
    }
}

fn columns(spec: &FeatureSpec) -> [(&'static str, DataType); 2] {
    let item = Arc::new(Field::new("item", number(spec.dtype), false));
    [("tokens", DataType::UInt32), ("features", DataType::LargeList(item))]
}

fn schema(spec: &FeatureSpec) -> SchemaRef {
    Arc::new(Schema::new(columns(spec).map(|(name, kind)| Field::new(name, kind, false)).to_vec()))
}

/// Writes the features of one shard into a temporary file without a name (in `TMPDIR`, which should be on a disk): a gibibyte for a shard of
/// 128 MiB under T5-XL.
#[derive(Debug)]
pub struct FeatureWriter {
    spec: FeatureSpec,
    file: ipc::Writer,
    tokens: Vec<u32>,
    numbers: Vec<u8>,
    rows: u64,
}

impl FeatureWriter {
    /// An empty file.
    pub fn new(spec: &FeatureSpec) -> Result<FeatureWriter, DataError> {
        let file = ipc::Writer::on_disk(schema(spec))?;
        Ok(FeatureWriter { spec: spec.clone(), file, tokens: Vec::new(), numbers: Vec::new(), rows: 0 })
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Appends the features of the next row: little-endian numbers of the spec's dtype, `[positions, width]`, where positions is
    /// `max_tokens` with fixed padding and `tokens` (the caption's own) without. A row without tokens is of a caption that is not there.
    pub fn push(&mut self, features: &[u8], tokens: u32) -> Result<(), DataError> {
        let wrong = |what| Err(DataError::FeatureRow { row: self.rows as usize, what });
        if tokens > self.spec.max_tokens {
            return wrong(format!("tokens must be at most {} (found {tokens})", self.spec.max_tokens));
        }
        let expected = self.spec.stored_tokens(tokens) as usize * self.spec.token_bytes();
        if features.len() != expected {
            return wrong(format!("{tokens} tokens need {expected} bytes (found {})", features.len()));
        }
        if self.tokens.len() == BATCH_ROWS || (self.numbers.len() + features.len()) as u64 > BATCH_BYTES {
            self.flush()?;
        }
        self.rows += 1;
        self.tokens.push(tokens);
        self.numbers.extend_from_slice(features);
        Ok(())
    }

    /// The file's bytes, mapped.
    pub fn finish(mut self) -> Result<Bytes, DataError> {
        self.flush()?;
        self.file.finish()
    }

    fn flush(&mut self) -> Result<(), DataError> {
        let (tokens, numbers) = (std::mem::take(&mut self.tokens), std::mem::take(&mut self.numbers));
        if tokens.is_empty() {
            return Ok(());
        }
        self.file.write(arrays(&self.spec, tokens, numbers).map_err(unwritable)?)
    }
}

/// Takes the features of a shard's rows in any order, and keeps them in a temporary file without a name until all are there.
#[derive(Debug)]
pub struct FeatureSpool {
    spec: FeatureSpec,
    file: BufWriter<File>,
    bytes: u64,
    /// Each row's start and length in the file, and its tokens.
    rows: Vec<(u64, usize, u32)>,
}

impl FeatureSpool {
    /// Room for so many rows. One that is not put has no tokens.
    pub fn new(spec: &FeatureSpec, rows: usize) -> Result<FeatureSpool, DataError> {
        let file = BufWriter::new(ipc::nameless()?);
        Ok(FeatureSpool { spec: spec.clone(), file, bytes: 0, rows: vec![(0, 0, 0); rows] })
    }

    /// Takes a row's features, as [`FeatureWriter::push`] does.
    pub fn put(&mut self, row: usize, features: &[u8], tokens: u32) -> Result<(), DataError> {
        let rows = self.rows.len();
        let place = self.rows.get_mut(row).ok_or_else(|| DataError::FeatureRow { row, what: format!("there are {rows} rows") })?;
        *place = (self.bytes, features.len(), tokens);
        self.bytes += features.len() as u64;
        self.file.write_all(features).map_err(ipc::unspoolable)
    }

    /// The file of all rows in order, mapped.
    pub fn finish(self) -> Result<Bytes, DataError> {
        let spooled = ipc::mapped(self.file)?;
        let mut writer = FeatureWriter::new(&self.spec)?;
        for (start, len, tokens) in self.rows {
            writer.push(&spooled[start as usize..start as usize + len], tokens)?;
        }
        writer.finish()
    }
}

fn arrays(spec: &FeatureSpec, tokens: Vec<u32>, numbers: Vec<u8>) -> Result<Vec<ArrayRef>, ArrowError> {
    let lengths = tokens.iter().map(|&t| spec.stored_tokens(t) as usize * spec.width as usize);
    let offsets = OffsetBuffer::<i64>::from_lengths(lengths);
    let len = numbers.len() / spec.dtype.bytes();
    let data = ArrayData::builder(number(spec.dtype)).len(len).add_buffer(Buffer::from(numbers)).align_buffers(true).build()?;
    let item = Arc::new(Field::new("item", number(spec.dtype), false));
    let features: ArrayRef = Arc::new(LargeListArray::try_new(item, offsets, make_array(data), None)?);
    Ok(vec![Arc::new(UInt32Array::from(tokens)), features])
}

#[derive(Debug)]
struct Batch {
    tokens: UInt32Array,
    /// In numbers, not bytes.
    offsets: OffsetBuffer<i64>,
    numbers: Buffer,
}

/// An open file of features: random access to rows without copying.
#[derive(Debug)]
pub struct FeatureReader {
    content: Content,
    spec: FeatureSpec,
    index: RowIndex,
    batches: Vec<Batch>,
}

impl FeatureReader {
    /// Opens a file from its bytes, which may be mapped. Rows must have the size that the spec says.
    pub fn open(file: &str, bytes: Bytes, spec: &FeatureSpec) -> Result<FeatureReader, DataError> {
        FeatureReader::of(Content::good(file, bytes), spec)
    }

    /// Maps a local file and opens it.
    pub fn open_path(path: &Path, spec: &FeatureSpec) -> Result<FeatureReader, DataError> {
        FeatureReader::of(Content::map(&path.display().to_string(), path)?, spec)
    }

    pub(crate) fn of(content: Content, spec: &FeatureSpec) -> Result<FeatureReader, DataError> {
        content.scattered(|| FeatureReader::parse(content.clone(), spec))
    }

    fn parse(content: Content, spec: &FeatureSpec) -> Result<FeatureReader, DataError> {
        let file = content.name();
        let mut index = RowIndex::default();
        let mut batches = Vec::new();
        for batch in ipc::batches(&content, &columns(spec))? {
            ipc::small_parts(&content, &batch, &["features"]).into_iter().try_for_each(|part| content.check(part))?;
            let tokens: UInt32Array = ipc::column(file, &batch, "tokens")?;
            let features: LargeListArray = ipc::column(file, &batch, "features")?;
            for (row, (&tokens, range)) in tokens.values().iter().zip(features.offsets().windows(2)).enumerate() {
                let (expected, found) = (i64::from(spec.stored_tokens(tokens)) * i64::from(spec.width), range[1] - range[0]);
                if expected != found || tokens > spec.max_tokens {
                    let row = index.rows() + row;
                    let what = format!("column features: row {row} of {tokens} tokens: expected {expected} numbers, found {found}");
                    return Err(DataError::Arrow { file: file.to_owned(), what });
                }
            }
            index.push(batch.num_rows());
            let numbers = features.values().to_data().buffers().first().cloned().unwrap_or_default();
            batches.push(Batch { tokens, offsets: features.offsets().clone(), numbers });
        }
        Ok(FeatureReader { content, spec: spec.clone(), index, batches })
    }

    /// The encoder.
    pub fn spec(&self) -> &FeatureSpec {
        &self.spec
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.index.rows()
    }

    /// A row's numbers (little-endian, `[positions, width]`) and its caption's own tokens. An error if there is no such row, or if its
    /// bytes are not those that were written.
    pub fn row(&self, row: usize) -> Result<(&[u8], u32), DataError> {
        let (numbers, tokens) = self.at(row)?;
        self.content.check_slice(numbers)?;
        Ok((numbers, tokens))
    }

    /// Positions stored of a row.
    pub fn positions(&self, row: usize) -> Result<u32, DataError> {
        Ok(self.spec.stored_tokens(self.at(row)?.1))
    }

    /// Has the system begin to read a row of a local file.
    pub(crate) fn read_ahead(&self, row: usize) -> Result<(), DataError> {
        self.content.range(self.at(row)?.0).into_iter().for_each(|part| self.content.read_ahead(part));
        Ok(())
    }

    /// Has the system begin to read a row of a local file that is about to be used, if it never was.
    pub(crate) fn expect(&self, row: usize) -> Result<(), DataError> {
        self.content.expect(self.at(row)?.0);
        Ok(())
    }

    /// A row, its numbers perhaps not checked yet.
    fn at(&self, row: usize) -> Result<(&[u8], u32), DataError> {
        let missing = || DataError::Row { file: self.content.name().to_owned(), row, rows: self.rows() };
        let (batch, at) = self.index.find(row).ok_or_else(missing)?;
        let batch = &self.batches[batch];
        let byte = |i: usize| batch.offsets[i] as usize * self.spec.dtype.bytes();
        Ok((&batch.numbers[byte(at)..byte(at + 1)], batch.tokens.value(at)))
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }
}
