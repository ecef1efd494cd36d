//! Sources: WebDataset tars by path or URL, read as a stream, sample by sample.
//!
//! A sample is a run of neighbouring members with the same key: the member's path up to the first dot of its base name. Members
//! whose base name begins with a dot or with `__`, folders and links belong to no sample.

use std::io::{self, Read};

use bytes::Bytes;
use ella_store::{Digest, Hasher, Store};
use futures::TryStreamExt;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::error::DataError;

/// Larger pictures are not read into memory.
const MAX_IMAGE_BYTES: u64 = 256 << 20;
/// Larger caption files are not read into memory.
const MAX_TEXT_BYTES: u64 = 1 << 20;
/// Larger `.json` files are not read into memory.
const MAX_JSON_BYTES: u64 = 16 << 20;
const BLOCK: u64 = 512;

/// One source tar in an object store.
#[derive(Clone, Debug)]
pub struct Source {
    store: Store,
    key: String,
    name: String,
    bytes: u64,
}

impl Source {
    /// The sources that a path or URL names: itself if it ends in `.tar`, else every `*.tar` directly in that folder, by name.
    pub async fn find(location: &str) -> Result<Vec<Source>, DataError> {
        let missing = || DataError::SourceMissing { source_name: location.to_owned() };
        let local_folder = std::path::Path::new(location).is_dir();
        if location.ends_with(".tar") && !local_folder {
            let (folder, key) = match location.rsplit_once('/') {
                Some(("", key)) => ("/", key),
                Some((folder, key)) => (folder, key),
                None => (".", location),
            };
            if !folder.contains("://") && !std::path::Path::new(folder).is_dir() {
                return Err(missing());
            }
            let store = Store::open(folder)?;
            let meta = store.head(key).await?.ok_or_else(missing)?;
            return Ok(vec![Source { store, key: key.to_owned(), name: location.to_owned(), bytes: meta.bytes }]);
        }
        if !location.contains("://") && !local_folder {
            return Err(missing());
        }
        let store = Store::open(location)?;
        let mut found: Vec<_> = store
            .list("")
            .await?
            .into_iter()
            .filter(|meta| meta.key.ends_with(".tar") && !meta.key.contains('/'))
            .map(|meta| Source {
                store: store.clone(),
                name: format!("{}/{}", location.trim_end_matches('/'), meta.key),
                key: meta.key,
                bytes: meta.bytes,
            })
            .collect();
        found.sort_by(|a, b| a.key.cmp(&b.key));
        if found.is_empty() { Err(missing()) } else { Ok(found) }
    }

    /// The source as messages name it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file's name without its folder.
    pub fn file_name(&self) -> &str {
        &self.key
    }

    /// Size in bytes when it was found.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A blocking reader over the tar's bytes. Must be called in a tokio runtime; must be read outside its async tasks.
    pub fn reader(&self) -> impl Read + Send + use<> {
        SyncIoBridge::new(StreamReader::new(self.store.stream(&self.key).map_err(io::Error::other)))
    }
}

/// A file of a sample.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Member {
    /// There is none.
    #[default]
    Absent,
    /// Its bytes.
    Data(Bytes),
    /// It has more bytes than are read.
    TooLarge,
}

/// The files of one key that prepare looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Path in the tar up to the first dot of the base name; invalid UTF-8 is replaced.
    pub key: String,
    /// Whether the key was valid UTF-8.
    pub key_is_utf8: bool,
    /// The first jpg, jpeg, png or webp.
    pub image: Member,
    /// `.txt`
    pub text: Member,
    /// `.json`
    pub json: Member,
}

/// What reading a whole tar showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarRead {
    /// Bytes of the file.
    pub bytes: u64,
    /// BLAKE3 of the file.
    pub blake3: Digest,
    /// Members that no sample used: folders, links, hidden files, other kinds of file.
    pub ignored: u64,
}

/// Reads a tar to its end and hands over each sample in turn; `each` returns false to stop early (then `None`).
/// Never holds more than one sample in memory.
pub fn read_samples(name: &str, from: impl Read, mut each: impl FnMut(Sample) -> bool) -> Result<Option<TarRead>, DataError> {
    let mut counted = Counted { inner: from, hash: Hasher::new(), bytes: 0, failed: false };
    let mut grouper = Grouper::default();
    // Where the last member ends, rounded up to whole blocks: the end marker must follow.
    let mut end = 0;
    let walked = walk(&mut counted, &mut end, &mut |member| grouper.add(member, &mut each));
    let corrupt = |offset, what: String| DataError::SourceCorrupt { source_name: name.to_owned(), offset, what };
    match walked {
        Ok(true) => {}
        Ok(false) => return Ok(None),
        Err(_) if counted.bytes == 0 && !counted.failed => return Err(corrupt(0, "is empty (expected a tar)".into())),
        Err(error) => return Err(corrupt(counted.bytes, explain(&error, &counted))),
    }
    if counted.bytes == 0 {
        return Err(corrupt(0, "is empty (expected a tar)".into()));
    }
    if counted.bytes < end + BLOCK {
        return Err(corrupt(counted.bytes, "is truncated (expected an end-of-archive block)".into()));
    }
    if end == 0 {
        return Err(corrupt(0, "holds no files (expected samples)".into()));
    }
    io::copy(&mut counted, &mut io::sink()).map_err(|e| corrupt(counted.bytes, format!("cannot be read: {e}")))?;
    if !grouper.flush(&mut each) {
        return Ok(None);
    }
    Ok(Some(TarRead { bytes: counted.bytes, blake3: counted.hash.finish(), ignored: grouper.ignored }))
}

fn explain<R>(error: &io::Error, counted: &Counted<R>) -> String {
    match error.kind() {
        _ if counted.failed => format!("cannot be read ({error})"),
        io::ErrorKind::UnexpectedEof => "is truncated (expected more bytes of a member)".into(),
        _ if counted.bytes <= BLOCK => format!("is not a plain tar ({error}; compressed tars must be unpacked first)"),
        _ => format!("is corrupt ({error})"),
    }
}

struct TarMember {
    path: Vec<u8>,
    kind: Kind,
    data: Member,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Image,
    Text,
    Json,
    Other,
}

impl Kind {
    fn of(extension: &[u8]) -> Kind {
        match extension.to_ascii_lowercase().as_slice() {
            b"jpg" | b"jpeg" | b"png" | b"webp" => Kind::Image,
            b"txt" => Kind::Text,
            b"json" => Kind::Json,
            _ => Kind::Other,
        }
    }

    fn limit(self) -> u64 {
        match self {
            Kind::Image => MAX_IMAGE_BYTES,
            Kind::Text => MAX_TEXT_BYTES,
            Kind::Json => MAX_JSON_BYTES,
            Kind::Other => 0,
        }
    }
}

/// Walks a tar's members; false if `each` stopped it.
fn walk(from: &mut impl Read, end: &mut u64, each: &mut dyn FnMut(TarMember) -> bool) -> io::Result<bool> {
    let mut archive = tar::Archive::new(from);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let size = entry.size();
        *end = entry.raw_file_position() + size.div_ceil(BLOCK) * BLOCK;
        let path = entry.path_bytes().into_owned();
        let kind = if entry.header().entry_type().is_file() {
            split(&path).map_or(Kind::Other, |(_, extension)| Kind::of(extension))
        } else {
            Kind::Other
        };
        let data = if kind == Kind::Other {
            Member::Absent
        } else if size > kind.limit() {
            Member::TooLarge
        } else {
            let mut data = Vec::with_capacity(size as usize);
            entry.read_to_end(&mut data)?;
            if data.len() as u64 != size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Member::Data(data.into())
        };
        if !each(TarMember { path, kind, data }) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Key and extension of a member, if it can belong to a sample.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let base = path.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
    let dot = base + path[base..].iter().position(|&b| b == b'.')?;
    let hidden = dot == base || path[base..].starts_with(b"__");
    (!hidden).then(|| (path[..dot].strip_prefix(b"./").unwrap_or(&path[..dot]), &path[dot + 1..]))
}

/// Collects members into samples.
#[derive(Default)]
struct Grouper {
    key: Option<Vec<u8>>,
    extensions: Vec<Vec<u8>>,
    sample: Sample,
    ignored: u64,
}

impl Grouper {
    fn add(&mut self, member: TarMember, each: &mut impl FnMut(Sample) -> bool) -> bool {
        let Some((key, extension)) = split(&member.path).filter(|_| !member.path.ends_with(b"/")) else {
            self.ignored += 1;
            return true;
        };
        // The same file twice under one key begins a second sample of that key, which is then a duplicate.
        let same = self.key.as_deref() == Some(key) && !self.extensions.iter().any(|e| e == extension);
        if !same {
            if !self.flush(each) {
                return false;
            }
            self.sample = Sample {
                key: String::from_utf8_lossy(key).into_owned(),
                key_is_utf8: std::str::from_utf8(key).is_ok(),
                ..Sample::default()
            };
            self.key = Some(key.to_vec());
        }
        self.extensions.push(extension.to_vec());
        let slot = match member.kind {
            Kind::Image if self.sample.image == Member::Absent => &mut self.sample.image,
            Kind::Text => &mut self.sample.text,
            Kind::Json => &mut self.sample.json,
            _ => {
                self.ignored += 1;
                return true;
            }
        };
        *slot = member.data;
        true
    }

    fn flush(&mut self, each: &mut impl FnMut(Sample) -> bool) -> bool {
        self.extensions.clear();
        self.key.take().is_none() || each(std::mem::take(&mut self.sample))
    }
}

/// Counts and digests what is read.
struct Counted<R> {
    inner: R,
    hash: Hasher,
    bytes: u64,
    /// Reading itself failed, whatever the bytes mean.
    failed: bool,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf).inspect_err(|_| self.failed = true)?;
        self.hash.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_end_at_the_first_dot_of_the_base_name() {
        let cases: [(&str, Option<(&str, &str)>); 9] = [
            ("a.jpg", Some(("a", "jpg"))),
            ("a.seg.png", Some(("a", "seg.png"))),
            ("x.y/a.jpg", Some(("x.y/a", "jpg"))),
            ("./a.txt", Some(("a", "txt"))),
            ("a", None),
            ("x.y/a", None),
            (".a.jpg", None),
            ("x/._a.jpg", None),
            ("x/__key__.json", None),
        ];
        for (path, expected) in cases {
            let expected = expected.map(|(key, extension)| (key.as_bytes(), extension.as_bytes()));
            assert_eq!(split(path.as_bytes()), expected, "{path}");
        }
    }

    #[test]
    fn a_failing_connection_is_not_taken_for_a_corrupt_tar() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("connection reset"))
            }
        }
        let error = read_samples("s3://b/x.tar", Failing, |_| true).unwrap_err().to_string();
        assert!(error.contains("s3://b/x.tar: cannot be read (connection reset)"), "{error}");
    }

    #[test]
    fn reading_stops_when_nobody_wants_more() {
        let mut builder = tar::Builder::new(Vec::new());
        for name in ["a.txt", "b.txt", "c.txt"] {
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            builder.append_data(&mut header, name, &b"x"[..]).unwrap();
        }
        let tar = builder.into_inner().unwrap();
        let mut keys = Vec::new();
        let read = read_samples("x.tar", tar.as_slice(), |sample| {
            keys.push(sample.key);
            keys.len() < 2
        });
        assert_eq!((read.unwrap(), keys.join(" ")), (None, "a b".to_owned()));
    }
}
