//! `ella dpg`: DPG-Bench (ELLA, arXiv 2403.05135, section 4), and other sets of questions in its form, such as DSG-1k.
//!
//! A set is a CSV with a row for each question of a prompt ([`set`]); pictures of a prompt are four tiles of one file, and a model of
//! another's answers each question about each tile ([`answers`]). What becomes a score of that is said twice: as the official script reckons,
//! its defects included ([`official`]), and with those mended ([`correct`]).

mod answers;
mod chart;
mod correct;
mod estimate;
mod generate;
mod judged;
mod look;
mod official;
mod published;
mod questions;
mod report;
mod score;
mod set;
mod sheet;
mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use crate::ui::{Fail, NO_RETRY, Out};

/// Tiles of a picture: two rows of two.
pub(crate) const TILES: u8 = 4;

#[derive(Debug, Args)]
pub(crate) struct Dpg {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Draw every prompt four times, as the 2×2 grids that the official scorer reads
    Generate(Box<generate::Generate>),
    /// Write the list of questions to ask of each tile of each picture, for any model that answers questions about pictures
    Questions(questions::Questions),
    /// Answer the questions about the built-in scenes by the detector that finds what is in their pictures
    Look(look::LookArgs),
    /// Reckon the scores from a model's answers, as the official script does and with its defects mended
    Score(score::Score),
}

impl Dpg {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        match &self.command {
            Command::Generate(command) => command.run(out),
            Command::Questions(command) => command.run(out),
            Command::Look(command) => command.run(out),
            Command::Score(command) => command.run(out),
        }
    }
}

/// Which questions, and of how many tiles.
#[derive(Debug, Args)]
struct Asked {
    /// The questions: dpg_bench.csv of the official repository, or another set with the columns item_id, proposition_id, dependency, tuple
    /// and question_natural_language
    #[arg(long, value_name = "FILE")]
    csv: PathBuf,
    /// Tiles of each picture, from the upper left one on (the official dist_eval.sh: 4)
    #[arg(long, value_name = "N", default_value_t = TILES, value_parser = clap::value_parser!(u8).range(1..=i64::from(TILES)))]
    pic_num: u8,
}

/// What the pictures of one prompt got, reckoned correctly.
#[derive(Debug)]
pub(crate) struct Marks {
    pub(crate) item: String,
    /// The share of its questions that stand, the mean over tiles.
    pub(crate) score: f64,
    /// By category of the first level: answers that are a yes, of how many.
    pub(crate) categories: BTreeMap<String, (u64, u64)>,
}

/// The marks of every prompt of a set.
pub(crate) fn marks(csv: &Path, answers: &Path) -> Result<Vec<Marks>, Fail> {
    let (set, answers) = (set::Set::read(csv)?, answers::Answers::read(answers)?);
    set.unambiguous()?;
    let of = |prompt: judged::Prompt<'_>| {
        let mut categories = BTreeMap::new();
        for (name, tally) in prompt.categories {
            let sum: &mut (u64, u64) = categories.entry(set::level1(name).to_owned()).or_default();
            *sum = (sum.0 + tally.yes, sum.1 + tally.of);
        }
        Marks { item: prompt.item.to_owned(), score: prompt.score, categories }
    };
    Ok(correct::judge(&set, &answers, TILES).prompts.into_iter().map(of).collect())
}

/// Input that would be refused again.
pub(crate) fn bad(message: impl std::fmt::Display) -> Fail {
    Fail { code: NO_RETRY, message: message.to_string() }
}

/// The first few of many names.
fn named<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let more = names.len().saturating_sub(SHOWN);
    shown.join(", ") + &if more == 0 { String::new() } else { format!(" and {more} more") }
}

/// Something that a reader of the scores must know (KNOWN), how often it is so, and a word for scripts.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
struct Note {
    kind: &'static str,
    count: usize,
    text: String,
}

impl Note {
    /// What these are, and what becomes of them. Nothing, where there are none.
    fn of<S: AsRef<str>>(kind: &'static str, which: &[S], what: &str, so: &str) -> Option<Self> {
        let count = which.len();
        (count > 0).then(|| Self { kind, count, text: format!("{what}: {count} ({}); {so}", named(which)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_names_the_first_few_are_shown() {
        assert_eq!(named(&["a", "b"]), "a, b");
        assert_eq!(named(&["a", "b", "c", "d", "e", "f", "g"]), "a, b, c, d, e and 2 more");
        assert_eq!(named::<&str>(&[]), "");
    }
}
