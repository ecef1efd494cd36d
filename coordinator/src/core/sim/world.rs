//! The virtual world: its clock, what is to happen, and who is in it.

use super::coordinator::{Answer, Attempt, Coordinator};
use super::network::{Cut, Node, Stream};
use super::ring::Ring;
use super::schedule::{Setup, Verdict};
use super::store::Store;
use super::truth::Truth;
use super::worker::{Mutant, Worker};
use crate::core::Mutation;
use crate::random::Random;
use ella_proto::v1::{FromWorker, ToWorker};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

/// A schedule with more events than this livelocks.
const MOST_EVENTS: u64 = 1_000_000;

/// When a run is over everyone leaves within so long.
const LEAVING: u64 = 40_000;

/// What is to happen.
#[derive(Debug)]
pub(super) enum Happening {
    /// The oldest packet of a stream arrives.
    Deliver {
        stream: usize,
        up: bool,
    },
    /// A message arrives once more on its stream.
    RepeatUp {
        stream: usize,
        message: Box<FromWorker>,
    },
    RepeatDown {
        stream: usize,
        message: Box<ToWorker>,
    },
    /// An old message arrives on whatever stream its worker has by now.
    Echo {
        worker: usize,
        message: Box<FromWorker>,
    },
    /// A coordinator's deadline.
    Wake {
        coordinator: usize,
    },
    /// It reads the log, to claim a term.
    Open {
        coordinator: usize,
    },
    /// It has its term, and begins to serve.
    Serve {
        coordinator: usize,
    },
    /// A conditional put reaches the store, and its answer the coordinator.
    Put {
        coordinator: usize,
        attempt: Box<Attempt>,
    },
    Answer {
        coordinator: usize,
        answer: Box<Answer>,
    },
    Delete {
        coordinator: usize,
        folders: Vec<String>,
    },
    /// Its driver ends, and at last its process.
    Close {
        coordinator: usize,
    },
    CutOff {
        coordinator: usize,
    },
    /// A worker tries to reach a coordinator, and gives a try up.
    Attach {
        worker: usize,
    },
    Late {
        worker: usize,
        stream: usize,
    },
    Beat {
        worker: usize,
        stream: usize,
    },
    Probe {
        worker: usize,
        stream: usize,
    },
    /// A worker's training thread and its committing thread go on.
    Thread {
        worker: usize,
        token: u64,
    },
    Commit {
        worker: usize,
        token: u64,
    },
    /// A collective is looked at, brings its result to a rank, or tells it that a neighbour is gone.
    Gather {
        ring: usize,
        op: usize,
    },
    Gathered {
        ring: usize,
        rank: usize,
        op: usize,
    },
    Lost {
        ring: usize,
        rank: usize,
    },
    /// Something goes wrong.
    Fault,
    /// Whoever keeps the processes running looks after them.
    Tend,
}

struct Item {
    at: u64,
    number: u64,
    what: Happening,
}

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Item {}

impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Item {
    /// The earliest is the greatest, for the heap.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// Which bug is built in, if one is; and whether a network is, that does not heal.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bugs {
    pub(super) core: Option<Mutation>,
    pub(super) worker: Option<Mutant>,
    /// What a core says is not judged by its own oracle, only what comes of it.
    pub(super) blind: bool,
    /// Nothing goes wrong but that two workers which have trained together never reach each other again.
    pub(super) lasting_cut: bool,
}

/// Everything there is.
pub(super) struct World {
    /// Milliseconds.
    pub(super) now: u64,
    pub(super) random: Random,
    pub(super) setup: Setup,
    pub(super) bugs: Bugs,
    pub(super) truth: Truth,
    pub(super) store: Store,
    pub(super) coordinators: Vec<Coordinator>,
    pub(super) workers: Vec<Worker>,
    pub(super) streams: Vec<Stream>,
    pub(super) rings: Vec<Ring>,
    pub(super) cuts: Vec<Cut>,
    /// How the run has ended.
    pub(super) verdict: Option<Verdict>,
    pub(super) concluded_at: u64,
    /// Somebody has asked the whole run to leave, or all workers.
    pub(super) drained: bool,
    /// Ranks that took a snapshot, by term, generation and step.
    pub(super) snapshots: BTreeMap<(u64, u64, u64), BTreeSet<u32>>,
    pub(super) seen: BTreeMap<String, u64>,
    queue: BinaryHeap<Item>,
    number: u64,
    /// What has happened, if it is kept.
    trace: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(seed: u64, bugs: Bugs, traced: bool) -> Self {
        let mut random = Random::new(seed);
        let setup = Setup::new(&mut random);
        let setup = if bugs.lasting_cut { setup.with_lasting_cut(&mut random) } else { setup };
        let truth = Truth::new(setup.lanes, setup.steps, setup.steps_per_epoch);
        let mut world = Self {
            now: 0,
            random,
            setup,
            bugs,
            truth,
            store: Store::default(),
            coordinators: Vec::new(),
            workers: Vec::new(),
            streams: Vec::new(),
            rings: Vec::new(),
            cuts: Vec::new(),
            verdict: None,
            concluded_at: 0,
            drained: false,
            snapshots: BTreeMap::new(),
            seen: BTreeMap::new(),
            queue: BinaryHeap::new(),
            number: 0,
            trace: traced.then(Vec::new),
        };
        world.begin();
        world
    }

    pub(super) fn at(&mut self, at: u64, what: Happening) {
        self.number += 1;
        self.queue.push(Item { at: at.max(self.now), number: self.number, what });
    }

    pub(super) fn after(&mut self, delay: u64, what: Happening) {
        self.at(self.now + delay, what);
    }

    /// Between two numbers.
    pub(super) fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.random.below(most.saturating_sub(least) + 1)
    }

    pub(super) fn see(&mut self, what: &str) {
        self.see_many(what, 1);
    }

    pub(super) fn see_many(&mut self, what: &str, n: u64) {
        match self.seen.get_mut(what) {
            Some(seen) => *seen += n,
            None => drop(self.seen.insert(what.to_owned(), n)),
        }
    }

    pub(super) fn tell(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>7} {}", self.now, line()));
        }
    }

    /// What has happened.
    pub(super) fn trace(&self) -> &[String] {
        self.trace.as_deref().unwrap_or_default()
    }

    /// Runs until the run is over and everyone has left.
    pub(super) fn run(&mut self) -> Verdict {
        let bound = self.setup.faults_until + self.setup.bound();
        for _ in 0..MOST_EVENTS {
            if let Some(verdict) = self.is_over() {
                self.judge_end(verdict);
                return verdict;
            }
            let Some(Item { at, what, .. }) = self.queue.pop() else { panic!("LIVE: nothing happens any more, and the run is not over") };
            assert!(at <= bound || self.verdict.is_some(), "LIVE: the run is not over by {bound} ms");
            assert!(at <= bound + LEAVING, "LIVE: the run is over, and not all have left by {at} ms");
            self.now = at;
            self.happen(what);
        }
        panic!("LIVE: the run is not over after {MOST_EVENTS} events");
    }

    /// When the process that something happens to runs again, if it is stopped.
    fn thaws_at(&self, what: &Happening) -> Option<u64> {
        use Happening as H;
        let of_worker = |worker: usize| self.workers[worker].frozen_until;
        let until = match what {
            H::Deliver { stream, up: false } | H::RepeatDown { stream, .. } => of_worker(self.streams[*stream].worker),
            H::Deliver { stream, up: true } | H::RepeatUp { stream, .. } => {
                self.coordinators[self.streams[*stream].coordinator].frozen_until
            }
            H::Attach { worker } | H::Late { worker, .. } | H::Beat { worker, .. } | H::Probe { worker, .. } => of_worker(*worker),
            H::Thread { worker, .. } | H::Commit { worker, .. } => of_worker(*worker),
            H::Gathered { ring, rank, .. } | H::Lost { ring, rank } => self.rings[*ring].worker(*rank).map_or(0, of_worker),
            H::Wake { coordinator } | H::Open { coordinator } | H::Serve { coordinator } | H::Answer { coordinator, .. } => {
                self.coordinators[*coordinator].frozen_until
            }
            H::Delete { coordinator, .. } | H::Close { coordinator } => self.coordinators[*coordinator].frozen_until,
            H::Echo { .. } | H::Put { .. } | H::CutOff { .. } | H::Gather { .. } | H::Fault | H::Tend => 0,
        };
        (until > self.now).then_some(until)
    }

    fn happen(&mut self, what: Happening) {
        use Happening as H;
        if let Some(thaws) = self.thaws_at(&what) {
            let at = thaws + self.random.below(10);
            return self.at(at, what);
        }
        match what {
            H::Deliver { stream, up } => self.deliver(stream, up),
            H::RepeatUp { stream, message } => self.repeat_up(stream, *message),
            H::RepeatDown { stream, message } => self.repeat_down(stream, *message),
            H::Echo { worker, message } => self.echo(worker, *message),
            H::Wake { coordinator } => self.wake(coordinator),
            H::Open { coordinator } => self.open(coordinator),
            H::Serve { coordinator } => self.serve(coordinator),
            H::Put { coordinator, attempt } => self.put(coordinator, *attempt),
            H::Answer { coordinator, answer } => self.answer(coordinator, *answer),
            H::Delete { coordinator, folders } => self.delete(coordinator, &folders),
            H::Close { coordinator } => self.close_driver(coordinator),
            H::CutOff { coordinator } => self.cut_off(coordinator),
            H::Attach { worker } => self.attach(worker),
            H::Late { worker, stream } => self.late(worker, stream),
            H::Beat { worker, stream } => self.beat(worker, stream),
            H::Probe { worker, stream } => self.probe(worker, stream),
            H::Thread { worker, token } => self.thread(worker, token),
            H::Commit { worker, token } => self.committer(worker, token),
            H::Gather { ring, op } => self.gather(ring, op),
            H::Gathered { ring, rank, op } => self.gathered(ring, rank, op),
            H::Lost { ring, rank } => self.neighbour_lost(ring, rank),
            H::Fault => self.fault(),
            H::Tend => self.tend(),
        }
    }

    /// Whether two workers are parted by the network, or one of them does not run: until when.
    pub(super) fn parted(&self, one: usize, other: usize) -> Option<u64> {
        let frozen = self.workers[one].frozen_until.max(self.workers[other].frozen_until);
        let cut = self.heals_at(Node::Worker(one), Node::Worker(other)).unwrap_or(0);
        Some(frozen.max(cut)).filter(|until| *until > self.now)
    }
}
