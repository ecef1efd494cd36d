//! A store that fails some of its requests changes nothing of what is made.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Duration;

use common::{files, good_tar, jpeg, leftovers, small, sources, store, tar_of, threads};
use ella_dataset::{DataError, Source, prepare};
use ella_store::faulty::{Failure, Faults};
use ella_store::{Limits, Operation};
use tempfile::TempDir;

/// Pauses for tests: a hanging call is given up soon.
fn quick() -> Limits {
    let pause = Duration::from_millis(1);
    Limits { attempt: Duration::from_secs(1), first_pause: pause, longest_pause: pause, ..Limits::default() }
}

async fn tars(dir: &TempDir) -> Vec<Source> {
    let second = tar_of(&[("x.jpg", &jpeg(41, 1)), ("x.txt", b"again"), ("y.jpg", &jpeg(60, 77)), ("y.txt", b"new")]);
    sources(dir.path(), &[("a.tar", &good_tar(0, 20)), ("b.tar", &second)]).await
}

#[tokio::test]
async fn requests_that_fail_and_pass_change_nothing() {
    let (dir, calm) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = tars(&dir).await;
    let report = prepare(&sources, &store(&calm), &small(), &threads(1)).await.unwrap();
    let out = TempDir::new().unwrap();
    let faults = Faults::new();
    let slow = Failure::Slow(Duration::from_millis(20));
    for (operation, key, failure, times) in [
        (Operation::Create, "plan.json", Failure::LostReply, 1),
        (Operation::Get, "plan.json", Failure::CutAt(10), 1),
        (Operation::Create, "shards", Failure::Before, 2),
        (Operation::Create, "shards", Failure::LostReply, 2),
        (Operation::Create, "shards", Failure::HangAfter, 1),
        (Operation::Create, "shards", slow, 1),
        (Operation::Create, "units", Failure::Before, 1),
        (Operation::Create, "units", Failure::LostReply, 1),
        (Operation::Get, "units", Failure::Before, 2),
        (Operation::Get, "units", slow, 2),
        (Operation::List, "", Failure::Before, 3),
        (Operation::Create, "duplicates.json", Failure::LostReply, 1),
        (Operation::Put, "report.json", Failure::LostReply, 1),
        (Operation::Create, "manifest.json", Failure::LostReply, 1),
        (Operation::Delete, "shards", Failure::LostReply, 1),
    ] {
        faults.push(operation, key, failure, times);
    }
    let faulty = faults.inject(&store(&out).with_limits(quick()));
    assert_eq!(prepare(&sources, &faulty, &small(), &threads(2)).await.unwrap(), report);
    assert!(faults.is_spent(), "{faults:?}");
    assert_eq!(files(out.path()), files(calm.path()));
    assert_eq!(leftovers(&out).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_store_that_refuses_is_an_error_and_the_next_run_goes_on() {
    let (dir, calm, out) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let sources = tars(&dir).await;
    prepare(&sources, &store(&calm), &small(), &threads(1)).await.unwrap();
    let places =
        [(Operation::Create, "shards"), (Operation::Create, "units"), (Operation::Create, "duplicates"), (Operation::Create, "manifest")];
    for (operation, key) in places {
        for failure in [Failure::Full, Failure::Denied] {
            let faults = Faults::new();
            faults.push(operation, key, failure, 1);
            let faulty = faults.inject(&store(&out).with_limits(quick()));
            let error = prepare(&sources, &faulty, &small(), &threads(1)).await.unwrap_err();
            assert!(matches!(&error, DataError::Store(error) if error.to_string().contains(key)), "{error}");
            assert!(!out.path().join("manifest.json").exists());
        }
    }
    prepare(&sources, &store(&out), &small(), &threads(1)).await.unwrap();
    assert_eq!(files(out.path()), files(calm.path()));
}
