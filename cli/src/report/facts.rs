//! What a run's folder says, gathered for the page.

use std::collections::BTreeSet;

use ella_proto::config::RunConfig;
use ella_store::{Body, Outcome, Record, RunState};
use serde_json::Value;

use super::numbers::{self, Numbers};
use super::samples::Grid;
use crate::audit::{Verdict, id};
use crate::run::{Membership, Metric, RunFolder, samples};
use crate::ui::Fail;

/// One coordinator's time: from its start or a resume to its end.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct TermFact {
    pub(super) term: u64,
    pub(super) at_unix_ms: u64,
    pub(super) host: String,
    pub(super) version: String,
    /// The commit it resumed from; 0 for a fresh start.
    pub(super) from_step: u64,
    /// The newest commit in it.
    pub(super) to_step: u64,
    /// Ranks of its newest commit.
    pub(super) world: Option<u32>,
    /// None: it was killed, or still runs.
    pub(super) ended: Option<(Outcome, String)>,
}

/// Everything that the page shows.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) title: String,
    pub(super) run: String,
    /// As an audit names the run, whatever its place.
    pub(super) id: String,
    pub(super) config: RunConfig,
    pub(super) metrics: Vec<Metric>,
    pub(super) terms: Vec<TermFact>,
    /// Steps of all commits, given up or not.
    pub(super) commits: Vec<u64>,
    /// Commits that the run still has.
    pub(super) kept: usize,
    /// Trained on since the run began.
    pub(super) samples_used: u64,
    /// What the workers computed on.
    pub(super) devices: BTreeSet<String>,
    pub(super) membership: Membership,
    pub(super) audit: Option<Verdict>,
    /// Pictures that it drew as it trained.
    pub(super) grid: Grid,
    /// Base64 of a PNG.
    pub(super) samples: Option<String>,
}

impl Facts {
    pub(super) async fn read(url: &str) -> Result<Self, Fail> {
        let run = RunFolder::open(url).await?;
        let records = run.records().await?;
        let metrics = run.metrics().await?;
        if metrics.is_empty() {
            return Err(Fail::failed(format_args!("{}/metrics: nothing was measured yet; train the run first", run.store.url())));
        }
        let state = RunState::from_records(&records);
        let events = run.events().await?;
        let grid = Grid::read(&run).await?;
        let commits = records.iter().filter_map(|record| if let Body::Commit(commit) = &record.body { Some(commit.step) } else { None });
        Ok(Self {
            title: String::new(),
            run: run.store.url().to_owned(),
            id: id(&records),
            samples_used: samples(&state, &metrics),
            metrics,
            terms: terms(&records),
            commits: commits.collect(),
            kept: state.commits.len(),
            devices: devices(&events),
            membership: Membership::of(&events),
            config: run.config,
            audit: None,
            grid,
            samples: None,
        })
    }

    pub(super) fn numbers(&self) -> Numbers {
        numbers::of(&self.metrics)
    }
}

fn terms(records: &[Record]) -> Vec<TermFact> {
    let mut terms: Vec<TermFact> = Vec::new();
    for record in records {
        match (&record.body, terms.last_mut()) {
            (Body::Term(term), last) => {
                let step = last.map_or(0, |last| last.to_step);
                terms.push(TermFact {
                    term: record.term,
                    at_unix_ms: record.at_unix_ms,
                    host: term.host.clone(),
                    version: term.version.clone(),
                    from_step: step,
                    to_step: step,
                    world: None,
                    ended: None,
                });
            }
            (Body::Commit(commit), Some(last)) => {
                last.to_step = commit.step;
                last.world = Some(commit.world);
            }
            (Body::End { outcome, reason, .. }, Some(last)) => last.ended = Some((*outcome, reason.clone())),
            _ => {}
        }
    }
    terms
}

/// The devices that workers said they have.
fn devices(events: &[(u64, Value)]) -> BTreeSet<String> {
    let attached = events.iter().map(|(_, event)| event).filter(|event| event["event"] == "attached");
    attached.filter_map(|event| Some(event["device"].as_str()?.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use ella_store::{Digest, Term};

    use super::*;

    #[test]
    fn a_killed_and_resumed_run_has_two_terms() {
        let term = |host: &str| Body::Term(Term { host: host.into(), version: "1".into(), config_digest: Digest::of(b"") });
        let commit = |step| {
            Body::Commit(ella_store::Commit {
                step,
                generation: 1,
                world: 2,
                folder: ella_store::commit_folder(step, 1, 1),
                parts: Vec::new(),
                config_digest: Digest::of(b""),
                data_digest: Digest::of(b""),
                models_digest: Digest::of(b""),
                epoch: 0,
                step_in_epoch: step,
                ledger: Vec::new(),
                state_digest: Digest::of(b""),
                computed_with: Default::default(),
            })
        };
        let end = Body::End { outcome: Outcome::Done, step: 9, reason: String::new() };
        let bodies = [(1, term("a")), (1, commit(4)), (2, term("b")), (2, commit(8)), (2, commit(9)), (2, end)];
        let record =
            |(seq, (term, body)): (usize, (u64, Body))| Record { seq: seq as u64, term, nonce: String::new(), at_unix_ms: 1, body };
        let records: Vec<Record> = bodies.into_iter().enumerate().map(record).collect();
        let found = terms(&records);
        assert_eq!(
            found.iter().map(|t| (t.term, t.from_step, t.to_step, t.ended.is_some())).collect::<Vec<_>>(),
            [(1, 0, 4, false), (2, 4, 9, true)]
        );
    }
}
