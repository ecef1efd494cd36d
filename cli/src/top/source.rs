//! Where what is shown comes from: a coordinator, a run's folder, or both.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ella_coordinator::client;
use ella_coordinator::credentials::Credentials;
use ella_coordinator::history::{MOST_BUCKETS, Past, Rank, Reader, judge, newest_first};
use ella_coordinator::status::StatusReport;
use ella_proto::access::Access;
use ella_store::{RunLog, RunState, Store};
use tokio::time::Instant;

use super::snapshot::{Snapshot, clean};
use crate::run::{ADDRESS, RUN_TOML, RunFolder};
use crate::status::{Asked, outcome};
use crate::ui::Fail;

/// A coordinator writes what it keeps this often, so the folder is read no more often.
const FOLDER: Duration = Duration::from_secs(10);
/// Points of a curve: more than a terminal has columns of dots.
const POINTS: usize = 600;
/// Steps seen by asking, that are not in the folder yet.
const RECENT: usize = 600;
/// Events that are shown.
const EVENTS: usize = 200;

/// A step as the coordinator told of it.
#[derive(Clone, Copy, Debug)]
struct Seen {
    step: u64,
    loss: Option<f64>,
    rate: f64,
}

pub(super) struct Source {
    access: Option<Access>,
    /// What the coordinators of a run's folder are shown: each `ella train` has another address.
    credentials: Credentials,
    /// Of a run whose folder can be read from here.
    folder: Option<(Store, Reader)>,
    past: Past,
    read: Option<Instant>,
    /// What the log said when it was read last.
    state: RunState,
    /// Why it could not be read then.
    trouble: Option<String>,
    /// In all, by the config.
    steps: u64,
    recent: VecDeque<Seen>,
    last: Option<StatusReport>,
}

impl Source {
    /// Finds out whether a coordinator is there, and whether the run's folder can be read.
    pub(super) async fn open(what: Option<&str>, asked: &Asked) -> Result<Self, Fail> {
        if let Some(access) = asked.coordinator(what)? {
            let status = StatusReport::from(client::status(&access).await?);
            let store = if status.job.is_none() { readable(&status.run_url).await } else { None };
            return Ok(Self::new(Some(access), &asked.credentials, store, status.steps));
        }
        let run = RunFolder::open(what.unwrap_or_default()).await?;
        if let Some(url) = address(&run.store) {
            // What will not do is told of now.
            asked.credentials.access(&url)?;
        }
        let steps = run.config.train.steps;
        Ok(Self::new(None, &asked.credentials, Some(run.store), steps))
    }

    fn new(access: Option<Access>, credentials: &Credentials, store: Option<Store>, steps: u64) -> Self {
        let folder = store.map(|store| (store.clone(), Reader::new(store, None)));
        let (credentials, past, state) = (credentials.clone(), Past::default(), RunState::default());
        Self { access, credentials, folder, past, read: None, state, trouble: None, steps, recent: VecDeque::new(), last: None }
    }

    /// Asks the coordinator; if it does not answer, the one that may have followed it.
    async fn ask(&mut self) -> Option<StatusReport> {
        if let Some(access) = &self.access
            && let Ok(status) = client::status(access).await
        {
            return Some(StatusReport::from(status));
        }
        let (store, _) = self.folder.as_ref()?;
        let url = address(store).filter(|url| self.access.as_ref().is_none_or(|access| access.url != *url))?;
        let access = self.credentials.access(&url).ok()?;
        // The port of one that was killed may be another's by now.
        let status = StatusReport::from(client::status(&access).await.ok().filter(|status| status.run_url == store.url())?);
        self.access = Some(access);
        Some(status)
    }

    /// What there is now.
    ///
    /// # Errors
    /// If neither a coordinator nor a folder has ever told of anything.
    pub(super) async fn look(&mut self) -> Result<Snapshot, Fail> {
        let status = self.ask().await;
        if let Some(status) = &status {
            self.note(status);
        }
        // Whether the run ended with its coordinator is found out at once.
        let ends = status.is_none() && self.last.is_some() && !self.state.is_over();
        if ends || self.read.is_none_or(|at| at.elapsed() >= FOLDER) {
            self.read_folder().await;
        }
        let gone = status.is_none() && self.access.is_some() && !self.state.is_over();
        let snapshot = match (status, &self.folder) {
            (Some(status), _) => {
                self.last = Some(status.clone());
                self.live(&status)
            }
            (None, Some(_)) if self.access.is_none() || self.state.is_over() => self.still(),
            (None, _) => {
                let last = self.last.clone().ok_or_else(|| Fail::failed("the coordinator does not answer; is the run still going?"))?;
                self.live(&last)
            }
        };
        Ok(Snapshot { gone, ..snapshot })
    }

    fn note(&mut self, status: &StatusReport) {
        if let Some(job) = &status.job {
            let look = self.recent.back().map_or(1, |seen| seen.step + 1);
            self.recent.push_back(Seen { step: look, loss: None, rate: job.samples_per_second });
        } else {
            let known = self.past.curves.last().map_or(0, |last| last.step);
            self.recent.retain(|seen| seen.step > known && seen.step < status.step);
            if status.step > known {
                self.recent.push_back(Seen { step: status.step, loss: status.loss, rate: status.samples_per_second });
            }
        }
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    async fn read_folder(&mut self) {
        self.read = Some(Instant::now());
        let Some((store, reader)) = &mut self.folder else { return };
        reader.read(&mut self.past).await;
        match RunLog::read(store).await {
            Ok(records) => (self.state, self.trouble) = (RunState::from_records(&records), None),
            Err(error) => self.trouble = Some(error.to_string()),
        }
    }

    fn live(&self, status: &StatusReport) -> Snapshot {
        let told: Vec<Rank> = status.workers.iter().filter_map(newest).collect();
        let mut ranks = self.past.timings.ranks(u64::MAX, 1024);
        if told.is_empty() || ranks.len() != told.len() {
            ranks = told;
        }
        let placed = status.workers.iter().filter(|worker| worker.rank.is_some()).count();
        let (step, left) = (status.step, status.steps.saturating_sub(status.step));
        let seconds_left = match &status.job {
            Some(job) => job.seconds_left,
            None => self.pace().filter(|_| status.phase == "training").map(|pace| pace * left as f64),
        };
        let snapshot = Snapshot {
            run: clean(&status.run_url),
            live: true,
            phase: clean(&status.phase),
            reason: clean(&status.reason),
            term: status.term,
            generation: status.generation,
            step,
            steps: status.steps,
            epoch: Some(status.epoch),
            samples: status.samples,
            samples_per_second: Some(status.samples_per_second),
            loss: status.loss,
            seconds_left,
            last_commit_step: status.last_commit_step,
            workers: placed,
            waiting: status.workers.len() - placed,
            counts: status.counts.iter().map(|(name, n)| (clean(name), *n)).collect(),
            job: status.job.clone(),
            ..Snapshot::default()
        };
        self.with_past(snapshot, ranks)
    }

    /// By the folder alone.
    fn still(&self) -> Snapshot {
        let (phase, reason) = outcome(&self.state);
        let last = self.past.curves.last();
        let committed = self.state.last_commit();
        let commit_step = committed.map_or(0, |commit| commit.step);
        let after = self.past.curves.view(commit_step + 1, u64::MAX, MOST_BUCKETS).buckets;
        let snapshot = Snapshot {
            run: self.folder.as_ref().map_or_else(String::new, |(store, _)| store.url().to_owned()),
            phase: phase.to_owned(),
            reason: clean(&reason),
            term: self.state.term,
            generation: committed.map_or(0, |commit| commit.generation),
            // A copy may have the commits alone, or more of them than of what was measured.
            step: last.map_or(0, |last| last.step).max(commit_step),
            steps: self.steps,
            epoch: committed.map(|commit| commit.epoch),
            samples: committed.map_or(0, ella_store::Commit::samples) + after.iter().map(|bucket| bucket.samples).sum::<u64>(),
            loss: last.and_then(|last| last.loss),
            last_commit_step: commit_step,
            counts: self.counts(),
            ..Snapshot::default()
        };
        self.with_past(snapshot, self.past.timings.ranks(u64::MAX, 1024))
    }

    /// What the steps have counted, by the names that `ella status` has for it.
    fn counts(&self) -> BTreeMap<String, u64> {
        let Past { skipped, read, .. } = &self.past;
        let skipped = skipped.sums().iter().map(|(name, n)| (clean(&format!("skipped_{name}")), *n));
        skipped.chain(read.sums().iter().map(|(name, n)| (clean(name), *n))).collect()
    }

    /// Seconds of a step, by the newest steps that were measured or seen.
    fn pace(&self) -> Option<f64> {
        let last = self.past.curves.last()?.step;
        let recent = self.past.curves.view(last.saturating_sub(64), last, 1);
        let bucket = recent.buckets.last().filter(|bucket| bucket.millis > 0)?;
        Some(bucket.millis as f64 / 1000.0 / f64::from(bucket.steps))
    }

    fn with_past(&self, snapshot: Snapshot, mut ranks: Vec<Rank>) -> Snapshot {
        let verdict = judge(&mut ranks);
        let view = self.past.curves.view(0, u64::MAX, POINTS);
        let at = |index: u64| (index * view.width) as f64 + (view.width - 1) as f64 / 2.0;
        let mut curves = snapshot.curves;
        for bucket in &view.buckets {
            curves.loss.extend(bucket.loss.mean().map(|loss| (at(bucket.index), loss)));
            curves.held_out.extend(bucket.held_out.mean().map(|loss| (at(bucket.index), loss)));
            curves.rate.extend(bucket.samples_per_second().map(|rate| (at(bucket.index), rate)));
        }
        for seen in &self.recent {
            curves.loss.extend(seen.loss.map(|loss| (seen.step as f64, loss)));
            curves.rate.push((seen.step as f64, seen.rate));
        }
        let mut events: Vec<_> = self.past.events.commits().chain(self.past.events.others()).cloned().collect();
        newest_first(&mut events);
        events.truncate(EVENTS);
        for rank in &mut ranks {
            (rank.worker, rank.host) = (clean(&rank.worker), clean(&rank.host));
        }
        let faults = &self.past.faults;
        let mut problems: Vec<String> =
            self.trouble.iter().chain(faults.unlisted.values()).chain(&faults.problems).map(|problem| clean(problem)).collect();
        if faults.damaged_lines + faults.unread_files > 0 {
            problems
                .insert(0, format!("{} damaged lines and {} files of the past are left out", faults.damaged_lines, faults.unread_files));
        }
        Snapshot { curves, ranks, verdict: clean(&verdict), events, problems, ..snapshot }
    }
}

fn newest(worker: &ella_coordinator::status::WorkerReport) -> Option<Rank> {
    Some(Rank::named(worker.rank?, &worker.worker_id, &worker.host).of_step(&worker.parts?))
}

/// Where `ella train` says that its coordinator is, on this machine.
fn address(run: &Store) -> Option<String> {
    std::fs::read_to_string(run.local_path()?.join(ADDRESS)).ok()
}

/// The run's folder, if it can be read from this machine.
async fn readable(url: &str) -> Option<Store> {
    let store = Store::open(url).ok()?;
    let there = store.head(RUN_TOML).await.ok()??;
    (there.bytes > 0).then_some(store)
}

#[cfg(test)]
mod tests {
    use ella_coordinator::shell::{Coordinator, Opened, Options};
    use ella_proto::config::RunConfig;
    use ella_store::{Body, Commit, Digest, LedgerEpoch, Part, Term};
    use tokio::sync::mpsc;

    use super::*;

    fn config(url: &str) -> RunConfig {
        let text = format!("[run]\noutput={url:?}\n[base]\nmodel='m'\n[text]\nmodel='t'\n[data]\npath='d'\n");
        RunConfig::parse(&text, "x", &[]).unwrap()
    }

    #[test]
    fn the_coordinator_that_follows_is_found_at_its_own_address() {
        let dir = tempfile::tempdir().unwrap();
        let url = dir.path().to_str().unwrap();
        crate::runtime().unwrap().block_on(async {
            let (store, config) = (Store::open(url).unwrap(), config(url));
            store.put(RUN_TOML, config.to_toml().into()).await.unwrap();
            // What was killed has left its address, where nobody answers.
            store.put(ADDRESS, "http://127.0.0.1:1".into()).await.unwrap();
            let mut source = Source::new(None, &Credentials::default(), Some(store.clone()), 9);
            assert!(!source.look().await.unwrap().live);
            let Opened::Ready(coordinator) = Coordinator::open(&config, store.clone(), &Options::default()).await.unwrap() else {
                panic!("there is nothing to be done")
            };
            std::fs::write(dir.path().join(ADDRESS), format!("http://{}", coordinator.addresses().grpc)).unwrap();
            let (_stop, stops) = mpsc::channel(1);
            let running = tokio::spawn(coordinator.run(stops));
            let found = source.look().await.unwrap();
            assert!(found.live && !found.gone && found.phase == "waiting", "{found:?}");
            running.abort();
        });
    }

    #[test]
    fn samples_and_pictures_after_the_newest_commit_count() {
        let dir = tempfile::tempdir().unwrap();
        let url = dir.path().to_str().unwrap();
        crate::runtime().unwrap().block_on(async {
            let store = Store::open(url).unwrap();
            store.put(RUN_TOML, config(url).to_toml().into()).await.unwrap();
            let none = Digest::of(b"");
            let (mut log, _) =
                RunLog::claim(&store, Term { host: "h".into(), version: "1".into(), config_digest: none }, "n", 1).await.unwrap();
            let commit = Commit {
                step: 60,
                generation: 1,
                world: 1,
                folder: ella_store::commit_folder(60, 1, 1),
                parts: vec![Part { name: "connector.safetensors".into(), bytes: 1, blake3: none }],
                config_digest: none,
                data_digest: none,
                models_digest: none,
                epoch: 0,
                step_in_epoch: 60,
                ledger: vec![LedgerEpoch { epoch: 0, samples: 240, hash: "0".repeat(32) }],
                state_digest: none,
                computed_with: Default::default(),
            };
            log.append(Body::Commit(commit), 2).await.unwrap();
            let counted = r#""skipped":{"odd":1},"read":{"pictures_saved":3}"#;
            let line = |step: u64| format!("{{\"at_unix_ms\":{step},\"step\":{step},\"samples\":4,\"loss\":0.5,{counted}}}\n");
            store.put("metrics/000001-000001.jsonl", (line(60) + &line(61)).into()).await.unwrap();
            let shown = Source::new(None, &Credentials::default(), Some(store), 99).look().await.unwrap();
            assert_eq!((shown.step, shown.samples), (61, 244));
            assert_eq!(shown.counts, [("pictures_saved".to_owned(), 6), ("skipped_odd".to_owned(), 2)].into());
        });
    }
}
