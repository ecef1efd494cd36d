//! The page itself: plain HTML with its style and pictures inside.

use std::fmt::{Display, Write};

use ella_store::Outcome;
use serde_json::Value;

use super::chart::{Chart, short};
use super::facts::{Facts, TermFact};
use super::numbers::{Numbers, Tenths};
use crate::audit::{Epoch, Verdict};
use crate::ui::{count, plain, span};

const STYLE: &str = include_str!("style.css");
/// Of the parts of a step, from the largest on.
const HUES: [&str; 7] = ["#1f5fa8", "#c4550e", "#1d7a46", "#8250a8", "#a8871f", "#3c8d93", "#8a929c"];

/// The whole document.
pub(super) fn page(facts: &Facts, numbers: &Numbers) -> String {
    let mut body = head(facts, numbers);
    body += &loss(facts, numbers);
    body += &facts.grid.html();
    if let Some(png) = &facts.samples {
        let _ =
            write!(body, "<h2>Samples</h2>\n<img alt=\"Pictures drawn with the trained connector\" src=\"data:image/png;base64,{png}\">\n");
    }
    body += &speed(facts, numbers);
    body += &audit(facts);
    body += &history(facts);
    body += &counted(numbers);
    body += &settings(facts);
    document(&facts.title, "", &body)
}

/// A self-contained document of the report's style, with further rules of its own.
pub(crate) fn document(title: &str, own: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{}</title>\n<style>\n{STYLE}{own}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title)
    )
}

/// Text as it stands in HTML.
pub(crate) fn escape(text: impl Display) -> String {
    plain(&text.to_string()).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn head(facts: &Facts, numbers: &Numbers) -> String {
    let steps = facts.config.train.steps;
    let mut tiles = tile("Steps", &format!("{} of {steps}", numbers.step), &format!("{} samples", facts.samples_used));
    if let Some(t) = numbers.held_out {
        tiles += &fall("Held-out loss", t);
    } else if let Some(t) = numbers.training {
        tiles += &fall("Training loss", t);
    }
    let rate = format!("{} samples/s", short(numbers.samples_per_second));
    tiles += &tile("Throughput", &rate, &format!("{} of training", span(numbers.trained_seconds)));
    let verdict = match &facts.audit {
        None => (
            "not shown".to_owned(),
            "<code>ella audit RUN --json &gt; a.json</code>, then this with <code>--audit a.json</code>".to_owned(),
        ),
        Some(Verdict { ok: true, steps_left_out: left_out @ 1.., .. }) => {
            let what = format!("but {} changed nothing", count(*left_out as usize, "step"));
            ("<span class=\"good\">holds</span>".to_owned(), what)
        }
        Some(verdict) if verdict.ok => {
            ("<span class=\"good\">holds</span>".to_owned(), "every sample exactly once, every byte as committed".to_owned())
        }
        Some(verdict) => ("<span class=\"bad\">fails</span>".to_owned(), count(verdict.problems.len(), "problem")),
    };
    tiles += &tile("Audit", &verdict.0, &verdict.1);
    format!(
        "<h1>{}</h1>\n<p class=\"soft\"><code>{}</code></p>\n<div class=\"tiles\">\n{tiles}</div>\n",
        escape(&facts.title),
        escape(&facts.run)
    )
}

fn tile(name: &str, value: &str, note: &str) -> String {
    format!("<div class=\"tile\"><small>{name}</small><b>{value}</b><small>{note}</small></div>\n")
}

fn fall(name: &str, tenths: Tenths) -> String {
    let value = format!("{:.4} → {:.4}", tenths.first, tenths.last);
    tile(name, &value, &format!("first to last tenth of the steps: ×{:.3}", tenths.ratio()))
}

/// Restarts, as the charts mark them: once for each step that was resumed from.
fn marks(facts: &Facts) -> Vec<(f64, String)> {
    let resumed: Vec<&TermFact> = facts.terms.iter().skip(1).collect();
    let word = |terms: &[&TermFact]| {
        let numbers: Vec<String> = terms.iter().map(|term| term.term.to_string()).collect();
        let plural = if terms.len() == 1 { ("term", "resumes") } else { ("terms", "resume") };
        (terms[0].from_step as f64, format!("{} {} {} at {}", plural.0, numbers.join(", "), plural.1, terms[0].from_step))
    };
    resumed.chunk_by(|a, b| a.from_step == b.from_step).map(word).collect()
}

fn loss(facts: &Facts, numbers: &Numbers) -> String {
    let chart = Chart {
        label: "Loss over steps",
        height: 300.0,
        steps: numbers.step as f64,
        lines: vec![("raw", &numbers.loss), ("smooth", &numbers.smooth)],
        dots: vec![("held", &numbers.held_out_points)],
        marks: marks(facts),
        ticks: &facts.commits,
        from_zero: false,
    };
    let line = |name: &str, tenths: Option<Tenths>| match tenths {
        Some(t) => format!(
            "<tr><td>{name}</td><td class=\"n\">{:.4}</td><td class=\"n\">{:.4}</td><td class=\"n\">×{:.3}</td></tr>\n",
            t.first,
            t.last,
            t.ratio()
        ),
        None => String::new(),
    };
    format!(
        "<h2>Loss</h2>\n{}{}</div>\n<p class=\"key\"><span><i style=\"color:var(--pale)\"></i>each step</span>\
         <span><i style=\"color:var(--blue)\"></i>running mean</span><span><i class=\"dot\"></i>held-out noise on fixed samples</span>\
         <span><i class=\"tri\"></i>commit</span><span><i style=\"color:var(--red);border-top-style:dashed\"></i>restart</span></p>\n\
         <table><tr><td></td><th class=\"n\">first tenth of the steps</th><th class=\"n\">last tenth</th><th class=\"n\">ratio</th></tr>\n{}{}</table>\n",
        scroll("Curve of the loss"),
        chart.svg(),
        line("Held-out loss", numbers.held_out),
        line("Training loss", numbers.training)
    )
}

fn speed(facts: &Facts, numbers: &Numbers) -> String {
    let chart = Chart {
        label: "Samples per second over steps",
        height: 150.0,
        steps: numbers.step as f64,
        lines: vec![("smooth", &numbers.throughput)],
        marks: marks(facts),
        from_zero: true,
        ..Chart::default()
    };
    let mut html = format!(
        "<h2>Throughput</h2>\n<p class=\"soft\">Samples per second, by step</p>\n{}{}</div>\n",
        scroll("Curve of the throughput"),
        chart.svg()
    );
    if numbers.parts.is_empty() {
        return html;
    }
    let total: f64 = numbers.parts.iter().map(|(_, seconds)| seconds).sum();
    let (mut bar, mut rows) = (String::new(), String::new());
    for (at, (name, seconds)) in numbers.parts.iter().enumerate() {
        let (hue, share) = (HUES[at.min(HUES.len() - 1)], 100.0 * seconds / total);
        let _ = write!(bar, "<span style=\"width:{share:.2}%;background:{hue}\" title=\"{}\"></span>", escape(name));
        let _ = writeln!(
            rows,
            "<tr><td><span class=\"swatch\" style=\"background:{hue}\"></span>{}</td><td class=\"n\">{:.1} ms</td><td class=\"n\">{share:.1} %</td></tr>",
            escape(name),
            1000.0 * seconds
        );
    }
    let _ = write!(
        html,
        "<h2>Where a step's time goes</h2>\n<p class=\"soft\">Mean step of rank 0: {:.1} ms. Beside it: encoding ahead {:.1} ms, and summing gradients \
         during the backward pass {:.1} ms.</p>\n<div class=\"bar\">{bar}</div>\n<table>{rows}</table>\n",
        1000.0 * numbers.step_seconds,
        1000.0 * numbers.encode,
        1000.0 * numbers.reduce_hidden
    );
    html
}

fn audit(facts: &Facts) -> String {
    let Some(verdict) = &facts.audit else { return String::new() };
    let Verdict { ok, step, records, terms, epochs, commits, retired, problems, notes, .. } = verdict;
    let word = if *ok { "<b class=\"good\">Holds.</b>" } else { "<b class=\"bad\">Fails.</b>" };
    let whole = commits.iter().filter(|commit| commit.whole).count();
    let mut html = format!(
        "<h2>Audit</h2>\n<p>{word} At step {step}: {} of {}; {whole} of {} commits whole, {retired} given up by the keep rule.</p>\n",
        count(*records, "log record"),
        count(*terms, "term"),
        commits.len()
    );
    if facts.commits.last().is_some_and(|newest| newest != step) {
        html += "<p class=\"bad\">The run has gone on since this audit.</p>\n";
    }
    for problem in problems {
        let _ = writeln!(html, "<p class=\"bad\">{}</p>", escape(problem));
    }
    for note in notes {
        let _ = writeln!(html, "<p class=\"soft\">{}</p>", escape(note));
    }
    html += "<table><tr><th>Epoch</th><th class=\"n\">samples used</th><th class=\"n\">due</th><th>count and multiset hash</th></tr>\n";
    for Epoch { epoch, samples, expected, finished, exact } in shown(epochs) {
        let found = if *exact { "<span class=\"good\">agree</span>" } else { "<span class=\"bad\">differ</span>" };
        let under_way = if *finished { "" } else { " (under way)" };
        let _ = writeln!(
            html,
            "<tr><td>{epoch}{under_way}</td><td class=\"n\">{samples}</td><td class=\"n\">{expected}</td><td>{found}</td></tr>"
        );
    }
    html += "</table>\n";
    if epochs.len() > shown(epochs).count() {
        let _ = writeln!(html, "<p class=\"soft\">and {} more epochs whose count and hash agree</p>", epochs.len() - shown(epochs).count());
    }
    html
}

/// Epochs worth a line: the last ones, and all that differ.
fn shown(epochs: &[Epoch]) -> impl Iterator<Item = &Epoch> {
    let first = epochs.len().saturating_sub(12);
    epochs.iter().enumerate().filter(move |(at, epoch)| *at >= first || !epoch.exact).map(|(_, epoch)| epoch)
}

fn history(facts: &Facts) -> String {
    let mut rows = String::new();
    for term in &facts.terms {
        let TermFact { term: number, host, version, from_step, to_step, world, .. } = term;
        let world = world.map_or_else(|| "–".to_owned(), |world| world.to_string());
        let _ = writeln!(
            rows,
            "<tr><td class=\"n\">{number}</td><td>{}</td><td class=\"n\">{from_step}</td><td class=\"n\">{to_step}</td>\
             <td class=\"n\">{world}</td><td>{}</td><td>{} {}</td></tr>",
            date(term.at_unix_ms),
            ending(term),
            escape(host),
            escape(version)
        );
    }
    let devices: Vec<String> = facts.devices.iter().map(escape).collect();
    let devices = if devices.is_empty() { String::new() } else { format!(" Workers computed on {}.", devices.join(", ")) };
    format!(
        "<h2>Terms and commits</h2>\n<p>{}, of which {} are kept. {}.{devices}</p>\n{}<table class=\"wide\"><tr><th class=\"n\">term</th>\
         <th>began (UTC)</th><th class=\"n\">from step</th><th class=\"n\">last commit</th><th class=\"n\">workers</th><th>end</th><th>host, version</th></tr>\n{rows}</table></div>\n",
        count(facts.commits.len(), "commit"),
        facts.kept,
        facts.membership,
        scroll("Terms")
    )
}

/// Begins what may be wider than a small screen, which keys can move, too.
pub(crate) fn scroll(what: &str) -> String {
    format!("<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{what}\">")
}

fn ending(term: &TermFact) -> String {
    let name = match &term.ended {
        None => return "none recorded: killed, or still running".to_owned(),
        Some((Outcome::Done, _)) => "done",
        Some((Outcome::Preempted, _)) => "preempted",
        Some((Outcome::Failed, _)) => "<span class=\"bad\">failed</span>",
    };
    let reason = term.ended.as_ref().map_or("", |(_, reason)| reason.as_str());
    if reason.is_empty() { name.to_owned() } else { format!("{name}: {}", escape(reason)) }
}

/// Milliseconds since 1970 as a date (the civil calendar; Hinnant's algorithm, "days to civil").
pub(crate) fn date(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, time) = ((seconds / 86_400) as i64 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", time / 3600, time % 3600 / 60, time % 60)
}

fn counted(numbers: &Numbers) -> String {
    if numbers.skipped.is_empty() {
        return String::new();
    }
    // Every run has these, and nothing is wrong with them.
    let asked = |reason: &str| if reason == "captions_dropped" { ", as train.caption_dropout asks" } else { "" };
    let row = |(reason, count): (&String, &u64)| {
        format!("<tr><td>{}{}</td><td class=\"n\">{count}</td></tr>\n", escape(reason.replace('_', " ")), asked(reason))
    };
    let rows: String = numbers.skipped.iter().map(row).collect();
    format!("<h2>Counted</h2>\n<table>{rows}</table>\n")
}

/// The effective config, a table for each section.
fn settings(facts: &Facts) -> String {
    let value = serde_json::to_value(&facts.config).unwrap_or_default();
    let mut tables = String::new();
    for (section, keys) in value.as_object().into_iter().flatten() {
        let mut rows = String::new();
        flatten("", keys, &mut rows);
        let _ = write!(tables, "<div><table><tr><th colspan=\"2\">[{}]</th></tr>\n{rows}</table><p></p></div>\n", escape(section));
    }
    format!("<h2>Settings</h2>\n<div class=\"two\">\n{tables}</div>\n")
}

fn flatten(prefix: &str, value: &Value, rows: &mut String) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, value, rows);
            }
        }
        Value::Null => {}
        other => {
            let text = other.as_str().map_or_else(|| other.to_string(), str::to_owned);
            let _ = writeln!(rows, "<tr><td>{}</td><td><code>{}</code></td></tr>", escape(prefix), escape(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ella_proto::config::RunConfig;

    use super::*;
    use crate::run::{Membership, Metric};

    #[test]
    fn dates_are_civil() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400_000), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_449_599_000), "2026-11-23 15:59:59");
    }

    #[test]
    fn the_page_stands_alone_and_says_what_it_was_given() {
        let config = RunConfig::parse("[run]\noutput='<r>'\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n", "x", &[]).unwrap();
        let metrics: Vec<Metric> = (1..=20)
            .map(|step| Metric {
                term: 1 + step / 11,
                step,
                samples: 4,
                at_unix_ms: 1000 * step,
                loss: Some(1.0 / step as f64),
                held_out_loss: Some(2.0 / step as f64),
                skipped: [("captions_dropped".to_owned(), 1)].into(),
                ..Metric::default()
            })
            .collect();
        let epoch = Epoch { epoch: 0, samples: 3, expected: 4, finished: true, exact: false };
        let facts = Facts {
            title: "A <title> & more".into(),
            run: "/runs/a".into(),
            id: String::new(),
            config,
            metrics,
            terms: vec![
                TermFact { term: 1, to_step: 10, ..TermFact::default() },
                TermFact { term: 2, from_step: 10, to_step: 20, ..TermFact::default() },
            ],
            commits: vec![10, 20],
            kept: 2,
            samples_used: 80,
            devices: BTreeSet::from(["cpu".to_owned()]),
            membership: Membership { generations: 3, lost: 1, joined: 1, stragglers: 0 },
            audit: Some(Verdict { step: 20, epochs: vec![epoch], problems: vec!["a byte was <flipped>".into()], ..Verdict::default() }),
            grid: super::super::samples::Grid::default(),
            samples: Some("QUJD".into()),
        };
        let shown = page(&facts, &facts.numbers());
        for expected in [
            "A &lt;title&gt; &amp; more",
            "term 2 resumes at 10",
            "a byte was &lt;flipped&gt;",
            "base64,QUJD",
            "differ",
            "20 of 1000",
            "captions dropped, as train.caption_dropout asks</td><td class=\"n\">20<",
            "3 generations, 1 worker lost, 1 joined. Workers computed on cpu",
        ] {
            assert!(shown.contains(expected), "{expected}");
        }
        assert!(!shown.contains("http://") && !shown.contains("https://") && !shown.contains("<script") && !shown.contains("NaN"));
        // It may have been audited: what is missing is the verdict's file.
        let numbers = facts.numbers();
        let shown = page(&Facts { audit: None, ..facts }, &numbers);
        assert!(shown.contains("ella audit RUN --json &gt; a.json") && shown.contains("--audit a.json"), "{shown}");
    }
}
