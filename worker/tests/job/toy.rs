//! A job that writes a file per unit, as real ones do: named from its input, written once.

use async_trait::async_trait;
use ella_proto::config::{JobConfig, JobKind, JobTable, Millis};
use ella_worker::job::{Job, JobError, PLAN, Tell};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::Semaphore;

/// What the test does to the toys of all workers, and what they did.
#[derive(Default)]
pub(crate) struct Stage {
    /// Units that wait until the test lets them go on.
    pub(crate) gates: BTreeMap<String, Arc<Semaphore>>,
    /// How units fail: wherever, or so often and then no more.
    pub(crate) broken: BTreeMap<String, Broken>,
    /// Units that were begun, in order, and by whom.
    pub(crate) begun: Mutex<Vec<(String, &'static str)>>,
}

pub(crate) enum Broken {
    Always(JobError),
    Times(Mutex<u32>),
    Panics,
}

impl Stage {
    pub(crate) fn begun(&self, unit: &str) -> usize {
        self.begun.lock().unwrap().iter().filter(|(begun, _)| begun == unit).count()
    }

    pub(crate) fn holder(&self, unit: &str) -> Option<&'static str> {
        self.begun.lock().unwrap().iter().rev().find(|(begun, _)| begun == unit).map(|(_, worker)| *worker)
    }

    /// Lets a unit go on, however often it is begun.
    pub(crate) fn open(&self, unit: &str) {
        self.gates[unit].add_permits(1_000);
    }
}

pub(crate) struct Toy {
    pub(crate) out: PathBuf,
    pub(crate) units: usize,
    pub(crate) worker: &'static str,
    pub(crate) stage: Arc<Stage>,
}

impl Toy {
    pub(crate) fn new(out: &Path, worker: &'static str, stage: &Arc<Stage>) -> Self {
        Self { out: out.to_owned(), units: 8, worker, stage: stage.clone() }
    }

    pub(crate) fn boxed(self) -> Box<dyn Job> {
        Box::new(self)
    }

    fn names(&self) -> impl Iterator<Item = String> {
        (0..self.units).map(|n| format!("unit-{n:05}"))
    }

    fn missing(&self) -> Vec<String> {
        self.names().filter(|name| !self.out.join(name).exists()).collect()
    }

    /// Creates a file that is never seen half-written, unless it is there.
    fn write(&self, name: &str, text: String) -> Result<(), JobError> {
        let partial = tempfile::NamedTempFile::new_in(&self.out).map_err(JobError::passing)?;
        std::fs::write(partial.path(), text).map_err(JobError::passing)?;
        match partial.persist_noclobber(self.out.join(name)) {
            Err(error) if error.error.kind() != ErrorKind::AlreadyExists => Err(JobError::passing(error)),
            _ => Ok(()),
        }
    }

    fn finish(&self) -> Result<(), JobError> {
        if let Some(missing) = self.missing().first() {
            return Err(JobError::permanent(format!("{missing} is missing: the barrier did not hold")));
        }
        let texts = self.names().map(|name| std::fs::read_to_string(self.out.join(name)).unwrap());
        self.write("manifest", texts.collect())
    }
}

#[async_trait]
impl Job for Toy {
    async fn unit(&self, unit: &str, tell: &Tell) -> Result<Vec<String>, JobError> {
        self.stage.begun.lock().unwrap().push((unit.to_owned(), self.worker));
        if let Some(gate) = self.stage.gates.get(unit) {
            let _open = gate.acquire().await.unwrap();
        }
        match self.stage.broken.get(unit) {
            Some(Broken::Always(error)) => return Err(error.clone()),
            Some(Broken::Times(left)) if *left.lock().unwrap() > 0 => {
                *left.lock().unwrap() -= 1;
                return Err(JobError::passing("not yet"));
            }
            Some(Broken::Panics) => panic!("{unit} is too much"),
            Some(Broken::Times(_)) | None => {}
        }
        if unit == PLAN {
            let missing = self.missing();
            let done = self.out.join("manifest").exists();
            return Ok(if missing.is_empty() && !done { vec!["finish".to_owned()] } else { missing });
        }
        if unit == "finish" {
            return self.finish().map(|()| Vec::new());
        }
        self.write(unit, format!("{unit}\n"))?;
        tell.samples(10);
        tell.count("read", 10);
        tell.count("kept", 9);
        Ok(vec!["finish".to_owned()])
    }
}

pub(crate) fn config(out: &Path) -> JobConfig {
    let mut job = JobTable::new(JobKind::Prepare, out.display().to_string());
    // On a machine that is busy with other things, too, nothing here is to end by a deadline.
    (job.lease, job.start_timeout, job.orphan_timeout) = (Millis(90_000), Millis(90_000), Millis(90_000));
    JobConfig::new(job, &BTreeMap::<String, String>::new()).unwrap()
}

/// Every file that a job left, with its bytes.
pub(crate) fn files(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(out).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}
