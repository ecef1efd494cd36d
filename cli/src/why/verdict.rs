//! Who waits for whom, and for what, from sums over the ranks' steps. Nothing here reads a file.
//!
//! All ranks of a step meet in its all-reduce: who comes first waits longest, and who comes last waits for the transfer only. So the rank that waits
//! least is the one that the others wait for, and what it needs more of than they do is the reason.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::run::Parts;

/// Waits of less than this part of a step are no news.
const EVEN: f64 = 0.05;
/// Parts of a step that say what to do about them, from this much of it on.
const MUCH: f64 = 0.15;
/// What a rank does before it meets the others.
const OWN: [&str; 6] = ["data", "forward", "backward", "update", "commit", "draw"];

/// Where the mean step of a rank goes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Rank {
    pub(super) rank: u32,
    pub(super) worker: String,
    pub(super) host: String,
    /// Over how many steps.
    pub(super) steps: u64,
    /// Seconds of a step.
    pub(super) seconds: f64,
    /// Seconds by part; `encode` and `reduce_hidden` run beside the step.
    pub(super) parts: Parts,
    /// Seconds of each step that it waits for ranks that come later.
    pub(super) waits: f64,
}

impl Rank {
    pub(super) fn part(&self, name: &str) -> f64 {
        self.parts.get(name).copied().unwrap_or_default()
    }

    /// What no part accounts for.
    pub(super) fn other(&self) -> f64 {
        let told: f64 = OWN.iter().chain(&["reduce"]).map(|part| self.part(part)).sum();
        (self.seconds - told).max(0.0)
    }
}

/// Fills in what each rank waits for others, and says in one sentence what there is to say.
pub(super) fn of(ranks: &mut [Rank]) -> String {
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
        let said = of(&mut ranks);
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
        let said = of(&mut ranks);
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
                let said = of(&mut ranks);
                assert!(words.iter().all(|word| said.contains(word)), "{parts:?}: {said}");
                assert_eq!(said.starts_with("no rank waits"), world > 1);
                assert!(ranks.iter().all(|rank| rank.waits == 0.0));
            }
        }
        assert!(of(&mut []).contains("yet"));
    }
}
