//! Progress: measured, kept, never answered (LIVE).

use super::*;
use ella_proto::ids::Rank;

#[test]
fn rank_zeros_steps_are_kept_and_summed() {
    let mut run = Run::training(vec![commit_at(4, 2)]);
    for step in 5..8 {
        run.now = Time(run.now.0 + 100);
        assert_eq!(run.say(1, from_worker::Body::Progress(progress(step, 4))), vec![Effect::Metric(progress(step, 4))]);
    }
    let status = run.core.status(run.now);
    assert_eq!((status.step, status.samples, status.loss, status.samples_per_second), (7, 28, 0.5, 40.0));
}

#[test]
fn a_lost_message_loses_no_count() {
    let mut run = Run::training(vec![]);
    run.say(1, from_worker::Body::Progress(progress(1, 40)));
    run.say(1, from_worker::Body::Progress(progress(4, 40)));
    let status = run.core.status(run.now);
    assert_eq!((status.samples, status.epoch), (160, 1));
}

#[test]
fn other_ranks_send_their_timing_only() {
    let mut run = Run::training(vec![]);
    let parts = v1::StepParts { data: 0.25, ..v1::StepParts::default() };
    assert_eq!(run.say(2, from_worker::Body::Progress(v1::Progress { parts: Some(parts), ..progress(1, 4) })), vec![]);
    let status = run.core.status(run.now);
    assert_eq!((status.step, status.workers[1].step, status.workers[1].parts), (0, 1, Some(parts)));
}

/// A rank's steps are summed, kept some at a time, and at the end what is left; the same step told twice counts once.
#[test]
fn where_each_ranks_time_goes_is_kept() {
    let mut run = Run::training_for(1000);
    let parts = v1::StepParts { data: 0.25, reduce: 0.5, ..v1::StepParts::default() };
    let told = |step| from_worker::Body::Progress(v1::Progress { parts: Some(parts), step_seconds: 2.0, ..progress(step, 4) });
    let timings = |effects: Vec<Effect>| -> Vec<RankTiming> {
        effects.into_iter().filter_map(|effect| if let Effect::Timing(timing) = effect { Some(timing) } else { None }).collect()
    };
    let mut kept = Vec::new();
    for step in 1..=70 {
        for n in [1, 2, 2] {
            kept.extend(timings(run.say(n, told(step))));
        }
    }
    let seen: Vec<_> = kept.iter().map(|t| (t.rank, t.step, t.steps, t.seconds, t.parts.data, t.parts.reduce)).collect();
    assert_eq!(seen, [(0, 64, 64, 128.0, 16.0, 32.0), (1, 64, 64, 128.0, 16.0, 32.0)]);
    let left = timings(run.event(Event::Leave("now".into())));
    assert_eq!(left.iter().map(|t| (t.rank, t.step, t.steps)).collect::<Vec<_>>(), [(0, 70, 6), (1, 70, 6)]);
}

#[test]
fn a_heartbeat_says_how_far_a_worker_is() {
    let mut run = Run::training(vec![]);
    for (said, known) in [(3, 3), (2, 3), (99, 10)] {
        assert_eq!(run.say(2, from_worker::Body::Heartbeat(v1::Heartbeat { step: said, ..Default::default() })), vec![]);
        assert_eq!(run.core.status(run.now).workers[1].step, known);
    }
}

/// The status says what the next step waits for, until it is applied.
#[test]
fn ranks_that_wait_for_captions_to_be_encoded_are_named() {
    let mut run = Run::training(vec![]);
    for (n, captions) in [(1, 70), (2, 30)] {
        run.say(n, from_worker::Body::Heartbeat(v1::Heartbeat { step: 0, encoding: Some(captions), ..Default::default() }));
    }
    assert_eq!(run.core.wait(), Some(Wait::Encoding { ranks: vec![Rank(0), Rank(1)], captions: 100 }));
    let reason = run.core.status(run.now).reason;
    assert!(reason.contains("100") && reason.contains("0, 1"), "{reason}");
    run.say(1, from_worker::Body::Heartbeat(v1::Heartbeat::default()));
    assert_eq!(run.core.wait(), Some(Wait::Encoding { ranks: vec![Rank(1)], captions: 30 }));
    run.say(2, from_worker::Body::Progress(progress(1, 4)));
    assert_eq!(run.core.wait(), None);
}

#[test]
fn skipped_samples_are_counted_by_reason_and_reasons_are_bounded() {
    let mut run = Run::training(vec![]);
    let skipped = |name: String, n| v1::Progress { skipped: [(name, n)].into(), ..v1::Progress::default() };
    run.say(1, from_worker::Body::Progress(skipped("torn_image".into(), 2)));
    run.say(2, from_worker::Body::Progress(skipped("torn_image".into(), 3)));
    assert_eq!(run.count("skipped_torn_image"), 5);
    for n in 0..500 {
        run.say(2, from_worker::Body::Progress(skipped(format!("reason {n}"), 1)));
    }
    run.say(2, from_worker::Body::Progress(skipped("x".repeat(1000), 1)));
    assert!(run.core.status(run.now).counts.len() <= MOST_NAMES + 1);
    assert!(run.count("other") > 0);
}

/// Any number is what a worker may send.
#[test]
fn what_workers_count_is_summed_up_without_a_turn_to_zero() {
    let mut run = Run::training(vec![]);
    for n in [1, 2] {
        let beat = v1::Heartbeat { encoding: Some(u64::MAX - 1), counts: [("kept".to_owned(), u64::MAX)].into(), ..Default::default() };
        run.say(n, from_worker::Body::Heartbeat(beat));
    }
    assert_eq!(run.count("kept"), u64::MAX);
    assert_eq!(run.core.wait(), Some(Wait::Encoding { ranks: vec![Rank(0), Rank(1)], captions: u64::MAX }));
}

#[test]
fn progress_out_of_turn_is_refused() {
    let mut run = Run::assigned(vec![]);
    run.say(1, from_worker::Body::Progress(progress(1, 4)));
    assert_eq!(run.count("refused_out_of_turn"), 1);
    let mut run = Run::training(vec![]);
    run.say(1, from_worker::Body::Progress(progress(11, 4)));
    assert_eq!(run.count("refused_out_of_turn"), 1);
    run.say(1, from_worker::Body::Progress(progress(2, 4)));
    assert_eq!(run.say(1, from_worker::Body::Progress(progress(2, 4))), vec![]);
    assert_eq!(run.count("refused_old_step"), 1);
}

#[test]
fn what_all_ranks_read_is_counted_and_told_with_rank_0s_next_step() {
    let mut run = Run::training(vec![]);
    let read = |step, hits| v1::Progress { read: [("cache_hits".to_owned(), hits)].into(), ..progress(step, 4) };
    assert_eq!(run.say(2, from_worker::Body::Progress(read(1, 5))), vec![]);
    assert_eq!(run.say(1, from_worker::Body::Progress(read(1, 2))), vec![Effect::Metric(read(1, 7))]);
    assert_eq!(run.say(1, from_worker::Body::Progress(progress(2, 4))), vec![Effect::Metric(progress(2, 4))]);
    assert_eq!(run.count("cache_hits"), 7);
}

/// Pictures of the last step are drawn after it, and before its commit: no later step tells of them.
#[test]
fn what_ranks_tell_after_the_last_step_is_written_down_with_it() {
    let mut run = Run::training(vec![]);
    let read = |of: v1::Progress, pictures| v1::Progress { read: [("pictures_saved".to_owned(), pictures)].into(), ..of };
    let drew = |pictures| from_worker::Body::Progress(read(v1::Progress { step: 10, ..v1::Progress::default() }, pictures));
    assert_eq!(run.say(1, from_worker::Body::Progress(progress(10, 4))), vec![]);
    assert_eq!((run.say(1, drew(2)), run.say(2, drew(1))), (vec![], vec![]));
    run.report_commit(10);
    let effects = run.event(Event::Appended(Body::Commit(commit_at(10, TERM))));
    assert_eq!(effects.first(), Some(&Effect::Metric(read(progress(10, 4), 3))));
    let mut left = Run::training(vec![]);
    left.say(1, from_worker::Body::Progress(progress(10, 4)));
    assert!(left.event(Event::Leave("now".into())).contains(&Effect::Metric(progress(10, 4))));
}

/// The newest step may be lost with the rank that told of it.
#[test]
fn the_count_goes_back_to_where_a_generation_begins() {
    let mut run = Run::training(vec![commit_at(4, 2)]);
    for step in 5..8 {
        run.say(1, from_worker::Body::Progress(progress(step, 4)));
    }
    run.close(1);
    run.say(2, idle(Some(6)));
    let status = run.core.status(run.now);
    assert_eq!((status.step, status.samples, status.samples_per_second), (6, 24, 0.0));
    run.go_on(6, &[2]);
    assert_eq!(run.say(2, from_worker::Body::Progress(progress(7, 4))), vec![Effect::Metric(progress(7, 4))]);
    assert_eq!(run.core.status(run.now).samples, 28);
    // Nobody has the state any more: back to the commit, which knows exactly.
    run.close(2);
    run.come(3);
    let status = run.core.status(run.now);
    assert_eq!((status.step, status.samples), (4, 16));
}

fn missed(step: u64) -> from_worker::Body {
    from_worker::Body::Progress(v1::Progress { missed: true, ..progress(step, 4) })
}

/// How many steps are written down.
fn kept(effects: Vec<Effect>) -> usize {
    effects.into_iter().filter(|effect| matches!(effect, Effect::Metric(_))).count()
}

/// Steps that were applied while nobody listened are kept once, and do not hold up those that come after.
#[test]
fn steps_that_nobody_wrote_down_are_kept_when_they_are_told() {
    let mut run = Run::training(vec![]);
    assert_eq!(kept(run.say(1, from_worker::Body::Progress(progress(1, 4)))), 1);
    let told: Vec<usize> = [1, 2, 3, 3].map(|step| kept(run.say(1, missed(step)))).to_vec();
    assert_eq!(told, [0, 1, 1, 0], "what is written down already is not again");
    assert_eq!(
        kept(run.event(Event::Message(conn(1), FromWorker { term: TERM, generation: 99, body: Some(missed(4)) }))),
        1,
        "whatever generation its teller is in now"
    );
    assert_eq!(kept(run.say(1, from_worker::Body::Progress(progress(5, 4)))), 1);
    assert_eq!(kept(run.say(1, missed(1_000_000))), 0, "no step of the run");
    assert_eq!(kept(run.say(2, missed(7))), 0, "a state that the run has not come to");
    assert_eq!(kept(run.say(2, missed(5))), 0);
    let status = run.core.status(run.now);
    let totals = status.totals.unwrap();
    assert_eq!((status.step, status.samples, totals.steps, totals.steps_missed, totals.samples), (5, 20, 2, 3, 8));
}

/// No worker was reached, and all trained on: nobody has a rank when the first of them is back.
#[test]
fn steps_that_were_taken_while_all_were_cut_off_are_kept() {
    let mut run = Run::training(vec![]);
    assert_eq!(kept(run.say(1, from_worker::Body::Progress(progress(1, 4)))), 1);
    run.close(1);
    run.close(2);
    run.hello(2);
    assert_eq!([2, 3, 1_000_000].map(|step| kept(run.say(2, missed(step)))), [1, 1, 0]);
    assert_eq!((run.core.status(run.now).step, run.count("refused_out_of_turn")), (3, 1));
}

#[test]
fn what_only_rises_is_summed_up() {
    let mut run = Run::training(vec![]);
    let parts = v1::StepParts { forward: 0.25, commit: 0.5, ..v1::StepParts::default() };
    for (step, seconds) in [(1, 0.75), (2, 0.001), (3, 5000.0)] {
        let told = v1::Progress { parts: Some(parts), step_seconds: seconds, grad_norm: 2.0, ..progress(step, 4) };
        run.say(1, from_worker::Body::Progress(told));
    }
    let vitals = v1::Vitals { memory_bytes: 7, ..v1::Vitals::default() };
    let counts = [("store_retried_get_timeout".to_owned(), 2)].into();
    run.say(2, from_worker::Body::Heartbeat(v1::Heartbeat { vitals: Some(vitals), counts, ..v1::Heartbeat::default() }));
    let status = run.core.status(run.now);
    let totals = status.totals.unwrap();
    assert_eq!((totals.steps, totals.samples, totals.workers_joined, totals.generations), (3, 12, 2, 1));
    assert_eq!((totals.step_seconds, totals.parts.unwrap().forward, totals.parts.unwrap().commit), (5000.751, 0.75, 1.5));
    assert_eq!((totals.step_buckets[0], totals.step_buckets[7], totals.step_buckets[17]), (1, 1, 1), "{:?}", totals.step_buckets);
    assert_eq!((status.newest.unwrap().grad_norm, status.workers_wanted), (2.0, 2));
    assert_eq!((status.workers[1].vitals.unwrap().memory_bytes, status.counts["store_retried_get_timeout"]), (7, 2));
}
