//! The dashboard over HTTP: what it answers, what it lets a browser do, and what it does with what comes from outside.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use ella_proto::v1::from_worker::Body as Say;
use ella_store::{Operation, Store, faulty};
use serde_json::Value;
use std::net::SocketAddr;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

struct Answer {
    code: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }
}

async fn get_with(address: SocketAddr, path: &str, more: &str) -> Answer {
    let mut socket = TcpStream::connect(address).await.unwrap();
    // HTTP/1.0: the body comes as it is, and ends with the connection.
    socket.write_all(format!("GET {path} HTTP/1.0\r\nhost: localhost\r\n{more}\r\n").as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    soon("a reply", socket.read_to_end(&mut bytes)).await.unwrap();
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
    Answer { code: head.split(' ').nth(1).unwrap().parse().unwrap(), head, body: bytes[end + 4..].to_vec() }
}

async fn get(address: SocketAddr, path: &str) -> Answer {
    get_with(address, path, "").await
}

/// The answer, once it is as wanted.
async fn get_when(address: SocketAddr, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let asked = async {
        loop {
            let json = get(address, path).await.json();
            if wanted(&json) {
                return json;
            }
        }
    };
    soon("the wanted answer", asked).await
}

async fn put(store: &Store, key: &str, text: &str) {
    store.put(key, text.to_owned().into()).await.unwrap();
}

fn measured(steps: std::ops::RangeInclusive<u64>) -> String {
    steps.map(|step| format!("{{\"at_unix_ms\":{},\"step\":{step},\"samples\":4,\"loss\":{}.5}}\n", 1000 * step, 100 - step)).collect()
}

/// A run that was trained to step 9 by the first term, which committed nothing: so it begins anew.
async fn run_with_a_past() -> (tempfile::TempDir, Store, Served) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("<script>alert(1)").to_str().unwrap()).unwrap();
    let config = config(&["workers.count=1"]);
    let first = Served::start(&config, &store).await;
    first.kill().await;
    put(&store, "metrics/000001-000001.jsonl", &(measured(1..=4) + "{\"step\":5,\n" + &measured(6..=9))).await;
    put(&store, "events/000001-000001.jsonl", "{\"at_unix_ms\":3500,\"event\":\"lost\",\"worker\":\"<b>w\",\"rank\":1,\"why\":\"x\"}\n")
        .await;
    let served = Served::start(&config, &store).await;
    (dir, store, served)
}

#[tokio::test]
async fn the_page_is_whole_in_itself_and_lets_a_browser_do_nothing_else() {
    let (_dir, _store, served) = run_with_a_past().await;
    let http = served.addresses.http;
    let page = get(http, "/").await;
    assert_eq!(page.code, 200);
    assert!(page.head.contains("content-security-policy: default-src 'none'; script-src 'self'; style-src 'self';"), "{}", page.head);
    assert!(!page.head.contains("unsafe") && page.head.contains("x-content-type-options: nosniff"));
    assert!(page.head.contains("frame-ancestors 'none'") && page.head.contains("require-trusted-types-for 'script'"));
    let mut wanted = vec!["/assets/chart.js".to_owned(), "/assets/dom.js".into(), "/assets/panels.js".into(), "/assets/samples.js".into()];
    wanted.extend(page.text().split('"').filter(|part| part.starts_with("/assets/")).map(str::to_owned));
    let mut bytes = page.body.len();
    for path in &wanted {
        let asset = get(http, path).await;
        assert_eq!(asset.code, 200, "{path}");
        bytes += asset.body.len();
        let tag = asset.head.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap().to_owned();
        let again = get_with(http, path, &format!("if-none-match: {tag}\r\n")).await;
        assert_eq!((again.code, again.body.len()), (304, 0));
    }
    assert!(bytes < 200_000, "{bytes}");
    let whole = page.text().to_lowercase();
    for never in ["http://", "https://", " onclick", " style=", "<script>"] {
        assert!(!whole.contains(never), "{never}");
    }
    for path in ["/assets/nothing.js", "/assets/..%2f..%2fcargo.toml", "/nothing"] {
        assert_eq!(get(http, path).await.code, 404, "{path}");
    }
    let mut socket = TcpStream::connect(http).await.unwrap();
    socket.write_all(b"POST /api/v1/summary HTTP/1.0\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    soon("a reply", socket.read_to_string(&mut text)).await.unwrap();
    assert!(text.contains("405"), "{text}");
}

#[tokio::test]
async fn the_past_is_restored_with_damage_counted_and_live_steps_are_joined_to_it() {
    let (_dir, _store, served) = run_with_a_past().await;
    let http = served.addresses.http;
    let summary = get_when(http, "/api/v1/summary", |summary| summary["history"]["restoring"] == false).await;
    assert_eq!((&summary["name"], &summary["history"]["damaged_lines"]), (&"<script>alert(1)".into(), &1.into()));
    assert!(summary["history"]["problems"][0].as_str().unwrap().contains("metrics/000001-000001.jsonl: line 5"), "{summary}");
    let curves = get(http, "/api/v1/curves?points=100").await.json();
    assert_eq!(curves["step"], serde_json::json!([1, 2, 3, 4, 6, 7, 8, 9]));
    assert_eq!((&curves["loss"]["mean"][0], &curves["width"], &curves["last_step"]), (&99.5.into(), &1.into(), &9.into()));
    let few = get(http, "/api/v1/curves?points=2").await.json();
    assert!(few["step"].as_array().unwrap().len() <= 2 && few["loss"]["max"][0] == 99.5, "{few}");
    let part = get(http, "/api/v1/curves?from=7&to=8").await.json();
    assert_eq!(part["step"], serde_json::json!([7, 8]));
    let events = get_when(http, "/api/v1/events", |events| events["total"].as_u64() > Some(0)).await;
    let lost = events["events"].as_array().unwrap().iter().find(|event| event["event"] == "lost").unwrap().clone();
    assert_eq!((&lost["step"], &lost["text"]), (&3.into(), &"rank 1, <b>w was lost: x".into()), "by the time, as words");
    assert!(events["marks"].as_array().unwrap().iter().any(|mark| mark["kind"] == "lost" && mark["step"] == 3));

    let mut worker = Fake::attach(&served.url(), hello("<img src=x>")).await.unwrap();
    worker.get_ready().await.unwrap();
    worker.progress(1).await;
    let curves = get_when(http, "/api/v1/curves", |curves| curves["last_step"] == 1).await;
    assert_eq!(curves["loss"]["mean"], serde_json::json!([1.0]), "the steps are computed again from the first");
    let ranks = get(http, "/api/v1/ranks").await.json();
    assert_eq!((&ranks["of"], &ranks["source"], &ranks["ranks"][0]["worker"]), (&1.into(), &"status".into(), &"<img src=x>".into()));
    let summary = get(http, "/api/v1/summary").await.json();
    assert_eq!((&summary["ranks"], &summary["samples_per_epoch"], &summary["workers"]), (&1.into(), &64.into(), &serde_json::json!([])));
    for bad in ["/api/v1/curves?points=x", "/api/v1/curves?from=-1"] {
        assert_eq!(get(http, bad).await.code, 400, "{bad}");
    }
}

async fn next_event(lines: &mut tokio::io::Lines<BufReader<TcpStream>>) -> (String, String, String) {
    let (mut id, mut name) = (String::new(), String::new());
    loop {
        let line = soon("an event", lines.next_line()).await.unwrap().expect("the stream goes on");
        match line.split_once(": ") {
            Some(("id", value)) => id = value.to_owned(),
            Some(("event", value)) => name = value.to_owned(),
            Some(("data", value)) => return (id, name, value.to_owned()),
            _ => {}
        }
    }
}

async fn live(http: SocketAddr, more: &str) -> tokio::io::Lines<BufReader<TcpStream>> {
    let mut socket = TcpStream::connect(http).await.unwrap();
    socket.write_all(format!("GET /api/v1/live HTTP/1.1\r\nhost: localhost\r\n{more}\r\n").as_bytes()).await.unwrap();
    BufReader::new(socket).lines()
}

#[tokio::test]
async fn what_happens_is_told_live_and_again_to_who_was_cut_off() {
    let store = Store::in_memory();
    let served = Served::start(&config(&["workers.count=1"]), &store).await;
    let http = served.addresses.http;
    let mut stream = live(http, "").await;
    assert_eq!(next_event(&mut stream).await.1, "reset");
    let mut worker = Fake::attach(&served.url(), hello("a")).await.unwrap();
    worker.get_ready().await.unwrap();
    worker.progress(1).await;
    let mut seen = Vec::new();
    let steps = loop {
        let event = next_event(&mut stream).await;
        if event.1 == "steps" {
            break event;
        }
        seen.push(event);
    };
    let step: Value = serde_json::from_str(&steps.2).unwrap();
    assert_eq!((&step[0]["step"], &step[0]["loss"]), (&1.into(), &1.0.into()));
    let attached = seen.iter().find(|(_, name, data)| name == "event" && data.contains("\"attached\"")).unwrap();
    drop(stream);
    let mut again = live(http, &format!("last-event-id: {}\r\n", attached.0)).await;
    let mut names = Vec::new();
    loop {
        let event = next_event(&mut again).await;
        assert_ne!(event.0, attached.0, "it was seen");
        names.push(event.1.clone());
        if event.0 == steps.0 {
            break;
        }
    }
    assert!(!names.contains(&"reset".to_owned()), "{names:?}");
    let mut stranger = live(http, "last-event-id: 1-1\r\n").await;
    assert_eq!(next_event(&mut stranger).await.1, "reset");

    // The end is told, then the stream ends, and the coordinator with it.
    served.stops.send("one".into()).await.unwrap();
    served.stops.send("two".into()).await.unwrap();
    loop {
        let (_, name, data) = next_event(&mut again).await;
        if name == "event" && data.contains("\"ended\"") {
            break;
        }
    }
    served.outcome().await;
    while soon("the stream's end", again.next_line()).await.unwrap().is_some() {}
}

#[tokio::test]
async fn streams_are_bounded_in_number() {
    let store = Store::in_memory();
    let served = Served::start(&config(&[]), &store).await;
    let mut open = Vec::new();
    for _ in 0..64 {
        let mut stream = live(served.addresses.http, "").await;
        next_event(&mut stream).await;
        open.push(stream);
    }
    let refused = get(served.addresses.http, "/api/v1/live").await;
    assert!(refused.code == 503 && refused.text().contains("64 pages"), "{}", refused.text());
    open.pop();
    let free = async { while get_head(served.addresses.http).await != 200 {} };
    soon("a place", free).await;
}

async fn get_head(http: SocketAddr) -> u16 {
    let mut stream = live(http, "").await;
    stream.next_line().await.unwrap().unwrap().split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn runs_beside_this_one_are_listed_compared_and_shown() {
    let (dir, _store, served) = run_with_a_past().await;
    let (http, runs) = (served.addresses.http, Store::open(dir.path().to_str().unwrap()).unwrap());
    put(&runs, "other/run.toml", &config(&["train.steps=7", "run.seed=3"]).to_toml()).await;
    put(&runs, "other/metrics/000001-000001.jsonl", &measured(1..=6)).await;
    put(&runs, "secret/notes.txt", "not a run").await;
    let listed = get(http, "/api/v1/runs").await.json();
    let names: Vec<_> = listed["runs"].as_array().unwrap().iter().map(|run| (run["name"].as_str().unwrap(), run["own"] == true)).collect();
    assert_eq!(names, [("<script>alert(1)", true), ("other", false)]);
    assert_eq!((&listed["runs"][1]["step"], &listed["runs"][1]["steps"], &listed["runs"][1]["loss"]), (&6.into(), &7.into(), &94.5.into()));
    let config = get(http, "/api/v1/config?with=other").await.json();
    let differs: Vec<_> = config["keys"].as_array().unwrap().iter().filter(|key| key["differs"] == true).map(|key| &key["key"]).collect();
    assert_eq!(differs, ["run.seed", "train.steps", "workers.count"]);
    let curves = get_when(http, "/api/v1/curves?run=other", |curves| curves["last_step"] == 6).await;
    assert_eq!(curves["step"].as_array().unwrap().len(), 6);
    let summary = get(http, "/api/v1/summary?run=other").await.json();
    assert_eq!((&summary["phase"], &summary["step"], &summary["name"]), (&"open".into(), &6.into(), &"other".into()));
    for bad in ["..%2f..", "%2e%2e", "a%2fb", "%2fetc", "%00"] {
        for route in ["curves?run", "summary?run", "samples?run", "config?with", "config?run"] {
            assert_eq!(get(http, &format!("/api/v1/{route}={bad}")).await.code, 400, "{route}={bad}");
        }
    }
    assert_eq!(get(http, "/api/v1/curves?run=secret").await.code, 404);
}

#[tokio::test]
async fn samples_are_shown_and_nothing_else_of_the_folder() {
    let (dir, store, served) = run_with_a_past().await;
    let http = served.addresses.http;
    assert_eq!(get(http, "/api/v1/samples").await.json()["steps"], serde_json::json!([]));
    let png = b"\x89PNG\r\n\x1a\npicture";
    store.put("samples/000000000400/000.png", png.to_vec().into()).await.unwrap();
    put(&store, "samples/000000000400/index.json", r#"{"step":400,"images":[{"file":"000.png","prompt":"a <b>cat","seed":7}]}"#).await;
    put(&store, "samples/000000000400/page.png", "<html><script>alert(1)</script>").await;
    put(&store, "samples/odd/index.json", "{}").await;
    std::fs::write(dir.path().join("outside.png"), png).unwrap();
    assert_eq!(get(http, "/api/v1/samples").await.json()["steps"], serde_json::json!([400]));
    let index = get(http, "/api/v1/samples/400").await.json();
    assert_eq!((&index["images"][0]["prompt"], &index["images"][0]["seed"]), (&"a <b>cat".into(), &7.into()));
    let picture = get(http, "/api/v1/samples/400/000.png").await;
    assert!(
        picture.code == 200 && picture.head.contains("content-type: image/png") && picture.head.contains("nosniff"),
        "{}",
        picture.head
    );
    assert_eq!(picture.body, png);
    assert_eq!(get(http, "/api/v1/samples/400/page.png").await.code, 415);
    for (path, code) in [("5", 404), ("x", 400), ("-1", 400), ("400/none.png", 404)] {
        assert_eq!(get(http, &format!("/api/v1/samples/{path}")).await.code, code, "{path}");
    }
    for path in ["..%2f..%2f..%2foutside.png", "..%2f..%2frun.toml", "%2e%2e", "..", "%2fetc%2fpasswd", ".hidden", "a%00b"] {
        let answer = get(http, &format!("/api/v1/samples/400/{path}")).await;
        assert!(matches!(answer.code, 400 | 404), "{path}: {}", answer.code);
    }
    // Whatever is wrong with a question is told as JSON.
    for (path, code) in [("curves?points=abc", 400), ("events?limit=x", 400), ("ranks?top=-1", 400), ("samples/abc", 400), ("nix", 404)] {
        let answer = get(http, &format!("/api/v1/{path}")).await;
        assert!(answer.code == code && answer.json()["error"].as_str().is_some_and(|error| !error.is_empty()), "{path}: {}", answer.text());
    }
}

#[tokio::test]
async fn a_store_that_fails_is_told_on_the_page_and_breaks_nothing() {
    let faults = faulty::Faults::new();
    let store = faults.inject(&Store::in_memory());
    put(&store, "metrics/000001-000001.jsonl", &measured(1..=3)).await;
    let config = config(&["workers.count=1"]);
    Served::start(&config, &store).await.kill().await;
    faults.push(Operation::Get, "metrics/", faulty::Failure::Denied, 100);
    faults.push(Operation::List, "samples", faulty::Failure::Denied, 100);
    let served = Served::start(&config, &store).await;
    let http = served.addresses.http;
    let summary = get_when(http, "/api/v1/summary", |summary| summary["history"]["restoring"] == false).await;
    assert_eq!(summary["history"]["unread_files"], 1);
    assert!(summary["history"]["problems"][0].as_str().unwrap().contains("metrics/000001-000001.jsonl"), "{summary}");
    let samples = get(http, "/api/v1/samples").await;
    assert!(samples.code == 502 && samples.json()["error"].as_str().unwrap().contains("samples"), "{}", samples.text());
    let mut worker = Fake::attach(&served.url(), hello("a")).await.unwrap();
    worker.get_ready().await.unwrap();
    worker.progress(1).await;
    get_when(http, "/api/v1/curves", |curves| curves["last_step"] == 1).await;
}

#[tokio::test]
async fn a_job_is_shown_by_its_units() {
    use ella_coordinator::shell::Coordinator;
    let data = tempfile::tempdir().unwrap();
    let text = format!("[job]\nkind = \"prepare\"\ndata = {:?}\n[prepare]\nx = 1\n", data.path());
    let job = ella_proto::config::JobConfig::parse(&text, "test", &[]).unwrap();
    let coordinator = Coordinator::open_job(&job, &options()).await.unwrap();
    let (http, grpc) = (coordinator.addresses().http, coordinator.addresses().grpc.to_string());
    let (_stops, receiver) = tokio::sync::mpsc::channel(4);
    let run = tokio::spawn(coordinator.run(receiver));
    let mut worker = Fake::attach(&grpc, hello("a")).await.unwrap();
    worker.say(Say::LeaseRequest(ella_proto::v1::LeaseRequest { slots: 1 })).await;
    worker.next().await.unwrap();
    let summary = get_when(http, "/api/v1/summary", |summary| summary["job"]["units_held"] == 1).await;
    assert_eq!((&summary["job"]["workers"][0]["held"][0]["unit"], &summary["phase"]), (&"plan".into(), &"working".into()));
    assert_eq!(get(http, "/api/v1/samples").await.json()["steps"], serde_json::json!([]));
    assert_eq!(get(http, "/api/v1/runs").await.json()["runs"].as_array().unwrap().len(), 1);
    let events = get(http, "/api/v1/events").await.json();
    assert!(events["events"].as_array().unwrap().iter().any(|event| event["event"] == "joined"), "{events}");
    run.abort();
}
