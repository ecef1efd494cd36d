//! Commits: gathering what a record binds, writing it, and giving up old ones (COMMIT).

use super::members::{Held, Member};
use super::{ConnId, Core, Effect, Failure, Field, Mutation, Note, Outcome, Phase, Refusal, Time};
use crate::machine::total;
use ella_proto::ids::{Generation, Rank, Step};
use ella_proto::v1::{self, to_worker};
use ella_store::{Body, Commit, Digest, LedgerEpoch, Part, commit_folder};
use std::collections::BTreeMap;

/// The files of every commit.
pub const PARTS: [&str; 3] = ["connector.safetensors", "ema.safetensors", "optimizer.safetensors"];

/// A commit whose record is not written yet.
#[derive(Debug)]
struct Pending {
    since: Time,
    /// Whose ranks report it.
    generation: Generation,
    digests: BTreeMap<Rank, v1::StateDigest>,
    parts: BTreeMap<&'static str, Part>,
    /// Who has saved each, by id.
    savers: BTreeMap<&'static str, String>,
    /// The record is on its way to the log.
    appending: bool,
}

impl Pending {
    fn is_complete(&self, ranks: usize) -> bool {
        self.digests.len() == ranks && self.parts.len() == PARTS.len()
    }
}

/// The commits of the run: those in the log, and those under way.
#[derive(Debug)]
pub(super) struct Commits {
    /// Not given up, oldest first.
    live: Vec<Commit>,
    pending: BTreeMap<Step, Pending>,
    /// Written by this incarnation: how many, their bytes, and milliseconds from the first report to the record.
    written: u64,
    written_bytes: u64,
    written_ms: u64,
    /// When the newest of them was recorded.
    last_at: Time,
}

impl Commits {
    pub(super) fn new(live: Vec<Commit>) -> Self {
        Self { live, pending: BTreeMap::new(), written: 0, written_bytes: 0, written_ms: 0, last_at: Time(0) }
    }

    pub(super) fn last(&self) -> Option<&Commit> {
        self.live.last()
    }

    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Adds what was written to the numbers that only rise.
    pub(super) fn total(&self, totals: &mut v1::Totals) {
        totals.commit_bytes = self.written_bytes;
        totals.commit_seconds = self.written_ms as f64 / 1000.0;
    }

    /// Milliseconds since the newest of this incarnation, or since that began.
    pub(super) fn age(&self, now: Time) -> u64 {
        now.since(self.last_at)
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The step of the commit whose record is on its way to the log, if one is.
    pub(super) fn appending(&self) -> Option<Step> {
        self.pending.iter().find(|(_, pending)| pending.appending).map(|(step, _)| *step)
    }

    /// Forgets what the ranks of a generation that is over have reported. A record on its way to the log gets there all the same.
    pub(super) fn drop_unrecorded(&mut self) {
        self.pending.retain(|_, pending| pending.appending);
    }

    fn of(&self, generation: Generation) -> impl Iterator<Item = (&Step, &Pending)> {
        self.pending.iter().filter(move |(_, pending)| pending.generation == generation)
    }

    /// Whether a rank still has something to report for a commit under way.
    pub(super) fn lacks_reports(&self, generation: Generation, ranks: usize) -> bool {
        self.of(generation).any(|(_, pending)| !pending.is_complete(ranks))
    }

    /// The first to be overdue, and when that is: one that lacks reports at `reports` after it was begun, any other at `record` after that.
    pub(super) fn due(
        &self,
        generation: Generation,
        ranks: usize,
        (reports, record): (impl Fn(Time) -> Time, u64),
    ) -> Option<(Time, Step)> {
        let due = |pending: &Pending| if pending.is_complete(ranks) { pending.since.after(record) } else { reports(pending.since) };
        self.of(generation).map(|(step, pending)| (due(pending), *step)).min()
    }

    /// What a commit under way lacks: reports, or the log's answer.
    pub(super) fn lacking(&self, step: Step, ranks: usize, now: Time) -> Option<Failure> {
        let pending = self.pending.get(&step)?;
        let waited_ms = now.since(pending.since);
        if pending.is_complete(ranks) {
            return Some(Failure::Append { error: format!("the record of the commit of step {step} was not taken within {waited_ms} ms") });
        }
        let silent = (0..).map(Rank).take(ranks).find(|rank| !pending.digests.contains_key(rank));
        let states = silent.map(|rank| format!("the state of {} of {ranks} ranks (rank {rank}, for one)", ranks - pending.digests.len()));
        let files = PARTS.iter().filter(|name| !pending.parts.contains_key(*name)).map(|name| (*name).to_owned());
        let lacks = states.into_iter().chain(files).collect::<Vec<_>>().join(", ");
        Some(Failure::CommitOverdue { step, lacks, waited_ms })
    }

    /// Whether all ranks have reported all of this one.
    pub(super) fn is_reported(&self, step: Step, ranks: usize) -> bool {
        self.pending.get(&step).is_some_and(|pending| pending.is_complete(ranks))
    }

    fn pending(&mut self, step: Step, now: Time, generation: Generation) -> &mut Pending {
        let (digests, parts, savers) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let new = || Pending { since: now, generation, digests, parts, savers, appending: false };
        self.pending.entry(step).or_insert_with(new)
    }

    /// What the keep rule gives up now.
    fn surplus(&self, keep: usize) -> Vec<String> {
        let surplus = self.live.len().saturating_sub(keep.max(1));
        self.live[..surplus].iter().map(|commit| commit.folder.clone()).collect()
    }
}

impl Core {
    /// The commit of this generation that is overdue first, and when it is. Where a worker came back its messages may be lost, so that what
    /// lacks some is not waited for long.
    pub(super) fn commit_due(&self) -> Option<(Time, Step)> {
        let (lease, timeout) = (self.config.welcome.lease_ms, self.config.commit_timeout);
        let shaken = self.lineup.as_ref().and_then(|lineup| lineup.shaken);
        let reports =
            move |since: Time| shaken.map_or(since.after(timeout), |shaken| since.max(shaken).after(lease).min(since.after(timeout)));
        self.commits.due(self.generation, self.world(), (reports, timeout)).filter(|_| self.phase.has_begun())
    }

    /// The rank that reports for a commit of `step`, if it may still do so.
    fn takes_commit(&mut self, conn: ConnId, step: u64) -> Option<Rank> {
        let takes = self.phase.has_begun() && Step(step) > self.last_commit() && step <= self.config.steps;
        let rank = self.members.rank(conn).filter(|_| takes);
        self.counts.add_some("refused_out_of_turn", usize::from(rank.is_none()));
        rank
    }

    /// A rank's digest of its whole state.
    pub(super) fn state(&mut self, now: Time, conn: ConnId, digest: v1::StateDigest) {
        let Some(rank) = self.takes_commit(conn, digest.step) else { return };
        if let Some(failure) = self.malformed(conn, &[(Field::State, &digest.digest)]).or_else(|| self.malformed_ledger(conn, &digest)) {
            return self.fail(failure);
        }
        let pending = self.commits.pending(Step(digest.step), now, self.generation);
        if pending.appending || pending.digests.contains_key(&rank) {
            return self.counts.add("refused_duplicate_digest", 1);
        }
        pending.digests.insert(rank, digest);
        self.advance_commits();
    }

    fn malformed_ledger(&self, conn: ConnId, digest: &v1::StateDigest) -> Option<Failure> {
        let is_hash = |hash: &str| hash.len() == 32 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let bad = digest.ledger.iter().find(|epoch| !is_hash(&epoch.hash))?;
        let found = bad.hash.chars().take(64).collect();
        Some(Failure::Malformed { who: self.members.who(conn)?, field: Field::Ledger, found })
    }

    /// A file of a commit is in the store.
    pub(super) fn part(&mut self, now: Time, conn: ConnId, saved: v1::PartSaved) {
        if self.takes_commit(conn, saved.step).is_none() {
            return;
        }
        let (Some(name), Some(who)) = (PARTS.iter().find(|name| **name == saved.name), self.members.who(conn)) else {
            return self.counts.add("refused_unknown_part", 1);
        };
        let Ok(blake3) = saved.blake3.parse::<Digest>() else {
            let failure = self.malformed(conn, &[(Field::State, &saved.blake3)]);
            return failure.into_iter().for_each(|failure| self.fail(failure));
        };
        let step = Step(saved.step);
        let part = Part { name: saved.name, bytes: saved.bytes, blake3 };
        let pending = self.commits.pending(step, now, self.generation);
        match pending.parts.get(name) {
            // Of a generation before, whose ranks had all reported.
            _ if pending.appending => self.counts.add("parts_saved_again", 1),
            None => {
                pending.parts.insert(name, part);
                pending.savers.insert(name, who.worker_id);
                self.advance_commits();
            }
            Some(first) if *first == part => self.counts.add("parts_saved_again", 1),
            Some(first) => {
                let (expected, found) = (first.blake3.to_string(), part.blake3.to_string());
                self.fail(Failure::PartDiffers { who, step, name: part.name, expected, found });
            }
        }
    }

    /// Judges states as soon as all ranks have reported, and writes the record once the parts are in, in the order of the steps.
    fn advance_commits(&mut self) {
        let ranks = self.world();
        let mut judged = self.commits.of(self.generation).filter(|(_, pending)| pending.digests.len() == ranks);
        let failure = judged.find_map(|(step, pending)| self.judge_states(*step, pending));
        drop(judged);
        if let Some(failure) = failure {
            return self.fail(failure);
        }
        let Some((&step, pending)) = self.commits.pending.first_key_value() else { return };
        let early =
            self.is_mutated(Mutation::RecordsBeforeParts) && pending.digests.len() == ranks && pending.parts.len() + 1 == PARTS.len();
        if pending.appending || !(pending.is_complete(ranks) || early) {
            return;
        }
        if let Some(commit) = self.record(step, pending) {
            self.effects.push(Effect::Append(Body::Commit(commit)));
            self.commits.pending.entry(step).and_modify(|pending| pending.appending = true);
        }
    }

    fn judge_states(&self, step: Step, pending: &Pending) -> Option<Failure> {
        let column = |text: fn(&v1::StateDigest) -> String| -> Vec<(Rank, String)> {
            pending.digests.iter().map(|(rank, digest)| (*rank, text(digest))).collect()
        };
        let columns = [
            (Field::State, column(|digest| digest.digest.clone())),
            (Field::Position, column(|digest| format!("epoch {}, step {}", digest.epoch, digest.step_in_epoch))),
            (Field::Ledger, column(|digest| ledger_text(&digest.ledger))),
        ];
        columns.iter().find_map(|(field, values)| self.members.disagreement(*field, step, values))
    }

    /// Binds everything together. Only forms that were checked on arrival are parsed here.
    fn record(&self, step: Step, pending: &Pending) -> Option<Commit> {
        let digest = pending.digests.values().next()?;
        let agreed = self.agreed.as_ref()?;
        let ledger = digest.ledger.iter().map(|e| LedgerEpoch { epoch: e.epoch, samples: e.samples, hash: e.hash.clone() }).collect();
        Some(Commit {
            step: step.0,
            generation: self.generation.0,
            world: u32::try_from(self.world()).ok()?,
            folder: commit_folder(step.0, self.term.0, self.generation.0),
            parts: pending.parts.values().cloned().collect(),
            config_digest: self.config.welcome.config_digest.parse().ok()?,
            data_digest: agreed.data_digest.parse().ok()?,
            models_digest: agreed.models_digest.parse().ok()?,
            epoch: digest.epoch,
            step_in_epoch: digest.step_in_epoch,
            ledger,
            state_digest: digest.digest.parse().ok()?,
            computed_with: self.computed_with.clone().unwrap_or_default(),
        })
    }

    /// A part is not in the run's folder, so that its commit was not recorded: whoever has saved it writes into another folder, and goes. The others
    /// still hold the state, of which their next generation makes a commit.
    pub(super) fn part_unseen(&mut self, now: Time, (step, part): (Step, &str), why: String) {
        let Some(pending) = self.commits.pending.get_mut(&step).filter(|_| !self.phase.is_over()) else { return };
        // It lacks that part again: nobody has done its work by it.
        pending.appending = false;
        pending.parts.remove(part);
        let (generation, saver) = (pending.generation, pending.savers.remove(part));
        if let Some(conn) = saver.and_then(|worker| self.members.conn_of(&worker)) {
            let refusal = Refusal::Elsewhere { why: why.clone() };
            self.counts.add(refusal.counter(), 1);
            self.send(conn, to_worker::Body::Refused(refusal.on_the_wire()));
            self.worker_failed(now, conn, v1::Failed { kind: v1::FailureKind::Machine.into(), message: why.clone(), permanent: true });
        }
        if generation == self.generation {
            self.end_generation(now, why, false);
        } else {
            self.commits.pending.remove(&step);
        }
        if !self.phase.is_over() {
            self.advance_commits();
            self.settle(now);
        }
    }

    /// A record stands in the log: what waited for it may be done.
    pub(super) fn appended(&mut self, now: Time, body: Body) {
        match body {
            Body::Commit(commit) => self.committed(now, commit),
            Body::Retire { commits } => {
                self.effects.push(Effect::DeleteFolders(commits.clone()));
                self.note(Note::Retired { folders: commits });
            }
            Body::End { .. } => self.end_recorded(),
            Body::Term(_) => {}
        }
    }

    fn committed(&mut self, now: Time, commit: Commit) {
        let (step, generation, folder) = (commit.step, commit.generation, commit.folder.clone());
        let bytes = total(commit.parts.iter().map(|part| part.bytes));
        let pending = self.commits.pending.remove(&Step(step));
        let took_ms = pending.map_or(0, |pending| now.since(pending.since));
        self.commits.written_ms += took_ms;
        self.commits.written_bytes = self.commits.written_bytes.saturating_add(bytes);
        self.commits.last_at = now;
        self.progress.correct(&commit);
        self.commits.live.push(commit);
        self.commits.written += 1;
        if step >= self.config.steps {
            self.write_last_down();
        }
        self.note(Note::Committed { step, generation, folder, bytes, took_ms });
        if self.phase.is_over() {
            return;
        }
        let trains = |member: &Member| matches!(member.held, Held::Busy(Some(_)) | Held::Idle(Some(_)));
        let conns = self.members.which(trains);
        self.send_to(&conns, &to_worker::Body::Committed(v1::Committed { step }));
        let surplus = self.commits.surplus(self.config.keep);
        if !surplus.is_empty() {
            self.commits.live.drain(..surplus.len());
            self.effects.push(Effect::Append(Body::Retire { commits: surplus }));
        }
        self.advance_commits();
        if step >= self.config.steps {
            self.farewells_until = Some(now.after(self.config.commit_timeout));
        }
        match self.phase {
            Phase::Closing { .. } => self.try_end(now),
            // The record was on its way when its generation ended: nothing is left to train.
            Phase::Starting { .. } if step >= self.config.steps => self.end(now, Outcome::Done),
            Phase::Regrouping { .. } if step >= self.config.steps => self.end(now, Outcome::Done),
            _ => self.settle(now),
        }
    }
}

fn ledger_text(ledger: &[v1::LedgerEpoch]) -> String {
    let epochs: Vec<String> = ledger.iter().map(|e| format!("epoch {}: {} samples, {}", e.epoch, e.samples, e.hash)).collect();
    if epochs.is_empty() { "empty".into() } else { epochs.join("; ") }
}
