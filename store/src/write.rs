//! Writing and deleting.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutPayload};

use crate::error::{Operation, Place, StoreError};
use crate::limits::retrying;
use crate::store::Store;

/// Objects above this many bytes are written in parts of it.
const PART_BYTES: usize = 16 << 20;
/// The parts that S3 allows, less some.
const MOST_PARTS: usize = 9_000;
/// Parts, or deletes, under way at once.
const CONCURRENT: usize = 4;

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
        let (path, place) = (self.path(key)?, self.place(Operation::Put, key));
        retrying(self, place, bytes.len() as u64, |_| async {
            self.object().put(&path, bytes.clone().into()).await.map_err(|error| place.error(error))?;
            Ok(())
        })
        .await
    }

    /// Writes an object only if no object has that name. Durable and atomic on every store.
    ///
    /// If an attempt's fate is unknown (no reply), what is there is read back: equal bytes are ours. So callers whose bytes could
    /// equal another writer's put a nonce in them. After an error the object may yet appear.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound` and `AlreadyExists`.
    pub async fn create(&self, key: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let (path, place) = (self.path(key)?, self.place(Operation::Create, key));
        let attempt = |number| self.try_create(&path, &bytes, number > 0, place);
        let error = match retrying(self, place, bytes.len() as u64, attempt).await {
            Err(error) if error.is_retryable() => error,
            decided => return decided,
        };
        // The last attempt's reply may be what was lost.
        let read_back = tokio::time::timeout(self.limits().attempt, self.whose(&path, &bytes, true, place));
        match read_back.await {
            Ok(Ok(created)) => Ok(created),
            _ => Err(error),
        }
    }

    async fn try_create(&self, path: &Path, bytes: &Bytes, unsure: bool, place: Place<'_>) -> Result<Created, StoreError> {
        let put = self.object().put_opts(path, PutPayload::from_bytes(bytes.clone()), PutMode::Create.into()).await;
        match put {
            Ok(_) => Ok(Created::Yes),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                self.whose(path, bytes, unsure, place).await
            }
            Err(error) => Err(place.error(error)),
        }
    }

    /// Says whose the object is that a create met: ours only if an earlier attempt of ours may have made it and the bytes are equal.
    async fn whose(&self, path: &Path, bytes: &Bytes, unsure: bool, place: Place<'_>) -> Result<Created, StoreError> {
        let found = match unsure {
            true => async { self.object().get(path).await?.bytes().await.map(|found| found == *bytes) }.await,
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

    /// Writes an object of any size, in parts above 16 MiB; it appears whole or not at all.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound` and `AlreadyExists`.
    pub async fn upload(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        if bytes.len() <= PART_BYTES {
            return self.put(key, bytes).await;
        }
        let (path, place) = (self.path(key)?, self.place(Operation::Upload, key));
        retrying(self, place, bytes.len() as u64, |_| async { self.try_upload(&path, &bytes).await.map_err(|error| place.error(error)) })
            .await
    }

    async fn try_upload(&self, path: &Path, bytes: &Bytes) -> object_store::Result<()> {
        let part = PART_BYTES.max(bytes.len().div_ceil(MOST_PARTS));
        let mut upload = self.object().put_multipart(path).await?;
        let puts: Vec<_> =
            (0..bytes.len()).step_by(part).map(|at| upload.put_part(bytes.slice(at..bytes.len().min(at + part)).into())).collect();
        let sent = stream::iter(puts).buffer_unordered(CONCURRENT).try_collect::<Vec<()>>().await;
        let done = match sent {
            Ok(_) => upload.complete().await.map(|_| ()),
            Err(error) => Err(error),
        };
        if done.is_err()
            && let Err(error) = upload.abort().await
        {
            tracing::warn!(%path, %error, "an unfinished upload could not be aborted; the bucket's lifecycle rules should remove it");
        }
        done
    }

    /// Deletes an object; one that is not there counts as deleted.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound`.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let (path, place) = (self.path(key)?, self.place(Operation::Delete, key));
        let deleted = retrying(self, place, 0, |_| async { self.object().delete(&path).await.map_err(|error| place.error(error)) }).await;
        match deleted {
            Err(StoreError::NotFound { .. }) => Ok(()),
            result => result,
        }
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
