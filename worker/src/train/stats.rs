//! What ranks tell each other about a step beside the gradient: one small vector of 64-bit integers, summed by the collective.
//! Integers do not care about order, so every rank ends with the same numbers whatever the dealing of lanes (SAME), and the ledger
//! is known to all (ONCE).

use crate::control::Era;
use ella_dataset::ledger::{LedgerError, TALLY_WORDS, Tally};

/// Losses travel as multiples of 2^-32.
const LOSS_SCALE: f64 = 4_294_967_296.0;
const FIXED: usize = 13;

/// Length of the vector.
pub const WORDS: usize = FIXED + TALLY_WORDS;

/// One step's sums. Before the collective: of this rank's lanes; after it: of all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// Sum of the samples' losses, in units of 2^-32.
    loss: i64,
    held_out_loss: i64,
    /// Samples in `held_out_loss`.
    pub held_out_samples: i64,
    /// Held-out samples whose batch has a loss that is not finite; they are not in the mean.
    pub held_out_lost: i64,
    /// Ranks that were told that the run leaves: it commits after this step.
    pub leaving: i64,
    /// Ranks that were told that this step is their generation's last.
    pub boundary: i64,
    /// What each rank's coordinator is known by: equal for all, or no commit could be recorded.
    authority: i64,
    /// Captions replaced by the empty one.
    pub dropped: i64,
    /// Captions cut at `text.max_tokens` (counted where they are encoded in the step).
    pub truncated: i64,
    /// Ranks that took part: the world size, as a check.
    pub ranks: i64,
    /// Ranks that ask for a commit after this step.
    pub due: i64,
    /// Ranks that have the next step's samples already.
    pub supplied: i64,
    /// Lanes that were computed in pieces, because a GPU's memory did not hold them.
    pub split: i64,
    /// Keys used.
    pub tally: Tally,
}

impl StepStats {
    /// One rank's sums, before anything is added. `era`: under which it would commit, if a coordinator knows its generation.
    pub fn of_one_rank(era: Option<Era>) -> Self {
        Self { ranks: 1, authority: authority(era), ..Self::default() }
    }

    /// Of all ranks: whether they would all commit under `era`.
    pub fn agree_on(&self, era: Option<Era>) -> bool {
        era.is_some() && self.authority == authority(era).wrapping_mul(self.ranks)
    }

    /// Adds a sum of sample losses.
    pub fn add_loss(&mut self, sum: f64) {
        self.loss = self.loss.wrapping_add(fixed(sum));
    }

    /// Adds a sum of held-out losses over `samples` samples.
    pub fn add_held_out(&mut self, sum: f64, samples: i64) {
        if !sum.is_finite() {
            self.held_out_lost += samples;
            return;
        }
        self.held_out_loss = self.held_out_loss.wrapping_add(fixed(sum));
        self.held_out_samples += samples;
    }

    /// Mean loss over the step's samples.
    pub fn mean_loss(&self) -> f64 {
        self.loss as f64 / LOSS_SCALE / self.tally.samples.max(1) as f64
    }

    /// Mean held-out loss, where it was measured.
    pub fn mean_held_out(&self) -> Option<f64> {
        (self.held_out_samples > 0).then(|| self.held_out_loss as f64 / LOSS_SCALE / self.held_out_samples as f64)
    }

    /// As the vector that is summed.
    pub fn words(&self) -> [i64; WORDS] {
        let mut words = [0; WORDS];
        words[..FIXED].copy_from_slice(&[
            self.loss,
            self.held_out_loss,
            self.held_out_samples,
            self.held_out_lost,
            self.leaving,
            self.dropped,
            self.truncated,
            self.ranks,
            self.supplied,
            self.due,
            self.boundary,
            self.authority,
            self.split,
        ]);
        words[FIXED..].copy_from_slice(&self.tally.words());
        words
    }

    /// From the summed vector.
    pub fn from_words(words: &[i64; WORDS]) -> Result<Self, LedgerError> {
        let mut tally = [0; TALLY_WORDS];
        tally.copy_from_slice(&words[FIXED..]);
        let tally = Tally::from_words(tally)?;
        let [loss, held_out_loss, held_out_samples, held_out_lost, leaving, dropped, truncated, rest @ ..] = *words;
        let [ranks, supplied, due, boundary, authority, split, ..] = rest;
        Ok(Self {
            loss,
            held_out_loss,
            held_out_samples,
            held_out_lost,
            leaving,
            boundary,
            authority,
            dropped,
            truncated,
            ranks,
            due,
            supplied,
            split,
            tally,
        })
    }
}

/// A number for a generation of a term, such that sums of several tell whether they are all the same. 0 for none.
pub(super) fn authority(era: Option<Era>) -> i64 {
    let hash = |Era { term, generation }: Era| blake3::hash(&[term.to_le_bytes(), generation.to_le_bytes()].concat());
    era.map_or(0, |era| i64::from_le_bytes(*hash(era).as_bytes().first_chunk().unwrap_or(&[0; 8])))
}

fn fixed(value: f64) -> i64 {
    (value * LOSS_SCALE).round() as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_dataset::ledger::KeyHash;

    #[test]
    fn sums_of_words_are_words_of_sums() {
        let mut whole = StepStats::default();
        let mut words = [0i64; WORDS];
        for rank in 0..5 {
            let mut part = StepStats { ranks: 1, dropped: rank, ..StepStats::default() };
            for sample in 0..20 {
                let key = KeyHash::of(&format!("{rank}/{sample}"));
                (part.supplied, part.due, part.split) = (rank % 2, rank % 3, rank);
                part.tally.add(key);
                whole.tally.add(key);
            }
            part.add_loss(1.25 * rank as f64);
            part.add_held_out(0.5, 2);
            part.add_held_out(f64::NAN, 1);
            for (sum, word) in words.iter_mut().zip(part.words()) {
                *sum += word;
            }
        }
        let sum = StepStats::from_words(&words).unwrap();
        assert_eq!(sum.tally, whole.tally);
        assert_eq!((sum.ranks, sum.supplied, sum.due, sum.split), (5, 2, 4, 10));
        assert_eq!((sum.dropped, sum.held_out_samples, sum.held_out_lost), (10, 10, 5));
        assert_eq!(sum.mean_loss(), 12.5 / 100.0);
        assert_eq!(sum.mean_held_out(), Some(0.25));
        assert_eq!(StepStats::default().mean_held_out(), None);
    }

    #[test]
    fn ranks_agree_on_a_coordinator_only_if_all_have_the_same() {
        let era = |term: u64| Era { term, generation: 1 };
        let agree = |terms: &[Option<u64>], mine: Option<u64>| {
            let mut words = [0i64; WORDS];
            for term in terms {
                words.iter_mut().zip(StepStats::of_one_rank(term.map(era)).words()).for_each(|(sum, word)| *sum = sum.wrapping_add(word));
            }
            StepStats::from_words(&words).unwrap().agree_on(mine.map(era))
        };
        assert!(agree(&[Some(7); 3], Some(7)) && agree(&[Some(1)], Some(1)));
        assert!(!agree(&[None, None], None) && !agree(&[Some(7), None], Some(7)) && !agree(&[Some(7), None], None));
        for mine in [7, 8, 9] {
            assert!(!agree(&[Some(7), Some(8), Some(9)], Some(mine)), "{mine}");
        }
    }
}
