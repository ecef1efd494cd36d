//! Which processes of a run are started again when they have ended, and after which pause. Nothing here starts one.

use std::process::ExitStatus;
use std::time::Duration;

use crate::ui::{DONE, NO_RETRY, PREEMPTED, USAGE};

/// Restarts of one place in a row that bring the run no step further; then the place stays empty.
pub(super) const MOST: u32 = 5;
/// The pause before the first of them; each later one is twice as long. It is longer than a run that is over takes to be seen to be.
const PAUSE: Duration = Duration::from_millis(500);

/// What becomes of a place whose process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// It is filled again after this pause.
    Again(Duration),
    /// Its process has left in good order.
    Left,
    /// It stays empty: that would happen again, or the run is being left, or nothing is to be started again.
    Empty,
    /// It stays empty: it was filled again too often for nothing.
    GivenUp,
}

/// One process's place.
#[derive(Clone, Debug, Default)]
struct Place {
    /// The run's step when its process last ended.
    step: u64,
    /// Restarts since that step was reached.
    in_a_row: u32,
    restarts: u32,
}

/// The places of all processes, in their order.
#[derive(Debug)]
pub(super) struct Places {
    places: Vec<Place>,
    /// The first is the coordinator's.
    owned: bool,
    /// Nothing is started again.
    fixed: bool,
    leaving: bool,
}

impl Places {
    pub(super) fn new(count: usize, owned: bool, fixed: bool) -> Self {
        Self { places: vec![Place::default(); count], owned, fixed, leaving: false }
    }

    /// Whether it is the coordinator's.
    pub(super) fn is_coordinator(&self, at: usize) -> bool {
        self.owned && at == 0
    }

    /// The run was asked to leave: workers are not started again. A coordinator is, as it has to see the others off.
    pub(super) fn leave(&mut self) {
        self.leaving = true;
    }

    /// Nothing is started again from now on.
    pub(super) fn fix(&mut self) {
        self.fixed = true;
    }

    /// How often they were filled again.
    pub(super) fn restarts(&self) -> u32 {
        self.places.iter().map(|place| place.restarts).sum()
    }

    /// A process has ended; the run was last seen in this phase and at this step.
    pub(super) fn ended(&mut self, at: usize, status: ExitStatus, phase: &str, step: u64) -> Then {
        let code = status.code().map(|code| u8::try_from(code).unwrap_or(u8::MAX));
        if !self.is_coordinator(at) && matches!(code, Some(DONE | PREEMPTED)) {
            return Then::Left;
        }
        // A coordinator's own exit code is the run's end. Of a worker's, these two say that another would not do better.
        let ended_itself = if self.is_coordinator(at) { code.is_some() } else { matches!(code, Some(USAGE | NO_RETRY)) };
        if ended_itself || !self.may_start(at, phase) {
            return Then::Empty;
        }
        let place = &mut self.places[at];
        if step > place.step {
            (place.step, place.in_a_row) = (step, 0);
        }
        if place.in_a_row == MOST {
            return Then::GivenUp;
        }
        place.in_a_row += 1;
        Then::Again(PAUSE * (1 << (place.in_a_row - 1)))
    }

    /// Whether a process may be started there again, now that the run is in this phase.
    pub(super) fn may_start(&self, at: usize, phase: &str) -> bool {
        let over = match phase {
            "preempted" | "failed" => true,
            // A coordinator says so itself, by its exit code.
            "done" => !self.is_coordinator(at),
            _ => self.leaving && !self.is_coordinator(at),
        };
        !self.fixed && !over
    }

    /// A process was started there again. Gives how often that has been.
    pub(super) fn started(&mut self, at: usize) -> u32 {
        self.places[at].restarts += 1;
        self.places[at].restarts
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn killed() -> ExitStatus {
        ExitStatus::from_raw(libc::SIGKILL)
    }

    fn code(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    /// A coordinator and two workers.
    fn whole() -> Places {
        Places::new(3, true, false)
    }

    #[test]
    fn pauses_grow_until_the_place_is_given_up() {
        let mut places = whole();
        let then: Vec<Then> = (0..7).map(|_| places.ended(1, killed(), "training", 9)).collect();
        let pauses = [500, 1000, 2000, 4000, 8000].map(|ms| Then::Again(Duration::from_millis(ms)));
        assert_eq!((&then[..5], &then[5..]), (&pauses[..], &[Then::GivenUp; 2][..]));
        assert_eq!(places.ended(2, code(1), "training", 9), pauses[0], "each place counts for itself");
    }

    #[test]
    fn a_step_further_makes_good_for_all_before() {
        let mut places = whole();
        for _ in 0..MOST {
            places.ended(1, killed(), "training", 9);
        }
        assert_eq!(places.ended(1, killed(), "training", 10), Then::Again(PAUSE));
        // A coordinator that has just come back begins at the last commit's step.
        assert_eq!(places.ended(1, killed(), "waiting", 4), Then::Again(2 * PAUSE));
    }

    #[test]
    fn workers_come_back_from_what_may_pass() {
        let mut places = whole();
        let mut then = |status| places.ended(1, status, "training", 0);
        assert_eq!([0, 3].map(|n| then(code(n))), [Then::Left; 2]);
        assert_eq!([2, 4].map(|n| then(code(n))), [Then::Empty; 2]);
        // 101: a panic.
        assert!([code(1), code(101), killed()].into_iter().all(|status| matches!(then(status), Then::Again(_))));
    }

    #[test]
    fn a_coordinator_comes_back_only_if_it_was_killed() {
        let mut places = whole();
        assert_eq!([0, 1, 3, 4].map(|n| places.ended(0, code(n), "training", 0)), [Then::Empty; 4]);
        assert_eq!(places.ended(0, killed(), "training", 0), Then::Again(PAUSE));
        assert_eq!(places.ended(0, killed(), "failed", 0), Then::Empty);
        assert!(matches!(places.ended(0, killed(), "done", 0), Then::Again(_)), "it says by its exit code that the run is done");
    }

    #[test]
    fn nothing_comes_back_to_a_run_that_is_over_or_left() {
        let mut places = whole();
        for phase in ["done", "preempted", "failed"] {
            assert_eq!(places.ended(1, killed(), phase, 0), Then::Empty, "{phase}");
        }
        places.leave();
        assert_eq!(places.ended(1, killed(), "draining", 0), Then::Empty);
        assert_eq!(places.ended(0, killed(), "draining", 0), Then::Again(PAUSE), "it has to see the others off");
        places.fix();
        assert_eq!(places.ended(0, killed(), "draining", 0), Then::Empty);
        assert_eq!(Places::new(1, false, true).ended(0, killed(), "training", 0), Then::Empty);
    }

    #[test]
    fn restarts_are_counted() {
        let mut places = whole();
        assert_eq!((places.started(1), places.started(1), places.started(0), places.restarts()), (1, 2, 1, 3));
    }
}
