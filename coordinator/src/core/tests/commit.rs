//! StateDigest, PartSaved, Appended: a commit exists when its record does (COMMIT).

use super::*;
use ella_proto::ids::{Rank, Step};

fn committed(run: &Run, n: u64, step: u64) -> Effect {
    run.to(n, to_worker::Body::Committed(v1::Committed { step }))
}

fn committed_note(step: u64) -> Effect {
    Effect::Note(Note::Committed { step, generation: 1, folder: ella_store::commit_folder(step, TERM, 1), bytes: 15, took_ms: 0 })
}

#[test]
fn the_record_is_written_when_all_states_and_parts_are_in_and_told_when_it_stands() {
    let mut run = Run::training(vec![]);
    for (n, body) in [(1, part(2, 0)), (1, state(2)), (2, part(2, 1)), (2, part(2, 2))] {
        assert_eq!(run.say(n, body), vec![]);
    }
    let body = Body::Commit(commit_at(2, TERM));
    assert_eq!(run.say(2, state(2)), vec![Effect::Append(body.clone())]);
    assert_eq!(run.core.status(run.now).last_commit_step, 0, "not before the record stands");
    let effects = run.event(Event::Appended(body));
    assert_eq!(effects, vec![committed_note(2), committed(&run, 1, 2), committed(&run, 2, 2)]);
    let status = run.core.status(run.now);
    assert_eq!((status.last_commit_step, status.commits, status.samples), (2, 1, 8));
}

#[test]
fn a_state_that_differs_ends_the_run_for_good_naming_the_rank() {
    let other = |change: fn(&mut v1::StateDigest)| {
        let from_worker::Body::State(mut digest) = state(2) else { unreachable!() };
        change(&mut digest);
        from_worker::Body::State(digest)
    };
    let cases = [
        (other(|digest| digest.digest = hex("other")), Field::State),
        (other(|digest| digest.epoch = 1), Field::Position),
        (other(|digest| digest.ledger[0].samples = 7), Field::Ledger),
    ];
    for (odd, expected) in cases {
        let mut run = Run::training(vec![]);
        run.say(2, odd);
        run.say(1, state(2));
        let Failure::Differs { who: named, step, field, .. } = run.failure() else { panic!("{:?}", run.failure()) };
        assert_eq!((named, step, field), (who(2, Some(1)), Step(2), expected));
        assert!(run.failure().permanent());
    }
}

#[test]
fn sizes_are_summed_up_without_a_turn_to_zero() {
    let mut run = Run::training(vec![]);
    for step in [2, 4] {
        let mut commit = commit_at(step, TERM);
        commit.parts.iter_mut().for_each(|part| part.bytes = u64::MAX);
        commit.ledger.push(ella_store::LedgerEpoch { epoch: 1, samples: u64::MAX, hash: "0".repeat(32) });
        let effects = run.event(Event::Appended(Body::Commit(commit)));
        assert!(matches!(&effects[0], Effect::Note(Note::Committed { bytes: u64::MAX, .. })), "{effects:?}");
    }
    let status = run.core.status(run.now);
    assert_eq!((status.totals.unwrap().commit_bytes, status.samples), (u64::MAX, u64::MAX));
}

#[test]
fn a_part_saved_twice_must_be_the_same() {
    let mut run = Run::training(vec![]);
    run.say(1, part(2, 0));
    assert_eq!(run.say(2, part(2, 0)), vec![]);
    assert_eq!(run.count("parts_saved_again"), 1);
    let name = PARTS[0].to_owned();
    run.say(2, from_worker::Body::Part(v1::PartSaved { step: 2, name: name.clone(), bytes: 5, blake3: hex("other") }));
    let (expected, found) = (hex(PARTS[0]), hex("other"));
    assert_eq!(run.failure(), Failure::PartDiffers { who: who(2, Some(1)), step: Step(2), name, expected, found });
}

#[test]
fn old_commits_are_given_up_in_the_log_before_they_are_deleted() {
    let mut run = Run::training(vec![commit_at(1, 1), commit_at(2, 2)]);
    let retire = Body::Retire { commits: vec![ella_store::commit_folder(1, 1, 1)] };
    let effects = run.commit(4);
    assert_eq!(effects.last(), Some(&Effect::Append(retire.clone())));
    let folders = vec![ella_store::commit_folder(1, 1, 1)];
    let effects = run.event(Event::Appended(retire));
    assert_eq!(effects, vec![Effect::DeleteFolders(folders.clone()), Effect::Note(Note::Retired { folders })]);
}

#[test]
fn a_keep_rule_that_was_lowered_gives_up_all_that_is_too_much() {
    let mut run = Run::training(vec![commit_at(1, 1), commit_at(2, 1), commit_at(3, 1)]);
    let retire = Body::Retire { commits: vec![ella_store::commit_folder(1, 1, 1), ella_store::commit_folder(2, 1, 1)] };
    assert_eq!(run.commit(4).last(), Some(&Effect::Append(retire)));
}

#[test]
fn commits_are_recorded_in_the_order_of_their_steps() {
    let mut run = Run::training(vec![]);
    for (n, body) in [(1, state(2)), (2, state(2)), (1, part(2, 0)), (2, part(2, 1))] {
        run.say(n, body);
    }
    assert_eq!(run.report_commit(4), vec![], "step 2 comes first");
    assert_eq!(run.say(1, part(2, 2)), vec![Effect::Append(Body::Commit(commit_at(2, TERM)))]);
    let effects = run.event(Event::Appended(Body::Commit(commit_at(2, TERM))));
    assert_eq!(effects.last(), Some(&Effect::Append(Body::Commit(commit_at(4, TERM)))));
}

#[test]
fn reports_out_of_turn_are_refused_and_counted() {
    let mut run = Run::training(vec![commit_at(2, 2)]);
    for body in [state(2), part(1, 0), state(11)] {
        assert_eq!(run.say(1, body), vec![], "already committed, or beyond the last step");
    }
    assert_eq!(run.count("refused_out_of_turn"), 3);
    run.say(1, from_worker::Body::Part(v1::PartSaved { step: 4, name: "../evil".into(), bytes: 1, blake3: hex("x") }));
    assert_eq!(run.count("refused_unknown_part"), 1);
    run.say(1, state(4));
    run.say(1, state(4));
    assert_eq!(run.count("refused_duplicate_digest"), 1);
}

#[test]
fn malformed_digests_name_the_worker() {
    let mut run = Run::training(vec![]);
    run.say(2, from_worker::Body::Part(v1::PartSaved { step: 2, name: PARTS[0].into(), bytes: 1, blake3: "x".into() }));
    assert_eq!(run.failure(), Failure::Malformed { who: who(2, Some(1)), field: Field::State, found: "x".into() });

    let mut run = Run::training(vec![]);
    let from_worker::Body::State(mut digest) = state(2) else { unreachable!() };
    digest.ledger[0].hash = "Z".repeat(32);
    run.say(1, from_worker::Body::State(digest));
    assert_eq!(run.failure(), Failure::Malformed { who: who(1, Some(0)), field: Field::Ledger, found: "Z".repeat(32) });
}

#[test]
fn a_commit_that_is_not_completed_fails_the_run_and_says_what_is_missing() {
    let mut run = Run::training(vec![]);
    run.say(1, state(2));
    run.say(1, part(2, 0));
    run.until(20_000, &[1, 2]);
    let reason = "the commit of step 2 was not complete within 20000 ms: the state of 1 of 2 ranks (rank 1, for one), ema.safetensors, \
                  optimizer.safetensors did not come; look at the workers' logs and the store";
    assert_eq!(run.failure().to_string(), reason);
}

/// Nobody's log but the run's has anything to say of that.
#[test]
fn a_commit_of_which_all_is_there_but_its_record_is_the_logs_fault() {
    let mut run = Run::training(vec![]);
    run.report_commit(2);
    run.until(20_000, &[1, 2]);
    assert_eq!(run.failure(), Failure::Append { error: "the record of the commit of step 2 was not taken within 20000 ms".into() });
}

#[test]
fn a_superseded_coordinator_stops_and_its_workers_go_on_to_the_next() {
    let mut run = Run::training(vec![]);
    run.report_commit(2);
    let effects = run.event(Event::Superseded(Term(4)));
    let reason = "superseded: the coordinator of term 4 has taken over this run, so this one stops";
    let note = Note::Ended { outcome: "failed", step: 0, reason: reason.into(), permanent: true };
    let expected = vec![
        Effect::Close(conn(1)),
        Effect::Close(conn(2)),
        Effect::Note(note),
        Effect::Finish(Failure::Superseded { by: Term(4) }.into()),
    ];
    assert_eq!(effects, expected);
    assert_eq!(Outcome::from(run.failure()).exit_code(), 4);
}

#[test]
fn a_log_that_cannot_be_written_is_fatal() {
    let mut run = Run::training(vec![]);
    run.report_commit(2);
    let effects = run.event(Event::AppendFailed("disk full".into()));
    assert_eq!(run.failure(), Failure::Append { error: "disk full".into() });
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Append(_))));
}

#[test]
fn a_record_that_was_on_its_way_when_the_run_failed_still_counts() {
    let mut run = Run::training(vec![]);
    run.report_commit(2);
    run.event(Event::Leave("now".into()));
    assert_eq!(run.event(Event::Appended(Body::Commit(commit_at(2, TERM)))), vec![committed_note(2)]);
    assert_eq!(run.core.status(run.now).last_commit_step, 2);
}

fn unseen(step: u64, part: usize) -> Event {
    Event::PartUnseen { step, part: PARTS[part].to_owned(), why: "nothing is there".into() }
}

fn gives_up_commits(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Append(Body::Retire { .. }) | Effect::DeleteFolders(_)))
}

/// The others see the run's folder, and still hold what was to be committed.
#[test]
fn whoever_saves_a_part_where_it_is_not_found_goes_and_the_others_make_the_commit() {
    let mut run = Run::training(vec![commit_at(1, 1), commit_at(2, 2)]);
    run.report_commit(10);
    run.say(1, done(10));
    run.say(2, done(10));
    let effects = run.event(unseen(10, 1));
    let reason = v1::RefusedReason::Data.into();
    let refused = v1::Refused { reason, detail: "nothing is there".into(), permanent: true, ..v1::Refused::default() };
    assert_eq!(effects[..2], [run.to(2, to_worker::Body::Refused(refused)), Effect::Close(conn(2))]);
    let why = "it failed (its machine): nothing is there".to_owned();
    assert!(effects.contains(&Effect::Note(Note::Lost { worker: "w2".into(), rank: Some(1), why })), "{effects:?}");
    assert!(!gives_up_commits(&effects) && run.core.status(run.now).last_commit_step == 2);
    let effects = run.say(1, idle(Some(10)));
    assert_eq!(run.places(&effects), [(1, Some(0), 10, false)]);
    run.go_on(10, &[1]);
    run.say(1, state(10));
    for index in 0..2 {
        run.say(1, part(10, index));
    }
    let commit = Commit { generation: 2, world: 1, folder: ella_store::commit_folder(10, TERM, 2), ..commit_at(10, TERM) };
    assert_eq!(run.say(1, part(10, 2)), vec![Effect::Append(Body::Commit(commit.clone()))]);
    assert!(gives_up_commits(&run.event(Event::Appended(Body::Commit(commit)))), "now that the new one was seen");
}

#[test]
fn a_part_that_is_not_found_ends_a_run_for_good_that_needs_whoever_saved_it() {
    let mut run = Run::new(CoreConfig { min: 2, keep: 1, ..config(2) }, vec![commit_at(2, 2)]).both_in().both_ready(2);
    run.report_commit(4);
    let effects = run.event(unseen(4, 0));
    let reason = "worker w1 (rank 0, host h1, pid 1) failed (its machine): nothing is there";
    assert_eq!((run.failure().to_string().as_str(), run.failure().permanent()), (reason, true));
    assert!(!gives_up_commits(&effects) && run.core.status(run.now).last_commit_step == 2, "{effects:?}");
}

#[test]
fn a_part_of_a_worker_that_is_gone_is_nobodys_fault_who_is_here() {
    let mut run = Run::training(vec![]);
    run.report_commit(4);
    run.close(2);
    run.say(1, idle(Some(4)));
    assert_eq!(run.event(unseen(4, 1)), vec![]);
    assert!(!run.core.commits.has_pending());
    run.go_on(4, &[1]);
    assert_eq!(run.core.phase(), &Phase::Training);
}

/// The record holds what all ranks reported while they were all there.
#[test]
fn a_record_that_was_on_its_way_when_its_generation_ended_gets_there() {
    let mut run = Run::training(vec![]);
    run.report_commit(2);
    run.close(1);
    run.say(2, idle(Some(2)));
    assert_eq!(run.core.wait(), Some(Wait::Loading { ranks: vec![Rank(0)], reason: String::new() }));
    let effects = run.event(Event::Appended(Body::Commit(commit_at(2, TERM))));
    assert_eq!(effects, vec![committed_note(2), committed(&run, 2, 2)]);
    run.go_on(2, &[2]);
    // Another one has its own folder, and one rank.
    run.say(2, state(4));
    for index in 0..2 {
        run.say(2, part(4, index));
    }
    let commit = Commit { generation: 2, world: 1, folder: ella_store::commit_folder(4, TERM, 2), ..commit_at(4, TERM) };
    assert_eq!(run.say(2, part(4, 2)), vec![Effect::Append(Body::Commit(commit))]);
}

#[test]
fn a_commit_whose_record_was_not_on_its_way_is_dropped_with_its_generation() {
    let mut run = Run::training(vec![]);
    run.say(1, state(2));
    run.say(2, state(2));
    run.say(1, part(2, 0));
    run.close(1);
    assert_eq!(run.say(2, part(2, 1)), vec![], "too late");
    assert_eq!(run.count("refused_out_of_turn"), 1);
    run.say(2, idle(Some(2)));
    run.go_on(2, &[2]);
    assert!(!run.core.commits.has_pending());
    run.until(25_000, &[2]);
    assert_eq!(run.core.phase(), &Phase::Training, "it is not overdue either");
}

/// The commit on its way is newer than the one that all would restore.
#[test]
fn a_generation_that_is_to_restore_waits_for_the_record_on_its_way() {
    let mut run = Run::training(vec![]);
    run.report_commit(2);
    run.close(1);
    run.close(2);
    assert_eq!(run.come(3).len(), 0);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 1, need: 1 }));
    let effects = run.event(Event::Appended(Body::Commit(commit_at(2, TERM))));
    assert_eq!(run.places(&effects), [(3, None, 2, false)]);

    let mut run = Run::training(vec![]);
    run.report_commit(2);
    run.close(1);
    run.close(2);
    run.come(3);
    run.until(10_000, &[3]);
    assert_eq!(run.failure(), Failure::Append { error: "no answer within 20000 ms".into() });
}

/// Those that held the state of the commit on its way are lost, and one with an older state must not train on from that: its next commit
/// would follow a newer one.
#[test]
fn a_state_older_than_the_record_on_its_way_is_not_gone_on_from() {
    let mut run = Run::training(vec![]);
    run.report_commit(5);
    run.close(1);
    run.close(2);
    assert_eq!(run.come_with(3, 4).len(), 0);
    let effects = run.event(Event::Appended(Body::Commit(commit_at(5, TERM))));
    assert_eq!(run.places(&effects), [(3, None, 5, false)]);

    // One with that very state can be gone on from.
    let mut run = Run::training(vec![]);
    run.report_commit(5);
    run.close(1);
    run.close(2);
    let effects = run.come_with(3, 5);
    assert_eq!(run.places(&effects), [(3, Some(0), 5, false)]);
}

/// Messages of a worker whose stream broke may be lost: what lacks some is not waited for long, and that ends nothing.
#[test]
fn a_commit_that_is_not_completed_after_a_worker_came_back_is_made_by_another_generation() {
    let mut run = Run::training(vec![]);
    run.say(1, state(2));
    run.until(700, &[1, 2]);
    run.hello_as(3, Hello { place: Some(place(TERM, 1, 1, 2, 2)), ..hello(2) });
    run.until(1_699, &[1, 3]);
    assert_eq!(run.core.phase(), &Phase::Training);
    run.until(1_700, &[1, 3]);
    let Some(Wait::Regroup { busy: 2, reason }) = run.core.wait() else { panic!("{:?}", run.core.wait()) };
    assert!(reason.starts_with("the commit of step 2 was not complete within 1700 ms: the state of 1 of 2 ranks (rank 1"), "{reason}");
}

#[test]
fn a_commit_that_is_reported_after_a_worker_came_back_waits_for_its_record_alone() {
    let mut run = Run::training(vec![]);
    run.hello_as(3, Hello { place: Some(place(TERM, 1, 1, 2, 2)), ..hello(2) });
    run.say(3, state(2));
    run.say(1, state(2));
    (0..3).for_each(|index| drop(run.say(1, part(2, index))));
    run.until(19_999, &[1, 3]);
    assert_eq!(run.core.phase(), &Phase::Training);
}

/// All that a worker said of the last commit may be lost.
#[test]
fn a_last_commit_that_does_not_come_after_a_worker_came_back_is_made_by_another_generation() {
    let mut run = Run::training(vec![]);
    run.hello_as(3, Hello { place: Some(place(TERM, 1, 1, 2, 10)), ..hello(2) });
    run.say(1, state(10));
    run.say(1, done(10));
    run.say(3, done(10));
    run.until(1_000, &[1, 3]);
    assert!(matches!(run.core.wait(), Some(Wait::Regroup { busy: 2, .. })), "{:?}", run.core.wait());
    run.say(1, idle(Some(10)));
    let effects = run.say(3, idle(Some(10)));
    assert_eq!(run.places(&effects), [(1, Some(0), 10, false), (3, Some(0), 10, false)]);
}

/// What would be written from there on is in no run's folder.
#[test]
fn a_log_that_is_gone_ends_the_run_for_good() {
    let mut run = Run::training(vec![]);
    run.report_commit(2);
    let effects = run.event(Event::LogGone("log/7.json: not there any more".into()));
    assert_eq!(Outcome::from(run.failure()).exit_code(), 4);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Append(_))));
    assert_eq!(effects[0], run.abort(1, "log/7.json: not there any more"));
}
