//! A JSON array as lines. What stands between its entries becomes a line's end, byte for byte: so one array of objects is read as a list of JSON
//! lines is, in bounded memory, at the very places of the file, and may be cut into pieces where entries begin.

use std::fmt;
use std::io::{self, Read};

use super::rows::BYTE_ORDER_MARK;

/// Why bytes are no array.
#[derive(Debug)]
pub(super) struct NoArray {
    /// Where in the file.
    pub(super) at: u64,
    what: String,
}

impl fmt::Display for NoArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for NoArray {}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Before,
    Within,
    Behind,
}

/// Reads a file that holds an array, or a part of it that begins behind the array's begin, or behind a comma of it.
pub(super) struct Lines<R> {
    from: R,
    /// Where in the file the next byte lies.
    at: u64,
    /// Whether what is read goes on to the file's end.
    last: bool,
    place: Place,
    /// Brackets that are open in an entry.
    open: u64,
    quoted: bool,
    escaped: bool,
    /// The entry that is read: which, from what is read first, and where it begins.
    entry: (u64, u64),
}

impl<R: Read> Lines<R> {
    /// What is read begins at this byte of the file.
    pub(super) fn new(from: R, at: u64, last: bool) -> Lines<R> {
        let place = if at == 0 { Place::Before } else { Place::Within };
        Lines { from, at, last, place, open: 0, quoted: false, escaped: false, entry: (0, at) }
    }

    /// What stands for the next byte.
    fn next(&mut self, byte: u8) -> Result<u8, NoArray> {
        match self.place {
            Place::Within if self.quoted => self.quoted(byte),
            Place::Within => return Ok(self.plain(byte)),
            _ if byte.is_ascii_whitespace() => {}
            Place::Before if self.at < 3 && byte == BYTE_ORDER_MARK[self.at as usize] => {}
            Place::Before if byte == b'[' => {
                (self.place, self.entry) = (Place::Within, (0, self.at + 1));
                return Ok(b'\n');
            }
            Place::Before => return Err(self.none()),
            Place::Behind => return Err(NoArray { at: self.at, what: "goes on behind its array's end (expected nothing more)".into() }),
        }
        // What is a line's end there must end no line here.
        Ok(if byte == b'\n' { b' ' } else { byte })
    }

    fn quoted(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.quoted = false,
            _ => {}
        }
    }

    fn plain(&mut self, byte: u8) -> u8 {
        match byte {
            b'"' => self.quoted = true,
            b'{' | b'[' => self.open += 1,
            b'}' | b']' if self.open > 0 => self.open -= 1,
            b']' => {
                self.place = Place::Behind;
                return b'\n';
            }
            b',' if self.open == 0 => {
                self.entry = (self.entry.0 + 1, self.at + 1);
                return b'\n';
            }
            b'\n' => return b' ',
            _ => {}
        }
        byte
    }

    /// The bytes end here.
    fn end(&self) -> Result<(), NoArray> {
        match self.place {
            Place::Before => Err(self.none()),
            Place::Within if self.last || self.open > 0 || self.quoted => {
                let (row, at) = self.entry;
                let what = format!("is cut off, or has a broken row: its array does not end (its last row, {row}, begins here)");
                Err(NoArray { at, what })
            }
            Place::Within | Place::Behind => Ok(()),
        }
    }

    fn none(&self) -> NoArray {
        let what = "holds no array of rows (expected [{…}, {…}]; if it has an object a line, name it .jsonl; if the array lies within an \
                    object, take it out: jq .NAME)";
        NoArray { at: self.at, what: what.into() }
    }
}

impl<R: Read> Read for Lines<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buf)?;
        if read == 0 && !buf.is_empty() {
            self.end().map_err(io::Error::other)?;
        }
        for byte in &mut buf[..read] {
            *byte = self.next(*byte).map_err(io::Error::other)?;
            self.at += 1;
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::source::rows::{Format, Rows};

    /// Rows from a place of a text on, with where they begin in it; or what is wrong, and where.
    fn rows(text: &str, range: std::ops::Range<usize>) -> Result<Vec<(usize, Value)>, (u64, String)> {
        let lines = Lines::new(&text.as_bytes()[range.clone()], range.start as u64, range.end == text.len());
        let (mut rows, mut found) = (Rows::new(lines, Format::Jsonl), Vec::new());
        loop {
            match rows.next() {
                Ok(None) => return Ok(found),
                Ok(Some(row)) => {
                    let value = serde_json::from_slice(row.bytes.unwrap()).unwrap_or(Value::Null);
                    found.push((row.at as usize + range.start, value));
                }
                Err(error) => {
                    let error = error.get_ref().and_then(|error| error.downcast_ref::<NoArray>()).unwrap();
                    return Err((error.at, error.to_string()));
                }
            }
        }
    }

    #[track_caller]
    fn is_none(text: &str, at: u64, says: &str) {
        let (found, what) = rows(text, 0..text.len()).unwrap_err();
        assert!(found == at && what.contains(says), "{text}: {found}: {what}");
    }

    #[test]
    fn entries_are_rows_however_they_are_written_and_one_that_is_broken_costs_itself() {
        let text = "\u{feff} [\n  {\"a\": \"},\\\"[\"},\r\n  {\n    \"b\": [1, {}]\n  } , 7, {\"c\": ]}, {\"d\": 1}},\"e,\"\n]\n ";
        let expected = [json!({"a": "},\"["}), json!({"b": [1, {}]}), json!(7), Value::Null, Value::Null, json!("e,")];
        let found = rows(text, 0..text.len()).unwrap();
        assert_eq!(found.iter().map(|(_, value)| value.clone()).collect::<Vec<_>>(), expected);
        assert_eq!(rows("[]", 0..2), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_array_is_told_with_its_place() {
        is_none("", 0, "holds no array");
        is_none("  ", 2, "holds no array");
        is_none(" {\"a\": 1}\n{\"a\": 2}", 1, "name it .jsonl");
        is_none("[{}] [{}]", 5, "behind its array's end");
        is_none("[{\"a\": 1}, {\"a\": [2}", 10, "its last row, 1, begins here");
        is_none("[{\"a\": 1},", 10, "cut off");
        is_none("[{\"a\": \"1}]", 1, "its last row, 0, begins here");
    }

    fn value() -> impl Strategy<Value = Value> {
        let text = "[a\"\\\\{}\\[\\],:\n\u{e9}]{0,8}";
        let leaf = prop_oneof![text.prop_map(Value::from), any::<i32>().prop_map(Value::from), Just(Value::Null)];
        leaf.prop_recursive(3, 12, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(text, inner, 0..4)
                    .prop_map(|entries| entries.into_iter().collect::<serde_json::Map<_, _>>().into()),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_was_written_is_read_whole_from_any_row_on_and_never_cut_off(
            values in prop::collection::vec(value(), 1..6),
            pretty: bool,
            part in 0.0f64..1.0,
        ) {
            let array = Value::from(values.clone());
            let text = if pretty { format!(" {array:#}\n") } else { array.to_string() };
            let found = rows(&text, 0..text.len()).unwrap();
            prop_assert_eq!(found.iter().map(|(_, value)| value.clone()).collect::<Vec<_>>(), values);

            let row = (part * found.len() as f64) as usize;
            let at = found[row].0;
            prop_assert_eq!(rows(&text, at..text.len()).unwrap(), &found[row..]);
            if row > 0 {
                prop_assert_eq!(rows(&text, found[0].0..at).unwrap(), &found[..row]);
            }

            let end = text.trim_end().len();
            let cut = (0..end).rev().find(|cut| *cut as f64 <= part * end as f64 && text.is_char_boundary(*cut)).unwrap_or(0);
            let (place, what) = rows(&text[..cut], 0..cut).unwrap_err();
            prop_assert!(place <= cut as u64 && (what.contains("cut off") || text[..cut].trim().is_empty()), "{} {}", place, what);
        }
    }
}
