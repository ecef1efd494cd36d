//! A job whose only worker is in this process: the same state machine and driver, joined to it by channels instead of a network.

use super::driver::{Driver, Input, Stream};
use super::grpc::ask_status;
use super::{INPUTS, job_settings};
use crate::core::Outcome;
use crate::job::{JobCore, JobSettings, MOST_SLOTS};
use crate::machine::{Closed, ConnId, Event, Time};
use ella_proto::config::JobConfig;
use ella_proto::v1::{FromWorker, RunStatus, ToWorker};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How often the worker tells how far its units are.
const PROGRESS_MS: u64 = 250;
/// How long the final status stays readable: until this is dropped, mostly.
const LINGER: Duration = Duration::from_secs(60);
/// A lease that does not end: both sides live and die together.
const FOR_EVER_MS: u64 = 365 * 24 * 3_600_000;

/// A job's coordinator in this process, which serves one worker.
#[derive(Debug)]
pub struct LocalJob {
    inputs: mpsc::Sender<Input>,
    _driver: AbortOnDropHandle<Outcome>,
}

impl LocalJob {
    /// Starts the job. Gives also the worker's ends of its stream. Call it within a runtime.
    pub fn start(config: &JobConfig) -> (Self, mpsc::Sender<FromWorker>, mpsc::Receiver<Box<ToWorker>>) {
        let mut settings: JobSettings = job_settings(config);
        settings.welcome.heartbeat_ms = PROGRESS_MS;
        settings.welcome.lease_ms = FOR_EVER_MS;
        let (inputs, inbox) = mpsc::channel(INPUTS);
        let driver = Driver::new(Box::new(JobCore::new(settings, Time(0))), inbox, None, LINGER);
        let driver = AbortOnDropHandle::new(tokio::spawn(driver.run(CancellationToken::new())));
        let (out, said) = mpsc::channel(INPUTS);
        // Grants of all slots, the welcome and the end.
        let (outgoing, incoming) = mpsc::channel(MOST_SLOTS as usize + 8);
        tokio::spawn(pass_on(said, Stream { outgoing, gate: CancellationToken::new() }, inputs.clone()));
        (Self { inputs, _driver: driver }, out, incoming)
    }

    /// What the job is doing now, or how it ended.
    pub async fn status(&self) -> Option<RunStatus> {
        ask_status(&self.inputs).await
    }
}

/// What the worker says, to the driver, until either is gone.
async fn pass_on(mut said: mpsc::Receiver<FromWorker>, stream: Stream, inputs: mpsc::Sender<Input>) {
    let conn = ConnId(1);
    let gate = stream.gate.clone();
    let mut next = Some(Input::Opened(conn, stream));
    while let Some(input) = next {
        if inputs.send(input).await.is_err() {
            return;
        }
        next = gate.run_until_cancelled(said.recv()).await.flatten().map(|message| Input::Event(Event::Message(conn, message)));
    }
    // No receiver: the job is over.
    let _ = inputs.send(Input::Event(Event::Closed(conn, Closed::Gone))).await;
}
