//! DDIM (arXiv:2010.02502) with η = 0, after diffusers 0.42, `schedulers/scheduling_ddim.py`.

use tch::Tensor;

use super::{Sampler, at, image, sigmas};
use crate::error::Result;
use crate::schedule::{Prediction, Schedule, Spacing};

/// A DDIM sampler of a fixed number of steps: from noise of unit variance, the same each time.
#[derive(Debug)]
pub struct Ddim {
    prediction: Prediction,
    clip: Option<f64>,
    timesteps: Vec<f32>,
    /// ᾱ before and after each step.
    alphas: Vec<(f64, f64)>,
}

impl Ddim {
    /// A sampler that takes `steps` steps, 1 to N; errors as in [`super::Method::sampler`].
    pub fn new(schedule: &Schedule, steps: usize) -> Result<Self> {
        let config = schedule.config();
        sigmas::check_steps(steps, config.num_train_timesteps)?;
        let spread = sigmas::spread(config, config.spacing.unwrap_or(Spacing::Leading), steps);
        let timesteps: Vec<i64> = spread.into_iter().map(|t| t.round_ties_even() as i64).collect();
        sigmas::check_offset(config, timesteps.first().map(|&t| t as f64), steps)?;
        let table = schedule.alphas_cumprod();
        let alpha = |t: i64| usize::try_from(t).ok().and_then(|t| table.get(t)).map(|&a| f64::from(a));
        let last = if config.set_alpha_to_one { 1.0 } else { f64::from(table[0]) };
        let stride = config.num_train_timesteps / steps as i64;
        let alphas = timesteps.iter().map(|&t| (alpha(t).unwrap_or(last), alpha(t - stride).unwrap_or(last))).collect();
        let timesteps = timesteps.iter().map(|&t| t as f32).collect();
        Ok(Self { prediction: config.prediction, clip: config.clip_sample, timesteps, alphas })
    }
}

impl Sampler for Ddim {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_sigma(&self) -> f64 {
        1.0
    }

    fn scale_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        at(&self.alphas, index).map(|_| sample.shallow_clone())
    }

    fn step(&mut self, output: &Tensor, index: usize, sample: &Tensor, _: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor> {
        let &(now, next) = at(&self.alphas, index)?;
        let (signal, sigma) = (now.sqrt(), (1.0 - now).sqrt());
        // Formula (12): the image and the noise that the output stands for, mixed anew for the next timestep.
        let mut x0 = image(self.prediction, output, sample, (signal, sigma))?;
        let noise = match self.prediction {
            Prediction::Epsilon => output.shallow_clone(),
            Prediction::Velocity => output.f_mul_scalar(signal)?.f_add(&sample.f_mul_scalar(sigma)?)?,
            Prediction::Sample => sample.f_sub(&output.f_mul_scalar(signal)?)?.f_div_scalar(sigma)?,
        };
        if let Some(range) = self.clip {
            x0 = x0.f_clamp(-range, range)?;
        }
        Ok(x0.f_mul_scalar(next.sqrt())?.f_add(&noise.f_mul_scalar((1.0 - next).sqrt())?)?)
    }
}
