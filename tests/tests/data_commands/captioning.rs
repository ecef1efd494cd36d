//! `ella caption` against an endpoint that fails, stalls, rambles and answers nonsense; killed half-way and run again.

use crate::endpoint::{Endpoint, FATES, Fate, PROMPT, expected, fate};
use crate::{captions, json, prepared};
use anyhow::{Context as _, Result};
use ella_tests::{ella, kill_group, signal, spawn, try_ella, wait_until};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const SCENES: usize = 96;
/// Pictures of a shard.
const EACH: usize = 8;

fn arguments(data: &str, endpoint: &Endpoint) -> Vec<String> {
    let sets = [
        format!("endpoint={}", endpoint.url),
        "model=tiny".to_owned(),
        format!("prompt=\"{PROMPT}{{caption}}\""),
        "timeout=2s".to_owned(),
        "retries=12".to_owned(),
        "concurrency=4".to_owned(),
        "cut=trim".to_owned(),
    ];
    let sets = sets.into_iter().flat_map(|set| ["--set".to_owned(), set]);
    ["caption", data, "--workers", "2", "--json"].map(str::to_owned).into_iter().chain(sets).collect()
}

/// What a process says on stderr, line by line.
fn lines(child: &mut Child) -> Result<Receiver<String>> {
    let stderr = child.stderr.take().context("no stderr")?;
    let (said, lines) = channel();
    std::thread::spawn(move || BufReader::new(stderr).lines().map_while(|line| line.ok()).try_for_each(|line| said.send(line)));
    Ok(lines)
}

#[test]
fn captions_from_a_bad_endpoint_are_whole_after_a_kill_and_a_resume() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = prepared(folder.path(), SCENES)?;
    let own = captions(&data, "caption")?;
    let mut fates = BTreeMap::<Fate, usize>::new();
    own.iter().for_each(|caption| *fates.entry(fate(caption)).or_default() += 1);
    assert!(own.len() == SCENES && fates.len() == FATES.len(), "{fates:?}");
    let endpoint = Endpoint::start()?;
    let arguments = arguments(&data, &endpoint);

    let mut child = spawn(&arguments)?;
    let said = lines(&mut child)?;
    let coordinator = loop {
        let line = said.recv_timeout(Duration::from_secs(120)).context("no coordinator")?;
        if let Some((_, rest)) = line.split_once("coordinator http://") {
            break rest.split_whitespace().next().context("no address")?.to_owned();
        }
    };
    let live = json(&["status", "--coordinator", &coordinator])?;
    assert_eq!(live["job"]["kind"], "caption", "{live}");
    // A worker that dies is followed by another; then all are killed.
    wait_until("a quarter of the captions", || endpoint.asked().len() >= SCENES / 4)?;
    let live = json(&["status", "--coordinator", &coordinator])?;
    let worker = live["job"]["workers"][0]["pid"].as_u64().context("no worker")?;
    signal(u32::try_from(worker)?, libc::SIGKILL);
    wait_until("half of the captions", || endpoint.asked().len() >= SCENES / 2)?;
    kill_group(child.id());
    child.wait()?;
    let before = endpoint.asked();

    let work = json(&["status", &data])?["work"].clone();
    let (prepare, begun) = (&work[0], &work[1]);
    assert_eq!((&prepare["kind"], &prepare["whole"], &prepare["counts"]["kept"]), (&"prepare".into(), &true.into(), &SCENES.into()));
    assert_eq!((&begun["kind"], &begun["name"], &begun["whole"]), (&"caption".into(), &"dense".into(), &false.into()), "{work}");
    let done = begun["units_done"].as_u64().context("no units")? as usize;
    assert!((1..SCENES / EACH).contains(&done) && begun["samples"] == done * EACH, "{work}");

    let told: serde_json::Value = serde_json::from_str(&ella(&arguments)?)?;
    let of = |fate| fates[&fate] as u64;
    let counts = &told["counts"];
    let refused = of(Fate::Rambles) + of(Fate::Declines);
    assert_eq!(counts["captioned"], SCENES as u64 - refused, "{told}");
    assert_eq!((&counts["refused.rambled"], &counts["refused.refused"]), (&of(Fate::Rambles).into(), &of(Fate::Declines).into()), "{told}");
    assert_eq!(counts["trimmed"], of(Fate::Cut), "{told}");
    assert_eq!(counts["output_tokens"], 20 * (SCENES as u64 - of(Fate::Rambles)), "{told}");
    assert_eq!(captions(&data, "dense")?, own.iter().map(|caption| expected(caption)).collect::<Vec<_>>());

    // What was done before the kill is not asked for again; what fails in passing is, and was.
    let asked = endpoint.asked();
    let again = asked.iter().filter(|(caption, times)| before.get(*caption).is_some_and(|before| **times > *before)).count();
    assert!(again <= SCENES - done * EACH + 1, "{again} of {SCENES} were asked again, though {done} shards were done");
    for passing in [Fate::Fails, Fate::Busy, Fate::Stalls, Fate::Nonsense] {
        assert!(asked.iter().all(|(caption, times)| fate(caption) != passing || *times >= 2), "{passing:?}");
    }

    // Refusals are named where a user looks.
    let report = told["report"].as_str().context("no report")?;
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report)?)?;
    let named = |why: &str| report["refused"][why].as_object().map_or(0, serde_json::Map::len) as u64;
    assert_eq!((named("rambled"), named("refused")), (of(Fate::Rambles), of(Fate::Declines)), "{report}");
    assert!(
        report["refused"]["refused"]
            .as_object()
            .is_some_and(|keys| keys.values().all(|said| said == "I'm sorry, I can't help with that picture."))
    );
    let seen = json(&["inspect", &data])?;
    let column = seen["captions"][1].as_str().context("no added column")?;
    assert!(column.starts_with("dense, added: ") && column.contains(&format!("{} trimmed", of(Fate::Cut))), "{column}");
    assert!(
        column.contains(&format!("{} refused.rambled", of(Fate::Rambles))) && column.contains("captions/dense/report.json"),
        "{column}"
    );
    assert_eq!(json(&["status", &data])?["work"][1]["whole"], true);

    // Nothing is left to ask, and nothing was left half-written.
    ella(&arguments)?;
    assert_eq!(endpoint.asked(), asked);
    let other = try_ella(&[&arguments[..], &["--set".to_owned(), "max_tokens=64".to_owned()]].concat())?;
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(4) && said.contains("max_tokens differs (expected 64, found 300)"), "{said}");
    assert!(said.contains("another --column"), "{said}");
    let verified = json(&["verify", &data])?;
    assert_eq!((&verified["damaged"], &verified["stray"]), (&serde_json::json!([]), &serde_json::json!([])));
    Ok(())
}
