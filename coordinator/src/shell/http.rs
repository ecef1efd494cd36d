//! HTTP for people and probes. Read-only.

use super::dashboard::{self, Dashboard, Refusal};
use super::driver::Input;
use super::grpc::ask_status;
use crate::metrics::{self, Format};
use crate::status::StatusReport;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

/// How old what is known of the driver may be, for probes.
const FRESH: Duration = Duration::from_secs(1);

type Inputs = State<mpsc::Sender<Input>>;

/// What is served, before the guard.
pub(super) fn router(inputs: mpsc::Sender<Input>, dashboard: Dashboard) -> Router {
    let ready = Ready { inputs: inputs.clone(), known: Arc::default() };
    Router::new()
        .route("/api/v1/status", get(status))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(prometheus))
        .route("/readyz", get(move || ready.clone().answer()))
        .with_state(inputs)
        .merge(dashboard::router(dashboard))
}

async fn report(inputs: &mpsc::Sender<Input>) -> Result<StatusReport, Response> {
    let status = ask_status(inputs).await;
    status.map(Into::into).ok_or_else(no_answer)
}

fn no_answer() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, "the coordinator does not answer\n").into_response()
}

async fn status(State(inputs): Inputs) -> Result<Json<StatusReport>, Refusal> {
    ask_status(&inputs).await.map(|status| Json(status.into())).ok_or_else(Refusal::no_answer)
}

/// Whether the driver answers. Probes show nothing, so anyone may ask: however often that is, the driver is asked once in a while.
#[derive(Clone)]
struct Ready {
    inputs: mpsc::Sender<Input>,
    known: Arc<Mutex<Option<(Instant, bool)>>>,
}

impl Ready {
    async fn answer(self) -> Result<&'static str, Response> {
        // Who asks meanwhile waits for the same answer.
        let mut known = self.known.lock().await;
        let before: Option<(Instant, bool)> = *known;
        let answers = match before.filter(|(at, _)| at.elapsed() < FRESH) {
            Some((_, answers)) => answers,
            None => {
                let answers = ask_status(&self.inputs).await.is_some();
                *known = Some((Instant::now(), answers));
                answers
            }
        };
        if answers { Ok("ok\n") } else { Err(no_answer()) }
    }
}

async fn prometheus(State(inputs): Inputs, headers: HeaderMap) -> Result<impl IntoResponse, Response> {
    let format = Format::accepted(headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()));
    let text = metrics::render(&report(&inputs).await?, format);
    Ok(([(header::CONTENT_TYPE, format.content_type())], text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use ella_proto::v1::RunStatus;

    #[tokio::test(start_paused = true)]
    async fn the_driver_is_asked_once_in_a_while_however_often_probes_ask() {
        let (inputs, mut inbox) = mpsc::channel(8);
        let driver = tokio::spawn(async move {
            let mut asked = 0;
            while let Some(Input::Status(reply)) = inbox.recv().await {
                asked += 1;
                let _ = reply.send(RunStatus::default());
            }
            asked
        });
        let ready = Ready { inputs, known: Arc::default() };
        for _ in 0..2 {
            for _ in 0..100 {
                assert!(ready.clone().answer().await.is_ok());
            }
            tokio::time::advance(FRESH).await;
        }
        drop(ready);
        assert_eq!(driver.await.unwrap(), 2);
    }
}
