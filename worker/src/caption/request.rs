//! The request: a chat with one picture in it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};

use super::config::CaptionConfig;
use super::error::{CaptionRefusal, Refused};
use super::prompt::fill;
use super::reply::Usage;

/// The body of the request for a picture's caption: the picture as a `data:` URL, and the prompt.
///
/// # Errors
/// The bytes are no picture that endpoints take.
pub(super) fn body(config: &CaptionConfig, image: &[u8], existing: &str) -> Result<Bytes, Refused> {
    let Some(kind) = media_type(image) else {
        let begins = image.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
        let detail = format!("{} bytes that begin with {begins:?} are no JPEG, PNG or WebP picture", image.len());
        return Err(Refused { why: CaptionRefusal::NotPicture, detail, usage: Usage::default() });
    };
    let mut picture = json!({ "url": format!("data:{kind};base64,{}", STANDARD.encode(image)) });
    if let Some(detail) = config.image_detail {
        picture["detail"] = json!(detail);
    }
    let content = json!([{ "type": "image_url", "image_url": picture }, { "type": "text", "text": fill(&config.prompt, existing) }]);
    let system = config.system.iter().map(|text| json!({ "role": "system", "content": text }));
    let messages: Vec<Value> = system.chain([json!({ "role": "user", "content": content })]).collect();
    let mut body = json!({ "model": config.model, "messages": messages, "temperature": config.temperature });
    if !config.extra.contains_key("max_completion_tokens") {
        body["max_tokens"] = json!(config.max_tokens);
    }
    if let Some(seed) = config.seed {
        body["seed"] = json!(seed);
    }
    for (key, value) in &config.extra {
        body[key] = value.clone();
    }
    Ok(body.to_string().into())
}

/// What kind of picture the bytes say they are.
fn media_type(image: &[u8]) -> Option<&'static str> {
    match image {
        [0xff, 0xd8, 0xff, ..] => Some("image/jpeg"),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some("image/png"),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some("image/webp"),
        _ => None,
    }
}
