//! The page's own files. A browser keeps them, and asks by their tag whether they are still the same.

use axum::extract::Path;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::Refusal;

const PAGE: &str = include_str!("assets/index.html");
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

/// By name: type and text.
const ASSETS: [(&str, &str, &str); 7] = [
    ("app.js", SCRIPT, include_str!("assets/app.js")),
    ("chart.js", SCRIPT, include_str!("assets/chart.js")),
    ("dom.js", SCRIPT, include_str!("assets/dom.js")),
    ("panels.js", SCRIPT, include_str!("assets/panels.js")),
    ("samples.js", SCRIPT, include_str!("assets/samples.js")),
    ("style.css", STYLE, include_str!("assets/style.css")),
    ("icon.svg", "image/svg+xml", include_str!("assets/icon.svg")),
];

pub(super) async fn page(headers: HeaderMap) -> Response {
    served(HTML, PAGE, &headers)
}

pub(super) async fn asset(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, Refusal> {
    let found = ASSETS.iter().find(|(known, ..)| *known == name);
    found.map(|(_, kind, text)| served(kind, text, &headers)).ok_or_else(|| Refusal::not_found("the page has no such file"))
}

fn served(kind: &'static str, text: &'static str, headers: &HeaderMap) -> Response {
    let tag = tag(text);
    let asked = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let own = [(header::ETAG, tag.as_str()), (header::CACHE_CONTROL, "no-cache")].map(|(name, value)| (name, value.to_owned()));
    if asked.split(',').any(|asked| asked.trim().trim_start_matches("W/") == tag) {
        return (StatusCode::NOT_MODIFIED, own).into_response();
    }
    (own, [(header::CONTENT_TYPE, kind)], text).into_response()
}

/// The same for the same text, in every process.
fn tag(text: &str) -> String {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}
