//! Who is let in, and to do what: certificates, tokens, roles and limits, against a coordinator that serves.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use ella_coordinator::client::{self, ClientError};
use ella_coordinator::core::Outcome;
use ella_coordinator::shell::cluster::Cluster;
use ella_coordinator::shell::{AccessControl, Coordinator, Options, RunError};
use ella_proto::access::{Access, ClientTls, TlsFiles, Token};
use ella_proto::config::RunConfig;
use ella_proto::v1::{DrainRequest, FromWorker, StatusRequest};
use ella_store::Store;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::{Code, Request};

/// A coordinator with these certificates and rules.
async fn serve(file: Option<&Path>, token: Option<&Path>, tls: TlsFiles) -> Served {
    let access = AccessControl::load(file, token, tls, None).unwrap();
    serve_with(access, &Store::in_memory()).await
}

async fn serve_with(access: AccessControl, store: &Store) -> Served {
    Served::start_with(&patient(), store, Options { access, ..options() }).await
}

/// A run that waits for its workers as long as a test may take.
fn patient() -> RunConfig {
    config(&["workers.start_timeout=600s"])
}

fn over(served: &Served, tls: &ClientTls) -> Access {
    Access { url: served.url(), token: None, tls: Some(tls.clone()) }
}

fn with_token(served: &Served, path: &Path) -> Access {
    Access { token: Some(Token::load(path).unwrap()), ..Access::from(served.url()) }
}

/// A token's file.
fn secret(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, format!("the-secret-of-the-{name}")).unwrap();
    path
}

/// Asks until the count is as wanted.
async fn counted(access: &Access, name: &str, wanted: u64) {
    let asked = async {
        while client::status(access).await.unwrap().counts.get(name) != Some(&wanted) {
            tokio::task::yield_now().await;
        }
    };
    soon(name, asked).await;
}

/// Handshakes that were refused so far.
async fn refused(access: &Access) -> u64 {
    client::status(access).await.unwrap().counts.get("refused_handshake").copied().unwrap_or(0)
}

/// What the HTTP port answers to these lines.
async fn http(served: &Served, lines: &str) -> String {
    let mut stream = TcpStream::connect(served.addresses.http).await.unwrap();
    // A server that has heard enough closes while more is sent.
    let _ = stream.write_all(format!("{lines}\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes()).await;
    let mut answer = Vec::new();
    let _ = soon("an answer", stream.read_to_end(&mut answer)).await;
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn only_certificates_of_its_ca_that_are_valid_are_let_in_and_all_else_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (ca, other) = (Ca::new(), Ca::new());
    let served = serve(None, None, ca.write(&at("server"), "127.0.0.1")).await;
    let ours = over(&served, &ca.client(folder.path(), "worker.lab"));
    client::status(&ours).await.unwrap();

    let plain = client::status(served.url()).await.unwrap_err();
    assert!(matches!(&plain, ClientError::Unreachable { .. }) && plain.to_string().contains("https://"), "{plain}");
    counted(&ours, "refused_handshake", 1).await;

    // It trusts another CA than the coordinator's.
    let error = client::status(over(&served, &other.client(folder.path(), "other.lab"))).await.unwrap_err();
    assert!(matches!(error, ClientError::Untrusted { .. }) && error.to_string().contains("invalid peer certificate"), "{error}");
    counted(&ours, "refused_handshake", 2).await;

    // Its own is of another CA; has ended; is not there.
    let foreign = TlsFiles { ca: Some(at("server/ca.crt")), ..other.write(&at("foreign"), "worker.lab") };
    let ended = ca.write_expired(&at("ended"), "worker.lab");
    let none = TlsFiles { ca: Some(at("server/ca.crt")), ..TlsFiles::default() };
    // Two CAs of one name are told apart by their signatures only.
    let foreign = (foreign, ["UnknownCA", "DecryptError"]);
    let cases = [foreign, (ended, ["CertificateExpired"; 2]), (none, ["CertificateRequired"; 2])];
    for (n, (files, words)) in (3..).zip(cases) {
        let error = client::status(over(&served, &ClientTls::load(&files).unwrap())).await.unwrap_err();
        let told = error.to_string();
        assert!(matches!(error, ClientError::Untrusted { .. }) && words.iter().any(|word| told.contains(word)), "{words:?}: {told}");
        // Where the connection broke before the alert came, it is asked for once more.
        soon("the count", async {
            while refused(&ours).await < n {
                tokio::task::yield_now().await
            }
        })
        .await;
    }

    let old = serve(None, None, ca.write_expired(&at("old"), "127.0.0.1")).await;
    let error = client::status(over(&old, &ca.client(folder.path(), "worker.lab"))).await.unwrap_err();
    assert!(error.to_string().contains("xpired"), "{error}");
    let elsewhere = serve(None, None, ca.write(&at("elsewhere"), "elsewhere.lab")).await;
    let error = client::status(over(&elsewhere, &ca.client(folder.path(), "worker.lab"))).await.unwrap_err();
    assert!(error.to_string().contains("not valid for name"), "{error}");
}

#[tokio::test]
async fn each_role_may_do_its_part_and_is_told_which_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::new();
    let tokens = ["viewer", "worker", "admin"].map(|name| secret(folder.path(), name));
    let rules = ["viewer", "worker", "admin"].map(|role| {
        format!("[[allow]]\nrole = \"{role}\"\ntoken_file = \"{role}\"\n[[allow]]\nrole = \"{role}\"\ncertificate = \"*.{role}s.lab\"\n")
    });
    std::fs::write(folder.path().join("access.toml"), rules.concat()).unwrap();
    let served = serve(Some(&folder.path().join("access.toml")), None, ca.write(&folder.path().join("server"), "127.0.0.1")).await;
    let bare = TlsFiles { ca: Some(folder.path().join("server/ca.crt")), ..TlsFiles::default() };
    let bare = ClientTls::load(&bare).unwrap();
    let by_token = tokens.clone().map(|path| Access { tls: Some(bare.clone()), ..with_token(&served, &path) });
    let by_certificate = ["a.viewers.lab", "a.workers.lab", "a.admins.lab"].map(|name| over(&served, &ca.client(folder.path(), name)));

    let mut refused = 0;
    for [viewer, worker, admin] in [by_token, by_certificate] {
        for access in [&viewer, &worker, &admin] {
            client::status(access).await.unwrap();
        }
        let error = Fake::try_attach(&viewer, hello("a")).await.err().unwrap();
        assert!(error.contains("needs the role worker") && error.contains("has the role viewer"), "{error}");
        for (n, access) in [&worker, &admin].into_iter().enumerate() {
            Fake::attach(access, hello(&format!("{refused}.{n}"))).await.unwrap();
        }
        for access in [&viewer, &worker] {
            for error in [client::drain(access, "a", "").await.unwrap_err(), client::stop(access, "").await.unwrap_err()] {
                assert!(matches!(error, ClientError::NoEntry { .. }) && error.to_string().contains("needs the role admin"), "{error}");
            }
        }
        refused += 5;
        counted(&admin, "refused_role", refused).await;
        assert!(matches!(client::drain(&admin, "nobody", "").await, Err(ClientError::Refused { .. })), "it may, and there is none");
    }
    // A certificate of the CA that no rule names; and one beside a token that has a greater role.
    let stranger = over(&served, &ca.client(folder.path(), "a.strangers.lab"));
    let error = client::status(&stranger).await.unwrap_err();
    assert!(matches!(error, ClientError::NoEntry { .. }), "{error}");
    let both = Access { tls: Some(ca.client(folder.path(), "b.viewers.lab")), ..with_token(&served, &tokens[2]) };
    client::stop(&both, "enough").await.unwrap();
    assert!(matches!(served.outcome().await, Outcome::Preempted { .. }));
}

#[tokio::test]
async fn people_look_with_a_viewers_token_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let viewer = secret(folder.path(), "viewer");
    std::fs::write(folder.path().join("access.toml"), "[[allow]]\nrole = \"viewer\"\ntoken_file = \"viewer\"").unwrap();
    let served = serve(Some(&folder.path().join("access.toml")), None, TlsFiles::default()).await;
    for path in ["/healthz", "/readyz"] {
        assert!(http(&served, &format!("GET {path} HTTP/1.1")).await.starts_with("HTTP/1.1 200"), "{path}");
    }
    // "anyone:the-secret-of-the-viewer"
    let (bearer, basic) =
        ("authorization: Bearer the-secret-of-the-viewer", "authorization: Basic YW55b25lOnRoZS1zZWNyZXQtb2YtdGhlLXZpZXdlcg==");
    for path in ["/", "/metrics", "/api/v1/status", "/whatever"] {
        let answer = http(&served, &format!("GET {path} HTTP/1.1")).await;
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("www-authenticate: Basic"), "{answer}");
        let wrong = http(&served, &format!("GET {path} HTTP/1.1\r\nauthorization: Bearer what-a-stranger-might-guess")).await;
        assert!(wrong.starts_with("HTTP/1.1 401") && !wrong.contains("guess"), "{wrong}");
        for answer in [answer, wrong] {
            assert_eq!(
                answer.contains("\r\n\r\n{\"error\":\"the "),
                path.starts_with("/api/"),
                "the API tells its errors as JSON: {answer}"
            );
        }
        for shown in [bearer, basic] {
            let answer = http(&served, &format!("GET {path} HTTP/1.1\r\n{shown}")).await;
            assert!(answer.starts_with(if path == "/whatever" { "HTTP/1.1 404" } else { "HTTP/1.1 200" }), "{answer}");
            assert!(answer.contains("content-security-policy: default-src 'none'") && answer.contains("nosniff"), "{answer}");
        }
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let answer = http(&served, &format!("{method} /api/v1/status HTTP/1.1\r\n{bearer}\r\ncontent-length: 0")).await;
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    }
    let long = http(&served, &format!("GET / HTTP/1.1\r\nx: {}", "x".repeat(20_000))).await;
    assert!(long.starts_with("HTTP/1.1 431"), "{long}");
    counted(&with_token(&served, &viewer), "refused_token", 8).await;
}

#[tokio::test]
async fn what_is_too_much_is_refused_with_its_reason_and_counted() {
    let served = Served::start(&patient(), &Store::in_memory()).await;
    let access = served.access();
    let mut client = access.connect(&access.endpoint().unwrap()).await.unwrap();

    let status = client.drain(DrainRequest { worker_id: "a".repeat(2 << 20), reason: String::new() }).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    counted(&access, "refused_oversized", 1).await;

    let mut request = Request::new(StatusRequest::default());
    request.metadata_mut().insert("x-much", "x".repeat(20_000).parse().unwrap());
    let status = client.status(request).await.unwrap_err();
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("headers"), "{status}");
    counted(&access, "refused_headers", 1).await;

    let mut open = Vec::new();
    let status = loop {
        match soon("an answer", client.attach(futures::stream::pending::<FromWorker>())).await {
            Ok(stream) => open.push(stream),
            Err(status) => break status,
        }
    };
    assert!(status.code() == Code::ResourceExhausted && status.message().contains("streams"), "{status}");
    assert_eq!(open.len(), 32);
    counted(&access, "refused_streams", 1).await;
    drop(open);
    let again = async { while client.status(StatusRequest::default()).await.is_err() {} };
    soon("room", again).await;

    // What a worker's stream brings is counted elsewhere, under the same name.
    let mut another = access.connect(&access.endpoint().unwrap()).await.unwrap();
    let long = Some(ella_proto::v1::from_worker::Body::Hello(hello(&"a".repeat(2 << 20))));
    let long = futures::stream::iter([FromWorker { term: 0, generation: 0, body: long }]);
    let mut answers = soon("an answer", another.attach(long)).await.unwrap().into_inner();
    let _ = soon("the stream's end", answers.message()).await;
    counted(&access, "refused_oversized", 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_shows_nothing_is_closed_and_counted() {
    let served = Served::start(&patient(), &Store::in_memory()).await;
    for address in [served.addresses.grpc, served.addresses.http] {
        let mut silent = TcpStream::connect(address).await.unwrap();
        let _ = silent.read_to_end(&mut Vec::new()).await;
    }
    tokio::time::resume();
    counted(&served.access(), "refused_silent", 2).await;
}

#[tokio::test]
async fn guesses_are_put_off_and_who_is_right_is_let_in_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (right, wrong) = (secret(folder.path(), "right"), secret(folder.path(), "wrong"));
    let served = serve(None, Some(&right), TlsFiles::default()).await;
    let guess = with_token(&served, &wrong);
    let mut client = guess.connect(&guess.endpoint().unwrap()).await.unwrap();
    let mut codes = Vec::new();
    for _ in 0..100 {
        codes.push(client.status(StatusRequest::default()).await.unwrap_err().code());
    }
    let answered = codes.iter().filter(|code| **code == Code::Unauthenticated).count();
    assert!((30..60).contains(&answered) && codes.contains(&Code::ResourceExhausted), "{answered} {codes:?}");
    client::status(with_token(&served, &right)).await.unwrap();

    // Who has an old secret is let in no longer than its file has it.
    std::fs::write(&right, "the-secret-that-comes-next").unwrap();
    let newest = with_token(&served, &right);
    let rotated = async { while client::status(&newest).await.is_err() {} };
    soon("the new secret", rotated).await;
    let old = folder.path().join("old");
    std::fs::write(&old, "the-secret-of-the-right").unwrap();
    let error = client::status(with_token(&served, &old)).await.unwrap_err();
    assert!(matches!(error, ClientError::NoEntry { .. } | ClientError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn certificates_are_replaced_under_a_worker_that_stays_and_broken_ones_are_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().join("server");
    let (ca, next) = (Ca::new(), Ca::new());
    let served = serve(None, None, ca.write(&at, "127.0.0.1")).await;
    let ours = over(&served, &ca.client(folder.path(), "worker.lab"));
    let mut worker = Fake::attach(&ours, hello("a")).await.unwrap();

    let whole = std::fs::read(at.join("tls.crt")).unwrap();
    std::fs::write(at.join("tls.crt"), &whole[..whole.len() / 2]).unwrap();
    counted(&ours, "failed_reloads", 1).await;
    std::fs::write(at.join("tls.crt"), whole).unwrap();

    next.write(&at, "127.0.0.1");
    let newer = over(&served, &next.client(folder.path(), "other.lab"));
    let replaced = async { while client::status(&newer).await.is_err() {} };
    soon("the new certificate", replaced).await;
    assert!(client::status(&ours).await.is_err(), "the old CA is out");
    // Its stream is what it was.
    worker.say(ella_proto::v1::from_worker::Body::Idle(ella_proto::v1::Idle::default())).await;
    let _second = Fake::attach(&newer, hello("b")).await.unwrap();
    _second.say(ella_proto::v1::from_worker::Body::Idle(ella_proto::v1::Idle::default())).await;
    assert!(matches!(worker.next().await, Some(ella_proto::v1::to_worker::Body::Assign(_))));
}

#[tokio::test]
async fn service_accounts_have_the_roles_of_their_rules_and_an_api_that_is_away_is_told() {
    use axum::{Json, Router, routing::post};
    use serde_json::{Value, json};
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name)
    };
    let rules = "[[allow]]\nrole = \"worker\"\nservice_account = \"lab/trainer\"\n[[allow]]\nrole = \"admin\"\ntoken_file = \"admin\"";
    file("token", "the-pods-own-token");
    file("admin", "the-secret-of-the-admin");
    let rules = file("access.toml", rules);
    let away = Arc::<AtomicBool>::default();
    let is_away = away.clone();
    let reviewed = move |Json(review): Json<Value>| {
        let user = match review["spec"]["token"].as_str().unwrap() {
            "header.trainer.signature" => Some("system:serviceaccount:lab:trainer"),
            "header.another.signature" => Some("system:serviceaccount:lab:another"),
            _ => None,
        };
        let status = match (is_away.load(Relaxed), user) {
            (true, _) => Value::Null,
            (false, None) => json!({ "error": "token has expired" }),
            (false, Some(user)) => json!({ "authenticated": true, "audiences": review["spec"]["audiences"], "user": { "username": user } }),
        };
        std::future::ready(Json(json!({ "status": status })))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/apis/authentication.k8s.io/v1/tokenreviews", post(reviewed));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let access = AccessControl::from_file_reviewed(&rules, Cluster::at(&url, folder.path()), "ella").unwrap();
    let served = serve_with(access, &Store::in_memory()).await;
    let of = |name: &str, token: &str| with_token(&served, &file(name, token));

    let trainer = of("trainer", "header.trainer.signature");
    Fake::attach(&trainer, hello("a")).await.unwrap();
    let error = client::stop(&trainer, "").await.unwrap_err();
    assert!(error.to_string().contains("needs the role admin"), "{error}");
    for (name, token, words) in [
        ("another", "header.another.signature", "no rule names the service account lab/another"),
        ("expired", "header.expired.signature", "token has expired"),
        ("garbage", "no-token-of-any-service-account", "it has another"),
    ] {
        let error = client::status(of(name, token)).await.unwrap_err();
        assert!(
            matches!(error, ClientError::NoEntry { .. }) && error.to_string().contains(words) && !error.to_string().contains(token),
            "{error}"
        );
    }

    away.store(true, Relaxed);
    // What was found a moment ago still counts; what was not can't be found out.
    client::status(&trainer).await.unwrap();
    let late = of("late", "header.late.signature");
    let error = client::status(&late).await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }) && error.to_string().contains("cannot be reviewed now"), "{error}");
    counted(&of("boss", "the-secret-of-the-admin"), "refused_review", 1).await;
}

#[tokio::test]
async fn nothing_listens_for_other_machines_unless_something_is_asked_of_them_or_it_is_said() {
    let store = Store::in_memory();
    let everywhere = || Options { listen: ([0, 0, 0, 0], 0).into(), ..options() };
    let http = Options { http: ([0, 0, 0, 0], 0).into(), ..options() };
    for options in [everywhere(), http] {
        let error = Coordinator::open(&config(&[]), store.clone(), &options).await.unwrap_err();
        assert!(matches!(error, RunError::Unguarded { .. }) && error.exit_code() == 2, "{error}");
        assert!(["--token-file", "--insecure"].iter().all(|word| error.to_string().contains(word)), "{error}");
    }
    assert!(store.list("").await.unwrap().is_empty(), "nothing was begun");
    let insecure = Options { access: AccessControl::default().insecure(true), ..everywhere() };
    Coordinator::open(&config(&[]), store.clone(), &insecure).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let token = Token::load(&secret(folder.path(), "token")).unwrap();
    let guarded = Options { access: AccessControl::of_token(Some(token)), ..everywhere() };
    Coordinator::open(&config(&[]), store, &guarded).await.unwrap();
}

/// The ports that a process listens on, by its open files.
fn listening(pid: u32) -> Vec<u16> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let sockets: Vec<String> = links
        .filter_map(|link| {
            std::fs::read_link(link.ok()?.path()).ok()?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']').map(str::to_owned)
        })
        .collect();
    let tables = ["tcp", "tcp6", "udp", "udp6"].map(|name| std::fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default());
    let mut ports = Vec::new();
    for line in tables.iter().flat_map(|table| table.lines().skip(1)) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // 0A: it listens; 07: a socket of UDP.
        if ["0A", "07"].contains(&fields[3]) && sockets.iter().any(|socket| socket == fields[9]) {
            ports.push(u16::from_str_radix(fields[1].rsplit_once(':').unwrap().1, 16).unwrap());
        }
    }
    ports.sort_unstable();
    ports
}

#[test]
fn a_scan_of_a_coordinators_ports_finds_two() {
    use std::io::BufRead as _;
    let folder = tempfile::tempdir().unwrap();
    let config = CONFIG.replace("\"unused\"", &format!("\"{}\"", folder.path().join("run").display()));
    let config = config.replace("start_timeout = \"10s\"", "start_timeout = \"600s\"");
    std::fs::write(folder.path().join("run.toml"), config).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ella-coordinator"));
    let command = command.arg(folder.path().join("run.toml")).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let told: serde_json::Value = serde_json::from_str(&line).unwrap();
    let port = |name: &str| told[name].as_str().unwrap().parse::<std::net::SocketAddr>().unwrap().port();
    let mut announced = [port("grpc"), port("http")];
    announced.sort_unstable();
    let found = listening(child.id());
    // And by knocking at every port: its own are open, and no other is its own.
    let open: Vec<u16> = (1..=u16::MAX).filter(|port| std::net::TcpStream::connect(("127.0.0.1", *port)).is_ok()).collect();
    let still = listening(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((&found[..], &still[..]), (&announced[..], &announced[..]));
    assert!(announced.iter().all(|port| open.contains(port)), "{announced:?} {open:?}");
}
