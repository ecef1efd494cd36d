//! The run log: what it accepts, what it refuses, and who wins.

#![allow(clippy::unwrap_used, reason = "what fails to unwrap fails the test")]

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use ella_store::faulty::{Failure, Faults};
use ella_store::log::record_key;
use ella_store::{
    Body, Commit, Digest, LedgerEpoch, Limits, LogError, Operation, Outcome, Part, Record, RunLog, RunState, Store, Term,
    collect_leftovers, commit_folder, remove_leftovers, verify_commit,
};
use proptest::prelude::*;

fn term() -> Term {
    Term { host: "h".into(), version: "1".into(), config_digest: Digest::of(b"config") }
}

fn part(name: &str, bytes: &[u8]) -> Part {
    Part { name: name.into(), bytes: bytes.len() as u64, blake3: Digest::of(bytes) }
}

fn commit(step: u64, term: u64) -> Commit {
    Commit {
        step,
        generation: 1,
        world: 2,
        folder: commit_folder(step, term, 1),
        parts: vec![part("connector.safetensors", b"weights"), part("optimizer.safetensors", b"")],
        config_digest: Digest::of(b"config"),
        data_digest: Digest::of(b"data"),
        models_digest: Digest::of(b"models"),
        epoch: 1,
        step_in_epoch: step % 7,
        ledger: vec![LedgerEpoch { epoch: 0, samples: u64::MAX, hash: "0123456789abcdef".repeat(2) }],
        state_digest: Digest::of(b"state"),
        computed_with: [("device".to_owned(), "cuda".to_owned())].into(),
    }
}

fn end(outcome: Outcome) -> Body {
    Body::End { outcome, step: 9, reason: "because".into() }
}

async fn claim(store: &Store, nonce: &str) -> (RunLog, Vec<Record>) {
    RunLog::claim(store, term(), nonce, 1).await.unwrap()
}

fn memory() -> Store {
    Store::in_memory()
}

/// Runs of before go on.
#[test]
fn a_commit_that_does_not_say_what_computed_it_is_read() {
    let unsaid = Commit { computed_with: Default::default(), ..commit(1, 1) };
    let text = serde_json::to_string(&unsaid).unwrap();
    assert!(
        !text.contains("computed_with") && serde_json::to_string(&commit(1, 1)).unwrap().contains(r#""computed_with":{"device":"cuda"}"#)
    );
    assert_eq!(serde_json::from_str::<Commit>(&text).unwrap(), unsaid);
}

#[test]
fn an_epoch_that_is_not_listed_is_as_the_one_before_it() {
    let entry = |epoch, samples| LedgerEpoch { epoch, samples, hash: format!("{epoch:032x}") };
    let with = |ledger: &[LedgerEpoch]| Commit { ledger: ledger.to_vec(), ..commit(1, 1) };
    let of = |commit: &Commit| (0..7).map(|epoch| commit.of_epoch(epoch).map(|used| (used.epoch, used.samples))).collect::<Vec<_>>();
    let (some, all) = (with(&[entry(0, 5), entry(4, 6), entry(5, 2)]), with(&[entry(0, 5), entry(1, 5), entry(2, 2)]));
    assert_eq!(of(&some), [[Some((0, 5)); 4].as_slice(), &[Some((4, 6)), Some((5, 2)), None]].concat());
    assert_eq!(of(&all), [Some((0, 5)), Some((1, 5)), Some((2, 2)), None, None, None, None]);
    assert_eq!([some.samples(), all.samples(), with(&[]).samples()], [28, 12, 0]);
    // Nothing of before the first one, and of nonsense no more than there is.
    assert_eq!(of(&with(&[entry(2, 3)]))[..4], [None, None, Some((2, 3)), None]);
    assert_eq!(with(&[entry(0, 9), entry(u64::MAX, 1)]).samples(), u64::MAX);
}

#[tokio::test]
async fn what_is_appended_is_read_again() {
    let store = memory();
    assert_eq!(RunLog::read(&store).await.unwrap(), []);
    let (mut log, records) = claim(&store, "a").await;
    assert_eq!((log.term(), log.next_seq(), records.len()), (1, 1, 1));
    let bodies = [
        Body::Commit(commit(10, 1)),
        Body::Commit(commit(20, 1)),
        Body::Retire { commits: vec![commit_folder(10, 1, 1)] },
        end(Outcome::Preempted),
    ];
    for (index, body) in bodies.iter().enumerate() {
        assert_eq!(log.append(body.clone(), 100 + index as u64).await.unwrap(), index as u64 + 1);
    }
    let read = RunLog::read(&store).await.unwrap();
    assert_eq!(read.iter().skip(1).map(|record| record.body.clone()).collect::<Vec<_>>(), bodies);
    assert!(read.iter().all(|record| record.term == 1 && record.nonce == "a"));
    let (next, all) = claim(&store, "b").await;
    assert_eq!((next.term(), next.next_seq()), (2, 6));
    assert_eq!(all[..5], read);
}

#[tokio::test]
async fn the_state_is_what_the_records_say() {
    let store = memory();
    let (mut log, _) = claim(&store, "a").await;
    for step in [10, 20, 30] {
        log.append(Body::Commit(commit(step, 1)), 2).await.unwrap();
    }
    log.append(Body::Retire { commits: vec![commit_folder(10, 1, 1)] }, 3).await.unwrap();
    let state = RunState::from_records(&RunLog::read(&store).await.unwrap());
    assert_eq!(state.commits.iter().map(|commit| commit.step).collect::<Vec<_>>(), [20, 30]);
    assert_eq!(state.last_commit().unwrap().step, 30);
    assert_eq!((state.term, state.is_over(), state.is_done()), (1, false, false));
    assert_eq!(state.retired, BTreeSet::from([commit_folder(10, 1, 1)]));
    log.append(end(Outcome::Done), 4).await.unwrap();
    let (_, records) = claim(&store, "b").await;
    let state = RunState::from_records(&records);
    assert_eq!((state.term, state.is_over(), state.is_done()), (2, false, true));
    let ended = state.ended.unwrap();
    assert_eq!((ended.term, ended.outcome, ended.step, ended.at_unix_ms), (1, Outcome::Done, 9, 4));
    assert_eq!(RunState::from_records(&[]), RunState::default());
}

#[tokio::test]
async fn whoever_finds_its_number_taken_is_superseded_for_good() {
    let store = memory();
    let (mut old, _) = claim(&store, "old").await;
    let (mut new, _) = claim(&store, "new").await;
    for _ in 0..2 {
        match old.append(Body::Commit(commit(10, 1)), 2).await {
            Err(error @ LogError::Superseded { seq: 1, by_term: 2, .. }) => assert!(error.to_string().contains("term 2"), "{error}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(new.append(end(Outcome::Done), 2).await.unwrap(), 2);
    assert_eq!(RunLog::read(&store).await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_body_that_could_not_be_read_again_is_not_written() {
    let store = memory();
    let (mut log, _) = claim(&store, "a").await;
    type Spoil = fn(&mut Commit);
    let bad: [(&str, Spoil); 8] = [
        ("expected \"commits/000000000010.1\"", |c| c.folder = commit_folder(11, 1, 1)),
        ("expected \"commits/000000000010.1\"", |c| c.folder = commit_folder(10, 2, 1)),
        ("expected \"commits/000000000010.1\"", |c| c.folder = "commits/../../x".into()),
        ("no parts", |c| c.parts.clear()),
        ("named twice", |c| c.parts = vec![part("x", b""), part("x", b"")]),
        ("plain file name", |c| c.parts[0].name = "../x".into()),
        ("plain file name", |c| c.parts[0].name = String::new()),
        ("32 lower-case hex digits", |c| c.ledger[0].hash = "ABC".into()),
    ];
    for (rule, spoil) in bad {
        let mut spoilt = commit(10, 1);
        spoil(&mut spoilt);
        let text = log.append(Body::Commit(spoilt), 2).await.unwrap_err().to_string();
        assert!(text.contains(rule) && text.contains("log/000000000001.json"), "{text}");
    }
    for body in [Body::Retire { commits: vec!["elsewhere".into()] }, Body::Term(term())] {
        assert!(matches!(log.append(body, 2).await, Err(LogError::Bad { .. })));
    }
    assert_eq!(RunLog::read(&store).await.unwrap().len(), 1);
}

/// A log of six records: two terms, two commits each.
async fn six() -> Store {
    let store = memory();
    for (nonce, number) in [("a", 1), ("b", 2)] {
        let (mut log, _) = claim(&store, nonce).await;
        for step in [10, 20] {
            log.append(Body::Commit(commit(step * number, number)), 2).await.unwrap();
        }
    }
    store
}

#[tokio::test]
async fn a_removed_record_is_an_error_that_names_it() {
    for seq in 0..5 {
        let store = six().await;
        store.delete(&record_key(seq)).await.unwrap();
        match RunLog::read(&store).await {
            Err(LogError::Gap { file, last: 5, .. }) => assert_eq!(file, record_key(seq)),
            other => panic!("{other:?}"),
        }
        assert!(RunLog::claim(&store, term(), "c", 3).await.is_err(), "a damaged log is not built upon");
    }
}

/// Else the folder would come back with the records from there on, and no run in it.
#[tokio::test]
async fn a_log_that_was_removed_takes_no_more_records() {
    let dir = tempfile::tempdir().unwrap();
    for store in [memory(), Store::open(dir.path().to_str().unwrap()).unwrap()] {
        let (mut log, _) = claim(&store, "a").await;
        log.append(Body::Commit(commit(10, 1)), 2).await.unwrap();
        for seq in 0..2 {
            store.delete(&record_key(seq)).await.unwrap();
        }
        match log.append(Body::Commit(commit(20, 1)), 3).await {
            Err(LogError::Gone { file, .. }) => assert_eq!(file, record_key(1)),
            other => panic!("{other:?}"),
        }
        assert_eq!(RunLog::read(&store).await.unwrap(), []);
    }
}

#[tokio::test]
async fn a_damaged_record_is_an_error_that_names_it() {
    let edits: [(u64, &str, &str, &str); 11] = [
        (1, "\"seq\": 1", "\"seq\": 2", "it says that it is number 2"),
        (1, "\"seq\": 1", "\"sequence\": 1", "unknown field `sequence`"),
        (1, "\"step\": 10,", "\"step\": 10, \"stop\": 1,", "unknown field `stop`"),
        (1, "\"world\": 2,", "", "missing field `world`"),
        (1, "\"commit\"", "\"comet\"", "unknown variant `comet`"),
        (1, "\"step\": 10,", "\"step\": 12,", "expected \"commits/000000000012.1\""),
        (1, "\"step\": 10,", "\"step\": -1,", "invalid value"),
        (2, "\"nonce\": \"a\"", "\"nonce\": \"b\"", "who holds the log"),
        (3, "\"term\": 2", "\"term\": 1", "expected a higher one"),
        (4, "\"term\": 2", "\"term\": 3", "expected term 2"),
        (0, "\"host\": \"h\"", "\"host\": \"h\", \"x\": 0", "unknown field `x`"),
    ];
    for (seq, from, to, rule) in edits {
        let store = six().await;
        let key = record_key(seq);
        let text = String::from_utf8(store.get(&key).await.unwrap().to_vec()).unwrap();
        assert!(text.contains(from), "{text}");
        store.put(&key, text.replacen(from, to, 1).into()).await.unwrap();
        match RunLog::read(&store).await {
            Err(LogError::Bad { file, reason, .. }) => assert!(file == key && reason.contains(rule), "{reason} (wanted {rule})"),
            other => panic!("{rule}: {other:?}"),
        }
    }
    for bytes in ["", "{", "[]", "\u{0}", "{}x"] {
        let store = six().await;
        store.put(&record_key(3), Bytes::from(bytes)).await.unwrap();
        assert!(matches!(RunLog::read(&store).await, Err(LogError::Bad { file, .. }) if file == record_key(3)));
    }
    for stray in ["log/notes.txt", "log/6.json", "log/sub/000000000006.json", "log/00000000000x.json", "log/18446744073709551615.json"] {
        let store = six().await;
        store.put(stray, Bytes::new()).await.unwrap();
        let error = RunLog::read(&store).await.unwrap_err();
        let told = error.to_string();
        assert!(matches!(error, LogError::Bad { file, .. } if file == stray));
        // No copy has it: one remedy, and no other.
        assert!(told.contains("remove it") && !told.contains("copy"), "{told}");
    }
}

#[tokio::test]
async fn a_log_that_does_not_begin_with_a_term_is_refused() {
    let store = memory();
    let record = Record { seq: 0, term: 0, nonce: String::new(), at_unix_ms: 0, body: end(Outcome::Failed) };
    store.put(&record_key(0), serde_json::to_vec(&record).unwrap().into()).await.unwrap();
    let read = RunLog::read(&store).await;
    assert!(matches!(read, Err(LogError::Bad { .. })), "{read:?}");
}

/// The names in the files are a format: others read them.
#[tokio::test]
async fn records_are_written_as_documented() {
    let record = Record { seq: 1, term: 2, nonce: "n".into(), at_unix_ms: 3, body: Body::Commit(commit(12_000, 2)) };
    let value = serde_json::to_value(&record).unwrap();
    assert_eq!(value["body"]["kind"], "commit");
    assert_eq!(value["body"]["folder"], "commits/000000012000.2");
    assert_eq!(value["body"]["parts"][1]["blake3"], "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
    assert_eq!(record_key(42), "log/000000000042.json");
    let value = serde_json::to_value(end(Outcome::Preempted)).unwrap();
    assert_eq!(value, serde_json::json!({"kind": "end", "outcome": "preempted", "step": 9, "reason": "because"}));
}

#[tokio::test]
async fn a_commit_is_verified_part_by_part() {
    let store = memory();
    let commit = commit(10, 1);
    let file = |name: &str| format!("{}/{name}", commit.folder);
    let (first, second) = (file("connector.safetensors"), file("optimizer.safetensors"));
    store.put(&first, Bytes::from_static(b"weights")).await.unwrap();
    store.put(&second, Bytes::new()).await.unwrap();
    verify_commit(&store, &commit).await.unwrap();
    for (bytes, what) in [(&b"weighty"[..], "wrong bytes (expected blake3"), (b"weight", "wrong size (expected 7 bytes, found 6)")] {
        store.put(&first, Bytes::from_static(bytes)).await.unwrap();
        let problems = verify_commit(&store, &commit).await.unwrap_err();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().starts_with(&first) && problems[0].to_string().contains(what), "{}", problems[0]);
    }
    store.delete(&second).await.unwrap();
    let problems = verify_commit(&store, &commit).await.unwrap_err();
    assert_eq!(problems.len(), 2);
    assert!(problems[1].to_string().contains("optimizer.safetensors: missing"), "{}", problems[1]);
    let faults = Faults::new();
    faults.push(Operation::Get, "connector", Failure::Denied, 1);
    store.put(&first, Bytes::from_static(b"weights")).await.unwrap();
    let problems = verify_commit(&faults.inject(&store), &commit).await.unwrap_err();
    assert!(problems[0].to_string().contains("get refused"), "{}", problems[0]);
}

#[tokio::test]
async fn leftovers_are_retired_folders_and_unrecorded_ones_of_earlier_terms() {
    let dir = tempfile::tempdir().unwrap();
    for store in [memory(), Store::open(dir.path().to_str().unwrap()).unwrap()] {
        let (mut log, _) = claim(&store, "a").await;
        for step in [10, 20] {
            log.append(Body::Commit(commit(step, 1)), 2).await.unwrap();
        }
        log.append(Body::Retire { commits: vec![commit_folder(10, 1, 1)] }, 3).await.unwrap();
        for folder in
            [commit_folder(10, 1, 1), commit_folder(20, 1, 1), commit_folder(30, 1, 1), commit_folder(30, 2, 1), "commits/mine".into()]
        {
            store.put(&format!("{folder}/x/y"), Bytes::new()).await.unwrap();
        }
        let (_, records) = claim(&store, "b").await;
        let state = RunState::from_records(&records);
        let leftovers = collect_leftovers(&store, &state, 2).await.unwrap();
        assert_eq!(leftovers, [commit_folder(10, 1, 1), commit_folder(30, 1, 1)]);
        remove_leftovers(&store, &leftovers).await.unwrap();
        assert_eq!(collect_leftovers(&store, &state, 2).await.unwrap(), [""; 0]);
        assert_eq!(store.folders("commits").await.unwrap(), [commit_folder(20, 1, 1), commit_folder(30, 2, 1), "commits/mine".into()]);
    }
}

/// What one coordinator did until it was superseded or had written all it wanted.
struct Stint {
    nonce: String,
    seqs: Vec<u64>,
    superseded: bool,
}

/// Claims, then appends `count` commits; stops when superseded.
async fn coordinator(store: Store, nonce: String, count: u64) -> Stint {
    let (mut log, _) = claim(&store, &nonce).await;
    let mut stint = Stint { nonce, seqs: vec![log.next_seq() - 1], superseded: false };
    for step in 1..=count {
        match log.append(Body::Commit(commit(step, log.term())), step).await {
            Ok(seq) => stint.seqs.push(seq),
            Err(LogError::Superseded { by_term, .. }) => {
                assert!(by_term > log.term(), "only a newer term supersedes");
                stint.superseded = true;
                break;
            }
            Err(error) => panic!("{error}"),
        }
    }
    stint
}

/// TERM: every number has one winner, who knows it; the loser stops; one who was not superseded wrote all it wanted.
async fn check_stints(store: &Store, stints: &[Stint], count: u64) {
    let records = RunLog::read(store).await.unwrap();
    for stint in stints {
        let own: Vec<u64> = records.iter().filter(|record| record.nonce == stint.nonce).map(|record| record.seq).collect();
        assert_eq!(own, stint.seqs, "{} knows what it wrote", stint.nonce);
        assert_eq!(stint.superseded, stint.seqs.len() as u64 != count + 1, "{}", stint.nonce);
    }
    assert_eq!(records.len(), stints.iter().map(|stint| stint.seqs.len()).sum::<usize>());
    let newest = records.last().unwrap();
    assert!(!stints.iter().find(|stint| stint.nonce == newest.nonce).unwrap().superseded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn racing_coordinators_on_real_threads_have_one_winner_per_number() {
    let dir = tempfile::tempdir().unwrap();
    let quick = Limits { first_pause: Duration::from_millis(1), ..Limits::default() };
    for round in 0..12 {
        let local = Store::open(dir.path().join(round.to_string()).to_str().unwrap()).unwrap();
        for store in [memory().with_limits(quick), local.with_limits(quick)] {
            let racing = (0..4).map(|racer| tokio::spawn(coordinator(store.clone(), format!("racer {racer}"), 5)));
            let stints = futures::future::try_join_all(racing).await.unwrap();
            check_stints(&store, &stints, 5).await;
        }
    }
}

fn failures() -> impl Strategy<Value = Failure> {
    prop_oneof![
        Just(Failure::Before),
        Just(Failure::LostReply),
        Just(Failure::Hang),
        Just(Failure::HangAfter),
        (1_u64..40_000).prop_map(|ms| Failure::Slow(Duration::from_millis(ms))),
    ]
}

fn scripts() -> impl Strategy<Value = Vec<(Failure, u32)>> {
    prop::collection::vec((failures(), 1_u32..3), 0..8)
}

/// Runs on a virtual clock: a hang costs no time.
fn on_virtual_clock<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(test)
}

/// The store, failing its creates and gets by script.
fn scripted(store: &Store, creates: &[(Failure, u32)], gets: &[(Failure, u32)]) -> Store {
    let faults = Faults::new();
    for &(failure, times) in creates {
        faults.push(Operation::Create, "log/", failure, times);
    }
    for &(failure, times) in gets {
        faults.push(Operation::Get, "log/", failure, times);
    }
    // However long the script, no call gives up.
    faults.inject(store).with_limits(Limits { overall: Duration::from_secs(86_400), ..Limits::default() })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Interleavings and failures come from the scripts; a failing case prints them.
    #[test]
    fn racing_coordinators_with_failing_stores_have_one_winner_per_number(racers in prop::collection::vec((scripts(), scripts()), 2..4)) {
        on_virtual_clock(async {
            let store = memory();
            let racing = racers.iter().enumerate().map(|(racer, (creates, gets))| {
                tokio::spawn(coordinator(scripted(&store, creates, gets), format!("racer {racer}"), 4))
            });
            let stints = futures::future::try_join_all(racing).await.unwrap();
            check_stints(&store, &stints, 4).await;
        });
    }

    /// A lone coordinator is never told that it was superseded, and never writes a commit twice, even when it gives up and appends again.
    #[test]
    fn lost_replies_make_neither_two_commits_nor_a_false_loser(creates in scripts(), gets in scripts(), patience in 1_u64..60) {
        on_virtual_clock(async {
            let store = memory();
            let faulty = scripted(&store, &creates, &gets).with_limits(Limits { overall: Duration::from_secs(patience), ..Limits::default() });
            let mut tries = 0;
            let (mut log, _) = loop {
                tries += 1;
                match RunLog::claim(&faulty, term(), &format!("try {tries}"), 1).await {
                    Ok(claimed) => break claimed,
                    Err(LogError::Store(error)) if error.is_retryable() && tries < 100 => {}
                    Err(error) => panic!("{error}"),
                }
            };
            for step in 1..=5 {
                let body = Body::Commit(commit(step, log.term()));
                let mut at = 0;
                while let Err(error) = log.append(body.clone(), at).await {
                    at += 1;
                    assert!(matches!(&error, LogError::Store(error) if error.is_retryable()) && at < 100, "{error}");
                }
            }
            let records = RunLog::read(&store).await.unwrap();
            let steps: Vec<u64> = RunState::from_records(&records).commits.iter().map(|commit| commit.step).collect();
            assert_eq!(steps, [1, 2, 3, 4, 5]);
        });
    }
}
