//! Pages in memory; large ones in temporary files.

use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};

/// Larger pages go to a file.
const IN_MEMORY_BYTES: u64 = 32 << 20;

/// The temporary files that are mapped.
#[derive(Clone, Debug, Default)]
pub(super) struct Resident(Arc<Mutex<Vec<Weak<Mmap>>>>);

struct Spilled(Arc<Mmap>);

impl AsRef<[u8]> for Spilled {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Resident {
    /// All bytes of a page, which must be this many.
    pub(super) fn collect(&self, from: &mut dyn Read, bytes: u64) -> io::Result<Bytes> {
        let mut from = from.take(bytes + 1);
        let (page, found) = if bytes <= IN_MEMORY_BYTES {
            let mut page = Vec::with_capacity(bytes as usize);
            from.read_to_end(&mut page)?;
            let found = page.len() as u64;
            (Bytes::from(page), found)
        } else {
            let mut file = tempfile::tempfile()?;
            // In small steps: what was written at once would be mapped at once, however little of it is looked at.
            let found = io::copy(&mut from, &mut file)?;
            (self.map(&file)?, found)
        };
        if found == bytes { Ok(page) } else { Err(io::Error::other(format!("a page of {bytes} bytes has {found}"))) }
    }

    fn map(&self, file: &File) -> io::Result<Bytes> {
        // SAFETY: the file has no name and this is its only handle: nobody else can change or truncate it.
        let map = Arc::new(unsafe { Mmap::map(file) }?);
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.retain(|map| map.strong_count() > 0);
        maps.push(Arc::downgrade(&map));
        Ok(Bytes::from_owner(Spilled(map)))
    }

    /// Lets go of the memory that looking at mapped files has taken; they are read anew where they are looked at again.
    pub(super) fn release(&self) {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for map in maps.iter().filter_map(Weak::upgrade) {
            // SAFETY: the map is shared with a file and never written through, so dropped pages are read from the file again.
            // That it could fail costs memory only.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_page_lies_in_a_file_and_reads_the_same_after_release() {
        let resident = Resident::default();
        for bytes in [0, 5, IN_MEMORY_BYTES, IN_MEMORY_BYTES + 12_345] {
            let pattern: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
            let page = resident.collect(&mut pattern.as_slice(), bytes).unwrap();
            resident.release();
            assert!(page == pattern, "{bytes}");
        }
        assert_eq!(resident.0.lock().unwrap().len(), 1, "only large pages are mapped");
    }

    #[test]
    fn a_page_of_another_length_is_an_error() {
        for bytes in [10, IN_MEMORY_BYTES + 1] {
            for found in [bytes - 1, bytes + 1] {
                let error = Resident::default().collect(&mut io::repeat(7).take(found), bytes).unwrap_err().to_string();
                assert!(error.contains(&format!("a page of {bytes} bytes")), "{error}");
            }
        }
    }
}
