//! Units of order-free work, their leases and stages. A unit is leased with a deadline, renewed, requeued at once when its holder goes,
//! and idempotent: its output has a name made from its input and is written once, so a late report of it is as good as the first.

use super::{GivenUp, MOST_TEXT};
use crate::machine::{ConnId, Time};
use ella_proto::v1;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// How often a unit that fails is tried.
const MOST_TRIES: u32 = 3;
/// How many holders a unit may lose: more than chance takes, and fewer than a unit that kills its workers would.
const MOST_LOSSES: u32 = 10;

type Name = Arc<str>;

/// Where a unit is: in exactly one place (J-1).
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// To be released with the next stage.
    Named,
    /// In the queue.
    Waiting,
    /// Under this lease.
    Held(u64),
    Done,
    GivenUp {
        error: String,
        permanent: bool,
    },
}

#[derive(Debug)]
struct Unit {
    place: Place,
    failures: u32,
    losses: u32,
    /// Who could not do it: others are asked first.
    failed_at: BTreeSet<ConnId>,
}

/// A unit in a worker's hands.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) unit: Name,
    pub(super) holder: ConnId,
    pub(super) since: Time,
    /// Samples done so far.
    pub(super) done: u64,
    until: Time,
}

/// Every unit that was ever named.
#[derive(Debug)]
pub(super) struct Units {
    all: BTreeMap<Name, Unit>,
    queue: VecDeque<Name>,
    held: BTreeMap<u64, Lease>,
    /// No lease ends before then.
    due: Time,
    /// Samples of what is held that are done.
    samples: u128,
    next: BTreeSet<Name>,
    stage: Stage,
    last_id: u64,
    /// Of a lease, in milliseconds.
    length: u64,
}

/// The stage that is worked on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stage {
    /// From 1.
    pub(super) number: u32,
    pub(super) units: usize,
    pub(super) done: usize,
    pub(super) given_up: usize,
}

/// What a report of a unit changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    Done,
    DoneBefore,
    Retry,
    GivenUp,
    Unknown,
}

/// How a lease ended before its unit did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Return {
    /// Its holder gave it back.
    Given,
    /// Its holder is gone, or did not renew it.
    Lost,
}

impl Units {
    /// A first stage of the one unit.
    pub(super) fn new(first: &str, length: u64) -> Self {
        let mut units = Self {
            all: BTreeMap::new(),
            queue: VecDeque::new(),
            held: BTreeMap::new(),
            due: Time::default(),
            samples: 0,
            next: BTreeSet::new(),
            stage: Stage::default(),
            last_id: 0,
            length,
        };
        units.name(&[first.to_owned()]);
        units.release();
        units
    }

    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    pub(super) fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.held.values()
    }

    /// How many units each holder has. Looks at all that are held.
    pub(super) fn laden(&self) -> BTreeMap<ConnId, usize> {
        let mut laden = BTreeMap::new();
        self.held.values().for_each(|lease| *laden.entry(lease.holder).or_default() += 1);
        laden
    }

    /// Whether any unit waits for a holder.
    pub(super) fn wait(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Samples of what is held that are done.
    pub(super) fn samples(&self) -> u64 {
        u64::try_from(self.samples).unwrap_or(u64::MAX)
    }

    /// When to look for leases that have ended: not after the first does.
    pub(super) fn deadline(&self) -> Option<Time> {
        (!self.held.is_empty()).then_some(self.due)
    }

    /// Leases the next unit to the first of `free` that has not failed at it, as long as one of `asking` has not.
    pub(super) fn grant(&mut self, now: Time, free: &[ConnId], asking: &[ConnId]) -> Option<(ConnId, u64, Name)> {
        let (at, holder) = self.queue.iter().enumerate().find_map(|(at, name)| Some((at, self.holder_for(name, free, asking)?)))?;
        let unit = self.queue.remove(at)?;
        self.last_id += 1;
        let id = self.last_id;
        self.put(&unit, Place::Held(id));
        if self.held.is_empty() {
            self.due = now.after(self.length);
        }
        self.held.insert(id, Lease { unit: unit.clone(), holder, since: now, until: now.after(self.length), done: 0 });
        Some((holder, id, unit))
    }

    fn holder_for(&self, unit: &Name, free: &[ConnId], asking: &[ConnId]) -> Option<ConnId> {
        let fresh = |conn: &&ConnId| self.all.get(unit).is_none_or(|unit| !unit.failed_at.contains(conn));
        let elsewhere = asking.iter().any(|conn| fresh(&conn));
        if elsewhere { free.iter().find(fresh) } else { free.first() }.copied()
    }

    pub(super) fn renew(&mut self, now: Time, holder: ConnId, renew: v1::LeaseRenew) -> bool {
        let lease = self.held.get_mut(&renew.lease_id).filter(|lease| lease.holder == holder);
        let Some(lease) = lease else { return false };
        let done = lease.done.max(renew.done);
        self.samples += u128::from(done - lease.done);
        (lease.until, lease.done) = (now.after(self.length), done);
        true
    }

    pub(super) fn is_held(&self, holder: ConnId, lease_id: u64) -> bool {
        self.held.get(&lease_id).is_some_and(|lease| lease.holder == holder)
    }

    /// A unit's output stands. Whose report it is does not matter. `then` are the units that follow.
    pub(super) fn finish(&mut self, unit: &str, then: &[String]) -> Report {
        let name: Name = unit.into();
        match self.all.get(unit).map(|unit| &unit.place) {
            Some(Place::Done) => return Report::DoneBefore,
            None | Some(Place::Named) => return Report::Unknown,
            Some(Place::Waiting) => self.queue.retain(|waiting| *waiting != name),
            Some(Place::Held(id)) => drop(self.end(*id)),
            Some(Place::GivenUp { .. }) => self.stage.given_up -= 1,
        }
        self.put(&name, Place::Done);
        self.stage.done += 1;
        self.name(then);
        Report::Done
    }

    /// A unit's holder could not do it. Others get their try, unless it is of no use.
    pub(super) fn fail(&mut self, holder: ConnId, done: &v1::LeaseDone) -> Report {
        if self.all.get(done.unit.as_str()).is_some_and(|unit| unit.place == Place::Done) {
            return Report::DoneBefore;
        }
        let mine = |lease: &&Lease| lease.holder == holder && *lease.unit == *done.unit;
        let Some(name) = self.held.get(&done.lease_id).filter(mine).map(|lease| lease.unit.clone()) else { return Report::Unknown };
        self.end(done.lease_id);
        let Some(unit) = self.all.get_mut(&name) else { return Report::Unknown };
        unit.failures += 1;
        unit.failed_at.insert(holder);
        if done.permanent || unit.failures >= MOST_TRIES {
            self.give_up(&name, done.error.chars().take(MOST_TEXT).collect(), done.permanent);
            return Report::GivenUp;
        }
        self.put(&name, Place::Waiting);
        self.queue.push_back(name);
        Report::Retry
    }

    /// Requeues, first in line, what a holder that is gone had; gives how many.
    pub(super) fn drop_holder(&mut self, holder: ConnId, how: Return) -> usize {
        self.requeue(how, |lease| lease.holder == holder)
    }

    /// Requeues what was not renewed in time; gives how many.
    pub(super) fn expire(&mut self, now: Time) -> usize {
        if self.deadline().is_none_or(|due| now < due) {
            return 0;
        }
        let expired = self.requeue(Return::Lost, |lease| lease.until <= now);
        self.due = self.held.values().map(|lease| lease.until).min().unwrap_or_default();
        expired
    }

    fn end(&mut self, id: u64) -> Option<Lease> {
        let lease = self.held.remove(&id)?;
        self.samples -= u128::from(lease.done);
        Some(lease)
    }

    fn requeue(&mut self, how: Return, which: impl Fn(&Lease) -> bool) -> usize {
        let ids: Vec<u64> = self.held.iter().filter(|(_, lease)| which(lease)).map(|(id, _)| *id).collect();
        for lease in ids.iter().rev().filter_map(|id| self.end(*id)).collect::<Vec<_>>() {
            let Some(unit) = self.all.get_mut(&lease.unit) else { continue };
            unit.losses += u32::from(how == Return::Lost);
            if unit.losses >= MOST_LOSSES {
                let error = format!("{MOST_LOSSES} workers were lost while they held it: look whether it needs more memory than they have");
                self.give_up(&lease.unit, error, false);
            } else {
                self.put(&lease.unit, Place::Waiting);
                self.queue.push_front(lease.unit);
            }
        }
        ids.len()
    }

    /// Whether nothing of the stage waits or is held.
    pub(super) fn stage_is_over(&self) -> bool {
        self.queue.is_empty() && self.held.is_empty()
    }

    /// Releases the next stage (J-3); false if no units were named for it.
    pub(super) fn release(&mut self) -> bool {
        let next = std::mem::take(&mut self.next);
        if next.is_empty() {
            return false;
        }
        self.stage = Stage { number: self.stage.number + 1, units: next.len(), ..Stage::default() };
        for name in &next {
            self.put(name, Place::Waiting);
        }
        self.queue = next.into_iter().collect();
        true
    }

    /// What was given up, in the order of names. Looks at all units, so only where there are any.
    pub(super) fn given_up(&self) -> Vec<GivenUp> {
        if self.stage.given_up == 0 {
            return Vec::new();
        }
        let given_up = |(name, unit): (&Name, &Unit)| match &unit.place {
            Place::GivenUp { error, permanent } => Some(GivenUp { unit: name.to_string(), error: error.clone(), permanent: *permanent }),
            _ => None,
        };
        self.all.iter().filter_map(given_up).collect()
    }

    /// Units for the next stage. One that was named before is that one.
    fn name(&mut self, names: &[String]) {
        for name in names {
            if self.all.contains_key(name.as_str()) {
                continue;
            }
            let name: Name = name.as_str().into();
            self.all.insert(name.clone(), Unit { place: Place::Named, failures: 0, losses: 0, failed_at: BTreeSet::new() });
            self.next.insert(name);
        }
    }

    fn give_up(&mut self, name: &Name, error: String, permanent: bool) {
        self.put(name, Place::GivenUp { error, permanent });
        self.stage.given_up += 1;
    }

    fn put(&mut self, name: &Name, place: Place) {
        if let Some(unit) = self.all.get_mut(name) {
            unit.place = place;
        }
    }

    #[cfg(test)]
    pub(super) fn done_names(&self) -> BTreeSet<String> {
        self.all.iter().filter(|(_, unit)| unit.place == Place::Done).map(|(name, _)| name.to_string()).collect()
    }

    #[cfg(test)]
    pub(super) fn all_done(&self) -> bool {
        self.all.values().all(|unit| unit.place == Place::Done)
    }

    /// J-1 and J-3: places, queue, leases and counts tell the same.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let of = |which: fn(&Place) -> bool| self.all.iter().filter(move |(_, unit)| which(&unit.place)).map(|(name, _)| name.clone());
        let queued: BTreeSet<Name> = self.queue.iter().cloned().collect();
        assert_eq!(queued.len(), self.queue.len(), "J-1: queued twice");
        assert_eq!(of(|place| *place == Place::Waiting).collect::<BTreeSet<_>>(), queued, "J-1: waiting");
        assert_eq!(of(|place| *place == Place::Named).collect::<BTreeSet<_>>(), self.next, "J-1: named");
        for (id, lease) in &self.held {
            assert_eq!(self.all.get(&lease.unit).map(|unit| &unit.place), Some(&Place::Held(*id)), "J-1: held");
        }
        assert_eq!(of(|place| matches!(place, Place::Held(_))).count(), self.held.len(), "J-1: held");
        assert_eq!(self.held.values().map(|lease| u128::from(lease.done)).sum::<u128>(), self.samples, "samples of what is held");
        assert!(self.held.values().all(|lease| self.due <= lease.until), "J-6: a lease ends before anybody looks");
        let Stage { units, done, given_up, .. } = self.stage;
        assert_eq!(self.queue.len() + self.held.len() + done + given_up, units, "J-3: the stage's units");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ConnId = ConnId(1);
    const B: ConnId = ConnId(2);
    const BOTH: [ConnId; 2] = [A, B];

    /// A stage of these units, the second: "plan" named them.
    fn units(names: &[&str]) -> Units {
        let mut units = Units::new("plan", 100);
        units.grant(Time(0), &[A], &[A]);
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(units.finish("plan", &names), Report::Done);
        assert!(units.stage_is_over() && units.release());
        units.last_id = 0;
        units
    }

    fn take(units: &mut Units, now: u64, holder: ConnId) -> Option<(u64, String)> {
        let granted = units.grant(Time(now), &[holder], &[holder]);
        units.check();
        granted.map(|(_, id, unit)| (id, unit.to_string()))
    }

    fn failed(lease_id: u64, unit: &str, permanent: bool) -> v1::LeaseDone {
        v1::LeaseDone { lease_id, unit: unit.into(), error: "no".into(), permanent, ..v1::LeaseDone::default() }
    }

    fn renew(lease_id: u64) -> v1::LeaseRenew {
        v1::LeaseRenew { lease_id, done: 7 }
    }

    #[test]
    fn each_unit_is_granted_once_and_a_dead_holders_units_come_first_again() {
        let mut units = units(&["u1", "u2", "u2", "u3"]);
        assert_eq!(take(&mut units, 0, A), Some((1, "u1".into())));
        assert_eq!(take(&mut units, 0, A), Some((2, "u2".into())));
        assert_eq!(units.drop_holder(A, Return::Lost), 2);
        assert_eq!([1, 2, 3].map(|_| take(&mut units, 1, B).unwrap().1), ["u1", "u2", "u3"]);
        assert_eq!(take(&mut units, 1, B), None);
    }

    #[test]
    fn a_lease_lasts_until_its_deadline_unless_its_holder_renews_it() {
        let mut units = units(&["u1"]);
        take(&mut units, 0, A);
        assert_eq!(units.deadline(), Some(Time(100)));
        assert!(units.renew(Time(50), A, renew(1)));
        assert_eq!(units.leases().next().map(|lease| lease.done), Some(7));
        assert!(!units.renew(Time(50), B, renew(1)), "not its holder");
        assert!(!units.renew(Time(50), A, renew(9)), "no such lease");
        assert_eq!(units.expire(Time(149)), 0);
        assert_eq!(units.expire(Time(150)), 1);
        assert!(!units.renew(Time(150), A, renew(1)));
    }

    #[test]
    fn an_output_that_stands_is_taken_from_anyone_and_only_once() {
        let mut units = units(&["u1", "u2"]);
        take(&mut units, 0, A);
        units.expire(Time(100));
        assert_eq!(take(&mut units, 100, B), Some((2, "u1".into())));
        assert_eq!(units.finish("u1", &["f".into()]), Report::Done, "late, but the output is there");
        assert_eq!(units.finish("u1", &["g".into()]), Report::DoneBefore);
        assert_eq!(units.finish("u9", &[]), Report::Unknown);
        assert_eq!(units.finish("f", &[]), Report::Unknown, "not released yet");
        assert_eq!(units.fail(B, &failed(2, "u1", true)), Report::DoneBefore);
        units.check();
        assert_eq!(units.finish("u2", &[]), Report::Done, "while it waits");
        assert!(units.stage_is_over() && units.release());
        assert_eq!(units.stage(), Stage { number: 3, units: 1, done: 0, given_up: 0 });
    }

    #[test]
    fn a_unit_that_fails_is_tried_elsewhere_first_and_given_up_after_three_tries() {
        let mut units = units(&["u", "v"]);
        take(&mut units, 0, A);
        assert_eq!(units.fail(B, &failed(1, "u", false)), Report::Unknown, "not its holder");
        assert_eq!(units.fail(A, &failed(1, "u", false)), Report::Retry);
        assert_eq!(units.grant(Time(0), &[A], &BOTH).map(|(_, _, unit)| unit.to_string()), Some("v".into()));
        assert_eq!(units.grant(Time(0), &[A], &BOTH), None, "B, which is busy, has not tried it");
        assert_eq!(units.grant(Time(0), &BOTH, &BOTH).map(|(holder, id, _)| (holder, id)), Some((B, 3)));
        assert_eq!(units.fail(B, &failed(3, "u", false)), Report::Retry);
        assert_eq!(units.grant(Time(0), &[A], &BOTH).map(|(holder, id, _)| (holder, id)), Some((A, 4)), "all have tried it");
        assert_eq!(units.fail(A, &failed(4, "u", false)), Report::GivenUp);
        assert_eq!(units.given_up(), vec![GivenUp { unit: "u".into(), error: "no".into(), permanent: false }]);
        units.check();
        assert_eq!(units.finish("u", &[]), Report::Done, "an output that stands is better than any error");
        assert!(units.given_up().is_empty());
        units.check();
    }

    #[test]
    fn an_error_that_is_the_same_everywhere_gives_up_at_once() {
        let mut units = units(&["u"]);
        take(&mut units, 0, A);
        assert_eq!(units.fail(A, &failed(1, "u", true)), Report::GivenUp);
        assert!(units.stage_is_over() && units.given_up()[0].permanent);
    }

    #[test]
    fn a_unit_that_kills_its_workers_is_given_up_but_not_one_that_is_given_back() {
        let mut units = units(&["u"]);
        for _ in 0..50 {
            take(&mut units, 0, A).unwrap();
            units.drop_holder(A, Return::Given);
        }
        for _ in 0..MOST_LOSSES {
            assert!(units.given_up().is_empty());
            take(&mut units, 0, A).unwrap();
            units.drop_holder(A, Return::Lost);
        }
        assert!(units.given_up()[0].error.contains("10 workers were lost"), "{:?}", units.given_up());
        units.check();
    }
}
