//! Units leased from a coordinator, until its job is over.

use super::hand::{Hand, say};
use super::{Job, JobEnd, JobError};
use crate::control::{self, ControlError, Link, Pauses};
use crate::train::Ending;
use crate::witness;
use ella_dataset::DataError;
use ella_proto::access::Access;
use ella_proto::config::JobConfig;
use ella_proto::v1::{
    Failed, FailureKind, Finished, Hello, JobOver, LeaseRequest, Outcome, RefusedReason, ToWorker, Welcome, from_worker, to_worker,
};
use ella_store::Store;
use futures::StreamExt as _;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How long a worker that leaves waits for the coordinator to end its stream: by then its last message has been read.
const FAREWELL: Duration = Duration::from_secs(5);

/// Works for the coordinator at `access` (`http://host:port`, and its token if it asks for one) until its job is over, doing `slots` units at once. `make` gets the job's
/// config. `stop` gives back what is in hand and leaves ([`Ending::Preempted`]). A coordinator that is gone has `job.orphan_timeout` to
/// come back; units go on meanwhile.
///
/// # Errors
/// If there is no coordinator, its job failed, or this worker cannot do it.
pub async fn run_leased<M>(access: impl Into<Access>, slots: u32, stop: CancellationToken, make: M) -> Result<Ending, JobEnd>
where
    M: FnOnce(&JobConfig) -> Result<Box<dyn Job>, JobError> + Send + 'static,
{
    let access = access.into();
    let link = match Link::open(&access, identity()?).await {
        Ok(link) => link,
        Err(error) => return Ok(error.ending()?),
    };
    let config = JobConfig::parse(&link.welcome.config_toml, "the coordinator's config", &[])?;
    Leased { access, slots, stop }.work(link, move || make(&config)).await
}

pub(super) fn identity() -> Result<Hello, JobEnd> {
    control::identity().map_err(|error| JobEnd::System(error.to_string()))
}

/// A worker of a coordinator's job.
#[derive(Debug)]
pub(crate) struct Leased {
    pub(crate) access: Access,
    pub(crate) slots: u32,
    pub(crate) stop: CancellationToken,
}

impl Leased {
    /// Makes the job, which may take a while, and does its units.
    pub(crate) async fn work<M>(self, mut link: Link, make: M) -> Result<Ending, JobEnd>
    where
        M: FnOnce() -> Result<Box<dyn Job>, JobError> + Send + 'static,
    {
        let welcome = link.welcome.clone();
        let make = move || Handle::current().block_on(check_folder(&welcome)).and_then(|()| make());
        let Some(made) = self.make(link.beating(), make).await else { return Ok(Ending::Preempted) };
        match made {
            Ok(job) => {
                let mut hand = Hand::new(job, self.slots);
                let ending = self.serve(&mut link, &mut hand).await;
                hand.let_go().await;
                ending
            }
            Err(error) => unfit(&mut link, error).await,
        }
    }

    /// Makes the job while signs of life are sent. None if it is told to leave first.
    async fn make<M>(&self, _beats: AbortOnDropHandle<()>, make: M) -> Option<Result<Box<dyn Job>, JobError>>
    where
        M: FnOnce() -> Result<Box<dyn Job>, JobError> + Send + 'static,
    {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            made = tokio::task::spawn_blocking(make) => Some(made.unwrap_or_else(|broken| Err(JobError::passing(broken)))),
        }
    }

    /// Does units for one coordinator after the other, until one says that the job is over.
    async fn serve(&self, link: &mut Link, hand: &mut Hand) -> Result<Ending, JobEnd> {
        loop {
            match serve(link, hand, &self.stop).await {
                Served::Over(over) => return ending(over),
                Served::Stopped => return Ok(Ending::Preempted),
                Served::Broken(error) => return Err(JobEnd::Broken(error)),
                Served::Silent(orphan) => {
                    let why = "its stream stands, but it answers nothing".to_owned();
                    return Err(JobEnd::Orphaned { url: self.access.url.clone(), seconds: orphan.as_secs(), why });
                }
                Served::Lost(why) => {
                    tracing::warn!("the coordinator is gone ({why}); what is in hand goes on, and the next one is looked for");
                    match self.again(link.welcome.clone()).await? {
                        Next::Link(next) => {
                            *link = *next;
                            let _beats = link.beating();
                            // A store that is away now may be back for the units.
                            if let Err(error) = check_folder(&link.welcome).await
                                && error.of_this_machine
                            {
                                return unfit(link, error).await;
                            }
                        }
                        Next::Ending(ending) => return Ok(ending),
                    }
                }
            }
        }
    }

    /// Looks for the coordinator that is in the old one's place, or for the old one.
    async fn again(&self, old: Welcome) -> Result<Next, JobEnd> {
        let orphan = Duration::from_millis(old.orphan_ms);
        let until = Instant::now() + orphan;
        let mut pauses = Pauses::new();
        loop {
            let hello = Hello { config_digest: old.config_digest.clone(), ..identity()? };
            let opened = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ok(Next::Ending(Ending::Preempted)),
                opened = Link::open(&self.access, hello) => opened,
            };
            let url = self.access.url.clone();
            let why = match opened {
                Ok(link) => return Ok(Next::Link(Box::new(link))),
                Err(ControlError::Refused { reason: RefusedReason::Config, .. }) => return Err(JobEnd::OtherConfig { url }),
                Err(error) if error.is_its_word() => return Ok(Next::Ending(error.ending()?)),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= until {
                return Err(JobEnd::Orphaned { url, seconds: orphan.as_secs(), why });
            }
            tokio::select! {
                () = self.stop.cancelled() => return Ok(Next::Ending(Ending::Preempted)),
                () = sleep(pauses.longer()) => {}
            }
        }
    }
}

/// What follows a coordinator that is gone.
enum Next {
    /// Another, or the same again.
    Link(Box<Link>),
    /// Nothing: the job is over, or this worker was told to leave.
    Ending(Ending),
}

/// Fails on a machine whose folder is another one than the coordinator's: what was done there would be found by nobody.
async fn check_folder(welcome: &Welcome) -> Result<(), JobError> {
    let store = Store::open(&welcome.run_url).map_err(DataError::from)?;
    match witness::elsewhere(&store, welcome, "job").await {
        Ok(None) => Ok(()),
        Ok(Some(what)) => Err(JobError::of_this_machine(what)),
        Err(error) => Err(DataError::from(error).into()),
    }
}

/// How a worker ends that cannot do the job. If that is over, what the coordinator had written was taken away for that.
async fn unfit(link: &mut Link, error: JobError) -> Result<Ending, JobEnd> {
    match confess(link, &error).await {
        Some(over) if error.of_this_machine => ending(over),
        _ => Err(JobEnd::Unfit(error)),
    }
}

/// Tells the coordinator why this worker is of no use. Gives the job's outcome, if that was said before.
async fn confess(link: &mut Link, error: &JobError) -> Option<JobOver> {
    let failed = Failed { kind: FailureKind::Input.into(), message: error.message.clone(), permanent: error.permanent };
    farewell(link, from_worker::Body::Failed(failed)).await
}

/// A last word, and a moment until it has been heard: the coordinator answers by ending the stream.
async fn farewell(link: &mut Link, last: from_worker::Body) -> Option<JobOver> {
    say(link, last);
    last_word(link).await
}

/// How a stream ended.
pub(super) enum Served {
    /// The job's outcome.
    Over(JobOver),
    /// This worker was told to leave.
    Stopped,
    /// The stream broke.
    Lost(String),
    /// The stream stands, but nobody answers.
    Silent(Duration),
    /// This worker can do nothing more.
    Broken(JobError),
}

/// Does what one coordinator grants.
pub(super) async fn serve(link: &mut Link, hand: &mut Hand, stop: &CancellationToken) -> Served {
    let _beats = link.beating();
    let orphan = Duration::from_millis(link.welcome.orphan_ms);
    let silent = link.silent(orphan);
    tokio::pin!(silent);
    let mut ticks = interval(Duration::from_millis(link.welcome.heartbeat_ms.max(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = say(link, from_worker::Body::LeaseRequest(LeaseRequest { slots: hand.slots }));
    while heard {
        tokio::select! {
            biased;
            () = stop.cancelled() => {
                farewell(link, from_worker::Body::Finished(Finished { step: 0, outcome: Outcome::Preempted.into() })).await;
                return Served::Stopped;
            }
            ended = hand.next() => {
                let broken = ended.1.as_ref().err().filter(|error| error.breaks_the_worker).cloned();
                heard = hand.report(link, ended);
                if let Some(error) = broken {
                    // What else is in hand waits for others at once.
                    confess(link, &error).await;
                    return Served::Broken(error);
                }
            }
            message = link.incoming.next() => match message {
                None => return Served::Lost("its stream ended".to_owned()),
                Some(Err(status)) => return Served::Lost(status.message().to_owned()),
                Some(Ok(message)) => if let Some(over) = told(link.term, hand, message) {
                    return Served::Over(over);
                },
            },
            () = &mut silent => return Served::Silent(orphan),
            _ = ticks.tick() => heard = hand.renew(link),
        }
    }
    last_word(link).await.map_or_else(|| Served::Lost("it reads nothing".to_owned()), Served::Over)
}

/// The job's outcome, if that is what a coordinator said before it ended the stream: a worker that was busy then, or loading, has not read it.
async fn last_word(link: &mut Link) -> Option<JobOver> {
    let session = link.term;
    let over = async {
        while let Some(Ok(message)) = link.incoming.next().await {
            match message.body {
                Some(to_worker::Body::JobOver(over)) if message.term == session => return Some(over),
                _ => {}
            }
        }
        None
    };
    timeout(FAREWELL, over).await.ok().flatten()
}

/// Takes in a message; gives the job's outcome if that is what it says.
fn told(session: u64, hand: &mut Hand, message: ToWorker) -> Option<JobOver> {
    use to_worker::Body as B;
    match message.body {
        _ if message.term != session => tracing::warn!(message.term, "refused a message of another session"),
        Some(B::LeaseGrant(grant)) => hand.take(grant, session),
        Some(B::JobOver(over)) => return Some(over),
        Some(B::Abort(abort)) => return Some(JobOver { outcome: Outcome::Failed.into(), reason: abort.reason, permanent: false }),
        _ => tracing::warn!("the coordinator sent what makes no sense in a job"),
    }
    None
}

/// What an outcome means for this process.
pub(super) fn ending(over: JobOver) -> Result<Ending, JobEnd> {
    match over.outcome() {
        Outcome::Done => Ok(Ending::Done),
        Outcome::Preempted => {
            tracing::info!("the job was told to leave: {}", over.reason);
            Ok(Ending::Preempted)
        }
        Outcome::Failed | Outcome::Unspecified => Err(JobEnd::Failed { reason: over.reason, permanent: over.permanent }),
    }
}
