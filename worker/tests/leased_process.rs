//! Workers of a job as processes of their own, told to leave and killed. Without the test harness: started with a coordinator's address,
//! this program is such a worker.

#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use ella_coordinator::client;
use ella_coordinator::core::Outcome;
use ella_coordinator::shell::{Coordinator, Options};
use ella_proto::config::{JobConfig, JobKind, JobTable, Millis};
use ella_proto::v1::{HeldUnit, RunStatus};
use ella_worker::job::{Job, JobError, PLAN, Tell, run_leased};
use ella_worker::train::Ending;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Nothing here takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(90);
/// Who is a worker, and of which coordinator.
const COORDINATOR: &str = "ELLA_TEST_COORDINATOR";

/// Two units, each done once there is a file of its name.
struct Waits {
    folder: PathBuf,
}

#[async_trait]
impl Job for Waits {
    async fn unit(&self, unit: &str, tell: &Tell) -> Result<Vec<String>, JobError> {
        if unit == PLAN {
            return Ok(vec!["a".to_owned(), "b".to_owned()]);
        }
        tell.samples(1);
        // It blocks, as real units do for a while.
        while !self.folder.join(unit).exists() && !tell.stopped() {
            std::thread::yield_now();
        }
        Ok(Vec::new())
    }
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let Ok(url) = std::env::var(COORDINATOR) else {
        runtime.block_on(told_to_leave_and_killed());
        println!("test told_to_leave_and_killed ... ok");
        return ExitCode::SUCCESS;
    };
    let ending = runtime.block_on(async {
        let (stop, mut term) = (CancellationToken::new(), signal(SignalKind::terminate()).unwrap());
        let told = stop.clone();
        tokio::spawn(async move {
            term.recv().await;
            told.cancel();
        });
        run_leased(&url, 1, stop, |config| Ok(Box::new(Waits { folder: config.job.data.clone().into() }))).await
    });
    match ending {
        Ok(Ending::Done) => ExitCode::SUCCESS,
        Ok(Ending::Preempted) => ExitCode::from(3),
        Err(error) => panic!("{error}"),
    }
}

fn start(url: &str) -> Child {
    Command::new(std::env::current_exe().unwrap()).env(COORDINATOR, url).kill_on_drop(true).spawn().unwrap()
}

fn send(child: &Child, signal: libc::c_int) {
    // SAFETY: kill takes plain numbers; the process is our child and not yet reaped, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id().unwrap() as libc::pid_t, signal) }, 0);
}

async fn code(child: &mut Child) -> Option<i32> {
    tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap().code()
}

async fn status_when(url: &str, wanted: impl Fn(&RunStatus) -> bool) -> RunStatus {
    let asked = async {
        loop {
            match client::status(url).await {
                Ok(status) if wanted(&status) => return status,
                _ => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap()
}

fn held(status: &RunStatus) -> Vec<(u32, &HeldUnit)> {
    status.job.iter().flat_map(|job| &job.workers).flat_map(|worker| worker.held.iter().map(|held| (worker.pid, held))).collect()
}

async fn told_to_leave_and_killed() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = JobTable::new(JobKind::Prepare, folder.path().display().to_string());
    // What is lost is seen at once, or not within this test.
    job.lease = Millis(600_000);
    let config = JobConfig::new(job, &std::collections::BTreeMap::<String, String>::new()).unwrap();
    let coordinator = Coordinator::open_job(&config, &Options::default()).await.unwrap();
    let url = format!("http://{}", coordinator.addresses().grpc);
    let (_stops, stops) = mpsc::channel(1);
    let running = tokio::spawn(coordinator.run(stops));
    let mut workers = [start(&url), start(&url)];
    status_when(&url, |status| held(status).len() == 2).await;
    // Told to leave: its unit waits again before the process has ended.
    send(&workers[0], libc::SIGTERM);
    assert_eq!(code(&mut workers[0]).await, Some(3));
    let status = status_when(&url, |status| status.counts.contains_key("workers_left")).await;
    assert_eq!((held(&status).len(), status.counts.get("leases_requeued")), (1, Some(&1)));
    // Killed: the kernel closes its stream, which nobody waits a lease for.
    send(&workers[1], libc::SIGKILL);
    assert_eq!(code(&mut workers[1]).await, None);
    let status = status_when(&url, |status| status.phase == "waiting").await;
    let count = |name: &str| status.counts.get(name).copied().unwrap_or(0);
    assert_eq!(["leases_requeued", "workers_lost", "leases_missed", "leases_expired"].map(count), [2, 1, 0, 0]);
    let mut last = start(&url);
    status_when(&url, |status| held(status).iter().any(|(pid, _)| Some(*pid) == last.id())).await;
    for unit in ["a", "b"] {
        std::fs::write(folder.path().join(unit), "").unwrap();
    }
    assert_eq!(code(&mut last).await, Some(0));
    assert_eq!(tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap(), Outcome::Done);
}
