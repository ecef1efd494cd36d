//! DDIM (arXiv:2010.02502) with η = 0: from noise to a latent in a few steps, the same each time.
//!
//! Follows diffusers 0.42, `schedulers/scheduling_ddim.py`. Classifier-free guidance is the caller's: it mixes two outputs of the U-Net before
//! [`Ddim::step`].

use tch::Tensor;

use crate::error::{ModelError, Result};
use crate::schedule::{Prediction, Schedule, ScheduleConfig, Spacing};

/// A DDIM sampler of a fixed number of steps.
#[derive(Debug)]
pub struct Ddim {
    prediction: Prediction,
    clip: Option<f64>,
    timesteps: Vec<i64>,
    /// ᾱ before and after each step.
    alphas: Vec<(f64, f64)>,
}

impl Ddim {
    /// A sampler that takes `steps` steps, 1 to N. Starts from latents of unit variance.
    pub fn new(schedule: &Schedule, steps: usize) -> Result<Self> {
        let config = schedule.config();
        let timesteps = timesteps(config, steps)?;
        let table = schedule.alphas_cumprod();
        let alpha = |t: i64| usize::try_from(t).ok().and_then(|t| table.get(t)).map(|&a| f64::from(a));
        let last = if config.set_alpha_to_one { 1.0 } else { f64::from(table[0]) };
        let stride = config.num_train_timesteps / steps as i64;
        let alphas = timesteps.iter().map(|&t| (alpha(t).unwrap_or(last), alpha(t - stride).unwrap_or(last))).collect();
        Ok(Self { prediction: config.prediction, clip: config.clip_sample, timesteps, alphas })
    }

    /// The timesteps, falling: the U-Net is asked at each of them, in this order.
    pub fn timesteps(&self) -> &[i64] {
        &self.timesteps
    }

    /// One step: from the latent `sample` `[B,C,H,W]` at the timestep of this index, and the U-Net's `output` there, to the next latent.
    pub fn step(&self, output: &Tensor, index: usize, sample: &Tensor) -> Result<Tensor> {
        let Some(&(now, next)) = self.alphas.get(index) else {
            return Err(ModelError::argument("index", format!("less than {}", self.alphas.len()), index));
        };
        let (signal, sigma) = (now.sqrt(), (1.0 - now).sqrt());
        // Formula (12): the image and the noise that the output stands for, mixed anew for the next timestep.
        let (mut x0, noise) = match self.prediction {
            Prediction::Epsilon => (sample.f_sub(&output.f_mul_scalar(sigma)?)?.f_div_scalar(signal)?, output.shallow_clone()),
            Prediction::Velocity => (
                sample.f_mul_scalar(signal)?.f_sub(&output.f_mul_scalar(sigma)?)?,
                output.f_mul_scalar(signal)?.f_add(&sample.f_mul_scalar(sigma)?)?,
            ),
        };
        if let Some(range) = self.clip {
            x0 = x0.f_clamp(-range, range)?;
        }
        Ok(x0.f_mul_scalar(next.sqrt())?.f_add(&noise.f_mul_scalar((1.0 - next).sqrt())?)?)
    }
}

fn timesteps(config: &ScheduleConfig, steps: usize) -> Result<Vec<i64>> {
    let n = config.num_train_timesteps;
    if steps == 0 || steps as i64 > n {
        return Err(ModelError::argument("steps", format!("1 to {n}"), steps));
    }
    let count = steps as i64;
    let rising: Vec<i64> = match config.spacing {
        Spacing::Leading => (0..count).map(|i| i * (n / count) + config.steps_offset).collect(),
        Spacing::Linspace => {
            let width = (n - 1) as f64 / (count - 1).max(1) as f64;
            (0..count).map(|i| (i as f64 * width).round_ties_even() as i64).collect()
        }
        Spacing::Trailing => {
            // The reference steps down by the rounded difference of the first two values, which decides ties.
            let down = (n as f64 - n as f64 / count as f64) - n as f64;
            (0..count).rev().map(|i| (n as f64 + i as f64 * down).round_ties_even() as i64 - 1).collect()
        }
    };
    match rising.last() {
        Some(&last) if last >= n => {
            Err(ModelError::argument("steps", format!("few enough that steps_offset {} stays below {n}", config.steps_offset), steps))
        }
        _ => Ok(rising.into_iter().rev().collect()),
    }
}
