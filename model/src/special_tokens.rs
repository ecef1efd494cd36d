//! What lies beside a tokenizer: `tokenizer_config.json` and `special_tokens_map.json`, which name its special tokens.

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::config::ConfigFile;
use crate::error::{ModelError, Result};

/// What `tokenizer_config.json` says, and `special_tokens_map.json`, whose fields go before, unless the former lists added tokens.
pub(crate) struct Settings {
    pub(crate) config: ConfigFile,
    map: Option<ConfigFile>,
}

impl Settings {
    pub(crate) fn read(place: &Path) -> Result<Self> {
        let open = |name: &str| -> Result<ConfigFile> {
            let file = place.join(name);
            let fields = if file.is_file() { object(&file)? } else { Map::new() };
            Ok(ConfigFile::from_map(&file, fields))
        };
        let config = open("tokenizer_config.json")?;
        let listed = config.value("added_tokens_decoder").is_some();
        let map = if listed { None } else { Some(open("special_tokens_map.json")?) };
        Ok(Settings { config, map })
    }

    /// The file that decides a field.
    pub(crate) fn of(&self, field: &str) -> &ConfigFile {
        self.map.as_ref().filter(|map| map.value(field).is_some()).unwrap_or(&self.config)
    }

    /// The token that a field such as `pad_token` names, if it does.
    pub(crate) fn special(&self, field: &str) -> Result<Option<AddedToken>> {
        let file = self.of(field);
        let read = |value| token(value).ok_or_else(|| file.refuse(field, "a token's text, or an object with its content"));
        file.value(field).map(read).transpose()
    }
}

/// A token as transformers writes it: its text, or an object.
pub(crate) fn token(value: &Value) -> Option<AddedToken> {
    if let Some(content) = value.as_str() {
        return Some(AddedToken::from(content, true));
    }
    let flag = |name: &str, default: bool| value[name].as_bool().unwrap_or(default);
    let special = flag("special", false);
    let token = AddedToken::from(value["content"].as_str()?, special).normalized(flag("normalized", !special));
    Some(token.single_word(flag("single_word", false)).lstrip(flag("lstrip", false)).rstrip(flag("rstrip", false)))
}

/// Reads a file of a tokenizer that holds a JSON object.
pub(crate) fn object(file: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(file).map_err(|source| ModelError::Unreadable { file: file.into(), source })?;
    let not = |reason: String| ModelError::Tokenizer { file: file.into(), reason: format!("{reason}; copy or download it again") };
    match serde_json::from_str(&text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(not("is JSON, but not an object".into())),
        Err(error) => Err(not(format!("is not JSON ({error})"))),
    }
}
