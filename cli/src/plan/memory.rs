//! What a worker takes of its GPU's memory, and the largest micro-batch that fits.

use ella_proto::config::Bytes;
use ella_worker::memory::{Fit, Needs, Plan};
use serde::Serialize;

use crate::ui::{bytes, count};

/// The memory of the GPUs that `--gpu` knows, in MiB as nvidia-smi tells it; of those that come in several sizes, the A100 of 80 GB and the V100 of 16.
const GPUS: [(&str, u64); 9] = [
    ("h200", 143_771),
    ("h100", 81_559),
    ("a100", 81_920),
    ("l40s", 46_068),
    ("l4", 23_034),
    ("a10", 23_028),
    ("4090", 24_564),
    ("v100", 16_160),
    ("t4", 15_360),
];

/// What is planned, and what would fit.
#[derive(Debug, Serialize)]
pub(super) struct Memory {
    #[serde(flatten)]
    plan: Plan,
    /// None if the GPU's memory is not known.
    fit: Option<Fit>,
    #[serde(skip)]
    workers: usize,
    #[serde(skip)]
    global_batch: usize,
}

impl Memory {
    /// For a GPU of this name, or of so many bytes; and no more than `workers.gpu_memory`.
    pub(super) fn of(needs: &Needs, gpu: &str, said: Option<Bytes>) -> Self {
        let known = GPUS.iter().find(|(name, _)| gpu.eq_ignore_ascii_case(name)).map(|(_, mib)| mib << 20);
        let limit = needs.config.workers.gpu_memory.map_or(u64::MAX, |most| most.0);
        let there = said.map(|said| said.0).or(known).map(|there| there.min(limit));
        let (workers, global_batch) = (needs.config.workers.count, needs.config.train.global_batch);
        Self { plan: needs.plan(needs.config.train.micro_batch as u64), fit: there.map(|there| needs.fit(there)), workers, global_batch }
    }

    pub(super) fn text(&self) -> String {
        let Plan { parts, bytes: all, micro_batch } = &self.plan;
        let name = |part: &ella_model::memory::Figure| part.name.clone();
        let width = parts.iter().map(|part| part.name.len()).max().unwrap_or(0);
        let mut text = format!("\nmemory of a GPU, for train.micro_batch = {micro_batch}\n");
        for part in parts {
            text += &format!("{:width$}  {:>10}  = {}\n", name(part), bytes(part.bytes), part.formula);
        }
        text += &format!("{:width$}  {:>10}\n", "in all", bytes(*all));
        let Some(Fit { memory, largest, of_the_batch }) = self.fit else {
            return text + "what fits is not told: this GPU's memory is not known; give --gpu-memory\n";
        };
        let there = bytes(memory);
        let verdict = if *all <= memory { format!("fits into {there}") } else { format!("DOES NOT FIT into {there}") };
        text += &format!("micro-batch of {micro_batch}: {verdict}");
        text += &match (largest, of_the_batch) {
            (Some(largest), Some(usable)) => {
                let (batch, workers) = (self.global_batch, count(self.workers, "worker"));
                format!(
                    "; the largest that does is {largest}; of those that divide the global batch of {batch} and leave {workers} (workers.count) a \
                     lane each, {usable}\n"
                )
            }
            (Some(largest), None) => {
                format!("; the largest that does is {largest}, and no divisor of the global batch leaves every worker a lane\n")
            }
            (None, _) => "; not one sample does\n".to_owned(),
        };
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gpu_that_has_a_peak_has_a_memory() {
        let names = |all: [(&'static str, f64); 9]| all.map(|(name, _)| name);
        assert_eq!(GPUS.map(|(name, _)| name), names(super::super::cost::GPUS));
    }
}
