//! Server-sent events: what happened lately lies in one ring that all streams read from, each at its own pace. A stream that comes back says
//! what it saw last; one that is too far behind is told to ask for everything anew; one that does not read is ended.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{Refusal, Shared};

/// Streams at a time.
const STREAMS: usize = 64;
/// What a stream that was cut off can catch up on: some minutes.
const KEPT: usize = 512;
/// Something is said this often, so that both sides and what is between them know that the other is there.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Who does not read for this long is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// One message.
#[derive(Clone, Debug)]
struct Frame {
    id: u64,
    name: &'static str,
    data: Arc<str>,
}

/// The newest messages.
#[derive(Debug)]
pub(super) struct Feed {
    frames: Mutex<VecDeque<Frame>>,
    /// The newest message's number; 0 before the first.
    newest: watch::Sender<u64>,
    streams: Arc<Semaphore>,
    /// Tells this process's numbers from another's.
    session: u64,
}

impl Feed {
    pub(super) fn new(session: u64) -> Self {
        Self { frames: Mutex::default(), newest: watch::channel(0).0, streams: Arc::new(Semaphore::new(STREAMS)), session }
    }

    /// Whether anyone looks.
    pub(super) fn is_read(&self) -> bool {
        self.streams.available_permits() < STREAMS
    }

    /// Tells all streams.
    pub(super) fn tell(&self, name: &'static str, data: String) {
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let id = *self.newest.borrow() + 1;
        frames.push_back(Frame { id, name, data: data.into() });
        if frames.len() > KEPT {
            frames.pop_front();
        }
        self.newest.send_replace(id);
    }

    /// The messages after number `seen`; none if some of them are gone.
    fn after(&self, seen: u64) -> Option<Vec<Frame>> {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = frames.front().map_or(1, |frame| frame.id);
        (seen + 1 >= oldest).then(|| frames.iter().filter(|frame| frame.id > seen).cloned().collect())
    }

    /// What a stream saw last, by the id that it shows.
    fn seen(&self, id: Option<&str>) -> Option<u64> {
        let (session, number) = id?.split_once('-')?;
        let (session, number) = (u64::from_str_radix(session, 16).ok()?, number.parse().ok()?);
        (session == self.session && number <= *self.newest.borrow()).then_some(number)
    }

    fn event(&self, frame: &Frame) -> Event {
        Event::default().id(format!("{:x}-{}", self.session, frame.id)).event(frame.name).data(&*frame.data)
    }

    /// Tells a stream to ask for everything anew; what follows continues from here.
    fn reset(&self, at: u64) -> Event {
        self.event(&Frame { id: at, name: "reset", data: "{}".into() })
    }
}

/// Streams what happens, from what the `Last-Event-ID` says on.
pub(super) async fn live(State(dashboard): Shared, headers: HeaderMap) -> Response {
    let feed = Arc::clone(&dashboard.feed);
    let Ok(permit) = Arc::clone(&feed.streams).try_acquire_owned() else {
        let full = format!("{STREAMS} pages are open already; close one, or look again later");
        return Refusal(StatusCode::SERVICE_UNAVAILABLE, full).into_response();
    };
    let seen = feed.seen(headers.get("last-event-id").and_then(|id| id.to_str().ok()));
    let (events, outgoing) = mpsc::channel(4);
    tokio::spawn(stream(feed, seen, events, permit, dashboard.shutdown.clone()));
    Sse::new(ReceiverStream::new(outgoing)).into_response()
}

async fn stream(
    feed: Arc<Feed>,
    seen: Option<u64>,
    events: mpsc::Sender<Result<Event, Infallible>>,
    _permit: OwnedSemaphorePermit,
    shutdown: CancellationToken,
) {
    let mut newest = feed.newest.subscribe();
    let mut at = seen.unwrap_or_else(|| *newest.borrow());
    let say = async |event: Event| timeout(PATIENCE, events.send(Ok(event))).await.is_ok_and(|sent| sent.is_ok());
    if seen.is_none() && !say(feed.reset(at)).await {
        return;
    }
    loop {
        // What is told before the end is still sent.
        let over = shutdown.is_cancelled();
        newest.mark_unchanged();
        let frames = feed.after(at);
        let behind = frames.is_none();
        let last = frames.as_ref().and_then(|frames| frames.last()).map(|frame| frame.id);
        at = last.unwrap_or(if behind { *newest.borrow() } else { at });
        let told = if behind { vec![feed.reset(at)] } else { frames.into_iter().flatten().map(|frame| feed.event(&frame)).collect() };
        for event in told {
            if !say(event).await {
                return;
            }
        }
        if over {
            return;
        }
        tokio::select! {
            _ = newest.changed() => {}
            () = shutdown.cancelled() => {}
            () = events.closed() => return,
            () = tokio::time::sleep(HEARTBEAT) => if !say(Event::default().comment("here")).await { return },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(feed: &Arc<Feed>, seen: Option<u64>) -> (mpsc::Receiver<Result<Event, Infallible>>, CancellationToken) {
        let (events, outgoing) = mpsc::channel(4);
        let shutdown = CancellationToken::new();
        let permit = Arc::clone(&feed.streams).try_acquire_owned().unwrap();
        tokio::spawn(stream(Arc::clone(feed), seen, events, permit, shutdown.clone()));
        (outgoing, shutdown)
    }

    async fn next(stream: &mut mpsc::Receiver<Result<Event, Infallible>>) -> String {
        format!("{:?}", stream.recv().await.unwrap().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_goes_on_where_it_was_cut_off_and_else_is_told_to_begin_anew() {
        let feed = Arc::new(Feed::new(0xab));
        (0..3).for_each(|n| feed.tell("steps", format!("n{n}")));
        assert_eq!(
            [Some("ab-2"), Some("ab-9"), Some("cd-2"), Some("ab-x"), None].map(|id| feed.seen(id)),
            [Some(2), None, None, None, None]
        );
        let (mut stream, _) = begin(&feed, Some(2));
        assert!(next(&mut stream).await.contains("n2"));
        feed.tell("steps", "n3".into());
        assert!(next(&mut stream).await.contains("n3"));
        let (mut fresh, _) = begin(&feed, None);
        assert!(next(&mut fresh).await.contains("reset"));
        (0..=KEPT).for_each(|n| feed.tell("steps", format!("m{n}")));
        assert!(feed.after(2).is_none());
        let (mut late, _) = begin(&feed, Some(2));
        assert!(next(&mut late).await.contains("reset"), "what it missed is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_is_kept_alive_ended_when_it_is_not_read_and_says_all_before_the_end() {
        let feed = Arc::new(Feed::new(1));
        let (mut idle, _) = begin(&feed, Some(0));
        assert!(next(&mut idle).await.contains("here"), "a heartbeat");
        drop(idle);
        let (stuck, _stop) = begin(&feed, Some(0));
        (0..20).for_each(|n| feed.tell("steps", n.to_string()));
        while feed.is_read() {
            tokio::time::advance(PATIENCE).await;
            tokio::task::yield_now().await;
        }
        drop(stuck);
        let (mut last, stop) = begin(&feed, Some(20));
        feed.tell("event", "the end".into());
        stop.cancel();
        assert!(next(&mut last).await.contains("the end"));
        assert!(last.recv().await.is_none());
    }
}
