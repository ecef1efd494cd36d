//! Samples while it trains, with real processes: they are the same for any number of workers and after kills, are what `ella sample` draws, change no
//! trained byte, and keep nobody who is to leave.

use anyhow::{Context as _, Result, ensure};
use ella_tests::{PATIENCE, Run, World, binary, ella, exists, journal, kill_group, lead, signal, spawn, try_ella, wait, wait_until};
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const STEPS: u64 = 12;
const PROMPTS: [&str; 3] = ["a red circle", "two stars above a grey square", ""];
/// Every fourth step, so that the last one is among them; its commits all stay.
const EVERY: &str = "[checkpoint]\nevery = 4\nkeep = 9\n[sample]\nevery = 4\n";

fn settings(more: &str) -> String {
    format!("{EVERY}prompts = {PROMPTS:?}\nimages = 2\nseed = 5\nsteps = 3\nguidance = 3.0\nnegative = \"a blue ring\"\n{more}")
}

/// All files below the run's `samples/`, by their paths there, but for what a kill left half-written, which no store lists.
fn samples(run: &Run) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for step in run.output.join("samples").read_dir()? {
        for file in step?.path().read_dir()? {
            let path = file?.path();
            let name = path.strip_prefix(run.output.join("samples"))?.display().to_string();
            if !name.contains('#') {
                files.insert(name, std::fs::read(&path)?);
            }
        }
    }
    Ok(files)
}

fn index(run: &Run, step: u64) -> Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(run.output.join(format!("samples/{step:012}/index.json")))?)?)
}

/// What `ella sample` draws with a commit's file, on one thread as the workers have it.
fn drawn(world: &World, (base, connector): (&Path, &Path), more: &[&str]) -> Result<Vec<image::RgbImage>> {
    let out = world.path("drawn");
    let path = |path: &Path| path.display().to_string();
    let (connector, base, text) = (path(connector), path(base), path(&world.path("models/text")));
    let mut command = Command::new(binary("ella")?);
    command.args(["sample", "--connector", &connector, "--base", &base, "--text", &text, "--max-tokens", "64", "--batch", "1"]);
    command.args(["--images", "2", "--seed", "5", "--steps", "3", "--guidance", "3", "--negative", "a blue ring"]);
    command.args(PROMPTS.iter().flat_map(|prompt| ["--prompt", prompt])).args(more).args(["--out-dir", &path(&out)]);
    // SAFETY: between fork and exec only a system call is made, on memory of this function.
    unsafe {
        command.pre_exec(|| {
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut one);
            match libc::sched_setaffinity(0, size_of_val(&one), &raw const one) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let output = wait(lead(command)?)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let picture = |number| Ok(image::open(out.join(format!("{number:04}.png")))?.into_rgb8());
    (0..2 * PROMPTS.len()).map(picture).collect()
}

/// Kills everything while it draws, and goes on with another number of workers.
fn killed(world: &World, step: u64) -> Result<Run> {
    let run = world.run(&format!("killed-{step}"), STEPS, &settings(""))?;
    let mut child = spawn(&run.train(&["workers.count=2"]))?;
    let first = run.output.join(format!("samples/{step:012}/000.png"));
    wait_until("a first picture", || exists(&first) || child.try_wait().is_ok_and(|s| s.is_some()))?;
    kill_group(child.id());
    child.wait()?;
    println!("killed while step {step} was drawn: {:?}", samples(&run)?.keys());
    ella(&run.train(&["workers.count=3"]))?;
    Ok(run)
}

#[test]
fn samples_are_the_same_for_any_number_of_workers_and_after_kills_and_change_no_trained_byte() -> Result<()> {
    let world = World::new(40)?;
    let calm = world.run("calm", STEPS, "[checkpoint]\nevery = 4\n")?;
    ella(&calm.train(&["workers.count=1"]))?;
    let one = world.run("one", STEPS, &settings(""))?;
    ella(&one.train(&["workers.count=1"]))?;
    let pictures = samples(&one)?;
    // Six pictures and an index after each of three steps.
    assert_eq!(pictures.len(), 3 * 7, "{:?}", pictures.keys());
    let told = index(&one, 8)?;
    assert_eq!((&told["step"], &told["images"][3]["file"], &told["images"][3]["seed"]), (&8.into(), &"003.png".into(), &6.into()));
    assert_eq!((told["images"][3]["prompt"].as_str(), told["sampler"].as_str()), (Some(PROMPTS[1]), Some("ddim")));
    let differ = |a: usize, b: usize| pictures[&format!("000000000008/{a:03}.png")] != pictures[&format!("000000000008/{b:03}.png")];
    assert!(differ(0, 1) && differ(0, 2) && differ(2, 4), "they depend on seed and prompt");
    assert!(pictures["000000000004/000.png"] != pictures["000000000012/000.png"], "they depend on the weights");

    let three = world.run("three", STEPS, &settings(""))?;
    ella(&three.train(&["workers.count=3"]))?;
    let (early, late) = (killed(&world, 4)?, killed(&world, 12)?);
    for run in [&three, &early, &late] {
        assert!(samples(run)? == pictures, "{}: other pictures than one worker's", run.output.display());
    }
    for run in [&one, &three, &early, &late] {
        assert!(run.last_files()? == calm.last_files()?, "{}: other bytes than without samples", run.output.display());
        ella(&["audit", &run.output.display().to_string()])?;
    }
    as_ella_sample_draws(&world, &one)?;
    told_where_people_look(&three)
}

/// From the committed weights of the same step.
fn as_ella_sample_draws(world: &World, run: &Run) -> Result<()> {
    let commit = run.commits()?.into_iter().find(|commit| commit.step == 8).context("no commit of step 8")?;
    let average = run.output.join(commit.folder).join("ema.safetensors");
    for (number, picture) in drawn(world, (&world.path("models/base"), &average), &[])?.iter().enumerate() {
        let ours = image::open(run.output.join(format!("samples/000000000008/{number:03}.png")))?.into_rgb8();
        assert!(*picture == ours, "picture {number} is not what ella sample draws");
    }
    Ok(())
}

/// Pictures of a run, by what became of them, as its metrics tell it.
fn told(run: &Run, what: &str) -> Result<u64> {
    Ok(journal(&run.output, "metrics")?.iter().filter_map(|line| line["read"][what].as_u64()).sum())
}

fn told_where_people_look(run: &Run) -> Result<()> {
    assert_eq!((told(run, "pictures_saved")?, told(run, "pictures_given_up")?), (18, 0), "those of the last step too");
    let folder = run.output.display().to_string();
    let why: Value = serde_json::from_str(&ella(&["why", &folder, "--json"])?)?;
    let ranks = why["ranks"].as_array().context("no ranks")?;
    assert!(ranks.len() == 3 && ranks.iter().all(|rank| rank["parts"]["draw"].as_f64() > Some(0.0)), "{why}");
    assert!(ella(&["status", &folder])?.contains("samples up to step 12"));
    let status: Value = serde_json::from_str(&ella(&["status", &folder, "--json"])?)?;
    assert_eq!(status["sampled_step"], 12);
    let html = run.output.with_extension("html");
    ella(&["report", &folder, "--out", &html.display().to_string()])?;
    let html = std::fs::read_to_string(html)?;
    assert_eq!(html.matches("<img alt=\"Step ").count(), 3 * 6);
    let events = journal(&run.output, "events")?;
    assert!(events.iter().all(|event| event["event"] != "straggler" && event["event"] != "lost"), "{events:?}");
    Ok(())
}

/// Weights that are not averaged, a base of SDXL's kind that predicts v, and a sampler that asks for noise.
#[test]
fn other_bases_and_samplers_draw_what_ella_sample_does() -> Result<()> {
    let world = World::new(40)?;
    let path = |name: &str| world.path(name).display().to_string();
    ella(&["init-base", "--preset", "nano-sdxl", "--seed", "1", "--captions", &path("data"), "--out", &path("sdxl")])?;
    let run = world.run("sdxl", 4, &settings("sampler = \"euler-a\"\nsize = \"64x32\"\naverage = false\n"))?;
    let base = format!("base.model={}", path("sdxl/base"));
    ella(&run.train(&[&base, "base.prediction=v_prediction", "workers.count=2"]))?;
    let connector = run.output.join(run.last_commit()?.folder).join("connector.safetensors");
    let more = ["--sampler", "euler-a", "--size", "64x32", "--prediction", "v_prediction"];
    let pictures = drawn(&world, (&world.path("sdxl/base"), &connector), &more)?;
    assert_eq!(index(&run, 4)?["size"], "64x32");
    for (number, picture) in pictures.iter().enumerate() {
        let ours = image::open(run.output.join(format!("samples/000000000004/{number:03}.png")))?.into_rgb8();
        assert!(ours.dimensions() == (64, 32) && *picture == ours, "picture {number} is not what ella sample draws");
    }
    Ok(())
}

/// What would take minutes is left at once, resumable; other settings draw it when the run goes on.
#[test]
fn a_run_that_is_to_leave_while_it_draws_does_not_draw_on() -> Result<()> {
    let world = World::new(40)?;
    let run = world.run("leaves", STEPS, &settings(""))?;
    let child = spawn(&run.train(&["workers.count=2", "sample.steps=400", "sample.images=300"]))?;
    wait_until("a first picture", || exists(run.output.join("samples/000000000004/000.png")))?;
    let begin = Instant::now();
    signal(child.id(), libc::SIGTERM);
    let output = wait(child)?;
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    println!("left after {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(60).min(PATIENCE), "it drew on");
    assert_eq!(run.last_commit()?.step, 4);
    assert!(!exists(run.output.join("samples/000000000004/index.json")));
    ella(&run.train(&["workers.count=3"]))?;
    assert_eq!(index(&run, 4)?["images"].as_array().map(Vec::len), Some(6));
    let calm = world.run("calm", STEPS, "")?;
    ella(&calm.train(&["workers.count=1"]))?;
    assert!(run.last_files()? == calm.last_files()?, "other bytes");
    Ok(())
}

/// No sample that cannot be stored ends training: they are counted, and training gives the same bytes.
#[test]
fn a_store_that_takes_no_samples_ends_nothing_and_is_told() -> Result<()> {
    let world = World::new(40)?;
    let calm = world.run("calm", STEPS, "")?;
    ella(&calm.train(&["workers.count=1"]))?;
    let run = world.run("refused", STEPS, &settings(""))?;
    std::fs::create_dir_all(&run.output)?;
    // A file stands where the folder would.
    std::fs::write(run.output.join("samples"), "")?;
    ella(&run.train(&["workers.count=2"]))?;
    assert!(run.last_files()? == calm.last_files()?, "other bytes");
    assert_eq!(told(&run, "pictures_given_up")?, 18);
    let mut logs = String::new();
    for file in run.output.join("logs").read_dir()? {
        logs += &std::fs::read_to_string(file?.path()).unwrap_or_default();
    }
    assert!(logs.contains("a sample cannot be stored"), "{logs}");
    Ok(())
}

/// Black pictures would pass for what the weights draw.
#[test]
fn what_is_not_finite_is_no_picture() -> Result<()> {
    let world = World::new(40)?;
    let run = world.run("overflows", STEPS, &settings(""))?;
    ella(&run.train(&["workers.count=1", "sample.guidance=1e30"]))?;
    assert!(!exists(run.output.join("samples/000000000004/000.png")));
    assert_eq!((told(&run, "pictures_saved")?, told(&run, "pictures_given_up")?), (0, 18));
    Ok(())
}

#[test]
fn settings_that_do_not_suit_the_base_are_refused_by_name() -> Result<()> {
    let world = World::new(40)?;
    let run = world.run("bad", STEPS, &settings(""))?;
    for (set, name) in [
        ("sample.size=63x64", "sample.size: width and height must be multiples of the VAE's 8, up to"),
        ("sample.steps=0", "sample.steps"),
        ("sample.sampler=ddpm", "ddpm"),
    ] {
        let output = try_ella(&run.train(&[set]))?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(2 | 4)) && said.contains(name), "{set}: {said}");
    }
    Ok(())
}
