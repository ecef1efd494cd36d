//! Damage in a run folder: nothing is resumed from it, it is named, and the other commits stay as they are (COMMIT).

use super::{PERMANENT, cut, ella_refused, files, flip, refused, shared};
use anyhow::Result;
use ella_tests::{Run, ella, try_ella};
use std::path::Path;

/// The last commit's folder, in the run's.
const LAST: &str = "commits/000000000006.1";

/// A copy of the shared run, which would go on to step 8 under these overrides.
fn copied(name: &str) -> Result<(Run, Vec<String>)> {
    let shared = shared()?;
    let output = shared.copy("run", &format!("run-{name}"))?;
    let set = vec![format!("run.output={}", output.display()), "train.steps=8".to_owned()];
    Ok((Run { output, ..shared.run.clone() }, set))
}

/// Resumes a copy of the run with one thing done to it: refused in these words, and no commit and no record of before is changed.
#[track_caller]
fn resume_refused(name: &str, damage: impl FnOnce(&Path) -> Result<()>, words: &[&str]) -> Result<(Run, Vec<String>)> {
    let (run, set) = copied(name)?;
    damage(&run.output)?;
    let before = files(&run.output)?;
    let set_refs: Vec<&str> = set.iter().map(String::as_str).collect();
    let folder = format!("run-{name}");
    refused(try_ella(&run.train(&set_refs))?, PERMANENT, &[words, &[folder.as_str()]].concat());
    let after = files(&run.output)?;
    for (file, bytes) in before.iter().filter(|(file, _)| file.starts_with("commits/") || file.starts_with("log/")) {
        assert!(after.get(file) == Some(bytes), "{name}: {file} was changed");
    }
    Ok((run, set))
}

/// Resumes a copy of the run with one thing done to its last commit: it goes on from the one before, and says why in these words.
#[track_caller]
fn falls_back(name: &str, damage: impl FnOnce(&Path) -> Result<()>, words: &[&str]) -> Result<()> {
    let (run, set) = copied(name)?;
    damage(&run.output.join(LAST))?;
    let output = try_ella(&run.train(&set.iter().map(String::as_str).collect::<Vec<_>>()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let warning = said.lines().find(|line| line.contains("WARNING")).unwrap_or_default();
    assert!(output.status.success() && words.iter().chain(&["step 6", LAST]).all(|word| warning.contains(word)), "{name}: {said}");
    let steps: Vec<u64> = run.commits()?.iter().map(|commit| commit.step).collect();
    assert_eq!(steps, [2, 4, 6, 6, 8], "{name}: step 6 is trained again");
    let audit = ella(&["audit", &run.output.display().to_string()])?;
    assert!(audit.contains("1 commit turned out to be damaged"), "{audit}");
    Ok(())
}

#[test]
fn a_damaged_part_of_the_last_commit_is_named_and_the_run_goes_on_from_the_one_before() -> Result<()> {
    let part = |commit: &Path| commit.join("optimizer.safetensors");
    falls_back("flipped", |commit| flip(&part(commit)), &["optimizer.safetensors", "wrong bytes", "blake3"])?;
    falls_back("cut", |commit| cut(&part(commit)), &["optimizer.safetensors", "wrong size", "expected"])?;
    falls_back("lost", |commit| Ok(std::fs::remove_file(part(commit))?), &["optimizer.safetensors", "missing"])?;
    falls_back("folder", |commit| Ok(std::fs::remove_dir_all(commit)?), &["connector.safetensors", "missing"])
}

#[test]
fn where_no_commit_is_whole_nothing_is_trained_until_one_is_back() -> Result<()> {
    let part = |run: &Path, step: u64| run.join(format!("commits/{step:012}.1/ema.safetensors"));
    let all = |run: &Path| [2, 4, 6].into_iter().try_for_each(|step| flip(&part(run, step)));
    let (run, set) = resume_refused("all", all, &["step 6", LAST, "ema.safetensors", "wrong bytes", "copy"])?;
    assert_eq!(try_ella(&["audit", &run.output.display().to_string()])?.status.code(), Some(1));
    std::fs::copy(part(&shared()?.run.output, 6), part(&run.output, 6))?;
    ella(&run.train(&set.iter().map(String::as_str).collect::<Vec<_>>()))?;
    assert_eq!(run.last_commit()?.step, 8);
    Ok(())
}

#[test]
fn a_damaged_or_missing_record_is_named() -> Result<()> {
    let record = |run: &Path, number: u64| run.join(format!("log/{number:012}.json"));
    let garbage = |run: &Path| Ok(std::fs::write(record(run, 2), "no record")?);
    let (run, _) = resume_refused("garbage", garbage, &["log/000000000002.json", "not a valid log record"])?;
    let folder = run.output.display().to_string();
    ella_refused(&["status", &folder], PERMANENT, &["log/000000000002.json", "not a valid log record"])?;
    ella_refused(&["export", &folder, "--out", &format!("{folder}.safetensors")], PERMANENT, &["log/000000000002.json"])?;
    resume_refused("gap", |run| Ok(std::fs::remove_file(record(run, 1))?), &["log/000000000001.json", "missing"])?;
    resume_refused("headless", |run| Ok(std::fs::remove_file(record(run, 0))?), &["log/000000000000.json", "missing"])?;
    let twice = |run: &Path| Ok(std::fs::copy(record(run, 1), record(run, 2)).map(drop)?);
    resume_refused("twice", twice, &["log/000000000002.json", "it is number 1"])?;
    Ok(())
}

#[test]
fn a_run_is_not_resumed_on_other_data_or_through_other_models() -> Result<()> {
    let shared = shared()?;
    let data = shared.path("data-of-another-run");
    ella(&["prepare", &shared.path("scenes"), "--out", &data, "--resolution", "64", "--quality", "80"])?;
    ella(&["embed", &data, "--text", &shared.path("models/text"), "--max-tokens", "64"])?;
    let base = shared.path("models-of-another-run");
    ella(&["init-base", "--preset", "nano", "--seed", "8", "--captions", &data, "--out", &base])?;
    let others =
        [("data", format!("data.path={data}"), "data set digest"), ("base", format!("base.model={base}/base"), "models' fingerprint")];
    for (name, other, what) in others {
        let (run, set) = copied(name)?;
        let set: Vec<&str> = set.iter().map(String::as_str).chain([other.as_str()]).collect();
        let before = run.commits()?.len();
        refused(try_ella(&run.train(&set))?, PERMANENT, &[what, "expected", "the commit of step 6"]);
        assert_eq!(run.commits()?.len(), before, "{name}: trained on");
    }
    Ok(())
}

#[test]
fn a_run_folder_whose_config_was_damaged_is_named() -> Result<()> {
    let (run, set) = copied("bad-toml")?;
    std::fs::write(run.output.join("run.toml"), "gar=bage")?;
    let words = ["run-bad-toml/run.toml", "line 1", "restore"];
    refused(try_ella(&run.train(&set.iter().map(String::as_str).collect::<Vec<_>>()))?, super::USAGE, &words);
    ella_refused(&["status", &run.output.display().to_string()], PERMANENT, &words)
}
