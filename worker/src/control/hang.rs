//! Whether this worker computes for far longer than ever before: in a call of the device that never returns, and no other rank waits for it to
//! tell of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many times the longest stretch before is no stretch any more.
const TIMES: u32 = 10;
/// Between two looks no more than this is counted: a process that was stopped did not compute.
const COUNTED: Duration = Duration::from_secs(1);

/// Stretches of computing, each of a micro-batch or less.
#[derive(Debug, Default)]
pub(super) struct Stretches(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// When the present one began.
    began: Option<Instant>,
    /// When it was last looked at, and how much of it was seen then.
    looked: Option<(Instant, Duration)>,
    /// The longest that has ended.
    longest: Option<Duration>,
    limits: Option<Limits>,
}

/// How long one may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Whatever the ones before took.
    least: Duration,
    /// The first, which warms up and has none before it.
    first: Duration,
}

impl Stretches {
    /// From now on it is looked at how long they take.
    pub(super) fn limit(&self, least: Duration, first: Duration) {
        self.with(|state| state.limits = Some(Limits { least, first: first.max(least) }));
    }

    /// The present one has ended; another one begins, if one does.
    pub(super) fn next(&self, now: Instant, another: bool) {
        self.with(|state| {
            let took = state.began.map(|began| now.saturating_duration_since(began));
            (state.longest, state.began, state.looked) = (state.longest.max(took), another.then_some(now), None);
        });
    }

    /// Looks at the present one, which is to be done often. How long it has been seen to take, if that is too long.
    pub(super) fn look(&self, now: Instant) -> Option<Duration> {
        self.with(|state| {
            let (last, seen) = state.looked.or(state.began.map(|began| (began, Duration::ZERO)))?;
            let seen = seen + now.saturating_duration_since(last).min(COUNTED);
            state.looked = Some((now, seen));
            let limits = state.limits?;
            let limit = state.longest.map_or(limits.first, |longest| limits.least.max(TIMES * longest));
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
        fn at(&self, seconds: u64) -> Instant {
            self.1 + Duration::from_secs(seconds)
        }

        /// Looks each second, up to that one. The first at which it is too long, and how long it has taken then.
        fn look(&self, seconds: std::ops::RangeInclusive<u64>) -> Option<(u64, u64)> {
            seconds.into_iter().find_map(|second| Some((second, self.0.look(self.at(second))?.as_secs())))
        }
    }

    #[test]
    fn a_stretch_ten_times_as_long_as_any_before_is_too_long_but_not_a_short_one() {
        let unlimited = Watched(Stretches::default(), Instant::now());
        unlimited.0.next(unlimited.at(0), true);
        assert_eq!(unlimited.look(1..=1_000), None, "nobody has said how long is too long");
        let watched = Watched(Stretches::default(), Instant::now());
        watched.0.limit(Duration::from_secs(20), Duration::from_secs(100));
        watched.0.next(watched.at(1_000), true);
        watched.0.next(watched.at(1_002), false);
        assert_eq!(watched.look(1_003..=9_000), None, "it does not compute");
        for (begins, limit, takes) in [(10_000, 20, 3), (10_100, 30, 1), (10_200, 30, 1)] {
            watched.0.next(watched.at(begins), true);
            assert_eq!(watched.look(begins..=begins + 99), Some((begins + limit + 1, limit + 1)));
            watched.0.next(watched.at(begins + takes), false);
        }
    }

    #[test]
    fn the_first_may_take_longer_and_the_time_of_a_stop_is_not_counted() {
        let watched = Watched(Stretches::default(), Instant::now());
        watched.0.limit(Duration::from_secs(20), Duration::from_secs(100));
        watched.0.next(watched.at(0), true);
        assert_eq!(watched.look(0..=90), None);
        assert_eq!(watched.look(5_000..=5_009), None);
        assert_eq!(watched.look(5_010..=6_000), Some((5_010, 101)));
    }
}
