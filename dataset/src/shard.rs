//! Prepared shards: Arrow IPC files with a row per sample.
//!
//! Columns: `key`, `caption` (utf8; the captions of a column named NAME are in `caption_NAME`, and one that a sample lacks is empty); with
//! pictures also `width`, `height` (u32, of the original), `crop_x`, `crop_y` (u32, in pixels of the resized picture) and `image` (binary,
//! JPEG or WebP) or `moments` (fixed-size list of f16, `[channels, height, width]`) or both. All pictures of a shard have one size.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, StringBuilder};
use arrow_array::{Array, ArrayRef, BinaryArray, FixedSizeListArray, Float16Array, RecordBatch, StringArray, UInt32Array};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use half::f16;

use crate::content::Content;
use crate::error::DataError;
use crate::ipc::{self, BATCH_BYTES, BATCH_ROWS, RowIndex, unwritable};

const CAPTION: &str = "caption";
const NUMBERS: [&str; 4] = ["width", "height", "crop_x", "crop_y"];

/// Which columns a shard has beside the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardLayout {
    /// Names of the columns of captions, at least one.
    pub captions: Vec<String>,
    /// The pictures' sizes and crops.
    pub pictures: bool,
    /// Encoded images.
    pub images: bool,
    /// VAE moments: numbers a row.
    pub moments: Option<usize>,
}

impl Default for ShardLayout {
    /// Captions only, in one column.
    fn default() -> ShardLayout {
        ShardLayout { captions: vec![CAPTION.into()], pictures: false, images: false, moments: None }
    }
}

/// The Arrow column of a column of captions.
fn caption_column(name: &str) -> String {
    if name == CAPTION { name.to_owned() } else { format!("{CAPTION}_{name}") }
}

impl ShardLayout {
    fn columns(&self) -> Vec<(String, DataType)> {
        let mut columns = vec![("key".to_owned(), DataType::Utf8)];
        columns.extend(self.captions.iter().map(|name| (caption_column(name), DataType::Utf8)));
        if self.pictures {
            columns.extend(NUMBERS.map(|name| (name.to_owned(), DataType::UInt32)));
        }
        if self.images {
            columns.push(("image".to_owned(), DataType::Binary));
        }
        if let Some(len) = self.moments {
            columns.push(("moments".to_owned(), DataType::FixedSizeList(item(), len as i32)));
        }
        columns
    }

    fn schema(&self) -> SchemaRef {
        let fields = self.columns().into_iter().map(|(name, kind)| Field::new(name, kind, false));
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }
}

fn item() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::Float16, false))
}

/// A row to write.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// The sample's key.
    pub key: String,
    /// Its captions, one for each of the layout's columns; empty ones where it has none.
    pub captions: Vec<String>,
    /// Width and height of the original, pixels.
    pub original: (u32, u32),
    /// Left and top of the crop, in pixels of the resized picture.
    pub crop: (u32, u32),
    /// Encoded image; empty where the layout has none.
    pub image: Vec<u8>,
    /// VAE moments; empty where the layout has none.
    pub moments: Vec<f16>,
}

impl Row {
    fn bytes(&self) -> u64 {
        let captions: usize = self.captions.iter().map(String::len).sum();
        (self.key.len() + captions + self.image.len() + 2 * self.moments.len()) as u64
    }
}

/// Writes one shard into memory. Equal rows make equal bytes.
#[derive(Debug)]
pub struct ShardWriter {
    layout: ShardLayout,
    file: ipc::Writer,
    batch: Vec<Row>,
    batch_bytes: u64,
    rows: u64,
    bytes: u64,
}

impl ShardWriter {
    /// An empty shard.
    pub fn new(layout: ShardLayout) -> Result<ShardWriter, DataError> {
        let file = ipc::Writer::new(layout.schema())?;
        Ok(ShardWriter { layout, file, batch: Vec::new(), batch_bytes: 0, rows: 0, bytes: 0 })
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes of the rows so far, without the file's own overhead.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends a row. Moments of a wrong length, or captions of a wrong number, are an error.
    pub fn push(&mut self, row: Row) -> Result<(), DataError> {
        let counts = [
            ("moments", self.layout.moments.unwrap_or(0), row.moments.len()),
            ("captions", self.layout.captions.len(), row.captions.len()),
        ];
        if let Some((what, expected, found)) = counts.into_iter().find(|(_, expected, found)| expected != found) {
            let what = format!("{what} of {}: expected {expected}, found {found}", row.key);
            return Err(unwritable(ArrowError::InvalidArgumentError(what)));
        }
        if self.batch.len() == BATCH_ROWS || self.batch_bytes + row.bytes() > BATCH_BYTES {
            self.flush()?;
        }
        self.rows += 1;
        self.bytes += row.bytes();
        self.batch_bytes += row.bytes();
        self.batch.push(row);
        Ok(())
    }

    /// The file's bytes.
    pub fn finish(mut self) -> Result<Bytes, DataError> {
        self.flush()?;
        self.file.finish()
    }

    fn flush(&mut self) -> Result<(), DataError> {
        let rows = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        if rows.is_empty() {
            return Ok(());
        }
        self.file.write(columns(&self.layout, &rows).map_err(unwritable)?)
    }
}

fn columns(layout: &ShardLayout, rows: &[Row]) -> Result<Vec<ArrayRef>, ArrowError> {
    let text = |of: &dyn for<'r> Fn(&'r Row) -> &'r str| -> ArrayRef {
        let mut builder = StringBuilder::new();
        rows.iter().for_each(|row| builder.append_value(of(row)));
        Arc::new(builder.finish())
    };
    let number = |of: fn(&Row) -> u32| -> ArrayRef { Arc::new(UInt32Array::from_iter_values(rows.iter().map(of))) };
    let mut columns = vec![text(&|row| &row.key)];
    columns.extend((0..layout.captions.len()).map(|column| text(&move |row| &row.captions[column])));
    if layout.pictures {
        columns.extend([number(|r| r.original.0), number(|r| r.original.1), number(|r| r.crop.0), number(|r| r.crop.1)]);
    }
    if layout.images {
        let mut builder = BinaryBuilder::new();
        rows.iter().for_each(|row| builder.append_value(&row.image));
        columns.push(Arc::new(builder.finish()));
    }
    if let Some(len) = layout.moments {
        let numbers = Float16Array::from_iter_values(rows.iter().flat_map(|row| row.moments.iter().copied()));
        columns.push(Arc::new(FixedSizeListArray::try_new(item(), len as i32, Arc::new(numbers), None)?));
    }
    Ok(columns)
}

/// A row of an open shard; everything points into the shard's bytes.
#[derive(Clone, Copy, Debug)]
pub struct RowRef<'a> {
    /// The sample's key.
    pub key: &'a str,
    /// Its caption in the first column.
    pub caption: &'a str,
    /// Width and height of the original; none if the data set has only captions.
    pub original: Option<(u32, u32)>,
    /// Left and top of the crop; none if the data set has only captions.
    pub crop: Option<(u32, u32)>,
    /// Encoded image (JPEG), if stored.
    pub image: Option<&'a [u8]>,
    /// VAE moments `[channels, height, width]`, if stored.
    pub moments: Option<&'a [f16]>,
    captions: &'a [StringArray],
    at: usize,
}

impl<'a> RowRef<'a> {
    /// Its caption in one of the layout's columns; empty where it has none. None: there is no such column.
    pub fn caption_in(&self, column: usize) -> Option<&'a str> {
        self.captions.get(column).map(|captions| captions.value(self.at))
    }
}

#[derive(Debug)]
struct Batch {
    key: StringArray,
    captions: Vec<StringArray>,
    numbers: Option<[UInt32Array; 4]>,
    image: Option<BinaryArray>,
    moments: Option<(Float16Array, usize)>,
    /// Where all but images and moments lies in the file.
    small: Vec<Range<usize>>,
}

/// An open shard: random access to rows without copying.
#[derive(Debug)]
pub struct ShardReader {
    content: Content,
    layout: ShardLayout,
    index: RowIndex,
    batches: Vec<Batch>,
}

impl ShardReader {
    /// Opens a shard from its bytes, which may be mapped. `file` names it in errors; the columns must be those of `layout`.
    pub fn open(file: &str, bytes: Bytes, layout: ShardLayout) -> Result<ShardReader, DataError> {
        ShardReader::of(Content::good(file, bytes), layout)
    }

    /// Maps a local file and opens it.
    pub fn open_path(path: &Path, layout: ShardLayout) -> Result<ShardReader, DataError> {
        ShardReader::of(Content::map(&path.display().to_string(), path)?, layout)
    }

    pub(crate) fn of(content: Content, layout: ShardLayout) -> Result<ShardReader, DataError> {
        content.scattered(|| ShardReader::parse(content.clone(), layout))
    }

    fn parse(content: Content, layout: ShardLayout) -> Result<ShardReader, DataError> {
        let mut index = RowIndex::default();
        let mut batches = Vec::new();
        let columns = layout.columns();
        let columns: Vec<_> = columns.iter().map(|(name, kind)| (name.as_str(), kind.clone())).collect();
        for batch in ipc::batches(&content, &columns)? {
            index.push(batch.num_rows());
            batches.push(Batch::new(&content, &batch, &layout)?);
        }
        Ok(ShardReader { content, layout, index, batches })
    }

    /// The columns there are.
    pub fn layout(&self) -> &ShardLayout {
        &self.layout
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.index.rows()
    }

    /// One row; an error if there is none of that number, or if its bytes are not those that were written.
    pub fn row(&self, row: usize) -> Result<RowRef<'_>, DataError> {
        let (batch, at) = self.find(row)?;
        batch.small.iter().try_for_each(|part| self.content.check(part.clone()))?;
        let row = batch.row(at);
        row.image.map_or(Ok(()), |image| self.content.check_slice(image))?;
        row.moments.map_or(Ok(()), |moments| self.content.check_slice(moments))?;
        Ok(row)
    }

    /// Has the system begin to read a row of a local file.
    pub(crate) fn read_ahead(&self, row: usize) -> Result<(), DataError> {
        let (batch, at) = self.find(row)?;
        let row = batch.row(at);
        let parts = [row.image.and_then(|image| self.content.range(image)), row.moments.and_then(|moments| self.content.range(moments))];
        parts.into_iter().flatten().for_each(|part| self.content.read_ahead(part));
        Ok(())
    }

    /// Has the system begin to read a row of a local file that is about to be used, if it never was.
    pub(crate) fn expect(&self, row: usize) -> Result<(), DataError> {
        let (batch, at) = self.find(row)?;
        let row = batch.row(at);
        row.image.iter().for_each(|image| self.content.expect(image));
        row.moments.iter().for_each(|moments| self.content.expect(moments));
        Ok(())
    }

    fn find(&self, row: usize) -> Result<(&Batch, usize), DataError> {
        let missing = || DataError::Row { file: self.content.name().to_owned(), row, rows: self.rows() };
        let (batch, at) = self.index.find(row).ok_or_else(missing)?;
        Ok((&self.batches[batch], at))
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    /// A row's caption in one of the layout's columns; empty where it has none.
    pub fn caption(&self, row: usize, column: usize) -> Result<&str, DataError> {
        let (batch, at) = self.find(row)?;
        batch.small.iter().try_for_each(|part| self.content.check(part.clone()))?;
        let unknown =
            || DataError::Arrow { file: self.content.name().to_owned(), what: format!("has no column of captions number {column}") };
        batch.captions.get(column).map(|captions| captions.value(at)).ok_or_else(unknown)
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = RowRef<'_>> {
        self.batches.iter().flat_map(|batch| (0..batch.key.len()).map(|at| batch.row(at)))
    }
}

impl Batch {
    fn new(content: &Content, batch: &RecordBatch, layout: &ShardLayout) -> Result<Batch, DataError> {
        let file = content.name();
        let number = |i: usize| ipc::column::<UInt32Array>(file, batch, NUMBERS[i]);
        let moments = |len: usize| -> Result<_, DataError> {
            let list = ipc::column::<FixedSizeListArray>(file, batch, "moments")?;
            let numbers = list.values().as_any().downcast_ref::<Float16Array>().cloned();
            let wrong = || DataError::Arrow { file: file.to_owned(), what: "column moments: expected f16".into() };
            Ok((numbers.ok_or_else(wrong)?, len))
        };
        let captions = layout.captions.iter().map(|name| ipc::column(file, batch, &caption_column(name)));
        Ok(Batch {
            key: ipc::column(file, batch, "key")?,
            captions: captions.collect::<Result<_, _>>()?,
            numbers: if layout.pictures { Some([number(0)?, number(1)?, number(2)?, number(3)?]) } else { None },
            image: if layout.images { Some(ipc::column(file, batch, "image")?) } else { None },
            moments: layout.moments.map(moments).transpose()?,
            small: ipc::small_parts(content, batch, &["image", "moments"]),
        })
    }

    fn row(&self, at: usize) -> RowRef<'_> {
        let pair = |i: usize| self.numbers.as_ref().map(|n| (n[i].value(at), n[i + 1].value(at)));
        RowRef {
            key: self.key.value(at),
            caption: self.captions.first().map_or("", |captions| captions.value(at)),
            original: pair(0),
            crop: pair(2),
            image: self.image.as_ref().map(|image| image.value(at)),
            moments: self.moments.as_ref().map(|(numbers, len)| &numbers.values()[at * len..(at + 1) * len]),
            captions: &self.captions,
            at,
        }
    }
}
