//! Retries, deadlines and lost replies, by script and on a virtual clock.

#![allow(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::time::Duration;

use bytes::Bytes;
use ella_store::faulty::{Failure, Faults};
use ella_store::{Created, Operation, Store, StoreError, probe};
use futures::TryStreamExt;
use tokio::time::Instant;

fn faulty() -> (Store, Faults) {
    let faults = Faults::new();
    (faults.inject(&Store::in_memory()), faults)
}

fn bytes() -> Bytes {
    Bytes::from_static(b"0123456789")
}

#[tokio::test(start_paused = true)]
async fn every_operation_survives_passing_failures() {
    for failure in [Failure::Before, Failure::LostReply, Failure::Hang, Failure::HangAfter, Failure::Slow(Duration::from_secs(200))] {
        let (store, faults) = faulty();
        for operation in
            [Operation::Put, Operation::Create, Operation::Get, Operation::Head, Operation::List, Operation::Delete, Operation::Upload]
        {
            let times = if operation == Operation::Upload { 1 } else { 2 };
            faults.push(operation, "", failure, times);
        }
        store.put("a/x", bytes()).await.unwrap();
        assert_eq!(store.create("a/y", bytes()).await.unwrap(), Created::Yes);
        assert_eq!(store.get("a/x").await.unwrap(), bytes());
        assert_eq!(store.head("a/x").await.unwrap().unwrap().bytes, 10);
        assert_eq!(store.list("a").await.unwrap().len(), 2);
        store.delete("a/x").await.unwrap();
        let large = Bytes::from(vec![7; (16 << 20) + 1]);
        store.upload("a/large", std::slice::from_ref(&large)).await.unwrap();
        assert_eq!(store.get("a/large").await.unwrap(), large);
        assert!(faults.is_spent(), "{failure:?}");
        assert!(store.retries() >= 9, "{failure:?}: {:?}", store.retry_report());
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_never_answers_is_given_up_at_the_overall_deadline() {
    for failure in [Failure::Hang, Failure::HangAfter, Failure::Before] {
        for operation in [Operation::Put, Operation::Get, Operation::Head, Operation::List, Operation::Delete] {
            let (store, faults) = faulty();
            store.put("x", bytes()).await.unwrap();
            faults.push(operation, "", failure, u32::MAX);
            let started = Instant::now();
            let error = match operation {
                Operation::Put => store.put("x", bytes()).await.err(),
                Operation::Get => store.get("x").await.err(),
                Operation::Head => store.head("x").await.err(),
                Operation::List => store.list("x").await.err(),
                _ => store.delete("x").await.err(),
            }
            .unwrap();
            assert!(error.is_retryable(), "{error:?}");
            let limits = store.limits();
            // Not only of the last attempt, which is cut short.
            let told = |after: Duration| after >= limits.overall;
            assert!(operation == Operation::Get || !matches!(error, StoreError::Timeout { after, .. } if !told(after)), "{error}");
            assert!(
                started.elapsed() <= limits.overall + limits.attempt + Duration::from_secs(200),
                "{operation} took {:?}",
                started.elapsed()
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_large_object_has_time_in_proportion() {
    let (store, faults) = faulty();
    let slow = Failure::Slow(Duration::from_secs(140));
    faults.push(Operation::Create, "", slow, 2);
    assert_eq!(store.create("shard", vec![0; 128 << 20].into()).await.unwrap(), Created::Yes);
    assert_eq!(store.retries(), 0, "a shard of 128 MiB at 1 MiB/s is no timeout");
    assert_eq!(store.create("record", bytes()).await.unwrap(), Created::Yes);
    assert_eq!(store.retries(), 1, "of a few bytes it is");
}

#[tokio::test(start_paused = true)]
async fn what_repeating_cannot_help_is_not_repeated() {
    for (failure, kind) in [(Failure::Full, "no space"), (Failure::Denied, "permission")] {
        let (store, faults) = faulty();
        faults.push(Operation::Put, "", failure, 1).push(Operation::Create, "", failure, 1);
        let put = store.put("x", bytes()).await.unwrap_err();
        let create = store.create("x", bytes()).await.unwrap_err();
        for (error, operation) in [(put, "put"), (create, "create")] {
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().contains("memory:///x: ") && error.to_string().contains(operation), "{error}");
        }
        assert!(faults.is_spent());
        assert_eq!((store.retries(), faults.seen().len()), (0, 2));
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_in_an_upload_leaves_the_old_object() {
    let (store, faults) = faulty();
    store.upload("x", &[bytes()]).await.unwrap();
    faults.push(Operation::Upload, "", Failure::Full, 1);
    let error = store.upload("x", &[vec![0; 40 << 20].into()]).await.unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    assert_eq!(store.get("x").await.unwrap(), bytes());
}

#[tokio::test(start_paused = true)]
async fn a_create_that_lost_every_reply_is_read_back_in_the_end() {
    let (store, faults) = faulty();
    faults.push(Operation::Create, "", Failure::HangAfter, u32::MAX);
    assert_eq!(store.create("x", bytes()).await.unwrap(), Created::Yes);
    store.put("y", Bytes::from_static(b"another")).await.unwrap();
    assert_eq!(store.create("y", bytes()).await.unwrap(), Created::AlreadyThere);
}

#[tokio::test(start_paused = true)]
async fn a_create_of_unknown_fate_is_an_error_not_a_guess() {
    let (store, faults) = faulty();
    faults.push(Operation::Create, "", Failure::LostReply, u32::MAX).push(Operation::Get, "", Failure::Before, u32::MAX);
    assert!(store.create("x", bytes()).await.unwrap_err().is_retryable());
    faults.clear();
    assert_eq!(store.get("x").await.unwrap(), bytes());
}

#[tokio::test(start_paused = true)]
async fn a_stream_resumes_where_it_broke() {
    let (store, faults) = faulty();
    store.put("x", bytes()).await.unwrap();
    faults.push(Operation::Get, "x", Failure::CutAt(3), 3);
    assert_eq!(store.stream("x").try_collect::<Vec<_>>().await.unwrap().concat(), bytes());
    assert_eq!(store.retries(), 3);
    faults.push(Operation::Get, "x", Failure::CutAt(0), u32::MAX);
    let error = store.stream("x").try_collect::<Vec<_>>().await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_object_replaced_while_it_is_read_is_an_error_not_a_mixture() {
    let (store, faults) = faulty();
    store.put("x", bytes()).await.unwrap();
    faults.push(Operation::Get, "x", Failure::CutAt(3), 1);
    let mut stream = store.stream("x");
    assert_eq!(stream.try_next().await.unwrap().unwrap(), "012");
    store.put("x", Bytes::from_static(b"abcdefghij")).await.unwrap();
    let error = stream.try_next().await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
    assert!(stream.try_next().await.unwrap().is_none(), "an error ends the stream");
}

#[tokio::test(start_paused = true)]
async fn a_flipped_bit_is_found() {
    let (store, faults) = faulty();
    store.put("x", bytes()).await.unwrap();
    faults.push(Operation::Get, "x", Failure::Flip, 1);
    let error = store.get_verified("x", &ella_store::Digest::of(&bytes()), 10).await.unwrap_err();
    assert!(error.to_string().contains("memory:///x: corrupt (expected blake3 "), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_probe_names_what_failed_and_cleans_up() {
    let (store, faults) = faulty();
    probe(&store).await.unwrap();
    for operation in [Operation::Create, Operation::Get, Operation::List, Operation::Delete] {
        faults.push(operation, "", Failure::Denied, 1);
        let error = probe(&store).await.unwrap_err();
        assert!(error.to_string().contains(&format!("{operation} refused")), "{error}");
        store.delete_prefix("probe").await.unwrap();
    }
}
