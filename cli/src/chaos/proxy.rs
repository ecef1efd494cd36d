//! Doors between processes: each lets connections through to one address, until it is told not to.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::time::timeout;

/// What is passed on at once.
const BUFFER: usize = 256 << 10;
/// How long a connection through may take.
const CONNECT: Duration = Duration::from_secs(3);

/// Whether something goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Open,
    /// Nothing goes through, and nobody is told: what is sent meanwhile arrives later, as on a network that loses packets.
    Held,
    /// Connections are reset, and so are new ones.
    Cut,
}

/// All doors. They are served by a thread of their own.
#[derive(Debug)]
pub(super) struct Network {
    runtime: Option<Runtime>,
}

/// One of them; it closes when this is dropped.
#[derive(Debug)]
pub(super) struct Door {
    address: SocketAddr,
    to: watch::Sender<Option<SocketAddr>>,
    way: watch::Sender<Way>,
}

impl Network {
    pub(super) fn new() -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// An open door that leads nowhere yet.
    pub(super) fn door(&self) -> io::Result<Door> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let ((to, towards), (way, ways)) = (watch::channel(None), watch::channel(Way::Open));
        if let Some(runtime) = &self.runtime {
            runtime.spawn(serve(listener, towards, ways));
        }
        Ok(Door { address, to, way })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // It may be dropped within another runtime, where nothing may be waited for.
            runtime.shutdown_background();
        }
    }
}

impl Door {
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// New connections lead there; to nobody if none.
    pub(super) fn lead(&self, to: Option<SocketAddr>) {
        self.to.send_replace(to);
    }

    pub(super) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

async fn serve(listener: std::net::TcpListener, to: watch::Receiver<Option<SocketAddr>>, way: watch::Receiver<Way>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let mut door = way.clone();
    loop {
        tokio::select! {
            // The door is gone.
            gone = door.wait_for(|_| false) => if gone.is_err() { return },
            connection = listener.accept() => if let Ok((connection, _)) = connection {
                tokio::spawn(pass(connection, to.clone(), way.clone()));
            },
        }
    }
}

/// Serves one connection, until either side ends it or it is cut.
async fn pass(from: TcpStream, to: watch::Receiver<Option<SocketAddr>>, mut way: watch::Receiver<Way>) {
    if is_cut(&mut way).await {
        return reset(&from);
    }
    let Some(to) = *to.borrow() else { return reset(&from) };
    let Ok(Ok(to)) = timeout(CONNECT, TcpStream::connect(to)).await else { return reset(&from) };
    if from.set_nodelay(true).and_then(|()| to.set_nodelay(true)).is_err() {
        return;
    }
    let ((read, write), (read_back, write_back)) = (from.into_split(), to.into_split());
    let (there, back) = (copy(read, write_back, way.clone()), copy(read_back, write, way.clone()));
    tokio::select! {
        _ = async { tokio::try_join!(there, back) } => {}
        _ = way.wait_for(|way| *way == Way::Cut) => {}
    }
}

/// A connection that is closed so tells the other side at once, whatever it was sending.
fn reset(connection: &TcpStream) {
    // The deprecation is of a wait in Drop, which zero has not.
    #[allow(deprecated)]
    let _ = connection.set_linger(Some(Duration::ZERO));
}

/// Waits while nothing goes through.
async fn is_cut(way: &mut watch::Receiver<Way>) -> bool {
    way.wait_for(|way| *way != Way::Held).await.is_ok_and(|way| *way == Way::Cut)
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: watch::Receiver<Way>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await;
        if is_cut(&mut way).await {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        match read? {
            0 => return to.shutdown().await,
            n => to.write_all(&buffer[..n]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends what it gets back.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let (mut read, mut write) = connection.into_split();
                tokio::spawn(async move { drop(tokio::io::copy(&mut read, &mut write).await) });
            }
        });
        address
    }

    async fn said(connection: &mut TcpStream, word: &[u8; 4]) -> io::Result<[u8; 4]> {
        let mut answer = [0; 4];
        connection.write_all(word).await?;
        connection.read_exact(&mut answer).await?;
        Ok(answer)
    }

    /// The same over a new connection, which may be reset before it is known here.
    async fn tried(door: &Door, word: &[u8; 4]) -> io::Result<[u8; 4]> {
        said(&mut TcpStream::connect(door.address()).await?, word).await
    }

    #[tokio::test]
    async fn what_is_held_arrives_later_and_what_is_cut_never() {
        let network = Network::new().unwrap();
        let door = network.door().unwrap();
        assert!(tried(&door, b"open").await.is_err(), "it leads nowhere");
        door.lead(Some(echo().await));
        let mut connection = TcpStream::connect(door.address()).await.unwrap();
        assert_eq!(said(&mut connection, b"open").await.unwrap(), *b"open");
        door.set(Way::Held);
        assert!(timeout(Duration::from_millis(50), said(&mut connection, b"held")).await.is_err());
        door.set(Way::Open);
        let mut late = [0; 4];
        connection.read_exact(&mut late).await.unwrap();
        assert_eq!(late, *b"held");
        door.set(Way::Cut);
        assert!(said(&mut connection, b"gone").await.is_err());
        assert!(tried(&door, b"gone").await.is_err());
        door.set(Way::Open);
        assert_eq!(tried(&door, b"back").await.unwrap(), *b"back");
    }
}
