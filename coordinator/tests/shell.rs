//! The shell against bad input: bytes that are no message, a store that fails, a folder of another run; and what people read over HTTP.

#![allow(clippy::unwrap_used)]

mod common;

use bytes::{Buf, BufMut, Bytes};
use common::*;
use ella_coordinator::client::{self, ClientError};
use ella_coordinator::core::{Failure, Outcome};
use ella_coordinator::shell::cluster::Cluster;
use ella_coordinator::shell::{Coordinator, Opened, Options, ProgressTo, RunError};
use ella_coordinator::status::StatusReport;
use ella_proto::config::RunConfig;
use ella_proto::v1::coordinator_client::CoordinatorClient;
use ella_proto::v1::from_worker::Body as Say;
use ella_proto::v1::{RunStatus, StatusRequest};
use ella_store::{Body, Limits, Operation, RunLog, Store, faulty};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Sends bytes as they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, tonic::Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

async fn send_raw(url: &str, bytes: Bytes) {
    let channel = raw_channel(url).await;
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = "/ella.v1.Coordinator/Attach".parse().unwrap();
    // The stream stays open: it is for the server to end it.
    let stream = futures::StreamExt::chain(futures::stream::iter([bytes]), futures::stream::pending());
    let mut answers = soon("an answer", grpc.streaming(tonic::Request::new(stream), path, Raw)).await.unwrap().into_inner();
    let end = soon("the stream's end", answers.message()).await;
    assert!(matches!(end, Ok(None) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn garbage_and_oversized_messages_are_refused_and_counted() {
    let store = Store::in_memory();
    let served = Served::start(&config(&[]), &store).await;
    send_raw(&served.url(), Bytes::from_static(&[0xff; 40])).await;
    send_raw(&served.url(), Bytes::from(vec![0x0a; 2 << 20])).await;
    let empty = Bytes::new();
    let channel = async {
        // An empty message is well-formed, and says nothing.
        let channel = raw_channel(&served.url()).await;
        let mut grpc = tonic::client::Grpc::new(channel);
        grpc.ready().await.unwrap();
        let stream = futures::stream::iter([empty]);
        let _ = grpc.streaming(tonic::Request::new(stream), "/ella.v1.Coordinator/Attach".parse().unwrap(), Raw).await.unwrap();
    };
    soon("an empty message's answer", channel).await;
    let status = served.status_when(|status| status.counts.len() >= 3).await;
    for name in ["refused_unreadable", "refused_oversized", "refused_empty"] {
        assert_eq!(status.counts.get(name), Some(&1), "{:?}", status.counts);
    }
    assert_eq!(status.phase, "waiting", "nobody was harmed");
}

#[tokio::test]
async fn the_journal_outlives_a_store_that_refuses_it_and_says_so() {
    let faults = faulty::Faults::new();
    let store = faults.inject(&Store::in_memory());
    faults.push(Operation::Put, "metrics/", faulty::Failure::Denied, 100);
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    let ended = train_two(&served, &config, &store, [Script::default(); 2]).await;
    assert_eq!(ended, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
    assert!(store.list("metrics").await.unwrap().is_empty());
    assert!(!store.list("events").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_log_that_cannot_be_written_fails_the_run() {
    let faults = faulty::Faults::new();
    let store = faults.inject(&Store::in_memory());
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    faults.push(Operation::Create, "log/", faulty::Failure::Full, 100);
    let ended = train_two(&served, &config, &store, [Script::default(); 2]).await;
    let outcome = served.outcome().await;
    assert!(matches!(&outcome, Outcome::Failed(failure) if matches!(**failure, Failure::Append { .. })), "{outcome:?}");
    assert!(outcome.reason().contains("no space left"), "{}", outcome.reason());
    assert_eq!(ended, [Ended::Aborted(outcome.reason()), Ended::Aborted(outcome.reason())]);
}

/// Else it would be "done", with a folder in which no run is.
#[tokio::test]
async fn a_run_whose_folder_is_removed_fails_for_good() {
    let (config, store) = (config(&[]), Store::in_memory());
    let served = Served::start(&config, &store).await;
    store.delete(&ella_store::log::record_key(0)).await.unwrap();
    let ended = train_two(&served, &config, &store, [Script::default(); 2]).await;
    let outcome = served.outcome().await;
    assert!(matches!(&outcome, Outcome::Failed(failure) if matches!(**failure, Failure::LogGone { .. })), "{outcome:?}");
    assert!(outcome.exit_code() == 4 && outcome.reason().contains("removed or replaced"), "{}", outcome.reason());
    assert_eq!(ended, [Ended::Aborted(outcome.reason()), Ended::Aborted(outcome.reason())]);
}

/// A worker that is stopped, or whose network is cut, does not close its connection. Kubernetes does not wait for long.
#[tokio::test]
async fn a_peer_that_does_not_hang_up_is_not_waited_for() {
    let served = Served::start(&config(&[]), &Store::in_memory()).await;
    let mut hung = tokio::net::TcpStream::connect(served.addresses.grpc).await.unwrap();
    // HTTP/2's preface and empty settings: from here on it answers nothing.
    hung.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    hung.read_u8().await.unwrap();
    served.stops.send("night".into()).await.unwrap();
    let began = std::time::Instant::now();
    assert!(matches!(served.outcome().await, Outcome::Preempted { .. }));
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    drop(hung);
}

#[tokio::test]
async fn a_lost_reply_or_a_store_that_is_away_for_a_moment_ends_nothing() {
    let faults = faulty::Faults::new();
    let limits = Limits { first_pause: Duration::from_millis(1), longest_pause: Duration::from_millis(2), ..Limits::default() };
    let store = faults.inject(&Store::in_memory()).with_limits(limits);
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    faults.push(Operation::Create, "log/", faulty::Failure::Before, 2);
    faults.push(Operation::Create, "log/", faulty::Failure::LostReply, 1);
    let ended = train_two(&served, &config, &store, [Script::default(); 2]).await;
    assert_eq!(ended, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
    assert!(faults.is_spent() && store.retries() >= 2);
}

/// As long as workers try to save what its records are of.
#[tokio::test]
async fn a_log_that_cannot_be_written_is_tried_for_as_long_as_a_commit_may_take() {
    let faults = faulty::Faults::new();
    // One attempt of the store's for each of the keeper's.
    let limits = Limits { overall: Duration::from_millis(500), first_pause: Duration::from_secs(1), ..Limits::default() };
    let store = faults.inject(&Store::in_memory()).with_limits(limits);
    let config = config(&["workers.start_timeout=4s"]);
    let served = Served::start(&config, &store).await;
    faults.push(Operation::Create, "log/", faulty::Failure::Before, 4);
    let ended = train_two(&served, &config, &store, [Script::default(); 2]).await;
    assert_eq!(ended, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
    assert!(faults.is_spent());
}

#[tokio::test]
async fn a_run_of_another_config_is_refused_naming_the_keys() {
    let (_, store) = cut_off_after_step_4().await;
    let other = config(&["run.seed=9", "train.optimizer.lr=1", "checkpoint.every=3"]);
    let error = Coordinator::open(&other, store.clone(), &options()).await.unwrap_err();
    let RunError::OtherConfig { keys, .. } = &error else { panic!("{error}") };
    assert_eq!(keys, &["run.seed", "train.optimizer.lr"]);
    assert_eq!(error.exit_code(), 2);
    // What binds no bits may change, and is written anew.
    let free = config(&["checkpoint.every=3"]);
    let _served = Served::start(&free, &store).await;
    assert_eq!(store.get("run.toml").await.unwrap(), free.to_toml().as_bytes());

    store.put("run.toml", Bytes::from_static(b"[run")).await.unwrap();
    let error = Coordinator::open(&free, store.clone(), &options()).await.unwrap_err();
    assert!(matches!(error, RunError::BadRunToml { .. }) && error.exit_code() == 2, "{error}");
}

/// With its comments, and the keys that it leaves out.
#[tokio::test]
async fn a_persons_own_config_in_the_runs_folder_is_not_overwritten() {
    let (config, store) = (config(&[]), Store::in_memory());
    for own in [common::CONFIG, "[run"] {
        store.put("run.toml", Bytes::from_static(own.as_bytes())).await.unwrap();
        let error = Coordinator::open(&config, store.clone(), &options()).await.unwrap_err();
        assert!(matches!(error, RunError::OwnToml { .. }) && error.exit_code() == 2, "{error}");
        assert!(error.to_string().contains("/run.toml: no run has written this"), "{error}");
        assert_eq!(store.get("run.toml").await.unwrap(), own.as_bytes());
        assert_eq!(store.list("").await.unwrap().len(), 1, "nothing is written");
    }
    // What a run has left that did not come as far as its log is one's own to go on from, also with more workers.
    store.put("run.toml", common::config(&["workers.count=1"]).to_toml().into()).await.unwrap();
    let _served = Served::start(&config, &store).await;
    assert_eq!(store.get("run.toml").await.unwrap(), config.to_toml().as_bytes());
}

#[tokio::test]
async fn a_data_sets_folder_is_no_runs() {
    for file in ["manifest.json", "plan.json"] {
        let store = Store::in_memory();
        store.put(file, Bytes::from_static(b"{}")).await.unwrap();
        let error = Coordinator::open(&config(&[]), store.clone(), &options()).await.unwrap_err();
        assert!(matches!(error, RunError::HoldsData { .. }) && error.exit_code() == 4, "{error}");
        assert_eq!(store.list("").await.unwrap().len(), 1, "nothing is written");
    }
}

/// Else a run that was cut off would be told to be done, at a step that it has passed.
#[tokio::test]
async fn fewer_steps_than_a_run_has_taken_are_refused_and_as_many_complete_it() {
    let (begun, store) = cut_off_after_step_4().await;
    let error = Coordinator::open(&config(&["train.steps=3"]), store.clone(), &options()).await.unwrap_err();
    assert!(matches!(error, RunError::FewerSteps { step: 4, steps: 3, .. }) && error.exit_code() == 2, "{error}");
    assert_eq!(store.get("run.toml").await.unwrap(), begun.to_toml().as_bytes());
    let enough = Coordinator::open(&config(&["train.steps=4"]), store, &options()).await.unwrap();
    assert!(matches!(enough, Opened::Done { step: 4 }), "{enough:?}");
}

/// A first start that came to nothing leaves a folder that the mended config may use.
#[tokio::test]
async fn a_run_that_ended_before_its_first_commit_takes_another_config() {
    let store = Store::in_memory();
    let served = Served::start(&config(&[]), &store).await;
    let other = config(&["run.seed=9"]);
    let refused = Coordinator::open(&other, store.clone(), &options()).await.unwrap_err();
    assert!(matches!(refused, RunError::OtherConfig { .. }), "somebody has it: {refused}");
    served.stops.send("enough".into()).await.unwrap();
    served.outcome().await;
    let served = Served::start(&other, &store).await;
    assert_eq!(store.get("run.toml").await.unwrap(), other.to_toml().as_bytes());
    assert_eq!(train_two(&served, &other, &store, [Script::default(); 2]).await, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
}

/// A run whose coordinator died, with all its workers, when the commits of step 2 and 4 stood.
async fn cut_off_after_step_4() -> (RunConfig, Store) {
    let (config, store) = (config(&[]), Store::in_memory());
    let served = Served::start(&config, &store).await;
    let limit = tokio::sync::watch::channel(4).1;
    let life = |fake| Life::new(fake, &config, &store, Script::default()).up_to(limit.clone()).live();
    let a = Fake::attach(&served.url(), hello("a")).await.unwrap();
    let b = Fake::attach(&served.url(), hello("b")).await.unwrap();
    tokio::select! {
        ended = async { tokio::join!(life(a), life(b)) } => panic!("{ended:?}"),
        _ = served.status_when(|status| status.last_commit_step == 4) => {}
    }
    served.kill().await;
    (config, store)
}

#[tokio::test]
async fn a_damaged_commit_or_log_is_told_with_the_file_and_nothing_is_deleted() {
    let (config, store) = cut_off_after_step_4().await;
    let file = "commits/000000000004.1/ema.safetensors";
    let (whole, folders, records) =
        (store.get(file).await.unwrap(), store.folders("commits").await.unwrap(), store.list("log").await.unwrap());
    let earlier = "commits/000000000002.1/optimizer.safetensors";
    let first = store.get(earlier).await.unwrap();
    store.put(file, whole.slice(..3)).await.unwrap();
    store.delete(earlier).await.unwrap();
    let error = Coordinator::open(&config, store.clone(), &options()).await.unwrap_err();
    assert!(matches!(error, RunError::DamagedCommits { step: 4, .. }), "{error}");
    assert!(error.to_string().contains(file) && error.to_string().contains("found 3"), "{error}");
    assert_eq!(error.exit_code(), 4);
    store.put(earlier, first).await.unwrap();
    store.delete("run.toml").await.unwrap();
    let error = Coordinator::open(&common::config(&["run.seed=9"]), store.clone(), &options()).await.unwrap_err();
    assert!(matches!(error, RunError::OtherDigest { step: 4, .. }) && error.exit_code() == 2, "{error}");
    store.put(file, whole).await.unwrap();
    assert_eq!(store.list("log").await.unwrap(), records, "a refused start leaves no term behind");

    store.delete("log/000000000001.json").await.unwrap();
    let error = Coordinator::open(&config, store.clone(), &options()).await.unwrap_err();
    assert!(error.to_string().contains("log/000000000001.json") && error.exit_code() == 4, "{error}");
    assert_eq!(store.folders("commits").await.unwrap(), folders);
}

/// One byte of the newest commit is wrong: the run goes on from the one before, and says so to whoever looks.
#[tokio::test]
async fn a_damaged_commit_is_given_up_for_the_one_before() {
    let (config, store) = cut_off_after_step_4().await;
    let file = "commits/000000000004.1/ema.safetensors";
    let mut bytes = store.get(file).await.unwrap().to_vec();
    bytes[1] ^= 1;
    store.put(file, bytes.into()).await.unwrap();

    let Opened::Ready(opened) = Coordinator::open(&config, store.clone(), &options()).await.unwrap() else { panic!("it is not done") };
    let told = opened.fell_back().unwrap();
    assert!(told.contains("step 4") && told.contains(file) && told.contains("wrong bytes"), "{told}");
    drop(opened);
    let records = RunLog::read(&store).await.unwrap();
    assert_eq!(records.last().unwrap().body, Body::Retire { commits: vec!["commits/000000000004.1".into()] });

    // The next one finds nothing wrong, and trains from step 2 to the end.
    let Opened::Ready(opened) = Coordinator::open(&config, store.clone(), &options()).await.unwrap() else { panic!("it is not done") };
    assert_eq!(opened.fell_back(), None);
    drop(opened);
    let served = Served::start(&config, &store).await;
    assert_eq!(train_two(&served, &config, &store, [Script::default(); 2]).await, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
    let commits = RunLog::read(&store).await.unwrap().into_iter().filter_map(|record| match record.body {
        Body::Commit(commit) => Some(commit.folder),
        _ => None,
    });
    let folders: Vec<String> = commits.collect();
    assert!(folders.contains(&"commits/000000000004.4".to_owned()), "{folders:?}");
}

/// The coordinator that has the run goes on committing, and deletes what the next one is looking at.
#[tokio::test]
async fn commits_that_are_given_up_while_they_are_looked_at_are_not_damaged() {
    let (_, store) = cut_off_after_step_4().await;
    let faults = faulty::Faults::new();
    faults.push(Operation::Head, "commits/000000000004.1/", faulty::Failure::Slow(Duration::from_millis(200)), 1);
    let (further, looking) = (config(&["train.steps=8"]), faults.inject(&store));
    let records = RunLog::read(&store).await.unwrap();
    let of = |record: &ella_store::Record| if let Body::Commit(commit) = &record.body { Some(commit.clone()) } else { None };
    let (Body::Term(term), Some(last)) = (records[0].body.clone(), records.iter().filter_map(of).next_back()) else {
        panic!("{records:?}")
    };
    let (mut log, _) = RunLog::claim(&store, term, "still here", 0).await.unwrap();
    let goes_on = async {
        while !faults.is_spent() {
            tokio::task::yield_now().await;
        }
        let next = ella_store::Commit { step: 6, folder: "commits/000000000006.2".into(), ..last.clone() };
        for part in &next.parts {
            let bytes = store.get(&format!("{}/{}", last.folder, part.name)).await.unwrap();
            store.put(&format!("{}/{}", next.folder, part.name), bytes).await.unwrap();
        }
        let before = store.folders("commits").await.unwrap().into_iter().filter(|folder| *folder != next.folder).collect::<Vec<_>>();
        log.append(Body::Commit(next), 0).await.unwrap();
        log.append(Body::Retire { commits: before.clone() }, 0).await.unwrap();
        ella_store::remove_leftovers(&store, &before).await.unwrap();
    };
    let (options, opening) = (options(), std::time::Instant::now());
    let (opened, ()) = tokio::join!(Coordinator::open(&further, looking, &options), goes_on);
    let Opened::Ready(opened) = opened.unwrap() else { panic!("it is not done") };
    assert_eq!(opened.fell_back(), None, "{:?}", opening.elapsed());
    assert!(matches!(RunLog::read(&store).await.unwrap().last().unwrap().body, Body::Term(_)));
}

/// Else the later one trains under its own config, and the other's may stand in the run's folder.
#[tokio::test]
async fn of_coordinators_that_begin_a_run_at_once_under_unlike_configs_one_is_refused() {
    let (store, faults) = (Store::in_memory(), faulty::Faults::new());
    faults.push(Operation::Create, "probe.", faulty::Failure::Slow(Duration::from_millis(200)), 1);
    let (slower, faster, slow, options) = (config(&[]), config(&["run.seed=9"]), faults.inject(&store), options());
    let meanwhile = async {
        while !faults.is_spent() {
            tokio::task::yield_now().await;
        }
        Coordinator::open(&faster, store.clone(), &options).await
    };
    let (refused, opened) = tokio::join!(Coordinator::open(&slower, slow, &options), meanwhile);
    assert!(matches!(opened, Ok(Opened::Ready(_))), "{opened:?}");
    assert!(matches!(&refused, Err(RunError::OtherConfig { keys, .. }) if keys == &["run.seed"]), "{refused:?}");
    assert_eq!(store.get("run.toml").await.unwrap(), faster.to_toml().as_bytes());
    assert_eq!(RunLog::read(&store).await.unwrap().len(), 1, "who has the run keeps it");
}

/// Where the store is full no other commit comes to be before that.
#[tokio::test]
async fn a_keep_rule_that_was_lowered_holds_when_the_run_is_opened() {
    let (_, store) = cut_off_after_step_4().await;
    let before = store.folders("commits").await.unwrap();
    let fewer = config(&["checkpoint.keep=1"]);
    let Opened::Ready(opened) = Coordinator::open(&fewer, store.clone(), &options()).await.unwrap() else { panic!("it is not done") };
    drop(opened);
    let records = RunLog::read(&store).await.unwrap();
    assert_eq!(records.last().unwrap().body, Body::Retire { commits: vec!["commits/000000000002.1".into()] });
    let after = store.folders("commits").await.unwrap();
    assert_eq!((before.len(), after), (2, vec!["commits/000000000004.1".to_owned()]));
    // Once is enough.
    drop(Coordinator::open(&fewer, store.clone(), &options()).await.unwrap());
    assert!(matches!(RunLog::read(&store).await.unwrap().last().unwrap().body, Body::Term(_)));
}

/// A run that is done is done as long as its newest commit is whole, and its config can be read.
#[tokio::test]
async fn a_done_run_is_looked_at_before_it_is_called_done() {
    let (config, store) = (config(&[]), Store::in_memory());
    let served = Served::start(&config, &store).await;
    assert_eq!(train_two(&served, &config, &store, [Script::default(); 2]).await, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
    store.delete("run.toml").await.unwrap();
    let opened = Coordinator::open(&config, store.clone(), &options()).await.unwrap();
    assert!(matches!(opened, Opened::Done { .. }));
    assert_eq!(store.get("run.toml").await.unwrap(), config.to_toml().as_bytes());

    let state = ella_store::RunState::from_records(&RunLog::read(&store).await.unwrap());
    let file = format!("{}/connector.safetensors", state.last_commit().unwrap().folder);
    let bytes = store.get(&file).await.unwrap();
    store.put(&file, bytes.slice(..3)).await.unwrap();
    let Opened::Ready(opened) = Coordinator::open(&config, store.clone(), &options()).await.unwrap() else { panic!("it is not done") };
    assert!(opened.fell_back().unwrap().contains(&file));
    drop(opened);
    let served = Served::start(&config, &store).await;
    assert_eq!(train_two(&served, &config, &store, [Script::default(); 2]).await, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
}

async fn get(address: std::net::SocketAddr, path: &str) -> (u16, String) {
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    socket.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    soon("a reply", socket.read_to_string(&mut text)).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Workers ask that all the time: an answer that names thousands of them, to each of them, would be gigabytes.
#[tokio::test]
async fn whether_a_coordinator_answers_is_told_without_its_status() {
    let served = Served::start(&config(&[]), &Store::in_memory()).await;
    let _worker = Fake::attach(&served.url(), hello("a")).await.unwrap();
    let mut client = CoordinatorClient::new(raw_channel(&served.url()).await);
    let mut ask = async |alive| client.status(StatusRequest { alive }).await.unwrap().into_inner();
    assert_eq!((ask(true).await, ask(false).await.workers.len()), (RunStatus::default(), 1));
}

#[tokio::test]
async fn people_and_probes_read_the_status_over_http() {
    let store = Store::in_memory();
    let served = Served::start(&config(&["workers.count=1"]), &store).await;
    let mut worker = Fake::attach(&served.url(), hello("<b>w</b>")).await.unwrap();
    worker.get_ready().await.unwrap();
    worker.progress(1).await;
    worker.say(Say::Heartbeat(ella_proto::v1::Heartbeat { step: 1, ..Default::default() })).await;
    let status = StatusReport::from(served.status_when(|status| status.step == 1).await);
    assert_eq!((status.loss, status.samples, status.workers[0].parts.unwrap().forward), (Some(1.0), 32, 0.005));

    let http = served.addresses.http;
    let (code, body) = get(http, "/api/v1/status").await;
    let report: StatusReport = serde_json::from_str(&body[body.find('{').unwrap()..=body.rfind('}').unwrap()]).unwrap();
    assert_eq!((code, report.step, report.phase.as_str()), (200, 1, "training"));
    let (code, body) = get(http, "/metrics").await;
    assert!(code == 200 && body.contains("\nella_step 1\n") && body.contains("ella_phase{phase=\"training\"} 1"), "{body}");
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(http, path).await.0, 200);
    }
    assert_eq!(get(http, "/nothing").await.0, 404);
}

#[tokio::test]
async fn the_final_status_is_readable_for_a_moment() {
    let store = Store::in_memory();
    let config = config(&["workers.count=1"]);
    let lingering = ella_coordinator::shell::Options { linger: Duration::from_secs(2), ..options() };
    let served = Served::start_with(&config, &store, lingering).await;
    let worker = Fake::attach(&served.url(), hello("a")).await.unwrap();
    worker.train(&config, &store, Script::default()).await;
    let status = client::status(&served.url()).await.unwrap();
    assert_eq!((status.phase.as_str(), status.step, status.last_commit_step), ("done", 5, 5));
    let refused = Fake::attach(&served.url(), hello("b")).await.err().unwrap();
    assert_eq!((refused.detail.as_str(), refused.outcome()), ("the run is over (done)", ella_proto::v1::Outcome::Done));
}

#[tokio::test]
async fn a_client_says_what_is_wrong_with_an_address() {
    let error = client::status("not an address").await.unwrap_err();
    assert!(matches!(error, ClientError::BadUrl { .. }), "{error}");
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = soon("an error", client::stop(&free.to_string(), "")).await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let options = ella_coordinator::shell::Options { http: taken.local_addr().unwrap(), ..options() };
    let error = Coordinator::open(&config(&[]), Store::in_memory(), &options).await.unwrap_err();
    assert!(matches!(error, RunError::Bind { .. }) && error.exit_code() == 2, "{error}");
}

/// Takes patches for annotations, the first of them badly.
async fn fake_cluster() -> (String, tokio::sync::mpsc::Receiver<(String, serde_json::Value)>) {
    use axum::http::{StatusCode, Uri};
    let (patches, received) = tokio::sync::mpsc::channel(16);
    let answer = move |uri: Uri, axum::Json(body): axum::Json<serde_json::Value>| async move {
        let code = if patches.capacity() == 16 { StatusCode::FORBIDDEN } else { StatusCode::OK };
        patches.send((uri.path().to_owned(), body)).await.unwrap();
        (code, axum::Json(serde_json::json!({})))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(axum::routing::patch(answer))).await });
    (url, received)
}

const ANNOTATED: &str = "/apis/batch/v1/namespaces/ella/jobs/first-workers";

/// A fake cluster's patches, and what has a coordinator tell it.
async fn annotated() -> (tokio::sync::mpsc::Receiver<(String, serde_json::Value)>, Options, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("token"), "of this pod").unwrap();
    let (url, patches) = fake_cluster().await;
    let progress_to = vec![ProgressTo::annotations(Cluster::at(url, folder.path()), ANNOTATED)];
    (patches, Options { progress_to, ..options() }, folder)
}

#[tokio::test]
async fn what_the_cluster_cannot_be_told_is_counted_and_holds_nobody_up() {
    let (mut patches, options, _folder) = annotated().await;
    let served = Served::start_with(&config(&[]), &Store::in_memory(), options).await;
    let (told, body) = soon("a patch", patches.recv()).await.unwrap();
    assert_eq!((told.as_str(), &body["metadata"]["annotations"]["ella/phase"]), (ANNOTATED, &serde_json::json!("waiting")));
    let status = served.status_when(|status| status.counts.contains_key("progress_pushes_failed")).await;
    assert_eq!((status.counts["progress_pushes_failed"], status.phase.as_str()), (1, "waiting"));
}

#[tokio::test]
async fn the_cluster_is_told_how_a_run_ended_however_soon_it_does() {
    let (mut patches, options, _folder) = annotated().await;
    let (config, store) = (config(&[]), Store::in_memory());
    let served = Served::start_with(&config, &store, options).await;
    train_two(&served, &config, &store, [Script::default(); 2]).await;
    assert_eq!(served.outcome().await, Outcome::Done);
    let mut last = serde_json::Value::Null;
    while let Ok((_, body)) = patches.try_recv() {
        last = body;
    }
    let said = ["ella/phase", "ella/progress"].map(|name| last["metadata"]["annotations"][name].as_str().unwrap_or_default());
    assert_eq!(said, ["done", "100.0 % (step 5 of 5)"], "{last}");
}
