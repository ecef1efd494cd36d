//! Lists: JSON lines, JSON arrays and CSV files whose rows name picture files.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Read;
use std::ops::Range;

use serde_json::{Map, Value};

use super::array::{Lines, NoArray};
use super::columns::{self, PATHS};
use super::fetch::{Pictures, RangeReader, Windows, data_error};
use super::rows::{Format, MAX_ROW_BYTES, Rows, values};
use super::sample::{Field, Fields, Sample, json_object};
use super::{Piece, PieceRead, Source, SourceKind, Within, within};
use crate::error::DataError;

/// Rows of a piece.
const PIECE_ROWS: u64 = 2000;
/// Of a list this much is fetched at once.
const WINDOWS: Windows = Windows { bytes: 4 << 20, ahead: 2 };

/// Passes over the list once and cuts it where rows begin. Blocks.
pub(super) fn pieces(source: &Source) -> Result<Vec<Piece>, DataError> {
    let list = List::open(source)?;
    let mut rows = list.rows(list.header_end..source.bytes);
    let (mut pieces, mut row, mut fits, mut lacks) = (Vec::<Piece>::new(), 0, list.picture_of_header()?, None);
    loop {
        let next = rows.next().map_err(|e| list.error(e))?;
        let at = next.as_ref().map_or(source.bytes, |row| row.at + list.header_end);
        if let Some(piece) = pieces.last_mut() {
            piece.rows.end = row;
            piece.bytes.end = at;
        }
        let Some(next) = next else { break };
        if row % PIECE_ROWS == 0 {
            pieces.push(Piece { rows: row..row, bytes: at..at });
        }
        // Rows of JSON each have their own columns; one with a picture's tells that this is a list of pictures at all.
        if !fits && let Some(Values::Json(object)) = next.bytes.and_then(|bytes| list.values(bytes)) {
            let names: Vec<&str> = object.keys().map(String::as_str).collect();
            fits = list.picture_among(&names).is_some();
            lacks.get_or_insert_with(|| source.no_picture(&names));
        }
        row += 1;
    }
    if let Some(lacks) = lacks.filter(|_| !fits) {
        return Err(lacks);
    }
    if pieces.is_empty() { Err(source.corrupt(0, "holds no rows (expected samples)")) } else { Ok(pieces) }
}

/// Whether any row has a column of one of these names, or a field within one. Blocks.
pub(super) fn has_field(source: &Source, fields: &[String]) -> Result<bool, DataError> {
    let list = List::open(source)?;
    let mut rows = list.rows(list.header_end..source.bytes);
    while let Some(row) = rows.next().map_err(|e| list.error(e))? {
        if row.bytes.and_then(|bytes| list.values(bytes)).is_some_and(|values| fields.iter().any(|field| values.has(field))) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Reads a piece's rows and their pictures. Blocks.
pub(super) fn read(source: &Source, piece: &Piece, each: &mut dyn FnMut(Sample) -> bool) -> Result<Option<PieceRead>, DataError> {
    let list = List::open(source)?;
    let mut rows = list.rows(piece.bytes.clone());
    let mut pictures = Pictures::new(source);
    let mut number = piece.rows.start;
    while let Some(row) = rows.next().map_err(|e| list.error(e))? {
        let (sample, path) = match row.bytes.and_then(|bytes| list.values(bytes)) {
            Some(values) => list.sample(values, number),
            None => (Sample::broken(list.number(number)), None),
        };
        number += 1;
        if !pictures.push(sample, path.as_deref(), each)? {
            return Ok(None);
        }
    }
    if number != piece.rows.end {
        return Err(source.changed(&format!("{} rows in this part", piece.rows.end - piece.rows.start), &format!("{number}")));
    }
    Ok(pictures.flush(each)?.then(|| pictures.tally.finish(piece.bytes.end - piece.bytes.start)))
}

/// A list and, of a CSV file, the names of its columns.
struct List<'a> {
    source: &'a Source,
    format: Format,
    header: Vec<String>,
    header_end: u64,
}

/// A row's values by name.
enum Values<'a> {
    Json(Map<String, Value>),
    Csv(HashMap<&'a str, Cow<'a, [u8]>>),
}

impl<'a> List<'a> {
    fn open(source: &'a Source) -> Result<List<'a>, DataError> {
        let format = if source.kind == SourceKind::Csv { Format::Csv } else { Format::Jsonl };
        let mut list = List { source, format, header: Vec::new(), header_end: 0 };
        if format == Format::Jsonl {
            return Ok(list);
        }
        let mut rows = list.rows(0..source.bytes.min(MAX_ROW_BYTES as u64));
        let row = rows.next().map_err(|e| list.error(e))?;
        let corrupt = |what: &str| source.corrupt(0, &format!("{what} (expected the names of the columns, in UTF-8, in its first row)"));
        let header = row.ok_or_else(|| corrupt("is empty"))?.bytes.ok_or_else(|| corrupt("begins with a broken row"))?;
        for name in values(header) {
            let name = std::str::from_utf8(&name).map_err(|_| corrupt("is not UTF-8"))?.trim().to_owned();
            if list.header.contains(&name) {
                return Err(corrupt(&format!("names the column {name:?} twice")));
            }
            list.header.push(name);
        }
        list.header_end = rows.place();
        Ok(list)
    }

    fn rows(&self, range: Range<u64>) -> Rows<Box<dyn Read>> {
        let (at, last) = (range.start, range.end == self.source.bytes);
        let bytes = RangeReader::new(self.source, range, WINDOWS);
        let lines: Box<dyn Read> =
            if self.source.kind == SourceKind::Json { Box::new(Lines::new(bytes, at, last)) } else { Box::new(bytes) };
        Rows::new(lines, self.format)
    }

    fn error(&self, error: std::io::Error) -> DataError {
        data_error(error, |e| match e.get_ref().and_then(|e| e.downcast_ref::<NoArray>()) {
            Some(none) => self.source.corrupt(none.at, &none.to_string()),
            None => self.source.corrupt(0, &format!("cannot be read ({e})")),
        })
    }

    fn picture_among<'n>(&self, names: &[&'n str]) -> Option<&'n str> {
        let wanted: Vec<&str> = self.source.options.image_column.as_deref().map_or(PATHS.to_vec(), |name| vec![name]);
        wanted.iter().find_map(|wanted| names.iter().copied().find(|name| name == wanted))
    }

    /// Whether the header names a picture's column; false for a list without a header.
    fn picture_of_header(&self) -> Result<bool, DataError> {
        let names: Vec<&str> = self.header.iter().map(String::as_str).collect();
        match self.format {
            Format::Jsonl => Ok(false),
            Format::Csv => self.picture_among(&names).map(|_| true).ok_or_else(|| self.source.no_picture(&names)),
        }
    }

    /// The values of a row's bytes; none if they are broken.
    fn values<'v>(&'v self, row: &'v [u8]) -> Option<Values<'v>> {
        match self.format {
            Format::Jsonl => json_object(row).map(Values::Json),
            Format::Csv => {
                let values = values(row);
                let whole = values.len() == self.header.len();
                whole.then(|| Values::Csv(self.header.iter().map(String::as_str).zip(values).collect()))
            }
        }
    }

    fn sample(&self, values: Values<'_>, number: u64) -> (Sample, Option<Vec<u8>>) {
        let names = values.names();
        let picture = self.picture_among(&names);
        let path = picture.and_then(|name| values.bytes(name));
        let key = columns::keys(self.source.options.key_column.as_deref(), picture).find_map(|name| values.bytes(name));
        let mut sample = Sample::of_key(&columns::key_of(key.as_deref(), path.as_deref(), self.source.stem(), number));
        let path = path.map(Cow::into_owned);
        sample.fields = values.fields(&self.source.within);
        (sample, path)
    }

    fn number(&self, number: u64) -> String {
        String::from_utf8_lossy(&columns::key_of(None, None, self.source.stem(), number)).into_owned()
    }
}

impl Values<'_> {
    fn names(&self) -> Vec<&str> {
        match self {
            Values::Json(object) => object.keys().map(String::as_str).collect(),
            Values::Csv(values) => values.keys().copied().collect(),
        }
    }

    fn has(&self, field: &str) -> bool {
        match self {
            Values::Json(object) => within::at(object, field).is_some(),
            Values::Csv(values) => values.contains_key(field),
        }
    }

    /// A text or number as it is written; none if there is no such, or an empty one.
    fn bytes(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let found = match self {
            Values::Csv(values) => values.get(name).map(|value| Cow::Borrowed(value.as_ref())),
            Values::Json(object) => match object.get(name)? {
                Value::String(text) => Some(Cow::Borrowed(text.as_bytes())),
                Value::Number(number) => Some(Cow::Owned(number.to_string().into_bytes())),
                _ => None,
            },
        };
        found.filter(|bytes| !bytes.is_empty())
    }

    fn fields(self, within: &Within) -> Fields {
        match self {
            Values::Json(object) => within.fields(object),
            Values::Csv(values) => values.into_iter().map(|(name, value)| (name.to_owned(), csv_field(&value))).collect(),
        }
    }
}

/// CSV has no types: what is written as a finite number is one.
fn csv_field(value: &[u8]) -> Field {
    match Field::text(value) {
        Field::Text(text) if text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) => match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Field::Number(number),
            _ => Field::Text(text),
        },
        field => field,
    }
}
