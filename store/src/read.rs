//! Reading: one resumable reader behind whole objects, ranges and streams.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use bytes::Bytes;
use futures::TryStreamExt;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, GetResultPayload};
use tokio::time::timeout;

use crate::digest::Digest;
use crate::error::{Operation, Place, StoreError};
use crate::limits::Retries;
use crate::store::{Store, stamp};
use crate::tally;

/// Local files are streamed in chunks of this many bytes.
const CHUNK_BYTES: u64 = 1 << 20;
/// Room is made for so many bytes before they come. An object's size is only its server's word.
const FIRST_ROOM: usize = 16 << 20;
/// No record is larger.
const MOST_RECORD: u64 = 1 << 30;

impl Store {
    /// Reads a whole object.
    ///
    /// # Errors
    /// Any of [`StoreError`].
    pub async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        Reader::new(self, key, None)?.collect().await
    }

    /// Reads a whole object that has `bytes` bytes. Of another nothing is read.
    ///
    /// # Errors
    /// `Corrupt` if it has another size; else any of [`StoreError`].
    pub async fn get_sized(&self, key: &str, bytes: u64) -> Result<Bytes, StoreError> {
        Reader::new(self, key, None)?.of(Size::Exactly(bytes)).collect().await
    }

    /// Reads a record (a manifest, a report, one of the log), of which no sound one is larger than 1 GiB. Of a larger one nothing is read.
    ///
    /// # Errors
    /// `Corrupt` if it is larger; else any of [`StoreError`].
    pub async fn get_record(&self, key: &str) -> Result<Bytes, StoreError> {
        Reader::new(self, key, None)?.of(Size::AtMost(MOST_RECORD)).collect().await
    }

    /// Reads the bytes `range` of an object. From a web server that serves no ranges, all bytes before them are read too.
    ///
    /// # Errors
    /// `Corrupt` if the object is shorter than the range's end; else any of [`StoreError`].
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let error = match Reader::new(self, key, Some(range.clone()))?.collect().await {
            Ok(bytes) if bytes.len() as u64 == range.end - range.start => return Ok(bytes),
            Ok(_) => None,
            Err(error @ StoreError::Other { .. }) => Some(error),
            Err(error) => return Err(error),
        };
        let found = self.head(key).await?.map_or(0, |meta| meta.bytes);
        Err(match error {
            Some(error) if found >= range.end => error,
            _ => self.place(Operation::Get, key).corrupt(format!("at least {} bytes", range.end), format!("{found} bytes")),
        })
    }

    /// Reads a whole object chunk by chunk. A broken connection is resumed where it broke; the first error ends the stream.
    pub fn stream(&self, key: &str) -> BoxStream<'static, Result<Bytes, StoreError>> {
        chunks(Reader::new(self, key, None))
    }

    /// The same of an object that has `bytes` bytes: of another nothing is read.
    pub(crate) fn stream_sized(&self, key: &str, bytes: u64) -> BoxStream<'static, Result<Bytes, StoreError>> {
        chunks(Reader::new(self, key, None).map(|reader| reader.of(Size::Exactly(bytes))))
    }

    /// Reads a whole object and checks that it has `bytes` bytes and the digest recorded.
    ///
    /// # Errors
    /// `Corrupt` if it is another; else any of [`StoreError`].
    pub async fn get_verified(&self, key: &str, digest: &Digest, bytes: u64) -> Result<Bytes, StoreError> {
        let found = self.get_sized(key, bytes).await?;
        check(self, key, (digest, bytes), (&Digest::of(&found), found.len() as u64))?;
        Ok(found)
    }
}

/// Compares an object's digest and size with what was recorded.
pub(crate) fn check(store: &Store, key: &str, recorded: (&Digest, u64), found: (&Digest, u64)) -> Result<(), StoreError> {
    let (expected, found) = match (recorded.1 == found.1, recorded.0 == found.0) {
        (true, true) => return Ok(()),
        (false, _) => (format!("{} bytes", recorded.1), format!("{} bytes", found.1)),
        (true, false) => (format!("blake3 {}", recorded.0), format!("blake3 {}", found.0)),
    };
    Err(store.place(Operation::Get, key).corrupt(expected, found))
}

/// Reads chunk by chunk; the first error ends the stream.
fn chunks(reader: Result<Reader, StoreError>) -> BoxStream<'static, Result<Bytes, StoreError>> {
    let reader = match reader {
        Ok(reader) => reader,
        Err(error) => return stream::once(async { Err(error) }).boxed(),
    };
    stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(None) => None,
            Ok(Some(chunk)) => Some((Ok(chunk), Some(reader))),
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

/// Appends a chunk. Where room must be made, it is for as many of the bytes still `to_come` as have come already: so memory is taken for
/// what is there, and in the end for no byte more.
fn append(all: &mut Vec<u8>, chunk: &[u8], to_come: u64) {
    if all.capacity() - all.len() < chunk.len() {
        let ahead = usize::try_from(to_come).unwrap_or(usize::MAX).min(all.len().max(FIRST_ROOM));
        all.reserve_exact(chunk.len() + ahead);
    }
    all.extend_from_slice(chunk);
}

/// The size that an object must have to be read at all.
#[derive(Clone, Copy, Debug)]
enum Size {
    Any,
    Exactly(u64),
    AtMost(u64),
}

impl Size {
    fn check(self, place: Place<'_>, found: u64) -> Result<(), StoreError> {
        let expected = match self {
            Self::Exactly(bytes) if found != bytes => format!("{bytes} bytes"),
            Self::AtMost(bytes) if found > bytes => format!("at most {bytes} bytes"),
            _ => return Ok(()),
        };
        Err(place.corrupt(expected, format!("{found} bytes")))
    }
}

/// A read in progress.
struct Reader {
    store: Store,
    key: String,
    path: Path,
    size: Size,
    /// The bytes still to come; the end is known once the object was opened.
    next: u64,
    end: Option<u64>,
    /// The size and stamp of the version that is read.
    version: Option<(u64, Option<String>)>,
    e_tag: Option<String>,
    body: Option<BoxStream<'static, object_store::Result<Bytes>>>,
    retries: Option<Retries>,
}

impl Reader {
    fn new(store: &Store, key: &str, range: Option<Range<u64>>) -> Result<Self, StoreError> {
        let path = store.path(key)?;
        let (next, end) = range.map_or((0, None), |range| (range.start, Some(range.end)));
        let (store, size) = (store.clone(), Size::Any);
        Ok(Self { store, key: key.into(), path, size, next, end, version: None, e_tag: None, body: None, retries: None })
    }

    fn of(self, size: Size) -> Self {
        Self { size, ..self }
    }

    fn place(&self) -> Place<'_> {
        Place { url: self.store.url(), key: &self.key, operation: Operation::Get }
    }

    /// The bytes still to come, once the object was opened.
    fn left(&self) -> u64 {
        self.end.unwrap_or_default().saturating_sub(self.next)
    }

    fn collect(mut self) -> BoxFuture<'static, Result<Bytes, StoreError>> {
        Box::pin(async move {
            let Some(first) = self.next().await? else { return Ok(Bytes::new()) };
            if self.left() == 0 {
                return Ok(first);
            }
            let mut all = Vec::new();
            append(&mut all, &first, self.left());
            let deadline = self.store.limits().overall_for(self.left());
            let rest = async {
                while let Some(chunk) = self.next().await? {
                    append(&mut all, &chunk, self.left());
                }
                Ok(())
            };
            match timeout(deadline, rest).await {
                Ok(read) => read.map(|()| all.into()),
                Err(_) => Err(self.place().timeout(deadline)),
            }
        })
    }

    /// The next chunk; `None` at the end. Bytes renew the retries; an empty chunk is no progress.
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        loop {
            let error = match self.attempt().await {
                Ok(Some(chunk)) if chunk.is_empty() => continue,
                Ok(Some(chunk)) => {
                    self.next += chunk.len() as u64;
                    tally::read(chunk.len() as u64);
                    self.retries = None;
                    return Ok(Some(chunk));
                }
                Ok(None) => return Ok(None),
                Err(error) => error,
            };
            self.body = None;
            let mut retries = self.retries.take().unwrap_or_else(|| self.store.limits().retries(0));
            retries.pause(&self.store, self.place(), error).await?;
            self.retries = Some(retries);
        }
    }

    async fn attempt(&mut self) -> Result<Option<Bytes>, StoreError> {
        if self.end.is_some_and(|end| self.next >= end) {
            return Ok(None);
        }
        let limits = self.store.limits();
        let deadline = self.retries.as_ref().map_or(limits.attempt, |retries| retries.left().min(limits.attempt));
        let mut body = match self.body.take() {
            Some(body) => body,
            None => match timeout(deadline, self.open()).await {
                Ok(opened) => opened?,
                Err(_) => return Err(self.place().timeout(deadline)),
            },
        };
        let chunk = timeout(deadline, body.next()).await;
        self.body = Some(body);
        match chunk {
            Err(_) => Err(self.place().timeout(deadline)),
            Ok(Some(Ok(chunk))) => Ok(Some(chunk)),
            Ok(Some(Err(error))) => Err(self.place().error(error)),
            Ok(None) if self.end.is_some_and(|end| self.next < end) => Err(self.place().unavailable("the reply broke off early")),
            Ok(None) => Ok(None),
        }
    }

    async fn open(&mut self) -> Result<BoxStream<'static, object_store::Result<Bytes>>, StoreError> {
        self.store.refuse_special(self.place()).await?;
        let wanted = self.end.map(|end| self.next..end);
        let result = match (self.request(wanted.clone()).await, &wanted) {
            (Err(object_store::Error::NotSupported { .. }), Some(_)) => {
                tracing::warn!(url = self.store.url(), key = self.key, "the server serves no ranges: reading starts at the beginning");
                self.request(None).await
            }
            (result, _) => result,
        };
        let result = result.map_err(|error| self.place().error(error))?;
        // Not every server minds a condition, and a weak tag can't be one.
        let version = (result.meta.size, stamp(&result.meta));
        if *self.version.get_or_insert_with(|| version.clone()) != version {
            return Err(self.place().replaced());
        }
        self.size.check(self.place(), result.meta.size)?;
        self.e_tag = result.meta.e_tag.clone().filter(|tag| !tag.starts_with("W/"));
        let (given, whole) = (result.range.clone(), body_of(result));
        let end = wanted.as_ref().map_or(given.end, |wanted| wanted.end.min(given.end));
        self.end = Some(end);
        Ok(if given.start == self.next && given.end == end { whole } else { cut(whole, given.start, self.next..end) })
    }

    async fn request(&mut self, range: Option<Range<u64>>) -> object_store::Result<GetResult> {
        let options = GetOptions { range: range.map(GetRange::Bounded), if_match: self.e_tag.clone(), ..GetOptions::default() };
        self.store.object().get_opts(&self.path, options).await
    }
}

/// Of a body that begins at byte `at` of the object, the bytes `wanted`; the rest as empty chunks.
fn cut(
    body: BoxStream<'static, object_store::Result<Bytes>>,
    mut at: u64,
    wanted: Range<u64>,
) -> BoxStream<'static, object_store::Result<Bytes>> {
    body.map_ok(move |chunk| {
        let len = chunk.len() as u64;
        let within = |byte: u64| usize::try_from(byte.saturating_sub(at).min(len)).unwrap_or(0);
        let part = chunk.slice(within(wanted.start)..within(wanted.end));
        at += len;
        part
    })
    .boxed()
}

/// The bytes of a reply; files in larger chunks than the backend's own.
fn body_of(result: GetResult) -> BoxStream<'static, object_store::Result<Bytes>> {
    let Range { start, end } = result.range;
    let file = match result.payload {
        GetResultPayload::Stream(body) => return body,
        GetResultPayload::File(file, _) => file,
    };
    stream::try_unfold((file, start), move |(mut file, at)| async move {
        if at >= end {
            return Ok(None);
        }
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; usize::try_from(CHUNK_BYTES.min(end - at)).unwrap_or(0)];
            file.seek(SeekFrom::Start(at))?;
            file.read_exact(&mut chunk)?;
            Ok::<_, std::io::Error>((chunk, file))
        });
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic { store: "file", source };
        let (chunk, file) = read.await.map_err(|error| failed(error.into()))?.map_err(|error| failed(error.into()))?;
        let next = at + chunk.len() as u64;
        Ok(Some((Bytes::from(chunk), (file, next))))
    })
    .boxed()
}
