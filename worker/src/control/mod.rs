//! The worker's side of the control plane: a stream to the coordinator, or to the next one, served by tasks of its own. The step path only
//! looks at flags and an inbox; it never waits for a coordinator (LIVE).

mod error;
mod flags;
mod hang;
mod link;
mod outbox;

pub use error::ControlError;
pub use flags::{Era, Flags};
pub(crate) use link::{Link, Pauses, identity};
pub use outbox::Outbox;
#[cfg(test)]
pub(crate) use outbox::unread;

use crate::vitals;
use ella_coordinator::logs;
use ella_proto::access::Access;
use ella_proto::v1::{Failed, Heartbeat, Hello, Leaving, Outcome, RefusedReason, ToWorker, Welcome, from_worker, to_worker};
use futures::StreamExt as _;
use link::ticking;
use outbox::Doing;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

/// What the coordinator says, in order.
pub type Message = to_worker::Body;

/// A message, and the generation that it is of.
#[derive(Clone, Debug)]
pub struct Said {
    /// Whose.
    pub era: Era,
    /// What.
    pub body: Message,
}

/// An attached worker's control plane.
#[derive(Debug)]
pub struct Control {
    inbox: Mutex<Receiver<Said>>,
    outbox: Outbox,
    /// What serves the streams; it ends with this.
    _task: AbortOnDropHandle<()>,
}

impl Control {
    /// Serves a link, and the ones that follow it when it breaks, to whoever coordinates at that address then. `flags` are those that the caller
    /// raises and looks at. Call it within the runtime.
    pub(crate) fn over(link: Link, (access, hello): (Access, Hello), flags: Arc<Flags>) -> (Self, Welcome) {
        let welcome = link.welcome.clone();
        logs::in_run(&welcome.run_url);
        let (inbound, inbox) = std::sync::mpsc::channel();
        let outbox = Outbox::new(flags);
        // It goes on with the run that it has begun with, and with no other.
        let hello = Hello { config_digest: welcome.config_digest.clone(), ..hello };
        let server = Server { access, hello, outbox: outbox.clone(), inbound };
        let task = AbortOnDropHandle::new(tokio::spawn(server.serve(link)));
        (Self { inbox: Mutex::new(inbox), outbox, _task: task }, welcome)
    }

    /// A sender for other threads.
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// The flags of this worker.
    pub fn flags(&self) -> &Arc<Flags> {
        self.outbox.flags()
    }

    /// Waits for the next message for at most `patience`; none if it does not come, or comes only when `interrupted`.
    ///
    /// # Errors
    /// Why nothing will be said any more.
    pub fn next(&self, patience: Duration) -> Result<Option<Said>, ControlError> {
        let got = self.inbox.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(patience);
        match (got, self.flags().stopped()) {
            (Ok(said), _) => Ok(Some(said)),
            (Err(_), Some(why)) => Err(why),
            (Err(RecvTimeoutError::Timeout), None) => Ok(None),
            (Err(RecvTimeoutError::Disconnected), None) => Err(ControlError::Unwelcomed("nobody serves its stream".to_owned())),
        }
    }
}

/// How a stream ended.
enum Broken {
    /// This worker's part is over.
    For(ControlError),
    /// It, or its coordinator, is gone. Another one may be there, or will be.
    Gone(String),
}

struct Server {
    access: Access,
    hello: Hello,
    outbox: Outbox,
    inbound: Sender<Said>,
}

impl Server {
    /// Serves one stream after the other, until this worker's part is over.
    async fn serve(self, mut link: Link) {
        let (mut last, mut newest) = (link.welcome.clone(), link.term);
        let why = loop {
            let orphan = Duration::from_millis(last.orphan_ms);
            let gone = match self.stream(link, orphan / 2).await {
                Broken::For(why) => break why,
                Broken::Gone(why) => why,
            };
            self.outbox.flags().unattended();
            self.outbox.detach();
            if let Some(end) = self.end_of_the_run() {
                break end;
            }
            tracing::warn!("the coordinator is gone ({gone}); work goes on, and the next one is looked for");
            match self.again(orphan, newest, &gone).await {
                Ok(next) => link = next,
                Err(why) => break why,
            }
            (last, newest) = (link.welcome.clone(), link.term);
        };
        self.outbox.flags().stop(why);
    }

    /// A stream that ends after the farewell, when the last commit stands, is the end of the run; and one that failed has nothing to come back for.
    fn end_of_the_run(&self) -> Option<ControlError> {
        let committed = self.outbox.flags().committed.load(Ordering::Relaxed);
        match self.outbox.doing() {
            Doing::Finished(finished, _) if committed >= finished.step => {
                let detail = format!("step {} is committed", finished.step);
                Some(ControlError::Over { outcome: finished.outcome(), detail, permanent: false })
            }
            Doing::Failed(Failed { permanent, .. }) => {
                Some(ControlError::Over { outcome: Outcome::Failed, detail: "this worker has failed".to_owned(), permanent })
            }
            _ => None,
        }
    }

    /// Looks for the coordinator that is in the old one's place, or for the old one.
    async fn again(&self, orphan: Duration, newest: u64, gone: &str) -> Result<Link, ControlError> {
        let (until, mut pauses) = (Instant::now() + orphan, Pauses::new());
        loop {
            let place = match self.outbox.doing() {
                Doing::Placed(place) => Some(place),
                _ => None,
            };
            let left = until.saturating_duration_since(Instant::now());
            let opened = timeout(left, Link::open(&self.access, Hello { place, ..self.hello.clone() })).await;
            let error = match opened.unwrap_or(Err(ControlError::Late { what: "welcome", seconds: left.as_secs() })) {
                Ok(link) if link.term >= newest => return Ok(link),
                // One that was stopped, and does not know yet that another has taken its place.
                Ok(link) => format!("a coordinator of term {} answers, and there has been one of {newest}", link.term),
                // It is about to leave, and the next one will be there.
                Err(ControlError::Refused { reason: RefusedReason::Superseded, detail, .. }) => detail,
                Err(error) if error.is_its_word() => return Err(error),
                Err(error) => error.to_string(),
            };
            if self.outbox.flags().parting.is_cancelled() {
                return Err(ControlError::Released("told to leave, and no coordinator is there to ask".to_owned()));
            }
            let pause = pauses.longer();
            if Instant::now() + pause >= until {
                return Err(ControlError::Orphaned { seconds: orphan.as_secs(), why: format!("{gone}, and then: {error}") });
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Serves one stream to its end. A coordinator that answers nothing for `patience` is gone too.
    async fn stream(&self, link: Link, patience: Duration) -> Broken {
        let flags = self.outbox.flags();
        let silent = link.silent(patience);
        tokio::pin!(silent);
        let (term, welcome) = (link.term, link.welcome);
        logs::in_term(term);
        self.outbox.attach(link.out, Era { term, generation: link.generation });
        let outbox = self.outbox.clone();
        let beats = ticking(Duration::from_millis(welcome.heartbeat_ms.max(1)), move || {
            let flags = outbox.flags();
            let (step, encoding, activity) = (flags.step.load(Ordering::Relaxed), flags.encoded(), flags.activity());
            let (vitals, counts) = (Some(vitals::look(flags.feed_bytes.load(Ordering::Relaxed))), vitals::news());
            if !outbox.offer(from_worker::Body::Heartbeat(Heartbeat { step, encoding, activity, vitals, counts: counts.clone() })) {
                vitals::untold(&counts);
            }
            true
        });
        let _beats = AbortOnDropHandle::new(tokio::spawn(beats));
        let (mut incoming, mut told) = (link.incoming, false);
        loop {
            let next = tokio::select! {
                biased;
                next = incoming.next() => next,
                () = flags.parting.cancelled(), if !told => {
                    told = true;
                    self.outbox.say(from_worker::Body::Leaving(Leaving {}));
                    continue;
                }
                () = &mut silent => return Broken::Gone(format!("it has answered nothing for {:.1} s", patience.as_secs_f64())),
            };
            match next {
                None => return Broken::Gone("its stream ended".to_owned()),
                Some(Err(status)) => return Broken::Gone(status.message().to_owned()),
                Some(Ok(ToWorker { term, generation, body: Some(body) })) => {
                    if let Some(end) = self.take(Era { term, generation }, body) {
                        return Broken::For(end);
                    }
                }
                Some(Ok(_)) => tracing::warn!("an empty message from the coordinator"),
            }
        }
    }

    /// Takes in one message: what concerns the step path at once, as flags; then for the inbox. Gives the end, if it is that.
    fn take(&self, era: Era, body: Message) -> Option<ControlError> {
        let flags = self.outbox.flags();
        if !self.outbox.heard(era, matches!(body, Message::Assign(_))) {
            tracing::warn!(era.term, era.generation, "refused a message of another term, or an older generation");
            return None;
        }
        match &body {
            Message::Drain(drain) => {
                tracing::info!(reason = drain.reason, "asked to commit and leave");
                flags.drain.cancel();
            }
            Message::Abort(abort) => {
                return Some(ControlError::Aborted { reason: abort.reason.clone(), permanent: abort.permanent });
            }
            // It has loaded what the run is not trained on.
            Message::Refused(refused) => return Some(link::refusal(refused.clone())),
            Message::Release(release) => return Some(ControlError::Released(release.reason.clone())),
            Message::Adopted(_) => flags.adopt(era),
            Message::Committed(commit) => {
                flags.committed.fetch_max(commit.step, Ordering::Relaxed);
                // All there is to it: while steps are taken nobody empties the inbox.
                return None;
            }
            Message::Regroup(regroup) => {
                tracing::info!(at_boundary = regroup.at_boundary, reason = regroup.reason, "the generation ends");
                flags.end(era, regroup.at_boundary);
            }
            // A coordinator gives a place only to who is in none, as far as it knows: whatever came before is over.
            Message::Assign(_) => flags.end(Era { generation: era.generation.saturating_sub(1), ..era }, false),
            _ => {}
        }
        drop(self.inbound.send(Said { era, body }));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_proto::v1::{Committed, Regroup};

    /// A run of a week has many commits, and its inbox nobody who reads it between two generations.
    #[test]
    fn commits_that_are_recorded_do_not_pile_up_in_the_inbox() {
        let (inbound, inbox) = std::sync::mpsc::channel();
        let server = Server { access: "http://h:1".into(), hello: Hello::default(), outbox: unread().0, inbound };
        let take = |body| assert!(server.take(Era { term: 4, generation: 1 }, body).is_none());
        [5, 9, 7].into_iter().for_each(|step| take(Message::Committed(Committed { step })));
        assert!(inbox.try_recv().is_err() && server.outbox.flags().committed.load(Ordering::Relaxed) == 9);
        take(Message::Regroup(Regroup::default()));
        assert!(matches!(inbox.try_recv().unwrap().body, Message::Regroup(_)));
    }

    #[tokio::test]
    async fn a_coordinator_that_is_not_there_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        for url in [url.as_str(), "not a url"] {
            let error = Link::open(&url.into(), Hello::default()).await.err().unwrap();
            assert!(matches!(error, ControlError::Unreachable { .. }) && error.to_string().contains(url), "{error}");
        }
    }
}
