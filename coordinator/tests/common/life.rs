//! A fake worker's whole life: it obeys what it is told, and its steps cost nothing.

use super::ring::{Ring, Wishes};
use super::{Fake, Say, Served, Told, digest_of, hello, ready};
use ella_proto::config::RunConfig;
use ella_proto::v1;
use ella_store::Store;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// How often a worker without a coordinator looks for one.
const RETRY: Duration = Duration::from_millis(5);

/// How a fake worker is to train.
#[derive(Clone, Copy, Default)]
pub struct Script {
    /// Closes its stream, as if killed, after this step.
    pub dies_after: Option<u64>,
    /// Reports another state at this step.
    pub differs_at: Option<u64>,
    /// Saves and reports this commit's parts all but the record's last message.
    pub withholds_parts_of: Option<u64>,
}

/// How a fake worker ended.
#[derive(Debug, PartialEq)]
pub enum Ended {
    Finished,
    Aborted(String),
    Released(String),
    /// Told so when it came back.
    Over(v1::Outcome),
    /// Its stream ended, and it was to go nowhere else.
    CutOff,
    Died,
}

/// How a generation ended for a worker.
enum Left {
    Idle { broken: String },
    Ended(Ended),
}

/// A place in a generation.
struct Seat {
    ring: Arc<Ring>,
    generation: u64,
    term: u64,
    ready: v1::Ready,
    wishes: Wishes,
    finished: bool,
}

pub struct Life {
    fake: Fake,
    config: RunConfig,
    store: Store,
    script: Script,
    held: Option<u64>,
    /// Its stream stands.
    attached: bool,
    /// Where to go when the stream ends.
    coordinator: Option<watch::Receiver<String>>,
    /// What every rank says of a step; rank 0 alone speaks otherwise.
    tells: Option<fn(u64, u32) -> v1::Progress>,
    /// Takes no more steps than this.
    limit: watch::Receiver<u64>,
    _limit: watch::Sender<u64>,
    _beats: AbortOnDropHandle<()>,
}

/// Sends signs of life while the stream stands.
fn beating(fake: &Fake) -> AbortOnDropHandle<()> {
    let (out, term, every) = (fake.out.clone(), fake.term, Duration::from_millis(fake.welcome.heartbeat_ms));
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(every);
        loop {
            ticks.tick().await;
            let body = Some(Say::Heartbeat(v1::Heartbeat::default()));
            if out.send(v1::FromWorker { term, generation: 0, body }).await.is_err() {
                return;
            }
        }
    }))
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.ring.leave();
    }
}

impl Life {
    pub fn new(fake: Fake, config: &RunConfig, store: &Store, script: Script) -> Self {
        let (_limit, limit) = watch::channel(u64::MAX);
        let (config, store) = (config.clone(), store.clone());
        let _beats = beating(&fake);
        Self { fake, config, store, script, held: None, attached: true, coordinator: None, tells: None, limit, _limit, _beats }
    }

    /// Goes to where this says when its stream ends.
    pub fn that_returns(self, coordinator: watch::Receiver<String>) -> Self {
        Self { coordinator: Some(coordinator), ..self }
    }

    /// Takes no more steps than this says.
    pub fn up_to(self, limit: watch::Receiver<u64>) -> Self {
        Self { limit, ..self }
    }

    /// Says this of each step, whatever its rank.
    pub fn telling(self, tells: fn(u64, u32) -> v1::Progress) -> Self {
        Self { tells: Some(tells), ..self }
    }

    pub async fn live(mut self) -> Ended {
        let mut broken = String::new();
        loop {
            let left = match self.wait_for_a_place(std::mem::take(&mut broken)).await {
                Ok(assign) => self.take_part(assign).await,
                Err(ended) => Left::Ended(ended),
            };
            match left {
                Left::Idle { broken: why } => broken = why,
                Left::Ended(ended) => return ended,
            }
        }
    }

    async fn wait_for_a_place(&mut self, broken: String) -> Result<v1::Assign, Ended> {
        self.fake.say(Say::Idle(v1::Idle { step: self.held, broken, ..v1::Idle::default() })).await;
        loop {
            match self.fake.next().await {
                Some(Told::Assign(assign)) => return Ok(assign),
                Some(Told::Release(release)) => return Err(Ended::Released(release.reason)),
                Some(Told::Abort(abort)) => return Err(Ended::Aborted(abort.reason)),
                Some(Told::Regroup(_) | Told::Committed(_)) => {}
                None => {
                    self.return_without_place().await?;
                    self.fake.say(Say::Idle(v1::Idle { step: self.held, broken: String::new(), ..v1::Idle::default() })).await;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn return_without_place(&mut self) -> Result<(), Ended> {
        let Some(coordinator) = self.coordinator.clone() else { return Err(Ended::CutOff) };
        loop {
            let url = coordinator.borrow().clone();
            match Fake::try_attach(&url, v1::Hello { place: None, ..self.fake.hello.clone() }).await {
                Ok(Ok(fake)) => {
                    self._beats = beating(&fake);
                    (self.fake, self.attached) = (fake, true);
                    return Ok(());
                }
                Ok(Err(refused)) if refused.reason() == v1::RefusedReason::RunOver => return Err(Ended::Over(refused.outcome())),
                _ => tokio::time::sleep(RETRY).await,
            }
        }
    }

    async fn take_part(&mut self, assign: v1::Assign) -> Left {
        (self.fake.rank, self.fake.world) = (assign.rank, assign.world);
        self.held = Some(assign.step);
        let digest = if assign.source.is_some() { String::new() } else { digest_of(assign.step) };
        let ready = ready(assign.step, digest);
        let (generation, term) = (self.fake.generation, self.fake.term);
        let mut seat =
            Seat { ring: Ring::of(&assign.session), generation, term, ready: ready.clone(), wishes: Wishes::default(), finished: false };
        self.fake.say(Say::Ready(ready)).await;
        loop {
            match self.fake.next().await {
                Some(Told::Start(_)) => break,
                Some(told) => {
                    if let Some(left) = self.hear(&mut seat, told) {
                        return left;
                    }
                }
                None => return Left::Idle { broken: "its stream ended".into() },
            }
        }
        self.train(seat).await
    }

    /// Obeys; gives how the generation ends if it does.
    fn hear(&self, seat: &mut Seat, told: Told) -> Option<Left> {
        match told {
            Told::Regroup(regroup) if regroup.at_boundary => seat.wishes.boundary = true,
            Told::Regroup(_) => return Some(Left::Idle { broken: String::new() }),
            Told::Drain(_) => seat.wishes.drain = true,
            Told::Adopted(_) => seat.term = self.fake.term,
            // Whoever comes back is told to start, for it may not have heard so.
            Told::Committed(_) | Told::Start(_) => {}
            Told::Abort(abort) => return Some(Left::Ended(Ended::Aborted(abort.reason))),
            Told::Release(release) => return Some(Left::Ended(Ended::Released(release.reason))),
            other => panic!("{other:?}"),
        }
        None
    }

    async fn train(&mut self, mut seat: Seat) -> Left {
        let steps = self.config.train.steps;
        if self.held == Some(steps) {
            self.finish(&mut seat, v1::Outcome::Done).await;
        }
        let mut sum = None;
        loop {
            let step = self.held.unwrap_or_default();
            if self.script.dies_after == Some(step) {
                return Left::Ended(Ended::Died);
            }
            let waits = seat.finished || step >= steps.min(*self.limit.borrow_and_update());
            if !waits && sum.is_none() {
                let wishes = Wishes { no_commit: !self.attached || seat.term != self.fake.term, ..seat.wishes };
                let (ring, world) = (Arc::clone(&seat.ring), self.fake.world);
                sum = Some(Box::pin(async move { ring.sum(world, wishes).await }));
            }
            let told = tokio::select! {
                biased;
                told = self.fake.incoming.message(), if self.attached => told.ok().flatten(),
                sums = async { sum.as_mut().unwrap().await }, if sum.is_some() => {
                    sum = None;
                    let left = match sums {
                        Ok(wishes) => self.apply(&mut seat, wishes).await,
                        Err(broken) => Some(Left::Idle { broken }),
                    };
                    match left {
                        Some(left) => return left,
                        None => continue,
                    }
                }
                Ok(()) = self.limit.changed(), if waits => continue,
                // Training goes on, and a coordinator is looked for meanwhile.
                () = tokio::time::sleep(RETRY), if !self.attached => {
                    self.look_for_a_coordinator(&seat).await;
                    continue;
                }
            };
            match told {
                Some(message) => {
                    self.fake.term = message.term;
                    if let Some(left) = self.hear(&mut seat, message.body.unwrap()) {
                        return left;
                    }
                }
                None if seat.finished => return Left::Ended(Ended::Finished),
                None if self.coordinator.is_none() => return Left::Ended(Ended::CutOff),
                None => self.attached = false,
            }
        }
    }

    /// A step is taken.
    async fn apply(&mut self, seat: &mut Seat, wishes: Wishes) -> Option<Left> {
        let step = self.held.unwrap_or_default() + 1;
        self.held = Some(step);
        match self.tells {
            Some(tells) => self.fake.say(Say::Progress(tells(step, self.fake.rank))).await,
            None if self.fake.rank == 0 => self.fake.progress(step).await,
            None => {}
        }
        let last = step == self.config.train.steps;
        let due = self.config.checkpoint.steps().is_some_and(|every| step.is_multiple_of(every));
        if (last || wishes.drain) && !wishes.no_commit {
            self.finish(seat, if last { v1::Outcome::Done } else { v1::Outcome::Preempted }).await;
        } else if due && !wishes.no_commit {
            self.fake.commit(step, &self.store, self.script).await;
        }
        (wishes.boundary && !seat.finished).then_some(Left::Idle { broken: String::new() })
    }

    async fn finish(&mut self, seat: &mut Seat, outcome: v1::Outcome) {
        let step = self.held.unwrap_or_default();
        self.fake.commit(step, &self.store, self.script).await;
        self.fake.say(Say::Finished(v1::Finished { step, outcome: outcome.into() })).await;
        seat.finished = true;
    }

    async fn look_for_a_coordinator(&mut self, seat: &Seat) {
        let Some(url) = self.coordinator.as_ref().map(|url| url.borrow().clone()) else { return };
        let (rank, world, step) = (self.fake.rank, self.fake.world, self.held.unwrap_or_default());
        let place = v1::Place { term: seat.term, generation: seat.generation, rank, world, step, ready: Some(seat.ready.clone()) };
        let hello = v1::Hello { place: Some(place), ..self.fake.hello.clone() };
        if let Ok(Ok(fake)) = Fake::try_attach(&url, hello).await {
            self._beats = beating(&fake);
            // It speaks of its own generation, whatever the welcome was of.
            (self.fake, self.attached) = (Fake { rank, world, generation: seat.generation, ..fake }, true);
        }
    }
}

/// Two fakes that train to the end; how they ended.
pub async fn train_two(served: &Served, config: &RunConfig, store: &Store, scripts: [Script; 2]) -> [Ended; 2] {
    let [one, two] = scripts;
    let a = Fake::attach(served.access(), hello("a")).await.unwrap();
    let b = Fake::attach(served.access(), hello("b")).await.unwrap();
    let (a, b) = tokio::join!(a.train(config, store, one), b.train(config, store, two));
    [a, b]
}
