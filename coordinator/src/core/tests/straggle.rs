//! Ranks that others wait for.

use super::*;
use v1::Activity as A;

/// Steps of 500 ms, up to step 3 at 2,000 ms: from 3,500 ms on a rank is a straggler.
fn at_pace(config: CoreConfig) -> Run {
    let mut run = Run::new(config, vec![]).both_in().both_ready(0);
    for step in 1..=3 {
        run.until(500 + 500 * step, &[1, 2]);
        for n in [1, 2] {
            run.say(n, from_worker::Body::Progress(progress(step, 4)));
        }
    }
    run
}

fn at(activity: A) -> from_worker::Body {
    from_worker::Body::Heartbeat(v1::Heartbeat { step: 3, encoding: None, activity: activity.into(), ..v1::Heartbeat::default() })
}

/// Until then, while each says what it is at.
fn beat_until(run: &mut Run, until: u64, activities: &[(u64, A)]) -> Vec<Effect> {
    let mut effects = Vec::new();
    while run.now < Time(until) {
        run.now = Time(until.min(run.now.0 + LEASE / 4));
        for (n, activity) in activities {
            effects.extend(run.say(*n, at(*activity)));
        }
        effects.extend(run.event(Event::Tick));
    }
    effects
}

#[test]
fn a_rank_that_others_wait_for_far_longer_than_usual_is_named_once() {
    let mut run = at_pace(config(2));
    assert_eq!(beat_until(&mut run, 3_250, &[(1, A::Reduce), (2, A::Compute)]), vec![]);
    let effects = beat_until(&mut run, 4_500, &[(1, A::Reduce), (2, A::Compute)]);
    let note = Note::Straggler { worker: "w2".into(), rank: 1, activity: "computes", waited_ms: 1_500 };
    assert_eq!(effects, vec![Effect::Note(note)]);
    assert_eq!(run.core.wait(), Some(Wait::Straggler { ranks: vec![(who(2, Some(1)), A::Compute)] }));
    let reason = "the other ranks wait for worker w2 (rank 1, host h2, pid 2), which computes";
    assert_eq!((run.core.status(run.now).reason.as_str(), run.count("stragglers")), (reason, 1));
    run.say(2, from_worker::Body::Progress(progress(4, 4)));
    assert_eq!(run.core.wait(), None);
}

#[test]
fn nobody_straggles_if_nobody_waits_or_all_do() {
    for activity in [A::Reduce, A::Compute, A::Data, A::Unspecified] {
        let mut run = at_pace(config(2));
        assert_eq!(beat_until(&mut run, 9_000, &[(1, activity), (2, activity)]), vec![]);
    }
}

#[test]
fn one_that_waits_for_captions_to_be_encoded_is_none() {
    let mut run = at_pace(config(2));
    let encodes = v1::Heartbeat { step: 3, encoding: Some(7), activity: A::Data.into(), ..v1::Heartbeat::default() };
    while run.now < Time(9_000) {
        run.now = Time(run.now.0 + LEASE / 4);
        run.say(1, at(A::Reduce));
        assert_eq!(run.say(2, from_worker::Body::Heartbeat(encodes.clone())), vec![]);
    }
    // One that waits for samples, and does not say that they are made, is.
    assert_eq!(beat_until(&mut run, 9_250, &[(1, A::Reduce), (2, A::Data)]).len(), 1 + 5, "named, and past its time let go");
}

#[test]
fn the_first_step_of_a_generation_is_slow_and_teaches_nothing() {
    let mut run = Run::training(vec![]);
    assert_eq!(beat_until(&mut run, 4_000, &[(1, A::Reduce), (2, A::Compute)]), vec![]);
    run.say(1, from_worker::Body::Progress(progress(1, 4)));
    assert_eq!(beat_until(&mut run, 8_000, &[(1, A::Reduce), (2, A::Compute)]), vec![]);
}

#[test]
fn past_the_step_timeout_a_straggler_is_let_go() {
    let mut run = at_pace(config(2));
    beat_until(&mut run, 6_999, &[(1, A::Reduce), (2, A::Compute)]);
    let effects = beat_until(&mut run, 7_000, &[(1, A::Reduce), (2, A::Compute)]);
    let why = "the others waited for it for 5000 ms, and it computes";
    let lost = Note::Lost { worker: "w2".into(), rank: Some(1), why: why.into() };
    assert_eq!(effects[..3], [run.release(2, why), Effect::Close(conn(2)), Effect::Note(lost)]);
    let effects = run.say(1, idle(Some(3)));
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false)]);
}

#[test]
fn it_is_let_go_at_once_if_that_is_asked_for_and_enough_remain() {
    let mut run = at_pace(CoreConfig { straggler_evict: true, ..config(2) });
    let effects = beat_until(&mut run, 3_500, &[(1, A::Reduce), (2, A::Compute)]);
    let why = "the others waited for it for 1500 ms, and it computes";
    assert_eq!(effects[1], run.release(2, why));
    assert!(matches!(run.core.phase(), Phase::Regrouping { .. }));

    let mut run = at_pace(CoreConfig { straggler_evict: true, min: 2, ..config(2) });
    assert_eq!(beat_until(&mut run, 6_000, &[(1, A::Reduce), (2, A::Compute)]).len(), 1, "named only");

    let mut run = at_pace(CoreConfig { straggler_evict: true, ..config(2) });
    assert_eq!(beat_until(&mut run, 6_000, &[(1, A::Reduce), (2, A::Commit)]).len(), 1, "named only: that is the store");
}

/// Of ranks that draw samples one may have more of them to draw: neither it nor who computes first afterwards is late, however long that takes.
#[test]
fn ranks_that_draw_samples_are_waited_for_and_that_time_is_no_measure_of_steps() {
    for evict in [false, true] {
        let mut run = at_pace(CoreConfig { straggler_evict: evict, ..config(2) });
        assert_eq!(beat_until(&mut run, 20_000, &[(1, A::Reduce), (2, A::Draw)]), vec![]);
        assert_eq!(beat_until(&mut run, 21_000, &[(1, A::Reduce), (2, A::Compute)]), vec![]);
        for n in [1, 2] {
            run.say(n, from_worker::Body::Progress(progress(4, 4)));
        }
        // As soon as before the drawing, a straggler is one.
        let effects = beat_until(&mut run, 22_500, &[(1, A::Reduce), (2, A::Compute)]);
        assert!(
            matches!(effects.first(), Some(Effect::Note(Note::Straggler { rank: 1, .. }))) || evict && !effects.is_empty(),
            "{effects:?}"
        );
    }
}

/// What it said before the newest step is of no use: it may be stopped.
#[test]
fn a_rank_that_is_silent_is_one_too() {
    let mut run = Run::new(CoreConfig { welcome: v1::Welcome { lease_ms: 8_000, ..config(2).welcome }, ..config(2) }, vec![]);
    run = run.both_in().both_ready(0);
    for step in 1..=3 {
        run.now = Time(500 * step);
        run.say(2, at(A::Reduce));
        run.say(1, from_worker::Body::Progress(progress(step, 4)));
    }
    let effects = beat_until(&mut run, 3_000, &[(1, A::Reduce)]);
    let note = Note::Straggler { worker: "w2".into(), rank: 1, activity: "does not say what it is at", waited_ms: 1_500 };
    assert_eq!(effects, vec![Effect::Note(note)]);
}
