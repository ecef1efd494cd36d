//! The tokenizers of decoders: a `tokenizer.json` taken as it says (LLaMA's pairs of pieces with byte fallback, Qwen's pairs of
//! bytes), and a padding token from the files beside it.
//!
//! Rows are padded on the right, whatever `padding_side` says for generating: the network masks padding, and positions count from a
//! row's beginning.

use std::path::Path;

use serde_json::json;
use tokenizers::Tokenizer;

use crate::error::{ModelError, Result};
use crate::special_tokens::Settings;
use crate::tokenizer::{TextTokenizer, find_json, read_json};

/// Reads the tokenizer in a model folder, or where else [`TextTokenizer::load`] looks. Rows are filled up with `pad_token` of
/// `tokenizer_config.json` or `special_tokens_map.json`; where they name none (LLaMA 2), with `eos_token`.
///
/// # Errors
/// None is there, or its files are damaged, name no token that fills rows up, or contradict each other.
pub fn load(folder: &Path) -> Result<TextTokenizer> {
    let file = find_json(folder)?;
    let (tokenizer, bytes) = read_json(&file)?;
    let settings = Settings::read(file.parent().unwrap_or(folder))?;
    settings.config.only("split_special_tokens", &[json!(false)])?;
    for (flag, field, first) in [("add_bos_token", "bos_token", true), ("add_eos_token", "eos_token", false)] {
        check_added(&tokenizer, &settings, (flag, field, first))?;
    }
    let pad = match id(&tokenizer, &settings, "pad_token")? {
        Some(pad) => pad,
        None => id(&tokenizer, &settings, "eos_token")?.ok_or_else(|| ModelError::Tokenizer {
            file: settings.config.file().into(),
            reason: "names no token to fill rows up with (expected pad_token or eos_token, found neither); \
                     copy or download it with its tokenizer.json"
                .into(),
        })?,
    };
    // The padding token is not in `tokenizer.json`, and counts too.
    let digest = blake3::Hasher::new().update(&bytes).update(&pad.to_le_bytes()).finalize();
    Ok(TextTokenizer::new(tokenizer, file, digest, pad))
}

/// The id of the token that a field names, if it names one.
fn id(tokenizer: &Tokenizer, settings: &Settings, field: &str) -> Result<Option<u32>> {
    let Some(token) = settings.special(field)? else { return Ok(None) };
    let found = tokenizer.token_to_id(&token.content);
    found.map(Some).ok_or_else(|| settings.of(field).refuse(field, "a token of tokenizer.json"))
}

/// Refuses settings that say otherwise than `tokenizer.json` whether a text begins with `bos_token` or ends with `eos_token`: newer
/// releases of transformers follow the one, older ones the other.
fn check_added(tokenizer: &Tokenizer, settings: &Settings, (flag, field, first): (&str, &str, bool)) -> Result<()> {
    let Some(wanted) = settings.config.get::<bool>(flag, "true or false")? else { return Ok(()) };
    let Some(token) = id(tokenizer, settings, field)? else { return Ok(()) };
    let empty =
        tokenizer.encode_fast("", true).map_err(|error| settings.config.refuse(flag, &format!("a setting that works ({error})")))?;
    let ids = empty.get_ids();
    let is = if first { ids.first() } else { ids.last() } == Some(&token);
    let rule = format!("{is}, as the post_processor of tokenizer.json has it");
    if is == wanted { Ok(()) } else { Err(settings.config.refuse(flag, &rule)) }
}
