//! As much of PromQL as it takes to see which metrics and labels a query asks for. `scripts/test-monitoring.sh` has promtool parse them whole.

use ella_coordinator::metrics::{ALL, Kind, Metric, Values};

/// Labels that whoever reads the metrics adds.
const ADDED: &[&str] = &["job", "instance", "namespace", "pod", "alertname"];
const FUNCTIONS: &[&str] = &[
    "rate",
    "increase",
    "sum",
    "max",
    "min",
    "avg",
    "count",
    "time",
    "changes",
    "histogram_quantile",
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
];
const WORDS: &[&str] = &["and", "or", "unless", "bool", "offset"];
/// Those after which a list of labels comes.
const LISTS: &[&str] = &["by", "without", "on", "ignoring", "group_left", "group_right"];

/// What is wrong with a query, and where it stands.
pub(crate) fn problems(place: &str, query: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let (mut asked, mut labels): (Vec<&Metric>, Vec<String>) = (Vec::new(), Vec::new());
    let mut rest = query;
    let (mut depth, mut lists) = (0, false);
    while let Some(first) = rest.chars().next() {
        let (taken, after) = token(rest);
        match first {
            '(' => depth += 1,
            ')' => {
                depth -= 1;
                lists = false;
            }
            '{' => problems.extend(matchers(taken, asked.last().copied())),
            'a'..='z' if LISTS.contains(&taken) => lists = true,
            'a'..='z' if lists => labels.push(taken.to_owned()),
            'a'..='z' if FUNCTIONS.contains(&taken) && after.trim_start().starts_with('(') || after.starts_with(" by") => {}
            'a'..='z' if FUNCTIONS.contains(&taken) || WORDS.contains(&taken) => {}
            'a'..='z' => match ALL.iter().find(|metric| metric.series().iter().any(|name| name == taken)) {
                Some(metric) => asked.push(metric),
                None => problems.push(format!("there is no metric {taken}")),
            },
            _ => {}
        }
        rest = after;
    }
    if depth != 0 {
        problems.push("its brackets do not match".to_owned());
    }
    if asked.is_empty() {
        problems.push("it asks for nothing".to_owned());
    }
    let known = |label: &str| ADDED.contains(&label) || asked.iter().any(|metric| has(metric, label));
    problems.extend(labels.iter().filter(|label| !known(label)).map(|label| format!("no metric in it has a label {label}")));
    problems.into_iter().map(|problem| format!("{place}: {problem}: {query}")).collect()
}

/// What the query begins with, and what follows: a name, a string, a whole `{…}` or `[…]`, or one character.
fn token(rest: &str) -> (&str, &str) {
    let name = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    let end = match rest.as_bytes()[0] {
        b'{' => rest.find('}').map_or(rest.len(), |end| end + 1),
        b'[' => rest.find(']').map_or(rest.len(), |end| end + 1),
        _ if name > 0 => name,
        _ => rest.chars().next().map_or(1, char::len_utf8),
    };
    rest.split_at(end)
}

fn has(metric: &Metric, label: &str) -> bool {
    metric.labels.iter().any(|of| of.name == label) || (label == "le" && metric.kind == Kind::Histogram)
}

/// What is wrong with `{label="value", …}` of a metric.
fn matchers(text: &str, metric: Option<&Metric>) -> Vec<String> {
    let Some(metric) = metric else { return vec![format!("{text} is of no metric")] };
    let inside = text.trim_start_matches('{').trim_end_matches('}');
    let mut problems = Vec::new();
    for matcher in inside.split(", ").filter(|matcher| !matcher.is_empty()) {
        let Some((label, value)) = matcher
            .split_once("=~")
            .or_else(|| matcher.split_once("!~"))
            .or_else(|| matcher.split_once("!="))
            .or_else(|| matcher.split_once('='))
        else {
            problems.push(format!("{matcher} matches nothing"));
            continue;
        };
        let value = value.trim_matches('"');
        let of = metric.labels.iter().find(|of| of.name == label);
        match of.map(|of| of.values) {
            Some(Values::Of(values)) => {
                let odd = value.split('|').filter(|value| !value.starts_with('$') && !values.contains(value));
                problems.extend(odd.map(|value| format!("{} never has {label}=\"{value}\"", metric.name)));
            }
            Some(Values::Some { .. }) => {}
            None if ADDED.contains(&label) => {}
            None => problems.push(format!("{} has no label {label}", metric.name)),
        }
    }
    problems
}

#[test]
fn queries_for_what_is_not_there_are_found() {
    let fine = "sum by (part) (rate(ella_step_part_seconds_total{part!=\"commit\", job=~\"$job\"}[$__rate_interval])) / on (job) group_left () ella_step";
    assert_eq!(problems("x", fine), Vec::<String>::new());
    for (query, wanted) in [
        ("rate(ella_steps[5m])", "no metric ella_steps"),
        ("ella_step{part=\"data\"}", "no label part"),
        ("ella_workers{state=\"dead\"}", "never has"),
        ("sum by (rank) (ella_step)", "no metric in it has a label rank"),
        ("rate(ella_steps_total[5m]", "brackets"),
        ("1 > 2", "nothing"),
        ("ella_step_duration_seconds > 1", "no metric ella_step_duration_seconds"),
    ] {
        assert!(problems("x", query).iter().any(|problem| problem.contains(wanted)), "{query}: {:?}", problems("x", query));
    }
}
