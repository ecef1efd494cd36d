//! Curves over a whole run in bounded memory: every level holds the newest buckets of its own width, and each level's are four times as
//! wide as those of the one before. A bucket keeps the least, the largest and the mean of what fell into it, so that no peak is lost.

use std::collections::VecDeque;

use super::Point;

/// Levels; the widest buckets hold 4^11 steps.
const LEVELS: usize = 12;
/// Buckets that a level keeps.
pub const MOST_BUCKETS: usize = 16_384;

/// The least, the largest and the mean of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The least.
    pub min: f32,
    /// The largest.
    pub max: f32,
    sum: f64,
    count: u32,
}

impl Default for Spread {
    fn default() -> Self {
        Self { min: f32::INFINITY, max: f32::NEG_INFINITY, sum: 0.0, count: 0 }
    }
}

impl Spread {
    /// Of one value; of none, if it is not finite.
    fn of(value: f64) -> Self {
        if !value.is_finite() {
            return Self::default();
        }
        Self { min: value as f32, max: value as f32, sum: value, count: 1 }
    }

    fn merge(&mut self, other: &Self) {
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.sum += other.sum;
        self.count = self.count.saturating_add(other.count);
    }

    /// The mean, if there is any value.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }
}

/// Some neighbouring steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bucket {
    /// Which: it holds the steps from `index * width` on.
    pub index: u64,
    /// How many steps were measured.
    pub steps: u32,
    /// When the last of them was applied, in milliseconds since 1970.
    pub end_ms: u64,
    /// Their samples.
    pub samples: u64,
    /// From the step before to the last of them, in milliseconds; time between terms is left out.
    pub millis: u64,
    /// The training loss.
    pub loss: Spread,
    /// The loss on held-out noise.
    pub held_out: Spread,
    /// The gradient's norm.
    pub grad_norm: Spread,
    /// The learning rate.
    pub lr: Spread,
    /// Seconds of a step, by the rank that reports.
    pub seconds: Spread,
}

impl Bucket {
    fn of(point: &Point, millis: u64) -> Self {
        Self {
            index: point.step,
            steps: 1,
            end_ms: point.at_unix_ms,
            samples: point.samples,
            millis,
            loss: Spread::of(point.loss.unwrap_or(f64::NAN)),
            held_out: Spread::of(point.held_out_loss.unwrap_or(f64::NAN)),
            grad_norm: Spread::of(point.grad_norm.unwrap_or(f64::NAN)),
            lr: Spread::of(point.lr.unwrap_or(f64::NAN)),
            seconds: Spread::of(point.step_seconds),
        }
    }

    fn merge(&mut self, other: &Self) {
        self.steps = self.steps.saturating_add(other.steps);
        self.end_ms = other.end_ms;
        self.samples = self.samples.saturating_add(other.samples);
        self.millis = self.millis.saturating_add(other.millis);
        self.loss.merge(&other.loss);
        self.held_out.merge(&other.held_out);
        self.grad_norm.merge(&other.grad_norm);
        self.lr.merge(&other.lr);
        self.seconds.merge(&other.seconds);
    }

    /// Its measurements as those of one step, of no known term.
    fn point(&self, step: u64) -> Point {
        Point {
            at_unix_ms: self.end_ms,
            step,
            samples: self.samples,
            loss: self.loss.mean(),
            held_out_loss: self.held_out.mean(),
            grad_norm: self.grad_norm.mean(),
            lr: self.lr.mean(),
            step_seconds: self.seconds.mean().unwrap_or_default(),
            ..Point::default()
        }
    }

    /// Samples a second, if any time passed.
    pub fn samples_per_second(&self) -> Option<f64> {
        (self.millis > 0).then(|| self.samples as f64 * 1000.0 / self.millis as f64)
    }
}

/// The newest buckets of one width.
#[derive(Clone, Debug, Default)]
struct Level {
    buckets: VecDeque<Bucket>,
    /// Whether older ones had to go.
    cut: bool,
}

impl Level {
    fn add(&mut self, bucket: Bucket) {
        match self.buckets.back_mut() {
            Some(last) if last.index == bucket.index => last.merge(&bucket),
            _ => self.buckets.push_back(bucket),
        }
        if self.buckets.len() > MOST_BUCKETS {
            self.buckets.pop_front();
            self.cut = true;
        }
    }

    /// Whether it has all there is from bucket `index` on.
    fn reaches(&self, index: u64) -> bool {
        !self.cut || self.buckets.front().is_some_and(|front| front.index <= index)
    }
}

/// Everything that is measured of a run's steps, by step.
#[derive(Clone, Debug)]
pub struct Curves {
    levels: Vec<Level>,
    first: Option<u64>,
    last: Option<Point>,
}

impl Default for Curves {
    fn default() -> Self {
        Self { levels: vec![Level::default(); LEVELS], first: None, last: None }
    }
}

/// Part of the curves, at one width.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Steps of each bucket.
    pub width: u64,
    /// In the order of their steps; those without a measurement are left out.
    pub buckets: Vec<Bucket>,
}

impl Curves {
    /// The first step that was measured.
    pub fn first_step(&self) -> Option<u64> {
        self.first
    }

    /// The newest measurement.
    pub fn last(&self) -> Option<&Point> {
        self.last.as_ref()
    }

    /// Takes in a step. One that was measured before is computed again: it and all later ones are as they are told now.
    pub fn add(&mut self, point: &Point) {
        if self.last.as_ref().is_some_and(|last| point.step <= last.step) {
            self.rewind(point.step);
        }
        let before = self.last.as_ref().filter(|last| last.term == point.term && last.at_unix_ms > 0 && last.at_unix_ms < point.at_unix_ms);
        let millis = before.map_or((point.step_seconds.max(0.0) * 1000.0).round() as u64, |last| point.at_unix_ms - last.at_unix_ms);
        let bucket = Bucket::of(point, millis);
        for (level, buckets) in self.levels.iter_mut().enumerate() {
            buckets.add(Bucket { index: point.step >> (2 * level), ..bucket.clone() });
        }
        self.first.get_or_insert(point.step);
        self.last = Some(point.clone());
    }

    /// Takes in all that came after.
    pub fn append(&mut self, later: Self) {
        let Some(first) = later.first else { return };
        if self.last.as_ref().is_some_and(|last| first <= last.step) {
            self.rewind(first);
        }
        for (mine, later) in self.levels.iter_mut().zip(later.levels) {
            mine.cut |= later.cut;
            later.buckets.into_iter().for_each(|bucket| mine.add(bucket));
        }
        self.first.get_or_insert(first);
        self.last = later.last;
    }

    /// Forgets all beyond `step`, of which nothing was measured anew yet.
    pub(super) fn undo(&mut self, step: u64) {
        if self.last.as_ref().is_none_or(|last| last.step <= step) {
            return;
        }
        self.rewind(step.saturating_add(1));
        // By the narrowest bucket that is left: of one step, unless more steps are undone than are kept one by one.
        let newest = |(level, Level { buckets, .. }): (usize, &Level)| {
            let bucket = buckets.back()?;
            Some(bucket.point((((bucket.index + 1) << (2 * level)) - 1).min(step)))
        };
        self.last = self.levels.iter().enumerate().find_map(newest);
    }

    /// Forgets `step` and all later ones. A bucket that lies across is made anew from the narrower ones, as far back as those reach.
    fn rewind(&mut self, step: u64) {
        for level in 0..LEVELS {
            let width = 1u64 << (2 * level);
            let Some((narrower, [buckets, ..])) = self.levels.split_at_mut_checked(level) else { return };
            while buckets.buckets.back().is_some_and(|last| last.index.saturating_mul(width) >= step) {
                buckets.buckets.pop_back();
            }
            let Some(narrower) = narrower.last() else { continue };
            let Some(across) = buckets.buckets.back_mut().filter(|last| last.index * width + width > step) else { continue };
            let from = across.index * 4;
            if !narrower.reaches(from) {
                continue;
            }
            let at = narrower.buckets.partition_point(|bucket| bucket.index < from);
            let mut left = narrower.buckets.range(at..).cloned();
            match left.next() {
                None => drop(buckets.buckets.pop_back()),
                Some(first) => {
                    *across = left.fold(Bucket { index: across.index, ..first }, |mut sum, bucket| {
                        sum.merge(&bucket);
                        sum
                    });
                }
            }
        }
        if self.first.is_some_and(|first| first >= step) {
            self.first = None;
        }
        self.last = None;
    }

    /// The steps from `from` to `to`, in `most` buckets or fewer, as narrow as they are kept.
    pub fn view(&self, from: u64, to: u64, most: usize) -> View {
        let most = most.max(1);
        let range = |level: usize| {
            let shift = 2 * level;
            let buckets = &self.levels[level].buckets;
            let start = buckets.partition_point(|bucket| bucket.index < from >> shift);
            start..buckets.partition_point(|bucket| bucket.index <= to >> shift).max(start)
        };
        let mut reaching = (0..LEVELS).filter(|level| self.levels[*level].reaches(from >> (2 * level)));
        let fits = |level: &usize| range(*level).len() <= 4 * most;
        let level = reaching.clone().find(fits).or(reaching.next_back()).unwrap_or(LEVELS - 1);
        let buckets = self.levels[level].buckets.range(range(level));
        let group = grouping(buckets.clone().map(|bucket| bucket.index), most);
        let mut view = View { width: group << (2 * level), buckets: Vec::new() };
        for bucket in buckets {
            let index = bucket.index / group;
            match view.buckets.last_mut() {
                Some(last) if last.index == index => last.merge(bucket),
                _ => view.buckets.push(Bucket { index, ..bucket.clone() }),
            }
        }
        view
    }

    /// The newest step that had been applied at this time: that before the first one, if none had.
    pub fn step_at(&self, unix_ms: u64) -> Option<u64> {
        let at = |level: &Level| level.buckets.partition_point(|bucket| bucket.end_ms <= unix_ms);
        let known = |level: &Level| !level.cut || at(level) > 0;
        let (shift, level) = self.levels.iter().enumerate().find(|(_, level)| known(level))?;
        let before = at(level).checked_sub(1).and_then(|at| level.buckets.get(at));
        let last = self.last.as_ref()?.step;
        Some(before.map_or_else(|| self.first.unwrap_or(1).saturating_sub(1), |bucket| (((bucket.index + 1) << (2 * shift)) - 1).min(last)))
    }

    /// Buckets that are held, of all widths.
    pub fn held(&self) -> usize {
        self.levels.iter().map(|level| level.buckets.len()).sum()
    }
}

/// How many neighbouring buckets must be taken together, so that these become no more than `most`.
fn grouping(indices: impl Iterator<Item = u64> + Clone, most: usize) -> u64 {
    let groups = |group: u64| {
        let mut before = None;
        indices.clone().filter(|index| before.replace(index / group) != Some(index / group)).count()
    };
    let mut group = (indices.clone().count() as u64).div_ceil(most as u64).max(1);
    while groups(group) > most {
        group += 1;
    }
    group
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn point(step: u64, loss: f64) -> Point {
        Point { term: 1, step, at_unix_ms: 1_000 + step * 10, samples: 4, loss: Some(loss), step_seconds: 0.01, ..Point::default() }
    }

    fn curves(points: &[Point]) -> Curves {
        let mut curves = Curves::default();
        points.iter().for_each(|point| curves.add(point));
        curves
    }

    /// What a view must be, from all points.
    fn check(view: &View, points: &[Point], from: u64, to: u64) {
        for bucket in &view.buckets {
            let (start, end) = (bucket.index * view.width, (bucket.index + 1) * view.width);
            let at = |step: u64| points.partition_point(|point| point.step < step);
            let within = &points[at(start)..at(end)];
            let losses: Vec<f64> = within.iter().filter_map(|point| point.loss).collect();
            // At the edges of the range only a part of a group may have been asked for.
            if start < from || end > to + 1 {
                continue;
            }
            assert_eq!(bucket.steps as usize, within.len(), "steps {start}..{end}");
            let (min, max) = losses.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), loss| (a.min(*loss), b.max(*loss)));
            assert_eq!((bucket.loss.min, bucket.loss.max), (min as f32, max as f32));
            let mean = losses.iter().sum::<f64>() / losses.len() as f64;
            assert!((bucket.loss.mean().unwrap() - mean).abs() <= 1e-9 * mean.abs().max(1.0));
        }
    }

    #[test]
    fn every_view_has_the_right_extremes_and_means_and_no_more_buckets_than_asked_for() {
        for seed in 0..4 {
            let mut random = Random::new(seed);
            let mut step = random.below(50);
            let points: Vec<Point> = (0..20_000)
                .map(|_| {
                    step += 1 + random.below(20) / 19;
                    point(step, random.below(1_000_000) as f64 / 1000.0)
                })
                .collect();
            let curves = curves(&points);
            for _ in 0..16 {
                let (from, most) = (random.below(step), 1 + random.below(1500) as usize);
                let to = from + random.below(step);
                let view = curves.view(from, to, most);
                assert!(view.buckets.len() <= most, "{} of {most}", view.buckets.len());
                assert!(view.buckets.windows(2).all(|pair| pair[0].index < pair[1].index));
                check(&view, &points, from, to);
            }
            assert!(curves.held() <= 12 * MOST_BUCKETS);
        }
    }

    #[test]
    fn a_million_steps_stay_small_and_keep_a_peak_of_one_step() {
        let mut curves = Curves::default();
        for step in 1..=1_000_000 {
            curves.add(&point(step, if step == 123_456 { 99.0 } else { 1.0 }));
        }
        let bytes = curves.held() * std::mem::size_of::<Bucket>();
        assert!(bytes < 16 << 20, "{bytes} bytes");
        let whole = curves.view(0, u64::MAX, 1000);
        assert!((250..=1000).contains(&whole.buckets.len()), "{}", whole.buckets.len());
        assert_eq!(whole.buckets.iter().map(|bucket| u64::from(bucket.steps)).sum::<u64>(), 1_000_000);
        assert_eq!(whole.buckets.iter().filter(|bucket| bucket.loss.max == 99.0).count(), 1);
        let near = curves.view(123_000, 124_000, 1000);
        assert!(near.width <= 64 && near.buckets.iter().any(|bucket| bucket.loss.max == 99.0), "{}", near.width);
        assert_eq!(curves.view(999_000, 1_000_000, 2000).width, 1, "the newest steps are there one by one");
        assert!(curves.view(0, u64::MAX, 1000).buckets.iter().all(|bucket| bucket.samples_per_second() == Some(400.0)));
    }

    #[test]
    fn steps_that_are_computed_again_count_once() {
        let mut random = Random::new(3);
        let mut points: Vec<Point> = Vec::new();
        let mut curves = Curves::default();
        for _ in 0..200 {
            let last = points.last().map_or(0, |point| point.step);
            let from = last.saturating_sub(random.below(3) * random.below(300)) + 1;
            points.retain(|point| point.step < from);
            for step in from..from + 100 {
                points.push(point(step, random.below(1000) as f64));
                curves.add(&points[points.len() - 1]);
            }
        }
        let last = points[points.len() - 1].step;
        for most in [1, 7, 100, 5000] {
            let view = curves.view(0, last, most);
            assert_eq!(view.buckets.iter().map(|bucket| bucket.steps as usize).sum::<usize>(), points.len());
            check(&view, &points, 0, last);
        }
    }

    #[test]
    fn what_was_before_and_what_comes_are_joined_as_if_they_had_come_in_order() {
        let points: Vec<Point> = (1..=30_000).map(|step| point(step, (step % 97) as f64)).collect();
        let whole = curves(&points);
        let mut joined = curves(&points[..20_000]);
        joined.append(curves(&points[19_000..]));
        for (from, to, most) in [(0, 40_000, 1000), (100, 900, 2000), (18_000, 21_000, 100), (29_000, 30_000, 2000)] {
            let (a, b) = (whole.view(from, to, most), joined.view(from, to, most));
            let seen = |view: &View| view.buckets.iter().map(|b| (b.index, b.steps, b.loss.min, b.loss.max)).collect::<Vec<_>>();
            assert_eq!((a.width, seen(&a)), (b.width, seen(&b)), "{from}..{to}");
        }
        assert_eq!(joined.last(), whole.last());
        joined.append(Curves::default());
        assert_eq!(joined.first_step(), Some(1));
    }

    #[test]
    fn numbers_that_are_not_finite_are_left_out_and_times_find_their_step() {
        let odd = Point { loss: None, held_out_loss: Some(f64::INFINITY), ..point(2, 0.0) };
        let curves = curves(&[point(1, 3.0), odd, point(3, 5.0)]);
        let all = curves.view(0, 10, 1);
        assert_eq!((all.buckets[0].steps, all.buckets[0].loss.mean(), all.buckets[0].held_out.mean()), (3, Some(4.0), None));
        // Who comes before the first step comes to a run at 0.
        assert_eq!([0, 1_015, 1_030, 9_999].map(|at| curves.step_at(at)), [Some(0), Some(1), Some(3), Some(3)]);
        assert_eq!(Curves::default().step_at(5), None);
        assert!(Curves::default().view(0, 9, 9).buckets.is_empty());
    }
}
