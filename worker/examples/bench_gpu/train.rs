//! The step itself, by the code that a worker trains with: gradient, sum, clip, update.

use crate::batches::Batches;
use crate::timing::{self, Timed};
use crate::{Setting, TOKENS, gpu, networks};
use anyhow::{Result, ensure};
use ella_model::cost;
use ella_proto::config::{Reduction, Train};
use ella_worker::precision::Precision;
use ella_worker::reduce::Solo;
use ella_worker::train::graph::Graphs;
use ella_worker::train::lane::{LaneBatch, Networks};
use ella_worker::train::state::TrainState;
use ella_worker::train::step_alone;
use serde_json::{Value, json};
use std::time::Duration;
use tch::{Kind, Tensor};

/// A worker's state, without a coordinator, a feed or others.
pub(crate) struct Trainer {
    pub(crate) networks: Networks,
    pub(crate) state: TrainState,
    pub(crate) graphs: Graphs,
    config: Train,
    batches: Batches,
    solo: Solo,
}

impl Trainer {
    pub(crate) fn new(setting: &Setting, seed: u64) -> Result<Self> {
        let reduction = setting.reduction;
        // As a run of this reduction has it, and before networks are loaded: attentions are timed then, where the clock may decide.
        Precision { tf32: false, deterministic: reduction == Reduction::Exact }.set(setting.device)?;
        let (networks, state) = networks::step(setting, seed)?;
        let samples = setting.micro_batch as usize;
        let config = Train { global_batch: samples, micro_batch: samples, reduction, ..Train::default() };
        let (graphs, batches) = (Graphs::new(setting.device), Batches::new(setting)?);
        Ok(Self { networks, state, graphs, config, batches, solo: Solo::default() })
    }

    /// The next batch, on the device.
    pub(crate) fn batch(&mut self) -> Result<LaneBatch> {
        self.batches.next()
    }

    /// One update on these samples; their mean loss.
    pub(crate) fn step(&mut self, batch: &LaneBatch) -> Result<f64> {
        let lanes = [batch.shallow_clone()];
        let loss = step_alone((&self.networks, &mut self.graphs), &mut self.state, &self.config, &lanes, &mut self.solo)?;
        ensure!(loss.is_finite(), "step {} has loss {loss}: nothing is measured", self.state.step);
        Ok(loss)
    }
}

/// FLOP of an image's step, by the cost model: through the U-Net and back to its conditions, through the connector and back to its
/// parameters.
pub(crate) fn flops(setting: &Setting) -> Result<f64> {
    let sizes = networks::connector_config(setting)?;
    let unet = cost::unet(&setting.preset().unet()?, (setting.latent(), setting.latent()), sizes.latents);
    Ok(cost::total(&unet).flops() + cost::total(&cost::connector(&sizes, TOKENS)).flops())
}

/// FLOP/s of a product of random square matrices in the setting's dtype: 8192 wide on a GPU.
pub(crate) fn peak(setting: &Setting) -> Result<f64> {
    let n: i64 = if setting.device.is_cuda() { 8192 } else { 256 };
    let random = || Tensor::f_randn([n, n], (Kind::Float, setting.device))?.f_to_kind(setting.kind);
    let (a, b) = (random()?, random()?);
    let timed = timing::time(setting.device, Duration::from_millis(500), || {
        let _ = a.f_matmul(&b)?;
        Ok(())
    })?;
    Ok(2.0 * (n as f64).powi(3) / timed.median())
}

/// Figures of `images` at once in this time.
pub(crate) fn figures(timed: &Timed, images: f64, flops: f64, peak: f64) -> Value {
    let rate = images / timed.median();
    json!({
        "images_per_second": rate, "step_ms": 1e3 * timed.median(), "windows": timed.windows.len(), "steps_per_window": timed.calls,
        "window_images_per_second": timed.windows.iter().map(|seconds| images / seconds).collect::<Vec<_>>(), "spread": timed.spread(),
        "tflops": rate * flops / 1e12, "tflop_per_image": flops / 1e12, "peak_tflops": peak / 1e12, "share_of_peak": rate * flops / peak,
    })
}

/// The norms of eight stretches of the first moments: after one update, a tenth of the clipped gradient's.
fn norms(moments: &Tensor) -> Result<Vec<f64>> {
    moments.f_chunk(8, 0)?.iter().map(|part| Ok(part.f_norm()?.f_double_value(&[])?)).collect()
}

pub(crate) fn run(setting: &Setting) -> Result<Value> {
    let (peak, flops) = (peak(setting)?, flops(setting)?);
    let mut trainer = Trainer::new(setting, 1)?;
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    let timed = timing::time(setting.device, setting.measure, || {
        let batch = trainer.batch()?;
        losses.push(trainer.step(&batch)?);
        if gradient.is_empty() {
            gradient = norms(&trainer.state.buffers.exp_avg)?;
        }
        Ok(())
    })?;
    let mut result = figures(&timed, setting.micro_batch as f64, flops, peak);
    result["micro_batch"] = json!(setting.micro_batch);
    result["reduction"] = json!(format!("{:?}", setting.reduction).to_lowercase());
    result["first_loss"] = json!(losses.first());
    result["first_gradient"] = json!(gradient);
    result["last_loss"] = json!(losses.last());
    result["memory"] = gpu::memory(setting.device);
    result["recorded_lanes"] = json!(trainer.graphs.count());
    result["connector_parameters"] = json!(trainer.state.layout.total());
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sizes;
    use tch::Device;

    fn setting(sizes: Sizes) -> Setting {
        Setting {
            sizes,
            device: Device::Cpu,
            kind: Kind::Float,
            reduction: Reduction::Exact,
            micro_batch: 2,
            measure: Duration::from_millis(50),
        }
    }

    #[test]
    fn a_step_is_of_1_69_tflop() {
        assert!((flops(&setting(Sizes::Sd15)).unwrap() / 1e12 - 1.69).abs() < 0.005);
    }

    #[test]
    fn the_nano_step_is_measured_and_learns_from_random_data() {
        let result = run(&setting(Sizes::Nano)).unwrap();
        assert!(result["images_per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(result["windows"], timing::WINDOWS);
        assert!(result["last_loss"].as_f64().unwrap().is_finite());
        let gradient = result["first_gradient"].as_array().unwrap();
        assert!(gradient.len() == 8 && gradient.iter().all(|norm| norm.as_f64().unwrap() > 0.0), "{gradient:?}");
        let mut trainer = Trainer::new(&setting(Sizes::Nano), 1).unwrap();
        let before = trainer.state.buffers.params.copy();
        let batch = trainer.batch().unwrap();
        trainer.step(&batch).unwrap();
        assert_ne!(trainer.state.buffers.params, before);
    }
}
