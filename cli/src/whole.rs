//! Files that are there whole, or not at all: others see the old one or the new one.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::ui::Fail;

/// Writes the file, whole or not at all.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<usize, Fail> {
    let mut partial = partial(path)?;
    partial.write_all(bytes).map_err(|error| Fail::io(path, "written", &error))?;
    appear(partial, path)?;
    Ok(bytes.len())
}

/// What is to become `path`, beside it.
pub(crate) fn partial(path: &Path) -> Result<NamedTempFile, Fail> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // As readable as any other new file: else only its owner could read it.
    let mode = std::fs::Permissions::from_mode(0o666);
    tempfile::Builder::new().prefix(".ella-").permissions(mode).tempfile_in(folder).map_err(|error| Fail::io(path, "written", &error))
}

/// It takes the name that it is for.
pub(crate) fn appear(partial: NamedTempFile, path: &Path) -> Result<(), Fail> {
    partial.persist(path).map(drop).map_err(|error| Fail::io(path, "written", &error.error))
}
