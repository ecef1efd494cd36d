//! Single-file checkpoints in the key layout of latent-diffusion and Stability's generative-models: what community sites hand out.
//!
//! Recognises SD 1.x, SD 2.x and SDXL, infers each network's configuration from names and shapes, and shows the tensors under the names
//! of diffusers and transformers. Follows diffusers 0.42, `loaders/single_file_utils.py`. What a file does not tell is that of the
//! family's published configurations: heads, groups of norms, activations, the VAE's scaling, the noise schedule.

mod clip;
mod foreign;
mod unet;
mod vae;

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use crate::config::ConfigFile;
use crate::error::{ModelError, Result};
use crate::part::Part;
use crate::weights::Weights;

/// Before the U-Net's keys.
const UNET: &str = "model.diffusion_model.";
/// Before the VAE's keys.
const VAE: &str = "first_stage_model.";

/// Keys that checkpoints hold beside their networks: averaged weights, the schedule's tables, the VAE's training loss, and what of CLIP
/// makes no features.
const HARMLESS: [&str; 19] = [
    "model_ema.*",
    "betas",
    "alphas_cumprod*",
    "sqrt_*",
    "log_one_minus_alphas_cumprod",
    "posterior_*",
    "logvar",
    "lvlb_weights",
    "denoiser.*",
    "embedding_manager.*",
    "scale_factor",
    "global_step",
    "v_pred",
    "ztsnr",
    "first_stage_model.loss.*",
    "first_stage_model.model_ema.*",
    "*.position_ids",
    "*.logit_scale",
    "*.attn_mask",
];

/// The families of Stable Diffusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// SD 1.x.
    Sd1,
    /// SD 2.x.
    Sd2,
    /// SDXL's base.
    Sdxl,
}

impl Family {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Family::Sd1 => "SD 1.x",
            Family::Sd2 => "SD 2.x",
            Family::Sdxl => "SDXL",
        }
    }
}

/// A single-file checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    weights: Weights,
    family: Family,
}

impl Checkpoint {
    /// Opens `path` and recognises what it is.
    ///
    /// # Errors
    /// A file that is damaged, is something else (which is then named), or holds tensors that no such checkpoint has.
    pub fn open(path: &Path) -> Result<Self> {
        let weights = Weights::open(path)?;
        foreign::refuse(&weights)?;
        let family = family(&weights);
        let mut known: Vec<String> = [UNET, VAE].iter().map(|prefix| format!("{prefix}*")).collect();
        known.extend(clip::encoders(family).iter().map(|encoder| format!("{}*", encoder.prefix)));
        known.extend(clip::beside(family).iter().map(|&key| key.to_owned()));
        let patterns: Vec<&str> = known.iter().map(String::as_str).chain(HARMLESS).collect();
        weights.expect_only(&BTreeSet::new(), &patterns)?;
        Ok(Checkpoint { weights, family })
    }

    /// Which family it is of.
    pub fn family(&self) -> Family {
        self.family
    }

    /// All tensors of the file, under its own keys.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The U-Net.
    ///
    /// # Errors
    /// A tensor that tells a size is missing or has another number of axes.
    pub fn unet(&self) -> Result<Part> {
        let raw = self.below(UNET)?;
        let pooled = clip::pooled_width(&self.weights);
        let shape = unet::Layout::read(&raw);
        let mut fields = shape.config(&raw, self.family, pooled)?;
        fields["sample_size"] = json!(self.pixels() / 8);
        self.part(fields, raw.renamed(|key| Some(shape.name(key).unwrap_or_else(|| format!("{UNET}{key}"))))?)
    }

    /// The VAE; errors as for the U-Net.
    pub fn vae(&self) -> Result<Part> {
        let raw = self.below(VAE)?.renamed(|key| (!key.starts_with("loss.") && !key.starts_with("model_ema.")).then(|| key.into()))?;
        let mut fields = vae::config(&raw, self.family)?;
        fields["sample_size"] = json!(self.pixels());
        self.part(fields, vae::named(&raw)?)
    }

    /// The side of the pictures that the published model was trained on: a large picture's tiles are as large.
    fn pixels(&self) -> i64 {
        match (self.family, self.prediction()) {
            (Family::Sd2, "v_prediction") => 768,
            (Family::Sd1 | Family::Sd2, _) => 512,
            (Family::Sdxl, _) => 1024,
        }
    }

    /// The text encoders that the file holds, in the order in which their features are joined; errors as for the U-Net.
    pub fn text_encoders(&self) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        for encoder in clip::encoders(self.family) {
            let raw = self.below(encoder.prefix)?;
            if raw.names().next().is_some() {
                let weights = encoder.named(&raw)?;
                parts.push(self.part(encoder.config(&weights)?, weights)?);
            }
        }
        Ok(parts)
    }

    /// The scheduler's configuration: the family's published one, with this file's prediction type.
    pub fn scheduler(&self) -> Result<ConfigFile> {
        let zero_snr = self.weights.shape("ztsnr").is_some();
        let (class, spacing) = match self.family {
            Family::Sd1 if !zero_snr => ("PNDMScheduler", None),
            Family::Sdxl if !zero_snr => ("EulerDiscreteScheduler", Some("leading")),
            // Of the samplers only DDIM and Euler know the rescaled schedule, which needs its last timestep (arXiv:2305.08891).
            _ => ("DDIMScheduler", zero_snr.then_some("trailing")),
        };
        let mut fields = json!({
            "_class_name": class, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000, "prediction_type": self.prediction(), "set_alpha_to_one": false, "steps_offset": 1,
            "clip_sample": false, "rescale_betas_zero_snr": zero_snr,
        });
        if let Some(spacing) = spacing {
            fields["timestep_spacing"] = json!(spacing);
        }
        self.config(fields)
    }

    /// What the U-Net predicts: as the file's metadata or its marks say; else v for SD 2.x and ε for the others. diffusers
    /// takes SD 2.x for ε if its `global_step` is that of the 512-pixel model.
    pub fn prediction(&self) -> &'static str {
        let said = ["modelspec.prediction_type", "modelspec.predict_key"].into_iter().find_map(|field| self.weights.metadata(field));
        match said {
            Some("v" | "v_prediction") => return "v_prediction",
            Some("epsilon" | "eps") => return "epsilon",
            _ => {}
        }
        let marked = self.weights.shape("v_pred").is_some() || self.weights.shape("ztsnr").is_some();
        let of_base = || {
            let step = self.weights.load("global_step", &[], tch::Kind::Int64, tch::Device::Cpu);
            step.ok().and_then(|step| i64::try_from(&step).ok()) == Some(875_000)
        };
        if marked || (self.family == Family::Sd2 && !of_base()) { "v_prediction" } else { "epsilon" }
    }

    fn below(&self, prefix: &str) -> Result<Weights> {
        self.weights.renamed(|key| key.strip_prefix(prefix).map(str::to_owned))
    }

    fn part(&self, fields: Value, weights: Weights) -> Result<Part> {
        Ok(Part { config: self.config(fields)?, weights })
    }

    fn config(&self, fields: Value) -> Result<ConfigFile> {
        match fields {
            Value::Object(fields) => Ok(ConfigFile::from_map(self.weights.path(), fields)),
            _ => Err(ModelError::NotConfig { file: self.weights.path().into(), reason: "is no object".into() }),
        }
    }
}

/// The family by the U-Net alone, since a file may hold no text encoder: SDXL's takes further conditions, SD 2's
/// projections around transformers are linear, SD 1's are convolutions.
fn family(weights: &Weights) -> Family {
    let linear = |name: &str| name.starts_with(UNET) && name.ends_with(".proj_in.weight");
    let first = weights.names().find(|name| linear(name));
    if weights.shape("model.diffusion_model.label_emb.0.0.weight").is_some() {
        Family::Sdxl
    } else if first.and_then(|name| weights.shape(name)).is_some_and(|shape| shape.len() == 2) {
        Family::Sd2
    } else {
        Family::Sd1
    }
}

/// `key` with the first prefix of the table that it has replaced by its counterpart.
fn swap(key: &str, table: &[(&str, &str)]) -> Option<String> {
    table.iter().find_map(|(old, new)| key.strip_prefix(old).map(|rest| format!("{new}{rest}")))
}

/// A size that is told by axis `axis` of a tensor.
///
/// # Errors
/// The tensor is missing, or has fewer axes.
fn size(weights: &Weights, prefix: &str, key: &str, axis: usize) -> Result<i64> {
    let named = || format!("{prefix}{key}");
    let shape = weights.shape(key).ok_or_else(|| ModelError::MissingTensor { file: weights.path().into(), key: named() })?;
    shape.get(axis).copied().ok_or_else(|| ModelError::WrongShape {
        file: weights.path().into(),
        key: named(),
        expected: vec![-1; axis + 1],
        found: shape.into(),
    })
}
