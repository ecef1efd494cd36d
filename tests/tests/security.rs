//! Security with real processes: a run under mutual TLS trains the same bytes as one without, each identity may do its part, and no secret that
//! a process knows comes to light anywhere.

use anyhow::{Context as _, Result, ensure};
use ella_tests::{Processes, Run, World, binary, children_of, coordinator, ella, lead, try_ella, wait, wait_until};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const STEPS: u64 = 24;
const USAGE: i32 = 2;

/// What a process may know of its environment, by the variables that it comes in. None of it is a word of anything else.
const PLANTED: [(&str, &str); 8] = [
    ("AWS_ACCESS_KEY_ID", "planted-aws-id-5c1d"),
    ("AWS_SECRET_ACCESS_KEY", "planted-aws-secret-77ab"),
    ("AWS_SESSION_TOKEN", "planted-aws-session-19fe"),
    ("AZURE_STORAGE_ACCOUNT_KEY", "cGxhbnRlZC1henVyZS1rZXktM2Q5Yg=="),
    ("GOOGLE_SERVICE_ACCOUNT_KEY", "planted-google-key-e0c4"),
    ("HF_TOKEN", "planted-hf-token-84aa"),
    ("OPENAI_API_KEY", "planted-openai-key-bb02"),
    ("ELLA_CAPTION_KEY", "planted-caption-key-6f3c"),
];
/// What is in the token's file.
const TOKEN: &str = "planted-token-of-the-run-2b8e";
/// What a worker with certificates says of its sums.
const SUMS_OVER_TLS: &str = "what workers sum goes over TLS";
/// What is in a URL where none should be.
const IN_URL: &str = "planted-in-a-url-d41f";

/// Every file below a folder, by its path.
fn files(folder: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(&at).with_context(|| at.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { drop(found.insert(path.clone(), std::fs::read(path)?)) }
        }
    }
    Ok(found)
}

/// No secret stands there.
#[track_caller]
fn tells_no_secret(what: &str, bytes: &[u8]) {
    for secret in PLANTED.map(|(_, secret)| secret).into_iter().chain([TOKEN, IN_URL]) {
        let at = bytes.windows(secret.len()).position(|at| at == secret.as_bytes());
        assert!(at.is_none(), "{what} tells {secret}:\n{}", String::from_utf8_lossy(bytes));
    }
}

/// A command that knows them all.
fn knowing(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary("ella")?);
    command.args(arguments).envs(PLANTED).env("ELLA_LOG", "debug").env("RUST_BACKTRACE", "full");
    Ok(command)
}

#[track_caller]
fn told_by(output: &Output) -> String {
    tells_no_secret("its stdout", &output.stdout);
    tells_no_secret("its stderr", &output.stderr);
    format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout))
}

/// The options that an identity of `ella certs` goes with.
fn shown(certs: &Path, identity: &str) -> Vec<String> {
    let at = |name: &str| certs.join(identity).join(name).display().to_string();
    ["--tls-cert", &at("tls.crt"), "--tls-key", &at("tls.key"), "--tls-ca", &at("ca.crt")].map(str::to_owned).to_vec()
}

fn finished(run: &Run) -> Result<ella_tests::Files> {
    ella(&["audit", &run.output.display().to_string()])?;
    run.last_files()
}

#[test]
fn a_run_under_mutual_tls_trains_the_same_bytes_and_each_identity_may_do_its_part() -> Result<()> {
    let world = World::new(48)?;
    let plain = world.run("plain", STEPS, "[checkpoint]\nevery = 8\n")?;
    ella(&plain.train(&["workers.count=2"]))?;
    let certs = world.path("certs");
    let make = ["certs", "--out", &certs.display().to_string(), "--host", "127.0.0.1", "--host", "localhost"];
    let told = ella(&make)?;
    assert!(told.contains("--tls-cert") && told.contains("access.toml"), "{told}");
    for (path, _) in files(&certs)? {
        assert_eq!(path.metadata()?.permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
    let again = try_ella(&make)?;
    assert!(again.status.code() == Some(USAGE) && String::from_utf8_lossy(&again.stderr).contains("nothing is overwritten"));

    // All of it in one command, which shows its processes the coordinator's own certificate.
    let whole = world.run("whole", STEPS, "[checkpoint]\nevery = 8\n")?;
    ella(&[whole.train(&["workers.count=2"]), shown(&certs, "coordinator")].concat())?;
    assert!(finished(&whole)? == plain.last_files()?, "a run under TLS trained other bytes");
    for worker in ["worker-0", "worker-1"] {
        let log = std::fs::read_to_string(whole.output.join(format!("logs/{worker}.log")))?;
        assert!(log.contains(SUMS_OVER_TLS), "{worker}: {log}");
    }

    // A coordinator, and workers of their own identity.
    let apart = world.run("apart", STEPS, "[checkpoint]\nevery = 8\n[workers]\ncount = 2\n")?;
    let access = ["--access".to_owned(), certs.join("access.toml").display().to_string()];
    let own = [shown(&certs, "coordinator"), access.to_vec()].concat();
    let (child, grpc, _) = coordinator(&apart.config, &own.iter().map(String::as_str).collect::<Vec<_>>())?;
    let mut coordinator = Processes(vec![child]);
    let url = format!("https://{grpc}");
    let as_one = |identity: &str, command: &[&str]| {
        try_ella(&[command.iter().map(|word| (*word).to_owned()).collect(), shown(&certs, identity)].concat())
    };
    for identity in ["viewer", "worker", "admin"] {
        let seen = as_one(identity, &["status", &url, "--json"])?;
        ensure!(seen.status.success(), "{}", told_by(&seen));
    }
    let config = apart.config.display().to_string();
    for (identity, command, words) in [
        ("viewer", &["drain", "0", &url][..], "no worker"),
        ("viewer", &["train", &config, "--coordinator", &url], "needs the role worker"),
    ] {
        let refused = as_one(identity, command)?;
        assert!(!refused.status.success() && told_by(&refused).contains(words), "{}", told_by(&refused));
    }
    let plaintext = try_ella(&["status", &format!("http://{grpc}")])?;
    assert!(!plaintext.status.success() && told_by(&plaintext).contains("https://"), "{}", told_by(&plaintext));

    // Their certificates are good for clients only, and they show them to each other all the same.
    let trained = as_one("worker", &["train", &config, "--coordinator", &url, "--verbose"])?;
    ensure!(trained.status.success(), "{}", told_by(&trained));
    assert_eq!(told_by(&trained).matches(SUMS_OVER_TLS).count(), 2, "{}", told_by(&trained));
    assert!(wait_for(coordinator.0.remove(0))?);
    assert!(finished(&apart)? == plain.last_files()?, "workers with certificates trained other bytes");
    Ok(())
}

fn wait_for(child: std::process::Child) -> Result<bool> {
    Ok(wait(child)?.status.success())
}

/// The command lines of a process and all below it.
fn command_lines(pid: u32) -> Vec<u8> {
    let own = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let children = ["ella-coordinator", "ella-worker"].into_iter().flat_map(|name| children_of(pid, name));
    children.map(command_lines).fold(own, |all, more| [all, more].concat())
}

#[test]
fn secrets_of_environment_files_and_urls_come_to_light_nowhere() -> Result<()> {
    let world = World::new(32)?;
    let token = world.path("token").display().to_string();
    std::fs::write(&token, TOKEN)?;
    let run = world.run("secretive", 40, "[checkpoint]\nevery = 8\n")?;
    let config = run.config.display().to_string();
    let command = knowing(&["train", &config, "--set", "workers.count=2", "--token-file", &token, "--verbose", "--json"])?;
    let mut child = lead(command)?;
    let mut lines = Vec::new();
    wait_until("the first commit", || {
        lines.extend(command_lines(child.id()));
        run.commits().is_ok_and(|commits| !commits.is_empty()) || child.try_wait().is_ok_and(|ended| ended.is_some())
    })?;
    let url = std::fs::read_to_string(run.output.join("logs/coordinator.address")).unwrap_or_default();
    let status = wait(lead(knowing(&["status", &url, "--token-file", &token, "--json"])?)?)?;
    told_by(&status);
    let trained = wait(child)?;
    let said = told_by(&trained);
    ensure!(trained.status.success(), "{said}");
    assert!(String::from_utf8_lossy(&lines).contains("ella-worker"), "no command line was seen");
    tells_no_secret("a command line", &lines);

    // Such as fail: what a config, a store, a hub and an endpoint are given that they can't use.
    let at = |scheme: &str| format!("{scheme}://user:{IN_URL}@127.0.0.1:1/x?X-Amz-Signature={IN_URL}&sig={IN_URL}");
    for (n, (key, value)) in [
        ("data.path", at("https")),
        ("run.output", at("s3")),
        ("data.path", at("az")),
        ("base.model", at("https")),
        ("text.model", at("https")),
        ("data.path", format!("s3://user:{IN_URL}/not-escaped@bucket/x")),
    ]
    .into_iter()
    .enumerate()
    {
        let failing = world.run(&format!("failing-{n}"), 4, "")?;
        let mut text = std::fs::read_to_string(&failing.config)?.parse::<toml::Table>()?;
        let (table, key) = key.split_once('.').context("a key")?;
        text[table][key] = value.into();
        std::fs::write(&failing.config, text.to_string())?;
        let output = wait(lead(knowing(&["train", &failing.config.display().to_string(), "--verbose", "--token-file", &token])?)?)?;
        assert!(!output.status.success(), "{n}");
        told_by(&output);
        if failing.output.exists() {
            files(&failing.output)?.iter().for_each(|(path, bytes)| tells_no_secret(&path.display().to_string(), bytes));
        }
    }
    let no_hub = [("HF_ENDPOINT", "http://127.0.0.1:1"), ("AWS_ENDPOINT", "http://127.0.0.1:1"), ("AWS_ALLOW_HTTP", "true")];
    for arguments in [
        &["inspect", "someone/gated-model"][..],
        &["status", "s3://bucket/run"],
        &["prepare", &at("https"), "--out", &world.path("out").display().to_string()],
        &["status", &format!("http://user:{IN_URL}@127.0.0.1:1")],
    ] {
        let mut command = knowing(arguments)?;
        command.envs(no_hub);
        let output = wait(lead(command)?)?;
        assert!(!output.status.success(), "{arguments:?}");
        told_by(&output);
    }
    files(&run.output)?.iter().for_each(|(path, bytes)| tells_no_secret(&path.display().to_string(), bytes));
    Ok(())
}
