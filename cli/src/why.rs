//! `ella why`: where the time of a run's steps goes, rank by rank, and who waits for whom. The folder is read here; the coordinator's own code judges.

use clap::Args;
use ella_coordinator::history::{Rank, Timing, Timings, judge};
use serde::Serialize;

use crate::run::RunFolder;
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
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
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
        let mut timings = Timings::default();
        lines.into_iter().for_each(|(term, timing)| timings.add(Timing { term, ..timing }));
        let mut ranks = timings.ranks(u64::MAX, self.steps);
        let verdict = judge(&mut ranks);
        let step = timings.newest().unwrap_or(0);
        Ok(Found { run: run.store.url().to_owned(), step, ranks, verdict })
    }
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
}
