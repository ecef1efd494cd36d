//! WebDataset tars, read as a stream, sample by sample.
//!
//! A sample is a run of neighbouring members with the same key: the member's path up to the first dot of its base name. Members
//! whose base name begins with a dot or with `__`, folders and links belong to no sample. `.txt` is the field `txt`, `.caption` the field
//! `caption`, `.NAME.txt` the field `NAME.txt`; each top-level entry of the object in `.json` is a field, where no text file has that name.

use std::collections::btree_map::Entry;
use std::io::{self, Read};

use ella_store::Hasher;
use futures::TryStreamExt;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::fetch::data_error;
use super::rows::BYTE_ORDER_MARK;
use super::sample::{Field, MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Member, Sample, json_object};
use super::{PieceRead, Source, Within};
use crate::error::DataError;

/// Larger `.json` files are not read into memory.
const MAX_JSON_BYTES: u64 = 16 << 20;
const BLOCK: u64 = 512;

/// Reads a whole tar. Blocks.
pub(super) fn read(source: &Source, each: &mut dyn FnMut(Sample) -> bool) -> Result<Option<PieceRead>, DataError> {
    let bytes = source.store.stream(&source.key).map_err(io::Error::other);
    let read = read_samples(&source.name, &source.within, SyncIoBridge::new(StreamReader::new(bytes)), each)?;
    match &read {
        Some(read) if read.bytes != source.bytes => {
            Err(source.changed(&format!("{} bytes", source.bytes), &format!("{} bytes", read.bytes)))
        }
        _ => Ok(read),
    }
}

/// Reads a tar to its end and hands over each sample in turn; `each` returns false to stop early (then `None`).
/// Never holds more than one sample in memory.
fn read_samples(
    name: &str,
    within: &Within,
    from: impl Read,
    each: &mut dyn FnMut(Sample) -> bool,
) -> Result<Option<PieceRead>, DataError> {
    let mut counted = Counted { inner: from, hash: Hasher::new(), bytes: 0, ended: false, failed: false };
    let mut grouper = Grouper::new(within);
    let corrupt = |offset, what: String| DataError::SourceCorrupt { source_name: name.to_owned(), offset, what };
    // Archives that were joined into one file (`cat a.tar b.tar`) are read one after the other. What was read of the next one already.
    let (mut begun, mut members) = (Vec::new(), 0u64);
    loop {
        let (start, before) = (counted.bytes - begun.len() as u64, members);
        let walked = walk(&mut begun.as_slice().chain(&mut counted), &mut |member| {
            members += 1;
            grouper.add(member, each)
        });
        match walked {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(_) if counted.bytes == 0 && !counted.failed => return Err(corrupt(0, "is empty (expected a tar)".into())),
            Err(error) if start > 0 && members == before && !counted.failed => return Err(behind(name, start, error, &mut counted)),
            Err(error) => return Err(data_error(error, |e| corrupt(counted.bytes, explain(&e, &counted)))),
        }
        if counted.bytes == 0 {
            return Err(corrupt(0, "is empty (expected a tar)".into()));
        }
        // The walk is over at the first block of zeroes, or at the end of the bytes if there is none.
        if counted.ended {
            return Err(corrupt(counted.bytes, "is truncated (expected an end-of-archive block)".into()));
        }
        match next_archive(&mut counted) {
            Ok(Some(block)) => begun = block,
            Ok(None) => break,
            Err(error) => return Err(data_error(error, |e| corrupt(counted.bytes, explain(&e, &counted)))),
        }
    }
    if members == 0 {
        return Err(corrupt(0, "holds no files (expected samples)".into()));
    }
    if !grouper.flush(each) {
        return Ok(None);
    }
    Ok(Some(PieceRead { bytes: counted.bytes, blake3: counted.hash.finish(), ignored: grouper.ignored }))
}

/// The first block that is not of zeroes, behind the end of an archive; none if there are no more.
fn next_archive(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    loop {
        let mut block = Vec::with_capacity(BLOCK as usize);
        from.by_ref().take(BLOCK).read_to_end(&mut block)?;
        match block.iter().any(|&byte| byte != 0) {
            true => return Ok(Some(block)),
            false if (block.len() as u64) < BLOCK => return Ok(None),
            false => {}
        }
    }
}

/// Bytes behind the end of an archive that begin no other.
fn behind(name: &str, start: u64, error: io::Error, counted: &mut Counted<impl Read>) -> DataError {
    let rest = io::copy(counted, &mut io::sink());
    let corrupt = |what: String| DataError::SourceCorrupt { source_name: name.to_owned(), offset: start, what };
    match rest {
        Ok(_) => {
            let bytes = counted.bytes - start;
            corrupt(format!("{bytes} bytes lie behind the archive's end and are no tar ({error}); cut them off: truncate -s {start}"))
        }
        Err(error) => data_error(error, |e| corrupt(explain(&e, counted))),
    }
}

fn explain<R>(error: &io::Error, counted: &Counted<R>) -> String {
    match error.kind() {
        _ if counted.failed => format!("cannot be read ({error})"),
        kind if kind == io::ErrorKind::UnexpectedEof || counted.ended && counted.bytes > BLOCK => {
            "is truncated (expected more bytes of a member)".into()
        }
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
            b"jpg" | b"jpeg" | b"png" | b"webp" | b"gif" => Kind::Image,
            b"json" => Kind::Json,
            b"txt" | b"caption" => Kind::Text,
            extension if extension.ends_with(b".txt") => Kind::Text,
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
fn walk(from: &mut impl Read, each: &mut dyn FnMut(TarMember) -> bool) -> io::Result<bool> {
    let mut archive = tar::Archive::new(from);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let size = entry.size();
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

fn text_of(data: &Member) -> Field {
    match data {
        Member::Data(bytes) => Field::text(bytes),
        Member::Absent | Member::TooLarge => Field::TooLong,
    }
}

/// Collects members into samples.
struct Grouper<'a> {
    within: &'a Within,
    key: Option<Vec<u8>>,
    extensions: Vec<Vec<u8>>,
    sample: Sample,
    ignored: u64,
}

impl<'a> Grouper<'a> {
    fn new(within: &'a Within) -> Grouper<'a> {
        Grouper { within, key: None, extensions: Vec::new(), sample: Sample::default(), ignored: 0 }
    }

    fn add(&mut self, member: TarMember, each: &mut dyn FnMut(Sample) -> bool) -> bool {
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
            self.sample = Sample::of_key(key);
            self.key = Some(key.to_vec());
        }
        self.extensions.push(extension.to_vec());
        match (member.kind, member.data) {
            (Kind::Image, data) if self.sample.image == Member::Absent => self.sample.image = data,
            (Kind::Text, data) => {
                let name = String::from_utf8_lossy(extension).to_ascii_lowercase();
                self.sample.fields.insert(name, text_of(&data));
            }
            (Kind::Json, data) => self.add_json(&data),
            (Kind::Image | Kind::Other, _) => self.ignored += 1,
        }
        true
    }

    fn add_json(&mut self, data: &Member) {
        let Member::Data(bytes) = data else {
            self.sample.fields.insert("json".into(), Field::TooLong);
            return;
        };
        let Some(object) = json_object(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)) else {
            let field = if std::str::from_utf8(bytes).is_ok() { Field::Other } else { Field::NotUtf8 };
            self.sample.fields.insert("json".into(), field);
            return;
        };
        for (name, field) in self.within.fields(object) {
            if let Entry::Vacant(entry) = self.sample.fields.entry(name) {
                entry.insert(field);
            }
        }
    }

    fn flush(&mut self, each: &mut dyn FnMut(Sample) -> bool) -> bool {
        self.extensions.clear();
        self.key.take().is_none() || each(std::mem::take(&mut self.sample))
    }
}

/// Counts and digests what is read.
struct Counted<R> {
    inner: R,
    hash: Hasher,
    bytes: u64,
    /// There are no more bytes.
    ended: bool,
    /// Reading itself failed, whatever the bytes mean.
    failed: bool,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf).inspect_err(|_| self.failed = true)?;
        self.hash.update(&buf[..n]);
        self.bytes += n as u64;
        self.ended |= n == 0 && !buf.is_empty();
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
        let error = read_samples("s3://b/x.tar", &Within::default(), Failing, &mut |_| true).unwrap_err().to_string();
        assert!(error.contains("s3://b/x.tar: cannot be read (connection reset)"), "{error}");
    }

    /// A member of GNU tar's sparse kind is longer unpacked than it lies in the archive.
    #[test]
    fn a_tar_that_ends_with_a_sparse_member_is_whole_or_truncated_as_any() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        builder.append_data(&mut header, "a.txt", &b"x"[..]).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_path("b.txt").unwrap();
        header.set_entry_type(tar::EntryType::GNUSparse);
        header.set_size(512);
        let gnu = header.as_gnu_mut().unwrap();
        // 64 GiB of nothing, then a block.
        gnu.sparse[0].offset = *b"777777770000";
        gnu.sparse[0].numbytes = *b"000000001000";
        gnu.realsize = *b"777777771000";
        header.set_cksum();
        builder.append(&header, &[b'y'; 512][..]).unwrap();
        let tar = builder.into_inner().unwrap();
        let keys = |tar: &[u8]| {
            let mut keys = Vec::new();
            let read = read_samples("x.tar", &Within::default(), tar, &mut |sample| {
                keys.push(sample.key);
                true
            });
            read.map(|read| (keys.join(" "), read.unwrap().bytes))
        };
        assert_eq!(keys(&tar).unwrap(), ("a b".to_owned(), tar.len() as u64));
        assert_eq!(keys(&tar[..tar.len() - 512]).unwrap().0, "a b", "one block of zeroes is enough");
        let error = keys(&tar[..tar.len() - 1024]).unwrap_err().to_string();
        assert!(error.contains("is truncated (expected an end-of-archive block)"), "{error}");
    }

    #[test]
    fn a_tar_that_is_cut_anywhere_is_said_to_be_truncated() {
        let whole = tar_of_texts(&["a.txt", "b.json", "c.cls"]);
        for cut in BLOCK as usize + 1..=whole.len() - 2 * BLOCK as usize {
            let error = read_samples("x.tar", &Within::default(), &whole[..cut], &mut |_| true).unwrap_err().to_string();
            assert!(error.contains("x.tar: is truncated"), "{cut}: {error}");
        }
    }

    fn tar_of_texts(names: &[&str]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_size(1);
            builder.append_data(&mut header, name, &b"x"[..]).unwrap();
        }
        builder.into_inner().unwrap()
    }

    /// `cat a.tar b.tar`, with as many blocks of zeroes between as tar pads with.
    #[test]
    fn archives_that_were_joined_are_read_to_the_last() {
        let keys = |tar: &[u8]| {
            let mut keys = Vec::new();
            let read = read_samples("x.tar", &Within::default(), tar, &mut |sample| {
                keys.push(sample.key);
                true
            });
            read.map(|read| (keys.join(" "), read.unwrap().bytes)).map_err(|error| error.to_string())
        };
        let (first, second) = (tar_of_texts(&["a.txt", "b.txt"]), tar_of_texts(&["c.txt"]));
        let joined = [&first[..], &[0; 7168], &second].concat();
        assert_eq!(keys(&joined).unwrap(), ("a b c".to_owned(), joined.len() as u64));
        let error = keys(&joined[..joined.len() - 1024]).unwrap_err();
        assert!(error.contains("is truncated (expected an end-of-archive block)"), "{error}");
        let error = keys(&[&first[..], &[7; 700]].concat()).unwrap_err();
        let place = format!("truncate -s {} ", first.len());
        assert!(error.contains("700 bytes lie behind the archive's end") && error.contains(place.trim_end()), "{error}");
        assert_eq!(keys(&[&first[..], &[0; 100]].concat()).unwrap().0, "a b", "zeroes, though no whole block");
        assert!(keys(&[0; 1024]).unwrap_err().contains("holds no files"));
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
        let read = read_samples("x.tar", &Within::default(), tar.as_slice(), &mut |sample| {
            keys.push(sample.key);
            keys.len() < 2
        });
        assert_eq!((read.unwrap(), keys.join(" ")), (None, "a b".to_owned()));
    }
}
