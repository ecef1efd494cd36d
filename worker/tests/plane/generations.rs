//! Generations, as a worker lives them: ended at once or at a boundary, begun anew with others, under one coordinator or the next.

use crate::coordinator::{Scripted, TERM, Worker, welcome};
use crate::session::{Heard, run_folder};
use crate::world::{RUNTIME, config, embedded};
use ella_proto::config::RunConfig;
use ella_proto::v1::from_worker::Body as Said;
use ella_proto::v1::to_worker::Body as Say;
use ella_proto::v1::{self, Outcome};
use ella_worker::train::Ending;
use std::sync::atomic::Ordering;

const STEPS: u64 = 40;

fn prepared(set: &[&str]) -> RunConfig {
    let steps = format!("train.steps={STEPS}");
    let config = config(&[&[steps.as_str(), "workers.count=2", "checkpoint.every=1000"], set].concat());
    embedded(&config);
    config
}

/// The last state that one worker alone comes to.
async fn alone(config: &RunConfig) -> v1::StateDigest {
    let (_folder, url) = run_folder();
    let (mut worker, _) = Scripted::start().await.training(config, &url, None).await;
    let (heard, finished) = Heard::of(&mut worker).await;
    assert_eq!(worker.committed(finished.step).await.unwrap(), Ending::Done);
    heard.states.last().unwrap().clone()
}

/// Workers that have loaded their models.
pub(crate) async fn idle(coordinator: &mut Scripted, config: &RunConfig, url: &str, count: usize) -> Vec<Worker> {
    let mut workers = Vec::new();
    for _ in 0..count {
        let mut worker = coordinator.worker().await;
        worker.say(welcome(config, url));
        let idle = worker.idle().await;
        assert_eq!((idle.step, idle.broken.as_str(), idle.data_digest.len(), idle.models_digest.len()), (None, "", 64, 64));
        workers.push(worker);
    }
    workers
}

fn peers(workers: &[Worker]) -> Vec<String> {
    workers.iter().map(|worker| worker.address.clone()).collect()
}

/// Has them train from a fresh start.
pub(crate) async fn begin(workers: &mut [Worker]) {
    let peers = peers(workers);
    (0..).zip(workers.iter_mut()).for_each(|(rank, worker)| worker.assign(rank, peers.clone(), None));
    for worker in workers.iter_mut() {
        worker.ready().await;
    }
    workers.iter().for_each(|worker| worker.say(Say::Start(v1::Start {})));
}

/// Has them go on from rank 0's state.
async fn go_on(workers: &mut [Worker], step: u64, copy: bool) {
    let peers = peers(workers);
    (0..).zip(workers.iter_mut()).for_each(|(rank, worker)| worker.next_place(rank, peers.clone(), (step, copy)));
    for worker in workers.iter_mut() {
        let ready = worker.ready().await;
        assert_eq!((ready.step, ready.state_digest.as_str()), (step, ""));
    }
    workers.iter().for_each(|worker| worker.say(Say::Start(v1::Start {})));
}

fn regroup(worker: &Worker, at_boundary: bool) {
    worker.say(Say::Regroup(v1::Regroup { at_boundary, reason: "a test".into() }));
}

async fn step_of(worker: &mut Worker) -> u64 {
    worker.idle().await.step.unwrap()
}

/// All of them train to the end, and report the same state.
async fn to_the_end(workers: Vec<Worker>, expected: &v1::StateDigest) {
    for mut worker in workers {
        let (heard, finished) = Heard::of(&mut worker).await;
        assert_eq!((finished.step, finished.outcome()), (STEPS, Outcome::Done));
        assert_eq!(heard.states.last(), Some(expected), "SAME");
        assert_eq!(worker.committed(STEPS).await.unwrap(), Ending::Done);
    }
}

/// The folders of commits, which nobody writes into while this holds them: a store that hangs.
fn hung(url: &str, steps: std::ops::RangeInclusive<u64>) -> Vec<std::fs::File> {
    let hold = |step| {
        let folder = std::path::Path::new(url).join(ella_store::commit_folder(step, TERM, 1));
        std::fs::create_dir_all(&folder).unwrap();
        let file = std::fs::File::open(&folder).unwrap();
        file.lock().unwrap();
        file
    };
    steps.map(hold).collect()
}

/// Training goes on while a store hangs: commits are left out, counted, until there is room for them again.
#[test]
fn a_store_that_hangs_costs_commits_and_no_worker() {
    RUNTIME.block_on(async {
        let config = prepared(&["checkpoint.every=1", "workers.step_timeout=2s"]);
        let (_folder, url) = run_folder();
        let hung = hung(&url, 1..=3);
        let mut coordinator = Scripted::start().await;
        let mut workers = idle(&mut coordinator, &config, &url, 2).await;
        begin(&mut workers).await;
        // Two are under way, and far more steps are taken than there is patience for.
        let mut left_out = 0;
        for step in 1..=20 {
            left_out += workers[0].progress(step).await.skipped.get("commits_left_out").copied().unwrap_or_default();
        }
        assert_eq!(left_out, 18);
        drop(hung);
        let mut committed = Vec::new();
        for worker in &mut workers {
            let (heard, finished) = Heard::of(worker).await;
            assert_eq!((finished.step, finished.outcome()), (STEPS, Outcome::Done));
            let steps: Vec<u64> = heard.states.iter().map(|state| state.step).collect();
            assert!(steps.contains(&STEPS) && steps.iter().all(|step| !(3..=20).contains(step)), "{steps:?}");
            committed.push(steps.into_iter().filter(|step| *step > 20).collect::<Vec<_>>());
        }
        assert_eq!(committed[0], committed[1]);
        for worker in workers {
            assert_eq!(worker.committed(STEPS).await.unwrap(), Ending::Done);
        }
    });
}

/// A death, in each of three generations; a joiner at a boundary; and the same state in the end as that of one worker alone (SAME).
#[test]
fn the_state_goes_on_from_generation_to_generation() {
    RUNTIME.block_on(async {
        let config = prepared(&[]);
        let expected = alone(&config).await;
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut workers = idle(&mut coordinator, &config, &url, 3).await;
        begin(&mut workers).await;
        let told = workers[1].progress(3).await;
        assert_eq!((told.generation, told.world), (workers[1].generation, 3));

        // One goes; the others are told, or find out by themselves.
        let gone = workers.pop().unwrap();
        gone.say(Say::Release(v1::Release { reason: "killed".into() }));
        assert_eq!(gone.ended().await.unwrap(), Ending::Preempted);
        regroup(&workers[0], false);
        let steps = [step_of(&mut workers[0]).await, step_of(&mut workers[1]).await];
        regroup(&workers[1], false);
        assert!(steps[0].abs_diff(steps[1]) <= 1 && steps[0].max(steps[1]) >= 3, "{steps:?}");
        if steps[1] > steps[0] {
            workers.swap(0, 1);
        }
        let step = steps[0].max(steps[1]);
        go_on(&mut workers, step, steps[0] != steps[1]).await;
        workers[0].progress(step + 2).await;

        // One more comes: all stop after the same step.
        workers.append(&mut idle(&mut coordinator, &config, &url, 1).await);
        workers[..2].iter().for_each(|worker| regroup(worker, true));
        let (a, b) = (step_of(&mut workers[0]).await, step_of(&mut workers[1]).await);
        assert!(a == b && a >= step + 2, "{a}, {b}");
        workers[2].generation = workers[0].generation;
        go_on(&mut workers, a, true).await;
        workers[2].progress(a + 1).await;
        to_the_end(workers, &expected).await;
    });
}

/// A generation that is ended before its ring has closed, or while a state is copied, leaves its ranks as fit as before.
#[test]
fn a_generation_that_never_begins_costs_nothing() {
    RUNTIME.block_on(async {
        let config = prepared(&[]);
        let expected = alone(&config).await;
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut workers = idle(&mut coordinator, &config, &url, 2).await;
        begin(&mut workers[..1]).await;
        workers[0].progress(2).await;
        regroup(&workers[0], true);
        let step = step_of(&mut workers[0]).await;
        // Its peer never hears of this one.
        let both = peers(&workers);
        workers[0].next_place(0, both.clone(), (step, true));
        regroup(&workers[0], false);
        assert_eq!(step_of(&mut workers[0]).await, step);
        // Nor does rank 0 of this; the peer has no state to tell of.
        workers[1].generation = workers[0].generation;
        workers[1].next_place(1, both, (step, true));
        regroup(&workers[1], false);
        assert_eq!(workers[1].idle().await.step, None);
        workers[0].generation = workers[1].generation;
        go_on(&mut workers, step, true).await;
        to_the_end(workers, &expected).await;
    });
}

/// LIVE: a coordinator that is gone holds up nothing. The next one is told where the worker is, goes on with its generation, and commits come
/// under its term from then on; in between none is tried.
#[test]
fn a_generation_outlives_its_coordinator() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=100000", "checkpoint.every=2"]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let (mut worker, ready) = coordinator.training(&config, &url, None).await;
        worker.progress(3).await;
        worker.hang_up();
        let mut worker = coordinator.again(worker).await;
        let place = worker.place.clone().unwrap();
        assert_eq!((place.term, place.generation, place.rank, place.world, place.ready), (TERM, 1, 0, 1, Some(ready)));
        (worker.term, worker.generation) = (TERM + 1, 1);
        worker.say(welcome(&config, &url));
        for _ in 0..5 {
            let body = worker.next().await;
            assert!(matches!(body, Said::Progress(_)), "no commit is made under a coordinator that does not know the generation: {body:?}");
        }
        worker.say(Say::Adopted(v1::Adopted {}));
        let state = loop {
            match worker.next().await {
                Said::State(state) => break state,
                Said::Progress(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert!(state.step > place.step);
        let part = loop {
            match worker.next().await {
                Said::Part(part) => break part,
                Said::Progress(_) | Said::State(_) => {}
                other => panic!("{other:?}"),
            }
        };
        let file = format!("{url}/commits/{:012}.{}/{}", part.step, TERM + 1, part.name);
        assert!(std::path::Path::new(&file).exists(), "{file}");
        worker.say(Say::Release(v1::Release { reason: "enough".into() }));
        assert_eq!(worker.ended().await.unwrap(), Ending::Preempted);
    });
}

/// What a coordinator of the past says to a worker that has another one now is refused; so is what is said of a generation of the past.
#[test]
fn a_generation_that_ends_without_a_coordinator_is_told_to_the_next() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=100000"]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut workers = idle(&mut coordinator, &config, &url, 2).await;
        begin(&mut workers).await;
        workers[0].progress(2).await;
        let (mut one, mut two) = (workers.remove(0), workers.remove(0));
        one.hang_up();
        let one = coordinator.again(one).await;
        assert!(one.place.is_some());
        // Not welcomed; meanwhile its peer goes.
        two.say(Say::Release(v1::Release { reason: "killed".into() }));
        two.hang_up();
        let mut one = one;
        one.hang_up();
        let mut one = loop {
            let again = coordinator.again(one).await;
            if again.place.is_none() {
                break again;
            }
            one = again;
            one.hang_up();
        };
        (one.term, one.generation) = (TERM + 1, 0);
        one.say(welcome(&config, &url));
        let step = step_of(&mut one).await;
        assert!(step >= 2);
        one.say_as(TERM, 9, Say::Abort(v1::Abort { reason: "of the past".into(), permanent: false }));
        let peers = vec![one.address.clone()];
        one.assign_from(0, peers, (step, false)).await;
        one.progress(step + 1).await;
        assert!(one.flags.working.load(Ordering::Relaxed));
        one.say(Say::Release(v1::Release { reason: "enough".into() }));
        assert_eq!(one.ended().await.unwrap(), Ending::Preempted);
    });
}

/// LIVE: the coordinator may die when all ranks are ready and none has been told to begin. The next one takes them for training, and so they
/// are; and it is the one that hears of their end.
#[test]
fn a_generation_that_is_adopted_before_it_was_begun_begins_and_ends() {
    RUNTIME.block_on(async {
        let config = prepared(&[]);
        let expected = alone(&config).await;
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut worker = idle(&mut coordinator, &config, &url, 1).await.remove(0);
        let peers = vec![worker.address.clone()];
        worker.assign(0, peers, None);
        worker.ready().await;
        worker.hang_up();
        let mut worker = coordinator.again(worker).await;
        assert!(worker.place.as_ref().is_some_and(|place| place.ready.is_some()));
        (worker.term, worker.generation) = (TERM + 1, 1);
        worker.say(welcome(&config, &url));
        worker.say(Say::Adopted(v1::Adopted {}));
        to_the_end(vec![worker], &expected).await;
    });
}

/// LIVE: a worker that still waits for the peers of a generation which its coordinator took to the grave is free for the next one's.
#[test]
fn a_new_coordinators_place_frees_a_worker_from_a_ring_that_never_closes() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=100000"]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut workers = idle(&mut coordinator, &config, &url, 2).await;
        let both = peers(&workers);
        let mut worker = workers.remove(0);
        // The other never hears of it.
        worker.assign(0, both, None);
        worker.beat().await;
        worker.hang_up();
        let mut worker = coordinator.again(worker).await;
        assert_eq!(worker.place, None);
        (worker.term, worker.generation) = (TERM + 1, 0);
        worker.say(welcome(&config, &url));
        worker.idle().await;
        let peers = vec![worker.address.clone()];
        worker.assign(0, peers, None);
        worker.ready().await;
        worker.say(Say::Start(v1::Start {}));
        worker.progress(2).await;
        worker.say(Say::Release(v1::Release { reason: "enough".into() }));
        assert_eq!(worker.ended().await.unwrap(), Ending::Preempted);
    });
}

/// SAME: a coordinator that takes a worker to have a state which it has not is told so, and nothing is trained on it.
#[test]
fn a_state_that_is_not_there_is_not_gone_on_with() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=100000"]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut worker = idle(&mut coordinator, &config, &url, 1).await.remove(0);
        let peers = vec![worker.address.clone()];
        worker.next_place(0, peers.clone(), (5, false));
        let idle = worker.idle().await;
        assert!(idle.step.is_none() && idle.broken.contains("the state of step 5"), "{idle:?}");
        worker.generation += 1;
        worker.say(Say::Assign(v1::Assign { world: 1, next: peers[0].clone(), session: vec![9; 16], ..v1::Assign::default() }));
        assert_eq!(worker.ready().await.step, 0);
        worker.say(Say::Release(v1::Release { reason: "enough".into() }));
        assert_eq!(worker.ended().await.unwrap(), Ending::Preempted);
    });
}
