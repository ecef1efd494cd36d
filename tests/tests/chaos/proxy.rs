//! A proxy between workers and a store's server, which fails some of the requests, remembers all, and lends itself to kills in the midst
//! of one. It sends on what it gets as it is, `Host` too, for that is signed.

use anyhow::{Result, anyhow, bail};
use bytes::Bytes;
use ella_tests::Dice;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{CONNECTION, CONTENT_LENGTH, IF_NONE_MATCH, RETRY_AFTER, TRANSFER_ENCODING};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// Of so many requests one fails: 2 %.
const ONE_IN: u64 = 50;
/// A slow reply takes so many milliseconds, and up to twice that.
const SLOW: u64 = 1_000;

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// Refused, for the server is busy.
    Busy,
    /// The same, with how long to wait.
    BusyFor,
    /// The connection ends before the server has it.
    Reset,
    /// It takes effect, and the connection ends without a reply.
    Lost,
    /// The reply breaks off half-way.
    Cut,
    /// The reply comes late.
    Slow,
}

impl Fault {
    const ALL: [Self; 6] = [Self::Busy, Self::BusyFor, Self::Reset, Self::Lost, Self::Cut, Self::Slow];
}

/// When a worker is to be killed in the midst of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// The server has not seen it.
    Before,
    /// It took effect, and the worker has no reply yet.
    After,
}

/// A request that the server answered.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    /// Path and query.
    pub(crate) target: String,
    /// Only if nothing has that name.
    pub(crate) create: bool,
    pub(crate) status: StatusCode,
}

/// The workers' way to a server.
#[derive(Debug)]
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    /// By the worker's slot.
    ports: Vec<u16>,
    _runtime: Runtime,
}

#[derive(Debug)]
struct Shared {
    /// Host and port.
    server: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    dice: Dice,
    faults: BTreeMap<Fault, u64>,
    requests: u64,
    seen: Vec<Seen>,
    trap: Option<Trap>,
}

#[derive(Debug)]
struct Trap {
    when: When,
    sprung: mpsc::Sender<usize>,
}

/// A connection is ended without a reply.
#[derive(Debug)]
struct HungUp;

impl fmt::Display for HungUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("hung up")
    }
}

impl std::error::Error for HungUp {}

impl Proxy {
    /// A way for each of so many workers to the server at `http://HOST:PORT`.
    pub(crate) fn start(endpoint: &str, workers: usize, dice: Dice) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let server = endpoint.strip_prefix("http://").ok_or_else(|| anyhow!("the server is not at an http:// address"))?.to_owned();
        let state = State { dice, faults: BTreeMap::new(), requests: 0, seen: Vec::new(), trap: None };
        let shared = Arc::new(Shared { server, state: Mutex::new(state) });
        let mut ports = Vec::new();
        for slot in 0..workers {
            let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
            ports.push(listener.local_addr()?.port());
            runtime.spawn(serve(listener, Arc::clone(&shared), slot));
        }
        Ok(Self { shared, ports, _runtime: runtime })
    }

    /// Where the worker of a slot finds the server.
    pub(crate) fn endpoint(&self, slot: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[slot])
    }

    /// Objects that were created so far.
    pub(crate) fn created(&self) -> usize {
        self.shared.lock().seen.iter().filter(|seen| seen.made()).count()
    }

    /// The next write of any worker is not answered: its slot is told instead, for that worker to be killed.
    pub(crate) fn trap(&self, when: When) -> mpsc::Receiver<usize> {
        let (sprung, caught) = mpsc::channel();
        self.shared.lock().trap = Some(Trap { when, sprung });
        caught
    }

    /// Lets the next write pass after all. False if it is held already.
    pub(crate) fn disarm(&self) -> bool {
        self.shared.lock().trap.take().is_some()
    }

    /// All that the server answered.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.lock().seen.clone()
    }

    /// Requests, and how many of them failed in which way.
    pub(crate) fn faults(&self) -> (u64, BTreeMap<Fault, u64>) {
        let state = self.shared.lock();
        (state.requests, state.faults.clone())
    }
}

impl Seen {
    /// Whether it made an object that was not there.
    pub(crate) fn made(&self) -> bool {
        self.method == Method::PUT && self.create && self.status.is_success()
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, slot: usize) {
    while let Ok((connection, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        let answer = service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move { shared.answer(slot, request).await.map_err(|_| HungUp) }
        });
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(connection), answer);
        // It ends in an error where that is what is wanted, and where the worker dies.
        tokio::spawn(async move { drop(connection.await) });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, slot: usize, request: Request<hyper::body::Incoming>) -> Result<Response<Reply>> {
        let (head, body) = request.into_parts();
        let request = Request::from_parts(head, Full::new(body.collect().await?.to_bytes()));
        let (fault, trap) = self.draw(request.method());
        if let Some(Trap { when: When::Before, sprung }) = &trap {
            return held(sprung, slot).await;
        }
        match fault {
            Some(Fault::Busy) => return Ok(busy(None)?),
            Some(Fault::BusyFor) => return Ok(busy(Some("1"))?),
            Some(Fault::Reset) => bail!("reset"),
            Some(Fault::Slow) => self.dawdle().await,
            None | Some(Fault::Lost | Fault::Cut) => {}
        }
        let reply = self.pass_on(request).await?;
        match (trap, fault) {
            (Some(trap), _) => held(&trap.sprung, slot).await,
            (None, Some(Fault::Lost)) => bail!("lost"),
            (None, Some(Fault::Cut)) => cut(reply),
            (None, _) => Ok(reply.map(Reply::from)),
        }
    }

    async fn dawdle(&self) {
        let slowness = Duration::from_millis(SLOW + self.lock().dice.below(SLOW));
        tokio::time::sleep(slowness).await;
    }

    /// What becomes of a request.
    fn draw(&self, method: &Method) -> (Option<Fault>, Option<Trap>) {
        let mut state = self.lock();
        state.requests += 1;
        let trap = if *method == Method::PUT { state.trap.take() } else { None };
        let fault = match (state.dice.below(ONE_IN), &trap) {
            (0, None) => Some(Fault::ALL[state.dice.below(Fault::ALL.len() as u64) as usize]),
            _ => None,
        };
        if let Some(fault) = fault {
            *state.faults.entry(fault).or_default() += 1;
        }
        (fault, trap)
    }

    /// Asks the server, over a connection of its own.
    async fn pass_on(&self, request: Request<Full<Bytes>>) -> Result<Response<Bytes>> {
        let (method, target) = (request.method().clone(), request.uri().to_string());
        let create = request.headers().get(IF_NONE_MATCH).is_some_and(|value| value == "*");
        let server = TcpStream::connect(&self.server).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(server)).await?;
        tokio::spawn(async move { drop(connection.await) });
        let (mut head, body) = sender.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        self.lock().seen.push(Seen { method, target, create, status: head.status });
        // These are of the connection that has ended.
        head.headers.remove(CONNECTION);
        head.headers.remove(TRANSFER_ENCODING);
        Ok(Response::from_parts(head, body))
    }
}

/// Tells whom to kill, and never answers. The request ends with the worker.
async fn held<T>(sprung: &mpsc::Sender<usize>, slot: usize) -> Result<T> {
    sprung.send(slot)?;
    std::future::pending().await
}

fn busy(wait: Option<&str>) -> hyper::http::Result<Response<Reply>> {
    let reply = Response::builder().status(StatusCode::SERVICE_UNAVAILABLE);
    wait.iter().fold(reply, |reply, seconds| reply.header(RETRY_AFTER, *seconds)).body(Reply::default())
}

/// A reply whose head promises more than comes, after which the connection ends.
fn cut(mut reply: Response<Bytes>) -> Result<Response<Reply>> {
    let length = reply.body().len();
    if length < 2 {
        bail!("nothing to cut");
    }
    reply.headers_mut().insert(CONTENT_LENGTH, length.into());
    Ok(reply.map(|body| Reply { rest: Some(body.slice(..length / 2)), breaks_off: true }))
}

/// A reply's body.
#[derive(Debug, Default)]
struct Reply {
    rest: Option<Bytes>,
    breaks_off: bool,
}

impl From<Bytes> for Reply {
    fn from(bytes: Bytes) -> Self {
        Self { rest: Some(bytes), breaks_off: false }
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = HungUp;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HungUp>>> {
        Poll::Ready(match self.rest.take() {
            Some(bytes) => Some(Ok(Frame::data(bytes))),
            None => self.breaks_off.then_some(Err(HungUp)),
        })
    }

    /// None if it breaks off: hyper would believe it rather than the head.
    fn size_hint(&self) -> SizeHint {
        let length = self.rest.as_ref().map_or(0, Bytes::len) as u64;
        if self.breaks_off { SizeHint::default() } else { SizeHint::with_exact(length) }
    }
}
