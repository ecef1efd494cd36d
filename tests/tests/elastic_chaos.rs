//! `ella chaos` on a small world: workers and coordinators killed, stopped, slowed, cut off, told to leave and joined by others, on a store that
//! fails; and the trained bytes are those of a calm run.

use anyhow::Result;
use ella_tests::{World, ella, try_ella};
use serde_json::Value;

const STEPS: u64 = 80;
const PLAN: &str = "workers = 4\nfaults = 12\nrestart_after = [\"100ms\", \"800ms\"]\nlasts = [\"50ms\", \"1500ms\"]\nstall = \"20s\"\n";

/// Times that suit a run of seconds.
const TIMES: &str = "[checkpoint]\nevery = 10\n[workers]\nlease = \"1s\"\norphan_timeout = \"6s\"\nstep_timeout = \"5s\"\nstart_timeout = \"30s\"\n\
                     join_window = \"100ms\"\n";

fn plan(world: &World, name: &str, more: &str) -> Result<String> {
    let run = world.run("run", STEPS, TIMES)?;
    let (output, path) = (world.path(name), world.path(&format!("{name}.toml")));
    std::fs::write(&path, format!("[chaos]\nrun = \"{}\"\noutput = \"{}\"\n{more}", run.config.display(), output.display()))?;
    Ok(path.display().to_string())
}

fn object(text: &str) -> Result<Value> {
    assert_eq!(text.lines().count(), 1, "one object and nothing else: {text}");
    Ok(serde_json::from_str(text)?)
}

#[test]
fn a_run_under_every_kind_of_fault_trains_the_same_bytes() -> Result<()> {
    let world = World::new(103)?;
    let plan = plan(&world, "chaos", PLAN)?;
    let output = try_ella(&["chaos", &plan, "--seeds", "1..2", "--json"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    let report = object(&String::from_utf8(output.stdout)?)?;
    assert!(output.status.success() && report["ok"] == true, "{said}\n{report:#}");
    let seeds = report["seeds"].as_array().cloned().unwrap_or_default();
    assert_eq!(seeds.len(), 2);
    for kind in ["kill", "stop", "slow", "partition", "store", "coordinator", "join", "leave"] {
        assert!(seeds.iter().any(|seed| seed["faults"][kind].as_u64() > Some(0)), "none of this kind befell the run: {kind}\n{report:#}");
    }
    for seed in seeds {
        let names = ["SAME", "ONCE", "COMMIT", "TERM", "LIVE", "KNOWN"];
        assert!(names.iter().all(|name| seed["invariants"][name]["holds"] == true), "{seed:#}");
        assert_eq!((&seed["outcome"], &seed["steps"]), (&"done".into(), &STEPS.into()), "{seed:#}");
        assert!(seed["generations"].as_u64() > Some(1), "{seed:#}");
        println!("{}", serde_json::to_string_pretty(&seed)?);
    }
    // The calm run is there now; and what is wrong is found: another calm run is expected.
    let audit: Value = serde_json::from_str(&ella(&["audit", &format!("{}/seed-2/run", world.path("chaos").display()), "--json"])?)?;
    assert_eq!(audit["ok"], true, "{audit}");
    Ok(())
}

#[test]
fn a_bad_plan_is_refused_by_key() -> Result<()> {
    let world = World::new(16)?;
    let plan = plan(&world, "chaos", "worker = 4\n")?;
    let output = try_ella(&["chaos", &plan])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("did you mean `chaos.workers`?"), "{said}");
    Ok(())
}
