//! One `ella train` whose processes are killed one by one, and asked to leave: it ends well by itself, and with the bytes of a calm run.
//!
//! `ELLA_CHAOS_SEED` draws other moments; every failure names its seed.

use anyhow::{Context as _, Result, bail, ensure};
use ella_tests::{
    Dice, Files, PATIENCE, Run, World, binary, children_of, ella, kill_group, lead, signal, spawn, try_ella, wait, wait_until,
};
use serde_json::Value;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const STEPS: u64 = 60;
const COMMITS: &str = "[checkpoint]\nevery = 5\n[workers]\njoin_window = \"100ms\"\n";

/// What one worker makes of it in peace.
fn calm(world: &World) -> Result<Files> {
    let run = world.run("calm", STEPS, COMMITS)?;
    ella(&run.train(&["workers.count=1"]))?;
    run.last_files()
}

/// A run of three workers that has begun to train.
struct Trained {
    run: Run,
    command: Child,
}

impl Trained {
    fn begin(world: &World, name: &str) -> Result<Self> {
        let run = world.run(name, STEPS, COMMITS)?;
        let mut command = spawn(&run.train(&["workers.count=3"]))?;
        let mut begun = false;
        wait_until("the first steps", || {
            begun = status(&run).is_some_and(|(step, _)| step > 1);
            begun || command.try_wait().is_ok_and(|ended| ended.is_some())
        })?;
        ensure!(begun, "{}", String::from_utf8_lossy(&wait(command)?.stderr));
        Ok(Self { run, command })
    }

    /// The command must succeed, and leave what a calm run does. Gives what it said.
    fn ends_like(self, calm: &Files) -> Result<String> {
        let Self { run, command } = self;
        let output = wait(command)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "ella train ended with {}:\n{said}", output.status);
        ensure!(run.last_commit()?.step == STEPS && run.last_files()? == *calm, "other bytes than a calm run's:\n{said}");
        let audit: Value = serde_json::from_str(&ella(&["audit", &run.output.display().to_string(), "--json"])?)?;
        ensure!(audit["ok"] == true, "{audit}\n{said}");
        Ok(said)
    }
}

/// Where the run's coordinator listens, once there is one.
fn address(run: &Run) -> Option<String> {
    std::fs::read_to_string(run.output.join("logs/coordinator.address")).ok()
}

/// The run's step and workers, if a coordinator answers.
fn status(run: &Run) -> Option<(u64, Vec<Value>)> {
    let output = try_ella(&["status", &address(run)?, "--json"]).ok().filter(|output| output.status.success())?;
    let status: Value = serde_json::from_slice(&output.stdout).ok()?;
    Some((status["step"].as_u64()?, status["workers"].as_array()?.clone()))
}

/// Kills one process after the other, each when the run is further than before: a worker, or every third time or so the coordinator. Gives
/// how many of each were killed.
fn harass(trained: &mut Trained, dice: &mut Dice) -> Result<(usize, usize)> {
    let (mut workers, mut coordinators, mut reached) = (0, 0, 1);
    let begin = Instant::now();
    while trained.command.try_wait()?.is_none() {
        if begin.elapsed() > PATIENCE {
            kill_group(trained.command.id());
            bail!("no end after step {reached}");
        }
        let Some((step, _)) = status(&trained.run).filter(|(step, _)| *step > reached) else { continue };
        reached = step;
        std::thread::sleep(Duration::from_millis(dice.below(500)));
        let (program, killed) = if dice.below(3) == 0 { ("ella-coordinator", &mut coordinators) } else { ("ella-worker", &mut workers) };
        let processes = children_of(trained.command.id(), program);
        if let Some(victim) = processes.get(dice.below(processes.len() as u64) as usize) {
            signal(*victim, libc::SIGKILL);
            *killed += 1;
            println!("step {step}: a SIGKILL for {program} {victim}");
        }
    }
    Ok((workers, coordinators))
}

#[test]
fn a_run_whose_processes_are_killed_ends_by_itself_with_a_calm_runs_bytes() -> Result<()> {
    let seed = std::env::var("ELLA_CHAOS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let world = World::new(103)?;
    let calm = calm(&world)?;
    let (mut workers, mut coordinators) = (0, 0);
    for round in 0..3 {
        let name = format!("killed-{round}");
        let trial = || -> Result<(usize, usize)> {
            let mut trained = Trained::begin(&world, &name)?;
            let killed = harass(&mut trained, &mut Dice::new(seed + round))?;
            trained.ends_like(&calm)?;
            Ok(killed)
        };
        let killed = trial().with_context(|| format!("round {round}, ELLA_CHAOS_SEED={seed}"))?;
        (workers, coordinators) = (workers + killed.0, coordinators + killed.1);
    }
    ensure!(workers > 0 && coordinators > 0, "killed were {workers} workers and {coordinators} coordinators: draw another ELLA_CHAOS_SEED");
    Ok(())
}

#[test]
fn one_worker_leaves_and_the_others_go_on() -> Result<()> {
    let world = World::new(103)?;
    let calm = calm(&world)?;
    let trained = Trained::begin(&world, "drained")?;
    let folder = trained.run.output.display().to_string();
    let nobody = try_ella(&["drain", "7", &folder])?;
    ensure!(nobody.status.code() == Some(4), "{nobody:?}");
    let drained: Value = serde_json::from_str(&ella(&["drain", "1", &folder, "--json"])?)?;
    ensure!(drained["rank"] == 1 && drained["workers"] == 2 && drained["step"].as_u64() < Some(STEPS), "{drained}");
    let pid = drained["pid"].as_u64().context("no pid")?;
    let left = status(&trained.run).is_none_or(|(_, workers)| workers.iter().all(|worker| worker["pid"] != pid));
    ensure!(left, "worker {pid} is still there");
    let said = trained.ends_like(&calm)?;
    ensure!(!said.contains("started again"), "a worker that left was started again:\n{said}");
    Ok(())
}

#[test]
fn workers_join_a_run_that_goes_on() -> Result<()> {
    let world = World::new(103)?;
    let calm = calm(&world)?;
    let trained = Trained::begin(&world, "joined")?;
    let run = trained.run.clone();
    let url = address(&run).context("no address")?;
    let joined = spawn(&[run.train(&["workers.count=2"]), vec!["--coordinator".to_owned(), url]].concat())?;
    trained.ends_like(&calm)?;
    let output = wait(joined)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let status: Value = serde_json::from_str(&ella(&["status", &run.output.display().to_string(), "--json"])?)?;
    ensure!(status["membership"]["joined"] == 2 && status["membership"]["lost"] == 0, "{status}");
    Ok(())
}

/// As by systemd, which signals the command, its coordinator and both processes of each worker; some of them are told by others too.
#[test]
fn a_signal_to_all_processes_of_a_run_is_one_wish_to_stop() -> Result<()> {
    let world = World::new(40)?;
    let run = world.run("stopped", 100_000, "[checkpoint]\nevery = 100000\n")?;
    let command = spawn(&run.train(&["workers.count=2"]))?;
    wait_until("the first steps", || status(&run).is_some_and(|(step, _)| step > 1))?;
    let workers = children_of(command.id(), "ella-worker");
    let watched = workers.iter().flat_map(|worker| children_of(*worker, "ella-worker"));
    let all = [vec![command.id()], children_of(command.id(), "ella-coordinator"), watched.collect(), workers.clone()].concat();
    ensure!(all.len() == 6, "{all:?}");
    for wish in [libc::SIGTERM, libc::SIGINT] {
        all.iter().for_each(|process| signal(*process, wish));
    }
    let output = wait(command)?;
    ensure!(output.status.code() == Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(run.last_commit()?.step > 1, "what was done is not committed");
    Ok(())
}

/// The first wish is for a commit, which a worker that is stopped keeps the others from.
#[test]
fn whoever_asks_twice_leaves_at_once_and_in_good_order() -> Result<()> {
    let world = World::new(40)?;
    let run = world.run("hurried", 100_000, "[checkpoint]\nevery = 100000\n")?;
    let mut command = spawn(&run.train(&["workers.count=2"]))?;
    wait_until("the first steps", || status(&run).is_some_and(|(step, _)| step > 1))?;
    // Workers take the run's config: whoever means another is told so.
    let url = address(&run).context("no address")?;
    let other = try_ella(&[run.train(&["run.seed=4"]), vec!["--coordinator".to_owned(), url]].concat())?;
    ensure!(other.status.code() == Some(2) && String::from_utf8_lossy(&other.stderr).contains("run.seed"), "{other:?}");

    let workers = children_of(command.id(), "ella-worker");
    let stopped = workers.first().map(|worker| children_of(*worker, "ella-worker")).unwrap_or_default();
    ensure!(!stopped.is_empty(), "{workers:?}");
    stopped.iter().for_each(|process| signal(*process, libc::SIGSTOP));
    let begin = Instant::now();
    wait_until("the command's end", || {
        // Long enough for a second wish, and not for a third.
        if begin.elapsed() < Duration::from_millis(1500) {
            signal(command.id(), libc::SIGTERM);
        }
        command.try_wait().is_ok_and(|ended| ended.is_some())
    })?;
    let output = wait(command)?;
    ensure!(output.status.code() == Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Machines on which other disks lie at the run's path: here, a process's own folder does. The last commit of such a run would be nowhere.
#[test]
fn a_worker_that_sees_another_run_folder_is_told_so_and_trains_nothing() -> Result<()> {
    let world = World::new(40)?;
    let run = world.run("elsewhere", 2, "[workers]\ncount = 1\ndevice = \"cpu\"")?;
    let start = |program: &str, folder: &str, arguments: &[&str]| -> Result<Child> {
        let mut command = Command::new(binary(program)?);
        std::fs::create_dir(world.path(folder))?;
        command.args(arguments).current_dir(world.path(folder));
        lead(command)
    };
    let (config, address) = (run.config.display().to_string(), world.path("address"));
    let file = address.display().to_string();
    let coordinator = start("ella-coordinator", "here", &[&config, "--set", "run.output=/proc/self/cwd/run", "--address-file", &file])?;
    wait_until("the coordinator's address", || address.exists())?;
    let addresses: Value = serde_json::from_slice(&std::fs::read(&address)?)?;
    let url = format!("http://{}", addresses["grpc"].as_str().context("no address")?);
    let worker = start("ella-worker", "there", &["--coordinator", &url, "--device", "cpu"])?;
    for process in [worker, coordinator] {
        let output = wait(process)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(4), "{:?}: {said}", output.status);
        ensure!(said.contains("this worker does not see the run's folder /proc/self/cwd/run"), "{said}");
    }
    ensure!(!world.path("there/run").exists() && !world.path("here/run/commits").exists(), "something was committed");
    Ok(())
}
