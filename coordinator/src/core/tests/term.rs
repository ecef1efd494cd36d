//! Messages of another term or generation change nothing but a counter (T-1, TERM).

use super::*;

fn message(term: u64, generation: u64, body: from_worker::Body) -> Event {
    Event::Message(conn(1), FromWorker { term, generation, body: Some(body) })
}

#[test]
fn another_terms_messages_are_refused_and_are_no_sign_of_life() {
    let mut run = Run::training(vec![]);
    run.until(500, &[2]);
    for term in [0, TERM - 1, TERM + 1] {
        assert_eq!(run.event(message(term, 1, state(2))), vec![]);
    }
    assert_eq!(run.count("refused_other_term"), 3);
    assert!(!run.core.commits.has_pending());
    assert_eq!(run.core.next_deadline(), Some(Time(1_000)), "worker 1 was last heard of at 0");
}

#[test]
fn another_generations_work_is_refused_but_its_heartbeat_is_a_sign_of_life() {
    let mut run = Run::training(vec![]);
    for body in [state(2), part(2, 0), done(10), from_worker::Body::Progress(v1::Progress::default()), from_worker::Body::Ready(ready(0))] {
        assert_eq!(run.event(message(TERM, 0, body)), vec![]);
    }
    assert_eq!(run.event(message(TERM, 0, idle(Some(0)))), vec![], "it has said so of the generation before");
    assert_eq!(run.count("refused_other_generation"), 6);
    run.until(500, &[2]);
    run.event(message(TERM, 0, from_worker::Body::Heartbeat(v1::Heartbeat::default())));
    run.until(1_499, &[2]);
    assert_eq!(run.core.phase(), &Phase::Training);
    run.until(1_500, &[2]);
    assert!(matches!(run.core.phase(), Phase::Regrouping { .. }));
}

#[test]
fn empty_messages_are_refused() {
    let mut run = Run::training(vec![]);
    assert_eq!(run.event(Event::Message(conn(1), FromWorker { term: TERM, generation: 1, body: None })), vec![]);
    assert_eq!(run.count("refused_empty"), 1);
}

#[test]
fn nothing_is_taken_in_after_the_end() {
    let mut run = Run::training(vec![]);
    run.event(Event::Leave("now".into()));
    assert_eq!(run.say(1, state(2)), vec![]);
    assert_eq!(run.event(Event::Closed(conn(1), Closed::Gone)), vec![]);
    assert_eq!(run.event(Event::Stop("again".into())), vec![]);
    assert_eq!(run.event(Event::Leave("again".into())), vec![]);
    assert_eq!(run.event(Event::Superseded(Term(9))), vec![]);
    assert_eq!(run.count("refused_after_the_end"), 1);
}

/// It was told of no generation yet when another one was formed.
#[test]
fn a_worker_without_a_place_may_be_idle_in_any_generation() {
    let mut run = Run::training(vec![]);
    run.hello(3);
    run.event(Event::Message(conn(3), FromWorker { term: TERM, generation: 0, body: Some(idle(None)) }));
    assert_eq!(run.core.status(run.now).workers[2].state, "spare");
}
