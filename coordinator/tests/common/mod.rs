//! What the shell's tests share: a run's config, a coordinator in this process, and workers that follow the protocol without training.

#![allow(dead_code, unused_imports, unreachable_pub, clippy::unwrap_used)] // each test file uses its part

mod certs;
mod life;
mod ring;

pub use certs::Ca;
pub use life::{Ended, Life, Script, train_two};

use bytes::Bytes;
use ella_coordinator::core::{Outcome, PARTS};
use ella_coordinator::shell::{Addresses, Coordinator, Opened, Options, RunError};
use ella_proto::access::{Access, ClientTls, Token};
use ella_proto::config::RunConfig;
use ella_proto::v1::from_worker::Body as Say;
use ella_proto::v1::to_worker::Body as Told;
use ella_proto::v1::{self, FromWorker, Hello, ToWorker};
use ella_store::{Commit, Digest, Store, commit_folder};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Nothing in these tests takes this long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what} did not come within {PATIENCE:?}"))
}

pub const CONFIG: &str = r#"
    [run]
    output = "unused"
    [base]
    model = "m"
    [text]
    model = "t"
    [data]
    path = "d"
    [train]
    steps = 5
    [checkpoint]
    every = 2
    keep = 2
    [workers]
    count = 2
    lease = "10s"
    start_timeout = "10s"
"#;

pub fn config(set: &[&str]) -> RunConfig {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(CONFIG, "test", &set).unwrap()
}

pub fn options() -> Options {
    Options { linger: Duration::from_millis(50), drain_timeout: Duration::from_secs(10), ..Options::default() }
}

/// A coordinator that serves in this process.
pub struct Served {
    pub addresses: Addresses,
    pub stops: mpsc::Sender<String>,
    /// What [`Self::access`] shows.
    pub token: Option<Token>,
    pub tls: Option<ClientTls>,
    pub run: JoinHandle<Result<Outcome, RunError>>,
}

impl Served {
    pub async fn start(config: &RunConfig, store: &Store) -> Self {
        Self::start_with(config, store, options()).await
    }

    pub async fn start_with(config: &RunConfig, store: &Store, options: Options) -> Self {
        let opened = soon("an open run", Coordinator::open(config, store.clone(), &options)).await.unwrap();
        let Opened::Ready(coordinator) = opened else { panic!("the run is done: {opened:?}") };
        let (stops, receiver) = mpsc::channel(4);
        Self { addresses: coordinator.addresses(), stops, token: None, tls: None, run: tokio::spawn(coordinator.run(receiver)) }
    }

    pub fn url(&self) -> String {
        self.addresses.grpc.to_string()
    }

    /// As those reach it who are to be let in.
    pub fn access(&self) -> Access {
        Access { url: self.url(), token: self.token.clone(), tls: self.tls.clone() }
    }

    /// Ends it as a kill would: nothing more is written or said.
    pub async fn kill(self) {
        self.run.abort();
        let _ = self.run.await;
    }

    pub async fn outcome(self) -> Outcome {
        soon("an outcome", self.run).await.unwrap().unwrap()
    }

    /// Asks for the status until `wanted` holds.
    pub async fn status_when(&self, wanted: impl Fn(&v1::RunStatus) -> bool) -> v1::RunStatus {
        let asked = async {
            loop {
                let status = ella_coordinator::client::status(self.access()).await.unwrap();
                if wanted(&status) {
                    return status;
                }
                tokio::task::yield_now().await;
            }
        };
        soon("the wanted status", asked).await
    }
}

/// A connection of no client's: what is sent on it need not be what a worker would send.
pub async fn raw_channel(url: &str) -> Channel {
    let access = Access::from(url.to_owned());
    access.channel(&access.endpoint().unwrap()).await.unwrap()
}

pub fn hello(name: &str) -> Hello {
    Hello {
        worker_id: name.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: "here".into(),
        pid: 77,
        device_kind: "cpu".into(),
        device_uuid: String::new(),
        peer_address: "127.0.0.1:4000".into(),
        config_digest: String::new(),
        place: None,
        computes: Default::default(),
    }
}

/// What ranks report of a state: any two of one step have the same.
fn digest_of(step: u64) -> String {
    Digest::of(&step.to_le_bytes()).to_string()
}

fn ready(step: u64, state_digest: String) -> v1::Ready {
    v1::Ready {
        step,
        state_digest,
        data_digest: Digest::of(b"data").to_string(),
        models_digest: Digest::of(b"models").to_string(),
        samples_per_epoch: 64,
    }
}

/// The lines of a journal, all files in order.
pub async fn journal(store: &Store, folder: &str) -> Vec<serde_json::Value> {
    let mut lines = Vec::new();
    for meta in store.list(folder).await.unwrap() {
        let text = String::from_utf8(store.get(&meta.key).await.unwrap().to_vec()).unwrap();
        lines.extend(text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()));
    }
    lines
}

/// A worker's side of a stream.
pub struct Fake {
    pub hello: Hello,
    pub out: mpsc::Sender<FromWorker>,
    pub incoming: Streaming<ToWorker>,
    pub term: u64,
    pub generation: u64,
    pub rank: u32,
    pub world: u32,
    pub welcome: v1::Welcome,
}

impl Fake {
    pub async fn attach(access: impl Into<Access>, hello: Hello) -> Result<Self, v1::Refused> {
        soon("a coordinator", Self::try_attach(access, hello)).await.unwrap()
    }

    /// The same; an error if nobody answers.
    pub async fn try_attach(access: impl Into<Access>, hello: Hello) -> Result<Result<Self, v1::Refused>, String> {
        let access = access.into();
        let mut client = access.connect(&access.endpoint()?).await.map_err(|e| ella_proto::with_causes(&e))?;
        let (out, outgoing) = mpsc::channel(256);
        let first = FromWorker { term: 0, generation: 0, body: Some(Say::Hello(hello.clone())) };
        out.send(first).await.map_err(|e| e.to_string())?;
        let incoming = client.attach(ReceiverStream::new(outgoing)).await.map_err(|e| e.to_string())?.into_inner();
        let welcome = v1::Welcome::default();
        let hello = Hello { place: None, ..hello };
        let mut fake = Self { hello, out, incoming, term: 0, generation: 0, rank: 0, world: 0, welcome };
        match fake.next().await {
            Some(Told::Welcome(welcome)) => Ok(Ok(Self { welcome, ..fake })),
            Some(Told::Refused(refused)) => Ok(Err(refused)),
            other => Err(format!("{other:?}")),
        }
    }

    /// The next message; none at the stream's end.
    pub async fn next(&mut self) -> Option<Told> {
        let message = soon("a message", self.incoming.message()).await.unwrap_or(None)?;
        (self.term, self.generation) = (message.term, message.generation);
        message.body
    }

    pub async fn say(&self, body: Say) {
        self.say_of(self.generation, body).await;
    }

    pub async fn say_of(&self, generation: u64, body: Say) {
        let _ = self.out.send(FromWorker { term: self.term, generation, body: Some(body) }).await;
    }

    /// Its models are loaded; it takes its place and gets ready. Gives the commit that it resumes from.
    pub async fn get_ready(&mut self) -> Result<Option<Commit>, Ended> {
        self.say(Say::Idle(v1::Idle::default())).await;
        let assign = match self.next().await {
            Some(Told::Assign(assign)) => assign,
            Some(Told::Abort(abort)) => return Err(Ended::Aborted(abort.reason)),
            other => panic!("{other:?}"),
        };
        (self.rank, self.world) = (assign.rank, assign.world);
        assert_eq!(assign.session.len(), 16);
        let commit: Option<Commit> = serde_json::from_slice(&assign.commit_json).ok();
        assert_eq!((assign.source, assign.step), (None, commit.as_ref().map_or(0, |commit| commit.step)));
        self.say(Say::Ready(ready(assign.step, digest_of(assign.step)))).await;
        match self.next().await {
            Some(Told::Start(_)) => Ok(commit),
            Some(Told::Abort(abort)) => Err(Ended::Aborted(abort.reason)),
            other => panic!("{other:?}"),
        }
    }

    pub async fn progress(&self, step: u64) {
        let progress = v1::Progress {
            step,
            samples: 32,
            loss: 1.0 / step as f64,
            grad_norm: 1.0,
            learning_rate: 1e-4,
            step_seconds: 0.01,
            parts: Some(v1::StepParts { forward: 0.005, ..v1::StepParts::default() }),
            generation: self.generation,
            world: self.world,
            ..v1::Progress::default()
        };
        self.say(Say::Progress(progress)).await;
    }

    /// Reports the state and saves this rank's parts.
    pub async fn commit(&self, step: u64, store: &Store, script: Script) {
        let state = if script.differs_at == Some(step) { Digest::of(b"odd").to_string() } else { digest_of(step) };
        let ledger = vec![v1::LedgerEpoch { epoch: 0, samples: step * 32, hash: format!("{step:032x}") }];
        self.say(Say::State(v1::StateDigest { step, digest: state, ledger, epoch: 0, step_in_epoch: step })).await;
        for (index, name) in PARTS.iter().enumerate().filter(|(index, _)| *index as u32 % self.world == self.rank) {
            let bytes = Bytes::from(format!("{name} {step}"));
            store.put(&format!("{}/{name}", commit_folder(step, self.term, self.generation)), bytes.clone()).await.unwrap();
            if script.withholds_parts_of == Some(step) && index == 0 {
                continue;
            }
            let (len, blake3) = (bytes.len() as u64, Digest::of(&bytes).to_string());
            self.say(Say::Part(v1::PartSaved { step, name: (*name).to_owned(), bytes: len, blake3 })).await;
        }
    }

    /// Waits for a commit's record; gives how the run ended if it did.
    pub async fn until_committed(&mut self, step: u64) -> Option<Ended> {
        loop {
            match self.next().await {
                Some(Told::Committed(committed)) if committed.step == step => return None,
                Some(Told::Committed(_) | Told::Drain(_)) => {}
                Some(Told::Abort(abort)) => return Some(Ended::Aborted(abort.reason)),
                None => return Some(Ended::CutOff),
                other => panic!("{other:?}"),
            }
        }
    }

    pub async fn finish(mut self, step: u64, outcome: v1::Outcome) -> Ended {
        self.say(Say::Finished(v1::Finished { step, outcome: outcome.into() })).await;
        loop {
            match self.next().await {
                None => return Ended::Finished,
                Some(Told::Abort(abort)) => return Ended::Aborted(abort.reason),
                Some(_) => {}
            }
        }
    }

    /// Trains to the end as a worker does.
    pub async fn train(self, config: &RunConfig, store: &Store, script: Script) -> Ended {
        Life::new(self, config, store, script).live().await
    }
}
