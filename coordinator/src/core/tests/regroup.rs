//! Idle, and what generations are formed of: who gets a place, whose state is taken, and when it is given up.

use super::*;
use ella_proto::ids::{Rank, Step};

/// Three that train from step 0.
fn three() -> Run {
    let mut run = Run::new(config(3), vec![]);
    (1..=3).for_each(|n| drop(run.come(n)));
    (1..=3).for_each(|n| drop(run.say(n, from_worker::Body::Ready(ready(0)))));
    assert_eq!(run.core.phase(), &Phase::Training);
    run
}

#[test]
fn the_newest_state_is_the_source_and_those_behind_get_a_copy() {
    let mut run = three();
    run.close(1);
    assert_eq!(run.say(2, idle(Some(6))), vec![], "rank 2 has not stopped");
    let effects = run.say(3, idle(Some(7)));
    assert_eq!(run.places(&effects), [(2, Some(1), 7, true), (3, Some(1), 7, true)]);

    let mut run = three();
    run.close(1);
    run.say(2, idle(Some(7)));
    let effects = run.say(3, idle(Some(7)));
    assert_eq!(run.places(&effects), [(2, Some(0), 7, false), (3, Some(0), 7, false)], "they keep what they have");
}

#[test]
fn while_one_lives_no_commit_is_read_and_after_that_the_newest_is() {
    let mut run = three();
    run.say(1, state(4));
    run.say(2, state(4));
    run.say(3, state(4));
    (0..3).for_each(|index| drop(run.say(1, part(4, index))));
    let commit = Commit { world: 3, ..commit_at(4, TERM) };
    run.event(Event::Appended(Body::Commit(commit)));
    run.close(1);
    run.close(2);
    run.come(4);
    let effects = run.say(3, idle(Some(5)));
    assert_eq!(run.places(&effects), [(3, Some(0), 5, true), (4, Some(0), 5, true)]);
    run.close(3);
    // It was about to be given a copy, and has none.
    let effects = run.say(4, idle(None));
    assert_eq!(run.places(&effects), [(4, None, 4, false)]);
}

#[test]
fn a_state_older_than_the_last_commit_is_worth_nothing() {
    let mut run = Run::training(vec![commit_at(4, 2)]);
    run.close(1);
    run.close(2);
    let effects = run.come_with(3, 3);
    assert_eq!(run.places(&effects), [(3, None, 4, false)]);
    // One beyond the last step is of another run.
    run.close(3);
    let effects = run.come_with(4, 11);
    assert_eq!(run.places(&effects), [(4, None, 4, false)]);
}

/// Nobody who has a place keeps it by right: what counts is what is in memory.
#[test]
fn those_that_hold_the_newest_state_are_chosen_first() {
    let mut run = Run::new(CoreConfig { max: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.come(3);
    run.come_with(4, 3);
    run.say(1, broken(3, "no answer"));
    let effects = run.say(2, idle(Some(2)));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false), (4, Some(0), 3, false)]);
}

#[test]
fn each_generation_has_a_number_and_a_session_of_its_own() {
    let mut run = three();
    let mut sessions = BTreeSet::new();
    for generation in 2..=4 {
        run.say(1, broken(generation, "no answer"));
        run.say(2, idle(Some(generation)));
        let effects = run.say(3, idle(Some(generation)));
        let session = |effect: &Effect| match effect {
            Effect::Send(_, ToWorker { body: Some(to_worker::Body::Assign(assign)), .. }) => Some(assign.session.clone()),
            _ => None,
        };
        sessions.extend(effects.iter().filter_map(session));
        assert_eq!((run.core.generation.0, sessions.len() as u64), (generation, generation - 1));
        run.go_on(generation, &[1, 2, 3]);
    }
}

#[test]
fn those_that_do_not_stop_in_time_are_let_go() {
    let mut run = three();
    run.close(1);
    run.say(2, idle(Some(6)));
    run.until(4_999, &[2, 3]);
    assert!(matches!(run.core.phase(), Phase::Regrouping { .. }));
    let effects = run.until(5_000, &[2, 3]);
    let why = "it did not stop within 5000 ms of being told to (workers.step_timeout)";
    let release = Effect::Send(
        conn(3),
        ToWorker { term: TERM, generation: 1, body: Some(to_worker::Body::Release(v1::Release { reason: why.into() })) },
    );
    let note = Note::Lost { worker: "w3".into(), rank: Some(2), why: why.into() };
    assert_eq!(effects[..3], [release, Effect::Close(conn(3)), Effect::Note(note)]);
    assert_eq!(run.places(&effects), [(2, Some(0), 6, false)]);
}

#[test]
fn another_loss_while_they_regroup_is_told_to_nobody() {
    let mut run = three();
    run.close(1);
    let note = Note::Lost { worker: "w2".into(), rank: Some(1), why: "its stream closed".into() };
    assert_eq!(run.close(2), vec![Effect::Close(conn(2)), Effect::Note(note)]);
    let effects = run.say(3, idle(Some(6)));
    assert_eq!(run.places(&effects), [(3, Some(0), 6, false)]);
}

#[test]
fn a_ring_that_does_not_close_is_formed_again() {
    let mut run = Run::assigned(vec![]);
    let reason = "worker w2 (rank 1, host h2, pid 2): no ring";
    let body = from_worker::Body::Idle(v1::Idle { step: None, broken: "no ring".into(), ..v1::Idle::default() });
    assert_eq!(run.say(2, body).last(), Some(&run.regroup(1, reason)));
    let effects = run.say(1, idle(None));
    assert_eq!(run.places(&effects), [(1, None, 0, false), (2, None, 0, false)]);
}

#[test]
fn a_worker_that_stops_unasked_ends_its_generation_and_is_said_to() {
    let mut run = Run::training(vec![]);
    let reason = "worker w1 (rank 0, host h1, pid 1) stopped unasked";
    assert_eq!(run.say(1, idle(Some(2))).last(), Some(&run.regroup(2, reason)));
}

/// It goes to every rank, and into the run's events.
#[test]
fn of_what_a_worker_says_of_its_end_no_more_is_told_than_can_be_read() {
    let words = "é".repeat(1 << 19);
    for asked in [false, true] {
        let mut run = three();
        if asked {
            run.come(4);
            run.until(2_000, &[1, 2, 3, 4]);
            run.say(1, idle(Some(5)));
        }
        let effects = run.say(2, broken(4, &words));
        let told: Vec<&str> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send(_, ToWorker { body: Some(to_worker::Body::Regroup(regroup)), .. }) => Some(regroup.reason.as_str()),
                Effect::Note(Note::Regroup { reason, .. }) => Some(reason.as_str()),
                _ => None,
            })
            .collect();
        assert!(told.len() > 1 && told.iter().all(|reason| reason.chars().count() == 2_000), "{}", told.len());
        assert!(told[0].starts_with("worker w2 (rank 1, host h2, pid 2): éé"));
    }
}

/// Three generations that end where they began are no accident.
#[test]
fn a_run_that_makes_no_progress_fails_for_good() {
    let again = |run: &mut Run, step| {
        run.say(1, broken(step, "illegal memory access"));
        run.say(2, idle(Some(step)));
    };
    let mut run = Run::training(vec![]);
    again(&mut run, 3);
    for _ in 0..2 {
        run.go_on(3, &[1, 2]);
        again(&mut run, 3);
    }
    again(&mut run, 4);
    for _ in 0..2 {
        run.go_on(4, &[1, 2]);
        again(&mut run, 4);
        assert!(!run.core.phase().is_over(), "a step was made in between");
    }
    // Also if it breaks before it begins.
    again(&mut run, 4);
    let why = "worker w1 (rank 0, host h1, pid 1): illegal memory access".to_owned();
    assert_eq!(run.failure(), Failure::NoProgress { generations: 3, step: Step(4), why });
    assert_eq!(Outcome::from(run.failure()).exit_code(), 4);
}

#[test]
fn a_generation_that_lost_a_worker_before_it_began_counts_nothing() {
    let mut run = Run::training(vec![]);
    run.say(1, broken(3, "x"));
    run.say(2, idle(Some(3)));
    for n in 3..9 {
        run.come(n);
        run.say(1, broken(3, "x"));
        run.say(2, idle(Some(3)));
        if run.core.phase().is_over() {
            break;
        }
        run.close(n);
        run.say(1, broken(3, "x"));
        run.say(2, idle(Some(3)));
    }
    assert_eq!(run.failure(), Failure::NoProgress { generations: 3, step: Step(3), why: "worker w1 (rank 0, host h1, pid 1): x".into() });
    assert_eq!(run.core.generation.0, 6, "two of five lost one first");
}

#[test]
fn the_status_names_who_has_no_place() {
    let mut run = Run::new(CoreConfig { max: 2, ..config(2) }, vec![]).both_in();
    run.hello(3);
    run.come(4);
    let status = run.core.status(run.now);
    let workers: Vec<_> = status.workers.iter().map(|w| (w.rank, w.state.as_str())).collect();
    assert_eq!(workers, [(0, "rank"), (1, "rank"), (0, "loading"), (0, "spare")]);
    assert_eq!(run.core.wait(), Some(Wait::Loading { ranks: vec![Rank(0), Rank(1)], reason: String::new() }));
}
