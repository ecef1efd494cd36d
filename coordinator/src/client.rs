//! Talking to a coordinator that runs.

use ella_proto::access::{Access, Client};
use ella_proto::v1::{DrainRequest, RunStatus, StatusRequest, StopRequest};
use std::time::Duration;
use tonic::Request;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(3);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Why a coordinator could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none.
    #[error("{url}: not a coordinator's address ({reason}); write it as host:port, or https://host:port where it has certificates")]
    BadUrl {
        /// As given.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Nobody answers there.
    #[error(
        "{url}: no coordinator answers ({reason}); is the run still going, and is this its gRPC address (https:// where it has certificates)?"
    )]
    Unreachable {
        /// As given.
        url: String,
        /// What the network said.
        reason: String,
    },
    /// What it was shown lets nobody in, or has too small a role.
    #[error("{url}: the coordinator refuses this command: {reason}")]
    NoEntry {
        /// As given.
        url: String,
        /// What is wrong, and what to do.
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

/// What the run is doing. `access`: `host:port`, with or without `http://`, and what the coordinator asks for.
///
/// # Errors
/// If no coordinator answers within a few seconds.
pub async fn status(access: impl Into<Access>) -> Result<RunStatus, ClientError> {
    let access = access.into();
    let answer = connect(&access).await?.status(timed(StatusRequest {})).await;
    answer.map(tonic::Response::into_inner).map_err(|status| failed(&access.url, status))
}

/// Asks the run to commit and leave. Returns once the coordinator has the request, not when the run is over.
///
/// # Errors
/// If no coordinator answers within a few seconds.
pub async fn stop(access: impl Into<Access>, reason: &str) -> Result<(), ClientError> {
    let access = access.into();
    let answer = connect(&access).await?.stop(timed(StopRequest { reason: reason.to_owned() })).await;
    answer.map(|_| ()).map_err(|status| failed(&access.url, status))
}

/// Asks one worker of a run to leave; the others go on. Returns once the coordinator has the request, not when the worker is gone.
///
/// # Errors
/// If no coordinator answers within a few seconds, or it knows no such worker.
pub async fn drain(access: impl Into<Access>, worker: &str, reason: &str) -> Result<(), ClientError> {
    let access = access.into();
    let request = DrainRequest { worker_id: worker.to_owned(), reason: reason.to_owned() };
    let answer = connect(&access).await?.drain(timed(request)).await;
    answer.map(|_| ()).map_err(|status| failed(&access.url, status))
}

async fn connect(access: &Access) -> Result<Client, ClientError> {
    let url = &access.url;
    let endpoint = access.endpoint().map_err(|reason| ClientError::BadUrl { url: url.to_owned(), reason })?;
    let endpoint = endpoint.connect_timeout(CONNECT).timeout(ANSWER);
    let unreachable = |reason: String| ClientError::Unreachable { url: url.to_owned(), reason };
    match tokio::time::timeout(CONNECT, access.connect(&endpoint)).await {
        Ok(connected) => connected.map_err(|e| unreachable(ella_proto::with_causes(&e))),
        Err(_) => Err(unreachable(format!("no connection within {CONNECT:?}"))),
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER);
    request
}

/// A timeout of the client's own comes as `Cancelled`, not as `DeadlineExceeded`. What has a cause was made here, of what the connection came to, whatever
/// its code: a port that speaks TLS answers plain text so.
fn failed(url: &str, status: tonic::Status) -> ClientError {
    use tonic::Code;
    let unreachable = || ClientError::Unreachable { url: url.to_owned(), reason: ella_proto::with_causes(&status) };
    match status.code() {
        _ if std::error::Error::source(&status).is_some() => unreachable(),
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Unknown => unreachable(),
        Code::Unauthenticated | Code::PermissionDenied => ClientError::NoEntry { url: url.to_owned(), reason: status.message().to_owned() },
        _ => ClientError::Refused { url: url.to_owned(), status: Box::new(status) },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn plain_text_on_a_port_that_speaks_tls_is_told_to_be_that() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                // What a caller says first is no hello of TLS: a fatal alert, protocol_version.
                let mut heard = [0; 24];
                let _ = stream.read_exact(&mut heard).await;
                let _ = stream.write_all(&[0x15, 3, 3, 0, 2, 2, 70]).await;
                let _ = stream.flush().await;
            }
        });
        let error = status(address.as_str()).await.unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { .. }) && error.to_string().contains("https://"), "{error}");
    }
}
