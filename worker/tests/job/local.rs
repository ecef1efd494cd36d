//! All units in one process.

use crate::soon;
use crate::toy::{Broken, Stage, Toy, config, files};
use ella_coordinator::status::StatusReport;
use ella_worker::job::{JobEnd, JobError, run_local};
use ella_worker::train::Ending;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

async fn run(out: &Path, stage: &Arc<Stage>, stop: CancellationToken) -> (Result<Ending, JobEnd>, StatusReport) {
    let mut last = StatusReport::default();
    let toy = Toy::new(out, "alone", stage).boxed();
    let ended = soon("the end", run_local(&config(out), toy, 2, stop, &mut |status| last = status.clone())).await;
    (ended, last)
}

#[tokio::test]
async fn all_stages_are_done_and_told() {
    let out = tempfile::tempdir().unwrap();
    let (ended, last) = run(out.path(), &Arc::default(), CancellationToken::new()).await;
    assert!(matches!(ended, Ok(Ending::Done)), "{ended:?}");
    assert_eq!(files(out.path()).len(), 9);
    let job = last.job.unwrap();
    assert_eq!((last.phase.as_str(), job.stage, job.units_done, job.samples), ("done", 3, 1, 80));
    assert_eq!(job.results, BTreeMap::from([("kept".to_owned(), 72), ("read".to_owned(), 80)]));
    let (ended, last) = run(out.path(), &Arc::default(), CancellationToken::new()).await;
    assert!(matches!(ended, Ok(Ending::Done)), "{ended:?}");
    assert_eq!(last.job.unwrap().stage, 1, "nothing was missing");
}

#[tokio::test]
async fn a_job_that_is_stopped_within_a_unit_goes_on_to_the_same_bytes() {
    let (calm, cut) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(calm.path(), &Arc::default(), CancellationToken::new()).await.0.unwrap();
    let gates = BTreeMap::from([("unit-00003".to_owned(), Arc::new(Semaphore::new(0)))]);
    let stage = Arc::new(Stage { gates, ..Stage::default() });
    let stop = CancellationToken::new();
    let mut running = tokio::spawn({
        let (out, stage, stop) = (cut.path().to_owned(), stage.clone(), stop.clone());
        async move { run(&out, &stage, stop).await.0 }
    });
    let waiting = async {
        while stage.begun("unit-00003") == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! { () = soon("unit 3", waiting) => {}, ended = &mut running => panic!("{ended:?}") }
    stop.cancel();
    assert!(matches!(running.await.unwrap(), Ok(Ending::Preempted)));
    let left = files(cut.path());
    assert!(!left.contains_key("unit-00003") && !left.contains_key("manifest"), "{left:?}");
    run(cut.path(), &Arc::default(), CancellationToken::new()).await.0.unwrap();
    assert_eq!(files(cut.path()), files(calm.path()));
}

#[tokio::test]
async fn what_fails_is_tried_three_times_and_everything_broken_is_named() {
    let out = tempfile::tempdir().unwrap();
    let broken = BTreeMap::from([
        ("unit-00001".to_owned(), Broken::Times(Mutex::new(2))),
        ("unit-00002".to_owned(), Broken::Always(JobError::permanent("a.tar: truncated"))),
        ("unit-00004".to_owned(), Broken::Panics),
    ]);
    let stage = Arc::new(Stage { broken, ..Stage::default() });
    let (ended, last) = run(out.path(), &stage, CancellationToken::new()).await;
    let Err(error @ JobEnd::Failed { permanent: true, .. }) = ended else { panic!("{ended:?}") };
    let told =
        "2 of the 8 units of stage 2 could not be done: unit-00002: a.tar: truncated; unit-00004: the worker broke: unit-00004 is too much";
    assert_eq!(error.to_string(), format!("the job failed: {told}"));
    assert_eq!(["unit-00001", "unit-00002", "unit-00004"].map(|unit| stage.begun(unit)), [3, 1, 3]);
    assert_eq!((files(out.path()).len(), last.job.unwrap().given_up.len()), (6, 2), "the others were done");
}

/// Its GPU broke, say: the other units are not tried on it.
#[tokio::test]
async fn a_worker_that_can_do_nothing_more_ends_at_once() {
    let out = tempfile::tempdir().unwrap();
    let error = JobError::passing("CUDA error: unspecified launch failure").of_a_broken_worker();
    let broken = BTreeMap::from([("unit-00000".to_owned(), Broken::Always(error))]);
    let stage = Arc::new(Stage { broken, ..Stage::default() });
    let (ended, _) = run(out.path(), &stage, CancellationToken::new()).await;
    let Err(error @ JobEnd::Broken(_)) = ended else { panic!("{ended:?}") };
    assert!(!error.is_permanent() && error.to_string().contains("GPU does not work any more: CUDA error: unspecified"), "{error}");
    assert_eq!(stage.begun("unit-00000"), 1);
}
