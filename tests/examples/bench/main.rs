//! Benchmarks: programs that print ratios, side by side in one run. `make bench`.

mod restart;

use anyhow::{Context as _, Result, ensure};
use ella_tests::{Processes, World, binary, coordinator, signal, unix_ms};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long the coordinator runs, and is stopped, in turn.
const WINDOW: Duration = Duration::from_secs(5);
const ROUNDS: usize = 4;

fn main() -> Result<()> {
    let (running, stopped) = coordinator_costs_nothing()?;
    println!("LIVE: steps/s with the coordinator running {running:.2}, stopped (SIGSTOP) {stopped:.2}, ratio {:.3}", stopped / running);
    restart::killed_and_back()?;
    let memory = idle_coordinator()?;
    println!("idle coordinator: {memory:.1} MB resident");
    Ok(())
}

/// Steps per second of two workers while their coordinator runs, and while it is stopped, in alternating windows of one run.
fn coordinator_costs_nothing() -> Result<(f64, f64)> {
    let world = World::new(96)?;
    let run = world.run("live", 1_000_000, "[checkpoint]\nevery = 1000000\n[workers]\ncount = 2\n")?;
    let (child, grpc, _) = coordinator(&run.config, &[])?;
    let (coordinator, url) = (child.id(), format!("http://{grpc}"));
    let mut processes = Processes(vec![child]);
    for _ in 0..2 {
        processes
            .0
            .push(Command::new(binary("ella-worker")?).args(["--coordinator", &url, "--device", "cpu"]).stderr(Stdio::null()).spawn()?);
    }
    ella_tests::wait_until("the first steps", || run.output.join("metrics").read_dir().is_ok_and(|mut files| files.next().is_some()))?;
    let mut windows = Vec::new();
    for round in 0..2 * ROUNDS {
        let stop = round % 2 == 1;
        signal(coordinator, if stop { libc::SIGSTOP } else { libc::SIGCONT });
        // What the change itself costs belongs to neither side.
        std::thread::sleep(Duration::from_millis(300));
        let begin = unix_ms();
        std::thread::sleep(WINDOW);
        windows.push((stop, begin, unix_ms()));
    }
    signal(coordinator, libc::SIGCONT);
    processes.all_run()?;
    signal(coordinator, libc::SIGTERM);
    let patience = Instant::now() + Duration::from_secs(60);
    while processes.0[0].try_wait()?.is_none() {
        ensure!(Instant::now() < patience, "the coordinator did not leave within 60 s");
        std::thread::sleep(Duration::from_millis(50));
    }
    let times = step_times(&run.output.join("metrics"))?;
    let rate = |stop: bool| {
        let rates: Vec<f64> = windows.iter().filter(|w| w.0 == stop).map(|(_, begin, end)| rate(&times, *begin, *end)).collect();
        rates.iter().sum::<f64>() / rates.len() as f64
    };
    Ok((rate(false), rate(true)))
}

/// Steps per second between the first and the last step of a window.
fn rate(times: &[u64], begin: u64, end: u64) -> f64 {
    let inside: Vec<u64> = times.iter().copied().filter(|t| (begin..=end).contains(t)).collect();
    match (inside.first(), inside.last()) {
        (Some(first), Some(last)) if last > first => (inside.len() - 1) as f64 * 1000.0 / (last - first) as f64,
        _ => 0.0,
    }
}

/// When each step was applied, by the worker's clock.
fn step_times(metrics: &std::path::Path) -> Result<Vec<u64>> {
    let mut times = Vec::new();
    for file in metrics.read_dir()? {
        for line in std::fs::read_to_string(file?.path())?.lines() {
            let step: serde_json::Value = serde_json::from_str(line)?;
            times.push(step["at_unix_ms"].as_u64().context("a metric without a time")?);
        }
    }
    times.sort_unstable();
    Ok(times)
}

/// Resident memory, in MB, of a coordinator that waits for workers.
fn idle_coordinator() -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("run.toml");
    let output = folder.path().join("run");
    let text = format!("[run]\noutput = \"{}\"\n[base]\nmodel = \"m\"\n[text]\nmodel = \"t\"\n[data]\npath = \"d\"\n", output.display());
    std::fs::write(&config, text)?;
    let (child, ..) = coordinator(&config, &[])?;
    let id = child.id();
    let _processes = Processes(vec![child]);
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib / 1024.0)
}
