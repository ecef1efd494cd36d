//! Runs whose workers come and go, and whose coordinators die, over real gRPC.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use ella_coordinator::client::{self, ClientError};
use ella_coordinator::core::{Failure, Outcome};
use ella_coordinator::shell::Options;
use ella_proto::config::RunConfig;
use ella_proto::v1;
use ella_store::{Body, Commit, RunLog, Store};
use tokio::sync::watch;
use tokio::task::JoinHandle;

fn memory() -> Store {
    Store::in_memory()
}

/// Every commit of a run's log, in order.
async fn commits(store: &Store) -> Vec<Commit> {
    let records = RunLog::read(store).await.unwrap().into_iter();
    records.filter_map(|record| if let Body::Commit(commit) = record.body { Some(commit) } else { None }).collect()
}

/// What commits bind, but for who made them.
fn bits(commits: &[Commit]) -> Vec<(u64, String, Vec<String>)> {
    let parts = |commit: &Commit| commit.parts.iter().map(|part| part.blake3.to_string()).collect();
    commits.iter().map(|commit| (commit.step, commit.state_digest.to_string(), parts(commit))).collect()
}

/// The commits of a run in which nothing happens.
async fn calm(config: &RunConfig) -> Vec<(u64, String, Vec<String>)> {
    let store = memory();
    let served = Served::start(config, &store).await;
    assert_eq!(train_two(&served, config, &store, [Script::default(); 2]).await, [Ended::Finished, Ended::Finished]);
    served.outcome().await;
    bits(&commits(&store).await)
}

/// A run with workers that take no more steps than they may, and go to where its coordinator is.
struct Cluster {
    config: RunConfig,
    store: Store,
    served: Served,
    url: watch::Sender<String>,
    limit: watch::Sender<u64>,
}

impl Cluster {
    async fn start(set: &[&str], limit: u64) -> Self {
        let (config, store) = (config(set), memory());
        let served = Served::start(&config, &store).await;
        let (url, limit) = (watch::channel(served.url()).0, watch::channel(limit).0);
        Self { config, store, served, url, limit }
    }

    async fn worker(&self, name: &str, script: Script) -> JoinHandle<Ended> {
        let fake = Fake::attach(&**self.url.borrow(), hello(name)).await.unwrap();
        let life = Life::new(fake, &self.config, &self.store, script);
        tokio::spawn(life.that_returns(self.url.subscribe()).up_to(self.limit.subscribe()).live())
    }

    /// Two workers, and their run at this step.
    async fn two_at(&self, step: u64) -> [JoinHandle<Ended>; 2] {
        let workers = [self.worker("a", Script::default()).await, self.worker("b", Script::default()).await];
        self.served.status_when(|status| status.step == step).await;
        workers
    }

    /// Kills the coordinator, then this worker, lets the others take steps without one, and starts the next.
    async fn replace(self, worker: Option<JoinHandle<Ended>>, limit: u64) -> Self {
        self.served.kill().await;
        if let Some(worker) = worker {
            worker.abort();
            let _ = worker.await;
        }
        self.limit.send_replace(limit);
        let served = Served::start(&self.config, &self.store).await;
        self.url.send_replace(served.url());
        Self { served, ..self }
    }
}

async fn ended(worker: JoinHandle<Ended>) -> Ended {
    soon("a worker's end", worker).await.unwrap()
}

#[tokio::test]
async fn when_a_worker_dies_the_other_goes_on_to_the_same_bits() {
    let cluster = Cluster::start(&[], u64::MAX).await;
    let dies = Script { dies_after: Some(3), ..Script::default() };
    let (a, b) = (cluster.worker("a", Script::default()).await, cluster.worker("b", dies).await);
    assert_eq!((ended(a).await, ended(b).await), (Ended::Finished, Ended::Died));
    assert_eq!(cluster.served.outcome().await, Outcome::Done);
    let made = commits(&cluster.store).await;
    let last: Vec<_> = made.iter().map(|commit| (commit.step, commit.generation, commit.world)).collect();
    assert_eq!(last[last.len() - 2..], [(4, 2, 1), (5, 2, 1)]);
    // The commit of step 2 may not have been recorded before its generation ended.
    let made = bits(&made);
    assert!(calm(&cluster.config).await.ends_with(&made), "{made:?}");
    for commit in &commits(&cluster.store).await[last.len() - 2..] {
        ella_store::verify_commit(&cluster.store, commit).await.unwrap();
    }
}

#[tokio::test]
async fn a_worker_that_comes_later_is_taken_in_at_a_boundary() {
    let cluster = Cluster::start(&["workers.join_window=50ms", "train.steps=6"], 2).await;
    let [a, b] = cluster.two_at(2).await;
    cluster.served.status_when(|status| status.last_commit_step == 2).await;
    let c = cluster.worker("c", Script::default()).await;
    cluster.served.status_when(|status| status.workers.iter().any(|worker| worker.state == "spare")).await;
    let reason = "after the next step another generation begins (workers that are to join: 1)";
    cluster.served.status_when(|status| status.reason == reason).await;
    cluster.limit.send_replace(3);
    let status = cluster.served.status_when(|status| status.generation == 2 && status.phase == "training").await;
    assert_eq!((status.step, status.workers.len()), (3, 3));
    cluster.limit.send_replace(u64::MAX);
    for worker in [a, b, c] {
        assert_eq!(ended(worker).await, Ended::Finished);
    }
    assert_eq!(cluster.served.outcome().await, Outcome::Done);
    let made: Vec<_> = commits(&cluster.store).await.iter().map(|commit| (commit.step, commit.world)).collect();
    assert_eq!(made, [(2, 2), (4, 3), (6, 3)]);
    assert_eq!(bits(&commits(&cluster.store).await), calm(&cluster.config).await);
}

#[tokio::test]
async fn a_coordinator_that_is_replaced_adopts_the_generation_and_nobody_stops() {
    let cluster = Cluster::start(&["train.steps=8"], 2).await;
    let workers = cluster.two_at(2).await;
    cluster.served.status_when(|status| status.last_commit_step == 2).await;
    let cluster = cluster.replace(None, 5).await;
    let status = cluster.served.status_when(|status| status.phase == "training").await;
    assert_eq!((status.term, status.generation), (2, 1), "no generation was formed");
    cluster.limit.send_replace(u64::MAX);
    for worker in workers {
        assert_eq!(ended(worker).await, Ended::Finished);
    }
    assert_eq!(cluster.served.outcome().await, Outcome::Done);
    let made: Vec<_> = commits(&cluster.store).await.into_iter().map(|commit| (commit.step, commit.folder)).collect();
    let folder = |step: u64, term: u64| (step, ella_store::commit_folder(step, term, 1));
    assert_eq!(made, [folder(2, 1), folder(6, 2), folder(8, 2)], "none while there was no coordinator");
}

#[tokio::test]
async fn a_coordinator_that_is_replaced_regroups_if_a_rank_is_gone() {
    let cluster = Cluster::start(&["workers.lease=400ms", "train.steps=8"], 2).await;
    let [a, b] = cluster.two_at(2).await;
    let cluster = cluster.replace(Some(b), 2).await;
    let status = cluster.served.status_when(|status| status.workers.len() == 1).await;
    assert_eq!(status.reason, "waiting for the ranks of the last coordinator to come back: 1 of 2 are here");
    let status = cluster.served.status_when(|status| status.phase == "training").await;
    assert_eq!((status.term, status.generation, status.step, status.workers.len()), (2, 2, 2, 1));
    cluster.limit.send_replace(u64::MAX);
    assert_eq!(ended(a).await, Ended::Finished);
    assert_eq!(cluster.served.outcome().await, Outcome::Done);
    assert_eq!(commits(&cluster.store).await.last().unwrap().step, 8);
}

#[tokio::test]
async fn a_drain_of_one_worker_lets_it_go_and_the_other_trains_on() {
    let cluster = Cluster::start(&[], 2).await;
    let [a, b] = cluster.two_at(2).await;
    let url = cluster.served.url();
    let error = client::drain(&url, "nobody", "").await.unwrap_err();
    assert!(matches!(&error, ClientError::Refused { status, .. } if status.code() == tonic::Code::NotFound), "{error}");
    assert!(error.to_string().contains("\"nobody\""), "{error}");
    client::drain(&url, "b", "the node is needed").await.unwrap();
    let status = cluster.served.status_when(|status| status.workers.iter().any(|worker| worker.leaving)).await;
    assert_eq!((status.workers[1].worker_id.as_str(), status.workers[1].leaving), ("b", true));
    cluster.limit.send_replace(u64::MAX);
    assert_eq!(ended(b).await, Ended::Released("the node is needed".into()));
    assert_eq!(ended(a).await, Ended::Finished);
    assert_eq!(cluster.served.outcome().await, Outcome::Done);
}

#[tokio::test]
async fn a_coordinator_that_was_superseded_stops_and_its_workers_go_on_under_the_next() {
    let cluster = Cluster::start(&["train.steps=8"], 1).await;
    let workers = cluster.two_at(1).await;
    let second = Served::start(&cluster.config, &cluster.store).await;
    cluster.url.send_replace(second.url());
    // The commit of step 2 is what tells the first one.
    cluster.limit.send_replace(2);
    let outcome = cluster.served.outcome().await;
    let reason = "superseded: the coordinator of term 2 has taken over this run, so this one stops";
    assert_eq!((outcome.exit_code(), outcome.reason().as_str()), (4, reason), "whoever starts it again takes the run back");
    let status = second.status_when(|status| status.phase == "training").await;
    assert_eq!((status.generation, status.last_commit_step), (1, 0));
    cluster.limit.send_replace(u64::MAX);
    for worker in workers {
        assert_eq!(ended(worker).await, Ended::Finished);
    }
    assert_eq!(second.outcome().await, Outcome::Done);
    let made: Vec<_> = commits(&cluster.store).await.into_iter().map(|commit| commit.folder).collect();
    assert_eq!(made, [4, 6, 8].map(|step| ella_store::commit_folder(step, 2, 1)), "the late commit is not in the log");
}

#[tokio::test]
async fn a_silent_worker_is_lost_after_its_lease() {
    let (config, store) = (config(&["workers.lease=300ms", "workers.start_timeout=500ms"]), memory());
    let served = Served::start(&config, &store).await;
    let mut a = Fake::attach(&served.url(), hello("a")).await.unwrap();
    let mut b = Fake::attach(&served.url(), hello("b")).await.unwrap();
    assert_eq!((a.welcome.heartbeat_ms, a.welcome.lease_ms), (75, 300));
    let _ = tokio::join!(a.get_ready(), b.get_ready());
    let outcome = served.outcome().await;
    let Outcome::Failed(failure) = &outcome else { panic!("{outcome:?}") };
    assert!(matches!(**failure, Failure::TooFewLeft { have: 0, need: 1, .. }), "{outcome:?}");
    assert!(outcome.reason().contains("nothing was heard from it for 300 ms"), "{outcome:?}");
}

#[tokio::test]
async fn a_spare_is_told_how_the_run_ended() {
    let cluster = Cluster::start(&["workers.max=2"], 2).await;
    let [a, b] = cluster.two_at(2).await;
    let c = cluster.worker("c", Script::default()).await;
    cluster.served.status_when(|status| status.workers.iter().any(|worker| worker.state == "spare")).await;
    cluster.limit.send_replace(u64::MAX);
    assert_eq!((ended(a).await, ended(b).await, ended(c).await), (Ended::Finished, Ended::Finished, Ended::Over(v1::Outcome::Done)));
    assert_eq!(cluster.served.outcome().await, Outcome::Done);
}

#[tokio::test]
async fn a_coordinator_that_hands_over_says_nothing_and_its_workers_train_on_under_the_next() {
    let (config, store) = (config(&["train.steps=8"]), memory());
    let served = Served::start_with(&config, &store, Options { hand_over: true, ..options() }).await;
    let (url, limit) = (watch::channel(served.url()).0, watch::channel(2).0);
    let cluster = Cluster { config, store, served, url, limit };
    let workers = cluster.two_at(2).await;
    cluster.served.status_when(|status| status.last_commit_step == 2).await;
    let Cluster { config, store, served, url, limit } = cluster;
    served.stops.send("the coordinator got SIGTERM".into()).await.unwrap();
    assert_eq!(served.outcome().await, Outcome::Preempted { reason: "the coordinator got SIGTERM".into() });
    assert!(!store.list("metrics").await.unwrap().is_empty(), "what it knew is written");
    limit.send_replace(u64::MAX);
    let next = Served::start(&config, &store).await;
    url.send_replace(next.url());
    for worker in workers {
        assert_eq!(ended(worker).await, Ended::Finished);
    }
    assert_eq!(next.outcome().await, Outcome::Done);
    // Those that fell due while nobody recorded them were never made.
    let (made, expected) = (bits(&commits(&store).await), calm(&config).await);
    assert!(made.last() == expected.last() && made.iter().all(|commit| expected.contains(commit)), "{made:?}");
    let ends: Vec<u64> =
        RunLog::read(&store).await.unwrap().iter().filter(|r| matches!(r.body, Body::End { .. })).map(|r| r.term).collect();
    assert_eq!(ends, [2], "the first left the run open");
}

#[tokio::test]
async fn a_coordinator_that_stays_tells_of_a_run_that_is_done_until_it_is_told_to_leave() {
    let (config, store) = (config(&[]), memory());
    let staying = || Options { stay: true, ..options() };
    let served = Served::start_with(&config, &store, staying()).await;
    assert_eq!(train_two(&served, &config, &store, [Script::default(); 2]).await, [Ended::Finished, Ended::Finished]);
    // And so does one that is started again: it claims no term for it.
    for served in [served, Served::start_with(&config, &store, staying()).await] {
        let status = served.status_when(|status| status.phase == "done").await;
        assert_eq!((status.step, status.last_commit_step, status.samples), (5, 5, 160));
        let late = Fake::attach(&served.url(), hello("late")).await.err().unwrap();
        assert_eq!(late.outcome(), v1::Outcome::Done, "{}", late.detail);
        served.stops.send("the coordinator got SIGTERM".into()).await.unwrap();
        assert_eq!(served.outcome().await, Outcome::Done);
    }
    let terms = RunLog::read(&store).await.unwrap().iter().filter(|record| matches!(record.body, Body::Term(_))).count();
    assert_eq!(terms, 1);
}
