//! The cache's folder: names, locks, and the bound.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, FlockOperation, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fallocate, flock, futimens};
use rustix::io::Errno;
use tokio::time::{Instant, sleep};

use super::blocking;
use crate::digest::Digest;

/// How long to wait for a process that makes room, which takes milliseconds.
pub(super) const LOCK_DEADLINE: Duration = Duration::from_secs(10);
/// The longest pause between two looks at a lock: the kernel tells no one when it comes free.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Where the cache lies, and how much it may hold.
#[derive(Clone, Debug)]
pub(super) struct Room {
    pub(super) folder: PathBuf,
    pub(super) bound: u64,
}

impl Room {
    pub(super) fn create(&self) -> io::Result<()> {
        fs::create_dir_all(self.folder.join("objects"))?;
        fs::create_dir_all(self.folder.join("fill"))
    }

    pub(super) fn object(&self, digest: &Digest) -> PathBuf {
        self.folder.join("objects").join(digest.to_string())
    }

    pub(super) fn fill(&self, digest: &Digest) -> PathBuf {
        self.folder.join("fill").join(digest.to_string())
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.folder.join("lock")
    }
}

/// A file that this process alone may write. Dropped, the file goes too, unless it was given its final name.
#[derive(Debug)]
pub(super) struct Claim {
    file: File,
    /// The name to remove in the end; empty if there is none.
    path: PathBuf,
}

impl Claim {
    /// Waits for the claim on `path` until the deadline.
    pub(super) async fn wait(path: PathBuf, deadline: Duration) -> io::Result<Option<Self>> {
        Ok(lock(path.clone(), deadline).await?.map(|file| Self { file, path }))
    }

    /// The file to write; the claim stands as long as any of these is open.
    pub(super) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Gives the file its final name.
    pub(super) fn publish(mut self, to: &Path) -> io::Result<File> {
        fs::rename(&self.path, to)?;
        self.path = PathBuf::new();
        self.file.try_clone()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock is still held here. Whoever waits for it finds that the name is gone, and makes the file anew.
        if !self.path.as_os_str().is_empty() {
            let _ = remove(&self.path);
        }
    }
}

/// Waits until the deadline for the lock on `path`, which ends when the file is closed, or with the process.
pub(super) async fn lock(path: PathBuf, deadline: Duration) -> io::Result<Option<File>> {
    let (end, mut pause) = (Instant::now() + deadline, Duration::from_millis(1));
    loop {
        let wanted = path.clone();
        if let Some(file) = blocking(move || try_lock(&wanted, true)).await? {
            return Ok(Some(file));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

/// Locks the file, if no one else has it locked and it still bears its name then.
fn try_lock(path: &Path, create: bool) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).create(create).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK | Errno::INTR) => return Ok(None),
        locked => locked?,
    }
    let inode = |meta: Metadata| (meta.dev(), meta.ino());
    let ours = inode(file.metadata()?);
    Ok(fs::metadata(path).is_ok_and(|named| inode(named) == ours).then_some(file))
}

/// Removes a file; one that is not there counts as removed.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Notes that the file was used: what was not for longest is evicted first. Another user's file can't be marked, and goes sooner.
pub(super) fn touch(file: &File) {
    let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let _ = futimens(file, &Timestamps { last_access: time(UTIME_NOW), last_modification: time(UTIME_OMIT) });
}

/// Whether an error says that the disk or the quota is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What was removed to make room.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Evicted {
    pub(super) objects: u64,
    pub(super) bytes: u64,
}

/// Evicts what was not used for longest until `bytes` more fit, and reserves them in `file`. Whether that could be done: what others are
/// fetching can't be evicted. The caller holds the cache's lock.
pub(super) fn make_room(room: &Room, file: Option<&File>, bytes: u64, evicted: &mut Evicted) -> io::Result<bool> {
    // What a killed process left in it does not count.
    file.map_or(Ok(()), |file| file.set_len(0))?;
    // In this order, what gets its final name meanwhile counts twice; in the other, not at all.
    let filling = filling(room)?;
    let mut objects = files(&room.folder.join("objects"))?;
    objects.sort_by_key(|object| object.used);
    let mut held = filling + objects.iter().map(|object| object.bytes).sum::<u64>();
    let mut oldest = objects.into_iter();
    loop {
        let fits = held.saturating_add(bytes) <= room.bound;
        if fits {
            match file.map_or(Ok(()), |file| reserve(file, bytes)) {
                // The disk is smaller than the bound. As much as is wanted is given up for it, and no more: others may fill it as well.
                Err(error) if is_full(&error) && evicted.bytes < bytes => {}
                reserved => return reserved.map(|()| true),
            }
        }
        let Some(victim) = oldest.next() else {
            return if fits { Err(io::ErrorKind::StorageFull.into()) } else { Ok(false) };
        };
        remove(&victim.path)?;
        held -= victim.bytes;
        evicted.objects += 1;
        evicted.bytes += victim.bytes;
    }
}

/// Takes the disk space at once, where the file system can: better no room now than half an object later.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(bytes),
        reserved => Ok(reserved?),
    }
}

/// The bytes being fetched. What killed processes left is removed: no one has it locked.
fn filling(room: &Room) -> io::Result<u64> {
    let mut bytes = 0;
    for file in files(&room.folder.join("fill"))? {
        match try_lock(&file.path, false) {
            Ok(None) => bytes += file.bytes,
            Ok(Some(_lock)) => remove(&file.path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

struct Entry {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// The files of ours in a folder; what bears no digest's name is not.
fn files(folder: &Path) -> io::Result<Vec<Entry>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let ours = entry.file_name().to_str().is_some_and(|name| name.parse::<Digest>().is_ok());
        // It may be gone by now.
        if let Some(meta) = entry.metadata().ok().filter(|meta| ours && meta.is_file()) {
            found.push(Entry { path: entry.path(), bytes: meta.len(), used: meta.accessed()? });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

    use super::*;

    /// A lock on a file that lost its name meanwhile is no claim: else two would fetch one object into one name.
    #[test]
    fn of_many_that_claim_make_and_remove_a_name_one_holds_it_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (path, held, rounds) = (folder.path().join("name"), AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while rounds.load(SeqCst) < 500 {
                        let Some(file) = try_lock(&path, true).unwrap() else { continue };
                        assert!(!held.swap(true, SeqCst), "two hold it");
                        std::thread::yield_now();
                        held.store(false, SeqCst);
                        drop(Claim { file, path: path.clone() });
                        rounds.fetch_add(1, SeqCst);
                    }
                });
            }
        });
        assert!(!path.exists());
    }
}
