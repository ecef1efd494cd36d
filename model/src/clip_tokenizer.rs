//! CLIP's tokenizer, from `tokenizer.json` or from `vocab.json` and `merges.txt`: pairs of bytes, lower case, `</w>` at the end of
//! a word, a start and an end token around each caption.
//!
//! Builds what transformers' `CLIPTokenizer` builds
//! (<https://github.com/huggingface/transformers/blob/main/src/transformers/models/clip/tokenization_clip.py>), which takes from
//! `tokenizer.json` no more than vocabulary, merges, added tokens and post-processor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{ModelError, Result};
use crate::special_tokens::{Settings, object, token};
use crate::tokenizer::{TextTokenizer, places};

/// What marks the last piece of a word.
pub(crate) const WORD_END: &str = "</w>";

/// More ids than any vocabulary has.
const IDS: u64 = 1 << 24;

/// The words that pieces are made of.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The special tokens' fields, in the order in which transformers adds them, and their defaults.
const SPECIAL: [(&str, &str); 4] =
    [("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")];

/// Settings that transformers honours and ella does not, with the value that means nothing special.
fn fixed() -> [(&'static str, Vec<Value>); 8] {
    [
        ("tokenizer_class", vec![json!("CLIPTokenizer"), json!("CLIPTokenizerFast")]),
        ("do_lower_case", vec![json!(true)]),
        ("add_prefix_space", vec![json!(false)]),
        ("padding_side", vec![json!("right")]),
        ("truncation_side", vec![json!("right")]),
        ("split_special_tokens", vec![json!(false)]),
        ("add_bos_token", vec![json!(true)]),
        ("add_eos_token", vec![json!(true)]),
    ]
}

/// Reads the tokenizer in a model folder, or where else [`TextTokenizer::load`] looks. The padding token is the one that its settings name: SD 1.5 fills rows up with the end
/// token, OpenCLIP's encoders with `!`.
///
/// # Errors
/// None is there, or its files are damaged, not of the CLIP kind, or ask for something that ella does not do.
pub fn load(folder: &Path) -> Result<TextTokenizer> {
    let found = places(folder).into_iter().find(|place| place.join("tokenizer.json").is_file() || place.join("vocab.json").is_file());
    let place = found
        .ok_or_else(|| ModelError::MissingFile { file: folder.into(), expected: "tokenizer.json, or vocab.json and merges.txt".into() })?;
    let pieces = Pieces::read(&place)?;
    let settings = Settings::read(&place)?;
    for (field, supported) in fixed() {
        settings.config.only(field, &supported)?;
    }
    let added = pieces.added_tokens(&place, &settings)?;
    let special = SPECIAL.map(|(field, default)| -> Result<Special> {
        let token = settings.special(field)?.unwrap_or_else(|| AddedToken::from(default, true));
        let id = pieces.id(&token.content, &added);
        let rule = || format!("a token of the vocabulary in {}", pieces.file.display());
        Ok((token, id.ok_or_else(|| settings.of(field).refuse(field, &rule()))?))
    });
    let [start, end, unknown, pad] = special;
    let special = [start?, end?, unknown?, pad?];
    let pad = special[3].1;
    let tokenizer = pieces.tokenizer(added, special)?;
    let text = tokenizer.to_string(false).map_err(|error| pieces.damaged(&error))?;
    let digest = blake3::Hasher::new().update(text.as_bytes()).update(&pad.to_le_bytes()).finalize();
    Ok(TextTokenizer::new(tokenizer, pieces.file, digest, pad))
}

/// A special token and its id.
type Special = (AddedToken, u32);

/// What the files of a tokenizer hold.
struct Pieces {
    file: PathBuf,
    vocab: Map<String, Value>,
    merges: Vec<(String, String)>,
    added: Option<Vec<Value>>,
    post: Option<Value>,
}

impl Pieces {
    fn read(place: &Path) -> Result<Self> {
        let file = place.join("tokenizer.json");
        let pieces = if file.is_file() { Self::from_json(file)? } else { Self::from_text(place)? };
        // The library makes a list of all ids that have no piece.
        if let Some((piece, id)) = pieces.vocab.iter().find(|(_, id)| id.as_u64().is_some_and(|id| id >= IDS)) {
            return Err(pieces.refuse(&format!("gives the piece {piece:?} an id that is too large (expected below {IDS}, found {id})")));
        }
        // Checked here, because the library takes it for granted.
        let joined = |(a, b): &&(String, String)| [a, b, &format!("{a}{b}")].iter().all(|piece| pieces.vocab.contains_key(*piece));
        match pieces.merges.iter().find(|pair| !joined(pair)) {
            Some((a, b)) => Err(pieces.refuse(&format!("has the merge \"{a} {b}\", with pieces that the vocabulary lacks"))),
            None => Ok(pieces),
        }
    }

    fn from_text(place: &Path) -> Result<Self> {
        let (file, lines) = (place.join("vocab.json"), place.join("merges.txt"));
        if !lines.is_file() {
            return Err(ModelError::MissingFile { file: lines, expected: "the merges that belong to vocab.json".into() });
        }
        let text = std::fs::read_to_string(&lines).map_err(|source| ModelError::Unreadable { file: lines.clone(), source })?;
        let vocab = object(&file)?;
        let mut pieces = Pieces { file, vocab, merges: Vec::new(), added: None, post: None };
        for line in text.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()) {
            let pair = pair(line).ok_or_else(|| {
                let reason = format!("has the line {line:?} (expected two pieces and a space between); copy or download it again");
                ModelError::Tokenizer { file: lines.clone(), reason }
            })?;
            pieces.merges.push(pair);
        }
        Ok(pieces)
    }

    fn from_json(file: PathBuf) -> Result<Self> {
        let mut json = object(&file)?;
        let mut model = json.remove("model").unwrap_or_default();
        let added = json.remove("added_tokens").and_then(|tokens| tokens.as_array().cloned());
        let post = json.remove("post_processor").filter(|post| !post.is_null());
        let mut pieces = Pieces { file, vocab: Map::new(), merges: Vec::new(), added: Some(added.unwrap_or_default()), post };
        if model["type"] != "BPE" || model["end_of_word_suffix"] != WORD_END {
            let reason = format!("is not of the CLIP kind (expected a BPE model with end_of_word_suffix {WORD_END:?})");
            return Err(pieces.refuse(&reason));
        }
        let merges = model["merges"].as_array().map(|merges| merges.iter().map(merge).collect());
        match (model["vocab"].take(), merges) {
            (Value::Object(vocab), Some(Some(merges))) => (pieces.vocab, pieces.merges) = (vocab, merges),
            _ => return Err(pieces.refuse("has no vocabulary, or merges that are not pairs of pieces")),
        }
        Ok(pieces)
    }

    /// The tokens added to the vocabulary, by id.
    fn added_tokens(&self, place: &Path, settings: &Settings) -> Result<BTreeMap<u32, AddedToken>> {
        let rule = "added tokens, each with its id and content";
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let config = &settings.config;
        if let Some(listed) = config.get::<Map<String, Value>>("added_tokens_decoder", rule)? {
            let read = listed.iter().map(|(id, value)| Some((id.parse().ok()?, token(value)?))).collect::<Option<_>>();
            return read.ok_or_else(|| config.refuse("added_tokens_decoder", rule));
        }
        let legacy = place.join("added_tokens.json");
        match &self.added {
            Some(added) => {
                let read = added.iter().map(|value| Some((id(&value["id"])?, token(value)?))).collect::<Option<_>>();
                read.ok_or_else(|| self.refuse("has added tokens without id or content"))
            }
            None if legacy.is_file() => {
                let reason = "added tokens in this old form are not supported; convert them with transformers: \
                              CLIPTokenizer.from_pretrained(DIR).save_pretrained(DIR)";
                Err(ModelError::Tokenizer { file: legacy, reason: reason.into() })
            }
            None => {
                // Tokens without ids: only a list of all added tokens says where they belong.
                for field in ["additional_special_tokens", "extra_special_tokens"] {
                    settings.of(field).only(field, &[json!([])])?;
                }
                Ok(BTreeMap::new())
            }
        }
    }

    fn id(&self, content: &str, added: &BTreeMap<u32, AddedToken>) -> Option<u32> {
        let own = self.vocab.get(content).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        own.or_else(|| added.iter().find(|(_, token)| token.content == content).map(|(&id, _)| id))
    }

    fn tokenizer(&self, added: BTreeMap<u32, AddedToken>, special: [Special; 4]) -> Result<Tokenizer> {
        let mut tokenizer = Tokenizer::from_bytes(self.pipeline(&special).to_string()).map_err(|error| self.damaged(&error))?;
        // A listed token keeps its own flags; of special tokens with one text the last one's flags count, as in transformers.
        let listed = |content: &str| added.values().any(|token| token.content == content);
        let named: Vec<AddedToken> = special.into_iter().map(|(token, _)| token).filter(|token| !listed(&token.content)).collect();
        tokenizer.add_tokens(added.values().cloned().chain(named)).map_err(|error| self.damaged(&error))?;
        match added.iter().find(|(id, token)| tokenizer.token_to_id(&token.content) != Some(**id)) {
            Some((id, token)) => Err(self.refuse(&format!("leaves the added token {} no place at its id {id}", token.content))),
            None => Ok(tokenizer),
        }
    }

    /// The whole as a `tokenizer.json`, but for added tokens.
    fn pipeline(&self, special: &[Special; 4]) -> Value {
        let [start, end, unknown, _] = special;
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let around = json!({
            "type": "RobertaProcessing", "trim_offsets": false, "add_prefix_space": false,
            "sep": [end.0.content, end.1], "cls": [start.0.content, start.1],
        });
        json!({
            "version": "1.0",
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"},
            ]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true}, bytes,
            ]},
            "post_processor": self.post.as_ref().unwrap_or(&around),
            "decoder": bytes,
            "model": {
                "type": "BPE", "unk_token": unknown.0.content, "continuing_subword_prefix": "", "end_of_word_suffix": WORD_END,
                "fuse_unk": false, "byte_fallback": false, "vocab": self.vocab, "merges": self.merges,
            },
        })
    }

    fn damaged(&self, error: &tokenizers::Error) -> ModelError {
        self.refuse(&format!("is not a tokenizer ({error})"))
    }

    fn refuse(&self, reason: &str) -> ModelError {
        ModelError::Tokenizer { file: self.file.clone(), reason: format!("{reason}; copy or download it again") }
    }
}

/// A merge in `tokenizer.json`: two pieces, or in older files one text with a space between them.
fn merge(value: &Value) -> Option<(String, String)> {
    match value {
        Value::String(text) => pair(text),
        other => serde_json::from_value(other.clone()).ok(),
    }
}

fn pair(text: &str) -> Option<(String, String)> {
    let (a, b) = text.split_once(' ')?;
    (!a.is_empty() && !b.is_empty() && !b.contains(' ')).then(|| (a.to_owned(), b.to_owned()))
}
