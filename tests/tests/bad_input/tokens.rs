//! Tokens: files that will not do, callers that have another one or none, and a run that is none the worse for them.

use super::{PERMANENT, USAGE, ella_refused, files, refused, shared};
use anyhow::{Context as _, Result, ensure};
use ella_tests::{Processes, binary, children_of, ella, lead, signal, spawn, try_ella, wait, wait_until};
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Output};

const OURS: &str = "what-the-coordinator-knows";
const THEIRS: &str = "what-a-stranger-would-say";

/// Writes a token's file, and gives its path.
fn token(name: &str, secret: &str) -> Result<String> {
    let path = shared()?.path(name);
    std::fs::write(&path, format!("{secret}\n"))?;
    Ok(path)
}

/// One of the long-running programs, to its end.
fn run(program: &str, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary(program)?);
    command.args(arguments);
    wait(lead(command)?)
}

/// Neither secret stands there.
#[track_caller]
fn tells_no_secret(text: &str) {
    assert!(!text.contains(OURS) && !text.contains(THEIRS), "{text}");
}

#[test]
fn a_token_file_that_will_not_do_is_named_with_its_rule() -> Result<()> {
    let shared = shared()?;
    let (short, none) = (token("token-short", "hunter2")?, shared.path("token-none"));
    let config = shared.path("run.toml");
    for (file, words) in [(&short, ["token-short", "at least 16 bytes"]), (&none, ["token-none", "cannot be read"])] {
        ella_refused(&["status", "http://127.0.0.1:1", "--token-file", file], USAGE, &words)?;
        ella_refused(&["train", &config, "--token-file", file], USAGE, &words)?;
        let coordinator = run("ella-coordinator", &[&config, "--token-file", file])?;
        let worker = run("ella-worker", &["--coordinator", "http://127.0.0.1:1", "--token-file", file])?;
        for output in [coordinator, worker] {
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(USAGE), "{said}");
            assert!(words.iter().all(|word| said.contains(word)) && !said.contains("hunter2"), "{said}");
        }
    }
    Ok(())
}

#[test]
fn who_has_no_token_or_another_is_told_on_both_sides_and_who_has_it_trains() -> Result<()> {
    let shared = shared()?;
    let (ours, theirs) = (token("token-ours", OURS)?, token("token-theirs", THEIRS)?);
    let run_of = shared.world.run("with-a-token", 4, "[workers]\ncount = 1\ndevice = \"cpu\"\n")?;
    let config = run_of.config.display().to_string();
    let mut command = Command::new(binary("ella-coordinator")?);
    command.args([&config, "--token-file", &ours]);
    let mut coordinator = Processes(vec![lead(command)?]);
    let mut line = String::new();
    BufReader::new(coordinator.0[0].stdout.take().context("no stdout")?).read_line(&mut line)?;
    let addresses: serde_json::Value = serde_json::from_str(&line)?;
    let url = format!("http://{}", addresses["grpc"].as_str().context("no address")?);

    for (further, words) in [(&[][..], "asks for a token"), (&["--token-file", &theirs][..], "is not the coordinator's")] {
        let worker = run("ella-worker", &[&["--coordinator", &url, "--device", "cpu"][..], further].concat())?;
        let said = String::from_utf8_lossy(&worker.stderr);
        assert_eq!(worker.status.code(), Some(PERMANENT), "{said}");
        assert!([&url, words, "refused this worker", "give --token-file"].iter().all(|word| said.contains(word)), "{said}");
        tells_no_secret(&said);
        for command in [&["status", &url][..], &["drain", "0", &url], &["train", &config, "--coordinator", &url]] {
            let said = refused(try_ella(&[command, further].concat())?, PERMANENT, &[&url, words, "give --token-file"]);
            tells_no_secret(&said);
        }
    }
    let status: serde_json::Value = serde_json::from_str(&ella(&["status", &url, "--token-file", &ours, "--json"])?)?;
    assert_eq!(status["counts"]["refused_token"], 8, "{status}");
    tells_no_secret(&status.to_string());

    ella(&["train", &config, "--coordinator", &url, "--token-file", &ours])?;
    let output = wait(coordinator.0.remove(0))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && run_of.last_commit()?.step == 4, "{said}");
    assert_eq!(said.lines().filter(|line| line.contains("stranger")).count(), 1, "{said}");
    assert!(said.contains(r#"{"event":"stranger","peer":"127.0.0.1:"#), "{said}");
    tells_no_secret(&said);
    for (name, bytes) in files(&run_of.output)? {
        assert!(![OURS, THEIRS].iter().any(|secret| bytes.windows(secret.len()).any(|at| at == secret.as_bytes())), "{name}");
    }
    Ok(())
}

#[test]
fn a_coordinator_that_is_started_again_asks_for_the_same_token() -> Result<()> {
    let shared = shared()?;
    let ours = token("token-again", OURS)?;
    let run = shared.world.run("killed-with-a-token", 300, "[checkpoint]\nevery = 100\n")?;
    let mut command = spawn(&[run.train(&["workers.count=2"]), ["--token-file", &ours, "--json"].map(str::to_owned).to_vec()].concat())?;
    let status = |with: &[&str]| {
        let url = std::fs::read_to_string(run.output.join("logs/coordinator.address")).ok()?;
        let output = try_ella(&[&["status", &url, "--json"], with].concat()).ok()?;
        Some((output.status.code()?, serde_json::from_slice::<serde_json::Value>(&output.stdout).ok()?))
    };
    wait_until("the first step", || {
        let begun = status(&["--token-file", &ours]).is_some_and(|(_, status)| status["step"].as_u64() > Some(0));
        begun || command.try_wait().is_ok_and(|ended| ended.is_some())
    })?;
    children_of(command.id(), "ella-coordinator").into_iter().for_each(|pid| signal(pid, libc::SIGKILL));
    let mut asked = false;
    wait_until("the next coordinator", || {
        asked = status(&[]).is_some_and(|(code, _)| code == PERMANENT);
        asked || command.try_wait().is_ok_and(|ended| ended.is_some())
    })?;
    let output = wait(command)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && asked, "{said}");
    let trained: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!((&trained["restarts"], &trained["step"]), (&1.into(), &300.into()), "{trained}\n{said}");
    Ok(())
}
