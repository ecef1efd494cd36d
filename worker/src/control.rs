//! The worker's side of the control plane: one stream to the coordinator, served by its own tasks. The step path only looks at
//! flags and an inbox; it never waits for the coordinator (LIVE).

use ella_proto::v1::coordinator_client::CoordinatorClient;
use ella_proto::v1::{FromWorker, Heartbeat, Hello, Progress, Refused, ToWorker, Welcome, from_worker, to_worker};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

/// Messages that may wait for a coordinator that does not read. Progress is dropped, and counted, when less than half is free.
const BACKLOG: usize = 4096;
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the control plane is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No connection.
    #[error("{url}: no coordinator answers ({message}); check the address and that ella-coordinator runs")]
    Unreachable {
        /// Where.
        url: String,
        /// The transport's words.
        message: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// The stream ended.
    #[error("the coordinator is gone: {0}")]
    Lost(String),
    /// The coordinator ended the run.
    #[error("the coordinator ended the run: {0}")]
    Aborted(String),
    /// An expected message did not come.
    #[error("no {what} from the coordinator within {seconds} s")]
    Late {
        /// Which message.
        what: &'static str,
        /// The deadline.
        seconds: u64,
    },
}

/// What the coordinator says, in order.
pub type Message = to_worker::Body;

/// Flags that both planes share.
#[derive(Debug, Default)]
pub struct Flags {
    /// Commit at the next step boundary and leave.
    pub drain: AtomicBool,
    /// The last applied step, for heartbeats.
    pub step: AtomicU64,
    /// Progress messages that were dropped because nobody read them.
    pub dropped_progress: AtomicU64,
    term: AtomicU64,
    generation: AtomicU64,
    stop: Mutex<Stop>,
}

/// What is called when the run ends from outside.
type OnStop = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Stop {
    reason: Option<String>,
    call: Option<OnStop>,
}

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stop").field("reason", &self.reason).finish_non_exhaustive()
    }
}

impl Flags {
    /// Calls `call` when the run is ended from outside: it frees a rank that waits in a collective. At once, if it has been ended.
    pub fn on_stop(&self, call: OnStop) {
        let mut stop = lock(&self.stop);
        if stop.reason.is_some() {
            call();
        }
        stop.call = Some(call);
    }

    /// The coordinator's term.
    pub fn term(&self) -> u64 {
        self.term.load(Ordering::Relaxed)
    }

    /// The generation that this worker is in.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Why the run was ended from outside, if it was.
    pub fn stopped(&self) -> Option<String> {
        lock(&self.stop).reason.clone()
    }

    fn stop(&self, reason: String) {
        let mut stop = lock(&self.stop);
        stop.reason.get_or_insert(reason);
        if let Some(call) = &stop.call {
            call();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An attached worker's control plane.
#[derive(Debug)]
pub struct Control {
    out: tokio::sync::mpsc::Sender<FromWorker>,
    inbox: Mutex<Receiver<Message>>,
    /// Flags that both planes share.
    pub flags: Arc<Flags>,
}

/// Sends to the coordinator from any thread.
#[derive(Clone, Debug)]
pub struct Outbox {
    out: tokio::sync::mpsc::Sender<FromWorker>,
    flags: Arc<Flags>,
}

impl Outbox {
    /// Sends a message that must arrive. Waits if the coordinator does not read and the backlog is full.
    pub fn send(&self, body: from_worker::Body) {
        // An error means that the stream has ended, which the inbox reports.
        let _ = self.out.blocking_send(self.stamp(body));
    }

    /// Sends progress, unless nobody reads it.
    pub fn progress(&self, progress: Progress) {
        let sent = self.out.capacity() > BACKLOG / 2 && self.out.try_send(self.stamp(from_worker::Body::Progress(progress))).is_ok();
        if !sent {
            self.flags.dropped_progress.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn stamp(&self, body: from_worker::Body) -> FromWorker {
        let term = self.flags.term.load(Ordering::Relaxed);
        FromWorker { term, generation: self.flags.generation.load(Ordering::Relaxed), body: Some(body) }
    }
}

impl Control {
    /// Connects, says hello, and waits for the welcome.
    pub async fn attach(url: &str, hello: Hello) -> Result<(Self, Welcome), ControlError> {
        let unreachable = |message: String| ControlError::Unreachable { url: url.to_owned(), message };
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|e| unreachable(e.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            // A coordinator that is stopped or cut off may come back within the workers' patience (LIVE).
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(60))
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(|e| unreachable(describe(&e)))?;
        let flags = Arc::new(Flags::default());
        let (out, outgoing) = tokio::sync::mpsc::channel(BACKLOG);
        let outbox = Outbox { out: out.clone(), flags: flags.clone() };
        let _ = out.try_send(outbox.stamp(from_worker::Body::Hello(hello)));
        let mut client = CoordinatorClient::new(channel);
        let mut incoming = deadline("answer", CONNECT_TIMEOUT, client.attach(ReceiverStream::new(outgoing))).await?.map_err(|e| unreachable(e.message().to_owned()))?.into_inner();
        let first = deadline("welcome", CONNECT_TIMEOUT, incoming.message()).await?.map_err(|e| ControlError::Lost(e.message().to_owned()))?;
        let welcome = match first.and_then(|m: ToWorker| Some((m.term, m.body?))) {
            Some((term, Message::Welcome(welcome))) => {
                flags.term.store(term, Ordering::Relaxed);
                welcome
            }
            Some((_, Message::Refused(refused))) => return Err(ControlError::Refused(refusal(&refused))),
            _ => return Err(ControlError::Lost("its first message was no welcome".to_owned())),
        };
        let (inbound, inbox) = channel_pair();
        tokio::spawn(listen(incoming, inbound, flags.clone()));
        tokio::spawn(beat(outbox, Duration::from_millis(welcome.heartbeat_ms.max(1))));
        Ok((Self { out, inbox: Mutex::new(inbox), flags }, welcome))
    }

    /// A sender for other threads.
    pub fn outbox(&self) -> Outbox {
        Outbox { out: self.out.clone(), flags: self.flags.clone() }
    }

    /// Waits for the next message, but not for ever.
    pub fn next(&self, what: &'static str, patience: Duration) -> Result<Message, ControlError> {
        let got = lock(&self.inbox).recv_timeout(patience);
        match (got, self.flags.stopped()) {
            (Ok(message), _) => Ok(message),
            (Err(_), Some(reason)) => Err(ControlError::Lost(reason)),
            (Err(RecvTimeoutError::Timeout), None) => Err(ControlError::Late { what, seconds: patience.as_secs() }),
            (Err(RecvTimeoutError::Disconnected), None) => Err(ControlError::Lost("its stream ended".to_owned())),
        }
    }
}

fn channel_pair() -> (Sender<Message>, Receiver<Message>) {
    channel()
}

async fn deadline<T>(what: &'static str, patience: Duration, wait: impl Future<Output = T>) -> Result<T, ControlError> {
    tokio::time::timeout(patience, wait).await.map_err(|_| ControlError::Late { what, seconds: patience.as_secs() })
}

/// Takes in what the coordinator says until the stream ends.
async fn listen(mut incoming: tonic::Streaming<ToWorker>, inbound: Sender<Message>, flags: Arc<Flags>) {
    let ended = loop {
        match incoming.next().await {
            None => break "its stream ended".to_owned(),
            Some(Err(status)) => break status.message().to_owned(),
            Some(Ok(message)) if message.term < flags.term.load(Ordering::Relaxed) => {
                tracing::warn!(term = message.term, "refused a message of an older term");
            }
            Some(Ok(ToWorker { generation, body: Some(body), .. })) => {
                flags.generation.store(generation, Ordering::Relaxed);
                match body {
                    Message::Drain(drain) => {
                        tracing::info!(reason = drain.reason, "asked to commit and leave");
                        flags.drain.store(true, Ordering::Relaxed);
                    }
                    Message::Abort(abort) => break abort.reason,
                    body => drop(inbound.send(body)),
                }
            }
            Some(Ok(_)) => tracing::warn!("an empty message from the coordinator"),
        }
    };
    flags.stop(ended);
}

async fn beat(outbox: Outbox, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    while !outbox.out.is_closed() {
        ticks.tick().await;
        let step = outbox.flags.step.load(Ordering::Relaxed);
        let _ = outbox.out.try_send(outbox.stamp(from_worker::Body::Heartbeat(Heartbeat { step })));
    }
}

fn refusal(refused: &Refused) -> String {
    if refused.detail.is_empty() { refused.reason().as_str_name().to_owned() } else { refused.detail.clone() }
}

/// An error with its causes, which tonic keeps to itself.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
