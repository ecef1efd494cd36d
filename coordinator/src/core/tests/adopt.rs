//! A coordinator that begins while a generation of the last one still runs; and workers whose streams break.

use super::*;

/// A worker is back that has a place of generation 5 of the term before.
fn back(n: u64, rank: u32, step: u64) -> Hello {
    Hello { place: Some(place(TERM - 1, 5, rank, 2, step)), ..hello(n) }
}

fn adopted(run: &Run, n: u64) -> Effect {
    run.to(n, to_worker::Body::Adopted(v1::Adopted {}))
}

fn start(run: &Run, n: u64) -> Effect {
    run.to(n, to_worker::Body::Start(v1::Start {}))
}

#[test]
fn a_generation_whose_ranks_all_come_back_goes_on() {
    let mut run = Run::new(config(3), vec![commit_at(4, 1)]);
    let effects = run.hello_as(1, back(1, 1, 7));
    assert_eq!(run.core.generation.0, 5, "the welcome is of that generation");
    let note = Note::Attached { worker: "w1".into(), device: "cpu".into(), have: 1, need: 1 };
    assert_eq!(effects, vec![run.to(1, to_worker::Body::Welcome(config(3).welcome)), Effect::Note(note)]);
    assert_eq!(run.core.wait(), Some(Wait::Return { have: 1, world: 2 }));
    let worker = run.core.status(run.now).workers.remove(0);
    assert_eq!((worker.state.as_str(), worker.step), ("returning", 7));
    // One without a place waits meanwhile.
    run.come(2);
    assert_eq!(run.say(1, state(8)), vec![], "nothing is taken until all are there");
    let effects = run.hello_as(3, back(3, 0, 8));
    let note = Note::Adopted { generation: 5, workers: vec!["w3".into(), "w1".into()], step: 7 };
    assert_eq!(effects[2..], [adopted(&run, 3), adopted(&run, 1), Effect::Note(note), start(&run, 3), start(&run, 1)]);
    assert_eq!((run.core.phase(), run.count("refused_out_of_turn")), (&Phase::Training, 1));
    // Its commits are of this term and of its generation.
    run.say(1, state(8));
    run.say(3, state(8));
    (0..2).for_each(|index| drop(run.say(1, part(8, index))));
    let folder = ella_store::commit_folder(8, TERM, 5);
    let commit = Commit { generation: 5, folder, ..commit_at(8, TERM) };
    assert_eq!(run.say(1, part(8, 2)), vec![Effect::Append(Body::Commit(commit))]);
}

#[test]
fn its_steps_are_counted_from_the_commit_on() {
    let mut run = Run::new(config(2), vec![commit_at(4, 1)]);
    run.hello_as(1, back(1, 0, 7));
    run.hello_as(2, back(2, 1, 7));
    run.say(1, from_worker::Body::Progress(progress(8, 4)));
    let status = run.core.status(run.now);
    assert_eq!((status.step, status.samples, status.workers[1].step), (8, 32, 7));
}

/// It is lost with the coordinator's machine, say.
#[test]
fn if_a_rank_does_not_come_back_within_a_lease_the_others_form_anew() {
    let mut run = Run::new(config(2), vec![commit_at(4, 1)]);
    run.hello_as(1, back(1, 0, 7));
    run.come(3);
    run.until(999, &[1, 3]);
    assert_eq!(run.core.wait(), Some(Wait::Return { have: 1, world: 2 }));
    let effects = run.until(1_000, &[1, 3]);
    let why = "not all ranks of the generation came back";
    let note = Note::Regroup { generation: 5, reason: why.into(), at_boundary: false };
    assert_eq!(effects, vec![Effect::Note(note), run.regroup(1, why)]);
    let effects = run.say(1, idle(Some(8)));
    assert_eq!(run.places(&effects), [(1, Some(0), 8, true), (3, Some(0), 8, true)]);
    assert_eq!(run.core.generation.0, 6);
    // The last one is too late, and comes in like any other.
    assert_eq!(run.hello_as(2, back(2, 1, 7)).last(), Some(&run.regroup(2, "its generation is over")));
    run.go_on(8, &[1, 3]);
    run.say(2, idle(Some(7)));
    let effects = run.until(3_000, &[1, 2, 3]);
    assert_eq!(effects.last(), Some(&run.boundary(3, "workers that are to join: 1")));
}

#[test]
fn a_run_goes_on_with_what_came_back_though_it_would_begin_with_more() {
    let mut run = Run::new(config(3), vec![]);
    let effects = run.come_with(1, 7);
    assert_eq!(run.places(&effects), [(1, Some(0), 7, false)]);
}

#[test]
fn a_generation_that_cannot_go_on_is_ended_at_once() {
    let other = |change: fn(&mut v1::Place)| {
        let mut second = back(2, 1, 7);
        change(second.place.as_mut().unwrap());
        second
    };
    let contradict = "the ranks that came back contradict each other";
    let cases = [
        (other(|place| place.rank = 0), contradict),
        (other(|place| place.world = 3), contradict),
        (other(|place| place.ready = None), contradict),
        (other(|place| place.ready.as_mut().unwrap().models_digest = hex("x")), contradict),
        (other(|place| place.step = 3), "the generation that came back is older than the last commit"),
        (other(|place| place.step = 10), "the generation that came back has applied its last step"),
    ];
    for (second, why) in cases {
        let mut run = Run::new(config(2), vec![commit_at(4, 1)]);
        run.hello_as(1, back(1, 0, 7));
        let effects = run.hello_as(2, second);
        assert_eq!(effects[3..], [run.regroup(1, why), run.regroup(2, why)]);
        assert_eq!(run.core.phase(), &Phase::Regrouping { until: Time(5_000) });
        run.say(1, idle(Some(8)));
        let effects = run.say(2, idle(Some(8)));
        assert_eq!(run.places(&effects).len(), 2);
    }
}

#[test]
fn of_two_generations_the_newer_goes_on() {
    let mut run = Run::new(config(2), vec![]);
    run.hello_as(1, Hello { place: Some(place(TERM - 1, 4, 0, 2, 5)), ..hello(1) });
    let effects = run.hello_as(2, back(2, 0, 7));
    assert_eq!(effects[2..], [run.regroup(1, "a newer generation runs")]);
    let effects = run.hello_as(3, Hello { place: Some(place(TERM - 2, 9, 1, 2, 5)), ..hello(3) });
    assert_eq!(effects[2..], [run.regroup(3, "its generation is over")]);
    assert_eq!(run.hello_as(4, back(4, 1, 7))[2..4], [adopted(&run, 2), adopted(&run, 4)]);
    assert_eq!(run.core.generation.0, 9, "G-2");
}

/// Its generation broke while its coordinator was away.
#[test]
fn a_rank_that_says_that_it_has_stopped_ends_the_wait() {
    let mut run = Run::new(config(2), vec![]);
    run.hello_as(1, back(1, 0, 7));
    let effects = run.say(1, broken(7, "peer closed"));
    assert_eq!(run.places(&effects), [(1, Some(0), 7, false)]);
}

#[test]
fn ranks_that_leave_again_may_come_again() {
    let mut run = Run::new(config(2), vec![]);
    run.hello_as(1, back(1, 0, 7));
    run.close(1);
    run.until(1_000, &[]);
    run.hello_as(2, back(1, 0, 7));
    run.until(1_900, &[2]);
    let effects = run.hello_as(3, back(2, 1, 8));
    assert_eq!(effects[2..4], [adopted(&run, 2), adopted(&run, 3)]);
}

#[test]
fn a_generation_of_a_coordinator_that_came_after_is_left_alone() {
    let mut run = Run::new(config(2), vec![]);
    let effects = run.hello_as(1, Hello { place: Some(place(TERM + 1, 1, 0, 2, 5)), ..hello(1) });
    assert!(matches!(&effects[2], Effect::Note(Note::Refused { why, .. }) if why.contains("superseded")), "{effects:?}");
}

#[test]
fn a_stop_finds_the_generation_that_came_back() {
    let mut run = Run::new(config(2), vec![]);
    run.hello_as(1, back(1, 0, 7));
    run.event(Event::Stop("night".into()));
    let effects = run.hello_as(2, back(2, 1, 7));
    assert_eq!(effects[7..], [run.drain(1, "night"), run.drain(2, "night")]);
}

fn again(n: u64, rank: u32, generation: u64) -> Hello {
    Hello { place: Some(place(TERM, generation, rank, 2, 3)), ..hello(n) }
}

#[test]
fn a_worker_whose_stream_broke_unnoticed_takes_its_place_again() {
    let mut run = Run::training(vec![]);
    run.until(900, &[1, 2]);
    let effects = run.hello_as(3, again(1, 0, 1));
    // Its coordinator's last words may be lost: that it is to start, for one.
    let welcome = run.to(3, to_worker::Body::Welcome(config(2).welcome));
    assert_eq!(effects, vec![Effect::Close(conn(1)), welcome, adopted(&run, 3), start(&run, 3)]);
    assert_eq!((run.core.phase(), run.count("workers_reattached")), (&Phase::Training, 1));
    assert_eq!(run.close(1), vec![]);
    run.say(3, state(4));
    run.say(2, state(4));
    (0..2).for_each(|index| drop(run.say(3, part(4, index))));
    assert_eq!(run.say(3, part(4, 2)).len(), 1, "its record is appended");
}

/// It may not have heard of it.
#[test]
fn what_it_was_asked_for_is_said_again() {
    let mut run = Run::training(vec![]);
    run.event(Event::Stop("night".into()));
    assert_eq!(run.hello_as(3, again(1, 0, 1)).last(), Some(&run.drain(3, "night")));
    let mut run = Run::training(vec![]);
    run.say(2, from_worker::Body::Leaving(v1::Leaving {}));
    let reason = "worker w2 (rank 1, host h2, pid 2) was told to leave";
    assert_eq!(run.hello_as(3, again(1, 0, 1)).last(), Some(&run.boundary(3, reason)));
}

#[test]
fn a_worker_that_has_left_its_generation_or_comes_too_late_is_told_to_regroup() {
    // The generation is over: its stream's end was noticed.
    let mut run = Run::training(vec![]);
    run.close(1);
    let effects = run.hello_as(3, again(1, 0, 1));
    assert_eq!(effects.last(), Some(&run.regroup(3, "its generation is over")));
    run.say(2, idle(Some(3)));
    let effects = run.say(3, idle(Some(4)));
    assert_eq!(run.places(&effects), [(2, Some(1), 4, true), (3, Some(1), 4, true)]);

    // It runs, but not as the worker has it.
    for hello in [again(1, 1, 1), again(1, 0, 7), hello(1)] {
        let mut run = Run::training(vec![]);
        let has_place = hello.place.is_some();
        let effects = run.hello_as(3, hello);
        let why = "it attached again, and had left its generation";
        let lost = Note::Lost { worker: "w1".into(), rank: Some(0), why: why.into() };
        assert_eq!(effects[2..4], [Effect::Close(conn(1)), Effect::Note(lost)]);
        let reason = format!("worker w1 (rank 0, host h1, pid 1) was lost: {why}");
        assert!(effects.contains(&run.regroup(2, &reason)));
        assert_eq!(effects.contains(&run.regroup(3, "its generation is over")), has_place);
    }
}
