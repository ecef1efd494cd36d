//! The binary as people and supervisors meet it: what it prints, its exit codes, signals, memory, and what it links.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use ella_coordinator::client;
use ella_proto::stops::SAME_WISH;
use ella_store::Store;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

const BINARY: &str = env!("CARGO_BIN_EXE_ella-coordinator");

struct Process {
    child: Child,
    grpc: String,
}

fn run_toml(folder: &Path) -> PathBuf {
    let path = folder.join("run.toml");
    let output = folder.join("run");
    std::fs::write(&path, CONFIG.replace("unused", output.to_str().unwrap())).unwrap();
    path
}

fn job_toml(folder: &Path) -> PathBuf {
    let path = folder.join("job.toml");
    std::fs::write(&path, "[job]\nkind = \"prepare\"\ndata = \"d\"\n[prepare]\nsources = [\"only workers know\"]\n").unwrap();
    path
}

fn command(folder: &Path, extra: &[&str]) -> Command {
    command_for(run_toml(folder), extra)
}

fn command_for(config: PathBuf, extra: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    command.arg(config).args(extra).kill_on_drop(true).stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped());
    command
}

impl Process {
    async fn start(folder: &Path, extra: &[&str]) -> Self {
        Self::start_as(command(folder, extra)).await
    }

    async fn start_as(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = soon("the addresses", lines.next_line()).await.unwrap().unwrap();
        let addresses: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert!(addresses["http"].is_string());
        Self { child, grpc: addresses["grpc"].as_str().unwrap().to_owned() }
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill takes plain numbers; the process is our child and not yet reaped, so its id is its own.
        assert_eq!(unsafe { libc::kill(self.child.id().unwrap() as libc::pid_t, signal) }, 0);
    }

    async fn code(mut self) -> i32 {
        soon("the exit", self.child.wait()).await.unwrap().code().unwrap()
    }
}

#[tokio::test]
async fn it_says_where_it_listens_and_is_small() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("addresses.json");
    let process = Process::start(folder.path(), &["--address-file", file.to_str().unwrap()]).await;
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(written["grpc"].as_str(), Some(process.grpc.as_str()));
    assert_eq!(client::status(&process.grpc).await.unwrap().phase, "waiting");
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.child.id().unwrap())).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    println!("idle memory: {rss} kB");
    assert!(rss < 50 * 1024, "{rss} kB");
}

#[test]
fn it_links_no_libtorch() {
    // The names of needed libraries stand in the binary's string table; libtorch's are not there at all.
    let bytes = std::fs::read(BINARY).unwrap();
    let holds = |name: &str| bytes.windows(name.len()).any(|window| window == name.as_bytes());
    assert!(holds("libc.so.6"), "the search finds needed libraries");
    for library in ["libtorch", "libc10", "libcudart"] {
        assert!(!holds(&format!("{library}.so")) && !holds(&format!("{library}_cpu.so")), "{library}");
    }
}

#[tokio::test]
async fn sigterm_while_it_waits_is_preemption() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path(), &["--log-format", "json"]).await;
    process.signal(libc::SIGTERM);
    assert_eq!(process.code().await, 3);
}

#[tokio::test]
async fn sigterm_while_the_store_does_not_answer_is_preemption() {
    let folder = tempfile::tempdir().unwrap();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let mut command = command(folder.path(), &["--set", "run.output=s3://bucket/run"]);
    command.envs([("AWS_ENDPOINT", endpoint.as_str()), ("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")]);
    command.envs([("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")]);
    let process = Process { child: command.spawn().unwrap(), grpc: String::new() };
    // It has begun to open its run, and will wait for long.
    let _connection = soon("a request to the store", silent.accept()).await.unwrap();
    process.signal(libc::SIGTERM);
    assert_eq!(process.code().await, 3);
}

/// Whoever signals a whole group has several signals come to it at once, which are one wish: its workers may commit.
#[tokio::test]
async fn only_a_later_signal_leaves_without_waiting_for_the_workers() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path(), &["--set", "workers.count=1"]).await;
    let mut worker = Fake::attach(&process.grpc, hello("a")).await.unwrap();
    worker.get_ready().await.unwrap();
    process.signal(libc::SIGTERM);
    process.signal(libc::SIGINT);
    let told = worker.next().await;
    assert!(
        matches!(&told, Some(ella_proto::v1::to_worker::Body::Drain(drain)) if drain.reason.starts_with("the coordinator got SIG")),
        "{told:?}"
    );
    let more = tokio::time::timeout(SAME_WISH + Duration::from_millis(100), worker.next()).await;
    assert!(more.is_err(), "it does not wait: {more:?}");
    process.signal(libc::SIGTERM);
    assert!(matches!(worker.until_committed(1).await, Some(Ended::Aborted(_))));
    assert_eq!(process.code().await, 3);
}

#[tokio::test]
async fn a_run_is_done_and_stays_done() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path(), &[]).await;
    let store = Store::open(folder.path().join("run").to_str().unwrap()).unwrap();
    let config = config(&[]);
    let a = Fake::attach(&process.grpc, hello("a")).await.unwrap();
    let b = Fake::attach(&process.grpc, hello("b")).await.unwrap();
    let (a, b) = tokio::join!(a.train(&config, &store, Script::default()), b.train(&config, &store, Script::default()));
    assert_eq!((a, b), (Ended::Finished, Ended::Finished));
    assert_eq!(process.code().await, 0);
    let again = soon("the exit", command(folder.path(), &[]).output()).await.unwrap();
    let line: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((again.status.code(), line["outcome"].as_str(), line["step"].as_u64()), (Some(0), Some("done"), Some(5)));
}

#[tokio::test]
async fn a_coordinator_that_was_stopped_for_longer_than_the_lease_goes_on_with_its_workers() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path(), &["--set", "workers.count=1", "--set", "workers.lease=400ms"]).await;
    let store = Store::open(folder.path().join("run").to_str().unwrap()).unwrap();
    let config = config(&["workers.count=1"]);
    let mut worker = Fake::attach(&process.grpc, hello("a")).await.unwrap();
    worker.get_ready().await.unwrap();
    let beats = {
        let (out, term, generation) = (worker.out.clone(), worker.term, worker.generation);
        tokio::spawn(async move {
            let mut every = tokio::time::interval(Duration::from_millis(50));
            let body = Some(ella_proto::v1::from_worker::Body::Heartbeat(ella_proto::v1::Heartbeat::default()));
            while out.send(ella_proto::v1::FromWorker { term, generation, body: body.clone() }).await.is_ok() {
                every.tick().await;
            }
        })
    };
    process.signal(libc::SIGSTOP);
    // It is the passing of time that is tested: three leases.
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    process.signal(libc::SIGCONT);
    let status = soon("a status", client::status(&process.grpc)).await.unwrap();
    assert_eq!(status.phase, "training", "{}", status.reason);
    assert!(status.counts.contains_key("coordinator_stopped"), "{:?}", status.counts);
    for step in 1..=5 {
        worker.progress(step).await;
    }
    worker.commit(5, &store, Script::default()).await;
    assert_eq!(worker.until_committed(5).await, None);
    assert_eq!(worker.finish(config.train.steps, ella_proto::v1::Outcome::Done).await, Ended::Finished);
    beats.abort();
    assert_eq!(process.code().await, 0);
}

#[tokio::test]
async fn a_job_is_served_shown_and_ends_with_its_outcomes_code() {
    use ella_proto::v1::from_worker::Body as Say;
    use ella_proto::v1::to_worker::Body as Told;
    use ella_proto::v1::{LeaseDone, LeaseRequest};
    let folder = tempfile::tempdir().unwrap();
    for (error, permanent, code) in [("", false, 0), ("bad input", true, 4)] {
        let process = Process::start_as(command_for(job_toml(folder.path()), &[])).await;
        let mut worker = Fake::attach(&process.grpc, hello("a")).await.unwrap();
        assert!(worker.welcome.config_toml.contains("only workers know") && worker.welcome.run_url == "d", "{:?}", worker.welcome);
        worker.say(Say::LeaseRequest(LeaseRequest { slots: 1 })).await;
        let Some(Told::LeaseGrant(granted)) = worker.next().await else { panic!("no grant") };
        let status = ella_coordinator::status::StatusReport::from(client::status(&process.grpc).await.unwrap());
        let job = status.job.unwrap();
        assert_eq!((job.kind.as_str(), job.workers[0].held[0].unit.as_str(), status.phase.as_str()), ("prepare", "plan", "working"));
        let (lease_id, unit, error) = (granted.lease_id, granted.unit, error.to_owned());
        worker.say(Say::LeaseDone(LeaseDone { lease_id, unit, error, permanent, ..LeaseDone::default() })).await;
        assert!(matches!(worker.next().await, Some(Told::JobOver(over)) if over.permanent == permanent));
        assert_eq!(process.code().await, code);
    }
    let process = Process::start_as(command_for(job_toml(folder.path()), &["--set", "job.start_timeout=50ms"])).await;
    assert_eq!(process.code().await, 1, "nobody came");
    let process = Process::start_as(command_for(job_toml(folder.path()), &[])).await;
    process.signal(libc::SIGTERM);
    assert_eq!(process.code().await, 3);
    let output = soon("the exit", command_for(job_toml(folder.path()), &["--set", "job.leese=1s"]).output()).await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && stderr.contains("did you mean `job.lease`?"), "{stderr}");
    // Nobody has to come for what only workers use to be refused.
    for (set, words) in [
        ("prepare.resolutoin=64", "did you mean `prepare.resolution`?"),
        ("prepare.resolution=\"64\"", "it must be of type integer"),
        ("prepare.sources=[]", "`prepare.sources` is left out or empty"),
    ] {
        let output = soon("the exit", command_for(job_toml(folder.path()), &["--set", set]).output()).await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && stderr.contains(words), "{set}: {stderr}");
    }
}

#[tokio::test]
async fn bad_usage_and_bad_config_are_told_on_stderr_with_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &str); 4] = [
        (&["--set", "train.stepz=1"], "did you mean `train.steps`?"),
        (&["--set", "workers.count=100"], "workers.count"),
        (&["--set", "run.output=ftp://x/y"], "unknown scheme ftp"),
        (&["--listen", "localhost:7000"], "expected ADDRESS:PORT"),
    ];
    for (extra, words) in cases {
        let output = soon("the exit", command(folder.path(), extra).output()).await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{extra:?}: {stderr}");
        assert!(stderr.contains(words), "{extra:?}: {stderr}");
        assert!(output.stdout.is_empty());
    }
    let missing = Command::new(BINARY).arg(folder.path().join("none.toml")).output().await.unwrap();
    assert_eq!(missing.status.code(), Some(2));
}

/// A term that is claimed ends whoever had the run: not for nothing.
#[tokio::test]
async fn one_that_cannot_serve_leaves_the_one_that_does_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (ours, other) = (Ca::new(), Ca::new());
    ours.write(&folder.path().join("ours"), "127.0.0.1");
    other.write(&folder.path().join("other"), "127.0.0.1");
    let process = Process::start(folder.path(), &["--set", "workers.start_timeout=10m"]).await;
    let log = folder.path().join("run/log");
    for wrong in [
        &["--tls-cert", &path("ours/tls.crt")][..],
        &["--tls-cert", &path("ours/tls.crt"), "--tls-key", &path("other/tls.key")],
        &["--tls-cert", &path("ours/tls.crt"), "--tls-key", &path("none")],
        &["--address-file", &path("none/addresses.json")],
        &["--token-file", &path("none")],
        &["--listen", &process.grpc],
    ] {
        let extra = [&["--set", "workers.start_timeout=10m"][..], wrong].concat();
        let output = soon("the exit", command(folder.path(), &extra).output()).await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "{wrong:?}: {stderr}");
        assert_eq!(std::fs::read_dir(&log).unwrap().count(), 1, "{wrong:?}: {stderr}");
    }
    assert_eq!(client::status(&process.grpc).await.unwrap().phase, "waiting");
}

#[tokio::test]
async fn one_that_is_supervised_leaves_at_once_and_leaves_its_workers_be() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(folder.path(), &["--set", "workers.count=1", "--stay", "--hand-over"]).await;
    let mut worker = Fake::attach(&process.grpc, hello("a")).await.unwrap();
    worker.get_ready().await.unwrap();
    process.signal(libc::SIGTERM);
    assert_eq!(worker.next().await, None, "its stream ends, without a word");
    assert_eq!(process.code().await, 3);
}
