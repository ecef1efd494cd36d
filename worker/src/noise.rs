//! NOISE: what is random about a sample is a pure function of (seed, epoch, sample), never of rank, clock or history.
//!
//! Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator: the key is made from seed, epoch and sample, the counter
//! counts blocks within a stream. Logarithm, sine and cosine come from `libm`, so that the bits do not depend on the system's.

/// What a stream of random numbers is for. Streams of one sample are independent of each other.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// The timestep.
    Timestep = 0,
    /// Whether the caption is dropped.
    Dropout = 1,
    /// The noise that the network learns to predict.
    Noise = 2,
    /// The sample taken from the VAE's posterior.
    Posterior = 3,
    /// Which of its captions is taken.
    Caption = 4,
}

/// The random numbers of one sample in one epoch.
#[derive(Clone, Copy, Debug)]
pub struct SampleNoise {
    key: [u32; 2],
}

/// The epoch that stands for held-out noise: no training epoch has this number.
pub const HELD_OUT: u64 = u64::MAX;

impl SampleNoise {
    /// `sample` is the sample's own number, such as the low half of its key's hash.
    pub fn new(seed: u64, epoch: u64, sample: u64) -> Self {
        let mut words = [0u8; 24];
        words[..8].copy_from_slice(&seed.to_le_bytes());
        words[8..16].copy_from_slice(&epoch.to_le_bytes());
        words[16..].copy_from_slice(&sample.to_le_bytes());
        let hash = blake3::hash(&words);
        let word = |at: usize| {
            u32::from_le_bytes([hash.as_bytes()[at], hash.as_bytes()[at + 1], hash.as_bytes()[at + 2], hash.as_bytes()[at + 3]])
        };
        Self { key: [word(0), word(4)] }
    }

    /// A timestep, uniform in `0..timesteps`.
    pub fn timestep(&self, timesteps: u32) -> i64 {
        let [word, ..] = self.block(Stream::Timestep, 0);
        ((u64::from(word) * u64::from(timesteps)) >> 32) as i64
    }

    /// Whether this sample's caption is dropped, with the given probability.
    pub fn dropped(&self, probability: f64) -> bool {
        let [word, ..] = self.block(Stream::Dropout, 0);
        f64::from(word) < probability * 4_294_967_296.0
    }

    /// One of several, by their weights (not negative, and not all 0: then the first).
    pub fn choice(&self, weights: &[f64]) -> usize {
        let [word, ..] = self.block(Stream::Caption, 0);
        let mut left = f64::from(word) / 4_294_967_296.0 * weights.iter().sum::<f64>();
        let taken = weights.iter().position(|weight| {
            let here = left < *weight;
            left -= weight;
            here
        });
        // Rounding, or a sum beyond what is finite, may leave none.
        taken.or_else(|| weights.iter().rposition(|weight| *weight > 0.0)).unwrap_or(0)
    }

    /// Fills `out` with standard normal numbers (Box and Muller).
    pub fn normals(&self, stream: Stream, out: &mut [f32]) {
        for (index, chunk) in out.chunks_mut(4).enumerate() {
            let [a, b, c, d] = self.block(stream, index as u64);
            let (x, y) = normal_pair(a, b);
            let (z, w) = normal_pair(c, d);
            for (slot, value) in chunk.iter_mut().zip([x, y, z, w]) {
                *slot = value;
            }
        }
    }

    fn block(&self, stream: Stream, index: u64) -> [u32; 4] {
        philox([index as u32, (index >> 32) as u32, stream as u32, 0], self.key)
    }
}

fn normal_pair(a: u32, b: u32) -> (f32, f32) {
    // (0, 1]: the logarithm is finite. 24 bits, as many as a float32 holds.
    let u = ((a >> 8) + 1) as f32 / 16_777_216.0;
    let angle = std::f32::consts::TAU * ((b >> 8) as f32 / 16_777_216.0);
    let radius = (-2.0 * libm::logf(u)).sqrt();
    let (sin, cos) = libm::sincosf(angle);
    (radius * cos, radius * sin)
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let left = u64::from(counter[0]) * 0xD251_1F53;
        let right = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(right >> 32) as u32 ^ counter[1] ^ key[0], right as u32, (left >> 32) as u32 ^ counter[3] ^ key[1], left as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normals_are_standard_and_depend_on_seed_epoch_sample_and_stream() {
        let mut values = vec![0f32; 200_001];
        SampleNoise::new(1, 2, 3).normals(Stream::Noise, &mut values);
        let n = values.len() as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let var = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        let fourth = values.iter().map(|v| f64::from(*v).powi(4)).sum::<f64>() / n;
        assert!(mean.abs() < 0.01 && (var - 1.0).abs() < 0.02 && (fourth - 3.0).abs() < 0.1, "{mean} {var} {fourth}");
        let first = |seed, epoch, sample, stream| {
            let mut out = [0f32; 4];
            SampleNoise::new(seed, epoch, sample).normals(stream, &mut out);
            out
        };
        let base = first(1, 2, 3, Stream::Noise);
        assert_eq!(base, values[..4]);
        for other in
            [first(2, 2, 3, Stream::Noise), first(1, 3, 3, Stream::Noise), first(1, 2, 4, Stream::Noise), first(1, 2, 3, Stream::Posterior)]
        {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn choices_have_their_weights_and_change_with_the_epoch() {
        let mut counts = [0u32; 3];
        let mut changed = 0;
        for sample in 0..20_000 {
            let choice = SampleNoise::new(7, 0, sample).choice(&[0.7, 0.0, 2.1]);
            counts[choice] += 1;
            changed += u32::from(choice != SampleNoise::new(7, 1, sample).choice(&[0.7, 0.0, 2.1]));
        }
        assert!((4_800..5_200).contains(&counts[0]) && counts[1] == 0, "{counts:?}");
        assert!((7_200..7_800).contains(&changed), "two draws differ 3 times in 8: {changed}");
        assert_eq!(SampleNoise::new(7, 0, 0).choice(&[1.0]), 0);
        assert_eq!(SampleNoise::new(7, 0, 0).choice(&[0.0, 0.0]), 0);
        // The product of the smallest weight and what is drawn is the weight itself, or nothing.
        assert!((0..64).all(|sample| SampleNoise::new(7, 0, sample).choice(&[0.0, 5e-324, 0.0]) == 1));
    }

    #[test]
    fn timesteps_are_uniform_and_dropout_has_its_rate() {
        let mut counts = [0u32; 10];
        let mut dropped = 0;
        for sample in 0..20_000 {
            let noise = SampleNoise::new(7, 0, sample);
            let t = noise.timestep(1000);
            assert!((0..1000).contains(&t));
            counts[(t / 100) as usize] += 1;
            dropped += u32::from(noise.dropped(0.1));
            assert!(!noise.dropped(0.0) && noise.dropped(1.0));
        }
        assert!(counts.iter().all(|c| (1_850..2_150).contains(c)), "{counts:?}");
        assert!((1_850..2_150).contains(&dropped), "{dropped}");
    }
}
