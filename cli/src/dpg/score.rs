//! `ella dpg score`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

use super::answers::Answers;
use super::estimate::{Resampling, Scores};
use super::judged::Judged;
use super::published::{LEVEL1, TABLE};
use super::set::Set;
use super::{Asked, Note, correct, official, report};
use crate::ui::{DONE, Fail, Out};
use crate::whole;

#[derive(Debug, Args)]
pub(crate) struct Score {
    #[command(flatten)]
    asked: Asked,
    /// A model's answers: JSON lines (or a .csv) of item_id, tile (0 to 3), proposition_id and answer, or of item_id and error where a picture
    /// could not be looked at
    #[arg(long, value_name = "FILE")]
    answers: PathBuf,
    /// How to reckon
    #[arg(long, value_enum, default_value_t = Modes::Both)]
    mode: Modes,
    /// Also write a report, by its ending .html or .md
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// How often prompts are drawn anew for the intervals
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    resamples: u32,
    /// What they are drawn from; the same seed gives the same intervals
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// What the command line may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Modes {
    /// As the official script does in one process, its defects included
    Official,
    /// With these mended
    Correct,
    /// Side by side
    Both,
}

/// One way to reckon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Official,
    Correct,
}

impl Mode {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Official => "official",
            Self::Correct => "correct",
        }
    }
}

/// All that was found.
#[derive(Debug)]
pub(super) struct Found<'a> {
    pub(super) csv: String,
    pub(super) answers_file: String,
    pub(super) prompts: usize,
    pub(super) questions: usize,
    pub(super) answers: usize,
    pub(super) pic_num: u8,
    pub(super) notes: Vec<Note>,
    judged: Vec<(Mode, Judged<'a>, Scores)>,
    how: Resampling,
}

impl Found<'_> {
    /// What each mode makes of it.
    pub(super) fn modes(&self) -> Vec<(Mode, &Scores)> {
        self.judged.iter().map(|(mode, _, scores)| (*mode, scores)).collect()
    }

    fn json(&self) -> Value {
        let mut value = json!({
            "csv": self.csv, "answers_file": self.answers_file, "prompts": self.prompts, "questions": self.questions, "answers": self.answers,
            "pic_num": self.pic_num, "resamples": self.how.resamples, "seed": self.how.seed, "notes": self.notes, "published": published(),
        });
        for (mode, judged, scores) in &self.judged {
            value[mode.name()] = mode_json(judged, scores);
        }
        value
    }
}

fn mode_json(judged: &Judged<'_>, scores: &Scores) -> Value {
    #[derive(Serialize)]
    struct Mode<'a> {
        #[serde(flatten)]
        scores: &'a Scores,
        absent: Vec<Value>,
        by_prompt: Vec<Value>,
    }
    let absent = judged.absent.iter().map(|(item, why)| json!({ "item_id": item, "reason": why.to_string() })).collect();
    let by_prompt =
        judged.prompts.iter().map(|prompt| json!({ "item_id": prompt.item, "tiles": prompt.tiles, "score": prompt.score })).collect();
    serde_json::to_value(Mode { scores, absent, by_prompt }).unwrap_or_default()
}

fn published() -> Vec<Value> {
    let row = |row: &super::published::Published| {
        let level1 = row.level1.map(|values| LEVEL1.into_iter().zip(values).collect::<std::collections::BTreeMap<_, _>>());
        json!({ "model": row.model, "score": row.score, "level1": level1, "source": row.source.name() })
    };
    TABLE.iter().map(row).collect()
}

impl Score {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let form = self.out.as_deref().map(Form::of).transpose()?;
        let set = Set::read(&self.asked.csv)?;
        if self.mode != Modes::Official {
            set.unambiguous()?;
        }
        let answers = Answers::read(&self.answers)?;
        let found = self.found(&set, &answers)?;
        if let (Some(path), Some(form)) = (&self.out, form) {
            whole::write(path, form.text(&found).as_bytes())?;
        }
        let mut value = found.json();
        value["report"] = json!(self.out);
        out.result(&value, || {
            let written = self.out.as_ref().map_or_else(String::new, |path| format!("report: {}\n", path.display()));
            report::text(&found) + &written
        });
        Ok(DONE)
    }

    fn found<'a>(&self, set: &'a Set, answers: &Answers) -> Result<Found<'a>, Fail> {
        let tiles = self.asked.pic_num;
        let notes = set.notes().into_iter().chain(answers.notes(set, tiles)?).collect();
        let how = Resampling { resamples: self.resamples, seed: self.seed };
        let mut judged = Vec::new();
        if self.mode != Modes::Correct {
            judged.push((Mode::Official, official::judge(set, answers, tiles)));
        }
        if self.mode != Modes::Official {
            judged.push((Mode::Correct, correct::judge(set, answers, tiles)));
        }
        let judged = judged.into_iter().map(|(mode, judged)| {
            let scores = Scores::of(&judged, how);
            (mode, judged, scores)
        });
        Ok(Found {
            csv: set.file.clone(),
            answers_file: self.answers.display().to_string(),
            prompts: set.items.len(),
            questions: set.questions.len(),
            answers: answers.count(),
            pic_num: tiles,
            notes,
            judged: judged.collect(),
            how,
        })
    }
}

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Html,
    Markdown,
}

impl Form {
    fn of(path: &Path) -> Result<Self, Fail> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("html") => Ok(Self::Html),
            Some("md") => Ok(Self::Markdown),
            _ => Err(Fail::usage(format_args!("--out {}: the ending must be .html or .md", path.display()))),
        }
    }

    fn text(self, found: &Found<'_>) -> String {
        match self {
            Self::Html => report::html(found),
            Self::Markdown => report::markdown(found),
        }
    }
}
