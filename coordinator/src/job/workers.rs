//! Who works: coming, leaving, and what each said so far.

use super::{JobCore, JobFailure, JobNote};
use crate::core::{Loss, Note, Refusal, Who, check_identity, shown};
use crate::job::units::Return;
use crate::machine::{Closed, ConnId, Effect, Time};
use ella_proto::v1::{self, to_worker};
use std::collections::BTreeMap;

/// A worker that was taken in.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) hello: v1::Hello,
    pub(super) heard: Time,
    /// Units that it may hold at once; 0 until it asks.
    pub(super) slots: u32,
    pub(super) units_done: u64,
    /// How its process is.
    pub(super) vitals: Option<v1::Vitals>,
    /// Units that follow one whose end it has not told yet, by lease.
    named: BTreeMap<u64, Vec<String>>,
    /// Names were refused, of leases that it does not hold: the end of such a one may not tell all that follow.
    unnamed: bool,
}

impl Worker {
    fn who(&self) -> Who {
        Who::of(&self.hello, None)
    }
}

/// The workers whose streams live, in the order in which those were opened.
#[derive(Debug, Default)]
pub(super) struct Workers(BTreeMap<ConnId, Worker>);

impl Workers {
    pub(super) fn iter(&self) -> impl Iterator<Item = (ConnId, &Worker)> {
        self.0.iter().map(|(conn, worker)| (*conn, worker))
    }

    pub(super) fn get_mut(&mut self, conn: ConnId) -> Option<&mut Worker> {
        self.0.get_mut(&conn)
    }

    /// Notes that a worker spoke, in this session or another (which is no sign of life). False for a stranger.
    pub(super) fn heard(&mut self, conn: ConnId, now: Time, of_session: bool) -> bool {
        let worker = self.0.get_mut(&conn);
        let known = worker.is_some();
        if let Some(worker) = worker.filter(|_| of_session) {
            worker.heard = now;
        }
        known
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn oldest_heard(&self) -> Option<Time> {
        self.0.values().map(|worker| worker.heard).min()
    }

    pub(super) fn silent(&self, now: Time, lease_ms: u64) -> Vec<ConnId> {
        self.iter().filter(|(_, worker)| now.since(worker.heard) >= lease_ms).map(|(conn, _)| conn).collect()
    }

    pub(super) fn ask(&mut self, conn: ConnId, slots: u32) {
        if let Some(worker) = self.0.get_mut(&conn) {
            worker.slots = slots;
        }
    }

    /// Keeps names until the unit that they follow is done.
    pub(super) fn name(&mut self, conn: ConnId, then: v1::LeaseThen) {
        if let Some(worker) = self.0.get_mut(&conn) {
            worker.named.entry(then.lease_id).or_default().extend(then.units);
        }
    }

    /// Notes that names were not kept.
    pub(super) fn refuse_names(&mut self, conn: ConnId) {
        if let Some(worker) = self.0.get_mut(&conn) {
            worker.unnamed = true;
        }
    }

    /// The names kept for a lease, which the worker still holds or not, and the last of them. None: some may have been refused.
    pub(super) fn take_names(&mut self, conn: ConnId, (lease_id, held): (u64, bool), last: Vec<String>) -> Option<Vec<String>> {
        let Some(worker) = self.0.get_mut(&conn) else { return Some(last) };
        let mut names = worker.named.remove(&lease_id).unwrap_or_default();
        names.extend(last);
        (held || !worker.unnamed).then_some(names)
    }

    /// For how many leases names are kept.
    #[cfg(test)]
    pub(super) fn leases_named(&self) -> usize {
        self.0.values().map(|worker| worker.named.len()).sum()
    }

    pub(super) fn remove_all(&mut self) -> Vec<ConnId> {
        std::mem::take(&mut self.0).into_keys().collect()
    }
}

impl JobCore {
    pub(super) fn hello(&mut self, now: Time, conn: ConnId, hello: v1::Hello) {
        if self.workers.0.contains_key(&conn) {
            return self.counts.add("refused_second_hello", 1);
        }
        if let Err(refusal) = self.admit(&hello) {
            return self.refuse(conn, shown(&hello.worker_id), &refusal);
        }
        let (worker, host, pid) = (hello.worker_id.clone(), hello.host.clone(), hello.pid);
        let named = BTreeMap::new();
        self.workers.0.insert(conn, Worker { hello, heard: now, slots: 0, units_done: 0, vitals: None, named, unnamed: false });
        if self.alone.take().is_some() {
            self.sample_rate.restart(now);
            self.unit_rate.restart(now);
        }
        self.send(conn, to_worker::Body::Welcome(self.settings.welcome.clone()));
        self.joined += 1;
        self.note(JobNote::Joined { worker, host, pid, workers: self.workers.0.len() });
    }

    /// A sign of life, with how the worker's process is.
    pub(super) fn beat(&mut self, conn: ConnId, beat: &v1::Heartbeat) {
        for (name, n) in &beat.counts {
            self.counts.add(name, *n);
        }
        if let Some(worker) = self.workers.get_mut(conn) {
            worker.vitals = beat.vitals.or(worker.vitals);
        }
    }

    fn admit(&self, hello: &v1::Hello) -> Result<(), Refusal> {
        if let Some(outcome) = &self.outcome {
            return Err(Refusal::JobOver { outcome: outcome.on_the_wire(), permanent: outcome.is_permanent() });
        }
        check_identity(hello)?;
        Refusal::of_another_build(hello, &self.settings.version, &self.settings.welcome.config_digest)?;
        match self.workers.0.values().find(|worker| worker.hello.worker_id == hello.worker_id) {
            Some(holder) => Err(Refusal::DuplicateWorker { holder: Box::new(holder.who()) }),
            None => Ok(()),
        }
    }

    pub(super) fn refuse(&mut self, conn: ConnId, worker: String, refusal: &Refusal) {
        self.counts.add(refusal.counter(), 1);
        self.send(conn, to_worker::Body::Refused(refusal.on_the_wire()));
        self.effects.push(Effect::Close(conn));
        self.effects.push(Effect::Note(Note::Refused { worker, why: refusal.to_string() }));
    }

    pub(super) fn closed(&mut self, now: Time, conn: ConnId, how: Closed) {
        if let Some(name) = how.counter() {
            self.counts.add(name, 1);
        }
        self.lost(now, conn, how.into());
    }

    /// Lets go of workers that were not heard of for too long.
    pub(super) fn look_for_silent(&mut self, now: Time) {
        let silent_ms = self.settings.welcome.lease_ms;
        if now.since(self.all_heard) < silent_ms {
            return;
        }
        for conn in self.workers.silent(now, silent_ms) {
            self.counts.add("leases_missed", 1);
            self.lost(now, conn, Loss::Silent { silent_ms });
        }
        self.all_heard = self.workers.oldest_heard().unwrap_or(now);
    }

    fn lost(&mut self, now: Time, conn: ConnId, how: Loss) {
        if self.gone(now, conn, Return::Lost, how.to_string()) {
            self.counts.add("workers_lost", 1);
        }
    }

    /// It says that it leaves.
    pub(super) fn left(&mut self, now: Time, conn: ConnId) {
        if self.gone(now, conn, Return::Given, "it was told to leave".to_owned()) {
            self.counts.add("workers_left", 1);
        }
    }

    /// It says that it cannot do the job. If no other could, the job fails; else the others go on.
    pub(super) fn worker_failed(&mut self, now: Time, conn: ConnId, failed: v1::Failed) {
        self.counts.add("workers_failed", 1);
        let message: String = failed.message.chars().take(super::MOST_TEXT).collect();
        let who = self.workers.0.get(&conn).map(Worker::who);
        self.gone(now, conn, Return::Given, message.clone());
        if let (Some(who), true) = (who, failed.permanent) {
            self.end(JobFailure::Worker { who, message }.into());
        }
    }

    /// Lets a worker go. What it held waits again, before all else.
    fn gone(&mut self, now: Time, conn: ConnId, how: Return, why: String) -> bool {
        let Some(worker) = self.workers.0.remove(&conn) else { return false };
        let requeued = self.units.drop_holder(conn, how);
        self.counts.add_some("leases_requeued", requeued);
        self.effects.push(Effect::Close(conn));
        if self.workers.is_empty() {
            self.alone = Some(now);
        }
        self.note(JobNote::Gone { worker: worker.hello.worker_id, why, requeued });
        true
    }
}
