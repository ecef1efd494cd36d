//! Open files of a data set: shards and features, kept open by their digest, the least recently used closed first.
//!
//! Local files are mapped, and take no memory of their own. Others are fetched: into this machine's cache, if there is one, and mapped from
//! there; or else into memory, within [`CacheLimits::bytes`].

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ella_store::{CacheCounts, Digest, DiskCache, Store, StoreError};
use tokio::sync::Mutex as Gate;
use tokio::time::{Instant, timeout_at};

use crate::content::{Content, map};
use crate::error::DataError;
use crate::manifest::{ShardEntry, at};
use crate::room::{Memory, Room, Share};
use crate::tree;

/// How long a row waits for room in memory while other readers hold all of it.
const PATIENCE: Duration = Duration::from_secs(60);
/// A reader that lets go of a file tells nobody: whoever waits for room looks again after this long.
const LOOK: Duration = Duration::from_millis(20);

/// How much is kept open.
#[derive(Clone, Copy, Debug)]
pub struct CacheLimits {
    /// Files open at once, at least one.
    pub shards: usize,
    /// Bytes of files held in memory (fetched ones; mapped files do not count, nor what a disk holds), shards and features together.
    pub bytes: u64,
}

impl Default for CacheLimits {
    /// 4096 files, 2 GiB.
    fn default() -> CacheLimits {
        CacheLimits { shards: 4096, bytes: 2 << 30 }
    }
}

/// How files came to be open (KNOWN).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Because a row was wanted at once.
    pub wanted: u64,
    /// Ahead of use.
    pub ahead: u64,
}

/// A file of a data set or of its features.
#[derive(Clone, Copy)]
pub(crate) struct FileAt<'a> {
    pub(crate) store: &'a Store,
    pub(crate) entry: &'a ShardEntry,
    /// What to do if it is not there.
    pub(crate) hint: &'static str,
}

/// Why a file is opened.
#[derive(Clone, Copy)]
enum Why<'a> {
    /// A row is wanted: others make room.
    Wanted,
    /// It will be: those that are wanted before stay.
    Ahead(&'a HashSet<Digest>),
}

/// How an open file is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// Mapped where it lies.
    Mapped,
    /// Mapped from this machine's cache.
    Cached,
    /// In memory.
    Memory,
}

pub(crate) struct Files {
    limits: CacheLimits,
    room: Arc<Room>,
    cache: Option<Cache>,
    state: Mutex<State>,
}

/// This machine's cache. What it evicts takes its disk space until it is closed here, so no more is kept open than it may hold.
struct Cache {
    disk: DiskCache,
    room: Arc<Room>,
}

#[derive(Default)]
struct State {
    open: HashMap<Digest, Open>,
    /// One opener of a file at a time.
    gates: HashMap<Digest, Arc<Gate<()>>>,
    /// Local files of which every byte was checked: not again by this process.
    checked: HashSet<Digest>,
    /// Counts uses.
    clock: u64,
    opened: Opened,
}

struct Open {
    file: Arc<dyn Any + Send + Sync>,
    content: Content,
    held: Held,
    used: u64,
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Files").field("limits", &self.limits).field("memory", &self.room.memory()).finish_non_exhaustive()
    }
}

impl Files {
    pub(crate) fn new(limits: CacheLimits, cache: Option<DiskCache>) -> Files {
        let cache = cache.map(|disk| Cache { room: Room::new(disk.bound()), disk });
        Files { limits, room: Room::new(limits.bytes), cache, state: Mutex::default() }
    }

    pub(crate) fn memory(&self) -> Memory {
        self.room.memory()
    }

    /// What this machine's cache did for this process, if there is one.
    pub(crate) fn cache(&self) -> Option<CacheCounts> {
        self.cache.as_ref().map(|cache| cache.disk.counts())
    }

    pub(crate) fn opened(&self) -> Opened {
        self.state().opened
    }

    /// An open file. The first use opens it; whoever holds one keeps it, though it be closed here.
    pub(crate) async fn open<T: Send + Sync + 'static>(
        &self,
        file: FileAt<'_>,
        parse: impl FnOnce(Content) -> Result<T, DataError> + Send + 'static,
    ) -> Result<Arc<T>, DataError> {
        if let Some(there) = self.there(&file.entry.blake3) {
            return Ok(there);
        }
        let crowded = || DataError::Crowded { limit: self.limits.bytes, file: at(file.store, &file.entry.name), bytes: file.entry.bytes };
        self.admit(file, Why::Wanted, |file| file, parse).await?.ok_or_else(crowded)
    }

    /// Opens a file ahead of use, if there is room without closing one of `keep`. Whether it is open.
    pub(crate) async fn open_ahead<T: Send + Sync + 'static>(
        &self,
        file: FileAt<'_>,
        keep: &HashSet<Digest>,
        parse: impl FnOnce(Content) -> Result<T, DataError> + Send + 'static,
    ) -> Result<bool, DataError> {
        if self.state().open.contains_key(&file.entry.blake3) {
            return Ok(true);
        }
        // The file is let go of at once: nobody but the cache holds it.
        Ok(self.admit(file, Why::Ahead(keep), drop, parse).await?.is_some())
    }

    /// A file, if it is open, or local and opened at no cost.
    pub(crate) async fn open_mapped<T: Send + Sync + 'static>(
        &self,
        file: FileAt<'_>,
        parse: impl FnOnce(Content) -> Result<T, DataError> + Send + 'static,
    ) -> Result<Option<Arc<T>>, DataError> {
        if file.store.local_path().is_none() {
            return Ok(self.there(&file.entry.blake3));
        }
        self.open(file, parse).await.map(Some)
    }

    /// Closes a file that is no good: it may be put right before it is wanted again.
    pub(crate) fn close(&self, digest: &Digest) {
        self.state().open.remove(digest);
    }

    /// Opens a file that was not open, once for all who want it. None: no room. `give` says what the caller gets of it.
    async fn admit<T: Send + Sync + 'static, G>(
        &self,
        file: FileAt<'_>,
        why: Why<'_>,
        give: impl FnOnce(Arc<T>) -> G,
        parse: impl FnOnce(Content) -> Result<T, DataError> + Send + 'static,
    ) -> Result<Option<G>, DataError> {
        let digest = file.entry.blake3;
        let gate = Arc::clone(self.state().gates.entry(digest).or_default());
        let _alone = gate.lock().await;
        if let Some(there) = self.there(&digest) {
            return Ok(Some(give(there)));
        }
        let Some((content, held)) = self.content(file, why).await? else { return Ok(None) };
        let kept = content.clone();
        // Reads the file's structure from disk: not on a thread that others wait for.
        let opened = Arc::new(blocking(file, move || parse(content)).await?);
        let given = give(Arc::clone(&opened));
        self.keep(digest, Open { file: opened, content: kept, held, used: 0 }, why);
        Ok(Some(given))
    }

    /// A file's bytes: mapped if it is local, else fetched. None: no room.
    async fn content(&self, file: FileAt<'_>, why: Why<'_>) -> Result<Option<(Content, Held)>, DataError> {
        let Some(folder) = file.store.local_path() else {
            return match &self.cache {
                Some(cache) => self.fetch_to_disk(cache, file, why).await,
                None => self.fetch(file, why).await,
            };
        };
        let name = at(file.store, &file.entry.name);
        let missing = DataError::RecordMissing { file: name.clone(), hint: file.hint };
        let (path, tree) = (folder.join(&file.entry.name), folder.join(tree::key(&file.entry.name)));
        let (digest, checked) = (file.entry.blake3, self.state().checked.contains(&file.entry.blake3));
        let mapped = blocking(file, move || {
            if !path.exists() {
                return Err(missing);
            }
            let content = Content::map(&name, &path)?;
            // A tree that cannot be read is as good as none.
            if checked { Ok(content) } else { content.unchecked(digest, map(&tree).ok().map(Bytes::from_owner)) }
        });
        mapped.await.map(|content| Some((content, Held::Mapped)))
    }

    /// Maps a file from this machine's cache, which checks it, and fetches it if need be. Where the cache is of no use, memory is.
    async fn fetch_to_disk(&self, cache: &Cache, file: FileAt<'_>, why: Why<'_>) -> Result<Option<(Content, Held)>, DataError> {
        let FileAt { store, entry, hint } = file;
        let mut share = None;
        if entry.bytes <= cache.disk.bound() {
            share = self.share(entry.bytes, Held::Cached, why).await;
            match (&share, why) {
                (None, Why::Ahead(_)) => return Ok(None),
                (None, Why::Wanted) => return self.fetch(file, why).await,
                (Some(_), _) => {}
            }
        }
        let mapped = match cache.disk.map(store, &entry.name, &entry.blake3, entry.bytes).await {
            Err(StoreError::NotFound { .. }) => return Err(DataError::RecordMissing { file: at(store, &entry.name), hint }),
            mapped => mapped?,
        };
        let evicted = |digest: &Digest, open: &Open| open.is_idle(Held::Cached) && !cache.disk.has(digest);
        while self.close_oldest(evicted) {}
        match mapped {
            Some(map) => Ok(Some((Content::mapped(&at(store, &entry.name), map, share), Held::Cached))),
            None => self.fetch(file, why).await,
        }
    }

    /// Fetches a file into memory, and checks it.
    async fn fetch(&self, file: FileAt<'_>, why: Why<'_>) -> Result<Option<(Content, Held)>, DataError> {
        let FileAt { store, entry, hint } = file;
        let Some(share) = self.share(entry.bytes, Held::Memory, why).await else { return Ok(None) };
        let name = at(store, &entry.name);
        // Of a size that another file has nothing is read: the share is that of the one recorded.
        let bytes = match store.get_sized(&entry.name, entry.bytes).await {
            Err(StoreError::NotFound { .. }) => return Err(DataError::RecordMissing { file: name, hint }),
            read => read?,
        };
        let digest = entry.blake3;
        blocking(file, move || Content::good(&name, Bytes::from_owner(Fetched { bytes, _share: share })).unchecked(digest, None))
            .await
            .map(|content| Some((content, Held::Memory)))
    }

    /// Room for a file that is held in one way. Whoever wants a row waits for it, though not for ever.
    async fn share(&self, bytes: u64, held: Held, why: Why<'_>) -> Option<Share> {
        let room = if held == Held::Cached { &self.cache.as_ref()?.room } else { &self.room };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let freed = room.freed.notified();
            loop {
                if let Some(share) = room.take(bytes) {
                    return Some(share);
                }
                let closed = match why {
                    Why::Wanted => self.close_oldest(|_, open| open.is_idle(held)),
                    Why::Ahead(keep) => self.close_oldest(|digest, open| open.is_idle(held) && !keep.contains(digest)),
                };
                if !closed {
                    break;
                }
            }
            if matches!(why, Why::Ahead(_)) || Instant::now() >= deadline {
                return None;
            }
            let _ = timeout_at(deadline.min(Instant::now() + LOOK), freed).await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file that is open.
    fn there<T: Send + Sync + 'static>(&self, digest: &Digest) -> Option<Arc<T>> {
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        let open = state.open.get_mut(digest)?;
        open.used = clock;
        Arc::clone(&open.file).downcast().ok()
    }

    /// Keeps a newly opened file, and closes the least recently used ones beyond the limit.
    fn keep(&self, digest: Digest, open: Open, why: Why<'_>) {
        let mut state = self.state();
        state.gates.remove(&digest);
        state.clock += 1;
        let used = state.clock;
        state.open.insert(digest, Open { used, ..open });
        match why {
            Why::Wanted => state.opened.wanted += 1,
            Why::Ahead(_) => state.opened.ahead += 1,
        }
        let surplus = state.open.len().saturating_sub(self.limits.shards.max(1));
        drop(state);
        // A fetched file that somebody holds stays: closing it would give nothing back.
        (0..surplus).for_each(|_| {
            self.close_oldest(|other, open| *other != digest && (open.held == Held::Mapped || open.is_idle(open.held)));
        });
        for room in [Some(&self.room), self.cache.as_ref().map(|cache| &cache.room)].into_iter().flatten() {
            room.freed.notify_waiters();
        }
    }

    /// Closes the least recently used file of those that may be closed, if there is one.
    fn close_oldest(&self, may: impl Fn(&Digest, &Open) -> bool) -> bool {
        let mut state = self.state();
        let oldest = state.open.iter().filter(|(digest, open)| may(digest, open)).min_by_key(|(_, open)| open.used);
        let Some(digest) = oldest.map(|(digest, _)| *digest) else { return false };
        let closed = state.open.remove(&digest);
        if closed.as_ref().is_some_and(|open| open.held == Held::Mapped && open.content.is_checked()) {
            state.checked.insert(digest);
        }
        drop(state);
        // Unmapping takes its time: not while others wait for the lock.
        drop(closed);
        true
    }
}

impl Open {
    /// Whether it is held in that way, and closing it gives its room back: nobody else holds it.
    fn is_idle(&self, held: Held) -> bool {
        self.held == held && Arc::strong_count(&self.file) == 1
    }
}

/// Fetched bytes, and their share of the room.
struct Fetched {
    bytes: Bytes,
    _share: Share,
}

impl AsRef<[u8]> for Fetched {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

async fn blocking<T: Send + 'static>(
    file: FileAt<'_>,
    work: impl FnOnce() -> Result<T, DataError> + Send + 'static,
) -> Result<T, DataError> {
    let stopped = |e: tokio::task::JoinError| DataError::Stopped { source_name: at(file.store, &file.entry.name), what: e.to_string() };
    tokio::task::spawn_blocking(work).await.map_err(stopped)?
}
