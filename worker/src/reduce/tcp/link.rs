//! One connection of the ring, in clear text or under TLS: whoever reads and writes need not know which. Nothing here blocks, and a handshake
//! goes on by itself while one reads.
//!
//! Under TLS bytes may be on their way within this process: received and not read yet, which no poll tells of, so a reader goes on until it
//! would have to wait; and taken to be sent but not sent yet ([`Link::holds`]), which a writer waits for.

use std::io::{self, BufReader, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use ella_proto::access::PeerTls;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustls::{ClientConnection, Connection, ServerConnection};

use super::CHUNK;
use super::ring::{poll_for, transient};

/// A connection that does not block.
#[derive(Debug)]
pub(super) enum Link {
    Clear(TcpStream),
    Tls(Box<Tls>),
}

/// A session of TLS. None is closed with a word: an operation knows by its lengths whether all has come, and who hangs up earlier is lost.
#[derive(Debug)]
pub(super) struct Tls {
    /// Buffered, for rustls asks for 4 KiB at a time.
    stream: BufReader<TcpStream>,
    pub(super) session: Connection,
}

impl Link {
    /// On a connection to `address`, which may not stand yet.
    pub(super) fn calls(stream: TcpStream, address: IpAddr, tls: Option<&PeerTls>) -> io::Result<Self> {
        let session = |tls: &PeerTls| ClientConnection::new(Arc::clone(&tls.calls), address.into()).map(Connection::from);
        Self::new(stream, tls.map(session).transpose())
    }

    /// On a connection that another has opened.
    pub(super) fn called(stream: TcpStream, tls: Option<&PeerTls>) -> io::Result<Self> {
        let session = |tls: &PeerTls| ServerConnection::new(Arc::clone(&tls.called)).map(Connection::from);
        Self::new(stream, tls.map(session).transpose())
    }

    fn new(stream: TcpStream, session: Result<Option<Connection>, rustls::Error>) -> io::Result<Self> {
        let Some(mut session) = session.map_err(io::Error::other)? else { return Ok(Self::Clear(stream)) };
        session.set_buffer_limit(Some(CHUNK));
        Ok(Self::Tls(Box::new(Tls { stream: BufReader::with_capacity(CHUNK, stream), session })))
    }

    /// Reads what has come: none if the other side has hung up.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Clear(stream) => stream.read(buffer),
            Self::Tls(tls) => tls.read(buffer),
        }
    }

    /// Takes bytes to be sent, and sends what can go without waiting; says how many were taken. Would have to wait only if nothing got on.
    pub(super) fn write(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Clear(stream) => Wire(stream).write_vectored(parts),
            Self::Tls(tls) => tls.write(parts),
        }
    }

    /// Says the first bytes on a connection, which its buffer always holds.
    pub(super) fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        let taken = self.write(&[IoSlice::new(bytes)])?;
        if taken < bytes.len() || self.holds() { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }

    /// Whether the handshake is not over yet; reading goes on with it.
    pub(super) fn is_handshaking(&self) -> bool {
        matches!(self, Self::Tls(tls) if tls.session.is_handshaking())
    }

    /// What this session of TLS has and no other, whoever made both (RFC 9266); once the handshake is over. None in clear text.
    pub(super) fn binding(&self) -> io::Result<Option<[u8; 32]>> {
        let Self::Tls(tls) = self else { return Ok(None) };
        tls.session.export_keying_material([0; 32], b"EXPORTER-Channel-Binding", None).map(Some).map_err(io::Error::other)
    }

    /// Whether the other side has hung up.
    pub(super) fn is_closed(&self) -> bool {
        let mut file = [PollFd::new(self, PollFlags::RDHUP)];
        poll_for(&mut file, Duration::ZERO).is_ok() && !file[0].revents().is_empty()
    }

    /// Whether it has taken what is not sent yet.
    pub(super) fn holds(&self) -> bool {
        match self {
            Self::Clear(_) => false,
            Self::Tls(tls) => tls.session.wants_write(),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Clear(stream) => stream.as_fd(),
            Self::Tls(tls) => tls.stream.get_ref().as_fd(),
        }
    }
}

impl Tls {
    /// As much as there is room for and has come: every wait and every sending on costs a call of the system.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.session.reader().read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => match self.receive() {
                    Ok(()) => {}
                    Err(error) if filled > 0 && transient(&error) => break,
                    Err(error) => return Err(error),
                },
                // It has hung up without a word.
                Err(_) => break,
            }
        }
        Ok(filled)
    }

    /// Takes in what has come, and answers it where the handshake asks for that.
    fn receive(&mut self) -> io::Result<()> {
        // A connection that takes nothing any more shows it when one reads, after what the other side has said last.
        let _ = self.flush();
        self.session.read_tls(&mut self.stream)?;
        self.session.process_new_packets().map(drop).map_err(|error| {
            // The alert that tells the other side.
            let _ = self.flush();
            io::Error::new(ErrorKind::InvalidData, error)
        })
    }

    fn write(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let taken = self.session.writer().write_vectored(parts)?;
        let sent = self.flush()?;
        if taken == 0 && sent == 0 { Err(ErrorKind::WouldBlock.into()) } else { Ok(taken) }
    }

    /// Sends what can go without waiting; says how much.
    fn flush(&mut self) -> io::Result<usize> {
        let mut sent = 0;
        while self.session.wants_write() {
            match self.session.write_tls(&mut Wire(self.stream.get_ref())) {
                Ok(n) => sent += n,
                Err(error) if transient(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }
}

/// A socket to write to: where nobody is at its other end any more, that is an error and no signal.
struct Wire<'a>(&'a TcpStream);

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(sendmsg(self.0, parts, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
