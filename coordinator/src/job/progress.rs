//! How far a job is and how fast.

use crate::machine::Time;
use std::collections::VecDeque;

/// Rates are measured over so many milliseconds, or from the last change before, if that is longer ago.
const WINDOW: u64 = 60_000;
/// Values that come closer together than this are taken as one.
const GRAIN: u64 = 250;

/// The rate of a number that rises.
#[derive(Debug)]
pub(super) struct Rate {
    points: VecDeque<(Time, u64)>,
}

impl Rate {
    pub(super) fn new(now: Time) -> Self {
        Self { points: [(now, 0)].into() }
    }

    /// The number now.
    pub(super) fn note(&mut self, now: Time, value: u64) {
        if self.points.back().is_some_and(|(_, last)| value <= *last) {
            return;
        }
        let close = |at: usize| self.points.len().checked_sub(at).and_then(|at| self.points.get(at)).map(|(time, _)| now.since(*time));
        if self.points.len() > 1 && close(2).is_some_and(|since| since < GRAIN) {
            self.points.pop_back();
        }
        self.points.push_back((now, value));
        while self.points.get(1).is_some_and(|(time, _)| now.since(*time) >= WINDOW) {
            self.points.pop_front();
        }
    }

    /// Time in which there was nothing to measure does not count.
    pub(super) fn restart(&mut self, now: Time) {
        let value = self.points.back().map_or(0, |(_, value)| *value);
        self.points = [(now, value)].into();
    }

    pub(super) fn per_second(&self, now: Time) -> f64 {
        let (Some((from, first)), Some((_, last))) = (self.points.front(), self.points.back()) else { return 0.0 };
        let (rise, millis) = (last - first, now.since(*from));
        if rise == 0 || millis == 0 { 0.0 } else { rise as f64 * 1000.0 / millis as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_minute() {
        let mut rate = Rate::new(Time(0));
        assert_eq!(rate.per_second(Time(0)), 0.0);
        for second in 1..=200 {
            rate.note(Time(second * 1000), second * if second <= 100 { 10 } else { 20 });
        }
        assert_eq!(rate.per_second(Time(200_000)), 20.0);
        assert_eq!(rate.points.len(), 61);
        assert_eq!(rate.per_second(Time(260_000)), 10.0, "it falls while nothing comes");
    }

    #[test]
    fn slow_numbers_are_measured_from_the_last_change_and_fast_ones_take_little_room() {
        let mut rate = Rate::new(Time(0));
        for hour in 1..=3 {
            rate.note(Time(hour * 3_600_000), hour * 3600);
        }
        assert_eq!(rate.per_second(Time(3 * 3_600_000)), 1.0);
        for milli in 1..=100_000 {
            rate.note(Time(20_000_000 + milli), 20_000 + milli);
        }
        assert!(rate.points.len() as u64 <= WINDOW / GRAIN * 2, "{}", rate.points.len());
        assert!((rate.per_second(Time(20_100_000)) - 1000.0).abs() < 1.0, "{}", rate.per_second(Time(20_100_000)));
        rate.restart(Time(20_100_000));
        assert_eq!(rate.per_second(Time(20_200_000)), 0.0);
        rate.note(Time(20_200_000), 1_000_000);
        assert!(rate.per_second(Time(20_200_000)) > 0.0);
    }

    #[test]
    fn a_number_that_falls_and_rises_again_counts_once() {
        let mut rate = Rate::new(Time(0));
        for (second, value) in [(1, 10), (2, 4), (3, 10), (4, 12)] {
            rate.note(Time(second * 1000), value);
        }
        assert_eq!(rate.per_second(Time(4000)), 3.0);
    }
}
