//! Euler's method over σ (arXiv:2206.00364, algorithm 2 without churn), plain and ancestral.
//!
//! Follows diffusers 0.42, `schedulers/scheduling_euler_discrete.py` and `scheduling_euler_ancestral_discrete.py`. Latents are x₀ + σ·ε:
//! unlike DDIM's, they start large, and are scaled for the U-Net.

use tch::Tensor;

use super::sigmas::{self, Levels};
use super::{Sampler, at, image};
use crate::error::Result;
use crate::schedule::{Prediction, Schedule, Spacing};

/// An Euler sampler of a fixed number of steps.
#[derive(Debug)]
pub struct Euler {
    prediction: Prediction,
    timesteps: Vec<f32>,
    /// σ before and after each step.
    sigmas: Vec<(f64, f64)>,
    init_sigma: f64,
    ancestral: bool,
}

impl Euler {
    /// A sampler that takes `steps` steps, 1 to N, and no noise; errors as in [`super::Method::sampler`].
    pub fn new(schedule: &Schedule, steps: usize) -> Result<Self> {
        Self::over(schedule, steps, false)
    }

    /// One that steps further down than the next σ and adds noise up to it. Its last step always ends at σ = 0.
    pub fn ancestral(schedule: &Schedule, steps: usize) -> Result<Self> {
        Self::over(schedule, steps, true)
    }

    fn over(schedule: &Schedule, steps: usize, ancestral: bool) -> Result<Self> {
        let config = schedule.config();
        sigmas::check_steps(steps, config.num_train_timesteps)?;
        let spacing = config.spacing.unwrap_or(Spacing::Linspace);
        // Evenly spaced timesteps stay between whole ones here, in float32.
        let timesteps: Vec<f32> = sigmas::spread(config, spacing, steps).into_iter().map(|t| t as f32).collect();
        sigmas::check_offset(config, timesteps.first().map(|&t| f64::from(t)), steps)?;
        let levels = Levels::of(schedule);
        let end = if ancestral { 0.0 } else { levels.end() };
        let sigmas = sigmas::pairs(timesteps.iter().map(|&t| levels.at(f64::from(t))), end);
        let greatest = sigmas.iter().fold(end, |greatest, (sigma, _)| greatest.max(*sigma));
        let init_sigma = if spacing == Spacing::Leading { greatest.hypot(1.0) } else { greatest };
        Ok(Self { prediction: config.prediction, timesteps, sigmas, init_sigma, ancestral })
    }
}

impl Sampler for Euler {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_sigma(&self) -> f64 {
        self.init_sigma
    }

    fn scale_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        let &(sigma, _) = at(&self.sigmas, index)?;
        Ok(sample.f_div_scalar(sigma.hypot(1.0))?)
    }

    fn step(&mut self, output: &Tensor, index: usize, sample: &Tensor, noise: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor> {
        let &(sigma, next) = at(&self.sigmas, index)?;
        let signal = 1.0 / sigma.hypot(1.0);
        let x0 = image(self.prediction, output, &sample.f_mul_scalar(signal)?, (signal, sigma * signal))?;
        let (up, down) = if self.ancestral { ancestral(sigma, next) } else { (0.0, next) };
        let slope = sample.f_sub(&x0)?.f_div_scalar(sigma)?;
        let stepped = sample.f_add(&slope.f_mul_scalar(down - sigma)?)?;
        if up > 0.0 { Ok(stepped.f_add(&noise()?.f_mul_scalar(up)?)?) } else { Ok(stepped) }
    }
}

/// How much noise an ancestral step from `sigma` to `next` adds, and the σ that it steps down to before: their squares sum up to next².
fn ancestral(sigma: f64, next: f64) -> (f64, f64) {
    let ratio = next / sigma;
    (next * (1.0 - ratio * ratio).max(0.0).sqrt(), next * ratio)
}
