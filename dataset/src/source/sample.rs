//! Samples: a picture and the fields beside it, whatever file they came from.

use std::collections::BTreeMap;

use bytes::Bytes;
use ella_store::{Digest, Hasher};
use serde_json::{Map, Value};

use super::PieceRead;
use crate::report::Refusal;

/// Larger pictures are not read into memory.
pub(super) const MAX_IMAGE_BYTES: u64 = 256 << 20;
/// Longer texts are not taken.
pub(super) const MAX_TEXT_BYTES: u64 = 1 << 20;

/// A picture's file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Member {
    /// There is none.
    #[default]
    Absent,
    /// Its bytes.
    Data(Bytes),
    /// It has more bytes than are read (256 MiB).
    TooLarge,
}

impl Member {
    /// A copy, so that a picture does not keep the page it came from.
    pub(super) fn copied(bytes: &[u8]) -> Member {
        if bytes.len() as u64 > MAX_IMAGE_BYTES { Member::TooLarge } else { Member::Data(Bytes::copy_from_slice(bytes)) }
    }
}

/// What is known of a picture beside the picture, by name.
pub type Fields = BTreeMap<String, Field>;

/// One thing known of a picture.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// A text, as it stands there. May be empty.
    Text(String),
    /// A finite number. In a CSV file: what is written as one.
    Number(f64),
    /// Bytes that were to be text, but are not UTF-8.
    NotUtf8,
    /// A text of more than 1 MiB (a tar's `.json` file: of more than 16 MiB).
    TooLong,
    /// Anything else: null, a bool, a list, an object, a date, JSON that cannot be parsed.
    Other,
}

impl Field {
    pub(super) fn text(bytes: &[u8]) -> Field {
        match std::str::from_utf8(bytes) {
            _ if bytes.len() as u64 > MAX_TEXT_BYTES => Field::TooLong,
            Ok(text) => Field::Text(text.to_owned()),
            Err(_) => Field::NotUtf8,
        }
    }

    pub(super) fn number(number: f64) -> Field {
        if number.is_finite() { Field::Number(number) } else { Field::Other }
    }

    pub(super) fn json(value: Value) -> Field {
        match value {
            Value::String(text) if text.len() as u64 > MAX_TEXT_BYTES => Field::TooLong,
            Value::String(text) => Field::Text(text),
            Value::Number(number) => number.as_f64().map_or(Field::Other, Field::number),
            _ => Field::Other,
        }
    }
}

/// A picture, its key, and what is known of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// What names it: a tar's path up to the first dot of the base name; a row's key, picture path or number. Invalid UTF-8 is replaced.
    pub key: String,
    /// Whether the key was valid UTF-8.
    pub key_is_utf8: bool,
    /// The encoded picture.
    pub image: Member,
    /// Texts and numbers beside it.
    pub fields: Fields,
    /// Where its picture lies, if that is a file of its own.
    pub place: Option<String>,
    /// Why it cannot be taken whatever the settings say: the row that should describe it is broken.
    pub refused: Option<Refusal>,
}

impl Sample {
    /// A sample of a row that could not be read.
    pub(super) fn broken(key: String) -> Sample {
        Sample { key, key_is_utf8: true, refused: Some(Refusal::RowInvalid), ..Sample::default() }
    }

    /// A key that may be no UTF-8.
    pub(super) fn of_key(key: &[u8]) -> Sample {
        let key_is_utf8 = std::str::from_utf8(key).is_ok();
        Sample { key: String::from_utf8_lossy(key).into_owned(), key_is_utf8, ..Sample::default() }
    }
}

/// An object of JSON; none if it is none. What Python's `json` writes of numbers that are none (`NaN`, `Infinity`, `-Infinity`) is taken for null.
pub(super) fn json_object(bytes: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(bytes).or_else(|_| serde_json::from_slice(&without_nan(bytes))).ok()
}

/// The same text with null in the place of what is no number, outside strings.
fn without_nan(bytes: &[u8]) -> Vec<u8> {
    let (mut out, mut rest, mut quoted) = (Vec::with_capacity(bytes.len()), bytes, false);
    while let Some((&byte, after)) = rest.split_first() {
        let none = [&b"NaN"[..], b"Infinity", b"-Infinity"].into_iter().find_map(|none| rest.strip_prefix(none)).filter(|_| !quoted);
        if let Some(after) = none {
            out.extend_from_slice(b"null");
            rest = after;
            continue;
        }
        // An escaped character ends no string.
        let taken = if quoted && byte == b'\\' { rest.len().min(2) } else { 1 };
        quoted ^= byte == b'"';
        out.extend_from_slice(&rest[..taken]);
        rest = if taken == 1 { after } else { &rest[taken..] };
    }
    out
}

/// The key of a picture by its path: without a leading `./` and without its ending.
pub(super) fn key_of_path(path: &str) -> &str {
    let path = path.strip_prefix("./").unwrap_or(path);
    match path.rsplit_once('.') {
        Some((stem, ending)) if is_ending(ending) && !stem.is_empty() && !stem.ends_with('/') => stem,
        _ => path,
    }
}

fn is_ending(ending: &str) -> bool {
    (1..=5).contains(&ending.len()) && ending.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Digests samples in order. Every length goes in before its bytes, so that no two sequences of samples look alike.
#[derive(Debug, Default)]
pub(super) struct Tally(Hasher);

impl Tally {
    pub(super) fn add(&mut self, sample: &Sample) {
        self.bytes(u8::from(sample.key_is_utf8) | u8::from(sample.refused.is_some()) << 1, sample.key.as_bytes());
        match &sample.image {
            Member::Absent => self.bytes(0, b""),
            Member::Data(bytes) => self.bytes(1, bytes),
            Member::TooLarge => self.bytes(2, b""),
        }
        self.bytes(0, &(sample.fields.len() as u64).to_le_bytes());
        for (name, field) in &sample.fields {
            self.bytes(0, name.as_bytes());
            match field {
                Field::Text(text) => self.bytes(0, text.as_bytes()),
                Field::Number(number) => self.bytes(1, &number.to_le_bytes()),
                Field::NotUtf8 => self.bytes(2, b""),
                Field::TooLong => self.bytes(3, b""),
                Field::Other => self.bytes(4, b""),
            }
        }
    }

    fn bytes(&mut self, kind: u8, bytes: &[u8]) {
        self.0.update(&[kind]).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    }

    pub(super) fn finish(&self, bytes: u64) -> PieceRead {
        PieceRead { bytes, blake3: self.digest(), ignored: 0 }
    }

    fn digest(&self) -> Digest {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_path_without_its_ending() {
        for (path, key) in [
            ("a/b.jpg", "a/b"),
            ("./b.JPEG", "b"),
            ("v1.2/b", "v1.2/b"),
            ("a.b.png", "a.b"),
            (".jpg", ".jpg"),
            ("x/.jpg", "x/.jpg"),
            ("s3://b/a.webp", "s3://b/a"),
            ("http://h/a.jpg?w=1", "http://h/a.jpg?w=1"),
            ("", ""),
        ] {
            assert_eq!(key_of_path(path), key, "{path}");
        }
    }

    #[test]
    fn numbers_that_are_none_are_null_outside_of_strings() {
        for (text, expected) in [
            (r#"{"a": NaN, "b": -Infinity, "c": [Infinity]}"#, r#"{"a": null, "b": null, "c": [null]}"#),
            (r#"{"NaN": "NaN \" Infinity \\", "b": NaN}"#, r#"{"NaN": "NaN \" Infinity \\", "b": null}"#),
        ] {
            assert_eq!(json_object(text.as_bytes()), json_object(expected.as_bytes()), "{text}");
            assert!(json_object(text.as_bytes()).is_some(), "{text}");
        }
        for text in [r#"{"a": NaNs}"#, r#"{"a": nan}"#, "NaN", r#"{"a": "\"#] {
            assert_eq!(json_object(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn samples_that_differ_have_other_digests() {
        let digest = |change: fn(&mut Sample)| {
            let mut sample = Sample::of_key(b"a");
            change(&mut sample);
            let mut tally = Tally::default();
            tally.add(&sample);
            tally.digest()
        };
        let field = |name: &str, field| Fields::from([(name.to_owned(), field)]);
        assert_ne!(field("a", Field::Other), field("b", Field::Other));
        let all = [
            digest(|_| {}),
            digest(|s| s.key = "b".into()),
            digest(|s| s.key_is_utf8 = false),
            digest(|s| s.refused = Some(Refusal::RowInvalid)),
            digest(|s| s.image = Member::Data(Bytes::new())),
            digest(|s| s.image = Member::TooLarge),
            digest(|s| drop(s.fields.insert("a".into(), Field::Other))),
            digest(|s| drop(s.fields.insert("a".into(), Field::Text(String::new())))),
            digest(|s| drop(s.fields.insert("a".into(), Field::Number(0.0)))),
            digest(|s| drop(s.fields.insert(String::new(), Field::Text("a".into())))),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all.iter().skip(i + 1).all(|other| other != one), "{i}");
        }
    }
}
