//! From noise to pictures: a sampler with classifier-free guidance, the connector asked anew at every timestep.

use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::connector::{Conditions, Connector};
use ella_model::lora::Lora;
use ella_model::sampler::{Method, Sampler};
use ella_model::unet::{Added, UNet};
use ella_model::vae::Vae;
use tch::{Device, Kind, Tensor};

use super::frame::{Noise, normal};
use super::picture::{Picture, pictures};
use super::plan::Shot;
use super::told::{Rows, Script, Told};
use crate::ui::Fail;

/// How to draw.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) method: Method,
    pub(super) steps: usize,
    /// 1: the negative prompt is not asked.
    pub(super) guidance: f64,
    /// Pictures drawn at once.
    pub(super) batch: usize,
}

/// The networks that draw; the connector and all between steps in float32.
#[derive(Debug)]
pub(super) struct Drawer {
    connector: Connector,
    unet: UNet,
    vae: Vae,
    sampler: Box<dyn Sampler>,
    settings: Settings,
    device: Device,
}

impl Drawer {
    /// Loads the base's networks, LoRAs merged into its U-Net, which compute in `kind`.
    pub(super) fn load(
        (base, loras): (&Base, &[Lora]),
        connector: Connector,
        settings: Settings,
        (kind, device): (Kind, Device),
    ) -> Result<Self, Fail> {
        let sampler = settings.method.sampler(&base.schedule(device)?, settings.steps)?;
        Ok(Self { connector, unet: base.unet_with(loras, kind, device)?, vae: base.vae(kind, device)?, sampler, settings, device })
    }

    /// How often the progress of so many pictures will count.
    pub(super) fn total_steps(&self, pictures: usize) -> u64 {
        (pictures.div_ceil(self.settings.batch) * self.sampler.timesteps().len()) as u64
    }

    /// The pictures of all shots, as the script tells them. `step` hears of each step done.
    pub(super) fn draw(&mut self, shots: &[Shot], script: &Script, noise: &Noise, step: &mut dyn FnMut()) -> Result<Vec<Picture>, Fail> {
        let mut drawn = Vec::with_capacity(shots.len());
        for shots in shots.chunks(self.settings.batch) {
            let noise = noise.rows(drawn.len(), shots)?.f_to_device(self.device)?;
            let images = tch::no_grad(|| self.group(shots, script, &noise, step))?;
            drawn.extend(pictures(&images)?);
        }
        Ok(drawn)
    }

    /// Images `[b, 3, H, W]` in −1…1 from `noise` `[b, C, h, w]`.
    fn group(&mut self, shots: &[Shot], script: &Script, noise: &Tensor, step: &mut dyn FnMut()) -> Result<Tensor, ModelError> {
        let guided = self.settings.guidance != 1.0;
        let prompts = shots.iter().map(|shot| &script.prompts[shot.text]);
        let told: Vec<&Told> = shots.iter().filter(|_| guided).map(|_| &script.negative).chain(prompts).collect();
        let rows = Rows::of(&told, script.ragged)?;
        let mut latents = noise.f_mul_scalar(self.sampler.init_sigma())?;
        for (index, t) in self.sampler.timesteps().to_vec().into_iter().enumerate() {
            let input = self.sampler.scale_input(&latents, index)?;
            let input = if guided { Tensor::f_cat(&[&input, &input], 0)? } else { input }; // [b or 2b, C, h, w]
            let mut output = self.predict(&rows, &input, t)?;
            if guided {
                let halves = output.f_chunk(2, 0)?;
                output = halves[1].f_sub(&halves[0])?.f_mul_scalar(self.settings.guidance)?.f_add(&halves[0])?;
            }
            let mut fresh = || Ok(normal(shots, &format!("step {index}"), &latents.size()[1..])?.f_to_device(latents.device())?);
            latents = self.sampler.step(&output, index, &latents, &mut fresh)?;
            step();
        }
        Ok(self.vae.decode_each(&self.vae.unscale(&latents)?)?.f_clamp(-1.0, 1.0)?)
    }

    /// What the U-Net says of `input` `[B, C, h, w]` at timestep `t`, in float32.
    fn predict(&self, rows: &Rows, input: &Tensor, t: f32) -> Result<Tensor, ModelError> {
        let (b, _, h, w) = input.size4()?;
        let timesteps = Tensor::f_full([b], f64::from(t), (Kind::Float, self.device))?;
        let Conditions { states, pooled } = rows.at(&self.connector, &timesteps)?;
        let added = match pooled.filter(|_| self.unet.config().added.is_some()) {
            None => None,
            Some(text_embeds) => Some(Added { text_embeds, time_ids: self.time_ids(b, (h, w))? }),
        };
        Ok(self.unet.forward_added(input, &timesteps, &states, added.as_ref())?.f_to_kind(Kind::Float)?)
    }

    /// SDXL's micro-conditioning `[b, 6]` of pictures that were never resized nor cropped.
    fn time_ids(&self, b: i64, (h, w): (i64, i64)) -> Result<Tensor, ModelError> {
        let downscale = self.vae.config().downscale();
        let (height, width) = ((h * downscale) as f32, (w * downscale) as f32);
        let ids = Tensor::f_from_slice(&[height, width, 0.0, 0.0, height, width])?;
        Ok(ids.f_to_device(self.device)?.f_unsqueeze(0)?.f_expand([b, 6], false)?)
    }
}
