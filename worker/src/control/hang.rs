//! Whether this worker computes for far longer than ever before: in a call of the device that never returns, and no other rank waits for it to
//! tell of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many times the longest stretch before is no stretch any more.
const TIMES: u32 = 10;
/// Between two looks no more than this is counted: a process that was stopped did not compute.
const COUNTED: Duration = Duration::from_secs(1);

/// Stretches of computing: a lane of a step, all of one that a GPU has still to do, a part of drawing.
#[derive(Debug, Default)]
pub(super) struct Stretches(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Of the present one, when it was last looked at, and how much of it had been seen by then.
    present: Option<(Instant, Duration)>,
    /// The longest that has ended.
    longest: Duration,
    /// Whether that one says anything of those to come.
    warm: bool,
    limits: Option<Limits>,
}

impl State {
    /// How much of the present one is seen now.
    fn seen(&self, now: Instant) -> Option<Duration> {
        let (looked, seen) = self.present?;
        Some(seen + now.saturating_duration_since(looked).min(COUNTED))
    }
}

/// How long one may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Whatever the ones before took.
    least: Duration,
    /// While those before say nothing.
    first: Duration,
}

impl Stretches {
    /// From now on it is looked at how long they take.
    pub(super) fn limit(&self, least: Duration, first: Duration) {
        self.with(|state| state.limits = Some(Limits { least, first: first.max(least) }));
    }

    /// A whole step lies behind: no stretch to come is a first one, which sets up what the others use, and which none before is like.
    pub(super) fn warmed_up(&self) {
        self.with(|state| state.warm = true);
    }

    /// The present one has ended; another one begins, if one does.
    pub(super) fn next(&self, now: Instant, another: bool) {
        self.with(|state| {
            state.longest = state.longest.max(state.seen(now).unwrap_or_default());
            state.present = another.then_some((now, Duration::ZERO));
        });
    }

    /// Looks at the present one, which is to be done often. How long it has been seen to take, if that is too long.
    pub(super) fn look(&self, now: Instant) -> Option<Duration> {
        self.with(|state| {
            let seen = state.seen(now)?;
            state.present = Some((now, seen));
            let limits = state.limits?;
            let limit = if state.warm { limits.least.max(TIMES * state.longest) } else { limits.first };
            (seen > limit).then_some(seen)
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Watched(Stretches, Instant);

    impl Watched {
        /// One that may take 20 s, and 100 s before a step is applied.
        fn new() -> Self {
            let watched = Self(Stretches::default(), Instant::now());
            watched.0.limit(Duration::from_secs(20), Duration::from_secs(100));
            watched
        }

        fn warm() -> Self {
            let watched = Self::new();
            watched.0.warmed_up();
            watched
        }

        fn at(&self, seconds: u64) -> Instant {
            self.1 + Duration::from_secs(seconds)
        }

        fn next(&self, seconds: u64, another: bool) {
            self.0.next(self.at(seconds), another);
        }

        /// Looks each second, up to that one. The first at which it is too long, and how long it has taken then.
        fn look(&self, seconds: std::ops::RangeInclusive<u64>) -> Option<(u64, u64)> {
            seconds.into_iter().find_map(|second| Some((second, self.0.look(self.at(second))?.as_secs())))
        }
    }

    #[test]
    fn a_stretch_ten_times_as_long_as_any_before_is_too_long_but_not_a_short_one() {
        let unlimited = Watched(Stretches::default(), Instant::now());
        unlimited.next(0, true);
        assert_eq!(unlimited.look(1..=1_000), None, "nobody has said how long is too long");
        for (before, limit) in [(1, 20), (2, 20), (3, 30), (7, 70)] {
            let watched = Watched::warm();
            watched.next(0, true);
            assert_eq!(watched.look(1..=before), None);
            watched.next(before, false);
            assert_eq!(watched.look(1_000..=9_000), None, "it does not compute");
            watched.next(10_000, true);
            assert_eq!(watched.look(10_001..=10_999), Some((10_000 + limit + 1, limit + 1)));
        }
    }

    /// What a short stretch of the first step took says nothing of the next one, which may be the first to compute a lane.
    #[test]
    fn before_a_step_is_applied_each_may_take_as_long_as_the_first() {
        let watched = Watched::new();
        watched.0.next(watched.at(0), true);
        watched.0.next(watched.at(0) + Duration::from_millis(3), true);
        assert_eq!(watched.look(1..=100), None);
        assert_eq!(watched.look(101..=200), Some((101, 100)));
    }

    #[test]
    fn the_time_of_a_stop_is_not_counted_for_this_one_nor_for_those_after_it() {
        let watched = Watched::warm();
        watched.next(0, true);
        assert_eq!(watched.look(1..=10), None);
        assert_eq!(watched.look(5_000..=5_001), None);
        watched.next(6_000, true);
        // It was seen for 13 s.
        assert_eq!(watched.look(6_001..=7_000), Some((6_131, 131)));
    }
}
