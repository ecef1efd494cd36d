//! From noise to pictures: a sampler with classifier-free guidance, the connector asked anew at every timestep.

use std::path::Path;

use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::connector::{Conditions, Connector};
use ella_model::lora::Lora;
use ella_model::rng::CounterRng;
use ella_model::sampler::{Method, Sampler};
use ella_model::unet::{Added, UNet};
use ella_model::vae::Vae;
use ella_proto::config::Padding;
use ella_worker::text::{TextEncoder, TextOptions};
use tch::{Device, Kind, Tensor};

use super::grid::Picture;
use crate::ui::Fail;

/// Pictures drawn at once; each goes through the U-Net twice.
const BATCH: usize = 4;

/// Where the networks are.
pub(super) struct Models<'a> {
    pub(super) connector: &'a Path,
    pub(super) heads: i64,
    pub(super) base: &'a Path,
    pub(super) text: TextOptions,
}

/// How to draw.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) method: Method,
    pub(super) steps: usize,
    pub(super) guidance: f64,
    /// What all noise is drawn from.
    pub(super) seed: u64,
}

/// All networks of a base, its connector and text encoder, in float32.
#[derive(Debug)]
pub(super) struct Drawer {
    connector: Connector,
    unet: UNet,
    vae: Vae,
    text: TextEncoder,
    padding: Padding,
    sampler: Box<dyn Sampler>,
    guidance: f64,
    seed: u64,
    /// Side of the pictures that the base was made for, in pixels.
    own_size: i64,
    device: Device,
}

/// What came of some prompts.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) pictures: Vec<Picture>,
    /// Prompts cut at the token limit.
    pub(super) truncated: usize,
}

impl Drawer {
    pub(super) fn load(models: &Models<'_>, loras: &[Lora], settings: &Settings, device: Device) -> Result<Self, Fail> {
        let connector = Connector::load(models.connector, models.heads, Kind::Float, device)?;
        let base = Base::open(models.base)?;
        let (unet, vae) = (base.unet_with(loras, Kind::Float, device)?, base.vae(Kind::Float, device)?);
        let text = TextEncoder::load(&models.text, device)?;
        let fits = |what: &str, file: &Path, expected: i64, found: i64| match expected == found {
            true => Ok(()),
            false => {
                let hint = "the models do not belong together";
                Err(Fail::failed(format_args!(
                    "{}: {what} is {found}, but {} has {expected}; {hint}",
                    models.connector.display(),
                    file.display()
                )))
            }
        };
        fits("the connector's width", base.path(), unet.config().cross_attention_dim, connector.config().width)?;
        let pooled = (unet.config().pooled_width()?.unwrap_or(0), connector.config().pooled.unwrap_or(0));
        fits("the width of the connector's pooled text (0: none)", base.path(), pooled.0, pooled.1)?;
        fits("the connector's text width", &models.text.model, text.width(), connector.config().text_width)?;
        let sampler = settings.method.sampler(&base.schedule(device)?, settings.steps)?;
        let own_size = unet.config().sample_size * vae.config().downscale();
        let (padding, guidance, seed) = (models.text.padding, settings.guidance, settings.seed);
        Ok(Self { connector, unet, vae, text, padding, sampler, guidance, seed, own_size, device })
    }

    /// Channels of a latent.
    pub(super) fn channels(&self) -> i64 {
        self.unet.config().in_channels
    }

    /// How often the progress of so many prompts will count.
    pub(super) fn total_steps(&self, prompts: usize) -> u64 {
        (prompts.div_ceil(BATCH) * self.sampler.timesteps().len()) as u64
    }

    /// Seeded noise `[count, C, h, w]` for square pictures. Each picture's depends on the seed and its own number only.
    pub(super) fn noise(&self, count: usize, size: Option<i64>) -> Result<Tensor, Fail> {
        let (size, downscale) = (size.unwrap_or(self.own_size), self.vae.config().downscale());
        if size < downscale || size % downscale != 0 || size > 1 << 14 {
            return Err(Fail::usage(format_args!("--size must be a multiple of the VAE's {downscale} up to 16384 (found {size})")));
        }
        let side = size / downscale;
        let names = (0..count).map(|picture| format!("picture {picture}"));
        Ok(normal(self.seed, names, &[count as i64, self.channels(), side, side])?)
    }

    /// One picture for each prompt, from `noise` `[prompts, C, h, w]`. `progress` hears of steps done.
    pub(super) fn draw(
        &mut self,
        prompts: &[String],
        negative: &str,
        noise: &Tensor,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Drawn, Fail> {
        let mut drawn = Drawn { pictures: Vec::with_capacity(prompts.len()), truncated: 0 };
        let mut done = 0;
        for (group, prompts) in prompts.chunks(BATCH).enumerate() {
            let first = group * BATCH;
            let noise = noise.f_narrow(0, first as i64, prompts.len() as i64)?.f_to_device(self.device)?;
            let mut step = || {
                done += 1;
                progress(done);
            };
            let images = tch::no_grad(|| self.group(prompts, negative, (first, noise), (&mut drawn.truncated, &mut step)))?;
            drawn.pictures.extend(pictures(&images)?);
        }
        Ok(drawn)
    }

    /// Images `[b, 3, H, W]` in −1…1, from the number of the first and the noise of all.
    fn group(
        &mut self,
        prompts: &[String],
        negative: &str,
        (first, noise): (usize, Tensor),
        (truncated, step): (&mut usize, &mut dyn FnMut()),
    ) -> Result<Tensor, ModelError> {
        let b = prompts.len();
        let texts: Vec<&str> = std::iter::repeat_n(negative, b).chain(prompts.iter().map(String::as_str)).collect();
        let rows = self.text.encode(&texts)?; // [2b, S, E]: negative, then positive
        *truncated += rows.truncated.saturating_sub(if self.cut(negative)? { b } else { 0 });
        let mask = if self.padding == Padding::None { Some(rows.mask()?) } else { None };
        let (seed, device) = (self.seed, self.device);
        let mut latents = noise.f_mul_scalar(self.sampler.init_sigma())?;
        for (index, t) in self.sampler.timesteps().to_vec().into_iter().enumerate() {
            let timesteps = Tensor::f_full([2 * b as i64], f64::from(t), (Kind::Float, device))?;
            let Conditions { states, pooled } = self.connector.forward(&rows.features, &timesteps, mask.as_ref())?; // [2b, L or S, D]
            let added = self.added(pooled, &latents)?;
            let input = self.sampler.scale_input(&latents, index)?;
            let both = self.unet.forward_added(&Tensor::f_cat(&[&input, &input], 0)?, &timesteps, &states, added.as_ref())?;
            let halves = both.f_chunk(2, 0)?;
            let output = halves[1].f_sub(&halves[0])?.f_mul_scalar(self.guidance)?.f_add(&halves[0])?;
            let mut fresh = || {
                let names = (first..first + b).map(|picture| format!("picture {picture} step {index}"));
                Ok(normal(seed, names, &latents.size())?.f_to_device(device)?)
            };
            latents = self.sampler.step(&output, index, &latents, &mut fresh)?;
            step();
        }
        Ok(self.vae.decode_each(&self.vae.unscale(&latents)?)?.f_clamp(-1.0, 1.0)?)
    }

    /// What SDXL is told beside the states `[2b, L, D]`: the pooled text, and the sizes of pictures that were never resized nor cropped.
    fn added(&self, pooled: Option<Tensor>, latents: &Tensor) -> Result<Option<Added>, ModelError> {
        let Some(text_embeds) = pooled else { return Ok(None) };
        let (b, _, h, w) = latents.size4()?;
        let downscale = self.vae.config().downscale();
        let (height, width) = (h * downscale, w * downscale);
        let time_ids = Tensor::f_from_slice(&[height, width, 0, 0, height, width])?.f_to_kind(Kind::Float)?.f_to_device(self.device)?;
        Ok(Some(Added { text_embeds, time_ids: time_ids.f_expand([2 * b, 6], false)? }))
    }

    /// Whether a text is longer than the token limit: counted once, not for each picture.
    fn cut(&self, text: &str) -> Result<bool, ModelError> {
        Ok(self.text.encode(&[text])?.truncated > 0)
    }
}

/// Normal noise of a shape whose first dimension counts the `names`: each row depends on the seed and its name only.
fn normal(seed: u64, names: impl Iterator<Item = String>, shape: &[i64]) -> Result<Tensor, ModelError> {
    let len = shape[1..].iter().product::<i64>() as usize;
    let numbers: Vec<f32> = names.flat_map(|name| CounterRng::new(seed, &name).normal(len, 1.0)).collect();
    Ok(Tensor::f_from_slice(&numbers)?.f_reshape(shape)?)
}

/// `[b, 3, H, W]` in −1…1 to 8-bit pictures.
fn pictures(images: &Tensor) -> Result<Vec<Picture>, Fail> {
    let (b, _, h, w) = images.size4()?;
    let bytes = images.f_to_kind(Kind::Float)?.f_add_scalar(1.0)?.f_mul_scalar(127.5)?.f_round()?.f_to_kind(Kind::Uint8)?;
    let bytes = bytes.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_to_device(Device::Cpu)?; // [b, H, W, 3]
    let one = |index: i64| -> Result<Picture, Fail> {
        let row = bytes.f_get(index)?;
        let mut rgb = vec![0u8; row.numel()];
        let len = rgb.len();
        row.f_copy_data(&mut rgb, len)?;
        Ok(Picture { width: w as u32, height: h as u32, rgb })
    };
    (0..b).map(one).collect()
}
