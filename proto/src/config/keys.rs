//! Keys of the config as a tree: which exist, which are meant, and how one is set or compared.

use super::*;
use serde_json::Value;
use std::path::PathBuf;

/// A run's config in which all optional keys are set: its tree has every key that exists.
pub(super) fn full() -> RunConfig {
    RunConfig {
        run: Run { output: String::new(), seed: 0 },
        base: Base {
            model: String::new(),
            dtype: Dtype::Fp32,
            prediction: Some(Prediction::Epsilon),
            loras: vec![Lora { file: String::new(), weight: 1.0 }],
        },
        text: Text {
            model: String::new(),
            max_tokens: 1,
            padding: Padding::Fixed,
            layers: Layers::Last,
            features: Features::Cached,
            dtype: Dtype::Fp32,
        },
        data: Data {
            path: String::new(),
            window: 1,
            captions: vec![CaptionChoice { column: String::new(), weight: 1.0 }],
            memory_bytes: 1,
            cache: Some(PathBuf::new()),
            cache_bytes: 1,
        },
        connector: Connector { width: Some(1), dtype: Some(ConnectorDtype::Fp32), from: Some(String::new()), ..Connector::default() },
        train: Train { snr_gamma: Some(1.0), ..Train::default() },
        sample: Sample {
            prompts_file: Some(PathBuf::new()),
            size: Some(Size { width: 1, height: 1 }),
            negative: Some(String::new()),
            ..Sample::default()
        },
        checkpoint: Checkpoint { every: Some(1), max_lost_work: Some(Millis(1)), ..Checkpoint::default() },
        workers: Workers { max: Some(1), gpu_memory: Some(Bytes(1)), ..Workers::default() },
    }
}

/// Refuses the first key of `table` that `known` lacks. Where `known` has an empty table, any keys may be.
pub(super) fn check(table: &toml::Table, known: &toml::Table, origin: &str) -> Result<(), ConfigError> {
    check_below(table, known, origin, "")
}

/// The same for a table that stands under the key `above`, which ends with a dot.
pub(super) fn check_below(table: &toml::Table, known: &toml::Table, origin: &str, above: &str) -> Result<(), ConfigError> {
    for (key, value) in table {
        let full = format!("{above}{key}");
        let Some(expected) = known.get(key) else {
            let below = below(key, known, above);
            let nearest =
                if below.is_empty() { nearest(key, known.keys()).map(|n| format!("{above}{n}")) } else { Some(below.join("` or `")) };
            return Err(ConfigError::UnknownKey { origin: origin.to_owned(), key: full, nearest });
        };
        if let (toml::Value::Table(inner), toml::Value::Table(expected)) = (value, expected)
            && !expected.is_empty()
        {
            check_below(inner, expected, origin, &format!("{full}."))?;
        }
    }
    Ok(())
}

/// The known keys below `above` that end like this one: it lacks its section.
fn below(key: &str, known: &toml::Table, above: &str) -> Vec<String> {
    let inner = known.iter().filter_map(|(name, value)| Some((name, value.as_table()?)));
    let ends = inner.flat_map(|(name, table)| {
        let above = format!("{above}{name}.");
        let own = table.contains_key(key).then(|| format!("{above}{key}"));
        own.into_iter().chain(below(key, table, &above)).collect::<Vec<_>>()
    });
    ends.collect()
}

/// The known key within a third of the word's length in edits, or two (letters that changed places), if any.
fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    known.map(|k| (edits(key, k), k.as_str())).min().filter(|(distance, k)| *distance <= 2.max(k.len().max(key.len()) / 3)).map(|(_, k)| k)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let cost = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Applies `section.key=value`. The value is TOML; what is not TOML is taken as a string.
pub(super) fn set(table: &mut toml::Table, item: &str) -> Result<(), ConfigError> {
    let syntax = |message: &str| ConfigError::Syntax { origin: format!("--set {item}"), message: message.to_owned() };
    let (path, text) = item.split_once('=').ok_or_else(|| syntax("expected section.key=value"))?;
    let value = format!("v = {text}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()));
    // What is not TOML only because no number is so large was not meant as a string.
    let digits = text.trim().trim_start_matches(['+', '-']);
    if value.is_str() && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(syntax(&format!("the number is out of range (expected {} to {})", i64::MIN, i64::MAX)));
    }
    let mut parts: Vec<&str> = path.split('.').map(str::trim).collect();
    let last = parts.pop().filter(|p| !p.is_empty()).ok_or_else(|| syntax("expected section.key=value"))?;
    let mut at = table;
    for part in parts {
        let next = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = next.as_table_mut().ok_or_else(|| syntax(&format!("`{part}` is a value, not a section")))?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

/// Removes a dotted path from a JSON tree.
pub(super) fn remove(value: &mut Value, path: &str) {
    match path.split_once('.') {
        Some((head, tail)) => {
            if let Some(inner) = value.get_mut(head) {
                remove(inner, tail);
            }
        }
        None => {
            if let Some(map) = value.as_object_mut() {
                map.remove(path);
            }
        }
    }
}

/// Dotted paths at which two JSON trees differ.
pub(super) fn differences(a: &Value, b: &Value) -> Vec<String> {
    let (Some(left), Some(right)) = (a.as_object(), b.as_object()) else {
        return if a == b { Vec::new() } else { vec![String::new()] };
    };
    let names: std::collections::BTreeSet<&String> = left.keys().chain(right.keys()).collect();
    let below = |name: &String| {
        let inner = differences(left.get(name).unwrap_or(&Value::Null), right.get(name).unwrap_or(&Value::Null));
        inner.into_iter().map(|path| if path.is_empty() { name.clone() } else { format!("{name}.{path}") }).collect::<Vec<_>>()
    };
    names.into_iter().flat_map(below).collect()
}
