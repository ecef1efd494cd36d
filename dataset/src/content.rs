//! The bytes of an open file, each checked before it is used.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use ella_store::Digest;
use memmap2::{Advice, Mmap};

use crate::error::DataError;
use crate::tree::{self, Tree};

/// Linux reads ahead no more for one call than a device takes at once, or than its read-ahead: this much, of most.
const READ_AHEAD: usize = 256 << 10;

/// A file's bytes. Clones share what has been checked.
#[derive(Clone, Debug)]
pub(crate) struct Content {
    /// The file, as errors name it.
    name: Arc<str>,
    bytes: Bytes,
    /// The map of a file, to read ahead by. It needs no open handle: a process may have few.
    map: Option<Arc<Mmap>>,
    /// None: all bytes are good.
    checks: Option<Arc<Checks>>,
}

#[derive(Debug)]
struct Checks {
    digest: Digest,
    tree: Tree<Bytes>,
}

impl Content {
    /// Bytes that need no check, or have been checked.
    pub(crate) fn good(name: &str, bytes: Bytes) -> Content {
        Content { name: name.into(), bytes, map: None, checks: None }
    }

    /// Maps a local file, whose bytes are taken for good.
    pub(crate) fn map(name: &str, path: &Path) -> Result<Content, DataError> {
        Ok(Content::mapped(name, map(path)?, ()))
    }

    /// A mapped file, whose bytes are taken for good. `with` is kept as long as they are.
    pub(crate) fn mapped(name: &str, map: Mmap, with: impl Send + 'static) -> Content {
        let map = Arc::new(map);
        let bytes = Bytes::from_owner(Mapped { map: Arc::clone(&map), _with: with });
        Content { map: Some(map), ..Content::good(name, bytes) }
    }

    /// The same, where nothing has been checked yet: by its tree piece by piece as it is used, or all of it now if it has none.
    pub(crate) fn unchecked(self, digest: Digest, tree: Option<Bytes>) -> Result<Content, DataError> {
        match tree.and_then(|tree| Tree::new(digest, self.bytes.len(), tree)) {
            Some(tree) => Ok(Content { checks: Some(Arc::new(Checks { digest, tree })), ..self }),
            None => self.against(digest),
        }
    }

    fn against(self, expected: Digest) -> Result<Content, DataError> {
        let found = Digest::of(&self.bytes);
        if found == expected { Ok(self) } else { Err(DataError::Digest { file: self.name.to_string(), expected, found }) }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Whether every byte has been checked.
    pub(crate) fn is_checked(&self) -> bool {
        self.checks.as_ref().is_none_or(|checks| checks.tree.is_done(self.bytes.len()))
    }

    /// Checks every byte.
    pub(crate) fn check_all(&self) -> Result<(), DataError> {
        self.check(0..self.bytes.len())
    }

    /// Checks a part, unless that was done before. What is not of the file (Arrow may have copied it) asks for the whole.
    pub(crate) fn check_slice<T>(&self, part: &[T]) -> Result<(), DataError> {
        self.check(self.range(part).unwrap_or(0..self.bytes.len()))
    }

    /// Checks a part, unless that was done before.
    pub(crate) fn check(&self, part: Range<usize>) -> Result<(), DataError> {
        match &self.checks {
            Some(checks) if !checks.tree.check(&self.bytes, &part) => self.doubt(checks),
            _ => Ok(()),
        }
    }

    /// Either the file is damaged, or only its tree is.
    fn doubt(&self, checks: &Checks) -> Result<(), DataError> {
        self.clone().against(checks.digest)?;
        checks.tree.accept();
        Ok(())
    }

    /// Where a slice lies in the file.
    pub(crate) fn range<T>(&self, part: &[T]) -> Option<Range<usize>> {
        let start = part.as_ptr().addr().checked_sub(self.bytes.as_ptr().addr())?;
        let end = start.checked_add(size_of_val(part))?;
        (end <= self.bytes.len()).then_some(start..end)
    }

    /// Has the system begin to read what is about to be used of a mapped file, if that has not been checked yet: perhaps nobody read it ahead.
    pub(crate) fn expect<T>(&self, part: &[T]) {
        let fresh = |part: &Range<usize>| self.checks.as_ref().is_some_and(|checks| !checks.tree.has(part));
        self.range(part).filter(fresh).into_iter().for_each(|part| self.read_ahead(part));
    }

    /// Reads here and there, in parts that the reader says before. Of a mapped file nothing is read around them: the system's guess can be
    /// mebibytes for each, and in the end the whole file.
    pub(crate) fn scattered<T>(&self, read: impl FnOnce() -> T) -> T {
        let advise = |advice| self.map.iter().for_each(|map| drop(map.advise(advice)));
        advise(Advice::Random);
        let read = read();
        advise(Advice::Normal);
        read
    }

    /// Has the system begin to read a part of a mapped file. Best effort: whoever needs the part reads it anyway.
    pub(crate) fn read_ahead(&self, part: Range<usize>) {
        let Some(map) = &self.map else { return };
        // What is read on the way to a check would else be missed, and waited for.
        let part = match &self.checks {
            Some(checks) if !checks.tree.has(&part) => tree::checked_with(&part, self.bytes.len()),
            _ => part,
        };
        // In one request where the device takes it, for each has its cost; else what was left out, piece by piece.
        let _ = map.advise_range(Advice::WillNeed, part.start, part.len());
        for start in part.clone().step_by(READ_AHEAD) {
            let _ = map.advise_range(Advice::WillNeed, start, READ_AHEAD.min(part.end - start));
        }
    }
}

/// The bytes of a map, and what is kept with them.
struct Mapped<T> {
    map: Arc<Mmap>,
    _with: T,
}

impl<T> AsRef<[u8]> for Mapped<T> {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

/// Maps a local file.
pub(crate) fn map(path: &Path) -> Result<Mmap, DataError> {
    let io = |source| DataError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: prepared files are written once under their final name and never changed. Should someone truncate one
    // while it is mapped, the process gets a bus error; there is no way to map a file that excludes this.
    unsafe { Mmap::map(&file) }.map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::outboard;

    fn damaged() -> (Vec<u8>, Digest, Bytes) {
        let mut file: Vec<u8> = (0..400_000).map(|i| (i / 7) as u8).collect();
        let (digest, tree) = (Digest::of(&file), outboard(&file).into());
        file[200_000] ^= 1;
        (file, digest, tree)
    }

    #[test]
    fn a_damaged_byte_is_told_by_who_uses_it() {
        let (file, digest, tree) = damaged();
        let content = Content::good("f", file.clone().into()).unchecked(digest, Some(tree)).unwrap();
        content.check_slice(&content.bytes()[..10]).unwrap();
        assert!(!content.is_checked());
        let error = content.check_slice(&content.bytes()[199_000..201_000]).unwrap_err();
        assert!(matches!(error, DataError::Digest { expected, found, .. } if expected == digest && found == Digest::of(&file)));
        assert!(content.check_slice(&[0; 4]).is_err(), "a copy asks for the whole");
    }

    #[test]
    fn without_a_tree_all_is_checked_at_once() {
        let (mut file, digest, tree) = damaged();
        assert!(Content::good("f", file.clone().into()).unchecked(digest, None).is_err());
        file[200_000] ^= 1;
        for tree in [None, Some(tree.slice(64..))] {
            assert!(Content::good("f", file.clone().into()).unchecked(digest, tree).unwrap().is_checked());
        }
    }

    /// The tree only saves work: a sound file stands, whatever became of its tree.
    #[test]
    fn a_damaged_tree_costs_a_check_of_the_whole() {
        let (mut file, digest, tree) = damaged();
        file[200_000] ^= 1;
        let tree: Vec<u8> = tree.iter().map(|byte| !byte).collect();
        let content = Content::good("f", file.into()).unchecked(digest, Some(tree.into())).unwrap();
        content.check(0..10).unwrap();
        assert!(content.is_checked());
    }
}
