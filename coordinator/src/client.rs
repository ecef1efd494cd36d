//! Talking to a coordinator that runs.

use ella_proto::access::{Access, Client};
use ella_proto::v1::{DrainRequest, RunStatus, StatusRequest, StopRequest};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tonic::Request;
use tonic::codegen::Service as _;

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
    /// Nobody answers there, or not as a coordinator does.
    #[error("{url}: no coordinator answers ({reason}); {hint}")]
    Unreachable {
        /// As given.
        url: String,
        /// What the network said.
        reason: String,
        /// What may be wrong.
        hint: &'static str,
    },
    /// One side does not take the other's certificate.
    #[error("{url}: no TLS with the coordinator ({reason}); {remedy}")]
    Untrusted {
        /// As given.
        url: String,
        /// Which side, and why.
        reason: String,
        /// What to do.
        remedy: &'static str,
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
    let answer = connect(&access).await?.status(timed(StatusRequest::default())).await;
    match answer {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(failed(&access, status).await),
    }
}

/// Asks the run to commit and leave. Returns once the coordinator has the request, not when the run is over.
///
/// # Errors
/// If no coordinator answers within a few seconds.
pub async fn stop(access: impl Into<Access>, reason: &str) -> Result<(), ClientError> {
    let access = access.into();
    let answer = connect(&access).await?.stop(timed(StopRequest { reason: reason.to_owned() })).await;
    match answer {
        Ok(_) => Ok(()),
        Err(status) => Err(failed(&access, status).await),
    }
}

/// Asks one worker of a run to leave; the others go on. Returns once the coordinator has the request, not when the worker is gone.
///
/// # Errors
/// If no coordinator answers within a few seconds, or it knows no such worker.
pub async fn drain(access: impl Into<Access>, worker: &str, reason: &str) -> Result<(), ClientError> {
    let access = access.into();
    let request = DrainRequest { worker_id: worker.to_owned(), reason: reason.to_owned() };
    let answer = connect(&access).await?.drain(timed(request)).await;
    match answer {
        Ok(_) => Ok(()),
        Err(status) => Err(failed(&access, status).await),
    }
}

async fn connect(access: &Access) -> Result<Client, ClientError> {
    let url = &access.url;
    let endpoint = access.endpoint().map_err(|reason| ClientError::BadUrl { url: url.to_owned(), reason })?;
    let endpoint = endpoint.connect_timeout(CONNECT).timeout(ANSWER);
    let unreachable = |reason: String| unreachable(access, reason);
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
async fn failed(access: &Access, status: tonic::Status) -> ClientError {
    use tonic::Code;
    let url = access.url.clone();
    match status.code() {
        _ if std::error::Error::source(&status).is_some() => {
            let error = unreachable(access, ella_proto::with_causes(&status));
            let alert = if matches!(error, ClientError::Unreachable { .. }) { alert(access).await } else { None };
            alert.map_or(error, |alert| unreachable(access, alert))
        }
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Unknown => {
            unreachable(access, ella_proto::with_causes(&status))
        }
        Code::Unauthenticated | Code::PermissionDenied => ClientError::NoEntry { url, reason: status.message().to_owned() },
        _ => ClientError::Refused { url, status: Box::new(status) },
    }
}

/// What a coordinator with certificates has against this side's, which TLS 1.3 says only after the handshake. Where a call is under way by then, it is told
/// of the broken connection at times and of the alert at others: here nothing is sent, and the alert is heard.
async fn alert(access: &Access) -> Option<String> {
    let (mut tls, to) = (access.tls.clone()?, access.endpoint().ok()?.uri().clone());
    let heard = async {
        let mut stream = tls.call(to).await?.into_inner();
        stream.read(&mut [0]).await
    };
    let error = tokio::time::timeout(CONNECT, heard).await.ok()?.err()?;
    Some(ella_proto::with_causes(&error)).filter(|error| error.contains(ALERT))
}

/// What comes before an alert's name.
const ALERT: &str = "received fatal alert: ";
/// Alerts by which a coordinator says that a certificate will not do, or is missing, as rustls has them.
const REFUSED: [&str; 9] = [
    "AccessDenied",
    "BadCertificate",
    "CertificateExpired",
    "CertificateRequired",
    "CertificateRevoked",
    "CertificateUnknown",
    "DecryptError",
    "UnknownCA",
    "UnsupportedCertificate",
];

/// By what the network said, in words: what comes through HTTP/2 has no more than those. An alert is sure; that a connection broke is not, as it may
/// have done so before the alert came.
fn unreachable(access: &Access, reason: String) -> ClientError {
    let url = access.url.clone();
    if reason.contains("invalid peer certificate") {
        let remedy = "this command does not take its certificate: give --tls-ca the CA of that, and the address by a name that it is for";
        return ClientError::Untrusted { url, reason, remedy };
    }
    let alert = reason.split_once(ALERT).map(|(_, alert)| alert.split(|c: char| !c.is_alphanumeric()).next());
    if alert.flatten().is_some_and(|alert| REFUSED.contains(&alert)) {
        let remedy = "it does not take this command's certificate, or asks for one: give --tls-cert and --tls-key of one that the coordinator's --tls-ca \
                      has signed, and that has not ended";
        return ClientError::Untrusted { url, reason, remedy };
    }
    let says = |words: &[&str]| words.iter().any(|word| reason.to_lowercase().contains(word));
    let broke = says(&["broken pipe", "connection reset", "connection closed", "eof", "frame_size_error", "frame with invalid size"]);
    let hint = match &access.tls {
        None if broke => {
            "something listens there: if it has TLS, write https:// and give --tls-ca; and is it the gRPC address, not the dashboard's?"
        }
        Some(_) if says(&["invalidcontenttype", "corrupt message"]) => {
            "something listens there: if it has no TLS, write http://, without certificates"
        }
        Some(_) if broke => "something listens there: if it asks for certificates, give --tls-cert and --tls-key of one that it takes",
        _ => "is the run still going, and is this its gRPC address (https:// where it has certificates)?",
    };
    ClientError::Unreachable { url, reason, hint }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

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

    #[test]
    fn certificates_that_will_not_do_are_told_from_an_address_where_nobody_answers() {
        let of = |access: &Access, reason: &str| unreachable(access, reason.to_owned());
        let plain = Access::from("http://h:1");
        for reason in [
            "transport error: invalid peer certificate: UnknownIssuer",
            "transport error: invalid peer certificate: BadSignature",
            "status: 'Unknown error': received fatal alert: CertificateRequired",
            "h2 protocol error: received fatal alert: UnknownCA",
        ] {
            let error = of(&plain, reason);
            assert!(matches!(error, ClientError::Untrusted { .. }) && error.to_string().contains(reason), "{error}");
        }
        for (reason, words) in [
            ("tcp connect error: Connection refused (os error 111)", "is the run still going"),
            ("received fatal alert: HandshakeFailure", "is the run still going"),
            ("transport error: stream closed because of a broken pipe", "if it has TLS, write https://"),
            ("connection error detected: frame with invalid size (FRAME_SIZE_ERROR)", "if it has TLS, write https://"),
        ] {
            let error = of(&plain, reason);
            assert!(matches!(error, ClientError::Unreachable { .. }) && error.to_string().contains(words), "{error}");
        }
    }
}
