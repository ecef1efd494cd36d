//! LeaseRequest, LeaseRenew, LeaseDone: order-free work through the core.

use super::*;

fn run_with_units() -> Run {
    let units = vec!["a".into(), "b".into()];
    let mut run = Run::new(CoreConfig { units, ..config(3) }, vec![]);
    run.hello(1);
    run.hello(2);
    run
}

fn grant(run: &Run, n: u64, lease_id: u64, unit: &str) -> Vec<Effect> {
    vec![run.to(n, to_worker::Body::LeaseGrant(v1::LeaseGrant { unit: unit.into(), lease_id, deadline_ms: 1_000 }))]
}

fn request() -> from_worker::Body {
    from_worker::Body::LeaseRequest(v1::LeaseRequest {})
}

fn report(lease_id: u64, unit: &str) -> from_worker::Body {
    from_worker::Body::LeaseDone(v1::LeaseDone { lease_id, unit: unit.into(), error: String::new() })
}

#[test]
fn units_are_leased_one_by_one_and_a_dead_holders_unit_at_once_to_the_next() {
    let mut run = run_with_units();
    assert_eq!(run.say(1, request()), grant(&run, 1, 1, "a"));
    assert_eq!(run.say(2, request()), grant(&run, 2, 2, "b"));
    let later = to_worker::Body::NoLease(v1::NoLease { finished: false, retry_ms: 250 });
    assert_eq!(run.say(2, request()), vec![run.to(2, later)]);
    run.event(Event::Closed(conn(1), Closed::Gone));
    assert_eq!(run.count("leases_requeued"), 1);
    assert_eq!(run.say(2, request()), grant(&run, 2, 3, "a"));
    run.say(2, report(2, "b"));
    run.say(2, report(3, "a"));
    run.say(2, report(3, "a"));
    assert_eq!((run.count("units_done"), run.count("units_done_before")), (2, 1));
    let finished = to_worker::Body::NoLease(v1::NoLease { finished: true, retry_ms: 250 });
    assert_eq!(run.say(2, request()), vec![run.to(2, finished)]);
}

#[test]
fn a_lease_that_is_not_renewed_goes_to_another() {
    let mut run = run_with_units();
    run.say(1, request());
    run.until(750, &[1, 2]);
    run.say(1, from_worker::Body::LeaseRenew(v1::LeaseRenew { lease_id: 1, done: 10 }));
    run.until(1_500, &[1, 2]);
    assert_eq!(run.count("leases_expired"), 0);
    run.until(1_750, &[1, 2]);
    assert_eq!(run.count("leases_expired"), 1);
    assert_eq!(run.say(2, request()), grant(&run, 2, 2, "a"));
    run.say(1, from_worker::Body::LeaseRenew(v1::LeaseRenew { lease_id: 1, done: 11 }));
    assert_eq!(run.count("refused_lost_lease"), 1);
}

#[test]
fn a_training_run_has_nothing_to_lease() {
    let mut run = Run::training(vec![]);
    let finished = to_worker::Body::NoLease(v1::NoLease { finished: true, retry_ms: 250 });
    assert_eq!(run.say(1, request()), vec![run.to(1, finished)]);
}
