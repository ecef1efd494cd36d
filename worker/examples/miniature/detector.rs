//! The detector: what pictures of scenes are scored by.

use anyhow::Result;
use ella_model::detector::{Detector, Found};
use ella_model::vae::Vae;
use serde_json::json;
use tch::{Device, Kind, Reduction, Tensor};

use crate::learner::{Course, Learner, fresh};
use crate::scenes::{HELD_OUT, LEARNT, Truth, UNASKED, ahead, detector_config, pictures, scenes, take, truth};
use crate::{Place, save_network};

pub(crate) fn train(place: &Place, course: Course) -> Result<()> {
    let config = detector_config();
    let first = fresh("detector", 2, place.device, |p| Detector::new(&config, p))?;
    let mut learner = Learner::open(&place.work("detector"), course, first, place.device)?;
    let detector = Detector::new(&config, &learner.params("detector"))?;
    let vae = Vae::load(&place.out("base/vae"), Kind::Float, place.device)?;
    let (batch, device) = (course.batch as u64, place.device);
    let batches = ahead(learner.next().unwrap_or(course.steps), course.steps, move |step| {
        let scenes = scenes(LEARNT, step * batch..(step + 1) * batch);
        Ok((pictures(&scenes, device)?, truth(&scenes, None, device)?))
    });
    while learner.next().is_some() {
        let (seen, truth) = take(&batches)?;
        // Pictures to be scored come out of the VAE, so half of these do; and none of them are clean.
        let half = seen.size()[0] / 2;
        let through = tch::no_grad(|| reconstructed(&vae, &seen.f_narrow(0, 0, half)?))?;
        let seen = Tensor::f_cat(&[through, seen.f_narrow(0, half, seen.size()[0] - half)?], 0)?;
        let strength = Tensor::f_rand([seen.size()[0], 1, 1, 1], (Kind::Float, device))?.f_mul_scalar(0.2)?;
        let seen = seen.f_add(&seen.f_randn_like()?.f_mul(&strength)?)?;
        learner.learn(&loss(&detector.forward(&seen)?, &truth)?)?;
    }
    let average = Detector::new(&config, &learner.average("detector")?)?;
    let held_out = scenes(HELD_OUT, 0..2000);
    let truth = truth(&held_out, None, device)?;
    let (clean, through) = tch::no_grad(|| -> Result<_> {
        let seen = pictures(&held_out, device)?;
        Ok((right(&average.forward(&seen)?, &truth)?, right(&average.forward(&reconstructed(&vae, &seen)?)?, &truth)?))
    })?;
    learner.tell(&json!({ "held_out": clean, "held_out_through_vae": through }))?;
    let words = json!({
        "places": config.places, "shapes": config.shapes, "colors": config.colors, "sizes": config.sizes, "textures": config.textures,
        "backdrops": config.backdrops, "channels": config.channels,
    });
    crate::write_json(&place.out("detector/config.json"), &words)?;
    save_network(place, "detector", "model", &learner.averaged("detector")?, &[])
}

/// Pictures as the VAE shows them.
pub(crate) fn reconstructed(vae: &Vae, seen: &Tensor) -> Result<Tensor> {
    let made: Result<Vec<Tensor>> =
        seen.f_split(500, 0)?.iter().map(|part| Ok(vae.decode(&vae.encode(part)?.0)?.f_clamp(-1.0, 1.0)?)).collect();
    Ok(Tensor::f_cat(&made?, 0)?)
}

/// The sum of the cross-entropies of what is asked.
pub(crate) fn loss(found: &Found, truth: &Truth) -> Result<Tensor> {
    let entropy = |logits: &Tensor, answers: &Tensor| {
        logits.f_flatten(0, -2)?.f_cross_entropy_loss(&answers.f_flatten(0, -1)?, None::<Tensor>, Reduction::Mean, UNASKED, 0.0)
    };
    let mut sum = entropy(&found.backdrop, &truth.backdrop)?;
    for (logits, answers) in found.cells.iter().zip(&truth.cells) {
        sum = sum.f_add(&entropy(logits, answers)?)?;
    }
    Ok(sum)
}

/// Shares of what is asked that is right: emptiness and outlines, colours, sizes, textures, backgrounds; and of objects with all that is asked of
/// them right.
pub(crate) fn right(found: &Found, truth: &Truth) -> Result<Vec<f64>> {
    let rounded = |share: f64| (share * 1e4).round() / 1e4;
    let share = |right: &Tensor, asked: &Tensor| -> Result<f64> {
        let count = |of: &Tensor| of.f_sum(Kind::Float).map(|sum| sum.double_value(&[]));
        Ok(rounded(count(&right.f_logical_and(asked)?)? / count(asked)?.max(1.0)))
    };
    let (mut shares, mut whole) = (Vec::new(), Tensor::f_ones_like(&truth.cells[0])?.f_to_kind(Kind::Bool)?);
    for (logits, answers) in found.cells.iter().zip(&truth.cells) {
        let right = logits.f_argmax(-1, false)?.f_eq_tensor(answers)?;
        shares.push(share(&right, &answers.f_ne(UNASKED)?)?);
        whole = whole.f_logical_and(&right)?;
    }
    shares.push(share(&found.backdrop.f_argmax(-1, false)?.f_eq_tensor(&truth.backdrop)?, &truth.backdrop.f_ne(UNASKED)?)?);
    shares.push(share(&whole, &truth.cells[0].f_gt(0)?)?);
    Ok(shares)
}

/// The trained one.
pub(crate) fn load(place: &Place, device: Device) -> Result<Detector> {
    Ok(Detector::load(&place.out("detector"), device)?)
}
