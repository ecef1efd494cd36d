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
    let why = "worker w2 (rank 1, host h2, pid 2) does not reach it at 10.0.0.3:4000; check its --advertise and --listen, and the ports between the \
               two. The caller's words: the ring did not close: the next rank was not reached";
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
    let why = "it does not reach worker w1 (rank 0, host h1, pid 1) at 10.0.0.1:4000; check the ports between the two, and --advertise of both. \
               The caller's words: the ring did not close: the next rank was not reached";
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
    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
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
        next_generation(&mut run, &[1, 2]);
        let reason = run.core.status(run.now).reason;
        let trying = "waiting for ranks to restore and to reach each other: 0, 1 (they did not before: worker w1 (rank 0";
        assert!(reason.starts_with(trying), "{reason}");
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

/// So many that have trained, and are in a ring again after three steps.
fn regrouped(workers: CoreConfig) -> Run {
    let all: Vec<u64> = (1..=workers.workers as u64).collect();
    let mut run = Run::new(workers, vec![]);
    all.iter().for_each(|n| drop(run.come(*n)));
    all.iter().for_each(|n| drop(run.say(*n, from_worker::Body::Ready(ready(0)))));
    assert_eq!(run.core.phase(), &Phase::Training);
    run.say(1, broken(3, "rank 1 is lost"));
    all[1..].iter().for_each(|n| drop(run.say(*n, idle(Some(3)))));
    run
}

fn ranks(run: &Run) -> Vec<u64> {
    run.core.lineup.as_ref().unwrap().ranks.iter().map(|conn| conn.0).collect()
}

/// Whoever calls this one does not reach it. All leave the ring, unless one of them is sent off for that, who is given.
fn in_vain(run: &mut Run, called: u64) -> Option<(u64, String)> {
    let ranks = ranks(run);
    let at = ranks.iter().position(|n| *n == called).unwrap();
    let caller = ranks[(at + ranks.len() - 1) % ranks.len()];
    let gone = refused(&run.say(caller, unreached(Some(3)))).pop();
    let left = gone.as_ref().map_or(0, |(n, _)| *n);
    ranks.iter().filter(|n| ![caller, left].contains(n)).for_each(|n| drop(run.say(*n, idle(Some(3)))));
    gone
}

/// Waits until those that have left a ring are in one again.
fn next_generation(run: &mut Run, beating: &[u64]) {
    while !matches!(run.core.phase(), Phase::Starting { .. }) {
        assert!(!run.core.phase().is_over(), "{:?}", run.core.phase());
        run.until(run.now.0 + LEASE / 4, beating);
    }
}

#[test]
fn of_two_that_trained_one_goes_well_before_the_run_would_fail_if_the_others_are_enough() {
    let mut run = regrouped(config(2));
    let mut gone = None;
    while gone.is_none() {
        assert!(run.now < Time(7_500), "{:?}", run.core.phase());
        next_generation(&mut run, &[1, 2]);
        gone = in_vain(&mut run, 2);
    }
    let why = "worker w1 (rank 0, host h1, pid 1) does not reach it at 10.0.0.2:4000; ";
    assert!(gone.as_ref().is_some_and(|(n, words)| *n == 2 && words.starts_with(why)), "{gone:?}");
    assert_eq!((run.now, ranks(&run)), (Time(5_500), vec![1]), "past half of the timeout");
    run.go_on(3, &[1]);
    assert_eq!((run.core.phase(), run.core.fruitless), (&Phase::Training, 0));
}

/// One is enough to commit what is held, and a drain does not last for long.
#[test]
fn a_run_that_leaves_does_not_wait_for_a_network() {
    let mut run = regrouped(CoreConfig { min: 2, ..config(2) });
    run.event(Event::Stop("night".into()));
    assert_eq!(in_vain(&mut run, 2).map(|(n, _)| n), Some(2));
    run.go_on(3, &[1]);
    assert!(matches!(run.core.phase(), Phase::Draining { .. }), "{:?}", run.core.phase());
}

/// Its port is shut, or it has another address: whoever calls it says so.
#[test]
fn the_one_that_no_other_reaches_goes_and_not_those_that_called_it() {
    let mut run = regrouped(CoreConfig { min: 2, ..config(3) });
    let mut gone = None;
    while gone.is_none() {
        next_generation(&mut run, &[1, 2, 3]);
        gone = in_vain(&mut run, 2);
    }
    assert_eq!(gone.map(|(n, _)| n), Some(2));
    assert_eq!(ranks(&run), [1, 3]);
}

/// Nobody has to go where the ring can be closed in another order: what does not pass one way may pass the other way, and of four none has to call any.
#[test]
fn ranks_are_dealt_so_that_none_calls_one_that_it_did_not_reach() {
    let mut run = regrouped(CoreConfig { min: 3, ..config(3) });
    assert_eq!(in_vain(&mut run, 2), None);
    next_generation(&mut run, &[1, 2, 3]);
    assert_eq!(ranks(&run), [2, 1, 3]);
    run.go_on(3, &[1, 2, 3]);
    assert_eq!((run.core.phase(), run.now), (&Phase::Training, Time(1_000)));

    let mut run = regrouped(config(4));
    assert_eq!(in_vain(&mut run, 2), None);
    next_generation(&mut run, &[1, 2, 3, 4]);
    let dealt = ranks(&run);
    let apart = (0..4).all(|at| ![[1, 2], [2, 1]].contains(&[dealt[at], dealt[(at + 1) % 4]]));
    assert!(apart && dealt.len() == 4, "{dealt:?}");
}

/// What restarts it does not know better, and each try stops those that train.
#[test]
fn who_comes_from_where_others_did_not_reach_anyone_is_a_spare_for_longer_and_longer() {
    let mut run = joined(config(2));
    run.say(2, unreached(Some(3)));
    run.say(1, idle(Some(3)));
    run.go_on(3, &[1, 2]);
    let mut asked = Vec::new();
    for n in [4, 5, 6] {
        run.hello_as(n, Hello { peer_address: format!("10.0.0.3:{n}"), ..hello(n) });
        run.say(n, idle(None));
        while run.core.lineup.as_ref().is_some_and(|lineup| !lineup.boundary) {
            run.until(run.now.0 + LEASE / 4, &[1, 2, n]);
        }
        asked.push(run.now.0);
        run.say(1, idle(Some(3)));
        run.say(2, idle(Some(3)));
        assert_eq!(refused(&run.say(2, unreached(Some(3)))).len(), 1);
        run.say(1, idle(Some(3)));
        run.go_on(3, &[1, 2]);
        run.core.fruitless = 0;
    }
    assert_eq!(asked, [4_500, 7_500, 11_500], "500, 1000 and 2000 ms before the others wait for whoever joins");
    // Whoever is reached there is as good as any.
    run.hello_as(7, Hello { peer_address: "10.0.0.3:7".into(), ..hello(7) });
    run.say(7, idle(None));
    run.until(run.now.0 + 4_000 + 2_000, &[1, 2, 7]);
    run.say(1, idle(Some(3)));
    run.say(2, idle(Some(3)));
    run.go_on(3, &[1, 2, 7]);
    assert_eq!((run.core.phase(), run.core.world(), run.core.bars.len()), (&Phase::Training, 3, 0));
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
