//! A step that has its features, and its latents, made when they are needed, beside one that has them cached.

use crate::timing;
use crate::train::{self, Trainer};
use crate::{Setting, gpu, networks};
use anyhow::Result;
use ella_model::text::{Layers, Text};
use ella_model::vae::Vae;
use ella_worker::train::lane::LaneBatch;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

struct Encoders {
    text: Text,
    vae: Vae,
    captions: (Tensor, Tensor),
    /// `[B, 3, H, W]` in −1…1.
    pictures: Tensor,
}

impl Encoders {
    fn new(setting: &Setting) -> Result<Self> {
        let vae = networks::vae(setting)?;
        let size = setting.latent() * vae.config().downscale();
        let pictures = Tensor::f_rand([setting.micro_batch, 3, size, size], (Kind::Float, setting.device))?;
        let pictures = pictures.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?;
        Ok(Self { text: networks::text(setting)?, vae, captions: networks::captions(setting)?, pictures })
    }

    fn features(&self, batch: &mut LaneBatch) -> Result<()> {
        let (ids, mask) = &self.captions;
        batch.features = tch::no_grad(|| self.text.features(ids, mask, Layers::Last))?;
        Ok(())
    }

    fn latents(&self, batch: &mut LaneBatch) -> Result<()> {
        let (mean, _) = tch::no_grad(|| self.vae.encode(&self.pictures))?;
        batch.latents = self.vae.scale(&mean)?.f_to_kind(Kind::Float)?;
        Ok(())
    }
}

pub(crate) fn run(setting: &Setting) -> Result<Value> {
    let (peak, flops) = (train::peak(setting)?, train::flops(setting)?);
    let (mut trainer, encoders) = (Trainer::new(setting, 1)?, Encoders::new(setting)?);
    gpu::reset_peak(setting.device);
    let mut measure = |features: bool, latents: bool| -> Result<Value> {
        let timed = timing::time(setting.device, setting.measure, || {
            let mut batch = trainer.batch()?;
            if features {
                encoders.features(&mut batch)?;
            }
            if latents {
                encoders.latents(&mut batch)?;
            }
            trainer.step(&batch).map(drop)
        })?;
        Ok(train::figures(&timed, setting.micro_batch as f64, flops, peak))
    };
    let (cached, features, both) = (measure(false, false)?, measure(true, false)?, measure(true, true)?);
    let ratio = |of: &Value| of["images_per_second"].as_f64().zip(cached["images_per_second"].as_f64()).map(|(of, cached)| of / cached);
    let (text_ratio, both_ratio) = (ratio(&features), ratio(&both));
    Ok(json!({
        "micro_batch": setting.micro_batch, "cached": cached, "inline_text": features, "inline_text_and_vae": both,
        "inline_text_over_cached": text_ratio, "inline_text_and_vae_over_cached": both_ratio, "memory": gpu::memory(setting.device),
    }))
}
