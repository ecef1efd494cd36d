//! A table as a Parquet file.

use std::sync::Arc;

use ::parquet::basic::{LogicalType, Repetition, TimeUnit, Type as Physical};
use ::parquet::data_type::{DoubleType, Int64Type};
use ::parquet::errors::Result;
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::types::{Type, TypePtr};

use super::table::{Column, Table, Values};

/// The whole file.
pub(super) fn bytes(table: &Table) -> Result<Vec<u8>> {
    let fields = table.columns.iter().map(field).collect::<Result<_>>()?;
    let schema = Type::group_type_builder("metrics").with_fields(fields).build()?;
    let properties = WriterProperties::builder().set_created_by(format!("ella {}", env!("CARGO_PKG_VERSION"))).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::new(properties))?;
    let mut rows = writer.next_row_group()?;
    for column in &table.columns {
        let Some(mut place) = rows.next_column()? else { break };
        match &column.values {
            Values::Whole(values) | Values::Time(values) => {
                place.typed::<Int64Type>().write_batch(values, None, None)?;
            }
            Values::Real(values) => {
                let levels: Vec<i16> = values.iter().map(|value| i16::from(value.is_some())).collect();
                let there: Vec<f64> = values.iter().copied().flatten().collect();
                place.typed::<DoubleType>().write_batch(&there, Some(&levels), None)?;
            }
        }
        place.close()?;
    }
    rows.close()?;
    writer.into_inner()
}

fn field(column: &Column) -> Result<TypePtr> {
    let (physical, repetition, logical) = match column.values {
        Values::Whole(_) => (Physical::INT64, Repetition::REQUIRED, None),
        Values::Time(_) => {
            let time = LogicalType::timestamp(true, TimeUnit::MILLIS);
            (Physical::INT64, Repetition::REQUIRED, Some(time))
        }
        Values::Real(_) => (Physical::DOUBLE, Repetition::OPTIONAL, None),
    };
    let field = Type::primitive_type_builder(&column.name, physical).with_repetition(repetition).with_logical_type(logical);
    field.build().map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::table;
    use super::*;
    use ::parquet::column::reader::ColumnReader;
    use ::parquet::file::reader::{FileReader, SerializedFileReader};

    /// A file's columns, read value by value.
    fn read(bytes: Vec<u8>) -> Table {
        let reader = SerializedFileReader::new(bytes::Bytes::from(bytes)).unwrap();
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        let rows = usize::try_from(reader.metadata().file_metadata().num_rows()).unwrap();
        let group = reader.get_row_group(0).unwrap();
        let columns = (0..schema.num_columns()).map(|at| {
            let name = schema.column(at).name().to_owned();
            let values = match group.get_column_reader(at).unwrap() {
                ColumnReader::Int64ColumnReader(mut reader) => {
                    let mut values = Vec::new();
                    reader.read_records(rows, None, None, &mut values).unwrap();
                    let is_time = schema.column(at).logical_type_ref().is_some();
                    if is_time { Values::Time(values) } else { Values::Whole(values) }
                }
                ColumnReader::DoubleColumnReader(mut reader) => {
                    let (mut values, mut levels) = (Vec::new(), Vec::new());
                    reader.read_records(rows, Some(&mut levels), None, &mut values).unwrap();
                    let mut values = values.into_iter();
                    Values::Real(levels.into_iter().map(|level| if level == 1 { values.next() } else { None }).collect())
                }
                _ => panic!("{name}: of another type"),
            };
            Column { name, values }
        });
        Table { rows, columns: columns.collect() }
    }

    #[test]
    fn what_is_written_is_read() {
        let table = table();
        assert_eq!(read(bytes(&table).unwrap()), table);
    }
}
