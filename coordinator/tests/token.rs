//! A coordinator that asks for a token: who has it is served as ever, and who has not is refused, counted and told of.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use ella_coordinator::client::{self, ClientError};
use ella_coordinator::core::Outcome;
use ella_coordinator::shell::{AccessControl, Options};
use ella_proto::access::{Access, Token};
use ella_proto::config::RunConfig;
use ella_proto::v1::{DrainRequest, FromWorker, StatusRequest, StopRequest};
use ella_store::Store;
use tonic::Code;

const SECRET: &str = "the-coordinators-own-secret";
const GUESS: &str = "what-a-stranger-might-guess";

fn token(secret: &str) -> Token {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), secret).unwrap();
    Token::load(file.path()).unwrap()
}

/// One that asks for the token.
async fn asking(config: &RunConfig, store: &Store) -> Served {
    let access = AccessControl::of_token(Some(token(SECRET)));
    let served = Served::start_with(config, store, Options { access, ..options() }).await;
    Served { token: Some(token(SECRET)), ..served }
}

/// What each of the calls is answered.
async fn refusals(access: &Access) -> Vec<tonic::Status> {
    let channel = raw_channel(&access.url).await;
    let mut client = access.client(channel);
    let stream = futures::stream::pending::<FromWorker>();
    let (worker_id, reason) = ("a".to_owned(), "because".to_owned());
    let answers = [
        soon("an answer", client.attach(stream)).await.map(drop),
        client.status(StatusRequest::default()).await.map(drop),
        client.drain(DrainRequest { worker_id, reason: reason.clone() }).await.map(drop),
        client.stop(StopRequest { reason }).await.map(drop),
    ];
    answers.into_iter().map(|answer| answer.expect_err("a stranger is let in")).collect()
}

#[tokio::test]
async fn strangers_are_refused_counted_and_told_of_and_the_run_goes_on() {
    let (store, config) = (Store::in_memory(), config(&[]));
    let served = asking(&config, &store).await;
    let missing = Access::from(served.url());
    let wrong = Access { token: Some(token(GUESS)), ..missing.clone() };
    let strangers = async {
        for (access, word) in [(&missing, "asks for a token"), (&wrong, "is not the coordinator's")] {
            for status in refusals(access).await {
                assert_eq!(status.code(), Code::Unauthenticated, "{status}");
                assert!(status.message().contains(word) && status.message().contains("--token-file"), "{status}");
            }
            let error = client::status(access).await.unwrap_err();
            assert!(matches!(&error, ClientError::NoEntry { .. }) && error.to_string().contains(word), "{error}");
        }
        served.status_when(|status| status.counts.get("refused_token") == Some(&10)).await
    };
    let (status, ended) = tokio::join!(strangers, train_two(&served, &config, &store, [Script::default(); 2]));
    assert_eq!(ended, [Ended::Finished, Ended::Finished]);
    assert!(!format!("{status:?}").contains(SECRET));
    assert_eq!(served.outcome().await, Outcome::Done);

    let events = journal(&store, "events").await;
    let told: Vec<_> = events.iter().filter(|event| event["event"] == "stranger").collect();
    let [event] = told[..] else { panic!("one address is told of once: {told:?}") };
    assert!(event["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{event}");
    assert!(event["why"].as_str().unwrap().contains("asks for a token"), "{event}");
    assert!(!format!("{events:?}").contains(GUESS));
}

#[tokio::test]
async fn who_has_the_token_stops_drains_and_attaches_and_where_none_is_asked_for_any_will_do() {
    let (store, config) = (Store::in_memory(), config(&["workers.count=1"]));
    let served = asking(&config, &store).await;
    let worker = Fake::attach(served.access(), hello("a")).await.unwrap();
    client::drain(served.access(), "a", "the node is needed").await.unwrap();
    drop(worker);
    client::stop(served.access(), "enough").await.unwrap();
    assert!(matches!(served.outcome().await, Outcome::Preempted { .. }));

    let open = Served::start(&config, &Store::in_memory()).await;
    let access = Access { token: Some(token(GUESS)), ..Access::from(open.url()) };
    Fake::attach(&access, hello("a")).await.unwrap();
    assert!(!client::status(access).await.unwrap().counts.contains_key("refused_token"));
}
