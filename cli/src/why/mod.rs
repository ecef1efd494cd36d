//! `ella why`: where the time of a run's steps goes, rank by rank, and who waits for whom.
//!
//! This file reads and shows; [`verdict`] judges.

mod verdict;

use std::collections::BTreeMap;

use clap::Args;
use serde::{Deserialize, Serialize};
use verdict::Rank;

use crate::run::{Parts, RunFolder};
use crate::ui::{DONE, Fail, Out, count};

/// The parts that are shown, by their names and titles, in the order of a step; the last two are beside it.
const SHOWN: [(&str, &str); 9] = [
    ("data", "data"),
    ("forward", "forward"),
    ("backward", "backward"),
    ("reduce", "reduce"),
    ("update", "update"),
    ("commit", "commit"),
    ("draw", "draw"),
    ("reduce_hidden", "hidden"),
    ("encode", "encode"),
];

#[derive(Debug, Args)]
pub(crate) struct Why {
    /// The run's folder: a path or URL. A run that trains has written of all but its last 64 steps
    run: String,
    /// Look at about so many of the newest steps
    #[arg(long, value_name = "N", default_value_t = 1024)]
    steps: u64,
}

/// Sums over some steps of a rank, as the coordinator kept them.
#[derive(Clone, Debug, Deserialize)]
struct Timing {
    rank: u32,
    generation: u64,
    worker: String,
    host: String,
    step: u64,
    steps: u64,
    seconds: f64,
    parts: Parts,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Found {
    run: String,
    /// The newest step that was told of.
    step: u64,
    ranks: Vec<Rank>,
    verdict: String,
}

impl Why {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let found = crate::runtime()?.block_on(self.look())?;
        out.result(&found, || text(&found));
        Ok(DONE)
    }

    async fn look(&self) -> Result<Found, Fail> {
        let run = RunFolder::open(&self.run).await?;
        let lines: Vec<(u64, Timing)> = run.lines("timing").await?;
        let mut ranks = summed(&lines, self.steps);
        let verdict = verdict::of(&mut ranks);
        let step = lines.iter().map(|(_, timing)| timing.step).max().unwrap_or(0);
        Ok(Found { run: run.store.url().to_owned(), step, ranks, verdict })
    }
}

/// Each rank's mean step over about the newest `most` steps of the newest generation.
fn summed(lines: &[(u64, Timing)], most: u64) -> Vec<Rank> {
    let newest = lines.iter().map(|(term, timing)| (*term, timing.generation)).max();
    let of_newest = || lines.iter().filter(|(term, timing)| Some((*term, timing.generation)) == newest).map(|(_, timing)| timing);
    let last = of_newest().map(|timing| timing.step).max().unwrap_or(0);
    let mut ranks = BTreeMap::<u32, Rank>::new();
    for timing in of_newest().filter(|timing| timing.step > last.saturating_sub(most)) {
        let rank = ranks.entry(timing.rank).or_insert_with(|| Rank {
            rank: timing.rank,
            worker: timing.worker.clone(),
            host: timing.host.clone(),
            ..Rank::default()
        });
        rank.steps += timing.steps;
        rank.seconds += timing.seconds;
        for (part, seconds) in &timing.parts {
            *rank.parts.entry(part.clone()).or_default() += seconds;
        }
    }
    for rank in ranks.values_mut() {
        let steps = rank.steps.max(1) as f64;
        rank.seconds /= steps;
        rank.parts.values_mut().for_each(|seconds| *seconds /= steps);
    }
    ranks.into_values().collect()
}

fn text(found: &Found) -> String {
    let Found { run, step, ranks, verdict } = found;
    if ranks.is_empty() {
        return format!("run      {run}\nverdict  {verdict}");
    }
    let steps = ranks.iter().map(|rank| rank.steps).max().unwrap_or(0);
    let mut text = format!("run      {run}\nsteps    {} up to step {step}, milliseconds of each\n", count(steps as usize, "step"));
    text += &format!("{:>5} {:>9}", "rank", "step");
    SHOWN.iter().for_each(|(_, title)| text += &format!(" {title:>9}"));
    text += &format!(" {:>9} {:>9}  host\n", "other", "waits");
    for rank in ranks {
        text += &format!("{:>5} {:>9.1}", rank.rank, 1000.0 * rank.seconds);
        SHOWN.iter().for_each(|(part, _)| text += &format!(" {:>9.1}", 1000.0 * rank.part(part)));
        text += &format!(" {:>9.1} {:>9.1}  {}\n", 1000.0 * rank.other(), 1000.0 * rank.waits, rank.host);
    }
    text + &format!("verdict  {verdict}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an all-reduce took beside the backward pass has a column of its own, and is none of the step.
    #[test]
    fn what_was_hidden_is_shown_beside_the_step() {
        let parts = [("backward", 0.5), ("reduce", 0.125), ("reduce_hidden", 0.25)].map(|(name, seconds)| (name.to_owned(), seconds));
        let rank = Rank { seconds: 0.625, steps: 64, parts: parts.into(), ..Rank::default() };
        assert_eq!(rank.other(), 0.0);
        let found = Found { run: "r".into(), step: 64, ranks: vec![rank], verdict: "v".into() };
        let shown = text(&found);
        let row: Vec<_> = shown.lines().nth(3).unwrap_or_default().split_whitespace().collect();
        let header: Vec<_> = shown.lines().nth(2).unwrap_or_default().split_whitespace().collect();
        for (title, value) in [("reduce", "125.0"), ("hidden", "250.0"), ("other", "0.0")] {
            let column = header.iter().position(|found| *found == title).unwrap();
            assert_eq!(row[column], value, "{shown}");
        }
    }

    fn line(term: u64, generation: u64, rank: u32, step: u64, seconds: f64) -> (u64, Timing) {
        let parts = [("forward".to_owned(), seconds / 2.0)].into();
        (term, Timing { rank, generation, worker: format!("w{rank}"), host: "h".into(), step, steps: 64, seconds, parts })
    }

    #[test]
    fn the_newest_generation_counts_and_of_it_the_newest_steps() {
        let lines = [
            line(1, 1, 0, 64, 900.0),
            line(2, 1, 0, 64, 640.0),
            line(2, 1, 0, 128, 64.0),
            line(2, 1, 1, 128, 128.0),
            line(2, 1, 0, 192, 192.0),
            line(2, 1, 1, 192, 128.0),
        ];
        let ranks = summed(&lines, 100);
        let seen: Vec<_> = ranks.iter().map(|rank| (rank.rank, rank.steps, rank.seconds, rank.part("forward"))).collect();
        assert_eq!(seen, [(0, 128, 2.0, 1.0), (1, 128, 2.0, 1.0)]);
        assert_eq!(summed(&lines, 1000)[0].steps, 192);
        assert!(summed(&[], 10).is_empty());
    }
}
