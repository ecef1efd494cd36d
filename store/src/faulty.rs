//! A store whose operations fail by script, or by chance, to test what stands on it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use futures::{FutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, DynObjectStore, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

use crate::chance::Chance;
use crate::error::Operation;
use crate::store::Store;

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// An error, and no effect.
    Before,
    /// The effect takes place, and then an error comes: the reply was lost.
    LostReply,
    /// No effect, and no answer, ever.
    Hang,
    /// The effect takes place, and no answer ever comes.
    HangAfter,
    /// It succeeds after this long.
    Slow(Duration),
    /// The disk is full.
    Full,
    /// The store refuses.
    Denied,
    /// Reads only: the reply breaks off after this many bytes.
    CutAt(u64),
    /// Reads only: one bit of the first byte is flipped.
    Flip,
}

/// One rule of the script: the next `times` calls of `operation` whose path contains `key` fail in this way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The operation.
    pub operation: Operation,
    /// Part of the object's path; `""` is any.
    pub key: String,
    /// How it fails.
    pub failure: Failure,
    /// How often.
    pub times: u32,
}

/// The script of a faulty store; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    script: Arc<Mutex<Script>>,
    /// What is drawn besides. Operations are not kept then: there is no end of them.
    chance: Option<Arc<Chance>>,
}

#[derive(Debug, Default)]
struct Script {
    pending: Vec<Fault>,
    seen: Vec<(Operation, String)>,
}

impl Faults {
    /// An empty script: all succeeds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Faults that are drawn.
    pub fn by(chance: Chance) -> Self {
        Self { chance: Some(Arc::new(chance)), ..Self::default() }
    }

    /// Adds a rule; of several that match, the oldest is used up first.
    pub fn push(&self, operation: Operation, key: &str, failure: Failure, times: u32) -> &Self {
        self.lock().pending.push(Fault { operation, key: key.to_owned(), failure, times });
        self
    }

    /// Drops all rules that were not used up.
    pub fn clear(&self) {
        self.lock().pending.clear();
    }

    /// Whether every rule was used up.
    pub fn is_spent(&self) -> bool {
        self.lock().pending.is_empty()
    }

    /// Every operation that reached the store so far, with its path.
    pub fn seen(&self) -> Vec<(Operation, String)> {
        self.lock().seen.clone()
    }

    /// The store, with this script between it and its backend.
    pub fn inject(&self, store: &Store) -> Store {
        store.with_backend(|inner| Arc::new(FaultyStore { inner, faults: self.clone() }))
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a call, and says how it is to fail.
    fn next(&self, operation: Operation, path: &Path) -> Option<Failure> {
        if let Some(chance) = &self.chance {
            return chance.draw(operation);
        }
        let mut script = self.lock();
        script.seen.push((operation, path.to_string()));
        let index = script.pending.iter().position(|fault| fault.operation == operation && path.as_ref().contains(&fault.key))?;
        let fault = &mut script.pending[index];
        let failure = fault.failure;
        fault.times = fault.times.saturating_sub(1);
        if fault.times == 0 {
            script.pending.remove(index);
        }
        Some(failure)
    }
}

/// A backend whose operations fail by script.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<DynObjectStore>,
    faults: Faults,
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}

fn io(error: std::io::Error) -> Error {
    Error::Generic { store: "faulty", source: error.into() }
}

fn broken() -> Error {
    io(std::io::ErrorKind::ConnectionReset.into())
}

/// Runs `effect` as the failure says.
async fn fail<T>(failure: Option<Failure>, path: &Path, effect: impl Future<Output = Result<T>>) -> Result<T> {
    match failure {
        None | Some(Failure::CutAt(_) | Failure::Flip) => effect.await,
        Some(Failure::Before) => Err(broken()),
        Some(Failure::LostReply) => effect.await.and_then(|_| Err(broken())),
        Some(Failure::Hang) => std::future::pending().await,
        Some(Failure::HangAfter) => {
            effect.await?;
            std::future::pending().await
        }
        Some(Failure::Slow(delay)) => {
            tokio::time::sleep(delay).await;
            effect.await
        }
        Some(Failure::Full) => Err(io(std::io::ErrorKind::StorageFull.into())),
        Some(Failure::Denied) => Err(Error::PermissionDenied { path: path.to_string(), source: "by the script".into() }),
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let operation = if opts.mode == PutMode::Create { Operation::Create } else { Operation::Put };
        let failure = self.faults.next(operation, location);
        fail(failure, location, self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let failure = self.faults.next(Operation::Upload, location);
        let inner = self.inner.put_multipart_opts(location, opts).await?;
        Ok(Box::new(FaultyUpload { inner, failure, path: location.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let failure = self.faults.next(if options.head { Operation::Head } else { Operation::Get }, location);
        let got = fail(failure, location, self.inner.get_opts(location, options)).await?;
        match failure {
            Some(failure @ (Failure::CutAt(_) | Failure::Flip)) => spoilt(got, failure).await,
            _ => Ok(got),
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, faults) = (Arc::clone(&self.inner), self.faults.clone());
        let delete = move |path: Path| {
            let (inner, failure) = (Arc::clone(&inner), faults.next(Operation::Delete, &path));
            async move {
                let one = stream::iter([Ok(path.clone())]).boxed();
                fail(failure, &path, async { inner.delete_stream(one).try_collect::<Vec<_>>().await }).await?;
                Ok(path)
            }
        };
        locations.and_then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let path = prefix.cloned().unwrap_or_default();
        let failure = self.faults.next(Operation::List, &path);
        let listed = self.inner.list(prefix);
        async move { fail(failure, &path, async { Ok(listed) }).await }.into_stream().try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let path = prefix.cloned().unwrap_or_default();
        let failure = self.faults.next(Operation::List, &path);
        fail(failure, &path, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// The reply, broken off or with a bit flipped.
async fn spoilt(got: GetResult, failure: Failure) -> Result<GetResult> {
    let (meta, range, attributes, extensions) = (got.meta.clone(), got.range.clone(), got.attributes.clone(), got.extensions.clone());
    let bytes = got.bytes().await?;
    let chunks = match failure {
        Failure::CutAt(at) => vec![Ok(bytes.slice(..bytes.len().min(usize::try_from(at).unwrap_or(usize::MAX)))), Err(broken())],
        _ => {
            let mut bytes = bytes.to_vec();
            bytes.iter_mut().take(1).for_each(|byte| *byte ^= 1);
            vec![Ok(Bytes::from(bytes))]
        }
    };
    Ok(GetResult { payload: GetResultPayload::Stream(stream::iter(chunks).boxed()), meta, range, attributes, extensions })
}

/// An upload that fails when it is completed.
#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    failure: Option<Failure>,
    path: Path,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        fail(self.failure, &self.path, self.inner.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
