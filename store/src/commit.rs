//! Commits in the store: their folders, their verification, and what is left over of those that never came to be.

use std::fmt;

use futures::future::{BoxFuture, try_join_all};
use futures::{StreamExt, TryStreamExt, stream};

use crate::digest::{Digest, Hasher};
use crate::error::StoreError;
use crate::record::{Commit, Part};
use crate::state::RunState;
use crate::store::Store;

/// The folder of the commit of `step` in `term`, relative to the run: `commits/000000012000.7`; of a generation beyond the term's first
/// `commits/000000012000.7-2`, so that what a worker of an earlier one saves too late cannot touch it.
pub fn commit_folder(step: u64, term: u64, generation: u64) -> String {
    if generation <= 1 { format!("commits/{step:012}.{term}") } else { format!("commits/{step:012}.{term}-{generation}") }
}

/// The step and term of a commit's folder; `None` for any other text.
pub fn parse_folder(folder: &str) -> Option<(u64, u64)> {
    let (step, rest) = folder.strip_prefix("commits/")?.split_once('.')?;
    let (term, generation) = rest.split_once('-').unwrap_or((rest, "1"));
    let (step, term) = (step.parse().ok()?, term.parse().ok()?);
    (commit_folder(step, term, generation.parse().ok()?) == folder).then_some((step, term))
}

/// What is wrong with one part of a commit.
#[derive(Debug)]
pub struct Problem {
    /// The file, relative to the run.
    pub file: String,
    /// What is wrong.
    pub fault: Fault,
}

/// The ways in which a part can be wrong.
#[derive(Debug)]
pub enum Fault {
    /// It is not there.
    Missing,
    /// It has another size.
    Size {
        /// As recorded.
        expected: u64,
        /// As found.
        found: u64,
    },
    /// It has other bytes.
    Bytes {
        /// As recorded.
        expected: Digest,
        /// As found.
        found: Digest,
    },
    /// It could not be read.
    Unreadable(StoreError),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = &self.file;
        match &self.fault {
            Fault::Missing => write!(f, "{file}: missing, though the log names it"),
            Fault::Size { expected, found } => write!(f, "{file}: wrong size (expected {expected} bytes, found {found})"),
            Fault::Bytes { expected, found } => write!(f, "{file}: wrong bytes (expected blake3 {expected}, found {found})"),
            Fault::Unreadable(error) => error.fmt(f),
        }
    }
}

/// Asks for the size of every part of a commit that is to be recorded, all at once. Gives the first part that is not there as it is to be.
///
/// # Errors
/// Those of asking.
pub fn find_unseen<'a>(store: &'a Store, commit: &'a Commit) -> BoxFuture<'a, Result<Option<(&'a Part, Fault)>, StoreError>> {
    Box::pin(async move {
        let folder = store.child(&commit.folder);
        let sizes = try_join_all(commit.parts.iter().map(|part| folder.head(&part.name))).await?;
        let mut faults = commit.parts.iter().zip(sizes).filter_map(|(part, found)| match found {
            None => Some((part, Fault::Missing)),
            Some(meta) if meta.bytes != part.bytes => Some((part, Fault::Size { expected: part.bytes, found: meta.bytes })),
            Some(_) => None,
        });
        Ok(faults.next())
    })
}

/// Reads every part of a commit and compares size and digest with the record.
///
/// # Errors
/// All problems found, in the order of the parts.
pub fn verify_commit<'a>(store: &'a Store, commit: &'a Commit) -> BoxFuture<'a, Result<(), Vec<Problem>>> {
    Box::pin(async move {
        let mut problems = Vec::new();
        for part in &commit.parts {
            let file = format!("{}/{}", commit.folder, part.name);
            if let Err(fault) = verify_part(store, &file, part).await {
                problems.push(Problem { file, fault });
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    })
}

async fn verify_part(store: &Store, file: &str, part: &Part) -> Result<(), Fault> {
    let meta = store.head(file).await.map_err(Fault::Unreadable)?.ok_or(Fault::Missing)?;
    if meta.bytes != part.bytes {
        return Err(Fault::Size { expected: part.bytes, found: meta.bytes });
    }
    let mut hasher = Hasher::new();
    let mut chunks = store.stream(file);
    while let Some(chunk) = chunks.try_next().await.map_err(Fault::Unreadable)? {
        hasher.update(&chunk);
    }
    let found = hasher.finish();
    if found == part.blake3 { Ok(()) } else { Err(Fault::Bytes { expected: part.blake3, found }) }
}

/// Commit folders that can go: retired ones still there, and those of terms before `current_term` that no record names
/// (their coordinator ended before it could write the record, and can't any more: TERM).
///
/// # Errors
/// Those of listing.
pub async fn collect_leftovers(store: &Store, state: &RunState, current_term: u64) -> Result<Vec<String>, StoreError> {
    let mut folders = store.folders("commits").await?;
    folders.retain(|folder| match parse_folder(folder) {
        Some((_, term)) => {
            state.retired.contains(folder) || (term < current_term && !state.commits.iter().any(|commit| commit.folder == *folder))
        }
        None => false,
    });
    Ok(folders)
}

/// Deletes the folders that [`collect_leftovers`] found.
///
/// # Errors
/// Those of deleting; what was deleted before stays deleted.
pub async fn remove_leftovers(store: &Store, folders: &[String]) -> Result<(), StoreError> {
    stream::iter(folders).map(Ok).try_for_each(|folder| store.delete_prefix(folder)).await
}
