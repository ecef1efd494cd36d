//! The guard before the HTTP routes, the limits of their requests, and the loop that serves them.
//!
//! Nothing can be changed over HTTP, whoever asks. With access control, everything but the probes takes a viewer's token (or certificate): as a
//! bearer, or as the password of HTTP's Basic scheme, which browsers ask for by themselves and Prometheus speaks.

use super::RunError;
use super::dashboard;
use super::door::{Connection, Peer};
use super::gate::{bearer, length};
use super::guard::{Denied, Guard, Refusal};
use super::limits::{HEADERS, HEADERS_AT_MOST, HTTP_HEADERS, HTTP_LEAVING};
use crate::core::Outcome;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{ALLOW, HOST, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, HeaderName, HeaderValue, REFERRER_POLICY, WWW_AUTHENTICATE,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ella_proto::access::Role;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::pin::pin;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::codegen::Service as _;

/// What asks for nothing: Kubernetes' probes show nothing, and are told nothing but that it lives.
const OPEN: [&str; 2] = ["/healthz", "/readyz"];
/// Pages have everything in themselves and speak to nobody else.
const POLICY: &str = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Serves the routes, to whom the guard lets in, until `shutdown`.
pub(super) async fn serve(
    router: Router,
    mut connections: mpsc::Receiver<Connection>,
    guard: Guard,
    shutdown: CancellationToken,
) -> Result<Option<Outcome>, RunError> {
    let router = router.layer(from_fn_with_state(guard, admit));
    let serving = TaskTracker::new();
    while let Some(Some(connection)) = shutdown.run_until_cancelled(connections.recv()).await {
        serving.spawn(serve_one(connection, router.clone(), shutdown.clone()));
    }
    serving.close();
    serving.wait().await;
    Ok(None)
}

async fn serve_one(connection: Connection, router: Router, shutdown: CancellationToken) {
    let peer = connection.peer.clone();
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer.clone());
        router.clone().call(request)
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HTTP_HEADERS).max_buf_size(HEADERS_AT_MOST as usize);
    let mut served = pin!(http.serve_connection(TokioIo::new(connection), service));
    // How a connection breaks is its peer's matter.
    tokio::select! {
        _ = served.as_mut() => return,
        () = shutdown.cancelled() => served.as_mut().graceful_shutdown(),
    }
    let _ = tokio::time::timeout(HTTP_LEAVING, served).await;
}

async fn admit(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let answer = match check(&guard, &head).await {
        Ok(()) => next.run(Request::from_parts(head, body)).await,
        Err(kept_out) => kept_out.answer(head.uri.path()),
    };
    hardened(answer)
}

/// Why a request is not let in: a status, words, and a header that goes with them.
struct KeptOut(StatusCode, String, Option<(HeaderName, HeaderValue)>);

impl KeptOut {
    fn of(status: StatusCode, why: impl Into<String>) -> Self {
        Self(status, why.into(), None)
    }

    /// As JSON where the API would have answered, and as text elsewhere.
    fn answer(self, path: &str) -> Response {
        let Self(status, why, header) = self;
        let mut answer = match path.starts_with("/api/") {
            true => dashboard::Refusal::new(status, why).into_response(),
            false => (status, format!("{why}\n")).into_response(),
        };
        answer.headers_mut().extend(header);
        answer
    }
}

async fn check(guard: &Guard, request: &Parts) -> Result<(), KeptOut> {
    if ![Method::GET, Method::HEAD].contains(&request.method) {
        let allowed = Some((ALLOW, HeaderValue::from_static("GET, HEAD")));
        return Err(KeptOut(StatusCode::METHOD_NOT_ALLOWED, "nothing can be changed here".into(), allowed));
    }
    if OPEN.contains(&request.uri.path()) {
        return Ok(());
    }
    // Every connection of the door's has one.
    let none = || KeptOut::of(StatusCode::INTERNAL_SERVER_ERROR, "a connection without a peer");
    let peer = request.extensions.get::<Arc<Peer>>().ok_or_else(none)?;
    if length(&request.headers) > HEADERS {
        guard.turn_away(peer.address, Refusal::Headers, "its headers are too long");
        let why = format!("the headers are longer than {HEADERS} bytes");
        return Err(KeptOut::of(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, why));
    }
    let secret = secret(&request.headers);
    guard.admit(peer, secret.as_deref(), Role::Viewer).await.map_err(refused)?;
    let is_asked = guard.access.is_on() || guard.access.is_insecure();
    if is_asked || !peer.address.ip().to_canonical().is_loopback() || is_local(&request.headers) {
        return Ok(());
    }
    Err(KeptOut::of(StatusCode::FORBIDDEN, "this address is for localhost only; ask for it by that name"))
}

/// Whether a name is asked for that means this machine, or an address. Any other may be a web page's that has its name resolve to here.
fn is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST).and_then(|host| host.to_str().ok()) else { return true };
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.bytes().all(|byte| byte.is_ascii_digit()) { name } else { host });
    let name = name.trim_matches(['[', ']']);
    name == "localhost" || name.ends_with(".localhost") || name.parse::<std::net::IpAddr>().is_ok()
}

/// The secret that a request shows: a bearer, or a password whatever the name.
fn secret(headers: &HeaderMap) -> Option<Vec<u8>> {
    if let Some(bearer) = bearer(headers) {
        return Some(bearer.to_vec());
    }
    let basic = headers.get(AUTHORIZATION)?.as_bytes().strip_prefix(b"Basic ")?;
    let pair = STANDARD.decode(basic).ok()?;
    let at = pair.iter().position(|byte| *byte == b':')?;
    Some(pair[at + 1..].to_vec())
}

fn refused(denied: Denied) -> KeptOut {
    let status = match denied {
        Denied::Missing(_) | Denied::Wrong(..) => StatusCode::UNAUTHORIZED,
        Denied::Role { .. } => StatusCode::FORBIDDEN,
        Denied::Unreviewed(_) => StatusCode::SERVICE_UNAVAILABLE,
        Denied::Flood => StatusCode::TOO_MANY_REQUESTS,
    };
    let ask = HeaderValue::from_static("Basic realm=\"ella: any name, and the token as the password\", charset=\"UTF-8\"");
    KeptOut(status, denied.to_string(), (status == StatusCode::UNAUTHORIZED).then_some((WWW_AUTHENTICATE, ask)))
}

/// No page of ours is shown in another's frame, guessed to be something else, or kept.
fn hardened(mut answer: Response) -> Response {
    let headers = answer.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
        // Else another site's page could show what is here, though not read it.
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    answer
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_a_bearer_or_a_password() {
        let shown = |text: &str| {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, text.parse().unwrap())]);
            secret(&headers).map(|secret| String::from_utf8(secret).unwrap())
        };
        assert_eq!(shown("Bearer abc").unwrap(), "abc");
        assert_eq!(shown(&format!("Basic {}", STANDARD.encode("me:a:b"))).unwrap(), "a:b");
        assert_eq!((shown("Basic ?"), shown("Digest abc"), secret(&HeaderMap::new())), (None, None, None));
    }

    #[test]
    fn only_this_machines_names_and_addresses_are_local() {
        for (host, local) in [
            ("localhost:80", true),
            ("127.0.0.1:80", true),
            ("[::1]:80", true),
            ("[::1]", true),
            ("10.0.0.7", true),
            ("evil.example:80", false),
            ("localhost.evil.example", false),
        ] {
            assert_eq!(is_local(&HeaderMap::from_iter([(HOST, host.parse().unwrap())])), local, "{host}");
        }
    }
}
