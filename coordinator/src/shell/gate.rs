//! The guard before the gRPC service, and the limits of its requests.

use super::door::Peer;
use super::guard::{Denied, Guard, Refusal};
use super::limits::{HEADERS, STREAMS};
use ella_proto::access::Role;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use tonic::body::Body;
use tonic::codegen::http::request::Parts;
use tonic::codegen::http::{HeaderMap, Request, Response, header::AUTHORIZATION};
use tonic::codegen::{Body as HttpBody, Bytes, Service};
use tonic::server::NamedService;
use tonic::{Code, Status};

/// A service that only those reach whom the guard lets in.
#[derive(Clone)]
pub(super) struct Gate<S> {
    pub(super) inner: S,
    pub(super) guard: Guard,
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The one that is ready is this one, not its clone.
        let clone = self.inner.clone();
        let (mut inner, guard) = (std::mem::replace(&mut self.inner, clone), self.guard.clone());
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let stream = match enter(&guard, &head).await {
                Ok(stream) => stream,
                Err(status) => return Ok(status.into_http()),
            };
            let answer = inner.call(Request::from_parts(head, body)).await?;
            if Status::from_header_map(answer.headers()).is_some_and(|status| status.code() == Code::OutOfRange) {
                guard.turn_away(stream.0.address, Refusal::Oversized, "its message is too long");
            }
            Ok(answer.map(|body| Body::new(Counted { body, _stream: stream })))
        })
    }
}

/// What a call takes place as, if it may.
async fn enter(guard: &Guard, request: &Parts) -> Result<Open, Status> {
    // Every connection of the door's has one.
    let peer = request.extensions.get::<Arc<Peer>>().ok_or_else(|| Status::internal("a connection without a peer"))?;
    let stream = Open::new(peer.clone()).ok_or_else(|| {
        guard.turn_away(peer.address, Refusal::Streams, "too many streams are open on its connection");
        Status::resource_exhausted(format!("more than {STREAMS} streams are open on this connection"))
    })?;
    if length(&request.headers) > HEADERS {
        guard.turn_away(peer.address, Refusal::Headers, "its headers are too long");
        return Err(Status::resource_exhausted(format!("the headers are longer than {HEADERS} bytes")));
    }
    let needed = Role::of_method(request.uri.path().rsplit('/').next().unwrap_or_default());
    guard.admit(peer, bearer(&request.headers), needed).await.map_err(status)?;
    Ok(stream)
}

/// Bytes of all headers, with what HTTP/2 reckons for each.
pub(super) fn length(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

/// The secret that a call shows.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(AUTHORIZATION)?.as_bytes().strip_prefix(b"Bearer ")
}

fn status(denied: Denied) -> Status {
    let code = match denied {
        Denied::Missing(_) | Denied::Wrong(..) => Code::Unauthenticated,
        Denied::Role { .. } => Code::PermissionDenied,
        Denied::Unreviewed(_) => Code::Unavailable,
        Denied::Flood => Code::ResourceExhausted,
    };
    Status::new(code, denied.to_string())
}

/// A stream that is counted as long as it is open.
struct Open(Arc<Peer>);

impl Open {
    fn new(peer: Arc<Peer>) -> Option<Self> {
        // Counted first, and given back by the drop where there are too many.
        let before = peer.streams.fetch_add(1, Relaxed);
        let open = Self(peer);
        (before < STREAMS).then_some(open)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Relaxed);
    }
}

/// An answer, and the stream that it goes out on.
struct Counted {
    body: Body,
    _stream: Open,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}
