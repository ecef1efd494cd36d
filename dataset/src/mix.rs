//! Keyed 64-bit mixing: the one source of pseudo-randomness behind ORDER and the built-in scenes.
//!
//! Plain integer arithmetic, so every machine draws the same numbers. What is derived here is pinned
//! by tests of the modules that use it: changing a constant changes every run's order.

/// An odd constant without structure (2^64 divided by the golden ratio).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A bijection of 64 bits in which every input bit reaches every output bit (SplitMix64's finalizer).
pub(crate) const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One key from several numbers; their order matters.
pub(crate) fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(GOLDEN, |hash, part| mix(hash.wrapping_mul(GOLDEN).wrapping_add(mix(part.wrapping_add(GOLDEN)))))
}

/// A number below `bound`, from a well mixed word. `bound` 0 gives 0.
pub(crate) const fn below(word: u64, bound: u64) -> u64 {
    ((word as u128 * bound as u128) >> 64) as u64
}

/// A SplitMix64 stream.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) const fn new(key: u64) -> Self {
        Self(key)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A number below `bound`.
    pub(crate) const fn below(&mut self, bound: usize) -> usize {
        below(self.next(), bound as u64) as usize
    }

    /// True once in `n` draws on average.
    pub(crate) const fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `items`, which must not be empty.
    pub(crate) fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    /// Fisher-Yates.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}
