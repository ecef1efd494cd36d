//! Writing and deleting.

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, ObjectStoreExt, PutMode, PutPayload};
use tokio::time::timeout;

use crate::error::{Operation, Place, StoreError};
use crate::limits::retrying;
use crate::store::Store;
use crate::tally;

/// Objects above this many bytes are written in parts of it.
const PART_BYTES: usize = 16 << 20;
/// The parts that S3 allows, less some.
const MOST_PARTS: usize = 9_000;
/// Parts, or deletes, under way at once.
const CONCURRENT: usize = 4;

fn length(pieces: &[Bytes]) -> usize {
    pieces.iter().map(Bytes::len).sum()
}

/// What an upload sends, part by part; nothing is copied.
fn in_parts(pieces: &[Bytes]) -> Vec<PutPayload> {
    let size = PART_BYTES.max(length(pieces).div_ceil(MOST_PARTS));
    let (mut parts, mut part, mut room) = (Vec::new(), Vec::new(), size);
    for piece in pieces {
        let mut rest = piece.clone();
        while !rest.is_empty() {
            let taken = rest.split_to(rest.len().min(room));
            room -= taken.len();
            part.push(taken);
            if room == 0 {
                parts.push(part.drain(..).collect());
                room = size;
            }
        }
    }
    if !part.is_empty() {
        parts.push(part.into_iter().collect());
    }
    parts
}

fn left_over(path: &Path, error: &dyn std::fmt::Display) {
    tracing::warn!(%path, %error, "an unfinished upload could not be aborted; the bucket's lifecycle rules should remove it");
}

/// An upload that the store does not know any more.
const ENDED: &str = "the store no longer knows the upload, which something else ended: another client, or a lifecycle rule of the bucket";

/// Why an upload in parts came to nothing.
enum Undone {
    /// Something else ended it: it can only begin anew.
    Ended,
    Failed(StoreError),
}

impl From<StoreError> for Undone {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

/// None: the store does not know the upload.
fn known<T>(reply: object_store::Result<T>, place: Place<'_>) -> Result<Option<T>, StoreError> {
    match reply {
        Ok(value) => Ok(Some(value)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(place.error(error)),
    }
}

/// Whether a conditional write took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is ours.
    Yes,
    /// Someone else's object has that name; nothing was written.
    AlreadyThere,
}

impl Store {
    /// Writes an object, replacing what was there. Readers see the old bytes or the new ones; on a local store they survive a crash.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound` and `AlreadyExists`.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.put_at_once(key, bytes.into()).await
    }

    fn put_at_once<'a>(&'a self, key: &'a str, bytes: PutPayload) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let (path, place) = self.at(Operation::Put, key)?;
            retrying(self, place, bytes.content_length() as u64, |_| async {
                let _writing = self.writing(key, place).await?;
                self.object().put(&path, bytes.clone()).await.map_err(|error| place.error(error))?;
                tally::written(bytes.content_length() as u64);
                Ok(())
            })
            .await
        })
    }

    /// Writes an object only if no object has that name. Durable and atomic on every store. It goes in one request, of which the clouds
    /// take 5 GB at most, and which has time in proportion to its bytes.
    ///
    /// If an attempt's fate is unknown (no reply), what is there is read back: equal bytes are ours. So callers whose bytes could
    /// equal another writer's put a nonce in them. After an error the object may yet appear.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound` and `AlreadyExists`.
    pub fn create<'a>(&'a self, key: &'a str, bytes: Bytes) -> BoxFuture<'a, Result<Created, StoreError>> {
        Box::pin(async move {
            let (path, place) = self.at(Operation::Create, key)?;
            let attempt = |number| self.try_create(&path, &bytes, number > 0, place);
            let error = match retrying(self, place, bytes.len() as u64, attempt).await {
                Err(error) if error.is_retryable() => error,
                decided => return decided,
            };
            // The last attempt's reply may be what was lost.
            let limit = self.limits().attempt_for(bytes.len() as u64);
            let read_back = timeout(limit, self.whose(&path, &bytes, true, place));
            match read_back.await {
                Ok(Ok(created)) => Ok(created),
                _ => Err(error),
            }
        })
    }

    async fn try_create(&self, path: &Path, bytes: &Bytes, unsure: bool, place: Place<'_>) -> Result<Created, StoreError> {
        let put = {
            let _writing = self.writing(place.key, place).await?;
            self.object().put_opts(path, PutPayload::from_bytes(bytes.clone()), PutMode::Create.into()).await
        };
        match put {
            Ok(_) => {
                tally::written(bytes.len() as u64);
                Ok(Created::Yes)
            }
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                self.whose(path, bytes, unsure, place).await
            }
            Err(error) => Err(place.error(error)),
        }
    }

    /// Says whose the object is that a create met: ours only if an earlier attempt of ours may have made it and the bytes are equal.
    async fn whose(&self, path: &Path, bytes: &Bytes, unsure: bool, place: Place<'_>) -> Result<Created, StoreError> {
        let found = match unsure {
            true => self.holds(path, bytes).await,
            false => self.object().head(path).await.map(|_| false),
        };
        match found {
            Ok(true) => Ok(Created::Yes),
            Ok(false) => Ok(Created::AlreadyThere),
            // S3 answers 409 while another conditional write is under way; that one may yet fail.
            Err(object_store::Error::NotFound { .. }) => Err(place.unavailable("another conditional write was under way")),
            Err(error) => Err(place.error(error)),
        }
    }

    /// Whether the object has just these bytes; no copy is made of a large one.
    async fn holds(&self, path: &Path, bytes: &Bytes) -> object_store::Result<bool> {
        let found = self.object().get(path).await?;
        if found.meta.size != bytes.len() as u64 {
            return Ok(false);
        }
        let (mut rest, mut chunks) = (&bytes[..], found.into_stream());
        while let Some(chunk) = chunks.try_next().await? {
            let Some(left) = rest.strip_prefix(&chunk[..]) else { return Ok(false) };
            rest = left;
        }
        Ok(rest.is_empty())
    }

    /// Writes an object of any size, in parts above 16 MiB; it appears whole or not at all. On clouds a part that fails is sent again by itself.
    /// Its bytes are those of `pieces`, one after the other, which are sent from where they lie: a large object needs no memory of its own here.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound` and `AlreadyExists`.
    pub fn upload<'a>(&'a self, key: &'a str, pieces: &'a [Bytes]) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let bytes = length(pieces);
            if bytes <= PART_BYTES {
                return self.put_at_once(key, pieces.iter().cloned().collect()).await;
            }
            let (path, place) = self.at(Operation::Upload, key)?;
            if let Some(parts) = self.parts() {
                return self.upload_parts(parts, &path, pieces, place).await.inspect(|()| tally::written(bytes as u64));
            }
            retrying(self, place, bytes as u64, |_| async {
                let _writing = self.writing(key, place).await?;
                self.try_upload(&path, pieces).await.map_err(|error| place.error(error))
            })
            .await
            .inspect(|()| tally::written(bytes as u64))
        })
    }

    /// Uploads at once, to a backend whose parts can't be sent again one by one.
    async fn try_upload(&self, path: &Path, pieces: &[Bytes]) -> object_store::Result<()> {
        let mut upload = self.object().put_multipart(path).await?;
        let puts: Vec<_> = in_parts(pieces).into_iter().map(|part| upload.put_part(part)).collect();
        let sent = stream::iter(puts).buffer_unordered(CONCURRENT).try_collect::<Vec<()>>().await;
        let done = match sent {
            Ok(_) => upload.complete().await.map(|_| ()),
            Err(error) => Err(error),
        };
        if done.is_err()
            && let Err(error) = upload.abort().await
        {
            left_over(path, &error);
        }
        done
    }

    /// Uploads in parts; from the start again if something else ended the upload, as long as the call has time.
    async fn upload_parts(&self, parts: &dyn MultipartStore, path: &Path, pieces: &[Bytes], place: Place<'_>) -> Result<(), StoreError> {
        let mut retries = self.limits().retries(length(pieces) as u64);
        loop {
            match self.try_parts(parts, path, pieces, place).await {
                Ok(()) => return Ok(()),
                Err(Undone::Failed(error)) => return Err(error),
                Err(Undone::Ended) => retries.pause(self, place, place.unavailable(ENDED)).await?,
            }
        }
    }

    async fn try_parts(&self, parts: &dyn MultipartStore, path: &Path, pieces: &[Bytes], place: Place<'_>) -> Result<(), Undone> {
        let begin = |_| async { parts.create_multipart(path).await.map_err(|error| place.error(error)) };
        let id = &retrying(self, place, 0, begin).await?;
        let deadline = self.limits().overall_for(length(pieces) as u64);
        let sent = timeout(deadline, self.send_parts(parts, path, id, pieces, place)).await;
        let sent = sent.unwrap_or_else(|_| Err(place.timeout(deadline).into()));
        if let Err(Undone::Failed(_)) = sent {
            match timeout(self.limits().attempt, parts.abort_multipart(path, id)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => left_over(path, &error),
                Err(error) => left_over(path, &error),
            }
        }
        sent
    }

    async fn send_parts(
        &self,
        parts: &dyn MultipartStore,
        path: &Path,
        id: &MultipartId,
        pieces: &[Bytes],
        place: Place<'_>,
    ) -> Result<(), Undone> {
        let send = |(index, part): (usize, PutPayload)| async move {
            let sent = retrying(self, place, part.content_length() as u64, |_| {
                let sent = parts.put_part(path, id, index, part.clone());
                async move { known(sent.await, place) }
            });
            sent.await?.ok_or(Undone::Ended)
        };
        let sent: Vec<PartId> = stream::iter(in_parts(pieces).into_iter().enumerate()).map(send).buffered(CONCURRENT).try_collect().await?;
        let completed = retrying(self, place, 0, |attempt| {
            let completed = parts.complete_multipart(path, id, sent.clone());
            async move {
                match known(completed.await, place)? {
                    // Perhaps an attempt whose reply was lost completed it. Only the object itself tells (COMMIT).
                    None if attempt > 0 => self.is_there(path, length(pieces) as u64, place).await,
                    completed => Ok(completed.is_some()),
                }
            }
        });
        if completed.await? { Ok(()) } else { Err(Undone::Ended) }
    }

    /// Whether an object of that size is there.
    async fn is_there(&self, path: &Path, bytes: u64, place: Place<'_>) -> Result<bool, StoreError> {
        Ok(known(self.object().head(path).await, place)?.is_some_and(|meta| meta.size == bytes))
    }

    /// Deletes an object; one that is not there counts as deleted.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound`.
    pub fn delete<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let (path, place) = self.at(Operation::Delete, key)?;
            let deleted =
                retrying(self, place, 0, |_| async { self.object().delete(&path).await.map_err(|error| place.error(error)) }).await;
            match deleted {
                Err(StoreError::NotFound { .. }) => Ok(()),
                result => result,
            }
        })
    }

    /// Deletes the folder `prefix` and all in it. On a local store also what killed writers left half-written there.
    ///
    /// # Errors
    /// `BadKey` for `""`; else any of [`StoreError`] but `NotFound`. What was deleted before an error stays deleted.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<(), StoreError> {
        let prefix = prefix.trim_end_matches('/');
        self.path(prefix)?;
        let found = self.list(prefix).await?;
        stream::iter(&found).map(|meta| self.delete(&meta.key)).buffer_unordered(CONCURRENT).try_collect::<Vec<()>>().await?;
        let Some(local) = self.local_path() else { return Ok(()) };
        match tokio::fs::remove_dir_all(local.join(prefix)).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(self.place(Operation::Delete, prefix).io(error)),
            _ => Ok(()),
        }
    }
}
