//! Web servers as read-only stores: those that do all they should, and those that lack ranges, tags, dates or HEAD.

#![cfg(feature = "cloud")]
#![allow(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ella_store::{Digest, Limits, Store, StoreError};
use futures::TryStreamExt;
use proptest::prelude::*;
use support::{Manners, Reply, Server};

const LEN: usize = 100_000;

fn content() -> Vec<u8> {
    (0..LEN as u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).take(LEN).collect()
}

/// Every kind of server: all manners, each one missing, none.
fn kinds() -> Vec<Manners> {
    let good = Manners::GOOD;
    vec![
        good,
        Manners { ranges: false, ..good },
        Manners { head: false, ..good },
        Manners { e_tag: false, ..good },
        Manners { weak: true, ..good },
        Manners { dates: false, ..good },
        Manners { conditions: false, ..good },
        Manners::NONE,
    ]
}

async fn serve(manners: Manners) -> (Arc<Server>, Store) {
    let server = Server::start([], manners).await;
    server.keep("/data/sets/a.tar", &content());
    server.keep("/data/sets/odd%20%23name%25.tar", b"odd");
    server.keep("/data/sets/empty", b"");
    let limits = Limits {
        attempt: Duration::from_secs(5),
        overall: Duration::from_secs(5),
        first_pause: Duration::from_millis(1),
        ..Limits::default()
    };
    let store = Store::open(&format!("{}/data", server.url)).unwrap().with_limits(limits);
    (server, store)
}

#[tokio::test]
async fn files_are_read_from_any_server() {
    for manners in kinds() {
        let (_server, store) = serve(manners).await;
        let sets = store.child("sets");
        assert_eq!(sets.get("a.tar").await.unwrap(), content(), "{manners:?}");
        assert_eq!(sets.get("odd #name%.tar").await.unwrap(), "odd", "{manners:?}");
        assert_eq!(store.stream("sets/a.tar").try_collect::<Vec<_>>().await.unwrap().concat(), content(), "{manners:?}");
        assert_eq!(store.get_range("sets/a.tar", 99_990..100_000).await.unwrap(), content()[99_990..], "{manners:?}");
        let meta = store.head("sets/a.tar").await.unwrap().unwrap();
        assert_eq!((meta.key.as_str(), meta.bytes), ("sets/a.tar", LEN as u64), "{manners:?}");
        assert_eq!(meta.stamp.is_some(), manners.e_tag || manners.dates, "{manners:?}");
        assert!(store.head("sets/b.tar").await.unwrap().is_none(), "{manners:?}");
        let missing = store.get("sets/b.tar").await.unwrap_err();
        assert!(matches!(missing, StoreError::NotFound { .. }), "{manners:?}: {missing}");
        let beyond = store.get_range("sets/a.tar", 99_990..100_001).await.unwrap_err();
        assert!(matches!(beyond, StoreError::Corrupt { .. }), "{manners:?}: {beyond}");
        let beyond = store.get_range("sets/a.tar", 200_000..200_001).await.unwrap_err();
        assert!(matches!(beyond, StoreError::Corrupt { .. }), "{manners:?}: {beyond}");
        assert_eq!(sets.get("empty").await.unwrap().len(), 0, "{manners:?}");
        assert_eq!(store.retries(), 0, "{manners:?}: {:?}", store.retry_report());
    }
}

#[tokio::test]
async fn a_broken_connection_is_resumed_on_any_server() {
    for manners in kinds() {
        let (server, store) = serve(manners).await;
        server.plan([Reply::Half, Reply::Half, Reply::Lost, Reply::Status(502)]);
        assert_eq!(store.get("sets/a.tar").await.unwrap(), content(), "{manners:?}");
        // Of a server without ranges each resume asks twice, and the first answer goes unread.
        assert_eq!(store.retries(), if manners.ranges { 4 } else { 3 }, "{manners:?}: {:?}", store.retry_report());
        server.plan([Reply::Half]);
        assert_eq!(store.get_range("sets/a.tar", 10..90_000).await.unwrap(), content()[10..90_000], "{manners:?}");
    }
}

#[tokio::test]
async fn a_file_replaced_while_it_is_read_is_an_error_on_any_server_that_tells_versions() {
    for manners in kinds() {
        let (server, store) = serve(manners).await;
        server.plan([Reply::Held]);
        let mut stream = store.stream("sets/a.tar");
        let first = stream.try_next().await.unwrap().unwrap();
        assert!(content().starts_with(&first));
        // Another length, for the server that tells nothing else; then the connection breaks.
        server.keep("/data/sets/a.tar", &vec![7; LEN + 1]);
        server.stop_held();
        let rest = stream.try_collect::<Vec<_>>().await;
        assert!(matches!(rest, Err(StoreError::Corrupt { .. })), "{manners:?}: {rest:?}");
    }
}

#[tokio::test]
async fn a_server_that_hides_sizes_is_refused_with_the_reason() {
    let (_server, store) = serve(Manners { length: false, ..Manners::GOOD }).await;
    let error = store.get("sets/a.tar").await.unwrap_err();
    assert!(!error.is_retryable() && error.to_string().contains("Content-Length Header missing"), "{error}");
}

/// A size is only the server's word: memory is taken for what comes.
#[tokio::test]
async fn a_size_beyond_all_memory_is_an_error_that_names_the_file() {
    let (server, store) = serve(Manners::GOOD).await;
    let store = store.with_limits(Limits { overall: Duration::from_millis(300), ..store.limits() });
    for bytes in [1 << 50, 1 << 63] {
        server.plan(vec![Reply::Claims(bytes); 10_000]);
        let error = store.get("sets/a.tar").await.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("/data/sets/a.tar: "), "{error}");
        let error = store.get_record("sets/a.tar").await.unwrap_err();
        let expected = format!("/data/sets/a.tar: corrupt (expected at most {} bytes, found {bytes} bytes)", 1 << 30);
        assert!(error.to_string().contains(&expected), "{error}");
        server.forget();
    }
}

#[tokio::test]
async fn an_object_of_another_size_than_recorded_is_refused_before_its_body_is_read() {
    for manners in kinds() {
        let (server, store) = serve(manners).await;
        let digest = Digest::of(&content());
        for bytes in [LEN as u64 - 1, LEN as u64 + 1] {
            // Its body would not end.
            server.plan([Reply::Held]);
            let error = store.get_verified("sets/a.tar", &digest, bytes).await.unwrap_err();
            let expected = format!("/data/sets/a.tar: corrupt (expected {bytes} bytes, found {LEN} bytes)");
            assert!(error.to_string().contains(&expected), "{manners:?}: {error}");
        }
        assert_eq!(store.get_verified("sets/a.tar", &digest, LEN as u64).await.unwrap(), content(), "{manners:?}");
        assert_eq!(store.retries(), 0, "{manners:?}: {:?}", store.retry_report());
    }
}

#[tokio::test]
async fn redirects_are_followed_and_their_secrets_kept() {
    let (server, store) = serve(Manners::GOOD).await;
    server.keep("/elsewhere?token=hunter2", &content());
    let to = |status| Reply::With(status, format!("location: {}/elsewhere?token=hunter2", server.url));
    server.plan([to(302)]);
    assert_eq!(store.get("sets/gone.tar").await.unwrap(), content());
    server.plan([to(307)]);
    assert_eq!(store.get_range("sets/gone.tar", 5..9).await.unwrap(), content()[5..9]);
    server.plan([to(301)]);
    assert_eq!(store.head("sets/gone.tar").await.unwrap().unwrap().bytes, LEN as u64);
    let round = || Reply::With(302, format!("location: {}/round?token=hunter2", server.url));
    server.plan((0..11).map(|_| round()));
    let error = store.get("sets/gone.tar").await.unwrap_err();
    assert!(!error.is_retryable() && error.to_string().contains("redirect") && !error.to_string().contains("hunter2"), "{error}");
    server.plan([to(302), Reply::Status(403)]);
    let error = store.get("sets/gone.tar").await.unwrap_err();
    assert!(matches!(error, StoreError::Permission { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
}

#[tokio::test]
async fn a_web_server_is_neither_written_nor_listed() {
    let (server, store) = serve(Manners::GOOD).await;
    let some = || Bytes::from_static(b"x");
    for (error, what) in [
        (store.put("k", some()).await.unwrap_err(), "put of \"k\""),
        (store.create("k", some()).await.unwrap_err(), "create of \"k\""),
        (store.upload("k", &[vec![0; 17 << 20].into()]).await.unwrap_err(), "upload of \"k\""),
        (store.delete("k").await.unwrap_err(), "delete of \"k\""),
        (store.delete_prefix("k").await.unwrap_err(), "list of \"k\""),
        (store.list("").await.unwrap_err(), "list of \"\""),
        (store.folders("sets").await.unwrap_err(), "list of \"sets\""),
        (store.child("sets").put("k", some()).await.unwrap_err(), "put of \"k\""),
        (store.with_backend(|inner| inner).put("k", some()).await.unwrap_err(), "put of \"k\""),
    ] {
        assert!(matches!(error, StoreError::Unsupported { .. }), "{error:?}");
        assert!(error.to_string().contains(what) && error.to_string().contains("can only be read"), "{error}");
    }
    assert!(server.requests().is_empty(), "{:?}", server.requests());
}

#[tokio::test]
async fn a_busy_web_server_is_given_the_time_it_asks_for() {
    let (server, store) = serve(Manners::GOOD).await;
    server.plan([Reply::With(429, "retry-after: 1".into()), Reply::With(503, "retry-after: 0".into())]);
    let begun = std::time::Instant::now();
    assert_eq!(store.get("sets/a.tar").await.unwrap(), content());
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(store.retries(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_range_is_its_bytes_from_any_server(start in 0..LEN, len in 0..LEN, kind in 0..8usize, cut in any::<bool>()) {
        let end = LEN.min(start + len);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (server, store) = serve(kinds()[kind]).await;
            server.plan(cut.then_some(Reply::Half));
            let got = store.get_range("sets/a.tar", start as u64..end as u64).await.unwrap();
            assert!(got == content()[start..end], "{start}..{end} of kind {kind}");
        });
    }
}
