//! Whole runs over real gRPC, with workers that follow the protocol without training.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use ella_coordinator::client;
use ella_coordinator::core::Outcome;
use ella_coordinator::shell::{Coordinator, Opened};
use ella_proto::v1;
use ella_store::{Body, RunLog, RunState, Store};

async fn state_of(store: &Store) -> RunState {
    RunState::from_records(&RunLog::read(store).await.unwrap())
}

#[tokio::test]
async fn two_workers_train_to_the_end_and_the_run_folder_holds_what_is_promised() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    let ended = train_two(&served, &config, &store, [Script::default(); 2]).await;
    assert_eq!(ended, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);

    let state = state_of(&store).await;
    assert!(state.is_done() && state.term == 1);
    assert_eq!(state.commits.iter().map(|commit| commit.step).collect::<Vec<_>>(), [4, 5], "two are kept");
    assert_eq!(store.folders("commits").await.unwrap(), ["commits/000000000004.1", "commits/000000000005.1"]);
    for commit in &state.commits {
        ella_store::verify_commit(&store, commit).await.unwrap();
        assert_eq!(commit.config_digest.to_string(), config.digest());
    }
    let toml = store.get("run.toml").await.unwrap();
    assert_eq!(String::from_utf8(toml.to_vec()).unwrap(), config.to_toml());
    let told = |line: &serde_json::Value| ["step", "samples", "generation", "world"].map(|name| line[name].as_u64());
    let steps: Vec<_> = journal(&store, "metrics").await.iter().map(told).collect();
    assert_eq!(steps, (1..=5).map(|step| [step, 32, 1, 2].map(Some)).collect::<Vec<_>>());
    assert!(state.commits.iter().all(|commit| commit.computed_with["device"] == "cpu"));
    let events = journal(&store, "events").await;
    let names: Vec<_> = events.iter().map(|line| line["event"].as_str().unwrap()).collect();
    let expected = ["attached", "attached", "generation", "started", "committed", "committed", "retired", "committed", "ended"];
    assert_eq!(names.iter().filter(|name| expected.contains(name)).count(), names.len());
    assert_eq!((names.first(), names.last()), (Some(&"attached"), Some(&"ended")), "{names:?}");

    // Once more: nothing to do. With more steps: it goes on from the last commit.
    let again = Coordinator::open(&config, store.clone(), &options()).await.unwrap();
    assert!(matches!(again, Opened::Done { step: 5 }), "{again:?}");
    let longer = common::config(&["train.steps=7"]);
    let served = Served::start(&longer, &store).await;
    let status = client::status(&served.url()).await.unwrap();
    assert_eq!((status.term, status.step, status.last_commit_step, status.samples), (2, 5, 5, 160));
    train_two(&served, &longer, &store, [Script::default(); 2]).await;
    assert_eq!(served.outcome().await, Outcome::Done);
    assert_eq!(state_of(&store).await.last_commit().unwrap().step, 7);
}

#[tokio::test]
async fn a_rank_with_another_state_fails_the_run_for_good_and_is_named() {
    let store = Store::in_memory();
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    let differs = Script { differs_at: Some(4), ..Script::default() };
    let ended = train_two(&served, &config, &store, [Script::default(), differs]).await;
    let outcome = served.outcome().await;
    assert!(outcome.reason().starts_with("worker b (rank 1, host here, pid 77) at step 4 has another state digest"), "{outcome:?}");
    assert_eq!(outcome.exit_code(), 4);
    assert_eq!(ended, [Ended::Aborted(outcome.reason()), Ended::Aborted(outcome.reason())]);
    assert_eq!(state_of(&store).await.last_commit().unwrap().step, 2, "the commit before stays");
}

#[tokio::test]
async fn a_killed_coordinators_unrecorded_commit_is_swept_by_the_next() {
    let store = Store::in_memory();
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    let mut a = Fake::attach(&served.url(), hello("a")).await.unwrap();
    let mut b = Fake::attach(&served.url(), hello("b")).await.unwrap();
    let _ = tokio::join!(a.get_ready(), b.get_ready());
    tokio::join!(a.commit(2, &store, Script::default()), b.commit(2, &store, Script::default()));
    assert_eq!(a.until_committed(2).await, None);
    let withholds = Script { withholds_parts_of: Some(4), ..Script::default() };
    tokio::join!(a.commit(4, &store, withholds), b.commit(4, &store, withholds));
    served.kill().await;
    assert_eq!(store.folders("commits").await.unwrap().len(), 2);

    let served = Served::start(&config, &store).await;
    assert_eq!(store.folders("commits").await.unwrap(), ["commits/000000000002.1"]);
    assert_eq!(client::status(&served.url()).await.unwrap().last_commit_step, 2);
    let ended = train_two(&served, &config, &store, [Script::default(); 2]).await;
    assert_eq!(ended, [Ended::Finished, Ended::Finished]);
    assert_eq!(served.outcome().await, Outcome::Done);
    let terms: Vec<u64> = RunLog::read(&store).await.unwrap().iter().filter(|r| matches!(r.body, Body::Term(_))).map(|r| r.term).collect();
    assert_eq!(terms, [1, 2]);
}

#[tokio::test]
async fn a_coordinator_cut_off_before_its_end_record_finds_the_run_done() {
    let store = Store::in_memory();
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    let mut a = Fake::attach(&served.url(), hello("a")).await.unwrap();
    let mut b = Fake::attach(&served.url(), hello("b")).await.unwrap();
    let _ = tokio::join!(a.get_ready(), b.get_ready());
    tokio::join!(a.commit(5, &store, Script::default()), b.commit(5, &store, Script::default()));
    assert_eq!(a.until_committed(5).await, None);
    served.kill().await;
    let opened = Coordinator::open(&config, store.clone(), &options()).await.unwrap();
    assert!(matches!(opened, Opened::Done { step: 5 }), "{opened:?}");
    assert!(state_of(&store).await.is_done());
}

#[tokio::test]
async fn stop_drains_commits_and_leaves() {
    let store = Store::in_memory();
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    let mut a = Fake::attach(&served.url(), hello("a")).await.unwrap();
    let mut b = Fake::attach(&served.url(), hello("b")).await.unwrap();
    let _ = tokio::join!(a.get_ready(), b.get_ready());
    client::stop(&served.url(), "the night begins").await.unwrap();
    for fake in [&mut a, &mut b] {
        let told = fake.next().await;
        assert!(matches!(&told, Some(v1::to_worker::Body::Drain(drain)) if drain.reason == "the night begins"), "{told:?}");
    }
    let status = served.status_when(|status| status.phase == "draining").await;
    assert_eq!(status.reason, "waiting for the workers to commit and leave (the night begins)");
    tokio::join!(a.commit(3, &store, Script::default()), b.commit(3, &store, Script::default()));
    let (a, b) = tokio::join!(a.finish(3, v1::Outcome::Preempted), b.finish(3, v1::Outcome::Preempted));
    assert_eq!((a, b), (Ended::Finished, Ended::Finished));
    let outcome = served.outcome().await;
    assert_eq!((outcome.exit_code(), outcome.name()), (3, "preempted"));
    assert_eq!(state_of(&store).await.last_commit().unwrap().step, 3);
}

#[tokio::test]
async fn a_second_stop_leaves_at_once() {
    let store = Store::in_memory();
    let config = config(&[]);
    let served = Served::start(&config, &store).await;
    let mut a = Fake::attach(&served.url(), hello("a")).await.unwrap();
    let mut b = Fake::attach(&served.url(), hello("b")).await.unwrap();
    let _ = tokio::join!(a.get_ready(), b.get_ready());
    served.stops.send("first".into()).await.unwrap();
    served.stops.send("second".into()).await.unwrap();
    assert_eq!(a.until_committed(1).await, Some(Ended::Aborted("second".into())));
    assert_eq!(served.outcome().await, Outcome::Preempted { reason: "second".into() });
    assert!(state_of(&store).await.commits.is_empty());
}
