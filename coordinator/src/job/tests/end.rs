//! How jobs end, and what is shown of them.

use super::*;

fn over(job: &Job) -> JobFailure {
    match job.outcome() {
        Outcome::Failed(failure) => match *failure {
            crate::core::Failure::Job(failure) => failure,
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn units_that_nobody_can_do_fail_the_job_at_the_end_of_their_stage_and_are_all_named() {
    let mut job = Job::planned(&["a", "b", "c"]);
    assert_eq!(job.say(1, failed(2, "a", "a.tar: truncated", true)).last(), Some(&grant(1, 4, "c")), "the others go on");
    for id in [3, 5, 6] {
        let n = if job.status().workers[0].held.iter().any(|held| held.unit == "b") { 1 } else { 2 };
        job.say(n, failed(id, "b", "no space", false));
        job.say(1, done(4, "c", &["finish"]));
    }
    let units = vec![
        GivenUp { unit: "a".into(), error: "a.tar: truncated".into(), permanent: true },
        GivenUp { unit: "b".into(), error: "no space".into(), permanent: false },
    ];
    assert_eq!(over(&job), JobFailure::GivenUp { stage: 2, of: 3, units });
    assert_eq!(job.outcome().exit_code(), 4);
    let reason = "2 of the 3 units of stage 2 could not be done: a: a.tar: truncated; b: no space";
    let status = job.core.status(job.now);
    assert_eq!((status.phase.as_str(), status.reason.as_str(), status.permanent_failure), ("failed", reason, true));
    assert_eq!(job.status().given_up.len(), 2);
}

#[test]
fn errors_that_may_pass_are_worth_another_start() {
    let mut job = Job::new();
    job.hello(1);
    job.say(1, ask(1));
    for id in 1..=3 {
        job.say(1, failed(id, PLAN, "the store is away", false));
    }
    assert_eq!((over(&job).permanent(), job.outcome().exit_code()), (false, 1));
}

#[test]
fn many_units_are_not_all_put_into_words() {
    let unit = |n: usize| GivenUp { unit: format!("u{n}"), error: "no".into(), permanent: false };
    let text = JobFailure::GivenUp { stage: 2, of: 500, units: (0..300).map(unit).collect() }.to_string();
    assert!(
        text.starts_with("300 of the 500 units of stage 2") && text.ends_with("u9: no; and 290 more, each named in the coordinator's log"),
        "{text}"
    );
}

#[test]
fn a_stop_ends_the_job_at_once_and_resumable() {
    let mut job = Job::planned(&["a", "b"]);
    let effects = job.event(Event::Stop("enough".into()));
    let told = v1::JobOver { outcome: v1::Outcome::Preempted.into(), reason: "enough".into(), permanent: false };
    assert_eq!(effects[..2], [to(1, to_worker::Body::JobOver(told)), Effect::Close(conn(1))]);
    assert_eq!((job.outcome(), job.outcome().exit_code()), (Outcome::Preempted { reason: "enough".into() }, 3));
    assert_eq!(job.say(1, done(2, "a", &[])), vec![]);
    assert_eq!(job.count("refused_after_the_end"), 1);
    assert!(
        matches!(&job.hello(3)[0], Effect::Send(_, ToWorker { body: Some(to_worker::Body::Refused(refused)), .. }) if refused.detail == "the job is over (preempted)")
    );
}

#[test]
fn the_status_says_what_is_done_how_fast_and_by_whom() {
    let mut job = Job::planned(&["a", "b", "c"]);
    job.until(5_000, &[]);
    // Both are gone by now: the time without workers does not count.
    assert_eq!(job.core.status(job.now).phase, "waiting");
    for n in [3, 4] {
        job.hello(n);
        job.say(n, ask(1));
    }
    job.now = Time(5_500);
    let results = |n| [("read".to_owned(), n), ("kept".to_owned(), n - 1)].into();
    let report = v1::LeaseDone { lease_id: 4, unit: "a".into(), done: 10, counts: results(10), ..v1::LeaseDone::default() };
    job.say(3, from_worker::Body::LeaseDone(report.clone()));
    job.say(3, from_worker::Body::LeaseDone(report));
    job.now = Time(6_000);
    job.say(4, from_worker::Body::LeaseRenew(v1::LeaseRenew { lease_id: 5, done: 20 }));
    let status = job.status();
    assert_eq!((status.stage, status.units, status.units_done, status.units_held, status.samples), (2, 3, 1, 2, 30));
    assert_eq!((status.samples_per_second, status.units_per_second, status.seconds_left), (30.0, 1.0, Some(2.0)));
    assert_eq!(status.results, results(10), "counted once");
    let held = v1::HeldUnit { unit: "b".into(), done: 20, held_ms: 1_000 };
    let worker = &status.workers[1];
    assert_eq!((worker.worker_id.as_str(), worker.slots, worker.held.as_slice(), worker.silent_ms), ("w4", 1, &[held][..], 0));
    assert_eq!(status.workers[0].units_done, 1);
}
