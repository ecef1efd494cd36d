//! The status as a page for people and as Prometheus text.

use crate::status::{StatusReport, WorkerReport};
use std::fmt::Write;

/// Phases, as `ella_phase` names them.
const PHASES: [&str; 7] = ["waiting", "starting", "training", "draining", "done", "preempted", "failed"];

/// Prometheus' text format, version 0.0.4.
pub(super) fn prometheus(report: &StatusReport) -> String {
    let mut out = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, values: &[(String, f64)]| {
        // Writing to a String can't fail.
        let _ = writeln!(out, "# HELP ella_{name} {help}\n# TYPE ella_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(out, "ella_{name}{labels} {value}");
        }
    };
    let one = |value: f64| [(String::new(), value)];
    metric("term", "gauge", "Number of this coordinator incarnation.", &one(report.term as f64));
    metric("generation", "gauge", "Number of the membership.", &one(report.generation as f64));
    let phases = PHASES.map(|phase| (label("phase", phase), f64::from(u8::from(phase == report.phase))));
    metric("phase", "gauge", "1 for the phase that the run is in.", &phases);
    metric("step", "gauge", "Applied optimizer steps.", &one(report.step as f64));
    metric("steps_target", "gauge", "Steps in all.", &one(report.steps as f64));
    metric("samples", "gauge", "Samples trained on since the run began.", &one(report.samples as f64));
    metric("loss", "gauge", "Training loss of the newest step.", &one(report.loss.unwrap_or(f64::NAN)));
    metric("samples_per_second", "gauge", "Throughput over the last steps.", &one(report.samples_per_second));
    metric("last_commit_step", "gauge", "Step of the newest commit.", &one(report.last_commit_step as f64));
    metric("commits_total", "counter", "Commits written by this coordinator.", &one(report.commits as f64));
    metric("workers", "gauge", "Workers that take part.", &one(report.workers.len() as f64));
    let silent: Vec<_> = report.workers.iter().map(|w| (label("rank", &w.rank.to_string()), w.silent_ms as f64 / 1000.0)).collect();
    metric("worker_silent_seconds", "gauge", "Time since a worker was last heard of.", &silent);
    let counts: Vec<_> = report.counts.iter().map(|(name, n)| (label("name", name), *n as f64)).collect();
    metric("counted_total", "counter", "What was refused, retried or skipped, by name.", &counts);
    out
}

fn label(name: &str, value: &str) -> String {
    format!("{{{name}=\"{}\"}}", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

/// A page without scripts or anything from elsewhere; it reloads itself.
pub(super) fn html(report: &StatusReport) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.5}"));
    let facts = [
        ("phase", report.phase.clone()),
        ("reason", report.reason.clone()),
        ("step", format!("{} of {}", report.step, report.steps)),
        ("epoch", report.epoch.to_string()),
        ("samples", report.samples.to_string()),
        ("loss", number(report.loss)),
        ("samples/s", format!("{:.2}", report.samples_per_second)),
        ("last commit", format!("step {}", report.last_commit_step)),
        ("term, generation", format!("{}, {}", report.term, report.generation)),
    ];
    let facts: String =
        facts.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| format!("<tr><th>{k}</th><td>{}</td></tr>\n", escape(v))).collect();
    let workers: String = report.workers.iter().map(worker_row).collect();
    let counts: String = report.counts.iter().map(|(k, n)| format!("<tr><td>{}</td><td>{n}</td></tr>\n", escape(k))).collect();
    let share = if report.steps == 0 { 0.0 } else { 100.0 * report.step as f64 / report.steps as f64 };
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"2\"><title>ella: {url}</title>\
         <style>body{{font:15px system-ui,sans-serif;margin:2rem;max-width:60rem}}th,td{{text-align:left;padding:.2rem .8rem .2rem 0;\
         vertical-align:top}}th{{font-weight:600}}.bar{{background:#ddd;height:.6rem;border-radius:.3rem}}.bar div{{background:#27c;height:100%;\
         border-radius:.3rem}}h2{{font-size:1.1rem;margin-top:1.5rem}}</style></head><body>\n<h1>{url}</h1>\n\
         <div class=\"bar\"><div style=\"width:{share:.1}%\"></div></div>\n<table>\n{facts}</table>\n\
         <h2>Workers</h2>\n<table>\n<tr><th>rank</th><th>worker</th><th>host</th><th>pid</th><th>device</th><th>step</th><th>silent</th></tr>\n\
         {workers}</table>\n<h2>Refused, retried, skipped</h2>\n<table>\n{counts}</table>\n</body></html>\n",
        url = escape(&report.run_url),
    )
}

fn worker_row(worker: &WorkerReport) -> String {
    let WorkerReport { worker_id, rank, host, pid, device, step, silent_ms, .. } = worker;
    format!(
        "<tr><td>{rank}</td><td>{}</td><td>{}</td><td>{pid}</td><td>{}</td><td>{step}</td><td>{silent_ms} ms</td></tr>\n",
        escape(worker_id),
        escape(host),
        escape(device)
    )
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> StatusReport {
        StatusReport {
            run_url: "s3://b/<script>".into(),
            phase: "training".into(),
            step: 3,
            steps: 10,
            loss: Some(0.5),
            workers: vec![WorkerReport { worker_id: "<w>&\"'".into(), silent_ms: 1500, ..WorkerReport::default() }],
            counts: [("skipped_\"odd\"\n".to_owned(), 2)].into(),
            ..StatusReport::default()
        }
    }

    #[test]
    fn the_page_escapes_what_comes_from_outside() {
        let html = html(&report());
        assert!(html.contains("s3://b/&lt;script&gt;") && !html.contains("<script>"), "{html}");
        assert!(html.contains("&lt;w&gt;&amp;&quot;&#39;"));
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
