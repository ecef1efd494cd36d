//! Bad input of every kind, given to the real command: one clear line that names file, field and rule, the exit code that says whose
//! fault it is, and nothing harmed that was there before.

mod cloud;
mod commands;
mod commits;
mod config;
mod data;
mod disk;
mod models;
mod sources;
mod tokens;

use anyhow::{Context as _, Result};
use ella_tests::{Run, World, ella, try_ella};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex, PoisonError};

/// Failed; trying again may help.
const FAILED: i32 = 1;
/// Bad usage or config.
const USAGE: i32 = 2;
/// Failed in a way that a restart would repeat.
const PERMANENT: i32 = 4;

/// The shared run's last connector.
const CONNECTOR: &str = "run/commits/000000000006.1/connector.safetensors";

/// What all tests share, and none of them changes: each damages a copy.
struct Shared {
    world: World,
    /// A run of 6 steps with commits of step 2, 4 and 6.
    run: Run,
}

static SHARED: Mutex<Option<Arc<Shared>>> = Mutex::new(None);

/// The shared world, made by whoever comes first, and removed when the process ends.
fn shared() -> Result<Arc<Shared>> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(shared) = &*shared {
        return Ok(shared.clone());
    }
    let world = World::new(48)?;
    let run = world.run("run", 6, "[checkpoint]\nevery = 2\n")?;
    ella(&run.train(&[]))?;
    // SAFETY: the handler is a plain function without arguments, which stays for the process's life.
    unsafe { libc::atexit(remove_shared) };
    Ok(shared.insert(Arc::new(Shared { world, run })).clone())
}

extern "C" fn remove_shared() {
    SHARED.lock().unwrap_or_else(PoisonError::into_inner).take();
}

impl Shared {
    /// A path of the world, as an argument.
    fn path(&self, name: &str) -> String {
        self.world.path(name).display().to_string()
    }

    /// A copy of one of the world's folders.
    fn copy(&self, name: &str, to: &str) -> Result<PathBuf> {
        let to = self.world.path(to);
        copy(&self.world.path(name), &to)?;
        Ok(to)
    }

    /// A new run of that name that fails before it has trained, under a config with these overrides.
    #[track_caller]
    fn train_refused(&self, name: &str, set: &[&str], code: i32, words: &[&str]) -> Result<()> {
        let run = self.world.run(name, 4, "")?;
        refused(try_ella(&run.train(set))?, code, words);
        assert!(run.commits().is_ok_and(|commits| commits.is_empty()), "{name}: a run that was refused has commits");
        Ok(())
    }
}

/// It failed with this code, without a panic, and with one line that says all of these things. Gives the line.
#[track_caller]
fn refused(output: Output, code: i32, words: &[&str]) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("ella: ")).collect();
    assert_eq!(output.status.code(), Some(code), "expected {words:?}:\n{said}{}", String::from_utf8_lossy(&output.stdout));
    assert!(lines.len() == 1 && !said.contains("panicked"), "expected one line about {words:?}:\n{said}");
    for word in words {
        assert!(lines[0].contains(word), "expected {word:?}:\n{said}");
    }
    lines[0].to_owned()
}

/// The same of `ella` with these arguments.
#[track_caller]
fn ella_refused<S: AsRef<str>>(arguments: &[S], code: i32, words: &[&str]) -> Result<()> {
    refused(try_ella(arguments)?, code, words);
    Ok(())
}

/// Every file below a folder, by its path in it.
fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(&at).with_context(|| at.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(folder)?.display().to_string(), std::fs::read(&path)?);
            }
        }
    }
    Ok(found)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    for (name, bytes) in files(from)? {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().context("a file without a folder")?)?;
        std::fs::write(path, bytes)?;
    }
    Ok(())
}

/// Changes one bit in the middle of a file.
fn flip(path: &Path) -> Result<()> {
    let mut bytes = std::fs::read(path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    Ok(std::fs::write(path, bytes)?)
}

/// Cuts a file to its first half.
fn cut(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path)?;
    Ok(std::fs::write(path, &bytes[..bytes.len() / 2])?)
}
