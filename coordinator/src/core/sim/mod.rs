//! The protocol in a seeded simulator with a virtual clock: the real core, and models of the workers, the network and the store, which do
//! what `ella-worker`, the shell and `ella-store` do.
//!
//! A schedule is its seed. Things go wrong for a time: workers and coordinators die, stop and go on, are cut off, are told to leave; messages
//! are late or come twice; streams break; two coordinators are there at once; the store is slow, refuses, or does what it is asked and does
//! not say so. Then all is well, and the run must end. In schedules of their own two workers never reach each other again. `ELLA_SEED=N` runs
//! one schedule and prints what happens; `ELLA_SCHEDULES=N` runs so many.
//!
//! Checked after every event, by name: what the core promises of each coordinator (its `Oracle`), and of the whole run
//! - **ORDER** all ranks that take a step take the same one.
//! - **ONCE** a step is made up of its samples, each once; so is what a commit's ledger says.
//! - **SAME** every state that a rank trains with, commits or restores is that of the truth, which one worker would come to alone.
//! - **COMMIT** a record names all parts, and each is in the store as it says; steps rise; what is restored is whole; the newest commit stays.
//! - **TERM** the log's records are of who holds its newest term; who is superseded stops.
//! - **SPLIT** the commits are of one line of generations, whose terms and numbers rise, and each was taken by all ranks of its own.
//! - **LIVE** the run ends within a time after the last thing that went wrong, and everyone in it; training goes on without a coordinator.

mod coordinator;
mod network;
mod oracle;
mod rank;
mod ring;
mod save;
mod schedule;
mod store;
mod truth;
mod worker;
mod world;

use super::Mutation;
use crate::random::given;
use schedule::Verdict;
use std::any::Any;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use worker::Mutant;
use world::{Bugs, World};

/// Schedules that are run unless told otherwise.
const SCHEDULES: u64 = 10_000;
/// Lines of a failed schedule's trace that are shown.
const SHOWN: usize = 60;

/// What a schedule came to: what was seen in it, or what was violated.
type Result = std::result::Result<BTreeMap<String, u64>, String>;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs a world to its end, or to a violation. That is told by whoever called, not here.
fn run(world: &mut World) -> std::result::Result<Verdict, Box<dyn Any + Send>> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let tell = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                tell(panic)
            }
        }));
    });
    QUIET.set(true);
    let run = catch_unwind(AssertUnwindSafe(|| world.run()));
    QUIET.set(false);
    run
}

fn schedule(seed: u64, bugs: Bugs) -> Result {
    let mut world = World::new(seed, bugs, false);
    let run = run(&mut world);
    match run {
        Ok(_) => {
            let mut seen = std::mem::take(&mut world.seen);
            seen.insert("schedules".into(), 1);
            *seen.entry("virtual seconds".into()).or_default() += world.now / 1000;
            Ok(seen)
        }
        Err(panic) => Err(text_of(panic.as_ref())),
    }
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Runs a schedule with its trace, and shows the last of it.
fn replay(seed: u64, bugs: Bugs, lines: usize) -> Option<Verdict> {
    let mut world = World::new(seed, bugs, true);
    let run = run(&mut world);
    let trace = world.trace();
    trace[trace.len().saturating_sub(lines)..].iter().for_each(|line| println!("{line}"));
    println!("{:?}", world.setup);
    if let Err(panic) = &run {
        println!("{}", text_of(panic.as_ref()));
    }
    run.ok()
}

/// Runs schedules on all cores, until `enough` of them were seen to fail. Gives what was seen in all, and the failures by seed.
fn run_all(first: u64, count: u64, bugs: Bugs, enough: usize) -> (BTreeMap<String, u64>, Vec<(u64, String)>) {
    let next = AtomicU64::new(first);
    let stop = AtomicBool::new(false);
    let all = Mutex::new((BTreeMap::<String, u64>::new(), Vec::new()));
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let result = schedule(seed, bugs);
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(seen) => add(&mut all.0, seen),
                        Err(why) => all.1.push((seed, why)),
                    }
                    stop.fetch_or(all.1.len() >= enough, Ordering::Relaxed);
                }
            });
        }
    });
    all.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn add(all: &mut BTreeMap<String, u64>, seen: BTreeMap<String, u64>) {
    for (name, n) in seen {
        *all.entry(name).or_default() += n;
    }
}

/// What must have been seen so often in ten thousand schedules, or the simulation means little.
const COVERAGE: [(&str, u64); 40] = [
    ("verdict Done", 5_000),
    ("verdict Preempted", 300),
    ("note generation", 10_000),
    ("note regroup", 3_000),
    ("note adopted", 500),
    ("note lost", 2_000),
    ("note left", 2_000),
    ("note committed", 30_000),
    ("note retired", 10_000),
    ("note draining", 500),
    ("note straggler", 300),
    ("commits after adoption", 500),
    ("commits made anew", 1_000),
    ("copies", 5_000),
    ("restores", 1_000),
    ("steps without a coordinator", 5_000),
    ("ranks left behind by a step", 500),
    ("collectives broken", 500),
    ("collective timeouts", 200),
    ("superseded", 1_000),
    ("welcomes of an older term", 50),
    ("refused Superseded", 500),
    ("messages of another term", 300),
    ("messages of another era", 50),
    ("duplicates", 5_000),
    ("echoes", 300),
    ("own records found", 200),
    ("records whose answer was lost", 200),
    ("puts that failed", 500),
    ("appends given up", 50),
    ("uploads that failed", 300),
    ("orphans", 500),
    ("streams lost", 5_000),
    ("count leases_missed", 1_000),
    ("count workers_reattached", 100),
    ("count workers_released", 1_000),
    ("count workers_failed", 500),
    ("count coordinator_stopped", 200),
    ("count refused_other_generation", 1_000),
    ("exit Done", 5_000),
];

#[test]
fn every_schedule_keeps_the_invariants_and_ends() {
    if let Some(seed) = given() {
        let verdict = replay(seed, Bugs::default(), usize::MAX);
        return assert!(verdict.is_some(), "ELLA_SEED={seed} failed");
    }
    let count = std::env::var("ELLA_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(SCHEDULES);
    let (seen, failed) = run_all(1, count, Bugs::default(), 5);
    if let Some((seed, _)) = failed.first() {
        replay(*seed, Bugs::default(), SHOWN);
        for (seed, why) in &failed {
            println!("seed {seed}: {why}");
        }
        panic!("ELLA_SEED={seed} cargo test -p ella-coordinator --lib core::sim::every -- --nocapture shows it: {}", failed[0].1);
    }
    println!("{seen:#?}");
    if count < SCHEDULES {
        return;
    }
    for (what, least) in COVERAGE {
        let n = seen.get(what).copied().unwrap_or(0);
        assert!(n * SCHEDULES >= least * count, "{what}: only {n} in {count} schedules");
    }
}

/// Two workers reach everyone but each other. The others are dealt between them, or else one of them goes: the run goes on without starting again.
#[test]
fn a_cut_between_two_workers_that_lasts_ends_no_run_that_needs_one_of_them() {
    let bugs = Bugs { lasting_cut: true, ..Bugs::default() };
    let (first, count) = given().map_or((1, 500), |seed| (seed, 1));
    let (seen, failed) = run_all(first, count, bugs, 1);
    if let Some((seed, why)) = failed.first() {
        replay(*seed, bugs, SHOWN);
        panic!("ELLA_SEED={seed} cargo test -p ella-coordinator --lib core::sim::a_cut -- --nocapture shows it: {why}");
    }
    println!("{seen:#?}");
    let n = |what: &str| seen.get(what).copied().unwrap_or(0);
    assert_eq!((n("verdict Done"), n("failed Unreached")), (count, 0));
    assert!(count == 1 || n("lasting cuts") > 250 && n("count refused_unreached") > 100 && n("next ranks not reached") > 250, "{seen:#?}");
}

/// A schedule is its seed.
#[test]
fn a_schedule_comes_to_the_same_again() {
    for seed in 1..=20 {
        assert_eq!(schedule(seed, Bugs::default()), schedule(seed, Bugs::default()));
    }
}

/// How many schedules it takes to find a bug that is built in, and the invariant by which it is found.
fn found(bugs: Bugs, most: u64) -> (u64, String) {
    let (_, failed) = run_all(1, most, bugs, 1);
    let (seed, why) = failed.into_iter().min().unwrap_or_else(|| panic!("{bugs:?} is not found in {most} schedules"));
    let named = why.strip_prefix("assertion `left == right` failed: ").unwrap_or(&why);
    println!("{bugs:?} by schedule {seed}: {}", named.lines().next().unwrap_or_default());
    (seed, named.split([':', '\n']).next().unwrap_or_default().to_owned())
}

#[test]
fn a_bug_that_is_built_into_the_core_is_found() {
    let bugs = [
        (Mutation::SkipsTermCheck, "T-1", "T-1", 2_000),
        (Mutation::RecordsBeforeParts, "C-1", "COMMIT", 200),
        (Mutation::DealsTwice, "M-2", "LIVE", 200),
    ];
    for (mutation, by_oracle, by_outcome, most) in bugs {
        let bugs = Bugs { core: Some(mutation), ..Bugs::default() };
        assert_eq!(found(bugs, most).1, by_oracle);
        assert_eq!(found(Bugs { blind: true, ..bugs }, most).1, by_outcome);
    }
}

#[test]
fn a_bug_that_is_built_into_a_worker_is_found() {
    let bugs = [
        (Mutant::CommitsWithoutAuthority, "LIVE", 10_000),
        (Mutant::KeepsTornCopy, "SAME", 10_000),
        (Mutant::TakesForeignLane, "ONCE", 50),
    ];
    for (mutant, invariant, most) in bugs {
        assert_eq!(found(Bugs { worker: Some(mutant), ..Bugs::default() }, most).1, invariant);
    }
}
