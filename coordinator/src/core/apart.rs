//! A ring that does not close, because one rank finds nothing where the next one is to listen: in which order the ranks are dealt then, which of them
//! goes, so that the others train, and when whoever comes back from there may try again.

use super::generation::Candidate;
use super::loss::MOST_TEXT;
use super::members::{Held, Member};
use super::{ConnId, Core, Failure, Loss, Refusal, Time, Who};
use ella_proto::v1::{Hello, to_worker};
use std::collections::BTreeSet;
use std::fmt;

/// The first pause before ranks that do not reach each other try again, in milliseconds, and the longest. Each is twice the one before.
const PAUSES: (u64, u64) = (1_000, 30_000);

/// A worker that cannot train with its neighbour in the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreached {
    /// The neighbour.
    pub other: Who,
    /// Where the one of the two is called.
    pub address: String,
    /// This worker is the one that calls.
    pub calls: bool,
    /// The caller's.
    pub words: String,
}

impl fmt::Display for Unreached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { other, address, calls, words } = self;
        match calls {
            true => write!(f, "it does not reach {other} at {address}; check the ports between the two, and --advertise of both")?,
            false => {
                write!(f, "{other} does not reach it at {address}; check its --advertise and --listen, and the ports between the two")?
            }
        }
        write!(f, ". The caller's words: {words}")
    }
}

/// Neighbours that both trained before, and do not reach each other now.
#[derive(Debug)]
pub(super) struct Apart {
    /// When the first try failed.
    since: Time,
    /// The last pause.
    pause: u64,
}

/// What keeps whoever comes from a machine that others did not reach from stopping them again at once.
#[derive(Debug)]
pub(super) struct Bar {
    /// Who was here before is judged by itself.
    since: Time,
    /// Until then it is a spare and no more; none once that has passed.
    pub(super) until: Option<Time>,
    pause: u64,
}

impl Core {
    /// A rank says that the ring did not close because of the next one. Who was in the last generation that trained is believed: the other goes, and
    /// nothing more is to be done with what was said. Of two that are new, the one that is not reached goes.
    pub(super) fn next_unreached(&mut self, now: Time, conn: ConnId, held: Held, words: &str) -> bool {
        let Some(lineup) = self.lineup.as_ref().filter(|lineup| !lineup.started) else { return false };
        let at = lineup.ranks.iter().position(|rank| *rank == conn);
        let Some(next) = at.map(|at| lineup.ranks[(at + 1) % lineup.ranks.len()]).filter(|next| *next != conn) else { return false };
        let open = |conn| self.members.get(conn).filter(|member: &&Member| member.open);
        let (Some(from), Some(to)) = (open(conn), open(next)) else { return false };
        let (who, other, address) = (from.who(), to.who(), to.hello.peer_address.clone());
        let words: String = words.chars().take(MOST_TEXT).collect();
        match (from.trained, to.trained) {
            (true, true) => {
                self.cuts.insert((conn, next), words.clone());
                return self.try_again(now, (conn, held), Failure::Unreached { who: other, by: who, address, words });
            }
            (false, true) => self.send_off(now, conn, Unreached { other, address, calls: true, words }),
            (from_trained, false) => {
                if !from_trained && self.attached() <= self.least() {
                    self.fail(Failure::Unreached { who: other, by: who, address, words });
                    return true;
                }
                self.leaves_ring(conn, held);
                self.send_off(now, next, Unreached { other: who, address, calls: false, words });
            }
        }
        true
    }

    /// A rank whose word has been acted upon waits for another place.
    fn leaves_ring(&mut self, conn: ConnId, held: Held) {
        self.keep_timing(conn, true);
        if let Some(member) = self.members.get_mut(conn) {
            member.enter(held);
        }
    }

    /// Lets a worker go that the others cannot train with. That says nothing about the run.
    fn send_off(&mut self, now: Time, conn: ConnId, unreached: Unreached) {
        self.weaken();
        if let Some(member) = self.members.get(conn) {
            let (machine, timeout) = (machine(&member.hello), self.config.start_timeout);
            let longer = |bar: &Bar| bar.pause.saturating_mul(2).min(timeout.saturating_mul(6));
            let pause = self.bars.get(machine).map_or(timeout / 20, longer).max(1);
            self.bars.insert(machine.to_owned(), Bar { since: now, until: Some(now.after(pause)), pause });
        }
        let unreached = Box::new(unreached);
        let refusal = Refusal::Unreached(unreached.clone());
        self.counts.add(refusal.counter(), 1);
        self.send(conn, to_worker::Body::Refused(refusal.on_the_wire()));
        self.lost(now, conn, Loss::Unreached(unreached));
    }

    /// Nobody is known to be at fault: the next generation is formed after a pause, as long as that may help. Well before the run would fail for it,
    /// one of them goes if the others are enough; at once if all are about to leave.
    fn try_again(&mut self, now: Time, (conn, held): (ConnId, Held), failure: Failure) -> bool {
        let apart = self.apart.get_or_insert(Apart { since: now, pause: PAUSES.0 / 2 });
        let waited = now.since(apart.since);
        let (is_here, members) = (|member: &Member| member.open, &self.members);
        self.cuts.retain(|(from, to), _| [from, to].iter().all(|conn| members.get(**conn).is_some_and(is_here)));
        if (waited >= self.config.start_timeout / 2 || self.drain.is_some())
            && self.attached() > self.least()
            && let Some((goes, unreached)) = self.outcast()
        {
            if goes != conn {
                self.leaves_ring(conn, held);
            }
            self.send_off(now, goes, unreached);
            return true;
        }
        if waited >= self.config.start_timeout {
            self.fail(failure);
            return true;
        }
        if let (Some(lineup), Some(apart)) = (&mut self.lineup, &mut self.apart)
            && !std::mem::replace(&mut lineup.apart, true)
        {
            apart.pause = (2 * apart.pause).min(PAUSES.1);
            // Who waits for workers has `start_timeout`, and must not have waited for that in vain.
            self.paused_until = Some(now.after(apart.pause.min(self.config.start_timeout / 4).max(1)));
        }
        false
    }

    /// Of the ranks that did not reach each other, the one with the most others on the far side. Of as many, who holds the newest state stays, and
    /// who came first.
    fn outcast(&self) -> Option<(ConnId, Unreached)> {
        let lineup = self.lineup.as_ref()?;
        let source = lineup.source.and_then(|rank| lineup.ranks.get(rank.0 as usize));
        let cuts: Vec<_> = self.cuts.iter().filter(|((from, to), _)| [from, to].iter().all(|conn| lineup.ranks.contains(conn))).collect();
        let others = |conn: &ConnId| -> BTreeSet<ConnId> {
            cuts.iter()
                .flat_map(|((from, to), _)| [(from, to), (to, from)])
                .filter(|(one, _)| *one == conn)
                .map(|(_, other)| *other)
                .collect()
        };
        let ranks = cuts.iter().flat_map(|((from, to), _)| [from, to]);
        let goes = ranks.max_by_key(|conn| (others(conn).len(), Some(*conn) != source, **conn))?;
        let ((from, to), words) = cuts.iter().find(|((from, to), _)| from == goes || to == goes)?;
        let (calls, address) = (from == goes, self.members.get(*to)?.hello.peer_address.clone());
        let other = self.members.who(if calls { *to } else { *from })?;
        Some((*goes, Unreached { other, address, calls, words: (*words).clone() }))
    }

    /// Has ranks change places until none is to call one that it did not reach, or that did not reach it, as far as that goes.
    pub(super) fn keep_apart(&self, ranks: &mut [Candidate]) {
        let world = ranks.len();
        // What did not pass one way may pass the other way, but rather not.
        let bad = |ranks: &[Candidate], at: usize| {
            let (from, to) = (ranks[at].0, ranks[(at + 1) % world].0);
            2 * usize::from(self.cuts.contains_key(&(from, to))) + usize::from(self.cuts.contains_key(&(to, from)))
        };
        let all = |ranks: &[Candidate]| (0..world).map(|at| bad(ranks, at)).sum::<usize>();
        while let Some(at) = (0..world).find(|at| bad(ranks, *at) > 0) {
            let before = all(ranks);
            let helps = (0..world).any(|to| {
                ranks.swap(at, to);
                let helps = all(ranks) < before;
                if !helps {
                    ranks.swap(at, to);
                }
                helps
            });
            if !helps {
                return;
            }
        }
    }

    /// Whether a worker has come, with nothing that others need, from a machine whose pause is not over.
    pub(super) fn is_barred(&self, member: &Member) -> bool {
        let bar = self.bars.get(machine(&member.hello)).filter(|bar| bar.until.is_some() && bar.since <= member.since);
        bar.is_some() && member.state(self.last_commit()).is_none()
    }

    /// Ranks have closed their ring: their machines are reached.
    pub(super) fn reached(&mut self) {
        (self.apart, self.paused_until) = (None, None);
        for (_, _, member) in self.members.placed() {
            self.bars.remove(machine(&member.hello));
        }
    }

    /// What was to pause goes on.
    pub(super) fn pause_expired(&mut self, now: Time) {
        let pauses = self.bars.values_mut().map(|bar| &mut bar.until).chain([&mut self.paused_until]);
        let over = pauses.filter(|until| until.is_some_and(|until| until <= now)).filter_map(Option::take).count();
        if over > 0 {
            self.settle(now);
        }
    }
}

/// Where a worker is called, whatever its port: one that was started again has another.
fn machine(hello: &Hello) -> &str {
    hello.peer_address.rsplit_once(':').map_or("", |(host, _)| host)
}
