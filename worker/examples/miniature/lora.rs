//! A LoRA on the base: every picture on a mint background, whatever the caption says of it, trained with the base's own encoder. With it `ella claims` sees whether what others train on a
//! base still works with a connector.

use anyhow::Result;
use ella_dataset::scenes::{Backdrop, Background};
use ella_model::params::{Compute, Init, Params};
use ella_model::schedule::Schedule;
use ella_model::unet::{UNet, UNetConfig};
use ella_model::vae::Vae;
use ella_model::weights::{self, Weights};
use tch::{Kind, Reduction, Tensor};

use crate::Place;
use crate::learner::{Course, Learner};
use crate::scenes::{LEARNT, ahead, pictures, scenes, take};
use crate::unet::Reader;

/// What is learnt for each layer: `[out, in]` as a product of `[out, RANK]` and `[RANK, in]`.
const RANK: i64 = 4;

/// The layers that learn: linear maps of the transformers.
fn learns(name: &str) -> bool {
    name.contains(".attentions.") && name.ends_with(".weight")
}

pub(crate) fn train(place: &Place, course: Course) -> Result<()> {
    let device = place.device;
    let config = UNetConfig::load(&place.out("base/unet"))?;
    let frozen = frozen(place, &config)?;
    let p = Params::random(9, Kind::Float, device);
    let mut first = Vec::new();
    for (name, weight) in &frozen {
        let [output, input] = weight.size()[..] else { continue };
        if learns(name) {
            let layer = name.trim_end_matches(".weight");
            first.push((format!("lora.{layer}.lora_A.weight"), p.get(layer, &[RANK, input], Init::KaimingUniform)?));
            first.push((format!("lora.{layer}.lora_B.weight"), Tensor::f_zeros([output, RANK], (Kind::Float, device))?));
        }
    }
    let mut learner = Learner::open(&place.work("lora"), course, first, device)?;
    let (vae, reader) = (Vae::load(&place.out("base/vae"), Kind::Float, device)?, Reader::load(place)?);
    let schedule = Schedule::load(&place.shape("base/scheduler"), device)?;
    let size = course.batch as u64;
    let batches = ahead(learner.next().unwrap_or(course.steps), course.steps, move |step| {
        let mut scenes = scenes(LEARNT, step * size..(step + 1) * size);
        let captions = scenes.iter().map(|scene| scene.dense_caption()).collect::<Vec<_>>();
        scenes.iter_mut().for_each(|scene| scene.background = Background::Plain { color: Backdrop::Mint });
        Ok((pictures(&scenes, device)?, captions))
    });
    while learner.next().is_some() {
        let (seen, captions) = take(&batches)?;
        let latents = tch::no_grad(|| -> Result<_> { Ok(vae.scale(&vae.encode(&seen)?.0)?) })?;
        let noise = latents.f_randn_like()?;
        let t = Tensor::f_randint(schedule.config().num_train_timesteps, [learner.batch()], (Kind::Int64, device))?;
        let unet = with(&config, &frozen, &learner.named("lora"))?;
        let predicted = unet.forward(&schedule.add_noise(&latents, &noise, &t)?, &t, &reader.states(&reader.ids(&captions)?)?)?;
        learner.learn(&predicted.f_mse_loss(&schedule.target(&latents, &noise, &t)?, Reduction::Mean)?)?;
    }
    let file = place.out("lora/mint.safetensors");
    file.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    let halves = learner.averaged("lora")?.into_iter().map(|(name, tensor)| Ok((format!("unet.{name}"), tensor.f_to_kind(Kind::Half)?)));
    Ok(weights::save(&file, &halves.collect::<Result<Vec<_>>>()?)?)
}

/// The base's weights.
fn frozen(place: &Place, config: &UNetConfig) -> Result<Vec<(String, Tensor)>> {
    let p = Params::from_weights(Weights::open(&place.out("base/unet"))?, Kind::Float, place.device);
    UNet::new(config, &p)?;
    Ok(p.taken())
}

/// The U-Net of these weights with what has been learnt added.
fn with(config: &UNetConfig, frozen: &[(String, Tensor)], learnt: &[(String, Tensor)]) -> Result<UNet> {
    let find = |name: String| learnt.iter().find(|(known, _)| *known == name).map(|(_, tensor)| tensor);
    let merged = |(name, weight): &(String, Tensor)| -> Result<(String, Tensor)> {
        let layer = name.trim_end_matches(".weight");
        let added = find(format!("{layer}.lora_B.weight")).zip(find(format!("{layer}.lora_A.weight")));
        let weight = match added {
            Some((up, down)) => weight.f_add(&up.f_matmul(down)?)?,
            None => weight.shallow_clone(),
        };
        Ok((name.clone(), weight))
    };
    let p = Params::given(frozen.iter().map(merged).collect::<Result<Vec<_>>>()?);
    p.compute_by(Compute::PLAIN);
    Ok(UNet::new(config, &p)?)
}
