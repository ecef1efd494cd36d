//! When to commit: every so many steps, or by the clock, so that a kill loses no more work than a run allows (`checkpoint.max_lost_work`).
//!
//! What a kill loses began at the snapshot of the newest commit that is recorded. Between two records that grows to the interval between their
//! snapshots and the time that the second one took to be saved; so the interval is what is allowed, less a save and a step.

use ella_proto::config::Checkpoint;
use std::time::{Duration, Instant};

/// What a save is taken to last until one has been measured, as a part of the work that may be lost.
const GUESS: u32 = 4;

/// Decides when this rank asks for a commit. Rank 0's answer counts, for clocks differ.
#[derive(Debug)]
pub struct Cadence {
    every: Option<u64>,
    most: Option<Duration>,
    /// How long a save takes: the longest of late.
    save: Duration,
    /// When the newest snapshot was taken, or training began.
    snapshot: Instant,
    /// The same of the newest commit that is recorded: until then work is lost by a kill of everything.
    recorded: Instant,
    /// The newest commit, while its record does not stand.
    saving: Option<u64>,
    /// When the last step was applied.
    stepped: Instant,
    warned: bool,
    /// The newest commit of which it was said that it takes too long.
    overdue: Option<u64>,
}

impl Cadence {
    /// By what a config says, if training begins now.
    pub fn new(checkpoint: &Checkpoint, now: Instant) -> Self {
        let most = checkpoint.max_lost_work.map(|most| most.duration());
        let save = most.unwrap_or_default() / GUESS;
        Self {
            every: checkpoint.steps(),
            most,
            save,
            snapshot: now,
            recorded: now,
            saving: None,
            stepped: now,
            warned: false,
            overdue: None,
        }
    }

    /// Training begins now: what came before is no work.
    pub fn begin(&mut self, now: Instant) {
        (self.snapshot, self.recorded, self.stepped) = (now, now, now);
    }

    /// Training goes on in another generation. A commit that the last one has not brought to its record never will be.
    pub fn go_on(&mut self, recorded: u64, now: Instant) {
        self.note(recorded, now);
        if self.saving.take().is_some() {
            self.snapshot = self.recorded;
        }
        self.stepped = now;
    }

    /// Whether to commit the state after this step, which all ranks decide alike: it is one of those that the config names.
    pub fn names(&self, step: u64) -> bool {
        self.every.is_some_and(|every| step.is_multiple_of(every))
    }

    /// Whether to commit after the step that is applied now, as `applied` were before: by the clock, or because a named step's commit has come
    /// to nothing. `recorded`: the step of the newest commit whose record stands.
    pub fn is_due(&mut self, applied: u64, recorded: u64, now: Instant) -> bool {
        let step = now.saturating_duration_since(std::mem::replace(&mut self.stepped, now));
        self.note(recorded, now);
        if let Some((saving, waits)) = self.overdue(now) {
            let waits = waits.as_secs_f64();
            tracing::warn!(
                "the commit of step {saving} has not come to its record, and {waits:.1} s of work may be lost by now, more than \
                 checkpoint.max_lost_work: look at the run's store"
            );
        }
        let missed = self.every.is_some_and(|every| applied / every > recorded / every);
        let late = self.most.is_some_and(|most| now - self.snapshot + self.save + step >= most);
        self.saving.is_none() && (missed || late)
    }

    /// Takes note of a record that stands.
    fn note(&mut self, recorded: u64, now: Instant) {
        if self.saving.is_none_or(|saving| recorded < saving) {
            return;
        }
        self.saving = None;
        self.recorded = self.snapshot;
        self.save = (now - self.snapshot).max(self.save - self.save / 4);
        if let Some(most) = self.most {
            self.warn(most);
        }
    }

    /// A snapshot of this step was taken.
    pub fn taken(&mut self, step: u64, now: Instant) {
        (self.saving, self.snapshot) = (Some(step), now);
    }

    /// A commit that is on its way for so long that more work may be lost than is allowed, once; and how much that is.
    fn overdue(&mut self, now: Instant) -> Option<(u64, Duration)> {
        let (saving, waits) = (self.saving?, now.saturating_duration_since(self.recorded));
        (waits > self.most? && self.overdue.replace(saving) != Some(saving)).then_some((saving, waits))
    }

    fn warn(&mut self, most: Duration) {
        if self.save * 2 > most && !std::mem::replace(&mut self.warned, true) {
            let save = self.save.as_secs_f64();
            tracing::warn!(
                "a commit takes {save:.1} s: as much as {:.1} s of work may be lost, more than checkpoint.max_lost_work",
                2.0 * save
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_proto::config::Millis;

    /// Trains for so many steps of `step` ms, every commit saved in `save` ms: the most work that a kill would have lost at any step, in ms, once a
    /// save was measured; and how many commits there were.
    fn lost(most: u64, step: u64, save: u64) -> (u64, usize) {
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let mut cadence = Cadence::new(&Checkpoint { max_lost_work: Some(Millis(most)), ..Checkpoint::default() }, begin);
        // Snapshots: when taken, when recorded.
        let mut commits: Vec<(u64, u64)> = Vec::new();
        let mut worst = 0;
        for number in 1..=2000 {
            let now = number * step;
            let recorded = commits.iter().filter(|(_, stands)| *stands <= now);
            if recorded.clone().count() > 1 {
                worst = worst.max(now - recorded.clone().map(|(taken, _)| *taken).max().unwrap());
            }
            let newest = recorded.map(|(taken, _)| taken / step).max().unwrap_or(0);
            if cadence.is_due(number - 1, newest, at(now)) {
                commits.push((now, now + save));
                cadence.taken(number, at(now));
            }
        }
        (worst, commits.len())
    }

    #[test]
    fn no_more_work_is_lost_than_may_be_and_no_commit_is_needless() {
        for (most, step, save) in [(1000, 10, 100), (1000, 10, 490), (60_000, 500, 700), (60_000, 7, 20_000), (1000, 300, 1)] {
            let (worst, commits) = lost(most, step, save);
            assert!(worst <= most, "{most}, {step}, {save}: {worst}");
            // An interval is at least what is left of a save, two steps, and what measuring by whole steps costs.
            let interval = most.saturating_sub(save + 3 * step).max(step);
            assert!((commits as u64) <= 2000 * step / interval + 2, "{most}, {step}, {save}: {commits} commits");
        }
    }

    /// Where a save takes longer, commits follow each other, one at a time.
    #[test]
    fn saves_that_take_too_long_do_not_pile_up() {
        let (worst, commits) = lost(1000, 10, 3000);
        assert!(worst <= 2 * 3000 + 20 && commits <= 20_000 / 3000 + 1, "{worst}, {commits}");
    }

    #[test]
    fn of_a_commit_that_hangs_it_is_said_once_that_more_may_be_lost() {
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let mut clock = Cadence::new(&Checkpoint { max_lost_work: Some(Millis(1000)), ..Checkpoint::default() }, begin);
        assert_eq!(clock.overdue(at(5000)), None, "none is on its way");
        clock.taken(7, at(800));
        assert_eq!([900, 1001, 1002].map(|ms| clock.overdue(at(ms))), [None, Some((7, Duration::from_millis(1001))), None]);
        clock.note(7, at(1100));
        clock.taken(9, at(1500));
        assert_eq!([1700, 1801].map(|ms| clock.overdue(at(ms))), [None, Some((9, Duration::from_millis(1001)))]);
        let mut steps = Cadence::new(&Checkpoint { every: Some(7), ..Checkpoint::default() }, begin);
        steps.taken(7, at(0));
        assert_eq!(steps.overdue(at(1 << 40)), None);
    }

    #[test]
    fn steps_are_named_by_the_config_and_the_clock_only_if_it_says_so() {
        let now = Instant::now();
        let of = |every, max_lost_work| Cadence::new(&Checkpoint { every, max_lost_work, ..Checkpoint::default() }, now);
        let later = now + Duration::from_secs(3600);
        for (mut cadence, named, due) in
            [(of(None, None), 100, false), (of(Some(7), None), 7, false), (of(Some(7), Some(Millis(1000))), 7, true)]
        {
            assert_eq!((cadence.names(named), cadence.names(named + 1), cadence.is_due(0, 0, later)), (true, false, due));
        }
        let mut clock = of(None, Some(Millis(1000)));
        assert!(!clock.names(100) && clock.is_due(0, 0, later));
    }

    /// A commit that its generation did not live to see recorded is made up for, by steps and by the clock.
    #[test]
    fn a_commit_that_came_to_nothing_is_made_up_for() {
        let begin = Instant::now();
        let at = |ms: u64| begin + Duration::from_millis(ms);
        let mut steps = Cadence::new(&Checkpoint { every: Some(10), ..Checkpoint::default() }, begin);
        assert!(!steps.is_due(9, 0, at(90)) && steps.names(10));
        steps.taken(10, at(100));
        assert!(!steps.is_due(10, 0, at(110)), "it is being saved");
        steps.go_on(0, at(120));
        assert!(steps.is_due(10, 0, at(130)));
        steps.taken(11, at(130));
        assert!(!steps.is_due(11, 11, at(140)), "it stands");

        let mut clock = Cadence::new(&Checkpoint { max_lost_work: Some(Millis(1000)), ..Checkpoint::default() }, begin);
        clock.begin(begin);
        clock.taken(5, at(100));
        assert!(!clock.is_due(6, 5, at(200)));
        clock.taken(9, at(800));
        clock.go_on(5, at(850));
        assert!(clock.is_due(9, 5, at(900)), "work since 100 ms may be lost, not since 800");
    }
}
