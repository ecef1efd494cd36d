//! What the simulators share: a seeded generator, and which schedule failed.

/// A small generator (xorshift64*): a schedule is its seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }

    pub(crate) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// The seed of `ELLA_SEED`, if one schedule is asked for.
pub(crate) fn given() -> Option<u64> {
    std::env::var("ELLA_SEED").ok().and_then(|seed| seed.parse().ok())
}

/// Says which schedule failed.
pub(crate) struct Seed(pub(crate) u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the schedule of ELLA_SEED={} failed", self.0);
        }
    }
}
