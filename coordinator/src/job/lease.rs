//! Leases as workers see them: granted as units and workers become free, renewed, reported.

use super::units::Report;
use super::{JobCore, JobNote};
use crate::machine::{ConnId, Time};
use ella_proto::v1::{self, to_worker};

impl JobCore {
    /// Grants what waits to workers that may hold more, the least laden first.
    pub(super) fn deal(&mut self, now: Time) {
        if !self.units.wait() {
            return;
        }
        let laden = self.units.laden();
        let asking: Vec<ConnId> = self.workers.iter().filter(|(_, worker)| worker.slots > 0).map(|(conn, _)| conn).collect();
        let mut free: Vec<(usize, u32, ConnId)> = self
            .workers
            .iter()
            .map(|(conn, worker)| (laden.get(&conn).copied().unwrap_or(0), worker.slots, conn))
            .filter(|(held, slots, _)| *held < *slots as usize)
            .collect();
        while !free.is_empty() {
            free.sort_unstable_by_key(|(held, _, conn)| (*held, *conn));
            let conns: Vec<ConnId> = free.iter().map(|(_, _, conn)| *conn).collect();
            let Some((conn, lease_id, unit)) = self.units.grant(now, &conns, &asking) else { return };
            self.send(conn, to_worker::Body::LeaseGrant(v1::LeaseGrant { unit: unit.to_string(), lease_id }));
            if let Some((held, ..)) = free.iter_mut().find(|(_, _, other)| *other == conn) {
                *held += 1;
            }
            free.retain(|(held, slots, _)| *held < *slots as usize);
        }
    }

    pub(super) fn lease_renew(&mut self, now: Time, conn: ConnId, renew: v1::LeaseRenew) {
        if !self.units.renew(now, conn, renew) {
            return self.counts.add("refused_lost_lease", 1);
        }
        self.sample_rate.note(now, self.samples_now());
    }

    /// Names of units that follow. They are kept for a lease that the worker holds: of those there are few.
    pub(super) fn lease_then(&mut self, conn: ConnId, then: v1::LeaseThen) {
        if self.units.is_held(conn, then.lease_id) {
            return self.workers.name(conn, then);
        }
        self.workers.refuse_names(conn);
        self.counts.add("refused_lost_lease", 1);
    }

    pub(super) fn lease_done(&mut self, now: Time, conn: ConnId, mut done: v1::LeaseDone) {
        let lease = (done.lease_id, self.units.is_held(conn, done.lease_id));
        let then = self.workers.take_names(conn, lease, std::mem::take(&mut done.then));
        let failed = !done.error.is_empty();
        let report = match then {
            _ if failed => self.units.fail(conn, &done),
            Some(then) => self.units.finish(&done.unit, &then),
            // What would follow is not all known: whoever holds the unit now does it again.
            None => Report::Unknown,
        };
        self.counts.add(
            match report {
                Report::Done => "units_done",
                Report::DoneBefore => "units_done_before",
                Report::Retry => "units_retried",
                Report::GivenUp => "units_given_up",
                Report::Unknown => "refused_unknown_unit",
            },
            1,
        );
        match report {
            Report::Done => self.unit_done(now, conn, &done),
            Report::Retry | Report::GivenUp => self.unit_failed(conn, done, report == Report::GivenUp),
            Report::DoneBefore | Report::Unknown => {}
        }
    }

    fn unit_done(&mut self, now: Time, conn: ConnId, done: &v1::LeaseDone) {
        self.samples = self.samples.saturating_add(done.done);
        for (name, n) in &done.counts {
            self.results.add(name, *n);
        }
        if let Some(worker) = self.workers.get_mut(conn) {
            worker.units_done += 1;
        }
        self.sample_rate.note(now, self.samples_now());
        self.unit_rate.note(now, self.units.stage().done as u64);
    }

    fn unit_failed(&mut self, conn: ConnId, done: v1::LeaseDone, given_up: bool) {
        let worker = self.workers.get_mut(conn).map(|worker| worker.hello.worker_id.clone()).unwrap_or_default();
        let error = done.error.chars().take(super::MOST_TEXT).collect();
        self.note(JobNote::UnitFailed { unit: done.unit, worker, error, permanent: done.permanent, given_up });
    }

    /// Samples of the units that are done, and of those that are held.
    pub(super) fn samples_now(&self) -> u64 {
        self.samples.saturating_add(self.units.samples())
    }
}
