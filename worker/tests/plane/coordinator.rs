//! A coordinator that follows a test's script: it says what it is told to say, and the test reads what the worker says.

use crate::world::RUNTIME;
use ella_proto::access::Access;
use ella_proto::config::{Device, RunConfig};
use ella_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use ella_proto::v1::from_worker::Body as Said;
use ella_proto::v1::to_worker::Body as Say;
use ella_proto::v1::{self, FromWorker, RunStatus, StatusRequest, StopReply, StopRequest, ToWorker};
use ella_store::Commit;
use ella_worker::control::Flags;
use ella_worker::session::{Options, WorkError, work};
use ella_worker::train::Ending;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};

/// Nothing here takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const TERM: u64 = 7;

pub(crate) async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{what} did not come within {PATIENCE:?}"))
}

type Opened = (Streaming<FromWorker>, mpsc::UnboundedSender<Result<ToWorker, Status>>);

struct Service {
    streams: mpsc::UnboundedSender<Opened>,
    answers: Arc<AtomicBool>,
    asks: Arc<AtomicBool>,
}

#[tonic::async_trait]
impl Coordinator for Service {
    type AttachStream = BoxStream<'static, Result<ToWorker, Status>>;

    async fn attach(&self, request: Request<Streaming<FromWorker>>) -> Result<Response<Self::AttachStream>, Status> {
        if self.asks.load(Ordering::Relaxed) {
            return Err(Status::unauthenticated("show the token"));
        }
        let (say, said) = mpsc::unbounded_channel();
        self.streams.send((request.into_inner(), say)).unwrap();
        Ok(Response::new(UnboundedReceiverStream::new(said).boxed()))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<RunStatus>, Status> {
        if !self.answers.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(RunStatus::default()))
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        Ok(Response::new(v1::DrainReply {}))
    }

    async fn stop(&self, _: Request<StopRequest>) -> Result<Response<StopReply>, Status> {
        Ok(Response::new(StopReply {}))
    }
}

/// The coordinator.
pub(crate) struct Scripted {
    url: String,
    streams: mpsc::UnboundedReceiver<Opened>,
    /// Whether it answers questions about its status, as a live one does.
    pub(crate) answers: Arc<AtomicBool>,
    /// Whether it asks for a token that nobody has.
    pub(crate) asks: Arc<AtomicBool>,
}

impl Scripted {
    pub(crate) async fn start() -> Self {
        Self::at(([127, 0, 0, 1], 0).into()).await
    }

    /// One that listens there.
    pub(crate) async fn at(address: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (send, streams) = mpsc::unbounded_channel();
        let (answers, asks) = (Arc::new(AtomicBool::new(true)), Arc::<AtomicBool>::default());
        let service = CoordinatorServer::new(Service { streams: send, answers: answers.clone(), asks: asks.clone() });
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        Self { url, streams, answers, asks }
    }

    /// Starts a worker as a process of its own and takes its Hello.
    pub(crate) async fn process(&mut self) -> (Worker, tokio::process::Child) {
        self.process_with(&[]).await
    }

    /// The same, with these further arguments.
    pub(crate) async fn process_with(&mut self, further: &[&str]) -> (Worker, tokio::process::Child) {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_ella-worker"));
        command.args(["--coordinator", &self.url, "--device", "cpu"]).args(further).stderr(std::process::Stdio::piped()).kill_on_drop(true);
        let child = command.spawn().unwrap();
        let (_, never) = oneshot::channel();
        (self.taken(never, Arc::default()).await, child)
    }

    /// Starts a worker as a thread and takes its Hello.
    pub(crate) async fn worker(&mut self) -> Worker {
        let listen = ([127, 0, 0, 1], 0).into();
        let (coordinator, patience) = (Access::from(&self.url), Duration::ZERO);
        let options = Options { coordinator, listen, advertise: None, device: Device::Cpu, slots: 1, patience };
        let flags = Arc::new(Flags::default());
        let (done, ending) = oneshot::channel();
        let its = flags.clone();
        std::thread::spawn(move || drop(done.send(work(&options, its, RUNTIME.handle()))));
        self.taken(ending, flags).await
    }

    /// Takes the next stream, of a worker that has lost its last one.
    pub(crate) async fn again(&mut self, worker: Worker) -> Worker {
        self.taken(worker.ending, worker.flags).await
    }

    pub(crate) async fn taken(&mut self, ending: oneshot::Receiver<Result<Ending, WorkError>>, flags: Arc<Flags>) -> Worker {
        let (heard, say) = soon("a worker", self.streams.recv()).await.unwrap();
        let mut worker = Worker {
            heard,
            say: Some(say),
            ending,
            flags,
            term: TERM,
            generation: 0,
            address: String::new(),
            idles: Vec::new(),
            place: None,
            pid: 0,
        };
        let Said::Hello(hello) = worker.next().await else { panic!("the first message is no Hello") };
        assert_eq!((hello.device_kind.as_str(), hello.version.as_str()), ("cpu", env!("CARGO_PKG_VERSION")));
        (worker.address, worker.place, worker.pid) = (hello.peer_address, hello.place, hello.pid);
        worker
    }

    /// A worker that is alone in its run, resumes from `commit`, and has begun to train.
    pub(crate) async fn training(&mut self, config: &RunConfig, run: &str, commit: Option<&Commit>) -> (Worker, v1::Ready) {
        let mut worker = self.worker().await;
        worker.say(welcome(config, run));
        let peers = vec![worker.address.clone()];
        worker.assign(0, peers, commit);
        let ready = worker.ready().await;
        worker.say(Say::Start(v1::Start {}));
        (worker, ready)
    }
}

pub(crate) fn welcome(config: &RunConfig, run: &str) -> Say {
    Say::Welcome(v1::Welcome {
        run_url: run.to_owned(),
        config_toml: config.to_toml(),
        config_digest: config.digest(),
        heartbeat_ms: 50,
        lease_ms: config.workers.lease.0,
        orphan_ms: config.workers.orphan_timeout.0,
        step_timeout_ms: config.workers.step_timeout.0,
        ..v1::Welcome::default()
    })
}

/// The coordinator's end of a worker's stream, and the worker's thread.
pub(crate) struct Worker {
    heard: Streaming<FromWorker>,
    say: Option<mpsc::UnboundedSender<Result<ToWorker, Status>>>,
    ending: oneshot::Receiver<Result<Ending, WorkError>>,
    pub(crate) flags: Arc<Flags>,
    /// The term and generation that are spoken of.
    pub(crate) term: u64,
    pub(crate) generation: u64,
    pub(crate) address: String,
    /// When it said that it waits for a place.
    idles: Vec<v1::Idle>,
    /// Of its Hello: where it was when it lost another coordinator.
    pub(crate) place: Option<v1::Place>,
    pub(crate) pid: u32,
}

impl Worker {
    pub(crate) fn say(&self, body: Say) {
        self.say_as(self.term, self.generation, body);
    }

    pub(crate) fn say_as(&self, term: u64, generation: u64, body: Say) {
        // The worker may have left.
        let _ = self.say.as_ref().unwrap().send(Ok(ToWorker { term, generation, body: Some(body) }));
    }

    /// Ends the stream.
    pub(crate) fn hang_up(&mut self) {
        self.say = None;
    }

    pub(crate) fn assign(&mut self, rank: u32, peers: Vec<String>, commit: Option<&Commit>) {
        self.generation = 1;
        let commit_json = commit.map(|commit| serde_json::to_vec(commit).unwrap()).unwrap_or_default();
        let (world, next) = (peers.len() as u32, peers[(rank as usize + 1) % peers.len()].clone());
        self.say(Say::Assign(v1::Assign { rank, world, next, commit_json, session: vec![9; 16], ..v1::Assign::default() }));
    }

    /// Waits until it says that it waits for a place.
    pub(crate) async fn idle(&mut self) -> v1::Idle {
        let until = tokio::time::Instant::now() + PATIENCE;
        while self.idles.is_empty() {
            assert!(tokio::time::Instant::now() < until, "not idle within {PATIENCE:?}");
            let message = soon("a message", self.heard.message()).await.unwrap().expect("the stream goes on");
            if let Some(Said::Idle(idle)) = message.body {
                self.idles.push(idle);
            }
        }
        self.idles.remove(0)
    }

    /// The next message that is no heartbeat.
    pub(crate) async fn next(&mut self) -> Said {
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            assert!(tokio::time::Instant::now() < until, "nothing but heartbeats within {PATIENCE:?}");
            let message = soon("a message", self.heard.message()).await.unwrap().expect("the stream goes on");
            match message.body.unwrap() {
                Said::Heartbeat(_) => {}
                Said::Idle(idle) => self.idles.push(idle),
                // Told again to a coordinator that may have missed it.
                Said::Progress(progress) if progress.missed => {}
                body @ (Said::Hello(_) | Said::Leaving(_)) => return body,
                body => {
                    assert_eq!((message.term, message.generation), (self.term, self.generation), "{body:?}");
                    return body;
                }
            }
        }
    }

    /// Gives it a place in the next generation, alone or among peers, with the state of rank 0 after so many steps, which is copied or not; and
    /// has it begin.
    pub(crate) async fn assign_from(&mut self, rank: u32, peers: Vec<String>, (step, copy): (u64, bool)) {
        self.next_place(rank, peers, (step, copy));
        let ready = self.ready().await;
        assert_eq!((ready.step, ready.state_digest.as_str()), (step, ""));
        self.say(Say::Start(v1::Start {}));
    }

    pub(crate) fn next_place(&mut self, rank: u32, peers: Vec<String>, (step, copy): (u64, bool)) {
        self.generation += 1;
        let session = vec![self.generation as u8; 16];
        let (world, next) = (peers.len() as u32, peers[(rank as usize + 1) % peers.len()].clone());
        self.say(Say::Assign(v1::Assign { rank, world, next, session, source: Some(0), step, copy, ..v1::Assign::default() }));
    }

    /// Reads until it says that it was told to leave.
    pub(crate) async fn leaving(&mut self) {
        while !matches!(self.next().await, Said::Leaving(_)) {}
    }

    pub(crate) async fn ready(&mut self) -> v1::Ready {
        match self.next().await {
            Said::Ready(ready) => ready,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn failed(&mut self) -> v1::Failed {
        loop {
            match self.next().await {
                Said::Failed(failed) => return failed,
                Said::Progress(_) | Said::State(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads until the worker has applied this step.
    pub(crate) async fn progress(&mut self, step: u64) -> v1::Progress {
        loop {
            match self.next().await {
                Said::Progress(progress) if progress.step >= step => return progress,
                Said::Failed(failed) => panic!("{failed:?}"),
                _ => {}
            }
        }
    }

    /// Tells it that the record of its last commit stands, and, as a coordinator does once all have finished, ends its stream.
    pub(crate) async fn committed(mut self, step: u64) -> Result<Ending, WorkError> {
        self.say(Say::Committed(v1::Committed { step }));
        self.hang_up();
        self.ended().await
    }

    /// Waits for a sign of life.
    pub(crate) async fn beat(&mut self) -> v1::Heartbeat {
        let message = soon("a message", self.heard.message()).await.unwrap().expect("the stream goes on");
        let Some(Said::Heartbeat(beat)) = message.body else { panic!("{message:?}") };
        beat
    }

    /// How its thread ended.
    pub(crate) async fn ended(self) -> Result<Ending, WorkError> {
        soon("the worker's end", self.ending).await.unwrap()
    }
}
