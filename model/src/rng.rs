//! Random numbers as a pure function of (seed, name, position): independent of order, thread and libtorch's generator.

/// A counter-based generator: SplitMix64 evaluated at any position, keyed by a seed and a name.
#[derive(Clone, Copy, Debug)]
pub struct CounterRng {
    key: u64,
}

impl CounterRng {
    /// The stream that belongs to `seed` and `name`.
    pub fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
        let mut key = [0; 8];
        hasher.finalize_xof().fill(&mut key);
        CounterRng { key: u64::from_le_bytes(key) }
    }

    /// 64 random bits at `position`.
    pub fn bits(&self, position: u64) -> u64 {
        // Constants of SplitMix64 (Steele, Lea, Flood 2014).
        let mut z = self.key.wrapping_add(position.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `[0, 1)` with 24 random bits, exact in float32.
    pub fn unit(&self, position: u64) -> f32 {
        (self.bits(position) >> 40) as f32 / (1u32 << 24) as f32
    }

    /// `count` numbers, uniform in `[-bound, bound)`.
    pub fn uniform(&self, count: usize, bound: f64) -> Vec<f32> {
        (0..count as u64).map(|i| ((2.0 * f64::from(self.unit(i)) - 1.0) * bound) as f32).collect()
    }

    /// `count` numbers, normal with mean 0 and the given standard deviation (Box–Muller over pairs of positions).
    pub fn normal(&self, count: usize, std: f64) -> Vec<f32> {
        let mut values = Vec::with_capacity(count + 1);
        for pair in 0..count.div_ceil(2) as u64 {
            let bits = self.bits(pair);
            // In (0, 1]: the logarithm stays finite.
            let radius = (-2.0 * (((bits >> 32) + 1) as f64 / 4_294_967_296.0).ln()).sqrt() * std;
            let angle = std::f64::consts::TAU * (bits & 0xffff_ffff) as f64 / 4_294_967_296.0;
            values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
        }
        values.truncate(count);
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_seed_and_name_only() {
        assert_eq!(CounterRng::new(7, "a").normal(5, 1.0), CounterRng::new(7, "a").normal(9, 1.0)[..5]);
        assert_ne!(CounterRng::new(7, "a").bits(0), CounterRng::new(7, "b").bits(0));
        assert_ne!(CounterRng::new(7, "a").bits(0), CounterRng::new(8, "a").bits(0));
    }

    #[test]
    fn moments_are_those_of_the_distribution() {
        let n = 100_000;
        let normal = CounterRng::new(1, "n").normal(n, 2.0);
        let mean = normal.iter().sum::<f32>() / n as f32;
        let var = normal.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n as f32;
        assert!(mean.abs() < 0.03 && (var - 4.0).abs() < 0.1, "mean {mean}, variance {var}");
        let uniform = CounterRng::new(1, "u").uniform(n, 3.0);
        let var = uniform.iter().map(|x| x * x).sum::<f32>() / n as f32;
        assert!((var - 3.0).abs() < 0.05 && uniform.iter().all(|x| (-3.0..3.0).contains(x)), "variance {var}");
    }
}
