//! Samples while it trains (`[sample]`): after a step that is due, ranks draw its pictures from the weights that all of them then have, picture *i* by
//! rank *i* mod world, each by itself. So a picture depends on the weights, its prompt and its seed (SAME), and nothing that training reads is changed.
//!
//! All are drawn before the next step. That holds training up, but keeps no weights of earlier steps, and no picture is of a step that a kill could
//! leave behind: who goes on from that step finds it without its pictures, and draws them. Meanwhile ranks ask each other, a little at a time,
//! as they do when they wait for captions (`super::supply`): so nobody waits for long in one sum, and who is asked to leave does not draw on.

use super::stats::authority;
use super::{Halt, Mark, TrainError, Trainer};
use crate::album::Page;
use crate::draw::{Drawer, Drawing, Made, Networks, Noise, NoiseError, Reader, Reading, Script, Settings, Shot, method};
use crate::models;
use crate::text::{TextEncoder, TextOptions};
use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::connector::Connector;
use ella_model::params::Compute;
use ella_model::unet::UNet;
use ella_model::vae::Vae;
use ella_proto::config::{LONGEST_SIDE, RunConfig};
use ella_proto::samples::{self, Image, Index};
use ella_proto::v1::Activity;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// How long a rank draws until it asks, and answers, the others again.
const ASK: Duration = Duration::from_secs(1);

/// What draws a run's samples.
#[derive(Debug)]
pub struct Studio {
    config: Arc<RunConfig>,
    shots: Vec<Shot>,
    /// On the processor: it may be of many prompts.
    script: Script,
    noise: Noise,
    drawer: Drawer,
    /// The feed has its own, on a stream of its own.
    vae: Vae,
    /// `WIDTHxHEIGHT` in pixels.
    size: String,
    device: Device,
    sheets: u64,
    sheet: Option<Sheet>,
}

/// This rank's pictures of a step.
#[derive(Debug)]
struct Sheet {
    step: u64,
    connector: Connector,
    left: VecDeque<usize>,
    drawing: Option<(usize, Drawing)>,
}

/// What ranks found out together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drawn {
    /// All have drawn.
    All,
    /// The run leaves; all ranks have one coordinator, which can record a commit.
    Leave,
    /// The generation ends with this step.
    Boundary,
}

impl Studio {
    /// Loads what drawing needs beside what trains, and reads the prompts; the text encoder is gone when it returns. None if nothing is to be drawn.
    ///
    /// # Errors
    /// A model's, or a setting that does not suit the base.
    pub fn load(config: &Arc<RunConfig>, device: Device) -> Result<Option<Self>, ModelError> {
        let sample = &config.sample;
        if sample.every == 0 {
            return Ok(None);
        }
        let base = Base::open(&models::locate("base.model", &config.base.model)?)?.predicting(models::predicts(config));
        let noise = Noise::seeded(&base, sample.size).map_err(|error| match error {
            NoiseError::Size { downscale, found } => {
                let expected = format!("multiples of the VAE's {downscale}, up to {LONGEST_SIDE}");
                ModelError::argument("sample.size: width and height", expected, found)
            }
            NoiseError::Model(error) => error,
            error => ModelError::argument("sample.size", "one of the base's", error),
        })?;
        let settings = Settings { method: method(sample.sampler), steps: sample.steps as usize, guidance: sample.guidance };
        let drawer = Drawer::new(settings, &base.schedule(device)?, device)?;
        let vae = base.vae(crate::device::kind(config.base.dtype), device)?;
        let (downscale, (height, width)) = (vae.config().downscale(), noise.size());
        let size = format!("{}x{}", width * downscale, height * downscale);
        let images = 0..u64::from(sample.images);
        let shots =
            (0..sample.prompts.len()).flat_map(|text| images.clone().map(move |n| Shot { text, seed: sample.seed.wrapping_add(n) }));
        let (shots, script) = (shots.collect(), script(config, device)?);
        Ok(Some(Self { config: config.clone(), shots, script, noise, drawer, vae, size, device, sheets: 0, sheet: None }))
    }

    /// What is written of a step's pictures.
    fn index(&self, step: u64) -> Index {
        let sample = &self.config.sample;
        let image = |(number, shot): (usize, &Shot)| Image {
            file: samples::file(number),
            prompt: sample.prompts[shot.text].clone(),
            seed: shot.seed,
        };
        Index {
            step,
            images: self.shots.iter().enumerate().map(image).collect(),
            sampler: method(sample.sampler).to_string(),
            steps: sample.steps,
            guidance: sample.guidance,
            size: self.size.clone(),
            negative: sample.negative.clone(),
            average: sample.average,
        }
    }

    /// A number for the settings, such that sums of several tell whether they are all the same.
    fn table(&self) -> i64 {
        let json = serde_json::to_vec(&self.config.sample).unwrap_or_default();
        i64::from_le_bytes(*blake3::hash(&json).as_bytes().first_chunk().unwrap_or(&[1; 8]))
    }

    /// The pictures of a step that are this rank's, with the connector that draws them.
    fn begin(&mut self, step: u64, connector: Connector, (rank, world): (u32, u32)) {
        self.sheets += 1;
        let left = (rank as usize..self.shots.len()).step_by(world.max(1) as usize).collect();
        self.sheet = Some(Sheet { step, connector, left, drawing: None });
    }

    fn is_idle(&self) -> bool {
        self.sheet.as_ref().is_none_or(|sheet| sheet.left.is_empty())
    }

    /// What is left of the step's pictures is not drawn. How many they are.
    fn put_away(&mut self) -> usize {
        self.sheet.take().map_or(0, |sheet| sheet.left.len())
    }

    /// One sampler's step, of a picture that is begun if none is; or, after its last one, the picture.
    fn advance(&mut self, unet: &UNet) -> Result<Option<Page>, TrainError> {
        let Some(sheet) = &mut self.sheet else { return Ok(None) };
        let Some(number) = sheet.left.front().copied() else { return Ok(None) };
        let (number, mut drawing) = match sheet.drawing.take() {
            Some(begun) => begun,
            None => {
                let Shot { text, seed } = self.shots[number];
                let (shot, script) = ([Shot { text: 0, seed }], self.script.of(text..text + 1, self.device)?);
                (number, self.drawer.begin(&shot, &script, &self.noise.rows(number, &shot)?)?)
            }
        };
        if !self.drawer.is_done(&drawing) {
            self.drawer.step(Networks { connector: Some(&sheet.connector), unet, vae: &self.vae }, &mut drawing)?;
            // A GPU is waited for: what it was given would else be done long after this rank has said how far it is.
            Mark::now(self.device)?.wait()?;
            sheet.drawing = Some((number, drawing));
            return Ok(None);
        }
        let picture = self.drawer.finish(&self.vae, &drawing)?.pop();
        sheet.left.pop_front();
        let (step, last) = (sheet.step, sheet.left.is_empty());
        let png = picture.map(|picture| picture.png(&self.parameters(step, number))).transpose();
        let png = png.map_err(|error| ModelError::argument("a picture", "one that a PNG can hold", error))?.unwrap_or_default();
        Ok(Some(Page { sheet: self.sheets, step, number, png, index: last.then(|| self.index(step)) }))
    }

    /// How a picture was made.
    fn parameters(&self, step: u64, number: usize) -> String {
        let RunConfig { base, text, sample, .. } = &*self.config;
        let (shot, weights) = (self.shots[number], if sample.average { "average of the weights" } else { "weights" });
        let made = Made {
            prompt: &sample.prompts[shot.text],
            negative: sample.negative.as_deref(),
            steps: sample.steps,
            sampler: method(sample.sampler),
            guidance: sample.guidance,
            seed: shot.seed,
            noise: None,
            base: &base.model,
            loras: base.loras.iter().map(|lora| format!("{}:{}", lora.file, lora.weight)).collect(),
            by: Some(Reader {
                text: &text.model,
                layers: text.layers,
                padding: text.padding,
                connector: format!("step {step}, {weights}"),
            }),
        };
        made.to_string()
    }
}

/// The prompts, read as captions are in training.
fn script(config: &RunConfig, device: Device) -> Result<Script, ModelError> {
    let (text, sample) = (&config.text, &config.sample);
    let model = models::locate("text.model", &text.model)?;
    let options = TextOptions { model, max_tokens: text.max_tokens, padding: text.padding, layers: text.layers, dtype: text.dtype };
    let reading = Reading { padding: text.padding, most: text.max_tokens };
    let encoder = TextEncoder::load(&options, device)?;
    let negative = sample.negative.as_deref().unwrap_or_default();
    let script = Script::features(&encoder, (&sample.prompts, reading), (negative, reading))?;
    if script.cut > 0 {
        tracing::warn!(prompts = script.cut, "prompts of sample.prompts are longer than text.max_tokens, and cut there");
    }
    script.of(0..sample.prompts.len(), Device::Cpu)
}

impl Trainer {
    /// Tells what became of the last pictures: no step comes that would.
    pub(crate) fn tell_pictures(&self) {
        self.committer.tell_pictures(&self.outbox, self.seat.era, self.state.step);
    }

    /// Whether this rank is to draw after a step.
    pub(super) fn draws_after(&self, step: u64) -> bool {
        self.studio.is_some() && self.config.sample.is_due(step)
    }

    /// Draws the present step's samples with the other ranks, all of which call it after the same step. How the generation ends, if that is now.
    pub(super) fn draw(&mut self) -> Result<Option<Halt>, TrainError> {
        let begin = Instant::now();
        self.flags.at(Activity::Draw);
        self.begin_sheet()?;
        let drew = self.studio.as_ref().is_some_and(|studio| !studio.is_idle());
        let drawn = self.draw_together();
        let left = self.studio.as_mut().map_or(0, Studio::put_away);
        if drew && self.state.buffers.params.device().is_cuda() {
            // Recordings and larger lanes have no use for what drawing leaves with the allocator.
            let _ = ella_cuda::memory::empty_cache();
        }
        self.flags.at(Activity::Compute);
        self.drawing += begin.elapsed();
        let is_last = self.state.step >= self.config.train.steps;
        match drawn? {
            Drawn::All => {}
            // Whoever goes on from this step draws what is left of its pictures.
            Drawn::Boundary => return Ok(Some(Halt::Boundary)),
            Drawn::Leave if !is_last => {
                if self.state.step > self.saved {
                    self.seat.era = self.flags.era();
                    self.commit()?;
                }
                return Ok(Some(Halt::Drained));
            }
            Drawn::Leave if left > 0 => {
                tracing::warn!(step = self.state.step, left, "samples of the last step are not drawn: the run leaves");
                self.committer.give_up(left);
            }
            Drawn::Leave => {}
        }
        Ok(None)
    }

    /// Lays this rank's pictures of the present step out, if they are to be drawn and not all there from an earlier try.
    fn begin_sheet(&mut self) -> Result<(), TrainError> {
        let step = self.state.step;
        let place = (self.collective.rank(), self.collective.world());
        let due = self.draws_after(step);
        let Some(studio) = self.studio.as_mut().filter(|_| due) else { return Ok(()) };
        if step == self.began && self.committer.has_samples(&studio.index(step)) {
            return Ok(());
        }
        if place.0 == 0 {
            // The others wait: nobody draws before all have come to the first exchange.
            self.committer.clear_samples(&studio.index(step));
        }
        let buffers = &self.state.buffers;
        let weights = if self.config.sample.average { &buffers.ema } else { &buffers.params };
        // In memory of their own: a processor's products may round otherwise where a tensor does not begin where its vectors do, as in the flat buffer, and
        // what is drawn from the commit's file would differ in a bit. And by the operators that it would be drawn by.
        let own = |(name, view): (String, Tensor)| Ok((name, tch::no_grad(|| view.f_mul_scalar(1.0))?));
        let tensors = self.state.layout.views(weights)?.into_iter().map(own).collect::<Result<Vec<_>, TrainError>>()?;
        let compute = Compute::fastest(Kind::Float, buffers.params.device())?;
        studio.begin(step, Connector::from_tensors(self.networks.connector.config(), tensors, compute)?, place);
        Ok(())
    }

    /// Returns once all ranks have drawn, or none is to draw on. In an exchange ranks wait for each other no longer than a slice of drawing takes.
    fn draw_together(&mut self) -> Result<Drawn, TrainError> {
        let world = i64::from(self.collective.world());
        let (mine, table) = (authority(self.flags.attended()), self.studio.as_ref().map_or(0, Studio::table));
        loop {
            self.committer.check()?;
            let idle = self.studio.as_ref().is_none_or(Studio::is_idle);
            let (leaving, boundary) = (self.flags.drain.is_cancelled(), self.may_end());
            let mut all = [i64::from(idle), i64::from(leaving), i64::from(boundary), mine, table];
            self.flags.at(Activity::Reduce);
            self.collective.sum_i64(&mut all)?;
            self.flags.at(Activity::Draw);
            let [idle, leaving, boundary, authority, tables] = all;
            match () {
                () if idle == world => return Ok(Drawn::All),
                () if tables != table.wrapping_mul(world) => {
                    let why = "the workers have not all the same [sample] settings: a coordinator was started again with other ones";
                    self.give_up_sheet(why);
                }
                () if leaving > 0 && mine != 0 && authority == mine.wrapping_mul(world) => return Ok(Drawn::Leave),
                () if boundary > 0 => return Ok(Drawn::Boundary),
                () => self.draw_a_while()?,
            }
        }
    }

    /// Whether the generation is to end, and may: one without a step would count as one that came to nothing.
    fn may_end(&self) -> bool {
        self.flags.at_boundary() && self.state.step > self.began
    }

    /// Draws for a second, or until there is reason to ask the others; one sampler's step in any case.
    fn draw_a_while(&mut self) -> Result<(), TrainError> {
        let begin = Instant::now();
        let slice = ASK.min(self.config.workers.step_timeout.duration() / 4);
        while let Some(studio) = self.studio.as_mut().filter(|studio| !studio.is_idle()) {
            if self.flags.interrupted() {
                return Err(TrainError::Interrupted);
            }
            // Each anew, so that one that never ends is seen to hang.
            self.flags.at(Activity::Draw);
            match studio.advance(&self.networks.unet) {
                Ok(page) => page.into_iter().for_each(|page| self.committer.keep(page)),
                Err(error) => self.give_up_sheet(&error.to_string()),
            }
            if begin.elapsed() > slice || self.flags.drain.is_cancelled() || self.may_end() {
                break;
            }
        }
        Ok(())
    }

    /// What this rank has still to draw of the step is given up, counted and told (KNOWN): samples never end training.
    fn give_up_sheet(&mut self, why: &str) {
        let step = self.state.step;
        let left = self.studio.as_mut().map_or(0, Studio::put_away);
        if left > 0 {
            tracing::warn!(step, left, "samples cannot be drawn, and are given up: {why}");
            self.committer.give_up(left);
        }
    }
}
