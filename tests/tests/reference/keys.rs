//! Tables of keys, fields and variants.

use super::source::{Declared, Form, Kind, Member, Source};
use ella_proto::config::{ConfigError, JobKind, JobTable, OnResume, RunConfig};
use ella_proto::exit::Exit;
use ella_worker::caption::{CaptionConfig, CaptionSettings};
use ella_worker::embed::EmbedSettings;
use ella_worker::grids::DrawSettings;
use ella_worker::prepare::PrepareSettings;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// Where the types of a run's config are declared; those of a job's tables follow.
const RUN: [&str; 7] = [
    "proto/src/config/run.rs",
    "proto/src/config/networks.rs",
    "proto/src/config/data.rs",
    "proto/src/config/train.rs",
    "proto/src/config/sample.rs",
    "proto/src/config/workers.rs",
    "proto/src/config/units.rs",
];
const JOBS: [&str; 8] = [
    "proto/src/config/networks.rs",
    "proto/src/config/sample.rs",
    "proto/src/config/units.rs",
    "proto/src/config/job.rs",
    "worker/src/prepare/settings.rs",
    "worker/src/embed/mod.rs",
    "worker/src/caption/config.rs",
    "worker/src/grids/settings.rs",
];
/// The keys that a run needs.
const NEEDED: &str = "[run]\noutput = \"o\"\n[base]\nmodel = \"b\"\n[text]\nmodel = \"t\"\n[data]\npath = \"d\"\n";

/// Every key of a run's config, by section.
pub(crate) fn run() -> String {
    let source = Source::read(&RUN);
    let parse = |set: &[String]| RunConfig::parse(NEEDED, "x", set);
    let least = parse(&[]).unwrap();
    let cosine = parse(&["train.schedule.kind=cosine".to_owned()]).unwrap();
    let on_resume = |key: &str| match (key, least.on_resume(key), cosine.on_resume(key)) {
        ("text.features", ..) => "between `\"cached\"` and `\"ahead\"`",
        (_, OnResume::Free, OnResume::Free) => "yes",
        (_, OnResume::Free, _) => "yes, if `train.schedule.kind` is `\"constant\"`",
        (_, OnResume::SameContent, _) => "to a place of the same content",
        (_, OnResume::Same, _) => "no",
    };
    let values = serde_json::to_value(&least).unwrap();
    let rules = |key: &str, kind: &Kind| rules(key, kind, &|set: &str| parse(&[set.to_owned()]).err());
    let mut text = String::new();
    for section in &source.get("RunConfig").members {
        sections(&mut text, &source, (&section.name, section), &values, &Columns { on_resume: Some(&on_resume), rules: &rules });
    }
    text
}

/// Every key of a job's config: `[job]`, and the kinds' own tables.
pub(crate) fn jobs() -> String {
    fn table(text: &mut String, source: &Source, (name, kind): (&str, &str), default: &impl Serialize) {
        let values = Value::Object([(name.to_owned(), serde_json::to_value(default).unwrap())].into_iter().collect());
        let member = Member {
            name: name.to_owned(),
            doc: String::new(),
            kind: Some(Kind::Named(kind.to_owned())),
            holds: Vec::new(),
            optional: true,
        };
        sections(text, source, (name, &member), &values, &Columns { on_resume: None, rules: &|_, _| Vec::new() });
    }
    let mut source = JOBS.to_vec();
    source.push("worker/src/caption/job.rs");
    let source = Source::read(&source);
    let mut text = String::new();
    table(&mut text, &source, ("job", "JobTable"), &JobTable::new(JobKind::Prepare, String::new()));
    table(&mut text, &source, ("prepare", "PrepareSettings"), &PrepareSettings::default());
    table(&mut text, &source, ("embed", "EmbedSettings"), &EmbedSettings::default());
    table(
        &mut text,
        &source,
        ("caption", "CaptionSettings"),
        &CaptionSettings { ask: CaptionConfig::default(), ..CaptionSettings::default() },
    );
    table(&mut text, &source, ("draw", "DrawSettings"), &DrawSettings::default());
    text
}

/// What a table of keys has beside their names, meanings and defaults.
struct Columns<'a> {
    on_resume: Option<&'a dyn Fn(&str) -> &'static str>,
    rules: &'a dyn Fn(&str, &Kind) -> Vec<String>,
}

/// A section, and those in it. `key` is its name with those above it.
fn sections(text: &mut String, source: &Source, (key, section): (&str, &Member), values: &Value, columns: &Columns<'_>) {
    let Some(Kind::Named(kind)) = &section.kind else { panic!("{key} is no section") };
    let declared = source.get(kind);
    let doc = declared.doc.trim_start_matches(&format!("`[{key}]`")).trim_start_matches([':', '.']).trim();
    let _ = write!(text, "## `[{key}]`\n\n{}\n\n", if doc.is_empty() { &section.doc } else { doc });
    let (values, columns) = (&values[key.rsplit('.').next().unwrap()], columns);
    text.push_str(if columns.on_resume.is_some() {
        "| key | | default | may change on resume |\n|---|---|---|---|\n"
    } else {
        "| key | | default |\n|---|---|---|\n"
    });
    let (inner, own): (Vec<_>, Vec<_>) = declared.members.iter().partition(|member| is_section(source, member));
    for member in own {
        let full = format!("{key}.{}", member.name);
        let kind = member.kind.as_ref().unwrap();
        let about = about(source, member, &(columns.rules)(&full, kind));
        let _ = write!(text, "| `{}` | {about} | {} |", member.name, default(member, values.get(&member.name)));
        let _ = columns.on_resume.map(|on_resume| write!(text, " {} |", on_resume(&full)));
        text.push('\n');
    }
    text.push('\n');
    for member in inner {
        sections(text, source, (&format!("{key}.{}", member.name), member), values, columns);
    }
}

/// A table of its own, not one of a list.
fn is_section(source: &Source, member: &Member) -> bool {
    matches!(&member.kind, Some(Kind::Named(name)) if source.get(name).form == Form::Table)
}

/// The doc comment; the type and the rules; and each word that may stand there.
fn about(source: &Source, member: &Member, rules: &[String]) -> String {
    let mut facts = vec![kind_in_words(source, member.kind.as_ref().unwrap())];
    facts.extend_from_slice(rules);
    let mut text = format!("{} *{}*", member.doc, facts.join(", "));
    let mut inner = member.kind.as_ref();
    while let Some(Kind::List(next) | Kind::Pair(next)) = inner {
        inner = Some(next);
    }
    if let Some(Kind::Named(name)) = inner {
        let declared = source.get(name);
        let quote = if declared.form == Form::Words { "\"" } else { "" };
        for value in &declared.members {
            if declared.form != Form::Text {
                let _ = write!(text, "<br>`{quote}{}{quote}`: {}", value.name, value.doc);
            }
        }
    }
    text
}

fn kind_in_words(source: &Source, kind: &Kind) -> String {
    match kind {
        Kind::Plain(name) => (*name).to_owned(),
        Kind::List(inner) => format!("a list: {} each", kind_in_words(source, inner)),
        Kind::Pair(inner) => format!("two: {} each", kind_in_words(source, inner)),
        Kind::Named(name) => match source.get(name) {
            Declared { form: Form::Words, .. } => "one of".to_owned(),
            Declared { form: Form::Table, .. } => "a table with".to_owned(),
            // Its doc says how it is written, after what it is.
            Declared { doc, .. } => doc.trim_end_matches('.').rsplit("in TOML ").next().unwrap_or_default().to_owned(),
        },
    }
}

/// As TOML has it.
fn default(member: &Member, value: Option<&Value>) -> String {
    match value {
        _ if !member.optional => "needed".to_owned(),
        None | Some(Value::Null) => "left out".to_owned(),
        Some(Value::String(text)) if text.is_empty() => "needed".to_owned(),
        Some(value) => format!("`{value}`").replace("\\n", " ").replace(['\n', '|'], " "),
    }
}

/// The validator's own words on what a key may be, which it says of values that are not.
fn rules(key: &str, kind: &Kind, refused: &dyn Fn(&str) -> Option<ConfigError>) -> Vec<String> {
    let tried: &[&str] = match kind {
        Kind::Plain("integer") => &["0", "9223372036854775807"],
        Kind::Plain("number") => &["-1.0", "0.0", "2.0"],
        Kind::Pair(_) => &["[2.0, 2.0]"],
        Kind::Named(name) if name == "Millis" => &["\"0ms\""],
        Kind::Named(name) if name == "Bytes" => &["\"0B\""],
        _ => &[],
    };
    let said = tried.iter().filter_map(|value| match refused(&format!("{key}={value}")) {
        Some(ConfigError::Value { key: of, rule, .. }) if of == key => Some(rule),
        _ => None,
    });
    // Rules that name other keys' values are those values' own.
    let general = said.filter(|rule| !rule.contains("= ") && !rule.contains("there are only"));
    let words = general.map(|rule| rule.trim_start_matches("it must be ").trim_start_matches("it must ").replace("lie from", "from"));
    words.collect::<BTreeSet<_>>().into_iter().collect()
}

/// The exit codes.
pub(crate) fn exit_codes() -> String {
    let source = Source::read(&["proto/src/exit.rs"]);
    let docs = &source.get("Exit").members;
    assert_eq!(docs.len(), Exit::ALL.len());
    let rows = Exit::ALL.iter().zip(docs).map(|(exit, member)| {
        assert_eq!(format!("{exit:?}"), member.name);
        format!("| {} | {} |\n", exit.code(), member.doc)
    });
    format!("| code | |\n|---|---|\n{}", rows.collect::<String>())
}

/// The fields of a type that is written as a table.
pub(crate) fn fields(source: &Source, name: &str) -> String {
    let rows = source.get(name).members.iter().map(|field| format!("| `{}` | {} |\n", field.name, field.doc));
    format!("| field | |\n|---|---|\n{}", rows.collect::<String>())
}

/// The variants of a type, and what each holds.
pub(crate) fn variants(source: &Source, name: &str) -> String {
    let rows = source.get(name).members.iter().map(|variant| {
        let holds: Vec<String> = variant.holds.iter().map(|field| format!("`{field}`")).collect();
        format!("| `{}` | {} | {} |\n", variant.name, variant.doc, holds.join(", "))
    });
    format!("| | | with |\n|---|---|---|\n{}", rows.collect::<String>())
}
