//! One step by kernel family.

use crate::train::Trainer;
use crate::{Setting, gpu, kernels, timing};
use anyhow::{Error, Result};
use ella_cuda::profile::Event;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Steps before the one that is looked at.
const SETTLING: usize = 4;

/// Kernels that are named one by one.
const NAMED: usize = 80;

pub(crate) fn run(setting: &Setting) -> Result<Value> {
    if !setting.device.is_cuda() {
        return Ok(json!({ "skipped": "a processor runs no kernels that could be told by family" }));
    }
    let mut trainer = Trainer::new(setting, 1)?;
    for _ in 0..SETTLING {
        let batch = trainer.batch()?;
        trainer.step(&batch)?;
    }
    timing::wait(setting.device);
    gpu::reset_peak(setting.device);
    let (_, events) = ella_cuda::profile::profile(|| -> Result<(), Reported> {
        let batch = trainer.batch()?;
        trainer.step(&batch)?;
        timing::wait(setting.device);
        Ok(())
    })
    .map_err(|reported| reported.0)?;
    let mut result = by_family(events.iter().filter(|event| event.on_device));
    result["recorded_lanes"] = json!(trainer.graphs.count());
    result["micro_batch"] = json!(setting.micro_batch);
    result["memory"] = gpu::memory(setting.device);
    Ok(result)
}

/// `anyhow`'s error, which is made from the profiler's too.
struct Reported(Error);

impl From<Error> for Reported {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<ella_cuda::Error> for Reported {
    fn from(error: ella_cuda::Error) -> Self {
        Self(error.into())
    }
}

#[derive(Default)]
struct Sum {
    calls: u64,
    us: f64,
}

impl Sum {
    fn add(&mut self, event: &Event) {
        self.calls += 1;
        self.us += event.duration_us;
    }
}

/// Milliseconds, calls and share of each family; the kernels that take longest; and how long the device had nothing to do between the first
/// kernel's begin and the last one's end.
fn by_family<'a>(kernels: impl Iterator<Item = &'a Event>) -> Value {
    let (mut families, mut names) = (BTreeMap::<_, Sum>::new(), BTreeMap::<&str, Sum>::new());
    let mut spans = Vec::new();
    for event in kernels {
        families.entry(kernels::family(&event.name)).or_default().add(event);
        names.entry(&event.name).or_default().add(event);
        spans.push((event.start_us, event.start_us + event.duration_us));
    }
    let total: f64 = families.values().map(|sum| sum.us).sum();
    let row = |name: &str, sum: &Sum| json!({ "name": name, "ms": sum.us / 1e3, "calls": sum.calls, "share": sum.us / total });
    let mut families: Vec<_> = families.into_iter().collect();
    let mut names: Vec<_> = names.into_iter().collect();
    families.sort_by(|a, b| b.1.us.total_cmp(&a.1.us));
    names.sort_by(|a, b| b.1.us.total_cmp(&a.1.us));
    let (begin, end, busy) = busy(spans);
    json!({
        "kernel_ms": total / 1e3, "span_ms": (end - begin) / 1e3, "idle_ms": (end - begin - busy) / 1e3,
        "families": families.iter().map(|(name, sum)| row(name, sum)).collect::<Vec<_>>(),
        "longest": names.iter().take(NAMED).map(|(name, sum)| {
            let mut row = row(name, sum);
            row["family"] = json!(kernels::family(name));
            row
        }).collect::<Vec<_>>(),
    })
}

/// First begin, last end, and the length of the union of these spans.
fn busy(mut spans: Vec<(f64, f64)>) -> (f64, f64, f64) {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let begin = spans.first().map_or(0.0, |span| span.0);
    let (mut end, mut busy) = (begin, 0.0);
    for (from, to) in spans {
        busy += (to - from.max(end)).max(0.0);
        end = end.max(to);
    }
    (begin, end, busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_add_up_and_gaps_are_seen() {
        let event = |name: &str, start_us: f64, duration_us: f64| Event { name: name.into(), on_device: true, start_us, duration_us };
        let events = [event("nvjet_a", 10.0, 4.0), event("norm_sums_bf16", 12.0, 4.0), event("nvjet_b", 20.0, 2.0), event("x", 20.0, 1.0)];
        let found = by_family(events.iter());
        assert_eq!(found["families"][0], json!({ "name": "gemm", "ms": 6e-3, "calls": 2, "share": 6.0 / 11.0 }));
        assert_eq!((found["span_ms"].as_f64(), found["idle_ms"].as_f64()), (Some(0.012), Some(0.004)));
        assert_eq!(found["longest"].as_array().unwrap().len(), 4);
        assert_eq!(busy(Vec::new()), (0.0, 0.0, 0.0));
    }
}
