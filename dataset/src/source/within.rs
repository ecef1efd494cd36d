//! Fields within others: a turn of a conversation, an entry of a list, by its path.

use serde_json::{Map, Value};

use super::sample::{Field, Fields};

/// Of lists so many entries are told of.
const ENTRIES_TOLD: usize = 2;

/// Which entries within others are fields, beside those at the top.
#[derive(Clone, Debug)]
pub(crate) enum Within {
    /// Those of these paths, as far as nothing at the top has such a name: names, and numbers of a list's entries (from 0, or from its end: -1 is the
    /// last), joined by dots.
    Named(Vec<String>),
    /// Texts, in the place of what holds them: to tell what there is.
    Texts,
}

impl Default for Within {
    fn default() -> Within {
        Within::Named(Vec::new())
    }
}

impl Within {
    /// The paths that are named.
    pub(super) fn paths(&self) -> &[String] {
        match self {
            Within::Named(paths) => paths,
            Within::Texts => &[],
        }
    }

    /// An object's fields.
    pub(super) fn fields(&self, object: Map<String, Value>) -> Fields {
        let more: Fields = match self {
            Within::Named(paths) => paths.iter().filter_map(|path| Some((path.clone(), Field::json(at(&object, path)?.clone())))).collect(),
            Within::Texts => return object.iter().flat_map(|(name, value)| told(name, value)).map(|name| (name, Field::Other)).collect(),
        };
        let mut fields: Fields = object.into_iter().map(|(name, value)| (name, Field::json(value))).collect();
        fields.extend(more);
        fields
    }
}

/// What lies at a path. A name that holds dots itself is found as well as names within names.
pub(super) fn at<'v>(object: &'v Map<String, Value>, path: &str) -> Option<&'v Value> {
    let longest_first = || path.rmatch_indices('.').find_map(|(dot, _)| below(object.get(&path[..dot])?, &path[dot + 1..]));
    object.get(path).or_else(longest_first)
}

fn below<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    match value {
        Value::Object(object) => at(object, path),
        Value::Array(entries) => {
            let (entry, rest) = path.split_once('.').map_or((path, None), |(entry, rest)| (entry, Some(rest)));
            let number = match entry.strip_prefix('-') {
                Some(back) => entries.len().checked_sub(back.parse().ok()?)?,
                None => entry.parse().ok()?,
            };
            let entry = entries.get(number)?;
            rest.map_or(Some(entry), |rest| below(entry, rest))
        }
        _ => None,
    }
}

/// The names of the texts that an entry holds; its own if it holds none.
fn told(name: &str, value: &Value) -> Vec<String> {
    let mut names = Vec::new();
    texts(name.to_owned(), value, &mut names);
    if names.is_empty() { vec![name.to_owned()] } else { names }
}

fn texts(name: String, value: &Value, names: &mut Vec<String>) {
    match value {
        Value::String(_) => names.push(name),
        Value::Object(object) => object.iter().for_each(|(key, value)| texts(format!("{name}.{key}"), value, names)),
        Value::Array(entries) => {
            let entries = entries.iter().take(ENTRIES_TOLD).enumerate();
            entries.for_each(|(number, value)| texts(format!("{name}.{number}"), value, names));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_path_leads_through_objects_and_lists_and_a_name_with_dots_wins() {
        let row = object(json!({
            "a": [{"b": "first"}, {"b": "second"}], "a.0.b": "literal", "c.d": {"e": 1, "e.f": [["deep"]]}, "c": {"d.e": 2}, "n": null
        }));
        for (path, expected) in [
            ("a.0.b", Some(json!("literal"))),
            ("a.1.b", Some(json!("second"))),
            ("a.-2.b", Some(json!("first"))),
            ("a.-1", Some(json!({"b": "second"}))),
            ("c.d.e", Some(json!(1))),
            ("c.d.e.f.0.0", Some(json!("deep"))),
            ("c.d.e.f.0.0.x", None),
            ("n", Some(json!(null))),
            ("a.2.b", None),
            ("a.-3.b", None),
            ("a.b", None),
            ("a.", None),
            ("a..b", None),
            (".", None),
            ("n.x", None),
        ] {
            assert_eq!(at(&row, path), expected.as_ref(), "{path}");
        }
        let fields = Within::Named(vec!["a.1.b".into(), "a.0.b".into(), "c.d.e".into(), "none.x".into()]).fields(row);
        let found: Vec<(&str, &Field)> = fields.iter().map(|(name, field)| (name.as_str(), field)).collect();
        let text = |text: &str| Field::Text(text.into());
        let expected = [
            ("a", &Field::Other),
            ("a.0.b", &text("literal")),
            ("a.1.b", &text("second")),
            ("c", &Field::Other),
            ("c.d", &Field::Other),
            ("c.d.e", &Field::Number(1.0)),
            ("n", &Field::Other),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn texts_are_told_by_their_paths_and_what_holds_none_by_its_name() {
        let row = object(json!({
            "id": 3, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}, {"from": "human"}],
            "meta": {"size": [4, 5], "by": "me"}, "tags": [], "image": "a.jpg"
        }));
        let names: Vec<String> = Within::Texts.fields(row).into_keys().collect();
        let expected = [
            "conversations.0.from",
            "conversations.0.value",
            "conversations.1.from",
            "conversations.1.value",
            "id",
            "image",
            "meta.by",
            "tags",
        ];
        assert_eq!(names, expected);
    }
}
