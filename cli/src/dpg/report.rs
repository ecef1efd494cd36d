//! What `ella dpg score` found, for people: as text, Markdown or one self-contained HTML page, all of the same tables.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::chart::{Bar, HUES, svg};
use super::estimate::{Estimate, Scores};
use super::published::{LEVEL1, PROMPTS, TABLE};
use super::score::{Found, Mode};
use super::set::level1;
use super::sheet::{Line, Sheet};
use crate::report::{document, escape};
use crate::ui::count;

const OWN: &str = "tr.own td { font-weight: 600; }\n.name { font-size: 13px; fill: var(--ink); }\n";

const INTERVALS: &str = "95 % intervals: prompts drawn anew, with replacement";

/// How a mode reckons.
fn legend(mode: Mode) -> &'static str {
    match mode {
        Mode::Official => {
            "official: as the official script reckons in one process: without the set's first row and without prompts that raise, dependencies in \
             the order of the rows, categories of the last tile alone"
        }
        Mode::Correct => "correct: all rows, all dependencies, all tiles; a prompt without a picture is 0",
    }
}

const BESIDE: [&str; 2] = [
    "The published categories were made by the official script in several processes, which mixes them up; no mode reproduces that",
    "All scores are of mPLUG's answers: those of another model's are not comparable. Take one or two points for noise",
];

/// A heading, words, and a table.
struct Section {
    title: &'static str,
    words: Vec<String>,
    sheet: Option<Sheet>,
}

/// For a terminal.
pub(super) fn text(found: &Found<'_>) -> String {
    let mut text = format!("{}\n\n", about(found));
    for Section { title, words, sheet } in sections(found) {
        let _ = writeln!(text, "{title}");
        words.iter().for_each(|words| text += &format!("  {words}\n"));
        text += &sheet.map_or_else(String::new, |sheet| sheet.text());
        text += "\n";
    }
    text
}

pub(super) fn markdown(found: &Found<'_>) -> String {
    let mut text = format!("# DPG-Bench\n\n{}\n\n", about(found));
    for Section { title, words, sheet } in sections(found) {
        let _ = writeln!(text, "## {title}\n");
        words.iter().for_each(|words| text += &format!("- {}\n", words.replace('|', "\\|").replace('<', "&lt;")));
        text += if words.is_empty() { "" } else { "\n" };
        text += &sheet.map_or_else(String::new, |sheet| sheet.markdown() + "\n");
    }
    text
}

pub(super) fn html(found: &Found<'_>) -> String {
    let mut body = format!("<h1>DPG-Bench</h1>\n<p class=\"soft\">{}</p>\n", escape(about(found)));
    body += "<div class=\"tiles\">\n";
    for (mode, scores) in found.modes() {
        let (value, note) = scores.score.map_or(("none".to_owned(), String::new()), |score| {
            (number(score), format!("{}, mean of {}", range(score), prompts(score.of)))
        });
        let _ = writeln!(body, "<div class=\"tile\"><small>{}</small><b>{value}</b><small>{note}</small></div>", mode.name());
    }
    body += "</div>\n";
    for (at, Section { title, words, sheet }) in sections(found).into_iter().enumerate() {
        let _ = writeln!(body, "<h2>{title}</h2>");
        words.iter().for_each(|words| body += &format!("<p class=\"soft\">{}</p>\n", escape(words)));
        body += &if at == 0 { chart(found) } else { String::new() };
        body += &sheet.map_or_else(String::new, |sheet| sheet.html());
    }
    document("DPG-Bench", OWN, &body)
}

fn about(found: &Found<'_>) -> String {
    format!(
        "{}: {}, {}; {}: {} of {} each",
        found.csv,
        count(found.prompts, "prompt"),
        count(found.questions, "question"),
        found.answers_file,
        count(found.answers, "answer"),
        count(usize::from(found.pic_num), "tile")
    )
}

fn sections(found: &Found<'_>) -> Vec<Section> {
    let told = found.notes.iter().map(|note| note.text.clone()).collect::<Vec<_>>();
    let words = found.modes().into_iter().map(|(mode, _)| legend(mode)).chain([INTERVALS]).map(str::to_owned).collect();
    let mut sections = vec![Section { title: "Scores", words, sheet: Some(scores(found)) }];
    if !told.is_empty() {
        sections.push(Section { title: "What to know", words: told, sheet: None });
    }
    let mut words = BESIDE.map(str::to_owned).to_vec();
    if found.prompts != PROMPTS {
        words.push(format!(
            "This set is not DPG-Bench ({} instead of {PROMPTS}): its scores are not comparable with these",
            count(found.prompts, "prompt")
        ));
    }
    sections.push(Section { title: "Beside published scores", words, sheet: Some(beside(found)) });
    sections
}

/// Every number of both modes: the score, and each category under that of the level above.
fn lines<'f>(found: &'f Found<'_>) -> Vec<Bar> {
    let modes: Vec<(Mode, &Scores)> = found.modes();
    let row = |name: String, pick: &dyn Fn(&'f Scores) -> Option<Estimate>| {
        let picked = modes.iter().enumerate().filter_map(|(at, (_, scores))| Some((at, pick(scores)?)));
        (name, picked.collect::<Vec<_>>())
    };
    let above: BTreeSet<&str> = modes.iter().flat_map(|(_, scores)| scores.level1.keys().map(String::as_str)).collect();
    let below: BTreeSet<&str> = modes.iter().flat_map(|(_, scores)| scores.level2.keys().map(String::as_str)).collect();
    let mut lines = vec![row("score".to_owned(), &|scores| scores.score)];
    for first in above {
        lines.push(row(first.to_owned(), &|scores| scores.level1.get(first).copied()));
        let inner: Vec<&str> = below.iter().copied().filter(|second| level1(second) == first).collect();
        // One that has the same name, and is alone in it, would say the same again.
        for second in inner.iter().copied().filter(|_| inner != [first]) {
            lines.push(row(format!("  {second}"), &|scores| scores.level2.get(second).copied()));
        }
    }
    lines
}

fn scores(found: &Found<'_>) -> Sheet {
    let mut heads = vec![String::new()];
    for (mode, _) in found.modes() {
        heads.extend([mode.name().to_owned(), "95 % interval".to_owned(), "of".to_owned()]);
    }
    let row = |(at, (name, estimates)): (usize, Bar)| {
        let mut cells = vec![name];
        for column in 0..found.modes().len() {
            let estimate = estimates.iter().find(|(at, _)| *at == column).map(|(_, estimate)| *estimate);
            let unit = if at == 0 { "prompt" } else { "answer" };
            cells.extend(
                estimate.map_or(["–".to_owned(), String::new(), String::new()], |e| [number(e), range(e), count(e.of as usize, unit)]),
            );
        }
        if at == 0 { Line::strong(cells) } else { Line::new(cells) }
    };
    Sheet { heads, rows: lines(found).into_iter().enumerate().map(row).collect(), texts: 0 }
}

/// The published table with ours in it, from the highest score on.
fn beside(found: &Found<'_>) -> Sheet {
    let heads = ["model", "score"].into_iter().chain(LEVEL1).chain(["source"]).map(str::to_owned).collect();
    let mut rows: Vec<(f64, Line)> = TABLE
        .iter()
        .map(|row| {
            let level1 =
                LEVEL1.iter().enumerate().map(|(at, _)| row.level1.map_or_else(|| "–".to_owned(), |values| format!("{:.2}", values[at])));
            let cells = [row.model.to_owned(), format!("{:.2}", row.score)].into_iter().chain(level1).chain([row.source.name().to_owned()]);
            (row.score, Line::new(cells.collect()))
        })
        .collect();
    for (mode, scores) in found.modes() {
        let Some(score) = scores.score else { continue };
        // Sets differ in how they write the categories.
        let named = |name: &str| scores.level1.iter().find(|(ours, _)| ours.eq_ignore_ascii_case(name)).map(|(_, estimate)| *estimate);
        let level1 = LEVEL1.iter().map(|name| named(name).map_or_else(|| "–".to_owned(), number));
        let name = format!("this, {}", mode.name());
        rows.push((
            score.value,
            Line::strong([name, number(score)].into_iter().chain(level1).chain([found.answers_file.clone()]).collect()),
        ));
    }
    rows.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    Sheet { heads, rows: rows.into_iter().map(|(_, line)| line).collect(), texts: 1 }
}

fn chart(found: &Found<'_>) -> String {
    let bars: Vec<Bar> = lines(found).into_iter().filter(|(name, _)| !name.starts_with(' ')).collect();
    let key = |(at, (mode, _)): (usize, (Mode, &Scores))| {
        format!("<span><i style=\"color:{}\"></i>{}</span>", HUES[at % HUES.len()], mode.name())
    };
    let key: String = found.modes().into_iter().enumerate().map(key).collect();
    format!("{}<p class=\"key\">{key}</p>\n", svg(&bars))
}

fn number(estimate: Estimate) -> String {
    format!("{:.2}", estimate.value)
}

fn range(estimate: Estimate) -> String {
    estimate.interval.map_or_else(|| "–".to_owned(), |[low, high]| format!("{low:.2} to {high:.2}"))
}

fn prompts(of: u64) -> String {
    count(of as usize, "prompt")
}
