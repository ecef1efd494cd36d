//! Files that are there whole, or not at all: others see the old one or the new one.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::ui::Fail;

/// Writes the file, whole or not at all. A link stays one; what is no file, as a pipe or a terminal, takes the bytes as they come.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<usize, Fail> {
    let failed = |error: &std::io::Error| Fail::io(path, "written", error);
    let target = match std::fs::metadata(path) {
        Ok(there) if !there.is_file() => {
            std::fs::write(path, bytes).map_err(|error| failed(&error))?;
            return Ok(bytes.len());
        }
        Ok(_) => std::fs::canonicalize(path).map_err(|error| failed(&error))?,
        Err(_) => path.to_owned(),
    };
    let mut partial = partial(&target)?;
    partial.write_all(bytes).map_err(|error| failed(&error))?;
    appear(partial, &target)?;
    Ok(bytes.len())
}

/// What is to become `path`, beside it.
pub(crate) fn partial(path: &Path) -> Result<NamedTempFile, Fail> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        let (path, folder) = (path.display(), folder.display());
        return Err(Fail::lasting(format_args!("{path}: cannot be written: {folder} is no folder; make it, or name another file")));
    }
    // As readable as any other new file: else only its owner could read it.
    let mode = std::fs::Permissions::from_mode(0o666);
    tempfile::Builder::new().prefix(".ella-").permissions(mode).tempfile_in(folder).map_err(|error| Fail::io(path, "written", &error))
}

/// It takes the name that it is for.
pub(crate) fn appear(partial: NamedTempFile, path: &Path) -> Result<(), Fail> {
    replaceable(path)?;
    partial.persist(path).map(drop).map_err(|error| Fail::io(path, "written", &error.error))
}

/// Refuses what a new file must not take the name of: a device is gone then, /dev/null for every program of the machine.
pub(crate) fn replaceable(path: &Path) -> Result<(), Fail> {
    match std::fs::metadata(path) {
        Ok(there) if !there.is_file() && !there.is_dir() => {
            Err(Fail::usage(format_args!("{}: is a pipe or device, which cannot be replaced; name a file", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What had the name before is replaced, and not written over: so a disk that fills up takes nothing away.
    #[test]
    fn what_was_there_is_replaced_as_a_whole_and_links_and_folders_stay() {
        let dir = tempfile::tempdir().unwrap();
        let [file, before, link] = ["page.html", "before", "link"].map(|name| dir.path().join(name));
        std::fs::write(&file, "old").unwrap();
        std::fs::hard_link(&file, &before).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(write(&link, b"newer").unwrap(), 5);
        assert!(link.is_symlink() && std::fs::read(&file).unwrap() == b"newer");
        assert_eq!(std::fs::read(&before).unwrap(), b"old");
        assert!(write(dir.path(), b"x").is_err() && dir.path().is_dir());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is left over");
        let fail = write(&dir.path().join("no/page.html"), b"x").unwrap_err();
        assert!(fail.message.ends_with("no is no folder; make it, or name another file"), "{}", fail.message);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("null");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        let fail = appear(partial(&link).unwrap(), &link).unwrap_err();
        assert!(fail.message.contains("is a pipe or device") && link.is_symlink(), "{}", fail.message);
    }
}
