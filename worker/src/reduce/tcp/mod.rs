//! A ring over TCP, under TLS where ranks have certificates: every rank sends to the next and receives from the one before.
//!
//! A sum goes round twice, in `world` segments: first each segment is added up along the ring, starting at a rank of its own, then the finished
//! segments go round once more and are copied. Bytes move on as soon as they have been added (`ring`), so the whole takes the time of sending the data
//! `2 (world - 1) / world` times, whatever the world size. Each segment is added in one fixed order and copied afterwards: all ranks end with the same bits.
//!
//! One thread does it all: the sockets do not block, and `poll` waits for whatever can move next, for the abort, and for the deadline.
//!
//! Data goes over the wire in the machine's own byte order; the greeting tells machines of another order apart.

mod hello;
mod link;
mod meet;
mod ring;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ella_proto::access::{ClientTls, PeerTls};
use half::bf16;
use half::slice::HalfFloatSliceExt as _;

use self::ring::{Add, Links, Plan, Transfer};
use super::abort::Wake;
use super::error::Steps;
use super::{AbortHandle, Collective, CollectiveError, DEFAULT_TIMEOUT, OpKind, Result};

pub use self::meet::{Membership, Refusals};

/// As much as is added at a time: what was just received is then still in the cache.
const CHUNK: usize = 256 << 10;

/// Where a rank waits for its predecessor in the ring. Made first, so that its address can be told to the others.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    tls: Option<ClientTls>,
    wake: Arc<Wake>,
}

impl Listener {
    /// Listens on `address`; port 0 takes any free one.
    ///
    /// # Errors
    /// [`CollectiveError::Bind`].
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let bind = |source| CollectiveError::Bind { address, source };
        let socket = TcpListener::bind(address).map_err(bind)?;
        socket.set_nonblocking(true).map_err(bind)?;
        let bound = socket.local_addr().map_err(bind)?;
        let wake = Wake::new().map_err(|source| CollectiveError::Io { what: "pair of sockets for the abort", source })?;
        Ok(Self { socket, address: bound, tls: None, wake })
    }

    /// The same, whose ranks show these certificates to each other, and speak nothing but TLS. Without a certificate nothing changes.
    #[must_use]
    pub fn secured(self, tls: Option<ClientTls>) -> Self {
        Self { tls, ..self }
    }

    /// With the certificates that are the newest now.
    fn tls(&self) -> Option<PeerTls> {
        self.tls.as_ref().and_then(ClientTls::peers)
    }

    /// Whether its ranks speak TLS.
    pub fn is_secured(&self) -> bool {
        self.tls().is_some()
    }

    /// The address that it has. Bound to an unspecified address (`0.0.0.0`), only its port is of use to others.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same listener for one more generation, with an abort of its own.
    ///
    /// # Errors
    /// [`CollectiveError::Io`].
    pub fn again(&self) -> Result<Self> {
        let io = |source| CollectiveError::Io { what: "listener's copy", source };
        let (socket, wake) = (self.socket.try_clone().map_err(io)?, Wake::new().map_err(io)?);
        Ok(Self { socket, address: self.address, tls: self.tls.clone(), wake })
    }

    /// Ends [`Tcp::connect`] on this listener, and whatever the resulting engine does: it is the same handle.
    pub fn abort_handle(&self) -> AbortHandle {
        self.wake.handle()
    }
}

/// One rank of a ring of TCP connections.
#[derive(Debug)]
pub struct Tcp {
    rank: u32,
    world: u32,
    /// None in a world of one, and after a failure: closed connections tell the neighbours at once.
    links: Option<Links>,
    wake: Arc<Wake>,
    steps: Steps,
    timeout: Duration,
    scratch: Vec<u8>,
    refused: Refusals,
}

impl Tcp {
    /// Closes the ring: connects to the next rank, waits for the one before, and returns when every rank has done so, or fails within `timeout`.
    /// Whoever else comes is sent away and counted.
    ///
    /// # Errors
    /// [`CollectiveError::Meet`] with the missing neighbours and the refused callers; [`CollectiveError::OneSided`]; [`CollectiveError::Aborted`];
    /// [`CollectiveError::Rank`].
    pub fn connect(listener: Listener, membership: &Membership, timeout: Duration) -> Result<Self> {
        Self::connect_unless(listener, membership, (timeout, timeout))
    }

    /// The same, that fails sooner if for the second of these times nothing that may be the next rank is there.
    ///
    /// # Errors
    /// Those of [`Tcp::connect`].
    pub fn connect_unless(listener: Listener, membership: &Membership, (timeout, unreached): (Duration, Duration)) -> Result<Self> {
        let (rank, world) = (membership.rank, membership.world);
        if rank >= world {
            return Err(CollectiveError::Rank { rank, world });
        }
        let deadline = Instant::now() + timeout;
        let (links, refused) = match world {
            1 => (None, Refusals::default()),
            _ => meet::meet(&listener, membership, (timeout, unreached)).map(|(links, refused)| (Some(links), refused))?,
        };
        let steps = Steps::default();
        let mut ring = Self { rank, world, links, wake: listener.wake, steps, timeout, scratch: vec![0; CHUNK], refused };
        // My neighbours have met me; only going round tells that theirs have met them.
        ring.timeout = deadline.saturating_duration_since(Instant::now());
        ring.barrier()?;
        ring.timeout = DEFAULT_TIMEOUT;
        Ok(ring)
    }

    /// Who came to the listener and was sent away, by reason (KNOWN).
    pub fn refused(&self) -> &Refusals {
        &self.refused
    }

    fn sum(&mut self, kind: OpKind, data: &mut [u8], size: usize, add: Add) -> Result<()> {
        let plan = Plan::sum(self.rank as usize, self.world as usize, data.len() / size, size);
        self.run(kind, data, size, (plan, add))
    }

    fn run(&mut self, kind: OpKind, data: &mut [u8], size: usize, (plan, add): (Plan, Add)) -> Result<()> {
        if self.wake.is_raised() {
            self.links = None;
            return Err(CollectiveError::Aborted);
        }
        let op = self.steps.begin(kind, data.len() / size)?;
        let Some(links) = &mut self.links else { return Ok(()) };
        let place = ring::Place { rank: self.rank, world: self.world, timeout: self.timeout };
        let mut transfer = Transfer::new(place, op, plan, (links, &self.wake));
        let result = transfer.run(&mut ring::Memory { data, scratch: &mut self.scratch, size, add });
        result.inspect_err(|error| {
            self.steps.fail(error);
            self.links = None;
        })
    }
}

impl Collective for Tcp {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world(&self) -> u32 {
        self.world
    }

    fn sum_i64(&mut self, data: &mut [i64]) -> Result<()> {
        self.sum(OpKind::SumI64, bytemuck::cast_slice_mut(data), 8, ring::add_i64)
    }

    fn sum_f32(&mut self, data: &mut [f32]) -> Result<()> {
        self.sum(OpKind::SumF32, bytemuck::cast_slice_mut(data), 4, ring::add_f32)
    }

    fn sum_bf16(&mut self, data: &mut [bf16]) -> Result<()> {
        self.sum(OpKind::SumBf16, bytemuck::cast_slice_mut(data.reinterpret_cast_mut()), 2, ring::add_bf16)
    }

    fn broadcast(&mut self, root: u32, data: &mut [u8]) -> Result<()> {
        if root >= self.world {
            return Err(CollectiveError::Rank { rank: root, world: self.world });
        }
        let plan = Plan::broadcast(self.rank, root, self.world, data.len());
        self.run(OpKind::Broadcast { root }, data, 1, (plan, ring::add_i64))
    }

    fn barrier(&mut self) -> Result<()> {
        // The sum of one number can only come back when everybody has put in theirs.
        self.sum(OpKind::Barrier, bytemuck::bytes_of_mut(&mut 0_i64), 8, ring::add_i64)
    }

    fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn abort_handle(&self) -> AbortHandle {
        self.wake.handle()
    }
}
