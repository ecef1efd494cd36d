//! Which timesteps and noise levels the steps of a sampler stand at.
//!
//! σ = √((1−ᾱ)/ᾱ) is the noise beside an image of full size. Timesteps here are float64, and whole unless said otherwise.

use crate::error::{ModelError, Result};
use crate::schedule::{BetaSchedule, FinalSigma, Schedule, ScheduleConfig, Spacing};

/// Refuses a number of steps outside 1 to `most`.
pub(super) fn check_steps(steps: usize, most: i64) -> Result<()> {
    match i64::try_from(steps) {
        Ok(1..) if steps as i64 <= most => Ok(()),
        _ => Err(ModelError::argument("steps", format!("1 to {most}"), steps)),
    }
}

/// Refuses a number of steps whose `first` timestep is beyond the last trained one, as an offset can bring about.
pub(super) fn check_offset(config: &ScheduleConfig, first: Option<f64>, steps: usize) -> Result<()> {
    let n = config.num_train_timesteps;
    match first {
        Some(first) if first > (n - 1) as f64 => {
            Err(ModelError::argument("steps", format!("few enough that steps_offset {} stays below {n}", config.steps_offset), steps))
        }
        _ => Ok(()),
    }
}

/// `count` timesteps, falling; those of [`Spacing::Linspace`] are not rounded yet. `count` is 1 to N.
pub(super) fn spread(config: &ScheduleConfig, spacing: Spacing, count: usize) -> Vec<f64> {
    let (n, count) = (config.num_train_timesteps, count as i64);
    let falling = (0..count).rev();
    match spacing {
        Spacing::Leading => falling.map(|i| (i * (n / count) + config.steps_offset) as f64).collect(),
        Spacing::Linspace => {
            let width = (n - 1) as f64 / (count - 1).max(1) as f64;
            falling.map(|i| i as f64 * width).collect()
        }
        Spacing::Trailing => {
            // The reference steps down by the rounded difference of the first two values, which decides ties.
            let down = (n as f64 - n as f64 / count as f64) - n as f64;
            (0..count).map(|i| (n as f64 + i as f64 * down).round_ties_even() - 1.0).collect()
        }
    }
}

/// Each value with the next; the last one with `end`.
pub(super) fn pairs(values: impl Iterator<Item = f64>, end: f64) -> Vec<(f64, f64)> {
    let values: Vec<f64> = values.chain([end]).collect();
    values.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

/// σ by timestep. All that is given out is float32, as the reference keeps it.
#[derive(Debug)]
pub(super) struct Levels {
    /// Rising.
    trained: Vec<f32>,
    end: FinalSigma,
    cosine: bool,
}

impl Levels {
    pub(super) fn of(schedule: &Schedule) -> Self {
        // Where nothing of the image is left, σ would be infinite; the reference takes the smallest positive float16 for ᾱ.
        let least = 2f32.powi(-24);
        let sigma = |&a: &f32| {
            let a = if a > 0.0 { a } else { least };
            ((1.0 - a) / a).sqrt()
        };
        let config = schedule.config();
        Self {
            trained: schedule.alphas_cumprod().iter().map(sigma).collect(),
            end: config.final_sigma,
            cosine: config.beta_schedule == BetaSchedule::SquaredCosCapV2,
        }
    }

    /// σ after the last step.
    pub(super) fn end(&self) -> f64 {
        match self.end {
            FinalSigma::Zero => 0.0,
            FinalSigma::Least => f64::from(self.trained[0]),
        }
    }

    /// σ at a timestep, which need not be whole: on the line between its neighbours.
    pub(super) fn at(&self, t: f64) -> f64 {
        let below = (t as usize).min(self.trained.len() - 2);
        let (low, high) = (f64::from(self.trained[below]), f64::from(self.trained[below + 1]));
        single(low + (high - low) * (t - below as f64))
    }

    /// `steps` timesteps and their σ, from the greatest to the least, evenly spaced in their seventh roots.
    pub(super) fn karras(&self, steps: usize) -> (Vec<f64>, Vec<f64>) {
        const RHO: f64 = 7.0;
        let root = |sigma: f32| f64::from(sigma).powf(1.0 / RHO);
        let (least, greatest) = (root(self.trained[0]), root(self.trained[self.trained.len() - 1]));
        let width = 1.0 / (steps - 1).max(1) as f64;
        let sigmas = (0..steps).map(|i| (greatest + i as f64 * width * (least - greatest)).powf(RHO));
        sigmas.map(|sigma| (self.whole_timestep(sigma), single(sigma))).unzip()
    }

    /// The timestep of a σ, found on lines between logarithms.
    fn whole_timestep(&self, sigma: f64) -> f64 {
        // The logarithms that the reference compares with are float32.
        let log = |i: usize| f64::from(f64::from(self.trained[i]).ln() as f32);
        let wanted = sigma.ln();
        let count = self.trained.len();
        let below = (0..count).rev().find(|&i| wanted >= log(i)).unwrap_or(0).min(count - 2);
        let share = ((log(below) - wanted) / single(log(below) - log(below + 1))).clamp(0.0, 1.0);
        let t = (1.0 - share) * below as f64 + share * (below + 1) as f64;
        // The reference rounds all but the cosine schedule's, and then cuts what is left behind the point.
        if self.cosine { t.trunc() } else { t.round_ties_even() }
    }
}

/// Rounded to float32.
fn single(x: f64) -> f64 {
    f64::from(x as f32)
}
