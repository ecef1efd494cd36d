//! A keyed permutation of 0..n with random access and no tables.

use crate::mix;

/// Four rounds make a pseudo-random permutation of a large domain; eight leave a margin.
const ROUNDS: usize = 8;

/// Small domains want more: with ideal hashes, the orders of 6 numbers are 34 % (rms) uneven after 8 rounds, 2 % after
/// 16, and after 20 no longer to be told from even.
const SMALL_ROUNDS: usize = 24;

/// Below this length a domain is small.
const SMALL: u64 = 1024;

/// A Feistel network over the pairs (left, right) of an a × b rectangle that just holds n numbers.
///
/// Every round adds a keyed hash of one half to the other, modulo that half's size; such a step can be undone, so the
/// network permutes the rectangle. Numbers at or above n are walked on until they fall below it (cycle-walking), which
/// keeps it a permutation of 0..n. With a = ⌈√n⌉ and b = ⌈n / a⌉ fewer than a numbers lie outside: a walk is rare.
#[derive(Clone, Debug)]
pub(super) struct Permutation {
    len: u64,
    left: u64,
    right: u64,
    rounds: usize,
    keys: [u64; SMALL_ROUNDS],
}

impl Permutation {
    /// The permutation of 0..`len` that `key` names.
    pub(super) fn new(key: u64, len: u64) -> Self {
        let root = len.isqrt();
        let left = (root + u64::from(root * root < len)).max(1);
        let mut stream = mix::Rng::new(key);
        let keys = std::array::from_fn(|_| stream.next());
        let rounds = if len < SMALL { SMALL_ROUNDS } else { ROUNDS };
        Self { len, left, right: len.div_ceil(left).max(1), rounds, keys }
    }

    /// Where `position`, which must be below the length, is sent. Others are their own image.
    pub(super) fn apply(&self, position: u64) -> u64 {
        if position >= self.len {
            return position;
        }
        let mut at = self.network(position);
        while at >= self.len {
            at = self.network(at);
        }
        at
    }

    fn network(&self, at: u64) -> u64 {
        let (mut left, mut right) = (at / self.right, at % self.right);
        for pair in self.keys[..self.rounds].chunks_exact(2) {
            left = add(left, round(pair[0], right), self.left);
            right = add(right, round(pair[1], left), self.right);
        }
        left * self.right + right
    }
}

/// A well mixed word from a round's key and one half.
const fn round(key: u64, half: u64) -> u64 {
    mix::mix(key.wrapping_add(half.wrapping_mul(0xd6e8_feb8_6659_fd93)))
}

/// (`half` + hash) modulo `size`, for `half` below `size`.
const fn add(half: u64, hash: u64, size: u64) -> u64 {
    let sum = half + mix::below(hash, size);
    if sum < size { sum } else { sum - size }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use proptest::prelude::*;

    use super::*;

    fn image(key: u64, len: u64) -> Vec<u64> {
        let permutation = Permutation::new(key, len);
        (0..len).map(|at| permutation.apply(at)).collect()
    }

    proptest! {
        #[test]
        fn every_number_is_hit_once(key: u64, len in 0_u64..3000) {
            let image = image(key, len);
            prop_assert_eq!(image.iter().copied().collect::<BTreeSet<_>>().len() as u64, len);
            prop_assert!(image.iter().all(|at| *at < len));
        }

        #[test]
        fn large_domains_stay_inside_and_apart(key: u64, len in (1_u64 << 40)..(1 << 62), at in any::<prop::sample::Index>()) {
            let permutation = Permutation::new(key, len);
            let at = at.index((len - 1) as usize) as u64;
            let (here, next) = (permutation.apply(at), permutation.apply(at + 1));
            prop_assert!(here < len && next < len && here != next);
        }
    }

    #[test]
    fn a_position_outside_is_its_own_image() {
        assert_eq!(Permutation::new(1, 10).apply(10), 10);
        assert_eq!(Permutation::new(1, 0).apply(0), 0);
    }

    /// All n! orders of a few numbers turn up about equally often over keys.
    #[test]
    fn small_domains_reach_every_order() {
        for (len, orders) in [(2, 2), (3, 6), (4, 24), (5, 120), (6, 720)] {
            let expected = 400.0;
            let mut seen: HashMap<Vec<u64>, u32> = HashMap::new();
            (0..400 * orders).for_each(|key| *seen.entry(image(mix::mix(key), len)).or_default() += 1);
            assert_eq!(seen.len() as u64, orders, "orders of {len}");
            let chi: f64 = seen.values().map(|n| (f64::from(*n) - expected).powi(2) / expected).sum();
            // Mean orders - 1, deviation sqrt(2 (orders - 1)): six deviations and a little.
            let freedom = orders as f64 - 1.0;
            assert!(chi < freedom + 6.0 * (2.0 * freedom).sqrt() + 6.0, "{len}: chi² {chi:.1} for {freedom}");
        }
    }

    /// Neighbours land independently: displacement and neighbour distance look as for a random order.
    #[test]
    fn neighbours_are_torn_apart() {
        for len in [1000_u64, 4096, 65_537] {
            let image = image(99, len);
            let mean = |distances: Vec<u64>| distances.iter().sum::<u64>() as f64 / distances.len() as f64 / len as f64;
            let moved = mean(image.iter().zip(0..).map(|(at, from)| at.abs_diff(from)).collect());
            let gap = mean(image.windows(2).map(|pair| pair[0].abs_diff(pair[1])).collect());
            assert!((moved - 1.0 / 3.0).abs() < 0.03 && (gap - 1.0 / 3.0).abs() < 0.03, "{len}: {moved} {gap}");
            let rises = image.windows(2).filter(|pair| pair[0] < pair[1]).count() as f64 / len as f64;
            assert!((rises - 0.5).abs() < 0.03, "{len}: {rises}");
            let fixed = image.iter().zip(0..).filter(|(at, from)| **at == *from).count();
            assert!(fixed < 10, "{len}: {fixed} fixed points");
        }
    }
}
