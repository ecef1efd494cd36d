//! `RUN.toml` and `--set`: file, key and rule, and no run folder for a config that is refused.

use super::{USAGE, ella_refused, files, shared};
use anyhow::Result;
use ella_tests::exists;

/// Trains under the shared world's config with this override.
#[track_caller]
fn set_refused(item: &str, words: &[&str]) -> Result<()> {
    let shared = shared()?;
    let run = shared.world.run("refused", 4, "")?;
    ella_refused(&run.train(&[item]), USAGE, words)?;
    assert!(!exists(&run.output), "{item}: a run folder appeared");
    Ok(())
}

/// Trains under this config, which is the shared world's but for one replaced text.
#[track_caller]
fn text_refused(name: &str, from: &str, to: &str, words: &[&str]) -> Result<()> {
    let shared = shared()?;
    let run = shared.world.run(name, 4, "")?;
    let text = std::fs::read_to_string(&run.config)?;
    assert!(text.contains(from), "{from} is not in the config");
    std::fs::write(&run.config, text.replacen(from, to, 1))?;
    let file = format!("{name}.toml");
    ella_refused(&run.train(&[]), USAGE, &[&[&*file], words].concat())?;
    assert!(!exists(&run.output), "{name}: a run folder appeared");
    Ok(())
}

#[test]
fn unknown_keys_are_refused_with_the_nearest() -> Result<()> {
    set_refused("train.step=3", &["--set train.step=3", "unknown key `train.step`", "`train.steps`"])?;
    set_refused("worker.count=3", &["unknown key `worker`", "`workers`"])?;
    text_refused("unknown-key", "window", "windw", &["unknown key `data.windw`", "did you mean `data.window`?"])?;
    text_refused("unknown-section", "[train.optimizer]", "[trian]", &["unknown key `trian`", "did you mean `train`?"])
}

#[test]
fn values_out_of_range_name_file_key_and_rule() -> Result<()> {
    text_refused("range", "steps = 4", "steps = 0", &["`train.steps` is 0", "from 1 to"])?;
    text_refused("lanes", "global_batch = 16", "global_batch = 15", &["`train.global_batch` is 15", "multiple of train.micro_batch = 2"])?;
    set_refused("workers.count=9", &["refused.toml with --set", "`workers.count` is 9", "only 8 lanes"])?;
    for (item, rule) in [
        ("train.optimizer.lr=-1", "0 or more"),
        ("train.optimizer.lr=nan", "0 or more"),
        ("train.optimizer.betas=[0.9, 1.0]", "below 1"),
        ("train.caption_dropout=1.5", "from 0 to 1"),
        ("train.snr_gamma=0", "above 0"),
        ("text.max_tokens=1000000", "from 1 to 65536"),
        ("workers.threads=100000", "from 1 to 1024"),
        ("checkpoint.keep=0", "1 or more"),
        ("checkpoint.max_lost_work=0s", "1ms or more"),
    ] {
        let key = item.split('=').next().unwrap_or_default();
        set_refused(item, &["refused.toml with --set", &format!("`{key}`"), rule])?;
    }
    Ok(())
}

#[test]
fn values_of_the_wrong_type_name_place_and_type() -> Result<()> {
    text_refused("type", "steps = 4", "steps = \"many\"", &["line 16, column 9", "\"many\"", "expected u64"])?;
    text_refused("syntax", "steps = 4", "steps = = 4", &["line 16, column 9"])?;
    text_refused("missing-key", "output", "# output", &["missing field `output`"])?;
    set_refused("train.steps=many", &["refused.toml", "train.steps", "\"many\""])?;
    set_refused("text.padding=some", &["refused.toml", "text.padding", "`fixed` or `none`"])?;
    set_refused("workers.lease=soon", &["refused.toml", "workers.lease", "10s"])?;
    set_refused("nonsense", &["--set nonsense", "section.key=value"])
}

#[test]
fn a_config_that_cannot_be_read_is_named() -> Result<()> {
    let shared = shared()?;
    ella_refused(&["train", &shared.path("no.toml")], USAGE, &["no.toml", "cannot be read"])?;
    ella_refused(&["train", &shared.path("data")], USAGE, &["data", "cannot be read", "directory"])?;
    std::fs::write(shared.world.path("latin.toml"), b"# caf\xe9")?;
    ella_refused(&["train", &shared.path("latin.toml")], USAGE, &["latin.toml", "UTF-8"])?;
    std::fs::write(shared.world.path("empty.toml"), "")?;
    ella_refused(&["train", &shared.path("empty.toml")], USAGE, &["empty.toml", "missing field `run`"])?;
    ella_refused(&["train"], USAGE, &["RUN.toml"])
}

#[test]
fn a_run_goes_on_only_under_the_keys_that_bind_it() -> Result<()> {
    let shared = shared()?;
    let before = files(&shared.run.output)?;
    let set = ["train.steps=10", "train.optimizer.lr=0.5", "train.micro_batch=4"];
    let words = [&*shared.path("run"), "another config", "train.micro_batch", "train.optimizer.lr", "run.output"];
    ella_refused(&shared.run.train(&set), USAGE, &words)?;
    let mut after = files(&shared.run.output)?;
    after.retain(|name, _| !name.starts_with("logs/"));
    assert!(after.iter().all(|(name, bytes)| before.get(name) == Some(bytes)), "the run was changed");
    Ok(())
}
