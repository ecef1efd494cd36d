//! What the planes of a worker share: flags that the step path looks at, and what it is freed by.

use super::ControlError;
use super::hang::Stretches;
use ella_proto::v1::Activity;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How often a wait for another thread looks whether it is over.
const LOOK: Duration = Duration::from_millis(50);

/// A generation of a term. They rise, in a term and from one to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Era {
    /// The coordinator's term.
    pub term: u64,
    /// The generation.
    pub generation: u64,
}

/// Flags that both planes share.
#[derive(Debug, Default)]
pub struct Flags {
    /// The run leaves: all ranks commit after the same step.
    pub drain: CancellationToken,
    /// This worker is to leave (SIGTERM). Its coordinator decides how; a job's units are given back.
    pub parting: CancellationToken,
    /// Steps or units are being done: from here on there is something to commit or to give back.
    pub working: AtomicBool,
    /// The last applied step, for heartbeats.
    pub step: AtomicU64,
    /// The step of the newest commit whose record stands.
    pub committed: AtomicU64,
    /// Bytes of samples that are made and wait for their step.
    pub feed_bytes: Arc<AtomicU64>,
    /// Messages of progress that were dropped because nobody read them.
    pub dropped_progress: AtomicU64,
    activity: AtomicI32,
    stretches: Stretches,
    /// Captions encoded so far, while the next step waits for more of them.
    encoding: Mutex<Option<u64>>,
    course: Mutex<Course>,
}

/// What is called to free a rank that waits for others.
type Free = Box<dyn Fn() + Send>;

/// What this worker is in, and what ends it.
#[derive(Default)]
struct Course {
    /// The run ended, or this worker's part in it.
    why: Option<ControlError>,
    /// The generation that this worker is in.
    current: Era,
    /// The newest one that the coordinator has ended.
    ended: Era,
    /// The newest one that the coordinator wants to end with a step.
    last_step: Era,
    /// A coordinator knows of it, and records its commits.
    attended: bool,
    free: Option<Free>,
}

impl std::fmt::Debug for Course {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { why, current, ended, last_step, attended, .. } = self;
        let mut course = f.debug_struct("Course");
        course.field("why", why).field("current", current).field("ended", ended).field("last_step", last_step).field("attended", attended);
        course.finish()
    }
}

impl Course {
    fn is_over(&self) -> bool {
        self.why.is_some() || self.ended >= self.current && self.ended != Era::default()
    }

    fn free_if_over(&self) {
        if let Some(free) = self.free.as_ref().filter(|_| self.is_over()) {
            free();
        }
    }
}

impl Flags {
    /// This worker enters a generation, at the coordinator's word.
    pub fn enter(&self, era: Era) {
        let mut course = self.course();
        (course.current, course.attended, course.free) = (era, true, None);
    }

    /// A coordinator of another term goes on with the generation.
    pub(super) fn adopt(&self, era: Era) {
        let mut course = self.course();
        (course.current, course.attended) = (era, true);
    }

    /// The coordinator is gone. The generation goes on, without commits.
    pub(super) fn unattended(&self) {
        self.course().attended = false;
    }

    /// The generation that this worker is in, or was in last.
    pub fn era(&self) -> Era {
        self.course().current
    }

    /// The term and generation under which commits are made; none while no coordinator knows this generation.
    pub fn attended(&self) -> Option<Era> {
        let course = self.course();
        course.attended.then_some(course.current)
    }

    /// The coordinator ends a generation: at once, or with the next step.
    pub fn end(&self, era: Era, at_boundary: bool) {
        let mut course = self.course();
        let which = if at_boundary { &mut course.last_step } else { &mut course.ended };
        *which = era.max(*which);
        course.free_if_over();
    }

    /// Calls `free` when the generation or the run is ended from outside: it frees a rank that waits in a collective. At once, if it has been.
    pub fn on_end(&self, free: Free) {
        let mut course = self.course();
        course.free = Some(free);
        course.free_if_over();
    }

    /// Whether the generation, or the run, has been ended from outside.
    pub fn interrupted(&self) -> bool {
        self.course().is_over()
    }

    /// Whether the next step is to be the generation's last.
    pub fn at_boundary(&self) -> bool {
        let course = self.course();
        course.last_step >= course.current && course.last_step != Era::default()
    }

    /// Ends this worker's part in the run. Only the first reason counts.
    pub(crate) fn stop(&self, why: ControlError) {
        let mut course = self.course();
        course.why.get_or_insert(why);
        course.free_if_over();
    }

    /// Why it was ended, if it was.
    pub fn stopped(&self) -> Option<ControlError> {
        self.course().why.clone()
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this rank is at, for heartbeats; of what it computes, each part anew.
    pub fn at(&self, activity: Activity) {
        self.activity.store(activity.into(), Ordering::Relaxed);
        self.stretches.next(Instant::now(), matches!(activity, Activity::Compute | Activity::Draw));
    }

    /// A step has been applied.
    pub fn applied(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
        self.stretches.warmed_up();
    }

    /// From now on a part that is computed for longer than `least`, and far longer than any before, is one that hangs; until this process has applied a
    /// step, one that is computed for longer than `first`.
    pub fn limit_computing(&self, least: Duration, first: Duration) {
        self.stretches.limit(least, first);
    }

    /// How long this rank has computed one part, if it hangs in it. To be asked twice a second or so.
    pub fn hangs(&self) -> Option<Duration> {
        self.stretches.look(Instant::now())
    }

    pub(super) fn activity(&self) -> i32 {
        self.activity.load(Ordering::Relaxed)
    }

    /// For heartbeats: how many captions are encoded, while the next step waits for more of them.
    pub(crate) fn encoding(&self, captions: Option<u64>) {
        *self.encoding.lock().unwrap_or_else(PoisonError::into_inner) = captions;
    }

    pub(super) fn encoded(&self) -> Option<u64> {
        *self.encoding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what another thread of this worker sends, but not for ever, and not beyond the end of the generation.
    pub fn receive<T>(&self, from: &Receiver<T>, patience: Duration) -> Result<T, RecvTimeoutError> {
        let begin = Instant::now();
        loop {
            let left = patience.saturating_sub(begin.elapsed());
            match from.recv_timeout(left.min(LOOK)) {
                Err(RecvTimeoutError::Timeout) if left > LOOK && !self.interrupted() => {}
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn era(term: u64, generation: u64) -> Era {
        Era { term, generation }
    }

    #[test]
    fn only_the_first_reason_counts_and_latecomers_are_told_at_once() {
        let flags = Flags::default();
        flags.stop(ControlError::Aborted { reason: "first".into(), permanent: false });
        flags.stop(ControlError::Released("second".into()));
        assert!(matches!(flags.stopped(), Some(ControlError::Aborted { reason, .. }) if reason == "first"));
        let called = Arc::new(AtomicBool::new(false));
        let flag = called.clone();
        flags.on_end(Box::new(move || flag.store(true, Ordering::Relaxed)));
        assert!(called.load(Ordering::Relaxed));
    }

    #[test]
    fn waits_for_other_threads_end_with_their_deadline_or_with_the_generation() {
        let flags = Flags::default();
        let (send, receive) = std::sync::mpsc::channel();
        assert_eq!(flags.receive(&receive, Duration::from_millis(1)), Err(RecvTimeoutError::Timeout));
        send.send(7).unwrap();
        flags.enter(era(1, 1));
        flags.end(era(1, 1), false);
        assert_eq!(flags.receive(&receive, Duration::from_secs(600)), Ok(7), "what is there is taken");
        let begin = Instant::now();
        assert_eq!(flags.receive(&receive, Duration::from_secs(600)), Err(RecvTimeoutError::Timeout));
        assert!(begin.elapsed() < Duration::from_secs(60));
        drop(send);
        assert_eq!(flags.receive(&receive, Duration::from_secs(600)), Err(RecvTimeoutError::Disconnected));
    }

    /// What is said of one generation neither ends the next nor is lost on one that is about to begin.
    #[test]
    fn a_generation_is_ended_by_what_is_said_of_it_or_of_a_later_one() {
        let flags = Flags::default();
        assert!(!flags.interrupted() && !flags.at_boundary());
        flags.enter(era(3, 2));
        for past in [era(3, 1), era(2, 9)] {
            flags.end(past, false);
            flags.end(past, true);
        }
        assert!(!flags.interrupted() && !flags.at_boundary());
        flags.end(era(3, 2), true);
        assert!(flags.at_boundary() && !flags.interrupted());
        flags.end(era(3, 3), false);
        assert!(flags.interrupted());
        flags.enter(era(3, 3));
        assert!(flags.interrupted(), "ended before it was entered");
        flags.enter(era(3, 4));
        assert!(!flags.interrupted() && !flags.at_boundary());
        // Another coordinator goes on with it under its own term.
        flags.unattended();
        assert_eq!(flags.attended(), None);
        flags.adopt(era(4, 4));
        flags.end(era(3, 9), false);
        assert_eq!((flags.interrupted(), flags.attended()), (false, Some(era(4, 4))));
        flags.end(era(4, 4), false);
        assert!(flags.interrupted());
    }
}
