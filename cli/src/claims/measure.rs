//! Comparisons of marks: means over prompts and trainings, and intervals by drawing both anew (bootstrap, percentiles).

use std::collections::{BTreeMap, BTreeSet};

use ella_model::rng::CounterRng;
use serde::Serialize;

use crate::dpg::Marks;

/// How often prompts and trainings are drawn anew.
const RESAMPLES: u64 = 2000;

/// What one set of pictures got.
#[derive(Debug)]
pub(super) struct Marked {
    pub(super) dense: Vec<Prompt>,
    pub(super) short: Vec<Prompt>,
}

/// What the pictures of one prompt got, and how many objects it is of.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) marks: Marks,
    pub(super) objects: u64,
}

/// What is counted of a prompt: the share of its questions that stand, or the answers of a category.
#[derive(Clone, Copy, Debug)]
enum Column<'a> {
    Score,
    Category(&'a str),
    /// The score of prompts with so many objects.
    Objects(u64),
}

impl Column<'_> {
    /// A sum and what to divide it by.
    fn of(self, Prompt { marks, objects }: &Prompt) -> (f64, f64) {
        match self {
            Self::Score => (marks.score, 1.0),
            Self::Category(name) => marks.categories.get(name).map_or((0.0, 0.0), |(yes, of)| (*yes as f64, *of as f64)),
            Self::Objects(asked) if *objects != asked => (0.0, 0.0),
            Self::Objects(_) => (marks.score, 1.0),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Score => "score".to_owned(),
            Self::Category(name) => name.to_owned(),
            Self::Objects(1) => "1 object".to_owned(),
            Self::Objects(objects) => format!("{objects} objects"),
        }
    }

    /// Per cent, over these prompts.
    fn mean<'m>(self, prompts: impl Iterator<Item = &'m Prompt>) -> f64 {
        let (sum, of) = prompts.map(|prompt| self.of(prompt)).fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        100.0 * sum / of
    }
}

/// Two sets of pictures by one count. Per cent.
#[derive(Debug, Serialize)]
pub(super) struct Compared {
    pub(super) name: String,
    /// Means over seeds.
    pub(super) before: f64,
    pub(super) after: f64,
    pub(super) difference: f64,
    /// 95 %: prompts and seeds drawn anew.
    pub(super) interval: [f64; 2],
}

/// A mean over trainings, and how far they are apart.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Spread {
    pub(super) mean: f64,
    /// The standard deviation; 0 of one.
    pub(super) deviation: f64,
}

impl Spread {
    /// None of no numbers.
    pub(super) fn of(numbers: &[f64]) -> Option<Self> {
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let square: f64 = numbers.iter().map(|one| (one - mean).powi(2)).sum();
        (!numbers.is_empty()).then(|| Self { mean, deviation: (square / (numbers.len().max(2) - 1) as f64).sqrt() })
    }
}

fn columns(prompts: &[Prompt]) -> Vec<Column<'_>> {
    let categories: BTreeSet<&str> = prompts.iter().flat_map(|prompt| prompt.marks.categories.keys().map(String::as_str)).collect();
    let objects: BTreeSet<u64> = prompts.iter().map(|prompt| prompt.objects).collect();
    let columns = std::iter::once(Column::Score).chain(categories.into_iter().map(Column::Category));
    columns.chain(objects.into_iter().map(Column::Objects)).collect()
}

/// What `after` has over `before`, seed by seed from the same noise, by everything that is counted.
pub(super) fn compare<'m>(before: &'m [Marked], after: &'m [Marked], of: impl Fn(&'m Marked) -> &'m Vec<Prompt>) -> Vec<Compared> {
    let pairs: Vec<(&[Prompt], &[Prompt])> = before.iter().zip(after).map(|(a, b)| (of(a).as_slice(), of(b).as_slice())).collect();
    let Some((first, _)) = pairs.first() else { return Vec::new() };
    let draws: Vec<Draw> = (0..RESAMPLES).map(|number| Draw::new(number, first.len(), pairs.len())).collect();
    let compared = |column: Column<'_>| {
        let mean = |side: &dyn Fn(usize) -> &'m [Prompt]| {
            (0..pairs.len()).map(|at| column.mean(side(at).iter())).sum::<f64>() / pairs.len() as f64
        };
        let (before, after) = (mean(&|at| pairs[at].0), mean(&|at| pairs[at].1));
        let mut drawn: Vec<f64> = draws.iter().map(|draw| draw.difference(column, &pairs)).filter(|value| value.is_finite()).collect();
        drawn.sort_by(f64::total_cmp);
        let at = |share: f64| drawn.get(((drawn.len().max(1) - 1) as f64 * share).round() as usize).copied().unwrap_or(f64::NAN);
        Compared { name: column.name(), before, after, difference: after - before, interval: [at(0.025), at(0.975)] }
    };
    columns(first).into_iter().map(compared).collect()
}

/// Prompts and seeds, drawn with replacement.
struct Draw {
    prompts: Vec<usize>,
    seeds: Vec<usize>,
}

impl Draw {
    fn new(number: u64, prompts: usize, seeds: usize) -> Self {
        let rng = CounterRng::new(number, "claims");
        let below = |position: u64, bound: usize| (rng.bits(position) % bound as u64) as usize;
        Self {
            prompts: (0..prompts as u64).map(|at| below(at, prompts)).collect(),
            seeds: (0..seeds as u64).map(|at| below(prompts as u64 + at, seeds)).collect(),
        }
    }

    fn difference(&self, column: Column<'_>, pairs: &[(&[Prompt], &[Prompt])]) -> f64 {
        let of = |prompts: &[Prompt]| column.mean(self.prompts.iter().filter_map(|at| prompts.get(*at)));
        let sum: f64 = self.seeds.iter().map(|seed| of(pairs[*seed].1) - of(pairs[*seed].0)).sum();
        sum / self.seeds.len() as f64
    }
}

/// The marks for dense prompts of several trainings, by everything that is counted, in per cent.
pub(super) fn spreads(marked: &[Marked]) -> BTreeMap<String, Spread> {
    let Some(first) = marked.first() else { return BTreeMap::new() };
    let spread = |column: Column<'_>| {
        let means: Vec<f64> = marked.iter().map(|marked| column.mean(marked.dense.iter())).collect();
        Spread::of(&means).map(|spread| (column.name(), spread))
    };
    columns(&first.dense).into_iter().filter_map(spread).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompts of which `right` of ten answers each are a yes.
    fn marked(right: u64, prompts: usize) -> Marked {
        let prompt = |at: usize| Prompt {
            marks: Marks {
                item: format!("p{at}"),
                score: right as f64 / 10.0,
                categories: BTreeMap::from([("entity".to_owned(), (right, 10))]),
            },
            objects: 1 + at as u64 % 2,
        };
        Marked { dense: (0..prompts).map(prompt).collect(), short: Vec::new() }
    }

    #[test]
    fn a_sure_difference_has_a_narrow_interval() {
        let (before, after) = ([marked(2, 20), marked(3, 20)], [marked(7, 20), marked(8, 20)]);
        let compared = compare(&before, &after, |marked| &marked.dense);
        let names: Vec<&str> = compared.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["score", "entity", "1 object", "2 objects"]);
        for one in compared {
            assert!((one.before - 25.0).abs() < 1e-9 && (one.after - 75.0).abs() < 1e-9 && (one.difference - 50.0).abs() < 1e-9, "{one:?}");
            assert!(one.interval.iter().all(|end| (end - 50.0).abs() < 1e-9), "{one:?}");
        }
    }

    #[test]
    fn seeds_that_differ_widen_it() {
        let (before, after) = ([marked(2, 20), marked(2, 20)], [marked(2, 20), marked(8, 20)]);
        let score = &compare(&before, &after, |marked| &marked.dense)[0];
        assert!((score.difference - 30.0).abs() < 1e-9 && score.interval[0] < 1.0 && score.interval[1] > 59.0, "{score:?}");
    }

    #[test]
    fn spreads_are_of_trainings() {
        let spread = spreads(&[marked(2, 4), marked(4, 4)])["score"];
        assert!((spread.mean - 30.0).abs() < 1e-9 && (spread.deviation - 200f64.sqrt()).abs() < 1e-9, "{spread:?}");
        assert_eq!(spreads(&[marked(2, 4)])["entity"].deviation, 0.0);
    }
}
