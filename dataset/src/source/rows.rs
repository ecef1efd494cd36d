//! Rows of a list: lines of JSON, or CSV records, found in a stream of bytes within bounded memory.
//!
//! A CSV row follows RFC 4180: a value that begins with a quote ends at the next single one, and may hold commas, line ends and
//! doubled quotes. A row that breaks this (text after a closing quote, a quote that is never closed) ends at its first line's end,
//! so that one broken row does not swallow those after it. What is a row depends on nothing but its own bytes, or the list can be
//! cut into pieces where rows begin.

use std::borrow::Cow;
use std::io::{self, Read};
use std::ops::Range;

/// Longer rows are refused.
pub(crate) const MAX_ROW_BYTES: usize = 4 << 20;
const READ_BYTES: u64 = 256 << 10;
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// How a list is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Jsonl,
    Csv,
}

/// One row.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Row<'a> {
    /// Where it begins in what is read.
    pub(crate) at: u64,
    /// Its bytes without the line's end; none if it is broken.
    pub(crate) bytes: Option<&'a [u8]>,
}

/// Finds the rows that are not blank.
pub(crate) struct Rows<R> {
    from: R,
    format: Format,
    buf: Vec<u8>,
    /// What of the buffer was handed over.
    used: usize,
    /// Where in what is read the buffer begins.
    start: u64,
    /// Up to here in what is read a quoted value is known to go on that is open at a line's end before it. That is all there is to
    /// know of it: whatever row it began in, it closes at the same quote. So a text in which each row opens a value that none closes is
    /// read once, and not once for each.
    open_to: u64,
    ended: bool,
}

impl<R: Read> Rows<R> {
    pub(crate) fn new(from: R, format: Format) -> Rows<R> {
        Rows { from, format, buf: Vec::new(), used: 0, start: 0, open_to: 0, ended: false }
    }

    /// The next row; none at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<Row<'_>>> {
        loop {
            match self.advance()? {
                None => return Ok(None),
                Some((at, None)) => return Ok(Some(Row { at, bytes: None })),
                Some((at, Some(range))) if !self.buf[range.clone()].trim_ascii().is_empty() => {
                    return Ok(Some(Row { at, bytes: Some(&self.buf[range]) }));
                }
                Some(_) => {}
            }
        }
    }

    /// Where in what is read the row after the last one begins.
    pub(crate) fn place(&self) -> u64 {
        self.start + self.used as u64
    }

    /// Passes over a row: where it begins in what is read and, if it is sound, where it lies in the buffer.
    fn advance(&mut self) -> io::Result<Option<(u64, Option<Range<usize>>)>> {
        loop {
            let rest = &self.buf[self.used..];
            if rest.is_empty() && self.ended {
                return Ok(None);
            }
            let too_long = rest.len() > MAX_ROW_BYTES;
            let found = match self.format {
                Format::Jsonl => line(rest, self.ended),
                Format::Csv => {
                    let scanned = scan(rest, usize::try_from(self.open_to.saturating_sub(self.place())).unwrap_or(0));
                    if let Scan::Open { quoted: true } = scanned {
                        self.open_to = self.place() + rest.len() as u64;
                    }
                    record(&scanned, rest, self.ended, too_long)
                }
            };
            match found {
                Some(found) => {
                    let (at, row) = (self.place(), self.used..self.used + found.row);
                    self.used += found.next;
                    return Ok(Some((at, (found.sound && row.len() <= MAX_ROW_BYTES).then_some(row))));
                }
                None if too_long => {
                    let at = self.place();
                    self.skip_line()?;
                    return Ok(Some((at, None)));
                }
                None => self.read()?,
            }
        }
    }

    /// Passes over a line that is too long to be held.
    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let end = find(b'\n', &self.buf[self.used..]);
            self.used = end.map_or(self.buf.len(), |end| self.used + end + 1);
            if end.is_some() || self.ended {
                return Ok(());
            }
            self.read()?;
        }
    }

    fn read(&mut self) -> io::Result<()> {
        self.buf.drain(..self.used);
        self.start += self.used as u64;
        self.used = 0;
        self.ended = self.from.by_ref().take(READ_BYTES).read_to_end(&mut self.buf)? == 0;
        if self.start == 0 && self.buf.starts_with(BYTE_ORDER_MARK) {
            self.used = BYTE_ORDER_MARK.len();
        }
        Ok(())
    }
}

/// Where a row ends, and where the next one begins.
struct Found {
    row: usize,
    next: usize,
    sound: bool,
}

/// The first line. None: its end is not there yet.
fn line(bytes: &[u8], ended: bool) -> Option<Found> {
    let end = find(b'\n', bytes);
    let row = end.or(ended.then_some(bytes.len()))?;
    Some(Found { row, next: row + usize::from(end.is_some()), sound: true })
}

/// The first CSV record; a broken one ends with its first line. None: its end is not there yet.
fn record(scanned: &Scan, bytes: &[u8], ended: bool, too_long: bool) -> Option<Found> {
    match *scanned {
        Scan::Whole { row, next } => Some(Found { row, next, sound: true }),
        Scan::Open { quoted: false } if ended => Some(Found { row: bytes.len(), next: bytes.len(), sound: true }),
        Scan::Open { .. } if !ended && !too_long => None,
        Scan::Open { .. } | Scan::Broken => line(bytes, ended).map(|line| Found { sound: false, ..line }),
    }
}

enum Scan {
    Whole {
        row: usize,
        next: usize,
    },
    /// The bytes end within the record, or within one of its quoted values.
    Open {
        quoted: bool,
    },
    Broken,
}

/// Looks for the end of the record that `bytes` begin with. A quoted value that is open at the first line's end is so up to `open_to`.
fn scan(bytes: &[u8], open_to: usize) -> Scan {
    let open = find(b'\n', bytes).unwrap_or(bytes.len())..open_to;
    let mut at = 0;
    loop {
        let end = match value_end(bytes, at, &open) {
            Ok(end) => end,
            Err(scan) => return scan,
        };
        match &bytes[end..] {
            [b',', ..] => at = end + 1,
            [b'\n', ..] => return Scan::Whole { row: end, next: end + 1 },
            [b'\r', b'\n', ..] => return Scan::Whole { row: end, next: end + 2 },
            [] | [b'\r'] => return Scan::Open { quoted: false },
            _ => return Scan::Broken,
        }
    }
}

/// Where the value that begins at `at` ends. If it is quoted, and goes on at the start of `open`, then up to its end.
fn value_end(bytes: &[u8], mut at: usize, open: &Range<usize>) -> Result<usize, Scan> {
    if bytes.get(at) != Some(&b'"') {
        let end = at + bytes[at..].iter().position(|b| matches!(b, b',' | b'\n')).ok_or(Scan::Open { quoted: false })?;
        // A line's end of two bytes: the first is no part of the value.
        return Ok(if end > at && bytes[end] == b'\n' && bytes[end - 1] == b'\r' { end - 1 } else { end });
    }
    loop {
        let next = find(b'"', &bytes[at + 1..]).map(|quote| at + 1 + quote);
        if !open.is_empty() && at < open.start && open.start < next.unwrap_or(bytes.len()) {
            at = open.end - 1;
            continue;
        }
        at = next.ok_or(Scan::Open { quoted: true })?;
        if bytes.get(at + 1) != Some(&b'"') {
            return Ok(at + 1);
        }
        at += 1;
    }
}

fn find(byte: u8, bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|&b| b == byte)
}

/// The records of a CSV text that is held as a whole, but for blank lines: where each begins, in bytes, and its values; none if it is broken.
pub fn csv_records(text: &[u8]) -> Vec<(u64, Option<Vec<Vec<u8>>>)> {
    let (mut rows, mut records) = (Rows::new(text, Format::Csv), Vec::new());
    // Reading from memory does not fail.
    while let Ok(Some(row)) = rows.next() {
        records.push((row.at, row.bytes.map(|bytes| values(bytes).into_iter().map(Cow::into_owned).collect())));
    }
    records
}

/// The values of a sound CSV row, without their quotes.
pub(crate) fn values(row: &[u8]) -> Vec<Cow<'_, [u8]>> {
    let (mut at, mut values) = (0, Vec::new());
    loop {
        let end = value_end(row, at, &(0..0)).unwrap_or(row.len());
        let value = &row[at..end];
        values.push(match value {
            [b'"', inner @ .., b'"'] => unquoted(inner),
            _ => Cow::Borrowed(value.strip_suffix(b"\r").filter(|_| end == row.len()).unwrap_or(value)),
        });
        if row.get(end) != Some(&b',') {
            return values;
        }
        at = end + 1;
    }
}

fn unquoted(inner: &[u8]) -> Cow<'_, [u8]> {
    if find(b'"', inner).is_none() {
        return Cow::Borrowed(inner);
    }
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter();
    while let Some(&b) = bytes.next() {
        out.push(b);
        if b == b'"' {
            bytes.next();
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Rows as text with where they begin; a broken one is `!`. Read in small steps, so that every row is cut somewhere.
    fn rows(text: &[u8], format: Format) -> Vec<(u64, String)> {
        struct Slow<'a>(&'a [u8]);
        impl Read for Slow<'_> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                let n = self.0.len().min(buf.len()).min(3);
                buf[..n].copy_from_slice(&self.0[..n]);
                self.0 = &self.0[n..];
                Ok(n)
            }
        }
        let mut rows = Rows::new(Slow(text), format);
        let mut found = Vec::new();
        while let Some(row) = rows.next().unwrap() {
            found.push((row.at, row.bytes.map_or("!".into(), |bytes| String::from_utf8_lossy(bytes).into_owned())));
        }
        found
    }

    #[track_caller]
    fn csv(text: &str, expected: &[(u64, &str)]) {
        let expected: Vec<_> = expected.iter().map(|(at, row)| (*at, (*row).to_owned())).collect();
        assert_eq!(rows(text.as_bytes(), Format::Csv), expected);
    }

    #[test]
    fn lines_are_rows_and_blank_ones_are_not() {
        let found = rows("\u{feff}{}\r\n\n  \n[1]\n2".as_bytes(), Format::Jsonl);
        assert_eq!(found, [(3, "{}\r".into()), (11, "[1]".into()), (15, "2".into())]);
        assert_eq!(rows(b"", Format::Jsonl), []);
    }

    #[test]
    fn a_whole_text_is_records_with_their_places() {
        let whole = |at, values: [&str; 2]| (at, Some(values.map(|value| value.as_bytes().to_vec()).to_vec()));
        let found = csv_records(b"\xef\xbb\xbfa,b\n\nc,\"d\"\"\ne\"\n\"x\" y,z\nf,g");
        assert_eq!(found, [whole(3, ["a", "b"]), whole(8, ["c", "d\"\ne"]), (18, None), whole(26, ["f", "g"])]);
    }

    #[test]
    fn csv_records_may_hold_line_ends_commas_and_quotes() {
        csv("a,b\nc,\"d\ne\"\r\n\nf,\"g\"\"h, i\"\n", &[(0, "a,b"), (4, "c,\"d\ne\""), (14, "f,\"g\"\"h, i\"")]);
        csv("a\nb 5\" wide\nlast", &[(0, "a"), (2, "b 5\" wide"), (12, "last")]);
        csv("a,\"b\"", &[(0, "a,\"b\"")]);
    }

    #[test]
    fn a_broken_record_ends_with_its_line() {
        csv("a,\"open\nb,\"text\"\nc,d\n", &[(0, "!"), (8, "b,\"text\""), (17, "c,d")]);
        csv("a,\"x\" y\nc,d", &[(0, "!"), (8, "c,d")]);
        csv("a,\"never closed\nc,d\ne,f", &[(0, "!"), (16, "c,d"), (20, "e,f")]);
    }

    #[test]
    fn a_row_that_is_too_long_is_passed_over() {
        for format in [Format::Jsonl, Format::Csv] {
            let text = format!("a\n{}\nb", "x".repeat(3 * MAX_ROW_BYTES));
            let mut rows = Rows::new(text.as_bytes(), format);
            let mut found = Vec::new();
            while let Some(row) = rows.next().unwrap() {
                found.push((row.at, row.bytes.map(<[u8]>::len)));
                assert!(rows.buf.capacity() < 3 * MAX_ROW_BYTES);
            }
            assert_eq!(found, [(0, Some(1)), (2, None), (3 + 3 * MAX_ROW_BYTES as u64, Some(1))]);
        }
    }

    /// Each row opens a value that the next one closes and opens again: looked at from each, it takes minutes.
    #[test]
    fn rows_of_which_each_opens_a_value_that_is_never_closed_are_read_once() {
        const ROWS: usize = 400_000;
        let text = "x\",\"z\n".repeat(ROWS) + "a,b";
        let mut rows = Rows::new(text.as_bytes(), Format::Csv);
        for row in 0..ROWS as u64 {
            assert_eq!(rows.next().unwrap(), Some(Row { at: 6 * row, bytes: None }));
        }
        assert_eq!(rows.next().unwrap().and_then(|row| row.bytes), Some(&b"a,b"[..]));
    }

    fn quoted(value: &str) -> String {
        format!("\"{}\"", value.replace('"', "\"\""))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_was_written_is_read(table in prop::collection::vec(prop::collection::vec("[a-c\",\n\r ]{0,6}", 2..4), 1..6)) {
            let text: String = table.iter().map(|row| row.iter().map(|v| quoted(v)).collect::<Vec<_>>().join(",") + "\r\n").collect();
            let found: Vec<Vec<String>> = rows(text.as_bytes(), Format::Csv)
                .iter()
                .map(|(_, row)| values(row.as_bytes()).iter().map(|v| String::from_utf8_lossy(v).into_owned()).collect())
                .collect();
            prop_assert_eq!(found, table);
        }

        #[test]
        fn a_list_cut_where_a_row_begins_has_the_same_rows(text in "[a\",\n]{0,40}", part in 0.0f64..1.0) {
            for format in [Format::Jsonl, Format::Csv] {
                let all = rows(text.as_bytes(), format);
                if all.is_empty() {
                    continue;
                }
                let cut = (part * all.len() as f64) as usize;
                let at = all[cut].0 as usize;
                let mut halves = rows(&text.as_bytes()[..at], format);
                halves.extend(rows(&text.as_bytes()[at..], format).into_iter().map(|(place, row)| (place + at as u64, row)));
                prop_assert_eq!(&halves, &all, "cut at {}", at);
            }
        }
    }
}
