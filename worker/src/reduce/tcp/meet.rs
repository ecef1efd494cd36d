//! Closing the ring: every rank calls the next one and lets in the one before, and nobody else.
//!
//! One loop does both, without blocking anywhere: a caller that says nothing, or the wrong thing, delays nobody. Where ranks have certificates
//! all of it is said under TLS: a handshake is one more thing that a caller may not come through.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ella_proto::access::PeerTls;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustls::{Error as TlsError, InvalidMessage};

use super::Listener;
use super::hello::{Hello, Key, Nonce, Refusal, nonce};
use super::link::Link;
use super::ring::{Links, poll_for, transient};
use crate::reduce::{CollectiveError, Result};

/// The first pause before the next rank is called again; it doubles up to the second.
const RETRY: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];
/// How long a called rank may take to answer before it is called afresh.
const ANSWER: Duration = Duration::from_secs(5);
/// So many callers may be silent at once; a further one takes the oldest one's place.
const SILENT: usize = 32;
/// What TLS that is called says to who does not speak it: an alert.
const ALERT: [u8; 2] = [21, 3];

/// Who meets.
#[derive(Clone, Copy)]
pub struct Membership {
    /// This rank.
    pub rank: u32,
    /// The number of ranks.
    pub world: u32,
    /// Where the next rank listens; of the last one, where rank 0 does.
    pub next: SocketAddr,
    /// The generation's secret, which is never sent. Whoever does not know it is a stranger.
    pub session: [u8; 16],
    /// The generation. Messages of others are refused (TERM).
    pub generation: u64,
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, world, next, generation, .. } = self;
        write!(f, "Membership(rank {rank} of {world}, next {next}, generation {generation})")
    }
}

impl Membership {
    fn next(&self) -> u32 {
        (self.rank + 1) % self.world
    }

    fn prev(&self) -> u32 {
        (self.rank + self.world - 1) % self.world
    }

    fn hello(&self, nonce: Nonce, to: u32, verdict: Option<Refusal>) -> Hello {
        Hello { nonce, generation: self.generation, world: self.world, from: self.rank, to, verdict }
    }
}

/// Callers that were sent away, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Spoke another protocol.
    pub garbage: u64,
    /// Spoke another version of this one.
    pub version: u64,
    /// Did not prove the generation's secret: of another run, or strangers.
    pub session: u64,
    /// Belonged to another generation.
    pub generation: u64,
    /// Were not the rank that was awaited.
    pub rank: u64,
    /// Said nothing, or not enough.
    pub silent: u64,
    /// Spoke TLS where this rank does not, or did not where it does.
    pub one_sided: u64,
    /// Had a certificate that will not do, or did not take this rank's.
    pub handshake: u64,
}

impl Refusals {
    fn count(&mut self, refusal: Refusal) {
        let counter = match refusal {
            Refusal::Garbage => &mut self.garbage,
            Refusal::Version => &mut self.version,
            Refusal::Session => &mut self.session,
            Refusal::Generation => &mut self.generation,
            Refusal::Rank => &mut self.rank,
            Refusal::Tls | Refusal::Clear => &mut self.one_sided,
            Refusal::Handshake => &mut self.handshake,
        };
        *counter += 1;
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { garbage, version, session, generation, rank, silent, one_sided, handshake } = self;
        write!(
            f,
            "{garbage} of another protocol, {version} of another version, {session} of another run or strangers, {generation} of another generation, \
             {rank} of another rank, {silent} silent, {one_sided} with TLS on one side only, {handshake} that failed in its handshake"
        )
    }
}

/// Meets the neighbours, or fails within `timeout`; within `unreached`, if nothing that may be the next rank is there all that time.
pub(super) fn meet(listener: &Listener, who: &Membership, (timeout, unreached): (Duration, Duration)) -> Result<(Links, Refusals)> {
    let now = Instant::now();
    let mut meeting = Meeting {
        listener,
        who,
        tls: listener.tls(),
        key: Key::new(&who.session),
        heard: Vec::new(),
        began: now,
        timeout,
        missed: now,
        unreached,
        call: Call::Pause { until: now },
        pause: RETRY[0],
        tried: "not called yet".into(),
        one_sided: false,
        callers: Vec::new(),
        prev: None,
        refused: Refusals::default(),
    };
    meeting.run()
}

/// The call to the next rank.
enum Call {
    /// Waiting to call again.
    Pause { until: Instant },
    /// Waiting for the connection.
    Ringing { stream: TcpStream, until: Instant },
    /// Waiting for the answer to the greeting, whose nonce it has once that is said: after the handshake.
    Greeted { caller: Greeting, said: Option<Nonce>, until: Instant },
    /// Answered, by the right one.
    Through(Link),
}

/// A connection on which a greeting is arriving.
struct Greeting {
    link: Link,
    bytes: [u8; Hello::LEN],
    received: usize,
}

impl Greeting {
    fn new(link: Link) -> Self {
        Self { link, bytes: [0; Hello::LEN], received: 0 }
    }

    /// The greeting, once all of it has come.
    fn read(&mut self) -> io::Result<Option<std::result::Result<Hello, Refusal>>> {
        while self.received < Hello::LEN {
            match self.link.read(&mut self.bytes[self.received..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.received += n,
                Err(error) if transient(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(Hello::decode(&self.bytes)))
    }

    /// What the end of the connection tells of TLS, if anything.
    fn refusal(&self, error: &io::Error) -> Option<Refusal> {
        match error.get_ref().and_then(|error| error.downcast_ref()) {
            Some(TlsError::InvalidMessage(InvalidMessage::InvalidContentType)) => Some(Refusal::Clear),
            Some(_) => Some(Refusal::Handshake),
            None => self.bytes[..self.received].starts_with(&ALERT).then_some(Refusal::Tls),
        }
    }

    /// What to wait for: what it says, and room for what is to be said to it.
    fn awaited(&self) -> PollFd<'_> {
        let flags = if self.link.holds() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        PollFd::new(&self.link, flags)
    }
}

struct Meeting<'a> {
    listener: &'a Listener,
    who: &'a Membership,
    tls: Option<PeerTls>,
    key: Key,
    /// The nonces of greetings that were proved: none counts twice.
    heard: Vec<Nonce>,
    began: Instant,
    timeout: Duration,
    /// Since then nothing that may be the next rank was there.
    missed: Instant,
    unreached: Duration,
    call: Call,
    pause: Duration,
    /// What became of the last call, for the error.
    tried: String,
    /// The next rank does not speak TLS, and this one does. In a ring in which some do and some do not there is one that finds this, and one is
    /// enough: the other way round nothing but the last call's words are kept, so that the two do not end the generation for two reasons.
    one_sided: bool,
    callers: Vec<Greeting>,
    prev: Option<Link>,
    refused: Refusals,
}

impl Meeting<'_> {
    fn run(&mut self) -> Result<(Links, Refusals)> {
        loop {
            if self.listener.wake.is_raised() {
                return Err(CollectiveError::Aborted);
            }
            self.let_in()?;
            self.hear_callers();
            self.step_call();
            if self.one_sided {
                let (rank, next, address) = (self.who.rank, self.who.next(), self.who.next);
                return Err(CollectiveError::OneSided { rank, next, address });
            }
            if let (Call::Through(_), Some(prev)) = (&self.call, &self.prev) {
                if !prev.is_closed() {
                    break;
                }
                // Its call had waited too long, while this rank was at something else: it calls anew.
                self.prev = None;
                self.refused.silent += 1;
            }
            let left = self.timeout.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                return Err(self.out_of_time(false));
            }
            if self.misses_next() && self.missed.elapsed() >= self.unreached {
                return Err(self.out_of_time(true));
            }
            self.wait(left)?;
        }
        let call = std::mem::replace(&mut self.call, Call::Pause { until: self.began });
        match (call, self.prev.take()) {
            (Call::Through(next), Some(prev)) => Ok((Links { next, prev }, std::mem::take(&mut self.refused))),
            _ => Err(self.out_of_time(false)),
        }
    }

    /// Whether nothing is there that may be the next rank: who has taken the call, and says nothing yet, may be.
    fn misses_next(&self) -> bool {
        !matches!(self.call, Call::Greeted { .. } | Call::Through(_))
    }

    /// Takes new callers from the listener.
    fn let_in(&mut self) -> Result<()> {
        loop {
            match self.listener.socket.accept() {
                Ok((stream, _)) => {
                    if self.callers.len() == SILENT {
                        self.callers.remove(0);
                        self.refused.silent += 1;
                    }
                    if let Ok(link) = prepare(&stream).and_then(|()| Link::called(stream, self.tls.as_ref())) {
                        self.callers.push(Greeting::new(link));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The caller gave up, or a signal came.
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
                Err(source) => return Err(CollectiveError::Io { what: "accept", source }),
            }
        }
    }

    fn hear_callers(&mut self) {
        for mut caller in std::mem::take(&mut self.callers) {
            match caller.read() {
                Ok(None) => self.callers.push(caller),
                Ok(Some(hello)) => self.answer(caller, hello),
                Err(error) => match caller.refusal(&error) {
                    Some(refusal) => self.refuse(refusal, Some(&error)),
                    None => self.refused.silent += 1,
                },
            }
        }
    }

    fn refuse(&mut self, refusal: Refusal, error: Option<&io::Error>) {
        self.refused.count(refusal);
        tracing::warn!(rank = self.who.rank, reason = refusal.reason(), error = error.map(tracing::field::display), "a caller was refused");
    }

    fn answer(&mut self, Greeting { mut link, bytes, .. }: Greeting, hello: std::result::Result<Hello, Refusal>) {
        let Ok(key) = self.key_on(&link) else { return self.refuse(Refusal::Handshake, None) };
        let verdict = hello.and_then(|hello| self.judge(&bytes, &hello, &key));
        // A stranger is not told what this is.
        let answered = verdict == Err(Refusal::Garbage) || self.reply(&mut link, hello.ok(), verdict.err(), &key).is_ok();
        match verdict {
            // A second call of the right one is as good as the first, which it must have given up.
            Ok(()) if answered => self.prev = Some(link),
            Ok(()) => self.refused.silent += 1,
            Err(refusal) => self.refuse(refusal, None),
        }
    }

    /// What is said on this link, whose handshake is over, is proved with.
    fn key_on(&self, link: &Link) -> io::Result<Key> {
        Ok(link.binding()?.map_or_else(|| self.key.clone(), |binding| self.key.within(&binding)))
    }

    fn judge(&mut self, bytes: &[u8; Hello::LEN], hello: &Hello, key: &Key) -> std::result::Result<(), Refusal> {
        let prev = self.who.prev();
        match self.who.hello(hello.nonce, prev, None).judge(hello, prev) {
            Err(Refusal::Generation) => return Err(Refusal::Generation),
            _ if !Hello::is_proven(bytes, key, None) || self.heard.contains(&hello.nonce) => return Err(Refusal::Session),
            judged => judged?,
        }
        self.heard.push(hello.nonce);
        Ok(())
    }

    fn reply(&self, link: &mut Link, to: Option<Hello>, verdict: Option<Refusal>, key: &Key) -> io::Result<()> {
        let answer = self.who.hello(nonce()?, self.who.prev(), verdict);
        link.say(&answer.encode(key, Some(to.map_or_else(Nonce::default, |to| to.nonce))))
    }

    /// Moves the call to the next rank on, as far as it goes without waiting.
    fn step_call(&mut self) {
        let address = self.who.next;
        let now = Instant::now();
        let call = std::mem::replace(&mut self.call, Call::Pause { until: now });
        let moved = match call {
            Call::Pause { until } if now >= until => begin_call(address).map(|stream| Call::Ringing { stream, until: now + ANSWER }),
            Call::Ringing { stream, until } => self.greet(stream, until),
            Call::Greeted { caller, said, until } => self.hear_answer(caller, said, until),
            other => Ok(other),
        };
        self.call = moved.unwrap_or_else(|reason| {
            self.tried = format!("{address}: {reason}");
            let until = now + self.pause;
            self.pause = RETRY[1].min(self.pause * 2);
            Call::Pause { until }
        });
    }

    /// Begins with the next rank as soon as the connection stands.
    fn greet(&self, stream: TcpStream, until: Instant) -> std::result::Result<Call, String> {
        if let Err(error) = sockopt::socket_error(&stream).map_err(io::Error::from).and_then(|state| Ok(state?)) {
            return Err(error.to_string());
        }
        if stream.peer_addr().is_err() {
            return if Instant::now() < until { Ok(Call::Ringing { stream, until }) } else { Err("no connection".into()) };
        }
        let link = Link::calls(stream, self.who.next.ip(), self.tls.as_ref()).map_err(|error| error.to_string())?;
        let mut caller = Greeting::new(link);
        let said = self.say_hello(&mut caller.link)?;
        Ok(Call::Greeted { caller, said, until })
    }

    /// Greets the next rank, unless a handshake has to come to its end first.
    fn say_hello(&self, link: &mut Link) -> std::result::Result<Option<Nonce>, String> {
        if link.is_handshaking() {
            return Ok(None);
        }
        let mut say = || -> io::Result<Nonce> {
            let said = nonce()?;
            link.say(&self.who.hello(said, self.who.next(), None).encode(&self.key_on(link)?, None))?;
            Ok(said)
        };
        say().map(Some).map_err(|error| error.to_string())
    }

    fn hear_answer(&mut self, mut caller: Greeting, said: Option<Nonce>, until: Instant) -> std::result::Result<Call, String> {
        let heard = caller.read().map_err(|error| {
            let refusal = caller.refusal(&error);
            self.one_sided = refusal == Some(Refusal::Clear);
            no_answer(refusal, &error)
        })?;
        let Some(hello) = heard else {
            if Instant::now() < until {
                let said = if said.is_none() { self.say_hello(&mut caller.link)? } else { said };
                return Ok(Call::Greeted { caller, said, until });
            }
            // It is there, and does not look yet who calls: it may be restoring.
            self.missed = Instant::now();
            return Err("no answer".into());
        };
        let hello = hello.map_err(|refusal| format!("it answers as {}", refusal.reason()))?;
        if let Some(refusal) = hello.verdict {
            return Err(format!("it refused this rank as {}", refusal.reason()));
        }
        let next = self.who.next();
        let key = self.key_on(&caller.link).map_err(|error| error.to_string())?;
        if said.is_none() || !Hello::is_proven(&caller.bytes, &key, said) {
            return Err(format!("it answers as {}", Refusal::Session.reason()));
        }
        let judged = self.who.hello(hello.nonce, next, None).judge(&hello, next);
        judged.map_err(|refusal| format!("it answers as {}", refusal.reason()))?;
        Ok(Call::Through(caller.link))
    }

    fn wait(&self, left: Duration) -> Result<()> {
        let mut files = vec![PollFd::new(&self.listener.wake.file, PollFlags::IN), PollFd::new(&self.listener.socket, PollFlags::IN)];
        files.extend(self.callers.iter().map(Greeting::awaited));
        let until = match &self.call {
            Call::Pause { until } => Some(*until),
            Call::Ringing { stream, until } => {
                files.push(PollFd::new(stream, PollFlags::OUT));
                Some(*until)
            }
            Call::Greeted { caller, until, .. } => {
                files.push(caller.awaited());
                Some(*until)
            }
            Call::Through(_) => None,
        };
        let next_step = until.map_or(left, |until| until.saturating_duration_since(Instant::now()));
        poll_for(&mut files, left.min(next_step))
    }

    fn out_of_time(&mut self, unreached: bool) -> CollectiveError {
        let (mut waiting_for, mut missing) = (Vec::new(), Vec::new());
        if !matches!(self.call, Call::Through(_)) {
            waiting_for.push(self.who.next());
            missing.push(format!("rank {} was not reached ({})", self.who.next(), self.tried));
        }
        if self.prev.is_none() {
            waiting_for.push(self.who.prev());
            missing.push(format!("rank {} did not come", self.who.prev()));
        }
        self.refused.silent += self.callers.len() as u64;
        CollectiveError::Meet {
            rank: self.who.rank,
            waiting_for,
            missing: missing.join(", "),
            unreached,
            elapsed: self.began.elapsed(),
            refused: Box::new(std::mem::take(&mut self.refused)),
        }
    }
}

/// Why a call came to nothing. Under TLS what to do about it is the same whichever side refuses.
fn no_answer(refusal: Option<Refusal>, error: &io::Error) -> String {
    match refusal {
        Some(Refusal::Handshake) => format!(
            "no TLS with it: {error}; the --tls-ca of every worker must hold the CA of all workers' certificates, and these must not have ended"
        ),
        Some(Refusal::Tls) => {
            "it speaks TLS, and this rank does not: give --tls-cert, --tls-key and --tls-ca to every worker of the run, or to none"
                .to_owned()
        }
        _ => format!("no answer: {error}"),
    }
}

/// Begins to connect, without waiting for it.
fn begin_call(address: SocketAddr) -> std::result::Result<TcpStream, String> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let begin = || -> io::Result<TcpStream> {
        let socket: OwnedFd = rustix::net::socket(family, SocketType::STREAM, None)?;
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        let stream = TcpStream::from(socket);
        prepare(&stream)?;
        match rustix::net::connect(&stream, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(stream),
            Err(error) => Err(error.into()),
        }
    };
    begin().map_err(|error| error.to_string())
}

/// Nothing on a connection ever blocks, and small frames go out at once.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)
}
