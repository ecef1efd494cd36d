//! Models by their hub ids, from a hub that this test imitates.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Ran, ella, ella_with, world};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";
const WEIGHTS: &str = "model.safetensors";

/// A hub of some repositories, each with one commit: the branch `main`. The gated ones want a token.
#[derive(Debug)]
struct Hub {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    port: u16,
    repos: BTreeMap<&'static str, BTreeMap<String, Vec<u8>>>,
    /// Every request line, and where its contents began if not at the start.
    asked: Mutex<Vec<String>>,
    /// How many downloads of weights break off half-way from now on.
    cuts: Mutex<usize>,
    /// Whether weights come with a changed byte.
    damage: Mutex<bool>,
}

/// A request, as far as it matters here.
struct Request {
    method: String,
    path: String,
    start: Option<usize>,
    token: bool,
}

impl Hub {
    fn open(repos: &[(&'static str, BTreeMap<String, Vec<u8>>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let repos = repos.iter().cloned().collect();
        let shared = Arc::new(Shared { port, repos, asked: Mutex::default(), cuts: Mutex::default(), damage: Mutex::default() });
        let server = shared.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let server = server.clone();
                std::thread::spawn(move || server.answer(&stream));
            }
        });
        Hub { port, shared }
    }

    /// Runs `ella` with this hub and a cache in the folder.
    fn ella(&self, here: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Ran {
        let (endpoint, home) = (format!("http://127.0.0.1:{}", self.port), here.join("hf").display().to_string());
        let mut all = vec![("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", &home), ("HF_TOKEN", ""), ("HF_HUB_CACHE", "")];
        all.extend_from_slice(variables);
        ella_with(here, &all, arguments)
    }

    /// What was asked since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.asked.lock().unwrap())
    }
}

impl Shared {
    fn answer(&self, stream: &TcpStream) {
        let Some(request) = Request::read(stream) else { return };
        let from = request.start.map(|start| format!(" from {start}")).unwrap_or_default();
        self.asked.lock().unwrap().push(format!("{} {}{from}", request.method, request.path));
        let parts: Vec<&str> = request.path.trim_start_matches('/').splitn(5, '/').collect();
        let reply = match parts[..] {
            ["api", "models", org, name, rest] => self.listing(&format!("{org}/{name}"), rest, request.token),
            [org, name, "resolve", COMMIT, file] => self.resolve(&format!("{org}/{name}"), file, &request),
            ["cdn", org, name, file] => return self.contents(&format!("{org}/{name}"), file, &request, stream),
            _ => reply("404 Not Found", &[], b""),
        };
        let body =
            if request.method == "HEAD" { &reply[..reply.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4] } else { &reply[..] };
        let _ = { stream }.write_all(body);
    }

    fn listing(&self, repo: &str, rest: &str, token: bool) -> Vec<u8> {
        let Some(files) = self.repos.get(repo) else { return reply("404 Not Found", &["X-Error-Code: RepoNotFound"], b"") };
        if repo.contains("private") && !token {
            return reply("401 Unauthorized", &["X-Error-Code: RepoNotFound"], b"");
        }
        if !["revision/main", "revision/refs%2Fpr%2F1", &format!("revision/{COMMIT}")].contains(&rest) {
            return reply("404 Not Found", &["X-Error-Code: RevisionNotFound"], b"");
        }
        let siblings: Vec<_> = files.keys().map(|file| serde_json::json!({ "rfilename": file })).collect();
        reply("200 OK", &[], serde_json::json!({ "id": repo, "sha": COMMIT, "siblings": siblings }).to_string().as_bytes())
    }

    fn resolve(&self, repo: &str, file: &str, request: &Request) -> Vec<u8> {
        let Some(bytes) = self.repos.get(repo).and_then(|files| files.get(file)) else {
            return reply("404 Not Found", &["X-Error-Code: EntryNotFound"], b"");
        };
        if repo.contains("gated") && !request.token {
            return reply("403 Forbidden", &["X-Error-Code: GatedRepo"], b"");
        }
        let (digest, commit) = (sha256(bytes), format!("X-Repo-Commit: {COMMIT}"));
        if !file.ends_with(".safetensors") {
            return reply("200 OK", &[&commit, &format!("ETag: W/\"{}\"", &digest[..40])], bytes);
        }
        // Large files are elsewhere: another host, which must not be told the token.
        let away = format!("Location: http://localhost:{}/cdn/{repo}/{}", self.port, file.replace('/', "%2F"));
        let linked = [format!("X-Linked-Etag: \"{digest}\""), format!("X-Linked-Size: {}", bytes.len())];
        reply("302 Found", &[&commit, &away, "ETag: \"of the redirect\"", &linked[0], &linked[1]], b"")
    }

    fn contents(&self, repo: &str, file: &str, request: &Request, mut stream: &TcpStream) {
        assert!(!request.token, "the token left the hub");
        let mut bytes = self.repos[repo][&file.replace("%2F", "/")].clone();
        if *self.damage.lock().unwrap() {
            *bytes.last_mut().unwrap() ^= 1;
        }
        let start = request.start.unwrap_or(0);
        let range = format!("Content-Range: bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
        let reply = match request.start {
            Some(_) => reply("206 Partial Content", &[&range], &bytes[start..]),
            None => reply("200 OK", &[], &bytes),
        };
        let mut cuts = self.cuts.lock().unwrap();
        let sent = if *cuts > 0 { reply.len() - (bytes.len() - start) / 2 } else { reply.len() };
        *cuts = cuts.saturating_sub(1);
        let _ = stream.write_all(&reply[..sent]);
    }
}

impl Request {
    fn read(stream: &TcpStream) -> Option<Self> {
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let first = lines.next()?;
        let mut words = first.split(' ').map(str::to_owned);
        let mut request = Request { method: words.next()?, path: words.next()?, start: None, token: false };
        for line in lines.take_while(|line| !line.is_empty()).map(|line| line.to_ascii_lowercase()) {
            if let Some(range) = line.strip_prefix("range: bytes=") {
                request.start = Some(range.trim_end_matches('-').parse().unwrap());
            }
            request.token |= line == format!("authorization: bearer {TOKEN}");
        }
        Some(request)
    }
}

fn reply(status: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The files below a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            found.extend(files(&entry.path()).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else {
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    found
}

/// A repository of these files, and of others that nobody should ask for.
fn repo(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = files(folder);
    for extra in ["README.md", "pytorch_model.bin", "onnx/model.onnx", "model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"] {
        all.entry(extra.to_owned()).or_insert_with(|| b"not wanted".to_vec());
    }
    all
}

/// A world, and a hub that has its models.
fn hub() -> (tempfile::TempDir, Hub) {
    let dir = world();
    let (base, text) = (repo(&dir.path().join("models/base")), repo(&dir.path().join("models/text")));
    let pickled = BTreeMap::from([("config.json".to_owned(), b"{}".to_vec()), ("pytorch_model.bin".to_owned(), b"PK".to_vec())]);
    let repos =
        [("org/base", base), ("org/text", text.clone()), ("org/gated", text.clone()), ("org/private", text), ("org/pickled", pickled)];
    (dir, Hub::open(&repos))
}

/// The arguments that embed the world's captions with a text model; few captions fit its token limit, so each model embeds anew.
fn embed<'a>(text: &'a str, tokens: &'a str) -> [&'a str; 7] {
    ["embed", "data", "--text", text, "--max-tokens", tokens, "--json"]
}

#[test]
fn a_model_is_downloaded_once_and_found_offline() {
    let (dir, hub) = hub();
    let here = dir.path();
    hub.ella(here, &[], &embed("org/text", "8")).ok();
    let asked = hub.asked();
    let got = |what: &str| asked.iter().any(|line| line.contains(what));
    assert!(got("/api/models/org/text/revision/main") && got("GET /cdn/org/text/model.safetensors") && got("tokenizer.json"), "{asked:?}");
    for unwanted in ["README.md", "pytorch_model.bin", "onnx", "fp16"] {
        assert!(!got(unwanted), "{unwanted}: {asked:?}");
    }

    // The layout of huggingface_hub's cache.
    let cache = here.join("hf/hub/models--org--text");
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    let weights = cache.join("snapshots").join(COMMIT).join(WEIGHTS);
    let original = fs::read(here.join("models/text").join(WEIGHTS)).unwrap();
    assert_eq!(fs::read_link(&weights).unwrap(), Path::new("../../blobs").join(sha256(&original)));
    assert_eq!(fs::read(&weights).unwrap(), original);
    assert!(files(&cache.join("blobs")).keys().all(|blob| !blob.contains("incomplete")));

    // Nothing but the list is asked for again, and offline nothing at all. What is embedded is what the folder gives.
    assert_eq!(hub.ella(here, &[], &embed("org/text", "8")).ok().json()["embedded"], 0);
    assert_eq!(hub.asked(), ["GET /api/models/org/text/revision/main"]);
    let offline = [("HF_HUB_OFFLINE", "1")];
    let same = hub.ella(here, &offline, &embed("org/text", "8")).ok().json();
    assert_eq!(
        (same["embedded"].clone(), same["fingerprint"].clone()),
        (0.into(), ella(here, &embed("models/text", "8")).ok().json()["fingerprint"].clone())
    );
    let pinned = format!("org/text@{COMMIT}");
    assert_eq!(hub.ella(here, &offline, &embed(&pinned, "8")).ok().json()["embedded"], 0);
    assert_eq!(hub.asked(), [""; 0]);
    hub.ella(here, &offline, &embed("org/text@other", "8"))
        .fails(4, &["--text", "org/text@other", "not in the cache", "HF_HUB_OFFLINE", "hf download"]);
    hub.ella(here, &offline, &embed("org/base", "8")).fails(4, &["org/base", "not in the cache"]);

    // Other revisions of the same commit have its files already.
    hub.ella(here, &[], &embed("org/text@refs/pr/1", "8")).ok();
    assert_eq!(fs::read_to_string(cache.join("refs/refs/pr/1")).unwrap(), COMMIT);
    assert_eq!(hub.asked(), ["GET /api/models/org/text/revision/refs%2Fpr%2F1"]);
}

#[test]
fn a_diffusion_model_is_downloaded_by_whoever_names_one() {
    let (dir, hub) = hub();
    let here = dir.path();
    hub.ella(here, &[], &["prepare", "tars", "--out", "with-latents", "--resolution", "64", "--latents", "org/base", "--json"]).ok();
    let snapshot = here.join("hf/hub/models--org--base/snapshots").join(COMMIT);
    let mut expected: Vec<String> = files(&here.join("models/base")).into_keys().collect();
    expected.retain(|file| !file.ends_with(".md"));
    assert_eq!(files(&snapshot).into_keys().collect::<Vec<_>>(), expected);
    let link = fs::read_link(snapshot.join("unet/config.json")).unwrap();
    assert!(link.starts_with("../../../blobs"), "{}", link.display());

    // A single file of a repository.
    let file = "org/base/unet/diffusion_pytorch_model.safetensors";
    let models = ["--base", "models/base", "--text", "models/text", "--prompt", "x"];
    hub.ella(here, &[], &[&["sample", "--connector", file][..], &models].concat())
        .fails(4, &["diffusion_pytorch_model.safetensors", "tensor connector.latents is missing"]);
    let sample = [&["sample", "--connector", "c.safetensors"][..], &models, &["--lora"]].concat();
    hub.ella(here, &[], &[&sample[..], &[file]].concat()).fails(4, &["diffusion_pytorch_model.safetensors"]);
    hub.ella(here, &[], &[&sample[..], &["org/base/none.safetensors:0.5"]].concat())
        .fails(4, &["--lora", "none.safetensors", "unet/diffusion"]);
}

#[test]
fn a_broken_download_goes_on_where_it_ended() {
    let (dir, hub) = hub();
    let here = dir.path();
    *hub.shared.cuts.lock().unwrap() = 2;
    hub.ella(here, &[], &embed("org/text", "8")).ok();
    let asked = hub.asked();
    let starts =
        asked.iter().filter(|line| line.contains("GET /cdn")).map(|line| line.split(" from ").nth(1).is_some()).collect::<Vec<_>>();
    assert_eq!(starts, [false, true, true], "{asked:?}");

    // Damaged contents are not kept.
    fs::remove_dir_all(here.join("hf")).unwrap();
    *hub.shared.damage.lock().unwrap() = true;
    hub.ella(here, &[], &embed("org/text", "8")).fails(1, &["org/text", "model.safetensors", "SHA-256", "expected", "found"]);
    hub.ella(here, &[("HF_HUB_OFFLINE", "1")], &embed("org/text", "8")).fails(4, &["not in the cache"]);
    *hub.shared.damage.lock().unwrap() = false;
    hub.ella(here, &[], &embed("org/text", "8")).ok();
}

#[test]
fn what_the_hub_refuses_is_said_with_what_to_do() {
    let (dir, hub) = hub();
    let here = dir.path();
    let refused = |text: &str, words: &[&str]| hub.ella(here, &[], &embed(text, "8")).fails(4, words);
    refused("org/nowhere", &["--text", "org/nowhere", "has no model", "check the id"]);
    refused("org/text@v9", &["org/text@v9", "no revision v9", "org/text"]);
    refused("org/pickled", &["org/pickled", "safetensors", "pytorch_model.bin"]);
    let words = ["HF_TOKEN", "licence", &format!("127.0.0.1:{}/org/gated", hub.port)];
    refused("org/gated", &["org/gated", "403", words[0], words[1], words[2]]);
    refused("org/private", &["org/private", "401", "HF_TOKEN"]);
    hub.ella(here, &[("HF_TOKEN", "wrong")], &embed("org/gated", "8")).fails(4, &["org/gated", "HF_TOKEN"]);
    hub.ella(here, &[("HF_TOKEN", TOKEN)], &embed("org/gated", "8")).ok();
    // The token that `hf auth login` keeps.
    fs::write(here.join("hf/token"), format!("{TOKEN}\n")).unwrap();
    hub.ella(here, &[], &embed("org/private", "8")).ok();

    refused("models/none/at/all", &["models/none/at/all", "not found", "hub id"]);
    let nobody = [("HF_ENDPOINT", "http://127.0.0.1:9")];
    let words = ["org/text", "cannot be reached", "hf download org/text", "HF_HUB_OFFLINE=1", "folder"];
    hub.ella(here, &nobody, &embed("org/text", "8")).fails(1, &words);
    hub.ella(here, &[("HF_ENDPOINT", "nonsense")], &embed("org/text", "8")).fails(1, &["HF_ENDPOINT"]);
}

/// `ella train` downloads before it starts a process that trains.
#[test]
fn a_run_names_its_models_by_hub_ids() {
    if !Path::new(env!("CARGO_BIN_EXE_ella")).with_file_name("ella-worker").is_file() {
        println!("skipped: ella-worker is not built");
        return;
    }
    let (dir, hub) = hub();
    let here = dir.path();
    let run = |base: &str| {
        let config = format!(
            "[run]\noutput = \"run\"\n[base]\nmodel = \"{base}\"\n[text]\nmodel = \"org/text\"\nmax_tokens = 24\nfeatures = \"inline\"\n\
             [data]\npath = \"data\"\n[connector]\nlayers = 1\nlatents = 4\n[train]\nsteps = 1\nglobal_batch = 4\nmicro_batch = 4\n\
             eval_every = 0\n[workers]\ndevice = \"cpu\"\n"
        );
        fs::write(here.join("run.toml"), config).unwrap();
        hub.ella(here, &[], &["train", "run.toml", "--json"])
    };
    run("org/nowhere").fails(4, &["base.model", "org/nowhere", "has no model"]);
    assert!(!here.join("run").exists());
    assert_eq!(run("org/base").ok().json()["outcome"], "done");
    assert!(here.join("hf/hub/models--org--base/snapshots").join(COMMIT).join("unet").is_dir());
}
