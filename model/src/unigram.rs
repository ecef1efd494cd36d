//! A small unigram tokenizer of the T5 kind, trained on captions. The same captions give the same bytes.
//!
//! The `tokenizers` crate has a trainer too, but its sums and its order of equals follow hash maps and thread counts.

use std::collections::{BTreeMap, HashMap};

use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::NFKC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, NormalizedString, Normalizer, Tokenizer};

use crate::error::{ModelError, Result};
use crate::tokenizer::PAD;

/// T5's special tokens, whose ids are their places here.
const SPECIAL: [&str; 3] = [PAD, "</s>", "<unk>"];

/// The mark that stands for the space before a word.
const SPACE: char = '▁';

/// The longest piece, in characters.
const LONGEST: usize = 16;

/// Pieces tried in each round of training, in multiples of the vocabulary.
const ROUNDS: [usize; 3] = [8, 4, 2];

/// Trains a vocabulary of at most `vocab_size` tokens and returns the text of its `tokenizer.json`.
///
/// # Errors
/// `vocab_size` leaves no room beside the special tokens, or there is no word in the captions.
pub fn train<S: AsRef<str>>(captions: &[S], vocab_size: usize) -> Result<String> {
    if vocab_size <= SPECIAL.len() {
        return Err(ModelError::argument("vocabulary size", format!("above {}", SPECIAL.len()), vocab_size));
    }
    let words = count_words(captions);
    if words.is_empty() {
        return Err(ModelError::argument("captions", "texts with at least one word", format!("{} empty ones", captions.len())));
    }
    let pieces = learn(&words, vocab_size - SPECIAL.len())?;
    tokenizer(pieces).and_then(|tokenizer| tokenizer.to_string(true)).map_err(|error| failed(&error))
}

/// How often each word occurs, with its space mark.
fn count_words<S: AsRef<str>>(captions: &[S]) -> BTreeMap<String, u64> {
    let mut words = BTreeMap::new();
    for caption in captions {
        let mut text = NormalizedString::from(caption.as_ref());
        // NFKC maps characters one by one and cannot fail; a caption it refused would be counted as it is.
        let _ = NFKC.normalize(&mut text);
        for word in text.get().split_whitespace() {
            *words.entry(format!("{SPACE}{word}")).or_default() += 1;
        }
    }
    words
}

/// Learns at most `size` pieces with log probabilities: candidates by frequency and length, then a few rounds of segmenting
/// the words with the most likely pieces and keeping those that are used most.
fn learn(words: &BTreeMap<String, u64>, size: usize) -> Result<Vec<(String, f64)>> {
    let mut counts: HashMap<String, u64> = HashMap::new();
    for (word, n) in words {
        let bounds: Vec<usize> = word.char_indices().map(|(at, _)| at).chain([word.len()]).collect();
        for from in 0..bounds.len() - 1 {
            for to in from + 1..bounds.len().min(from + 1 + LONGEST) {
                *counts.entry(word[bounds[from]..bounds[to]].to_owned()).or_default() += n;
            }
        }
    }
    for round in ROUNDS {
        counts = recount(words, best(&counts, size.saturating_mul(round)))?;
    }
    Ok(best(&counts, size))
}

/// The `size` pieces worth most, with log probabilities, likeliest first. Single characters come before all others, so that
/// any text can be spelled.
fn best(counts: &HashMap<String, u64>, size: usize) -> Vec<(String, f64)> {
    let mut ranked: Vec<(bool, u64, &String, u64)> = counts
        .iter()
        .map(|(piece, &n)| {
            let length = piece.chars().count() as u64;
            (length > 1, n * length, piece, n)
        })
        .filter(|&(long, _, _, n)| !long || n > 1)
        .collect();
    ranked.sort_by_key(|&(long, worth, piece, _)| (long, std::cmp::Reverse(worth), piece));
    ranked.truncate(size);
    let total: f64 = ranked.iter().map(|&(_, _, _, n)| n.max(1) as f64).sum();
    ranked.sort_by_key(|&(_, _, piece, n)| (std::cmp::Reverse(n), piece));
    ranked.into_iter().map(|(_, _, piece, n)| (piece.clone(), (n.max(1) as f64 / total).ln())).collect()
}

/// How often each piece is used in the likeliest spelling of every word; characters are kept even if unused.
fn recount(words: &BTreeMap<String, u64>, pieces: Vec<(String, f64)>) -> Result<HashMap<String, u64>> {
    let single = |piece: &str| piece.chars().nth(1).is_none();
    let mut counts: HashMap<String, u64> = pieces.iter().filter(|(piece, _)| single(piece)).map(|(piece, _)| (piece.clone(), 0)).collect();
    let model = unigram(pieces).map_err(|error| failed(&error))?;
    for (word, n) in words {
        for piece in model.encode(word).map_err(|error| failed(&error))? {
            *counts.entry(piece).or_default() += n;
        }
    }
    Ok(counts)
}

fn unigram(pieces: Vec<(String, f64)>) -> tokenizers::Result<Unigram> {
    let special = SPECIAL.iter().map(|token| ((*token).to_owned(), 0.0));
    Unigram::from(special.chain(pieces).collect(), Some(SPECIAL.len() - 1), false)
}

fn tokenizer(pieces: Vec<(String, f64)>) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(unigram(pieces)?);
    let metaspace = || Metaspace::new(SPACE, PrependScheme::Always, true);
    let split = Sequence::new(vec![PreTokenizerWrapper::WhitespaceSplit(WhitespaceSplit), PreTokenizerWrapper::Metaspace(metaspace())]);
    let template =
        TemplateProcessing::builder().try_single("$A </s>")?.try_pair("$A </s> $B </s>")?.special_tokens(vec![("</s>", 1)]).build()?;
    tokenizer
        .with_normalizer(Some(NFKC))?
        .with_pre_tokenizer(Some(split))
        .with_post_processor(Some(template))
        .with_decoder(Some(metaspace()));
    tokenizer.add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)))?;
    Ok(tokenizer)
}

fn failed(error: &tokenizers::Error) -> ModelError {
    ModelError::argument("captions", "texts that a tokenizer can be trained on", error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captions() -> Vec<String> {
        let colours = ["red", "green", "blue", "yellow"];
        let shapes = ["circle", "square", "triangle", "star"];
        let pairs = colours.iter().flat_map(|colour| shapes.iter().map(move |shape| (colour, shape)));
        pairs.map(|(colour, shape)| format!("A small {colour} {shape} stands left of the ﬁrst one.")).collect()
    }

    #[test]
    fn the_same_captions_give_the_same_bytes() {
        assert_eq!(train(&captions(), 120).unwrap(), train(&captions(), 120).unwrap());
    }

    #[test]
    fn frequent_words_become_tokens_and_any_word_can_be_spelled() {
        let text = train(&captions(), 120).unwrap();
        let tokenizer: Tokenizer = text.parse().unwrap();
        assert!(tokenizer.get_vocab_size(true) <= 120);
        let pieces = |caption: &str| tokenizer.encode(caption, true).unwrap().get_tokens().to_vec();
        assert_eq!(pieces("red  circle"), ["▁red", "▁circle", "</s>"]);
        let ids = |caption: &str| tokenizer.encode(caption, true).unwrap().get_ids().to_vec();
        assert!(!ids("lots of clear trial").contains(&2));
        assert!(ids("漢").contains(&2));
        assert_eq!(pieces("ﬁrst"), pieces("first"));
        for (id, token) in SPECIAL.iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
        }
    }

    #[test]
    fn captions_without_words_are_refused() {
        assert!(matches!(train(&["  "], 100), Err(ModelError::Input { .. })));
        assert!(matches!(train(&captions(), 3), Err(ModelError::Input { .. })));
    }
}
