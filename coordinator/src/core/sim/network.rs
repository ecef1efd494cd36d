//! Streams between workers and coordinators, and who is cut off from whom.
//!
//! A stream keeps its order in each direction. What is cut off waits, as in TCP's buffers; a stream that breaks loses what is on its way.

use super::world::{Happening, World};
use crate::machine::ConnId;
use ella_proto::v1::{FromWorker, ToWorker};
use std::collections::VecDeque;

/// What travels.
#[derive(Clone, Debug)]
pub(super) enum Packet<M> {
    Said(M),
    /// The other side has closed its end.
    Fin,
}

/// One stream, as the network has it.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) worker: usize,
    pub(super) coordinator: usize,
    pub(super) conn: ConnId,
    pub(super) up: VecDeque<Packet<FromWorker>>,
    pub(super) down: VecDeque<Packet<ToWorker>>,
    /// When the newest packet of each direction arrives.
    up_at: u64,
    down_at: u64,
}

impl Stream {
    pub(super) fn new(worker: usize, coordinator: usize, conn: ConnId) -> Self {
        Self { worker, coordinator, conn, up: VecDeque::new(), down: VecDeque::new(), up_at: 0, down_at: 0 }
    }
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Worker(usize),
    Coordinator(usize),
}

/// Nothing passes between two nodes, or between one and all others, until then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub(super) one: Node,
    /// None: everyone.
    pub(super) other: Option<Node>,
    pub(super) until: u64,
}

impl Cut {
    fn parts(&self, a: Node, b: Node) -> bool {
        match self.other {
            Some(other) => (self.one, other) == (a, b) || (self.one, other) == (b, a),
            None => self.one == a || self.one == b,
        }
    }
}

impl World {
    /// When two nodes reach each other again, if they do not now.
    pub(super) fn heals_at(&self, a: Node, b: Node) -> Option<u64> {
        self.cuts.iter().filter(|cut| cut.until > self.now && cut.parts(a, b)).map(|cut| cut.until).max()
    }

    /// Mostly a few milliseconds, sometimes far more.
    pub(super) fn latency(&mut self) -> u64 {
        match self.random.below(self.setup.late) {
            0 => 1 + self.random.below(1_500),
            _ => 1 + self.random.below(8),
        }
    }

    pub(super) fn send_up(&mut self, stream: usize, packet: Packet<FromWorker>) {
        let at = self.now + self.latency();
        let link = &mut self.streams[stream];
        link.up.push_back(packet);
        link.up_at = link.up_at.max(at);
        let at = link.up_at;
        self.at(at, Happening::Deliver { stream, up: true });
    }

    pub(super) fn send_down(&mut self, stream: usize, packet: Packet<ToWorker>) {
        let at = self.now + self.latency();
        let link = &mut self.streams[stream];
        link.down.push_back(packet);
        link.down_at = link.down_at.max(at);
        let at = link.down_at;
        self.at(at, Happening::Deliver { stream, up: false });
    }

    /// The stream breaks: what is on its way is lost, and each side finds out in its own time.
    pub(super) fn break_stream(&mut self, stream: usize) {
        self.streams[stream].up.clear();
        self.streams[stream].down.clear();
        let (up, down) = (self.now + self.random.below(2_000), self.now + self.random.below(2_000));
        let link = &mut self.streams[stream];
        (link.up_at, link.down_at) = (link.up_at.max(up), link.down_at.max(down));
        self.send_up(stream, Packet::Fin);
        self.send_down(stream, Packet::Fin);
    }

    /// The oldest packet of a stream arrives, whichever one this was meant for.
    pub(super) fn deliver(&mut self, stream: usize, up: bool) {
        let (worker, coordinator) = (self.streams[stream].worker, self.streams[stream].coordinator);
        if let Some(heals) = self.heals_at(Node::Worker(worker), Node::Coordinator(coordinator)) {
            let at = heals + self.random.below(20);
            return self.at(at, Happening::Deliver { stream, up });
        }
        if up {
            let Some(packet) = self.streams[stream].up.pop_front() else { return };
            self.echo_later(stream, &packet);
            self.arrive_up(stream, packet);
        } else {
            let Some(packet) = self.streams[stream].down.pop_front() else { return };
            if let (Packet::Said(message), true) = (&packet, self.random.chance(self.setup.duplicates)) {
                let at = self.now + self.random.below(1_000);
                self.at(at, Happening::RepeatDown { stream, message: Box::new(message.clone()) });
            }
            self.arrive_down(stream, packet);
        }
    }

    /// Some messages come again, on the same stream or on a later one of the same worker.
    fn echo_later(&mut self, stream: usize, packet: &Packet<FromWorker>) {
        let Packet::Said(message) = packet else { return };
        if self.random.chance(self.setup.duplicates) {
            let at = self.now + self.random.below(1_000);
            self.at(at, Happening::RepeatUp { stream, message: Box::new(message.clone()) });
        }
        if self.random.chance(self.setup.duplicates) {
            let worker = self.streams[stream].worker;
            let at = self.now + self.random.below(10_000);
            self.at(at, Happening::Echo { worker, message: Box::new(message.clone()) });
        }
    }
}
