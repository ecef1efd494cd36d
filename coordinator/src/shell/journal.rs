//! What happened, kept in the run folder in batches: `metrics/TERM-NNNNNN.jsonl` (a line a step), `timing/TERM-NNNNNN.jsonl` (a line for some
//! steps of a rank) and `events/TERM-NNNNNN.jsonl`.
//! Nothing depends on it, so its failures are counted and told, and never end a run.

use super::RunError;
use super::spans::Spans;
use super::start::unix_ms;
use crate::core::{Note, RankTiming};
use crate::job::JobNote;
use crate::logs;
use crate::status::PartsReport;
use ella_proto::v1;
use ella_store::Store;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// How long lines are gathered before they are written, if no commit comes.
const GATHER: Duration = Duration::from_secs(10);
/// Lines of one file, and lines that may wait while the store is down.
const BATCH: usize = 4_096;
/// Lines that may wait for the writer.
const QUEUE: usize = 4_096;

#[derive(Debug)]
enum Line {
    Metric(String),
    Timing(String),
    Event(String),
    /// Write now: what led to a commit must not be lost by a death after it.
    Flush,
}

/// Takes lines; never blocks.
#[derive(Debug)]
pub(super) struct Journal {
    lines: mpsc::Sender<Line>,
    counts: Arc<JournalCounts>,
    spans: Spans,
}

#[derive(Debug, Default)]
struct JournalCounts {
    dropped: AtomicU64,
    failed: AtomicU64,
}

/// One step, as `metrics/` keeps it.
#[derive(Serialize)]
struct Metric<'a> {
    at_unix_ms: u64,
    generation: u64,
    /// Ranks of that generation.
    world: u32,
    step: u64,
    samples: u64,
    loss: f64,
    grad_norm: f64,
    lr: f64,
    step_seconds: f64,
    parts: Option<PartsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    held_out_loss: Option<f64>,
    #[serde(skip_serializing_if = "std::collections::HashMap::is_empty")]
    skipped: &'a std::collections::HashMap<String, u64>,
    #[serde(skip_serializing_if = "std::collections::HashMap::is_empty")]
    read: &'a std::collections::HashMap<String, u64>,
}

/// Some steps of a rank, as `timing/` keeps them.
#[derive(Serialize)]
struct Timing<'a> {
    at_unix_ms: u64,
    rank: u32,
    generation: u64,
    worker: &'a str,
    host: &'a str,
    /// The last of the steps.
    step: u64,
    steps: u64,
    seconds: f64,
    parts: PartsReport,
}

#[derive(Serialize)]
struct Stamped<'a> {
    at_unix_ms: u64,
    #[serde(flatten)]
    note: &'a Note,
}

impl Journal {
    /// Keeps a step's measurements.
    pub(super) fn metric(&self, progress: &v1::Progress) {
        if !progress.missed {
            logs::at_step(progress.step);
        }
        let line = Metric {
            at_unix_ms: progress.at_unix_ms,
            generation: progress.generation,
            world: progress.world,
            step: progress.step,
            samples: progress.samples,
            loss: progress.loss,
            grad_norm: progress.grad_norm,
            lr: progress.learning_rate,
            step_seconds: progress.step_seconds,
            parts: progress.parts.map(Into::into),
            held_out_loss: progress.held_out_loss,
            skipped: &progress.skipped,
            read: &progress.read,
        };
        self.send(serde_json::to_string(&line).map(Line::Metric));
    }

    /// Keeps where a rank's time went.
    pub(super) fn timing(&self, timing: &RankTiming) {
        let RankTiming { rank, generation, worker_id, host, step, steps, seconds, parts } = timing;
        let line = Timing {
            at_unix_ms: unix_ms(),
            rank: *rank,
            generation: *generation,
            worker: worker_id,
            host,
            step: *step,
            steps: *steps,
            seconds: *seconds,
            parts: (*parts).into(),
        };
        self.send(serde_json::to_string(&line).map(Line::Timing));
    }

    /// Keeps what happened, and logs it.
    pub(super) fn note(&self, note: &Note) {
        log(note);
        self.spans.noted(note);
        let line = serde_json::to_string(&Stamped { at_unix_ms: unix_ms(), note });
        self.send(line.map(Line::Event));
        if matches!(note, Note::Committed { .. }) {
            self.send(Ok(Line::Flush));
        }
    }

    /// What was lost or had to be written again (KNOWN).
    pub(super) fn counts(&self) -> [(&'static str, u64); 2] {
        [("journal_lines_dropped", self.counts.dropped.load(Relaxed)), ("journal_writes_failed", self.counts.failed.load(Relaxed))]
    }

    fn send(&self, line: Result<Line, serde_json::Error>) {
        if line.map_or(true, |line| self.lines.try_send(line).is_err()) {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// Tells what happened in this process's log.
pub(super) fn log(note: &Note) {
    if let Note::Generation { generation, from_step: step, .. } | Note::Adopted { generation, step, .. } = note {
        logs::in_generation(*generation);
        logs::at_step(*step);
    }
    // What cannot be written as JSON the journal counts.
    let text = serde_json::to_string(note).unwrap_or_default();
    match note {
        Note::Refused { .. }
        | Note::Stranger { .. }
        | Note::Left { .. }
        | Note::Lost { .. }
        | Note::Straggler { .. }
        | Note::Unlike { .. } => tracing::warn!("{text}"),
        Note::Job(JobNote::Gone { .. } | JobNote::UnitFailed { .. }) => tracing::warn!("{text}"),
        Note::Ended { outcome: "failed", .. } | Note::Job(JobNote::Over { outcome: "failed", .. }) => tracing::error!("{text}"),
        _ => tracing::info!("{text}"),
    }
}

/// A journal of `term`, and the task that writes it. The task ends when the journal is dropped and all is written.
pub(super) fn journal(store: Store, term: u64) -> (Journal, impl Future<Output = Result<(), RunError>>) {
    let (lines, inbox) = mpsc::channel(QUEUE);
    let counts = Arc::new(JournalCounts::default());
    let files =
        ["metrics", "timing", "events"].map(|folder| File { folder, term, next: 1, lines: Vec::new(), counts: Arc::clone(&counts) });
    let spans = Spans::new(store.url().to_owned(), term);
    (Journal { lines, counts, spans }, write(store, files, inbox))
}

struct File {
    folder: &'static str,
    term: u64,
    next: u64,
    lines: Vec<String>,
    counts: Arc<JournalCounts>,
}

async fn write(store: Store, [mut metrics, mut timing, mut events]: [File; 3], mut inbox: mpsc::Receiver<Line>) -> Result<(), RunError> {
    let mut open = true;
    while open {
        let until = Instant::now() + GATHER;
        while metrics.lines.len().max(timing.lines.len()).max(events.lines.len()) < BATCH {
            match timeout_at(until, inbox.recv()).await {
                Ok(Some(Line::Metric(line))) => metrics.lines.push(line),
                Ok(Some(Line::Timing(line))) => timing.lines.push(line),
                Ok(Some(Line::Event(line))) => events.lines.push(line),
                Ok(Some(Line::Flush)) | Err(_) => break,
                Ok(None) => {
                    open = false;
                    break;
                }
            }
        }
        metrics.flush(&store, open).await;
        timing.flush(&store, open).await;
        events.flush(&store, open).await;
    }
    Ok(())
}

impl File {
    /// Writes the lines as the next file. If the store refuses they wait for the next time, as long as there is room and a next time.
    async fn flush(&mut self, store: &Store, again: bool) {
        if self.lines.is_empty() {
            return;
        }
        let key = format!("{}/{:06}-{:06}.jsonl", self.folder, self.term, self.next);
        let text = self.lines.join("\n") + "\n";
        match store.put(&key, text.into()).await {
            Ok(()) => {
                self.next += 1;
                self.lines.clear();
            }
            Err(error) => {
                self.counts.failed.fetch_add(1, Relaxed);
                tracing::warn!("{error}; training goes on");
                if !again || self.lines.len() >= BATCH {
                    self.counts.dropped.fetch_add(self.lines.len() as u64, Relaxed);
                    self.lines.clear();
                }
            }
        }
    }
}
