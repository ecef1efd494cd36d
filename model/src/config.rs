//! Strict reading of a model's `config.json`: every field is read, or refused by name.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// A JSON object that remembers which of its fields have been read.
#[derive(Debug)]
pub struct ConfigFile {
    file: PathBuf,
    fields: Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl ConfigFile {
    /// Reads the JSON object in `file`.
    pub fn open(file: &Path) -> Result<Self> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(ModelError::MissingFile { file: file.into(), expected: "the model's configuration".into() });
            }
            Err(source) => return Err(ModelError::Unreadable { file: file.into(), source }),
        };
        let not = |reason: String| ModelError::NotConfig { file: file.into(), reason };
        match serde_json::from_str(&plain_json(&text)) {
            Ok(Value::Object(fields)) => Ok(Self::from_map(file, fields)),
            Ok(_) => Err(not("is JSON, but not an object".into())),
            Err(error) => Err(not(format!("is not JSON ({error})"))),
        }
    }

    /// An object that is at hand already; `file` is what errors name.
    pub fn from_map(file: &Path, fields: Map<String, Value>) -> Self {
        ConfigFile { file: file.into(), fields, read: RefCell::default() }
    }

    /// The same configuration with another value for one field.
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.fields.insert(field.to_owned(), value);
        self
    }

    /// All fields as JSON, sorted by name: equal for equal configurations.
    pub fn text(&self) -> String {
        Value::Object(self.fields.clone()).to_string()
    }

    /// The file that errors name.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// A field's value, if it is there and not `null`; counts as read.
    pub fn value(&self, field: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(field.to_owned());
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// A field that must be there, of type `T`; `rule` says in words what it must be.
    pub fn required<T: DeserializeOwned>(&self, field: &str, rule: &str) -> Result<T> {
        self.get(field, rule)?.ok_or_else(|| self.refuse(field, rule))
    }

    /// A field that has a default when it is missing or `null`.
    pub fn optional<T: DeserializeOwned>(&self, field: &str, rule: &str, default: T) -> Result<T> {
        Ok(self.get(field, rule)?.unwrap_or(default))
    }

    /// A field of type `T`, or nothing when it is missing or `null`.
    pub fn get<T: DeserializeOwned>(&self, field: &str, rule: &str) -> Result<Option<T>> {
        match self.value(field) {
            None => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|_| self.refuse(field, rule)),
        }
    }

    /// A size or count that must be there and be at least 1.
    pub fn size(&self, field: &str) -> Result<i64> {
        self.positive(field, self.required(field, POSITIVE)?)
    }

    /// A size or count of at least 1 that has a default.
    pub fn size_or(&self, field: &str, default: i64) -> Result<i64> {
        self.positive(field, self.optional(field, POSITIVE, default)?)
    }

    fn positive(&self, field: &str, value: i64) -> Result<i64> {
        // The upper bound keeps products of sizes within 64 bits.
        if (1..=1 << 30).contains(&value) { Ok(value) } else { Err(self.refuse(field, POSITIVE)) }
    }

    /// Refuses a field unless it is missing, `null` or one of `supported`: for switches of which ella does one side.
    pub fn only(&self, field: &str, supported: &[Value]) -> Result<()> {
        match self.value(field) {
            Some(value) if !supported.iter().any(|one| same(one, value)) => {
                let words: Vec<String> = supported.iter().map(Value::to_string).collect();
                Err(self.refuse(field, &words.join(" or ")))
            }
            _ => Ok(()),
        }
    }

    /// The error that names this file, the field, the rule and the value found.
    pub fn refuse(&self, field: &str, rule: &str) -> ModelError {
        let found = match self.fields.get(field) {
            None => "nothing".to_owned(),
            Some(value) => value.to_string(),
        };
        ModelError::Config { file: self.file.clone(), field: field.into(), rule: rule.into(), found }
    }

    /// Refuses fields that nobody read, except metadata (a leading `_`) and those listed as `irrelevant`.
    pub fn finish(self, irrelevant: &[&str]) -> Result<()> {
        let read = self.read.borrow();
        let unknown =
            self.fields.keys().find(|field| !field.starts_with('_') && !read.contains(*field) && !irrelevant.contains(&field.as_str()));
        match unknown {
            Some(field) => Err(self.refuse(field, "absent, because ella does not know it")),
            None => Ok(()),
        }
    }
}

const POSITIVE: &str = "a whole number of at least 1";

/// The text with `-Infinity` and the like, which Python writes and JSON has not, as words in quotes: fields that are to be numbers refuse them.
/// diffusers writes one with every DPM-Solver, its `lambda_min_clipped`.
fn plain_json(text: &str) -> String {
    let (mut plain, mut quoted) = (String::with_capacity(text.len()), false);
    for piece in text.split_inclusive('"') {
        if quoted {
            plain += piece;
            let inside = piece.trim_end_matches('"');
            // After an odd number of backslashes a quote is the string's own.
            quoted = (inside.len() - inside.trim_end_matches('\\').len()) % 2 == 1;
        } else {
            let words = piece.replace("Infinity", "\"Infinity\"").replace("-\"Infinity\"", "\"-Infinity\"");
            plain += &words.replace("NaN", "\"NaN\"");
            quoted = piece.ends_with('"');
        }
    }
    plain
}

/// JSON equality that takes `1` and `1.0` for the same number.
fn same(a: &Value, b: &Value) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(value: Value) -> ConfigFile {
        match value {
            Value::Object(fields) => ConfigFile::from_map(Path::new("unet/config.json"), fields),
            _ => panic!("an object"),
        }
    }

    #[test]
    fn reads_what_is_there_and_defaults_what_is_not() {
        let c = config(json!({"width": 32, "eps": 1e-5, "maybe": null, "_class_name": "X", "torch_dtype": "float32"}));
        assert_eq!(c.size("width").unwrap(), 32);
        assert_eq!(c.optional("eps", "a number", 0.0).unwrap(), 1e-5);
        assert_eq!(c.size_or("maybe", 3).unwrap(), 3);
        c.finish(&["torch_dtype"]).unwrap();
    }

    #[test]
    fn names_file_field_rule_and_value() {
        let c = config(json!({"width": -1, "act_fn": "mish", "new": [1]}));
        let text = c.size("width").unwrap_err().to_string();
        assert!(text.contains("unet/config.json") && text.contains("width") && text.contains("(found -1)"), "{text}");
        assert!(matches!(c.size("depth"), Err(ModelError::Config { found, .. }) if found == "nothing"));
        let error = c.only("act_fn", &[json!("silu"), json!("swish")]).unwrap_err();
        assert!(matches!(&error, ModelError::Config { field, rule, .. } if field == "act_fn" && rule.contains("silu")));
        assert!(matches!(c.finish(&[]), Err(ModelError::Config { field, .. }) if field == "new"));
    }

    #[test]
    fn infinities_as_python_writes_them_are_words() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let text = r#"{"a": -Infinity, "b": [NaN, Infinity], "c": "say \"NaN\" \\", "d": "Infinity \\\" NaN", "e": NaN}"#;
        std::fs::write(&file, text).unwrap();
        let c = ConfigFile::open(&file).unwrap();
        let expected = json!({"a": "-Infinity", "b": ["NaN", "Infinity"], "c": "say \"NaN\" \\", "d": "Infinity \\\" NaN", "e": "NaN"});
        assert_eq!(serde_json::from_str::<Value>(&c.text()).unwrap(), expected);
        let error = c.optional("a", "a number", 0.0).unwrap_err().to_string();
        assert!(error.contains("field a must be a number (found \"-Infinity\")"), "{error}");
    }

    #[test]
    fn numbers_compare_by_value() {
        let c = config(json!({"scale": 1, "dropout": 0.0}));
        c.only("scale", &[json!(1.0)]).unwrap();
        c.only("dropout", &[json!(0)]).unwrap();
    }
}
