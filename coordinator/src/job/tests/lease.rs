//! Units through the core: stages, grants, renewals, reports.

use super::*;
use crate::core::Loss;

#[test]
fn stages_follow_each_other_and_the_job_is_done_when_one_names_no_more() {
    let mut job = Job::new();
    assert_eq!(job.hello(1).len(), 2);
    assert_eq!(job.say(1, ask(1)), vec![grant(1, 1, PLAN)]);
    let effects = job.say(1, done(1, PLAN, &["b", "a", "a"]));
    assert_eq!(effects, vec![note(JobNote::Stage { stage: 2, units: 2 }), grant(1, 2, "a")]);
    job.hello(2);
    assert_eq!(job.say(2, ask(1)), vec![grant(2, 3, "b")]);
    assert_eq!(job.say(1, done(2, "a", &["finish"])), vec![], "the stage is not over: b is held");
    assert_eq!(job.say(2, done(3, "b", &["finish", "a"])), vec![note(JobNote::Stage { stage: 3, units: 1 }), grant(1, 4, "finish")]);
    let effects = job.say(1, done(4, "finish", &[]));
    let over = v1::JobOver { outcome: v1::Outcome::Done.into(), reason: String::new(), permanent: false };
    let told = |n| [to(n, to_worker::Body::JobOver(over.clone())), Effect::Close(conn(n))];
    let end = JobNote::Over { outcome: "done", stage: 3, reason: String::new(), permanent: false };
    let expected: Vec<Effect> = [told(1), told(2)].into_iter().flatten().chain([note(end), Effect::Finish(Outcome::Done)]).collect();
    assert_eq!(effects, expected);
    assert_eq!(job.outcome().exit_code(), 0);
}

#[test]
fn a_worker_holds_as_many_units_as_it_asks_for_and_the_least_laden_comes_first() {
    let mut job = Job::new();
    job.hello(1);
    job.say(1, ask(1));
    job.say(1, done(1, PLAN, &["a", "b", "c", "d", "e"]));
    job.hello(2);
    assert_eq!(job.say(2, ask(3)), vec![grant(2, 3, "b"), grant(2, 4, "c"), grant(2, 5, "d")]);
    assert_eq!(job.say(1, ask(2)), vec![grant(1, 6, "e")]);
    assert_eq!(job.close(2)[1..], [note(JobNote::Gone { worker: "w2".into(), why: Loss::StreamClosed.to_string(), requeued: 3 })]);
    job.hello(3);
    assert_eq!(job.say(3, ask(9)), vec![grant(3, 7, "b"), grant(3, 8, "c"), grant(3, 9, "d")]);
    assert_eq!(job.say(3, ask(u32::MAX)), vec![]);
    assert_eq!(job.status().workers[1].slots, MOST_SLOTS);
}

#[test]
fn a_dead_holders_unit_goes_to_another_at_once_and_its_late_report_counts_once() {
    let mut job = Job::planned(&["a", "b"]);
    assert_eq!(job.say(2, done(3, "b", &[])), vec![]);
    let effects = job.close(1);
    assert_eq!(effects.last(), Some(&grant(2, 4, "a")));
    job.hello(3);
    assert_eq!(job.say_as(SESSION, 3, done(2, "a", &["finish"])).last(), Some(&grant(2, 5, "finish")), "it came back and had done it");
    assert_eq!(job.say(2, done(4, "a", &["finish"])), vec![]);
    assert_eq!((job.count("units_done"), job.count("units_done_before"), job.count("leases_requeued")), (3, 1, 1));
    assert_eq!(job.say(2, done(5, "finish", &[])).last(), Some(&Effect::Finish(Outcome::Done)));
}

#[test]
fn a_lease_that_is_not_renewed_goes_to_another() {
    let mut job = Job::planned(&["a", "b"]);
    let renew = |lease_id| from_worker::Body::LeaseRenew(v1::LeaseRenew { lease_id, done: 10 });
    job.say(2, done(3, "b", &[]));
    job.until(750, &[1, 2]);
    job.say(1, renew(2));
    job.until(1_500, &[1, 2]);
    assert_eq!(job.count("leases_expired"), 0);
    let effects = job.until(1_750, &[1, 2]);
    assert_eq!((job.count("leases_expired"), effects.as_slice()), (1, &[grant(1, 4, "a")][..]), "to whoever is free");
    job.say(1, renew(2));
    assert_eq!(job.count("refused_lost_lease"), 1);
}

/// If all were looked at for each, the signs of life of a thousand workers would take more time than passes between them: minutes here.
#[test]
fn signs_of_life_of_many_workers_take_little_time() {
    const WORKERS: u64 = 1_000;
    let mut core = JobCore::new(settings(), Time(0));
    let mut say = |term, n, body| core.handle(Time(1), Event::Message(conn(n), FromWorker { term, generation: 0, body: Some(body) }));
    for n in 1..=WORKERS {
        say(0, n, from_worker::Body::Hello(hello(n)));
        say(SESSION, n, ask(4));
    }
    let units: Vec<String> = (0..5 * WORKERS).map(|n| format!("u{n:04}")).collect();
    say(SESSION, 1, done(1, PLAN, &units.iter().map(String::as_str).collect::<Vec<_>>()));
    let begin = std::time::Instant::now();
    for (samples, lease) in (1..=5).flat_map(|samples| (0..4 * WORKERS).map(move |lease| (samples, lease))) {
        let renew = v1::LeaseRenew { lease_id: 2 + lease, done: samples };
        assert_eq!(say(SESSION, 1 + lease % WORKERS, from_worker::Body::LeaseRenew(renew)), vec![]);
    }
    assert!(begin.elapsed() < std::time::Duration::from_secs(10), "{:?}", begin.elapsed());
    let job = core.status(Time(1)).job.unwrap();
    assert_eq!((job.samples, job.units_held, job.workers[7].held.len()), (5 * 4 * WORKERS, 4 * WORKERS, 4));
}

#[test]
fn a_failed_unit_is_tried_elsewhere_first() {
    let mut job = Job::planned(&["a", "b"]);
    let effects = job.say(1, failed(2, "a", "disk full", false));
    let told = JobNote::UnitFailed { unit: "a".into(), worker: "w1".into(), error: "disk full".into(), permanent: false, given_up: false };
    assert_eq!(effects, vec![note(told)], "2 has not tried it, and is busy");
    assert_eq!(job.say(2, done(3, "b", &[])), vec![grant(2, 4, "a")]);
    assert_eq!(job.close(2).last(), Some(&grant(1, 5, "a")), "nobody else is here");
}

#[test]
fn a_plan_of_many_units_comes_in_parts_that_count_with_its_end_only() {
    let mut job = Job::new();
    job.hello(1);
    job.say(1, ask(1));
    let then = |units: &[&str]| from_worker::Body::LeaseThen(v1::LeaseThen { lease_id: 1, units: names(units) });
    assert_eq!(job.say(1, then(&["a", "b"])), vec![]);
    job.close(1);
    job.hello(2);
    job.say(2, ask(1));
    assert_eq!(job.say(2, done(2, PLAN, &["c"]))[0], note(JobNote::Stage { stage: 2, units: 1 }), "1 did not come to the end");
    let mut job = Job::new();
    job.hello(1);
    job.say(1, ask(1));
    job.say(1, then(&["a", "b"]));
    assert_eq!(job.say(1, done(1, PLAN, &["c"]))[0], note(JobNote::Stage { stage: 2, units: 3 }));
}

#[test]
fn names_for_leases_that_a_worker_does_not_hold_are_refused_and_counted() {
    let mut job = Job::planned(&["a", "b"]);
    let then = |lease_id| from_worker::Body::LeaseThen(v1::LeaseThen { lease_id, units: names(&["x"]) });
    // 1 is done, 3 is the other worker's, and the rest are nobody's.
    for lease_id in (0..1_001).filter(|id| *id != 2) {
        assert_eq!(job.say(1, then(lease_id)), vec![]);
    }
    assert_eq!((job.core.workers.leases_named(), job.count("refused_lost_lease")), (0, 1_000));
    job.say(1, then(2));
    assert_eq!(job.core.workers.leases_named(), 1);
}

/// It was away while its unit was requeued, and some of the names were refused: the unit would be done without all that follows.
#[test]
fn an_end_whose_names_were_refused_does_not_count() {
    let mut job = Job::planned(&["a", "b"]);
    let then = |lease_id, units: &[&str]| from_worker::Body::LeaseThen(v1::LeaseThen { lease_id, units: names(units) });
    job.close(1);
    job.hello(3);
    // Two leases of one worker, turn by turn: it is the first one's end that comes.
    job.say(3, then(2, &["x", "y"]));
    job.say(3, then(1, &["w"]));
    assert_eq!(job.say(3, done(2, "a", &["z"])), vec![]);
    assert_eq!((job.count("refused_lost_lease"), job.count("refused_unknown_unit"), job.status().units_done), (2, 1, 0));
    assert_eq!(job.say(3, ask(1)), vec![grant(3, 4, "a")]);
    job.say(3, then(4, &["x", "y"]));
    job.say(3, done(4, "a", &["z"]));
    let effects = job.say(2, done(3, "b", &[]));
    assert_eq!(effects[0], note(JobNote::Stage { stage: 3, units: 3 }));
}

#[test]
fn what_a_run_says_and_what_another_session_says_changes_nothing() {
    let mut job = Job::planned(&["a"]);
    job.say_as(SESSION + 1, 1, done(2, "a", &[]));
    job.say(1, from_worker::Body::Ready(v1::Ready::default()));
    job.event(Event::Message(conn(1), FromWorker::default()));
    assert_eq!(["refused_other_session", "refused_of_a_run", "refused_empty"].map(|name| job.count(name)), [1, 1, 1]);
    assert_eq!(job.status().units_held, 1);
}
