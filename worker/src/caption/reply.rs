//! The answer: what a completion says, and whether it is a caption.

use ella_dataset::{is_whole, sentences};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::{CaptionConfig, Cut};
use super::error::{CaptionRefusal, Detail};

/// The longest detail that is kept of what an endpoint or a model said, in characters.
const DETAIL: usize = 300;

/// Tokens used, as the endpoint counts them; 0 where it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Read: prompt and picture.
    #[serde(rename = "prompt_tokens", default)]
    pub input_tokens: u64,
    /// Written.
    #[serde(rename = "completion_tokens", default)]
    pub output_tokens: u64,
}

/// An answer to `chat/completions`, as far as it is read.
#[derive(Debug, Deserialize)]
struct Completion {
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    message: Message,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    refusal: Option<String>,
}

/// What a model said.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Reply {
    /// One paragraph.
    pub(super) text: String,
    /// Why it ended, in the endpoint's word.
    finish: String,
    /// The model's own word that it declines.
    declined: Option<String>,
    pub(super) usage: Usage,
}

impl Reply {
    /// Reads a completion.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub(super) fn read(body: &[u8]) -> Result<Self, String> {
        let read = serde_json::from_slice::<Completion>(body);
        let read = read.or_else(|error| serde_json::from_slice(&whole_pairs(body)).map_err(|_| error));
        let Completion { choices, usage } = read.map_err(|error| error.to_string())?;
        let Choice { message, finish_reason } = choices.into_iter().next().ok_or("it has no choices")?;
        Ok(Self {
            text: paragraph(said(&message.content.unwrap_or_default())),
            finish: finish_reason.unwrap_or_default(),
            declined: message.refusal.filter(|text| !text.trim().is_empty()),
            usage: usage.unwrap_or_default(),
        })
    }

    /// Whether it ended at `max_tokens`.
    pub(super) fn is_cut(&self) -> bool {
        self.finish == "length"
    }

    /// The caption in it; or why there is none, and what was said.
    pub(super) fn caption(&self, config: &CaptionConfig) -> Result<String, (CaptionRefusal, String)> {
        let no = |why, detail: &str| Err((why, line(detail)));
        if self.finish == "content_filter" {
            return no(CaptionRefusal::ContentFilter, &self.text);
        }
        if let Some(declined) = &self.declined {
            return no(CaptionRefusal::Refused, declined);
        }
        let text = match (self.is_cut(), config.cut) {
            (true, Cut::Refuse) => return no(CaptionRefusal::Cut, &self.text),
            (true, Cut::Trim) => whole_sentences(&self.text).ok_or((CaptionRefusal::Cut, line(&self.text)))?,
            (false, _) => self.text.as_str(),
        };
        if text.is_empty() {
            return no(CaptionRefusal::Empty, &self.finish);
        }
        if declines(text, &config.refusals) {
            return no(CaptionRefusal::Refused, text);
        }
        match text.split(' ').count() {
            few if few < config.min_words => no(CaptionRefusal::TooShort, text),
            many if many > config.max_words => no(CaptionRefusal::TooLong, text),
            _ => Ok(text.to_owned()),
        }
    }
}

/// The same JSON with U+FFFD in the place of each half of a surrogate pair: some servers write such where an answer ends within a character, and it
/// would end so again.
fn whole_pairs(body: &[u8]) -> Vec<u8> {
    let unit = |at: usize| {
        let digits = body.get(at..at + 6)?.strip_prefix(b"\\u")?;
        u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (mut out, mut at) = (body.to_vec(), 0);
    while at < body.len() {
        at += match (unit(at), unit(at + 6)) {
            (Some(0xd800..0xdc00), Some(0xdc00..0xe000)) => 12,
            (Some(0xd800..0xe000), _) => {
                out[at + 2..at + 6].copy_from_slice(b"fffd");
                6
            }
            _ if body[at] == b'\\' => 2,
            _ => 1,
        };
    }
    out
}

/// What follows a model's thoughts, where its server leaves them in the answer. Thoughts without an end are all there is, and no caption.
fn said(content: &str) -> &str {
    match content.split_once("</think>") {
        Some((_, said)) => said,
        None if content.trim_start().starts_with("<think>") => "",
        None => content,
    }
}

/// A text as one paragraph: single spaces, and no control characters.
fn paragraph(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// A text without what comes after its last whole sentence.
fn whole_sentences(text: &str) -> Option<&str> {
    let last = sentences(text).pop()?;
    let kept = if is_whole(last) { text } else { text[..text.len() - last.len()].trim_end() };
    Some(kept).filter(|kept| !kept.is_empty())
}

/// Whether a text's first sentence holds one of the phrases, whatever the case and the apostrophe, as words of their own.
fn declines(text: &str, phrases: &[String]) -> bool {
    let plain = |text: &str| {
        let words = text.to_lowercase().replace('’', "'");
        let words = words.split(|c: char| !c.is_alphanumeric() && c != '\'').filter(|word| !word.is_empty());
        format!(" {} ", words.collect::<Vec<_>>().join(" "))
    };
    let first = sentences(text).first().map(|sentence| plain(sentence)).unwrap_or_default();
    phrases.iter().any(|phrase| first.contains(&plain(phrase)))
}

/// The beginning of a text as one line.
fn line(text: &str) -> String {
    let text = paragraph(text);
    match text.char_indices().nth(DETAIL) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// What an endpoint says of a failure: its error's message, or what it says instead.
pub(super) fn detail(body: &[u8]) -> Detail {
    let found = serde_json::from_slice::<Value>(body).ok();
    let message = found.as_ref().and_then(|body| {
        let error = body.get("error").unwrap_or(body);
        [error.get("message"), body.get("message"), body.get("detail"), Some(error)].into_iter().flatten().find_map(Value::as_str)
    });
    Detail(line(message.unwrap_or(&String::from_utf8_lossy(body))))
}

/// The code or type by which an endpoint names an error.
pub(super) fn names(body: &[u8], error: &[&str]) -> bool {
    let found: Value = serde_json::from_slice(body).unwrap_or_default();
    let found = found.get("error").unwrap_or(&found);
    ["code", "type"].iter().filter_map(|key| found.get(*key)?.as_str()).any(|name| error.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn judged(message: Value, finish: &str, config: &CaptionConfig) -> Result<String, CaptionRefusal> {
        let body =
            json!({ "choices": [{ "message": message, "finish_reason": finish }], "usage": { "prompt_tokens": 9, "total_tokens": 9 } });
        let reply = Reply::read(body.to_string().as_bytes()).unwrap();
        assert_eq!(reply.usage, Usage { input_tokens: 9, output_tokens: 0 });
        reply.caption(config).map_err(|(why, _)| why)
    }

    fn said_by(content: &str, finish: &str, config: &CaptionConfig) -> Result<String, CaptionRefusal> {
        judged(json!({ "role": "assistant", "content": content }), finish, config)
    }

    #[test]
    fn captions_are_one_paragraph_and_what_is_none_has_a_reason() {
        use CaptionRefusal as Why;
        let config = CaptionConfig { max_words: 12, ..CaptionConfig::default() };
        let trimming = CaptionConfig { cut: Cut::Trim, ..config.clone() };
        let good = "A red cup stands on a table. It is";
        assert_eq!(said_by(" A red\u{0} cup\n\n- stands on a\ttable. ", "stop", &config).unwrap(), "A red cup - stands on a table.");
        assert_eq!(said_by("<think>A cup? A mug?</think>\nA red cup on a table.", "stop", &config).unwrap(), "A red cup on a table.");
        assert_eq!(said_by(good, "stop", &config).unwrap(), good);
        assert_eq!(said_by(good, "length", &config), Err(Why::Cut));
        assert_eq!(said_by(good, "length", &trimming).unwrap(), "A red cup stands on a table.");
        assert_eq!(said_by("A red cup stands on", "length", &trimming), Err(Why::Cut));
        assert_eq!(said_by("<think>A cup? A mug? Or", "length", &trimming), Err(Why::Cut));
        assert_eq!(said_by("<think>A cup? A mug? Or", "stop", &config), Err(Why::Empty));
        assert_eq!(said_by(" \n", "stop", &config), Err(Why::Empty));
        assert_eq!(judged(json!({ "content": null }), "tool_calls", &config), Err(Why::Empty));
        assert_eq!(said_by("A red cup.", "stop", &config), Err(Why::TooShort));
        assert_eq!(said_by(&"word ".repeat(13), "stop", &config), Err(Why::TooLong));
        assert_eq!(said_by(good, "content_filter", &config), Err(Why::ContentFilter));
        assert_eq!(judged(json!({ "content": null, "refusal": "No." }), "stop", &config), Err(Why::Refused));
        for declined in
            ["I’m sorry, but I can't help with that picture.", "Unfortunately, I CANNOT describe this.", "As an AI, I see nothing."]
        {
            assert_eq!(said_by(declined, "stop", &config), Err(Why::Refused), "{declined}");
        }
        for caption in ["Hawaii cannot be seen on this map.", "A sign on a wall. It reads \"I cannot\"."] {
            assert_eq!(said_by(caption, "stop", &config).unwrap(), caption);
        }
    }

    #[test]
    fn what_is_no_completion_is_told_as_such() {
        for (body, expected) in [
            (&b"{\"choices\": []}"[..], "no choices"),
            (b"{\"choices\": [{\"mess", "EOF"),
            (b"<html>It works!</html>", "expected value"),
            (b"{\"error\": {\"message\": \"no GPU\"}}", "missing field `choices`"),
            (b"{\"choices\": [{\"message\": {\"content\": 7}}]}", "expected a string"),
            (b"", "EOF"),
        ] {
            let error = Reply::read(body).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn half_a_character_costs_no_more_than_itself() {
        let said = |text: &str| Reply::read(format!(r#"{{"choices": [{{"message": {{"content": "{text}"}}}}]}}"#).as_bytes());
        for (text, expected) in [
            (r"a cup \ud83d", "a cup \u{fffd}"),
            (r"\ude00 a \ud83d\ude00 cup", "\u{fffd} a 😀 cup"),
            (r"\ud83d\ud83d\ude00\\ud83d", "\u{fffd}😀\\ud83d"),
            (r"\ud83d\n\ud83d.", "\u{fffd} \u{fffd}."),
        ] {
            assert_eq!(said(text).unwrap().text, expected, "{text}");
        }
        assert!(said(r"a cup \ud8").is_err());
    }

    #[test]
    fn what_an_endpoint_says_of_a_failure_is_kept_in_a_line() {
        for (body, expected) in [
            ("{\"error\":{\"message\":\"The model `x`\\ndoes not exist.\",\"code\":404}}", "The model `x` does not exist."),
            ("{\"object\":\"error\",\"message\":\"too long\",\"code\":400}", "too long"),
            ("{\"detail\":\"Not Found\"}", "Not Found"),
            ("{\"error\":\"url must be base64\"}", "url must be base64"),
            ("{\"detail\":[{\"msg\":\"x\"}]}", "{\"detail\":[{\"msg\":\"x\"}]}"),
            ("", ""),
        ] {
            assert_eq!(detail(body.as_bytes()).0, expected);
        }
        assert_eq!(detail("é".repeat(9999).as_bytes()).0.chars().count(), DETAIL + 1);
        assert!(names(b"{\"error\":{\"code\":\"insufficient_quota\"}}", &["insufficient_quota"]));
        assert!(!names(b"{\"error\":{\"code\":429}}", &["insufficient_quota"]) && !names(b"[]", &["x"]));
    }

    proptest! {
        #[test]
        fn any_text_is_a_caption_of_few_words_or_refused(text in "(\\PC|[a-c .!?\n\u{0}]){0,60}", length: bool, trim: bool) {
            let cut = if trim { Cut::Trim } else { Cut::Refuse };
            let config = CaptionConfig { min_words: 2, max_words: 6, cut, ..CaptionConfig::default() };
            if let Ok(caption) = said_by(&text, if length { "length" } else { "stop" }, &config) {
                prop_assert!((2..=6).contains(&caption.split_whitespace().count()));
                prop_assert_eq!(&paragraph(&caption), &caption);
                prop_assert!(!length || (trim && is_whole(&caption)));
            }
        }

        #[test]
        fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Reply::read(&body).is_err());
            let _ = (detail(&body), names(&body, &["x"]));
        }
    }
}
