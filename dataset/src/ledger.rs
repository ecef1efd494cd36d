//! ONCE: which samples were used, folded into a multiset hash.
//!
//! Every epoch has the count of the keys used in it and the sum of their hashes modulo 2^128. A sum does not
//! care about order, so ranks fold what they used on their own and the parts add up; a key that is missing,
//! used twice or swapped for another changes it. `ella audit` recomputes it from the manifest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The length of what [`Tally::words`] gives to an all-reduce.
pub const TALLY_WORDS: usize = 5;

/// The first 16 bytes of a key's BLAKE3 digest, big-endian: its hex form is the digest's beginning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KeyHash(pub u128);

impl KeyHash {
    /// The hash of a sample's key.
    pub fn of(key: &str) -> Self {
        let digest = blake3::hash(key.as_bytes());
        let mut head = [0; 16];
        head.copy_from_slice(&digest.as_bytes()[..16]);
        Self(u128::from_be_bytes(head))
    }
}

/// Why summed words are not a tally.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// A word is negative: the reduction overflowed, or the words are not a tally's.
    #[error("ledger: word {word} of a summed tally is {value} (expected 0 or more); the reduction overflowed or mixed up its buffers")]
    Negative {
        /// Which of the [`TALLY_WORDS`] words.
        word: usize,
        /// What it held.
        value: i64,
    },
}

/// How many keys, and the sum of their hashes modulo 2^128.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    /// How many keys were added.
    pub samples: u64,
    /// The sum of the keys' hashes; written as 32 hex digits.
    #[serde(with = "hex")]
    pub hash: u128,
}

impl Tally {
    /// Counts one key.
    pub fn add(&mut self, key: KeyHash) {
        self.samples += 1;
        self.hash = self.hash.wrapping_add(key.0);
    }

    /// Counts what another tally counted.
    pub fn merge(&mut self, other: &Self) {
        self.samples += other.samples;
        self.hash = self.hash.wrapping_add(other.hash);
    }

    /// The tally as numbers that an integer all-reduce may sum: the count, then the hash in four limbs of
    /// 32 bits, lowest first. A limb leaves 31 bits of room, so up to 2^31 ranks may be summed.
    pub fn words(&self) -> [i64; TALLY_WORDS] {
        let [a, b, c, d] = limbs(self.hash);
        [self.samples as i64, a, b, c, d]
    }

    /// The merged tally of all ranks, from the element-wise sum of their [`Tally::words`].
    ///
    /// # Errors
    /// [`LedgerError::Negative`] if a sum cannot have come from tallies.
    pub fn from_words(words: [i64; TALLY_WORDS]) -> Result<Self, LedgerError> {
        if let Some((word, value)) = words.iter().copied().enumerate().find(|(_, value)| *value < 0) {
            return Err(LedgerError::Negative { word, value });
        }
        let [samples, a, b, c, d] = words;
        Ok(Self { samples: samples as u64, hash: join([a, b, c, d]) })
    }
}

/// A 128-bit number in four limbs of 32 bits, lowest first.
fn limbs(value: u128) -> [i64; 4] {
    [0, 32, 64, 96].map(|shift| i64::from((value >> shift) as u32))
}

/// The number modulo 2^128 whose limbs these are; limbs above 32 bits carry into the next.
fn join(limbs: [i64; 4]) -> u128 {
    limbs.iter().zip([0, 32, 64, 96]).fold(0, |sum: u128, (limb, shift)| sum.wrapping_add((*limb as u128) << shift))
}

/// The tallies of a run, by epoch.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ledger {
    epochs: BTreeMap<u64, Tally>,
}

impl Ledger {
    /// A ledger in which nothing was used yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts one use of `key` in `epoch`.
    pub fn add(&mut self, epoch: u64, key: &str) {
        self.add_hash(epoch, KeyHash::of(key));
    }

    /// As [`Ledger::add`], for a key hashed before.
    pub fn add_hash(&mut self, epoch: u64, key: KeyHash) {
        self.epochs.entry(epoch).or_default().add(key);
    }

    /// Adds a whole tally to `epoch`: what an all-reduce brought back.
    pub fn add_tally(&mut self, epoch: u64, tally: &Tally) {
        if tally.samples > 0 {
            self.epochs.entry(epoch).or_default().merge(tally);
        }
    }

    /// Counts what another ledger counted.
    pub fn merge(&mut self, other: &Self) {
        other.epochs.iter().for_each(|(epoch, tally)| self.add_tally(*epoch, tally));
    }

    /// The tally of one epoch; empty if nothing of it was used.
    pub fn epoch(&self, epoch: u64) -> Tally {
        self.epochs.get(&epoch).copied().unwrap_or_default()
    }

    /// Every epoch of which something was used, in order.
    pub fn epochs(&self) -> impl Iterator<Item = (u64, Tally)> + '_ {
        self.epochs.iter().map(|(epoch, tally)| (*epoch, *tally))
    }
}

mod hex {
    //! 128 bits as exactly 32 lower-case hex digits.

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &u128, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:032x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u128, D::Error> {
        let text = String::deserialize(from)?;
        let plain = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match u128::from_str_radix(&text, 16) {
            Ok(value) if plain => Ok(value),
            _ => Err(D::Error::custom(format!("hash: {text:?} is not 32 lower-case hex digits"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ledger(keys: &[(u64, String)]) -> Ledger {
        let mut ledger = Ledger::new();
        keys.iter().for_each(|(epoch, key)| ledger.add(*epoch, key));
        ledger
    }

    fn keys() -> impl Strategy<Value = Vec<(u64, String)>> {
        prop::collection::vec((0_u64..3, "[a-z]{1,6}"), 0..40)
    }

    proptest! {
        #[test]
        fn any_order_and_any_split_give_the_same_ledger(keys in keys(), cut in 0_usize..40) {
            let whole = ledger(&keys);
            let mut back = keys.clone();
            back.reverse();
            prop_assert_eq!(&whole, &ledger(&back));
            let cut = cut.min(keys.len());
            let mut merged = ledger(&keys[cut..]);
            merged.merge(&ledger(&keys[..cut]));
            prop_assert_eq!(&whole, &merged);
        }

        #[test]
        fn a_missing_doubled_or_swapped_key_changes_it(mut keys in keys(), at in any::<prop::sample::Index>()) {
            prop_assume!(!keys.is_empty());
            let whole = ledger(&keys);
            let at = at.index(keys.len());
            let taken = keys.remove(at);
            prop_assert_ne!(&whole, &ledger(&keys));
            keys.push((taken.0, format!("{}!", taken.1)));
            prop_assert_ne!(&whole, &ledger(&keys));
            keys.push(taken.clone());
            keys.push(taken);
            prop_assert_ne!(&whole, &ledger(&keys));
        }

        #[test]
        fn words_summed_over_ranks_are_the_merge(hashes in prop::collection::vec(any::<u128>(), 1..50)) {
            let mut merged = Tally::default();
            let mut sums = [0_i64; TALLY_WORDS];
            for hash in hashes {
                let mut rank = Tally::default();
                rank.add(KeyHash(hash));
                merged.merge(&rank);
                sums.iter_mut().zip(rank.words()).for_each(|(sum, word)| *sum += word);
            }
            prop_assert_eq!(Tally::from_words(sums), Ok(merged));
        }

        #[test]
        fn json_brings_back_the_same_ledger(keys in keys()) {
            let whole = ledger(&keys);
            let json = serde_json::to_string(&whole).unwrap();
            prop_assert_eq!(whole, serde_json::from_str::<Ledger>(&json).unwrap());
        }
    }

    #[test]
    fn the_written_form_is_pinned() {
        let mut ledger = Ledger::new();
        ledger.add(2, "scene-7-000000001");
        let start = &blake3::hash(b"scene-7-000000001").to_hex()[..32];
        let json = serde_json::to_string(&ledger).unwrap();
        assert_eq!(json, format!(r#"{{"2":{{"samples":1,"hash":"{start}"}}}}"#));
        assert_eq!(KeyHash::of("").0, 0xaf13_49b9_f5f9_a1a6_a040_4dea_36dc_c949, "BLAKE3 of nothing");
    }

    #[test]
    fn the_sum_wraps_and_full_limbs_carry() {
        let mut tally = Tally { samples: 1, hash: u128::MAX };
        tally.add(KeyHash(2));
        assert_eq!(tally, Tally { samples: 2, hash: 1 });
        let ranks = 1_i64 << 31;
        let sums = Tally { samples: 1, hash: u128::MAX }.words().map(|word| word.checked_mul(ranks).unwrap());
        let expected = Tally { samples: ranks as u64, hash: u128::MAX.wrapping_mul(ranks as u128) };
        assert_eq!(Tally::from_words(sums), Ok(expected));
    }

    #[test]
    fn what_is_no_tally_is_refused() {
        assert_eq!(Tally::from_words([1, 0, -3, 0, 0]), Err(LedgerError::Negative { word: 2, value: -3 }));
        for hash in ["", "0", "+0000000000000000000000000000000", "0000000000000000000000000000000G", "0000000000000000000000000000000A"] {
            let json = format!(r#"{{"0":{{"samples":1,"hash":"{hash}"}}}}"#);
            let error = serde_json::from_str::<Ledger>(&json).unwrap_err();
            assert!(error.to_string().contains("32 lower-case hex digits"), "{error}");
        }
    }

    #[test]
    fn an_unused_epoch_is_empty_and_not_listed() {
        let mut ledger = Ledger::new();
        ledger.add_tally(5, &Tally::default());
        assert_eq!(ledger, Ledger::new());
        assert_eq!(ledger.epoch(5), Tally::default());
        ledger.add(9, "a");
        assert_eq!(ledger.epochs().map(|(epoch, tally)| (epoch, tally.samples)).collect::<Vec<_>>(), [(9, 1)]);
    }
}
