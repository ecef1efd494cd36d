//! A step that has its features, and its latents, made when they are needed, beside one that has them cached.

use crate::timing;
use crate::train::{self, Trainer};
use crate::{Setting, gpu, networks};
use anyhow::{Result, anyhow};
use ella_cuda::stream::{Event, Priority, Stream};
use ella_model::text::{Layers, Text};
use ella_model::vae::Vae;
use ella_worker::train::lane::LaneBatch;
use serde_json::{Value, json};
use std::sync::mpsc::{SyncSender, sync_channel};
use tch::{Device, Kind, Tensor};

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
    let mut measure = |make: &dyn Fn(&mut LaneBatch) -> Result<()>| -> Result<Value> {
        let timed = timing::time(setting.device, setting.measure, || {
            let mut batch = trainer.batch()?;
            make(&mut batch)?;
            trainer.step(&batch).map(drop)
        })?;
        Ok(train::figures(&timed, setting.micro_batch as f64, flops, peak))
    };
    let cached = measure(&|_| Ok(()))?;
    let text = measure(&|batch| encoders.features(batch))?;
    let both = measure(&|batch| encoders.features(batch).and_then(|()| encoders.latents(batch)))?;
    let ahead = match setting.device.is_cuda() {
        true => text_ahead(setting.device, encoders.text, encoders.captions, measure)?,
        false => json!({ "skipped": "a processor has no streams" }),
    };
    let rate = |of: &Value| of["images_per_second"].as_f64();
    let ratio = |of: &Value| rate(of).zip(rate(&cached)).map(|(of, cached)| of / cached);
    let ratios = json!({ "text": ratio(&text), "text_ahead": ratio(&ahead), "text_and_vae": ratio(&both) });
    Ok(json!({
        "micro_batch": setting.micro_batch, "over_cached": ratios, "cached": cached, "text": text, "text_ahead": ahead, "text_and_vae": both,
        "memory": gpu::memory(setting.device),
    }))
}

/// Features of a batch, and when they are there.
type Made = (Tensor, Event);

/// The steps that `measure` measures, with features that another thread makes one batch ahead, on a stream of low priority.
fn text_ahead(
    device: Device,
    text: Text,
    captions: (Tensor, Tensor),
    mut measure: impl FnMut(&dyn Fn(&mut LaneBatch) -> Result<()>) -> Result<Value>,
) -> Result<Value> {
    let (sender, made) = sync_channel::<Result<Made>>(1);
    std::thread::scope(|scope| {
        scope.spawn(move || encode_ahead(device, &text, &captions, &sender));
        let current = Stream::current(device)?;
        let measured = measure(&|batch| {
            let (features, event) = made.recv().map_err(|_| anyhow!("the text encoder's thread has ended"))??;
            current.wait(&event)?;
            current.keep(&features)?;
            batch.features = features;
            Ok(())
        });
        // Nobody waits for features any more: the thread ends.
        drop(made);
        measured
    })
}

/// Makes features until nobody takes them.
fn encode_ahead(device: Device, text: &Text, (ids, mask): &(Tensor, Tensor), sender: &SyncSender<Result<Made>>) {
    let stream = Stream::new(device, Priority::Low).and_then(|stream| Ok((stream, stream.enter()?)));
    let (stream, _entered) = match stream {
        Ok(entered) => entered,
        Err(error) => return drop(sender.send(Err(error.into()))),
    };
    let make = || -> Result<Made> {
        let features = tch::no_grad(|| text.features(ids, mask, Layers::Last))?;
        Ok((features, stream.record()?))
    };
    while sender.send(make()).is_ok() {}
}
