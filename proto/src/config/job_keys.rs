//! What can be told of the jobs' own tables by who does not do their work: which keys there are, the kinds of their values, and what a job
//! needs.

use super::{ConfigError, JobKind, keys};
use toml::{Table, Value};

/// All keys, by kind of job.
const KEYS: &str = include_str!("job_keys.toml");
/// What a job has nothing to do without.
const NEEDED: [(JobKind, &str); 6] = [
    (JobKind::Prepare, "prepare.sources"),
    (JobKind::Embed, "embed.text"),
    (JobKind::Caption, "caption.ask.endpoint"),
    (JobKind::Caption, "caption.ask.model"),
    (JobKind::Draw, "draw.prompts"),
    (JobKind::Draw, "draw.base"),
];

/// The keys of a kind's table, each with a value of its kind.
pub fn known(kind: JobKind) -> Table {
    let all = KEYS.parse::<Table>().unwrap_or_default();
    all.get(kind.name()).and_then(Value::as_table).cloned().unwrap_or_default()
}

/// Refuses a key that there is none, a value of another kind, and a table that leaves nothing to do.
pub(super) fn check(kind: JobKind, table: &Table, origin: &str) -> Result<(), ConfigError> {
    let known = known(kind);
    keys::check_below(table, &known, origin, &format!("{kind}."))?;
    if let Some((key, found, expected)) = other_kind(table, &known, &format!("{kind}.")) {
        let message = format!("`{key}` is {found}, but it must be of type {expected}");
        return Err(ConfigError::Syntax { origin: origin.to_owned(), message });
    }
    let lacks = |path: &&str| {
        let mut names = path.split('.').skip(1);
        let first = names.next().and_then(|name| table.get(name));
        names.fold(first, |value, name| value?.get(name)).is_none_or(is_empty)
    };
    match NEEDED.into_iter().filter(|(of, _)| *of == kind).map(|(_, key)| key).find(lacks) {
        None => Ok(()),
        Some(key) => Err(ConfigError::Value {
            origin: origin.to_owned(),
            key,
            found: "left out or empty".to_owned(),
            rule: format!("a {kind} job needs it"),
        }),
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_str().is_some_and(str::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// The first value that is of another kind than it must be: its key, itself, and the kind. What is text here may be written otherwise.
fn other_kind(table: &Table, known: &Table, above: &str) -> Option<(String, String, &'static str)> {
    table.iter().find_map(|(key, value)| {
        let path = format!("{above}{key}");
        match (value, known.get(key)?) {
            (Value::Table(inner), Value::Table(known)) => other_kind(inner, known, &format!("{path}.")),
            (Value::Integer(_), Value::Float(_)) | (_, Value::String(_)) => None,
            (value, known) if value.same_type(known) => None,
            (value, known) => Some((path, value.to_string(), known.type_str())),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_keys_and_needs_some_of_them() {
        assert_eq!(KEYS.parse::<Table>().unwrap().len(), 4);
        for (kind, key) in NEEDED {
            let (mut all, mut whole) = (known(kind), known(kind));
            for (_, other) in NEEDED.into_iter().filter(|(of, _)| *of == kind) {
                let value = if other == "prepare.sources" { "[\"x\"]" } else { "x" };
                let item = format!("{}={value}", other.split_once('.').unwrap().1);
                keys::set(&mut whole, &item).unwrap();
                if other != key {
                    keys::set(&mut all, &item).unwrap();
                }
            }
            if key == "prepare.sources" {
                all.remove("sources");
            }
            let error = check(kind, &all, "job.toml").unwrap_err().to_string();
            assert_eq!(error, format!("job.toml: `{key}` is left out or empty, but a {kind} job needs it"));
            check(kind, &whole, "job.toml").unwrap();
        }
    }

    #[test]
    fn values_of_another_kind_are_named() {
        let refused = |text: &str| check(JobKind::Prepare, &text.parse().unwrap(), "job.toml").map_err(|error| error.to_string());
        let expected = "job.toml: `prepare.resolution` is \"64\", but it must be of type integer";
        assert_eq!(refused("sources = [\"a\"]\nresolution = \"64\"").unwrap_err(), expected);
        assert!(refused("sources = \"a\"").unwrap_err().contains("of type array"));
        assert!(refused("sources = [\"a\"]\nresolutoin = 64").unwrap_err().contains("did you mean `prepare.resolution`?"));
        assert!(refused("resolution = 64").unwrap_err().contains("`prepare.sources` is left out or empty"));
        assert_eq!(refused("sources = [\"a\"]\nmax_aspect = 2"), Ok(()), "an integer is a number too");
    }
}
