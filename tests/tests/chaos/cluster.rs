//! A coordinator and its workers, as processes that can be killed.

use anyhow::{Context as _, Result, ensure};
use ella_tests::{binary, children_of, wait_until};
use serde_json::Value;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long the coordinator's page may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Settings of a process's environment.
pub(crate) type Environment = Vec<(String, String)>;

/// A job's processes. All are killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// Where the logs are.
    folder: PathBuf,
    job: PathBuf,
    port: u16,
    coordinator: Child,
    http: String,
    slots: Vec<Slot>,
    started: usize,
    /// Workers that may yet end by themselves: those that find no coordinator, while that is replaced.
    may_fail: usize,
    failed: usize,
}

/// A worker's place, and who has it.
#[derive(Debug)]
struct Slot {
    child: Child,
    log: PathBuf,
    environment: Environment,
}

impl Cluster {
    /// Starts the coordinator of a job, and a worker for each environment.
    pub(crate) fn start(job: &Path, folder: &Path, environments: &[Environment]) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (coordinator, http) = coordinator(job, folder, port, 0)?;
        let (folder, job) = (folder.to_owned(), job.to_owned());
        let mut cluster = Self { folder, job, port, coordinator, http, slots: Vec::new(), started: 1, may_fail: 0, failed: 0 };
        for environment in environments {
            let slot = cluster.worker(environment)?;
            cluster.slots.push(slot);
        }
        Ok(cluster)
    }

    fn worker(&mut self, environment: &Environment) -> Result<Slot> {
        let mut command = Command::new(binary("ella-worker")?);
        command.args(["--coordinator", &format!("http://127.0.0.1:{}", self.port), "--device", "cpu"]);
        command.envs(environment.iter().cloned());
        self.started += 1;
        let log = self.folder.join(format!("{:03}-worker.log", self.started));
        Ok(Slot { child: logged(command, &log)?, log, environment: environment.clone() })
    }

    /// The processes that work, of all slots: each is watched by the one that was started.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.slots.iter().map(|slot| children_of(slot.child.id(), "ella-worker").first().copied().unwrap_or(slot.child.id())).collect()
    }

    /// Kills the worker of a slot, and starts another in its place.
    pub(crate) fn replace(&mut self, slot: usize) -> Result<()> {
        // One that has ended already cannot be killed, and is as dead.
        let _ = self.slots[slot].child.kill();
        self.slots[slot].child.wait()?;
        let environment = self.slots[slot].environment.clone();
        self.slots[slot] = self.worker(&environment)?;
        Ok(())
    }

    /// Kills the coordinator, and starts another at the same address.
    pub(crate) fn replace_coordinator(&mut self) -> Result<()> {
        self.coordinator.kill()?;
        self.coordinator.wait()?;
        self.started += 1;
        self.may_fail = self.slots.len();
        (self.coordinator, self.http) = coordinator(&self.job, &self.folder, self.port, self.started)?;
        Ok(())
    }

    /// What the coordinator says of the job; none if it does not answer.
    pub(crate) fn status(&self) -> Option<Value> {
        let mut page = TcpStream::connect(&self.http).ok()?;
        page.set_read_timeout(Some(ANSWER)).ok()?;
        page.write_all(b"GET /api/v1/status HTTP/1.0\r\nhost: localhost\r\n\r\n").ok()?;
        let mut reply = String::new();
        page.read_to_string(&mut reply).ok()?;
        serde_json::from_str(reply.split_once("\r\n\r\n")?.1).ok()
    }

    /// Workers that ended by themselves, and were replaced.
    pub(crate) fn failed(&self) -> usize {
        self.failed
    }

    /// Whether the job is over. Workers do not end before it, but by a kill, or where one starts while there is no coordinator.
    pub(crate) fn is_over(&mut self) -> Result<bool> {
        if let Some(status) = self.coordinator.try_wait()? {
            ensure!(status.success(), "the coordinator ended with {status}:\n{}", self.last_words()?);
            return Ok(true);
        }
        for slot in 0..self.slots.len() {
            let Some(status) = self.slots[slot].child.try_wait()?.filter(|status| !status.success()) else { continue };
            let excused = self.may_fail > 0 && found_nobody(&self.slots[slot].log)?;
            ensure!(excused, "a worker ended by itself with {status}:\n{}", self.last_words()?);
            (self.may_fail, self.failed) = (self.may_fail - 1, self.failed + 1);
            self.replace(slot)?;
        }
        Ok(false)
    }

    /// Waits until all have ended: well, or because they were too late to find a coordinator.
    pub(crate) fn ended(mut self) -> Result<()> {
        for slot in &mut self.slots {
            let mut status = None;
            wait_until("the workers' end", || {
                status = slot.child.try_wait().ok().flatten();
                status.is_some()
            })?;
            let well = status.is_some_and(|status| status.success()) || found_nobody(&slot.log)?;
            ensure!(well, "a worker ended with {status:?} when the job was over:\n{}", std::fs::read_to_string(&slot.log)?);
        }
        Ok(())
    }

    /// The last lines of every log, for a failure.
    pub(crate) fn last_words(&self) -> Result<String> {
        let mut text = String::new();
        for (name, log) in logs(&self.folder)? {
            let lines: Vec<&str> = log.lines().filter(|line| !line.contains("store call is retried")).collect();
            text += &format!("{name}\n    {}\n", lines[lines.len().saturating_sub(4)..].join("\n    "));
        }
        Ok(text)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.slots.iter_mut().map(|slot| &mut slot.child).chain([&mut self.coordinator]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Whether a worker says that it found no coordinator, or lost it before it was welcomed; not one that did work.
fn found_nobody(log: &Path) -> Result<bool> {
    let log = std::fs::read_to_string(log)?;
    let welcomed = log.contains("what is in hand goes on");
    Ok(!welcomed && ["no coordinator answers", "the coordinator is gone"].iter().any(|why| log.contains(why)))
}

/// What the processes of a folder said, by name.
pub(crate) fn logs(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".log") {
            logs.push((name, String::from_utf8_lossy(&std::fs::read(entry.path())?).into_owned()));
        }
    }
    logs.sort();
    Ok(logs)
}

/// Starts a coordinator, and waits until it says where people look.
fn coordinator(job: &Path, folder: &Path, port: u16, number: usize) -> Result<(Child, String)> {
    let addresses = folder.join(format!("{number:03}-addresses.json"));
    let mut command = Command::new(binary("ella-coordinator")?);
    command.arg(job).args(["--listen", &format!("127.0.0.1:{port}"), "--address-file"]).arg(&addresses);
    let mut child = logged(command, &folder.join(format!("{number:03}-coordinator.log")))?;
    wait_until("the coordinator's addresses", || addresses.is_file() || child.try_wait().is_ok_and(|ended| ended.is_some()))?;
    let text = std::fs::read_to_string(&addresses).context("the coordinator did not start")?;
    let said: Value = serde_json::from_str(&text)?;
    let http = said["http"].as_str().context("the coordinator names no http address")?;
    Ok((child, http.trim_start_matches("http://").to_owned()))
}

fn logged(mut command: Command, log: &Path) -> Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(log)?);
    command.spawn().with_context(|| format!("{command:?}"))
}
