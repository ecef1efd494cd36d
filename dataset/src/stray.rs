//! What killed writers left half-written on a local store. Elsewhere nothing half-written can be seen.

use std::path::PathBuf;

use ella_store::Store;

use crate::error::DataError;

/// Files in these folders of a store that a writer began and did not finish: the store writes beside the final name, with `#` and a
/// number after it.
pub(crate) fn find_stray(store: &Store, folders: &[&str]) -> Result<Vec<PathBuf>, DataError> {
    let Some(root) = store.local_path() else { return Ok(Vec::new()) };
    let mut stray = Vec::new();
    for folder in folders.iter().map(|folder| root.join(folder)).filter(|folder| folder.is_dir()) {
        let io = |source| DataError::Io { path: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let number = path.file_name().and_then(|name| name.to_str()?.rsplit_once('#').map(|(_, number)| number.to_owned()));
            if number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())) {
                stray.push(path);
            }
        }
    }
    stray.sort();
    Ok(stray)
}

/// Deletes them. To be called when all work is done: a writer that still lives fails, and its work was done by another.
pub(crate) fn remove_stray(store: &Store, folders: &[&str]) -> Result<(), DataError> {
    for path in find_stray(store, folders)? {
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(DataError::Io { path, source }),
            _ => {}
        }
    }
    Ok(())
}
