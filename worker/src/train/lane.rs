//! One lane's part of a step: noisy latents, connector, frozen U-Net, loss, and the gradient of the connector's parameters
//! (paper §3.1, design.md §4 "Step").

use super::TrainError;
use super::split::Split;
use ella_model::connector::{Conditions, Connector};
use ella_model::schedule::Schedule;
use ella_model::unet::{Added, Gradients, UNet};
use std::ops::Range;
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
    /// Sum of the samples' losses, `[]` float32 on the device.
    pub loss_sum: Tensor,
}

/// Who is told of a lane's gradient while it is made. On a GPU it is told when work has been handed out, long before that is done.
pub trait Follow {
    /// The forward pass has been handed out; the backward pass comes.
    ///
    /// # Errors
    /// What ends the step.
    fn forward_done(&mut self) -> Result<(), TrainError>;

    /// A stretch of the gradient, `[len]` float32, and its place in the layout's order: the next below the one before. The last begins at 0.
    ///
    /// # Errors
    /// What ends the step.
    fn part(&mut self, elements: Range<i64>, gradient: &Tensor) -> Result<(), TrainError>;
}

/// Keeps all stretches.
#[derive(Default)]
struct Whole(Vec<Tensor>);

impl Follow for Whole {
    fn forward_done(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    fn part(&mut self, _: Range<i64>, gradient: &Tensor) -> Result<(), TrainError> {
        self.0.push(gradient.shallow_clone());
        Ok(())
    }
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
    /// The connector's compute format; its parameters are float32.
    pub connector_kind: Kind,
    /// The diffusion schedule.
    pub schedule: Schedule,
    /// Min-SNR weighting.
    pub snr_gamma: Option<f64>,
    /// Whether the U-Net's gradient is made block by block.
    pub checkpointing: bool,
    /// How lanes are cut that a GPU's memory does not hold.
    pub split: Split,
}

/// What the U-Net takes of a lane.
struct Inputs {
    /// `[b, 4, h, w]` float32.
    noisy: Tensor,
    /// `[b, L or S, D]`.
    states: Tensor,
    /// For SDXL.
    added: Option<Added>,
}

impl Inputs {
    /// Those of some samples; its conditions are leaves of their own.
    fn narrow(&self, from: i64, count: i64) -> Result<Self, tch::TchError> {
        let leaf = |tensor: &Tensor| tensor.f_narrow(0, from, count)?.f_detach()?.f_set_requires_grad(true);
        let added = self.added.as_ref().map(|Added { text_embeds, time_ids }| {
            Ok::<_, tch::TchError>(Added { text_embeds: leaf(text_embeds)?, time_ids: time_ids.f_narrow(0, from, count)? })
        });
        Ok(Self { noisy: self.noisy.f_narrow(0, from, count)?, states: leaf(&self.states)?, added: added.transpose()? })
    }
}

impl Networks {
    /// The loss of each sample, `[b]` float32: mean squared error over channels and places, weighted.
    pub fn losses(&self, batch: &LaneBatch) -> Result<Tensor, TrainError> {
        self.score(batch, &self.predict(batch, &self.inputs(batch)?)?)
    }

    /// What the U-Net takes besides the timesteps.
    fn inputs(&self, batch: &LaneBatch) -> Result<Inputs, TrainError> {
        let conditions = self.connector.forward(&batch.features.f_to_kind(self.connector_kind)?, &batch.timesteps, batch.mask.as_ref())?;
        self.conditioned(batch, &conditions)
    }

    /// The same, of a connector's pass that was made.
    fn conditioned(&self, batch: &LaneBatch, Conditions { states, pooled }: &Conditions) -> Result<Inputs, TrainError> {
        let LaneBatch { latents, noise, timesteps, time_ids, .. } = batch;
        let noisy = self.schedule.add_noise(latents, noise, timesteps)?;
        let added = pooled.as_ref().map(|pooled| Added { text_embeds: pooled.shallow_clone(), time_ids: time_ids.shallow_clone() });
        Ok(Inputs { noisy, states: states.shallow_clone(), added })
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
    ///
    /// It waits for no device, copies nothing to one, and its shapes are those of `batch`: a GPU can record it and play it again.
    ///
    /// # Errors
    /// The networks'.
    pub fn gradient(&self, batch: &LaneBatch, step_samples: u64) -> Result<LaneGradient, TrainError> {
        let mut whole = Whole::default();
        let loss_sum = self.gradient_in_parts(batch, step_samples, &mut whole)?;
        whole.0.reverse();
        Ok(LaneGradient { grad: Tensor::f_cat(&whole.0, 0)?, loss_sum })
    }

    /// The same, each stretch of the gradient as soon as it is there: that of the connector's last block first. Returns the sum of the samples' losses,
    /// `[]` float32 on the device.
    ///
    /// # Errors
    /// The networks', and those of `follow`.
    pub fn gradient_in_parts(&self, batch: &LaneBatch, step_samples: u64, follow: &mut dyn Follow) -> Result<Tensor, TrainError> {
        let features = batch.features.f_to_kind(self.connector_kind)?;
        let pass = self.connector.forward_in_segments(&features, &batch.timesteps, batch.mask.as_ref())?;
        let inputs = self.conditioned(batch, &pass.conditions)?;
        let scale = loss_scale(self.kind, batch, step_samples);
        let (loss_sum, by_conditions) = self.through_unet(batch, &inputs, (step_samples, scale), follow)?;
        drop(inputs);
        let segments = self.connector.segments();
        pass.backward(&by_conditions.hidden_states, by_conditions.text_embeds.as_ref(), |segment, mut gradient| {
            if scale != 1.0 {
                let _ = gradient.f_div_scalar_(scale)?;
            }
            follow.part(segments[segment].elements.clone(), &gradient)
        })?;
        Ok(loss_sum)
    }

    /// The sum of the losses, and the gradient by the conditions of its share of the mean over `step_samples`, times `scale`: of the whole lane, or of
    /// what of it fits at a time.
    fn through_unet(
        &self,
        batch: &LaneBatch,
        inputs: &Inputs,
        share: (u64, f64),
        follow: &mut dyn Follow,
    ) -> Result<(Tensor, Gradients), TrainError> {
        let mut pieces = self.split.pieces(batch.len(), |piece| {
            let (from, count) = (piece.start as i64, piece.len() as i64);
            match count == batch.len() {
                true => self.piece_through_unet(batch, inputs, share, follow),
                false => self.piece_through_unet(&batch.narrow(from, count)?, &inputs.narrow(from, count)?, share, follow),
            }
        })?;
        if pieces.len() == 1 {
            return Ok(pieces.remove(0));
        }
        let (sums, gradients): (Vec<_>, Vec<_>) = pieces.into_iter().unzip();
        let hidden_states: Vec<&Tensor> = gradients.iter().map(|gradient| &gradient.hidden_states).collect();
        let text_embeds: Vec<&Tensor> = gradients.iter().filter_map(|gradient| gradient.text_embeds.as_ref()).collect();
        let text_embeds = if text_embeds.is_empty() { None } else { Some(Tensor::f_cat(&text_embeds, 0)?) };
        let whole = Gradients { hidden_states: Tensor::f_cat(&hidden_states, 0)?, text_embeds };
        Ok((Tensor::f_stack(&sums, 0)?.f_sum(Kind::Float)?, whole))
    }

    fn piece_through_unet(
        &self,
        batch: &LaneBatch,
        inputs: &Inputs,
        (step_samples, scale): (u64, f64),
        follow: &mut dyn Follow,
    ) -> Result<(Tensor, Gradients), TrainError> {
        let Inputs { noisy, states, added } = inputs;
        let loss = |predicted: &Tensor| -> Result<(Tensor, Tensor), TrainError> {
            let sum = self.score(batch, predicted)?.f_sum(Kind::Float)?;
            let root = sum.f_div_scalar(step_samples as f64)?.f_mul_scalar(scale)?;
            Ok((sum.f_detach()?, root))
        };
        if self.checkpointing {
            let pass = self.unet.forward_checkpointed(noisy, &batch.timesteps, states, added.as_ref())?;
            let predicted = pass.prediction().f_detach()?.f_set_requires_grad(true)?;
            let (sum, root) = loss(&predicted)?;
            follow.forward_done()?;
            let by_prediction = Tensor::f_run_backward(&[root], &[predicted], false, false)?;
            return Ok((sum, pass.gradients(&by_prediction[0])?));
        }
        let (sum, root) = loss(&self.predict(batch, inputs)?)?;
        follow.forward_done()?;
        let leaves: Vec<&Tensor> = std::iter::once(states).chain(added.as_ref().map(|added| &added.text_embeds)).collect();
        let mut gradients = Tensor::f_run_backward(&[root], &leaves, false, false)?;
        let text_embeds = if gradients.len() > 1 { gradients.pop() } else { None };
        Ok((sum, Gradients { hidden_states: gradients.remove(0), text_embeds }))
    }

    /// The sum of the losses, without a gradient: `[]` float32 on the device.
    ///
    /// # Errors
    /// The networks'.
    pub fn evaluate(&self, batch: &LaneBatch) -> Result<Tensor, TrainError> {
        tch::no_grad(|| Ok(self.losses(batch)?.f_sum(Kind::Float)?))
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
