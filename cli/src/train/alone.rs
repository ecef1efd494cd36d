//! One `ella train` for a run on a disk of this machine: a second one would take the run over, and the first lose what came after its last commit.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::ui::{Fail, shell};

/// In the run's folder; whoever trains the run keeps it locked, and has written in it who that is. The kernel ends the lock with the process,
/// however that ends, and no child inherits it: so nothing is left behind that would keep a run from its resume.
const LOCK: &str = "logs/train.lock";
/// How long one that was just killed may take to be gone.
const GOING: Duration = Duration::from_secs(1);

/// Locks the run in this folder, which is also to be shown as `run`, until the file that is given is closed. None: there are no locks here, as on
/// some file systems of a network, or no writing, of which others tell; the later one takes the run over then (TERM).
pub(super) fn lock(folder: &Path, run: &str) -> Result<Option<File>, Fail> {
    let path = folder.join(LOCK);
    let opened = std::fs::create_dir_all(folder.join("logs"))
        .and_then(|()| File::options().read(true).write(true).create(true).truncate(false).open(&path));
    let Ok(mut file) = opened else { return Ok(None) };
    let until = Instant::now() + GOING;
    loop {
        match file.try_lock() {
            Ok(()) => break,
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(TryLockError::WouldBlock) => return Err(taken(&path, run)),
        }
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    // For people alone.
    let _ = file.set_len(0).and_then(|()| write!(file, "process {} on {}", std::process::id(), host.trim()));
    Ok(Some(file))
}

fn taken(path: &Path, run: &str) -> Fail {
    let who = std::fs::read_to_string(path).ok().filter(|who| !who.is_empty()).unwrap_or_else(|| "another process".to_owned());
    let look = shell(run);
    Fail::failed(format_args!("run.output: {run} is being trained by {who}; stop that first, or look at the run: ella top {look}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::FAILED;

    #[test]
    fn a_run_is_trained_by_one_at_a_time_and_at_once_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path(), "runs/a b").unwrap().unwrap();
        let fail = lock(dir.path(), "runs/a b").unwrap_err();
        let who = format!("run.output: runs/a b is being trained by process {} on ", std::process::id());
        assert!(
            fail.code == FAILED && fail.message.starts_with(&who) && fail.message.ends_with(": ella top 'runs/a b'"),
            "{}",
            fail.message
        );
        drop(first);
        assert!(lock(dir.path(), "runs/a b").unwrap().is_some());
    }

    #[test]
    fn where_nothing_can_be_written_no_lock_keeps_anyone_away() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("logs"), "a file").unwrap();
        assert!(lock(dir.path(), "r").unwrap().is_none());
    }
}
