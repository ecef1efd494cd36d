//! From noise to a latent in a few steps: DDIM, Euler, Euler ancestral and DPM-Solver++ 2M, each as diffusers 0.42 steps it.
//!
//! A [`Method`] is chosen by name and made into a [`Sampler`] over a [`Schedule`]. The caller starts from noise times
//! [`Sampler::init_sigma`], and for each timestep asks the U-Net at [`Sampler::scale_input`] and hands its output to [`Sampler::step`].
//! Classifier-free guidance is the caller's: it mixes two outputs of the U-Net before the step. Latents are float32 of any shape.

mod ddim;
mod dpm;
mod euler;
mod sigmas;

use std::fmt::{Debug, Display, Formatter};
use std::str::FromStr;

use tch::Tensor;

pub use self::ddim::Ddim;
pub use self::dpm::Dpm;
pub use self::euler::Euler;
use crate::error::{ModelError, Result};
use crate::schedule::{Prediction, Schedule};

/// A sampler of a fixed number of steps.
pub trait Sampler: Debug + Send {
    /// The timesteps, falling: the U-Net is asked at each of them, in this order. Not all methods keep to whole ones.
    fn timesteps(&self) -> &[f32];

    /// What noise of unit variance is multiplied by to start from.
    fn init_sigma(&self) -> f64;

    /// What the U-Net is asked about: the latent `sample` at the timestep of this index, in the scale that the U-Net was trained on.
    ///
    /// # Errors
    /// There is no timestep of this index.
    fn scale_input(&self, sample: &Tensor, index: usize) -> Result<Tensor>;

    /// One step: from the latent `sample` (as it was before [`Sampler::scale_input`]) at the timestep of this index, and the U-Net's `output`
    /// there, to the next latent. `noise` gives fresh noise of the latent's shape; only a random method asks for it, and once a step at most.
    ///
    /// # Errors
    /// There is no timestep of this index, or it does not follow that of the last step where the method builds on it. Index 0 starts anew.
    fn step(&mut self, output: &Tensor, index: usize, sample: &Tensor, noise: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor>;
}

/// The ways to sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// [`Ddim`] with η = 0.
    Ddim,
    /// [`Euler`]'s method.
    Euler,
    /// [`Euler`]'s method with fresh noise after each step.
    EulerAncestral,
    /// [`Dpm`]-Solver++ 2M.
    Dpm2M,
    /// [`Dpm`]-Solver++ 2M at the noise levels of Karras.
    Dpm2MKarras,
}

impl Method {
    /// Every method by the name that users know it by.
    pub const NAMES: [(&'static str, Method); 5] = [
        ("ddim", Method::Ddim),
        ("euler", Method::Euler),
        ("euler-a", Method::EulerAncestral),
        ("dpm++2m", Method::Dpm2M),
        ("dpm++2m-karras", Method::Dpm2MKarras),
    ];

    /// A sampler that takes `steps` steps, 1 to N (N − 1 for DPM-Solver++).
    ///
    /// # Errors
    /// `steps` is out of range, or so many that the schedule's `steps_offset` leads beyond the last timestep.
    pub fn sampler(self, schedule: &Schedule, steps: usize) -> Result<Box<dyn Sampler>> {
        Ok(match self {
            Method::Ddim => Box::new(Ddim::new(schedule, steps)?),
            Method::Euler => Box::new(Euler::new(schedule, steps)?),
            Method::EulerAncestral => Box::new(Euler::ancestral(schedule, steps)?),
            Method::Dpm2M => Box::new(Dpm::new(schedule, steps)?),
            Method::Dpm2MKarras => Box::new(Dpm::karras(schedule, steps)?),
        })
    }

    /// Whether its steps ask for noise.
    pub fn is_random(self) -> bool {
        self == Method::EulerAncestral
    }
}

impl FromStr for Method {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self> {
        let known = Self::NAMES.iter().find(|(known, _)| *known == name);
        known.map(|(_, method)| *method).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name).join(" or ");
            ModelError::argument("sampler", names, format_args!("{name:?}"))
        })
    }
}

impl Display for Method {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let name = Self::NAMES.iter().find(|(_, method)| method == self).map_or("", |(name, _)| name);
        f.pad(name)
    }
}

/// What a method keeps for each step, or the error of an index beyond them.
fn at<T>(steps: &[T], index: usize) -> Result<&T> {
    steps.get(index).ok_or_else(|| ModelError::argument("index", format!("less than {}", steps.len()), index))
}

/// The image x₀ that the U-Net's `output` stands for, where it was asked about `sample` = `signal`·x₀ + `sigma`·ε.
fn image(prediction: Prediction, output: &Tensor, sample: &Tensor, (signal, sigma): (f64, f64)) -> Result<Tensor> {
    Ok(match prediction {
        Prediction::Epsilon => sample.f_sub(&output.f_mul_scalar(sigma)?)?.f_div_scalar(signal)?,
        Prediction::Velocity => sample.f_mul_scalar(signal)?.f_sub(&output.f_mul_scalar(sigma)?)?,
        Prediction::Sample => output.shallow_clone(),
    })
}
