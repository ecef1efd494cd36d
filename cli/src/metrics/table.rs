//! A run's measurements as columns.

use std::collections::BTreeSet;
use std::fmt::Write;

use ella_coordinator::metrics::PARTS;

use crate::run::Metric;

/// A column's values, one for each step.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Values {
    /// Counts and numbers of things.
    Whole(Vec<i64>),
    /// Milliseconds since 1970.
    Time(Vec<i64>),
    /// Measurements; none where it was not measured, or was not finite.
    Real(Vec<Option<f64>>),
}

/// A column.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) values: Values,
}

/// All of it, in the order of the steps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Table {
    pub(super) rows: usize,
    pub(super) columns: Vec<Column>,
}

impl Table {
    /// Of steps in their order, each once.
    pub(super) fn of(metrics: &[Metric]) -> Self {
        let whole = |name: &str, value: fn(&Metric) -> u64| Column {
            name: name.to_owned(),
            values: Values::Whole(metrics.iter().map(|metric| value(metric).cast_signed()).collect()),
        };
        let real = |name: &str, value: fn(&Metric) -> Option<f64>| Column {
            name: name.to_owned(),
            values: Values::Real(metrics.iter().map(|metric| value(metric).filter(|value| value.is_finite())).collect()),
        };
        let time = Values::Time(metrics.iter().map(|metric| metric.at_unix_ms.cast_signed()).collect());
        let mut columns = vec![
            whole("step", |metric| metric.step),
            Column { name: "time".to_owned(), values: time },
            whole("term", |metric| metric.term),
            whole("samples", |metric| metric.samples),
            real("loss", |metric| metric.loss),
            real("held_out_loss", |metric| metric.held_out_loss),
            real("grad_norm", |metric| metric.grad_norm),
            real("lr", |metric| metric.lr),
            real("step_seconds", |metric| Some(metric.step_seconds)),
        ];
        let mut parts: Vec<&str> = PARTS.to_vec();
        // Of another version of ella.
        let others: BTreeSet<&str> =
            metrics.iter().flat_map(|metric| metric.parts.iter().flatten()).map(|(name, _)| name.as_str()).collect();
        parts.extend(others.into_iter().filter(|name| !PARTS.contains(name)));
        for part in parts {
            let seconds = metrics.iter().map(|metric| metric.parts.as_ref()?.get(part).copied().filter(|value| value.is_finite()));
            columns.push(Column { name: format!("seconds.{part}"), values: Values::Real(seconds.collect()) });
        }
        columns.extend(counted("skipped", metrics, |metric| &metric.skipped));
        columns.extend(counted("read", metrics, |metric| &metric.read));
        Self { rows: metrics.len(), columns }
    }

    pub(super) fn column(&self, name: &str) -> Option<&Values> {
        self.columns.iter().find(|column| column.name == name).map(|column| &column.values)
    }

    /// As comma-separated values; empty where there is none.
    pub(super) fn csv(&self) -> String {
        let names: Vec<String> = self.columns.iter().map(|column| quoted(&column.name)).collect();
        let mut text = names.join(",") + "\n";
        for row in 0..self.rows {
            for (at, column) in self.columns.iter().enumerate() {
                let comma = if at == 0 { "" } else { "," };
                // Writing to a String can't fail.
                let _ = match &column.values {
                    Values::Whole(values) | Values::Time(values) => write!(text, "{comma}{}", values[row]),
                    Values::Real(values) => write!(text, "{comma}{}", values[row].map_or_else(String::new, |value| value.to_string())),
                };
            }
            text.push('\n');
        }
        text
    }

    /// As one JSON object a line; `null` where there is none.
    pub(super) fn jsonl(&self) -> String {
        let mut text = String::new();
        for row in 0..self.rows {
            let members = self.columns.iter().map(|column| {
                let value = match &column.values {
                    Values::Whole(values) | Values::Time(values) => values[row].into(),
                    Values::Real(values) => values[row].map_or(serde_json::Value::Null, Into::into),
                };
                format!("{}:{value}", serde_json::Value::from(column.name.as_str()))
            });
            let _ = writeln!(text, "{{{}}}", members.collect::<Vec<_>>().join(","));
        }
        text
    }
}

/// A column for each name that is counted anywhere; 0 where it is not.
fn counted(kind: &str, metrics: &[Metric], counts: fn(&Metric) -> &std::collections::BTreeMap<String, u64>) -> Vec<Column> {
    let names: BTreeSet<&String> = metrics.iter().flat_map(|metric| counts(metric).keys()).collect();
    let of = |name: &&String| metrics.iter().map(|metric| counts(metric).get(*name).map_or(0, |count| count.cast_signed())).collect();
    names.iter().map(|name| Column { name: format!("{kind}.{name}"), values: Values::Whole(of(name)) }).collect()
}

fn quoted(name: &str) -> String {
    if name.contains([',', '"', '\n']) { format!("\"{}\"", name.replace('"', "\"\"")) } else { name.to_owned() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn table() -> Table {
        let parts = |forward: f64| Some([("forward".to_owned(), forward), ("polish".to_owned(), 0.5)].into());
        let metrics = [
            Metric {
                term: 1,
                at_unix_ms: 1_000,
                step: 1,
                samples: 4,
                loss: Some(2.0),
                lr: Some(0.125),
                parts: parts(0.25),
                ..Metric::default()
            },
            Metric {
                term: 2,
                at_unix_ms: 3_000,
                step: 2,
                samples: 3,
                loss: None,
                grad_norm: Some(1.5),
                held_out_loss: Some(0.75),
                step_seconds: 2.0,
                skipped: [("a,b".to_owned(), 7)].into(),
                ..Metric::default()
            },
        ];
        Table::of(&metrics)
    }

    #[test]
    fn a_run_is_a_table() {
        let table = table();
        assert_eq!(table.column("step"), Some(&Values::Whole(vec![1, 2])));
        assert_eq!(table.column("time"), Some(&Values::Time(vec![1_000, 3_000])));
        assert_eq!(table.column("loss"), Some(&Values::Real(vec![Some(2.0), None])));
        assert_eq!(table.column("seconds.forward"), Some(&Values::Real(vec![Some(0.25), None])));
        assert_eq!(table.column("seconds.polish"), Some(&Values::Real(vec![Some(0.5), None])), "a part of another version");
        assert_eq!(table.column("skipped.a,b"), Some(&Values::Whole(vec![0, 7])));
    }

    #[test]
    fn it_is_text_too() {
        let table = table();
        let csv = table.csv();
        let lines: Vec<&str> = csv.lines().collect();
        assert!(lines[0].starts_with("step,time,term,samples,loss,held_out_loss,grad_norm,lr,step_seconds,seconds.data,"), "{csv}");
        assert!(
            lines[0].ends_with(",\"skipped.a,b\"") && lines[1].starts_with("1,1000,1,4,2,,,0.125,0,") && lines[2].ends_with(",7"),
            "{csv}"
        );
        let second: serde_json::Value = serde_json::from_str(table.jsonl().lines().nth(1).unwrap()).unwrap();
        assert!(second["loss"].is_null() && second["grad_norm"] == 1.5 && second["skipped.a,b"] == 7 && second["step"] == 2, "{second}");
    }
}
