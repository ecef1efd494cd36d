//! One stream to one coordinator: opened, welcomed, watched.

use super::ControlError;
use super::Message;
use crate::vitals;
use ella_proto::access::{Access, Client};
use ella_proto::v1::{FromWorker, Heartbeat, Hello, Refused, RefusedReason, StatusRequest, ToWorker, Welcome, from_worker};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::net::{UdpSocket, lookup_host};
use tokio::time::{MissedTickBehavior, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

/// Messages that may wait for a coordinator that does not read. What may be lost (progress, heartbeats) takes at most half of it; the
/// other half is for commits, of which each has four messages at most.
pub(super) const BACKLOG: usize = 4096;
/// Questions in a row that a coordinator may leave unanswered. More than one, so that a stop of this process counts as one at most.
const PROBES: u32 = 4;
/// The first and the longest pause between two tries to reach a coordinator.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Pauses between tries to reach a coordinator: each is twice as long as the one before, up to the longest, less up to half of it by chance. Thousands of
/// workers that have lost one coordinator at the same moment do not come to the next at the same moment.
pub(crate) struct Pauses(Duration);

impl Pauses {
    pub(crate) fn new() -> Self {
        Self(PAUSES.0)
    }

    pub(crate) fn longer(&mut self) -> Duration {
        let most = self.0;
        self.0 = (2 * most).min(PAUSES.1);
        // The standard library seeds each hasher from the system's randomness.
        let chance = (RandomState::new().build_hasher().finish() >> 11) as f64 / (1_u64 << 53) as f64;
        most.mul_f64(1.0 - chance / 2.0)
    }
}

/// A stream to a coordinator that has welcomed this worker.
pub(crate) struct Link {
    /// None if the coordinator is in this process.
    client: Option<Client>,
    pub(crate) out: tokio::sync::mpsc::Sender<FromWorker>,
    pub(crate) incoming: BoxStream<'static, Result<ToWorker, Status>>,
    /// The coordinator's.
    pub(crate) term: u64,
    /// The generation that it is at.
    pub(crate) generation: u64,
    pub(crate) welcome: Welcome,
}

impl Link {
    /// The same, again and again for `patience` while nobody answers: a worker may be there before its coordinator.
    pub(crate) async fn open_patiently(access: &Access, hello: &Hello, patience: Duration) -> Result<Self, ControlError> {
        // What is no URL never will be one.
        endpoint(access)?;
        let (until, mut pauses, mut told) = (Instant::now() + patience, Pauses::new(), false);
        loop {
            let error = match Self::open(access, hello.clone()).await {
                Err(error @ (ControlError::Unreachable { .. } | ControlError::Late { .. } | ControlError::Unwelcomed(_))) => error,
                other => return other,
            };
            let pause = pauses.longer();
            if Instant::now() + pause >= until {
                return Err(error);
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("{error}; trying again for {} s", patience.as_secs());
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Connects, says hello, and waits for the welcome.
    pub(crate) async fn open(access: &Access, hello: Hello) -> Result<Self, ControlError> {
        let mut client = connect(access, CONNECT_TIMEOUT).await?;
        let hello = to_be_called(access, hello).await?;
        let (out, outgoing) = tokio::sync::mpsc::channel(BACKLOG);
        // The stream opens with its first message.
        let first = FromWorker { term: 0, generation: 0, body: Some(from_worker::Body::Hello(hello)) };
        let outgoing = tokio_stream::once(first).chain(ReceiverStream::new(outgoing));
        let answer = deadline("answer", CONNECT_TIMEOUT, client.attach(outgoing)).await?;
        let incoming = answer.map_err(|status| unanswered(&access.url, &status))?.into_inner().boxed();
        Self::welcomed(Some(client), out, incoming).await
    }

    /// The same for a coordinator in this process.
    pub(crate) async fn within(
        out: tokio::sync::mpsc::Sender<FromWorker>,
        incoming: tokio::sync::mpsc::Receiver<Box<ToWorker>>,
        hello: Hello,
    ) -> Result<Self, ControlError> {
        // A closed queue shows as the end of what comes in.
        let _ = out.send(FromWorker { term: 0, generation: 0, body: Some(from_worker::Body::Hello(hello)) }).await;
        Self::welcomed(None, out, ReceiverStream::new(incoming).map(|message| Ok(*message)).boxed()).await
    }

    /// Takes the first message for what it must be.
    async fn welcomed(
        client: Option<Client>,
        out: tokio::sync::mpsc::Sender<FromWorker>,
        mut incoming: BoxStream<'static, Result<ToWorker, Status>>,
    ) -> Result<Self, ControlError> {
        let first = deadline("welcome", CONNECT_TIMEOUT, incoming.next()).await?.transpose();
        let first = first.map_err(|e| ControlError::Unwelcomed(e.message().to_owned()))?;
        match first.and_then(|m| Some((m.term, m.generation, m.body?))) {
            Some((term, generation, Message::Welcome(welcome))) => Ok(Self { client, out, incoming, term, generation, welcome }),
            Some((_, _, Message::Refused(refused))) => Err(refusal(refused)),
            _ => Err(ControlError::Unwelcomed("its first message was no welcome".to_owned())),
        }
    }

    /// Returns when the coordinator has answered nothing for `patience`; never, if it is in this process.
    pub(crate) fn silent(&self, patience: Duration) -> impl Future<Output = ()> + Send + 'static {
        let client = self.client.clone();
        async move {
            match client {
                Some(client) => silent(client, patience).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Sends signs of life until it is dropped.
    pub(crate) fn beating(&self) -> AbortOnDropHandle<()> {
        let (out, term) = (self.out.clone(), self.term);
        let every = Duration::from_millis(self.welcome.heartbeat_ms.max(1));
        AbortOnDropHandle::new(tokio::spawn(ticking(every, move || {
            // What is behind already needs no signs of life.
            if out.capacity() <= BACKLOG / 2 {
                return !out.is_closed();
            }
            let counts = vitals::news();
            let beat = Heartbeat { vitals: Some(vitals::look(0)), counts: counts.clone(), ..Heartbeat::default() };
            let told = out.try_send(FromWorker { term, generation: 0, body: Some(from_worker::Body::Heartbeat(beat)) });
            told.inspect_err(|_| vitals::untold(&counts)).is_ok() || !out.is_closed()
        })))
    }
}

/// Does something again and again, as long as it says so.
pub(super) async fn ticking(every: Duration, mut act: impl FnMut() -> bool) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if !act() {
            return;
        }
    }
}

/// Who this process is, but for what it computes on. The id is new in every call.
pub(crate) fn identity() -> std::io::Result<Hello> {
    let mut id = [0u8; 16];
    std::fs::File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut id))?;
    Ok(Hello {
        worker_id: id.iter().map(|b| format!("{b:02x}")).collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        pid: std::process::id(),
        ..Hello::default()
    })
}

fn endpoint(access: &Access) -> Result<Endpoint, ControlError> {
    let endpoint = access.endpoint().map_err(|reason| unreachable(&access.url, &reason))?;
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true))
}

async fn connect(access: &Access, patience: Duration) -> Result<Client, ControlError> {
    let Ok(client) = timeout(patience, access.connect(&endpoint(access)?)).await else {
        let seconds = patience.as_secs();
        let message = format!("no connection within {seconds} s: the name server, the machine or its TLS does not answer");
        return Err(unreachable(&access.url, &message));
    };
    client.map_err(|e| unreachable(&access.url, &ella_proto::with_causes(&e)))
}

/// A worker that listens on all addresses (`0.0.0.0`) and advertises none is to be called at the one that its machine has towards the coordinator.
/// At the next attach that may be another one.
async fn to_be_called(access: &Access, hello: Hello) -> Result<Hello, ControlError> {
    let Some(listens) = hello.peer_address.parse().ok().filter(|at: &SocketAddr| at.ip().is_unspecified()) else { return Ok(hello) };
    let peer_address =
        match timeout(CONNECT_TIMEOUT, own_address(&endpoint(access)?, listens)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())) {
            Ok(own) => SocketAddr::new(own, listens.port()).to_string(),
            Err(error) => {
                tracing::warn!("{listens} is no address for other workers to call ({error}): give this worker's with --advertise");
                hello.peer_address
            }
        };
    Ok(Hello { peer_address, ..hello })
}

/// This machine's address on its way to where `endpoint` is, of a kind that `listens` takes calls at. Nothing is sent.
async fn own_address(endpoint: &Endpoint, listens: SocketAddr) -> io::Result<IpAddr> {
    let uri = endpoint.uri();
    let coordinator = format!("{}:{}", uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(80));
    let mut found = lookup_host(coordinator).await?;
    let to = found.find(|to| to.is_ipv4() || listens.is_ipv6()).ok_or(io::ErrorKind::AddrNotAvailable)?;
    let socket = UdpSocket::bind(SocketAddr::new(if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, 0)).await?;
    socket.connect(to).await?;
    Ok(socket.local_addr()?.ip())
}

/// Why there is no stream: whoever answers does not let this worker in, or is no coordinator that can be spoken to.
fn unanswered(url: &str, status: &Status) -> ControlError {
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => {
            ControlError::NoEntry { url: url.to_owned(), reason: status.message().to_owned() }
        }
        _ => unreachable(url, &ella_proto::with_causes(status)),
    }
}

fn unreachable(url: &str, message: &str) -> ControlError {
    ControlError::Unreachable { url: url.to_owned(), message: message.to_owned() }
}

async fn deadline<T>(what: &'static str, patience: Duration, wait: impl Future<Output = T>) -> Result<T, ControlError> {
    timeout(patience, wait).await.map_err(|_| ControlError::Late { what, seconds: patience.as_secs() })
}

/// Asks again and again whether the coordinator still answers, and returns when it has not for `patience`. Whatever it answers, it is
/// there; that it is not will be seen on the stream too, unless it is stopped or cut off.
async fn silent(mut client: Client, patience: Duration) {
    let each = patience / PROBES;
    let mut unanswered = 0;
    while unanswered < PROBES {
        match timeout(each, client.status(StatusRequest { alive: true })).await {
            Ok(_) => {
                unanswered = 0;
                tokio::time::sleep(each).await;
            }
            Err(_) => unanswered += 1,
        }
    }
}

pub(super) fn refusal(refused: Refused) -> ControlError {
    let (reason, outcome, permanent) = (refused.reason(), refused.outcome(), refused.permanent);
    let detail = if refused.detail.is_empty() { reason.as_str_name().to_owned() } else { refused.detail };
    match reason {
        RefusedReason::RunOver => ControlError::Over { outcome, detail, permanent },
        reason => ControlError::Refused { reason, detail, permanent },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_proto::access::{ClientTls, TlsFiles};

    #[test]
    fn workers_that_have_lost_a_coordinator_at_once_do_not_come_to_the_next_at_once() {
        let mut first = Pauses::new();
        let pauses: Vec<Duration> = (0..9).map(|_| first.longer()).collect();
        for (pause, most) in pauses.iter().zip([50, 100, 200, 400, 800, 1600, 2000, 2000, 2000].map(Duration::from_millis)) {
            assert!(*pause <= most && 2 * *pause >= most, "{pauses:?}");
        }
        let others: std::collections::BTreeSet<Duration> = (0..100).map(|_| Pauses::new().longer()).collect();
        assert!(others.len() > 90, "{others:?}");
    }

    #[tokio::test]
    async fn a_worker_that_listens_on_all_addresses_is_called_at_its_own_towards_the_coordinator() {
        for (url, listens, called) in [
            ("http://127.0.0.1:9", "0.0.0.0:4000", "127.0.0.1:4000"),
            ("http://127.0.0.1:9", "[::]:4000", "127.0.0.1:4000"),
            ("http://127.0.0.1:9", "10.0.0.7:4000", "10.0.0.7:4000"),
            ("http://127.0.0.1:9", "worker-3.ella:4000", "worker-3.ella:4000"),
            // It would not hear calls there.
            ("http://[::1]:9", "0.0.0.0:4000", "0.0.0.0:4000"),
        ] {
            let hello = Hello { peer_address: listens.to_owned(), ..Hello::default() };
            assert_eq!(to_be_called(&url.into(), hello).await.unwrap().peer_address, called, "{url} {listens}");
        }
    }

    /// As where the name server does not answer: nothing else has a deadline then.
    #[tokio::test]
    async fn a_connection_that_does_not_come_to_be_names_the_coordinator() {
        // It takes the call, and says nothing in the handshake.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", silent.local_addr().unwrap());
        let ca = concat!(env!("CARGO_MANIFEST_DIR"), "/src/reduce/tcp/certs/ours/ca.crt");
        let tls = ClientTls::load(&TlsFiles { ca: Some(ca.into()), ..TlsFiles::default() }).unwrap();
        let access = Access { url: url.clone(), token: None, tls: Some(tls) };
        let error = connect(&access, Duration::from_millis(50)).await.err().unwrap().to_string();
        assert!(error.starts_with(&format!("{url}: no coordinator answers (no connection within 0 s: the name server")), "{error}");
    }
}
