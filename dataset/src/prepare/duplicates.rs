//! Finds samples that are there twice: keys, pictures of the same bytes, pictures that look alike.
//!
//! Parts are added in order, and the first of equal samples is kept; what comes out depends on the records alone.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::plan::UnitRecord;
use crate::settings::Duplicates;

/// Part and row (among those kept) of a sample.
pub(super) type At = (u32, u32);

/// 96 bits of a digest. Among 10⁹ keys, two that share them are as likely as one in 10¹¹.
type Short = [u32; 3];
/// 128 bits of a digest.
type Content = [u32; 4];

/// A sample that repeats an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Repeat {
    pub(super) at: At,
    pub(super) of: Of,
}

/// What a repeat repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// The key of a sample in an earlier part of the same source.
    Key,
    /// The bytes of this sample's picture.
    Content(At),
    /// The look of this sample's picture.
    Look(At),
}

impl Of {
    /// Where the earlier sample is, if its key must be looked up.
    pub(super) fn place(&self) -> Option<At> {
        match self {
            Of::Key => None,
            Of::Content(at) | Of::Look(at) => Some(*at),
        }
    }
}

/// A key that two sources, by their places in the plan, have both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SharedKey {
    pub(super) key: String,
    pub(super) first: usize,
    pub(super) second: usize,
}

/// Looks for repeats. In hash tables: 16 bytes for every sample's key, 24 for its picture's digest, and 4 for each band of its look.
#[derive(Debug)]
pub(super) struct Finder {
    /// The source of every key.
    keys: HashMap<Short, u32>,
    contents: HashMap<Content, At>,
    looks: Option<Looks>,
    pub(super) repeats: Vec<Repeat>,
}

impl Finder {
    pub(super) fn new(rule: Duplicates) -> Finder {
        let looks = if let Duplicates::Near { bits } = rule { Some(Looks::new(bits)) } else { None };
        Finder { keys: HashMap::new(), contents: HashMap::new(), looks, repeats: Vec::new() }
    }

    /// Adds the next part, of a source. A key of another source is an error.
    pub(super) fn add(&mut self, part: u32, source: usize, record: &UnitRecord) -> Result<(), SharedKey> {
        for (row, key) in (0..).zip(&record.keys) {
            match self.keys.entry(short(key)) {
                Entry::Occupied(first) if *first.get() as usize == source => {
                    // Not kept, so nothing repeats its picture.
                    self.repeats.push(Repeat { at: (part, row), of: Of::Key });
                    continue;
                }
                Entry::Occupied(first) => return Err(SharedKey { key: key.clone(), first: *first.get() as usize, second: source }),
                Entry::Vacant(place) => _ = place.insert(source as u32),
            }
            let content = record.contents.get(row as usize).and_then(|text| u128::from_str_radix(text, 16).ok());
            let look = record.looks.get(row as usize).and_then(|text| u64::from_str_radix(text, 16).ok());
            self.add_picture((part, row), content, look);
        }
        Ok(())
    }

    fn add_picture(&mut self, at: At, content: Option<u128>, look: Option<u64>) {
        if let Some(content) = content {
            match self.contents.entry(words(&content.to_le_bytes())) {
                Entry::Occupied(first) => return self.repeats.push(Repeat { at, of: Of::Content(*first.get()) }),
                Entry::Vacant(place) => _ = place.insert(at),
            }
        }
        if let (Some(look), Some(looks)) = (look, &mut self.looks) {
            match looks.like(look) {
                Some(of) => self.repeats.push(Repeat { at, of: Of::Look(of) }),
                None => looks.add(look, at),
            }
        }
    }
}

fn short(key: &str) -> Short {
    words(blake3::hash(key.as_bytes()).as_bytes())
}

/// The first bytes as numbers: they need less alignment, and so less room, than one large number.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = bytes.chunks_exact(4).map(|word| word.try_into().map_or(0, u32::from_le_bytes));
    std::array::from_fn(|_| words.next().unwrap_or_default())
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
        let repeat = |row| Repeat { at: (0, row), of: Of::Content((0, 0)) };
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
                    Some((_, of)) => expected.push(Repeat { at: (0, row), of: Of::Look((0, *of)) }),
                    None => kept.push((*look, row)),
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
