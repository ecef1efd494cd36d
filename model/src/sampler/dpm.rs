//! DPM-Solver++ 2M (arXiv:2211.01095, algorithm 2), with and without the noise levels of Karras.
//!
//! Follows diffusers 0.42, `schedulers/scheduling_dpmsolver_multistep.py`, with `algorithm_type` dpmsolver++, `solver_order` 2 and
//! `solver_type` midpoint.

use tch::Tensor;

use super::sigmas::{self, Levels};
use super::{Sampler, at, image};
use crate::error::{ModelError, Result};
use crate::schedule::{Prediction, Schedule, Spacing};

/// Below this number of steps the last one is of the first order, whatever σ it ends at.
const FEW: usize = 15;

/// A DPM-Solver++ 2M sampler of a fixed number of steps: from noise of unit variance, the same each time.
#[derive(Debug)]
pub struct Dpm {
    prediction: Prediction,
    timesteps: Vec<f32>,
    /// Noise before and after each step.
    levels: Vec<(Level, Level)>,
    /// Whether the last step leaves out what the one before it found.
    plain_end: bool,
    /// The index of the last step, and the image that it predicted.
    last: Option<(usize, Tensor)>,
}

/// A noise level, for latents `signal`·x₀ + `sigma`·ε of unit variance.
#[derive(Clone, Copy, Debug)]
struct Level {
    signal: f64,
    sigma: f64,
    /// ln(signal/sigma): infinite where there is no noise.
    lambda: f64,
}

impl Level {
    fn of(sigma: f64) -> Self {
        let signal = 1.0 / sigma.hypot(1.0);
        Self { signal, sigma: sigma * signal, lambda: -sigma.ln() }
    }
}

impl Dpm {
    /// A sampler that takes `steps` steps, 1 to N − 1; errors as in [`super::Method::sampler`].
    pub fn new(schedule: &Schedule, steps: usize) -> Result<Self> {
        let config = schedule.config();
        sigmas::check_steps(steps, config.num_train_timesteps - 1)?;
        let spacing = config.spacing.unwrap_or(Spacing::Linspace);
        // But for trailing ones, timesteps are those of one more step without the lowest.
        let count = if spacing == Spacing::Trailing { steps } else { steps + 1 };
        let mut timesteps = sigmas::spread(config, spacing, count);
        timesteps.truncate(steps);
        timesteps.iter_mut().for_each(|t| *t = t.round_ties_even());
        sigmas::check_offset(config, timesteps.first().copied(), steps)?;
        let levels = Levels::of(schedule);
        let sigmas = timesteps.iter().map(|&t| levels.at(t)).collect();
        Ok(Self::over(schedule, &levels, timesteps, sigmas))
    }

    /// One whose σ are spread as Karras does (arXiv:2206.00364, formula 5 with ρ = 7) over all that the U-Net was trained on, whatever the
    /// schedule's spacing and offset.
    pub fn karras(schedule: &Schedule, steps: usize) -> Result<Self> {
        sigmas::check_steps(steps, schedule.config().num_train_timesteps - 1)?;
        let levels = Levels::of(schedule);
        let (timesteps, sigmas) = levels.karras(steps);
        Ok(Self::over(schedule, &levels, timesteps, sigmas))
    }

    fn over(schedule: &Schedule, levels: &Levels, timesteps: Vec<f64>, sigmas: Vec<f64>) -> Self {
        let plain_end = levels.end() == 0.0 || timesteps.len() < FEW;
        let pairs = sigmas::pairs(sigmas.into_iter(), levels.end());
        Self {
            prediction: schedule.config().prediction,
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            levels: pairs.into_iter().map(|(now, next)| (Level::of(now), Level::of(next))).collect(),
            plain_end,
            last: None,
        }
    }

    /// How far the image goes on changing in half a step, by this step's prediction `x0` and the last one's; none in steps of the first order.
    fn trend(&self, x0: &Tensor, index: usize) -> Result<Option<Tensor>> {
        if index == 0 || (self.plain_end && index + 1 == self.levels.len()) {
            return Ok(None);
        }
        let Some((_, before)) = self.last.as_ref().filter(|(last, _)| last + 1 == index) else {
            return Err(ModelError::argument("index", "0, or one more than the last step's", index));
        };
        let (now, next) = self.levels[index];
        let (stride, last) = (next.lambda - now.lambda, now.lambda - self.levels[index - 1].0.lambda);
        Ok(Some(x0.f_sub(before)?.f_mul_scalar(0.5 * stride / last)?))
    }
}

impl Sampler for Dpm {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_sigma(&self) -> f64 {
        1.0
    }

    fn scale_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        at(&self.levels, index).map(|_| sample.shallow_clone())
    }

    fn step(&mut self, output: &Tensor, index: usize, sample: &Tensor, _: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor> {
        let &(now, next) = at(&self.levels, index)?;
        let x0 = image(self.prediction, output, sample, (now.signal, now.sigma))?;
        let ahead = match self.trend(&x0, index)? {
            Some(trend) => x0.f_add(&trend)?,
            None => x0.shallow_clone(),
        };
        self.last = Some((index, x0));
        let share = -next.signal * (now.lambda - next.lambda).exp_m1();
        Ok(sample.f_mul_scalar(next.sigma / now.sigma)?.f_add(&ahead.f_mul_scalar(share)?)?)
    }
}
