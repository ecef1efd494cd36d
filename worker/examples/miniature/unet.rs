//! The U-Net, with the frozen encoder of CLIP's kind and captions cut at its limit: it learns to draw what they name, and never sees the rest.

use anyhow::Result;
use ella_model::clip::{Clip, ClipConfig};
use ella_model::detector::{Detector, Found};
use ella_model::sampler::Method;
use ella_model::schedule::Schedule;
use ella_model::text::TextConfig;
use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_model::unet::{UNet, UNetConfig};
use ella_model::vae::Vae;
use serde_json::json;
use tch::{Device, Kind, Reduction, Tensor};

use crate::detector::{self, right};
use crate::learner::{Course, Learner, fresh};
use crate::scenes::{Cutter, HELD_OUT, LEARNT, pictures, scenes, truth};
use crate::{Place, save_network};

/// Scenes whose latents and tokens are kept; each is seen several times, with other noise.
const KEPT: u64 = 100_000;

/// Of 100 captions so many are short ones, and so many are left out.
const SHORT: f64 = 0.15;
const LEFT_OUT: f64 = 0.1;

/// How pictures are drawn to see what has been learnt.
const GUIDANCE: f64 = 3.0;
const STEPS: usize = 20;
const SHOWN: i64 = 256;

/// Updates between two looks.
const LOOK_EVERY: u64 = 500;

/// What text says to the U-Net.
pub(crate) struct Reader {
    clip: Clip,
    tokenizer: TextTokenizer,
    limit: usize,
    device: Device,
}

impl Reader {
    pub(crate) fn load(place: &Place) -> Result<Self> {
        let folder = place.out("base/text_encoder");
        let limit = ClipConfig::load(&folder)?.max_positions as usize;
        let tokenizer = TextTokenizer::load(&folder, &TextConfig::load(&folder)?)?;
        Ok(Self { clip: Clip::load(&folder, Kind::Float, place.device)?, tokenizer, limit, device: place.device })
    }

    /// `[B, limit]` i64.
    pub(crate) fn ids(&self, captions: &[String]) -> Result<Tensor> {
        Ok(self.tokenizer.encode(captions, self.limit, Padding::Fixed)?.tensors(self.device)?.0)
    }

    /// `[B, limit, E]`.
    pub(crate) fn states(&self, ids: &Tensor) -> Result<Tensor> {
        tch::no_grad(|| Ok(self.clip.forward(ids, &ids.f_ones_like()?)?.last_hidden_state))
    }
}

/// What the U-Net is trained on, kept in memory.
struct Kept {
    latents: Tensor,
    dense: Tensor,
    short: Tensor,
}

impl Kept {
    /// Reads it, or makes it.
    fn load(place: &Place, vae: &Vae, reader: &Reader) -> Result<Self> {
        let file = place.work("kept.safetensors");
        if !file.is_file() {
            let mut parts: [Vec<Tensor>; 3] = Default::default();
            for from in (0..KEPT).step_by(1000) {
                let scenes = scenes(LEARNT, from..from + 1000);
                let (mean, _) = tch::no_grad(|| vae.encode(&pictures(&scenes, place.device)?).map_err(anyhow::Error::from))?;
                let told =
                    |caption: fn(&ella_dataset::scenes::Scene) -> String| reader.ids(&scenes.iter().map(caption).collect::<Vec<_>>());
                let made = [vae.scale(&mean)?, told(|scene| scene.dense_caption())?, told(|scene| scene.short_caption())?];
                parts.iter_mut().zip(made).for_each(|(parts, part)| parts.push(part));
            }
            let [latents, dense, short] = parts.map(|parts| Tensor::f_cat(&parts, 0));
            let named = [("latents", latents?), ("dense", dense?), ("short", short?)].map(|(name, tensor)| (name.to_owned(), tensor));
            let unfinished = file.with_extension("unfinished");
            Tensor::write_safetensors(&named, &unfinished)?;
            std::fs::rename(unfinished, &file)?;
        }
        let read = Tensor::read_safetensors(&file)?;
        let find = |name: &str| {
            let found = read.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor.f_to_device(place.device));
            found.ok_or_else(|| anyhow::anyhow!("{}: no {name}; remove it", file.display()))
        };
        Ok(Self { latents: find("latents")??, dense: find("dense")??, short: find("short")?? })
    }
}

pub(crate) fn train(place: &Place, course: Course) -> Result<()> {
    let device = place.device;
    let config = UNetConfig::load(&place.shape("base/unet"))?;
    let first = fresh("unet", 8, device, |p| UNet::new(&config, p))?;
    let mut learner = Learner::open(&place.work("unet"), course, first, device)?;
    let (vae, reader) = (Vae::load(&place.out("base/vae"), Kind::Float, device)?, Reader::load(place)?);
    let schedule = Schedule::load(&place.shape("base/scheduler"), device)?;
    let kept = Kept::load(place, &vae, &reader)?;
    let nothing = reader.ids(&[String::new()])?;
    let unet = UNet::new(&config, &learner.params("unet"))?;
    let gallery = Gallery::new(place, &reader)?;
    while let Some(step) = learner.next() {
        let rows = Tensor::f_randint(KEPT as i64, [learner.batch()], (Kind::Int64, device))?;
        let (latents, ids) = (kept.latents.f_index_select(0, &rows)?, kept.dense.f_index_select(0, &rows)?);
        let chance = || Tensor::f_rand([learner.batch(), 1], (Kind::Float, device));
        let ids = kept.short.f_index_select(0, &rows)?.f_where_self(&chance()?.f_lt(SHORT)?, &ids)?;
        let ids = nothing.f_expand_as(&ids)?.f_where_self(&chance()?.f_lt(LEFT_OUT)?, &ids)?;
        let noise = latents.f_randn_like()?;
        let t = Tensor::f_randint(schedule.config().num_train_timesteps, [learner.batch()], (Kind::Int64, device))?;
        let predicted = unet.forward(&schedule.add_noise(&latents, &noise, &t)?, &t, &reader.states(&ids)?)?;
        let loss = predicted.f_mse_loss(&schedule.target(&latents, &noise, &t)?, Reduction::Mean)?;
        learner.learn(&loss)?;
        if (step + 1).is_multiple_of(LOOK_EVERY) {
            let average = UNet::new(&config, &learner.average("unet")?)?;
            let shares = gallery.look(&average, &vae, &schedule, &reader, &place.work(&format!("unet/step-{:06}.png", step + 1)))?;
            learner.tell(&json!({ "named_and_drawn": shares }))?;
        }
    }
    save_network(place, "base/unet", "diffusion_pytorch_model", &learner.averaged("unet")?, &[])
}

/// Captions that are drawn again and again, to see how many of the objects that they name are there.
struct Gallery {
    ids: Tensor,
    truth: crate::scenes::Truth,
    noise: Tensor,
    detector: Detector,
}

impl Gallery {
    fn new(place: &Place, reader: &Reader) -> Result<Self> {
        let scenes = scenes(HELD_OUT, 5000..5000 + SHOWN as u64);
        let captions: Vec<String> = scenes.iter().map(|scene| scene.dense_caption()).collect();
        let mut cutter = Cutter::new(&reader.tokenizer);
        let told = captions.iter().map(|caption| cutter.cut(caption, reader.limit)).collect::<Result<Vec<_>>>()?;
        let device = place.device;
        tch::manual_seed(99);
        let noise = Tensor::f_randn([SHOWN, 4, 8, 8], (Kind::Float, device))?;
        Ok(Self {
            ids: reader.ids(&captions)?,
            truth: truth(&scenes, Some(&told), device)?,
            noise,
            detector: detector::load(place, device)?,
        })
    }

    /// The shares of [`right`] in what the U-Net draws; the first 32 pictures go to `file`.
    fn look(&self, unet: &UNet, vae: &Vae, schedule: &Schedule, reader: &Reader, file: &std::path::Path) -> Result<Vec<f64>> {
        tch::no_grad(|| {
            let (states, nothing) = (reader.states(&self.ids)?, reader.states(&reader.ids(&[String::new()])?)?);
            let both = Tensor::f_cat(&[nothing.f_expand_as(&states)?, states], 0)?;
            let mut sampler = Method::Ddim.sampler(schedule, STEPS)?;
            let mut x = self.noise.f_mul_scalar(sampler.init_sigma())?;
            for (index, t) in sampler.timesteps().to_vec().into_iter().enumerate() {
                let input = sampler.scale_input(&x, index)?;
                let input = Tensor::f_cat(&[&input, &input], 0)?;
                let t = Tensor::f_full([input.size()[0]], f64::from(t), (Kind::Float, input.device()))?;
                let made = unet.forward(&input, &t, &both)?.f_chunk(2, 0)?;
                let guided = made[0].f_lerp(&made[1], GUIDANCE)?;
                x = sampler.step(&guided, index, &x, &mut || Ok(self.noise.f_randn_like()?))?;
            }
            let pictures = vae.decode(&vae.unscale(&x)?)?.f_clamp(-1.0, 1.0)?;
            crate::sheet(&pictures.f_narrow(0, 0, 32)?, file)?;
            let Found { cells, backdrop } = self.detector.forward(&pictures)?;
            // What is not named may be there or not: only named objects are asked for.
            let [shapes, b, c, d] = &self.truth.cells;
            let shapes = shapes.f_masked_fill(&shapes.f_eq(0)?, crate::scenes::UNASKED)?;
            let clone = Tensor::shallow_clone;
            let asked = crate::scenes::Truth { cells: [shapes, clone(b), clone(c), clone(d)], backdrop: clone(&self.truth.backdrop) };
            right(&Found { cells, backdrop }, &asked)
        })
    }
}
