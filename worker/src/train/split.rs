//! A lane whose pass through the U-Net a GPU's memory does not hold, computed in pieces (`workers.split_on_oom`).
//!
//! What the U-Net makes of a sample does not depend on the others, so pieces give the same but for rounding: which is why it goes with
//! `reduction = "fast"` alone. The connector, which takes far less, has the lane as a whole.

use super::TrainError;
use crate::gpu::pieces::in_pieces;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// How a rank's lanes are split, if they are.
#[derive(Debug)]
pub struct Split {
    allowed: bool,
    /// The most samples that were found to fit.
    most: AtomicUsize,
    /// For now nothing more is split.
    settled: AtomicBool,
}

impl Split {
    /// Nothing is split yet, or ever.
    pub fn new(allowed: bool) -> Self {
        Self { allowed, most: AtomicUsize::new(usize::MAX), settled: AtomicBool::new(false) }
    }

    /// As if no more than so many samples were found to fit.
    pub fn found(most: usize) -> Self {
        Self { allowed: true, most: AtomicUsize::new(most), settled: AtomicBool::new(false) }
    }

    /// Whether a lane of so many samples is computed in pieces.
    pub(super) fn cuts(&self, samples: i64) -> bool {
        usize::try_from(samples).is_ok_and(|samples| samples > self.most.load(Relaxed))
    }

    /// Does `work` with lanes cut as they are by now: what does not fit is an error. For work with less memory than a step has otherwise.
    pub(super) fn settled<T>(&self, work: impl FnOnce() -> T) -> T {
        self.settled.store(true, Relaxed);
        let made = work();
        self.settled.store(false, Relaxed);
        made
    }

    /// What `work` makes of all of a lane's samples, in order: all at once, unless that does not fit.
    pub(super) fn pieces<T>(&self, samples: i64, work: impl FnMut(Range<usize>) -> Result<T, TrainError>) -> Result<Vec<T>, TrainError> {
        let mut most = self.most.load(Relaxed);
        let pieces = in_pieces(usize::try_from(samples).unwrap_or(0), &mut most, self.allowed && !self.settled.load(Relaxed), work);
        // One thread computes.
        self.most.store(most, Relaxed);
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::TchError;

    /// The samples of a piece, on a GPU that holds so many.
    fn fits(piece: &Range<usize>, room: usize) -> Result<(), TrainError> {
        let full = || TrainError::Torch(TchError::Torch("CUDA out of memory. Tried to allocate 2.00 GiB.".into()));
        if piece.len() > room { Err(full()) } else { Ok(()) }
    }

    #[test]
    fn a_lane_is_cut_until_it_fits_and_the_next_one_at_once() {
        for room in [7, 4, 2, 1] {
            let split = Split::new(true);
            let run = || {
                let mut sizes = Vec::new();
                let pieces = split.pieces(7, |piece| {
                    sizes.push(piece.len());
                    fits(&piece, room).map(|()| piece)
                });
                (pieces.unwrap().into_iter().flatten().collect::<Vec<_>>(), sizes)
            };
            let (samples, _) = run();
            assert_eq!(samples, (0..7).collect::<Vec<_>>());
            assert_eq!((split.cuts(7), split.cuts(1)), (room < 7, false));
            assert!(run().1.iter().all(|size| *size <= room));
        }
    }

    #[test]
    fn what_is_settled_is_not_cut_further() {
        let split = Split::new(true);
        let run = |room| split.pieces(8, |piece| fits(&piece, room)).map(|pieces| pieces.len());
        assert!(split.settled(|| run(4)).is_err() && !split.cuts(8));
        assert_eq!(run(4).unwrap(), 2);
        assert_eq!(split.settled(|| run(4)).unwrap(), 2);
    }

    #[test]
    fn a_lane_that_does_not_fit_is_an_error_where_nothing_is_split() {
        let error = Split::new(false).pieces(4, |piece| fits(&piece, 2)).unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert!(Split::new(true).pieces(1, |piece| fits(&piece, 0)).is_err());
    }
}
