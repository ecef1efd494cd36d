//! The worker's side of the control plane: one stream to the coordinator, served by its own tasks. The step path only looks at
//! flags and an inbox; it never waits for the coordinator (LIVE).

use crate::train::Ending;
use ella_proto::v1::coordinator_client::CoordinatorClient;
use ella_proto::v1::{
    FromWorker, Heartbeat, Hello, Outcome, Progress, Refused, RefusedReason, StatusRequest, ToWorker, Welcome, from_worker, to_worker,
};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Channel, Endpoint};

/// Messages that may wait for a coordinator that does not read. What may be lost (progress, heartbeats) takes at most half of it; the
/// other half is for commits, of which each has four messages at most.
const BACKLOG: usize = 4096;
/// Questions in a row that a coordinator may leave unanswered. More than one, so that a stop of this process counts as one at most.
const PROBES: u32 = 4;
/// How often a wait for another thread looks whether the run has ended.
const LOOK: Duration = Duration::from_millis(100);
/// The first and the longest pause between two tries to reach a coordinator.
pub(crate) const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the control plane is of no use any more.
#[derive(Clone, Debug, thiserror::Error)]
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
    #[error("the coordinator refused this worker: {detail}")]
    Refused {
        /// In short.
        reason: RefusedReason,
        /// In words.
        detail: String,
    },
    /// The run or job had ended before this worker came.
    #[error("{detail}")]
    Over {
        /// How.
        outcome: Outcome,
        /// In words.
        detail: String,
    },
    /// The stream ended before the coordinator had taken this worker in.
    #[error("the coordinator is gone ({0}) before it took this worker in; start the worker again")]
    Unwelcomed(String),
    /// The stream ended.
    #[error("the coordinator is gone ({0}); start the run again to resume from its last commit")]
    Lost(String),
    /// The stream stands, but nobody answers.
    #[error(
        "the coordinator has answered nothing for {seconds} s (workers.orphan_timeout); start the run again to resume from its last commit"
    )]
    Silent {
        /// For how long.
        seconds: u64,
    },
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

impl ControlError {
    /// Whether starting again would fail in the same way.
    pub fn is_permanent(&self) -> bool {
        use RefusedReason as R;
        let Self::Refused { reason, .. } = self else { return false };
        matches!(reason, R::Version | R::Config | R::DeviceKind | R::Malformed)
    }

    /// For a worker that came too late to be of use: how that ends it.
    pub(crate) fn ending(self) -> Result<Ending, Self> {
        match self {
            Self::Over { outcome: Outcome::Done, detail } => {
                tracing::info!("nothing is left to do: {detail}");
                Ok(Ending::Done)
            }
            Self::Over { outcome: Outcome::Preempted, .. } => Ok(Ending::Preempted),
            error => Err(error),
        }
    }
}

/// What the coordinator says, in order.
pub type Message = to_worker::Body;

/// Flags that both planes share.
#[derive(Debug, Default)]
pub struct Flags {
    /// Leave: commit at the next step boundary, or give back the units in hand.
    pub drain: CancellationToken,
    /// Steps or units are being done: from here on there is something to commit or to give back.
    pub working: AtomicBool,
    /// The last applied step, for heartbeats.
    pub step: AtomicU64,
    /// The step of the newest commit whose record stands.
    pub committed: AtomicU64,
    /// Messages of progress that were dropped because nobody read them.
    pub dropped_progress: AtomicU64,
    term: AtomicU64,
    generation: AtomicU64,
    /// Captions encoded so far, while the next step waits for more of them.
    encoding: Mutex<Option<u64>>,
    stop: Mutex<Stop>,
}

/// What is called when the run ends from outside.
type OnStop = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Stop {
    why: Option<ControlError>,
    call: Option<OnStop>,
}

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stop").field("why", &self.why).finish_non_exhaustive()
    }
}

impl Flags {
    /// Calls `call` when the run is ended from outside: it frees a rank that waits in a collective. At once, if it has been ended.
    pub fn on_stop(&self, call: OnStop) {
        let mut stop = lock(&self.stop);
        if stop.why.is_some() {
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

    /// For heartbeats: how many captions are encoded, while the next step waits for more of them.
    pub(crate) fn encoding(&self, captions: Option<u64>) {
        *lock(&self.encoding) = captions;
    }

    /// Why the run was ended from outside, if it was.
    pub fn stopped(&self) -> Option<ControlError> {
        lock(&self.stop).why.clone()
    }

    /// Waits for what another thread of this worker sends, but not for ever, and not beyond the end of the run.
    pub fn receive<T>(&self, from: &Receiver<T>, patience: Duration) -> Result<T, RecvTimeoutError> {
        let begin = Instant::now();
        loop {
            let left = patience.saturating_sub(begin.elapsed());
            match from.recv_timeout(left.min(LOOK)) {
                Err(RecvTimeoutError::Timeout) if left > LOOK && self.stopped().is_none() => {}
                other => return other,
            }
        }
    }

    /// Ends the run. Only the first reason counts.
    pub(crate) fn stop(&self, why: ControlError) {
        let mut stop = lock(&self.stop);
        stop.why.get_or_insert(why);
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
    /// What serves the stream; it ends with this.
    _tasks: JoinSet<()>,
}

/// Sends to the coordinator from any thread.
#[derive(Clone, Debug)]
pub struct Outbox {
    out: tokio::sync::mpsc::Sender<FromWorker>,
    flags: Arc<Flags>,
}

impl Outbox {
    /// Sends a message that must arrive. Never waits: a coordinator that leaves so many unread is given up (LIVE).
    pub fn send(&self, body: from_worker::Body) {
        // A closed queue means that the stream has ended, which the flags say.
        if let Err(TrySendError::Full(_)) = self.out.try_send(self.stamp(body)) {
            self.flags.stop(ControlError::Lost(format!("it reads nothing, and {BACKLOG} messages wait for it")));
        }
    }

    /// The flags of this worker.
    pub fn flags(&self) -> &Arc<Flags> {
        &self.flags
    }

    /// Sends progress, unless nobody reads it.
    pub fn progress(&self, progress: Progress) {
        if !self.offer(from_worker::Body::Progress(progress)) && self.flags.dropped_progress.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!("the coordinator reads nothing: progress is dropped until it does");
        }
    }

    /// Sends what may be lost, while much room is left.
    fn offer(&self, body: from_worker::Body) -> bool {
        self.out.capacity() > BACKLOG / 2 && self.out.try_send(self.stamp(body)).is_ok()
    }

    fn stamp(&self, body: from_worker::Body) -> FromWorker {
        let term = self.flags.term.load(Ordering::Relaxed);
        FromWorker { term, generation: self.flags.generation.load(Ordering::Relaxed), body: Some(body) }
    }
}

/// A stream to a coordinator that has welcomed this worker.
pub(crate) struct Link {
    /// None if the coordinator is in this process.
    client: Option<CoordinatorClient<Channel>>,
    pub(crate) out: tokio::sync::mpsc::Sender<FromWorker>,
    pub(crate) incoming: BoxStream<'static, Result<ToWorker, tonic::Status>>,
    /// The coordinator's.
    pub(crate) term: u64,
    pub(crate) welcome: Welcome,
}

impl Link {
    /// The same, again and again for `patience` while nobody answers: a worker may be there before its coordinator.
    pub(crate) async fn open_patiently(url: &str, hello: &Hello, patience: Duration) -> Result<Self, ControlError> {
        // What is no URL never will be one.
        endpoint(url)?;
        let (until, mut pause) = (Instant::now() + patience, PAUSES.0);
        loop {
            let error = match Self::open(url, hello.clone()).await {
                Err(error @ (ControlError::Unreachable { .. } | ControlError::Late { .. } | ControlError::Unwelcomed(_))) => error,
                other => return other,
            };
            if Instant::now() + pause >= until {
                return Err(error);
            }
            if pause == PAUSES.0 {
                tracing::warn!("{error}; trying again for {} s", patience.as_secs());
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(PAUSES.1);
        }
    }

    /// Connects, says hello, and waits for the welcome.
    pub(crate) async fn open(url: &str, hello: Hello) -> Result<Self, ControlError> {
        let mut client = connect(url).await?;
        let (out, outgoing) = tokio::sync::mpsc::channel(BACKLOG);
        // The stream opens with its first message.
        let first = FromWorker { term: 0, generation: 0, body: Some(from_worker::Body::Hello(hello)) };
        let outgoing = tokio_stream::once(first).chain(ReceiverStream::new(outgoing));
        let answer = deadline("answer", CONNECT_TIMEOUT, client.attach(outgoing)).await?;
        let incoming = answer.map_err(|e| unreachable(url, e.message()))?.into_inner().boxed();
        Self::welcomed(Some(client), out, incoming).await
    }

    /// The same for a coordinator in this process.
    pub(crate) async fn within(
        out: tokio::sync::mpsc::Sender<FromWorker>,
        incoming: tokio::sync::mpsc::Receiver<ToWorker>,
        hello: Hello,
    ) -> Result<Self, ControlError> {
        // A closed queue shows as the end of what comes in.
        let _ = out.send(FromWorker { term: 0, generation: 0, body: Some(from_worker::Body::Hello(hello)) }).await;
        Self::welcomed(None, out, ReceiverStream::new(incoming).map(Ok).boxed()).await
    }

    /// Takes the first message for what it must be.
    async fn welcomed(
        client: Option<CoordinatorClient<Channel>>,
        out: tokio::sync::mpsc::Sender<FromWorker>,
        mut incoming: BoxStream<'static, Result<ToWorker, tonic::Status>>,
    ) -> Result<Self, ControlError> {
        let first = deadline("welcome", CONNECT_TIMEOUT, incoming.next()).await?.transpose();
        let first = first.map_err(|e| ControlError::Unwelcomed(e.message().to_owned()))?;
        match first.and_then(|m| Some((m.term, m.body?))) {
            Some((term, Message::Welcome(welcome))) => Ok(Self { client, out, incoming, term, welcome }),
            Some((_, Message::Refused(refused))) => Err(refusal(refused)),
            _ => Err(ControlError::Unwelcomed("its first message was no welcome".to_owned())),
        }
    }

    /// Returns when the coordinator has answered nothing for `orphan_ms`; never, if it is in this process.
    pub(crate) fn orphaned(&self) -> impl Future<Output = ControlError> + Send + 'static {
        let (client, patience) = (self.client.clone(), Duration::from_millis(self.welcome.orphan_ms));
        async move {
            match client {
                Some(client) => orphaned(client, patience).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Sends signs of life until it is dropped.
    pub(crate) fn beating(&self) -> AbortOnDropHandle<()> {
        let flags = Flags { term: self.term.into(), ..Flags::default() };
        let outbox = Outbox { out: self.out.clone(), flags: Arc::new(flags) };
        AbortOnDropHandle::new(tokio::spawn(beat(outbox, Duration::from_millis(self.welcome.heartbeat_ms.max(1)))))
    }
}

/// Who this process is, but for what it computes on. The id is new in every call.
pub(crate) fn identity() -> std::io::Result<Hello> {
    let mut id = [0u8; 16];
    std::fs::File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, &mut id))?;
    Ok(Hello {
        worker_id: id.iter().map(|b| format!("{b:02x}")).collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
        pid: std::process::id(),
        ..Hello::default()
    })
}

impl Control {
    /// Serves a link. `flags` are those that the caller raises and looks at. Call it within the runtime.
    pub(crate) fn over(link: Link, flags: Arc<Flags>) -> (Self, Welcome) {
        flags.term.store(link.term, Ordering::Relaxed);
        let orphaned = link.orphaned();
        let Link { out, incoming, welcome, .. } = link;
        let (inbound, inbox) = std::sync::mpsc::channel();
        let outbox = Outbox { out: out.clone(), flags: flags.clone() };
        let mut tasks = JoinSet::new();
        tasks.spawn(listen(incoming, orphaned, inbound, flags.clone()));
        tasks.spawn(beat(outbox, Duration::from_millis(welcome.heartbeat_ms.max(1))));
        (Self { out, inbox: Mutex::new(inbox), flags, _tasks: tasks }, welcome)
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
            (Err(_), Some(why)) => Err(why),
            (Err(RecvTimeoutError::Timeout), None) => Err(ControlError::Late { what, seconds: patience.as_secs() }),
            (Err(RecvTimeoutError::Disconnected), None) => Err(ControlError::Lost("its stream ended".to_owned())),
        }
    }
}

fn endpoint(url: &str) -> Result<Endpoint, ControlError> {
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|e| unreachable(url, &ella_proto::with_causes(&e)))?;
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true))
}

async fn connect(url: &str) -> Result<CoordinatorClient<Channel>, ControlError> {
    let channel = deadline("connection", CONNECT_TIMEOUT, endpoint(url)?.connect()).await?;
    Ok(CoordinatorClient::new(channel.map_err(|e| unreachable(url, &ella_proto::with_causes(&e)))?))
}

fn unreachable(url: &str, message: &str) -> ControlError {
    ControlError::Unreachable { url: url.to_owned(), message: message.to_owned() }
}

async fn deadline<T>(what: &'static str, patience: Duration, wait: impl Future<Output = T>) -> Result<T, ControlError> {
    timeout(patience, wait).await.map_err(|_| ControlError::Late { what, seconds: patience.as_secs() })
}

/// Takes in what the coordinator says, until the stream ends or nobody is there any more.
async fn listen(
    mut incoming: BoxStream<'static, Result<ToWorker, tonic::Status>>,
    orphaned: impl Future<Output = ControlError>,
    inbound: Sender<Message>,
    flags: Arc<Flags>,
) {
    tokio::pin!(orphaned);
    let why = loop {
        let next = tokio::select! {
            biased;
            next = incoming.next() => next,
            why = &mut orphaned => break why,
        };
        match next {
            None => break ControlError::Lost("its stream ended".to_owned()),
            Some(Err(status)) => break ControlError::Lost(status.message().to_owned()),
            Some(Ok(message)) if message.term < flags.term() || message.generation < flags.generation() => {
                tracing::warn!(message.term, message.generation, "refused a message of an older term or generation");
            }
            Some(Ok(ToWorker { generation, body: Some(body), .. })) => {
                flags.generation.store(generation, Ordering::Relaxed);
                match body {
                    Message::Drain(drain) => {
                        tracing::info!(reason = drain.reason, "asked to commit and leave");
                        flags.drain.cancel();
                    }
                    Message::Abort(abort) => break ControlError::Aborted(abort.reason),
                    body => {
                        if let Message::Committed(commit) = &body {
                            flags.committed.fetch_max(commit.step, Ordering::Relaxed);
                        }
                        drop(inbound.send(body));
                    }
                }
            }
            Some(Ok(_)) => tracing::warn!("an empty message from the coordinator"),
        }
    };
    flags.stop(why);
}

/// Asks again and again whether the coordinator still answers, and returns when it has not for `patience`. Whatever it answers, it is
/// there; that it is not will be seen on the stream too, unless it is stopped or cut off.
async fn orphaned(mut client: CoordinatorClient<Channel>, patience: Duration) -> ControlError {
    let each = patience / PROBES;
    let mut unanswered = 0;
    while unanswered < PROBES {
        match timeout(each, client.status(StatusRequest {})).await {
            Ok(_) => {
                unanswered = 0;
                tokio::time::sleep(each).await;
            }
            Err(_) => unanswered += 1,
        }
    }
    ControlError::Silent { seconds: patience.as_secs() }
}

async fn beat(outbox: Outbox, every: Duration) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !outbox.out.is_closed() {
        ticks.tick().await;
        let (step, encoding) = (outbox.flags.step.load(Ordering::Relaxed), *lock(&outbox.flags.encoding));
        outbox.offer(from_worker::Body::Heartbeat(Heartbeat { step, encoding }));
    }
}

fn refusal(refused: Refused) -> ControlError {
    let (reason, outcome) = (refused.reason(), refused.outcome());
    let detail = if refused.detail.is_empty() { reason.as_str_name().to_owned() } else { refused.detail };
    match reason {
        RefusedReason::RunOver => ControlError::Over { outcome, detail },
        reason => ControlError::Refused { reason, detail },
    }
}

#[cfg(test)]
pub(crate) fn unread() -> (Outbox, tokio::sync::mpsc::Receiver<FromWorker>) {
    let (out, queue) = tokio::sync::mpsc::channel(BACKLOG);
    (Outbox { out, flags: Arc::default() }, queue)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LIVE: nothing waits for a coordinator that does not read. Progress is dropped and counted; what must arrive has room, and the run
    /// ends when that is used up.
    #[test]
    fn nothing_waits_for_a_coordinator_that_does_not_read() {
        let (outbox, queue) = unread();
        for step in 0..BACKLOG as u64 {
            outbox.progress(Progress { step, ..Progress::default() });
        }
        assert_eq!((queue.len(), outbox.flags.dropped_progress.load(Ordering::Relaxed)), (BACKLOG / 2, BACKLOG as u64 / 2));
        let called = Arc::new(AtomicBool::new(false));
        let flag = called.clone();
        outbox.flags.on_stop(Box::new(move || flag.store(true, Ordering::Relaxed)));
        for _ in 0..BACKLOG / 2 {
            outbox.send(from_worker::Body::Finished(Default::default()));
        }
        assert!(outbox.flags.stopped().is_none() && queue.len() == BACKLOG);
        outbox.send(from_worker::Body::Finished(Default::default()));
        assert!(matches!(outbox.flags.stopped(), Some(ControlError::Lost(why)) if why.contains("4096")));
        assert!(called.load(Ordering::Relaxed), "a rank that waits for others is freed");
    }

    #[test]
    fn only_the_first_reason_counts_and_latecomers_are_told_at_once() {
        let flags = Flags::default();
        flags.stop(ControlError::Aborted("first".into()));
        flags.stop(ControlError::Lost("second".into()));
        assert!(matches!(flags.stopped(), Some(ControlError::Aborted(why)) if why == "first"));
        let called = Arc::new(AtomicBool::new(false));
        let flag = called.clone();
        flags.on_stop(Box::new(move || flag.store(true, Ordering::Relaxed)));
        assert!(called.load(Ordering::Relaxed));
    }

    #[test]
    fn waits_for_other_threads_end_with_their_deadline_or_with_the_run() {
        let flags = Flags::default();
        let (send, receive) = std::sync::mpsc::channel();
        assert_eq!(flags.receive(&receive, Duration::from_millis(1)), Err(RecvTimeoutError::Timeout));
        send.send(7).unwrap();
        flags.stop(ControlError::Lost("gone".into()));
        assert_eq!(flags.receive(&receive, Duration::from_secs(600)), Ok(7), "what is there is taken");
        let begin = Instant::now();
        assert_eq!(flags.receive(&receive, Duration::from_secs(600)), Err(RecvTimeoutError::Timeout));
        assert!(begin.elapsed() < Duration::from_secs(60));
        drop(send);
        assert_eq!(flags.receive(&receive, Duration::from_secs(600)), Err(RecvTimeoutError::Disconnected));
    }

    #[tokio::test]
    async fn a_coordinator_that_is_not_there_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        for url in [url.as_str(), "not a url"] {
            let error = Link::open(url, Hello::default()).await.err().unwrap();
            assert!(matches!(error, ControlError::Unreachable { .. }) && error.to_string().contains(url), "{error}");
        }
    }
}
