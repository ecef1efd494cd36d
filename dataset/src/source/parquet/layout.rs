//! Which of a Parquet file's columns hold what.

use parquet::basic::{ConvertedType, LogicalType, Type};
use parquet::schema::types::{ColumnDescPtr, ColumnDescriptor, SchemaDescriptor};

use crate::error::DataError;
use crate::source::{Source, Within, columns};

/// What is read of a file, by the number of the column (leaf).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Encoded pictures.
    pub(super) picture: Option<usize>,
    /// Paths of pictures: where there are no encoded ones.
    pub(super) path: Option<usize>,
    /// Keys, the preferred first.
    pub(super) keys: Vec<usize>,
    /// Texts and numbers, with their names.
    pub(super) fields: Vec<(String, usize)>,
    /// Names of columns that are neither.
    pub(super) others: Vec<String>,
}

impl Layout {
    /// Finds the columns by the rules of [`columns`].
    pub(super) fn of(source: &Source, schema: &SchemaDescriptor) -> Result<Layout, DataError> {
        let names: Vec<&str> = schema.root_schema().get_fields().iter().map(|field| field.name()).collect();
        let find = |path: &[&str], fits: fn(&ColumnDescriptor) -> bool| {
            schema.columns().iter().position(|column| {
                let parts = column.path().parts();
                column.max_rep_level() == 0 && parts.iter().eq(path) && fits(column)
            })
        };
        let bytes = |name: &str| {
            let within = find(&[name, "bytes"], is_bytes).map(|picture| (Some(picture), find(&[name, "path"], is_text)));
            within.or_else(|| find(&[name], is_bytes).map(|picture| (Some(picture), None)))
        };
        let path = |name: &str| find(&[name], is_text).map(|path| (None, Some(path)));
        let given = source.options.image_column.as_deref();
        let wanted = |usual: &[&'static str]| given.map_or(usual.to_vec(), |_| Vec::new()).into_iter().chain(given);
        let found = wanted(&columns::BYTES).find_map(|name| Some((name, bytes(name)?)));
        let found = found.or_else(|| wanted(&columns::PATHS).find_map(|name| Some((name, path(name)?))));
        let (name, (picture, path)) = found.ok_or_else(|| source.no_picture(&names))?;
        let keys = columns::keys(source.options.key_column.as_deref(), Some(name)).filter_map(|key| find(&[key], is_field)).collect();
        let (mut fields, mut others) = (Vec::new(), Vec::new());
        for field in names.iter().filter(|field| picture.is_none() || **field != name) {
            match find(&[field], is_field) {
                Some(column) => fields.push(((*field).to_owned(), column)),
                None => others.extend(other(source, schema, field)),
            }
        }
        for path in source.within.paths().iter().filter(|path| !names.contains(&path.as_str())) {
            // Names may hold dots themselves.
            let named = |column: &ColumnDescPtr| column.max_rep_level() == 0 && column.path().string() == *path && is_field(column);
            match schema.columns().iter().position(named) {
                Some(column) => fields.push((path.clone(), column)),
                None => refuse_list(source, schema, path)?,
            }
        }
        Ok(Layout { picture, path, keys, fields, others })
    }
}

/// What is told of a column that is no field: its name or, where that is asked for, those of the texts in it.
fn other(source: &Source, schema: &SchemaDescriptor, name: &str) -> Vec<String> {
    let within = |column: &&ColumnDescPtr| column.path().parts().first().is_some_and(|first| first == name);
    let texts = schema.columns().iter().filter(within).filter(|column| column.max_rep_level() == 0 && is_text(column));
    let texts: Vec<String> = match source.within {
        Within::Texts => texts.map(|column| column.path().string()).collect(),
        Within::Named(_) => Vec::new(),
    };
    if texts.is_empty() { vec![name.to_owned()] } else { texts }
}

/// Of a list one entry cannot be read apart here.
fn refuse_list(source: &Source, schema: &SchemaDescriptor, path: &str) -> Result<(), DataError> {
    let first = path.split('.').next();
    let in_list = |column: &ColumnDescPtr| column.max_rep_level() > 0 && column.path().parts().first().map(String::as_str) == first;
    if !schema.columns().iter().any(in_list) {
        return Ok(());
    }
    let what = format!("the field {path} lies in a list, and of lists in Parquet files none is read; write the rows as .jsonl instead");
    Err(DataError::SourceLocation { location: source.name.clone(), what })
}

fn is_bytes(column: &ColumnDescriptor) -> bool {
    column.physical_type() == Type::BYTE_ARRAY && column.converted_type() == ConvertedType::NONE
}

fn is_text(column: &ColumnDescriptor) -> bool {
    let text = [ConvertedType::UTF8, ConvertedType::ENUM, ConvertedType::JSON];
    column.physical_type() == Type::BYTE_ARRAY && text.contains(&column.converted_type())
}

fn is_field(column: &ColumnDescriptor) -> bool {
    is_text(column) || is_number(column)
}

/// Whether these are numbers: integers, floats, halves, decimals; not dates and times.
fn is_number(column: &ColumnDescriptor) -> bool {
    use ConvertedType::{DECIMAL, INT_8, INT_16, INT_32, INT_64, NONE, UINT_8, UINT_16, UINT_32, UINT_64};
    let converted = column.converted_type();
    let integers = [NONE, DECIMAL, INT_8, INT_16, INT_32, INT_64, UINT_8, UINT_16, UINT_32, UINT_64];
    let logical = column.logical_type_ref();
    // Times in nanoseconds have no converted type.
    let is_time = matches!(logical, Some(LogicalType::Timestamp { .. } | LogicalType::Time { .. }));
    match column.physical_type() {
        Type::INT32 | Type::INT64 => integers.contains(&converted) && !is_time,
        Type::FLOAT | Type::DOUBLE => true,
        Type::FIXED_LEN_BYTE_ARRAY => matches!(logical, Some(LogicalType::Float16)) || converted == DECIMAL,
        Type::BOOLEAN | Type::INT96 | Type::BYTE_ARRAY => false,
    }
}
