//! Finished, Stop, Leave: how a run ends in good order.

use super::*;
use ella_proto::ids::Step;

fn end(outcome: ella_store::Outcome, step: u64, reason: &str) -> Body {
    Body::End { outcome, step, reason: reason.into() }
}

fn over(outcome: Outcome, step: u64) -> Vec<Effect> {
    let note = Note::Ended { outcome: outcome.name(), step, reason: outcome.reason(), permanent: false };
    vec![Effect::Close(conn(1)), Effect::Close(conn(2)), Effect::Note(note), Effect::Finish(outcome)]
}

#[test]
fn a_run_is_done_when_all_have_finished_the_last_commit_stands_and_the_end_is_recorded() {
    let mut run = Run::training(vec![]);
    run.report_commit(10);
    run.say(1, done(10));
    assert_eq!(run.say(2, done(10)), vec![]);
    assert_eq!(run.core.wait(), Some(Wait::LastCommit { step: Step(10) }));
    let effects = run.event(Event::Appended(Body::Commit(commit_at(10, TERM))));
    let record = end(ella_store::Outcome::Done, 10, "");
    assert_eq!(effects.last(), Some(&Effect::Append(record.clone())));
    assert_eq!((run.core.wait(), run.core.phase().name()), (Some(Wait::Record), "training"));
    assert_eq!(run.event(Event::Appended(record)), over(Outcome::Done, 10));
    assert_eq!(Outcome::Done.exit_code(), 0);
}

#[test]
fn ranks_may_finish_after_their_commit_is_recorded() {
    let mut run = Run::training(vec![]);
    run.commit(10);
    run.say(1, done(10));
    assert_eq!(run.say(2, done(10)), vec![Effect::Append(end(ella_store::Outcome::Done, 10, ""))]);
}

#[test]
fn a_stop_drains_and_the_run_ends_preempted_after_its_commit() {
    let mut run = Run::training(vec![]);
    let effects = run.event(Event::Stop("night".into()));
    let drain = || to_worker::Body::Drain(v1::Drain { reason: "night".into() });
    let note = Note::Draining { reason: "night".into() };
    assert_eq!(effects, vec![Effect::Note(note), run.to(1, drain()), run.to(2, drain())]);
    assert_eq!(run.core.wait(), Some(Wait::Boundary { reason: "night".into() }));
    assert_eq!(run.event(Event::Stop("again".into())), vec![]);
    run.commit(3);
    run.say(1, preempted(3));
    let record = end(ella_store::Outcome::Preempted, 3, "night");
    assert_eq!(run.say(2, preempted(3)), vec![Effect::Append(record.clone())]);
    let outcome = Outcome::Preempted { reason: "night".into() };
    assert_eq!(outcome.exit_code(), 3);
    assert_eq!(run.event(Event::Appended(record)), over(outcome, 3));
}

/// Workers that waited for captions to be encoded have nothing new to commit.
#[test]
fn a_stop_before_the_first_step_of_a_resume_ends_preempted_at_the_old_commit() {
    for from in [0, 4] {
        let mut run = Run::training(if from == 0 { vec![] } else { vec![commit_at(from, 2)] });
        run.event(Event::Stop("night".into()));
        run.say(1, preempted(from));
        let record = end(ella_store::Outcome::Preempted, from, "night");
        assert_eq!(run.say(2, preempted(from)), vec![Effect::Append(record)]);
    }
}

#[test]
fn a_drain_that_meets_the_last_step_is_done() {
    let mut run = Run::training(vec![]);
    run.event(Event::Stop("night".into()));
    run.commit(10);
    run.say(1, done(10));
    assert_eq!(run.say(2, done(10)), vec![Effect::Append(end(ella_store::Outcome::Done, 10, ""))]);
}

#[test]
fn workers_may_be_told_to_leave_by_others() {
    let mut run = Run::training(vec![]);
    run.commit(3);
    run.say(2, preempted(3));
    let reason = "worker w2 (rank 1, host h2, pid 2) was told to leave";
    assert_eq!(run.core.wait(), Some(Wait::Boundary { reason: reason.into() }));
    assert_eq!(run.say(1, preempted(3)), vec![Effect::Append(end(ella_store::Outcome::Preempted, 3, reason))]);
}

#[test]
fn what_has_not_begun_training_is_stopped_at_once() {
    for (mut run, here) in [(Run::new(config(2), vec![]), vec![]), (Run::assigned(vec![]), vec![1, 2])] {
        let told = here.into_iter().flat_map(|n| [run.release(n, "night"), Effect::Close(conn(n))]);
        let record = end(ella_store::Outcome::Preempted, 0, "night");
        let expected: Vec<Effect> = told.chain([Effect::Append(record.clone())]).collect();
        assert_eq!(run.event(Event::Stop("night".into())), expected);
        run.event(Event::Appended(record));
        assert_eq!(run.core.phase(), &Phase::Over(Outcome::Preempted { reason: "night".into() }));
    }
}

/// A spare has not finished anything, so it must be told how it ends.
#[test]
fn spares_leave_with_a_run_that_was_stopped() {
    let mut run = Run::new(CoreConfig { max: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.come(3);
    run.event(Event::Stop("night".into()));
    run.commit(3);
    run.say(1, preempted(3));
    run.say(2, preempted(3));
    let effects = run.event(Event::Appended(end(ella_store::Outcome::Preempted, 3, "night")));
    assert_eq!(effects[..2], [run.release(3, "night"), Effect::Close(conn(1))]);
}

#[test]
fn leaving_at_once_commits_nothing_and_keeps_the_last_commit() {
    let mut run = Run::training(vec![commit_at(4, 2)]);
    run.event(Event::Stop("night".into()));
    let effects = run.event(Event::Leave("now".into()));
    let outcome = Outcome::Preempted { reason: "now".into() };
    let mut expected = vec![run.abort(1, "now"), run.abort(2, "now")];
    expected.extend(over(outcome, 4));
    expected.insert(4, Effect::Append(end(ella_store::Outcome::Preempted, 4, "now")));
    assert_eq!(effects, expected);
}

#[test]
fn ranks_must_finish_at_one_step_and_in_one_way() {
    let mut run = Run::training(vec![]);
    run.say(1, done(10));
    run.say(2, done(9));
    let Failure::Differs { who: named, field, .. } = run.failure() else { panic!("{:?}", run.failure()) };
    assert_eq!((named, field), (who(2, Some(1)), Field::Step));

    let mut run = Run::training(vec![]);
    run.say(1, preempted(9));
    run.say(2, done(9));
    let Failure::Differs { field, .. } = run.failure() else { panic!("{:?}", run.failure()) };
    assert_eq!(field, Field::Outcome);
}

#[test]
fn a_drain_and_a_last_commit_have_deadlines() {
    let mut run = Run::training(vec![]);
    run.event(Event::Stop("night".into()));
    run.until(5_000, &[1, 2]);
    assert_eq!(run.failure(), Failure::DrainOverdue { reason: "night".into(), waited_ms: 5_000 });

    let mut run = Run::training(vec![]);
    run.say(1, done(10));
    run.say(2, done(10));
    run.until(20_000, &[1, 2]);
    assert_eq!(run.failure(), Failure::NoLastCommit { step: Step(10), last: Step(0), waited_ms: 20_000 });
}

#[test]
fn a_log_that_takes_no_end_fails_the_run() {
    let mut run = Run::training(vec![]);
    run.commit(10);
    run.say(1, done(10));
    run.say(2, done(10));
    run.until(20_000, &[1, 2]);
    assert_eq!(run.failure(), Failure::Append { error: "no answer within 20000 ms".into() });
}

#[test]
fn finishing_twice_or_before_training_is_refused() {
    let mut run = Run::assigned(vec![]);
    assert_eq!(run.say(1, done(10)), vec![]);
    let mut run = Run::training(vec![]);
    run.say(1, done(10));
    assert_eq!(run.say(1, done(10)), vec![]);
    assert_eq!(run.count("refused_out_of_turn"), 1);
}

/// A worker that lives and says no farewell must not keep the run from its end (LIVE).
#[test]
fn a_run_whose_last_commit_stands_does_not_wait_for_farewells_for_ever() {
    let mut run = Run::training(vec![]);
    run.commit(10);
    run.say(1, done(10));
    run.until(19_999, &[1, 2]);
    assert_eq!(run.core.phase(), &Phase::Training);
    let record = Body::End { outcome: ella_store::Outcome::Done, step: 10, reason: String::new() };
    assert_eq!(run.until(20_000, &[1, 2]), vec![Effect::Append(record)]);
}
