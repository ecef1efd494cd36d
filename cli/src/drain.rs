//! `ella drain`: one worker leaves a run, in good order; the others go on.

use std::time::Duration;

use clap::Args;
use ella_coordinator::client;
use ella_coordinator::status::{StatusReport, WorkerReport};
use ella_proto::access::Access;
use ella_proto::config::MOST_SECONDS;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::run::{self, ADDRESS};
use crate::status::{Asked, SHOWN};
use crate::ui::{DONE, Fail, Out, count, note};

/// How often it is asked whether the worker has left.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// Its rank, its host, or its id or the beginning of it, eight characters or more: as `ella status URL` shows them
    worker: String,
    /// The folder of a run that `ella train` trains on this machine, or the address of a run's coordinator, http://HOST:PORT
    #[arg(value_name = "RUN|URL", required_unless_present = "coordinator")]
    what: Option<String>,
    #[command(flatten)]
    asked: Asked,
    /// How long it may take to leave: it computes its step first
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    timeout: u64,
}

/// A worker that has left.
#[derive(Debug, Serialize)]
struct Drained {
    run: String,
    worker: String,
    rank: Option<u32>,
    host: String,
    pid: u32,
    /// Where the run was then.
    step: u64,
    /// What the run does now.
    phase: String,
    /// Workers that it still has.
    workers: usize,
}

impl Drain {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let drained = crate::runtime()?.block_on(self.drain())?;
        out.result(&drained, || human(&drained));
        Ok(DONE)
    }

    async fn drain(&self) -> Result<Drained, Fail> {
        let (access, status) = self.find().await?;
        let url = &access.url;
        if status.job.is_some() {
            return Err(Fail::lasting(format_args!("{url}: coordinates a job; a SIGTERM to one of its workers lets that leave")));
        }
        let worker = resolve(&status.workers, &self.worker)?;
        client::drain(&access, &worker.worker_id, "asked by ella drain").await?;
        note(format_args!("{} is asked to leave after its step; waiting for up to {} s", named(worker), self.timeout));
        let status = self.gone(&access, worker).await?;
        let WorkerReport { worker_id, rank, host, pid, .. } = worker.clone();
        let StatusReport { run_url: run, step, phase, workers, .. } = status;
        let workers = workers.iter().filter(|other| other.worker_id != worker_id).count();
        Ok(Drained { run, worker: worker_id, rank, host, pid, step, phase, workers })
    }

    /// The coordinator, and what it says.
    async fn find(&self) -> Result<(Access, StatusReport), Fail> {
        if let Some(access) = self.asked.coordinator(self.what.as_deref())? {
            let status = client::status(&access).await?.into();
            return Ok((access, status));
        }
        let store = run::store(self.what.as_deref().unwrap_or_default())?;
        let hint = "give its coordinator's address, http://HOST:PORT";
        let address = store.local_path().and_then(|run| std::fs::read_to_string(run.join(ADDRESS)).ok());
        let Some(url) = address else {
            return Err(Fail::failed(format_args!("{}: no `ella train` of this machine trains this run; {hint}", store.url())));
        };
        let access = self.asked.credentials.access(&url)?;
        let status = StatusReport::from(client::status(&access).await?);
        // The port of one that was killed may be another's by now.
        if status.run_url != store.url() {
            return Err(Fail::failed(format_args!("{}: its coordinator is gone, and {url} has another run; {hint}", store.url())));
        }
        Ok((access, status))
    }

    /// Waits until the worker has left, or the run is over.
    async fn gone(&self, access: &Access, worker: &WorkerReport) -> Result<StatusReport, Fail> {
        let deadline = Instant::now() + Duration::from_secs(self.timeout);
        loop {
            // A coordinator that does not answer may come back.
            let answer = client::status(access).await.map(StatusReport::from);
            match answer {
                Ok(status) if has_left(&status, &worker.worker_id) => return Ok(status),
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Ok(status) if Instant::now() >= deadline => {
                    let (worker, step) = (named(worker), status.step);
                    let patience = format!("within {} s", self.timeout);
                    return Err(Fail::failed(format_args!(
                        "{}: {worker} has not left {patience}, the run is {} at step {step}; it leaves when it can",
                        access.url, status.phase
                    )));
                }
                _ => sleep(POLL).await,
            }
        }
    }
}

/// Nobody is left in a run that is over, whoever its last status names.
fn has_left(status: &StatusReport, worker_id: &str) -> bool {
    let over = matches!(&*status.phase, "done" | "preempted" | "failed");
    over || status.workers.iter().all(|worker| worker.worker_id != worker_id)
}

/// The worker of that rank; else the one whose id begins so; else the one on that host. A shorter beginning may be a rank's number that is
/// mistaken: it must not fall on a worker by chance.
fn resolve<'a>(workers: &'a [WorkerReport], wanted: &str) -> Result<&'a WorkerReport, Fail> {
    let rank: Option<u32> = wanted.parse().ok();
    let ways: [&dyn Fn(&WorkerReport) -> bool; 3] = [
        &|worker| rank.is_some() && worker.rank == rank,
        &|worker| wanted.len() >= SHOWN && worker.worker_id.starts_with(wanted),
        &|worker| worker.host == wanted,
    ];
    let found = |way: &dyn Fn(&WorkerReport) -> bool| workers.iter().filter(|worker| way(worker)).collect::<Vec<_>>();
    let found = ways.iter().map(|way| found(way)).find(|found| !found.is_empty()).unwrap_or_default();
    let list = |workers: &mut dyn Iterator<Item = &WorkerReport>| workers.map(named).collect::<Vec<_>>().join("; ");
    match found.as_slice() {
        [worker] => Ok(worker),
        [] if workers.is_empty() => Err(Fail::lasting(format_args!("{wanted:?}: the run has no worker now"))),
        [] => Err(Fail::lasting(format_args!("{wanted:?}: no worker has this rank, id or host; there are {}", list(&mut workers.iter())))),
        several => {
            Err(Fail::lasting(format_args!("{wanted:?}: could be any of {}; give more of the id", list(&mut several.iter().copied()))))
        }
    }
}

fn named(worker: &WorkerReport) -> String {
    let WorkerReport { worker_id, host, pid, .. } = worker;
    format!("worker {worker_id} ({}, {host} pid {pid})", place(worker.rank, &worker.state))
}

fn place(rank: Option<u32>, state: &str) -> String {
    rank.map_or_else(|| state.to_owned(), |rank| format!("rank {rank}"))
}

fn human(drained: &Drained) -> String {
    let Drained { worker, rank, host, step, phase, workers, .. } = drained;
    let left = count(*workers, "worker");
    let place = place(*rank, "a spare");
    format!("worker {worker} ({place}, {host}) has left at step {step}; the run is {phase}, with {left}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::NO_RETRY;

    fn worker(worker_id: &str, rank: u32, host: &str) -> WorkerReport {
        WorkerReport { worker_id: worker_id.into(), rank: Some(rank), host: host.into(), pid: 5, ..WorkerReport::default() }
    }

    fn workers() -> Vec<WorkerReport> {
        vec![worker("7f03a5b6c7", 0, "a"), worker("12ab12ab12", 1, "b"), worker("e0cd123456", 2, "b")]
    }

    #[test]
    fn a_worker_is_known_by_rank_id_or_host() {
        let workers = workers();
        for (wanted, id) in [("0", "7f03"), ("1", "12ab"), ("12ab12ab", "12ab"), ("e0cd123456", "e0cd"), ("a", "7f03"), ("2", "e0cd")] {
            assert!(resolve(&workers, wanted).unwrap().worker_id.starts_with(id), "{wanted}");
        }
    }

    #[test]
    fn whoever_is_meant_must_be_clear() {
        let workers = workers();
        let several = resolve(&workers, "b").unwrap_err().message;
        assert!(several.contains("12ab12ab12 (rank 1, b pid 5); worker e0cd") && !several.contains("7f03"), "{several}");
        // A rank that is not there must not fall on the worker whose id happens to begin so.
        for wanted in ["7", "12", "9", "c", "12ab12ac"] {
            let nobody = resolve(&workers, wanted).unwrap_err().message;
            assert!(nobody.contains(wanted) && nobody.contains("7f03") && nobody.contains("e0cd"), "{nobody}");
        }
        assert!(resolve(&[], "0").unwrap_err().message.contains("no worker now"));
        // It is not how it is written that is wrong: a name where nothing is.
        assert_eq!([resolve(&[], "0"), resolve(&workers, "9")].map(|found| found.unwrap_err().code), [NO_RETRY; 2]);
    }

    #[test]
    fn a_worker_has_left_when_nobody_has_its_id_or_the_run_is_over() {
        let mut status = StatusReport { phase: "regrouping".into(), workers: workers(), ..StatusReport::default() };
        assert!(!has_left(&status, "12ab12ab12"));
        status.workers.remove(1);
        assert!(has_left(&status, "12ab12ab12") && !has_left(&status, "e0cd123456"));
        status.phase = "preempted".into();
        assert!(has_left(&status, "e0cd123456"));
    }
}
