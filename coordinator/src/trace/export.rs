//! The way of spans to the collector: a bounded queue, and one task that empties it.

use super::{Settings, Span, TraceError};
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

/// Spans that may wait to be sent.
const QUEUE: usize = 4_096;
/// Spans that are sent at once.
const BATCH: usize = 512;
/// How long spans are gathered before they are sent.
const GATHER: Duration = Duration::from_secs(2);

static SENT: AtomicU64 = AtomicU64::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);
static FAILED: AtomicU64 = AtomicU64::new(0);
/// This process's way out. Traces are of a process, as its log is.
static TELLER: OnceLock<Teller> = OnceLock::new();

#[derive(Debug)]
struct Teller {
    settings: Settings,
    queue: mpsc::Sender<Told>,
}

#[derive(Debug)]
enum Told {
    Span(Box<Span>),
    /// Send all there is, and say so.
    Flush(oneshot::Sender<()>),
}

/// Starts to send this process's spans, if the environment asks for it; `service` is its name where `OTEL_SERVICE_NAME` gives no other. Call it
/// within a runtime, once.
///
/// # Errors
/// If the environment asks for what cannot be done.
pub fn start(service: &'static str) -> Result<(), TraceError> {
    let variable = |name: &str| std::env::var(name).ok();
    let Some(settings) = Settings::of(variable)? else { return Ok(()) };
    let made = SpanExporter::builder().with_tonic().build();
    let mut exporter = made.map_err(|error| TraceError::Exporter(error.to_string()))?;
    let resource = Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let named = variable("OTEL_SERVICE_NAME").is_some_and(|name| !name.is_empty());
    let resource = if named { resource } else { resource.with_service_name(service) };
    exporter.set_resource(&resource.build());
    let (queue, inbox) = mpsc::channel(QUEUE);
    // Whoever came first stays.
    if TELLER.set(Teller { settings, queue }).is_ok() {
        tokio::spawn(send(exporter, inbox));
    }
    Ok(())
}

/// Whether spans are wanted; of a step, whether that one's are.
pub fn is_on(step: Option<u64>) -> bool {
    TELLER.get().is_some_and(|teller| step.is_none_or(|step| teller.settings.every > 0 && step.is_multiple_of(teller.settings.every)))
}

/// Takes a span; never blocks.
pub fn tell(span: Span) {
    let Some(teller) = TELLER.get() else { return };
    if teller.queue.try_send(Told::Span(Box::new(span))).is_err() && DROPPED.fetch_add(1, Relaxed) == 0 {
        tracing::warn!("the collector of traces is too slow: a span was dropped; more of these are only counted");
    }
}

/// Sends what is left, for at most so long.
pub async fn finish(patience: Duration) {
    let Some(teller) = TELLER.get() else { return };
    let (sent, done) = oneshot::channel();
    let flushed = async {
        if teller.queue.send(Told::Flush(sent)).await.is_ok() {
            // The task has ended with the runtime that it was started in: nothing is left to be done.
            let _ = done.await;
        }
    };
    if timeout(patience, flushed).await.is_err() {
        tracing::warn!("the last spans were not sent within {patience:?}");
    }
}

/// Spans that were sent, dropped because the queue was full, and lost because the collector did not take them (KNOWN).
pub fn counts() -> [u64; 3] {
    [&SENT, &DROPPED, &FAILED].map(|count| count.load(Relaxed))
}

async fn send(exporter: SpanExporter, mut inbox: mpsc::Receiver<Told>) {
    let (mut open, mut fails) = (true, false);
    while open {
        let (mut batch, mut flushed, until) = (Vec::new(), None, Instant::now() + GATHER);
        while batch.len() < BATCH && flushed.is_none() {
            match timeout_at(until, inbox.recv()).await {
                Ok(Some(Told::Span(span))) => batch.push(data(*span)),
                Ok(Some(Told::Flush(done))) => flushed = Some(done),
                Ok(None) => {
                    open = false;
                    break;
                }
                Err(_) => break,
            }
        }
        if !batch.is_empty() {
            fails = export(&exporter, batch, fails).await;
        }
        // Nobody waits any more: the deadline has passed.
        flushed.map(|done| done.send(()));
    }
}

/// Sends a batch; gives whether that failed. It is told of when it begins and when it ends.
async fn export(exporter: &SpanExporter, batch: Vec<SpanData>, fails: bool) -> bool {
    let count = batch.len() as u64;
    match exporter.export(batch).await {
        Ok(()) => {
            SENT.fetch_add(count, Relaxed);
            if fails {
                tracing::info!("the collector of traces takes spans again");
            }
            false
        }
        Err(error) => {
            FAILED.fetch_add(count, Relaxed);
            if !fails {
                tracing::warn!("{count} spans of traces were not taken by the collector ({error}); more of these are only counted");
            }
            true
        }
    }
}

fn data(span: Span) -> SpanData {
    let Span { trace, id, parent, name, begun, ended, attributes, error } = span;
    let (trace, id) = (TraceId::from_bytes(trace), SpanId::from_bytes(id));
    SpanData {
        span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::default()),
        parent_span_id: parent.map_or(SpanId::INVALID, SpanId::from_bytes),
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time: begun,
        end_time: ended,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: error.map_or(Status::Unset, Status::error),
        instrumentation_scope: InstrumentationScope::builder("ella").with_version(env!("CARGO_PKG_VERSION")).build(),
    }
}
