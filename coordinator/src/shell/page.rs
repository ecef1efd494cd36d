//! The status as Prometheus text.

use crate::status::{JobReport, StatusReport};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Phases, as `ella_phase` names them.
const PHASES: [&str; 9] = ["waiting", "starting", "training", "regrouping", "working", "draining", "done", "preempted", "failed"];

/// Text in Prometheus' format, version 0.0.4.
#[derive(Default)]
struct Metrics(String);

impl Metrics {
    fn add(&mut self, name: &str, kind: &str, help: &str, values: &[(String, f64)]) {
        // Writing to a String can't fail.
        let _ = writeln!(self.0, "# HELP ella_{name} {help}\n# TYPE ella_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(self.0, "ella_{name}{labels} {value}");
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.add(name, "gauge", help, &[(String::new(), value)]);
    }
}

/// The status as Prometheus reads it.
pub(super) fn prometheus(report: &StatusReport) -> String {
    let mut metrics = Metrics::default();
    let phases = PHASES.map(|phase| (label("phase", phase), f64::from(u8::from(phase == report.phase))));
    metrics.add("phase", "gauge", "1 for the phase that the run or job is in.", &phases);
    match &report.job {
        Some(job) => job_metrics(&mut metrics, job),
        None => run_metrics(&mut metrics, report),
    }
    metrics.add("counted_total", "counter", "What was refused, retried or skipped, by name.", &named(&report.counts));
    metrics.0
}

fn run_metrics(metrics: &mut Metrics, report: &StatusReport) {
    metrics.gauge("term", "Number of this coordinator incarnation.", report.term as f64);
    metrics.gauge("generation", "Number of the membership.", report.generation as f64);
    metrics.gauge("step", "Applied optimizer steps.", report.step as f64);
    metrics.gauge("steps_target", "Steps in all.", report.steps as f64);
    metrics.gauge("samples", "Samples trained on since the run began.", report.samples as f64);
    metrics.gauge("loss", "Training loss of the newest step.", report.loss.unwrap_or(f64::NAN));
    metrics.gauge("samples_per_second", "Throughput over the last steps.", report.samples_per_second);
    metrics.gauge("last_commit_step", "Step of the newest commit.", report.last_commit_step as f64);
    metrics.add("commits_total", "counter", "Commits written by this coordinator.", &[(String::new(), report.commits as f64)]);
    let ranks: Vec<_> = report.workers.iter().filter_map(|worker| Some((worker.rank?, worker))).collect();
    metrics.gauge("workers", "Workers that take part.", ranks.len() as f64);
    metrics.gauge("workers_without_place", "Workers that load, or wait for a place.", (report.workers.len() - ranks.len()) as f64);
    let silent: Vec<_> = ranks.iter().map(|(rank, w)| (label("rank", &rank.to_string()), w.silent_ms as f64 / 1000.0)).collect();
    metrics.add("worker_silent_seconds", "gauge", "Time since a worker was last heard of.", &silent);
}

fn job_metrics(metrics: &mut Metrics, job: &JobReport) {
    metrics.gauge("job_stage", "The stage that is worked on, from 1.", f64::from(job.stage));
    let waiting = job.units - job.units_done - job.units_given_up - job.units_held;
    let places = [("waiting", waiting), ("held", job.units_held), ("done", job.units_done), ("given_up", job.units_given_up)];
    metrics.add(
        "job_units",
        "gauge",
        "Units of this stage, by where they are.",
        &places.map(|(place, n)| (label("place", place), n as f64)),
    );
    metrics.gauge("samples", "Samples of all stages, those of held units included.", job.samples as f64);
    metrics.gauge("samples_per_second", "Throughput over the last minute.", job.samples_per_second);
    metrics.gauge("job_seconds_left", "Until this stage ends, at the rate of the last minute.", job.seconds_left.unwrap_or(f64::NAN));
    metrics.gauge("workers", "Workers that take part.", job.workers.len() as f64);
    metrics.add("job_results_total", "counter", "What came of the samples of units that are done, by name.", &named(&job.results));
}

fn named(counts: &BTreeMap<String, u64>) -> Vec<(String, f64)> {
    counts.iter().map(|(name, n)| (label("name", name), *n as f64)).collect()
}

fn label(name: &str, value: &str) -> String {
    format!("{{{name}=\"{}\"}}", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{FailedUnitReport, HeldUnitReport, JobWorkerReport, WorkerReport};

    fn report() -> StatusReport {
        StatusReport {
            run_url: "s3://b/<script>".into(),
            phase: "training".into(),
            step: 3,
            steps: 10,
            loss: Some(0.5),
            workers: vec![WorkerReport { worker_id: "<w>&\"'".into(), silent_ms: 1500, rank: Some(0), ..WorkerReport::default() }],
            counts: [("skipped_\"odd\"\n".to_owned(), 2)].into(),
            ..StatusReport::default()
        }
    }

    fn job() -> StatusReport {
        let held = vec![HeldUnitReport { unit: "<u>".into(), done: 7, held_ms: 10 }];
        let workers = vec![JobWorkerReport { worker_id: "w".into(), slots: 2, held, ..JobWorkerReport::default() }];
        let given_up = vec![FailedUnitReport { unit: "a.tar".into(), error: "<truncated>".into(), permanent: true }];
        let results = [("refused.too_small".to_owned(), 3)].into();
        let job = JobReport {
            stage: 2,
            units: 9,
            units_done: 4,
            units_held: 1,
            units_given_up: 1,
            workers,
            given_up,
            results,
            ..JobReport::default()
        };
        StatusReport { phase: "working".into(), job: Some(job), ..StatusReport::default() }
    }

    #[test]
    fn a_job_is_shown_as_a_job() {
        let text = prometheus(&job());
        for line in [
            "ella_phase{phase=\"working\"} 1",
            "ella_job_units{place=\"waiting\"} 3",
            "ella_job_results_total{name=\"refused.too_small\"} 3",
            "ella_job_seconds_left NaN",
            "ella_workers 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        assert!(!text.contains("ella_step"));
    }

    #[test]
    fn metrics_are_prometheus_text() {
        let text = prometheus(&report());
        for line in [
            "ella_step 3",
            "ella_phase{phase=\"training\"} 1",
            "ella_phase{phase=\"failed\"} 0",
            "ella_worker_silent_seconds{rank=\"0\"} 1.5",
            "ella_counted_total{name=\"skipped_\\\"odd\\\"\\n\"} 2",
            "# TYPE ella_commits_total counter",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        assert!(prometheus(&StatusReport::default()).contains("ella_loss NaN"));
    }
}
