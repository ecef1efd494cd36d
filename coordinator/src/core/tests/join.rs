//! Workers that come while training goes on.

use super::*;

/// Two train, and a third has loaded.
fn one_waits() -> Run {
    let mut run = Run::training(vec![]);
    assert_eq!(run.come(3), vec![]);
    run
}

const ONE: &str = "workers that are to join: 1";

#[test]
fn joiners_are_taken_in_at_a_boundary_after_their_window() {
    let mut run = one_waits();
    run.until(1_000, &[1, 2, 3]);
    run.come(4);
    run.until(1_999, &[1, 2, 3, 4]);
    assert_eq!(run.core.phase(), &Phase::Training);
    let effects = run.until(2_000, &[1, 2, 3, 4]);
    let reason = "workers that are to join: 2";
    let note = Note::Regroup { generation: 1, reason: reason.into(), at_boundary: true };
    assert_eq!(effects, vec![Effect::Note(note), run.boundary(1, reason), run.boundary(2, reason)]);
    assert_eq!(run.core.phase(), &Phase::Training, "the step is still being taken");
    assert_eq!(run.core.status(run.now).reason, format!("after the next step another generation begins ({reason})"));
    assert_eq!(run.say(2, idle(Some(5))), vec![], "nobody is told to stop in the midst of it");
    assert_eq!(run.core.phase(), &Phase::Regrouping { until: Time(7_000) });
    let effects = run.say(1, idle(Some(5)));
    let places: Vec<_> = (1..=4).map(|n| (n, Some(0), 5, true)).collect();
    assert_eq!(run.places(&effects), places);
    assert_eq!(run.count("workers_lost"), 0);
}

#[test]
fn no_more_are_taken_in_than_a_run_may_have() {
    let mut run = Run::new(CoreConfig { max: 3, ..config(2) }, vec![]).both_in().both_ready(0);
    run.come(3);
    run.come(4);
    run.until(2_000, &[1, 2, 3, 4]);
    run.say(1, idle(Some(5)));
    let effects = run.say(2, idle(Some(5)));
    assert_eq!(run.places(&effects).iter().map(|place| place.0).collect::<Vec<_>>(), [1, 2, 3]);
    run.go_on(5, &[1, 2, 3]);
    assert_eq!(run.until(9_000, &[1, 2, 3, 4]), vec![], "the fourth stays a spare");
    // It takes the place of the next that is lost.
    run.close(2);
    run.say(1, idle(Some(9)));
    let effects = run.say(3, idle(Some(9)));
    assert_eq!(run.places(&effects).iter().map(|place| place.0).collect::<Vec<_>>(), [1, 3, 4]);
}

#[test]
fn a_joiner_that_leaves_in_its_window_disturbs_nobody() {
    let mut run = one_waits();
    run.close(3);
    assert_eq!(run.until(5_000, &[1, 2]), vec![]);
}

#[test]
fn a_joiner_comes_in_with_a_regroup_that_happens_anyway() {
    let mut run = one_waits();
    run.close(1);
    let effects = run.say(2, idle(Some(4)));
    assert_eq!(run.places(&effects), [(2, Some(0), 4, true), (3, Some(0), 4, true)]);
    run.go_on(4, &[2, 3]);
    assert_eq!(run.until(9_000, &[2, 3]), vec![], "its window is forgotten");
}

#[test]
fn one_that_has_loaded_while_a_generation_starts_waits_for_its_window_too() {
    let mut run = Run::assigned(vec![]);
    run.come(3);
    run.until(3_000, &[1, 2, 3]);
    let run = &mut run.both_ready(0);
    assert!(run.core.next_deadline().is_some_and(|at| at <= Time(4_000)), "the leases");
    let effects = run.until(5_000, &[1, 2, 3]);
    assert_eq!(effects.last(), Some(&run.boundary(2, ONE)));
}

#[test]
fn joiners_wait_for_a_commit_under_way_but_not_for_ever() {
    let mut run = one_waits();
    run.say(1, state(2));
    assert_eq!(run.until(5_000, &[1, 2, 3]), vec![]);
    run.say(2, state(2));
    run.say(1, part(2, 0));
    run.say(1, part(2, 1));
    let effects = run.say(2, part(2, 2));
    let note = Note::Regroup { generation: 1, reason: ONE.into(), at_boundary: true };
    let append = Effect::Append(Body::Commit(commit_at(2, TERM)));
    assert_eq!(effects, vec![append, Effect::Note(note), run.boundary(1, ONE), run.boundary(2, ONE)]);

    let mut run = Run::new(CoreConfig { commit_timeout: 3_000, ..config(2) }, vec![]).both_in().both_ready(0);
    run.come(3);
    run.until(1_900, &[1, 2, 3]);
    for step in [2, 4, 6] {
        run.say(1, state(step));
        run.until(1_900 + 1_000 * step / 2, &[1, 2, 3]);
        for (n, body) in [(2, state(step)), (1, part(step, 0)), (1, part(step, 1)), (1, state(step + 2))] {
            run.say(n, body);
        }
        let effects = run.say(1, part(step, 2));
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Send(..))), "another is under way");
        run.event(Event::Appended(Body::Commit(commit_at(step, TERM))));
    }
    let effects = run.until(5_000, &[1, 2, 3]);
    assert_eq!(effects.last(), Some(&run.boundary(2, ONE)));
}

/// It waits in the step's sums for one that will never come.
#[test]
fn a_rank_that_is_lost_on_the_way_to_a_boundary_makes_the_others_stop_at_once() {
    let mut run = one_waits();
    run.until(2_000, &[1, 2, 3]);
    let effects = run.close(2);
    let reason = "worker w2 (rank 1, host h2, pid 2) was lost: its stream closed";
    assert_eq!(effects.last(), Some(&run.regroup(1, reason)));

    let mut run = Run::new(config(3), vec![]);
    (1..=3).for_each(|n| drop(run.come(n)));
    (1..=3).for_each(|n| drop(run.say(n, from_worker::Body::Ready(ready(0)))));
    run.come(4);
    run.until(2_000, &[1, 2, 3, 4]);
    run.say(1, idle(Some(5)));
    let effects = run.close(2);
    assert_eq!(effects.last(), Some(&run.regroup(3, reason)), "rank 0 has stopped");
    let effects = run.say(3, idle(Some(5)));
    assert_eq!(run.places(&effects).len(), 3);
}

#[test]
fn a_boundary_that_breaks_makes_the_others_stop_at_once() {
    let mut run = Run::new(config(3), vec![]);
    (1..=3).for_each(|n| drop(run.come(n)));
    (1..=3).for_each(|n| drop(run.say(n, from_worker::Body::Ready(ready(0)))));
    run.come(4);
    run.until(2_000, &[1, 2, 3, 4]);
    run.say(1, idle(Some(5)));
    let reason = "worker w2 (rank 1, host h2, pid 2): peer closed";
    assert_eq!(run.say(2, broken(4, "peer closed")).last(), Some(&run.regroup(3, reason)));
}

#[test]
fn a_run_that_ends_instead_needs_no_boundary() {
    let mut run = one_waits();
    run.until(2_000, &[1, 2, 3]);
    run.report_commit(10);
    run.say(1, done(10));
    run.say(2, done(10));
    assert_eq!(run.say(1, idle(Some(10))), vec![], "it was told too late");
    run.event(Event::Appended(Body::Commit(commit_at(10, TERM))));
    assert_eq!(run.core.wait(), Some(Wait::Record));
}
