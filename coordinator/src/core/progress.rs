//! How far training is and how fast. Nothing waits for these messages and none is answered (LIVE).

use super::{ConnId, Core, Effect, Phase, Time};
use crate::machine::Counts;
use ella_proto::ids::{Rank, Step};
use ella_proto::v1;
use ella_store::Commit;
use std::collections::{BTreeSet, VecDeque};

/// Throughput is measured over so many steps.
const WINDOW: usize = 32;
/// So many steps are remembered as written down.
const REMEMBERED: usize = 4096;
/// Elements of `Totals.step_buckets`.
const BUCKETS: usize = 18;

/// The newest measurements.
#[derive(Debug, Default)]
pub(super) struct Progress {
    step: u64,
    samples: u64,
    epoch: u64,
    loss: f64,
    recent: VecDeque<(Time, u64)>,
    /// Samples of the newest step.
    per_step: u64,
    /// Beside the loss, and when it was told.
    newest: Option<(Time, v1::Newest)>,
    totals: v1::Totals,
    /// Steps that were written down.
    kept: BTreeSet<u64>,
    /// What the other ranks have read since rank 0's last message, for its next one: so metrics have all of it.
    read: Counts,
    /// The run's last step, which is written down with its commit: its pictures are drawn before that, and no later step tells of them.
    last: Option<v1::Progress>,
}

impl Progress {
    /// Where a run that resumes from `commit` stands.
    pub(super) fn from_commit(commit: Option<&Commit>) -> Self {
        commit.map_or_else(Self::default, |commit| Self {
            step: commit.step,
            samples: commit.samples(),
            epoch: commit.epoch,
            ..Self::default()
        })
    }

    pub(super) fn step(&self) -> u64 {
        self.step
    }

    pub(super) fn samples(&self) -> u64 {
        self.samples
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn loss(&self) -> f64 {
        self.loss
    }

    /// Samples per second over the last steps; 0 before the second.
    pub(super) fn rate(&self) -> f64 {
        match (self.recent.front(), self.recent.back()) {
            (Some((from, first)), Some((to, last))) if to > from => last.saturating_sub(*first) as f64 * 1000.0 / to.since(*from) as f64,
            _ => 0.0,
        }
    }

    /// The newest step's measurements beside its loss.
    pub(super) fn newest(&self, now: Time) -> Option<v1::Newest> {
        self.newest.map(|(at, newest)| v1::Newest { age_ms: now.since(at), ..newest })
    }

    /// What only rises, but for what is counted elsewhere.
    pub(super) fn totals(&self) -> v1::Totals {
        self.totals.clone()
    }

    /// Sums a step up, of which rank 0 tells.
    fn total(&mut self, now: Time, progress: &v1::Progress) {
        let held_out_loss = progress.held_out_loss.or(self.newest.and_then(|(_, newest)| newest.held_out_loss));
        let v1::Progress { grad_norm, learning_rate, step_seconds, .. } = *progress;
        self.newest = Some((now, v1::Newest { grad_norm, learning_rate, step_seconds, held_out_loss, age_ms: 0 }));
        let totals = &mut self.totals;
        totals.steps += 1;
        totals.samples = totals.samples.saturating_add(progress.samples);
        totals.step_seconds += if step_seconds.is_finite() { step_seconds.max(0.0) } else { 0.0 };
        totals.step_buckets.resize(BUCKETS, 0);
        totals.step_buckets[bucket(step_seconds)] += 1;
        add_parts(totals.parts.get_or_insert_default(), &progress.parts.unwrap_or_default());
    }

    /// Whether a step is not written down yet. It is then.
    fn is_news(&mut self, step: u64) -> bool {
        let is_news = self.kept.insert(step);
        if self.kept.len() > REMEMBERED {
            self.kept.pop_first();
        }
        is_news
    }

    /// A lost message loses no count: its step had as many samples as this one, or the next commit's ledger corrects it.
    fn take(&mut self, progress: &v1::Progress, samples_per_epoch: u64) {
        let steps = progress.step - self.step;
        self.step = progress.step;
        self.samples = self.samples.saturating_add(progress.samples.saturating_mul(steps));
        self.per_step = progress.samples;
        self.loss = progress.loss;
        self.epoch = self.samples.checked_div(samples_per_epoch).unwrap_or(self.epoch);
    }

    /// The newest step was taken just now.
    fn pace(&mut self, now: Time) {
        self.recent.push_back((now, self.samples));
        if self.recent.len() > WINDOW {
            self.recent.pop_front();
        }
    }

    /// Another generation begins from this step: exactly as a commit has it, or as many samples away as the steps between had.
    pub(super) fn restart(&mut self, from: Step, last: Option<&Commit>) {
        self.recent.clear();
        if let Some(commit) = last.filter(|commit| commit.step == from.0) {
            (self.step, self.epoch) = (0, 0);
            return self.correct(commit);
        }
        let between = self.per_step.saturating_mul(self.step.abs_diff(from.0));
        self.samples = if from.0 < self.step { self.samples.saturating_sub(between) } else { self.samples.saturating_add(between) };
        self.step = from.0;
    }

    /// A commit knows the exact numbers as of its step.
    pub(super) fn correct(&mut self, commit: &Commit) {
        if commit.step >= self.step {
            (self.step, self.epoch) = (commit.step, commit.epoch);
            self.samples = commit.samples();
        }
    }
}

/// Which element of `Totals.step_buckets` counts a step of so many seconds.
fn bucket(seconds: f64) -> usize {
    (0..BUCKETS - 1).find(|at| seconds <= upper(*at)).unwrap_or(BUCKETS - 1)
}

/// The most seconds of a step that each element of `Totals.step_buckets` counts.
pub(crate) fn step_bounds() -> [Option<f64>; BUCKETS] {
    std::array::from_fn(|at| (at + 1 < BUCKETS).then(|| upper(at)))
}

fn upper(at: usize) -> f64 {
    (at as f64 - 7.0).exp2()
}

/// Adds each part.
pub(super) fn add_parts(sum: &mut v1::StepParts, parts: &v1::StepParts) {
    sum.data += parts.data;
    sum.encode += parts.encode;
    sum.forward += parts.forward;
    sum.backward += parts.backward;
    sum.reduce += parts.reduce;
    sum.update += parts.update;
    sum.commit += parts.commit;
    sum.reduce_hidden += parts.reduce_hidden;
    sum.draw += parts.draw;
}

impl Core {
    /// A sign of life, with how far the worker is.
    pub(super) fn beat(&mut self, now: Time, conn: ConnId, beat: v1::Heartbeat, of_generation: bool) {
        let steps = self.config.steps;
        for (name, n) in &beat.counts {
            self.counts.add(name, *n);
        }
        if let Some(member) = self.members.get_mut(conn) {
            member.vitals = beat.vitals.or(member.vitals);
        }
        if of_generation && beat.activity() == v1::Activity::Draw {
            self.keep_pace_of_drawing(now);
        }
        if let Some(member) = self.members.get_mut(conn).filter(|_| of_generation) {
            member.step = member.step.max(beat.step.min(steps));
            member.encoding = beat.encoding;
            member.activity = Some((now, beat.activity()));
        }
    }

    /// A rank has applied a step. Rank 0 speaks for all; of the others only the timing is of interest.
    pub(super) fn measured(&mut self, now: Time, conn: ConnId, mut progress: v1::Progress) {
        if progress.missed {
            return self.missed(conn, progress);
        }
        // What a rank tells of the last step of a generation may come when others have said that it is over.
        let in_generation = self.phase.has_begun() || matches!(self.phase, Phase::Regrouping { .. });
        if !in_generation || progress.step > self.config.steps || self.members.rank(conn).is_none() {
            return self.counts.add("refused_out_of_turn", 1);
        }
        for (reason, n) in &progress.skipped {
            self.counts.add(&format!("skipped_{reason}"), *n);
        }
        self.add_reads(&mut progress);
        let Some(member) = self.members.get_mut(conn) else { return };
        member.step = member.step.max(progress.step);
        member.parts = progress.parts.or(member.parts);
        member.encoding = None;
        member.timing.add(&progress);
        let rank = member.rank();
        self.keep_timing(conn, false);
        self.keep_pace(now, progress.step);
        if rank != Some(Rank(0)) || (progress.parts.is_none() && progress.samples == 0) {
            return;
        }
        if progress.step <= self.progress.step {
            return self.counts.add("refused_old_step", 1);
        }
        let samples_per_epoch = self.agreed.as_ref().map_or(0, |ready| ready.samples_per_epoch);
        self.progress.take(&progress, samples_per_epoch);
        self.progress.pace(now);
        self.progress.total(now, &progress);
        self.progress.is_news(progress.step);
        self.write_down(progress);
    }

    /// What was read is counted, and told with the next step that is written down.
    fn add_reads(&mut self, progress: &mut v1::Progress) {
        for (name, n) in std::mem::take(&mut progress.read) {
            self.counts.add(&name, n);
            self.progress.read.add(&name, n);
        }
    }

    fn write_down(&mut self, mut progress: v1::Progress) {
        if progress.step == self.config.steps {
            self.progress.last = Some(progress);
            return;
        }
        progress.read = std::mem::take(&mut self.progress.read).to_map();
        self.effects.push(Effect::Metric(progress));
    }

    /// Writes the run's last step down, with all that ranks have told since.
    pub(super) fn write_last_down(&mut self) {
        if let Some(last) = self.progress.last.take() {
            let read = std::mem::take(&mut self.progress.read).to_map();
            self.effects.push(Effect::Metric(v1::Progress { read, ..last }));
        }
    }

    /// A step that was applied while nobody listened, or whoever did has not lived to write it down: it is kept if it was not before.
    /// Beyond where the run is only its own rank 0 may speak of any, or whoever comes while there is none: it may have trained on, cut off from here.
    fn missed(&mut self, conn: ConnId, mut progress: v1::Progress) {
        let leads = self.lineup.is_none() || matches!(self.phase, Phase::Waiting { .. }) || self.members.rank(conn) == Some(Rank(0));
        let most = if leads { self.config.steps } else { self.progress.step };
        if progress.step > most {
            return self.counts.add("refused_out_of_turn", 1);
        }
        if !self.progress.is_news(progress.step) {
            return;
        }
        for (reason, n) in &progress.skipped {
            self.counts.add(&format!("skipped_{reason}"), *n);
        }
        self.add_reads(&mut progress);
        self.progress.totals.steps_missed += 1;
        if progress.step > self.progress.step {
            let samples_per_epoch = self.agreed.as_ref().map_or(0, |ready| ready.samples_per_epoch);
            self.progress.take(&progress, samples_per_epoch);
        }
        self.write_down(progress);
    }
}
