//! The VAE: pictures to latents and back.

use anyhow::Result;
use ella_model::vae::{Vae, VaeConfig};
use serde_json::json;
use tch::{Kind, Reduction, Tensor};

use crate::learner::{Course, Learner, fresh};
use crate::scenes::{HELD_OUT, LEARNT, ahead, pictures, scenes, take};
use crate::{Place, save_network};

pub(crate) fn train(place: &Place, course: Course) -> Result<()> {
    let config = VaeConfig::load(&place.shape("base/vae"))?;
    let first = fresh("vae", 1, place.device, |p| Vae::new(&config, p))?;
    let mut learner = Learner::open(&place.work("vae"), course, first, place.device)?;
    let vae = Vae::new(&config, &learner.params("vae"))?;
    let (batch, device) = (course.batch as u64, place.device);
    let batches = ahead(learner.next().unwrap_or(course.steps), course.steps, move |step| {
        pictures(&scenes(LEARNT, step * batch..(step + 1) * batch), device)
    });
    while learner.next().is_some() {
        let loss = loss(&vae, &take(&batches)?)?;
        learner.learn(&loss)?;
    }
    let average = Vae::new(&config, &learner.average("vae")?)?;
    // Latents of unit deviation are what the diffusion model's noise is made for.
    let (held_out, scale) = tch::no_grad(|| -> Result<_> {
        let seen = pictures(&scenes(HELD_OUT, 0..500), device)?;
        let (mean, _) = average.encode(&seen)?;
        let error = average.decode(&mean)?.f_sub(&seen)?.f_abs()?.f_mean(Kind::Float)?.double_value(&[]);
        Ok((error, 1.0 / mean.f_std(true)?.double_value(&[])))
    })?;
    learner.tell(&json!({ "held_out_l1": held_out, "scaling_factor": scale }))?;
    save_network(place, "base/vae", "diffusion_pytorch_model", &learner.averaged("vae")?, &[("scaling_factor", json!(scale))])
}

/// How far a picture and its reconstruction are apart, in values and in the differences of neighbours; and how far latents are from noise.
fn loss(vae: &Vae, seen: &Tensor) -> Result<Tensor> {
    let (mean, logvar) = vae.encode(seen)?;
    let latent = mean.f_add(&mean.f_randn_like()?.f_mul(&logvar.f_mul_scalar(0.5)?.f_exp()?)?)?;
    let made = vae.decode(&latent)?;
    let values = made.f_l1_loss(seen, Reduction::Mean)?.f_add(&made.f_mse_loss(seen, Reduction::Mean)?)?;
    let across = |axis: i64| -> Result<Tensor> {
        let step = |x: &Tensor| x.f_diff::<Tensor>(1, axis, None, None);
        Ok(step(&made)?.f_l1_loss(&step(seen)?, Reduction::Mean)?)
    };
    let edges = across(2)?.f_add(&across(3)?)?.f_mul_scalar(0.5)?;
    // Half of (μ² + σ² − 1 − ln σ²), over the number of the picture's values.
    let apart = mean.f_square()?.f_add(&logvar.f_exp()?)?.f_sub_scalar(1.0)?.f_sub(&logvar)?.f_sum(Kind::Float)?;
    let apart = apart.f_mul_scalar(0.5 * KL_WEIGHT / seen.numel() as f64)?;
    Ok(values.f_add(&edges)?.f_add(&apart)?)
}

const KL_WEIGHT: f64 = 1e-3;
