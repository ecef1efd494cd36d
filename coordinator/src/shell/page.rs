//! The status as a page for people.

use crate::status::{FailedUnitReport, JobReport, JobWorkerReport, StatusReport, WorkerReport};
use std::collections::BTreeMap;

/// A page without scripts or anything from elsewhere; it reloads itself.
pub(super) fn html(report: &StatusReport) -> String {
    let (share, body) = match &report.job {
        Some(job) => (share(job.units_done, job.units), job_body(report, job)),
        None => (share(report.step, report.steps), run_body(report)),
    };
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"2\"><title>ella: {url}</title>\
         <style>body{{font:15px system-ui,sans-serif;margin:2rem;max-width:60rem}}th,td{{text-align:left;padding:.2rem .8rem .2rem 0;\
         vertical-align:top}}th{{font-weight:600}}.bar{{background:#ddd;height:.6rem;border-radius:.3rem}}.bar div{{background:#27c;height:100%;\
         border-radius:.3rem}}h2{{font-size:1.1rem;margin-top:1.5rem}}</style></head><body>\n<h1>{url}</h1>\n\
         <div class=\"bar\"><div style=\"width:{share:.1}%\"></div></div>\n{body}\
         <h2>Refused, retried, skipped</h2>\n<table>\n{counts}</table>\n</body></html>\n",
        url = escape(&report.run_url),
        counts = count_rows(&report.counts),
    )
}

fn share(done: u64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { 100.0 * done as f64 / of as f64 }
}

fn run_body(report: &StatusReport) -> String {
    let facts = facts(&[
        ("phase", report.phase.clone()),
        ("reason", report.reason.clone()),
        ("step", format!("{} of {}", report.step, report.steps)),
        ("epoch", report.epoch.to_string()),
        ("samples", report.samples.to_string()),
        ("loss", report.loss.map_or_else(|| "–".to_owned(), |loss| format!("{loss:.5}"))),
        ("samples/s", format!("{:.2}", report.samples_per_second)),
        ("last commit", format!("step {}", report.last_commit_step)),
        ("term, generation", format!("{}, {}", report.term, report.generation)),
    ]);
    let workers: String = report.workers.iter().map(worker_row).collect();
    format!(
        "{facts}<h2>Workers</h2>\n<table>\n<tr><th>rank</th><th>worker</th><th>host</th><th>pid</th><th>device</th><th>step</th>\
         <th>silent</th></tr>\n{workers}</table>\n"
    )
}

fn job_body(report: &StatusReport, job: &JobReport) -> String {
    let JobReport { kind, stage, units, units_done, units_held, units_given_up, samples, samples_per_second, .. } = job;
    let facts = facts(&[
        ("job", kind.clone()),
        ("phase", report.phase.clone()),
        ("reason", report.reason.clone()),
        ("stage", stage.to_string()),
        ("units", format!("{units_done} of {units} done, {units_held} held, {units_given_up} given up")),
        ("samples", format!("{samples}, {samples_per_second:.2}/s")),
        ("time left", job.seconds_left.map_or_else(String::new, |left| format!("{left:.0} s for this stage"))),
    ]);
    let workers: String = job.workers.iter().map(job_worker_row).collect();
    let failed = |unit: &FailedUnitReport| format!("<tr><td>{}</td><td>{}</td></tr>\n", escape(&unit.unit), escape(&unit.error));
    let given_up: String = job.given_up.iter().map(failed).collect();
    format!(
        "{facts}<h2>Workers</h2>\n<table>\n<tr><th>worker</th><th>host</th><th>pid</th><th>device</th><th>holds</th><th>done</th>\
         <th>silent</th></tr>\n{workers}</table>\n<h2>What came of the samples</h2>\n<table>\n{results}</table>\n\
         <h2>Given up</h2>\n<table>\n{given_up}</table>\n",
        results = count_rows(&job.results),
    )
}

fn facts(facts: &[(&str, String)]) -> String {
    let row = |(name, value): &(&str, String)| format!("<tr><th>{name}</th><td>{}</td></tr>\n", escape(value));
    let rows: String = facts.iter().filter(|(_, value)| !value.is_empty()).map(row).collect();
    format!("<table>\n{rows}</table>\n")
}

fn count_rows(counts: &BTreeMap<String, u64>) -> String {
    counts.iter().map(|(name, n)| format!("<tr><td>{}</td><td>{n}</td></tr>\n", escape(name))).collect()
}

fn job_worker_row(worker: &JobWorkerReport) -> String {
    let JobWorkerReport { worker_id, host, pid, device, slots, held, units_done, silent_ms, .. } = worker;
    let held: String = held.iter().map(|held| format!("{} ({})<br>", escape(&held.unit), held.done)).collect();
    format!(
        "<tr><td>{}</td><td>{}</td><td>{pid}</td><td>{}</td><td>{held}of {slots}</td><td>{units_done}</td><td>{silent_ms} ms</td></tr>\n",
        escape(worker_id),
        escape(host),
        escape(device)
    )
}

fn worker_row(worker: &WorkerReport) -> String {
    let WorkerReport { worker_id, state, rank, leaving, host, pid, device, step, silent_ms, .. } = worker;
    let mut rank = rank.map_or_else(|| escape(state), |rank| rank.to_string());
    if *leaving {
        rank += ", leaving";
    }
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
    use crate::status::HeldUnitReport;

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

    #[test]
    fn the_page_escapes_what_comes_from_outside() {
        let html = html(&report());
        assert!(html.contains("s3://b/&lt;script&gt;") && !html.contains("<script>"), "{html}");
        assert!(html.contains("&lt;w&gt;&amp;&quot;&#39;"));
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
        let html = html(&job());
        for text in
            ["4 of 9 done, 1 held, 1 given up", "&lt;u&gt; (7)<br>of 2", "&lt;truncated&gt;", "refused.too_small</td><td>3", "width:44.4%"]
        {
            assert!(html.contains(text), "{text} is not in: {html}");
        }
        assert!(!html.contains("commit") && !html.contains("<u>"));
    }
}
