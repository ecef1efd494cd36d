//! What Prometheus is told: its text is as promtool wants it, and whatever reads it (the dashboard, the alert rules, the reference) speaks of
//! metrics and labels that there are.

#![allow(clippy::unwrap_used)]

mod lint;
mod promql;

use ella_coordinator::metrics::{ALL, Format, Kind, MOST_RANKS, Of, Values, render};
use ella_coordinator::status::{
    HeldUnitReport, JobReport, JobWorkerReport, NewestReport, PartsReport, StatusReport, TotalsReport, VitalsReport, WorkerReport,
};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn vitals(gpu: bool) -> VitalsReport {
    let bytes = if gpu { 1 << 30 } else { 0 };
    VitalsReport {
        memory_bytes: 1 << 30,
        cpu_seconds: 7.5,
        feed_bytes: 4096,
        gpu_memory_used_bytes: bytes,
        gpu_memory_total_bytes: bytes,
        gpu_memory_allocated_bytes: bytes,
        gpu_busy: gpu.then_some(0.5),
    }
}

/// A run in which everything has happened.
fn run(ranks: u32) -> StatusReport {
    let parts = PartsReport { forward: 0.5, reduce: 0.25, ..PartsReport::default() };
    let worker = |rank| WorkerReport {
        state: "rank".into(),
        rank: Some(rank),
        parts: Some(parts),
        vitals: Some(vitals(true)),
        ..WorkerReport::default()
    };
    let counts = [
        "refused_token",
        "skipped_captions_dropped",
        "skipped_steps_not_finite",
        "store_retried_get_timeout",
        "store_failed_put_no_space",
        "store_read_bytes",
        "captions_embedded",
        "cache_hits",
        "cache_bypassed_full",
        "workers_lost",
        "stragglers",
        "odd \"name\"\n",
    ];
    StatusReport {
        run_url: "s3://bucket/run".into(),
        phase: "training".into(),
        loss: Some(0.5),
        newest: Some(NewestReport { grad_norm: None, held_out_loss: Some(0.25), ..NewestReport::default() }),
        totals: TotalsReport { steps: 3, step_seconds: 2.5, step_buckets: vec![0, 0, 0, 0, 0, 0, 1, 2], ..TotalsReport::default() },
        workers: (0..ranks).map(worker).chain([WorkerReport { state: "spare".into(), ..WorkerReport::default() }]).collect(),
        counts: counts.iter().map(|name| ((*name).to_owned(), 3)).collect(),
        ..StatusReport::default()
    }
}

fn job() -> StatusReport {
    let held = vec![HeldUnitReport { unit: "u".into(), done: 7, held_ms: 10 }];
    let workers = vec![JobWorkerReport { slots: 2, held, vitals: Some(vitals(false)), ..JobWorkerReport::default() }];
    let results = [("refused.too_small".to_owned(), 3)].into();
    let job =
        JobReport { kind: "prepare".into(), stage: 2, units: 9, units_done: 4, units_held: 1, workers, results, ..JobReport::default() };
    StatusReport { phase: "working".into(), job: Some(job), ..StatusReport::default() }
}

#[test]
fn both_formats_pass_the_lint_and_tell_every_metric() {
    let mut told = BTreeSet::new();
    for report in [run(3), run(MOST_RANKS as u32 + 1), job(), StatusReport::default()] {
        let plain = render(&report, Format::Plain);
        assert_eq!(lint::problems(&plain, false), Vec::<String>::new(), "{plain}");
        let open = render(&report, Format::OpenMetrics);
        assert_eq!(lint::problems(&open, true), Vec::<String>::new(), "{open}");
        told.extend(plain.lines().filter_map(|line| Some(line.strip_prefix("# TYPE ")?.split(' ').next()?.to_owned())));
    }
    if let Some(folder) = std::env::var_os("ELLA_METRICS_OUT") {
        for (name, report) in [("run", run(3)), ("large", run(MOST_RANKS as u32 + 1)), ("job", job())] {
            std::fs::write(Path::new(&folder).join(name), render(&report, Format::Plain)).unwrap();
        }
    }
    let missing: Vec<_> = ALL.iter().map(|metric| metric.name).filter(|name| !told.contains(*name)).collect();
    assert_eq!(missing, Vec::<&str>::new());
}

#[test]
fn counts_become_metrics_of_their_own() {
    let text = render(&run(2), Format::Plain);
    for line in [
        "ella_refused_total{reason=\"token\"} 3",
        "ella_skipped_total{reason=\"captions_dropped\"} 3",
        "ella_steps_not_finite_total 3",
        "ella_store_retries_total{process=\"worker\",operation=\"get\",reason=\"timeout\"} 3",
        "ella_store_failures_total{process=\"worker\",operation=\"put\",reason=\"no_space\"} 3",
        "ella_store_read_bytes_total{process=\"worker\"} 3",
        "ella_captions_encoded_total{result=\"embedded\"} 3",
        "ella_data_cache_hits_total 3",
        "ella_counted_total{name=\"cache_bypassed_full\"} 3",
        "ella_counted_total{name=\"odd \\\"name\\\"\\n\"} 3",
        "ella_worker_events_total{event=\"lost\"} 3",
        "ella_worker_events_total{event=\"left\"} 0",
        "ella_workers{state=\"rank\"} 2",
        "ella_workers{state=\"spare\"} 1",
        "ella_worker_step_part_seconds{rank=\"1\",part=\"reduce\"} 0.25",
        "ella_workers_step_part_seconds{stat=\"most\",part=\"forward\"} 0.5",
        "ella_step_duration_seconds_bucket{le=\"0.5\"} 1",
        "ella_step_duration_seconds_bucket{le=\"1\"} 3",
        "ella_step_duration_seconds_sum 2.5",
        "ella_held_out_loss 0.25",
        "ella_grad_norm NaN",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
    }
    let text = render(&job(), Format::Plain);
    for line in [
        "ella_phase{phase=\"working\"} 1",
        "ella_run_info{run=\"\",kind=\"prepare\"} 1",
        "ella_job_units{place=\"waiting\"} 4",
        "ella_job_results_total{name=\"refused.too_small\"} 3",
        "ella_job_remaining_seconds NaN",
        "ella_workers{state=\"working\"} 1",
        "ella_workers_memory_bytes{stat=\"mean\"} 1073741824",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
    }
    assert!(!text.contains("ella_step") && !text.contains("commit"), "{text}");
}

/// Ten thousand ranks must not make ten thousand series.
#[test]
fn a_large_world_is_told_of_together() {
    let (few, many) = (render(&run(MOST_RANKS as u32), Format::Plain), render(&run(10_000), Format::Plain));
    assert!(few.contains("rank=\"127\"") && !many.contains("rank=") && many.contains("ella_workers{state=\"rank\"} 10000"));
    assert!(many.len() < 20_000 && many.contains("ella_workers_memory_bytes{stat=\"least\"}"), "{} bytes", many.len());
}

#[test]
fn the_table_has_each_name_once_with_known_labels() {
    let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
    assert_eq!(names.len(), ALL.len());
    for metric in ALL {
        assert!(metric.name.starts_with("ella_") || metric.of == Of::Process, "{}", metric.name);
        assert!(metric.help.ends_with('.'), "{}", metric.name);
        assert_eq!(metric.kind == Kind::Info, metric.name.ends_with("_info"), "{}", metric.name);
    }
}

#[test]
fn the_dashboard_asks_for_what_there_is() {
    let dashboard: Value = serde_json::from_str(&read("k8s/components/prometheus/dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
    let mut queries = Vec::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is taken");
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        assert!(at("w") >= 1 && at("h") >= 1 && at("x") + at("w") <= 24, "{title}: outside the grid");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(cells.insert((x, y)), "{title}: on another panel");
            }
        }
        let targets = panel["targets"].as_array().map(Vec::as_slice).unwrap_or_default();
        assert_eq!(targets.is_empty(), panel["type"] == "row", "{title}");
        queries.extend(targets.iter().map(|target| (title.to_owned(), target["expr"].as_str().unwrap().to_owned())));
    }
    for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
        queries.push((annotation["name"].to_string(), annotation["expr"].as_str().unwrap().to_owned()));
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        if let Some(asked) = variable["definition"].as_str().and_then(|text| text.strip_prefix("label_values(")?.strip_suffix(')')) {
            let (query, _) = asked.rsplit_once(", ").unwrap();
            queries.push((variable["name"].to_string(), query.to_owned()));
        }
    }
    assert!(queries.len() > 40, "{}", queries.len());
    let problems: Vec<_> = queries.iter().flat_map(|(place, query)| promql::problems(place, query)).collect();
    assert_eq!(problems, Vec::<String>::new());
}

#[test]
fn the_alerts_ask_for_what_there_is_and_name_a_heading_to_read() {
    let rules = read("k8s/components/prometheus/rules.yaml");
    let values = |key: &str| rules.lines().filter_map(|line| line.trim().strip_prefix(key)).map(str::to_owned).collect::<Vec<_>>();
    let (alerts, queries, runbooks) = (values("- alert: "), values("expr: "), values("runbook_url: "));
    assert!(alerts.len() >= 8 && alerts.len() == queries.len() && alerts.len() == runbooks.len());
    assert_eq!(alerts.iter().collect::<BTreeSet<_>>().len(), alerts.len());
    let problems: Vec<_> = alerts.iter().zip(&queries).flat_map(|(alert, query)| promql::problems(alert, query)).collect();
    assert_eq!(problems, Vec::<String>::new());
    let guide = std::fs::read_to_string(repository().join("docs/recover.md")).ok();
    let headings = guide.map(|text| text.lines().filter(|line| line.starts_with('#')).map(anchor).collect::<BTreeSet<String>>());
    for runbook in runbooks {
        let (_, heading) = runbook.split_once("docs/recover.md#").unwrap_or_else(|| panic!("{runbook}"));
        assert!(headings.as_ref().is_none_or(|headings| headings.contains(heading)), "{runbook} is none of {headings:?}");
    }
    assert_eq!(anchor("## The run's store, and more"), "the-runs-store-and-more");
}

/// A heading as links name it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-')).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// `UPDATE=1 cargo test -p ella-coordinator --test metrics` writes it anew.
#[test]
fn the_reference_is_made_of_the_table() {
    let mut text = "# Metrics\n\nWhat a coordinator tells Prometheus at `/metrics`; [monitoring](monitoring.md) says how to read it. This page is made \
                    of the table in the code\n(`coordinator/src/metrics/table.rs`). Counters begin anew with each coordinator.\n"
        .to_owned();
    let sections = [(Of::Any, "Runs and jobs"), (Of::Run, "Runs"), (Of::Job, "Jobs"), (Of::Process, "The coordinator's process")];
    for (of, title) in sections {
        writeln!(text, "\n## {title}\n\n| name | kind | labels | |\n|---|---|---|---|").unwrap();
        for metric in ALL.iter().filter(|metric| metric.of == of) {
            let labels = metric.labels.iter().map(|label| match label.values {
                Values::Of(values) => format!("`{}`: {}", label.name, values.join(", ")),
                Values::Some { what, most } if most > 1 => format!("`{}`: {what}, {most} at most", label.name),
                Values::Some { what, .. } => format!("`{}`: {what}", label.name),
            });
            let labels = labels.collect::<Vec<_>>().join("; ");
            let kind = format!("{:?}", metric.kind).to_lowercase();
            writeln!(text, "| `{}` | {kind} | {labels} | {} |", metric.name, metric.help).unwrap();
        }
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(repository().join("docs/metrics.md"), &text).unwrap();
    }
    assert_eq!(read("docs/metrics.md"), text, "docs/metrics.md is not what the table says; UPDATE=1 writes it anew");
}
