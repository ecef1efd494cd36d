//! Leases for order-free work (prepare, embed): a unit is leased with a deadline, renewed, requeued at once when its holder goes, and
//! idempotent: its output has a name made from its input and is written once, so a late second report is as good as the first.

use super::{ConnId, Core, Time};
use ella_proto::v1::{self, to_worker};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How often a unit that fails is tried.
const MOST_TRIES: u32 = 3;

#[derive(Debug)]
struct Lease {
    unit: String,
    holder: ConnId,
    until: Time,
}

/// Every unit, in exactly one of four places.
#[derive(Debug)]
pub(super) struct Leases {
    waiting: VecDeque<String>,
    held: BTreeMap<u64, Lease>,
    done: BTreeSet<String>,
    given_up: BTreeMap<String, String>,
    failures: BTreeMap<String, u32>,
    last_id: u64,
    length: u64,
}

/// What a report of a unit changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Report {
    Done,
    DoneBefore,
    Retry,
    GivenUp,
    Unknown,
}

impl Leases {
    pub(super) fn new(units: Vec<String>, length: u64) -> Self {
        let unique: BTreeSet<String> = units.into_iter().collect();
        Self {
            waiting: unique.into_iter().collect(),
            held: BTreeMap::new(),
            done: BTreeSet::new(),
            given_up: BTreeMap::new(),
            failures: BTreeMap::new(),
            last_id: 0,
            length,
        }
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.held.values().map(|lease| lease.until).min()
    }

    /// Units waiting, held, done and given up.
    pub(super) fn sizes(&self) -> [usize; 4] {
        [self.waiting.len(), self.held.len(), self.done.len(), self.given_up.len()]
    }

    #[cfg(test)]
    pub(super) fn holders(&self) -> impl Iterator<Item = ConnId> {
        self.held.values().map(|lease| lease.holder)
    }

    fn grant(&mut self, now: Time, holder: ConnId) -> Option<(u64, String)> {
        let unit = self.waiting.pop_front()?;
        self.last_id += 1;
        self.held.insert(self.last_id, Lease { unit: unit.clone(), holder, until: now.after(self.length) });
        Some((self.last_id, unit))
    }

    fn renew(&mut self, now: Time, holder: ConnId, id: u64) -> bool {
        let lease = self.held.get_mut(&id).filter(|lease| lease.holder == holder);
        lease.map(|lease| lease.until = now.after(self.length)).is_some()
    }

    /// A unit's output stands, or its holder could not make it. Who holds the lease by now does not matter for an output that stands.
    fn report(&mut self, holder: ConnId, done: &v1::LeaseDone) -> Report {
        if self.done.contains(&done.unit) {
            return Report::DoneBefore;
        }
        if done.error.is_empty() {
            return self.finish(&done.unit);
        }
        let held = self.held.get(&done.lease_id).is_some_and(|lease| lease.holder == holder && lease.unit == done.unit);
        if !held {
            return Report::Unknown;
        }
        self.held.remove(&done.lease_id);
        let failures = self.failures.entry(done.unit.clone()).or_default();
        *failures += 1;
        if *failures < MOST_TRIES {
            self.waiting.push_back(done.unit.clone());
            return Report::Retry;
        }
        self.given_up.insert(done.unit.clone(), done.error.clone());
        Report::GivenUp
    }

    fn finish(&mut self, unit: &str) -> Report {
        let before = self.waiting.len() + self.held.len() + self.given_up.len();
        self.waiting.retain(|waiting| waiting != unit);
        self.held.retain(|_, lease| lease.unit != unit);
        self.given_up.remove(unit);
        if before == self.waiting.len() + self.held.len() + self.given_up.len() {
            return Report::Unknown;
        }
        self.done.insert(unit.to_owned());
        Report::Done
    }

    /// Requeues, first in line, what a holder that is gone had.
    pub(super) fn drop_holder(&mut self, holder: ConnId) -> usize {
        self.requeue(|lease| lease.holder == holder)
    }

    /// Requeues what was not renewed in time.
    pub(super) fn expire(&mut self, now: Time) -> usize {
        self.requeue(|lease| lease.until <= now)
    }

    fn requeue(&mut self, which: impl Fn(&Lease) -> bool) -> usize {
        let ids: Vec<u64> = self.held.iter().filter(|(_, lease)| which(lease)).map(|(id, _)| *id).collect();
        for id in ids.iter().rev() {
            if let Some(lease) = self.held.remove(id) {
                self.waiting.push_front(lease.unit);
            }
        }
        ids.len()
    }
}

impl Core {
    pub(super) fn lease_request(&mut self, now: Time, conn: ConnId) {
        let deadline_ms = self.config.welcome.lease_ms;
        let answer = match self.leases.grant(now, conn) {
            Some((lease_id, unit)) => to_worker::Body::LeaseGrant(v1::LeaseGrant { unit, lease_id, deadline_ms }),
            None => {
                let finished = self.leases.held.is_empty();
                to_worker::Body::NoLease(v1::NoLease { finished, retry_ms: self.config.welcome.heartbeat_ms })
            }
        };
        self.send(conn, answer);
    }

    pub(super) fn lease_renew(&mut self, now: Time, conn: ConnId, renew: v1::LeaseRenew) {
        if !self.leases.renew(now, conn, renew.lease_id) {
            self.counts.add("refused_lost_lease", 1);
        }
    }

    pub(super) fn lease_done(&mut self, conn: ConnId, done: v1::LeaseDone) {
        self.counts.add(
            match self.leases.report(conn, &done) {
                Report::Done => "units_done",
                Report::DoneBefore => "units_done_before",
                Report::Retry => "units_retried",
                Report::GivenUp => "units_given_up",
                Report::Unknown => "refused_unknown_unit",
            },
            1,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ConnId = ConnId(1);
    const B: ConnId = ConnId(2);

    fn leases() -> Leases {
        Leases::new(vec!["u1".into(), "u2".into(), "u2".into()], 100)
    }

    fn done(id: u64, unit: &str, error: &str) -> v1::LeaseDone {
        v1::LeaseDone { lease_id: id, unit: unit.into(), error: error.into() }
    }

    #[test]
    fn each_unit_is_granted_once_and_a_dead_holders_units_come_first_again() {
        let mut leases = leases();
        assert_eq!(leases.grant(Time(0), A), Some((1, "u1".into())));
        assert_eq!(leases.grant(Time(0), B), Some((2, "u2".into())));
        assert_eq!(leases.grant(Time(0), A), None);
        assert_eq!(leases.drop_holder(A), 1);
        assert_eq!(leases.grant(Time(1), B), Some((3, "u1".into())));
        assert_eq!(leases.sizes(), [0, 2, 0, 0]);
    }

    #[test]
    fn a_lease_lasts_until_its_deadline_unless_its_holder_renews_it() {
        let mut leases = leases();
        leases.grant(Time(0), A);
        assert_eq!(leases.deadline(), Some(Time(100)));
        assert!(leases.renew(Time(50), A, 1));
        assert!(!leases.renew(Time(50), B, 1), "not its holder");
        assert!(!leases.renew(Time(50), A, 9), "no such lease");
        assert_eq!(leases.expire(Time(149)), 0);
        assert_eq!(leases.expire(Time(150)), 1);
        assert!(!leases.renew(Time(150), A, 1));
    }

    #[test]
    fn an_output_that_stands_is_taken_from_anyone_and_only_once() {
        let mut leases = leases();
        leases.grant(Time(0), A);
        leases.expire(Time(100));
        leases.grant(Time(100), B);
        assert_eq!(leases.report(A, &done(1, "u1", "")), Report::Done, "late, but the output is there");
        assert_eq!(leases.report(B, &done(2, "u1", "")), Report::DoneBefore);
        assert_eq!(leases.report(B, &done(2, "u9", "")), Report::Unknown);
        assert_eq!(leases.sizes(), [1, 0, 1, 0]);
    }

    #[test]
    fn a_unit_that_keeps_failing_is_given_up_with_its_reason() {
        let mut leases = Leases::new(vec!["u".into()], 100);
        for (id, report) in [(1, Report::Retry), (2, Report::Retry), (3, Report::GivenUp)] {
            leases.grant(Time(0), A);
            assert_eq!(leases.report(B, &done(id, "u", "no")), Report::Unknown, "not its holder");
            assert_eq!(leases.report(A, &done(id, "u", "no")), report);
        }
        assert_eq!(leases.given_up.get("u").map(String::as_str), Some("no"));
        assert_eq!(leases.grant(Time(0), A), None);
        assert_eq!(leases.sizes(), [0, 0, 0, 1]);
    }
}
