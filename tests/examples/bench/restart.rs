//! A coordinator that is killed (SIGKILL), and started again at the same address later. Two workers go on meanwhile; what they do is read from their
//! own logs, for nobody else sees it.

use anyhow::{Context as _, Result, ensure};
use ella_tests::{Processes, Run, World, binary, coordinator, ella, exists, journal, signal, unix_ms};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

const WORKERS: usize = 2;
const ROUNDS: usize = 3;
/// How long there is no coordinator.
const AWAY: Duration = Duration::from_secs(10);
/// How long steps are looked at after the next one has found them.
const AFTER: Duration = Duration::from_secs(5);
/// How long nothing happens before a kill: at least as long as what is compared with it.
const CALM: Duration = Duration::from_secs(20);

/// A coordinator's death, and the moment at which the next one goes on with the generation.
struct Round {
    killed: u64,
    adopted: u64,
}

/// Steps by number, and when each was applied.
type Steps = Vec<(u64, u64)>;

/// Measures, checks that no step is lost or done twice, and prints it.
pub(crate) fn killed_and_back() -> Result<()> {
    let world = World::new(96)?;
    let run = world.run("restart", 1_000_000, "[checkpoint]\nevery = 1000000\n[workers]\ncount = 2\n")?;
    let logs: Vec<PathBuf> = (0..WORKERS).map(|worker| world.path(&format!("worker-{worker}.log"))).collect();
    let kills = kill_again_and_again(&run, &logs)?;
    let ranks: Vec<Steps> = logs.iter().map(|log| applied(log)).collect::<Result<_>>()?;
    let rounds = rounds(&run.output, &kills)?;
    let told = check_steps(&run.output, &ranks)?;
    let alone: usize =
        rounds.iter().map(|round| ranks[0].iter().filter(|(_, at)| (round.killed..round.adopted).contains(at)).count()).sum();
    println!(
        "coordinator killed and back after {} s, {ROUNDS} times, {WORKERS} workers: {alone} steps applied without one; of all {} none is missing and \
         none done twice (audited; {told} are in metrics/); 1 generation, {} terms",
        AWAY.as_secs(),
        ranks[0].len(),
        kills.len() + 1,
    );
    print_gaps(&ranks, &rounds);
    Ok(())
}

/// Gives the times of the kills. In the end the run is told to commit and leave.
fn kill_again_and_again(run: &Run, logs: &[PathBuf]) -> Result<Vec<u64>> {
    let (child, address, mut status) = coordinator(&run.config, &[])?;
    let mut processes = Processes(vec![child]);
    for log in logs {
        processes.0.push(worker(&address, log)?);
    }
    status.settled(WORKERS)?;
    let mut kills = Vec::new();
    for round in 0..ROUNDS {
        // At any moment of a step.
        std::thread::sleep(CALM + Duration::from_millis(37 * round as u64));
        kills.push(unix_ms());
        signal(processes.0[0].id(), libc::SIGKILL);
        processes.0[0].wait()?;
        std::thread::sleep(AWAY);
        (processes.0[0], _, status) = coordinator(&run.config, &["--listen", &address])?;
        let settled = processes.all_run().and_then(|()| status.settled(WORKERS)).and_then(|_| processes.all_run());
        settled.with_context(|| format!("after kill {}; the workers' last words: {}", round + 1, last_words(logs)))?;
        std::thread::sleep(AFTER);
    }
    signal(processes.0[0].id(), libc::SIGTERM);
    for process in &mut processes.0 {
        process.wait()?;
    }
    Ok(kills)
}

fn worker(coordinator: &str, log: &Path) -> Result<Child> {
    let url = format!("http://{coordinator}");
    let mut command = Command::new(binary("ella-worker")?);
    command.args(["--coordinator", &url, "--device", "cpu", "--log-format", "json"]).env("ELLA_LOG", "warn,ella_worker::train=debug");
    Ok(command.stderr(File::create(log)?).spawn()?)
}

fn last_words(logs: &[PathBuf]) -> String {
    let last = |log: &PathBuf| std::fs::read_to_string(log).ok()?.lines().last().map(str::to_owned);
    logs.iter().map(|log| last(log).unwrap_or_default()).collect::<Vec<_>>().join("; ")
}

/// What a worker's log says it has applied.
fn applied(log: &Path) -> Result<Steps> {
    let mut steps = Vec::new();
    for line in std::fs::read_to_string(log)?.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| format!("{}: {line}", log.display()))?;
        if line["fields"]["message"] == "applied" {
            let number = |name: &str| line["fields"][name].as_u64().context("a step without a number");
            steps.push((number("step")?, number("at_unix_ms")?));
        }
    }
    Ok(steps)
}

/// When each coordinator went on with the generation, which must be the first's.
fn rounds(run: &Path, kills: &[u64]) -> Result<Vec<Round>> {
    let events = journal(run, "events")?;
    let of = |name: &str| events.iter().filter(|event| event["event"] == name).collect::<Vec<_>>();
    let adopted = of("adopted");
    ensure!(of("generation").len() <= 1 && adopted.len() == kills.len(), "another generation: {events:?}");
    ensure!(adopted.iter().all(|event| event["generation"] == 1), "another generation: {adopted:?}");
    let round = |(killed, event): (&u64, &&Value)| {
        Ok(Round { killed: *killed, adopted: event["at_unix_ms"].as_u64().context("an event without a time")? })
    };
    kills.iter().zip(&adopted).map(round).collect()
}

/// Every rank has applied every step once; the commit's ledger says so of the samples; the metrics have none twice. Gives how many these have.
fn check_steps(run: &Path, ranks: &[Steps]) -> Result<usize> {
    for steps in ranks {
        let numbers: Vec<u64> = steps.iter().map(|(number, _)| *number).collect();
        ensure!(numbers.iter().copied().eq(1..=steps.len() as u64), "steps are missing or done twice: {numbers:?}");
        ensure!(steps.len() == ranks[0].len(), "ranks have applied different numbers of steps");
    }
    ensure!(exists(run.join("commits")), "the run has not committed");
    let audit: Value = serde_json::from_str(&ella(&["audit", &run.display().to_string(), "--json"])?)?;
    ensure!(audit["ok"] == true && audit["step"] == ranks[0].len(), "{audit}");
    let metrics = journal(run, "metrics")?;
    let told: BTreeSet<u64> = metrics.iter().filter_map(|metric| metric["step"].as_u64()).collect();
    ensure!(told.len() == metrics.len(), "a step is in metrics/ twice");
    Ok(told.len())
}

/// From a kill until some time after the next coordinator came, and as long before the kill: the longest time between two steps.
fn print_gaps(ranks: &[Steps], rounds: &[Round]) {
    let gaps: Vec<BTreeMap<u64, u64>> =
        ranks.iter().map(|steps| steps.windows(2).map(|pair| (pair[1].1, pair[1].1 - pair[0].1)).collect()).collect();
    let longest = |from: u64, to: u64| gaps.iter().flat_map(|gaps| gaps.range(from..to)).map(|(_, gap)| *gap).max().unwrap_or_default();
    let mut all: Vec<u64> = gaps.iter().flat_map(|gaps| gaps.values().copied()).collect();
    all.sort_unstable();
    let median = all.get(all.len() / 2).copied().unwrap_or_default();
    let each: Vec<(u64, u64)> = rounds
        .iter()
        .map(|round| {
            let end = round.adopted + AFTER.as_millis() as u64;
            (longest(round.killed, end), longest(2 * round.killed - end, round.killed))
        })
        .collect();
    let list = |side: fn(&(u64, u64)) -> u64| each.iter().map(|pair| side(pair).to_string()).collect::<Vec<_>>().join(", ");
    let worst = each.iter().map(|pair| pair.0).max().unwrap_or_default();
    println!(
        "  longest time between two steps: {} ms, and in as long before each kill {} ms; a step takes {median} ms in the median, so the worst delay \
         is {:.2} of a step",
        list(|pair| pair.0),
        list(|pair| pair.1),
        worst.saturating_sub(median) as f64 / median.max(1) as f64,
    );
}
