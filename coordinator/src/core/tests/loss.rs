//! Closed, Failed, and silence: who is to blame, and what becomes of the others.

use super::*;
use v1::FailureKind as Kind;

fn failed(kind: Kind, message: &str, permanent: bool) -> from_worker::Body {
    from_worker::Body::Failed(v1::Failed { kind: kind.into(), message: message.into(), permanent })
}

fn lost(n: u64, rank: u32, why: &str) -> Effect {
    Effect::Note(Note::Lost { worker: format!("w{n}"), rank: Some(rank), why: why.into() })
}

fn regrouping(generation: u64, reason: &str) -> Effect {
    Effect::Note(Note::Regroup { generation, reason: reason.into(), at_boundary: false })
}

#[test]
fn before_training_a_workers_place_is_free_again() {
    let mut run = Run::new(config(2), vec![]);
    run.hello(1);
    let note = Note::Left { worker: "w1".into(), why: "its stream closed".into() };
    assert_eq!(run.close(1), vec![Effect::Close(conn(1)), Effect::Note(note)]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 0, need: 2 }));
    run.come(2);
    run.come(3);
    assert!(matches!(run.core.phase(), Phase::Starting { .. }));
}

#[test]
fn when_a_worker_dies_the_others_are_told_at_once_and_go_on_without_it() {
    let mut run = Run::training(vec![commit_at(4, 2)]);
    let effects = run.close(2);
    let reason = "worker w2 (rank 1, host h2, pid 2) was lost: its stream closed";
    let expected = vec![Effect::Close(conn(2)), lost(2, 1, "its stream closed"), regrouping(1, reason), run.regroup(1, reason)];
    assert_eq!(effects, expected);
    assert_eq!(run.core.phase(), &Phase::Regrouping { until: Time(5_000) });
    let status = run.core.status(run.now);
    assert_eq!(status.phase, "regrouping");
    assert_eq!(status.reason, format!("waiting for workers to stop, so that others can go on: 1 ({reason})"));
    assert_eq!(run.count("workers_lost"), 1);
    let effects = run.say(1, idle(Some(7)));
    assert_eq!(run.places(&effects), [(1, Some(0), 7, false)]);
    assert_eq!(effects.last(), Some(&Effect::Note(Note::Generation { generation: 2, workers: vec!["w1".into()], from_step: 7 })));
    run.go_on(7, &[1]);
    assert_eq!((run.core.phase(), run.core.wait()), (&Phase::Training, None));
}

#[test]
fn silence_for_a_lease_is_a_loss() {
    let mut run = Run::training(vec![]);
    run.until(999, &[1]);
    assert_eq!(run.core.next_deadline(), Some(Time(1_000)));
    let effects = run.until(1_000, &[1]);
    assert_eq!(effects[1], lost(2, 1, "nothing was heard from it for 1000 ms (its lease)"));
    assert!(matches!(run.core.phase(), Phase::Regrouping { .. }));
}

#[test]
fn silence_before_training_frees_the_place() {
    let mut run = Run::new(config(2), vec![]);
    run.hello(1);
    run.until(1_000, &[]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 0, need: 2 }));
    assert_eq!(run.count("leases_missed"), 1);
}

/// Whoever is at fault, all that are there form again.
#[test]
fn a_broken_collective_loses_nobody() {
    let mut run = Run::training(vec![]);
    let effects = run.say(1, broken(3, "peer closed"));
    let reason = "worker w1 (rank 0, host h1, pid 1): peer closed";
    assert_eq!(effects, vec![regrouping(1, reason), run.regroup(2, reason)]);
    let effects = run.say(2, broken(2, "aborted"));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, true), (2, Some(0), 3, true)]);
    assert_eq!(run.count("workers_lost"), 0);
}

#[test]
fn a_workers_own_failure_that_would_come_again_ends_the_run() {
    for mut run in [Run::assigned(vec![]), Run::training(vec![])] {
        run.say(1, failed(Kind::Input, "a shard is cut short", true));
        let text = "worker w1 (rank 0, host h1, pid 1) failed (input): a shard is cut short";
        assert_eq!(run.failure().to_string(), text);
        assert_eq!(Outcome::from(run.failure()).exit_code(), 4);
    }
}

#[test]
fn a_workers_own_failure_that_may_pass_loses_it_if_enough_others_remain() {
    let mut run = Run::training(vec![]);
    let effects = run.say(1, failed(Kind::Store, "no answer", false));
    let why = "it failed (store): no answer";
    let reason = format!("worker w1 (rank 0, host h1, pid 1) was lost: {why}");
    assert_eq!(effects, vec![Effect::Close(conn(1)), lost(1, 0, why), regrouping(1, &reason), run.regroup(2, &reason)]);
    run.say(2, idle(Some(0)));
    run.say(2, failed(Kind::Store, "no answer", false));
    assert_eq!(run.failure().to_string(), "worker w2 (rank 0, host h2, pid 2) failed (store): no answer");
    assert_eq!(Outcome::from(run.failure()).exit_code(), 1);

    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in();
    run.say(2, failed(Kind::Store, "no answer", false));
    assert!(!run.failure().permanent(), "fewer than workers.min would remain, and the store is theirs too");
}

/// As one that was killed may: whoever starts it again finds the run waiting.
#[test]
fn a_workers_own_failure_that_may_pass_is_waited_for_if_too_few_remain() {
    for min in [1, 2] {
        let mut run = Run::new(CoreConfig { min, ..config(2) }, vec![]).both_in().both_ready(0);
        run.commit(2);
        run.say(1, failed(Kind::Internal, "it broke", false));
        run.say(2, idle(Some(2)));
        run.say(2, failed(Kind::Internal, "it broke", false));
        assert!(matches!(run.core.phase(), Phase::Waiting { .. }), "{min}: {:?}", run.core.phase());
    }
}

/// Where it has a place already: its memory may be too small for what the others' holds.
#[test]
fn what_one_machine_lacks_ends_no_run_that_others_can_go_on_with() {
    let mut run = Run::training(vec![]);
    let effects = run.say(2, failed(Kind::Machine, "out of memory", true));
    assert!(effects.contains(&lost(2, 1, "it failed (its machine): out of memory")), "{effects:?}");
    assert!(matches!(run.core.phase(), Phase::Regrouping { .. }));
    run.say(1, idle(Some(0)));
    run.say(1, failed(Kind::Machine, "out of memory", true));
    assert_eq!(Outcome::from(run.failure()).exit_code(), 4);
    // Before all have come it is how they were set up.
    let mut run = Run::new(config(3), vec![]);
    run.hello(1);
    run.hello(2);
    run.say(2, failed(Kind::Machine, "no such device", true));
    assert!(run.failure().permanent());
}

#[test]
fn a_worker_that_fails_before_the_others_came_ends_the_run_too() {
    for permanent in [true, false] {
        let mut run = Run::new(config(2), vec![]);
        run.hello(1);
        run.say(1, failed(Kind::Input, "no such model", permanent));
        assert_eq!(run.failure().permanent(), permanent);
    }
}

/// What is wrong on its machine is not wrong on those that train.
#[test]
fn a_joiner_that_fails_for_good_is_only_lost() {
    let mut run = Run::training(vec![]);
    run.hello(3);
    let effects = run.say(3, failed(Kind::Input, "no such model", true));
    let note = Note::Lost { worker: "w3".into(), rank: None, why: "it failed (input): no such model".into() };
    assert_eq!(effects, vec![Effect::Close(conn(3)), Effect::Note(note)]);
    assert_eq!((run.core.phase(), run.count("workers_lost")), (&Phase::Training, 1));
}

#[test]
fn unreadable_messages_are_counted_and_lose_their_sender() {
    for (how, counter, why) in [
        (Closed::Malformed, "refused_unreadable", "it sent what is no message of this protocol"),
        (Closed::Oversized, "refused_oversized", "it sent what is no message of this protocol"),
        (Closed::Stuck, "workers_stuck", "it stopped reading what it was sent"),
    ] {
        let mut run = Run::training(vec![]);
        assert_eq!(run.event(Event::Closed(conn(9), how)), vec![], "a stranger harms nobody");
        assert_eq!(run.event(Event::Closed(conn(1), how))[1], lost(1, 0, why));
        assert_eq!(run.count(counter), 2);
    }
}

#[test]
fn a_run_with_too_few_left_waits_for_others_and_fails_at_its_deadline() {
    let waiting = || {
        let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
        run.close(2);
        run.say(1, idle(Some(3)));
        assert_eq!(run.core.wait(), Some(Wait::Workers { have: 1, need: 2 }));
        run
    };
    let mut run = waiting();
    run.until(10_000, &[1]);
    let last = Some((who(2, Some(1)), Loss::StreamClosed));
    assert_eq!(run.failure(), Failure::TooFewLeft { have: 1, need: 2, waited_ms: 10_000, last });
    let text = "only 1 of the 2 workers that training needs (workers.min) are left, and no others came within 10000 ms \
                (workers.start_timeout); the last to be lost was worker w2 (rank 1, host h2, pid 2): its stream closed; start the run again \
                to resume from its last commit";
    assert_eq!((run.failure().to_string().as_str(), Outcome::from(run.failure()).exit_code()), (text, 1));

    let mut run = waiting();
    run.until(9_000, &[1]);
    let effects = run.come(3);
    assert_eq!(run.places(&effects), [(1, Some(0), 3, true), (3, Some(0), 3, true)]);
}

#[test]
fn a_worker_whose_work_is_done_may_go() {
    let mut run = Run::training(vec![]);
    run.report_commit(10);
    run.say(1, done(10));
    run.say(2, done(10));
    assert_eq!(run.close(1), vec![Effect::Close(conn(1))]);
    assert!(!run.core.phase().is_over());
    run.event(Event::Appended(Body::Commit(commit_at(10, TERM))));
    run.close(2);
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
    assert_eq!(run.close(1), vec![Effect::Close(conn(1))]);
    assert_eq!(run.close(2), vec![Effect::Close(conn(2)), Effect::Append(record())]);
    run.event(Event::Appended(record()));
    assert_eq!((run.core.phase(), run.count("workers_lost")), (&Phase::Over(Outcome::Done), 0));

    let mut run = Run::training(vec![]);
    run.commit(10);
    run.close(2);
    assert_eq!(run.say(1, done(10)), vec![Effect::Append(record())]);
}

/// A drain ends at a step that only the workers know: the last commit is not known to be all of it until they say so.
#[test]
fn a_worker_that_goes_in_a_drain_is_lost_unless_it_said_farewell() {
    let mut run = Run::training(vec![]);
    run.event(Event::Stop("night".into()));
    run.commit(3);
    run.say(1, preempted(3));
    assert_eq!(run.close(1), vec![Effect::Close(conn(1))]);
    let effects = run.close(2);
    assert_eq!(effects[1], lost(2, 1, "its stream closed"));
    // Nobody is left who holds anything.
    let record = Body::End { outcome: ella_store::Outcome::Preempted, step: 3, reason: "night".into() };
    assert_eq!(effects.last(), Some(&Effect::Append(record)));
}

#[test]
fn a_worker_that_goes_before_its_commit_is_complete_is_lost_and_the_others_make_the_commit() {
    let mut run = Run::training(vec![]);
    run.say(1, state(10));
    run.say(1, done(10));
    run.say(2, done(10));
    let effects = run.close(2);
    assert_eq!(effects[1], lost(2, 1, "its stream closed"));
    let effects = run.say(1, idle(Some(10)));
    assert_eq!(run.places(&effects), [(1, Some(0), 10, false)]);
    run.go_on(10, &[1]);
    run.say(1, state(10));
    run.say(1, done(10));
    for index in 0..3 {
        run.say(1, part(10, index));
    }
    let commit = Commit { generation: 2, world: 1, folder: ella_store::commit_folder(10, TERM, 2), ..commit_at(10, TERM) };
    run.event(Event::Appended(Body::Commit(commit)));
    assert_eq!(run.core.wait(), Some(Wait::Record));
}

/// It was told that its generation is over before its last step's commit was known to stand.
#[test]
fn a_run_is_done_when_its_last_commit_stands_whoever_is_left() {
    let record = || Body::End { outcome: ella_store::Outcome::Done, step: 10, reason: String::new() };
    for starting in [false, true] {
        let mut run = Run::training(vec![]);
        run.report_commit(10);
        run.close(2);
        if starting {
            run.say(1, idle(Some(10)));
            assert_eq!(run.core.wait(), Some(Wait::Workers { have: 1, need: 1 }), "the log is awaited");
        }
        let effects = run.event(Event::Appended(Body::Commit(commit_at(10, TERM))));
        assert_eq!(effects.last(), Some(&Effect::Append(record())));
        run.event(Event::Appended(record()));
        assert_eq!(run.core.phase(), &Phase::Over(Outcome::Done));
    }
}

#[test]
fn a_coordinator_that_was_stopped_itself_blames_nobody() {
    let mut run = Run::training(vec![]);
    run.until(500, &[1, 2]);
    // Stopped for a minute; the workers' messages wait in the sockets.
    run.now = Time(60_500);
    assert_eq!(run.event(Event::Tick), vec![]);
    assert_eq!(run.count("coordinator_stopped"), 1);
    assert!(run.core.next_deadline().is_some_and(|at| at <= Time(61_500)));
    run.beat(1);
    run.beat(2);
    run.until(61_000, &[1]);
    assert!(!run.core.phase().is_over());
    run.until(61_500, &[1]);
    assert!(matches!(run.core.phase(), Phase::Regrouping { .. }));
}
