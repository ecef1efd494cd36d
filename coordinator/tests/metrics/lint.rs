//! The rules of `promtool check metrics`, and of OpenMetrics where they go further.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
struct Family {
    help: Option<String>,
    kind: Option<String>,
    unit: Option<String>,
    series: Vec<(String, BTreeMap<String, String>, String)>,
}

/// What is wrong with an exposition; nothing, if it is well.
pub(crate) fn problems(text: &str, open: bool) -> Vec<String> {
    let mut problems = Vec::new();
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut order: Vec<String> = Vec::new();
    let mut lines: Vec<&str> = text.lines().collect();
    if !text.ends_with('\n') {
        problems.push("the last line does not end".to_owned());
    }
    if open && lines.pop() != Some("# EOF") {
        problems.push("there is no # EOF at the end".to_owned());
    }
    for line in lines {
        if let Some(comment) = line.strip_prefix("# ") {
            let (keyword, rest) = comment.split_once(' ').unwrap_or((comment, ""));
            let (name, said) = rest.split_once(' ').unwrap_or((rest, ""));
            if !families.contains_key(name) {
                order.push(name.to_owned());
            } else if order.last().map(String::as_str) != Some(name) {
                problems.push(format!("{name}: its lines are not together"));
            }
            let family = families.entry(name.to_owned()).or_default();
            let place = match keyword {
                "HELP" => &mut family.help,
                "TYPE" => &mut family.kind,
                "UNIT" => &mut family.unit,
                _ => {
                    problems.push(format!("an odd comment: {line}"));
                    continue;
                }
            };
            if place.replace(said.to_owned()).is_some() {
                problems.push(format!("{name}: a second {keyword}"));
            }
            if !family.series.is_empty() {
                problems.push(format!("{name}: {keyword} after its values"));
            }
            continue;
        }
        match sample(line) {
            Some((name, labels, value)) => match order.last().filter(|family| belongs(&name, family, &families[*family], open)) {
                Some(family) => families.entry(family.clone()).or_default().series.push((name, labels, value)),
                None => problems.push(format!("{name}: a value of no family before it")),
            },
            None => problems.push(format!("no value: {line}")),
        }
    }
    families.iter().for_each(|(name, family)| family_problems(name, family, open, &mut problems));
    problems
}

/// A line's name, labels and value.
fn sample(line: &str) -> Option<(String, BTreeMap<String, String>, String)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        let mut left = inside;
        while !left.starts_with('}') {
            let (label, after) = left.split_once("=\"")?;
            let (mut value, mut chars) = (String::new(), after.char_indices());
            let close = loop {
                match chars.next()? {
                    (_, '\\') => value.push(chars.next().filter(|(_, c)| matches!(c, '\\' | '"' | 'n'))?.1),
                    (at, '"') => break at,
                    (_, c) => value.push(c),
                }
            };
            let is_name = label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') && !label.is_empty();
            if !is_name || labels.insert(label.to_owned(), value).is_some() {
                return None;
            }
            left = after[close + 1..].strip_prefix(',').unwrap_or(&after[close + 1..]);
        }
        rest = &left[1..];
    }
    let value = rest.strip_prefix(' ')?;
    let is_number = matches!(value, "NaN" | "+Inf" | "-Inf") || value.parse::<f64>().is_ok_and(f64::is_finite);
    is_number.then(|| (name.to_owned(), labels, value.to_owned()))
}

fn belongs(name: &str, family: &str, of: &Family, open: bool) -> bool {
    let suffixes: &[&str] = match (of.kind.as_deref(), open) {
        (Some("histogram"), _) => &["_bucket", "_sum", "_count"],
        (Some("counter"), true) => &["_total"],
        (Some("info"), true) => &["_info"],
        _ => &[""],
    };
    name.strip_prefix(family).is_some_and(|suffix| suffixes.contains(&suffix))
}

fn family_problems(name: &str, family: &Family, open: bool, problems: &mut Vec<String>) {
    let mut wrong = |what: &str| problems.push(format!("{name}: {what}"));
    let Family { help, kind, unit, series } = family;
    let kind = kind.as_deref().unwrap_or_default();
    if help.as_ref().is_none_or(String::is_empty) {
        wrong("no HELP");
    }
    if !["counter", "gauge", "histogram"].contains(&kind) && (!open || kind != "info") {
        wrong("no TYPE, or an odd one");
    }
    if series.is_empty() {
        wrong("no value");
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') || name.contains("__") {
        wrong("a name is of small letters, joined by _");
    }
    if !open && (kind == "counter") != name.ends_with("_total") {
        wrong("counters, and only they, end on _total");
    }
    if ["_bucket", "_count", "_sum"].iter().any(|suffix| name.ends_with(suffix)) {
        wrong("only a histogram's values have this suffix");
    }
    let words: BTreeSet<&str> = name.split('_').collect();
    for word in ["gauge", "counter", "histogram", "summary"] {
        if words.contains(word) {
            wrong("a name does not tell its type");
        }
    }
    let odd = [
        "ms",
        "us",
        "ns",
        "secs",
        "sec",
        "s",
        "mb",
        "kb",
        "gb",
        "b",
        "milliseconds",
        "minutes",
        "hours",
        "days",
        "kilobytes",
        "megabytes",
        "percent",
    ];
    if let Some(unit) = odd.iter().find(|unit| words.contains(*unit)) {
        wrong(&format!("{unit} is no base unit"));
    }
    if let Some(unit) = unit
        && !name.ends_with(&format!("_{unit}"))
    {
        wrong("its unit is not at the end of its name");
    }
    let mut seen = BTreeSet::new();
    for (series, labels, value) in series {
        if !seen.insert((series, labels)) {
            wrong("the same value twice");
        }
        if labels.contains_key("le") != series.ends_with("_bucket") || labels.contains_key("quantile") {
            wrong("le is for a histogram's buckets, quantile for nobody");
        }
        if (kind == "counter" || kind == "histogram") && value.parse::<f64>().is_ok_and(|value| value < 0.0) {
            wrong("a counter below 0");
        }
    }
    if kind == "histogram" {
        histogram_problems(series, &mut wrong);
    }
}

fn histogram_problems(series: &[(String, BTreeMap<String, String>, String)], wrong: &mut impl FnMut(&str)) {
    let counts: Vec<f64> = series.iter().filter(|(name, ..)| name.ends_with("_bucket")).map(|(.., value)| value.parse().unwrap()).collect();
    let last = series.iter().rfind(|(name, ..)| name.ends_with("_bucket"));
    let count = series.iter().find(|(name, ..)| name.ends_with("_count")).map(|(.., value)| value);
    if !counts.is_sorted() || last.is_none_or(|(_, labels, value)| labels["le"] != "+Inf" || Some(value) != count) {
        wrong("buckets do not add up to its count at +Inf");
    }
}

#[test]
fn the_lint_finds_what_is_wrong() {
    let good = "# HELP a_total b\n# TYPE a_total counter\na_total{x=\"1\"} 1\n";
    assert_eq!(problems(good, false), Vec::<String>::new());
    for (text, wanted) in [
        ("a_total 1\n", "no family"),
        ("# HELP a b\n# TYPE a counter\na 1\n", "_total"),
        ("# HELP a_total b\n# TYPE a_total gauge\na_total 1\n", "_total"),
        ("# TYPE a gauge\na 1\n", "no HELP"),
        ("# HELP a b\na 1\n", "no TYPE"),
        ("# HELP a b\n# TYPE a gauge\na 1\na 2\n", "twice"),
        ("# HELP a b\n# TYPE a gauge\n", "no value"),
        ("# HELP a b\n# TYPE a gauge\na{X=\"1\"} 2\n", "no value: a{X"),
        ("# HELP a b\n# TYPE a gauge\na one\n", "no value: a one"),
        ("# HELP a_ms b\n# TYPE a_ms gauge\na_ms 1\n", "base unit"),
        ("# HELP a_count b\n# TYPE a_count gauge\na_count 1\n", "suffix"),
        ("# HELP a_gauge b\n# TYPE a_gauge gauge\na_gauge 1\n", "type"),
        ("# HELP a b\n# TYPE a gauge\na 1\n# HELP c d\n# TYPE c gauge\nc 1\n# HELP a b\na{x=\"2\"} 1\n", "not together"),
        ("# HELP a b\n# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 1\n", "add up"),
        ("# HELP a b\n# TYPE a gauge\na 1", "does not end"),
    ] {
        let found = problems(text, false);
        assert!(found.iter().any(|problem| problem.contains(wanted)), "{text}: {found:?}");
    }
    assert!(problems("# HELP a b\n# TYPE a gauge\na 1\n", true)[0].contains("EOF"));
}
