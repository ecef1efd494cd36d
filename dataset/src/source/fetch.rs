//! Bytes from stores, fetched ahead on the runtime and handed over in order to a thread that blocks.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io::{self, Read};
use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};
use ella_store::{Store, StoreError};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::Source;
use super::sample::{MAX_IMAGE_BYTES, Member, Sample, Tally};
use crate::error::{DataError, is_link_loop};
use crate::report::Refusal;

/// Pictures fetched at once.
const PICTURES_AHEAD: usize = 16;
/// Samples that wait for a picture before them.
const SAMPLES_AHEAD: usize = 64;
/// Of a picture that is not yet wanted, this much is fetched: sixteen large ones must not fill the memory.
const PICTURE_AHEAD_BYTES: usize = 8 << 20;

/// Tasks in flight, in order. Dropping it ends them.
struct Ahead<T> {
    runtime: Handle,
    tasks: VecDeque<JoinHandle<T>>,
}

impl<T: Send + 'static> Ahead<T> {
    fn new() -> Ahead<T> {
        Ahead { runtime: Handle::current(), tasks: VecDeque::new() }
    }

    fn push(&mut self, task: impl Future<Output = T> + Send + 'static) {
        self.tasks.push_back(self.runtime.spawn(task));
    }

    /// What the oldest task came to. The store's deadlines bound the wait. None: it panicked, or the runtime ends.
    fn pop(&mut self) -> Option<T> {
        self.runtime.block_on(self.tasks.pop_front()?).ok()
    }
}

impl<T> Drop for Ahead<T> {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// How much of a range is fetched at once, and how many such windows ahead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    pub(super) bytes: u64,
    pub(super) ahead: usize,
}

/// A blocking reader over a range of an object. Its errors hold the store's ([`data_error`]).
pub(super) struct RangeReader {
    store: Store,
    key: String,
    /// What was not asked for yet.
    left: Range<u64>,
    windows: Windows,
    ahead: Ahead<Result<Bytes, StoreError>>,
    window: Bytes,
}

impl RangeReader {
    /// Begins to fetch. Must be called in a tokio runtime.
    pub(super) fn new(source: &Source, range: Range<u64>, windows: Windows) -> RangeReader {
        let (store, key) = (source.store.clone(), source.key.clone());
        let mut reader = RangeReader { store, key, left: range, windows, ahead: Ahead::new(), window: Bytes::new() };
        reader.fill();
        reader
    }

    fn fill(&mut self) {
        while self.ahead.tasks.len() < self.windows.ahead && !self.left.is_empty() {
            let range = self.left.start..self.left.end.min(self.left.start + self.windows.bytes);
            self.left.start = range.end;
            let (store, key) = (self.store.clone(), self.key.clone());
            self.ahead.push(async move { store.get_range(&key, range).await });
        }
    }
}

impl Read for RangeReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.window.is_empty() && !self.ahead.tasks.is_empty() {
            let window = self.ahead.pop().ok_or_else(|| io::Error::other("the runtime was stopped"))?;
            self.window = window.map_err(io::Error::other)?;
            self.fill();
        }
        let n = buf.len().min(self.window.len());
        self.window.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

/// An error of reading as ours: the store's own if it failed, else that the source is corrupt.
pub(super) fn data_error(error: io::Error, corrupt: impl FnOnce(io::Error) -> DataError) -> DataError {
    if error.get_ref().is_none_or(|inner| !inner.is::<StoreError>()) {
        return corrupt(error);
    }
    match error.into_inner().map(|inner| inner.downcast::<StoreError>()) {
        Some(Ok(store)) => DataError::Store(*store),
        Some(Err(other)) => corrupt(io::Error::other(other)),
        None => corrupt(io::ErrorKind::Other.into()),
    }
}

/// Fetches the pictures that rows name, several at once, and hands the samples over in the order of the rows.
pub(super) struct Pictures<'a> {
    source: &'a Source,
    /// Stores of other hosts and buckets, by the part of the URL that names them.
    stores: HashMap<String, Store>,
    samples: VecDeque<(Sample, bool)>,
    ahead: Ahead<Result<Fetched, StoreError>>,
    pub(super) tally: Tally,
}

impl<'a> Pictures<'a> {
    /// Of rows whose paths are relative to the source's folder. Must be called in a tokio runtime.
    pub(super) fn new(source: &'a Source) -> Pictures<'a> {
        Pictures { source, stores: HashMap::new(), samples: VecDeque::new(), ahead: Ahead::new(), tally: Tally::default() }
    }

    /// Takes the next sample and where its picture is, if it is elsewhere. False if `each` has had enough.
    pub(super) fn push(
        &mut self,
        mut sample: Sample,
        path: Option<&[u8]>,
        each: &mut dyn FnMut(Sample) -> bool,
    ) -> Result<bool, DataError> {
        let locate = |path: &[u8]| std::str::from_utf8(path).map_or(Ok(None), |path| self.locate(path));
        let place = path.filter(|path| !path.is_empty()).map(locate).transpose()?;
        let fetching = matches!(place, Some(Some(_)));
        match place {
            Some(Some((store, key))) => {
                sample.place = Some(format!("{}/{key}", store.url().trim_end_matches('/')));
                self.ahead.push(fetch(store, key));
            }
            Some(None) => sample.refused = Some(Refusal::RowInvalid),
            None => {}
        }
        self.samples.push_back((sample, fetching));
        let full = |this: &Self| this.ahead.tasks.len() >= PICTURES_AHEAD || this.samples.len() >= SAMPLES_AHEAD;
        while full(self) || self.samples.front().is_some_and(|(_, fetching)| !fetching) {
            if !self.pop(each)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hands over all that is still on its way. False if `each` has had enough.
    pub(super) fn flush(&mut self, each: &mut dyn FnMut(Sample) -> bool) -> Result<bool, DataError> {
        while !self.samples.is_empty() {
            if !self.pop(each)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn pop(&mut self, each: &mut dyn FnMut(Sample) -> bool) -> Result<bool, DataError> {
        let Some((mut sample, fetching)) = self.samples.pop_front() else { return Ok(true) };
        if fetching {
            let stopped = || DataError::Stopped { source_name: self.source.name.clone(), what: "the runtime was stopped".into() };
            let fetched = self.ahead.pop().ok_or_else(stopped)?;
            match fetched.and_then(|fetched| self.ahead.runtime.block_on(fetched.finish())) {
                Ok(image) => sample.image = image,
                Err(StoreError::BadKey { .. }) => sample.refused = Some(Refusal::RowInvalid),
                Err(error) if is_absent(&error) || is_web(&sample) && is_withheld(&error) => {}
                Err(error) => {
                    let (source_name, key) = (self.source.name.clone(), sample.key);
                    return Err(DataError::Picture { source_name, key, source: Box::new(error) });
                }
            }
        }
        self.tally.add(&sample);
        Ok(each(sample))
    }

    /// The store and key of a picture. None: no store can be asked for such a path, or it is no address at all.
    fn locate(&mut self, path: &str) -> Result<Option<(Store, String)>, DataError> {
        if !path.contains("://") && !path.starts_with('/') && !path.split('/').any(|part| part == "..") {
            return Ok(Some((self.source.store.clone(), normal(path))));
        }
        let Some((root, key)) = split_root(self.source.store.url(), path) else { return Ok(None) };
        let store = match self.stores.get(root) {
            Some(store) => store.clone(),
            None => {
                let store = match Store::open(root) {
                    // All that a web server's address needs is in it.
                    Err(StoreError::BadUrl { .. }) if root.starts_with("http") => return Ok(None),
                    opened => opened?,
                };
                self.stores.insert(root.to_owned(), store.clone());
                store
            }
        };
        Ok(Some((store, key)))
    }
}

/// A path's host or bucket (`/` for the file system), and the key in it; relative ones are meant from `folder`.
fn split_root<'a>(folder: &'a str, path: &'a str) -> Option<(&'a str, String)> {
    let Some((scheme, _)) = path.split_once("://") else {
        let (root, base) = root_of(folder);
        return match path.starts_with('/') {
            true if root == "/" => Some(("/", normal(path))),
            true => None,
            false if root.starts_with("memory:") => None,
            false => Some((root, normal(&format!("{base}/{path}")))),
        };
    };
    let (root, below) = root_of(path);
    match scheme {
        "s3" | "gs" | "az" if is_bucket(&root[scheme.len() + 3..]) => Some((root, normal(below))),
        // A query names no object of a store.
        "http" | "https" if root.len() > scheme.len() + 3 && !path.contains(['?', '#']) => Some((root, normal(&decoded(below)))),
        "file" if root == "file://" => Some(("/", normal(&decoded(below)))),
        _ => None,
    }
}

/// Whether a bucket or container may have this name, by its characters.
fn is_bucket(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._$".contains(&byte))
}

fn root_of(url: &str) -> (&str, &str) {
    match url.find("://") {
        Some(scheme) => url.split_at(url[scheme + 3..].find('/').map_or(url.len(), |slash| scheme + 3 + slash)),
        None => ("/", url),
    }
}

fn decoded(path: &str) -> String {
    percent_encoding::percent_decode_str(path).decode_utf8_lossy().into_owned()
}

/// A path without `.`, `..` and double slashes; it never leads above its root.
fn normal(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Whether a picture lies on a web server.
fn is_web(sample: &Sample) -> bool {
    sample.place.as_ref().is_some_and(|place| place.starts_with("http"))
}

/// Whether a web server has a picture for others, or for nobody: of many servers some say so for ever (401, 403, 410, 451, redirects in a circle),
/// and in other ways. What may pass is no such thing.
fn is_withheld(error: &StoreError) -> bool {
    matches!(error, StoreError::Permission { .. } | StoreError::Other { .. })
}

/// Whether a store says that there is no such file, whatever its words: a path through a file, in a circle of links, longer than names can be,
/// or to what is no file.
fn is_absent(error: &StoreError) -> bool {
    use io::ErrorKind::{InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound};
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            let absent = [InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound].contains(&error.kind());
            if absent || is_link_loop(error) {
                return true;
            }
        }
        cause = error.source();
    }
    matches!(error, StoreError::NotFound { .. })
}

/// A picture whose first bytes are there, and the rest if it is large.
struct Fetched {
    bytes: BytesMut,
    rest: Option<BoxStream<'static, Result<Bytes, StoreError>>>,
}

async fn fetch(store: Store, key: String) -> Result<Fetched, StoreError> {
    let mut fetched = Fetched { bytes: BytesMut::new(), rest: Some(store.stream(&key)) };
    fetched.read_to(PICTURE_AHEAD_BYTES).await?;
    Ok(fetched)
}

impl Fetched {
    /// Reads until it has this many bytes, or all.
    async fn read_to(&mut self, bytes: usize) -> Result<(), StoreError> {
        while let Some(rest) = self.rest.as_mut().filter(|_| self.bytes.len() < bytes) {
            match rest.next().await {
                Some(chunk) => self.bytes.extend_from_slice(&chunk?),
                None => self.rest = None,
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Member, StoreError> {
        self.read_to(MAX_IMAGE_BYTES as usize + 1).await?;
        Ok(if self.bytes.len() as u64 > MAX_IMAGE_BYTES { Member::TooLarge } else { Member::Data(self.bytes.freeze()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_to_their_store_and_key() {
        for (folder, path, expected) in [
            ("/data/set", "../a.jpg", Some(("/", "data/a.jpg"))),
            ("/data/set", "/pictures/./a.jpg", Some(("/", "pictures/a.jpg"))),
            ("/data", "../../../a.jpg", Some(("/", "a.jpg"))),
            ("/data", "s3://bucket/x//y.jpg", Some(("s3://bucket", "x/y.jpg"))),
            ("/data", "file:///x/y.jpg", Some(("/", "x/y.jpg"))),
            ("/data", "https://host/a%20b.jpg", Some(("https://host", "a b.jpg"))),
            ("/data", "s3://bucket/a%20b.jpg", Some(("s3://bucket", "a%20b.jpg"))),
            ("/data", "s3:///a.jpg", None),
            ("/data", "ftp://host/a.jpg", None),
            ("/data", "https://host/a?file=1.jpg", None),
            ("s3://bucket/set", "../a.jpg", Some(("s3://bucket", "a.jpg"))),
            ("s3://bucket", "../a.jpg", Some(("s3://bucket", "a.jpg"))),
            ("/data", "s3://Bad Bucket/a.jpg", None),
            ("/data", "s3://key:secret@bucket/a.jpg", None),
            ("s3://bucket/set", "/a.jpg", None),
        ] {
            let found = split_root(folder, path);
            assert_eq!(found, expected.map(|(root, key)| (root, key.to_owned())), "{folder} {path}");
        }
    }
}
