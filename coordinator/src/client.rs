//! Talking to a coordinator that runs.

use ella_proto::v1::coordinator_client::CoordinatorClient;
use ella_proto::v1::{DrainRequest, RunStatus, StatusRequest, StopRequest};
use std::time::Duration;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(3);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Why a coordinator could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none.
    #[error("{url}: not a coordinator's address ({reason}); write it as host:port")]
    BadUrl {
        /// As given.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Nobody answers there.
    #[error("{url}: no coordinator answers ({reason}); is the run still going, and is this its gRPC address?")]
    Unreachable {
        /// As given.
        url: String,
        /// What the network said.
        reason: String,
    },
    /// It answers, but not as asked.
    #[error("{url}: the coordinator refuses ({0}: {1})", status.code(), status.message())]
    Refused {
        /// As given.
        url: String,
        /// Its answer.
        status: Box<tonic::Status>,
    },
}

/// What the run is doing. `url`: `host:port`, with or without `http://`.
///
/// # Errors
/// If no coordinator answers within a few seconds.
pub async fn status(url: &str) -> Result<RunStatus, ClientError> {
    let answer = connect(url).await?.status(timed(StatusRequest {})).await;
    answer.map(tonic::Response::into_inner).map_err(|status| failed(url, status))
}

/// Asks the run to commit and leave. Returns once the coordinator has the request, not when the run is over.
///
/// # Errors
/// If no coordinator answers within a few seconds.
pub async fn stop(url: &str, reason: &str) -> Result<(), ClientError> {
    let answer = connect(url).await?.stop(timed(StopRequest { reason: reason.to_owned() })).await;
    answer.map(|_| ()).map_err(|status| failed(url, status))
}

/// Asks one worker of a run to leave; the others go on. Returns once the coordinator has the request, not when the worker is gone.
///
/// # Errors
/// If no coordinator answers within a few seconds, or it knows no such worker.
pub async fn drain(url: &str, worker: &str, reason: &str) -> Result<(), ClientError> {
    let request = DrainRequest { worker_id: worker.to_owned(), reason: reason.to_owned() };
    let answer = connect(url).await?.drain(timed(request)).await;
    answer.map(|_| ()).map_err(|status| failed(url, status))
}

async fn connect(url: &str) -> Result<CoordinatorClient<Channel>, ClientError> {
    let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let endpoint = Endpoint::from_shared(full).map_err(|e| ClientError::BadUrl { url: url.to_owned(), reason: e.to_string() })?;
    let endpoint = endpoint.connect_timeout(CONNECT).timeout(ANSWER);
    let channel = endpoint.connect();
    let unreachable = |reason: String| ClientError::Unreachable { url: url.to_owned(), reason };
    match tokio::time::timeout(CONNECT, channel).await {
        Ok(connected) => connected.map(CoordinatorClient::new).map_err(|e| unreachable(ella_proto::with_causes(&e))),
        Err(_) => Err(unreachable(format!("no connection within {CONNECT:?}"))),
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER);
    request
}

/// A timeout of the client's own comes as `Cancelled`, not as `DeadlineExceeded`.
fn failed(url: &str, status: tonic::Status) -> ClientError {
    use tonic::Code;
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Unknown => {
            ClientError::Unreachable { url: url.to_owned(), reason: status.message().to_owned() }
        }
        _ => ClientError::Refused { url: url.to_owned(), status: Box::new(status) },
    }
}
