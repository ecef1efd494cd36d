//! A CSV file as text by column, with places for messages.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::Path;

use ella_dataset::csv_records;

use super::bad;
use crate::ui::Fail;

/// A file's rows.
#[derive(Debug)]
pub(super) struct Table {
    file: String,
    columns: HashMap<String, usize>,
    pub(super) rows: Vec<Row>,
}

/// One row.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) place: Place,
    values: Vec<String>,
}

/// Where a row is: its number from 1 (the header is none), and the line of the file in which it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) row: usize,
    pub(super) line: usize,
}

impl Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "row {} (line {})", self.row, self.line)
    }
}

impl Table {
    /// Reads a file whose first row names the columns.
    pub(super) fn read(path: &Path) -> Result<Self, Fail> {
        let bytes = std::fs::read(path).map_err(|error| Fail::io(path, "read", &error))?;
        Self::of(&path.display().to_string(), &bytes)
    }

    pub(super) fn of(file: &str, bytes: &[u8]) -> Result<Self, Fail> {
        let file = file.to_owned();
        let (mut line, mut counted, mut row) = (1, 0, 0);
        let mut records = csv_records(bytes).into_iter().map(|(at, values)| {
            let at = usize::try_from(at).unwrap_or(usize::MAX).min(bytes.len());
            line += bytes[counted..at].iter().filter(|byte| **byte == b'\n').count();
            counted = at;
            row += 1;
            (Place { row: row - 1, line }, values)
        });
        let header = records.next().and_then(|(_, values)| values).and_then(texts);
        let header = header.ok_or_else(|| bad(format_args!("{file}: must begin with a row of the columns' names, in UTF-8")))?;
        let mut columns = HashMap::new();
        for (at, name) in header.iter().enumerate() {
            if columns.insert(name.trim().to_owned(), at).is_some() {
                return Err(bad(format_args!("{file}: the column `{name}` is there twice")));
            }
        }
        let mut rows = Vec::new();
        for (place, values) in records {
            let rule = "must be a record of comma-separated values in UTF-8, quotes closed and doubled within quotes";
            let values = values.and_then(texts).ok_or_else(|| bad(format_args!("{file}: {place} {rule}")))?;
            if values.len() != header.len() {
                let (expected, found) = (header.len(), values.len());
                return Err(bad(format_args!(
                    "{file}: {place} must have a value for each column (expected {expected}, found {found}): is a quote missing?"
                )));
            }
            rows.push(Row { place, values });
        }
        Ok(Self { file, columns, rows })
    }

    /// Where a column is that must be there.
    pub(super) fn column(&self, name: &str) -> Result<usize, Fail> {
        self.optional(name).ok_or_else(|| {
            let mut there: Vec<&str> = self.columns.keys().map(String::as_str).collect();
            there.sort_unstable();
            bad(format_args!("{}: has no column `{name}` (there are: {})", self.file, there.join(", ")))
        })
    }

    pub(super) fn optional(&self, name: &str) -> Option<usize> {
        self.columns.get(name).copied()
    }
}

impl Row {
    pub(super) fn get(&self, column: usize) -> &str {
        self.values.get(column).map_or("", String::as_str)
    }
}

fn texts(values: Vec<Vec<u8>>) -> Option<Vec<String>> {
    values.into_iter().map(|value| String::from_utf8(value).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_know_where_they_are() {
        let table = Table::of("t", b"\xef\xbb\xbfa,b\r\n1,\"x\ny\"\r\n\r\n2,\"\"\"\"\r\n").unwrap();
        let found: Vec<_> = table.rows.iter().map(|row| (row.place.row, row.place.line, row.get(0), row.get(1))).collect();
        assert_eq!(found, [(1, 2, "1", "x\ny"), (2, 5, "2", "\"")]);
    }

    #[test]
    fn what_is_no_table_says_what_and_where() {
        for (bytes, words) in [
            (&b""[..], "must begin with"),
            (b"a,b\n1,2\n1\n", "row 2 (line 3) must have a value for each column (expected 2, found 1)"),
            (b"a,b\n1,\"2\n", "row 1 (line 2) must be a record"),
            (b"a,b\n1,\xff\n", "row 1 (line 2) must be a record"),
            (b"a,a\n", "`a` is there twice"),
        ] {
            let message = Table::of("t.csv", bytes).unwrap_err().message;
            assert!(message.starts_with("t.csv: ") && message.contains(words), "{message}");
        }
        let message = Table::of("t", b"b,a\n").unwrap().column("c").unwrap_err().message;
        assert!(message.contains("no column `c` (there are: a, b)"), "{message}");
    }
}
