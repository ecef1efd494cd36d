//! The noise schedule of a base model: how much noise a timestep stands for, and what the U-Net was taught to predict.
//!
//! Read from `scheduler_config.json`. Only the noise schedule is taken from it, whichever sampler it names: training needs no sampler, and
//! [`crate::sampler`] lets its caller choose one. The tables are computed in float32 by the same operations as in diffusers 0.42
//! (`schedulers/scheduling_ddim.py`), so that they agree bit for bit.

use std::fmt::{self, Display};
use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::config::ConfigFile;
use crate::error::{ModelError, Result};

/// How betas run from `beta_start` to `beta_end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaSchedule {
    /// Evenly spaced.
    Linear,
    /// Evenly spaced square roots: that of latent diffusion.
    ScaledLinear,
    /// From a squared cosine; `beta_start` and `beta_end` play no part.
    SquaredCosCapV2,
}

/// What the U-Net predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise ε.
    Epsilon,
    /// The velocity v = √ᾱ·ε − √(1−ᾱ)·x₀ (Imagen Video, section 2.4).
    Velocity,
    /// The image x₀.
    Sample,
}

impl Prediction {
    /// All of them, by the names that diffusers' configurations have for them.
    pub const NAMES: [(&str, Prediction); 3] =
        [("epsilon", Prediction::Epsilon), ("v_prediction", Prediction::Velocity), ("sample", Prediction::Sample)];
}

impl FromStr for Prediction {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, prediction)| *prediction);
        found.ok_or_else(|| ModelError::argument("prediction", Self::NAMES.map(|(known, _)| known).join(" or "), name))
    }
}

impl Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES.iter().find(|(_, known)| known == self).map_or("", |(name, _)| name))
    }
}

/// How a sampler's timesteps are spread over the trained ones (table 2 of arXiv:2305.08891).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// Multiples of a whole step from 0 up, plus `steps_offset`.
    Leading,
    /// Whole steps down from the last timestep.
    Trailing,
    /// Evenly from 0 to the last timestep, both included.
    Linspace,
}

/// The noise that is left after the last step of a sampler that counts in σ = √((1−ᾱ)/ᾱ).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalSigma {
    /// None.
    Zero,
    /// That of timestep 0.
    Least,
}

/// The fields of `scheduler_config.json` that a schedule and its samplers use.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleConfig {
    /// The number of timesteps N; timesteps are 0..N.
    pub num_train_timesteps: i64,
    /// The first beta.
    pub beta_start: f64,
    /// The last beta.
    pub beta_end: f64,
    /// The way from one to the other.
    pub beta_schedule: BetaSchedule,
    /// What the U-Net predicts.
    pub prediction: Prediction,
    /// Whether betas are rescaled so that nothing of the image is left at the last timestep (arXiv:2305.08891, algorithm 1).
    pub rescale_betas_zero_snr: bool,
    /// DDIM's last step goes to ᾱ = 1, else to that of timestep 0.
    pub set_alpha_to_one: bool,
    /// Added to a sampler's timesteps when the spacing is leading.
    pub steps_offset: i64,
    /// How a sampler's timesteps are spread, or nothing: then each sampler has its own way.
    pub spacing: Option<Spacing>,
    /// DDIM clamps predicted images to ±this, if given.
    pub clip_sample: Option<f64>,
    /// Where Euler's method and DPM-Solver++ end.
    pub final_sigma: FinalSigma,
}

impl ScheduleConfig {
    /// Reads `scheduler_config.json` in `dir`.
    ///
    /// # Errors
    /// A field is out of range, unknown, or asks for something unsupported: named with file, rule and value.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::read(ConfigFile::open(&dir.join("scheduler_config.json"))?)
    }

    /// Reads an opened configuration; errors as in [`ScheduleConfig::load`]. Missing fields have the defaults of the class named, but for
    /// the spacing: it has that of the sampler's, as where diffusers makes one scheduler from the configuration of another.
    pub fn read(c: ConfigFile) -> Result<Self> {
        c.only("_class_name", &CLASSES.map(Value::from))?;
        c.only("thresholding", &[json!(false)])?;
        if c.value("trained_betas").is_some() {
            return Err(c.refuse("trained_betas", "null or absent"));
        }
        let class = c.value("_class_name").and_then(Value::as_str).unwrap_or(CLASSES[0]);
        let (clips, ends_at_one) = match class {
            "PNDMScheduler" => (false, false),
            "DDIMScheduler" | "DDPMScheduler" => (true, true),
            _ => (false, true),
        };
        for (field, supported) in WITHOUT_CHOICE {
            c.only(field, &[Value::from(supported)])?;
        }
        c.only("use_flow_sigmas", &[json!(false)])?;
        for field in ["sigma_min", "sigma_max"] {
            if c.value(field).is_some() {
                return Err(c.refuse(field, "null or absent"));
            }
        }
        let spacing = c.value("timestep_spacing").is_some().then(|| choice(&c, "timestep_spacing", "", &SPACINGS)).transpose()?;
        let clip_sample_range = c.optional("clip_sample_range", "a number above 0", 1.0)?;
        let config = Self {
            num_train_timesteps: c.size_or("num_train_timesteps", 1000)?,
            beta_start: c.optional("beta_start", BETAS, 0.0001)?,
            beta_end: c.optional("beta_end", BETAS, 0.02)?,
            beta_schedule: choice(&c, "beta_schedule", "linear", &BETA_SCHEDULES)?,
            prediction: choice(&c, "prediction_type", "epsilon", &Prediction::NAMES)?,
            rescale_betas_zero_snr: c.optional("rescale_betas_zero_snr", BOOL, false)?,
            set_alpha_to_one: c.optional("set_alpha_to_one", BOOL, ends_at_one)?,
            steps_offset: c.optional("steps_offset", "a whole number of at least 0", 0)?,
            spacing,
            clip_sample: c.optional("clip_sample", BOOL, clips)?.then_some(clip_sample_range),
            final_sigma: choice(&c, "final_sigmas_type", "zero", &FINAL_SIGMAS)?,
        };
        config.check(&c, clip_sample_range)?;
        c.finish(&OF_SAMPLERS)?;
        Ok(config)
    }

    fn check(&self, c: &ConfigFile, clip_sample_range: f64) -> Result<()> {
        let rule = |field, holds: bool, rule: &str| if holds { Ok(()) } else { Err(c.refuse(field, rule)) };
        rule("num_train_timesteps", self.num_train_timesteps >= 2, "at least 2")?;
        rule("beta_start", self.beta_start > 0.0, BETAS)?;
        rule("beta_end", self.beta_end < 1.0 && self.beta_end >= self.beta_start, BETAS)?;
        rule("steps_offset", self.steps_offset >= 0, "a whole number of at least 0")?;
        rule("clip_sample_range", clip_sample_range > 0.0, "a number above 0")?;
        // Where nothing of the image is left, noise does not determine it.
        let solvable = !self.rescale_betas_zero_snr || self.prediction != Prediction::Epsilon;
        rule("rescale_betas_zero_snr", solvable, "false unless prediction_type is v_prediction or sample")
    }
}

const BOOL: &str = "true or false";
const BETAS: &str = "a number with 0 < beta_start <= beta_end < 1";

/// Samplers whose configurations describe a noise schedule in these fields.
const CLASSES: [&str; 10] = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
];
const BETA_SCHEDULES: [(&str, BetaSchedule); 3] =
    [("linear", BetaSchedule::Linear), ("scaled_linear", BetaSchedule::ScaledLinear), ("squaredcos_cap_v2", BetaSchedule::SquaredCosCapV2)];
const SPACINGS: [(&str, Spacing); 3] = [("leading", Spacing::Leading), ("trailing", Spacing::Trailing), ("linspace", Spacing::Linspace)];

const FINAL_SIGMAS: [(&str, FinalSigma); 2] = [("zero", FinalSigma::Zero), ("sigma_min", FinalSigma::Least)];

/// Fields with which timesteps and noise would belong together otherwise than here, and the value that they must have.
const WITHOUT_CHOICE: [(&str, &str); 2] = [("interpolation_type", "linear"), ("timestep_type", "discrete")];

/// Fields that choose a sampler, which is the caller's to name, or that count only beside a switch that is refused; none changes the noise
/// schedule.
const OF_SAMPLERS: [&str; 20] = [
    "algorithm_type",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "flow_shift",
    "lambda_min_clipped",
    "lower_order_final",
    "predict_x0",
    "sample_max_value",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "time_shift_type",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
];

/// A field that names one of a few things.
fn choice<T: Copy>(c: &ConfigFile, field: &str, default: &str, choices: &[(&str, T)]) -> Result<T> {
    let rule = choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
    let name = c.optional(field, &rule, default.to_owned())?;
    choices.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| c.refuse(field, &rule))
}

/// ᾱ by timestep, and what follows from it for training. Timesteps are `[B]` i64 in 0..N; tensors live on the schedule's device.
#[derive(Debug)]
pub struct Schedule {
    config: ScheduleConfig,
    alphas_cumprod: Vec<f32>,
    table: Tensor,
}

impl Schedule {
    /// Computes the tables, for tensors on `device`.
    pub fn new(config: ScheduleConfig, device: Device) -> Result<Self> {
        let table = alphas_cumprod(&config)?;
        Ok(Self { alphas_cumprod: Vec::try_from(&table)?, table: table.f_to_device(device)?, config })
    }

    /// Reads `scheduler_config.json` in `dir` and computes the tables, for tensors on `device`.
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        Self::new(ScheduleConfig::load(dir)?, device)
    }

    /// From an opened configuration.
    pub fn read(config: ConfigFile, device: Device) -> Result<Self> {
        Self::new(ScheduleConfig::read(config)?, device)
    }

    /// The configuration that it was made from.
    pub fn config(&self) -> &ScheduleConfig {
        &self.config
    }

    /// ᾱ for each timestep, falling from almost 1 to almost (or exactly) 0.
    pub fn alphas_cumprod(&self) -> &[f32] {
        &self.alphas_cumprod
    }

    /// The noisy latent √ᾱ·x₀ + √(1−ᾱ)·ε. `x0` and `noise` `[B,C,H,W]` → the same shape and dtype.
    pub fn add_noise(&self, x0: &Tensor, noise: &Tensor, t: &Tensor) -> Result<Tensor> {
        let (signal, sigma) = self.mix(x0, t)?;
        Ok((signal.f_mul(x0)?).f_add(&sigma.f_mul(noise)?)?)
    }

    /// What the U-Net's output is compared with: ε, v or x₀, by the configuration. Shapes as in [`Schedule::add_noise`].
    pub fn target(&self, x0: &Tensor, noise: &Tensor, t: &Tensor) -> Result<Tensor> {
        match self.config.prediction {
            Prediction::Epsilon => Ok(noise.shallow_clone()),
            Prediction::Sample => Ok(x0.shallow_clone()),
            Prediction::Velocity => {
                let (signal, sigma) = self.mix(x0, t)?;
                Ok((signal.f_mul(noise)?).f_sub(&sigma.f_mul(x0)?)?)
            }
        }
    }

    /// The min-SNR-γ weight of each sample's loss (arXiv:2303.09556), `[B]` float32: min(SNR, γ)/SNR for ε,
    /// min(SNR, γ)/(SNR+1) for v, min(SNR, γ) for x₀.
    pub fn min_snr_weights(&self, t: &Tensor, gamma: f64) -> Result<Tensor> {
        let a = self.table.f_index_select(0, t)?;
        let snr = a.f_div(&a.f_rsub_scalar(1.0)?)?;
        let least = snr.f_clamp_max(gamma)?;
        match self.config.prediction {
            Prediction::Epsilon => Ok(least.f_div(&snr)?),
            Prediction::Velocity => Ok(least.f_div(&snr.f_add_scalar(1.0)?)?),
            Prediction::Sample => Ok(least),
        }
    }

    /// (√ᾱ, √(1−ᾱ)) of each timestep, shaped to broadcast over `like` and in its dtype; the roots are taken in float32.
    fn mix(&self, like: &Tensor, t: &Tensor) -> Result<(Tensor, Tensor)> {
        let batch = like.size().first().copied().unwrap_or_default();
        if t.size() != [batch] || t.kind() != Kind::Int64 {
            return Err(ModelError::argument("timesteps", format!("[{batch}] Int64"), format!("{:?} {:?}", t.size(), t.kind())));
        }
        let mut shape = vec![1; like.dim()];
        shape[0] = batch;
        let a = self.table.f_index_select(0, t)?.f_view(shape.as_slice())?;
        let kind = like.kind();
        Ok((a.f_sqrt()?.f_to_kind(kind)?, a.f_rsub_scalar(1.0)?.f_sqrt()?.f_to_kind(kind)?))
    }
}

fn alphas_cumprod(config: &ScheduleConfig) -> Result<Tensor> {
    let n = config.num_train_timesteps;
    let on = (Kind::Float, Device::Cpu);
    let betas = match config.beta_schedule {
        BetaSchedule::Linear => Tensor::f_linspace(config.beta_start, config.beta_end, n, on)?,
        BetaSchedule::ScaledLinear => Tensor::f_linspace(config.beta_start.sqrt(), config.beta_end.sqrt(), n, on)?.f_square()?,
        BetaSchedule::SquaredCosCapV2 => squared_cosine(n)?,
    };
    let alphas = betas.f_rsub_scalar(1.0)?;
    if config.rescale_betas_zero_snr { zero_terminal_snr(&alphas) } else { Ok(alphas.f_cumprod(0, Kind::Float)?) }
}

/// β of step i is 1 − ᾱ((i+1)/n)/ᾱ(i/n), at most 0.999, with ᾱ(s) = cos²((s + 0.008)/1.008 · π/2).
fn squared_cosine(n: i64) -> Result<Tensor> {
    let alpha_bar = |i: i64| (((i as f64 / n as f64) + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let betas: Vec<f32> = (0..n).map(|i| (1.0 - alpha_bar(i + 1) / alpha_bar(i)).min(0.999) as f32).collect();
    Ok(Tensor::f_from_slice(&betas)?)
}

/// Shifts √ᾱ so that the last is 0, scales it so that the first stays, and takes ᾱ from the betas of that, as the reference does.
fn zero_terminal_snr(alphas: &Tensor) -> Result<Tensor> {
    let roots = alphas.f_cumprod(0, Kind::Float)?.f_sqrt()?;
    let n = alphas.size1()?;
    let (first, last) = (roots.f_narrow(0, 0, 1)?, roots.f_narrow(0, n - 1, 1)?);
    let bar = roots.f_sub(&last)?.f_mul(&first.f_div(&first.f_sub(&last)?)?)?.f_square()?;
    let ratios = bar.f_narrow(0, 1, n - 1)?.f_div(&bar.f_narrow(0, 0, n - 1)?)?;
    let alphas = Tensor::f_cat(&[&bar.f_narrow(0, 0, 1)?, &ratios], 0)?;
    // The reference stores betas, and so rounds 1 − (1 − α).
    Ok(alphas.f_rsub_scalar(1.0)?.f_rsub_scalar(1.0)?.f_cumprod(0, Kind::Float)?)
}
