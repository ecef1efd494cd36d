//! A ring that does not close, because one rank finds nothing where the next one is to listen: which of the two goes, so that the others train.

use super::loss::MOST_TEXT;
use super::members::{Held, Member};
use super::{ConnId, Core, Failure, Loss, Refusal, Time, Who};
use ella_proto::v1::to_worker;
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
}

impl fmt::Display for Unreached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { other, address, calls } = self;
        match calls {
            true => write!(f, "it does not reach {other} at {address}; check the ports between the two, and --advertise of both"),
            false => write!(f, "{other} does not reach it at {address}; check its --advertise and --listen, and the ports between the two"),
        }
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
        match (from.trained, to.trained) {
            (true, true) => {
                let words = words.chars().take(MOST_TEXT).collect();
                return self.try_again(now, Failure::Unreached { who: other, by: who, address, words });
            }
            (false, true) => self.send_off(now, conn, Unreached { other, address, calls: true }),
            (from_trained, false) => {
                if !from_trained && self.attached().saturating_sub(1) < self.least() {
                    let words = words.chars().take(MOST_TEXT).collect();
                    self.fail(Failure::Unreached { who: other, by: who, address, words });
                    return true;
                }
                self.keep_timing(conn, true);
                if let Some(member) = self.members.get_mut(conn) {
                    member.enter(held);
                }
                self.send_off(now, next, Unreached { other: who, address, calls: false });
            }
        }
        true
    }

    /// Lets a worker go that the others cannot train with. That says nothing about the run.
    fn send_off(&mut self, now: Time, conn: ConnId, unreached: Unreached) {
        self.weaken();
        let unreached = Box::new(unreached);
        let refusal = Refusal::Unreached(unreached.clone());
        self.counts.add(refusal.counter(), 1);
        self.send(conn, to_worker::Body::Refused(refusal.on_the_wire()));
        self.lost(now, conn, Loss::Unreached(unreached));
    }

    /// Nobody is known to be at fault: the next generation is formed after a pause, as long as that may help.
    fn try_again(&mut self, now: Time, failure: Failure) -> bool {
        let apart = self.apart.get_or_insert(Apart { since: now, pause: PAUSES.0 / 2 });
        if now.since(apart.since) >= self.config.start_timeout {
            self.fail(failure);
            return true;
        }
        if self.lineup.as_mut().is_some_and(|lineup| !std::mem::replace(&mut lineup.apart, true)) {
            apart.pause = (2 * apart.pause).min(PAUSES.1);
            // Who waits for workers has `start_timeout`, and must not have waited for that in vain.
            self.paused_until = Some(now.after(apart.pause.min(self.config.start_timeout / 4).max(1)));
        }
        false
    }

    /// The pause is over.
    pub(super) fn pause_expired(&mut self, now: Time) {
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            self.settle(now);
        }
    }
}
