//! The S3 client against a small server that answers by script: which replies are retried, refused, or leave the effect unknown.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::{Created, Digest, Limits, Operation, Store};

/// What happens to one request.
#[derive(Clone, Copy)]
enum Reply {
    /// This status, without effect.
    Status(u16),
    /// It takes effect, and the connection closes without a reply.
    Lost,
    /// It takes effect, and no reply ever comes.
    Silent,
    /// A get's body breaks off half-way.
    Half,
    /// As it should be.
    Proper,
}

#[derive(Default)]
struct Server {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    script: Mutex<VecDeque<Reply>>,
    requests: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    /// Answers one request; `None` when the connection is done.
    async fn answer(&self, connection: &mut TcpStream) -> Option<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(connection.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).unwrap();
        let header = |name: &str| {
            head.lines().find_map(|line| Some(line.split_once(": ")?).filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|pair| pair.1))
        };
        let mut body = vec![0; header("content-length").map_or(0, |length| length.parse().unwrap())];
        connection.read_exact(&mut body).await.ok()?;
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap().to_owned());
        lock(&self.requests).push(format!("{method} {path}"));
        let reply = lock(&self.script).pop_front().unwrap_or(Reply::Proper);
        if let Reply::Status(status) = reply {
            let text = format!("HTTP/1.1 {status} X\r\ncontent-length: 5\r\n\r\noops\n");
            return connection.write_all(text.as_bytes()).await.ok();
        }
        let (status, found) = self.effect(method, path, body, header("if-none-match").is_some());
        let (start, end) = header("range")
            .and_then(|range| range.strip_prefix("bytes=")?.split_once('-'))
            .map_or((0, found.len()), |(start, end)| (start.parse().unwrap(), end.parse::<usize>().unwrap() + 1));
        let part = &found[start..end.min(found.len())];
        let status = if start > 0 { 206 } else { status };
        let range = format!("content-range: bytes {start}-{}/{}\r\n", end - usize::from(end > 0), found.len());
        let dates = "etag: \"1\"\r\nlast-modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n";
        let text = format!("HTTP/1.1 {status} X\r\n{dates}{}content-length: {}\r\n\r\n", if start > 0 { &range } else { "" }, part.len());
        match reply {
            Reply::Lost => return None,
            Reply::Silent => std::future::pending().await,
            Reply::Half => {
                connection.write_all(text.as_bytes()).await.ok()?;
                connection.write_all(&part[..part.len() / 2]).await.ok()?;
                return None;
            }
            _ => connection.write_all(text.as_bytes()).await.ok()?,
        }
        if method == "HEAD" { Some(()) } else { connection.write_all(part).await.ok() }
    }

    fn effect(&self, method: &str, path: String, body: Vec<u8>, only_if_absent: bool) -> (u16, Vec<u8>) {
        let mut objects = lock(&self.objects);
        match method {
            "PUT" if only_if_absent && objects.contains_key(&path) => (412, vec![]),
            "PUT" => {
                objects.insert(path, body);
                (200, vec![])
            }
            _ => objects.get(&path).map_or((404, vec![]), |found| (200, found.clone())),
        }
    }
}

/// A store over the S3 client and a server that will answer the first requests by `script`.
async fn store(script: impl Into<VecDeque<Reply>>) -> (Store, Arc<Server>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = Arc::new(Server { script: Mutex::new(script.into()), ..Server::default() });
    let serving = Arc::clone(&server);
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let server = Arc::clone(&serving);
            tokio::spawn(async move { while server.answer(&mut connection).await.is_some() {} });
        }
    });
    (store_at(&endpoint), server)
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
    Store::open("memory://").unwrap().with_backend(|_| client).with_limits(limits)
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
        assert_eq!(lock(&server.requests).len(), 1, "{status}");
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
        lock(&server.objects).insert("/bucket/a".into(), b"another".to_vec());
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
    lock(&server.script).push_back(Reply::Half);
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
