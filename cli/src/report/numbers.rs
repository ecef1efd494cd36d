//! The numbers that the page shows, from the steps' measurements. Nothing here reads a file.

use std::collections::BTreeMap;

use crate::run::Metric;

/// Points of a curve, left to right.
pub(super) type Curve = Vec<(f64, f64)>;

/// Most points of a drawn curve.
const POINTS: usize = 1200;
/// Most single points: more would hide the curves.
const DOTS: usize = 200;

/// A mean over the first and over the last tenth of the steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tenths {
    pub(super) first: f64,
    pub(super) last: f64,
}

impl Tenths {
    /// What is left of the first.
    pub(super) fn ratio(self) -> f64 {
        self.last / self.first
    }
}

/// Everything numeric.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Numbers {
    /// The newest step that was measured.
    pub(super) step: u64,
    pub(super) loss: Curve,
    pub(super) smooth: Curve,
    pub(super) held_out_points: Curve,
    pub(super) held_out: Option<Tenths>,
    pub(super) training: Option<Tenths>,
    /// Over steps.
    pub(super) throughput: Curve,
    /// Over all steps, without the time between terms.
    pub(super) samples_per_second: f64,
    /// Seconds in which steps were trained.
    pub(super) trained_seconds: f64,
    /// Mean seconds of a step by part, of the rank that reports; the largest first.
    pub(super) parts: Vec<(String, f64)>,
    /// Mean seconds of a step in the feeding thread, beside the step.
    pub(super) encode: f64,
    /// Mean seconds of a step in which gradients were summed beside the backward pass.
    pub(super) reduce_hidden: f64,
    /// Mean seconds of a step.
    pub(super) step_seconds: f64,
    /// What was skipped, by reason, and what was read through caches, by name (KNOWN).
    pub(super) skipped: BTreeMap<String, u64>,
}

/// Works all of it out. `metrics` are in the order of their steps, each once.
pub(super) fn of(metrics: &[Metric]) -> Numbers {
    let last = metrics.last().cloned().unwrap_or_default();
    let curve = |value: fn(&Metric) -> Option<f64>| -> Curve {
        metrics.iter().filter_map(|metric| Some((metric.step as f64, value(metric).filter(|v| v.is_finite())?))).collect()
    };
    let loss = curve(|metric| metric.loss);
    let held_out_points = curve(|metric| metric.held_out_loss);
    let smooth = thin(&smoothed(&loss, (loss.len() / 25).max(1)), POINTS);
    let (samples, seconds) = spans(metrics).fold((0.0, 0.0), |sum, span| (sum.0 + span.samples, sum.1 + span.seconds));
    let mut skipped = BTreeMap::new();
    for (reason, count) in metrics.iter().flat_map(|metric| metric.skipped.iter().chain(&metric.read)) {
        *skipped.entry(reason.clone()).or_default() += count;
    }
    let step_seconds = mean(metrics.iter().map(|metric| metric.step_seconds)).unwrap_or_default();
    let (parts, [encode, reduce_hidden]) = parts(metrics, step_seconds);
    Numbers {
        step: last.step,
        held_out: tenths(&held_out_points, last.step),
        training: tenths(&loss, last.step),
        loss: thin(&loss, POINTS),
        smooth,
        held_out_points: thin(&held_out_points, DOTS),
        throughput: throughput(metrics),
        samples_per_second: if seconds > 0.0 { samples / seconds } else { 0.0 },
        trained_seconds: seconds,
        parts,
        encode,
        reduce_hidden,
        step_seconds,
        skipped,
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// Means over the first and the last tenth of `steps`, where both have points.
fn tenths(points: &Curve, steps: u64) -> Option<Tenths> {
    let edge = steps as f64 / 10.0;
    let first = mean(points.iter().filter(|(step, _)| *step <= edge.max(1.0)).map(|(_, value)| *value))?;
    let last = mean(points.iter().filter(|(step, _)| *step > steps as f64 - edge.max(1.0)).map(|(_, value)| *value))?;
    Some(Tenths { first, last })
}

/// A running mean over `reach` points on either side, by sums that are kept: a long run has millions of points.
fn smoothed(points: &Curve, reach: usize) -> Curve {
    let mut sums = vec![0.0];
    sums.extend(points.iter().scan(0.0, |sum, (_, value)| {
        *sum += value;
        Some(*sum)
    }));
    let mean = |at: usize| {
        let (from, to) = (at.saturating_sub(reach), points.len().min(at + reach + 1));
        (sums[to] - sums[from]) / (to - from) as f64
    };
    points.iter().enumerate().map(|(at, (step, _))| (*step, mean(at))).collect()
}

/// Every so manieth point, so that a long run's page stays small; the last one stays.
fn thin(points: &Curve, most: usize) -> Curve {
    let stride = points.len().div_ceil(most).max(1);
    let last = points.len().saturating_sub(1);
    points.iter().enumerate().filter(|(at, _)| at % stride == 0 || *at == last).map(|(_, point)| *point).collect()
}

/// What was trained between two measurements of one term.
struct Span {
    step: f64,
    samples: f64,
    seconds: f64,
}

fn spans(metrics: &[Metric]) -> impl Iterator<Item = Span> + '_ {
    metrics.windows(2).filter(|pair| pair[0].term == pair[1].term).map(|pair| Span {
        step: pair[1].step as f64,
        samples: pair[1].samples as f64,
        seconds: pair[1].at_unix_ms.saturating_sub(pair[0].at_unix_ms) as f64 / 1000.0,
    })
}

/// Samples per second in pieces of equally many steps.
fn throughput(metrics: &[Metric]) -> Curve {
    let spans: Vec<Span> = spans(metrics).collect();
    let piece = (spans.len() / 100).max(4);
    let rate = |spans: &[Span]| {
        let (samples, seconds) = spans.iter().fold((0.0, 0.0), |sum, span| (sum.0 + span.samples, sum.1 + span.seconds));
        (seconds > 0.0).then(|| (spans[spans.len() / 2].step, samples / seconds))
    };
    spans.chunks(piece).filter_map(rate).collect()
}

/// Mean seconds by part, with what no part accounts for; and apart from them `encode` and `reduce_hidden`, which go on beside the step.
fn parts(metrics: &[Metric], step_seconds: f64) -> (Vec<(String, f64)>, [f64; 2]) {
    let measured: Vec<_> = metrics.iter().filter_map(|metric| metric.parts.as_ref()).collect();
    if measured.is_empty() {
        return (Vec::new(), [0.0; 2]);
    }
    let mut sums = BTreeMap::<String, f64>::new();
    for (name, seconds) in measured.iter().flat_map(|parts| parts.iter()) {
        *sums.entry(name.clone()).or_default() += seconds / measured.len() as f64;
    }
    let beside = ["encode", "reduce_hidden"].map(|name| sums.remove(name).unwrap_or_default());
    let rest = step_seconds - sums.values().sum::<f64>();
    let mut parts: Vec<(String, f64)> = sums.into_iter().filter(|(_, seconds)| *seconds > 0.0).collect();
    if rest > 0.0 {
        parts.push(("other".to_owned(), rest));
    }
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    (parts, beside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(term: u64, step: u64, at_unix_ms: u64, loss: f64) -> Metric {
        let parts = [("forward", 0.1), ("encode", 9.0), ("reduce_hidden", 7.0), ("commit", 0.0)];
        let parts = parts.into_iter().map(|(name, seconds)| (name.to_owned(), seconds)).collect();
        let held_out_loss = step.is_multiple_of(5).then_some(loss);
        Metric {
            term,
            at_unix_ms,
            step,
            samples: 4,
            loss: Some(loss),
            held_out_loss,
            step_seconds: 0.25,
            parts: Some(parts),
            ..Metric::default()
        }
    }

    #[test]
    fn tenths_are_means_over_the_first_and_the_last_steps() {
        let metrics: Vec<_> = (1..=100).map(|step| metric(1, step, 500 * step, if step <= 10 { 2.0 } else { 1.0 })).collect();
        let numbers = of(&metrics);
        assert_eq!(numbers.training, Some(Tenths { first: 2.0, last: 1.0 }));
        assert_eq!(numbers.held_out.unwrap().ratio(), 0.5);
        assert_eq!(numbers.samples_per_second, 8.0);
        assert!(numbers.throughput.iter().all(|(_, rate)| *rate == 8.0) && !numbers.throughput.is_empty());
    }

    #[test]
    fn the_time_between_terms_is_not_trained_time() {
        let metrics = [metric(1, 1, 0, 1.0), metric(1, 2, 1000, 1.0), metric(2, 3, 900_000, 1.0), metric(2, 4, 901_000, 1.0)];
        let numbers = of(&metrics);
        assert_eq!((numbers.trained_seconds, numbers.samples_per_second), (2.0, 4.0));
    }

    #[test]
    fn parts_add_up_to_the_step_and_what_goes_on_beside_it_stands_beside_it() {
        let numbers = of(&[metric(1, 1, 0, 1.0)]);
        assert_eq!(numbers.parts, [("other".to_owned(), 0.15), ("forward".to_owned(), 0.1)]);
        assert_eq!((numbers.encode, numbers.reduce_hidden), (9.0, 7.0));
    }

    #[test]
    fn numbers_that_are_not_finite_are_left_out_of_curves() {
        let mut odd = metric(1, 2, 0, 1.0);
        odd.loss = None;
        assert_eq!(of(&[metric(1, 1, 0, 1.0), odd]).loss, [(1.0, 1.0)]);
        assert_eq!(of(&[]), Numbers::default());
    }

    #[test]
    fn long_curves_are_thinned_and_keep_their_end() {
        let long: Curve = (0..10_000).map(|n| (f64::from(n), 0.0)).collect();
        let thinned = thin(&long, POINTS);
        assert!(thinned.len() <= POINTS + 1 && thinned.last() == long.last());
        let measured: Vec<_> = (1..=5_000).map(|step| metric(1, step, step, 1.0)).collect();
        assert!(of(&measured).held_out_points.len() <= DOTS + 1, "dots do not hide the curves");
    }

    #[test]
    fn a_running_mean_is_of_the_points_around_and_takes_no_longer_for_a_wide_reach() {
        let points: Curve = [1.0, 2.0, 6.0, 3.0].iter().enumerate().map(|(at, value)| (at as f64, *value)).collect();
        assert_eq!(smoothed(&points, 1), [(0.0, 1.5), (1.0, 3.0), (2.0, 11.0 / 3.0), (3.0, 4.5)]);
        // Means taken one by one would be 4 × 10¹⁰ sums.
        let long: Curve = (0..500_000).map(|n| (f64::from(n), 2.0)).collect();
        assert!(smoothed(&long, 40_000).iter().all(|(_, value)| (value - 2.0).abs() < 1e-9));
    }
}
