//! What training must come to, whoever computes it: the state after each step is a pure function of the samples that made it up.

use ella_proto::v1;
use ella_store::{Digest, LedgerEpoch};

/// Samples that a lane takes in a step, but for the last step of an epoch.
const MICRO_BATCH: u64 = 2;

/// Mixes two numbers into one.
pub(super) fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b.wrapping_add(0xD1B5_4A32_D192_ED03);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A multiset of samples: how many, and the sum of their keys' hashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) samples: u64,
    hash: u128,
}

impl Tally {
    fn add(&mut self, sample: u64) {
        self.samples += 1;
        self.hash = self.hash.wrapping_add(u128::from(mix(sample, 1)) << 64 | u128::from(mix(sample, 2)));
    }

    pub(super) fn merge(&mut self, other: Self) {
        self.samples += other.samples;
        self.hash = self.hash.wrapping_add(other.hash);
    }
}

/// What a worker trains: weights and all, as one number, and the ledger of samples, by epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) step: u64,
    pub(super) chain: u64,
    pub(super) ledger: Vec<Tally>,
}

impl State {
    /// Before the first step.
    pub(super) fn fresh() -> Self {
        Self { step: 0, chain: 1, ledger: Vec::new() }
    }

    /// Takes a step, with the gradients of all lanes summed.
    pub(super) fn apply(&mut self, epoch: usize, gradient: u64, tally: Tally) {
        self.step += 1;
        self.chain = mix(mix(self.chain, self.step), gradient);
        self.ledger.resize(self.ledger.len().max(epoch + 1), Tally::default());
        self.ledger[epoch].merge(tally);
    }

    fn part(&self, part: usize) -> Digest {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.step.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.chain.to_le_bytes());
        bytes[16] = part as u8;
        Digest::of(&bytes)
    }

    /// The digests of a commit's files.
    pub(super) fn parts(&self) -> [Digest; 3] {
        [0, 1, 2].map(|part| self.part(part))
    }

    /// The digest on which all ranks must agree.
    pub(super) fn digest(&self) -> Digest {
        let mut text = format!("{} {}", self.step, self.chain);
        for tally in &self.ledger {
            text.push_str(&format!(" {} {:x}", tally.samples, tally.hash));
        }
        Digest::of(text.as_bytes())
    }

    /// As a message has it.
    pub(super) fn reported(&self) -> Vec<v1::LedgerEpoch> {
        let epoch = |(epoch, tally): (usize, &Tally)| v1::LedgerEpoch {
            epoch: epoch as u64,
            samples: tally.samples,
            hash: format!("{:032x}", tally.hash),
        };
        self.ledger.iter().enumerate().map(epoch).collect()
    }

    /// As a record has it.
    pub(super) fn recorded(&self) -> Vec<LedgerEpoch> {
        self.reported().into_iter().map(|e| LedgerEpoch { epoch: e.epoch, samples: e.samples, hash: e.hash }).collect()
    }
}

/// Which samples make up which step (ORDER), and the state after each.
#[derive(Debug)]
pub(super) struct Truth {
    lanes: u64,
    steps_per_epoch: u64,
    states: Vec<State>,
}

impl Truth {
    pub(super) fn new(lanes: u64, steps: u64, steps_per_epoch: u64) -> Self {
        let mut truth = Self { lanes, steps_per_epoch, states: vec![State::fresh()] };
        for step in 1..=steps {
            let mut state = truth.states[step as usize - 1].clone();
            let (mut gradient, mut all) = (0u64, Tally::default());
            for lane in 0..lanes {
                let (of_lane, tally) = truth.lane(&state, lane);
                gradient = gradient.wrapping_add(of_lane);
                all.merge(tally);
            }
            state.apply(truth.epoch(step), gradient, all);
            truth.states.push(state);
        }
        truth
    }

    pub(super) fn epoch(&self, step: u64) -> usize {
        ((step - 1) / self.steps_per_epoch) as usize
    }

    /// Where the data goes on after a step.
    pub(super) fn position(&self, step: u64) -> (u64, u64) {
        (step / self.steps_per_epoch, step % self.steps_per_epoch)
    }

    /// In the last step of an epoch some lanes have fewer samples.
    fn samples(&self, step: u64, lane: u64) -> impl Iterator<Item = u64> + use<> {
        let within = (step - 1) % self.steps_per_epoch;
        let count = if within + 1 == self.steps_per_epoch { MICRO_BATCH - lane % 2 } else { MICRO_BATCH };
        let first = (within * self.lanes + lane) * MICRO_BATCH;
        first..first + count
    }

    /// The gradient of a lane in the step after `state`, and the samples that it used.
    pub(super) fn lane(&self, state: &State, lane: u64) -> (u64, Tally) {
        let mut tally = Tally::default();
        let mut gradient = mix(state.chain, lane);
        for sample in self.samples(state.step + 1, lane) {
            tally.add(sample);
            gradient = mix(gradient, sample);
        }
        (gradient, tally)
    }

    /// The samples of a step.
    pub(super) fn step_samples(&self, step: u64) -> u64 {
        (0..self.lanes).map(|lane| self.samples(step, lane).count() as u64).sum()
    }

    pub(super) fn samples_per_epoch(&self) -> u64 {
        (1..=self.steps_per_epoch).map(|step| self.step_samples(step)).sum()
    }

    /// The state after so many steps.
    pub(super) fn state(&self, step: u64) -> &State {
        &self.states[step as usize]
    }
}
