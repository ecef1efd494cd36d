//! A small tokenizer of CLIP's kind, trained on captions. The same captions give the same bytes.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::clip_tokenizer::WORD_END;
use crate::error::{ModelError, Result};

/// What a tokenizer's folder holds.
#[derive(Debug)]
pub(crate) struct Files {
    /// `vocab.json`.
    pub(crate) vocab: Value,
    /// `merges.txt`.
    pub(crate) merges: String,
    /// `tokenizer_config.json`.
    pub(crate) config: Value,
    /// The end token's id, the largest.
    pub(crate) end: usize,
}

/// A word in pieces, and how often it occurs.
type Word = (Vec<String>, u64);

/// Trains a vocabulary of at most `vocab_size` tokens: bytes, bytes at a word's end, the pairs that occur most in words of a to z, start and
/// end. Other words are spelled in bytes.
///
/// # Errors
/// `vocab_size` leaves no room for all bytes.
pub(crate) fn train(captions: &[String], vocab_size: usize) -> Result<Files> {
    let bytes: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
    let mut pieces: Vec<String> = bytes.iter().map(char::to_string).collect();
    pieces.extend(bytes.iter().map(|byte| format!("{byte}{WORD_END}")));
    let least = pieces.len() + SPECIAL.len();
    let Some(room) = vocab_size.checked_sub(least) else {
        return Err(ModelError::argument("vocabulary size", format!("at least {least}"), vocab_size));
    };
    let merges = learn(&mut words(captions), room);
    pieces.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    pieces.extend(SPECIAL.map(str::to_owned));
    let end = pieces.len() - 1;
    let vocab: Map<String, Value> = pieces.into_iter().enumerate().map(|(id, piece)| (piece, json!(id))).collect();
    let merges = merges.iter().map(|(a, b)| format!("{a} {b}\n"));
    let [start, stop] = SPECIAL;
    let config = json!({
        "tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": stop, "unk_token": stop, "pad_token": stop,
        "add_prefix_space": false, "do_lower_case": true, "errors": "replace",
    });
    Ok(Files { vocab: vocab.into(), merges: std::iter::once("#version: 0.2\n".to_owned()).chain(merges).collect(), config, end })
}

/// What ends a row, and fills it up unless something else does.
pub(crate) const END: &str = "<|endoftext|>";

/// Start and end.
const SPECIAL: [&str; 2] = ["<|startoftext|>", END];

/// The captions' words in single letters, each with how often it occurs.
fn words(captions: &[String]) -> Vec<Word> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for caption in captions {
        let caption = caption.to_lowercase();
        for word in caption.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty() && word.is_ascii()) {
            *counts.entry(word.to_owned()).or_default() += 1;
        }
    }
    let letters =
        |word: &str| word.char_indices().map(|(at, c)| if at + 1 == word.len() { format!("{c}{WORD_END}") } else { c.into() }).collect();
    counts.iter().map(|(word, &count)| (letters(word), count)).collect()
}

/// The pairs that occur most, one after the other, each joined before the next is looked for; of equals the first in order of bytes.
/// Not one that would spell what another spells.
fn learn(words: &mut [Word], room: usize) -> Vec<(String, String)> {
    let (mut merges, mut spelled) = (Vec::new(), BTreeSet::new());
    while merges.len() < room {
        let mut counts: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for (word, count) in words.iter() {
            for pair in word.windows(2) {
                *counts.entry((&pair[0], &pair[1])).or_default() += count;
            }
        }
        let new = counts.into_iter().filter(|((a, b), _)| !spelled.contains(&format!("{a}{b}")));
        let Some(((a, b), _)) = new.max_by_key(|&(pair, count)| (count, std::cmp::Reverse(pair))) else { break };
        let (a, b) = (a.to_owned(), b.to_owned());
        words.iter_mut().for_each(|(word, _)| join(word, &a, &b));
        spelled.insert(format!("{a}{b}"));
        merges.push((a, b));
    }
    merges
}

fn join(word: &mut Vec<String>, a: &str, b: &str) {
    let mut at = 0;
    while at + 1 < word.len() {
        if word[at] == a && word[at + 1] == b {
            let next = word.remove(at + 1);
            word[at].push_str(&next);
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Padding;

    #[test]
    fn what_is_trained_reads_back_as_clips_tokenizer() {
        let captions: Vec<String> = ["A red circle", "a red square, a red star", "the circle's edge"].map(str::to_owned).into();
        let files = train(&captions, 600).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tokenizer");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("vocab.json"), files.vocab.to_string()).unwrap();
        std::fs::write(folder.join("merges.txt"), &files.merges).unwrap();
        std::fs::write(folder.join("tokenizer_config.json"), files.config.to_string()).unwrap();
        let tokenizer = crate::clip_tokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.vocab_size(), files.end as i64 + 1);
        let encoded = tokenizer.encode(&["A RED circle", "zebra", ""], 77, Padding::Fixed).unwrap();
        // Start, the words that occur, end; what is new is spelled; padding is the end token again.
        assert_eq!((encoded.lengths[0], encoded.lengths[2]), (5, 2));
        assert!(encoded.lengths[1] > 4 && encoded.ids[76] == files.end as i64);
        assert_eq!(train(&captions, 600).unwrap().vocab, files.vocab);
        assert!(matches!(train(&captions, 500), Err(ModelError::Input { .. })));
    }
}
