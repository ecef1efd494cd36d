//! A folder in an object store.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use futures::TryStreamExt;
use futures::future::BoxFuture;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{DynObjectStore, ObjectMeta, ObjectStoreExt};

use crate::chance;
use crate::error::{Operation, Place, StoreError};
use crate::limits::{Limits, retrying};
use crate::open::{self, Backend, Opened};

/// What a listing of a hundred thousand names moves, for its deadline.
const LISTING_BYTES: u64 = 64 << 20;

/// A folder in an object store. Cloning is cheap; clones and children share the connection and the retry counts.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
    folder: Path,
    url: Arc<str>,
    local: Option<Arc<FilePath>>,
}

struct Shared {
    backend: Backend,
    limits: Limits,
    retries: Mutex<BTreeMap<(Operation, &'static str), u64>>,
    /// Something answered there once.
    met: AtomicBool,
}

/// An object's name, relative to the store's folder, its size, and what tells its versions apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// The key.
    pub key: String,
    /// The size in bytes.
    pub bytes: u64,
    /// Another one when the object was replaced: its entity tag (of a local file: inode, time and size), or else when it was last
    /// modified. `None` where a web server tells neither.
    pub stamp: Option<String>,
    /// When it was last modified, in milliseconds since 1970 by the store's clock. `None` where a web server does not tell.
    pub changed_ms: Option<u64>,
}

/// How often calls were retried, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryCount {
    /// What was tried.
    pub operation: Operation,
    /// The kind of error ([`StoreError::kind`]).
    pub reason: &'static str,
    /// How many times.
    pub count: u64,
}

impl Shared {
    fn new(backend: Backend, limits: Limits) -> Self {
        Self { backend, limits, retries: Mutex::default(), met: AtomicBool::default() }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens a folder: a plain path or `file://` (created on the first write), `s3://`, `gs://` or `az://`
    /// (credentials, region and endpoint from the cloud's usual environment variables), `https://` or `http://` (read-only, and not listed).
    /// Nothing is contacted yet.
    ///
    /// With `ELLA_STORE_FAULTS` in the environment operations fail by chance ([`crate::Chance`]), which is warned of once.
    ///
    /// # Errors
    /// `BadUrl` for what is no folder's URL or lacks its settings, `Unsupported` for a remote store in a build without the feature `cloud`,
    /// and for an `ELLA_STORE_FAULTS` that is not understood.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        chance::as_the_environment_says(Self::of(open::open(url)?))
    }

    /// A new and empty folder in memory, for tests. Clones share it; its URL is that of no store.
    pub fn in_memory() -> Self {
        Self::of(open::in_memory())
    }

    fn of(opened: Opened) -> Self {
        Self {
            shared: Arc::new(Shared::new(opened.backend, Limits::default())),
            folder: opened.folder,
            url: opened.url.into(),
            local: opened.local.map(Into::into),
        }
    }

    /// The same folder with other deadlines; retries are counted apart.
    pub fn with_limits(&self, limits: Limits) -> Self {
        self.rebuilt(self.shared.backend.clone(), limits)
    }

    /// The same folder with its backend decorated; retries are counted apart.
    pub fn with_backend(&self, decorate: impl FnOnce(Arc<DynObjectStore>) -> Arc<DynObjectStore>) -> Self {
        let Backend { object, read_only, .. } = self.shared.backend.clone();
        self.rebuilt(Backend { object: decorate(object), parts: None, read_only }, self.shared.limits)
    }

    pub(crate) fn rebuilt(&self, backend: Backend, limits: Limits) -> Self {
        Self { shared: Arc::new(Shared::new(backend, limits)), ..self.clone() }
    }

    /// The folder `path` below this one.
    pub fn child(&self, path: &str) -> Self {
        let path = path.trim_matches('/');
        if path.is_empty() {
            return self.clone();
        }
        let local = self.local.as_ref().map(|local| local.join(path).into());
        let url = format!("{}/{path}", if &*self.url == "/" { "" } else { &self.url });
        let folder = self.folder.parts().chain(path.split('/').map(Into::into)).collect();
        Self { shared: Arc::clone(&self.shared), folder, url: url.into(), local }
    }

    /// The folder's URL (an absolute path for a local one), without credentials.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The largest file that [`Store::create`] can write, in bytes, if there is a bound: it goes in one request, of which S3 takes 5 GiB and Azure
    /// 5000 MiB.
    pub fn largest_created(&self) -> Option<u64> {
        ["s3://", "az://"].iter().any(|scheme| self.url.starts_with(scheme)).then_some(5000 << 20)
    }

    /// The folder on this machine's file system, for mapping files into memory.
    pub fn local_path(&self) -> Option<PathBuf> {
        self.local.as_deref().map(FilePath::to_path_buf)
    }

    /// The deadlines in force.
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// How many attempts were repeated so far (KNOWN).
    pub fn retries(&self) -> u64 {
        self.retry_report().iter().map(|retry| retry.count).sum()
    }

    /// The same by operation and reason.
    pub fn retry_report(&self) -> Vec<RetryCount> {
        let counts = self.shared.retries.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|(&(operation, reason), &count)| RetryCount { operation, reason, count }).collect()
    }

    pub(crate) fn count_retry(&self, operation: Operation, reason: &'static str) {
        crate::tally::retried(operation, reason);
        *self.shared.retries.lock().unwrap_or_else(PoisonError::into_inner).entry((operation, reason)).or_default() += 1;
    }

    /// Notes that something answers at the store's address.
    pub(crate) fn meet(&self) {
        self.shared.met.store(true, Relaxed);
    }

    /// Whether anything ever answered at the store's address.
    pub(crate) fn is_met(&self) -> bool {
        self.shared.met.load(Relaxed)
    }

    pub(crate) fn object(&self) -> &DynObjectStore {
        &*self.shared.backend.object
    }

    pub(crate) fn parts(&self) -> Option<&dyn MultipartStore> {
        self.shared.backend.parts.as_deref()
    }

    pub(crate) fn place<'a>(&'a self, operation: Operation, key: &'a str) -> Place<'a> {
        Place { url: &self.url, key, operation }
    }

    /// Where `key` lies in the backend, if the store offers `operation`.
    pub(crate) fn at<'a>(&'a self, operation: Operation, key: &'a str) -> Result<(Path, Place<'a>), StoreError> {
        let path = if operation == Operation::List { self.folder_path(key)? } else { self.path(key)? };
        match self.shared.backend.read_only && !matches!(operation, Operation::Get | Operation::Head) {
            false => Ok((path, self.place(operation, key))),
            true => Err(StoreError::Unsupported {
                url: self.url.to_string(),
                what: format!(
                    "{operation} of {key:?}: a web server's files can only be read, each by its name; use s3://, gs://, az:// or a folder"
                ),
            }),
        }
    }

    /// Where `key` lies in the backend.
    pub(crate) fn path(&self, key: &str) -> Result<Path, StoreError> {
        let bad = |reason: String| StoreError::BadKey { url: self.url.to_string(), key: key.to_owned(), reason };
        let below = Path::parse(key).map_err(|error| bad(error.to_string()))?;
        if below.as_ref() != key || key.is_empty() {
            return Err(bad("empty, or with a slash at its start or end".into()));
        }
        Ok(self.folder.parts().chain(below.parts()).collect())
    }

    /// As [`Store::path`], but `""` is the folder itself and a trailing slash is allowed.
    fn folder_path(&self, prefix: &str) -> Result<Path, StoreError> {
        match prefix.trim_end_matches('/') {
            "" => Ok(self.folder.clone()),
            prefix => self.path(prefix),
        }
    }

    /// The key of a backend's path: what follows the folder.
    fn key(&self, path: &Path) -> String {
        let below = path.prefix_match(&self.folder).into_iter().flatten();
        below.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/")
    }

    fn meta(&self, meta: &ObjectMeta) -> Meta {
        let changed_ms = u64::try_from(meta.last_modified.timestamp_millis()).ok().filter(|changed| *changed > 0);
        Meta { key: self.key(&meta.location), bytes: meta.size, stamp: stamp(meta), changed_ms }
    }

    /// An object's size and stamp; `None` if there is no such object.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound`.
    pub fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Meta>, StoreError>> {
        Box::pin(async move {
            let (path, place) = self.at(Operation::Head, key)?;
            let found = retrying(self, place, 0, |_| async {
                self.refuse_special(place).await?;
                self.object().head(&path).await.map_err(|error| place.error(error))
            });
            let found = found.await;
            match found {
                Ok(meta) => Ok(Some(self.meta(&meta))),
                Err(StoreError::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }

    /// Refuses what lies on this machine and is neither a file nor a folder: opening a pipe that nobody writes to never ends, and the size of a
    /// device says nothing of its bytes.
    pub(crate) async fn refuse_special(&self, place: Place<'_>) -> Result<(), StoreError> {
        let Some(path) = self.local.as_ref().map(|local| local.join(place.key)) else { return Ok(()) };
        // What goes wrong here the store itself will say.
        let looked = tokio::task::spawn_blocking(move || std::fs::metadata(path).map(|meta| meta.is_file() || meta.is_dir())).await;
        match looked {
            Ok(Ok(false)) => Err(place.io(io::Error::new(io::ErrorKind::InvalidInput, "a pipe, socket or device (expected a file)"))),
            _ => Ok(()),
        }
    }

    /// Every object below the folder `prefix` (`""` for all), however deep, sorted by key. A folder that is not there is empty.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound`.
    pub fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Meta>, StoreError>> {
        Box::pin(async move {
            let (path, place) = self.at(Operation::List, prefix)?;
            let mut found = self
                .listing(place, || async { self.object().list(Some(&path)).map_ok(|meta| self.meta(&meta)).try_collect().await })
                .await?;
            found.sort_by(|a: &Meta, b: &Meta| a.key.cmp(&b.key));
            Ok(found)
        })
    }

    /// The folders directly below `prefix`, sorted, as keys. On a local store empty ones too.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound`.
    pub fn folders<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>> {
        Box::pin(async move {
            let (path, place) = self.at(Operation::List, prefix)?;
            let mut found = self
                .listing(place, || async {
                    let listed = self.object().list_with_delimiter(Some(&path)).await?;
                    Ok(listed.common_prefixes.iter().map(|path| self.key(path)).collect())
                })
                .await?;
            found.sort();
            Ok(found)
        })
    }

    /// The objects directly in the folder `prefix`, sorted by key: what lies deeper is not looked at.
    ///
    /// # Errors
    /// Any of [`StoreError`] but `NotFound`.
    pub fn files<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<Meta>, StoreError>> {
        Box::pin(async move {
            let (path, place) = (self.folder_path(prefix)?, self.place(Operation::List, prefix));
            let mut found = self
                .listing(place, || async {
                    let listed = self.object().list_with_delimiter(Some(&path)).await?;
                    Ok(listed.objects.iter().map(|meta| self.meta(meta)).collect())
                })
                .await?;
            found.sort_by(|a: &Meta, b: &Meta| a.key.cmp(&b.key));
            Ok(found)
        })
    }

    /// Retries a listing, and takes a missing folder for an empty one.
    async fn listing<T, F, Fut>(&self, place: Place<'_>, list: F) -> Result<Vec<T>, StoreError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = object_store::Result<Vec<T>>>,
    {
        match retrying(self, place, LISTING_BYTES, |_| async { list().await.map_err(|error| place.error(error)) }).await {
            Err(StoreError::NotFound { .. }) => Ok(Vec::new()),
            result => result,
        }
    }
}

/// What tells this version of an object from another. Azure quotes the tag in one reply and not in another.
pub(crate) fn stamp(meta: &ObjectMeta) -> Option<String> {
    let tag = meta.e_tag.as_deref().map(|tag| tag.replace('"', ""));
    // A server that tells no time reads as 1970.
    tag.or_else(|| (meta.last_modified.timestamp() != 0).then(|| meta.last_modified.to_rfc3339()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever makes a file that is to be written once asks first, for a cloud refuses it only when all of it was sent.
    #[test]
    fn what_goes_in_one_request_is_bounded_where_the_cloud_bounds_it() {
        let of = |url: &str| Store { url: url.into(), ..Store::in_memory() }.child("features/0").largest_created();
        assert_eq!(["s3://bucket", "az://container/data"].map(of), [Some(5_242_880_000); 2]);
        assert_eq!(["gs://bucket/data", "/data/s3:", "https://host/data"].map(of), [None; 3]);
    }
}
