//! Ready: all ranks must agree with each other and with the commit before training begins.

use super::*;
use ella_proto::ids::Step;

fn say_ready(run: &mut Run, n: u64, ready: v1::Ready) -> Vec<Effect> {
    run.say(n, from_worker::Body::Ready(ready))
}

#[test]
fn training_begins_when_all_ranks_are_ready_and_agree() {
    let mut run = Run::assigned(vec![]);
    assert_eq!(say_ready(&mut run, 2, ready(0)), vec![]);
    assert_eq!(run.core.wait(), Some(Wait::Loading { ranks: vec![ella_proto::ids::Rank(0)], reason: String::new() }));
    let effects = say_ready(&mut run, 1, ready(0));
    let start = || to_worker::Body::Start(v1::Start {});
    let note = Note::Started { generation: 1, step: 0 };
    assert_eq!(effects, vec![run.to(1, start()), run.to(2, start()), Effect::Note(note)]);
    assert_eq!(run.core.phase(), &Phase::Training);
    assert_eq!(run.core.wait(), None);
}

#[test]
fn a_rank_that_differs_from_the_others_ends_the_run_for_good_and_is_named() {
    let cases = [
        (v1::Ready { data_digest: hex("other"), ..ready(0) }, Field::Data, hex("data"), hex("other")),
        (v1::Ready { models_digest: hex("x"), ..ready(0) }, Field::Models, hex("models"), hex("x")),
        (v1::Ready { samples_per_epoch: 9, ..ready(0) }, Field::SamplesPerEpoch, "100".into(), "9".into()),
        (v1::Ready { state_digest: hex("other"), ..ready(0) }, Field::State, hex("state 0"), hex("other")),
    ];
    for (odd, field, expected, found) in cases {
        let mut run = Run::assigned(vec![]);
        say_ready(&mut run, 2, odd);
        let effects = say_ready(&mut run, 1, ready(0));
        let failure = Failure::Differs { who: who(2, Some(1)), step: Step(0), field, expected, found, than: Than::Others };
        assert_eq!(run.failure(), failure);
        let reason = failure.to_string();
        assert!(reason.starts_with("worker w2 (rank 1, host h2, pid 2) at step 0 has another "), "{reason}");
        let end = Body::End { outcome: ella_store::Outcome::Failed, step: 0, reason: reason.clone() };
        let note = Note::Ended { outcome: "failed", step: 0, reason: reason.clone(), permanent: true };
        let expected = vec![
            run.abort(1, &reason),
            run.abort(2, &reason),
            Effect::Close(conn(1)),
            Effect::Close(conn(2)),
            Effect::Append(end),
            Effect::Note(note),
            Effect::Finish(failure.into()),
        ];
        assert_eq!(effects, expected);
        assert_eq!(Outcome::from(run.failure()).exit_code(), 4);
    }
}

#[test]
fn a_resume_must_agree_with_the_commit() {
    let cases = [
        (v1::Ready { data_digest: hex("other"), ..ready(4) }, Field::Data, hex("data"), hex("other")),
        (v1::Ready { models_digest: hex("other"), ..ready(4) }, Field::Models, hex("models"), hex("other")),
        (v1::Ready { state_digest: hex("other"), ..ready(4) }, Field::State, hex("state 4"), hex("other")),
        (v1::Ready { step: 3, ..ready(4) }, Field::Step, "4".into(), "3".into()),
    ];
    for (odd, field, expected, found) in cases {
        let mut run = Run::assigned(vec![commit_at(4, 2)]);
        say_ready(&mut run, 1, odd.clone());
        say_ready(&mut run, 2, odd);
        let failure = Failure::Differs { who: who(1, Some(0)), step: Step(4), field, expected, found, than: Than::Commit(Step(4)) };
        assert_eq!(run.failure(), failure);
        assert!(failure.permanent());
        assert!(failure.to_string().contains("as in the commit of step 4"), "{failure}");
    }
}

#[test]
fn a_fresh_start_begins_at_step_zero() {
    let mut run = Run::assigned(vec![]);
    say_ready(&mut run, 1, v1::Ready { step: 2, ..ready(0) });
    say_ready(&mut run, 2, ready(0));
    let (expected, found) = ("0".into(), "2".into());
    let who = who(1, Some(0));
    assert_eq!(run.failure(), Failure::Differs { who, step: Step(0), field: Field::Step, expected, found, than: Than::FreshStart });
}

#[test]
fn of_three_the_odd_one_is_named_whoever_it_is() {
    for odd in 1..=3 {
        let mut run = Run::new(config(3), vec![]);
        (1..=3).for_each(|n| drop(run.come(n)));
        for n in 1..=3 {
            say_ready(&mut run, n, v1::Ready { models_digest: hex(if n == odd { "x" } else { "models" }), ..ready(0) });
        }
        let Failure::Differs { who: named, .. } = run.failure() else { panic!("{:?}", run.failure()) };
        assert_eq!(named, who(odd, Some(odd as u32 - 1)));
    }
}

#[test]
fn a_digest_that_is_none_is_told_at_once() {
    let nonsense = || "nonsense".to_owned();
    for (bad, field) in [
        (v1::Ready { data_digest: nonsense(), ..ready(0) }, Field::Data),
        (v1::Ready { models_digest: nonsense(), ..ready(0) }, Field::Models),
    ] {
        let mut run = Run::assigned(vec![]);
        say_ready(&mut run, 1, bad);
        assert_eq!(run.failure(), Failure::Malformed { who: who(1, Some(0)), field, found: nonsense() });
    }
}

#[test]
fn a_rank_that_does_not_get_ready_at_the_beginning_is_named_at_the_deadline() {
    let mut run = Run::assigned(vec![]);
    say_ready(&mut run, 1, ready(0));
    run.until(10_000, &[1, 2]);
    assert_eq!(run.failure(), Failure::NotReady { who: who(2, Some(1)), waited_ms: 10_000 });
}

#[test]
fn later_a_rank_that_does_not_get_ready_is_let_go() {
    let mut run = Run::training(vec![]);
    run.come_with(3, 0);
    run.say(1, broken(0, "no answer"));
    run.say(2, idle(Some(0)));
    run.go_on(0, &[1, 3]);
    let why = "it was not ready within 10000 ms (workers.start_timeout)";
    let effects: Vec<Effect> = run.until(10_000, &[1, 2, 3]).into_iter().filter(|effect| !matches!(effect, Effect::Append(_))).collect();
    let reason = format!("worker w2 (rank 1, host h2, pid 2) was lost: {why}");
    let expected = vec![
        run.release(2, why),
        Effect::Close(conn(2)),
        Effect::Note(Note::Lost { worker: "w2".into(), rank: Some(1), why: why.into() }),
        Effect::Note(Note::Regroup { generation: 2, reason: reason.clone(), at_boundary: false }),
        run.regroup(1, &reason),
        run.regroup(3, &reason),
    ];
    assert_eq!(effects, expected);
}

#[test]
fn later_a_run_without_enough_ready_ranks_fails_and_names_who_is_late() {
    let mut run = Run::new(CoreConfig { min: 2, ..config(2) }, vec![]).both_in().both_ready(0);
    run.say(1, broken(0, "no answer"));
    run.say(2, idle(Some(0)));
    run.go_on(0, &[1]);
    run.until(10_000, &[1, 2]);
    assert_eq!(run.failure(), Failure::NotReady { who: who(2, Some(1)), waited_ms: 10_000 });
}

/// A ring that one of them does not close, or a GPU that hangs in the first sum, keeps all of them from getting ready.
#[test]
fn where_no_rank_gets_ready_the_one_that_does_not_leave_is_let_go() {
    let begun = || {
        let mut run = Run::training(vec![]);
        run.say(1, broken(3, "no answer"));
        run.say(2, idle(Some(3)));
        run
    };
    let mut run = begun();
    run.until(10_000, &[1, 2]);
    let reason = "no rank was ready within 10000 ms (workers.start_timeout)".to_owned();
    assert_eq!(run.core.wait(), Some(Wait::Regroup { busy: 2, reason }));
    run.say(1, idle(Some(3)));
    let effects = run.until(15_000, &[1, 2]);
    let why = "it did not stop within 5000 ms of being told to (workers.step_timeout)".to_owned();
    assert!(effects.contains(&Effect::Note(Note::Lost { worker: "w2".into(), rank: Some(1), why })), "{effects:?}");
    assert_eq!(run.places(&effects), [(1, Some(0), 3, false)]);

    // Where all leave in time, the network is at fault: it has one more try.
    let mut run = begun();
    run.until(10_000, &[1, 2]);
    run.say(1, idle(Some(3)));
    run.say(2, idle(Some(3)));
    run.until(20_000, &[1, 2]);
    assert_eq!(run.failure(), Failure::NotReady { who: who(1, Some(0)), waited_ms: 10_000 });
}

/// Where a state survives, nothing is digested; what is read must still be the same.
#[test]
fn where_a_state_survives_it_needs_no_digest_and_its_step_must_be_right() {
    let regrouped = || {
        let mut run = Run::training(vec![]);
        run.say(1, broken(3, "no answer"));
        run.say(2, idle(Some(3)));
        run
    };
    let mut run = regrouped();
    run.go_on(3, &[2]);
    let note = Note::Started { generation: 2, step: 3 };
    let start = || to_worker::Body::Start(v1::Start {});
    assert_eq!(run.go_on(3, &[1]), vec![run.to(1, start()), run.to(2, start()), Effect::Note(note)]);

    let mut run = regrouped();
    run.go_on(2, &[1, 2]);
    let Failure::Differs { who: named, field, than, .. } = run.failure() else { panic!("{:?}", run.failure()) };
    assert_eq!((named, field, than), (who(1, Some(0)), Field::Step, Than::Survivor));

    let mut run = Run::assigned(vec![]);
    say_ready(&mut run, 1, ready_to_go_on(0));
    assert_eq!(run.failure(), Failure::Malformed { who: who(1, Some(0)), field: Field::State, found: String::new() });
}

/// A worker that was set up wrongly must not end a run that others can go on with.
#[test]
fn a_joiner_with_other_data_or_models_is_let_go() {
    let cases = [
        (v1::Ready { data_digest: hex("x"), ..ready_to_go_on(3) }, "data set digest", hex("x"), hex("data")),
        (v1::Ready { models_digest: hex("x"), ..ready_to_go_on(3) }, "models' fingerprint", hex("x"), hex("models")),
        (v1::Ready { samples_per_epoch: 9, ..ready_to_go_on(3) }, "samples per epoch", "9".into(), "100".into()),
    ];
    for (odd, field, found, expected) in cases {
        let mut run = Run::training(vec![]);
        run.come(3);
        run.say(1, broken(3, "no answer"));
        run.say(2, idle(Some(3)));
        say_ready(&mut run, 3, odd);
        run.go_on(3, &[1]);
        let effects = run.go_on(3, &[2]);
        let why = format!("its {field} is {found}, and the run's is {expected}; start it with the data and models of this run");
        assert_eq!(effects[0], run.release(3, &why));
        assert_eq!(run.core.wait().map(|wait| matches!(wait, Wait::Regroup { busy: 2, .. })), Some(true));
        run.say(1, idle(Some(3)));
        run.say(2, idle(Some(3)));
        run.go_on(3, &[1, 2]);
        assert_eq!((run.core.phase(), run.core.fruitless), (&Phase::Training, 0), "the joiner's generation does not count");
    }
}

#[test]
fn ready_out_of_turn_is_refused() {
    let mut run = Run::training(vec![]);
    assert_eq!(say_ready(&mut run, 1, ready(0)), vec![]);
    assert_eq!(run.count("refused_out_of_turn"), 1);
}
