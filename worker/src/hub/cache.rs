//! The cache that all of Hugging Face's tools share: `models--ORG--NAME/{blobs,refs,snapshots}`, as huggingface_hub lays it out.
//!
//! A blob appears whole or not at all; a snapshot's links are made when all of its blobs are there, and its ref last. So what is found
//! offline is what was wanted, and an interrupted download leaves only an `.incomplete` blob, which the next one goes on with.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::{HubError, HubId};

/// How long another process may hold a file's lock without getting further.
const STALLED: Duration = Duration::from_secs(120);
/// How often the lock is tried.
const POLL: Duration = Duration::from_millis(200);

/// One repository's part of the cache.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    name: String,
}

impl Cache {
    pub(super) fn new(root: &Path, repo: &str) -> Self {
        Cache { root: root.into(), name: format!("models--{}", repo.replace('/', "--")) }
    }

    fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// Where a commit's files are.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    /// Where contents are, by the name that the hub has for them.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder().join("blobs").join(etag)
    }

    /// What was downloaded before: the file that `id` names, or the snapshot's folder.
    pub(super) fn find(&self, id: &HubId) -> Result<PathBuf, HubError> {
        let named = fs::read_to_string(self.folder().join("refs").join(id.revision()));
        let commit = named.map_or_else(|_| id.revision().to_owned(), |commit| commit.trim().to_owned());
        let found = id.file().map_or_else(|| self.snapshot(&commit), |file| self.snapshot(&commit).join(file));
        if found.exists() { Ok(found) } else { Err(HubError::NotCached { id: Box::new(id.clone()), cache: self.root.clone() }) }
    }

    /// Waits for a blob's lock, which huggingface_hub honours too. It is free again when the file is dropped.
    pub(super) fn lock(&self, etag: &str, incomplete: &Path) -> Result<File, HubError> {
        let path = self.root.join(".locks").join(&self.name).join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = File::options().create(true).append(true).open(&path).map_err(|source| disk(&path, source))?;
        let mut seen = (length(incomplete), Instant::now());
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(disk(&path, error.into())),
            }
            if length(incomplete) != seen.0 {
                seen = (length(incomplete), Instant::now());
            } else if seen.1.elapsed() > STALLED {
                return Err(HubError::Busy { lock: path, seconds: STALLED.as_secs() });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Links a snapshot's files to their blobs, and then names the commit by the revision that was asked for.
    pub(super) fn publish(&self, commit: &str, revision: &str, files: &[(String, String)]) -> Result<(), HubError> {
        for (file, etag) in files {
            let link = self.snapshot(commit).join(file);
            if link.exists() {
                continue;
            }
            make_parent(&link)?;
            // Relative, so that the cache can be moved: up from the file's folder to the repository's.
            let up = "../".repeat(2 + file.matches('/').count());
            let temporary = link.with_extension(format!("link-{}", std::process::id()));
            let _ = fs::remove_file(&temporary);
            std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &temporary).map_err(|source| disk(&temporary, source))?;
            fs::rename(&temporary, &link).map_err(|source| disk(&link, source))?;
        }
        if commit == revision {
            return Ok(());
        }
        let name = self.folder().join("refs").join(revision);
        make_parent(&name)?;
        let temporary = name.with_extension(format!("ref-{}", std::process::id()));
        fs::write(&temporary, commit).map_err(|source| disk(&temporary, source))?;
        fs::rename(&temporary, &name).map_err(|source| disk(&name, source))
    }
}

/// The error of a file or folder of the cache.
pub(super) fn disk(path: &Path, source: io::Error) -> HubError {
    HubError::Disk { path: path.into(), source }
}

/// A file's length; 0 where there is none.
pub(super) fn length(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |found| found.len())
}

pub(super) fn make_parent(path: &Path) -> Result<(), HubError> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(|source| disk(folder, source)),
        None => Ok(()),
    }
}
