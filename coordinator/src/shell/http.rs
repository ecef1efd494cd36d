//! HTTP for people and probes. Read-only.

use super::dashboard::{self, Dashboard};
use super::driver::Input;
use super::grpc::ask_status;
use super::page;
use crate::status::StatusReport;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use tokio::sync::mpsc;

type Inputs = State<mpsc::Sender<Input>>;

/// What is served, before the guard.
pub(super) fn router(inputs: mpsc::Sender<Input>, dashboard: Dashboard) -> Router {
    Router::new()
        .route("/api/v1/status", get(status))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics))
        .route("/readyz", get(ready))
        .with_state(inputs)
        .merge(dashboard::router(dashboard))
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
