//! A data set in an object store, read through the machine's cache by all workers: the trained bytes are those of a local data set, each
//! file is fetched once, what is damaged in the cache is fetched anew, and the cache keeps its bound.

use anyhow::Result;
use ella_tests::s3::Bucket;
use ella_tests::{Run, World, binary, ella, kill_group, lead, wait, wait_until};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

const STEPS: u64 = 16;

struct Far<'a> {
    bucket: &'a Bucket,
    cache: PathBuf,
}

impl Far<'_> {
    fn start(&self, run: &Run, set: &[&str]) -> Result<Child> {
        let cache = format!("data.cache={}", self.cache.display());
        let mut command = Command::new(binary("ella")?);
        command.args(run.train(&[&["data.path=s3://bucket/data", &cache], set].concat())).arg("--json");
        self.bucket.lend(&mut command);
        lead(command)
    }

    /// Trains to the end; what it printed.
    fn train(&self, run: &Run, set: &[&str]) -> Result<serde_json::Value> {
        let output = wait(self.start(run, set)?)?;
        let logs = || -> String {
            let files = std::fs::read_dir(run.output.join("logs")).into_iter().flatten().flatten();
            files
                .map(|file| format!("{}:\n{}\n", file.path().display(), std::fs::read_to_string(file.path()).unwrap_or_default()))
                .collect()
        };
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), logs());
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Files and bytes in the cache.
    fn held(&self) -> Result<Vec<(PathBuf, u64)>> {
        let files = std::fs::read_dir(self.cache.join("objects"))?;
        files.map(|file| Ok((file.as_ref().map_or_else(|_| PathBuf::new(), std::fs::DirEntry::path), file?.metadata()?.len()))).collect()
    }
}

/// Shards and features, without the one row of the empty caption.
fn large(taken: &[String]) -> Vec<&String> {
    let mut large: Vec<_> = taken.iter().filter(|key| key.ends_with(".arrow") && !key.ends_with("empty.arrow")).collect();
    large.sort();
    large
}

fn arrow_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let count =
        |path: PathBuf| if path.is_dir() { arrow_files(&path) } else { usize::from(large(&[path.display().to_string()]).len() == 1) };
    entries.map(|entry| count(entry.path())).sum()
}

#[test]
fn a_data_set_elsewhere_is_fetched_once_by_all_workers_and_trains_the_same_bytes() -> Result<()> {
    let world = World::new(103)?;
    let near = world.run("near", STEPS, "[checkpoint]\nevery = 2\n")?;
    ella(&near.train(&["workers.count=1"]))?;
    let same = near.last_files()?;
    let bucket = Bucket::serve(world.path("data").parent().map_or_else(PathBuf::new, Path::to_owned))?;
    let far = Far { bucket: &bucket, cache: world.path("cache") };
    let files = arrow_files(&world.path("data"));

    // Two that fill it at once.
    let run = world.run("far", STEPS, "[checkpoint]\nevery = 2\n")?;
    let trained = far.train(&run, &["workers.count=2"])?;
    assert!(run.last_files()? == same, "a data set in a store trained other bytes");
    let taken = bucket.taken();
    let distinct: std::collections::BTreeSet<_> = large(&taken).into_iter().collect();
    assert_eq!((large(&taken).len(), distinct.len()), (files, files), "each file once: {taken:?}");
    assert_eq!(trained["read"]["cache_misses"].as_u64(), Some(files as u64), "{trained}");
    let said = String::from_utf8(std::fs::read(run.output.join("metrics/000001-000001.jsonl"))?)?;
    assert!(said.contains("cache_fetched_bytes"), "{said}");

    // One that is killed, and goes on with other workers: nothing is fetched, and what a disk forgot is.
    let (damaged, _) = far.held()?.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or_default();
    let mut bytes = std::fs::read(&damaged)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes)?;
    let run = world.run("killed", STEPS, "[checkpoint]\nevery = 2\n")?;
    let mut child = far.start(&run, &["workers.count=2"])?;
    wait_until("a commit", || run.commits().is_ok_and(|c| !c.is_empty()) || child.try_wait().is_ok_and(|s| s.is_some()))?;
    kill_group(child.id());
    child.wait()?;
    let taken = bucket.taken();
    assert!(large(&taken).len() <= 1, "only the damaged one: {taken:?}");
    let trained = far.train(&run, &["workers.count=3"])?;
    assert!(run.last_files()? == same, "a run through a cache, killed and resumed, trained other bytes");
    let again = bucket.taken();
    assert_eq!(large(&taken).len() + large(&again).len(), 1, "{again:?}");
    assert!(trained["read"]["cache_hits"].as_u64() > Some(0), "{trained}");

    // A cache in which not all fit.
    let largest = far.held()?.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
    let small = Far { bucket: &bucket, cache: world.path("small") };
    let run = world.run("small", STEPS, "[checkpoint]\nevery = 2\n")?;
    let trained = small.train(&run, &["workers.count=2", &format!("data.cache_bytes={}", 3 * largest)])?;
    assert!(run.last_files()? == same, "a small cache trained other bytes");
    assert!(trained["read"]["cache_evicted"].as_u64() > Some(0), "{trained}");
    let held: u64 = small.held()?.iter().map(|(_, bytes)| *bytes).sum();
    assert!(held > 0 && held <= 3 * largest, "{held} of {largest}");

    // None at all.
    let run = world.run("none", STEPS, "[checkpoint]\nevery = 8\n")?;
    let trained = far.train(&run, &["workers.count=1", "data.cache_bytes=0"])?;
    assert!(run.last_files()? == same && trained.get("read").is_none(), "{trained}");
    Ok(())
}
