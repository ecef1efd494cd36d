//! What ranks tell each other about a step beside the gradient: one small vector of 64-bit integers, summed by the collective.
//! Integers do not care about order, so every rank ends with the same numbers whatever the dealing of lanes (SAME), and the ledger
//! is known to all (ONCE).
//!
//! What the processor knows is put into the vector by [`StepStats::words`]; what only the device knows, the losses, is added to it there (`Losses`).

use crate::control::Era;
use ella_dataset::ledger::{LedgerError, TALLY_WORDS, Tally};
use tch::{Kind, TchError, Tensor};

/// Losses travel as multiples of 2^-32.
const LOSS_SCALE: f64 = 4_294_967_296.0;
/// What a lane's loss counts as at most, in those units: 2²⁰, so that two thousand such lanes do not wrap.
const MOST: f64 = (1_u64 << 52) as f64;
const FIXED: usize = 18;

/// Length of the vector.
pub const WORDS: usize = FIXED + TALLY_WORDS;
/// Where lanes whose gradient has an element that was left out of the sum are counted.
pub(super) const REFUSED_LANES: usize = 5;

/// Places in the vector for a kind of losses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Losses {
    sum: usize,
    /// Samples in the sum.
    samples: Option<usize>,
    /// Samples that are not, for their lane's loss is not finite.
    lost: usize,
}

impl Losses {
    /// Those that are trained on.
    pub(super) const TRAINED: Self = Self { sum: 0, samples: None, lost: 4 };
    /// Those of held-out samples.
    pub(super) const HELD_OUT: Self = Self { sum: 1, samples: Some(2), lost: 3 };

    /// Adds a lane's `loss`, the sum over `samples` samples as a number on the device, to `words` `[WORDS]` int64 there.
    pub(super) fn add(self, words: &Tensor, loss: &Tensor, samples: i64) -> Result<(), TchError> {
        let lost = loss.f_isfinite()?.f_logical_not()?;
        let units = loss.f_to_kind(Kind::Double)?.f_mul_scalar(LOSS_SCALE)?.f_clamp(-MOST, MOST)?.f_round()?;
        add_word(words, self.sum, &units.f_masked_fill(&lost, 0.0)?)?;
        let of_samples = |is: &Tensor| is.f_to_kind(Kind::Int64)?.f_mul_scalar(samples);
        if let Some(at) = self.samples {
            add_word(words, at, &of_samples(&lost.f_logical_not()?)?)?;
        }
        add_word(words, self.lost, &of_samples(&lost)?)
    }
}

/// Adds a number on the device to one word.
pub(super) fn add_word(words: &Tensor, at: usize, number: &Tensor) -> Result<(), TchError> {
    words.f_narrow(0, at as i64, 1)?.f_add_(&number.f_to_kind(Kind::Int64)?).map(drop)
}

/// One step's sums. Before the collective: of this rank's lanes; after it: of all.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// Sum of the samples' losses, in units of 2^-32.
    loss: i64,
    held_out_loss: i64,
    /// Samples whose lane has a loss that is not finite; they are not in `loss`.
    pub lost: i64,
    /// Lanes whose gradient has elements that were left out of the sum.
    pub refused_lanes: i64,
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
    /// Captions replaced by the empty one by chance.
    pub dropped: i64,
    /// Samples without a caption in the columns that are trained on.
    pub absent: i64,
    /// Captions cut at `text.max_tokens` (counted where they are encoded in the step).
    pub truncated: i64,
    /// Ranks that took part: the world size, as a check.
    pub ranks: i64,
    /// Ranks that ask for a commit after this step.
    pub due: i64,
    /// Ranks that could not hand over a commit after this step without a wait.
    pub behind: i64,
    /// Ranks that have the next step's samples already.
    pub supplied: i64,
    /// Ranks that are to draw samples after this step.
    pub drawing: i64,
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

    /// Mean loss over the step's samples that have a finite one; NaN if none has.
    pub fn mean_loss(&self) -> f64 {
        self.loss as f64 / LOSS_SCALE / (self.tally.samples as f64 - self.lost as f64)
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
            self.lost,
            self.refused_lanes,
            self.leaving,
            self.dropped,
            self.truncated,
            self.ranks,
            self.supplied,
            self.due,
            self.boundary,
            self.authority,
            self.split,
            self.drawing,
            self.behind,
            self.absent,
        ]);
        words[FIXED..].copy_from_slice(&self.tally.words());
        words
    }

    /// From the summed vector.
    pub fn from_words(words: &[i64; WORDS]) -> Result<Self, LedgerError> {
        let mut tally = [0; TALLY_WORDS];
        tally.copy_from_slice(&words[FIXED..]);
        let tally = Tally::from_words(tally)?;
        let [loss, held_out_loss, held_out_samples, held_out_lost, lost, refused_lanes, leaving, rest @ ..] = *words;
        let [dropped, truncated, ranks, supplied, due, boundary, authority, split, drawing, behind, absent, ..] = rest;
        Ok(Self {
            loss,
            held_out_loss,
            held_out_samples,
            held_out_lost,
            lost,
            refused_lanes,
            leaving,
            boundary,
            authority,
            dropped,
            absent,
            truncated,
            ranks,
            due,
            behind,
            supplied,
            split,
            drawing,
            tally,
        })
    }
}

/// A number for a generation of a term, such that sums of several tell whether they are all the same. 0 for none.
pub(super) fn authority(era: Option<Era>) -> i64 {
    let hash = |Era { term, generation }: Era| blake3::hash(&[term.to_le_bytes(), generation.to_le_bytes()].concat());
    era.map_or(0, |era| i64::from_le_bytes(*hash(era).as_bytes().first_chunk().unwrap_or(&[0; 8])))
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
            let mut part = StepStats { ranks: 1, dropped: rank, absent: 2 * rank, ..StepStats::default() };
            for sample in 0..20 {
                let key = KeyHash::of(&format!("{rank}/{sample}"));
                (part.supplied, part.due, part.split, part.drawing, part.behind) = (rank % 2, rank % 3, rank, 1, rank / 3);
                part.tally.add(key);
                whole.tally.add(key);
            }
            let of_rank = Tensor::from_slice(&part.words());
            let loss = |value: f32| Tensor::from(value);
            Losses::TRAINED.add(&of_rank, &loss(1.25 * rank as f32), 20).unwrap();
            Losses::HELD_OUT.add(&of_rank, &loss(0.5), 2).unwrap();
            Losses::HELD_OUT.add(&of_rank, &loss(f32::NAN), 1).unwrap();
            add_word(&of_rank, REFUSED_LANES, &Tensor::from(rank > 3)).unwrap();
            for (sum, word) in words.iter_mut().zip(Vec::<i64>::try_from(of_rank).unwrap()) {
                *sum += word;
            }
        }
        let sum = StepStats::from_words(&words).unwrap();
        assert_eq!(sum.tally, whole.tally);
        assert_eq!((sum.ranks, sum.supplied, sum.due, sum.split, sum.drawing, sum.behind), (5, 2, 4, 10, 5, 2));
        assert_eq!((sum.dropped, sum.absent, sum.held_out_samples, sum.held_out_lost), (10, 20, 10, 5));
        assert_eq!((sum.lost, sum.refused_lanes), (0, 1));
        assert_eq!(sum.mean_loss(), 12.5 / 100.0);
        assert_eq!(sum.mean_held_out(), Some(0.25));
        assert_eq!(StepStats::default().mean_held_out(), None);
    }

    /// A loss that is not finite is counted and kept out; one that is too large for its unit stays as large as it can.
    #[test]
    fn losses_that_are_not_finite_are_counted_beside_the_mean() {
        let words = Tensor::zeros([WORDS as i64], (Kind::Int64, tch::Device::Cpu));
        for loss in [2.0, f32::INFINITY, f32::NAN, f32::NEG_INFINITY, 4.0] {
            Losses::TRAINED.add(&words, &Tensor::from(loss), 3).unwrap();
        }
        let mut sum = StepStats::from_words(&Vec::try_from(&words).unwrap().try_into().unwrap()).unwrap();
        sum.tally.samples = 15;
        assert_eq!((sum.lost, sum.mean_loss()), (9, 1.0));
        sum.lost = 15;
        sum.loss = 0;
        assert!(sum.mean_loss().is_nan(), "none has one");
        let words = Tensor::zeros([WORDS as i64], (Kind::Int64, tch::Device::Cpu));
        for _ in 0..1000 {
            Losses::TRAINED.add(&words, &Tensor::from(f32::MAX), 1).unwrap();
        }
        assert!(words.int64_value(&[0]) > 1 << 60);
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
