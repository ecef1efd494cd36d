//! The columns of a row group, read row by row.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};

use half::f16;
use parquet::basic::ConvertedType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_column_reader};
use parquet::data_type::{ByteArray, DataType};
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;

use super::layout::Layout;
use super::page::Pages;
use super::spill::Resident;
use super::{chunk, guarded};
use crate::error::DataError;
use crate::source::fetch::{RangeReader, Windows};
use crate::source::sample::{Field, Fields, Member, Sample};
use crate::source::{Source, columns};

/// Rows whose fields are decoded at once.
const BATCH: usize = 32;
/// Of a column of pictures this much is fetched at once, and of any other.
const PICTURES: Windows = Windows { bytes: 4 << 20, ahead: 4 };
const FIELDS: Windows = Windows { bytes: 256 << 10, ahead: 2 };

/// The columns of a row group that are read.
pub(super) struct Columns<'a> {
    source: &'a Source,
    layout: &'a Layout,
    picture: Option<Column<'a>>,
    /// All others, by number.
    others: BTreeMap<usize, Column<'a>>,
    /// Rows not yet read.
    left: usize,
    resident: Resident,
}

impl<'a> Columns<'a> {
    /// Begins to fetch a row group's columns.
    pub(super) fn open(source: &'a Source, layout: &'a Layout, meta: &ParquetMetaData, group: usize) -> Result<Columns<'a>, DataError> {
        let left = usize::try_from(meta.row_group(group).num_rows()).unwrap_or(0);
        let resident = Resident::default();
        let open = |column: usize, windows| Column::open(source, meta, (group, column), windows, &resident);
        let picture = layout.picture.map(|column| open(column, PICTURES)).transpose()?;
        let mut others = BTreeMap::new();
        let fields = layout.fields.iter().map(|(_, column)| column);
        for &column in fields.chain(&layout.path).chain(&layout.keys) {
            if let Entry::Vacant(entry) = others.entry(column) {
                entry.insert(open(column, FIELDS)?);
            }
        }
        Ok(Columns { source, layout, picture, others, left, resident })
    }

    /// The next row, and where its picture is if that is elsewhere.
    pub(super) fn next(&mut self, row: u64) -> Result<(Sample, Option<Vec<u8>>), DataError> {
        let batch = self.left.min(BATCH);
        self.left = self.left.saturating_sub(1);
        let mut cells = BTreeMap::new();
        for (number, column) in &mut self.others {
            cells.insert(*number, column.next(batch)?);
        }
        let image = match &mut self.picture {
            Some(column) => column.next(1)?,
            None => Cell::Null,
        };
        let bytes = |column: &usize| cells.get(column).and_then(Cell::key);
        let path = self.layout.path.as_ref().and_then(bytes);
        let key = self.layout.keys.iter().find_map(bytes);
        let mut sample = Sample::of_key(&columns::key_of(key.as_deref(), path.as_deref(), self.source.stem(), row));
        if let Cell::Bytes(bytes) = &image {
            sample.image = Member::copied(bytes.data());
        }
        sample.fields = self.fields(&cells);
        self.resident.release();
        let elsewhere = sample.image == Member::Absent;
        Ok((sample, path.filter(|_| elsewhere)))
    }

    fn fields(&self, cells: &BTreeMap<usize, Cell>) -> Fields {
        let known = self.layout.fields.iter().map(|(name, column)| (name, cells.get(column).map_or(Field::Other, Cell::field)));
        let others = self.layout.others.iter().map(|name| (name, Field::Other));
        known.chain(others).map(|(name, field)| (name.clone(), field)).collect()
    }
}

/// A value.
enum Cell {
    Null,
    Bytes(ByteArray),
    Int(i64),
    Unsigned(u64),
    Float(f64),
    Other,
}

impl Cell {
    fn field(&self) -> Field {
        match self {
            Cell::Bytes(bytes) => Field::text(bytes.data()),
            Cell::Int(number) => Field::number(*number as f64),
            Cell::Unsigned(number) => Field::number(*number as f64),
            Cell::Float(number) => Field::number(*number),
            Cell::Null | Cell::Other => Field::Other,
        }
    }

    /// A text or number as it is written; none if there is no such, or an empty one.
    fn key(&self) -> Option<Vec<u8>> {
        let bytes = match self {
            Cell::Bytes(bytes) => bytes.data().to_vec(),
            Cell::Int(number) => number.to_string().into_bytes(),
            Cell::Unsigned(number) => number.to_string().into_bytes(),
            Cell::Float(number) => number.to_string().into_bytes(),
            Cell::Null | Cell::Other => Vec::new(),
        };
        Some(bytes).filter(|bytes| !bytes.is_empty())
    }
}

/// A column of a row group.
struct Column<'a> {
    source: &'a Source,
    /// As messages name it.
    place: String,
    offset: u64,
    reader: ColumnReader,
    /// The definition level of a value that is there.
    defined: i16,
    kind: ConvertedType,
    scale: i32,
    ready: VecDeque<Cell>,
}

impl<'a> Column<'a> {
    fn open(
        source: &'a Source,
        meta: &ParquetMetaData,
        (group, column): (usize, usize),
        windows: Windows,
        resident: &Resident,
    ) -> Result<Column<'a>, DataError> {
        let (descr, group_meta) = (meta.file_metadata().schema_descr().column(column), meta.row_group(group));
        let place = format!("row group {group}, column {}", descr.path().string());
        let range = chunk(group_meta, column).unwrap_or_default();
        let chunk_meta = group_meta.columns().get(column).filter(|chunk| chunk.num_values() == group_meta.num_rows());
        let Some(chunk_meta) = chunk_meta else {
            return Err(source.corrupt(range.start, &format!("is corrupt ({place}: other than one value for every row)")));
        };
        let pages = Pages::new(RangeReader::new(source, range.clone(), windows), range.end - range.start, chunk_meta, resident.clone());
        let (defined, kind, scale) = (descr.max_def_level(), descr.converted_type(), descr.type_scale());
        let reader = guarded(source, range.start, &place, || Ok(get_column_reader(descr, Box::new(pages))))?;
        Ok(Column { source, place, offset: range.start, reader, defined, kind, scale, ready: VecDeque::new() })
    }

    /// The next value; `batch` are decoded at once.
    fn next(&mut self, batch: usize) -> Result<Cell, DataError> {
        if self.ready.is_empty() {
            let Column { source, place, offset, reader, .. } = self;
            let (defined, kind, scale) = (self.defined, self.kind, self.scale);
            self.ready = guarded(source, *offset, place, || cells(reader, batch, defined, (kind, scale)))?;
        }
        Ok(self.ready.pop_front().unwrap_or(Cell::Null))
    }
}

fn number(int: i64, kind: ConvertedType, scale: i32) -> Cell {
    match kind {
        ConvertedType::DECIMAL => Cell::Float(int as f64 / 10_f64.powi(scale)),
        ConvertedType::UINT_64 => Cell::Unsigned(int as u64),
        _ => Cell::Int(int),
    }
}

/// Decimals are big-endian integers; what else of two bytes is read is a half.
fn fixed(bytes: &[u8], kind: ConvertedType, scale: i32) -> Cell {
    match bytes {
        [low, high] if kind != ConvertedType::DECIMAL => Cell::Float(f16::from_le_bytes([*low, *high]).to_f64()),
        [first, ..] if bytes.len() <= 16 => {
            let sign = if *first < 128 { 0 } else { -1 };
            let int = bytes.iter().fold(sign, |int: i128, byte| int << 8 | i128::from(*byte));
            Cell::Float(int as f64 / 10_f64.powi(scale))
        }
        _ => Cell::Other,
    }
}

fn cells(
    reader: &mut ColumnReader,
    rows: usize,
    defined: i16,
    (kind, scale): (ConvertedType, i32),
) -> Result<VecDeque<Cell>, ParquetError> {
    let int = |int| number(int, kind, scale);
    match reader {
        ColumnReader::Int32ColumnReader(reader) => values(reader, rows, defined, |v| int(v.into())),
        ColumnReader::Int64ColumnReader(reader) => values(reader, rows, defined, int),
        ColumnReader::FloatColumnReader(reader) => values(reader, rows, defined, |v| Cell::Float(v.into())),
        ColumnReader::DoubleColumnReader(reader) => values(reader, rows, defined, Cell::Float),
        ColumnReader::ByteArrayColumnReader(reader) => values(reader, rows, defined, Cell::Bytes),
        ColumnReader::BoolColumnReader(reader) => values(reader, rows, defined, |_| Cell::Other),
        ColumnReader::Int96ColumnReader(reader) => values(reader, rows, defined, |_| Cell::Other),
        ColumnReader::FixedLenByteArrayColumnReader(reader) => values(reader, rows, defined, |v| fixed(v.data(), kind, scale)),
    }
}

fn values<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    rows: usize,
    defined: i16,
    cell: impl Fn(T::T) -> Cell,
) -> Result<VecDeque<Cell>, ParquetError> {
    let (mut levels, mut values) = (Vec::new(), Vec::with_capacity(rows));
    let (found, ..) = reader.read_records(rows, Some(&mut levels), None, &mut values)?;
    if found != rows {
        return Err(ParquetError::General(format!("it ends before its last row ({found} of {rows} rows were there)")));
    }
    if defined == 0 {
        return Ok(values.into_iter().map(cell).collect());
    }
    let mut values = values.into_iter();
    Ok(levels.iter().map(|&level| if level == defined { values.next().map_or(Cell::Null, &cell) } else { Cell::Null }).collect())
}
