//! HTTP for people and probes. Read-only.

use super::driver::Input;
use super::grpc::ask_status;
use super::{RunError, page};
use crate::core::Outcome;
use crate::metrics::{self, Format};
use crate::status::StatusReport;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

type Inputs = State<mpsc::Sender<Input>>;

/// Serves until `shutdown`.
pub(super) async fn serve(
    listener: TcpListener,
    inputs: mpsc::Sender<Input>,
    shutdown: CancellationToken,
) -> Result<Option<Outcome>, RunError> {
    let router = Router::new()
        .route("/", get(index))
        .route("/api/v1/status", get(status))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(prometheus))
        .route("/readyz", get(ready))
        .with_state(inputs);
    let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
    served.map(|()| None).map_err(|e| RunError::Server { name: "HTTP", reason: e.to_string() })
}

async fn report(inputs: &mpsc::Sender<Input>) -> Result<StatusReport, Response> {
    let status = ask_status(inputs).await;
    status.map(Into::into).ok_or_else(|| (StatusCode::SERVICE_UNAVAILABLE, "the coordinator does not answer\n").into_response())
}

async fn index(State(inputs): Inputs) -> Result<Html<String>, Response> {
    report(&inputs).await.map(|report| Html(page::html(&report)))
}

async fn status(State(inputs): Inputs) -> Result<Json<StatusReport>, Response> {
    report(&inputs).await.map(Json)
}

async fn ready(State(inputs): Inputs) -> Result<&'static str, Response> {
    report(&inputs).await.map(|_| "ok\n")
}

async fn prometheus(State(inputs): Inputs, headers: HeaderMap) -> Result<impl IntoResponse, Response> {
    let format = Format::accepted(headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()));
    let text = metrics::render(&report(&inputs).await?, format);
    Ok(([(header::CONTENT_TYPE, format.content_type())], text))
}
