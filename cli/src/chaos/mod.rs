//! `ella chaos`: a run under faults, on this machine, again and again by other seeds; and whether what must hold did (design.md §1).
//!
//! [`plan`] says what is asked for, [`faults`] what a seed draws, [`cluster`] and [`proxy`] are what is harmed, [`trial`] does it, and
//! [`verdict`] judges what is left.

mod cluster;
mod faults;
mod plan;
mod proxy;
mod trial;
mod verdict;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use ella_proto::config::RunConfig;
use serde::Serialize;

use crate::children::binary;
use crate::gpus::Gpus;
use crate::train::{device, have_models};
use crate::ui::{Fail, Meter, Out, count, note, span};
use cluster::{Cluster, Setting};
use faults::Fault;
use plan::Plan;
use trial::{Outcome, Record, Trial};
use verdict::{Calm, Tried, Verdict};

/// What must hold, in the order in which it is told.
const NAMES: [&str; 6] = ["SAME", "ONCE", "COMMIT", "TERM", "LIVE", "KNOWN"];
/// In a seed's folder: it is ours, and may be replaced.
const MARK: &str = "chaos.json";

#[derive(Debug, Args)]
pub(crate) struct Command {
    /// The plan of faults
    #[arg(value_name = "PLAN.toml")]
    plan: PathBuf,
    /// Override one key of the run's config, as in --set workers.lease=2s; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Draw the faults by this seed, not the plan's
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Try these seeds one after the other, as in 1..10: ten of them
    #[arg(long, value_name = "A..B", value_parser = seeds)]
    seeds: Option<Seeds>,
}

/// The first and the last.
type Seeds = (u64, u64);

fn seeds(text: &str) -> Result<Seeds, String> {
    let range = text.split_once("..").and_then(|(first, last)| Some((first.parse().ok()?, last.trim_start_matches('=').parse().ok()?)));
    range.filter(|(first, last)| first <= last).ok_or_else(|| "expected FIRST..LAST, as in 1..10".to_owned())
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    plan: String,
    workers: usize,
    steps: u64,
    /// The run without faults: its folder.
    calm: String,
    seeds: Vec<Verdict>,
}

impl Command {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let plan = Plan::load(&self.plan)?;
        // One thread: the kernel ties the children's lives to that of the thread which started them.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Fail::failed(format_args!("the async runtime cannot be started ({error})")))?;
        let report = runtime.block_on(self.report(&plan))?;
        out.result(&report, || table(&report));
        Ok(trial::code(report.ok))
    }

    async fn report(&self, plan: &Plan) -> Result<Report, Fail> {
        let output = std::path::absolute(&plan.chaos.output).map_err(|error| Fail::io(&plan.chaos.output, "found", &error))?;
        let config = plan.run(&self.set, plan.chaos.workers, &output)?;
        // Said before the run without faults, which one worker does.
        Gpus::for_run(plan.chaos.workers, config.workers.device)?;
        have_models(&config)?;
        let (calm_folder, calm) = self.calm(plan, &output).await?;
        let (first, last) = self.seeds.unwrap_or_else(|| {
            let seed = self.seed.unwrap_or(plan.chaos.seed);
            (seed, seed)
        });
        let mut verdicts = Vec::new();
        for seed in first..=last {
            let verdict = self.seed(plan, seed, &output, &calm).await?;
            note(line(&verdict));
            complain(&verdict);
            verdicts.push(verdict);
        }
        Ok(Report {
            ok: verdicts.iter().all(|verdict| verdict.ok),
            plan: self.plan.display().to_string(),
            workers: plan.chaos.workers,
            steps: config.train.steps,
            calm: calm_folder.display().to_string(),
            seeds: verdicts,
        })
    }

    /// The run without faults, by one worker: as it lies there, or trained now.
    async fn calm(&self, plan: &Plan, output: &Path) -> Result<(PathBuf, Calm), Fail> {
        let config = plan.run(&self.set, 1, output)?;
        let folder = output.join(format!("calm-{}-{}", &config.digest()[..12], config.train.steps));
        let config = plan.run(&self.set, 1, &folder.join("run"))?;
        if let Some(calm) = Calm::of(&config).await? {
            note(format_args!("{}: the run without faults is there already", folder.display()));
            return Ok((folder, calm));
        }
        note(format_args!("{}: first the run without faults, by one worker", folder.display()));
        let setting = setting(&config, &folder, 0, None)?;
        let stall = plan.chaos.stall.duration();
        let record = try_run(setting, Vec::new(), stall, (1, config.train.steps)).await?;
        if let Outcome::Failed(why) | Outcome::Stuck(why) = &record.outcome {
            return Err(Fail::failed(format_args!("the run fails without any fault: {why}; its logs are in {}/logs", folder.display())));
        }
        let calm = Calm::of(&config).await?;
        calm.map(|calm| (folder.clone(), calm)).ok_or_else(|| Fail::failed(format_args!("{}: the run left no commit", folder.display())))
    }

    /// A run under a seed's faults, and what became of it.
    async fn seed(&self, plan: &Plan, seed: u64, output: &Path, calm: &Calm) -> Result<Verdict, Fail> {
        let folder = output.join(format!("seed-{seed}"));
        make_anew(&folder)?;
        let config = plan.run(&self.set, plan.chaos.workers, &folder.join("run"))?;
        let faults = faults::draw(plan, seed, config.train.steps, config.workers.lease.0);
        let planned: Vec<String> = faults.iter().map(|fault| format!("step {}: {}", fault.at_step, fault.words())).collect();
        let mark = folder.join(MARK);
        let text = serde_json::to_string_pretty(&serde_json::json!({ "seed": seed, "faults": planned })).unwrap_or_default();
        std::fs::write(&mark, text).map_err(|error| Fail::io(&mark, "written", &error))?;
        let setting = setting(&config, &folder, seed, plan.harms_the_store().then_some(plan.chaos.store_rates))?;
        let logs = setting.logs.clone();
        let stall = plan.chaos.stall;
        let record = try_run(setting, faults, stall.duration(), (plan.chaos.workers, config.train.steps)).await?;
        let tried = Tried { seed, config: &config, record, logs: &logs, stall_ms: stall.0, replay: self.replay(seed) };
        let verdict = verdict::judge(tried, calm).await?;
        let path = folder.join("verdict.json");
        let text = serde_json::to_string_pretty(&verdict).unwrap_or_default();
        std::fs::write(&path, text).map_err(|error| Fail::io(&path, "written", &error))?;
        Ok(verdict)
    }

    fn replay(&self, seed: u64) -> String {
        let set: String = self.set.iter().map(|set| format!(" --set '{set}'")).collect();
        format!("ella chaos {} --seed {seed}{set}", self.plan.display())
    }
}

/// An empty folder: one of ours that is there is replaced, and no other.
fn make_anew(folder: &Path) -> Result<(), Fail> {
    if folder.join(MARK).is_file() {
        std::fs::remove_dir_all(folder).map_err(|error| Fail::io(folder, "deleted", &error))?;
    } else if folder.exists() {
        let what = "is there, and is not this command's; delete it, or choose another chaos.output";
        return Err(Fail::failed(format_args!("{}: {what}", folder.display())));
    }
    std::fs::create_dir_all(folder).map_err(|error| Fail::io(folder, "made", &error))
}

/// Writes the run's config beside its folder, and says how its processes are started.
fn setting(config: &RunConfig, folder: &Path, seed: u64, store: Option<[f64; 2]>) -> Result<Setting, Fail> {
    let file = folder.join("run.toml");
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, config.to_toml()));
    written.map_err(|error| Fail::io(&file, "written", &error))?;
    Ok(Setting {
        coordinator: binary("ella-coordinator")?,
        worker: binary("ella-worker")?,
        config: file,
        device: device(config),
        gpus: Gpus::for_run(config.workers.count, config.workers.device)?,
        logs: folder.join("logs"),
        seed,
        store,
    })
}

async fn try_run(setting: Setting, faults: Vec<Fault>, stall: Duration, (workers, steps): (usize, u64)) -> Result<Record, Fail> {
    let mut meter = Meter::new("chaos", steps);
    let longest = faults.iter().map(|fault| fault.lasts).max().unwrap_or_default();
    // A while beyond what is allowed, so that a stall is told from an end.
    let trial = Trial::new(Cluster::new(setting)?, faults, 2 * stall + longest);
    trial.run(workers, &mut meter).await
}

/// One seed's line.
fn line(verdict: &Verdict) -> String {
    let held = |name: &&str| verdict.invariants.get(*name).is_some_and(|invariant| invariant.holds);
    let held = NAMES.iter().filter(|name| held(name)).count();
    let Verdict { seed, outcome, seconds, generations, adoptions, longest_stall_ms, .. } = verdict;
    format!(
        "seed {seed}: {outcome} in {}, {held} of {} hold; {} faults, {generations} generations, {adoptions} adoptions, longest stall {longest_stall_ms} ms",
        span(*seconds),
        NAMES.len(),
        tried(verdict)
    )
}

/// How many faults there were, and were to be.
fn tried(verdict: &Verdict) -> String {
    let faults: usize = verdict.faults.values().sum();
    match verdict.faults_left {
        0 => faults.to_string(),
        left => format!("{faults}/{}", faults + left),
    }
}

/// Where to look, if something is wrong.
fn complain(verdict: &Verdict) {
    if verdict.ok {
        return;
    }
    for (name, invariant) in &verdict.invariants {
        invariant.problems.iter().for_each(|problem| note(format_args!("  {name}: {problem}")));
    }
    if let Some(why) = &verdict.why {
        note(format_args!("  {}: {why}", verdict.outcome));
    }
    note(format_args!("  logs:   {}\n  replay: {}", verdict.logs, verdict.replay));
}

fn table(report: &Report) -> String {
    let mut text = format!("{:>6}  {:7}", "seed", "outcome");
    NAMES.iter().for_each(|name| text += &format!(" {name:6}"));
    text +=
        &format!(" {:>6} {:>6} {:>8} {:>6} {:>5} {:>9} {:>8}\n", "faults", "gens", "regroups", "adopts", "terms", "stall ms", "seconds");
    for verdict in &report.seeds {
        text += &format!("{:>6}  {:7}", verdict.seed, verdict.outcome);
        for name in NAMES {
            let holds = verdict.invariants.get(name).is_some_and(|invariant| invariant.holds);
            text += &format!(" {:6}", if holds { "ok" } else { "BROKEN" });
        }
        let Verdict { generations, regroups, adoptions, terms, longest_stall_ms, seconds, .. } = verdict;
        let faults = tried(verdict);
        text += &format!(" {faults:>6} {generations:>6} {regroups:>8} {adoptions:>6} {terms:>5} {longest_stall_ms:>9} {seconds:>8.1}\n");
    }
    let mut kinds = BTreeMap::<&str, usize>::new();
    report.seeds.iter().flat_map(|verdict| &verdict.faults).for_each(|(kind, n)| *kinds.entry(kind).or_default() += n);
    let kinds: Vec<String> = kinds.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    text += &format!("faults   {}\n", kinds.join(", "));
    if report.seeds.iter().any(|verdict| verdict.faults_left > 0) {
        text += "some faults came too late: a run was over before they could befall it; let it take more steps, or larger ones\n";
    }
    let broken: Vec<&Verdict> = report.seeds.iter().filter(|verdict| !verdict.ok).collect();
    for verdict in &broken {
        text += &format!("replay   {}   (logs: {})\n", verdict.replay, verdict.logs);
    }
    let (steps, seeds) = (report.steps, count(report.seeds.len(), "seed"));
    text + &match broken.len() {
        0 => format!("verdict  {steps} steps under {seeds}: all that must hold did"),
        n => format!("verdict  {n} of {seeds} broke what must hold"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_from_the_first_to_the_last() {
        assert_eq!(seeds("1..10"), Ok((1, 10)));
        assert_eq!(seeds("3..=3"), Ok((3, 3)));
        for bad in ["", "1", "5..2", "a..b"] {
            assert!(seeds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_folders_of_this_command_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("seed-1");
        make_anew(&folder).unwrap();
        std::fs::write(folder.join("precious"), "").unwrap();
        assert!(make_anew(&folder).unwrap_err().message.contains("is not this command's"));
        std::fs::write(folder.join(MARK), "").unwrap();
        make_anew(&folder).unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }
}
