//! Drawing: from noise to pictures by a sampler with classifier-free guidance, the connector asked anew at every timestep. `ella sample` draws
//! from files, and so does a job that draws sets of prompts ([`crate::grids`]); a run from the weights that it trains ([`crate::train`]).
//!
//! Nothing here takes a number from libtorch's own generators: a picture depends on the weights, its prompt and its seed.

mod clip;
mod fit;
mod made;
mod noise;
mod picture;
mod told;

pub use clip::BaseText;
use ella_model::ModelError;
use ella_model::connector::{Conditions, Connector};
use ella_model::sampler::{Method, Sampler};
use ella_model::schedule::Schedule;
use ella_model::unet::{Added, UNet};
use ella_model::vae::Vae;
pub use fit::{check_fit, method};
pub use made::{Made, Reader};
pub use noise::{Noise, NoiseError};
pub use picture::Picture;
use picture::pictures;
use tch::{Device, Kind, Tensor};
pub use told::{ClipTold, Reading, Rows, Script, Told};

/// A picture to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shot {
    /// The place of its prompt among a script's.
    pub text: usize,
    /// What its noise is drawn from.
    pub seed: u64,
}

/// How to draw.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The sampler.
    pub method: Method,
    /// Steps from noise to picture.
    pub steps: usize,
    /// 1: the negative prompt is not asked.
    pub guidance: f64,
}

/// The networks that draw; the connector and all between steps in float32.
#[derive(Clone, Copy, Debug)]
pub struct Networks<'a> {
    /// Texts to what the U-Net attends to; none where the base's own CLIP alone tells.
    pub connector: Option<&'a Connector>,
    /// The base's.
    pub unet: &'a UNet,
    /// The base's.
    pub vae: &'a Vae,
}

/// A sampler and its guidance.
#[derive(Debug)]
pub struct Drawer {
    sampler: Box<dyn Sampler>,
    guidance: f64,
    device: Device,
}

/// Pictures that are being drawn, some steps from noise.
#[derive(Debug)]
pub struct Drawing {
    shots: Vec<Shot>,
    rows: Rows,
    /// `[b, C, h, w]` float32.
    latents: Tensor,
    /// Steps done.
    index: usize,
}

impl Drawer {
    /// A drawer that computes on `device`.
    ///
    /// # Errors
    /// The schedule has not so many steps.
    pub fn new(settings: Settings, schedule: &Schedule, device: Device) -> Result<Self, ModelError> {
        let Settings { method, steps, guidance } = settings;
        Ok(Self { sampler: method.sampler(schedule, steps)?, guidance, device })
    }

    /// Steps from noise to picture.
    pub fn steps(&self) -> usize {
        self.sampler.timesteps().len()
    }

    /// Pictures from `noise` `[b, C, h, w]`, as the script tells them.
    ///
    /// # Errors
    /// libtorch's.
    pub fn begin(&self, shots: &[Shot], script: &Script, noise: &Tensor) -> Result<Drawing, ModelError> {
        let guided = self.guidance != 1.0;
        let prompts = shots.iter().map(|shot| &script.prompts[shot.text]);
        let told: Vec<&Told> = shots.iter().filter(|_| guided).map(|_| &script.negative).chain(prompts).collect();
        let rows = Rows::of(&told, script.ragged)?;
        let latents = noise.f_to_device(self.device)?.f_mul_scalar(self.sampler.init_sigma())?;
        Ok(Drawing { shots: shots.to_vec(), rows, latents, index: 0 })
    }

    /// Whether all steps are done.
    pub fn is_done(&self, drawing: &Drawing) -> bool {
        drawing.index >= self.steps()
    }

    /// One step. A sampler may remember the last ones: one drawing is finished before the next is begun.
    ///
    /// # Errors
    /// libtorch's, or all steps are done.
    pub fn step(&mut self, through: Networks<'_>, drawing: &mut Drawing) -> Result<(), ModelError> {
        let Drawing { shots, rows, latents, index } = drawing;
        let (guided, t) = (self.guidance != 1.0, self.sampler.timesteps().get(*index).copied().unwrap_or_default());
        let input = self.sampler.scale_input(latents, *index)?;
        let input = if guided { Tensor::f_cat(&[&input, &input], 0)? } else { input }; // [b or 2b, C, h, w]
        let mut output = tch::no_grad(|| self.predict(through, rows, &input, t))?;
        if guided {
            let halves = output.f_chunk(2, 0)?;
            output = halves[1].f_sub(&halves[0])?.f_mul_scalar(self.guidance)?.f_add(&halves[0])?;
        }
        let shape = latents.size()[1..].to_vec();
        let mut fresh = || Ok(noise::normal(shots, &format!("step {index}"), &shape)?.f_to_device(self.device)?);
        *latents = self.sampler.step(&output, *index, latents, &mut fresh)?;
        *index += 1;
        Ok(())
    }

    /// The pictures, once all steps are done.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`], or libtorch's.
    pub fn finish(&self, vae: &Vae, drawing: &Drawing) -> Result<Vec<Picture>, ModelError> {
        let latents = vae.unscale(&drawing.latents)?;
        // `[b, 3, H, W]`, in −1…1 but for what the VAE makes beyond.
        let images = tch::no_grad(|| vae.decode_each(&latents))?;
        if images.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(ModelError::NotFinite);
        }
        pictures(&images.f_clamp(-1.0, 1.0)?)
    }

    /// [`Drawer::begin`] to [`Drawer::finish`]. `step` hears of each step done.
    ///
    /// # Errors
    /// As there.
    pub fn draw(
        &mut self,
        through: Networks<'_>,
        (shots, script, noise): (&[Shot], &Script, &Tensor),
        step: &mut dyn FnMut(),
    ) -> Result<Vec<Picture>, ModelError> {
        let mut drawing = self.begin(shots, script, noise)?;
        while !self.is_done(&drawing) {
            self.step(through, &mut drawing)?;
            step();
        }
        self.finish(through.vae, &drawing)
    }

    /// What the U-Net says of `input` `[B, C, h, w]` at timestep `t`, in float32.
    fn predict(&self, through: Networks<'_>, rows: &Rows, input: &Tensor, t: f32) -> Result<Tensor, ModelError> {
        let Networks { connector, unet, vae } = through;
        let (b, _, h, w) = input.size4()?;
        let timesteps = Tensor::f_full([b], f64::from(t), (Kind::Float, self.device))?;
        let Conditions { states, pooled } = rows.at(connector, &timesteps)?;
        let added = match pooled.filter(|_| unet.config().added.is_some()) {
            None => None,
            Some(text_embeds) => {
                let downscale = vae.config().downscale();
                Some(Added { text_embeds, time_ids: self.time_ids(b, (h * downscale, w * downscale))? })
            }
        };
        Ok(unet.forward_added(input, &timesteps, &states, added.as_ref())?.f_to_kind(Kind::Float)?)
    }

    /// SDXL's micro-conditioning `[b, 6]` of pictures that were never resized nor cropped.
    fn time_ids(&self, b: i64, (height, width): (i64, i64)) -> Result<Tensor, ModelError> {
        let (height, width) = (height as f32, width as f32);
        let ids = Tensor::f_from_slice(&[height, width, 0.0, 0.0, height, width])?;
        Ok(ids.f_to_device(self.device)?.f_unsqueeze(0)?.f_expand([b, 6], false)?)
    }
}
