//! The two text formats.

use super::{ALL, Kind, Metric};
use std::collections::BTreeMap;
use std::fmt::Write;

/// A text format that Prometheus reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' own, version 0.0.4.
    Plain,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The one that a request's `Accept` header asks for.
    pub fn accepted(accept: Option<&str>) -> Self {
        let asks = |wanted: &str| {
            let mut parts = wanted.split(';').map(str::trim);
            let refuses = |parameter: &str| parameter.strip_prefix("q=").is_some_and(|q| q.parse::<f64>().is_ok_and(|q| q == 0.0));
            parts.next() == Some("application/openmetrics-text") && !parts.any(refuses)
        };
        if accept.is_some_and(|accept| accept.split(',').any(asks)) { Self::OpenMetrics } else { Self::Plain }
    }

    /// The `Content-Type` of what is written in it.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Plain => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Values by metric, to be written in the table's order.
#[derive(Debug, Default)]
pub(super) struct Exposition(BTreeMap<&'static str, Vec<(String, String)>>);

impl Exposition {
    /// A value with the values of the metric's labels, in their order.
    pub(super) fn put(&mut self, metric: &Metric, labels: &[&str], value: f64) {
        debug_assert_eq!(labels.len(), metric.labels.len(), "{}", metric.name);
        let pairs: Vec<String> = metric.labels.iter().zip(labels).map(|(label, value)| pair(label.name, value)).collect();
        self.0.entry(metric.name).or_default().push((pairs.join(","), number(value)));
    }

    /// A histogram of counts, each of its own bucket, and the bucket's most; the last has none.
    pub(super) fn histogram(&mut self, metric: &Metric, buckets: &[(Option<f64>, u64)], sum: f64) {
        let (mut lines, mut below) = (Vec::new(), 0);
        for (most, count) in buckets {
            below += count;
            lines.push((format!("_bucket:{}", pair("le", &most.map_or_else(|| "+Inf".to_owned(), number))), below.to_string()));
        }
        lines.push(("_sum:".to_owned(), number(sum)));
        lines.push(("_count:".to_owned(), below.to_string()));
        self.0.insert(metric.name, lines);
    }

    /// All of it as text.
    pub(super) fn write(&self, format: Format) -> String {
        let mut text = String::new();
        for metric in ALL {
            let Some(values) = self.0.get(metric.name) else { continue };
            let (family, kind) = family(metric, format);
            // Writing to a String can't fail.
            let _ = writeln!(text, "# HELP {family} {}\n# TYPE {family} {kind}", metric.help);
            if let (Format::OpenMetrics, Some(unit)) = (format, metric.unit()) {
                let _ = writeln!(text, "# UNIT {family} {unit}");
            }
            for (labels, value) in values {
                let (suffix, labels) = match metric.kind {
                    Kind::Histogram => labels.split_once(':').unwrap_or_default(),
                    _ => ("", labels.as_str()),
                };
                let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
                let _ = writeln!(text, "{}{suffix}{braces} {value}", metric.name);
            }
        }
        if format == Format::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }
}

/// The name and the kind in a metric's header: OpenMetrics leaves out what only its values' names have.
fn family(metric: &Metric, format: Format) -> (&'static str, &'static str) {
    let without = |suffix: &str| metric.name.strip_suffix(suffix).unwrap_or(metric.name);
    match (metric.kind, format) {
        (Kind::Gauge, _) | (Kind::Info, Format::Plain) => (metric.name, "gauge"),
        (Kind::Histogram, _) => (metric.name, "histogram"),
        (Kind::Counter, Format::Plain) => (metric.name, "counter"),
        (Kind::Counter, Format::OpenMetrics) => (without("_total"), "counter"),
        (Kind::Info, Format::OpenMetrics) => (without("_info"), "info"),
    }
}

fn pair(name: &str, value: &str) -> String {
    format!("{name}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".to_owned(),
        value if value.is_infinite() => if value > 0.0 { "+Inf" } else { "-Inf" }.to_owned(),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{RUN_INFO, STEP, STEP_DURATION, STEPS};

    #[test]
    fn openmetrics_is_for_who_asks() {
        for (accept, format) in [
            (None, Format::Plain),
            (Some("text/plain"), Format::Plain),
            (Some("application/openmetrics-text;version=1.0.0,text/plain;q=0.5"), Format::OpenMetrics),
            (Some("text/plain;q=0.5, application/openmetrics-text; version=1.0.0; q=0.6"), Format::OpenMetrics),
            (Some("application/openmetrics-text;q=0"), Format::Plain),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept:?}");
        }
    }

    #[test]
    fn both_formats_are_written() {
        let mut all = Exposition::default();
        all.put(&STEPS, &[], 3.0);
        all.put(&STEP, &[], f64::NAN);
        all.put(&RUN_INFO, &["s3://b/\"x\"\n", "a\\b"], 1.0);
        all.histogram(&STEP_DURATION, &[(Some(0.5), 2), (Some(1.0), 0), (None, 1)], 7.25);
        let plain = all.write(Format::Plain);
        assert!(plain.starts_with("# HELP ella_run_info "), "{plain}");
        for line in [
            "# TYPE ella_run_info gauge",
            "ella_run_info{run=\"s3://b/\\\"x\\\"\\n\",kind=\"a\\\\b\"} 1",
            "ella_step NaN",
            "# TYPE ella_steps_total counter",
            "ella_steps_total 3",
            "ella_step_duration_seconds_bucket{le=\"0.5\"} 2",
            "ella_step_duration_seconds_bucket{le=\"1\"} 2",
            "ella_step_duration_seconds_bucket{le=\"+Inf\"} 3",
            "ella_step_duration_seconds_sum 7.25",
            "ella_step_duration_seconds_count 3",
        ] {
            assert!(plain.lines().any(|l| l == line), "{line} is not in:\n{plain}");
        }
        let open = all.write(Format::OpenMetrics);
        for line in ["# TYPE ella_run info", "# TYPE ella_steps counter", "ella_steps_total 3", "# UNIT ella_step_duration_seconds seconds"]
        {
            assert!(open.lines().any(|l| l == line), "{line} is not in:\n{open}");
        }
        assert!(open.ends_with("# EOF\n") && !plain.contains("# UNIT") && !plain.contains("EOF"));
    }
}
