//! Ranks that do not reach each other: who of the two goes, and when the next generation is tried.

use super::*;

/// The ring did not close, because of the next rank.
fn unreached(step: Option<u64>) -> from_worker::Body {
    let broken = "the ring did not close: the next rank was not reached".to_owned();
    from_worker::Body::Idle(v1::Idle { step, broken, next_unreached: true, ..v1::Idle::default() })
}

/// Who was refused in this, and in which words.
fn refused(effects: &[Effect]) -> Vec<(u64, String)> {
    let refused = |effect: &Effect| match effect {
        Effect::Send(ConnId(n), ToWorker { body: Some(to_worker::Body::Refused(refused)), .. }) => {
            assert_eq!(refused.reason(), v1::RefusedReason::Unreached);
            Some((*n, refused.detail.clone()))
        }
        _ => None,
    };
    effects.iter().filter_map(refused).collect()
}

/// Two that have trained for three steps, and one that has joined them as rank 2.
fn joined(workers: CoreConfig) -> Run {
    let mut run = Run::new(workers, vec![]).both_in().both_ready(0);
    run.come(3);
    run.until(2_000, &[1, 2, 3]);
    run.say(1, idle(Some(3)));
    let effects = run.say(2, idle(Some(3)));
    assert_eq!(run.places(&effects).len(), 3, "{effects:?}");
    run
}

#[test]
fn a_joiner_that_is_not_reached_is_let_go_at_once_and_the_others_go_on() {
    let mut run = joined(config(2));
    let effects = run.say(2, unreached(Some(3)));
    let why = "worker w2 (rank 1, host h2, pid 2) does not reach it at 10.0.0.3:4000; check its --advertise and --listen, and the ports between the two";
    assert_eq!(refused(&effects), [(3, why.to_owned())]);
    assert!(effects.contains(&Effect::Note(Note::Lost { worker: "w3".into(), rank: Some(2), why: why.into() })), "{effects:?}");
    // Its other neighbour waits for it in the ring.
    let effects = run.say(1, idle(Some(3)));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false), (2, Some(0), 3, false)]);
    run.go_on(3, &[1, 2]);
    assert_eq!((run.core.phase(), run.core.fruitless, run.now), (&Phase::Training, 0, Time(2_000)));
}

/// Whichever word comes first: the neighbours' connections end with the ring.
#[test]
fn what_is_said_of_the_next_rank_counts_when_others_have_said_that_the_ring_broke() {
    let mut run = joined(config(2));
    run.say(3, broken(0, "rank 1 did not come"));
    run.say(1, broken(3, "rank 1 is lost"));
    let effects = run.say(2, unreached(Some(3)));
    assert_eq!(refused(&effects).len(), 1, "{effects:?}");
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false), (2, Some(0), 3, false)]);
    assert_eq!(run.count("workers_lost"), 1);
}

#[test]
fn of_a_joiner_that_does_not_reach_one_that_trained_the_joiner_is_at_fault() {
    let mut run = joined(config(2));
    let effects = run.say(3, unreached(None));
    let why =
        "it does not reach worker w1 (rank 0, host h1, pid 1) at 10.0.0.1:4000; check the ports between the two, and --advertise of both";
    assert_eq!(refused(&effects), [(3, why.to_owned())]);
    run.say(1, idle(Some(3)));
    let effects = run.say(2, idle(Some(3)));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false), (2, Some(0), 3, false)]);
}

#[test]
fn of_two_that_are_new_the_one_that_is_not_reached_goes_if_enough_remain() {
    let mut run = Run::assigned(vec![]);
    assert_eq!(refused(&run.say(1, unreached(Some(0)))).len(), 1);
    assert_eq!(run.core.world(), 1);
    run.say(1, from_worker::Body::Ready(ready_to_go_on(0)));
    assert_eq!(run.core.phase(), &Phase::Training);

    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in();
    run.say(1, unreached(Some(0)));
    let Failure::Unreached { who: named, by, .. } = run.failure() else { panic!("{:?}", run.failure()) };
    assert_eq!((named, by), (who(2, Some(1)), who(1, Some(0))));
    let text = run.failure().to_string();
    assert!(text.contains("at 10.0.0.2:4000") && text.contains("--advertise") && text.contains("the ring did not close"), "{text}");
    assert_eq!(Outcome::from(run.failure()).exit_code(), 1, "a network may come back");
}

/// A network that is away for a while ends no run for good, and is not tried a hundred times a second.
#[test]
fn two_that_trained_and_do_not_reach_each_other_try_again_after_a_pause_and_not_for_ever() {
    let mut run = Run::training(vec![]);
    run.say(1, broken(3, "rank 1 is lost"));
    run.say(2, idle(Some(3)));
    let mut formed = Vec::new();
    while !run.core.phase().is_over() {
        run.say(1, unreached(Some(3)));
        run.say(2, idle(Some(3)));
        if run.core.phase().is_over() {
            break;
        }
        let reason = run.core.status(run.now).reason;
        assert!(reason.starts_with("workers that do not reach each other try again shortly (worker w1 (rank 0"), "{reason}");
        let generation = run.core.generation;
        while run.core.generation == generation {
            run.until(run.now.0 + LEASE / 4, &[1, 2]);
        }
        formed.push(run.now.0);
    }
    assert_eq!(formed, [1_000, 3_000, 5_500, 8_000, 10_500], "pauses grow, to a quarter of the timeout");
    assert!(matches!(run.failure(), Failure::Unreached { .. }), "{:?}", run.failure());
    assert_eq!(Outcome::from(run.failure()).exit_code(), 1);

    let mut run = Run::training(vec![]);
    for _ in 0..9 {
        run.say(1, broken(3, "rank 1 is lost"));
        run.say(2, idle(Some(3)));
        run.say(1, unreached(Some(3)));
        run.say(2, idle(Some(3)));
        run.until(run.now.0 + 1_000, &[1, 2]);
        run.go_on(3, &[1, 2]);
        assert_eq!(run.core.phase(), &Phase::Training, "it closed again: the pause is the first one");
        run.core.fruitless = 0;
    }
}

/// A worker is alone in its ring, or its neighbour is gone already.
#[test]
fn a_word_about_nobody_ends_the_generation_and_no_more() {
    let mut run = Run::training(vec![]);
    run.close(2);
    run.say(1, idle(Some(3)));
    assert!(refused(&run.say(1, unreached(Some(3)))).is_empty());
    assert!(!run.core.phase().is_over());

    let mut run = joined(config(2));
    run.close(3);
    assert!(refused(&run.say(2, unreached(Some(3)))).is_empty());
    let effects = run.say(1, idle(Some(3)));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false), (2, Some(0), 3, false)]);
}
