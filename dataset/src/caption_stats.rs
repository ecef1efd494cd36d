//! What a data set's captions are like: words, sentences, tokens and parts of speech, beside the ELLA paper's Table 1.
//!
//! Parts of speech come from harper's tagger (a dictionary and Brill's rules, trained on the Universal Dependencies of English). It does not
//! know every word: those are counted as untagged. The paper does not name its tagger, so small differences tell nothing.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use harper_brill::{BrillTagger, FreqDict, Tagger, UPOS, brill_tagger};
use serde::{Deserialize, Serialize};

/// Words of the histogram's bars; the last has all that are longer.
const BAR: u64 = 10;
/// The histogram's bars.
const BARS: usize = 21;
/// Distinct words are counted up to here, in 64 MiB at most.
const MOST_DISTINCT: usize = 1 << 22;

/// Counts tokens of a caption, as some tokenizer cuts it.
pub type Tokens<'a> = &'a (dyn Fn(&str) -> usize + Sync);

/// The whole sentences of a text, and at its end what is none: a sentence ends with `.`, `!`, `?` or `…` (and quotes or brackets that close)
/// before white space that no small letter follows, or at the text's end.
pub fn sentences(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut start = 0;
    for (end, _) in text.char_indices().filter(|(_, c)| c.is_whitespace()) {
        let next = text[end..].trim_start().chars().next();
        let sentence = text[start..end].trim_start();
        if is_whole(sentence) && !next.is_none_or(char::is_lowercase) {
            found.push(sentence);
            start = end;
        }
    }
    found.extend(Some(text[start..].trim()).filter(|rest| !rest.is_empty()));
    found
}

/// Whether a text ends as sentences do.
pub fn is_whole(text: &str) -> bool {
    text.trim_end().trim_end_matches(['"', '\'', '”', '’', ')', ']']).ends_with(['.', '!', '?', '…', '。'])
}

/// Sums over captions: add them one by one, and [`merge`](Self::merge) the counts of several threads.
pub struct CaptionCounter<'a> {
    tagger: Arc<BrillTagger<FreqDict>>,
    tokens: Option<Tokens<'a>>,
    /// Captions by their number of words.
    lengths: BTreeMap<u64, u64>,
    characters: u64,
    sentences: u64,
    token_sum: u64,
    speech: [u64; 5],
    distinct: HashSet<u64>,
}

impl fmt::Debug for CaptionCounter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaptionCounter").field("lengths", &self.lengths).finish_non_exhaustive()
    }
}

impl<'a> CaptionCounter<'a> {
    /// Counts no captions yet; tokens too, if told how.
    pub fn new(tokens: Option<Tokens<'a>>) -> Self {
        let (lengths, distinct) = (BTreeMap::new(), HashSet::new());
        Self { tagger: brill_tagger(), tokens, lengths, characters: 0, sentences: 0, token_sum: 0, speech: [0; 5], distinct }
    }

    /// Counts a caption.
    pub fn add(&mut self, caption: &str) {
        let mut words = 0;
        for word in caption.split_whitespace() {
            words += 1;
            self.note(word);
        }
        *self.lengths.entry(words).or_default() += 1;
        self.characters += caption.trim().chars().count() as u64;
        self.token_sum += self.tokens.map_or(0, |tokens| tokens(caption)) as u64;
        for sentence in sentences(caption) {
            self.sentences += 1;
            self.tag(sentence);
        }
    }

    /// Remembers a word, without marks around it and whatever its case.
    fn note(&mut self, word: &str) {
        let word = word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
        if !word.is_empty() && self.distinct.len() < MOST_DISTINCT {
            self.distinct.insert(hash(&word));
        }
    }

    fn tag(&mut self, sentence: &str) {
        let parts = parts(sentence);
        for (part, tag) in parts.iter().zip(self.tagger.tag_sentence(&parts)) {
            if let Some(kind) = kind(part, tag) {
                self.speech[kind] += 1;
            }
        }
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: Self) {
        for (words, captions) in other.lengths {
            *self.lengths.entry(words).or_default() += captions;
        }
        self.characters += other.characters;
        self.sentences += other.sentences;
        self.token_sum += other.token_sum;
        self.speech.iter_mut().zip(other.speech).for_each(|(sum, more)| *sum += more);
        self.distinct.extend(other.distinct);
    }

    /// The statistics of what was counted.
    pub fn finish(&self) -> CaptionStats {
        let captions: u64 = self.lengths.values().sum();
        let words: u64 = self.lengths.iter().map(|(words, captions)| words * captions).sum();
        let mean = |sum: u64| if captions == 0 { 0.0 } else { sum as f64 / captions as f64 };
        let [nouns, adjectives, verbs, prepositions, untagged] = self.speech.map(mean);
        let mut histogram = vec![0; BARS];
        for (words, captions) in &self.lengths {
            histogram[((words / BAR) as usize).min(BARS - 1)] += captions;
        }
        CaptionStats {
            captions,
            words: Lengths {
                mean: mean(words),
                p5: self.quantile(captions, 5),
                median: self.quantile(captions, 50),
                p95: self.quantile(captions, 95),
                most: self.lengths.keys().next_back().copied().unwrap_or(0),
            },
            histogram,
            sentences: mean(self.sentences),
            characters: mean(self.characters),
            tokens: self.tokens.map(|_| mean(self.token_sum)),
            distinct_words: self.distinct.len().min(MOST_DISTINCT) as u64,
            more_distinct_words: self.distinct.len() >= MOST_DISTINCT,
            speech: Speech { nouns, adjectives, verbs, prepositions, untagged },
        }
    }

    /// The fewest words that so many per cent of the captions do not exceed.
    fn quantile(&self, captions: u64, percent: u64) -> u64 {
        let rank = quantile_rank(captions, percent);
        let mut below = 0;
        let reached = self.lengths.iter().find(|(_, count)| {
            below += **count;
            below >= rank
        });
        reached.map_or(0, |(words, _)| *words)
    }
}

/// Which of so many values in their order, from 1, is the least that so many per cent of them do not exceed.
pub fn quantile_rank(values: u64, percent: u64) -> u64 {
    (values * percent).div_ceil(100).max(1)
}

/// The statistics of `captions`, and of their tokens if told how to count them.
pub fn caption_stats<S: AsRef<str>>(captions: impl IntoIterator<Item = S>, tokens: Option<Tokens<'_>>) -> CaptionStats {
    let mut counter = CaptionCounter::new(tokens);
    captions.into_iter().for_each(|caption| counter.add(caption.as_ref()));
    counter.finish()
}

/// A hash by which counts of several threads can be merged: it has no seed of its own.
fn hash(word: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    word.hash(&mut hasher);
    hasher.finish()
}

/// A sentence's words and marks, each by itself, as treebanks have them.
fn parts(sentence: &str) -> Vec<String> {
    let mut parts = Vec::new();
    for word in sentence.split_whitespace() {
        let inner = word.trim_start_matches(|c: char| !c.is_alphanumeric());
        let (opening, inner) = word.split_at(word.len() - inner.len());
        let (inner, closing) = inner.split_at(inner.trim_end_matches(|c: char| !c.is_alphanumeric()).len());
        let owner = inner.find(['\'', '’']).filter(|at| matches!(&inner[*at..], "'s" | "’s"));
        let (inner, owner) = inner.split_at(owner.unwrap_or(inner.len()));
        let marks = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
        parts.extend(marks(opening));
        parts.extend([inner, owner].into_iter().filter(|part| !part.is_empty()).map(str::to_owned));
        parts.extend(marks(closing));
    }
    parts
}

/// Which of the five sums of [`Speech`] a part counts in.
fn kind(part: &str, tag: Option<UPOS>) -> Option<usize> {
    match tag {
        Some(UPOS::NOUN | UPOS::PROPN) => Some(0),
        Some(UPOS::ADJ | UPOS::ADV) => Some(1),
        Some(UPOS::VERB) => Some(2),
        Some(UPOS::ADP) => Some(3),
        Some(_) => None,
        None => part.chars().any(char::is_alphabetic).then_some(4),
    }
}

/// What captions are like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionStats {
    /// How many there are.
    pub captions: u64,
    /// Words per caption: what white space parts.
    pub words: Lengths,
    /// Captions of 0–9 words, of 10–19, and so on; the last of 200 and more.
    pub histogram: Vec<u64>,
    /// Sentences per caption (mean).
    pub sentences: f64,
    /// Characters per caption (mean).
    pub characters: f64,
    /// Tokens per caption (mean), if they were counted.
    pub tokens: Option<f64>,
    /// Words that differ in more than case and marks around them.
    pub distinct_words: u64,
    /// There are more: they were not counted further.
    pub more_distinct_words: bool,
    /// Parts of speech.
    pub speech: Speech,
}

/// Words per caption.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lengths {
    /// Mean.
    pub mean: f64,
    /// 5 % of the captions have so many or fewer.
    pub p5: u64,
    /// 50 % do.
    pub median: u64,
    /// 95 % do.
    pub p95: u64,
    /// The longest.
    pub most: u64,
}

/// Words per caption (mean) by their part of speech; determiners, pronouns, auxiliaries, conjunctions and numbers are none of these.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speech {
    /// Nouns and names.
    pub nouns: f64,
    /// Adjectives and adverbs.
    pub adjectives: f64,
    /// Verbs without auxiliaries.
    pub verbs: f64,
    /// Prepositions.
    pub prepositions: f64,
    /// Words that the tagger does not know, most of them nouns.
    pub untagged: f64,
}

/// The paper's Table 1 (arXiv 2403.05135): LAION's alt texts and CogVLM's captions of LAION, then COYO's; tokens are CLIP's.
const PAPER: [(&str, [Option<f64>; 4]); 5] = [
    ("words", [Some(9.81), Some(49.87), Some(9.83), Some(50.71)]),
    ("tokens", [Some(11.88), Some(62.33), Some(11.89), Some(63.05)]),
    ("nouns", [None, Some(15.51), None, None]),
    ("adjectives, adverbs", [None, Some(8.06), None, None]),
    ("prepositions", [None, Some(6.26), None, None]),
];

impl fmt::Display for CaptionStats {
    /// A table beside the paper's, and the lengths as bars.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { words, speech, .. } = self;
        let heads = ["these", "LAION alt", "CogVLM", "COYO alt", "CogVLM"];
        row(f, "mean per caption", &heads.map(str::to_owned))?;
        let ours = [Some(words.mean), self.tokens, Some(speech.nouns), Some(speech.adjectives), Some(speech.prepositions)];
        for (own, (name, paper)) in ours.into_iter().zip(PAPER) {
            let cells: Vec<_> = std::iter::once(own).chain(paper).map(|cell| cell.map_or("-".to_owned(), |x| format!("{x:.2}"))).collect();
            row(f, name, &cells)?;
        }
        let more = [("verbs", speech.verbs), ("untagged", speech.untagged), ("sentences", self.sentences), ("characters", self.characters)];
        for (name, mean) in more {
            row(f, name, &[format!("{mean:.2}")])?;
        }
        let most = if self.more_distinct_words { "more than " } else { "" };
        writeln!(f, "{} captions, {most}{} distinct words", self.captions, self.distinct_words)?;
        let Lengths { p5, median, p95, most, .. } = words;
        writeln!(f, "words: 5 % have {p5} or fewer, half have {median}, 95 % have {p95}, the longest has {most}")?;
        self.bars(f)
    }
}

impl CaptionStats {
    fn bars(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let highest = self.histogram.iter().copied().max().unwrap_or(0).max(1);
        let last = self.histogram.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        for (bar, count) in self.histogram.iter().take(last).enumerate() {
            let from = bar as u64 * BAR;
            let name = if bar + 1 == BARS { format!("{from} and more") } else { format!("{from}–{}", from + BAR - 1) };
            let length = (40 * count).div_ceil(highest) as usize;
            writeln!(f, "{}", format!("  {name:<12} {count:>10} {}", "█".repeat(length)).trim_end())?;
        }
        Ok(())
    }
}

/// A line of the table.
fn row(f: &mut fmt::Formatter<'_>, name: &str, cells: &[String]) -> fmt::Result {
    write!(f, "{name:<20}")?;
    cells.iter().try_for_each(|cell| write!(f, " {cell:>10}"))?;
    writeln!(f)
}
