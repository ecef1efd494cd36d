//! One lane's part of a step: noisy latents, connector, frozen U-Net, loss, and the gradient of the connector's parameters
//! (paper §3.1, design.md §4 "Step").

use super::TrainError;
use ella_model::connector::{Conditions, Connector};
use ella_model::layers::inner_product;
use ella_model::schedule::Schedule;
use ella_model::unet::{Added, Gradients, UNet};
use std::time::{Duration, Instant};
use tch::{Kind, Reduction, Tensor};

/// The samples of one lane at one step, on the computing device.
#[derive(Debug)]
pub struct LaneBatch {
    /// `[b, 4, h, w]` float32, scaled.
    pub latents: Tensor,
    /// `[b, 4, h, w]` float32 (NOISE).
    pub noise: Tensor,
    /// `[b]` int64 (NOISE).
    pub timesteps: Tensor,
    /// `[b, S, E]`.
    pub features: Tensor,
    /// `[b, S]` bool, true where a token is; `None`: padding is attended too.
    pub mask: Option<Tensor>,
    /// `[b, 6]` float32, pixels: SDXL's micro-conditioning, by its paper's §2.2. Original height and width, top and left of the crop, height and
    /// width of what is trained on. A base of another kind is not told.
    pub time_ids: Tensor,
}

impl LaneBatch {
    /// Number of samples.
    pub fn len(&self) -> i64 {
        self.latents.size()[0]
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of its samples, as views.
    pub fn narrow(&self, from: i64, count: i64) -> Result<Self, tch::TchError> {
        let part = |tensor: &Tensor| tensor.f_narrow(0, from, count);
        let Self { latents, noise, timesteps, features, mask, time_ids } = self;
        Ok(Self {
            latents: part(latents)?,
            noise: part(noise)?,
            timesteps: part(timesteps)?,
            features: part(features)?,
            mask: mask.as_ref().map(part).transpose()?,
            time_ids: part(time_ids)?,
        })
    }

    /// All its tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let Self { latents, noise, timesteps, features, mask, time_ids } = self;
        [latents, noise, timesteps, features, time_ids].into_iter().chain(mask)
    }

    /// The same tensors again.
    pub fn shallow_clone(&self) -> Self {
        Self {
            latents: self.latents.shallow_clone(),
            noise: self.noise.shallow_clone(),
            timesteps: self.timesteps.shallow_clone(),
            features: self.features.shallow_clone(),
            mask: self.mask.as_ref().map(Tensor::shallow_clone),
            time_ids: self.time_ids.shallow_clone(),
        }
    }
}

/// What a lane adds to a step.
#[derive(Debug)]
pub struct LaneGradient {
    /// `[P]` float32, in the layout's order.
    pub grad: Tensor,
    /// Sum of the samples' losses.
    pub loss_sum: f64,
    /// Time of the forward pass.
    pub forward: Duration,
    /// Time of the backward pass.
    pub backward: Duration,
}

/// The networks of a step.
#[derive(Debug)]
pub struct Networks {
    /// What is trained; its tensors are views into the flat buffers.
    pub connector: Connector,
    /// The frozen U-Net.
    pub unet: UNet,
    /// Its compute format.
    pub kind: Kind,
    /// The diffusion schedule.
    pub schedule: Schedule,
    /// Min-SNR weighting.
    pub snr_gamma: Option<f64>,
    /// Whether the U-Net's gradient is made block by block.
    pub checkpointing: bool,
}

/// What the U-Net takes of a lane, with the connector's graph.
struct Inputs {
    /// `[b, 4, h, w]` float32.
    noisy: Tensor,
    /// `[b, L or S, D]`.
    states: Tensor,
    /// For SDXL.
    added: Option<Added>,
}

impl Inputs {
    /// What leads backward from these gradients of the conditions through the connector.
    fn roots(&self, gradients: &Gradients) -> Result<Vec<Tensor>, TrainError> {
        let mut roots = vec![inner_product(&self.states, &gradients.hidden_states)?];
        if let Some((added, gradient)) = self.added.as_ref().zip(gradients.text_embeds.as_ref()) {
            roots.push(inner_product(&added.text_embeds, gradient)?);
        }
        Ok(roots)
    }
}

impl Networks {
    /// The loss of each sample, `[b]` float32: mean squared error over channels and places, weighted.
    pub fn losses(&self, batch: &LaneBatch) -> Result<Tensor, TrainError> {
        self.score(batch, &self.predict(batch, &self.inputs(batch)?)?)
    }

    /// What the U-Net takes besides the timesteps.
    fn inputs(&self, batch: &LaneBatch) -> Result<Inputs, TrainError> {
        let LaneBatch { latents, noise, timesteps, features, mask, time_ids } = batch;
        let noisy = self.schedule.add_noise(latents, noise, timesteps)?;
        let Conditions { states, pooled } = self.connector.forward(&features.f_to_kind(Kind::Float)?, timesteps, mask.as_ref())?;
        let added = pooled.map(|text_embeds| Added { text_embeds, time_ids: time_ids.shallow_clone() });
        Ok(Inputs { noisy, states, added })
    }

    fn predict(&self, batch: &LaneBatch, inputs: &Inputs) -> Result<Tensor, TrainError> {
        Ok(self.unet.forward_added(&inputs.noisy, &batch.timesteps, &inputs.states, inputs.added.as_ref())?)
    }

    /// The losses of these predictions.
    fn score(&self, batch: &LaneBatch, predicted: &Tensor) -> Result<Tensor, TrainError> {
        let LaneBatch { latents, noise, timesteps, .. } = batch;
        let target = self.schedule.target(latents, noise, timesteps)?;
        let error = predicted.f_to_kind(Kind::Float)?.f_mse_loss(&target, Reduction::None)?; // [b, 4, h, w]
        let losses = error.f_mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float)?; // [b]
        match self.snr_gamma {
            Some(gamma) => Ok(losses.f_mul(&self.schedule.min_snr_weights(timesteps, gamma)?)?),
            None => Ok(losses),
        }
    }

    /// This lane's share of the step's gradient. The step's loss is the mean over its `step_samples` samples, of all lanes.
    pub fn gradient(&self, batch: &LaneBatch, step_samples: u64) -> Result<LaneGradient, TrainError> {
        let begin = Instant::now();
        let inputs = self.inputs(batch)?;
        let pass = || self.unet.forward_checkpointed(&inputs.noisy, &batch.timesteps, &inputs.states, inputs.added.as_ref());
        let pass = self.checkpointing.then(pass).transpose()?;
        let predicted = match &pass {
            Some(pass) => pass.prediction().f_detach()?.f_set_requires_grad(true)?,
            None => self.predict(batch, &inputs)?,
        };
        let sum = self.score(batch, &predicted)?.f_sum(Kind::Float)?;
        let forward = begin.elapsed();
        let scale = loss_scale(self.kind, batch, step_samples);
        let loss = sum.f_div_scalar(step_samples as f64)?.f_mul_scalar(scale)?;
        let roots = match pass {
            Some(pass) => {
                let by_prediction = Tensor::f_run_backward(&[loss], &[predicted], false, false)?;
                inputs.roots(&pass.gradients(&by_prediction[0])?)?
            }
            None => vec![loss],
        };
        let params: Vec<&Tensor> = self.connector.tensors().iter().map(|(_, t)| t).collect();
        let grads = Tensor::f_run_backward(&roots, &params, false, false)?;
        let flat: Vec<Tensor> = grads.iter().map(|g| g.f_reshape([-1])).collect::<Result<_, _>>()?;
        let mut grad = Tensor::f_cat(&flat, 0)?;
        if scale != 1.0 {
            let _ = grad.f_div_scalar_(scale)?;
        }
        Ok(LaneGradient { grad, loss_sum: sum.f_double_value(&[])?, forward, backward: begin.elapsed() - forward })
    }

    /// The sum of the losses, without a gradient.
    pub fn evaluate(&self, batch: &LaneBatch) -> Result<f64, TrainError> {
        tch::no_grad(|| Ok(self.losses(batch)?.f_sum(Kind::Float)?.f_double_value(&[])?))
    }
}

/// What a loss is multiplied with for the backward pass, and its gradient divided by: a power of two, so that nothing else changes.
///
/// 1, unless the U-Net computes in float16. There the gradient of a mean over a whole batch's latents, about the error divided by
/// their number, is smaller than the smallest number; so it is brought back to the order of the error itself.
fn loss_scale(kind: Kind, batch: &LaneBatch, step_samples: u64) -> f64 {
    if kind != Kind::Half {
        return 1.0;
    }
    let elements = batch.latents.numel() as f64 / batch.len().max(1) as f64 * step_samples as f64;
    // A quarter leaves room for what backward passes amplify.
    (elements.log2().floor() - 2.0).max(0.0).exp2()
}
