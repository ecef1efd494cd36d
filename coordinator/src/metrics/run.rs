//! The metrics of a run, of a job, and of this process.

use super::text::{Exposition, Format};
use super::*;
use crate::core::step_bounds;
use crate::status::{JobReport, PartsReport, StatusReport, VitalsReport, WorkerReport};
use ella_store::RetryCount;
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// Ranks that are told of one by one. Where there are more, none is: the least, the mean and the most are told in any case.
pub const MOST_RANKS: usize = 128;

/// The status as Prometheus reads it.
pub fn render(report: &StatusReport, format: Format) -> String {
    let mut all = Exposition::default();
    all.put(&BUILD_INFO, &[env!("CARGO_PKG_VERSION")], 1.0);
    all.put(&RUN_INFO, &[&report.run_url, report.job.as_ref().map_or("run", |job| &job.kind)], 1.0);
    for phase in PHASES {
        all.put(&PHASE, &[phase], f64::from(u8::from(*phase == report.phase)));
    }
    match &report.job {
        Some(job) => job_metrics(&mut all, job),
        None => run_metrics(&mut all, report),
    }
    let mut counts = report.counts.clone();
    events(&mut all, report, &mut counts);
    counted(&mut all, report.job.is_none(), counts);
    stores(&mut all);
    process::put(&mut all);
    all.write(format)
}

fn run_metrics(all: &mut Exposition, report: &StatusReport) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let totals = &report.totals;
    for (metric, value) in [
        (&TERM, report.term as f64),
        (&GENERATION, report.generation as f64),
        (&GENERATIONS, totals.generations as f64),
        (&STEP, report.step as f64),
        (&STEPS_TARGET, report.steps as f64),
        (&STEPS, totals.steps as f64),
        (&STEPS_MISSED, totals.steps_missed as f64),
        (&SAMPLES, totals.samples as f64),
        (&RUN_SAMPLES, report.samples as f64),
        (&SAMPLES_PER_SECOND, report.samples_per_second),
        (&EPOCH, report.epoch as f64),
        (&LOSS, report.loss.unwrap_or(f64::NAN)),
        (&COMMITS, report.commits as f64),
        (&COMMIT_BYTES, totals.commit_bytes as f64),
        (&COMMIT_SECONDS, totals.commit_seconds),
        (&COMMIT_BLOCKED, totals.parts.commit),
        (&LAST_COMMIT_STEP, report.last_commit_step as f64),
        (&LAST_COMMIT_TIMESTAMP, now - report.commit_age_seconds),
        (&WORKERS_WANTED, f64::from(report.workers_wanted)),
    ] {
        all.put(metric, &[], value);
    }
    if let Some(newest) = &report.newest {
        all.put(&HELD_OUT_LOSS, &[], newest.held_out_loss.unwrap_or(f64::NAN));
        all.put(&GRAD_NORM, &[], newest.grad_norm.unwrap_or(f64::NAN));
        all.put(&LEARNING_RATE, &[], newest.learning_rate);
        all.put(&LAST_STEP_TIMESTAMP, &[], now - newest.age_seconds);
    }
    let bounds = step_bounds();
    let count = |at: usize| totals.step_buckets.get(at).copied().unwrap_or(0);
    let buckets: Vec<_> = bounds.into_iter().enumerate().map(|(at, most)| (most, count(at))).collect();
    all.histogram(&STEP_DURATION, &buckets, totals.step_seconds);
    for (part, seconds) in parts(&totals.parts) {
        all.put(&STEP_PART_SECONDS, &[part], seconds);
    }
    workers(all, &report.workers);
}

/// The parts in the order of [`PARTS`].
fn parts(parts: &PartsReport) -> impl Iterator<Item = (&'static str, f64)> {
    let PartsReport { data, encode, forward, backward, reduce, update, commit, reduce_hidden, draw } = *parts;
    PARTS.iter().copied().zip([data, encode, forward, backward, reduce, update, commit, reduce_hidden, draw])
}

fn workers(all: &mut Exposition, workers: &[WorkerReport]) {
    for state in STATES {
        all.put(&WORKERS, &[state], workers.iter().filter(|worker| worker.state == **state).count() as f64);
    }
    let ranks: Vec<_> = workers.iter().filter_map(|worker| Some((worker.rank?, worker))).collect();
    if ranks.len() <= MOST_RANKS {
        ranks.iter().for_each(|(rank, worker)| rank_metrics(all, &rank.to_string(), worker));
    }
    spread(all, &WORKERS_SILENT, None, workers.iter().map(|worker| worker.silent_ms as f64 / 1000.0));
    for (at, part) in PARTS.iter().enumerate() {
        let seconds = ranks.iter().filter_map(|(_, worker)| parts(worker.parts.as_ref()?).nth(at).map(|(_, seconds)| seconds));
        spread(all, &WORKERS_PART, Some(part), seconds);
    }
    let vitals: Vec<_> = workers.iter().filter_map(|worker| worker.vitals).collect();
    processes(all, &vitals);
    spread(all, &WORKERS_FEED, None, vitals.iter().map(|vitals| vitals.feed_bytes as f64));
}

fn rank_metrics(all: &mut Exposition, rank: &str, worker: &WorkerReport) {
    all.put(&WORKER_STEP, &[rank], worker.step as f64);
    all.put(&WORKER_SILENT, &[rank], worker.silent_ms as f64 / 1000.0);
    for (part, seconds) in worker.parts.iter().flat_map(parts) {
        all.put(&WORKER_PART, &[rank, part], seconds);
    }
    let Some(vitals) = &worker.vitals else { return };
    all.put(&WORKER_MEMORY, &[rank], vitals.memory_bytes as f64);
    all.put(&WORKER_CPU, &[rank], vitals.cpu_seconds);
    all.put(&WORKER_FEED, &[rank], vitals.feed_bytes as f64);
    for (metric, bytes) in [
        (&WORKER_GPU_USED, vitals.gpu_memory_used_bytes),
        (&WORKER_GPU_SIZE, vitals.gpu_memory_total_bytes),
        (&WORKER_GPU_ALLOCATED, vitals.gpu_memory_allocated_bytes),
    ] {
        if bytes > 0 {
            all.put(metric, &[rank], bytes as f64);
        }
    }
    if let Some(busy) = vitals.gpu_busy {
        all.put(&WORKER_GPU_BUSY, &[rank], busy);
    }
}

/// What is told of the processes of runs' and jobs' workers alike.
fn processes(all: &mut Exposition, vitals: &[VitalsReport]) {
    spread(all, &WORKERS_MEMORY, None, vitals.iter().map(|vitals| vitals.memory_bytes as f64));
    let gpus = || vitals.iter().filter(|vitals| vitals.gpu_memory_total_bytes > 0);
    spread(all, &WORKERS_GPU_USED, None, gpus().map(|vitals| vitals.gpu_memory_used_bytes as f64));
    spread(all, &WORKERS_GPU_BUSY, None, vitals.iter().filter_map(|vitals| vitals.gpu_busy));
}

/// The least, the mean and the most of some values; nothing of none.
fn spread(all: &mut Exposition, metric: &Metric, part: Option<&str>, values: impl Iterator<Item = f64>) {
    let (mut least, mut most, mut sum, mut count) = (f64::INFINITY, f64::NEG_INFINITY, 0.0, 0u64);
    for value in values {
        (least, most, sum, count) = (least.min(value), most.max(value), sum + value, count + 1);
    }
    if count > 0 {
        for (stat, value) in STATS.iter().zip([least, sum / count as f64, most]) {
            all.put(metric, &[&[*stat][..], part.as_slice()].concat(), value);
        }
    }
}

fn job_metrics(all: &mut Exposition, job: &JobReport) {
    all.put(&JOB_STAGE, &[], f64::from(job.stage));
    let waiting = job.units.saturating_sub(job.units_done + job.units_given_up + job.units_held);
    for (place, units) in PLACES.iter().zip([waiting, job.units_held, job.units_done, job.units_given_up]) {
        all.put(&JOB_UNITS, &[place], units as f64);
    }
    all.put(&JOB_UNITS_PER_SECOND, &[], job.units_per_second);
    all.put(&JOB_SAMPLES, &[], job.samples as f64);
    all.put(&SAMPLES_PER_SECOND, &[], job.samples_per_second);
    all.put(&JOB_REMAINING, &[], job.seconds_left.unwrap_or(f64::NAN));
    for (name, count) in &job.results {
        all.put(&JOB_RESULTS, &[name], *count as f64);
    }
    let loading = job.workers.iter().filter(|worker| worker.slots == 0).count();
    for state in STATES {
        let here = match *state {
            "loading" => loading,
            "working" => job.workers.len() - loading,
            _ => 0,
        };
        all.put(&WORKERS, &[state], here as f64);
    }
    spread(all, &WORKERS_SILENT, None, job.workers.iter().map(|worker| worker.silent_ms as f64 / 1000.0));
    let vitals: Vec<_> = job.workers.iter().filter_map(|worker| worker.vitals).collect();
    processes(all, &vitals);
}

type Counts = BTreeMap<String, u64>;

fn take(counts: &mut Counts, name: &str) -> f64 {
    counts.remove(name).unwrap_or(0) as f64
}

/// What has befallen workers: told even where it is none, so that the first is seen to rise.
fn events(all: &mut Exposition, report: &StatusReport, counts: &mut Counts) {
    for event in EVENTS {
        let count = match *event {
            "joined" => report.totals.workers_joined as f64,
            event => take(counts, &format!("workers_{event}")),
        };
        all.put(&WORKER_EVENTS, &[event], count);
    }
}

/// Sorts the counts into metrics of their own.
fn counted(all: &mut Exposition, of_a_run: bool, mut counts: Counts) {
    if of_a_run {
        for (metric, name) in [
            (&STEPS_NOT_FINITE, "skipped_steps_not_finite"),
            (&STRAGGLERS, "stragglers"),
            (&CACHE_HITS, "cache_hits"),
            (&CACHE_MISSES, "cache_misses"),
            (&CACHE_FETCHED, "cache_fetched_bytes"),
            (&CACHE_EVICTED, "cache_evicted_bytes"),
            (&JOURNAL_DROPPED, "journal_lines_dropped"),
            (&JOURNAL_FAILED, "journal_writes_failed"),
        ] {
            all.put(metric, &[], take(&mut counts, name));
        }
        for result in ENCODED {
            all.put(&CAPTIONS_ENCODED, &[result], take(&mut counts, &format!("captions_{result}")));
        }
    }
    for (metric, name) in [(&STORE_READ, "store_read_bytes"), (&STORE_WRITTEN, "store_written_bytes")] {
        all.put(metric, &["worker"], take(&mut counts, name));
    }
    // Of this process, whose stores are told of below.
    counts.remove("store_retries");
    for (name, count) in &counts {
        let count = *count as f64;
        let of_store = |prefix: &str| {
            let (operation, reason) = name.strip_prefix(prefix)?.split_once('_')?;
            OPERATIONS.contains(&operation).then_some((operation, reason))
        };
        match (name.strip_prefix("refused_"), name.strip_prefix("skipped_").filter(|_| of_a_run)) {
            (Some(reason), _) => all.put(&REFUSED, &[reason], count),
            (_, Some(reason)) => all.put(&SKIPPED, &[reason], count),
            _ => match (of_store("store_retried_"), of_store("store_failed_")) {
                (Some((operation, reason)), _) => all.put(&STORE_RETRIES, &["worker", operation, reason], count),
                (_, Some((operation, reason))) => all.put(&STORE_FAILURES, &["worker", operation, reason], count),
                _ => all.put(&COUNTED, &[name], count),
            },
        }
    }
}

/// What this process's stores did, and its traces.
fn stores(all: &mut Exposition) {
    let totals = ella_store::totals();
    let mut put = |metric: &Metric, counts: &[RetryCount]| {
        for RetryCount { operation, reason, count } in counts {
            all.put(metric, &["coordinator", &operation.to_string(), &reason.replace(' ', "_")], *count as f64);
        }
    };
    put(&STORE_RETRIES, &totals.retried);
    put(&STORE_FAILURES, &totals.failed);
    all.put(&STORE_READ, &["coordinator"], totals.read_bytes as f64);
    all.put(&STORE_WRITTEN, &["coordinator"], totals.written_bytes as f64);
    for (result, count) in SPANS.iter().zip(crate::trace::counts()) {
        all.put(&SPANS_TOLD, &[result], count as f64);
    }
}
