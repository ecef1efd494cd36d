//! Collectives: what the ranks of a generation do together. None brings a result to anyone before all have come to it; what breaks in the
//! midst of one may leave it done for some ranks and not for others, which are then one behind.

use super::truth::{State, Tally};
use super::world::{Happening, World};

/// What ranks tell each other in a step, summed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Words {
    pub(super) gradient: u64,
    pub(super) tally: Tally,
    pub(super) leaving: u64,
    pub(super) boundary: u64,
    pub(super) due: u64,
    pub(super) ranks: u64,
}

/// What a rank brings to a collective.
#[derive(Clone, Debug)]
pub(super) enum Share {
    /// It closes the ring.
    Here,
    /// It takes part in a copy, and has the original if it is the source.
    Copy(Option<Box<State>>),
    /// Its sums of the step with this number, and its coordinator's term.
    Step { number: u64, term: u64, words: Words },
}

/// One collective.
#[derive(Debug)]
struct Op {
    shares: Vec<Option<Share>>,
    /// All have come, and nothing stood in its way.
    complete: bool,
}

/// The ranks of a generation.
#[derive(Debug)]
pub(super) struct Ring {
    session: Vec<u8>,
    generation: u64,
    /// Who has come as which rank.
    who: Vec<Option<usize>>,
    ops: Vec<Op>,
    /// The next collective of each rank, and whether it waits in the one before.
    next: Vec<usize>,
    waits: Vec<bool>,
    /// Ranks that have dropped their connections, and those that a neighbour's end has reached.
    left: Vec<bool>,
    lost: Vec<bool>,
}

impl Ring {
    fn world(&self) -> usize {
        self.who.len()
    }

    /// Who has this rank, if anyone came as it.
    pub(super) fn worker(&self, rank: usize) -> Option<usize> {
        self.who[rank]
    }

    fn is(&self, session: &[u8], generation: u64, world: usize) -> bool {
        self.generation == generation && self.session == session && self.world() == world
    }
}

/// What a collective comes to for a rank.
pub(super) enum Gain {
    Closed,
    State(Box<State>),
    Step(Sum),
}

/// The sums of a step.
#[derive(Clone, Debug)]
pub(super) struct Sum {
    pub(super) words: Words,
    /// The number that each rank gave the step, and the term of its coordinator.
    pub(super) numbers: Vec<u64>,
    pub(super) terms: Vec<u64>,
}

impl World {
    /// The ring that an assignment speaks of.
    pub(super) fn ring_of(&mut self, session: &[u8], generation: u64, world: usize) -> usize {
        let known = self.rings.iter().rposition(|ring| ring.is(session, generation, world));
        known.unwrap_or_else(|| {
            self.rings.push(Ring {
                session: session.to_vec(),
                generation,
                who: vec![None; world],
                ops: Vec::new(),
                next: vec![0; world],
                waits: vec![false; world],
                left: vec![false; world],
                lost: vec![false; world],
            });
            self.rings.len() - 1
        })
    }

    /// A rank takes part in its next collective. False if it cannot: a neighbour is gone, or its rank is another's.
    pub(super) fn enter(&mut self, ring: usize, (rank, worker): (usize, usize), share: Share) -> bool {
        let of = &mut self.rings[ring];
        if of.left[rank] || *of.who[rank].get_or_insert(worker) != worker || of.lost[rank] {
            return false;
        }
        let (op, world) = (of.next[rank], of.world());
        of.next[rank] += 1;
        of.waits[rank] = true;
        if of.ops.len() == op {
            of.ops.push(Op { shares: vec![None; world], complete: false });
        }
        of.ops[op].shares[rank] = Some(share);
        self.gather(ring, op);
        true
    }

    /// Completes a collective if all have come to it, and none is stopped or cut off from its neighbours.
    pub(super) fn gather(&mut self, ring: usize, op: usize) {
        let of = &self.rings[ring];
        if of.ops[op].complete || of.ops[op].shares.iter().any(Option::is_none) || of.left.contains(&true) {
            return;
        }
        let who: Vec<usize> = of.who.iter().flatten().copied().collect();
        let neighbours = || who.iter().zip(who.iter().cycle().skip(1));
        if let Some(until) = neighbours().filter_map(|(one, other)| self.parted(*one, *other)).max() {
            return self.at(until, Happening::Gather { ring, op });
        }
        let copies = matches!(self.rings[ring].ops[op].shares[0], Some(Share::Copy(_)));
        let takes = if copies { self.between(0, 600) } else { 0 };
        self.rings[ring].ops[op].complete = true;
        for rank in 0..who.len() {
            let delay = takes + self.latency();
            self.after(delay, Happening::Gathered { ring, rank, op });
        }
    }

    /// A rank has all of a collective's result.
    pub(super) fn gathered(&mut self, ring: usize, rank: usize, op: usize) {
        let of = &mut self.rings[ring];
        let Some(worker) = of.who[rank].filter(|_| of.waits[rank] && !of.left[rank] && of.next[rank] == op + 1) else { return };
        of.waits[rank] = false;
        let gain = gain(&of.ops[op]);
        self.gained(worker, gain);
    }

    /// A rank drops its connections, which its neighbours find out.
    pub(super) fn leave_ring(&mut self, ring: usize, (rank, worker): (usize, usize), silently: bool) {
        let of = &mut self.rings[ring];
        if of.who[rank] != Some(worker) || std::mem::replace(&mut of.left[rank], true) {
            return;
        }
        of.waits[rank] = false;
        let world = of.world();
        if silently {
            return;
        }
        for neighbour in [(rank + 1) % world, (rank + world - 1) % world] {
            let cut = self.rings[ring].who[neighbour].and_then(|other| self.parted(worker, other)).unwrap_or(0);
            let at = cut.max(self.now) + self.latency();
            self.at(at, Happening::Lost { ring, rank: neighbour });
        }
    }

    /// A rank finds that a neighbour is gone. What it has all of already it keeps; in a ring that is not closed it may still call again.
    pub(super) fn neighbour_lost(&mut self, ring: usize, rank: usize) {
        let keeps = self.random.chance(2);
        let of = &mut self.rings[ring];
        let Some(worker) = of.who[rank].filter(|_| !of.left[rank]) else { return };
        let op = of.next[rank] - 1;
        if of.waits[rank] && !of.ops[op].complete && op == 0 && keeps {
            return;
        }
        of.lost[rank] = true;
        if of.waits[rank] && !(of.ops[op].complete && keeps) {
            of.waits[rank] = false;
            self.see(if self.rings[ring].ops[op].complete { "ranks left behind by a step" } else { "collectives broken" });
            self.broken(worker, "a peer is lost");
        }
    }
}

fn gain(op: &Op) -> Gain {
    let shares = || op.shares.iter().flatten();
    if let Some(Share::Copy(_)) = op.shares[0] {
        let original = shares().find_map(|share| if let Share::Copy(Some(state)) = share { Some(state.clone()) } else { None });
        return original.map_or(Gain::Closed, Gain::State);
    }
    let mut sum = Sum { words: Words::default(), numbers: Vec::new(), terms: Vec::new() };
    for share in shares() {
        let Share::Step { number, term, words } = share else { return Gain::Closed };
        sum.numbers.push(*number);
        sum.terms.push(*term);
        sum.words.gradient = sum.words.gradient.wrapping_add(words.gradient);
        sum.words.tally.merge(words.tally);
        sum.words.leaving += words.leaving;
        sum.words.boundary += words.boundary;
        sum.words.due += words.due;
        sum.words.ranks += words.ranks;
    }
    Gain::Step(sum)
}
