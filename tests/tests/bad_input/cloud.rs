//! Stores that refuse or do not answer: an error within a bounded time, which names the address.

use super::{FAILED, USAGE, ella_refused, refused, shared};
use anyhow::Result;
use ella_tests::{binary, exists, lead, wait};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// What an address that never answers may take at most.
const PATIENCE: Duration = Duration::from_secs(40);

/// Arguments, the environment's settings, and the address that must be named.
type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str);

/// A port of this machine on which nothing listens.
fn closed_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Starts `ella` with only these cloud settings.
fn start(arguments: &[&str], settings: &[(&str, &str)]) -> Result<Child> {
    let mut command = Command::new(binary("ella")?);
    for (name, _) in std::env::vars().filter(|(name, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|cloud| name.starts_with(cloud))) {
        command.env_remove(name);
    }
    command.args(arguments).envs(settings.iter().copied());
    lead(command)
}

#[test]
fn a_store_that_cannot_be_reached_is_given_up_in_time() -> Result<()> {
    let shared = shared()?;
    let endpoint = format!("http://127.0.0.1:{}", closed_port()?);
    let reachable = [("AWS_ENDPOINT", &*endpoint), ("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")];
    let keys = [("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "hunter2")];
    let with_keys = [&reachable[..], &keys].concat();
    // Without keys, the machine's own cloud is asked for them: here one that does not answer.
    let without_keys = [&reachable[..], &[("AWS_METADATA_ENDPOINT", &*endpoint)]].concat();
    let run = shared.world.run("in-the-cloud", 4, "")?;
    let train = run.train(&["run.output=s3://bucket/run"]);
    let train: Vec<&str> = train.iter().map(String::as_str).collect();
    let (scenes, out) = (shared.path("scenes"), shared.path("from-the-cloud"));
    let cases: [Case; 5] = [
        (&train, &with_keys, "s3://bucket/run/"),
        (&["prepare", &scenes, "--out", "s3://bucket/data", "--resolution", "64"], &with_keys, "s3://bucket/data/"),
        (&["prepare", "s3://bucket/a.tar", "--out", &out], &with_keys, "s3://bucket/a.tar"),
        (&["audit", "s3://bucket/run"], &with_keys, "s3://bucket/run/run.toml"),
        (&["status", "s3://bucket/run"], &without_keys, "s3://bucket/run/run.toml"),
    ];
    let begin = Instant::now();
    let children: Vec<_> = cases.iter().map(|(arguments, settings, _)| start(arguments, settings)).collect::<Result<_>>()?;
    for (child, (_, settings, url)) in children.into_iter().zip(&cases) {
        let line = refused(wait(child)?, FAILED, &[url, "127.0.0.1", "refused"]);
        assert!(!line.contains("hunter2") && line.len() < 700, "{} settings: {line}", settings.len());
    }
    assert!(begin.elapsed() < PATIENCE, "given up after {:?}", begin.elapsed());
    assert!(!exists(shared.world.path("from-the-cloud")), "a source that is not there left something behind");
    Ok(())
}

#[test]
fn a_url_that_names_no_store_is_bad_usage() -> Result<()> {
    let shared = shared()?;
    let run = shared.world.run("nowhere-at-all", 4, "")?;
    let train = |output: &str| run.train(&[&format!("run.output={output}")]);
    ella_refused(&train("ftp://host/run"), USAGE, &["ftp://host/run", "unknown scheme ftp"])?;
    ella_refused(&train("s3://"), USAGE, &["s3://", "bucket"])?;
    ella_refused(&train("s3://bucket/run?token=hunter2"), USAGE, &["s3://bucket/run", "environment"])?;
    ella_refused(&train(""), USAGE, &["`run.output`", "it must be a path or a URL"])?;
    for below in ["", "/run"] {
        let output = format!("{}{below}", shared.path("data/manifest.json"));
        ella_refused(&train(&output), USAGE, &["data/manifest.json", "file", "expected a folder"])?;
    }
    Ok(())
}
