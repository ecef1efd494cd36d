//! What this worker says to its coordinator, from any thread, whether there is one or not.

use super::flags::{Era, Flags};
use super::link::BACKLOG;
use ella_proto::v1::{Failed, Finished, FromWorker, Idle, Place, Progress, from_worker};
use from_worker::Body;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::Sender;

/// What this worker does in the run, as a coordinator must know it: the next one is told again.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Doing {
    /// It loads its models.
    #[default]
    Loading,
    /// It waits for a place, and says so like this.
    Idle(Idle),
    /// It is on its way into a generation.
    Starting,
    /// It is in a generation.
    Placed(Place),
    /// It has said farewell; if the next coordinator does not know of that, it waits for a place.
    Finished(Finished, Idle),
    /// It has failed, and only waits until that has been heard.
    Failed(Failed),
}

/// The way to the coordinator, if there is one.
#[derive(Debug, Default)]
struct Wire {
    out: Option<Sender<FromWorker>>,
    /// Of the coordinator at its other end.
    term: u64,
    /// The newest that it has spoken of.
    generation: u64,
    doing: Doing,
    /// The newest generation that it has given this worker a place in.
    assigned: Era,
    /// The newest steps that this worker has spoken of for all ranks: whoever comes next may not have them.
    spoken: VecDeque<Progress>,
}

/// Steps that are told again to the next coordinator. They must leave room in the queue.
const SPOKEN: usize = BACKLOG / 4;

/// Sends to the coordinator from any thread. Never waits (LIVE).
#[derive(Clone, Debug)]
pub struct Outbox {
    wire: Arc<Mutex<Wire>>,
    flags: Arc<Flags>,
}

impl Outbox {
    /// One that has no coordinator yet.
    pub fn new(flags: Arc<Flags>) -> Self {
        Self { wire: Arc::default(), flags }
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The flags of this worker.
    pub fn flags(&self) -> &Arc<Flags> {
        &self.flags
    }

    /// Sends a message of the generation `era` that must arrive, if its coordinator is there; another one would have no use for it.
    pub fn send(&self, era: Era, body: Body) {
        let wire = self.wire();
        if wire.term == era.term {
            self.put(&wire, era.generation, body);
        }
    }

    /// Sends progress, unless nobody reads it. What is said for all ranks is kept for the next coordinator: this one may not be there, or not live
    /// to write it down.
    pub fn progress(&self, progress: Progress) {
        let era = self.flags.era();
        let mut wire = self.wire();
        if progress.samples > 0 {
            // It goes on from an older state.
            while wire.spoken.back().is_some_and(|spoken| spoken.step >= progress.step) {
                wire.spoken.pop_back();
            }
            if wire.spoken.len() == SPOKEN {
                wire.spoken.pop_front();
            }
            wire.spoken.push_back(Progress { missed: true, ..progress.clone() });
        }
        let wire = &*wire;
        if let Doing::Placed(place) = &wire.doing
            && wire.out.is_some()
            && !offer(wire, era.generation.max(place.generation), Body::Progress(progress))
            && self.flags.dropped_progress.fetch_add(1, Ordering::Relaxed) == 0
        {
            tracing::warn!("the coordinator reads nothing: progress is dropped until it does");
        }
    }

    /// Sends what speaks of no generation and may be lost, while much room is left. False if it is.
    pub(super) fn offer(&self, body: Body) -> bool {
        let wire = self.wire();
        offer(&wire, wire.generation, body)
    }

    /// Sends what speaks of this worker, if there is a coordinator.
    pub(super) fn say(&self, body: Body) {
        let wire = self.wire();
        self.put(&wire, wire.generation, body);
    }

    /// A coordinator that leaves so many messages unread is given up.
    fn put(&self, wire: &Wire, generation: u64, body: Body) {
        let message = FromWorker { term: wire.term, generation, body: Some(body) };
        let Some(out) = &wire.out else { return };
        // A closed queue means that the stream has ended, which whoever serves it finds.
        if let Err(tokio::sync::mpsc::error::TrySendError::Full(_)) = out.try_send(message) {
            self.flags.stop(super::ControlError::Unread { messages: BACKLOG });
        }
    }

    /// Its generation is over, or its models are loaded: says so, now or to the next coordinator. Nothing if a new place has been given already.
    pub fn idle(&self, idle: Idle) {
        let era = self.flags.era();
        let mut wire = self.wire();
        // The next coordinator has not ended any generation.
        wire.doing = Doing::Idle(Idle { broken: String::new(), next_unreached: false, ..idle.clone() });
        if wire.assigned <= era {
            let generation = if era.term == wire.term { era.generation } else { wire.generation };
            self.put(&wire, generation, Body::Idle(idle));
        }
    }

    /// It has been given a place, and is on its way into it. A coordinator that goes meanwhile has no successor that knows of it.
    pub fn starting(&self) {
        self.wire().doing = Doing::Starting;
    }

    /// It has left the ring for good, and waits for a place like this unless its farewell is heard.
    pub fn done(&self, waits: Idle) {
        self.wire().doing = Doing::Idle(waits);
    }

    /// It is in a generation from here on.
    pub fn placed(&self, place: Place) {
        let mut wire = self.wire();
        if place.rank != 0 {
            // Another one speaks from here on, and what it tells again must not come before what is older.
            wire.spoken.clear();
        }
        let step = place.ready.as_ref().map_or(0, |ready| ready.step);
        wire.spoken.retain(|spoken| spoken.step <= step);
        wire.doing = Doing::Placed(place);
    }

    /// It has applied the run's last step, or the one at which the run leaves, under the coordinator of `era`: says farewell to that one. Another
    /// that has come since is told only that this worker waits, like this, for it knows of no commit: false.
    pub fn finished(&self, era: Era, finished: Finished, waits: Idle) -> bool {
        let mut wire = self.wire();
        if wire.out.is_some() && wire.term != era.term {
            wire.doing = Doing::Idle(waits.clone());
            self.put(&wire, wire.generation, Body::Idle(waits));
            return false;
        }
        wire.doing = Doing::Finished(finished, waits);
        self.put(&wire, era.generation, Body::Finished(finished));
        true
    }

    /// It cannot go on.
    pub fn failed(&self, failed: Failed) {
        let mut wire = self.wire();
        wire.doing = Doing::Failed(failed.clone());
        self.put(&wire, wire.generation, Body::Failed(failed));
    }

    /// What this worker does now.
    pub(super) fn doing(&self) -> Doing {
        let mut doing = self.wire().doing.clone();
        if let Doing::Placed(place) = &mut doing {
            let era = self.flags.era();
            (place.term, place.generation) = (era.term, era.generation);
            place.step = self.flags.step.load(Ordering::Relaxed);
        }
        doing
    }

    /// A coordinator has taken this worker in. What it did not hear of with the greeting, it is told now.
    pub(super) fn attach(&self, out: Sender<FromWorker>, era: Era) {
        let mut wire = self.wire();
        (wire.out, wire.term, wire.generation) = (Some(out), era.term, era.generation);
        if let Doing::Finished(_, idle) = wire.doing.clone() {
            wire.doing = Doing::Idle(idle);
        }
        match wire.doing.clone() {
            Doing::Idle(idle) => self.put(&wire, wire.generation, Body::Idle(idle)),
            Doing::Failed(failed) => self.put(&wire, wire.generation, Body::Failed(failed)),
            _ => {}
        }
        // Before any newer step: lines of the journal are in the order of the steps.
        for step in &wire.spoken {
            offer(&wire, wire.generation, Body::Progress(step.clone()));
        }
    }

    /// The coordinator is gone.
    pub(super) fn detach(&self) {
        let mut wire = self.wire();
        (wire.out, wire.term) = (None, 0);
        // Nor has a place that is still to be taken.
        if !matches!(wire.doing, Doing::Placed(_)) {
            self.flags.end(wire.assigned, false);
        }
    }

    /// The coordinator has spoken of this generation, and given this worker a place in it if `assigned`. False if it has spoken of a later one.
    pub(super) fn heard(&self, era: Era, assigned: bool) -> bool {
        let mut wire = self.wire();
        if era.term != wire.term || era.generation < wire.generation || assigned && era <= wire.assigned {
            return false;
        }
        wire.generation = era.generation;
        if assigned {
            wire.assigned = era;
        }
        true
    }
}

fn offer(wire: &Wire, generation: u64, body: Body) -> bool {
    let message = FromWorker { term: wire.term, generation, body: Some(body) };
    wire.out.as_ref().is_some_and(|out| out.capacity() > BACKLOG / 2 && out.try_send(message).is_ok())
}

#[cfg(test)]
pub(crate) fn unread() -> (Outbox, tokio::sync::mpsc::Receiver<FromWorker>) {
    let (out, queue) = tokio::sync::mpsc::channel(BACKLOG);
    let outbox = Outbox::new(Arc::default());
    outbox.attach(out, Era { term: 4, generation: 1 });
    outbox.flags.enter(Era { term: 4, generation: 1 });
    outbox.placed(Place { term: 4, generation: 1, ..Place::default() });
    (outbox, queue)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::ControlError;
    use std::sync::atomic::AtomicBool;

    const ERA: Era = Era { term: 4, generation: 1 };

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
        outbox.flags.on_end(Box::new(move || flag.store(true, Ordering::Relaxed)));
        for _ in 0..BACKLOG / 2 {
            outbox.send(ERA, Body::Finished(Finished::default()));
        }
        assert!(outbox.flags.stopped().is_none() && queue.len() == BACKLOG);
        outbox.send(ERA, Body::Finished(Finished::default()));
        assert!(matches!(outbox.flags.stopped(), Some(ControlError::Unread { messages: BACKLOG })));
        assert!(called.load(Ordering::Relaxed), "a rank that waits for others is freed");
    }

    fn said(queue: &mut tokio::sync::mpsc::Receiver<FromWorker>) -> Vec<(u64, u64, Body)> {
        std::iter::from_fn(|| queue.try_recv().ok()).map(|m| (m.term, m.generation, m.body.unwrap())).collect()
    }

    fn waits(step: u64, broken: &str) -> Idle {
        Idle { step: Some(step), broken: broken.into(), data_digest: "d".into(), ..Idle::default() }
    }

    fn idle(step: u64, broken: &str) -> Body {
        Body::Idle(waits(step, broken))
    }

    /// However the end of a generation and the change of coordinators fall together, each coordinator hears of it once, and of nothing else.
    #[test]
    fn a_generations_end_is_told_once_to_whoever_is_there() {
        let (outbox, mut first) = unread();
        outbox.idle(waits(7, "a peer is lost"));
        assert_eq!(said(&mut first), [(4, 1, idle(7, "a peer is lost"))]);

        // While nobody is there, the next one is told.
        let (outbox, mut first) = unread();
        outbox.detach();
        outbox.send(ERA, Body::Finished(Finished::default()));
        outbox.idle(waits(7, "a peer is lost"));
        assert_eq!(outbox.doing(), Doing::Idle(waits(7, "")), "so the greeting has no place");
        let (out, mut second) = tokio::sync::mpsc::channel(9);
        outbox.attach(out, Era { term: 5, generation: 0 });
        assert_eq!((said(&mut first), said(&mut second)), (vec![], vec![(5, 0, idle(7, ""))]));

        // It ends while the greeting is under way.
        let (outbox, _first) = unread();
        outbox.flags.step.store(9, Ordering::Relaxed);
        assert!(matches!(outbox.doing(), Doing::Placed(Place { term: 4, generation: 1, step: 9, .. })));
        let (out, mut second) = tokio::sync::mpsc::channel(9);
        outbox.detach();
        outbox.attach(out, Era { term: 5, generation: 1 });
        outbox.send(ERA, Body::Finished(Finished::default()));
        outbox.idle(waits(9, "timeout"));
        assert_eq!(said(&mut second), [(5, 1, idle(9, "timeout"))]);

        // A farewell that the last coordinator has not acted upon is none to the next.
        let (outbox, _first) = unread();
        outbox.finished(ERA, Finished { step: 10, outcome: 0 }, waits(10, ""));
        outbox.detach();
        let (out, mut second) = tokio::sync::mpsc::channel(9);
        outbox.attach(out, Era { term: 5, generation: 0 });
        assert_eq!(said(&mut second), [(5, 0, idle(10, ""))]);

        // Nor is one that comes when the next is there already.
        let (outbox, mut first) = unread();
        let (out, mut second) = tokio::sync::mpsc::channel(9);
        outbox.attach(out, Era { term: 5, generation: 1 });
        assert!(!outbox.finished(ERA, Finished { step: 10, outcome: 0 }, waits(10, "")));
        assert_eq!((said(&mut first), said(&mut second)), (vec![], vec![(5, 1, idle(10, ""))]));
    }

    /// It may fail before its stream is served.
    #[test]
    fn a_failure_is_told_to_whoever_comes_first() {
        let outbox = Outbox::new(Arc::default());
        let failed = Failed { message: "no such model".into(), ..Failed::default() };
        outbox.failed(failed.clone());
        let (out, mut queue) = tokio::sync::mpsc::channel(9);
        outbox.attach(out, Era { term: 5, generation: 2 });
        assert_eq!(said(&mut queue), [(5, 2, Body::Failed(failed))]);
    }

    /// KNOWN: steps that are applied while nobody listens, or whoever did has not written down, are told to the next coordinator before any other.
    #[test]
    fn the_next_coordinator_is_told_of_the_last_steps_again() {
        let step = |step: u64, samples: u64| Progress { step, samples, ..Progress::default() };
        let told = |queue: &mut _| -> Vec<_> {
            let steps = said(queue).into_iter().map(|(term, _, body)| match body {
                Body::Progress(progress) => (term, progress.step, progress.missed),
                other => panic!("{other:?}"),
            });
            steps.collect()
        };
        let (outbox, mut first) = unread();
        outbox.progress(step(1, 4));
        outbox.detach();
        outbox.progress(step(2, 4));
        let (out, mut second) = tokio::sync::mpsc::channel(BACKLOG);
        outbox.attach(out, Era { term: 5, generation: 1 });
        outbox.progress(step(3, 4));
        assert_eq!((told(&mut first), told(&mut second)), (vec![(4, 1, false)], vec![(5, 1, true), (5, 2, true), (5, 3, false)]));

        // What is only of this rank's time is not, nor what another rank speaks of from here on.
        outbox.placed(Place { rank: 1, ..Place::default() });
        outbox.progress(step(4, 0));
        outbox.detach();
        let (out, mut third) = tokio::sync::mpsc::channel(BACKLOG);
        outbox.attach(out, Era { term: 6, generation: 2 });
        assert_eq!(told(&mut third), []);

        // So many at most, the newest.
        outbox.placed(Place::default());
        outbox.detach();
        (1..=2 * SPOKEN as u64).for_each(|number| outbox.progress(step(number, 4)));
        let (out, mut fourth) = tokio::sync::mpsc::channel(BACKLOG);
        outbox.attach(out, Era { term: 7, generation: 2 });
        let steps = told(&mut fourth);
        assert_eq!((steps.len(), steps[0], steps[SPOKEN - 1]), (SPOKEN, (7, SPOKEN as u64 + 1, true), (7, 2 * SPOKEN as u64, true)));
    }

    /// The next coordinator would wait for ranks that never begin.
    #[test]
    fn a_generation_that_not_all_are_ready_for_ends_with_its_coordinator() {
        let (outbox, _first) = unread();
        assert!(outbox.heard(ERA, true) && !outbox.heard(ERA, true), "a place is given once");
        outbox.starting();
        outbox.detach();
        assert!(outbox.flags.interrupted() && !matches!(outbox.doing(), Doing::Placed(_)));
        let (outbox, _first) = unread();
        outbox.detach();
        assert!(!outbox.flags.interrupted() && matches!(outbox.doing(), Doing::Placed(_)));
    }

    #[test]
    fn a_place_that_was_given_already_is_not_answered_by_idle() {
        let (outbox, mut queue) = unread();
        assert!(outbox.heard(Era { term: 4, generation: 2 }, true));
        assert!(!outbox.heard(Era { term: 4, generation: 1 }, false) && !outbox.heard(Era { term: 3, generation: 9 }, false));
        outbox.idle(waits(7, ""));
        assert_eq!(said(&mut queue), []);
    }
}
