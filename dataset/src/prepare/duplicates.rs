//! Finds samples that are there twice: keys, pictures of the same bytes, pictures that look alike.
//!
//! The first of equal samples, in the order of parts and rows, is kept; what comes out depends on the records alone. Digests go to temporary
//! files by their first bits, and are sorted file by file: by that reckoning 10⁹ samples take 48 GB of disk and 375 MB of memory. Looks, which are compared
//! only if the settings say so, stay in memory: 16 bytes a picture, and 4 for each band.

use std::collections::{HashMap, HashSet};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};

use tempfile::SpooledTempFile;

use crate::plan::UnitRecord;
use crate::settings::Duplicates;

/// Part and row (among those kept) of a sample.
pub(super) type At = (u32, u32);
/// Half of a digest. Among 10⁹ keys, two that share it are as likely as one in 10²⁰.
type Half = [u8; 16];

/// Files that digests are dealt to, by their first bits.
const FILES: usize = 64;
/// Bytes of one that stay in memory.
const IN_MEMORY: usize = 128 << 10;
/// Bytes of a sample in one.
const SAMPLE: u64 = 24;

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

/// A key that two sources have both: where the second is, and the parts of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SharedKey {
    pub(super) at: At,
    pub(super) first: u32,
}

/// What was found: repeats in the samples' order, or the first key that sources share.
pub(super) type Found = Result<Vec<Repeat>, SharedKey>;

/// Looks for repeats.
#[derive(Debug)]
pub(super) struct Finder {
    /// The source of every part.
    sources: HashMap<u32, usize>,
    keys: Spill,
    contents: Spill,
    /// How many bits may differ, and what is compared.
    looks: Option<(u32, Spill)>,
}

impl Finder {
    pub(super) fn new(rule: Duplicates) -> Finder {
        let looks = if let Duplicates::Near { bits } = rule { Some((bits, Spill::new(1))) } else { None };
        Finder { sources: HashMap::new(), keys: Spill::new(FILES), contents: Spill::new(FILES), looks }
    }

    /// Adds the next part, of a source.
    pub(super) fn add(&mut self, part: u32, source: usize, record: &UnitRecord) -> io::Result<()> {
        self.sources.insert(part, source);
        for (row, key) in (0..).zip(&record.keys) {
            self.keys.push(half(key), (part, row))?;
            let content = record.contents.get(row as usize).and_then(|text| u128::from_str_radix(text, 16).ok());
            let look = record.looks.get(row as usize).and_then(|text| u64::from_str_radix(text, 16).ok());
            self.add_picture((part, row), content, look)?;
        }
        Ok(())
    }

    fn add_picture(&mut self, at: At, content: Option<u128>, look: Option<u64>) -> io::Result<()> {
        if let Some(content) = content {
            self.contents.push(content.to_be_bytes(), at)?;
        }
        if let (Some(look), Some((_, looks))) = (look, &mut self.looks) {
            looks.push(u128::from(look).to_le_bytes(), at)?;
        }
        Ok(())
    }

    /// Compares all samples.
    pub(super) fn find(self) -> io::Result<Found> {
        let mut repeats = match self.keys.find_keys(&self.sources)? {
            Ok(repeats) => repeats,
            Err(shared) => return Ok(Err(shared)),
        };
        // What is not kept for its key, nothing repeats; nor what is not kept for its bytes.
        let mut gone: HashSet<At> = repeats.iter().map(|repeat| repeat.at).collect();
        let contents = self.contents.find_contents(&gone)?;
        gone.extend(contents.iter().map(|repeat| repeat.at));
        repeats.extend(contents);
        if let Some((bits, looks)) = self.looks {
            repeats.extend(looks.find_looks(bits, &gone)?);
        }
        repeats.sort_unstable_by_key(|repeat| repeat.at);
        Ok(Ok(repeats))
    }
}

fn half(key: &str) -> Half {
    blake3::hash(key.as_bytes()).as_bytes().first_chunk().copied().unwrap_or_default()
}

/// Samples in files, each with what it is compared by.
struct Spill(Vec<BufWriter<SpooledTempFile>>);

impl std::fmt::Debug for Spill {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Spill of {} files", self.0.len())
    }
}

impl Spill {
    /// Files: a power of two.
    fn new(files: usize) -> Spill {
        Spill((0..files).map(|_| BufWriter::new(SpooledTempFile::new(IN_MEMORY))).collect())
    }

    fn push(&mut self, half: Half, (part, row): At) -> io::Result<()> {
        let file = (half[0] as usize * self.0.len()) >> 8;
        let file = &mut self.0[file];
        file.write_all(&half)?;
        file.write_all(&part.to_le_bytes())?;
        file.write_all(&row.to_le_bytes())
    }

    /// The files, each with its samples in the order in which they were added.
    fn files(self) -> impl Iterator<Item = io::Result<Samples>> {
        self.0.into_iter().map(|file| {
            let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            let left = file.stream_position()? / SAMPLE;
            file.rewind()?;
            Ok(Samples { left, file: BufReader::with_capacity(1 << 20, file) })
        })
    }

    /// Calls with all that are equal, in order, the first apart.
    fn each_equal(self, gone: &HashSet<At>, mut equal: impl FnMut(At, At)) -> io::Result<()> {
        for samples in self.files() {
            let kept = |sample: &io::Result<(Half, At)>| sample.as_ref().map_or(true, |(_, at)| !gone.contains(at));
            let mut samples: Vec<_> = samples?.filter(kept).collect::<io::Result<_>>()?;
            samples.sort_unstable();
            for same in samples.chunk_by(|a, b| a.0 == b.0) {
                same[1..].iter().for_each(|later| equal(same[0].1, later.1));
            }
        }
        Ok(())
    }

    fn find_keys(self, sources: &HashMap<u32, usize>) -> io::Result<Found> {
        let (mut repeats, mut shared) = (Vec::new(), None::<SharedKey>);
        self.each_equal(&HashSet::new(), |first, at| {
            if sources.get(&first.0) == sources.get(&at.0) {
                repeats.push(Repeat { at, of: Of::Key });
            } else {
                let found = SharedKey { at, first: first.0 };
                shared = Some(shared.map_or(found, |other| other.min(found)));
            }
        })?;
        Ok(shared.map_or(Ok(repeats), Err))
    }

    fn find_contents(self, gone: &HashSet<At>) -> io::Result<Vec<Repeat>> {
        let mut repeats = Vec::new();
        self.each_equal(gone, |first, at| repeats.push(Repeat { at, of: Of::Content(first) }))?;
        Ok(repeats)
    }

    fn find_looks(self, bits: u32, gone: &HashSet<At>) -> io::Result<Vec<Repeat>> {
        let (mut looks, mut repeats) = (Looks::new(bits), Vec::new());
        for samples in self.files() {
            for sample in samples? {
                let (look, at) = sample?;
                let look = u128::from_le_bytes(look) as u64;
                match looks.like(look) {
                    _ if gone.contains(&at) => {}
                    Some(of) => repeats.push(Repeat { at, of: Of::Look(of) }),
                    None => looks.add(look, at),
                }
            }
        }
        Ok(repeats)
    }
}

/// What one file holds.
struct Samples {
    left: u64,
    file: BufReader<SpooledTempFile>,
}

impl Iterator for Samples {
    type Item = io::Result<(Half, At)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        Some(self.read())
    }
}

impl Samples {
    fn read(&mut self) -> io::Result<(Half, At)> {
        let (mut half, mut part, mut row) = (Half::default(), [0; 4], [0; 4]);
        self.file.read_exact(&mut half)?;
        self.file.read_exact(&mut part)?;
        self.file.read_exact(&mut row)?;
        Ok((half, (u32::from_le_bytes(part), u32::from_le_bytes(row))))
    }
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
            finder.add_picture((0, row), Some(*content), Some(*look)).unwrap();
        }
        finder.find().unwrap().unwrap()
    }

    #[test]
    fn the_first_of_the_same_bytes_is_kept() {
        let repeats = finder(Duplicates::Exact, &[(1, 0), (2, 0), (1, 0), (1, 9)]);
        let repeat = |row| Repeat { at: (0, row), of: Of::Content((0, 0)) };
        assert_eq!(repeats, [repeat(2), repeat(3)]);
    }

    fn of_keys(parts: &[(usize, &[&str])]) -> Found {
        let mut finder = Finder::new(Duplicates::Exact);
        for (part, (source, keys)) in (0..).zip(parts) {
            for (row, key) in (0..).zip(*keys) {
                finder.keys.push(half(key), (part, row)).unwrap();
            }
            finder.sources.insert(part, *source);
        }
        finder.find().unwrap()
    }

    #[test]
    fn a_key_may_repeat_in_its_own_source_only() {
        let repeat = |at| Repeat { at, of: Of::Key };
        assert_eq!(of_keys(&[(0, &["a", "b"]), (0, &["b", "c", "a"])]), Ok(vec![repeat((1, 0)), repeat((1, 2))]));
        assert_eq!(of_keys(&[(0, &["a", "b"]), (1, &["c"]), (1, &["b", "a", "c"])]), Err(SharedKey { at: (2, 0), first: 0 }));
    }

    #[test]
    fn nothing_repeats_what_is_not_kept() {
        let mut finder = Finder::new(Duplicates::Exact);
        for (row, (key, content)) in (0..).zip([("a", 1), ("a", 2), ("b", 2), ("c", 1)]) {
            finder.keys.push(half(key), (0, row)).unwrap();
            finder.add_picture((0, row), Some(content), None).unwrap();
        }
        let found = finder.find().unwrap().unwrap();
        assert_eq!(found, [Repeat { at: (0, 1), of: Of::Key }, Repeat { at: (0, 3), of: Of::Content((0, 0)) }]);
    }

    proptest! {
        /// Files and sorting find what a table finds, whatever lies on disk.
        #[test]
        fn equal_bytes_are_found(contents in prop::collection::vec(0u128..600, 0..3000)) {
            let spread = |content: &u128| content.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
            let pictures: Vec<_> = contents.iter().map(|content| (spread(content), 0)).collect();
            let mut first = HashMap::new();
            let expected: Vec<_> = (0..).zip(&contents).filter_map(|(row, content)| {
                let of = *first.entry(content).or_insert(row);
                (of != row).then_some(Repeat { at: (0, row), of: Of::Content((0, of)) })
            }).collect();
            prop_assert_eq!(finder(Duplicates::Exact, &pictures), expected);
        }

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
