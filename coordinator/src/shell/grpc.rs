//! The gRPC service: streams of workers, and clients' questions.

use super::RunError;
use super::door::Connection;
use super::driver::{Input, Stream};
use super::gate::Gate;
use super::guard::Guard;
use super::limits::{HEADERS_AT_MOST, LARGEST_MESSAGE, STREAMS_AT_MOST};
use crate::core::Outcome;
use crate::machine::{Closed, ConnId, Event};
use ella_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use ella_proto::v1::{DrainReply, DrainRequest, FromWorker, RunStatus, StatusRequest, StopReply, StopRequest, ToWorker};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};

/// Messages that may wait to be sent to one worker.
const OUTGOING: usize = 64;
/// How long a stream may be open before its worker says who it is.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// How long the driver may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

struct Service {
    inputs: mpsc::Sender<Input>,
    next: AtomicU64,
    readers: TaskTracker,
    shutdown: CancellationToken,
}

/// Serves whom `guard` lets in, until `shutdown`.
pub(super) async fn serve(
    connections: mpsc::Receiver<Connection>,
    guard: Guard,
    shutdown: CancellationToken,
) -> Result<Option<Outcome>, RunError> {
    let readers = TaskTracker::new();
    let inputs = guard.inputs.clone();
    let service = Service { inputs, next: AtomicU64::new(1), readers: readers.clone(), shutdown: shutdown.clone() };
    let inner = CoordinatorServer::new(service).max_decoding_message_size(LARGEST_MESSAGE);
    // A worker behind a connection that silently breaks is found by its lease, and the kernel closes what remains. HTTP/2's own
    // keep-alive would do worse: after a stop of this process it finds its pings overdue before it reads the answers that wait (P-3).
    let served = Server::builder()
        .max_concurrent_streams(STREAMS_AT_MOST)
        .http2_max_header_list_size(HEADERS_AT_MOST)
        .add_service(Gate { inner, guard })
        .serve_with_incoming_shutdown(ReceiverStream::new(connections).map(Ok::<_, std::io::Error>), shutdown.cancelled_owned())
        .await;
    readers.close();
    readers.wait().await;
    served.map(|()| None).map_err(|e| RunError::Server { name: "gRPC", reason: e.to_string() })
}

/// Asks the driver for the status.
pub(super) async fn ask_status(inputs: &mpsc::Sender<Input>) -> Option<RunStatus> {
    ask(inputs, Input::Status).await
}

async fn ask<T>(inputs: &mpsc::Sender<Input>, question: fn(oneshot::Sender<T>) -> Input) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    let asked = async {
        inputs.send(question(reply)).await.ok()?;
        answer.await.ok()
    };
    tokio::time::timeout(ANSWER, asked).await.ok().flatten()
}

impl Service {
    /// Tells the driver what a client asks for.
    async fn tell(&self, event: Event) -> Result<(), Status> {
        self.inputs.send_timeout(Input::Event(event), ANSWER).await.map_err(|_| no_answer())
    }
}

/// A client's reason, or this one if it gives none.
fn reason_or(reason: String, default: &str) -> String {
    if reason.is_empty() { default.to_owned() } else { reason.chars().take(256).collect() }
}

fn no_answer() -> Status {
    Status::unavailable("the coordinator is leaving")
}

#[tonic::async_trait]
impl Coordinator for Service {
    type AttachStream = BoxStream<'static, Result<ToWorker, Status>>;

    async fn attach(&self, request: Request<Streaming<FromWorker>>) -> Result<Response<Self::AttachStream>, Status> {
        let conn = ConnId(self.next.fetch_add(1, Relaxed));
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let gate = self.shutdown.child_token();
        let stream = Stream { outgoing, gate: gate.clone() };
        self.inputs.send(Input::Opened(conn, stream)).await.map_err(|_| no_answer())?;
        self.readers.spawn(read(conn, request.into_inner(), self.inputs.clone(), gate));
        Ok(Response::new(ReceiverStream::new(messages).map(|message| Ok(*message)).boxed()))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<RunStatus>, Status> {
        let status = match request.into_inner().alive {
            true => ask(&self.inputs, Input::Alive).await.map(|()| RunStatus::default()),
            false => ask_status(&self.inputs).await,
        };
        status.map(Response::new).ok_or_else(no_answer)
    }

    async fn stop(&self, request: Request<StopRequest>) -> Result<Response<StopReply>, Status> {
        let reason = reason_or(request.into_inner().reason, "asked to stop");
        self.tell(Event::Stop(reason)).await.map(|()| Response::new(StopReply {}))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        let DrainRequest { worker_id, reason } = request.into_inner();
        let status = ask_status(&self.inputs).await.ok_or_else(no_answer)?;
        if !status.workers.iter().any(|worker| worker.worker_id == worker_id) {
            return Err(Status::not_found(format!(
                "no worker of this run has the id {worker_id:?}; see those that are here with ella status"
            )));
        }
        let reason = reason_or(reason, "asked to leave");
        self.tell(Event::Drain { worker: worker_id, reason }).await.map(|()| Response::new(DrainReply {}))
    }
}

/// Reads one worker's stream to its end, and says how it ended.
async fn read(conn: ConnId, mut messages: Streaming<FromWorker>, inputs: mpsc::Sender<Input>, gate: CancellationToken) {
    let mut first = Some(FIRST_MESSAGE);
    let how = loop {
        let message = async {
            match first.take() {
                Some(patience) => tokio::time::timeout(patience, messages.message()).await.map_err(|_| Closed::Silent),
                None => Ok(messages.message().await),
            }
        };
        match gate.run_until_cancelled(message).await {
            Some(Ok(Ok(Some(message)))) => {
                if inputs.send(Input::Event(Event::Message(conn, message))).await.is_err() {
                    return;
                }
            }
            Some(Ok(Err(status))) => break how_it_broke(&status),
            Some(Err(silent)) => break silent,
            Some(Ok(Ok(None))) | None => break Closed::Gone,
        }
    };
    // No receiver: the coordinator is leaving anyway.
    let _ = inputs.send(Input::Event(Event::Closed(conn, how))).await;
}

/// tonic's codes for what can't be decoded; a test against real bytes pins them.
fn how_it_broke(status: &Status) -> Closed {
    match status.code() {
        Code::OutOfRange => Closed::Oversized,
        Code::Internal if status.message().contains("decode") => Closed::Malformed,
        _ => Closed::Gone,
    }
}
