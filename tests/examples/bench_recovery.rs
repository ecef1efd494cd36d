//! What a death costs, and a joiner, at the connector's true size (66.8 million parameters with AdamW's moments and an average): four workers, of
//! which one after the other is killed (SIGKILL) and replaced. `make bench-recovery`. Beside it, torchrun restarting four processes that
//! train as many parameters, if PEERS_PYTHON names a Python that has torch.
//!
//! Times are from the signal to the first step that the survivors apply, less that step itself; for a joiner, from the last step without it to
//! the first with it, less that step.

use anyhow::{Context as _, Result, ensure};
use ella_tests::{Processes, binary, coordinator, ella, journal, signal, unix_ms};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const WORKERS: usize = 4;
const KILLS: usize = 20;

fn main() -> Result<()> {
    let kills = std::env::args().nth(1).map_or(Ok(KILLS), |text| text.parse())?;
    let folder = tempfile::tempdir()?;
    let run = world(folder.path())?;
    let times = harass(&run, kills)?;
    report(&run.output, &times)?;
    match std::env::var("PEERS_PYTHON") {
        Ok(python) => peer(&python),
        Err(_) => {
            println!("torchrun: not measured; name a Python that has torch in PEERS_PYTHON");
            Ok(())
        }
    }
}

struct Run {
    config: PathBuf,
    output: PathBuf,
}

/// A data set, and models between which the connector has its true size.
fn world(folder: &Path) -> Result<Run> {
    let path = |name: &str| folder.join(name).display().to_string();
    let (tars, data, models, text) = (path("scenes"), path("data"), path("models"), path("models/text"));
    ella(&["scenes", "--out", &tars, "--count", "64", "--seed", "1", "--size", "64", "--per-tar", "32"])?;
    ella(&["prepare", &tars, "--out", &data, "--resolution", "64"])?;
    ella(&["init-base", "--preset", "nano-wide", "--seed", "1", "--captions", &data, "--out", &models])?;
    ella(&["embed", &data, "--text", &text, "--max-tokens", "32"])?;
    let (config, output) = (folder.join("run.toml"), folder.join("run"));
    let text = format!(
        "[run]\noutput = \"{}\"\n[base]\nmodel = \"{models}/base\"\n[text]\nmodel = \"{text}\"\nmax_tokens = 32\n[data]\npath = \"{data}\"\n\
         [train]\nsteps = 1000000\nglobal_batch = {WORKERS}\nmicro_batch = 1\neval_every = 0\n\
         [checkpoint]\nevery = 1000000\n[workers]\ncount = {WORKERS}\njoin_window = \"100ms\"\n",
        output.display()
    );
    std::fs::write(&config, text)?;
    Ok(Run { config, output })
}

/// Kills one worker after the other, and starts another in its place. Gives the times of the kills.
fn harass(run: &Run, kills: usize) -> Result<Vec<u64>> {
    let (child, grpc, status) = coordinator(&run.config, &[])?;
    let url = format!("http://{grpc}");
    let mut processes = Processes(vec![child]);
    let worker = || -> Result<Child> {
        Ok(Command::new(binary("ella-worker")?).args(["--coordinator", &url, "--device", "cpu"]).stderr(Stdio::null()).spawn()?)
    };
    for _ in 0..WORKERS {
        processes.0.push(worker()?);
    }
    let mut times = Vec::new();
    for kill in 0..kills {
        let pids = status.settled(WORKERS)?;
        // At any moment of a step.
        std::thread::sleep(Duration::from_millis((kill as u64 * 377) % 1500));
        times.push(unix_ms());
        signal(pids[kill % WORKERS], libc::SIGKILL);
        status.settled(WORKERS - 1)?;
        processes.0.push(worker()?);
        eprintln!("kill {} of {kills}", kill + 1);
    }
    status.settled(WORKERS)?;
    // Its journal is complete when it has left.
    signal(processes.0[0].id(), libc::SIGTERM);
    processes.0[0].wait()?;
    Ok(times)
}

struct Step {
    number: u64,
    at: u64,
    took: u64,
}

fn report(run: &Path, kills: &[u64]) -> Result<()> {
    let metrics = journal(run, "metrics")?;
    let step = |metric: &Value| -> Result<Step> {
        let took = (metric["step_seconds"].as_f64().context("no seconds")? * 1000.0) as u64;
        Ok(Step { number: metric["step"].as_u64().context("no step")?, at: metric["at_unix_ms"].as_u64().context("no time")?, took })
    };
    let steps: Vec<Step> = metrics.iter().map(step).collect::<Result<_>>()?;
    let numbers: std::collections::BTreeSet<u64> = steps.iter().map(|step| step.number).collect();
    ensure!(metrics.iter().all(|metric| metric["samples"] == WORKERS), "the global batch changed");
    let events = journal(run, "events")?;
    let generations: Vec<(u64, usize, u64)> = events
        .iter()
        .filter(|event| event["event"] == "generation")
        .map(|event| {
            let world = event["workers"].as_array().map_or(0, Vec::len);
            Ok((event["at_unix_ms"].as_u64().context("no time")?, world, event["from_step"].as_u64().context("no step")?))
        })
        .collect::<Result<_>>()?;
    let first_of = |from: u64| steps.iter().find(|step| step.number == from + 1);
    let mut deaths: Vec<u64> = Vec::new();
    for kill in kills {
        let (_, _, from) =
            generations.iter().find(|(at, world, _)| at >= kill && *world == WORKERS - 1).context("no generation after a kill")?;
        let first = first_of(*from).context("no step after a kill")?;
        deaths.push((first.at - kill).saturating_sub(first.took));
    }
    let mut joins: Vec<u64> = Vec::new();
    for (_, _, from) in generations.iter().skip(1).filter(|(_, world, _)| *world == WORKERS) {
        if let (Some(last), Some(first)) = (steps.iter().find(|step| step.number == *from), first_of(*from)) {
            joins.push((first.at - last.at).saturating_sub(first.took));
        }
    }
    if std::env::var_os("ELLA_VERBOSE").is_some() {
        breakdown(&events, &steps, kills)?;
        for metric in metrics.iter().rev().take(3) {
            println!("step {}: {}", metric["step"], metric["parts"]);
        }
    }
    deaths.sort_unstable();
    joins.sort_unstable();
    let median = |times: &[u64]| times.get(times.len() / 2).copied().unwrap_or_default();
    let mut took: Vec<u64> = steps.iter().map(|step| step.took).collect();
    took.sort_unstable();
    println!("a step of {WORKERS} workers at 66.8 million parameters: median {} ms", median(&took));
    println!(
        "deaths: {} of {} kills; from SIGKILL to the next applied step, less that step: median {} ms, worst {} ms",
        deaths.len(),
        kills.len(),
        median(&deaths),
        deaths.last().unwrap_or(&0)
    );
    println!(
        "joins: {}; the others' pause, less the step: median {} ms, worst {} ms",
        joins.len(),
        median(&joins),
        joins.last().unwrap_or(&0)
    );
    println!("steps applied {}, of which more than once {}; the global batch unchanged in all", steps.len(), steps.len() - numbers.len());
    Ok(())
}

/// When after each kill it was noticed, the generation was formed and all ranks were ready, and the first step was applied; in ms.
fn breakdown(events: &[Value], steps: &[Step], kills: &[u64]) -> Result<()> {
    for kill in kills {
        let mut line = String::new();
        for name in ["lost", "generation", "started"] {
            let event = events.iter().find(|event| event["event"] == name && event["at_unix_ms"].as_u64().is_some_and(|at| at >= *kill));
            let at = event.and_then(|event| event["at_unix_ms"].as_u64()).context("no event after a kill")?;
            line += &format!("{name} {}  ", at - kill);
        }
        let first = steps.iter().find(|step| step.at > *kill).context("no step after a kill")?;
        println!("{line}step {} at {}, which took {}", first.number, first.at - kill, first.took);
    }
    Ok(())
}

fn peer(python: &str) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/recovery_peer.py");
    let status = Command::new(python).arg(script).status().with_context(|| format!("{python} cannot be started"))?;
    ensure!(status.success(), "the peer's script failed");
    Ok(())
}
