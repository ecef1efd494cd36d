//! Finds samples that are there twice: keys that two sources share, pictures of the same bytes, pictures that look alike.
//!
//! Parts are added in order, and the first of equal samples is kept; what comes out depends on the records alone.

use std::collections::HashMap;

use crate::plan::UnitRecord;
use crate::settings::Duplicates;

/// Part and row (among those kept) of a sample.
pub(super) type At = (u32, u32);

/// A sample that repeats an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Repeat {
    pub(super) at: At,
    pub(super) of: At,
    /// They only look alike.
    pub(super) near: bool,
}

/// What was found of keys. 64 bits of a digest may be shared by two keys: whoever asks looks at the keys themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SharedKey {
    pub(super) first: u32,
    pub(super) second: At,
}

/// Looks for repeats. About 12 bytes for every sample's key, 24 for its picture's digest, and 4 for each band of its look.
#[derive(Debug)]
pub(super) struct Finder {
    keys: HashMap<u64, u32>,
    contents: HashMap<u128, At>,
    looks: Option<Looks>,
    pub(super) repeats: Vec<Repeat>,
    pub(super) shared_keys: Vec<SharedKey>,
}

impl Finder {
    pub(super) fn new(rule: Duplicates) -> Finder {
        let looks = if let Duplicates::Near { bits } = rule { Some(Looks::new(bits)) } else { None };
        Finder { keys: HashMap::new(), contents: HashMap::new(), looks, repeats: Vec::new(), shared_keys: Vec::new() }
    }

    pub(super) fn add(&mut self, part: u32, record: &UnitRecord) {
        for (row, key) in (0..).zip(&record.keys) {
            let first = self.keys.insert(short(key), part);
            self.shared_keys.extend(first.map(|first| SharedKey { first, second: (part, row) }));
            let content = record.contents.get(row as usize).and_then(|text| u128::from_str_radix(text, 16).ok());
            let look = record.looks.get(row as usize).and_then(|text| u64::from_str_radix(text, 16).ok());
            self.add_picture((part, row), content, look);
        }
    }

    fn add_picture(&mut self, at: At, content: Option<u128>, look: Option<u64>) {
        if let Some(content) = content {
            if let Some(of) = self.contents.get(&content) {
                return self.repeats.push(Repeat { at, of: *of, near: false });
            }
            self.contents.insert(content, at);
        }
        if let (Some(look), Some(looks)) = (look, &mut self.looks) {
            match looks.like(look) {
                Some(of) => self.repeats.push(Repeat { at, of, near: true }),
                None => looks.add(look, at),
            }
        }
    }
}

fn short(key: &str) -> u64 {
    let hash = blake3::hash(key.as_bytes());
    hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Hashes by their bands: two that differ in at most `bits` bits have one of `bits + 1` bands in common.
#[derive(Debug)]
struct Looks {
    bits: u32,
    kept: Vec<(u64, At)>,
    bands: Vec<HashMap<u64, Vec<u32>>>,
}

impl Looks {
    fn new(bits: u32) -> Looks {
        Looks { bits, kept: Vec::new(), bands: (0..=bits).map(|_| HashMap::new()).collect() }
    }

    fn band(&self, look: u64, band: usize) -> u64 {
        let edge = |band: usize| (band * 64 / self.bands.len()) as u32;
        let (low, width) = (edge(band), edge(band + 1) - edge(band));
        look.checked_shr(low).unwrap_or(0) & (u64::MAX >> (64 - width))
    }

    /// The first kept picture that looks like this one.
    fn like(&self, look: u64) -> Option<At> {
        let candidates = self.bands.iter().enumerate().filter_map(|(band, map)| map.get(&self.band(look, band))).flatten();
        let close = candidates.filter(|at| (self.kept[**at as usize].0 ^ look).count_ones() <= self.bits);
        close.min().map(|at| self.kept[*at as usize].1)
    }

    fn add(&mut self, look: u64, at: At) {
        let number = self.kept.len() as u32;
        for band in 0..self.bands.len() {
            let value = self.band(look, band);
            self.bands[band].entry(value).or_default().push(number);
        }
        self.kept.push((look, at));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn finder(rule: Duplicates, pictures: &[(u128, u64)]) -> Vec<Repeat> {
        let mut finder = Finder::new(rule);
        for (row, (content, look)) in (0..).zip(pictures) {
            finder.add_picture((0, row), Some(*content), Some(*look));
        }
        finder.repeats
    }

    #[test]
    fn the_first_of_the_same_bytes_is_kept() {
        let repeats = finder(Duplicates::Exact, &[(1, 0), (2, 0), (1, 0), (1, 9)]);
        let repeat = |row| Repeat { at: (0, row), of: (0, 0), near: false };
        assert_eq!(repeats, [repeat(2), repeat(3)]);
    }

    proptest! {
        /// Bands find what comparing with everything finds.
        #[test]
        fn looks_within_the_bound_are_found(bits in 0u32..=12, looks in prop::collection::vec(0u64..1 << 10, 0..40), spread in 0u32..54) {
            let looks: Vec<u64> = looks.iter().map(|look| look << spread | look >> 3).collect();
            let pictures: Vec<_> = (0..).zip(&looks).map(|(content, look)| (content, *look)).collect();
            let found = finder(Duplicates::Near { bits }, &pictures);
            let (mut kept, mut expected) = (Vec::<(u64, u32)>::new(), Vec::new());
            for (row, look) in (0..).zip(&looks) {
                match kept.iter().find(|(other, _)| (other ^ look).count_ones() <= bits) {
                    Some((_, of)) => expected.push(Repeat { at: (0, row), of: (0, *of), near: true }),
                    None => kept.push((*look, row)),
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
