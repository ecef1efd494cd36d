//! Connections as they come in: counted, put through TLS if there are certificates, and cut off if they do not show soon what lets them in.

use super::flood::host;
use super::guard::{Guard, Refusal};
use super::limits::{CONNECTIONS, STRANGE, STRANGERS, STRANGERS_OF_ONE, TCP_KEEPALIVE};
use ella_proto::access::tls::Reloaded;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

/// Connections that may wait to be served.
const WAITING: usize = 64;
/// How long to wait when the system has no more files to give.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// First bytes of HTTP/1.1 and HTTP/2, where a TLS record is expected: whoever sends them forgot the `s` of `https`.
const PLAIN: &str = "it speaks no TLS: its address must begin with https://, and --tls-ca be given";

/// The room for connections, of both ports.
#[derive(Debug, Default)]
pub(super) struct Room {
    open: AtomicUsize,
    strangers: Mutex<HashMap<IpAddr, usize>>,
}

impl Room {
    fn strangers(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a stranger, if there is one.
    fn take(self: &Arc<Self>, address: SocketAddr) -> Result<Peer, &'static str> {
        let mut strangers = self.strangers();
        let all: usize = strangers.values().sum();
        let of_one = strangers.get(&host(address.ip())).copied().unwrap_or_default();
        let full = [
            (self.open.load(Relaxed) >= CONNECTIONS, "too many connections are open"),
            (all >= STRANGERS, "too many connections have shown nothing yet that lets them in"),
            (of_one >= STRANGERS_OF_ONE, "too many connections of its address have shown nothing yet that lets them in"),
        ];
        if let Some((_, why)) = full.iter().find(|(full, _)| *full) {
            return Err(why);
        }
        strangers.insert(host(address.ip()), of_one + 1);
        self.open.fetch_add(1, Relaxed);
        Ok(Peer { address, names: None, streams: AtomicUsize::new(0), known: AtomicBool::new(false), room: self.clone() })
    }
}

/// Whom a connection is with.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// Of its certificate, if it showed one: DNS names and URIs.
    pub(super) names: Option<Vec<String>>,
    /// That are open.
    pub(super) streams: AtomicUsize,
    known: AtomicBool,
    room: Arc<Room>,
}

impl Peer {
    /// It has shown what lets it in.
    pub(super) fn is_known(&self) {
        if !self.known.swap(true, Relaxed) {
            self.leave_strangers();
        }
    }

    fn leave_strangers(&self) {
        let (mut strangers, key) = (self.room.strangers(), host(self.address.ip()));
        if let Some(count) = strangers.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                strangers.remove(&key);
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.is_known();
        self.room.open.fetch_sub(1, Relaxed);
    }
}

/// A connection that is served.
pub(super) struct Connection {
    stream: Stream,
    pub(super) peer: Arc<Peer>,
    guard: Guard,
    /// Until when it must be known.
    until: Option<Pin<Box<Sleep>>>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Lets connections in until `shutdown`. One that is not taken up ends there.
pub(super) fn open(
    listener: TcpListener,
    tls: Option<Arc<Reloaded<ServerConfig>>>,
    (guard, room): (Guard, Arc<Room>),
    shutdown: CancellationToken,
) -> mpsc::Receiver<Connection> {
    let (out, connections) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        // Where nobody takes connections up any more, as after the end of what serves them, nothing listens either.
        let unserved = out.clone();
        tokio::select! {
            () = accept(&listener, tls, (guard, room), out) => {}
            () = unserved.closed() => {}
            () = shutdown.cancelled_owned() => {}
        }
    });
    connections
}

async fn accept(
    listener: &TcpListener,
    tls: Option<Arc<Reloaded<ServerConfig>>>,
    (guard, room): (Guard, Arc<Room>),
    out: mpsc::Sender<Connection>,
) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                let Some(peer) = seated(address, &guard, &room) else { continue };
                let (tls, guard, out) = (tls.as_ref().map(|tls| tls.newest()), guard.clone(), out.clone());
                tokio::spawn(async move {
                    if let Some(connection) = greet(stream, peer, tls, guard).await {
                        // No receiver: the coordinator leaves.
                        let _ = out.send(connection).await;
                    }
                });
            }
            Err(error) => {
                tracing::warn!("a connection cannot be taken ({error}); trying again");
                tokio::time::sleep(EXHAUSTED).await;
            }
        }
    }
}

fn seated(address: SocketAddr, guard: &Guard, room: &Arc<Room>) -> Option<Peer> {
    room.take(address).inspect_err(|why| guard.turn_away(address, Refusal::Crowd, why)).ok()
}

/// Sets a connection up, through TLS if there is a config for it.
async fn greet(stream: TcpStream, mut peer: Peer, tls: Option<Arc<ServerConfig>>, guard: Guard) -> Option<Connection> {
    let until = Instant::now() + STRANGE;
    let keepalive = socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE);
    let set = stream.set_nodelay(true).and_then(|()| socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = set {
        // It is gone already.
        tracing::debug!("{}: {error}", peer.address);
        return None;
    }
    let stream = match tls {
        None => Stream::Plain(stream),
        Some(config) => match tokio::time::timeout_at(until, TlsAcceptor::from(config).accept(stream)).await {
            Ok(Ok(stream)) => {
                peer.names = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).map(names);
                Stream::Tls(Box::new(stream))
            }
            Ok(Err(error)) => {
                guard.turn_away(peer.address, Refusal::Handshake, &why(&error));
                return None;
            }
            Err(_) => {
                guard.turn_away(peer.address, Refusal::Silent, "its TLS handshake took too long");
                return None;
            }
        },
    };
    Some(Connection { stream, peer: Arc::new(peer), guard, until: Some(Box::pin(tokio::time::sleep_until(until))) })
}

/// Why a handshake failed, in words.
fn why(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidMessage(_)) => PLAIN.to_owned(),
        Some(error) => format!("its TLS handshake failed ({error})"),
        None => format!("its TLS handshake failed ({error})"),
    }
}

/// The names that a certificate is for. One that has none, or can't be read, names nobody.
fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = webpki::EndEntityCert::try_from(certificate) else { return Vec::new() };
    certificate.valid_dns_names().chain(certificate.valid_uri_names()).map(str::to_owned).collect()
}

impl Connection {
    /// Whether it has been a stranger for too long.
    fn is_overdue(&mut self, context: &mut Context<'_>) -> bool {
        let Some(until) = &mut self.until else { return false };
        if self.peer.known.load(Relaxed) {
            self.until = None;
            return false;
        }
        if until.as_mut().poll(context).is_pending() {
            return false;
        }
        self.until = None;
        self.guard.turn_away(self.peer.address, Refusal::Silent, "its connection showed nothing that lets it in");
        true
    }
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_overdue(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, into),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, into),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn there_is_so_much_room_for_strangers_and_more_for_the_known() {
        let room = Arc::new(Room::default());
        let address = |n: u32| SocketAddr::from((std::net::Ipv4Addr::from_bits(n), 7));
        let mut peers: Vec<Peer> = (0..STRANGERS_OF_ONE).map(|_| room.take(address(1)).unwrap()).collect();
        assert!(room.take(address(1)).unwrap_err().contains("of its address"));
        peers[0].is_known();
        peers[0].is_known();
        peers.push(room.take(address(1)).unwrap());
        let crowd = (2..).map(|n| room.take(address(n)));
        peers.extend(crowd.map_while(|taken| taken.map_err(|why| assert!(why.contains("have shown nothing yet"), "{why}")).ok()));
        assert_eq!(peers.len(), STRANGERS + 1);
        drop(peers);
        assert_eq!(room.open.load(Relaxed), 0);
        assert!(room.strangers().values().all(|count| *count == 0), "{room:?}");
    }
}
