//! HTTP for people and probes. Read-only.

use super::dashboard::{self, Dashboard};
use super::driver::Input;
use super::grpc::ask_status;
use super::{RunError, page};
use crate::core::Outcome;
use crate::status::StatusReport;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
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
    dashboard: Dashboard,
    shutdown: CancellationToken,
) -> Result<Option<Outcome>, RunError> {
    let router = Router::new()
        .route("/api/v1/status", get(status))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics))
        .route("/readyz", get(ready))
        .with_state(inputs)
        .merge(dashboard::router(dashboard));
    let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
    served.map(|()| None).map_err(|e| RunError::Server { name: "HTTP", reason: e.to_string() })
}

async fn report(inputs: &mpsc::Sender<Input>) -> Result<StatusReport, Response> {
    let status = ask_status(inputs).await;
    status.map(Into::into).ok_or_else(|| (StatusCode::SERVICE_UNAVAILABLE, "the coordinator does not answer\n").into_response())
}

async fn status(State(inputs): Inputs) -> Result<Json<StatusReport>, Response> {
    report(&inputs).await.map(Json)
}

async fn ready(State(inputs): Inputs) -> Result<&'static str, Response> {
    report(&inputs).await.map(|_| "ok\n")
}

async fn metrics(State(inputs): Inputs) -> Result<impl IntoResponse, Response> {
    let text = page::prometheus(&report(&inputs).await?);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}
