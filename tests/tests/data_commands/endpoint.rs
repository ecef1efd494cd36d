//! A small endpoint of the OpenAI kind. What it answers depends on the picture, which it knows by the caption that the prompt shows: some
//! make it fail the first time that they are asked about, some never get a caption.

use axum::body::Body;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::runtime::Runtime;

/// The prompt; what follows is the sample's own caption.
pub(crate) const PROMPT: &str = "Describe what was called: ";

/// What becomes of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    Good,
    /// Status 500 the first time.
    Fails,
    /// Status 429 with `Retry-After` the first time.
    Busy,
    /// No answer the first time.
    Stalls,
    /// Words, but no completion, the first time.
    Nonsense,
    /// Words without end, every time.
    Rambles,
    /// The model declines.
    Declines,
    /// Cut off after its first sentence.
    Cut,
}

pub(crate) const FATES: [Fate; 8] =
    [Fate::Good, Fate::Fails, Fate::Busy, Fate::Stalls, Fate::Nonsense, Fate::Rambles, Fate::Declines, Fate::Cut];

/// The fate of the picture with this caption.
pub(crate) fn fate(caption: &str) -> Fate {
    FATES[caption.bytes().fold(7usize, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into())) % FATES.len()]
}

/// What is to stand in the new column for the picture with this caption.
pub(crate) fn expected(caption: &str) -> String {
    let words: Vec<&str> = caption.split_whitespace().take(8).collect();
    match fate(caption) {
        Fate::Rambles | Fate::Declines => String::new(),
        _ => format!("It was called {}.", words.join(" ").trim_end_matches(['.', ','])),
    }
}

/// An endpoint on a port of its own, until it is dropped.
pub(crate) struct Endpoint {
    pub(crate) url: String,
    asked: Arc<Mutex<HashMap<String, usize>>>,
    _runtime: Runtime,
}

impl Endpoint {
    pub(crate) fn start() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let url = format!("http://{}/v1", listener.local_addr()?);
        let asked = Arc::new(Mutex::new(HashMap::new()));
        let record = asked.clone();
        let router = Router::new().fallback(move |Json(body): Json<Value>| {
            let record = record.clone();
            async move { answer(&record, &body).await }
        });
        let router = router.layer(axum::extract::DefaultBodyLimit::disable());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Ok(Self { url, asked, _runtime: runtime })
    }

    /// How often it was asked about each picture.
    pub(crate) fn asked(&self) -> HashMap<String, usize> {
        self.asked.lock().map(|asked| asked.clone()).unwrap_or_default()
    }
}

async fn answer(record: &Mutex<HashMap<String, usize>>, body: &Value) -> Response {
    let content = body["messages"][0]["content"].as_array().cloned().unwrap_or_default();
    let picture = content.iter().find_map(|part| part["image_url"]["url"].as_str()).unwrap_or_default();
    let prompt = content.iter().find_map(|part| part["text"].as_str()).unwrap_or_default();
    let caption = prompt.strip_prefix(PROMPT).unwrap_or_default().to_owned();
    if !picture.starts_with("data:image/jpeg;base64,/9j/") || caption.is_empty() || body["model"] != "tiny" {
        return (StatusCode::BAD_REQUEST, "expected a picture, its caption and the model tiny").into_response();
    }
    let before = {
        let mut asked = record.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let times = asked.entry(caption.clone()).or_default();
        *times += 1;
        *times - 1
    };
    match fate(&caption) {
        Fate::Fails if before == 0 => (StatusCode::INTERNAL_SERVER_ERROR, "CUDA out of memory").into_response(),
        Fate::Busy if before == 0 => (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "0.2")], "slow down").into_response(),
        Fate::Stalls if before == 0 => std::future::pending().await,
        Fate::Nonsense if before == 0 => "It works!".into_response(),
        Fate::Rambles => Body::from_stream(futures::stream::repeat_with(|| Ok::<_, std::io::Error>("and another thing, "))).into_response(),
        Fate::Declines => completion("I'm sorry, I can't help with that picture.", "stop"),
        Fate::Cut => completion(&format!("{} Behind it there", expected(&caption)), "length"),
        _ => completion(&expected(&caption), "stop"),
    }
}

fn completion(text: &str, finish: &str) -> Response {
    let choice = json!({ "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": finish });
    Json(json!({ "choices": [choice], "usage": { "prompt_tokens": 400, "completion_tokens": 20 } })).into_response()
}
