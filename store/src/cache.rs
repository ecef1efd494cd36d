//! A local cache of whole objects, bounded in bytes, that all processes of a machine share.
//!
//! An object lies under its BLAKE3 digest, so it can't be stale. It is digested while it is fetched and, since disks forget too, again when a
//! process first opens it. Who fetches it holds a lock on its file to be; who else wants it waits for that, with a deadline. The kernel frees
//! the lock of a process that was killed, and what it left half-way is taken over or removed. What an eviction removes stays readable for who
//! has it open. Where the cache is of no use (an object above the bound, a full disk, a stuck neighbour) the store is read past it, and that
//! is counted (KNOWN). No daemon, no shared memory.
//!
//! ```text
//! objects/DIGEST   whole
//! fill/DIGEST      being fetched, locked
//! lock             held while room is made
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::TryStreamExt;
use memmap2::Mmap;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use crate::digest::{Digest, Hasher};
use crate::error::{Operation, Place, StoreError};
use crate::read::check;
use crate::store::Store;
use room::{Claim, Evicted, Room, is_full, lock, make_room};

mod room;

/// A local cache of whole objects; clones share it, and so do other processes that open the same folder.
#[derive(Clone, Debug)]
pub struct DiskCache {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    room: Room,
    /// The files whose bytes this process has digested, as they were then.
    verified: Mutex<HashMap<Digest, Version>>,
    counts: Mutex<CacheCounts>,
}

/// What a cache did for this process (KNOWN).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Objects given from the cache, those included that another process fetched meanwhile.
    pub hits: u64,
    /// Objects fetched into the cache.
    pub misses: u64,
    /// The bytes of those.
    pub fetched_bytes: u64,
    /// Objects whose bytes on disk had changed; they were removed and fetched anew.
    pub corrupt: u64,
    /// Objects removed to make room.
    pub evicted: u64,
    /// The bytes of those.
    pub evicted_bytes: u64,
    /// Objects read past the cache, by reason.
    pub bypassed: BTreeMap<&'static str, u64>,
}

/// What changes when a file's bytes do: inode, time of the last write, size.
type Version = (u64, i64, i64, u64);

/// Why the cache gives no object.
enum Miss {
    /// The store gives none either.
    Store(StoreError),
    /// The cache is of no use for it.
    Bypass(&'static str, io::Error),
}

impl From<io::Error> for Miss {
    fn from(error: io::Error) -> Self {
        Self::Bypass(if is_full(&error) { "disk full" } else { "disk error" }, error)
    }
}

impl DiskCache {
    /// Opens the cache in `folder`, which is made if need be, and evicts what it holds beyond `bound` bytes. Objects that are still open when
    /// they are evicted take their disk space until they are dropped.
    ///
    /// # Errors
    /// Those of making and writing the folder, and `Timeout` if another process keeps it locked.
    pub async fn open(folder: impl AsRef<Path>, bound: u64) -> Result<Self, StoreError> {
        let folder = std::path::absolute(folder.as_ref()).unwrap_or_else(|_| folder.as_ref().to_owned());
        let shown = folder.display().to_string();
        let place = Place { url: &shown, key: "lock", operation: Operation::Put };
        let cache =
            Self { shared: Arc::new(Shared { room: Room { folder, bound }, verified: Mutex::default(), counts: Mutex::default() }) };
        let room = cache.shared.room.clone();
        blocking(move || room.create()).await.map_err(|error| place.io(error))?;
        match cache.make_room(None, 0).await {
            Ok(()) => Ok(cache),
            Err(Miss::Store(error)) => Err(error),
            Err(Miss::Bypass(_, error)) => Err(place.io(error)),
        }
    }

    /// What the cache did so far.
    pub fn counts(&self) -> CacheCounts {
        self.lock_counts().clone()
    }

    /// The object `key` of `store`, which has this digest and size: mapped from the cache, after it was fetched if need be, or else read past
    /// the cache. For stores that are not local anyway.
    ///
    /// # Errors
    /// `Corrupt` if the store's object is another, or any [`StoreError`] of reading it. What is wrong with the cache is no error.
    pub async fn get(&self, store: &Store, key: &str, digest: &Digest, bytes: u64) -> Result<Bytes, StoreError> {
        match self.map(store, key, digest, bytes).await? {
            Some(map) => Ok(Bytes::from_owner(map)),
            None => store.get_verified(key, digest, bytes).await,
        }
    }

    /// The same for who has other ways to read past the cache: none where it is of no use.
    ///
    /// # Errors
    /// Those of [`DiskCache::get`].
    pub async fn map(&self, store: &Store, key: &str, digest: &Digest, bytes: u64) -> Result<Option<Mmap>, StoreError> {
        match self.cached(store, key, digest, bytes).await {
            Ok(found) => Ok(Some(found)),
            Err(Miss::Store(error)) => Err(error),
            Err(Miss::Bypass(reason, error)) => {
                tracing::warn!(folder = %self.shared.room.folder.display(), key, reason, %error, "read past the cache");
                *self.lock_counts().bypassed.entry(reason).or_default() += 1;
                Ok(None)
            }
        }
    }

    /// The most bytes that it may hold.
    pub fn bound(&self) -> u64 {
        self.shared.room.bound
    }

    /// Whether an object is in it, as far as its name tells. What was evicted takes disk space until nobody has it mapped.
    pub fn has(&self, digest: &Digest) -> bool {
        self.shared.room.object(digest).exists()
    }

    async fn cached(&self, store: &Store, key: &str, digest: &Digest, bytes: u64) -> Result<Mmap, Miss> {
        if bytes > self.shared.room.bound {
            return Err(Miss::Bypass("larger than the cache", io::ErrorKind::FileTooLarge.into()));
        }
        if let Some(found) = self.look(digest, bytes).await? {
            return Ok(found);
        }
        let deadline = store.limits().overall_for(bytes);
        let Some(claim) = Claim::wait(self.shared.room.fill(digest), deadline).await? else {
            return Err(Miss::Bypass("waited too long", io::ErrorKind::TimedOut.into()));
        };
        // Whoever had the claim before may have fetched it.
        if let Some(found) = self.look(digest, bytes).await? {
            return Ok(found);
        }
        self.make_room(Some(claim.file()?), bytes).await?;
        let fetched = timeout(deadline, fetch(store, key, (digest, bytes), claim.file()?)).await;
        fetched.unwrap_or_else(|_| Err(Miss::Store(store.place(Operation::Get, key).timeout(deadline))))?;
        self.publish(claim, digest, bytes).await
    }

    /// The object, if the cache has it and its bytes are right.
    async fn look(&self, digest: &Digest, bytes: u64) -> io::Result<Option<Mmap>> {
        let (shared, digest) = (Arc::clone(&self.shared), *digest);
        blocking(move || shared.look(&digest, bytes)).await
    }

    async fn make_room(&self, file: Option<File>, bytes: u64) -> Result<(), Miss> {
        let room = self.shared.room.clone();
        let Some(lock) = lock(room.lock(), room::LOCK_DEADLINE).await? else {
            return Err(Miss::Bypass("cache locked", io::ErrorKind::TimedOut.into()));
        };
        let (evicted, made) = blocking(move || {
            let (_lock, mut evicted) = (lock, Evicted::default());
            let made = make_room(&room, file.as_ref(), bytes, &mut evicted);
            Ok((evicted, made))
        })
        .await?;
        let mut counts = self.lock_counts();
        counts.evicted += evicted.objects;
        counts.evicted_bytes += evicted.bytes;
        match made? {
            true => Ok(()),
            false => Err(Miss::Bypass("others are filling it", io::ErrorKind::StorageFull.into())),
        }
    }

    /// Gives what was fetched its name.
    async fn publish(&self, claim: Claim, digest: &Digest, bytes: u64) -> Result<Mmap, Miss> {
        let (shared, digest) = (Arc::clone(&self.shared), *digest);
        let map = blocking(move || {
            let file = claim.publish(&shared.room.object(&digest))?;
            shared.lock_verified().insert(digest, version(&file)?);
            map(&file)
        })
        .await?;
        let mut counts = self.lock_counts();
        counts.misses += 1;
        counts.fetched_bytes += bytes;
        Ok(map)
    }

    fn lock_counts(&self) -> MutexGuard<'_, CacheCounts> {
        self.shared.lock_counts()
    }
}

impl Shared {
    fn look(&self, digest: &Digest, bytes: u64) -> io::Result<Option<Mmap>> {
        let path = self.room.object(digest);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        room::touch(&file);
        let version = version(&file)?;
        if self.lock_verified().get(digest) != Some(&version) {
            // Read, not mapped: a failing disk is an error here, and would be a signal there.
            if !Digest::of_reader(&file).is_ok_and(|found| found == (*digest, bytes)) {
                tracing::warn!(path = %path.display(), "the cache's copy is damaged; it is fetched anew");
                self.lock_counts().corrupt += 1;
                room::remove(&path)?;
                return Ok(None);
            }
            self.lock_verified().insert(*digest, version);
        }
        self.lock_counts().hits += 1;
        map(&file).map(Some)
    }

    fn lock_verified(&self) -> MutexGuard<'_, HashMap<Digest, Version>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_counts(&self) -> MutexGuard<'_, CacheCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fetches the object into a file, and checks it on the way.
async fn fetch(store: &Store, key: &str, recorded: (&Digest, u64), file: File) -> Result<(), Miss> {
    let mut file = tokio::fs::File::from_std(file);
    let mut hasher = Hasher::new();
    let mut chunks = store.stream_sized(key, recorded.1);
    while let Some(chunk) = chunks.try_next().await.map_err(Miss::Store)? {
        hasher.update(&chunk);
        file.write_all(&chunk).await?;
    }
    check(store, key, recorded, (&hasher.finish(), hasher.bytes())).map_err(Miss::Store)?;
    Ok(file.flush().await?)
}

fn version(file: &File) -> io::Result<Version> {
    let meta = file.metadata()?;
    Ok((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
}

fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: files under `objects` are whole when they get that name, and are removed but never changed. Should someone truncate one
    // while it is mapped, the process gets a bus error; there is no way to map a file that excludes this.
    unsafe { Mmap::map(file) }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
