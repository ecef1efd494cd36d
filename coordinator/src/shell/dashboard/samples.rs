//! Pictures that training drew: `samples/STEP/index.json` (twelve digits of STEP) with its files beside it. Whatever is missing or damaged there
//! is said, and shown as missing; and nothing else of the run's folder can be read through here.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use ella_proto::samples::{self, folder};
use ella_store::Store;
use serde::{Deserialize, Serialize};

use super::api::Which;
use super::{Dashboard, Path, Query, Refusal, Shared};

/// Pictures of one step.
const MOST_PICTURES: usize = 256;
/// Steps that are listed, the newest.
const MOST_STEPS: usize = 2_000;
/// Characters of a prompt.
const LONGEST: usize = 2_000;
const LARGEST_INDEX: u64 = 1 << 20;
const LARGEST_PICTURE: u64 = 16 << 20;

/// What there is of one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Index {
    #[serde(default)]
    step: u64,
    #[serde(default)]
    images: Vec<Picture>,
    /// Pictures that the index names wrongly, or that are too many.
    #[serde(default, skip_deserializing)]
    left_out: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Picture {
    file: String,
    #[serde(default)]
    prompt: String,
    #[serde(default)]
    seed: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Steps {
    steps: Vec<u64>,
}

/// A file's plain name.
fn is_file(name: &str) -> bool {
    let fits = (1..=64).contains(&name.len()) && !name.starts_with('.');
    fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

/// What these bytes are, if they are a picture that a browser shows and that can hold no script.
fn picture_type(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some("image/png"),
        [0xff, 0xd8, 0xff, ..] => Some("image/jpeg"),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some("image/webp"),
        _ => None,
    }
}

impl Dashboard {
    async fn store_of(&self, which: &Which) -> Result<Store, Refusal> {
        let view = self.view(which.run.as_deref()).await?;
        view.store().cloned().ok_or_else(|| Refusal::not_found("a job draws no samples"))
    }
}

/// Lists the steps of which there are pictures.
pub(super) async fn steps(State(dashboard): Shared, Query(which): Query<Which>) -> Result<Json<Steps>, Refusal> {
    let view = dashboard.view(which.run.as_deref()).await?;
    let Some(store) = view.store() else { return Ok(Json(Steps { steps: Vec::new() })) };
    let folders = store.folders(samples::FOLDER).await?;
    let mut steps: Vec<u64> = folders.iter().filter_map(|folder| samples::step_of(folder)).collect();
    Ok(Json(Steps { steps: steps.split_off(steps.len().saturating_sub(MOST_STEPS)) }))
}

/// What there is of a step.
pub(super) async fn index(State(dashboard): Shared, Path(step): Path<u64>, Query(which): Query<Which>) -> Result<Json<Index>, Refusal> {
    let store = dashboard.store_of(&which).await?;
    Ok(Json(index_of(&store, step).await?))
}

async fn index_of(store: &Store, step: u64) -> Result<Index, Refusal> {
    let key = format!("{}/{}", folder(step), samples::INDEX);
    let bytes = small(store, &key, LARGEST_INDEX).await?;
    let damaged = |error| Refusal(StatusCode::BAD_GATEWAY, format!("{}/{key}: {error}; its pictures are not shown", store.url()));
    let mut index: Index = serde_json::from_slice(&bytes).map_err(damaged)?;
    let named = index.images.len();
    index.images.retain(|picture| is_file(&picture.file));
    index.images.truncate(MOST_PICTURES);
    for picture in &mut index.images {
        picture.prompt = picture.prompt.chars().take(LONGEST).collect();
    }
    Ok(Index { step, left_out: named - index.images.len(), ..index })
}

/// Gives a picture's bytes.
pub(super) async fn picture(
    State(dashboard): Shared,
    Path((step, file)): Path<(u64, String)>,
    Query(which): Query<Which>,
) -> Result<impl IntoResponse, Refusal> {
    if !is_file(&file) {
        return Err(Refusal::bad("a picture's name has letters, digits, dots, dashes and underscores only"));
    }
    let store = dashboard.store_of(&which).await?;
    let bytes = small(&store, &format!("{}/{file}", folder(step)), LARGEST_PICTURE).await?;
    let Some(kind) = picture_type(&bytes) else {
        return Err(Refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("{file}: neither PNG, JPEG nor WebP")));
    };
    // They are drawn anew where a run goes on from an earlier step, and differ if its [sample] settings do.
    Ok(([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "private, max-age=60")], bytes))
}

/// An object that is no larger than it should be.
async fn small(store: &Store, key: &str, most: u64) -> Result<bytes::Bytes, Refusal> {
    let found = store.head(key).await?.ok_or_else(|| Refusal::not_found(format!("{}/{key}: not there", store.url())))?;
    if found.bytes > most {
        let words = format!("{}/{key}: {} bytes, where {most} are the most that is shown", store.url(), found.bytes);
        return Err(Refusal(StatusCode::PAYLOAD_TOO_LARGE, words));
    }
    Ok(store.get(key).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere_else_and_types_are_told_by_content() {
        assert!(["000.png", "a-b_c.webp"].iter().all(|name| is_file(name)));
        assert!(["", "..", "../run.toml", "a/b", ".x", "a b", "é.png"].iter().all(|name| !is_file(name)));
        assert_eq!(picture_type(b"\x89PNG\r\n\x1a\nrest"), Some("image/png"));
        assert_eq!(picture_type(b"RIFF1234WEBPVP8 "), Some("image/webp"));
        assert_eq!(picture_type(b"<svg onload=alert(1)>"), None);
        assert_eq!(picture_type(b""), None);
    }

    #[tokio::test]
    async fn an_index_is_shown_as_far_as_it_makes_sense() {
        let store = Store::in_memory();
        let text =
            r#"{"step":400,"images":[{"file":"000.png","prompt":"<b>","seed":7},{"file":"../../run.toml","prompt":"x"},{"file":"1.png"}]}"#;
        store.put("samples/000000000400/index.json", text.into()).await.unwrap();
        let index = index_of(&store, 400).await.unwrap();
        assert_eq!((index.images.len(), index.left_out, index.images[0].seed), (2, 1, Some(7)));
        assert_eq!(index_of(&store, 5).await.unwrap_err().0, StatusCode::NOT_FOUND);
        store.put("samples/000000000500/index.json", "{".into()).await.unwrap();
        assert_eq!(index_of(&store, 500).await.unwrap_err().0, StatusCode::BAD_GATEWAY);
        store.put("samples/000000000500/big.png", vec![0; 20 << 20].into()).await.unwrap();
        assert_eq!(small(&store, "samples/000000000500/big.png", LARGEST_PICTURE).await.unwrap_err().0, StatusCode::PAYLOAD_TOO_LARGE);
    }
}
