//! One operation on the ring, as two streams of bytes.
//!
//! What a rank sends is its own part first, and then, byte for byte, what it has received so far (and added to, in a sum's first round).
//! So an operation is a list of places to send from, a list of places to receive into, and one rule: never send further than
//! the own part plus what has been received. Nothing else orders the two directions, which keeps both busy.
//!
//! Why nothing is overwritten before it was sent: the value that arrives for a place in the second round contains this rank's share of it,
//! which was sent from that very place in the first.

use std::io::{self, ErrorKind, IoSlice};
use std::ops::Range;
use std::time::{Duration, Instant};

use half::bf16;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::CHUNK;
use super::hello::{HEADER, decode_op, encode_op};
use super::link::Link;
use crate::reduce::abort::Wake;
use crate::reduce::{CollectiveError, Op, Result};

/// Adds the elements in the second slice to those in the first.
pub(super) type Add = fn(&mut [u8], &[u8]);

/// Adds `f32`s; the compiler makes vector instructions of it.
pub(super) fn add_f32(sum: &mut [u8], more: &[u8]) {
    for (a, b) in sum.as_chunks_mut().0.iter_mut().zip(more.as_chunks().0) {
        *a = (f32::from_ne_bytes(*a) + f32::from_ne_bytes(*b)).to_ne_bytes();
    }
}

/// Adds bfloat16s, each sum rounded to the nearest: what goes round is bfloat16 all the way, half of float32's bytes.
pub(super) fn add_bf16(sum: &mut [u8], more: &[u8]) {
    for (a, b) in sum.as_chunks_mut().0.iter_mut().zip(more.as_chunks().0) {
        *a = crate::reduce::add_bf16(bf16::from_ne_bytes(*a), bf16::from_ne_bytes(*b)).to_ne_bytes();
    }
}

/// Adds `i64`s, wrapping.
pub(super) fn add_i64(sum: &mut [u8], more: &[u8]) {
    for (a, b) in sum.as_chunks_mut().0.iter_mut().zip(more.as_chunks().0) {
        *a = i64::from_ne_bytes(*a).wrapping_add(i64::from_ne_bytes(*b)).to_ne_bytes();
    }
}

/// The two connections of a rank.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) next: Link,
    pub(super) prev: Link,
}

/// Which bytes go where.
#[derive(Debug)]
pub(super) struct Plan {
    outgoing: Route,
    incoming: Route,
    /// So many bytes may be sent before anything was received.
    own: usize,
    /// So many of the first received bytes are added; the rest are copied.
    added: usize,
}

impl Plan {
    /// A sum of `n` elements of `size` bytes: segment `rank - step` goes out, and the one before it comes in, twice round but for one step each.
    pub(super) fn sum(rank: usize, world: usize, n: usize, size: usize) -> Self {
        let segment = |back: usize| {
            let i = (rank + 2 * world - back) % world;
            i * n / world * size..(i + 1) * n / world * size
        };
        let steps = 2 * (world - 1);
        let added = (0..world - 1).map(|step| segment(step + 1).len()).sum();
        Self { outgoing: Route::new((0..steps).map(segment)), incoming: Route::new((1..=steps).map(segment)), own: segment(0).len(), added }
    }

    /// A copy of `root`'s bytes along the ring; the last rank sends nothing on.
    pub(super) fn broadcast(rank: u32, root: u32, world: u32, len: usize) -> Self {
        let distance = (rank + world - root) % world;
        let whole = |takes_part: bool| Route::new(takes_part.then_some(0..len));
        let own = if distance == 0 { len } else { 0 };
        Self { outgoing: whole(distance + 1 < world), incoming: whole(distance > 0), own, added: 0 }
    }
}

/// A list of places, gone through in order.
#[derive(Debug)]
struct Route {
    places: std::vec::IntoIter<Range<usize>>,
    /// The rest of the present place; empty when all is done.
    here: Range<usize>,
    passed: usize,
}

impl Route {
    fn new(places: impl IntoIterator<Item = Range<usize>>) -> Self {
        let places: Vec<_> = places.into_iter().filter(|place| !place.is_empty()).collect();
        let mut route = Self { places: places.into_iter(), here: 0..0, passed: 0 };
        route.advance(0);
        route
    }

    fn advance(&mut self, by: usize) {
        self.passed += by;
        self.here.start += by;
        if self.here.is_empty() {
            self.here = self.places.next().unwrap_or(0..0);
        }
    }

    fn done(&self) -> bool {
        self.here.is_empty()
    }
}

/// Where this rank stands, and how long it waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) rank: u32,
    pub(super) world: u32,
    pub(super) timeout: Duration,
}

impl Place {
    fn next(self) -> u32 {
        (self.rank + 1) % self.world
    }

    fn prev(self) -> u32 {
        (self.rank + self.world - 1) % self.world
    }
}

/// What an operation works on.
pub(super) struct Memory<'a> {
    pub(super) data: &'a mut [u8],
    /// Where data to be added arrives.
    pub(super) scratch: &'a mut [u8],
    /// Bytes per element.
    pub(super) size: usize,
    pub(super) add: Add,
}

/// One operation under way.
pub(super) struct Transfer<'a> {
    place: Place,
    op: Op,
    plan: Plan,
    links: &'a mut Links,
    wake: &'a Wake,
    header_out: [u8; HEADER],
    header_sent: usize,
    header_in: [u8; HEADER],
    header_received: usize,
    /// Bytes in the scratch memory that do not make a whole element yet.
    held: usize,
    /// What became of the connection to the next rank, kept until the one before had its chance to tell more.
    next_lost: Option<String>,
    began: Instant,
    moved: Instant,
}

impl<'a> Transfer<'a> {
    pub(super) fn new(place: Place, op: Op, plan: Plan, (links, wake): (&'a mut Links, &'a Wake)) -> Self {
        let now = Instant::now();
        Self {
            place,
            op,
            plan,
            links,
            wake,
            header_out: encode_op(&op),
            header_sent: 0,
            header_in: [0; HEADER],
            header_received: 0,
            held: 0,
            next_lost: None,
            began: now,
            moved: now,
        }
    }

    /// Moves everything, or fails.
    pub(super) fn run(&mut self, memory: &mut Memory<'_>) -> Result<()> {
        loop {
            if self.wake.is_raised() {
                return Err(CollectiveError::Aborted);
            }
            let sent = self.send(memory.data);
            let received = self.receive(memory)?;
            if self.sent_all() && self.received_all() {
                return Ok(());
            }
            if sent || received {
                self.moved = Instant::now();
                continue;
            }
            // Only now: where the two neighbours disagree about the operation, that is the error to report, not that one of them left over it.
            if let Some(reason) = self.next_lost.take() {
                return Err(self.lost(self.place.next(), reason));
            }
            self.wait()?;
        }
    }

    fn sent_all(&self) -> bool {
        self.header_sent == HEADER && self.plan.outgoing.done() && !self.links.next.holds()
    }

    fn received_all(&self) -> bool {
        self.header_received == HEADER && self.plan.incoming.done()
    }

    /// What may be sent now.
    fn sendable(&self) -> Range<usize> {
        let Plan { outgoing, incoming, own, .. } = &self.plan;
        let allowed = (own + incoming.passed).saturating_sub(outgoing.passed).min(CHUNK);
        outgoing.here.start..outgoing.here.end.min(outgoing.here.start + allowed)
    }

    /// Sends what can be sent without waiting; says whether anything was.
    fn send(&mut self, data: &[u8]) -> bool {
        let header = &self.header_out[self.header_sent..];
        let body = &data[self.sendable()];
        if self.next_lost.is_some() || header.is_empty() && body.is_empty() && !self.links.next.holds() {
            return false;
        }
        match self.links.next.write(&[IoSlice::new(header), IoSlice::new(body)]) {
            Ok(n) => {
                let of_header = n.min(header.len());
                self.header_sent += of_header;
                self.plan.outgoing.advance(n - of_header);
                true
            }
            Err(error) => {
                if !transient(&error) {
                    self.next_lost = Some(error.to_string());
                }
                false
            }
        }
    }

    /// Receives what has come; says whether anything had.
    fn receive(&mut self, memory: &mut Memory<'_>) -> Result<bool> {
        if self.header_received < HEADER {
            let result = self.links.prev.read(&mut self.header_in[self.header_received..]);
            let n = self.read(result)?;
            self.header_received += n;
            return if self.header_received == HEADER { self.check_header().map(|()| true) } else { Ok(n > 0) };
        }
        if self.plan.incoming.done() {
            return Ok(false);
        }
        if self.plan.incoming.passed < self.plan.added { self.receive_and_add(memory) } else { self.receive_in_place(memory.data) }
    }

    fn receive_and_add(&mut self, memory: &mut Memory<'_>) -> Result<bool> {
        let here = self.plan.incoming.here.clone();
        let most = here.len().min(memory.scratch.len());
        let result = self.links.prev.read(&mut memory.scratch[self.held..most]);
        let n = self.read(result)?;
        let have = self.held + n;
        let whole = have - have % memory.size;
        (memory.add)(&mut memory.data[here.start..here.start + whole], &memory.scratch[..whole]);
        memory.scratch.copy_within(whole..have, 0);
        self.held = have - whole;
        self.plan.incoming.advance(whole);
        Ok(n > 0)
    }

    fn receive_in_place(&mut self, data: &mut [u8]) -> Result<bool> {
        let here = self.plan.incoming.here.clone();
        let end = here.end.min(here.start + CHUNK);
        let result = self.links.prev.read(&mut data[here.start..end]);
        let n = self.read(result)?;
        self.plan.incoming.advance(n);
        Ok(n > 0)
    }

    /// The number of bytes that a read brought; none if it would have had to wait.
    fn read(&self, result: io::Result<usize>) -> Result<usize> {
        match result {
            Ok(0) => Err(self.lost(self.place.prev(), "it closed the connection".into())),
            Ok(n) => Ok(n),
            Err(error) if transient(&error) => Ok(0),
            Err(error) => Err(self.lost(self.place.prev(), error.to_string())),
        }
    }

    fn check_header(&self) -> Result<()> {
        let peer = self.place.prev();
        match decode_op(&self.header_in) {
            Some(theirs) if theirs == self.op => Ok(()),
            Some(theirs) => Err(CollectiveError::Mismatch { rank: self.place.rank, peer, ours: self.op, theirs }),
            None => {
                let found = self.header_in.iter().map(|byte| format!("{byte:02x}")).collect();
                Err(CollectiveError::Garbled { peer, op: self.op, found })
            }
        }
    }

    /// Waits until something can move, and no longer than the timeout since something last did.
    fn wait(&mut self) -> Result<()> {
        let left = self.place.timeout.saturating_sub(self.moved.elapsed());
        if left.is_zero() {
            let waiting_for = if self.received_all() { self.place.next() } else { self.place.prev() };
            let Self { place, op, .. } = *self;
            return Err(CollectiveError::Timeout { rank: place.rank, waiting_for, op, elapsed: self.began.elapsed() });
        }
        let writable = self.header_sent < HEADER || !self.sendable().is_empty() || self.links.next.holds();
        let mut next = if writable { PollFlags::OUT } else { PollFlags::empty() };
        // A next rank that hangs up is worth knowing of only while it still needs something from this one.
        next |= if self.sent_all() { PollFlags::empty() } else { PollFlags::RDHUP };
        let prev = if self.received_all() { PollFlags::empty() } else { PollFlags::IN };
        let mut files = Vec::with_capacity(3);
        files.push(PollFd::new(&self.wake.file, PollFlags::IN));
        if !prev.is_empty() {
            files.push(PollFd::new(&self.links.prev, prev));
        }
        if !next.is_empty() {
            files.push(PollFd::new(&self.links.next, next));
        }
        poll_for(&mut files, left)?;
        let hung_up = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        if !next.is_empty() && files.last().is_some_and(|file| file.revents().intersects(hung_up)) {
            self.next_lost = Some("it closed the connection".into());
        }
        Ok(())
    }

    fn lost(&self, rank: u32, reason: String) -> CollectiveError {
        CollectiveError::PeerLost { rank, op: self.op, reason }
    }
}

/// Whether the same call may succeed later.
pub(super) fn transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Waits until one of `files` is ready, a signal comes, or the time is over.
pub(super) fn poll_for(files: &mut [PollFd<'_>], at_most: Duration) -> Result<()> {
    let seconds = i64::try_from(at_most.as_secs()).unwrap_or(i64::MAX);
    let time = Timespec { tv_sec: seconds, tv_nsec: at_most.subsec_nanos().into() };
    match poll(files, Some(&time)).map_err(io::Error::from) {
        Err(source) if !transient(&source) => Err(CollectiveError::Io { what: "poll", source }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All places of a route, byte by byte.
    fn bytes(route: &Route) -> Vec<usize> {
        std::iter::once(route.here.clone()).chain(route.places.clone()).flatten().collect()
    }

    #[test]
    fn what_one_rank_sends_is_what_the_next_expects() {
        for world in 2..6 {
            for n in [0, 1, 2, 7, 30] {
                for rank in 0..world {
                    let [mine, next] = [rank, (rank + 1) % world].map(|rank| Plan::sum(rank, world, n, 4));
                    assert_eq!(bytes(&mine.outgoing), bytes(&next.incoming), "rank {rank} of {world}, {n} elements");
                }
            }
        }
    }

    #[test]
    fn after_its_own_part_a_rank_sends_what_it_received() {
        for (world, n) in [(2, 9), (3, 9), (5, 3), (5, 101)] {
            for rank in 0..world {
                let plan = Plan::sum(rank, world, n, 8);
                let (sent, received) = (bytes(&plan.outgoing), bytes(&plan.incoming));
                let forwarded = &sent[plan.own..];
                assert_eq!(forwarded, &received[..forwarded.len()]);
                assert!(plan.added.is_multiple_of(8) && plan.added <= received.len());
            }
        }
    }

    #[test]
    fn every_element_is_added_up_over_all_ranks_and_then_copied_to_all() {
        let (world, n) = (4, 11);
        for rank in 0..world {
            let plan = Plan::sum(rank, world, n, 1);
            let received = bytes(&plan.incoming);
            let (added, copied) = received.split_at(plan.added);
            // All but the own segment pass through here to be added; all but the one that is finished here come back.
            assert_eq!(added.len(), n - plan.own);
            let finished = (rank + 1) % world;
            let expected: Vec<_> = (0..n).filter(|i| !(finished * n / world..(finished + 1) * n / world).contains(i)).collect();
            let mut copied = copied.to_vec();
            copied.sort_unstable();
            assert_eq!(copied, expected);
        }
    }

    #[test]
    fn a_broadcast_ends_before_its_root() {
        let plans: Vec<_> = (0..3).map(|rank| Plan::broadcast(rank, 1, 3, 10)).collect();
        let lengths: Vec<_> = plans.iter().map(|plan| (bytes(&plan.outgoing).len(), bytes(&plan.incoming).len(), plan.own)).collect();
        assert_eq!(lengths, [(0, 10, 0), (10, 0, 10), (10, 10, 0)]);
    }

    #[test]
    fn odd_lengths_are_added_to_the_last_element() {
        let mut sum: Vec<u8> = [1.5_f32, 2.0, -3.0].iter().flat_map(|x| x.to_ne_bytes()).collect();
        add_f32(&mut sum, &[1.0_f32, 1.0, 1.0].map(f32::to_ne_bytes).concat());
        assert_eq!(sum, [2.5_f32, 3.0, -2.0].map(f32::to_ne_bytes).concat());
        let mut sum = i64::MAX.to_ne_bytes();
        add_i64(&mut sum, &1_i64.to_ne_bytes());
        assert_eq!(sum, i64::MIN.to_ne_bytes());
    }
}
