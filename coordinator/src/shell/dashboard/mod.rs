//! What people look at: one page, and what it asks for as JSON. Read-only; all of it is in the binary, and nothing is fetched from elsewhere.
//!
//! - [`recorder`]: takes down what happens as it does, and restores what was before.
//! - [`feed`]: tells it on to those who look, as server-sent events.
//! - [`api`]: what is asked for: curves, events, ranks, the state.
//! - [`siblings`]: the runs beside this one.
//! - [`samples`]: pictures that training drew.
//! - [`assets`]: the page.
//!
//! The driver's thread gives to the recorder and never waits for a reader (LIVE): readers copy what they need while they hold its lock.

mod api;
mod assets;
mod feed;
mod recorder;
mod samples;
mod siblings;
mod view;

pub(super) use recorder::Recorder;

use super::driver::Input;
use super::grpc::ask_status;
use crate::status::StatusReport;
use axum::Router;
use axum::extract::{self, FromRequestParts};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use feed::Feed;
use serde::Serialize;
use serde::de::DeserializeOwned;
use siblings::Siblings;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use view::RunView;

/// What a browser may do with anything that comes from here: show it, run the page's own script, and ask this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// What the page's questions are answered from.
#[derive(Debug)]
pub(super) struct Dashboard {
    inputs: mpsc::Sender<Input>,
    /// This coordinator's run or job.
    own: Arc<RunView>,
    feed: Arc<Feed>,
    siblings: Siblings,
    shutdown: CancellationToken,
}

type Shared = extract::State<Arc<Dashboard>>;

impl Dashboard {
    /// Of what `recorder` takes down.
    pub(super) fn new(inputs: mpsc::Sender<Input>, recorder: &Recorder, shutdown: CancellationToken) -> Self {
        let own = Arc::clone(recorder.view());
        let siblings = Siblings::of(own.store());
        Self { inputs, own, feed: Arc::clone(recorder.feed()), siblings, shutdown }
    }

    async fn status(&self) -> Result<StatusReport, Refusal> {
        let status = ask_status(&self.inputs).await;
        status.map(Into::into).ok_or_else(Refusal::no_answer)
    }
}

/// The page's routes.
pub(super) fn router(dashboard: Dashboard) -> Router {
    Router::new()
        .route("/", get(assets::page))
        .route("/assets/{name}", get(assets::asset))
        .route("/api/v1/summary", get(api::summary))
        .route("/api/v1/curves", get(api::curves))
        .route("/api/v1/events", get(api::events))
        .route("/api/v1/ranks", get(api::ranks))
        .route("/api/v1/runs", get(siblings::runs))
        .route("/api/v1/config", get(siblings::config))
        .route("/api/v1/samples", get(samples::steps))
        .route("/api/v1/samples/{step}", get(samples::index))
        .route("/api/v1/samples/{step}/{file}", get(samples::picture))
        .route("/api/v1/live", get(feed::live))
        .route("/api/{*rest}", get(nothing))
        .layer(map_response(guarded))
        .with_state(Arc::new(dashboard))
}

/// What no other route of the API answers.
async fn nothing(uri: Uri) -> Refusal {
    Refusal::not_found(format!("{}: there is no such route; the documentation's page on the dashboard has them all", uri.path()))
}

/// What follows a `?`, or why it cannot be understood.
struct Query<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let read = extract::Query::from_request_parts(parts, state).await;
        read.map(|query| Self(query.0)).map_err(|error| Refusal::bad(error.body_text()))
    }
}

/// The parts of a path that are no fixed words, or why they cannot be understood.
struct Path<T>(T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let read = extract::Path::from_request_parts(parts, state).await;
        read.map(|path| Self(path.0)).map_err(|error| Refusal::bad(error.body_text()))
    }
}

/// Sets what keeps a browser from doing more than it should, and from keeping what changes.
async fn guarded(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Why there is no answer: a status, and words as JSON.
#[derive(Debug)]
pub(super) struct Refusal(StatusCode, String);

impl Refusal {
    pub(super) fn new(status: StatusCode, why: String) -> Self {
        Self(status, why)
    }

    /// The driver says nothing.
    pub(super) fn no_answer() -> Self {
        Self(StatusCode::SERVICE_UNAVAILABLE, "the coordinator does not answer".into())
    }

    fn not_found(what: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, what.into())
    }

    fn bad(what: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, what.into())
    }
}

impl From<ella_store::StoreError> for Refusal {
    fn from(error: ella_store::StoreError) -> Self {
        match error {
            ella_store::StoreError::NotFound { .. } => Self::not_found(error.to_string()),
            ella_store::StoreError::BadKey { .. } => Self::bad(error.to_string()),
            error => Self(StatusCode::BAD_GATEWAY, error.to_string()),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Body {
            error: String,
        }
        (self.0, axum::Json(Body { error: self.1 })).into_response()
    }
}
