//! Hello: welcomes, refusals, and the first generation.

use super::*;
use ella_proto::ids::Rank;

fn refused(run: &Run, n: u64, worker: &str, reason: v1::RefusedReason, detail: &str) -> Vec<Effect> {
    let outcome = if reason == v1::RefusedReason::RunOver { v1::Outcome::Preempted } else { v1::Outcome::Unspecified };
    let refused = v1::Refused { reason: reason.into(), detail: detail.into(), outcome: outcome.into(), permanent: false };
    vec![
        run.to(n, to_worker::Body::Refused(refused)),
        Effect::Close(conn(n)),
        Effect::Note(Note::Refused { worker: worker.into(), why: detail.into() }),
    ]
}

#[test]
fn a_worker_is_welcomed_and_the_run_says_what_it_waits_for() {
    let mut run = Run::new(config(2), vec![]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 0, need: 2 }));
    let effects = run.hello(1);
    let welcome = run.to(1, to_worker::Body::Welcome(config(2).welcome));
    let note = Note::Attached { worker: "w1".into(), device: "cpu".into(), have: 1, need: 2 };
    assert_eq!(effects, vec![welcome, Effect::Note(note)]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 1, need: 2 }));
    let status = run.core.status(Time(40));
    assert_eq!((status.phase.as_str(), status.reason.as_str()), ("waiting", "waiting for workers: 1 of 2 are here"));
    let worker = &status.workers[0];
    assert_eq!((worker.silent_ms, worker.state.as_str(), worker.leaving), (40, "loading", false));
}

#[test]
fn a_run_waits_for_those_that_are_here_to_load() {
    let mut run = Run::new(config(2), vec![]);
    run.hello(1);
    run.hello(2);
    assert_eq!(run.say(1, idle(None)), vec![]);
    assert_eq!(run.core.wait(), Some(Wait::Models { workers: vec![who(2, None)] }));
    let status = run.core.status(run.now);
    assert_eq!(status.reason, "waiting for workers to load their models: worker w2 (host h2, pid 2)");
    assert_eq!(status.workers.iter().map(|worker| worker.state.as_str()).collect::<Vec<_>>(), ["spare", "loading"]);
}

#[test]
fn when_enough_have_loaded_a_generation_is_formed_and_all_get_their_places() {
    let mut run = Run::new(config(2), vec![commit_at(4, 2)]);
    run.hello(2);
    run.hello(1);
    assert_eq!(run.say(2, idle(None)), vec![]);
    let effects = run.say(1, idle(None));
    let session = run.core.session();
    let assign = |rank: u32| {
        to_worker::Body::Assign(v1::Assign {
            rank,
            next: format!("10.0.0.{}:4000", 2 - rank),
            world: 2,
            commit_json: serde_json::to_vec(&commit_at(4, 2)).unwrap(),
            session: session.clone(),
            source: None,
            step: 4,
            copy: false,
        })
    };
    // Ranks go by the order in which streams were opened.
    let note = Note::Generation { generation: 1, workers: vec!["w1".into(), "w2".into()], from_step: 4 };
    assert_eq!(effects, vec![run.to(1, assign(0)), run.to(2, assign(1)), Effect::Note(note)]);
    assert_eq!(run.core.phase(), &Phase::Starting { until: Time(10_000) });
    assert_eq!(run.core.wait(), Some(Wait::Loading { ranks: vec![Rank(0), Rank(1)], reason: String::new() }));
}

/// A run begins with all that it is to have, also if that is more than it goes on with.
#[test]
fn no_run_begins_with_fewer_than_it_is_to_have() {
    for commits in [vec![], vec![commit_at(4, 2)]] {
        let mut run = Run::new(config(3), commits);
        run.come(1);
        assert_eq!(run.come(2), vec![]);
        assert_eq!(run.come(3).len(), 4, "three places and a note");
    }
}

#[test]
fn workers_that_do_not_fit_are_refused_with_the_reason_and_counted() {
    use v1::RefusedReason as R;
    let gpu = |n: u64, uuid: &str| Hello { device_kind: "cuda".into(), device_uuid: uuid.into(), ..hello(n) };
    let mut run = Run::new(config(3), vec![]);
    run.hello_as(1, gpu(1, "GPU-1"));
    let holder = "worker w1 (host h1, pid 1)";
    let cases = [
        (
            Hello { version: "2".into(), ..gpu(9, "G") },
            R::Version,
            "refused_version",
            "this worker has version 2, the coordinator 1; start workers of the same version".to_owned(),
        ),
        (
            Hello { config_digest: "x".into(), ..gpu(9, "G") },
            R::Config,
            "refused_config",
            format!(
                "this worker was started for config x, but the coordinator has {}; start it with that config, or with none",
                hex("config")
            ),
        ),
        (
            gpu(9, "GPU-1"),
            R::DuplicateDevice,
            "refused_duplicate_device",
            format!("device GPU-1 is already used by {holder}; give each worker a device of its own"),
        ),
        (
            hello(9),
            R::DeviceKind,
            "refused_device_kind",
            "this worker computes on cpu, others of this run on cuda, and all must have one kind of device; see `ella doctor` there, or name the kind in \
             workers.device"
                .to_owned(),
        ),
        (
            Hello { worker_id: "w1".into(), ..gpu(9, "GPU-1") },
            R::DuplicateWorker,
            "refused_duplicate_worker",
            format!("the worker id is already used by {holder}; each process must make its own"),
        ),
    ];
    for (hello, reason, counter, detail) in cases {
        let worker = hello.worker_id.clone();
        let effects = run.hello_as(9, hello);
        assert_eq!(effects, refused(&run, 9, &worker, reason, &detail));
        assert_eq!(run.count(counter), 1);
    }
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 1, need: 3 }), "nobody was harmed");
}

#[test]
fn malformed_hellos_are_refused_with_the_rule() {
    let mut run = Run::new(config(2), vec![]);
    let cases = [
        (Hello { worker_id: String::new(), ..hello(9) }, "Hello.worker_id must not be empty"),
        (Hello { device_kind: "abacus".into(), ..hello(9) }, "Hello.device_kind must be \"cpu\" or \"cuda\""),
        (Hello { device_kind: "cuda".into(), ..hello(9) }, "Hello.device_uuid must name the GPU"),
        (Hello { peer_address: "host".into(), ..hello(9) }, "Hello.peer_address must be host:port"),
        (Hello { peer_address: "host:0".into(), ..hello(9) }, "Hello.peer_address must be host:port"),
        (Hello { place: Some(place(2, 1, 1, 1, 0)), ..hello(9) }, "Hello.place.rank must be below its world"),
        (Hello { place: Some(place(2, u64::MAX, 0, 1, 0)), ..hello(9) }, "Hello.place.generation must be below 2^53"),
        (Hello { host: "x".repeat(300), ..hello(9) }, "no text in Hello may be longer than 256 bytes"),
    ];
    for (n, (hello, rule)) in cases.into_iter().enumerate() {
        let worker = hello.worker_id.clone();
        let effects = run.hello_as(9, hello);
        assert_eq!(effects, refused(&run, 9, &worker, v1::RefusedReason::Malformed, rule));
        assert_eq!(run.count("refused_malformed"), n as u64 + 1);
    }
}

#[test]
fn a_stranger_that_does_not_say_hello_is_refused() {
    let mut run = Run::new(config(2), vec![]);
    let effects = run.say(9, from_worker::Body::Heartbeat(v1::Heartbeat { step: 1, ..Default::default() }));
    assert_eq!(effects, refused(&run, 9, "", v1::RefusedReason::Malformed, "the first message must be Hello"));
}

#[test]
fn more_than_a_run_may_have_are_spares_and_there_is_no_second_hello() {
    let mut run = Run::new(CoreConfig { max: 2, ..config(2) }, vec![]);
    for n in [1, 2, 3] {
        run.hello(n);
    }
    run.say(3, idle(None));
    let effects = run.say(2, idle(None));
    assert_eq!(run.places(&effects).iter().map(|place| place.0).collect::<Vec<_>>(), [2, 3], "whoever has loaded first");
    assert_eq!(run.say(1, idle(None)), vec![]);
    run.until(5_000, &[1, 2, 3]);
    assert!(matches!(run.core.phase(), Phase::Starting { .. }));
    let states: Vec<String> = run.core.status(run.now).workers.into_iter().map(|worker| worker.state).collect();
    assert_eq!(states, ["spare", "rank", "rank"]);
    assert_eq!(run.hello(1), vec![]);
    assert_eq!(run.count("refused_second_hello"), 1);
}

/// Its process is another one, so it is another worker, whatever it says.
#[test]
fn a_worker_that_attaches_again_takes_its_own_place_and_nobody_elses() {
    let mut run = Run::new(config(2), vec![]);
    run.hello(1);
    let effects = run.hello_as(2, hello(1));
    let welcome = run.to(2, to_worker::Body::Welcome(config(2).welcome));
    let attached = Note::Attached { worker: "w1".into(), device: "cpu".into(), have: 2, need: 2 };
    let left = Note::Left { worker: "w1".into(), why: "it attached again, and had left its generation".into() };
    assert_eq!(effects, vec![welcome, Effect::Note(attached), Effect::Close(conn(1)), Effect::Note(left)]);
    assert_eq!(run.core.wait(), Some(Wait::Workers { have: 1, need: 2 }));
    assert_eq!(run.close(1), vec![], "the old stream is a stranger's");
}

#[test]
fn nobody_is_taken_in_when_the_run_is_over() {
    let mut run = Run::training(vec![]);
    run.event(Event::Leave("twice".into()));
    let effects = run.hello(3);
    assert_eq!(effects, refused(&run, 3, "w3", v1::RefusedReason::RunOver, "the run is over (preempted)"));

    let mut run = Run::training(vec![]);
    run.event(Event::Superseded(Term(4)));
    let effects = run.hello(3);
    let detail = "this coordinator has been superseded; attach to the new one";
    assert_eq!(effects, refused(&run, 3, "w3", v1::RefusedReason::Superseded, detail));
}

/// Whoever starts it again would do so for ever (`--stay`).
#[test]
fn who_comes_to_a_run_that_failed_for_good_is_told_that_it_did() {
    for permanent in [true, false] {
        let mut run = Run::training(vec![]);
        let failed = v1::Failed { kind: v1::FailureKind::Input.into(), message: "no such model".into(), permanent: true };
        let event = if permanent { from_worker::Body::Failed(failed) } else { from_worker::Body::Heartbeat(v1::Heartbeat::default()) };
        run.say(1, event);
        run.event(Event::AppendFailed("disk full".into()));
        let refused = run.hello(3).into_iter().find_map(|effect| match effect {
            Effect::Send(_, ToWorker { body: Some(to_worker::Body::Refused(refused)), .. }) => Some(refused),
            _ => None,
        });
        assert_eq!(refused.map(|refused| (refused.outcome(), refused.permanent)), Some((v1::Outcome::Failed, permanent)));
    }
}

#[test]
fn a_run_that_gets_too_few_workers_fails_at_its_deadline() {
    let mut run = Run::new(config(2), vec![]);
    run.come(1);
    run.until(9_999, &[1]);
    assert!(!run.core.phase().is_over());
    run.until(10_000, &[1]);
    assert_eq!(run.failure(), Failure::TooFew { have: 1, need: 2, waited_ms: 10_000 });
    assert!(!run.failure().permanent());
}

/// Loading has as long as coming, once.
#[test]
fn a_worker_that_does_not_load_is_named_at_the_deadline() {
    let mut run = Run::new(config(2), vec![]);
    run.come(1);
    run.until(9_000, &[1]);
    run.hello(2);
    run.until(18_000, &[1, 2]);
    run.close(1);
    run.hello(3);
    run.until(18_999, &[2, 3]);
    assert!(!run.core.phase().is_over());
    run.until(19_000, &[2, 3]);
    assert_eq!(run.failure(), Failure::NotReady { who: who(2, None), waited_ms: 10_000 });
}

/// It is set up wrongly; the run, which knows better by now, goes on without it.
#[test]
fn a_joiner_with_another_data_set_is_refused_before_it_has_a_place() {
    let mut run = Run::training(vec![]);
    run.hello(3);
    let other = v1::Idle { data_digest: hex("other"), models_digest: hex("models"), ..v1::Idle::default() };
    let effects = run.say(3, from_worker::Body::Idle(other));
    let detail = format!(
        "this worker has {} as its data set digest, the run {}; all workers, and every resume, must read the data set that the run began with",
        hex("other"),
        hex("data")
    );
    let refused = v1::Refused { reason: v1::RefusedReason::Data.into(), detail: detail.clone(), ..v1::Refused::default() };
    let note = Note::Refused { worker: "w3".into(), why: detail };
    assert_eq!(effects, vec![run.to(3, to_worker::Body::Refused(refused)), Effect::Close(conn(3)), Effect::Note(note)]);
    assert_eq!((run.count("refused_data"), run.core.phase()), (1, &Phase::Training));
    run.hello(4);
    let same = v1::Idle { data_digest: hex("data"), models_digest: hex("models"), ..v1::Idle::default() };
    assert_eq!(run.say(4, from_worker::Body::Idle(same)), vec![]);
}

fn gpu(n: u64) -> Hello {
    Hello { device_kind: "cuda".into(), device_uuid: format!("GPU-{n}"), ..hello(n) }
}

/// A worker that computes with other operators than the others.
fn odd(n: u64) -> Hello {
    Hello { computes: [("fused operators".to_owned(), "norm".to_owned())].into(), ..hello(n) }
}

fn trained_on(device: &str) -> Commit {
    Commit { computed_with: [("device".to_owned(), device.to_owned())].into(), ..commit_at(4, 2) }
}

/// What a worker that is turned away is told: of what kind, in words, and whether for good.
fn turned_away(effects: &[Effect]) -> Option<(v1::RefusedReason, String, bool)> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send(_, ToWorker { body: Some(to_worker::Body::Refused(refused)), .. }) => {
            Some((refused.reason(), refused.detail.clone(), refused.permanent))
        }
        _ => None,
    })
}

/// What is told of ranks that may compute other bits.
fn unlike(effects: &[Effect]) -> Vec<String> {
    let how = |effect: &Effect| if let Effect::Note(Note::Unlike { how, .. }) = effect { Some(how.clone()) } else { None };
    effects.iter().filter_map(how).collect()
}

/// Who comes first is of chance, and a worker whose GPU can't be used comes soonest.
#[test]
fn before_anything_is_trained_workers_without_a_gpu_make_way_for_those_with_one() {
    let mut run = Run::new(config(2), vec![]);
    run.come(1);
    let (reason, detail, permanent) = turned_away(&run.hello_as(2, gpu(2))).unwrap();
    assert!(reason == v1::RefusedReason::DeviceKind && !permanent && detail.contains("on cpu, others of this run on cuda"), "{detail}");
    assert_eq!((run.core.attached(), run.count("refused_device_kind")), (1, 1));
    // What it said before it heard of that, and its end, are nobody's.
    assert_eq!(run.say(1, from_worker::Body::Heartbeat(v1::Heartbeat::default())), vec![]);
    assert_eq!(run.close(1), vec![]);
    assert_eq!(turned_away(&run.hello(3)).map(|(.., permanent)| permanent), Some(false));
    run.say(2, idle(None));
    run.hello_as(4, gpu(4));
    let effects = run.say(4, idle(None));
    assert_eq!(run.places(&effects).iter().map(|place| place.0).collect::<Vec<_>>(), [2, 4]);
    // Those that have places keep them.
    let mut run = Run::assigned(vec![]);
    assert_eq!(turned_away(&run.hello_as(3, gpu(3))).map(|(.., permanent)| permanent), Some(false));
}

/// A worker whose GPU is gone is started again, and would go on by itself on the processor, with other bits.
#[test]
fn a_run_keeps_to_the_kind_of_device_that_it_was_trained_on() {
    let mut run = Run::new(config(1), vec![]);
    run.hello_as(1, gpu(1));
    run.say(1, idle(None));
    run.say(1, from_worker::Body::Ready(ready(0)));
    assert_eq!(run.core.phase(), &Phase::Training);
    run.close(1);
    let (reason, detail, permanent) = turned_away(&run.hello(2)).unwrap();
    assert!(reason == v1::RefusedReason::DeviceKind && permanent, "{detail}");
    assert!(
        detail.starts_with("this worker computes on cpu, and the run was trained on cuda") && detail.contains("workers.device = \"cpu\"")
    );
    assert!(turned_away(&run.hello_as(3, gpu(3))).is_none());

    let refused = |mut run: Run, hello: Hello| turned_away(&run.hello_as(9, hello)).map(|(.., permanent)| permanent);
    assert_eq!(refused(Run::new(config(1), vec![trained_on("cuda")]), hello(9)), Some(true));
    assert_eq!(refused(Run::new(config(1), vec![trained_on("cpu")]), gpu(9)), Some(true));
    assert_eq!(refused(Run::new(config(1), vec![trained_on("cuda")]), gpu(9)), None);
    let of_before = Commit { computed_with: BTreeMap::new(), ..commit_at(4, 2) };
    assert_eq!(refused(Run::new(config(1), vec![of_before]), hello(9)), None);
    let named = CoreConfig { device: Some("cpu".into()), ..config(1) };
    assert_eq!(refused(Run::new(named, vec![]), gpu(9)), Some(true));
}

#[test]
fn a_run_goes_on_with_another_kind_of_device_where_its_config_names_it() {
    let named = CoreConfig { device: Some("cpu".into()), ..config(1) };
    let mut run = Run::new(named, vec![trained_on("cuda")]);
    run.come(1);
    let effects = run.say(1, from_worker::Body::Ready(ready(4)));
    assert_eq!(unlike(&effects), ["it computes otherwise than the commit of step 4: device is `cpu` instead of `cuda`"]);
    assert_eq!((run.core.phase(), run.count("ranks_unlike")), (&Phase::Training, 1));
}

/// Other operators give other bits, of which no commit's digest tells: all ranks have the same sums.
#[test]
fn ranks_that_compute_otherwise_than_others_train_and_that_is_told() {
    let mut run = Run::new(config(2), vec![]);
    run.come(1);
    run.hello_as(2, odd(2));
    run.say(2, idle(None));
    run.say(1, from_worker::Body::Ready(ready(0)));
    let effects = run.say(2, from_worker::Body::Ready(ready(0)));
    let how = "it computes otherwise than rank 0: fused operators is `norm` instead of unknown; unlike rank 0 are 1 of 2 ranks";
    assert_eq!(unlike(&effects), [how]);
    assert_eq!(run.core.phase(), &Phase::Training);
}
