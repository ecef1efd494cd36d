//! Workers that come and go.

use super::*;
use crate::core::{Loss, Who};
use v1::RefusedReason as R;

fn refusal(effects: &[Effect]) -> Option<R> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send(_, ToWorker { body: Some(to_worker::Body::Refused(refused)), .. }) => Some(refused.reason()),
        _ => None,
    })
}

#[test]
fn any_number_of_workers_is_welcome_as_long_as_each_says_who_it_is() {
    let mut job = Job::new();
    let joined = JobNote::Joined { worker: "w1".into(), host: "h1".into(), pid: 1, workers: 1 };
    assert_eq!(job.hello(1), vec![to(1, to_worker::Body::Welcome(settings().welcome)), note(joined)]);
    let cases = [
        (v1::Hello { worker_id: "w1".into(), ..hello(2) }, R::DuplicateWorker),
        (v1::Hello { worker_id: String::new(), ..hello(3) }, R::Malformed),
        (v1::Hello { host: "h".repeat(300), ..hello(4) }, R::Malformed),
        (v1::Hello { version: "2".into(), ..hello(5) }, R::Version),
        (v1::Hello { config_digest: "other".into(), ..hello(6) }, R::Config),
    ];
    for (n, (hello, reason)) in (2..).zip(cases) {
        let effects = job.say_as(0, n, from_worker::Body::Hello(hello));
        assert_eq!((refusal(&effects), effects.contains(&Effect::Close(conn(n)))), (Some(reason), true));
    }
    assert_eq!(refusal(&job.say(9, ask(1))), Some(R::Malformed), "a stranger");
    job.hello(1);
    assert_eq!(job.count("refused_second_hello"), 1);
    for n in 10..200 {
        job.hello(n);
    }
    assert_eq!(job.status().workers.len(), 191);
}

#[test]
fn a_worker_that_falls_silent_loses_its_units_and_one_that_leaves_gives_them_back() {
    let mut job = Job::planned(&["a", "b"]);
    let effects = job.until(LEASE, &[2]);
    let why = Loss::Silent { silent_ms: LEASE }.to_string();
    assert!(
        effects.contains(&note(JobNote::Gone { worker: "w1".into(), why, requeued: 0 })),
        "its lease ended in the same moment: {effects:?}"
    );
    assert_eq!((job.count("leases_missed"), job.count("workers_lost")), (1, 1));
    job.hello(3);
    job.say(3, ask(1));
    let held = |job: &Job| job.status().workers.iter().map(|worker| worker.held.len()).sum::<usize>();
    assert_eq!(held(&job), 2);
    job.say(3, from_worker::Body::Finished(v1::Finished { step: 0, outcome: v1::Outcome::Preempted.into() }));
    job.close(3);
    assert_eq!((job.count("workers_left"), job.count("workers_lost"), job.status().workers.len()), (1, 1, 1));
}

#[test]
fn a_job_without_workers_waits_and_fails_in_the_end_and_can_be_started_again() {
    let mut job = Job::new();
    assert!(job.core.status(Time(START - 1_000)).reason.contains("fails in 1 s"), "{}", job.core.status(Time(START - 1_000)).reason);
    job.until(START - 1, &[]);
    job.hello(1);
    job.until(3 * START, &[1]);
    assert_eq!((job.core.status(job.now).phase.as_str(), job.core.status(job.now).reason.as_str()), ("working", ""));
    job.close(1);
    assert_eq!(job.core.status(job.now).phase, "waiting");
    job.until(4 * START - 1, &[]);
    assert!(job.core.outcome.is_none());
    job.until(4 * START, &[]);
    assert_eq!((job.outcome(), job.outcome().exit_code()), (JobFailure::NoWorker { waited_ms: START }.into(), 1));
}

#[test]
fn time_in_which_the_coordinator_was_stopped_is_nobodys_silence() {
    let mut job = Job::planned(&["a", "b"]);
    job.until(500, &[1, 2]);
    job.now = Time(500_000);
    job.event(Event::Tick);
    assert_eq!((job.count("coordinator_stopped"), job.status().units_held, job.status().workers.len()), (1, 2, 2));
}

#[test]
fn a_worker_that_cannot_do_the_job_leaves_it_to_others_unless_none_could() {
    let say = |job: &mut Job, n: u64, permanent| {
        let kind = v1::FailureKind::Input.into();
        job.say(n, from_worker::Body::Failed(v1::Failed { kind, message: "no such model".into(), permanent }))
    };
    let mut job = Job::planned(&["a", "b"]);
    say(&mut job, 1, false);
    assert_eq!((job.count("workers_failed"), job.count("leases_requeued"), job.core.outcome.is_none()), (1, 1, true));
    say(&mut job, 2, true);
    let who = Who { worker_id: "w2".into(), rank: None, host: "h2".into(), pid: 2 };
    assert_eq!(job.outcome(), JobFailure::Worker { who, message: "no such model".into() }.into());
    assert_eq!(job.outcome().exit_code(), 4);
}
