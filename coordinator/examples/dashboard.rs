//! Something to look at: a run with a long past, trained on by workers that follow the protocol and compute nothing, or such a job. Prints where
//! its dashboard is. For `make test-dashboard`, and for whoever works on the page.
//!
//!     cargo run --release -p ella-coordinator --example dashboard -- FOLDER [--past 1000000] [--steps 1200000] [--world 4]
//!         [--pace-ms 50] [--loss-of-workers] [--job]
//!
//! With `--write-only` only the past is written.

#![allow(clippy::unwrap_used)] // it is a test's helper

#[path = "../tests/common/mod.rs"]
mod common;

use bytes::Bytes;
use common::{Fake, Life, Script, hello};
use ella_coordinator::core::PARTS;
use ella_coordinator::shell::{Coordinator, Opened, Options};
use ella_proto::config::{JobConfig, RunConfig};
use ella_proto::v1::from_worker::Body as Say;
use ella_proto::v1::to_worker::Body as Told;
use ella_proto::v1::{self, LeaseDone, LeaseRenew, LeaseRequest};
use ella_store::{Body, Commit, Digest, LedgerEpoch, Part, RunLog, Store, Term, commit_folder};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

/// Lines of a file, as a coordinator writes at most.
const BATCH: u64 = 4_096;
/// Between the commits of the past.
const EVERY: u64 = 10_000;
/// Milliseconds of a step of the past.
const STEP_MS: u64 = 120;
/// Samples of a step.
const SAMPLES: u64 = 32;

struct Args {
    folder: String,
    past: u64,
    steps: u64,
    world: usize,
    pace: Duration,
    loses: bool,
    job: bool,
    write_only: bool,
}

impl Args {
    fn parse() -> Self {
        let args: Vec<String> = std::env::args().skip(1).collect();
        let value = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)?.parse::<u64>().ok());
        let is = |name: &str| args.iter().any(|arg| arg == name);
        let past = value("--past").unwrap_or(0);
        Self {
            folder: args.first().expect("a FOLDER is needed").clone(),
            past,
            steps: value("--steps").unwrap_or(past + past / 5 + 2_000),
            world: usize::try_from(value("--world").unwrap_or(4)).unwrap(),
            pace: Duration::from_millis(value("--pace-ms").unwrap_or(50)),
            loses: is("--loss-of-workers"),
            job: is("--job"),
            write_only: is("--write-only"),
        }
    }
}

#[tokio::main]
async fn main() {
    let args = Args::parse();
    if args.job {
        return job(&args).await;
    }
    let text = format!(
        "[run]\noutput = {:?}\n[base]\nmodel = \"models/sd15\"\n[text]\nmodel = \"models/flan-t5-xl\"\n[data]\npath = \"data/scenes\"\n\
         [train]\nsteps = {}\nglobal_batch = {}\nmicro_batch = 1\n[checkpoint]\nevery = {}\nkeep = 3\n[workers]\ncount = {}\nmin = 1\njoin_window = \"1s\"\n",
        args.folder,
        args.steps,
        args.world.max(32).next_multiple_of(args.world),
        if args.past > 100_000 { EVERY } else { 200 },
        args.world
    );
    let config = RunConfig::parse(&text, "example", &[]).unwrap();
    let store = Store::open(&args.folder).unwrap();
    let began = Instant::now();
    if args.past > 0 && store.head("run.toml").await.unwrap().is_none() {
        write_past(&store, &config, args.past).await;
    }
    let written = began.elapsed().as_secs_f64();
    if args.write_only {
        return println!("{{\"written_seconds\":{written:.2}}}");
    }
    train(&args, &config, &store, written).await;
}

/// A number between 0 and 1 that is the same for the same `n`.
fn noise(n: u64) -> f64 {
    let mixed = n.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (mixed >> 11) as f64 / (1u64 << 53) as f64
}

fn loss(step: u64) -> f64 {
    let base = 0.12 + 0.9 / (1.0 + step as f64 / 400.0).sqrt() + 0.05 / (1.0 + step as f64 / 60_000.0);
    let peak = if noise(step * 7) > 0.9999 { 1.5 } else { 0.0 };
    base * (0.85 + 0.3 * noise(step)) + peak
}

fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// What a coordinator would have left behind of `steps` steps, and a commit of the last.
async fn write_past(store: &Store, config: &RunConfig, steps: u64) {
    store.put("run.toml", config.to_toml().into()).await.unwrap();
    let digest: Digest = config.digest().parse().unwrap();
    let term = Term { host: "past".into(), version: "0.1.0".into(), config_digest: digest };
    let (mut log, _) = RunLog::claim(store, term, "past", 1).await.unwrap();
    let begin = now_ms() - steps * STEP_MS - 60_000;
    let (mut file, mut events) = (1, String::new());
    let names: Vec<String> = (0..4).map(|worker| format!("past{worker} on node-{worker}")).collect();
    let generation = |n: u64, workers: &[String], step: u64| {
        let at = begin + step * STEP_MS;
        format!(
            "{{\"at_unix_ms\":{at},\"event\":\"generation\",\"generation\":{n},\"workers\":{},\"from_step\":{step}}}\n",
            serde_json::json!(workers)
        )
    };
    events += &generation(1, &names, 0);
    for first in (1..=steps).step_by(BATCH as usize) {
        let mut text = String::with_capacity(BATCH as usize * 360);
        for step in first..(first + BATCH).min(steps + 1) {
            line(&mut text, step, begin + step * STEP_MS + if step > steps / 2 { 20_000 } else { 0 }, steps);
            if step.is_multiple_of(EVERY) {
                let at = begin + step * STEP_MS;
                writeln!(events, "{{\"at_unix_ms\":{at},\"event\":\"committed\",\"step\":{step},\"folder\":\"commits/{step:012}.1\",\"bytes\":1070000000}}").unwrap();
            }
        }
        store.put(&format!("metrics/000001-{file:06}.jsonl"), text.into()).await.unwrap();
        file += 1;
    }
    let at = begin + steps / 2 * STEP_MS;
    writeln!(
        events,
        "{{\"at_unix_ms\":{at},\"event\":\"lost\",\"worker\":\"past3 on node-3\",\"rank\":3,\"why\":\"its stream was closed\"}}"
    )
    .unwrap();
    events += &generation(2, &names[..3], steps / 2);
    events += &generation(3, &names, steps * 3 / 4);
    store.put("events/000001-000001.jsonl", events.into()).await.unwrap();
    let folder = commit_folder(steps, log.term(), 1);
    let mut parts = Vec::new();
    for name in PARTS {
        let bytes = Bytes::from(format!("{name} {steps}"));
        store.put(&format!("{folder}/{name}"), bytes.clone()).await.unwrap();
        parts.push(Part { name: name.to_string(), bytes: bytes.len() as u64, blake3: Digest::of(&bytes) });
    }
    let ledger = vec![LedgerEpoch { epoch: 0, samples: steps * SAMPLES, hash: format!("{steps:032x}") }];
    let commit = Commit {
        step: steps,
        generation: 1,
        world: 4,
        folder,
        parts,
        config_digest: digest,
        data_digest: Digest::of(b"data"),
        models_digest: Digest::of(b"models"),
        epoch: 0,
        step_in_epoch: steps,
        ledger,
        state_digest: Digest::of(&steps.to_le_bytes()),
        computed_with: Default::default(),
    };
    log.append(Body::Commit(commit), now_ms()).await.unwrap();
}

fn line(text: &mut String, step: u64, at: u64, steps: u64) {
    let (loss, norm, seconds) = (loss(step), 0.4 + noise(step * 3), 0.1 + 0.03 * noise(step * 5));
    let lr = 1e-4 * (step as f64 / 2_000.0).min(1.0) * (0.55 + 0.45 * (std::f64::consts::PI * step as f64 / steps as f64).cos());
    let held_out = if step.is_multiple_of(500) { format!(",\"held_out_loss\":{:.6}", loss * 1.04) } else { String::new() };
    writeln!(
        text,
        "{{\"at_unix_ms\":{at},\"step\":{step},\"samples\":{SAMPLES},\"loss\":{loss:.17},\"grad_norm\":{norm:.17},\"lr\":{lr:.17},\
         \"step_seconds\":{seconds:.6},\"parts\":{{\"data\":0.001,\"encode\":0.0,\"forward\":0.04,\"backward\":0.05,\"reduce\":0.01,\"update\":0.004,\
         \"commit\":0.0,\"reduce_hidden\":0.0}}{held_out}}}"
    )
    .unwrap();
}

/// What a rank says of a step: the last one feeds slowly.
fn told(step: u64, rank: u32) -> v1::Progress {
    let slow = if rank % 4 == 3 { 0.05 } else { 0.002 };
    let (data, forward, backward) =
        (slow * (0.5 + noise(step + u64::from(rank))), 0.03 + 0.004 * noise(step * 11 + u64::from(rank)), 0.045);
    let reduce = (0.155 - data - forward - backward).max(0.01);
    let parts = v1::StepParts { data, forward, backward, reduce, update: 0.006, commit: 0.0, encode: 0.01, reduce_hidden: 0.02, draw: 0.0 };
    v1::Progress {
        step,
        samples: SAMPLES,
        loss: loss(step),
        grad_norm: 0.4 + noise(step * 3),
        learning_rate: 1e-4 * (step as f64 / 200.0).min(1.0),
        step_seconds: data + forward + backward + reduce + 0.008,
        parts: Some(parts),
        held_out_loss: step.is_multiple_of(50).then(|| loss(step) * 1.04),
        at_unix_ms: now_ms(),
        skipped: if step.is_multiple_of(90) && rank == 0 { HashMap::from([("nonfinite_loss".to_owned(), 1)]) } else { HashMap::new() },
        ..v1::Progress::default()
    }
}

fn options() -> Options {
    Options { linger: Duration::from_secs(2), ..Options::default() }
}

/// Says where everything is, and what it took.
fn announce(coordinator: &Coordinator, written: f64, opened: f64) {
    let addresses = coordinator.addresses();
    println!(
        "{{\"http\":\"http://{}\",\"grpc\":\"{}\",\"written_seconds\":{written:.2},\"open_seconds\":{opened:.3}}}",
        addresses.http, addresses.grpc
    );
}

async fn train(args: &Args, config: &RunConfig, store: &Store, written: f64) {
    let began = Instant::now();
    let Opened::Ready(coordinator) = Coordinator::open(config, store.clone(), &options()).await.unwrap() else {
        return println!("{{\"done\":true}}");
    };
    announce(&coordinator, written, began.elapsed().as_secs_f64());
    let url = coordinator.addresses().grpc.to_string();
    let (_stops, receiver) = mpsc::channel(4);
    let mut run = tokio::spawn(coordinator.run(receiver));
    let (limit, limits) = watch::channel(args.past);
    let live = |name: String| {
        let (url, config, store, limits) = (url.clone(), config.clone(), store.clone(), limits.clone());
        tokio::spawn(async move {
            let host = format!("node-{}", name.trim_start_matches(|c: char| !c.is_ascii_digit()));
            let Ok(fake) = Fake::attach(&url, v1::Hello { host, ..hello(&name) }).await else { return };
            Life::new(fake, &config, &store, Script::default()).telling(told).up_to(limits).live().await;
        })
    };
    let mut workers = Vec::new();
    for n in 0..args.world {
        workers.push(live(format!("worker{n}")));
        // More than a few at once are more than a listener's queue has room for.
        if n % 16 == 15 {
            sleep(Duration::from_millis(50)).await;
        }
    }
    let mut next = args.world;
    let (mut ticks, mut losses) = (tokio::time::interval(args.pace), tokio::time::interval(Duration::from_secs(7)));
    losses.tick().await;
    loop {
        tokio::select! {
            outcome = &mut run => return println!("{{\"outcome\":{:?}}}", format!("{outcome:?}")),
            _ = ticks.tick() => { limit.send_modify(|limit| *limit += 1); }
            _ = losses.tick(), if args.loses && args.world > 1 => {
                workers.remove(1).abort();
                sleep(Duration::from_millis(300)).await;
                workers.push(live(format!("worker{next}")));
                next += 1;
            }
        }
    }
}

async fn job(args: &Args) {
    let config =
        JobConfig::parse(&format!("[job]\nkind = \"prepare\"\ndata = {:?}\n[prepare]\nx = 1\n", args.folder), "example", &[]).unwrap();
    let coordinator = Coordinator::open_job(&config, &options()).await.unwrap();
    announce(&coordinator, 0.0, 0.0);
    let url = coordinator.addresses().grpc.to_string();
    let (_stops, receiver) = mpsc::channel(4);
    let run = tokio::spawn(coordinator.run(receiver));
    for n in 0..args.world {
        let (url, pace) = (url.clone(), args.pace);
        tokio::spawn(async move {
            let fake = Fake::attach(&url, v1::Hello { host: format!("node-{n}"), ..hello(&format!("worker{n}")) }).await.unwrap();
            work(fake, pace).await;
        });
    }
    println!("{{\"outcome\":{:?}}}", format!("{:?}", run.await));
}

/// Does units until the job is over; some of them cannot be done.
async fn work(mut fake: Fake, pace: Duration) {
    fake.say(Say::LeaseRequest(LeaseRequest { slots: 1 })).await;
    while let Some(told) = fake.next().await {
        let Told::LeaseGrant(granted) = told else { return };
        let (lease_id, unit) = (granted.lease_id, granted.unit);
        let then = if unit == "plan" { (0..400).map(|n| format!("images-{n:05}.tar")).collect() } else { Vec::new() };
        let bad = unit.ends_with("13.tar");
        if unit != "plan" {
            for done in 1..=10 {
                sleep(pace).await;
                fake.say(Say::LeaseRenew(LeaseRenew { lease_id, done: done * 100 })).await;
            }
        }
        let error = if bad { "image 7 of 1000: <b>truncated</b>".to_owned() } else { String::new() };
        let counts = [("kept".to_owned(), 930), ("refused.too_small".to_owned(), 50), ("refused.caption_short".to_owned(), 20)];
        let counts = if bad || unit == "plan" { HashMap::new() } else { counts.into() };
        let done = if unit == "plan" { 0 } else { 1000 };
        fake.say(Say::LeaseDone(LeaseDone { lease_id, unit, error, permanent: bad, then, done, counts })).await;
    }
}
