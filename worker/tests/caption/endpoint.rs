//! The endpoint: it answers by script, and records what it was asked, when, and how much at once.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use ella_worker::caption::{CaptionClient, CaptionConfig, CaptionFailure, EndpointError, Refused};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// What a picture is to the client: the first bytes of a JPEG file.
pub(crate) const PICTURE: &[u8] = &[0xff, 0xd8, 0xff, 0xe0, 1, 2, 3];
/// A caption that nothing is wrong with.
pub(crate) const CUP: &str = "A red cup stands on a wooden table.";

/// What happens to a request.
#[derive(Clone)]
pub(crate) enum Answer {
    /// A completion with this content and finish reason.
    Says(&'static str, &'static str),
    /// A body with status 200.
    Raw(&'static str),
    /// A status, a header, and a body.
    Status(u16, (&'static str, &'static str), &'static str),
    /// The status, and the request's own key in the error.
    Repeats(u16),
    /// [`CUP`], after so many seconds.
    After(u64),
    /// Nothing, ever.
    Stalls,
    /// A byte a second, for ever.
    Drips,
    /// Words without end.
    Rambles,
    /// Half a completion, and the connection's end.
    Breaks,
}

/// A status without a header.
pub(crate) fn status(status: u16, body: &'static str) -> Answer {
    Answer::Status(status, ("x-none", ""), body)
}

/// One request.
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) key: Option<String>,
    pub(crate) body: Value,
    pub(crate) at: Instant,
}

#[derive(Default)]
struct Record {
    script: VecDeque<Answer>,
    asked: Vec<Asked>,
    now: usize,
    most: usize,
}

/// An endpoint on a port of its own. What its script does not say is answered with [`CUP`].
#[derive(Clone)]
pub(crate) struct Endpoint {
    pub(crate) url: String,
    record: Arc<Mutex<Record>>,
}

impl Endpoint {
    pub(crate) async fn new(script: impl IntoIterator<Item = Answer>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let record = Arc::new(Mutex::new(Record { script: script.into_iter().collect(), ..Record::default() }));
        let endpoint = Endpoint { url, record };
        let serving = endpoint.clone();
        let router = Router::new().fallback(move |uri: Uri, headers: HeaderMap, Json(body)| async move {
            serving.answer(uri.path().to_owned(), &headers, body).await
        });
        tokio::spawn(axum::serve(listener, router.layer(axum::extract::DefaultBodyLimit::disable())).into_future());
        endpoint
    }

    async fn answer(&self, path: String, headers: &HeaderMap, body: Value) -> Response {
        let key = headers.get("authorization").map(|key| key.to_str().unwrap().to_owned());
        let answer = {
            let mut record = self.record.lock().unwrap();
            record.asked.push(Asked { path, key: key.clone(), body, at: Instant::now() });
            record.now += 1;
            record.most = record.most.max(record.now);
            record.script.pop_front().unwrap_or(Answer::Says(CUP, "stop"))
        };
        let _leave = Leave(self);
        match answer {
            Answer::Says(text, finish) => completion(text, finish),
            Answer::Raw(body) => body.into_response(),
            Answer::Status(status, header, body) => (StatusCode::from_u16(status).unwrap(), [header], body).into_response(),
            Answer::Repeats(status) => {
                let said = json!({ "error": { "message": format!("{}{}", "x".repeat(280), key.unwrap_or_default()) } });
                (StatusCode::from_u16(status).unwrap(), Json(said)).into_response()
            }
            Answer::After(seconds) => {
                sleep(Duration::from_secs(seconds)).await;
                completion(CUP, "stop")
            }
            Answer::Stalls => std::future::pending().await,
            Answer::Drips => stream(futures::stream::unfold((), async |()| {
                sleep(Duration::from_secs(1)).await;
                Some((Ok(" "), ()))
            })),
            Answer::Rambles => stream(futures::stream::repeat_with(|| Ok("and another thing, "))),
            Answer::Breaks => {
                let half = "{\"choices\": [{\"message\": {\"content\": \"A red cup";
                stream(futures::stream::iter([Ok(half), Err(std::io::Error::other("broken"))]))
            }
        }
    }

    /// What it was asked so far.
    pub(crate) fn asked<T>(&self, look: impl FnOnce(&[Asked]) -> T) -> T {
        look(&self.record.lock().unwrap().asked)
    }

    /// How often it was asked so far.
    pub(crate) fn times(&self) -> usize {
        self.asked(<[Asked]>::len)
    }

    /// The most requests that it had at once.
    pub(crate) fn most(&self) -> usize {
        self.record.lock().unwrap().most
    }

    /// A config for it, changed by overrides.
    pub(crate) fn config(&self, set: &[&str]) -> CaptionConfig {
        let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        CaptionConfig::parse(&format!("endpoint = \"{}/\"\nmodel = \"m\"", self.url), "caption.toml", &set).unwrap()
    }

    /// A client of it, without a key.
    pub(crate) fn client(&self, set: &[&str]) -> CaptionClient {
        CaptionClient::with_key(self.config(set), None).unwrap()
    }
}

/// A request that leaves, answered or not.
struct Leave<'a>(&'a Endpoint);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.record.lock().unwrap().now -= 1;
    }
}

fn completion(text: &str, finish: &str) -> Response {
    let choice = json!({ "index": 0, "message": { "role": "assistant", "content": text }, "finish_reason": finish });
    Json(json!({ "id": "1", "choices": [choice], "usage": { "prompt_tokens": 400, "completion_tokens": 60 } })).into_response()
}

fn stream(chunks: impl futures::Stream<Item = Result<&'static str, std::io::Error>> + Send + 'static) -> Response {
    Body::from_stream(chunks).into_response()
}

/// The refusal that a failure is.
pub(crate) fn refused(failure: CaptionFailure) -> Refused {
    match failure {
        CaptionFailure::Refused(refused) => refused,
        CaptionFailure::Endpoint(error) => panic!("{error}"),
    }
}

/// The endpoint's error that a failure is.
pub(crate) fn endpoints(failure: CaptionFailure) -> EndpointError {
    match failure {
        CaptionFailure::Endpoint(error) => error,
        CaptionFailure::Refused(refused) => panic!("{refused}"),
    }
}
