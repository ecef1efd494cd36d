//! Closed, Failed, and silence: who is to blame, and what becomes of the others.

use super::*;
use v1::FailureKind as Kind;

fn failed(kind: Kind, message: &str, permanent: bool) -> from_worker::Body {
    from_worker::Body::Failed(v1::Failed { kind: kind.into(), message: message.into(), permanent })
}

#[test]
fn before_training_a_workers_place_is_free_again() {
    let mut run = Run::new(config(2), vec![]);
    run.hello(1);
    let note = Note::Left { worker: "w1".into(), why: "its stream closed".into() };
    assert_eq!(run.event(Event::Closed(conn(1), Closed::Gone)), vec![Effect::Close(conn(1)), Effect::Note(note)]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 0, need: 2 }));
    run.hello(2);
    run.hello(3);
    assert!(matches!(run.core.phase(), Phase::Starting { .. }));
}

#[test]
fn a_worker_that_dies_in_training_ends_the_run_and_the_survivors_are_told_at_once() {
    let mut run = Run::training(vec![commit_at(4, 2)]);
    let effects = run.event(Event::Closed(conn(2), Closed::Gone));
    let reason = "worker w2 (rank 1, host h2, pid 2) was lost: its stream closed; start the run again to resume from its last commit";
    let failure = Failure::Lost { who: who(2, Some(1)), how: Loss::StreamClosed };
    let expected = vec![
        Effect::Close(conn(2)),
        run.abort(1, reason),
        Effect::Close(conn(1)),
        Effect::Append(Body::End { outcome: ella_store::Outcome::Failed, step: 4, reason: reason.into() }),
        Effect::Note(Note::Ended { outcome: "failed", step: 4, reason: reason.into(), permanent: false }),
        Effect::Finish(failure.clone().into()),
    ];
    assert_eq!(effects, expected);
    assert_eq!(run.failure(), failure);
    let status = run.core.status(run.now);
    assert_eq!((status.phase.as_str(), status.reason.as_str(), status.last_commit_step), ("failed", reason, 4));
    assert_eq!(run.count("workers_lost"), 1);
    assert_eq!(Outcome::from(failure).exit_code(), 1);
}

#[test]
fn silence_for_a_lease_is_a_loss() {
    let mut run = Run::training(vec![]);
    run.until(999, &[1]);
    assert_eq!(run.core.next_deadline(), Some(Time(1_000)));
    run.until(1_000, &[1]);
    assert_eq!(run.failure(), Failure::Lost { who: who(2, Some(1)), how: Loss::Silent { silent_ms: 1_000 } });
}

#[test]
fn silence_before_training_frees_the_place() {
    let mut run = Run::new(config(2), vec![]);
    run.hello(1);
    run.until(1_000, &[]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 0, need: 2 }));
    assert_eq!(run.count("leases_missed"), 1);
}

#[test]
fn a_broken_collective_is_blamed_on_the_worker_that_is_gone() {
    let mut run = Run::training(vec![]);
    assert_eq!(run.say(1, failed(Kind::Collective, "peer closed", false)), vec![]);
    run.now = Time(150);
    run.event(Event::Closed(conn(2), Closed::Gone));
    assert_eq!(run.failure(), Failure::Lost { who: who(2, Some(1)), how: Loss::StreamClosed });
}

#[test]
fn the_reporter_of_a_broken_collective_is_not_blamed_for_leaving() {
    let mut run = Run::training(vec![]);
    run.say(1, failed(Kind::Collective, "peer closed", false));
    assert_eq!(run.event(Event::Closed(conn(1), Closed::Gone)), vec![Effect::Close(conn(1))]);
    run.until(200, &[2]);
    let (kind, message) = (Kind::Collective, "peer closed".to_owned());
    assert_eq!(run.failure(), Failure::Worker { who: who(1, Some(0)), kind, message, permanent: false });
}

#[test]
fn when_all_ranks_report_a_broken_collective_there_is_nothing_to_wait_for() {
    let mut run = Run::training(vec![]);
    run.say(2, failed(Kind::Collective, "first", false));
    run.say(1, failed(Kind::Collective, "second", false));
    let Failure::Worker { message, .. } = run.failure() else { panic!("{:?}", run.failure()) };
    assert_eq!(message, "first");
}

#[test]
fn a_workers_own_failure_ends_the_run_as_it_says() {
    for (permanent, code) in [(true, 4), (false, 1)] {
        let mut run = Run::assigned(vec![]);
        run.say(1, failed(Kind::Input, "a shard is cut short", permanent));
        let text = "worker w1 (rank 0, host h1, pid 1) failed (input): a shard is cut short";
        assert_eq!(run.failure().to_string(), text);
        assert_eq!(Outcome::from(run.failure()).exit_code(), code);
    }
}

#[test]
fn a_worker_that_fails_before_the_others_came_ends_the_run_too() {
    let mut run = Run::new(config(2), vec![]);
    run.hello(1);
    run.say(1, failed(Kind::Input, "no such model", true));
    assert!(run.failure().permanent());
}

#[test]
fn unreadable_messages_are_counted_and_lose_their_sender() {
    for (how, counter, loss) in [
        (Closed::Malformed, "refused_unreadable", Loss::Unreadable),
        (Closed::Oversized, "refused_oversized", Loss::Unreadable),
        (Closed::Stuck, "workers_stuck", Loss::Stuck),
    ] {
        let mut run = Run::training(vec![]);
        assert_eq!(run.event(Event::Closed(conn(9), how)), vec![], "a stranger harms nobody");
        run.event(Event::Closed(conn(1), how));
        assert_eq!(run.failure(), Failure::Lost { who: who(1, Some(0)), how: loss });
        assert_eq!(run.count(counter), 2);
    }
}

#[test]
fn a_worker_whose_work_is_done_may_go() {
    let mut run = Run::training(vec![]);
    run.report_commit(10);
    run.say(1, done(10));
    run.say(2, done(10));
    assert_eq!(run.event(Event::Closed(conn(1), Closed::Gone)), vec![Effect::Close(conn(1))]);
    assert!(!run.core.phase().is_over());
    run.event(Event::Appended(Body::Commit(commit_at(10, TERM))));
    run.event(Event::Closed(conn(2), Closed::Gone));
    run.event(Event::Appended(Body::End { outcome: ella_store::Outcome::Done, step: 10, reason: String::new() }));
    assert_eq!(run.core.phase(), &Phase::Over(Outcome::Done));
}

/// Its farewell may be lost with it, or come before the others'.
#[test]
fn a_worker_may_go_once_the_last_commit_stands() {
    let record = || Body::End { outcome: ella_store::Outcome::Done, step: 10, reason: String::new() };
    let mut run = Run::training(vec![]);
    run.commit(10);
    run.say(1, done(10));
    assert_eq!(run.event(Event::Closed(conn(1), Closed::Gone)), vec![Effect::Close(conn(1))]);
    assert_eq!(run.event(Event::Closed(conn(2), Closed::Gone)), vec![Effect::Close(conn(2)), Effect::Append(record())]);
    run.event(Event::Appended(record()));
    assert_eq!((run.core.phase(), run.count("workers_lost")), (&Phase::Over(Outcome::Done), 0));

    let mut run = Run::training(vec![]);
    run.commit(10);
    run.event(Event::Closed(conn(2), Closed::Gone));
    assert_eq!(run.say(1, done(10)), vec![Effect::Append(record())]);
}

/// A drain ends at a step that only the workers know: the last commit is not known to be all of it until they say so.
#[test]
fn a_worker_that_goes_in_a_drain_is_lost_unless_it_said_farewell() {
    let mut run = Run::training(vec![]);
    run.event(Event::Stop("night".into()));
    run.commit(3);
    run.say(1, preempted(3));
    assert_eq!(run.event(Event::Closed(conn(1), Closed::Gone)), vec![Effect::Close(conn(1))]);
    run.event(Event::Closed(conn(2), Closed::Gone));
    assert_eq!(run.failure(), Failure::Lost { who: who(2, Some(1)), how: Loss::StreamClosed });
}

#[test]
fn a_worker_that_goes_before_its_commit_is_complete_is_lost() {
    let mut run = Run::training(vec![]);
    run.say(1, state(10));
    run.say(1, done(10));
    run.say(2, done(10));
    run.event(Event::Closed(conn(2), Closed::Gone));
    assert_eq!(run.failure(), Failure::Lost { who: who(2, Some(1)), how: Loss::StreamClosed });
}

#[test]
fn a_coordinator_that_was_stopped_itself_blames_nobody() {
    let mut run = Run::training(vec![]);
    run.until(500, &[1, 2]);
    // Stopped for a minute; the workers' messages wait in the sockets.
    run.now = Time(60_500);
    assert_eq!(run.event(Event::Tick), vec![]);
    assert_eq!(run.count("coordinator_stopped"), 1);
    assert_eq!(run.core.next_deadline(), Some(Time(61_500)));
    run.beat(1);
    run.beat(2);
    run.until(61_000, &[1]);
    assert!(!run.core.phase().is_over());
    run.until(61_500, &[1]);
    assert_eq!(run.failure(), Failure::Lost { who: who(2, Some(1)), how: Loss::Silent { silent_ms: 1_000 } });
}
