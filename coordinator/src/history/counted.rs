//! What was skipped in a run's steps, by reason; and what else was counted. Of the newest steps it is known which of them it was: what a resume undoes
//! is taken back.

use std::collections::{BTreeMap, VecDeque};

/// Reasons beyond this many are counted together.
const MOST_REASONS: usize = crate::machine::MOST_NAMES;
/// Steps that skipped something and that can be taken back: the newest.
const MOST_STEPS: usize = 16_384;

type Counts = BTreeMap<String, u64>;

/// Sums by reason.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    sums: Counts,
    newest: VecDeque<(u64, Counts)>,
}

impl Counted {
    /// The sums (KNOWN).
    pub fn sums(&self) -> &Counts {
        &self.sums
    }

    /// Takes in a step, after which none that was told of before counts.
    pub(super) fn add(&mut self, step: u64, skipped: &Counts) {
        self.undo(step.saturating_sub(1));
        if skipped.is_empty() {
            return;
        }
        let mut counts = Counts::new();
        for (reason, n) in skipped {
            let fits = self.sums.contains_key(reason) || (self.sums.len() < MOST_REASONS && reason.len() <= 64);
            let reason = if fits { reason.as_str() } else { "other" };
            for counts in [&mut self.sums, &mut counts] {
                let count = counts.entry(reason.to_owned()).or_default();
                *count = count.saturating_add(*n);
            }
        }
        self.newest.push_back((step, counts));
        if self.newest.len() > MOST_STEPS {
            self.newest.pop_front();
        }
    }

    /// Takes in all that came after.
    pub(super) fn append(&mut self, later: Self) {
        for (reason, n) in later.sums {
            let count = self.sums.entry(reason).or_default();
            *count = count.saturating_add(n);
        }
        self.newest.extend(later.newest);
        let surplus = self.newest.len().saturating_sub(MOST_STEPS);
        self.newest.drain(..surplus);
    }

    /// Takes back what steps beyond this one skipped.
    pub(super) fn undo(&mut self, step: u64) {
        while self.newest.back().is_some_and(|(last, _)| *last > step) {
            for (reason, n) in self.newest.pop_back().into_iter().flat_map(|(_, counts)| counts) {
                if let Some(count) = self.sums.get_mut(&reason) {
                    *count = count.saturating_sub(n);
                    if *count == 0 {
                        self.sums.remove(&reason);
                    }
                }
            }
        }
    }
}
