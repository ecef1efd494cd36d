//! Scores in per cent with 95 % intervals: prompts are drawn anew, with replacement, and the interval is that of the means in between
//! (bootstrap, percentiles). The draws come from a counter-based generator, so the same seed gives the same intervals.

use std::collections::BTreeMap;

use ella_model::rng::CounterRng;
use serde::Serialize;

use super::judged::{Judged, Tally};
use super::set::level1;

/// How often prompts are drawn anew, and from where on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resampling {
    pub(super) resamples: u32,
    pub(super) seed: u64,
}

/// A number with what it rests on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Estimate {
    /// Per cent.
    pub(super) value: f64,
    /// 2.5 % of the resamples lie below the first, and 2.5 % above the second. None if fewer than two prompts
    /// have a part in it: drawing the same one again and again tells nothing.
    pub(super) interval: Option<[f64; 2]>,
    /// How many prompts it is the mean of, or answers for a category.
    pub(super) of: u64,
}

/// All scores of a mode.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Scores {
    /// None if no prompt is in the mean.
    pub(super) score: Option<Estimate>,
    pub(super) level1: BTreeMap<String, Estimate>,
    pub(super) level2: BTreeMap<String, Estimate>,
}

impl Scores {
    pub(super) fn of(judged: &Judged<'_>, how: Resampling) -> Self {
        let sums = Sums::of(judged);
        let draws = sums.resampled(how);
        let estimate = |column: usize| {
            let parts: Vec<Fraction> = sums.rows.iter().flatten().filter(|(at, _)| *at == column).map(|(_, part)| *part).collect();
            let mut means: Vec<f64> = draws.iter().filter_map(|draw| draw[column].mean()).collect();
            means.sort_by(f64::total_cmp);
            let interval = (parts.len() > 1).then(|| Some([quantile(&means, 0.025)?, quantile(&means, 0.975)?])).flatten();
            let whole: Fraction = parts.into_iter().sum();
            whole.mean().map(|mean| Estimate {
                value: 100.0 * mean,
                interval: interval.map(|ends| ends.map(|end| 100.0 * end)),
                of: whole.of as u64,
            })
        };
        let named = |kind| {
            let columns = sums.columns.iter().enumerate().filter(move |(_, (k, _))| *k == kind);
            columns.filter_map(|(at, (_, name))| Some((name.clone(), estimate(at)?))).collect()
        };
        Self { score: estimate(0), level1: named(Kind::Level1), level2: named(Kind::Level2) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Score,
    Level1,
    Level2,
}

/// A sum and what to divide it by.
#[derive(Clone, Copy, Debug, Default)]
struct Fraction {
    sum: f64,
    of: f64,
}

impl Fraction {
    fn mean(self) -> Option<f64> {
        (self.of > 0.0).then(|| self.sum / self.of)
    }
}

impl std::iter::Sum for Fraction {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, part| Self { sum: sum.sum + part.sum, of: sum.of + part.of })
    }
}

impl From<Tally> for Fraction {
    fn from(tally: Tally) -> Self {
        Self { sum: tally.yes as f64, of: tally.of as f64 }
    }
}

/// What each prompt adds to each number.
#[derive(Debug)]
struct Sums {
    /// The score is the first.
    columns: Vec<(Kind, String)>,
    rows: Vec<Vec<(usize, Fraction)>>,
}

impl Sums {
    fn of(judged: &Judged<'_>) -> Self {
        let mut places: BTreeMap<(Kind, &str), usize> = BTreeMap::from([((Kind::Score, ""), 0)]);
        let mut rows = Vec::new();
        for prompt in &judged.prompts {
            let mut parts: BTreeMap<(Kind, &str), Fraction> =
                BTreeMap::from([((Kind::Score, ""), Fraction { sum: prompt.score, of: 1.0 })]);
            for (&level2, tally) in &prompt.categories {
                parts.insert((Kind::Level2, level2), (*tally).into());
                let above = parts.entry((Kind::Level1, level1(level2))).or_default();
                *above = [*above, (*tally).into()].into_iter().sum();
            }
            let row = parts.into_iter().map(|(key, part)| {
                let next = places.len();
                (*places.entry(key).or_insert(next), part)
            });
            rows.push(row.collect());
        }
        let mut columns = vec![(Kind::Score, String::new()); places.len()];
        places.into_iter().for_each(|((kind, name), at)| columns[at] = (kind, name.to_owned()));
        Self { columns, rows }
    }

    /// The sums of each resample.
    fn resampled(&self, how: Resampling) -> Vec<Vec<Fraction>> {
        let (random, n) = (CounterRng::new(how.seed, "dpg bootstrap"), self.rows.len() as u64);
        let draw = |resample: u64| {
            let mut sums = vec![Fraction::default(); self.columns.len()];
            for position in resample * n..(resample + 1) * n {
                let row = (u128::from(random.bits(position)) * u128::from(n)) >> 64;
                for (column, part) in &self.rows[row as usize] {
                    sums[*column].sum += part.sum;
                    sums[*column].of += part.of;
                }
            }
            sums
        };
        (0..u64::from(how.resamples)).map(draw).collect()
    }
}

/// The value below which a share of them lies, between the two nearest (numpy's default). They are in order.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let at = share * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted.get(at.floor() as usize)?, sorted.get(at.ceil() as usize)?);
    Some(low + (high - low) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::super::judged::Prompt;
    use super::*;

    const HOW: Resampling = Resampling { resamples: 2000, seed: 0 };

    /// Prompts of one tile and one question in each of these categories.
    fn judged(prompts: &[(f64, &[(&'static str, u64)])]) -> Judged<'static> {
        let prompt = |(score, categories): &(f64, &[(&'static str, u64)])| {
            let tally = |(name, yes): &(&'static str, u64)| (*name, Tally { yes: *yes, of: 1 });
            Prompt::new("a", vec![*score], categories.iter().map(tally).collect())
        };
        Judged { prompts: prompts.iter().map(prompt).collect(), absent: Vec::new() }
    }

    #[test]
    fn categories_of_the_first_level_are_means_over_answers() {
        let judged = judged(&[(1.0, &[("entity - whole", 1), ("entity - part", 0), ("global", 1)]), (0.0, &[("entity - whole", 1)])]);
        let scores = Scores::of(&judged, HOW);
        let values: Vec<_> = scores.level1.iter().map(|(name, e)| (name.as_str(), e.value, e.of)).collect();
        assert_eq!(values, [("entity", 100.0 * (2.0 / 3.0), 3), ("global", 100.0, 1)]);
        assert_eq!(scores.level2.keys().collect::<Vec<_>>(), ["entity - part", "entity - whole", "global"]);
        assert_eq!(scores.score.map(|e| (e.value, e.of)), Some((50.0, 2)));
    }

    #[test]
    fn intervals_are_those_of_the_normal_distribution_where_it_holds() {
        let prompts: Vec<(f64, &[(&str, u64)])> = (0..1000).map(|at| (f64::from(at % 2), &[][..])).collect();
        let judged = judged(&prompts);
        let [low, high] = Scores::of(&judged, HOW).score.unwrap().interval.unwrap();
        // 1.96 standard errors of 0.5 / √1000, and the noise of 2,000 resamples.
        let expected = 100.0 * 1.96 * 0.5 / 1000f64.sqrt();
        assert!((50.0 - low - expected).abs() < 0.25 && (high - 50.0 - expected).abs() < 0.25, "{low} {high} {expected}");
        assert_eq!(Scores::of(&judged, HOW).score.unwrap().interval, Some([low, high]), "the same seed, the same draws");
        assert_ne!(Scores::of(&judged, Resampling { seed: 1, ..HOW }).score.unwrap().interval, Some([low, high]));
    }

    #[test]
    fn of_one_prompt_there_is_no_interval_and_of_none_no_score() {
        let one = Scores::of(&judged(&[(0.5, &[("global", 1)])]), HOW);
        assert_eq!(one.score, Some(Estimate { value: 50.0, interval: None, of: 1 }));
        let shared = Scores::of(&judged(&[(0.5, &[("global", 1), ("entity", 0)]), (0.5, &[("entity", 1)])]), HOW);
        assert_eq!((shared.level1["global"].interval, shared.level1["entity"].interval), (None, Some([0.0, 100.0])));
        let none = Scores::of(&judged(&[]), HOW);
        assert!(none.score.is_none() && none.level1.is_empty() && none.level2.is_empty());
    }

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.5), Some(2.0));
        assert_eq!(quantile(&[0.0, 10.0], 0.975), Some(9.75));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
