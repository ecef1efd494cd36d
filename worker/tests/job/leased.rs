//! Units leased over gRPC: workers that come, die and leave, and coordinators that are followed by others.

use crate::soon;
use crate::toy::{Broken, Stage, Toy, config, files};
use async_trait::async_trait;
use ella_coordinator::core::Outcome;
use ella_coordinator::shell::{AccessControl, Coordinator, Options, RunError};
use ella_proto::access::{Access, Token};
use ella_proto::config::{JobConfig, Millis};
use ella_proto::v1::RunStatus;
use ella_worker::control::ControlError;
use ella_worker::job::{Job, JobEnd, JobError, PLAN, Tell, run_leased, run_local};
use ella_worker::train::Ending;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A job's coordinator in this process.
struct Served {
    address: SocketAddr,
    token: Option<Token>,
    run: JoinHandle<Result<Outcome, RunError>>,
    _stops: mpsc::Sender<String>,
}

impl Served {
    async fn start(config: &JobConfig, listen: Option<SocketAddr>) -> Self {
        Self::lingering(config, listen, Duration::from_millis(50)).await
    }

    async fn lingering(config: &JobConfig, listen: Option<SocketAddr>, linger: Duration) -> Self {
        Self::asking(config, listen, linger, None).await
    }

    /// One that asks for a token.
    async fn asking(config: &JobConfig, listen: Option<SocketAddr>, linger: Duration, token: Option<Token>) -> Self {
        let access = AccessControl::of_token(token.clone());
        let options = Options { listen: listen.unwrap_or(([127, 0, 0, 1], 0).into()), linger, access, ..Options::default() };
        let opened = async {
            loop {
                match Coordinator::open_job(config, &options).await {
                    Ok(coordinator) => return coordinator,
                    // The tasks of one that was killed a moment ago may still be going.
                    Err(RunError::Bind { .. }) => tokio::task::yield_now().await,
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let coordinator = soon("a coordinator", opened).await;
        let (_stops, stops) = mpsc::channel(1);
        Self { address: coordinator.addresses().grpc, token, run: tokio::spawn(coordinator.run(stops)), _stops }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// As those reach it who know its token.
    fn access(&self) -> Access {
        Access { token: self.token.clone(), ..Access::from(self.url()) }
    }

    async fn outcome(self) -> Outcome {
        soon("the outcome", self.run).await.unwrap().unwrap()
    }

    /// Dies without a word; its address is free then.
    async fn kill(self) -> SocketAddr {
        self.run.abort();
        let _ = self.run.await;
        self.address
    }

    async fn status_when(&self, wanted: impl Fn(&RunStatus) -> bool) -> RunStatus {
        let asked = async {
            loop {
                match ella_coordinator::client::status(self.access()).await {
                    Ok(status) if wanted(&status) => return status,
                    _ => tokio::task::yield_now().await,
                }
            }
        };
        soon("the wanted status", asked).await
    }

    fn worker(&self, toy: Toy) -> Worker {
        self.does(toy.boxed())
    }

    fn does(&self, job: Box<dyn Job>) -> Worker {
        Worker::start(self.access(), job)
    }
}

struct Worker {
    task: JoinHandle<Result<Ending, JobEnd>>,
    stop: CancellationToken,
}

impl Worker {
    fn start(access: Access, job: Box<dyn Job>) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run_leased(access, 1, stop.clone(), |_| Ok(job)));
        Self { task, stop }
    }

    async fn ended(self) -> Result<Ending, JobEnd> {
        soon("a worker's end", self.task).await.unwrap()
    }
}

fn gated(units: &[&str]) -> Arc<Stage> {
    let gates = units.iter().map(|unit| ((*unit).to_owned(), Arc::new(Semaphore::new(0)))).collect();
    Arc::new(Stage { gates, ..Stage::default() })
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    soon(what, wait).await;
}

/// What the job leaves if nothing goes wrong.
async fn calm(units: usize) -> BTreeMap<String, Vec<u8>> {
    let out = tempfile::tempdir().unwrap();
    let toy = Toy { units, ..Toy::new(out.path(), "alone", &Arc::default()) };
    run_local(&config(out.path()), toy.boxed(), 1, CancellationToken::new(), &mut |_| {}).await.unwrap();
    files(out.path())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_are_killed_or_stopped_lose_nothing_and_the_result_is_that_of_one_process() {
    let out = tempfile::tempdir().unwrap();
    let stage = gated(&["unit-00000", "unit-00001", "unit-00002"]);
    let served = Served::start(&config(out.path()), None).await;
    let toy = |name| Toy::new(out.path(), name, &stage);
    let mut workers: BTreeMap<_, _> = ["a", "b", "c"].map(|name| (name, served.worker(toy(name)))).into();
    until("three units in three hands", || ["unit-00000", "unit-00001", "unit-00002"].iter().all(|unit| stage.begun(unit) == 1)).await;
    let (killed, stopped) = (stage.holder("unit-00000").unwrap(), stage.holder("unit-00001").unwrap());
    // Killed: its stream is dropped without a word.
    workers.remove(killed).unwrap().task.abort();
    let stopped = workers.remove(stopped).unwrap();
    stopped.stop.cancel();
    assert!(matches!(stopped.ended().await, Ok(Ending::Preempted)));
    let status = served.status_when(|status| status.counts.get("leases_requeued") == Some(&2)).await;
    let counted = |name| status.counts.get(name).copied();
    assert_eq!((counted("workers_lost"), counted("workers_left"), counted("leases_expired")), (Some(1), Some(1), None));
    let fresh = served.worker(toy("d"));
    served.status_when(|status| status.job.as_ref().is_some_and(|job| job.workers.len() == 2)).await;
    stage.gates.keys().for_each(|unit| stage.open(unit));
    assert_eq!(served.outcome().await, Outcome::Done);
    for (_, worker) in workers.into_iter().chain([("d", fresh)]) {
        assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    }
    assert_eq!(files(out.path()), calm(8).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_is_followed_by_another_costs_nothing_that_is_done() {
    let out = tempfile::tempdir().unwrap();
    let stage = gated(&["unit-00005"]);
    let served = Served::start(&config(out.path()), None).await;
    let worker = served.worker(Toy::new(out.path(), "a", &stage));
    until("unit 5 in hand", || stage.begun("unit-00005") == 1).await;
    let address = served.kill().await;
    // It goes on with what it has in hand meanwhile.
    stage.open("unit-00005");
    until("unit 5 done", || out.path().join("unit-00005").exists()).await;
    let served = Served::start(&config(out.path()), Some(address)).await;
    assert_eq!(served.outcome().await, Outcome::Done);
    assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    assert_eq!(files(out.path()), calm(8).await);
    assert!((0..=5).all(|n| stage.begun(&format!("unit-{n:05}")) == 1), "{:?}", stage.begun);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_in_hand_goes_on_under_the_lease_of_the_next_coordinator() {
    let out = tempfile::tempdir().unwrap();
    let stage = gated(&["unit-00002"]);
    let served = Served::start(&config(out.path()), None).await;
    let worker = served.worker(Toy { units: 3, ..Toy::new(out.path(), "a", &stage) });
    until("unit 2 in hand", || stage.begun("unit-00002") == 1).await;
    let served = Served::start(&config(out.path()), Some(served.kill().await)).await;
    // The plan waits for the one slot, which unit 2 has; it is in the new coordinator's books before that is free.
    served.status_when(|status| status.job.as_ref().is_some_and(|job| job.units_held == 1)).await;
    stage.open("unit-00002");
    assert_eq!(served.outcome().await, Outcome::Done);
    assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    assert_eq!((files(out.path()), stage.begun("unit-00002")), (calm(3).await, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_coordinator_does_not_come_back_or_comes_back_as_another_stops() {
    let out = tempfile::tempdir().unwrap();
    let mut brief = config(out.path());
    brief.job.orphan_timeout = Millis(300);
    let stage = gated(&["plan"]);
    let served = Served::start(&brief, None).await;
    let worker = served.worker(Toy::new(out.path(), "a", &stage));
    until("a plan", || stage.begun("plan") == 1).await;
    let address = served.kill().await;
    let ended = worker.ended().await;
    assert!(matches!(&ended, Err(error @ JobEnd::Orphaned { .. }) if !error.is_permanent()), "{ended:?}");

    let config = config(out.path());
    let served = Served::start(&config, Some(address)).await;
    let worker = served.worker(Toy::new(out.path(), "b", &stage));
    until("another plan", || stage.begun("plan") == 2).await;
    let _other = Served::start(&brief, Some(served.kill().await)).await;
    let ended = worker.ended().await;
    assert!(matches!(ended, Err(JobEnd::OtherConfig { .. })), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_job_and_an_unfit_worker_say_so_on_both_sides() {
    let out = tempfile::tempdir().unwrap();
    let broken = BTreeMap::from([("unit-00002".to_owned(), Broken::Always(JobError::permanent("a.tar: truncated")))]);
    let stage = Arc::new(Stage { broken, ..Stage::default() });
    let served = Served::start(&config(out.path()), None).await;
    let worker = served.worker(Toy::new(out.path(), "a", &stage));
    let outcome = served.outcome().await;
    assert_eq!((outcome.exit_code(), outcome.reason().contains("unit-00002: a.tar: truncated")), (4, true), "{outcome:?}");
    assert!(matches!(worker.ended().await, Err(JobEnd::Failed { reason, permanent: true }) if reason == outcome.reason()));

    let served = Served::start(&config(out.path()), None).await;
    let ended = soon("an end", run_leased(&served.url(), 1, CancellationToken::new(), |_| Err(JobError::permanent("no such model")))).await;
    assert!(matches!(ended, Err(JobEnd::Unfit(error)) if error.message == "no such model"));
    let outcome = served.outcome().await;
    assert_eq!((outcome.exit_code(), outcome.reason().contains("no such model")), (4, true), "{outcome:?}");
}

/// What it did there would be found by nobody. The others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_has_another_folder_does_no_unit_and_ends_for_good() {
    let (out, stage) = (tempfile::tempdir().unwrap(), Arc::<Stage>::default());
    let served = Served::start(&config(out.path()), None).await;
    // As on a machine where another folder lies at the path.
    let mark = std::fs::read_dir(out.path()).unwrap().next().unwrap().unwrap().path();
    let text = std::fs::read(&mark).unwrap();
    std::fs::remove_file(&mark).unwrap();
    let error = served.worker(Toy::new(out.path(), "elsewhere", &stage)).ended().await.unwrap_err();
    assert!(matches!(error, JobEnd::Unfit(_)) && error.is_permanent(), "{error:?}");
    assert!(error.to_string().contains("this worker does not see the job's folder"), "{error}");
    std::fs::write(&mark, text).unwrap();
    let worker = served.worker(Toy::new(out.path(), "a", &stage));
    assert_eq!(served.outcome().await, Outcome::Done);
    assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    assert_eq!(files(out.path()), calm(8).await, "the coordinator's own file is gone");
    assert!(stage.begun.lock().unwrap().iter().all(|(_, worker)| *worker == "a"));
}

/// Units that take no time.
struct Idle {
    units: usize,
    done: Arc<AtomicUsize>,
}

#[async_trait]
impl Job for Idle {
    async fn unit(&self, unit: &str, _: &Tell) -> Result<Vec<String>, JobError> {
        self.done.fetch_add(1, Relaxed);
        let name = |n| format!("{n:0>150}");
        Ok(if unit == PLAN { (0..self.units).map(name).collect() } else { Vec::new() })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_larger_than_a_message_arrives_whole() {
    let (units, done) = (10_000, Arc::<AtomicUsize>::default());
    let out = tempfile::tempdir().unwrap();
    let served = Served::start(&config(out.path()), None).await;
    let begin = std::time::Instant::now();
    let workers: Vec<_> = (0..2).map(|_| served.does(Box::new(Idle { units, done: done.clone() }))).collect();
    assert_eq!(served.outcome().await, Outcome::Done);
    println!("{units} units by two workers: {:.0} units a second", units as f64 / begin.elapsed().as_secs_f64());
    for worker in workers {
        assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    }
    assert_eq!(done.load(Relaxed), units + 1, "none twice");
}

#[tokio::test]
async fn nobody_there_is_told_with_the_address() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let make = |_: &JobConfig| Ok(Toy::new(Path::new("unused"), "a", &Arc::default()).boxed());
    let error = soon("an error", run_leased(&url, 1, CancellationToken::new(), make)).await.unwrap_err();
    assert!(error.to_string().contains(&url), "{error}");
}

/// The binary finds out from the welcome that this is a job. Captions come from no worker of this build.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_binary_takes_part_in_jobs_and_says_which_it_cannot_do() {
    let out = tempfile::tempdir().unwrap();
    let mut config = config(out.path());
    config.job.kind = ella_proto::config::JobKind::Caption;
    let served = Served::start(&config, None).await;
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ella-worker"));
    command.args(["--coordinator", &served.url(), "--device", "cpu", "--slots", "2"]).kill_on_drop(true);
    let output = soon("its exit", command.output()).await.unwrap();
    // Captions of no endpoint.
    let words = "`endpoint` is left out";
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(4) && stderr.contains(words), "{stderr}");
    let outcome = served.outcome().await;
    assert!(outcome.exit_code() == 4 && outcome.reason().contains(words), "{outcome:?}");
}

/// Who is not let in ends at once and for good, be it by the first coordinator or by one that follows. Who is let in shows the token with
/// every call, those too that ask whether the coordinator is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_without_the_token_that_is_asked_for_ends_for_good() {
    let (out, file) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    std::fs::write(file.path(), "this-is-asked-for-from-here-on").unwrap();
    let (token, config) = (Token::load(file.path()).unwrap(), config(out.path()));
    let stage = gated(&["plan"]);
    let toy = |name| Toy::new(out.path(), name, &stage).boxed();
    let served = Served::start(&config, None).await;
    let worker = served.does(toy("a"));
    until("a plan", || stage.begun("plan") == 1).await;
    let served = Served::asking(&config, Some(served.kill().await), Duration::from_secs(2), Some(token)).await;
    let late = Worker::start(served.url().into(), toy("b"));
    for worker in [worker, late] {
        let error = worker.ended().await.unwrap_err();
        assert!(matches!(error, JobEnd::Control(ControlError::NoEntry { .. })) && error.is_permanent(), "{error:?}");
        let said = error.to_string();
        assert!(said.contains(&served.url()) && said.contains("asks for a token") && said.contains("--token-file"), "{said}");
    }
    let worker = served.does(toy("c"));
    stage.open("plan");
    let status = served.status_when(|status| status.phase == "done").await;
    assert_eq!(status.counts.get("refused_token"), Some(&2), "{:?}", status.counts);
    assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    assert_eq!(served.outcome().await, Outcome::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_still_loads_when_the_job_is_over_ends_well_and_at_once() {
    let (out, stage) = (tempfile::tempdir().unwrap(), Arc::<Stage>::default());
    let mut config = config(out.path());
    config.job.orphan_timeout = Millis(1_000);
    let served = Served::start(&config, None).await;
    let (loaded, loading) = std::sync::mpsc::channel::<()>();
    let (url, toy) = (served.url(), Toy::new(out.path(), "late", &stage));
    let make = move |_: &JobConfig| {
        let _ = loading.recv();
        Ok(toy.boxed())
    };
    let late = tokio::spawn(async move { run_leased(&url, 1, CancellationToken::new(), make).await });
    served.status_when(|status| status.job.as_ref().is_some_and(|job| job.workers.len() == 1)).await;
    let worker = served.worker(Toy::new(out.path(), "a", &stage));
    assert_eq!(served.outcome().await, Outcome::Done);
    assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    loaded.send(()).unwrap();
    let ended = soon("its end", late).await.unwrap();
    assert!(matches!(ended, Ok(Ending::Done)), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_comes_when_the_job_is_done_has_nothing_to_do() {
    let (out, stage) = (tempfile::tempdir().unwrap(), Arc::<Stage>::default());
    let served = Served::lingering(&config(out.path()), None, Duration::from_secs(2)).await;
    let worker = served.worker(Toy::new(out.path(), "a", &stage));
    served.status_when(|status| status.phase == "done").await;
    let late = served.worker(Toy::new(out.path(), "late", &stage)).ended().await;
    assert!(matches!(late, Ok(Ending::Done)), "{late:?}");
    assert!(matches!(worker.ended().await, Ok(Ending::Done)));
    assert_eq!(served.outcome().await, Outcome::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_dropped_leaves_no_unit_behind() {
    let out = tempfile::tempdir().unwrap();
    let stage = gated(&["plan"]);
    let served = Served::start(&config(out.path()), None).await;
    let worker = served.worker(Toy::new(out.path(), "a", &stage));
    until("a plan", || stage.begun("plan") == 1).await;
    worker.task.abort();
    // The gate has no permits: only a unit that was dropped lets go of what the test shares with it.
    until("the end of its unit", || Arc::strong_count(&stage) == 1).await;
}
