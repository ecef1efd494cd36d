//! The BLAKE3 tree of a file: by it any part of the file is checked against the digest of the whole, without reading the whole.
//!
//! BLAKE3 is a Merkle tree. Its inner nodes above groups of 64 KiB, parents before their children and left before right, 64 bytes each (the
//! children's chaining values), are stored beside the file: one thousandth of its size. It is what bao calls a pre-order outboard, without
//! the length in front. The tree need not be trusted: what it says must lead up to the file's own digest.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use bytes::Bytes;
use ella_store::{Created, Digest, Store};

use crate::error::DataError;
use crate::manifest::read;

/// Bytes that are checked at once. BLAKE3 is at its full speed from 16 KiB on.
const GROUP: usize = 64 << 10;
const NODE: usize = 64;

/// The folder of trees, beside the folder's other files.
pub(crate) const TREES: &str = "trees";
const ENDING: &str = ".obao6";

/// Where the tree of a file lies.
pub(crate) fn key(name: &str) -> String {
    format!("{TREES}/{name}{ENDING}")
}

/// The file of a tree.
pub(crate) fn file_of(key: &str) -> Option<&str> {
    key.strip_prefix(TREES)?.strip_prefix('/')?.strip_suffix(ENDING)
}

/// Stores the tree of the file that stands under this name. A small file has none.
pub(crate) async fn write(folder: &Store, name: &str, file: &[u8]) -> Result<(), DataError> {
    if file.len() <= GROUP {
        return Ok(());
    }
    let (key, tree) = (key(name), Bytes::from(outboard(file)));
    // One that is there may be of a file that was lost and made again with other bytes.
    if folder.create(&key, tree.clone()).await? == Created::AlreadyThere && read(folder, &key).await?.as_ref() != Some(&tree) {
        folder.put(&key, tree).await?;
    }
    Ok(())
}

fn groups(len: usize) -> usize {
    len.div_ceil(GROUP).max(1)
}

/// A part of a file of that length, with all of the groups that it has bytes of: what is read to check it.
pub(crate) fn checked_with(part: &Range<usize>, len: usize) -> Range<usize> {
    part.start / GROUP * GROUP..part.end.next_multiple_of(GROUP).min(len)
}

/// Bytes of the tree of a file of that length.
fn outboard_len(len: usize) -> usize {
    (groups(len) - 1) * NODE
}

/// The tree of a file.
pub(crate) fn outboard(file: &[u8]) -> Vec<u8> {
    let mut tree = Vec::with_capacity(outboard_len(file.len()));
    if file.len() > GROUP {
        build(file, 0, &mut tree);
    }
    tree
}

fn build(part: &[u8], start: usize, tree: &mut Vec<u8>) -> ChainingValue {
    if part.len() <= GROUP {
        return leaf(part, start);
    }
    let (at, middle) = (tree.len(), split(part.len()));
    tree.extend([0; NODE]);
    let left = build(&part[..middle], start, tree);
    let right = build(&part[middle..], start + middle, tree);
    tree[at..at + NODE / 2].copy_from_slice(&left);
    tree[at + NODE / 2..at + NODE].copy_from_slice(&right);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

fn leaf(group: &[u8], start: usize) -> ChainingValue {
    Hasher::new().set_input_offset(start as u64).update(group).finalize_non_root()
}

/// Length of the left subtree: whole groups, for they are a power of two of chunks.
fn split(len: usize) -> usize {
    left_subtree_len(len as u64) as usize
}

/// Which groups of a file have been checked.
#[derive(Debug)]
pub(crate) struct Marks(Vec<AtomicU64>);

impl Marks {
    /// None, of a file of that length.
    pub(crate) fn new(len: usize) -> Marks {
        Marks((0..groups(len).div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn has(&self, group: usize) -> bool {
        self.0.get(group / 64).is_some_and(|word| word.load(Relaxed) >> (group % 64) & 1 == 1)
    }

    /// Whether all groups of a part are marked. A part without bytes has none.
    fn have(&self, part: &Range<usize>) -> bool {
        part.is_empty() || (part.start / GROUP..part.end.div_ceil(GROUP)).all(|group| self.has(group))
    }

    fn set(&self, group: usize) {
        if let Some(word) = self.0.get(group / 64) {
            word.fetch_or(1 << (group % 64), Relaxed);
        }
    }
}

/// A file's tree, and what has been checked by it.
#[derive(Debug)]
pub(crate) struct Tree<T> {
    digest: Digest,
    outboard: T,
    marks: Marks,
}

impl<T: AsRef<[u8]>> Tree<T> {
    /// The tree of a file of that digest and length; none if it has the wrong size to be that.
    pub(crate) fn new(digest: Digest, len: usize, outboard: T) -> Option<Tree<T>> {
        (len > GROUP && outboard.as_ref().len() == outboard_len(len)).then(|| Tree { digest, outboard, marks: Marks::new(len) })
    }

    /// Whether a part of the file, which has the length it was made for, is what the digest says.
    pub(crate) fn check(&self, file: &[u8], part: &Range<usize>) -> bool {
        self.marks.have(part) || self.node(file, part, 0..file.len(), 0, None)
    }

    /// Whether a part has been checked.
    pub(crate) fn has(&self, part: &Range<usize>) -> bool {
        self.marks.have(part)
    }

    /// Marks all as checked.
    pub(crate) fn accept(&self) {
        self.marks.0.iter().for_each(|word| word.store(u64::MAX, Relaxed));
    }

    /// Whether all has been checked.
    pub(crate) fn is_done(&self, len: usize) -> bool {
        self.marks.have(&(0..len))
    }

    /// Checks what `span`, the subtree of node number `at`, has in common with `part`. `expected`: its chaining value; none for the root.
    fn node(&self, file: &[u8], part: &Range<usize>, span: Range<usize>, at: usize, expected: Option<&[u8]>) -> bool {
        if span.start >= part.end || span.end <= part.start {
            return true;
        }
        if span.len() <= GROUP {
            let group = span.start / GROUP;
            let good = self.marks.has(group) || expected.is_some_and(|value| leaf(&file[span.clone()], span.start) == value);
            if good {
                self.marks.set(group);
            }
            return good;
        }
        let (left, right) = self.outboard.as_ref()[at * NODE..(at + 1) * NODE].split_at(NODE / 2);
        let (Ok(l), Ok(r)) = (left.try_into(), right.try_into()) else { return false };
        let good = match expected {
            Some(value) => merge_subtrees_non_root(l, r, Mode::Hash) == value,
            None => merge_subtrees_root(l, r, Mode::Hash).as_bytes() == self.digest.as_bytes(),
        };
        let middle = split(span.len());
        good && self.node(file, part, span.start..span.start + middle, at + 1, Some(left))
            && self.node(file, part, span.start + middle..span.end, at + groups(middle), Some(right))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    fn tree(file: &[u8]) -> Tree<Vec<u8>> {
        Tree::new(Digest::of(file), file.len(), outboard(file)).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

        /// A flipped bit is found by whoever asks for its group, and by nobody else.
        #[test]
        fn damage_is_found_where_it_is(len in GROUP + 1..20 * GROUP, at: prop::sample::Index, from: prop::sample::Index, to: prop::sample::Index) {
            let good = file(len);
            let tree = tree(&good);
            let mut bad = good.clone();
            let at = at.index(len);
            bad[at] ^= 4;
            let (from, to) = (from.index(len), to.index(len));
            let part = from.min(to)..from.max(to) + 1;
            let group = at / GROUP;
            let asked = part.start / GROUP <= group && group <= (part.end - 1) / GROUP;
            prop_assert_eq!(tree.check(&bad, &part), !asked);
            prop_assert!(!tree.check(&bad, &(at..at + 1)) && !tree.is_done(len));
            prop_assert!(tree.check(&good, &(0..len)) && tree.is_done(len));
        }

        /// A damaged tree lets nothing through that it has a part in.
        #[test]
        fn a_tree_is_not_trusted(len in 2 * GROUP + 1..9 * GROUP, at: prop::sample::Index) {
            let file = file(len);
            let mut outboard = outboard(&file);
            let at = at.index(outboard.len());
            outboard[at] ^= 1;
            let tree = Tree::new(Digest::of(&file), len, outboard).unwrap();
            prop_assert!(!tree.check(&file, &(0..len)));
        }
    }

    #[test]
    fn a_tree_of_another_size_is_none() {
        let (one, other) = (file(3 * GROUP), file(4 * GROUP + 1));
        assert!(Tree::new(Digest::of(&one), one.len(), outboard(&other)).is_none());
        assert!(outboard(&file(GROUP)).is_empty() && Tree::new(Digest::of(b""), 0, Vec::new()).is_none());
    }

    #[test]
    fn the_empty_part_is_always_right() {
        let file = file(2 * GROUP);
        assert!(tree(&file).check(&file, &(7..7)));
    }
}
