//! The S3 client against a small server that answers by script: which replies are retried, refused, or leave the effect unknown.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use tokio::net::TcpListener;

use super::*;
use crate::{Created, Digest, Limits, Operation, Store};
use support::{Manners, Reply, Server};

#[path = "../../tests/support/mod.rs"]
mod support;

/// A store over the S3 client and a server that will answer the first requests by `script`.
async fn store(script: impl IntoIterator<Item = Reply>) -> (Store, Arc<Server>) {
    let server = Server::start(script.into_iter().collect::<Vec<_>>(), Manners::GOOD).await;
    (store_at(&server.url), server)
}

fn store_at(endpoint: &str) -> Store {
    let builder = AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_region("r")
        .with_access_key_id("id")
        .with_secret_access_key("hunter2");
    let client = s3(builder, "bucket").unwrap();
    let limits = Limits {
        attempt: Duration::from_millis(300),
        overall: Duration::from_secs(5),
        first_pause: Duration::from_millis(1),
        ..Limits::default()
    };
    Store::in_memory().rebuilt(client, limits)
}

fn bytes() -> Bytes {
    Bytes::from_static(b"0123456789")
}

#[tokio::test]
async fn server_errors_and_throttling_are_retried_and_counted() {
    let (store, _) = store([Reply::Status(500), Reply::Status(503), Reply::Status(429), Reply::Lost, Reply::Silent]).await;
    store.put("a", bytes()).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), bytes());
    assert_eq!(store.retries(), 5);
    let report: Vec<_> = store.retry_report().into_iter().map(|retry| (retry.operation, retry.reason, retry.count)).collect();
    assert_eq!(report, [(Operation::Put, "timeout", 1), (Operation::Put, "unavailable", 4)]);
}

#[tokio::test]
async fn refusals_are_not_retried() {
    for (status, kind) in [(400, "other"), (401, "permission"), (403, "permission"), (404, "bad url"), (507, "no space")] {
        let (store, server) = store([Reply::Status(status)]).await;
        let error = store.put("a", bytes()).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{status}: {error}");
        assert!(error.to_string().starts_with("memory:///a: ") || kind == "bad url", "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        assert_eq!(server.requests().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_create_whose_reply_was_lost_is_ours() {
    for reply in [Reply::Lost, Reply::Silent, Reply::Status(503)] {
        let (store, _) = store([reply]).await;
        assert_eq!(store.create("a", bytes()).await.unwrap(), Created::Yes);
        assert_eq!(store.get("a").await.unwrap(), bytes());
    }
}

#[tokio::test]
async fn a_create_that_met_anothers_object_is_not_ours_even_after_a_lost_reply() {
    for script in [vec![], vec![Reply::Lost], vec![Reply::Status(503)]] {
        let (store, server) = store(script).await;
        server.keep("/bucket/a", b"another");
        assert_eq!(store.create("a", bytes()).await.unwrap(), Created::AlreadyThere);
        assert_eq!(store.get("a").await.unwrap(), "another");
    }
}

/// S3 answers 409 while another conditional write is under way, which may fail in the end.
#[tokio::test]
async fn a_conflict_over_an_absent_object_is_tried_again() {
    let (store, _) = store([Reply::Status(409)]).await;
    assert_eq!(store.create("a", bytes()).await.unwrap(), Created::Yes);
    assert_eq!(store.retries(), 1);
}

#[tokio::test]
async fn a_read_that_breaks_off_is_resumed_where_it_broke() {
    let (store, server) = store([Reply::Proper, Reply::Half]).await;
    store.put("a", bytes()).await.unwrap();
    assert_eq!(store.get_verified("a", &Digest::of(&bytes()), 10).await.unwrap(), bytes());
    server.plan([Reply::Half]);
    assert_eq!(store.stream("a").try_collect::<Vec<_>>().await.unwrap().concat(), bytes());
    assert_eq!(store.retries(), 2);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_given_up_at_the_deadline() {
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let quick = Limits { overall: Duration::from_millis(100), ..store_at("http://127.0.0.1:1").limits() };
    let store = store_at(&format!("http://127.0.0.1:{port}")).with_limits(quick);
    let error = store.get("a").await.unwrap_err();
    assert_eq!(error.kind(), "unavailable", "{error}");
    assert!(error.is_retryable() && store.retries() > 0);
}

#[tokio::test]
async fn a_store_that_asks_for_time_is_given_it() {
    let soon = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(3));
    for (status, asked) in [(503, soon), (503, "1".to_owned()), (429, "1".to_owned())] {
        let (store, server) = store([Reply::With(status, format!("retry-after: {asked}"))]).await;
        let begun = Instant::now();
        store.put("a", bytes()).await.unwrap();
        // A date has no fractions of seconds.
        assert!(begun.elapsed() >= Duration::from_secs(1), "{status} {asked}: {:?}", begun.elapsed());
        assert_eq!((store.retries(), server.requests().len()), (1, 2));
    }
}

#[tokio::test]
async fn a_wait_beyond_the_deadline_is_not_begun() {
    // The last is the longest that there is, and the pause comes on top.
    for seconds in [3600, u64::MAX] {
        let (store, server) = store([Reply::With(503, format!("Retry-After: {seconds}"))]).await;
        let store = store.with_limits(Limits { first_pause: Duration::from_secs(2), ..store.limits() });
        let begun = Instant::now();
        let error = store.get("a").await.unwrap_err();
        assert!(begun.elapsed() < store.limits().overall, "{:?}", begun.elapsed());
        assert_eq!((error.retry_after(), server.requests().len()), (Some(Duration::from_secs(seconds)), 1));
        assert!(error.is_retryable() && error.to_string().contains(&format!("(status 503) and asks to wait {seconds}s")), "{error}");
    }
}

#[tokio::test]
async fn no_two_calls_pause_alike() {
    let pauses = || crate::Limits::default().retries(0).pauses.take(4).collect::<Vec<_>>();
    assert_ne!(pauses(), pauses());
}

#[tokio::test]
async fn of_an_upload_only_the_part_that_failed_is_sent_again() {
    let large: Bytes = (0..40_u32 << 18).flat_map(u32::to_le_bytes).collect::<Vec<_>>().into();
    for failure in [Reply::Status(503), Reply::Lost, Reply::With(503, "retry-after: 0".into())] {
        // One that begins it, three parts, one that completes it: each fails once.
        let (store, server) = store([failure.clone(), Reply::Proper, failure.clone()]).await;
        let limits = Limits { attempt: Duration::from_secs(5), ..store.limits() };
        let store = store.with_limits(limits);
        store.upload("a", std::slice::from_ref(&large)).await.unwrap();
        let sent = server.requests();
        assert_eq!(sent.iter().filter(|request| request.starts_with("PUT")).count(), 4, "{sent:?}");
        assert_eq!(store.retries(), 2, "{:?}", store.retry_report());
        server.plan([Reply::Proper, Reply::Proper, Reply::Proper, Reply::Proper, failure]);
        store.upload("a", std::slice::from_ref(&large)).await.unwrap();
        assert_eq!(store.retries(), 3, "{:?}", store.retry_report());
        assert_eq!(store.get("a").await.unwrap(), large);
    }
}

#[tokio::test]
async fn an_upload_that_is_given_up_is_aborted() {
    let (store, server) = store([Reply::Proper, Reply::Status(403)]).await;
    let error = store.upload("a", &[vec![0; 20 << 20].into()]).await.unwrap_err();
    assert_eq!(error.kind(), "permission", "{error}");
    assert!(server.requests().iter().any(|request| request.starts_with("DELETE /bucket/a?uploadId=7")), "{:?}", server.requests());
}

/// What begins an upload of two parts, and sends them; then how often completing it fails, and how.
fn completing(replies: impl IntoIterator<Item = Reply>) -> Vec<Reply> {
    [Reply::Proper, Reply::Proper, Reply::Proper].into_iter().chain(replies).collect()
}

async fn patient_store(script: Vec<Reply>) -> (Store, Arc<Server>) {
    let (store, server) = store(script).await;
    let limits = Limits { attempt: Duration::from_secs(10), overall: Duration::from_secs(20), ..store.limits() };
    (store.with_limits(limits), server)
}

/// A reply that was lost may be that of the attempt which completed it. It may as well be that something else ended it (COMMIT).
#[tokio::test]
async fn an_upload_that_the_store_forgot_counts_only_if_its_object_is_there() {
    let large: Bytes = vec![7; 20 << 20].into();
    let begun = |server: &Server| {
        server.requests().iter().filter(|request| request.ends_with("?uploads") || request.ends_with("?uploads=")).count()
    };
    let (store, server) = patient_store(completing([Reply::Lost])).await;
    store.upload("a", std::slice::from_ref(&large)).await.unwrap();
    assert_eq!((store.get("a").await.unwrap(), begun(&server)), (large.clone(), 1));
    // Neither no object nor one of another size is ours.
    for before in [None, Some(b"another")] {
        let (store, server) = patient_store(completing([Reply::Status(503), Reply::Status(404)])).await;
        before.into_iter().for_each(|before| server.keep("/bucket/a", before));
        store.upload("a", std::slice::from_ref(&large)).await.unwrap();
        assert_eq!((store.get("a").await.unwrap(), begun(&server)), (large.clone(), 2));
    }
    let (store, server) = patient_store(completing([Reply::Status(503), Reply::Status(404), Reply::Proper, Reply::Status(403)])).await;
    assert_eq!(store.upload("a", std::slice::from_ref(&large)).await.unwrap_err().kind(), "permission", "{:?}", server.requests());
    assert!(store.head("a").await.unwrap().is_none());
}

#[tokio::test]
async fn an_upload_that_ends_while_its_parts_are_sent_begins_anew_and_is_said_to() {
    let large: Bytes = vec![7; 20 << 20].into();
    let (store, _) = patient_store(vec![Reply::Proper, Reply::Status(404)]).await;
    store.upload("a", std::slice::from_ref(&large)).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), large);
    for script in [vec![Reply::Proper, Reply::Status(404)], completing([Reply::Status(404)])] {
        let (store, _) = patient_store(script).await;
        let hasty = Limits { first_pause: Duration::from_secs(100), longest_pause: Duration::from_secs(100), ..store.limits() };
        let error = store.with_limits(Limits { bytes_per_second: u64::MAX, ..hasty }).upload("a", std::slice::from_ref(&large)).await;
        let error = error.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("no longer knows the upload"), "{error}");
    }
}

#[tokio::test]
async fn a_body_that_came_too_slowly_for_s3_is_sent_again() {
    let error = classify_reply("<Error><Code>RequestTimeout</Code></Error>");
    assert!(error.is_retryable(), "{error}");
    assert!(!classify_reply("<Error><Code>InvalidArgument</Code></Error>").is_retryable());
}

fn classify_reply(body: &str) -> StoreError {
    let text = format!("Server returned non-2xx status code: 400 Bad Request: {body}");
    Store::in_memory().place(Operation::Put, "a").error(object_store::Error::Generic { store: "S3", source: text.into() })
}

#[tokio::test]
async fn an_endpoint_without_encryption_needs_a_word() {
    let server = Server::start([], Manners::GOOD).await;
    let builder = AmazonS3Builder::new().with_endpoint(&server.url).with_access_key_id("id").with_secret_access_key("hunter2");
    let store = Store::in_memory().rebuilt(s3(builder, "bucket").unwrap(), Limits::default());
    let error = store.get("a").await.unwrap_err();
    assert!(matches!(error, StoreError::BadUrl { .. }) && error.to_string().contains("set AWS_ALLOW_HTTP=true"), "{error}");
    assert_eq!((store.retries(), server.requests().len()), (0, 0));
}

/// The steps by which a machine of the cloud gets its role's credentials.
#[tokio::test]
async fn an_instance_role_gives_credentials() {
    let server = Server::start([], Manners::GOOD).await;
    let expiry = "2099-01-01T00:00:00Z";
    server.keep("/latest/meta-data/iam/security-credentials/", b"worker");
    let given = format!(r#"{{"AccessKeyId":"id","SecretAccessKey":"hunter2","Token":"t","Expiration":"{expiry}"}}"#);
    server.keep("/latest/meta-data/iam/security-credentials/worker", given.as_bytes());
    let builder = AmazonS3Builder::new().with_endpoint(&server.url).with_allow_http(true).with_metadata_endpoint(&server.url);
    let store = Store::in_memory().rebuilt(s3(builder, "bucket").unwrap(), Limits::default());
    store.put("a", bytes()).await.unwrap();
    assert_eq!(server.requests()[0], "PUT /latest/api/token");
    assert_eq!(server.requests().last().unwrap(), "PUT /bucket/a");
}

#[tokio::test]
async fn an_address_where_nothing_ever_answered_is_given_up_sooner() {
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let limits = Limits { overall: Duration::from_millis(800), first_contact: Duration::from_millis(200), ..store_at(&url).limits() };
    let tried = async |store: Store| {
        let error = store.get("a").await.unwrap_err();
        assert_eq!(error.kind(), "unavailable", "{error}");
        store.retries()
    };
    let (never, met) = (store_at(&url).with_limits(limits), store_at(&url).with_limits(limits));
    met.meet();
    assert!(tried(never).await < tried(met).await);
}

#[test]
fn a_cloud_url_without_bucket_or_settings_says_so() {
    for url in ["s3:///folder", "gs:///folder", "az:///folder"] {
        let text = Store::open(url).unwrap_err().to_string();
        assert!(text.contains("no bucket or container named"), "{text}");
    }
}
