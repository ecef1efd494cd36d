//! Captions to token ids, for text encoders of any family: by a `tokenizer.json` of the T5 kind (`$A </s>`), by CLIP's tokenizer
//! (`clip_tokenizer`), or by a decoder's (`decoder_tokenizer`).

use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use tch::{Device, Tensor};
use tokenizers::{PostProcessor, Tokenizer, TruncationDirection};

use crate::error::{ModelError, Result};
use crate::text::TextConfig;
use crate::{clip_tokenizer, decoder_tokenizer};

/// The token that fills rows up, in T5's vocabularies.
pub(crate) const PAD: &str = "<pad>";

/// How rows are filled up. Padding is part of the meaning: released connectors attend to padded positions (paper §0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// Every row to `max_tokens`.
    Fixed,
    /// Only as far as the longest row of the call needs; the mask tells the rows' own lengths.
    None,
}

/// Token ids of some captions, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Ids `[rows × width]`.
    pub ids: Vec<i64>,
    /// 1 for a caption's own tokens and 0 for padding, `[rows × width]`.
    pub mask: Vec<i64>,
    /// Tokens in each row before padding, the end mark included.
    pub lengths: Vec<usize>,
    /// Tokens in each row after padding.
    pub width: usize,
    /// The rows whose caption was too long and lost its end.
    pub truncated: Vec<usize>,
}

impl Encoded {
    /// (`input_ids`, `attention_mask`), both `[rows, width]` i64.
    pub fn tensors(&self, device: Device) -> Result<(Tensor, Tensor)> {
        let shape = [self.lengths.len() as i64, self.width as i64];
        let tensor = |values: &[i64]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_reshape(shape)?.f_to_device(device)?) };
        Ok((tensor(&self.ids)?, tensor(&self.mask)?))
    }
}

/// A tokenizer and what identifies it.
#[derive(Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    file: PathBuf,
    digest: String,
    pad: i64,
    added: usize,
}

/// Where the tokenizer of a model folder may be, in order: in it, in its `tokenizer/`, or in the `tokenizer` folder beside it
/// (`tokenizer_2` beside `text_encoder_2`).
pub(crate) fn places(folder: &Path) -> [PathBuf; 3] {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let beside = match name.strip_prefix("text_encoder") {
        Some(number) => folder.with_file_name(format!("tokenizer{number}")),
        None => folder.join("../tokenizer"),
    };
    [folder.to_owned(), folder.join("tokenizer"), beside]
}

/// The `tokenizer.json` of a model folder; a lone sentencepiece file is said to need conversion.
pub(crate) fn find_json(folder: &Path) -> Result<PathBuf> {
    let first = |names: &[&str]| {
        let files = places(folder).into_iter().flat_map(|place| names.iter().map(move |name| place.join(name)).collect::<Vec<_>>());
        files.into_iter().find(|file| file.is_file())
    };
    let lacking = || match first(&["spiece.model", "tokenizer.model"]) {
        Some(file) => ModelError::Tokenizer {
            file,
            reason: "only the sentencepiece form is there (expected tokenizer.json); convert it with \
                     transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                .into(),
        },
        None => ModelError::MissingFile { file: folder.into(), expected: "tokenizer.json".into() },
    };
    first(&["tokenizer.json"]).ok_or_else(lacking)
}

/// Reads a `tokenizer.json`, and gives its bytes too.
pub(crate) fn read_json(file: &Path) -> Result<(Tokenizer, Vec<u8>)> {
    let bytes = std::fs::read(file).map_err(|source| ModelError::Unreadable { file: file.into(), source })?;
    let refuse = |reason: String| ModelError::Tokenizer { file: file.into(), reason };
    let not = |error: String| refuse(format!("is not a tokenizer ({error}); write it anew"));
    serde_json::from_slice::<IgnoredAny>(&bytes).map_err(|error| not(error.to_string()))?;
    // The library panics on JSON in which a decoder or a normalizer is not what it should be, and when it encodes, on a post-processor
    // whose template names tokens that it does not list.
    let read = || {
        let tokenizer = Tokenizer::from_bytes(&bytes)?;
        tokenizer.encode("a", true).map(|_| tokenizer)
    };
    let read = std::panic::catch_unwind(|| read().map_err(|error| error.to_string()));
    let mut tokenizer = read.unwrap_or_else(|_| Err("one of its parts cannot be read, or does not fit the others".into())).map_err(not)?;
    // Lengths are the caller's matter here, whatever the file was last used for.
    tokenizer.with_truncation(None).map_err(|error| refuse(error.to_string()))?.with_padding(None);
    Ok((tokenizer, bytes))
}

impl TextTokenizer {
    /// Reads the tokenizer of the text encoder in `folder`, whose configuration is `config`: in that folder, in its `tokenizer/`, or
    /// in the `tokenizer` folder beside it (`tokenizer_2` beside `text_encoder_2`).
    ///
    /// # Errors
    /// None is there, or it is damaged, not of the encoder's family, or larger than its vocabulary.
    pub fn load(folder: &Path, config: &TextConfig) -> Result<Self> {
        let tokenizer = match config {
            TextConfig::T5(_) => Self::t5(folder)?,
            TextConfig::Clip(_) => clip_tokenizer::load(folder)?,
            TextConfig::Decoder(_) => decoder_tokenizer::load(folder)?,
        };
        tokenizer.check_vocabulary(config.vocab_size())?;
        Ok(tokenizer)
    }

    /// T5's, which has a padding token.
    pub(crate) fn t5(folder: &Path) -> Result<Self> {
        let file = find_json(folder)?;
        let (tokenizer, bytes) = read_json(&file)?;
        let pad = tokenizer.token_to_id(PAD).ok_or_else(|| ModelError::Tokenizer {
            file: file.clone(),
            reason: format!("has no padding token (expected {PAD}, found none); use a tokenizer of the T5 kind"),
        })?;
        Ok(Self::new(tokenizer, file, blake3::hash(&bytes), pad))
    }

    /// A tokenizer at hand, read from `file`, that fills rows up with the id `pad`.
    pub(crate) fn new(tokenizer: Tokenizer, file: PathBuf, digest: blake3::Hash, pad: u32) -> Self {
        let added = tokenizer.get_post_processor().map_or(0, |post| post.added_tokens(false));
        TextTokenizer { tokenizer, file, digest: digest.to_hex().to_string(), pad: pad.into(), added }
    }

    /// BLAKE3 of `tokenizer.json` (for CLIP's, of what it would say) and, but for T5's, of the padding id; lower-case hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> i64 {
        self.tokenizer.get_vocab(true).values().max().map_or(0, |&largest| i64::from(largest) + 1)
    }

    /// Refuses a tokenizer that makes ids for which an encoder with `encoder_vocab` embeddings has none.
    pub fn check_vocabulary(&self, encoder_vocab: i64) -> Result<()> {
        let found = self.vocab_size();
        if found <= encoder_vocab {
            return Ok(());
        }
        let reason = format!(
            "has more tokens than the text encoder (expected at most {encoder_vocab}, found {found}); \
             use the tokenizer that the encoder was trained with"
        );
        Err(ModelError::Tokenizer { file: self.file.clone(), reason })
    }

    /// Encodes captions with their special tokens. A caption that is too long is cut, keeps its end mark, and is counted. One that has
    /// no token at all (Qwen's tokenizer adds none to the empty caption) becomes one padding token, which counts as its own.
    ///
    /// # Errors
    /// `max_tokens` leaves no room for a token of the caption, or the tokenizer fails on a caption.
    pub fn encode<S: AsRef<str>>(&self, captions: &[S], max_tokens: usize, padding: Padding) -> Result<Encoded> {
        if max_tokens <= self.added {
            return Err(ModelError::argument("max_tokens", format!("at least {}", self.added + 1), max_tokens));
        }
        let mut truncated = Vec::new();
        let mut rows = Vec::with_capacity(captions.len());
        for (row, caption) in captions.iter().enumerate() {
            let (tokens, cut) = self.encode_one(caption.as_ref(), max_tokens)?;
            if cut {
                truncated.push(row);
            }
            rows.push(tokens);
        }
        let lengths: Vec<usize> = rows.iter().map(Vec::len).collect();
        let width = match padding {
            Padding::Fixed => max_tokens,
            Padding::None => lengths.iter().copied().max().unwrap_or(0),
        };
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for row in &rows {
            ids.extend(row);
            ids.resize(ids.len() + width - row.len(), self.pad);
            mask.resize(mask.len() + row.len(), 1);
            mask.resize(ids.len(), 0);
        }
        Ok(Encoded { ids, mask, lengths, width, truncated })
    }

    /// One caption's tokens, and whether it had to be cut.
    fn encode_one(&self, caption: &str, max_tokens: usize) -> Result<(Vec<i64>, bool)> {
        let fail = |error: tokenizers::Error| ModelError::Tokenizer {
            file: self.file.clone(),
            reason: format!("cannot encode a caption ({error}); check the tokenizer with the library that wrote it"),
        };
        let mut encoding = self.tokenizer.encode_fast(caption, false).map_err(fail)?;
        let room = max_tokens - self.added;
        let cut = encoding.len() > room;
        encoding.truncate(room, 0, TruncationDirection::Right);
        let encoding = self.tokenizer.post_process(encoding, None, true).map_err(fail)?;
        let mut tokens: Vec<i64> = encoding.get_ids().iter().map(|&id| i64::from(id)).collect();
        if tokens.is_empty() {
            tokens.push(self.pad);
        }
        Ok((tokens, cut))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unigram;

    const CAPTIONS: [&str; 3] = ["a red square above a blue circle", "a tiny green circle", "two red squares"];

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let captions = CAPTIONS.map(str::to_owned);
        std::fs::write(dir.path().join("tokenizer.json"), unigram::train(&captions, 60).unwrap()).unwrap();
        dir
    }

    #[test]
    fn rows_end_with_the_end_mark_and_are_filled_up() {
        let dir = folder();
        let tokenizer = TextTokenizer::t5(dir.path()).unwrap();
        let fixed = tokenizer.encode(&["a red circle", ""], 20, Padding::Fixed).unwrap();
        assert_eq!((fixed.width, fixed.ids.len(), fixed.lengths[1]), (20, 40, 1));
        let n = fixed.lengths[0];
        assert_eq!((fixed.ids[n - 1], fixed.ids[n], fixed.mask[n - 1], fixed.mask[n]), (1, 0, 1, 0));
        assert_eq!((fixed.ids[20], fixed.ids[21]), (1, 0));
        let ragged = tokenizer.encode(&["a red circle", ""], 20, Padding::None).unwrap();
        assert_eq!((ragged.width, &ragged.ids[..n]), (n, &fixed.ids[..n]));
        assert!(fixed.truncated.is_empty());
    }

    #[test]
    fn cut_captions_keep_the_end_mark_and_are_counted() {
        let dir = folder();
        let tokenizer = TextTokenizer::t5(dir.path()).unwrap();
        let whole = tokenizer.encode(&CAPTIONS, 100, Padding::None).unwrap();
        let limit = whole.lengths[0] - 1;
        let cut = tokenizer.encode(&CAPTIONS[..1], limit, Padding::Fixed).unwrap();
        assert_eq!((cut.truncated.as_slice(), cut.lengths.as_slice()), (&[0][..], &[limit][..]));
        assert_eq!(cut.ids[..limit - 1], whole.ids[..limit - 1]);
        assert_eq!(cut.ids[limit - 1], 1);
        assert!(matches!(tokenizer.encode(&CAPTIONS, 1, Padding::Fixed), Err(ModelError::Input { .. })));
    }

    #[test]
    fn a_tokenizer_larger_than_the_encoder_is_refused() {
        let dir = folder();
        let tokenizer = TextTokenizer::t5(dir.path()).unwrap();
        let n = tokenizer.vocab_size();
        tokenizer.check_vocabulary(n).unwrap();
        let error = tokenizer.check_vocabulary(n - 1).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains(&format!("found {n}")), "{error}");
    }

    #[test]
    fn missing_and_damaged_files_are_said_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(TextTokenizer::t5(dir.path()), Err(ModelError::MissingFile { .. })));
        std::fs::write(dir.path().join("spiece.model"), "x").unwrap();
        assert!(matches!(TextTokenizer::t5(dir.path()), Err(ModelError::Tokenizer { reason, .. }) if reason.contains("convert")));
        std::fs::write(dir.path().join("tokenizer.json"), "{\"version\":").unwrap();
        assert!(matches!(TextTokenizer::t5(dir.path()), Err(ModelError::Tokenizer { reason, .. }) if reason.contains("not a tok")));
    }
}
