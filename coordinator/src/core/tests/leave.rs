//! Workers that are told to leave, and drains that outlive their generation.

use super::*;

const WHO: &str = "worker w2 (rank 1, host h2, pid 2) was told to leave";
const TOLD: &str = "it was told to leave";

fn leaving() -> from_worker::Body {
    from_worker::Body::Leaving(v1::Leaving {})
}

fn left(n: u64, why: &str) -> Effect {
    Effect::Note(Note::Left { worker: format!("w{n}"), why: why.into() })
}

#[test]
fn a_worker_that_is_told_to_leave_does_at_the_next_boundary_and_the_others_go_on() {
    let mut run = Run::training(vec![]);
    let effects = run.say(2, leaving());
    let note = Note::Regroup { generation: 1, reason: WHO.into(), at_boundary: true };
    assert_eq!(effects, vec![Effect::Note(note), run.boundary(1, WHO), run.boundary(2, WHO)]);
    assert_eq!(run.say(2, leaving()), vec![], "once is enough");
    assert!(run.core.status(run.now).workers[1].leaving);
    assert_eq!(run.say(2, idle(Some(4))), vec![], "the other may need its state");
    let effects = run.say(1, idle(Some(4)));
    let released =
        [Effect::Send(conn(2), ToWorker { generation: 1, ..message(&run.release(2, TOLD)) }), Effect::Close(conn(2)), left(2, TOLD)];
    assert_eq!(effects[..3], released);
    assert_eq!(run.places(&effects), [(1, Some(0), 4, false)]);
    assert_eq!((run.count("workers_released"), run.count("workers_lost")), (1, 0));
}

fn message(effect: &Effect) -> ToWorker {
    let Effect::Send(_, message) = effect else { panic!("{effect:?}") };
    message.clone()
}

#[test]
fn a_client_may_tell_a_worker_to_leave() {
    let mut run = Run::training(vec![]);
    let drain = |worker: &str| Event::Drain { worker: worker.into(), reason: "the node is needed".into() };
    assert_eq!(run.event(drain("w9")), vec![]);
    assert_eq!(run.count("refused_unknown_worker"), 1);
    assert_eq!(run.event(drain("w2")).last(), Some(&run.boundary(2, WHO)));
    run.say(2, idle(Some(4)));
    let effects = run.say(1, idle(Some(4)));
    assert_eq!(effects[2], left(2, "the node is needed"));
}

#[test]
fn who_has_no_place_leaves_at_once() {
    let mut run = Run::training(vec![]);
    run.hello(3);
    assert_eq!(run.say(3, leaving()), vec![run.release(3, TOLD), Effect::Close(conn(3)), left(3, TOLD)]);
    assert_eq!(run.core.phase(), &Phase::Training);
    let mut run = Run::new(config(2), vec![]);
    run.come(1);
    assert_eq!(run.say(1, leaving()), vec![run.release(1, TOLD), Effect::Close(conn(1)), left(1, TOLD)]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 0, need: 2 }));
}

#[test]
fn in_a_start_it_is_asked_when_training_has_begun() {
    let mut run = Run::assigned(vec![]);
    assert_eq!(run.say(2, leaving()), vec![]);
    run.say(1, from_worker::Body::Ready(ready(0)));
    assert_eq!(run.say(2, from_worker::Body::Ready(ready(0))).last(), Some(&run.boundary(2, WHO)));
}

#[test]
fn if_too_few_would_go_on_the_whole_run_leaves() {
    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    let note = Note::Draining { reason: WHO.into() };
    assert_eq!(run.say(2, leaving()), vec![Effect::Note(note), run.drain(1, WHO), run.drain(2, WHO)]);
    assert_eq!(run.core.wait(), Some(Wait::Boundary { reason: WHO.into() }));
    // A spare counts: with it there are enough.
    let mut run = Run::new(CoreConfig { min: 2, max: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.come(3);
    assert_eq!(run.say(2, leaving()).last(), Some(&run.boundary(2, WHO)));
    run.say(1, idle(Some(4)));
    let effects = run.say(2, idle(Some(4)));
    assert_eq!(run.places(&effects), [(1, Some(0), 4, true), (3, Some(0), 4, true)]);
}

/// As when a machine with all workers is told to stop: one after the other hears of it.
#[test]
fn if_all_are_told_to_leave_the_whole_run_does() {
    let mut run = Run::training(vec![]);
    run.say(2, leaving());
    let reason = "worker w1 (rank 0, host h1, pid 1) was told to leave";
    let note = Note::Draining { reason: reason.into() };
    assert_eq!(run.say(1, leaving()), vec![Effect::Note(note), run.drain(1, reason), run.drain(2, reason)]);
    // The boundary was reached first.
    run.say(1, idle(Some(4)));
    let effects = run.say(2, idle(Some(4)));
    assert_eq!(run.places(&effects).len(), 2, "both take part in the commit");
    let effects = run.go_on(4, &[1, 2]);
    assert_eq!(effects[3..], [run.drain(1, reason), run.drain(2, reason)]);
    assert!(matches!(run.core.phase(), Phase::Draining { until: Time(5_000), .. }));
}

/// What it holds is nowhere else.
#[test]
fn the_last_that_holds_the_state_commits_before_it_leaves() {
    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.close(2);
    run.say(1, idle(Some(3)));
    let effects = run.say(1, leaving());
    let reason = "worker w1 (host h1, pid 1) was told to leave";
    assert_eq!(effects[0], Effect::Note(Note::Draining { reason: reason.into() }));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false)]);
    assert_eq!(run.go_on(3, &[1]).last(), Some(&run.drain(1, reason)));

    // A commit has it already.
    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.commit(3);
    run.close(2);
    run.say(1, idle(Some(3)));
    assert_eq!(run.say(1, leaving())[1..], [Effect::Close(conn(1)), left(1, TOLD)]);
}

/// Others wait for a place, and have no state: it leaves them its own in a generation of its own, and goes with its first step.
#[test]
fn the_last_that_holds_the_state_leaves_it_to_those_that_wait() {
    let alone = |max: usize| {
        let mut run = Run::new(CoreConfig { max, ..config(1) }, vec![]);
        run.come(1);
        run.say(1, from_worker::Body::Ready(ready(0)));
        run.come(2);
        run
    };
    let mut run = alone(2);
    let reason = "worker w1 (rank 0, host h1, pid 1) was told to leave";
    assert_eq!(run.say(1, leaving()).last(), Some(&run.boundary(1, reason)));
    let effects = run.say(1, idle(Some(4)));
    assert_eq!(run.places(&effects), [(1, Some(0), 4, true), (2, Some(0), 4, true)]);
    run.say(2, from_worker::Body::Ready(ready(4)));
    let effects = run.say(1, from_worker::Body::Ready(ready(4)));
    assert_eq!(effects[effects.len() - 2..], [run.boundary(1, reason), run.boundary(2, reason)]);
    run.say(1, idle(Some(5)));
    let effects = run.say(2, idle(Some(5)));
    assert_eq!(effects[1..3], [Effect::Close(conn(1)), left(1, TOLD)]);
    assert_eq!(run.places(&effects), [(2, Some(0), 5, false)]);

    // There is no room for two.
    let mut run = alone(1);
    assert_eq!(run.say(1, leaving()), vec![Effect::Note(Note::Draining { reason: reason.into() }), run.drain(1, reason)]);

    // The heir is gone before it has the state.
    let mut run = alone(2);
    run.say(1, leaving());
    assert!(run.close(2).contains(&Effect::Note(Note::Draining { reason: reason.into() })));
    let effects = run.say(1, idle(Some(4)));
    assert_eq!(run.places(&effects), [(1, Some(0), 4, false)]);
}

#[test]
fn a_drain_survives_its_generation_and_takes_whoever_is_left() {
    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.event(Event::Stop("night".into()));
    run.close(2);
    assert_eq!(run.core.phase().name(), "regrouping");
    let effects = run.say(1, idle(Some(3)));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false)]);
    let effects = run.go_on(3, &[1]);
    let note = Note::Started { generation: 2, step: 3 };
    assert_eq!(effects, vec![run.to(1, to_worker::Body::Start(v1::Start {})), Effect::Note(note), run.drain(1, "night")]);
    assert_eq!(run.core.phase(), &Phase::Draining { reason: "night".into(), until: Time(5_000) });
    run.until(5_000, &[1]);
    assert_eq!(run.failure(), Failure::DrainOverdue { reason: "night".into(), waited_ms: 5_000 });
}

#[test]
fn a_stop_in_a_regroup_commits_what_no_commit_has() {
    let stopped = |step: u64| {
        let mut run = Run::training(vec![commit_at(4, 2)]);
        run.close(2);
        assert_eq!(run.event(Event::Stop("night".into())), vec![Effect::Note(Note::Draining { reason: "night".into() })]);
        let effects = run.say(1, idle(Some(step)));
        (run, effects)
    };
    let (run, effects) = stopped(7);
    assert_eq!(run.places(&effects), [(1, Some(0), 7, false)]);
    let (run, effects) = stopped(4);
    let record = Body::End { outcome: ella_store::Outcome::Preempted, step: 4, reason: "night".into() };
    assert_eq!(effects, vec![run.release(1, "night"), Effect::Close(conn(1)), Effect::Append(record)]);
}

#[test]
fn a_stop_in_a_wait_commits_what_no_commit_has() {
    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.close(2);
    run.say(1, idle(Some(3)));
    let effects = run.event(Event::Stop("night".into()));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false)]);
    assert_eq!(effects.last(), Some(&Effect::Note(Note::Draining { reason: "night".into() })));
}

#[test]
fn a_stop_in_a_start_commits_if_there_is_anything() {
    let starting = |commits: Vec<Commit>| {
        let mut run = Run::training(commits);
        run.close(2);
        run.say(1, idle(Some(4)));
        run
    };
    let mut run = starting(vec![]);
    assert_eq!(run.event(Event::Stop("night".into())), vec![Effect::Note(Note::Draining { reason: "night".into() })]);
    assert_eq!(run.go_on(4, &[1]).last(), Some(&run.drain(1, "night")));
    let mut run = starting(vec![commit_at(4, 2)]);
    assert_eq!(run.event(Event::Stop("night".into()))[0], run.release(1, "night"));
    assert_eq!(run.core.wait(), Some(Wait::Record));
}

/// That is no good order, and nobody may take it for one.
#[test]
fn a_stop_when_all_workers_are_gone_says_how_many_steps_are_lost() {
    let mut run = Run::training(vec![]);
    run.commit(2);
    for step in 1..=5 {
        run.say(1, from_worker::Body::Progress(progress(step, 4)));
    }
    run.close(1);
    run.close(2);
    run.event(Event::Stop("night".into()));
    let text = "told to leave (night) when all workers were gone: what was applied since the last commit (of step 2) is lost, 3 steps; start the run \
                again to go on from that commit";
    assert_eq!((run.failure().to_string().as_str(), Outcome::from(run.failure()).exit_code()), (text, 1));

    // Nothing is lost if the commit of the last step stands, or its record is on its way.
    for recorded in [true, false] {
        let mut run = Run::training(vec![]);
        run.say(1, from_worker::Body::Progress(progress(2, 4)));
        run.report_commit(2);
        if recorded {
            run.event(Event::Appended(Body::Commit(commit_at(2, TERM))));
        }
        run.close(1);
        run.close(2);
        let record = Body::End { outcome: ella_store::Outcome::Preempted, step: 2, reason: "night".into() };
        assert_eq!(run.event(Event::Stop("night".into())), vec![Effect::Append(record)]);
    }
}
