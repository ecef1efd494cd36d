//! Work that is done in smaller pieces where a GPU's memory does not hold it at once.

use super::fault::Fault;
use std::fmt::Display;
use std::ops::Range;

/// Does `work` on all of `0..total`, as much as `most` at once, in order. If `split`, a piece for which memory does not suffice is done again in
/// halves, down to single ones, and `most` is what was found to fit: nothing larger is tried from then on.
///
/// # Errors
/// What `work` gives that is something else, or of a piece that is not to be halved.
pub(crate) fn in_pieces<T, E: Display>(
    total: usize,
    most: &mut usize,
    split: bool,
    mut work: impl FnMut(Range<usize>) -> Result<T, E>,
) -> Result<Vec<T>, E> {
    let (mut done, mut from) = (Vec::new(), 0);
    while from < total {
        let count = (total - from).min((*most).max(1));
        match work(from..from + count) {
            Ok(piece) => {
                done.push(piece);
                from += count;
            }
            Err(error) if split && count > 1 && Fault::of(&error) == Some(Fault::OutOfMemory) => {
                *most = count.div_ceil(2);
                // What is cut into blocks of the larger size is of no use; without a GPU's allocator there is nothing to give back.
                let _ = ella_cuda::memory::empty_cache();
                tracing::warn!("the memory does not hold {count} at once: from here on at most {most}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = "CUDA out of memory. Tried to allocate 2.00 GiB.";

    /// A device that holds so many.
    fn holds(room: usize, tried: &mut Vec<usize>) -> impl FnMut(Range<usize>) -> Result<Vec<usize>, String> {
        move |piece| {
            tried.push(piece.len());
            if piece.len() > room { Err(FULL.to_owned()) } else { Ok(piece.collect()) }
        }
    }

    #[test]
    fn a_piece_that_does_not_fit_is_halved_until_it_does() {
        for (total, room) in [(8, 8), (8, 4), (8, 3), (7, 2), (9, 1), (1, 1), (0, 1)] {
            let (mut most, mut tried) = (usize::MAX, Vec::new());
            let done = in_pieces(total, &mut most, true, holds(room, &mut tried)).unwrap();
            assert_eq!(done.concat(), (0..total).collect::<Vec<_>>(), "each once, and in order");
            assert!(done.iter().all(|piece| piece.len() <= room));
            // What was found to fit is not searched for again.
            tried.clear();
            in_pieces(total, &mut most, true, holds(room, &mut tried)).unwrap();
            assert!(tried.iter().all(|count| *count <= room), "{tried:?}");
        }
    }

    #[test]
    fn nothing_is_split_unless_it_is_asked_for_and_one_alone_cannot_be() {
        let mut tried = Vec::new();
        assert_eq!(in_pieces(8, &mut 8, false, holds(4, &mut tried)).unwrap_err(), FULL);
        assert_eq!(tried, [8]);
        assert_eq!(in_pieces(2, &mut 2, true, holds(0, &mut tried)).unwrap_err(), FULL);
        let other = |_| Err::<(), _>("CUDA error: device-side assert triggered".to_owned());
        assert!(in_pieces(8, &mut 8, true, other).unwrap_err().contains("assert"));
    }
}
