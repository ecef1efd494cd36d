//! What a mode makes of the answers, prompt by prompt.

use std::collections::BTreeMap;
use std::fmt::Display;

/// Why a prompt has no score of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// No answer is there: no picture was looked at.
    Missing,
    /// The picture could not be looked at.
    Unreadable(String),
    /// The model's answer is not there.
    Unanswered { tile: u8, question: i64 },
    /// The official script raises a `KeyError`: the question depends on one that it does not have.
    NoParent { question: i64, parent: i64 },
    /// The official script raises a `TypeError`: it has dropped the item's only row.
    Dropped,
}

impl Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => write!(f, "no answers: no picture was looked at"),
            Self::Unreadable(error) => write!(f, "the picture could not be looked at: {error}"),
            Self::Unanswered { tile, question } => write!(f, "question {question} of tile {tile} has no answer"),
            Self::NoParent { question, parent } => {
                write!(f, "KeyError: {parent} (question {question} depends on {parent}, which the script does not have)")
            }
            Self::Dropped => write!(f, "TypeError: the script has dropped the item's only row"),
        }
    }
}

/// Answers in a category, by how many are a yes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) yes: u64,
    pub(super) of: u64,
}

impl Tally {
    pub(super) fn add(&mut self, yes: bool) {
        self.yes += u64::from(yes);
        self.of += 1;
    }
}

/// One prompt's score.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prompt<'a> {
    pub(super) item: &'a str,
    /// Of each tile, 0 to 1.
    pub(super) tiles: Vec<f64>,
    /// Their mean.
    pub(super) score: f64,
    /// By category of the second level, before dependencies take anything away.
    pub(super) categories: BTreeMap<&'a str, Tally>,
}

impl<'a> Prompt<'a> {
    pub(super) fn new(item: &'a str, tiles: Vec<f64>, categories: BTreeMap<&'a str, Tally>) -> Self {
        let score = tiles.iter().sum::<f64>() / tiles.len().max(1) as f64;
        Self { item, tiles, score, categories }
    }
}

/// What a mode makes of all of them.
#[derive(Debug, Default)]
pub(super) struct Judged<'a> {
    /// Those that are in the mean.
    pub(super) prompts: Vec<Prompt<'a>>,
    /// Those that are not (official), or that are in it with a 0 or with questions that count as no (correct).
    pub(super) absent: Vec<(&'a str, Why)>,
}
