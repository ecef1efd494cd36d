//! A worker's life under a coordinator that follows a script.

use crate::coordinator::{Scripted, TERM, Worker, soon, welcome};
use crate::world::{EPOCH, LANES, RUNTIME, SCENES, config, damaged_copy, embedded, load, order, path, sdxl, text};
use ella_model::connector::{Connector, ConnectorKind};
use ella_proto::config::RunConfig;
use ella_proto::stops::SAME_WISH;
use ella_proto::v1::from_worker::Body as Said;
use ella_proto::v1::to_worker::Body as Say;
use ella_proto::v1::{self, FailureKind, Outcome, RefusedReason};
use ella_store::{Commit, LedgerEpoch, Part, RunLog, Store, Term, commit_folder, verify_commit};
use ella_worker::control::ControlError;
use ella_worker::feed::lanes_of;
use ella_worker::session::{Options, WorkError, work};
use ella_worker::train::Ending;
use ella_worker::trained::Trained;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tch::{Device, Kind};
use tempfile::TempDir;

pub(crate) fn run_folder() -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let url = text(folder.path());
    (folder, url)
}

fn prepared(set: &[&str]) -> RunConfig {
    let config = config(set);
    embedded(&config);
    config
}

/// What a worker that trains alone reports, until it has finished.
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) progress: Vec<v1::Progress>,
    pub(crate) states: Vec<v1::StateDigest>,
    parts: Vec<v1::PartSaved>,
}

impl Heard {
    pub(crate) async fn of(worker: &mut Worker) -> (Self, v1::Finished) {
        let mut heard = Self::default();
        loop {
            match worker.next().await {
                Said::Progress(progress) => heard.progress.push(progress),
                Said::State(state) => heard.states.push(state),
                Said::Part(part) => heard.parts.push(part),
                Said::Finished(finished) => return (heard, finished),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The record that a coordinator would write.
    fn commit(&self, step: u64, config: &RunConfig, ready: &v1::Ready) -> Commit {
        let state = self.states.iter().find(|state| state.step == step).unwrap();
        let parts = self.parts.iter().filter(|part| part.step == step);
        let ledger = state.ledger.iter().map(|e| LedgerEpoch { epoch: e.epoch, samples: e.samples, hash: e.hash.clone() });
        Commit {
            step,
            generation: 1,
            world: 1,
            folder: commit_folder(step, TERM, 1),
            parts: parts.map(|p| Part { name: p.name.clone(), bytes: p.bytes, blake3: p.blake3.parse().unwrap() }).collect(),
            config_digest: config.digest().parse().unwrap(),
            data_digest: ready.data_digest.parse().unwrap(),
            models_digest: ready.models_digest.parse().unwrap(),
            epoch: state.epoch,
            step_in_epoch: state.step_in_epoch,
            ledger: ledger.collect(),
            state_digest: state.digest.parse().unwrap(),
            computed_with: Default::default(),
        }
    }
}

#[test]
fn a_run_is_trained_committed_and_resumed_to_the_same_state() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=2", "checkpoint.every=1", "train.eval_every=2", "train.eval_samples=5"]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut worker = coordinator.worker().await;
        worker.say(welcome(&config, &url));
        let peers = vec![worker.address.clone()];
        worker.assign(0, peers, None);
        let ready = worker.ready().await;
        assert_eq!((ready.step, ready.samples_per_epoch), (0, SCENES));
        // What an older term or generation says is refused.
        worker.say_as(TERM - 1, 1, Say::Abort(v1::Abort { reason: "of the past".into(), permanent: false }));
        worker.say_as(TERM, 0, Say::Abort(v1::Abort { reason: "of the past".into(), permanent: false }));
        worker.say(Say::Start(v1::Start {}));
        let (heard, finished) = Heard::of(&mut worker).await;
        assert_eq!((finished.step, finished.outcome()), (2, Outcome::Done));
        worker.say(Say::Committed(v1::Committed { step: 1 }));
        assert_eq!(worker.committed(2).await.unwrap(), Ending::Done);

        let steps: Vec<_> = heard.progress.iter().map(|p| (p.step, p.samples, p.held_out_loss.is_some())).collect();
        assert_eq!(steps, [(1, 8, true), (2, 8, true)], "held-out loss before the first step and before the last");
        assert!(heard.progress.iter().all(|p| p.loss.is_finite() && p.grad_norm > 0.0 && p.learning_rate == 1e-4 && p.at_unix_ms > 0));
        let store = Store::open(&url).unwrap();
        for step in [1, 2] {
            let commit = heard.commit(step, &config, &ready);
            verify_commit(&store, &commit).await.unwrap();
            assert_eq!((commit.epoch, commit.step_in_epoch, commit.ledger[0].samples), (0, step, 8 * step));
        }

        // From the first commit to the same second state (SAME).
        let first = heard.commit(1, &config, &ready);
        let (mut worker, again) = coordinator.training(&config, &url, Some(&first)).await;
        assert_eq!((again.step, &again.state_digest), (1, &heard.states[0].digest));
        let (resumed, _) = Heard::of(&mut worker).await;
        assert_eq!(resumed.states, heard.states[1..]);
        assert_eq!(resumed.parts, heard.parts.iter().filter(|part| part.step == 2).cloned().collect::<Vec<_>>());
        assert_eq!(worker.committed(2).await.unwrap(), Ending::Done);
    });
}

/// Both reductions, and everything that changes the step's arithmetic, run; `fast` in a world of one is the sum of float32 lanes.
#[test]
fn every_kind_of_step_runs() {
    RUNTIME.block_on(async {
        let mut losses = Vec::new();
        for set in [
            vec![],
            vec!["train.reduction=fast"],
            vec!["train.snr_gamma=5", "train.schedule.kind=cosine", "train.schedule.warmup=1"],
            vec!["text.padding=none", "base.dtype=bf16"],
            vec!["text.features=inline", "text.dtype=fp16", "train.grad_clip=0"],
        ] {
            let set: Vec<&str> = ["train.steps=7", "train.caption_dropout=0.5"].iter().chain(&set).copied().collect();
            let config = if set.contains(&"text.features=inline") { config(&set) } else { prepared(&set) };
            let (_folder, url) = run_folder();
            let (mut worker, _) = Scripted::start().await.training(&config, &url, None).await;
            let (heard, finished) = Heard::of(&mut worker).await;
            assert_eq!((finished.step, finished.outcome(), heard.progress.len()), (7, Outcome::Done, 7), "{set:?}");
            assert_eq!(heard.progress[5].samples, 3, "the epoch's last step");
            let dropped: u64 = heard.progress.iter().filter_map(|p| p.skipped.get("captions_dropped")).sum();
            assert!((10..40).contains(&dropped), "{dropped}");
            losses.push(heard.progress[6].loss);
            assert_eq!(worker.committed(7).await.unwrap(), Ending::Done);
        }
        assert!((losses[0] - losses[1]).abs() < 1e-4 * losses[0], "{losses:?}");
    });
}

/// Every parameter of every kind is trained, and the file that comes of it tells its kind.
#[test]
fn every_kind_of_connector_is_trained() {
    RUNTIME.block_on(async {
        let (nano, sdxl) = (format!("base.model={}", text(path("base"))), sdxl());
        for (base, set, kind) in [
            (&nano, "connector.kind=tsc-zero", ConnectorKind::TscZero),
            (&nano, "connector.kind=resampler", ConnectorKind::Resampler),
            (&nano, "connector.kind=mlp", ConnectorKind::Mlp),
            (&sdxl, "connector.kind=tsc", ConnectorKind::Tsc),
            (&sdxl, "connector.kind=mlp", ConnectorKind::Mlp),
        ] {
            let config = prepared(&["train.steps=2", "checkpoint.every=2", base, set]);
            let (folder, url) = run_folder();
            let (mut worker, ready) = Scripted::start().await.training(&config, &url, None).await;
            let (heard, finished) = Heard::of(&mut worker).await;
            assert_eq!((finished.step, finished.outcome()), (2, Outcome::Done), "{set}");
            assert_eq!(worker.committed(2).await.unwrap(), Ending::Done);
            let file = folder.path().join(heard.commit(2, &config, &ready).folder).join("connector.safetensors");
            let told = Trained::told(&Connector::open(&file).unwrap()).unwrap();
            assert!(told == Trained::by(&config, told.text.clone()) && told.text == Some(load(&config).text.weights_digest), "{told:?}");
            let trained = Connector::load(&file, None, Kind::Float, Device::Cpu).unwrap();
            assert_eq!((trained.config().kind, trained.config().pooled), (kind, (base == &sdxl).then_some(32)));
            let first = load(&config).networks.connector;
            for ((name, before), (_, after)) in first.tensors().iter().zip(trained.tensors()) {
                assert!(!before.equal(after), "{set}: {name} is as it was");
            }
        }
    });
}

#[test]
fn a_refused_worker_says_why_and_whether_to_try_again() {
    RUNTIME.block_on(async {
        for (reason, said, permanent) in [
            (RefusedReason::Version, false, true),
            (RefusedReason::DuplicateDevice, false, false),
            (RefusedReason::Unreached, false, false),
            // Until something is trained, who has another kind of device may come in time.
            (RefusedReason::DeviceKind, false, false),
            (RefusedReason::DeviceKind, true, true),
        ] {
            let worker = Scripted::start().await.worker().await;
            let refused = v1::Refused { reason: reason.into(), detail: "not you".into(), permanent: said, ..Default::default() };
            worker.say(Say::Refused(refused));
            let error = worker.ended().await.unwrap_err();
            assert!(matches!(&error, WorkError::Control(ControlError::Refused { reason: told, .. }) if *told == reason));
            assert!(error.to_string().contains("not you") && error.is_permanent() == permanent, "{error}");
        }
    });
}

/// COMMIT: its share of each would be saved where nobody finds it.
#[test]
fn a_worker_that_has_another_run_folder_takes_no_place() {
    RUNTIME.block_on(async {
        let config = prepared(&[]);
        let folders = [run_folder(), run_folder(), run_folder()];
        let [theirs, earlier, none] = folders.each_ref().map(|(_, url)| url.as_str());
        let claim = async |url: &str, nonce: &str| {
            let (store, config_digest) = (Store::open(url).unwrap(), config.digest().parse().unwrap());
            let term = Term { host: "h".into(), version: "1".into(), config_digest };
            RunLog::claim(&store, term, nonce, 1).await.unwrap().0.claim_record()
        };
        let (witness_file, witness) = claim(theirs, "this").await;
        // A run of the same name was there before.
        claim(earlier, "another").await;
        for (url, wrong) in [(theirs, None), (earlier, Some("here that is another one")), (none, Some("here that is not there"))] {
            let mut worker = Scripted::start().await.worker().await;
            let Say::Welcome(welcome) = welcome(&config, url) else { unreachable!() };
            worker.say(Say::Welcome(v1::Welcome { witness_file: witness_file.clone(), witness: witness.clone(), ..welcome }));
            let Some(wrong) = wrong else {
                worker.idle().await;
                worker.say(Say::Abort(v1::Abort::default()));
                assert!(matches!(worker.ended().await, Err(WorkError::Control(_))));
                continue;
            };
            let failed = worker.failed().await;
            assert_eq!((failed.kind(), failed.permanent), (FailureKind::Machine, true));
            assert!(failed.message.contains(url) && failed.message.contains(wrong), "{}", failed.message);
            worker.hang_up();
            assert!(worker.ended().await.unwrap_err().is_permanent());
        }
    });
}

#[test]
fn a_worker_that_comes_when_the_run_is_over_ends_as_the_run_did() {
    RUNTIME.block_on(async {
        for (outcome, permanent, expected) in [
            (Outcome::Done, false, Some(Ending::Done)),
            (Outcome::Preempted, false, Some(Ending::Preempted)),
            (Outcome::Failed, false, None),
            (Outcome::Failed, true, None),
        ] {
            let worker = Scripted::start().await.worker().await;
            let reason = RefusedReason::RunOver.into();
            worker.say(Say::Refused(v1::Refused { reason, detail: "over".into(), outcome: outcome.into(), permanent }));
            let ended = worker.ended().await;
            assert!(ended.as_ref().ok() == expected.as_ref(), "{ended:?}");
            assert!(ended.err().is_none_or(|error| error.is_permanent() == permanent), "what would fail again is not to be started again");
        }
    });
}

/// A worker in the middle of a run that is too long to finish.
async fn in_the_middle(set: &[&str]) -> (TempDir, Scripted, Worker) {
    let set: Vec<&str> = ["train.steps=100000", "checkpoint.every=100000"].iter().chain(set).copied().collect();
    let config = prepared(&set);
    let (folder, url) = run_folder();
    let mut coordinator = Scripted::start().await;
    let (mut worker, _) = coordinator.training(&config, &url, None).await;
    worker.progress(2).await;
    (folder, coordinator, worker)
}

#[test]
fn an_abort_ends_it_with_the_coordinators_reason() {
    RUNTIME.block_on(async {
        let (_folder, _coordinator, worker) = in_the_middle(&[]).await;
        worker.say(Say::Abort(v1::Abort { reason: "worker w2 was lost".into(), permanent: true }));
        let error = worker.ended().await.unwrap_err();
        assert!(matches!(&error, WorkError::Control(ControlError::Aborted { reason, .. }) if reason == "worker w2 was lost"), "{error}");
        assert!(error.is_permanent(), "the same failure ends all ranks alike");
    });
}

/// LIVE: training goes on under a coordinator that says nothing, until `workers.orphan_timeout`.
#[test]
fn a_coordinator_that_answers_nothing_is_given_up_after_the_orphan_timeout() {
    RUNTIME.block_on(async {
        let (_folder, coordinator, mut worker) = in_the_middle(&["workers.orphan_timeout=2s"]).await;
        coordinator.answers.store(false, Ordering::Relaxed);
        let begin = std::time::Instant::now();
        let from = worker.progress(3).await.step;
        assert!(worker.progress(from + 2).await.step > from, "training goes on meanwhile");
        let error = worker.ended().await.unwrap_err();
        assert!(matches!(error, WorkError::Control(ControlError::Orphaned { .. })), "{error}");
        assert!(error.to_string().contains("workers.orphan_timeout") && begin.elapsed() >= std::time::Duration::from_millis(1500));
    });
}

/// One that follows another may ask for a token, which this worker will not have the next time either.
#[test]
fn a_coordinator_that_does_not_let_it_in_any_more_ends_it_for_good() {
    RUNTIME.block_on(async {
        let (_folder, coordinator, mut worker) = in_the_middle(&[]).await;
        coordinator.asks.store(true, Ordering::Relaxed);
        worker.hang_up();
        let error = worker.ended().await.unwrap_err();
        assert!(matches!(error, WorkError::Control(ControlError::NoEntry { .. })) && error.is_permanent(), "{error}");
        assert!(error.to_string().contains("show the token"), "{error}");
    });
}

/// By the coordinator's word, or by this worker's own signal.
#[test]
fn a_drain_commits_at_the_next_step_and_leaves_resumable() {
    RUNTIME.block_on(async {
        for by_signal in [false, true] {
            let (_folder, _coordinator, mut worker) = in_the_middle(&[]).await;
            assert!(worker.flags.working.load(Ordering::Relaxed));
            if by_signal {
                worker.flags.parting.cancel();
                worker.leaving().await;
            }
            worker.say(Say::Drain(v1::Drain { reason: "a spot machine goes".into() }));
            let (heard, finished) = Heard::of(&mut worker).await;
            assert_eq!((finished.outcome(), heard.states.len(), heard.parts.len()), (Outcome::Preempted, 1, 3));
            assert_eq!((heard.states[0].step, heard.progress.last().unwrap().step), (finished.step, finished.step));
            assert_eq!(worker.committed(finished.step).await.unwrap(), Ending::Preempted);
        }
    });
}

/// A commit may be recorded before its workers have said farewell: one that left by that would be taken for lost. It stays until the
/// coordinator ends its stream.
#[test]
fn a_worker_stays_until_its_farewell_has_been_read() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=1"]);
        let (_folder, url) = run_folder();
        let (mut worker, _) = Scripted::start().await.training(&config, &url, None).await;
        worker.say(Say::Committed(v1::Committed { step: 1 }));
        let (_, finished) = Heard::of(&mut worker).await;
        assert_eq!((finished.step, finished.outcome()), (1, Outcome::Done));
        for _ in 0..10 {
            worker.beat().await;
        }
        worker.hang_up();
        assert_eq!(worker.ended().await.unwrap(), Ending::Done);

        // A stream that ends before the commit is recorded is a coordinator that is gone: the next one must see to the commit.
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let (mut worker, _) = coordinator.training(&config, &url, None).await;
        Heard::of(&mut worker).await;
        worker.hang_up();
        let mut worker = coordinator.again(worker).await;
        assert_eq!(worker.place, None);
        worker.term = TERM + 1;
        worker.say(welcome(&config, &url));
        let idle = worker.idle().await;
        assert_eq!((idle.step, idle.broken.as_str()), (Some(1), ""));
        let peers = vec![worker.address.clone()];
        worker.assign_from(0, peers, (1, false)).await;
        let (heard, finished) = Heard::of(&mut worker).await;
        assert_eq!((finished.step, heard.states.len(), heard.parts.len(), heard.progress.len()), (1, 1, 3, 0));
        assert_eq!(worker.committed(1).await.unwrap(), Ending::Done);
    });
}

#[test]
fn a_drain_at_the_last_step_is_a_run_that_is_done() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=1"]);
        let (_folder, url) = run_folder();
        let mut worker = Scripted::start().await.worker().await;
        worker.flags.drain.cancel();
        worker.say(welcome(&config, &url));
        let peers = vec![worker.address.clone()];
        worker.assign(0, peers, None);
        worker.ready().await;
        worker.say(Say::Start(v1::Start {}));
        let (_, finished) = Heard::of(&mut worker).await;
        assert_eq!((finished.step, finished.outcome()), (1, Outcome::Done));
        assert_eq!(worker.committed(1).await.unwrap(), Ending::Done);
    });
}

/// Where a cluster starts both at once, workers may be there first.
#[test]
fn a_worker_that_comes_before_its_coordinator_tries_again() {
    RUNTIME.block_on(async {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let options = |url: String, patience| Options {
            coordinator: url.into(),
            listen: ([127, 0, 0, 1], 0).into(),
            advertise: None,
            device: ella_proto::config::Device::Cpu,
            slots: 1,
            patience,
        };
        let start = |options: Options| {
            let (done, ending) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || drop(done.send(work(&options, Arc::default(), RUNTIME.handle()))));
            ending
        };
        let early = start(options(format!("http://{address}"), Duration::from_secs(30)));
        // One that does not wait, and one that was told no URL, end at once, whoever comes.
        for (url, patience) in [(format!("http://{address}"), Duration::ZERO), ("http://no host".to_owned(), Duration::from_secs(30))] {
            let error = soon("an end", start(options(url, patience))).await.unwrap().unwrap_err();
            assert!(matches!(error, WorkError::Control(ControlError::Unreachable { .. })), "{error}");
        }
        let mut coordinator = Scripted::at(address).await;
        let worker = coordinator.taken(early, Arc::default()).await;
        let (reason, outcome) = (RefusedReason::RunOver.into(), Outcome::Done.into());
        worker.say(Say::Refused(v1::Refused { reason, detail: "the run is over".into(), outcome, permanent: false }));
        assert_eq!(worker.ended().await.unwrap(), Ending::Done);
    });
}

/// What cannot be used is told to the coordinator, with file or key, before the first step.
#[test]
fn bad_input_is_told_with_its_name_and_for_good() {
    RUNTIME.block_on(async {
        for (set, kind, word) in [
            ("data.path=/nonexistent/data", FailureKind::Input, "/nonexistent/data"),
            ("base.model=/nonexistent/base", FailureKind::Input, "base.model"),
            ("text.max_tokens=39", FailureKind::Input, "ella embed"),
            ("connector.width=65", FailureKind::Input, "connector.width"),
        ] {
            let config = config(&[set]);
            let (_folder, url) = run_folder();
            let mut worker = Scripted::start().await.worker().await;
            worker.say(welcome(&config, &url));
            // It loads before it has a place.
            let failed = worker.failed().await;
            worker.hang_up();
            assert_eq!((failed.kind(), failed.permanent), (kind, true), "{failed:?}");
            assert!(failed.message.contains(word), "{set}: {}", failed.message);
            assert_eq!(worker.ended().await.unwrap_err().to_string(), failed.message);
        }
    });
}

#[test]
fn another_kind_of_device_than_the_run_wants_is_told_before_anything_is_loaded() {
    RUNTIME.block_on(async {
        let mut worker = Scripted::start().await.worker().await;
        worker.say(welcome(&config(&["workers.device=cuda"]), "unused"));
        let message = worker.next().await;
        let Said::Failed(failed) = message else { panic!("{message:?}") };
        worker.hang_up();
        assert!(failed.permanent && failed.message.contains("--device cuda"), "{}", failed.message);
        assert!(matches!(worker.ended().await, Err(WorkError::OtherDevice { .. })));
    });
}

#[test]
fn a_commit_with_a_flipped_byte_or_of_another_layout_is_not_restored() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=2", "checkpoint.every=1"]);
        let (folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let (mut worker, ready) = coordinator.training(&config, &url, None).await;
        let (heard, _) = Heard::of(&mut worker).await;
        worker.committed(2).await.unwrap();
        let commit = heard.commit(1, &config, &ready);

        let tell = async |coordinator: &mut Scripted, config: &RunConfig, commit: &Commit| {
            let mut worker = coordinator.worker().await;
            worker.say(welcome(config, &url));
            let peers = vec![worker.address.clone()];
            worker.assign(0, peers, Some(commit));
            let failed = worker.failed().await;
            worker.hang_up();
            assert!(failed.permanent && worker.ended().await.is_err());
            failed.message
        };
        let mut without = commit.clone();
        without.parts.retain(|part| part.name != "ema.safetensors");
        let message = tell(&mut coordinator, &config, &without).await;
        assert!(message.contains("ema.safetensors") && message.contains(&commit.folder), "{message}");

        let wider = prepared(&["train.steps=2", "checkpoint.every=1", "connector.latents=9"]);
        let message = tell(&mut coordinator, &wider, &commit).await;
        assert!(message.contains("connector.latents") && message.contains("[9, 64]"), "{message}");

        let file = folder.path().join(&commit.folder).join("optimizer.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let message = tell(&mut coordinator, &config, &commit).await;
        assert!(message.contains("optimizer.safetensors"), "{message}");
    });
}

/// A rank whose feed fails says so; the other, which waits for it in a sum, is freed by the coordinator's word long before its timeout.
#[test]
fn a_feed_that_fails_on_one_rank_ends_the_other_too() {
    let whole = config(&[]);
    let (order, _) = order(&whole);
    let shards = |rank: u32| -> Vec<u32> {
        let places = lanes_of(rank, 2, LANES).flat_map(|lane| (0..EPOCH).map(move |step| (step, lane)));
        places.flat_map(|(step, lane)| order.lane(step, lane)).map(|at| at.shard).collect()
    };
    let of_rank_zero = shards(0);
    let victim = shards(1).into_iter().find(|shard| !of_rank_zero.contains(shard)).unwrap();
    let copy = damaged_copy(&whole, victim as usize);
    let data = format!("data.path={}", copy.path().display());
    RUNTIME.block_on(async {
        let config = config(&["workers.count=2", &data]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut workers = [coordinator.worker().await, coordinator.worker().await];
        let peers: Vec<String> = workers.iter().map(|worker| worker.address.clone()).collect();
        for (rank, worker) in (0..).zip(&mut workers) {
            worker.say(welcome(&config, &url));
            worker.assign(rank, peers.clone(), None);
        }
        let [mut zero, mut one] = workers;
        let (a, b) = (zero.ready().await, one.ready().await);
        assert_eq!(a, b);
        zero.say(Say::Start(v1::Start {}));
        one.say(Say::Start(v1::Start {}));
        let failed = one.failed().await;
        assert_eq!((failed.kind(), failed.permanent), (FailureKind::Input, true));
        assert!(failed.message.contains(".arrow"), "{}", failed.message);
        zero.say(Say::Abort(v1::Abort { reason: failed.message.clone(), permanent: failed.permanent }));
        one.hang_up();
        let ended = zero.ended().await.unwrap_err();
        assert!(matches!(&ended, WorkError::Control(ControlError::Aborted { reason, .. }) if *reason == failed.message), "{ended}");
        assert_eq!(one.ended().await.unwrap_err().to_string(), failed.message);
    });
}

/// Ranks other than the first report their timing only, so that nothing is counted once for every rank.
#[test]
fn only_rank_zero_speaks_for_all() {
    RUNTIME.block_on(async {
        let config = prepared(&["workers.count=2", "train.steps=2", "train.caption_dropout=1"]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let mut workers = [coordinator.worker().await, coordinator.worker().await];
        let peers: Vec<String> = workers.iter().map(|worker| worker.address.clone()).collect();
        for (rank, worker) in (0..).zip(&mut workers) {
            worker.say(welcome(&config, &url));
            worker.assign(rank, peers.clone(), None);
        }
        let mut states = Vec::new();
        for worker in &mut workers {
            worker.ready().await;
        }
        workers.iter().for_each(|worker| worker.say(Say::Start(v1::Start {})));
        for (rank, worker) in workers.iter_mut().enumerate() {
            let (heard, _) = Heard::of(worker).await;
            for progress in &heard.progress {
                assert!(progress.parts.is_some() && progress.step_seconds > 0.0);
                let counted = progress.skipped.get("captions_dropped").copied().unwrap_or(0);
                assert_eq!((progress.samples, counted), if rank == 0 { (8, 8) } else { (0, 0) });
            }
            let names: Vec<_> = heard.parts.iter().map(|part| part.name.as_str()).collect();
            assert_eq!(names, if rank == 0 { vec!["connector.safetensors", "optimizer.safetensors"] } else { vec!["ema.safetensors"] });
            states.push(heard.states);
        }
        assert_eq!(states[0], states[1]);
        for worker in workers {
            assert_eq!(worker.committed(2).await.unwrap(), Ending::Done);
        }
    });
}

/// A commit that cannot be saved ends the run: training must not go on as if it had been.
#[test]
fn a_store_that_refuses_a_commit_ends_the_run_with_its_reason() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=100000", "checkpoint.every=1"]);
        let (folder, url) = run_folder();
        std::fs::write(folder.path().join("commits"), "a file where a folder should be").unwrap();
        let (mut worker, _) = Scripted::start().await.training(&config, &url, None).await;
        let failed = worker.failed().await;
        worker.hang_up();
        assert_eq!(failed.kind(), FailureKind::Store);
        assert!(failed.message.contains("the commit of step 1") && failed.message.contains("commits/000000000001.7"), "{}", failed.message);
        assert_eq!(worker.ended().await.unwrap_err().to_string(), failed.message);
    });
}

/// The exit codes of design.md §6, and SIGTERM in each part of a life.
#[test]
fn the_process_ends_with_the_code_that_says_what_to_do_next() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=100000", "checkpoint.every=100000"]);
        let (_folder, url) = run_folder();
        let mut coordinator = Scripted::start().await;
        let terminate = |child: &tokio::process::Child| signal(child.id().unwrap(), libc::SIGTERM);

        let (worker, mut child) = coordinator.process().await;
        worker.say(Say::Refused(v1::Refused { reason: RefusedReason::Version.into(), detail: "not you".into(), ..Default::default() }));
        assert_eq!(soon("the end", child.wait()).await.unwrap().code(), Some(4));

        // Before the first step there is nothing to commit.
        let (worker, mut child) = coordinator.process().await;
        worker.say(welcome(&config, &url));
        terminate(&child);
        assert_eq!(soon("the end", child.wait()).await.unwrap().code(), Some(3));

        let (mut worker, mut child) = coordinator.process().await;
        train_alone(&mut worker, &config, &url).await;
        terminate(&child);
        worker.leaving().await;
        worker.say(Say::Drain(v1::Drain { reason: "nobody else is there".into() }));
        let (_, finished) = Heard::of(&mut worker).await;
        assert_eq!(finished.outcome(), Outcome::Preempted);
        worker.say(Say::Committed(v1::Committed { step: finished.step }));
        worker.hang_up();
        assert_eq!(soon("the end", child.wait()).await.unwrap().code(), Some(3));

        let (worker, mut child) = coordinator.process().await;
        worker.say(welcome(&config, &url));
        worker.say(Say::Abort(v1::Abort { reason: "another worker was lost".into(), permanent: false }));
        assert_eq!(soon("the end", child.wait()).await.unwrap().code(), Some(1));
    });
}

/// Has a worker train until its second step.
async fn train_alone(worker: &mut Worker, config: &RunConfig, url: &str) {
    worker.say(welcome(config, url));
    let peers = vec![worker.address.clone()];
    worker.assign(0, peers, None);
    worker.ready().await;
    worker.say(Say::Start(v1::Start {}));
    worker.progress(2).await;
}

/// To a process that this test has started, or one that such a process has, and that is not gone.
fn signal(process: u32, signal: i32) {
    // SAFETY: kill has no memory effects here.
    unsafe { libc::kill(process as i32, signal) };
}

/// Both processes of a worker are signalled, as by a terminal or systemd, and the one that watches passes its signal on: that is one wish to leave.
/// A later one is another.
#[test]
fn a_signal_to_a_whole_worker_loses_nothing_and_a_later_one_leaves_at_once() {
    RUNTIME.block_on(async {
        let config = prepared(&["train.steps=100000", "checkpoint.every=100000"]);
        let (_folder, url) = run_folder();
        let (mut worker, mut child) = Scripted::start().await.process().await;
        train_alone(&mut worker, &config, &url).await;
        signal(worker.pid, libc::SIGTERM);
        signal(child.id().unwrap(), libc::SIGINT);
        worker.leaving().await;
        tokio::time::sleep(SAME_WISH).await;
        assert!(child.try_wait().unwrap().is_none(), "it has left without its coordinator's word");
        signal(child.id().unwrap(), libc::SIGTERM);
        assert_eq!(soon("the end", child.wait()).await.unwrap().code(), Some(3));
    });
}

/// A worker in which nothing moves any more, as in a device call that never returns, is ended by the process that watches it.
#[test]
fn a_worker_that_is_stuck_is_ended_from_outside() {
    RUNTIME.block_on(async {
        let mut coordinator = Scripted::start().await;
        let (worker, mut child) = coordinator.process_with(&["--stuck-timeout", "3"]).await;
        assert_ne!(worker.pid, child.id().unwrap(), "the one that works is not the one that was started");
        signal(worker.pid, libc::SIGSTOP);
        assert_eq!(soon("the end", child.wait()).await.unwrap().code(), Some(1));
        assert!(!std::path::Path::new(&format!("/proc/{}", worker.pid)).exists());
    });
}
