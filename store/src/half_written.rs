//! Half-written files on a local store, and who may delete them.
//!
//! A file is written beside its final name, as `NAME#1`, and renamed when it is whole. A writer that is killed leaves that behind; a writer
//! that lives needs it. To tell the two apart, a writer holds a shared lock on the folder while it writes (`flock`, which the system takes
//! back from the dead), and who sweeps needs the exclusive one. Elsewhere than on a local store nothing half-written can be seen.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep};

use crate::error::{Operation, Place, StoreError};
use crate::store::Store;

/// How long the one waits for the other's lock.
const WAIT: Duration = Duration::from_secs(2);
/// Between two tries at a lock.
const PAUSE: Duration = Duration::from_millis(3);

/// Held by whoever writes into a folder; none where locks are not to be had, for there nobody can sweep either.
pub(crate) struct Writing {
    _lock: Option<File>,
}

impl Writing {
    /// Begins to write what will lie at `file`; its folder is made if need be. Waits while the folder is swept.
    async fn begin(file: PathBuf, place: Place<'_>) -> Result<Writing, StoreError> {
        let open = move || {
            let folder = file.parent()?;
            // What is wrong with a folder, the write itself says better.
            std::fs::create_dir_all(folder).and_then(|()| File::open(folder)).ok()
        };
        let Ok(Some(folder)) = spawn_blocking(open).await else { return Ok(Writing { _lock: None }) };
        match lock(&folder, File::try_lock_shared).await {
            Ok(true) => Ok(Writing { _lock: Some(folder) }),
            Ok(false) => Err(place.unavailable("the folder is being swept")),
            Err(_) => Ok(Writing { _lock: None }),
        }
    }
}

/// Whether the lock was had in time.
async fn lock(folder: &File, attempt: fn(&File) -> Result<(), TryLockError>) -> io::Result<bool> {
    let deadline = Instant::now() + WAIT;
    loop {
        match attempt(folder) {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Ok(false),
            Err(TryLockError::WouldBlock) => sleep(PAUSE).await,
        }
    }
}

impl Store {
    /// To be held while an object is written; nothing elsewhere than on a local store.
    pub(crate) async fn writing(&self, key: &str, place: Place<'_>) -> Result<Option<Writing>, StoreError> {
        let Some(root) = self.local_path() else { return Ok(None) };
        Writing::begin(root.join(key), place).await.map(Some)
    }

    /// The names of half-written files directly in a folder (`""`: this one): of writers that were killed, or that write now.
    ///
    /// # Errors
    /// `Permission` or `Other` for a folder that can't be listed.
    pub async fn half_written(&self, folder: &str) -> Result<Vec<String>, StoreError> {
        let Some(path) = self.folder_on_disk(folder) else { return Ok(Vec::new()) };
        let found = spawn_blocking(move || find(&path)).await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)));
        let names = found.map_err(|error| self.place(Operation::List, folder).io(error))?;
        Ok(names.into_iter().map(|name| if folder.is_empty() { name } else { format!("{folder}/{name}") }).collect())
    }

    /// Deletes what killed writers left half-written directly in a folder (`""`: this one), and gives how many there were. If somebody
    /// writes there for longer than two seconds, or the file system has no locks to tell, all is left for another time.
    ///
    /// # Errors
    /// `Permission` or `Other` for a folder that can't be listed, or a file that can't be deleted.
    pub async fn sweep(&self, folder: &str) -> Result<usize, StoreError> {
        let Some(path) = self.folder_on_disk(folder) else { return Ok(0) };
        let failed = |error| self.place(Operation::Delete, folder).io(error);
        let opened = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
            opened => opened.map_err(failed)?,
        };
        if !lock(&opened, File::try_lock).await.unwrap_or(false) {
            tracing::debug!(folder = %path.display(), "not swept: it is written to, or has no locks");
            return Ok(0);
        }
        let swept = spawn_blocking(move || {
            let names = find(&path)?;
            names.iter().try_for_each(|name| std::fs::remove_file(path.join(name)))?;
            // Held until here.
            drop(opened);
            Ok(names.len())
        });
        swept.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped))).map_err(failed)
    }

    fn folder_on_disk(&self, folder: &str) -> Option<PathBuf> {
        self.local_path().map(|root| root.join(folder))
    }
}

/// Names that end in `#` and a number; none in a folder that is not there.
fn find(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let number = name.rsplit_once('#').map_or("", |(_, number)| number);
        if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
