//! What the page asks for, as JSON. Every answer is bounded, whatever the run's length and the number of its ranks.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::view::{Restored, RunView};
use super::{Dashboard, Query, Refusal, Shared};
use crate::history::{Bucket, Happening, Kind, Rank, Spread, judge, newest_first};
use crate::status::{StatusReport, WorkerReport};

/// Most points of a curve in one answer.
const MOST_POINTS: usize = 4_000;
/// Most ranks, workers, units and events in one answer.
const MOST_ROWS: usize = 500;
/// Workers, and units that were given up, of a job in its summary.
const MOST_OF_JOB: usize = 100;
/// Marks on a curve, commits among them.
const MOST_MARKS: usize = 400;

/// Which run is asked about: this coordinator's own, if none is named.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Which {
    pub(super) run: Option<String>,
}

impl Dashboard {
    /// What is known of a run.
    pub(super) async fn view(&self, run: Option<&str>) -> Result<Arc<RunView>, Refusal> {
        match run.filter(|run| !run.is_empty() && !self.siblings.is_own(run)) {
            None => Ok(Arc::clone(&self.own)),
            Some(run) => self.siblings.view(run).await,
        }
    }
}

/// Where a run or job is, without its lists of workers.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    #[serde(flatten)]
    status: StatusReport,
    /// The run's name among its siblings.
    name: String,
    /// Workers with a place.
    ranks: usize,
    /// Workers without one.
    others: usize,
    /// Until the last step, at the rate of the last steps.
    seconds_left: Option<f64>,
    first_step: Option<u64>,
    last_step: Option<u64>,
    /// Samples that were skipped, by reason, since the run began.
    skipped: BTreeMap<String, u64>,
    history: Restored,
}

impl Summary {
    pub(super) fn of(view: &RunView, mut status: StatusReport) -> Self {
        let ranks = status.workers.iter().filter(|worker| worker.rank.is_some()).count();
        let others = std::mem::take(&mut status.workers).len() - ranks;
        if let Some(job) = &mut status.job {
            job.workers.truncate(MOST_OF_JOB);
            job.given_up.truncate(MOST_OF_JOB);
            job.workers.iter_mut().for_each(|worker| worker.held.truncate(4));
        }
        let history = view.restored();
        let past = view.past();
        Self {
            name: super::siblings::name_of(&status.run_url).to_owned(),
            ranks,
            others,
            seconds_left: seconds_left(&status, &past),
            first_step: past.curves.first_step(),
            last_step: past.curves.last().map(|last| last.step),
            skipped: past.skipped.sums().clone(),
            history,
            status,
        }
    }
}

fn seconds_left(status: &StatusReport, past: &crate::history::Past) -> Option<f64> {
    let last = past.curves.last()?;
    let recent = past.curves.view(last.step.saturating_sub(64), last.step, 1);
    let bucket = recent.buckets.last().filter(|bucket| bucket.millis > 0 && status.phase == "training")?;
    Some(status.steps.saturating_sub(status.step) as f64 * bucket.millis as f64 / 1000.0 / f64::from(bucket.steps))
}

pub(super) async fn summary(State(dashboard): Shared, Query(which): Query<Which>) -> Result<Json<Summary>, Refusal> {
    let view = dashboard.view(which.run.as_deref()).await?;
    let status = if Arc::ptr_eq(&view, &dashboard.own) { dashboard.status().await? } else { dashboard.siblings.status(&view).await? };
    Ok(Json(Summary::of(&view, status)))
}

#[derive(Debug, Deserialize)]
pub(super) struct Range {
    run: Option<String>,
    from: Option<u64>,
    to: Option<u64>,
    points: Option<usize>,
    limit: Option<usize>,
}

/// Curves in columns: as many values in each as there are buckets; null where nothing was measured.
#[derive(Debug, Default, Serialize)]
pub(super) struct Columns {
    /// Steps of a bucket.
    width: u64,
    first_step: Option<u64>,
    last_step: Option<u64>,
    /// The first step of each bucket.
    step: Vec<u64>,
    at_unix_ms: Vec<u64>,
    samples_per_second: Vec<Option<f32>>,
    loss: Spreads,
    held_out: Spreads,
    grad_norm: Spreads,
    lr: Spreads,
    step_seconds: Spreads,
}

#[derive(Debug, Default, Serialize)]
struct Spreads {
    min: Vec<Option<f32>>,
    mean: Vec<Option<f32>>,
    max: Vec<Option<f32>>,
}

impl Spreads {
    fn push(&mut self, spread: &Spread) {
        let mean = spread.mean();
        self.mean.push(mean.map(|mean| mean as f32));
        self.min.push(mean.map(|_| spread.min));
        self.max.push(mean.map(|_| spread.max));
    }
}

/// Samples a second at each bucket, over this many steps at least: the times of single steps are as coarse as a clock's milliseconds.
const RATE_STEPS: u64 = 16;

fn rates(width: u64, buckets: &[Bucket]) -> Vec<Option<f32>> {
    let reach = usize::try_from(RATE_STEPS / 2 / width).unwrap_or(0);
    let around = |at: usize| &buckets[at.saturating_sub(reach)..buckets.len().min(at + reach + 1)];
    let rate = |at: usize| {
        let (samples, millis) =
            around(at).iter().fold((0, 0), |(samples, millis), bucket| (samples + bucket.samples, millis + bucket.millis));
        (millis > 0).then(|| (samples as f64 * 1000.0 / millis as f64) as f32)
    };
    (0..buckets.len()).map(rate).collect()
}

impl Columns {
    fn push(&mut self, bucket: &Bucket) {
        self.step.push(bucket.index * self.width);
        self.at_unix_ms.push(bucket.end_ms);
        self.loss.push(&bucket.loss);
        self.held_out.push(&bucket.held_out);
        self.grad_norm.push(&bucket.grad_norm);
        self.lr.push(&bucket.lr);
        self.step_seconds.push(&bucket.seconds);
    }
}

pub(super) async fn curves(State(dashboard): Shared, Query(range): Query<Range>) -> Result<Json<Columns>, Refusal> {
    let view = dashboard.view(range.run.as_deref()).await?;
    let points = range.points.unwrap_or(600).clamp(1, MOST_POINTS);
    let past = view.past();
    let found = past.curves.view(range.from.unwrap_or(0), range.to.unwrap_or(u64::MAX), points);
    let (first_step, last_step) = (past.curves.first_step(), past.curves.last().map(|last| last.step));
    drop(past);
    let mut columns = Columns { width: found.width, first_step, last_step, ..Columns::default() };
    found.buckets.iter().for_each(|bucket| columns.push(bucket));
    columns.samples_per_second = rates(found.width, &found.buckets);
    Ok(Json(columns))
}

/// Events, newest first, and where all of the range stand on the curve.
#[derive(Debug, Serialize)]
pub(super) struct Happenings {
    events: Vec<Happening>,
    /// In the range, those that are not listed included.
    total: usize,
    /// That were let go since there were too many.
    dropped: u64,
    marks: Vec<Mark>,
}

#[derive(Clone, Debug, Serialize)]
struct Mark {
    step: u64,
    kind: Kind,
    text: String,
}

pub(super) async fn events(State(dashboard): Shared, Query(range): Query<Range>) -> Result<Json<Happenings>, Refusal> {
    let view = dashboard.view(range.run.as_deref()).await?;
    let past = view.past();
    let (from, to) = (range.from.unwrap_or(0), range.to.unwrap_or(u64::MAX));
    let placed = |happening: &Happening| {
        let step = happening.step.or_else(|| past.curves.step_at(happening.at_unix_ms));
        let within = step.is_none_or(|step| (from..=to).contains(&step));
        within.then(|| Happening { step, ..happening.clone() })
    };
    let commits: Vec<Happening> = past.events.commits().filter_map(placed).collect();
    let others: Vec<Happening> = past.events.others().filter_map(placed).collect();
    let dropped = past.events.dropped();
    drop(past);
    let marked = |happening: &Happening| Some(Mark { step: happening.step?, kind: happening.kind, text: happening.text.clone() });
    let news: Vec<Mark> = others.iter().filter(|other| !matches!(other.kind, Kind::Other | Kind::Commit)).filter_map(marked).collect();
    let mut marks = thinned(news);
    marks.extend(thinned(commits.iter().filter_map(marked).collect()));
    let total = commits.len() + others.len();
    let mut events: Vec<Happening> = commits.into_iter().chain(others).collect();
    newest_first(&mut events);
    events.truncate(range.limit.unwrap_or(100).min(MOST_ROWS));
    Ok(Json(Happenings { events, total, dropped, marks }))
}

/// Every so manieth mark, so that there are not too many; the last one stays.
fn thinned(marks: Vec<Mark>) -> Vec<Mark> {
    let (stride, last) = (marks.len().div_ceil(MOST_MARKS / 2).max(1), marks.len().saturating_sub(1));
    marks.into_iter().enumerate().filter(|(at, _)| at % stride == 0 || *at == last).map(|(_, mark)| mark).collect()
}

#[derive(Debug, Deserialize)]
pub(super) struct Asked {
    run: Option<String>,
    until: Option<u64>,
    steps: Option<u64>,
    top: Option<usize>,
}

/// Where the ranks' time goes, and who waits for whom.
#[derive(Debug, Serialize)]
pub(super) struct Ranks {
    /// `timing`: means over some steps; `status`: of the newest step alone.
    source: &'static str,
    verdict: String,
    /// Ranks in all.
    of: usize,
    /// Those that are shown: all, or the slowest.
    ranks: Vec<RankRow>,
    /// Over all ranks, by part: the least, the median and the most seconds.
    spread: BTreeMap<String, [f32; 3]>,
    /// Steps at which there is something to see, the newest.
    windows: Vec<u64>,
    /// Workers without a place.
    others: Vec<WorkerReport>,
}

#[derive(Debug, Serialize)]
struct RankRow {
    #[serde(flatten)]
    rank: Rank,
    /// Seconds that no part accounts for.
    other: f64,
    device: String,
    silent_ms: Option<u64>,
    live_step: Option<u64>,
    leaving: bool,
}

pub(super) async fn ranks(State(dashboard): Shared, Query(asked): Query<Asked>) -> Result<Json<Ranks>, Refusal> {
    let view = dashboard.view(asked.run.as_deref()).await?;
    let own = Arc::ptr_eq(&view, &dashboard.own);
    let workers = if own { dashboard.status().await?.workers } else { Vec::new() };
    let past = view.past();
    let (until, steps) = (asked.until.unwrap_or(u64::MAX), asked.steps.unwrap_or(1024));
    let told = past.timings.ranks(until, steps);
    let windows = past.timings.windows(MOST_ROWS);
    drop(past);
    Ok(Json(ranked(told, windows, workers, asked.top.unwrap_or(32).min(MOST_ROWS))))
}

fn ranked(told: Vec<Rank>, windows: Vec<u64>, workers: Vec<WorkerReport>, top: usize) -> Ranks {
    let (placed, others): (Vec<_>, Vec<_>) = workers.into_iter().partition(|worker| worker.rank.is_some());
    let by_rank: BTreeMap<u32, &WorkerReport> = placed.iter().filter_map(|worker| Some((worker.rank?, worker))).collect();
    let source = if told.is_empty() { "status" } else { "timing" };
    let newest = |worker: &&WorkerReport| {
        let named = Rank::named(worker.rank?, &worker.worker_id, &worker.host);
        Some(named.of_step(&worker.parts?))
    };
    let mut ranks = if told.is_empty() { by_rank.values().filter_map(newest).collect() } else { told };
    let verdict = judge(&mut ranks);
    let spread = spread(&ranks);
    let of = ranks.len();
    if of > top {
        // What a rank does before it waits is what others wait for.
        let own = |rank: &Rank| rank.seconds - rank.part("reduce");
        ranks.sort_by(|a, b| own(b).total_cmp(&own(a)));
        ranks.truncate(top);
    }
    let row = |rank: Rank| {
        let worker =
            by_rank.get(&rank.rank).filter(|worker| rank.worker.contains(&worker.worker_id) || worker.worker_id.contains(&rank.worker));
        RankRow {
            other: rank.other(),
            device: worker.map_or_else(String::new, |worker| worker.device.clone()),
            silent_ms: worker.map(|worker| worker.silent_ms),
            live_step: worker.map(|worker| worker.step),
            leaving: worker.is_some_and(|worker| worker.leaving),
            rank,
        }
    };
    let ranks = ranks.into_iter().map(row).collect();
    Ranks { source, verdict, of, ranks, spread, windows, others: others.into_iter().take(MOST_ROWS).collect() }
}

fn spread(ranks: &[Rank]) -> BTreeMap<String, [f32; 3]> {
    let mut parts = BTreeMap::<String, Vec<f64>>::new();
    for rank in ranks {
        let own = rank.parts.iter().map(|(part, seconds)| (part.as_str(), *seconds));
        for (part, seconds) in own.chain([("step", rank.seconds), ("waits", rank.waits)]) {
            parts.entry(part.to_owned()).or_default().push(seconds);
        }
    }
    let of = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        [all[0] as f32, all[all.len() / 2] as f32, all[all.len() - 1] as f32]
    };
    parts.into_iter().map(|(part, all)| (part, of(all))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::PartsReport;

    fn worker(rank: u32, data: f64) -> WorkerReport {
        let parts = Some(PartsReport { data, reduce: 1.0 - data, ..PartsReport::default() });
        WorkerReport { worker_id: format!("w{rank}"), rank: Some(rank), parts, ..WorkerReport::default() }
    }

    #[test]
    fn of_a_thousand_ranks_the_slowest_are_shown_and_the_spread_of_all() {
        let workers = (0..1000).map(|rank| worker(rank, f64::from(rank % 500) / 1000.0)).collect();
        let shown = ranked(Vec::new(), Vec::new(), workers, 20);
        assert_eq!((shown.of, shown.ranks.len(), shown.source), (1000, 20, "status"));
        assert!(shown.ranks.iter().all(|row| row.rank.part("data") >= 0.49));
        assert_eq!(shown.spread["data"], [0.0, 0.25, 0.499]);
        assert!(serde_json::to_string(&shown).unwrap().len() < 20_000);
        let few = ranked(Vec::new(), vec![64], vec![worker(1, 0.1), worker(0, 0.4), WorkerReport::default()], 20);
        assert_eq!(few.ranks.iter().map(|row| row.rank.rank).collect::<Vec<_>>(), [0, 1]);
        assert_eq!((few.others.len(), few.ranks[0].live_step), (1, Some(0)));
        assert!(few.verdict.contains("rank 0"), "{}", few.verdict);
    }

    #[test]
    fn throughput_is_taken_over_some_steps_as_samples_by_time() {
        let bucket = |index: u64| Bucket { index, samples: 4, millis: 2 * (index % 2), ..Bucket::default() };
        let buckets: Vec<Bucket> = (0..100).map(bucket).collect();
        let rates = rates(1, &buckets);
        assert!(rates.iter().all(|rate| rate.is_some_and(|rate| (3_000.0..5_200.0).contains(&rate))), "{rates:?}");
        assert_eq!(super::rates(64, &buckets[..2]), [None, Some(2_000.0)], "wide buckets stand for themselves");
    }

    #[test]
    fn marks_are_thinned_and_the_last_one_stays() {
        let mark = |step| Mark { step, kind: Kind::Commit, text: String::new() };
        let marks = thinned((0..5_000).map(mark).collect());
        assert!(marks.len() <= MOST_MARKS && marks.last().map(|mark| mark.step) == Some(4_999));
        assert!(thinned(Vec::new()).is_empty());
    }
}
