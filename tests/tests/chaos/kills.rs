//! Whom to kill and when, by what is seen to be done: never by the clock.

use crate::cluster::Cluster;
use crate::proxy::{Proxy, When};
use crate::report::Report;
use anyhow::{Context as _, Result, ensure};
use ella_tests::Dice;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// How long a job may take, and a moment be waited for.
const PATIENCE: Duration = Duration::from_secs(900);
/// Between two looks at what is done.
const LOOK: Duration = Duration::from_millis(2);
/// Between two looks at the coordinator's page.
const ASK: Duration = Duration::from_millis(50);
/// Of 100 objects so many are there by the last kill, so that no job is over before it.
const LAST_KILL: usize = 95;

/// Where the work goes, and is watched.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ground<'a> {
    /// A local folder.
    Folder(&'a Path),
    /// A server behind a proxy.
    Server(&'a Proxy),
}

/// A moment to kill a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// While it has a unit in hand.
    Holding,
    /// The one that was started last, before it has begun.
    Newest,
    /// While it has a file half-written.
    Writing,
    /// In the midst of a write to a server.
    Request(When),
}

impl Moment {
    fn name(self) -> &'static str {
        match self {
            Self::Holding => "with a unit in hand",
            Self::Newest => "while it starts",
            Self::Writing => "with a file half-written",
            Self::Request(When::Before) => "before its write",
            Self::Request(When::After) => "after its write, before the reply",
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Victim {
    Worker(Moment),
    Coordinator,
}

/// One kill: when so many objects have been made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kill {
    at: usize,
    victim: Victim,
}

impl Ground<'_> {
    fn moments(self) -> &'static [Moment] {
        use Moment::{Holding, Newest, Request, Writing};
        match self {
            Self::Folder(_) => &[Holding, Holding, Holding, Writing, Writing, Newest],
            Self::Server(_) => &[Holding, Holding, Request(When::Before), Request(When::After), Request(When::After), Newest],
        }
    }

    /// Objects that were made so far.
    pub(crate) fn made(self) -> usize {
        match self {
            Self::Folder(folder) => files(folder).iter().filter(|path| !is_half_written(path)).count(),
            Self::Server(proxy) => proxy.created(),
        }
    }
}

/// Draws so many kills of workers for a job that makes so many objects, and one of its coordinator.
pub(crate) fn draw(kills: usize, objects: usize, ground: Ground<'_>, dice: &mut Dice) -> Vec<Kill> {
    let moments = ground.moments();
    let mut at = || dice.below((objects * LAST_KILL / 100) as u64) as usize;
    let coordinator = Kill { at: at(), victim: Victim::Coordinator };
    let times: Vec<usize> = (0..kills).map(|_| at()).collect();
    let worker = |at| Kill { at, victim: Victim::Worker(moments[dice.below(moments.len() as u64) as usize]) };
    let mut drawn: Vec<Kill> = times.into_iter().map(worker).chain([coordinator]).collect();
    drawn.sort_by_key(|kill| kill.at);
    drawn
}

/// A job under kills.
pub(crate) struct Harassed<'a> {
    cluster: Cluster,
    ground: Ground<'a>,
    /// Objects that were there before.
    before: usize,
    dice: Dice,
    newest: usize,
    begun: Instant,
    asked: Instant,
    /// The last that each coordinator said, by its session.
    said: BTreeMap<u64, Value>,
    report: Report,
}

impl<'a> Harassed<'a> {
    pub(crate) fn new(cluster: Cluster, ground: Ground<'a>, before: usize, dice: Dice) -> Self {
        let begun = Instant::now();
        let (said, report) = (BTreeMap::new(), Report::default());
        Self { cluster, ground, before, dice, newest: 0, begun, asked: begun, said, report }
    }

    /// Kills as drawn, waits for the job's end, and gives what was counted, with the last that each coordinator said.
    pub(crate) fn run(mut self, kills: &[Kill]) -> Result<(Report, Vec<Value>)> {
        for (done, kill) in kills.iter().enumerate() {
            while self.ground.made() < self.before + kill.at {
                ensure!(!self.is_over()?, "the job was over after {done} of {} kills", kills.len());
                std::thread::sleep(LOOK);
            }
            match kill.victim {
                Victim::Worker(moment) => self.kill(moment)?,
                Victim::Coordinator => {
                    self.cluster.replace_coordinator()?;
                    self.report.coordinators += 1;
                }
            }
        }
        while !self.is_over()? {
            std::thread::sleep(LOOK);
        }
        self.report.failed = self.cluster.failed();
        self.report.seconds = self.begun.elapsed().as_secs_f64();
        self.cluster.ended()?;
        Ok((self.report, self.said.into_values().collect()))
    }

    fn is_over(&mut self) -> Result<bool> {
        ensure!(self.begun.elapsed() < PATIENCE, "not done within {PATIENCE:?}:\n{}", self.cluster.last_words()?);
        if self.asked.elapsed() > ASK {
            self.asked = Instant::now();
            if let Some(status) = self.cluster.status() {
                self.said.insert(status["term"].as_u64().unwrap_or_default(), status);
            }
        }
        self.cluster.is_over()
    }

    fn kill(&mut self, moment: Moment) -> Result<()> {
        let caught = match moment {
            Moment::Newest => Some(self.newest),
            Moment::Holding => self.holder()?,
            Moment::Writing => self.writer()?,
            Moment::Request(when) => self.asker(when)?,
        };
        let slot = caught.with_context(|| format!("the job was over before a worker was seen {}", moment.name()))?;
        self.newest = slot;
        *self.report.kills.entry(moment.name()).or_default() += 1;
        self.cluster.replace(slot)
    }

    /// One of the workers that have a unit in hand; none if the job is over before one has.
    fn holder(&mut self) -> Result<Option<usize>> {
        while !self.is_over()? {
            let status = self.cluster.status().unwrap_or_default();
            let holds = |worker: &&Value| worker["held"].as_array().is_some_and(|held| !held.is_empty());
            let workers = status["job"]["workers"].as_array().into_iter().flatten().filter(holds);
            let holding: Vec<u64> = workers.filter_map(|worker| worker["pid"].as_u64()).collect();
            let pids = self.cluster.pids();
            let slots: Vec<usize> = (0..pids.len()).filter(|slot| holding.contains(&u64::from(pids[*slot]))).collect();
            if let Some(slot) = slots.get(self.dice.below(slots.len() as u64) as usize) {
                return Ok(Some(*slot));
            }
            std::thread::sleep(LOOK);
        }
        Ok(None)
    }

    /// A worker that has a file half-written; none if the job is over before one has.
    fn writer(&mut self) -> Result<Option<usize>> {
        while !self.is_over()? {
            if let Some(slot) = self.cluster.pids().into_iter().position(is_writing) {
                return Ok(Some(slot));
            }
            std::thread::yield_now();
        }
        Ok(None)
    }

    /// A worker that is held in a write; none if the job is over before one is.
    fn asker(&mut self, when: When) -> Result<Option<usize>> {
        let Ground::Server(proxy) = self.ground else { return Ok(None) };
        let caught: Receiver<usize> = proxy.trap(when);
        loop {
            if let Ok(slot) = caught.recv_timeout(LOOK) {
                return Ok(Some(slot));
            }
            if self.is_over()? {
                proxy.disarm();
                return Ok(caught.recv_timeout(LOOK).ok());
            }
        }
    }
}

fn is_half_written(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains('#'))
}

/// Whether a process has a half-written file open.
fn is_writing(process: u32) -> bool {
    let open = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).any(|path| is_half_written(&path))
}

/// Every file below a folder.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                _ => found.push(entry.path()),
            }
        }
    }
    found
}
