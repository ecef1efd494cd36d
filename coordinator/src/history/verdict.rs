//! Where each rank's time goes; who waits for whom, and for what.
//!
//! All ranks of a step meet in its all-reduce: who comes first waits longest, and who comes last waits for the transfer only. So the rank that waits
//! least is the one that the others wait for, and what it needs more of than they do is the reason.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::core::RankTiming;
use crate::status::PartsReport;

/// Seconds of one step, by what they were spent on.
type Parts = BTreeMap<String, f64>;

/// Sums that are kept: the newest.
const MOST: usize = 16_384;

/// Waits of less than this part of a step are no news.
const EVEN: f64 = 0.05;
/// Parts of a step that say what to do about them, from this much of it on.
const MUCH: f64 = 0.15;
/// What a rank does before it meets the others.
const OWN: [&str; 6] = ["data", "forward", "backward", "update", "commit", "draw"];

/// Where the mean step of a rank goes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Rank {
    /// The rank.
    pub rank: u32,
    /// Who it is.
    pub worker: String,
    /// Its machine.
    pub host: String,
    /// Over how many steps.
    pub steps: u64,
    /// Seconds of a step.
    pub seconds: f64,
    /// Seconds by part; `encode` and `reduce_hidden` run beside the step.
    pub parts: Parts,
    /// Seconds of each step that it waits for ranks that come later.
    pub waits: f64,
}

impl Rank {
    /// Seconds of one part.
    pub fn part(&self, name: &str) -> f64 {
        self.parts.get(name).copied().unwrap_or_default()
    }

    /// What no part accounts for.
    pub fn other(&self) -> f64 {
        let told: f64 = OWN.iter().chain(&["reduce"]).map(|part| self.part(part)).sum();
        (self.seconds - told).max(0.0)
    }
}

/// Sums over some steps of a rank, as `timing/` keeps them.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Timing {
    /// Of the coordinator that kept it.
    #[serde(skip)]
    pub term: u64,
    /// The rank, in its generation.
    pub rank: u32,
    /// Its generation.
    pub generation: u64,
    /// Who it is.
    pub worker: String,
    /// Its machine.
    pub host: String,
    /// The last of the steps.
    pub step: u64,
    /// How many.
    pub steps: u64,
    /// Seconds in all.
    pub seconds: f64,
    /// Seconds by part.
    pub parts: PartsReport,
}

impl Timing {
    /// As the core has it.
    pub fn of(term: u64, timing: &RankTiming) -> Self {
        let RankTiming { rank, generation, worker_id, host, step, steps, seconds, parts } = timing;
        Self {
            term,
            rank: *rank,
            generation: *generation,
            worker: worker_id.clone(),
            host: host.clone(),
            step: *step,
            steps: *steps,
            seconds: *seconds,
            parts: (*parts).into(),
        }
    }
}

/// The newest sums of all ranks.
#[derive(Clone, Debug, Default)]
pub struct Timings {
    lines: VecDeque<Timing>,
}

impl Timings {
    /// Takes in some steps of a rank. What an earlier generation told of steps that this one computes again does not count any more.
    pub fn add(&mut self, timing: Timing) {
        let (this, from) = ((timing.term, timing.generation), timing.step.saturating_sub(timing.steps));
        while self.lines.back().is_some_and(|last| (last.term, last.generation) < this && last.step > from) {
            self.lines.pop_back();
        }
        self.lines.push_back(timing);
        if self.lines.len() > MOST {
            self.lines.pop_front();
        }
    }

    /// Takes in all that came after.
    pub(super) fn append(&mut self, later: Self) {
        later.lines.into_iter().for_each(|line| self.add(line));
    }

    /// The newest step that was told of.
    pub fn newest(&self) -> Option<u64> {
        self.lines.iter().map(|timing| timing.step).max()
    }

    /// The steps at which sums end, in order: at most so many, the newest.
    pub fn windows(&self, most: usize) -> Vec<u64> {
        let mut steps: Vec<u64> = self.lines.iter().map(|timing| timing.step).collect();
        steps.sort_unstable();
        steps.dedup();
        steps.split_off(steps.len().saturating_sub(most))
    }

    /// Each rank's mean step over about the newest `most` steps until `until`, of the generation that was the newest then.
    pub fn ranks(&self, until: u64, most: u64) -> Vec<Rank> {
        let lines = || self.lines.iter().filter(|timing| timing.step <= until);
        let newest = lines().map(|timing| (timing.term, timing.generation)).max();
        let of_newest = || lines().filter(|timing| Some((timing.term, timing.generation)) == newest);
        let last = of_newest().map(|timing| timing.step).max().unwrap_or(0);
        let mut ranks = BTreeMap::<u32, Rank>::new();
        for timing in of_newest().filter(|timing| timing.step > last.saturating_sub(most)) {
            ranks.entry(timing.rank).or_insert_with(|| Rank::named(timing.rank, &timing.worker, &timing.host)).add(timing);
        }
        ranks.into_values().map(Rank::per_step).collect()
    }
}

impl Rank {
    /// One of which nothing is known yet.
    pub fn named(rank: u32, worker: &str, host: &str) -> Self {
        Self { rank, worker: worker.to_owned(), host: host.to_owned(), ..Self::default() }
    }

    /// One of which the newest step is known, by its parts only.
    pub fn of_step(self, parts: &PartsReport) -> Self {
        let parts: Parts = parts.named().map(|(part, seconds)| (part.to_owned(), seconds)).into();
        let seconds = OWN.iter().chain(&["reduce"]).filter_map(|part| parts.get(*part)).sum();
        Self { steps: 1, seconds, parts, ..self }
    }

    fn add(&mut self, timing: &Timing) {
        self.steps += timing.steps;
        self.seconds += timing.seconds;
        for (part, seconds) in timing.parts.named() {
            *self.parts.entry(part.to_owned()).or_default() += seconds;
        }
    }

    fn per_step(mut self) -> Self {
        let steps = self.steps.max(1) as f64;
        self.seconds /= steps;
        self.parts.values_mut().for_each(|seconds| *seconds /= steps);
        self
    }
}

/// Fills in what each rank waits for others, and says in one sentence what there is to say.
pub fn judge(ranks: &mut [Rank]) -> String {
    let Some(slowest) = ranks.iter().min_by(|a, b| a.part("reduce").total_cmp(&b.part("reduce"))).cloned() else {
        return "no rank has told of its steps yet: it does every 64 steps, and when the run ends".to_owned();
    };
    ranks.iter_mut().for_each(|rank| rank.waits = rank.part("reduce") - slowest.part("reduce"));
    let most = ranks.iter().map(|rank| rank.waits).fold(0.0, f64::max);
    let step = mean(ranks, |rank| rank.seconds);
    if most > EVEN * step { straggler(ranks, &slowest, most, step) } else { largest(ranks, step) }
}

fn mean(ranks: &[Rank], value: impl Fn(&Rank) -> f64) -> f64 {
    ranks.iter().map(value).sum::<f64>() / ranks.len().max(1) as f64
}

/// One rank keeps the others waiting: by what it spends more on than they do.
fn straggler(ranks: &[Rank], slowest: &Rank, most: f64, step: f64) -> String {
    let others: Vec<Rank> = ranks.iter().filter(|rank| rank.rank != slowest.rank).cloned().collect();
    let excess = |part: &&str| slowest.part(part) - mean(&others, |rank| rank.part(part));
    let part = OWN.into_iter().max_by(|a, b| excess(a).total_cmp(&excess(b))).unwrap_or("data");
    let (its, theirs) = (milliseconds(slowest.part(part)), milliseconds(mean(&others, |rank| rank.part(part))));
    format!(
        "others wait up to {} ms of each step ({:.0} %) for rank {} on {}: {} takes it {its} ms, and them {theirs}; {}",
        milliseconds(most),
        100.0 * most / step,
        slowest.rank,
        slowest.host,
        name(part),
        advice(part)
    )
}

/// The ranks are even: what most of the step is.
fn largest(ranks: &[Rank], step: f64) -> String {
    let parts: BTreeMap<&str, f64> = OWN.into_iter().chain(["reduce"]).map(|part| (part, mean(ranks, |rank| rank.part(part)))).collect();
    let of_step = |part: &str| parts.get(part).copied().unwrap_or_default() / step;
    let even = if ranks.len() > 1 { "no rank waits for another; " } else { "" };
    for part in ["data", "reduce", "commit", "draw"] {
        if of_step(part) > MUCH {
            return format!("{even}{:.0} % of a step is {}; {}", 100.0 * of_step(part), name(part), advice(part));
        }
    }
    let part = parts.iter().max_by(|a, b| a.1.total_cmp(b.1)).map_or("forward", |(part, _)| part);
    format!("{even}{:.0} % of a step is {}: it computes, and waits for nothing", 100.0 * of_step(part), name(part))
}

fn milliseconds(seconds: f64) -> String {
    let value = 1000.0 * seconds;
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

fn name(part: &str) -> &str {
    match part {
        "data" => "waiting for samples",
        "forward" => "the forward pass",
        "backward" => "the backward pass",
        "update" => "the optimizer's update",
        "commit" => "copying its state for a commit",
        "draw" => "drawing samples",
        "reduce" => "the all-reduce",
        other => other,
    }
}

fn advice(part: &str) -> &str {
    match part {
        "data" => {
            "if `encode` is large, embed first (text.features = \"cached\") and prepare with --latents; else look at its store and disk"
        }
        "reduce" => "use a faster network between the workers, or larger lanes (train.micro_batch)",
        "commit" => "commit less often (checkpoint.every, checkpoint.max_lost_work)",
        "draw" => "draw less often (sample.every), or fewer pictures in fewer steps (sample.prompts, sample.images, sample.steps)",
        "update" => "look at what else runs on its device",
        _ => "look at its device: what else runs there, its clock and its temperature",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(rank: u32, parts: &[(&str, f64)]) -> Rank {
        let parts: Parts = parts.iter().map(|(name, seconds)| ((*name).to_owned(), *seconds)).collect();
        let seconds = parts.iter().filter(|(name, _)| *name != "encode").map(|(_, seconds)| seconds).sum::<f64>() + 0.01;
        Rank { rank, host: format!("h{rank}"), steps: 64, seconds, parts, ..Rank::default() }
    }

    #[test]
    fn the_rank_that_others_wait_for_is_named_with_what_keeps_it() {
        let even = [("forward", 0.2), ("backward", 0.3), ("reduce", 0.45)];
        let slow = [("data", 0.4), ("forward", 0.2), ("backward", 0.3), ("reduce", 0.05)];
        let mut ranks = [rank(0, &even), rank(1, &slow), rank(2, &even)];
        let said = judge(&mut ranks);
        assert!(said.contains("rank 1 on h1") && said.contains("waiting for samples takes it 400 ms, and them 0.0"), "{said}");
        assert!(said.contains("400 ms of each step (42 %)"), "{said}");
        assert_eq!(ranks.iter().map(|rank| (rank.waits * 1000.0).round()).collect::<Vec<_>>(), [400.0, 0.0, 400.0]);
    }

    #[test]
    fn a_slow_device_is_told_by_its_passes() {
        let mut ranks = [
            rank(0, &[("forward", 0.5), ("backward", 0.9), ("reduce", 0.02)]),
            rank(1, &[("forward", 0.2), ("backward", 0.3), ("reduce", 0.92)]),
        ];
        let said = judge(&mut ranks);
        assert!(said.contains("rank 0") && said.contains("the backward pass takes it 900 ms, and them 300"), "{said}");
    }

    #[test]
    fn even_ranks_are_judged_by_what_most_of_the_step_is() {
        for (parts, words) in [
            ([("forward", 0.2), ("backward", 0.6), ("reduce", 0.02)], ["the backward pass", "waits for nothing"]),
            ([("data", 0.5), ("backward", 0.3), ("reduce", 0.02)], ["waiting for samples", "text.features"]),
            ([("backward", 0.3), ("update", 0.1), ("reduce", 0.4)], ["the all-reduce", "network"]),
            ([("backward", 0.3), ("commit", 0.4), ("reduce", 0.02)], ["a commit", "checkpoint.every"]),
            ([("backward", 0.3), ("draw", 0.4), ("reduce", 0.02)], ["drawing samples", "sample.every"]),
        ] {
            for world in [1, 3] {
                let mut ranks: Vec<Rank> = (0..world).map(|number| rank(number, &parts)).collect();
                let said = judge(&mut ranks);
                assert!(words.iter().all(|word| said.contains(word)), "{parts:?}: {said}");
                assert_eq!(said.starts_with("no rank waits"), world > 1);
                assert!(ranks.iter().all(|rank| rank.waits == 0.0));
            }
        }
        assert!(judge(&mut []).contains("yet"));
    }

    fn line(term: u64, generation: u64, rank: u32, step: u64, seconds: f64) -> Timing {
        let parts = PartsReport { forward: seconds / 2.0, ..PartsReport::default() };
        Timing { term, rank, generation, worker: format!("w{rank}"), host: "h".into(), step, steps: 64, seconds, parts }
    }

    #[test]
    fn the_newest_generation_counts_and_of_it_the_newest_steps() {
        let mut timings = Timings::default();
        for line in [
            line(1, 1, 0, 64, 900.0),
            line(2, 1, 0, 64, 640.0),
            line(2, 1, 0, 128, 64.0),
            line(2, 1, 1, 128, 128.0),
            line(2, 1, 0, 192, 192.0),
            line(2, 1, 1, 192, 128.0),
        ] {
            timings.add(line);
        }
        let seen = |until, most| -> Vec<_> {
            let ranks = timings.ranks(until, most);
            ranks.iter().map(|rank| (rank.rank, rank.steps, rank.seconds, rank.part("forward"))).collect()
        };
        assert_eq!(seen(u64::MAX, 100), [(0, 128, 2.0, 1.0), (1, 128, 2.0, 1.0)]);
        assert_eq!(seen(u64::MAX, 1000)[0].1, 192);
        assert_eq!(seen(128, 64), [(0, 64, 1.0, 0.5), (1, 64, 2.0, 1.0)], "as it was then");
        assert_eq!((timings.windows(2), timings.newest()), (vec![128, 192], Some(192)));
        assert!(Timings::default().ranks(u64::MAX, 10).is_empty());
    }

    #[test]
    fn steps_that_a_resume_undid_are_told_of_no_more() {
        let mut timings = Timings::default();
        [64, 128].into_iter().for_each(|step| timings.add(line(1, 1, 0, step, 64.0)));
        timings.add(Timing { steps: 22, ..line(2, 1, 0, 86, 22.0) });
        assert_eq!((timings.newest(), timings.windows(9)), (Some(86), vec![64, 86]));
        assert_eq!(timings.ranks(u64::MAX, 1024)[0].steps, 22);
    }

    #[test]
    fn a_thousand_ranks_keep_their_newest_steps() {
        let mut timings = Timings::default();
        for window in 1..=40 {
            (0..1000).for_each(|rank| timings.add(line(1, 1, rank, 64 * window, 64.0)));
        }
        assert!(timings.lines.len() <= MOST && timings.ranks(u64::MAX, 64).len() == 1000);
    }
}
