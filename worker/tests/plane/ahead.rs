//! `text.features = "ahead"`: the first epoch is the precompute, and nothing else differs from features that were embedded before.

use crate::coordinator::Scripted;
use crate::embed::{files, folder};
use crate::feed::{collect, same};
use crate::session::{Heard, run_folder};
use crate::world::{EPOCH, LANES, RUNTIME, SCENES, bare_copy, config, embedded_by, fed, open, order, text};
use ella_proto::config::RunConfig;
use ella_proto::v1::to_worker::Body as Say;
use ella_proto::v1::{self, Outcome};
use ella_worker::embed::BATCH;
use ella_worker::feed::{Feed, FeedError};
use ella_worker::train::Ending;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A data set of which nothing is embedded, and a run on it.
fn bare(set: &[&str]) -> (TempDir, RunConfig) {
    let copy = bare_copy(&config(&[]));
    let path = format!("data.path={}", text(copy.path()));
    let set: Vec<&str> = ["text.features=ahead", &path].iter().chain(set).copied().collect();
    (copy, config(&set))
}

/// The same run on a copy that has been embedded before.
fn embedded(set: &[&str]) -> (TempDir, RunConfig) {
    let (copy, config) = bare(&[&["text.features=cached"], set].concat());
    embedded_by(&config, BATCH);
    (copy, config)
}

#[test]
fn features_made_ahead_are_those_that_ella_embed_makes() {
    for set in ["text.padding=fixed", "text.padding=none"] {
        let (_there, before) = embedded(&[set, "train.eval_every=3", "train.eval_samples=20"]);
        let (_bare, ahead) = bare(&[set, "train.eval_every=3", "train.eval_samples=20"]);
        let steps = 0..EPOCH + 2;
        let expected = collect(&before, 0..LANES, steps.clone());

        // Two workers at once, of which one resumes in the middle; then another that finds what they left.
        let mut ranks = [fed(&ahead, 0..2, 0..EPOCH), fed(&ahead, 2..LANES, 2..EPOCH)];
        assert!(ranks.iter_mut().all(|feed| feed.next_step().is_ok()));
        let mut alone = fed(&ahead, 0..LANES, steps.clone());
        for step in steps {
            let (input, expected) = (alone.next_step().unwrap(), &expected[step as usize]);
            for (lane, other) in input.lanes.iter().zip(&expected.lanes) {
                assert_eq!((lane.tally, lane.dropped, lane.batch.is_some()), (other.tally, other.dropped, other.batch.is_some()));
                assert!(lane.batch.iter().zip(&other.batch).all(|(a, b)| same(a, b)), "{set}: step {step}, lane {}", lane.lane);
            }
            assert_eq!(input.held_out.len(), expected.held_out.len());
            assert!(input.held_out.iter().zip(&expected.held_out).all(|(a, b)| same(a, b)), "{set}: held-out of step {step}");
        }
        let encoded: u64 = ranks.iter().chain([&alone]).map(Feed::encoded).sum();
        assert!(encoded >= SCENES, "{encoded}");
        // With nothing left to do the encoder goes, which on a GPU has its memory back.
        let begin = Instant::now();
        while alone.holds_encoder() {
            assert!(begin.elapsed() < Duration::from_secs(30), "the encoder stays");
            std::thread::sleep(Duration::from_millis(5));
        }
        alone.finish_features().unwrap();
        assert!(files(&folder(&ahead)) == files(&folder(&before)), "{set}");
    }
}

/// Without a step that takes any: the shards of the next window have their features before one comes to them.
#[test]
fn shards_are_made_before_the_steps_come_to_them() {
    let (_bare, config) = bare(&["data.window=1", "train.global_batch=4", "train.micro_batch=1"]);
    let order = order(&config).0;
    // The feed itself makes what its first steps need.
    let lane = (0..LANES).find(|lane| order.next_window(0, *lane) > 3).unwrap();
    let next = order.next_window(0, lane);
    let shards = order.lane_shards(next..next + 1, lane);
    let names: Vec<String> = shards.iter().map(|shard| open(&config).manifest().shards[*shard as usize].name.clone()).collect();
    let _feed = fed(&config, lane..lane + 1, 0..EPOCH);
    let begin = Instant::now();
    let there = |name: &String| {
        let record = name.rsplit('/').next().unwrap().replace(".arrow", ".json");
        folder(&config).join(record).exists()
    };
    while !names.iter().all(there) {
        assert!(begin.elapsed() < Duration::from_secs(30), "{names:?} were not made ahead");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_run_that_encodes_ahead_trains_the_same_bits_and_leaves_whole_sidecars() {
    RUNTIME.block_on(async {
        let set = ["train.steps=8", "checkpoint.every=4"];
        let ((_there, before), (_bare, ahead)) = (embedded(&set), bare(&set));
        let mut states = Vec::new();
        // The third time everything is there.
        for (config, captions) in [(&before, None), (&ahead, Some(SCENES)), (&ahead, None)] {
            let (_folder, url) = run_folder();
            let (mut worker, _) = Scripted::start().await.training(config, &url, None).await;
            let (heard, finished) = Heard::of(&mut worker).await;
            assert_eq!((finished.step, finished.outcome()), (8, Outcome::Done));
            assert_eq!(worker.committed(8).await.unwrap(), Ending::Done);
            let told: u64 = heard.progress.iter().filter_map(|progress| progress.read.get("captions_embedded")).sum();
            assert_eq!(told, captions.unwrap_or(0));
            states.push(heard.states);
        }
        assert_eq!(states[0].len(), 2);
        assert!(states.iter().all(|other| *other == states[0]));
        assert!(files(&folder(&ahead)) == files(&folder(&before)));
    });
}

/// Shards that can be opened only once a test lets go of them: until then an encoder stands still.
struct Stuck(Vec<PathBuf>);

impl Stuck {
    fn shards(config: &RunConfig) -> Self {
        let folder = PathBuf::from(&config.data.path);
        let shards: Vec<_> = open(config).manifest().shards.iter().map(|shard| folder.join(&shard.name)).collect();
        for shard in &shards {
            std::fs::remove_file(shard).unwrap();
            assert!(Command::new("mkfifo").arg(shard).status().unwrap().success());
        }
        Self(shards)
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        for shard in &self.0 {
            // Whoever waits for a writer finds that this is no file. Nobody may.
            let _ = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(shard);
        }
    }
}

/// A rank that is told to leave while its encoder is at work has nothing to commit, and does not wait for it.
#[test]
fn a_drain_before_the_first_step_does_not_wait_for_the_encoder() {
    RUNTIME.block_on(async {
        let (_bare, config) = bare(&[]);
        let _stuck = Stuck::shards(&config);
        let (_folder, url) = run_folder();
        let (mut worker, _) = Scripted::start().await.training(&config, &url, None).await;
        while worker.beat().await.encoding != Some(0) {}
        worker.say(Say::Drain(v1::Drain { reason: "a spot machine goes".into() }));
        let (heard, finished) = Heard::of(&mut worker).await;
        assert_eq!((finished.step, finished.outcome()), (0, Outcome::Preempted));
        assert!(heard.states.is_empty() && heard.progress.is_empty());
        worker.hang_up();
        assert_eq!(worker.ended().await.unwrap(), Ending::Preempted);
    });
}

#[test]
fn an_encoder_that_stands_still_fails_its_worker() {
    RUNTIME.block_on(async {
        let (_bare, config) = bare(&["workers.step_timeout=200ms"]);
        let _stuck = Stuck::shards(&config);
        let (_folder, url) = run_folder();
        let (mut worker, _) = Scripted::start().await.training(&config, &url, None).await;
        let failed = worker.failed().await;
        assert!(!failed.permanent && failed.message.contains("workers.step_timeout"), "{failed:?}");
    });
}

/// A byte flipped in a shard is told by the step that needs its captions, with the file's name.
#[test]
fn a_shard_that_cannot_be_read_is_told_by_its_name() {
    let (bare, config) = bare(&[]);
    let victim = open(&config).manifest().shards[0].name.clone();
    let mut bytes = std::fs::read(bare.path().join(&victim)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(bare.path().join(&victim), bytes).unwrap();
    let mut feed = fed(&config, 0..LANES, 0..EPOCH);
    let error = (0..EPOCH).find_map(|_| feed.next_step().err()).unwrap();
    assert!(matches!(error, FeedError::Data(_)) && error.is_permanent() && error.to_string().contains(&victim), "{error}");
}
