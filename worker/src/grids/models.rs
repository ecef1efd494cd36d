//! A draw job's models: found, read as far as tells whether they fit each other, and loaded.

use std::path::PathBuf;

use ella_dataset::Prompt;
use ella_model::ModelError;
use ella_model::base::Base;
use ella_model::connector::{Connector, ConnectorConfig};
use ella_model::lora::Lora;
use ella_model::text::TextConfig;
use ella_model::unet::{UNet, UNetConfig};
use ella_model::vae::{Vae, VaeConfig};
use ella_model::weights::Weights;
use ella_proto::config::{ConfigError, Padding};
use tch::{Device, Kind};

use super::DrawError;
use super::grid::{TILES, seeds};
use super::settings::DrawSettings;
use crate::device;
use crate::draw::{self, BaseText, Drawer, Networks, Noise, NoiseError, Picture, Reading, Script, Shot, Told, check_fit, method};
use crate::job::Tell;
use crate::models;
use crate::text::{self, TextEncoder, TextIdentity, TextOptions};
use crate::trained::{Reads, Trained};

/// The models that settings name: they are there and fit each other, and no weights are read yet.
#[derive(Debug)]
pub struct Found {
    pub(super) base: Base,
    pub(super) loras: Vec<Lora>,
    pub(super) reader: Option<Reader>,
    unet: UNetConfig,
    noise: Noise,
    /// Of a tile, in pixels.
    side: u32,
}

/// A connector and the text encoder before it.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) weights: Weights,
    pub(super) heads: u32,
    model: PathBuf,
    pub(super) text: TextIdentity,
    pub(super) reads: Reads,
    /// What is asked for otherwise than the connector was trained.
    otherwise: Vec<String>,
}

impl Found {
    /// Finds them, downloaded if need be. Blocks; not to be called in an async task.
    ///
    /// # Errors
    /// One is not there or not sound, they do not fit each other, or the settings do not suit them.
    pub fn find(settings: &DrawSettings) -> Result<Self, DrawError> {
        let base = Base::open(&models::locate("--base", &settings.base)?)?.predicting(settings.prediction.map(models::prediction));
        let (unet, vae) = (UNetConfig::read(base.unet_part()?.config)?, VaeConfig::read(base.vae_part()?.config)?);
        let noise = noise(&base, settings)?;
        let (height, width) = noise.size();
        if height != width {
            let (what, rule) = (format!("{}: the base's own size", base.path().display()), "square; say another with --size");
            return Err(ModelError::argument(what, rule, format_args!("latents of {width}x{height}")).into());
        }
        let side = u32::try_from(width * vae.downscale()).unwrap_or(u32::MAX);
        let loras = settings.loras.iter().map(|named| models::lora("--lora", named)).collect::<Result<_, _>>()?;
        let names = settings.connector.as_ref().zip(settings.text.as_ref());
        let reader = names.map(|(connector, text)| Reader::find(settings, (connector, text), (&base, &unet))).transpose()?;
        Ok(Self { base, loras, reader, unet, noise, side })
    }

    /// The side of a tile in pixels.
    pub fn side(&self) -> u32 {
        self.side
    }

    /// What is asked for otherwise than the connector was trained, a line each: pictures may be the worse for it.
    pub fn otherwise(&self) -> impl Iterator<Item = String> {
        self.reader.iter().flat_map(|reader| reader.otherwise.iter().map(|line| format!("{} {line}", reader.weights.path().display())))
    }
}

/// What pictures start from.
fn noise(base: &Base, settings: &DrawSettings) -> Result<Noise, DrawError> {
    Noise::seeded(base, settings.size).map_err(|error| match error {
        NoiseError::Model(error) => error.into(),
        error => {
            let found = settings.size.map_or_else(String::new, |size| size.to_string());
            ConfigError::Value { origin: base.path().display().to_string(), key: "size", found, rule: error.to_string() }.into()
        }
    })
}

impl Reader {
    fn find(settings: &DrawSettings, (connector, text): (&str, &str), base: (&Base, &UNetConfig)) -> Result<Self, DrawError> {
        let weights = Connector::open(&models::locate("--connector", connector)?)?;
        let heads = settings.heads.map(i64::from);
        let (config, model) = (ConnectorConfig::of_file(&weights, heads)?, models::locate("--text", text)?);
        let takes = TextConfig::load(&model)?;
        check_fit((weights.path(), &config), base, (&model, &takes))?;
        let DrawSettings { padding, max_tokens, layers, text_dtype, dtype, .. } = *settings;
        let (trained, asked) = (Trained::told(&weights)?, Trained { heads, padding, max_tokens, layers, text: None, text_dtype });
        let reads = trained.reads(&asked, settings.negative_padding, takes.max_positions(), dtype);
        let identity = text::identity(&model, reads.prompt.most)?;
        let otherwise = trained.differences(&Trained { text: Some(identity.weights_digest.clone()), ..asked }, text);
        Ok(Self { weights, heads: u32::try_from(config.heads).unwrap_or(u32::MAX), model, text: identity, reads, otherwise })
    }
}

/// What tells prompts: the text encoder of a connector, the base's own CLIP, or both.
#[derive(Debug)]
struct Texts {
    encoder: Option<(TextEncoder, Reads)>,
    clip: Option<BaseText>,
}

impl Texts {
    fn load(found: &Found, settings: &DrawSettings, (kind, device): (Kind, Device)) -> Result<Self, ModelError> {
        let encoder = found.reader.as_ref().map(|Reader { model, reads, .. }| {
            let Reads { prompt: Reading { padding, most }, layers, dtype, .. } = *reads;
            let options = TextOptions { model: model.clone(), max_tokens: most, padding, layers, dtype };
            Ok::<_, ModelError>((TextEncoder::load(&options, device)?, *reads))
        });
        let asks = settings.with_clip || found.reader.is_none();
        let clip = asks.then(|| BaseText::load(&found.base, &found.unet, (kind, device)));
        Ok(Self { encoder: encoder.transpose()?, clip: clip.transpose()? })
    }

    /// What a prompt tells, and whether it lost its end anywhere.
    fn prompt(&self, text: &str) -> Result<(Told, bool), ModelError> {
        let features = self.encoder.as_ref().map(|(encoder, reads)| Told::features(encoder, text, reads.prompt)).transpose()?;
        Ok(both(features, self.clip.as_ref().map(|clip| Told::clip(clip, text)).transpose()?))
    }

    fn negative(&self, text: Option<&str>) -> Result<(Told, bool), ModelError> {
        let nothing = text.unwrap_or_default();
        let features = self.encoder.as_ref().map(|(encoder, reads)| Told::features(encoder, nothing, reads.negative)).transpose()?;
        Ok(both(features, self.clip.as_ref().map(|clip| Told::clip_negative(clip, text)).transpose()?))
    }

    /// How many prompts lose their end at the text encoder, and how many at CLIP.
    fn cuts(&self, prompts: &[Prompt]) -> Result<[Option<usize>; 2], ModelError> {
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
        let by_encoder = self.encoder.as_ref().map(|(encoder, reads)| encoder.cuts(&texts, reads.prompt.most)).transpose()?;
        let cut = |clip: &BaseText| texts.iter().try_fold(0, |cut, text| Ok::<_, ModelError>(cut + usize::from(clip.cuts(text)?)));
        Ok([by_encoder, self.clip.as_ref().map(cut).transpose()?])
    }

    /// The longest prompt in tokens, by whoever reads most of it.
    fn most(&self) -> usize {
        let encoder = self.encoder.as_ref().map(|(_, reads)| reads.prompt.most);
        encoder.into_iter().chain(self.clip.as_ref().map(BaseText::most_tokens)).max().unwrap_or(0)
    }

    /// Whether features may differ in length.
    fn is_ragged(&self) -> bool {
        self.encoder.as_ref().is_some_and(|(_, reads)| [reads.prompt, reads.negative].iter().any(|how| how.padding == Padding::None))
    }
}

/// What two say of one text.
fn both(features: Option<(Told, bool)>, clip: Option<(Told, bool)>) -> (Told, bool) {
    let ((features, cut), (clip, cut_there)) = (features.unwrap_or_default(), clip.unwrap_or_default());
    (Told { features: features.features, clip: clip.clip }, cut | cut_there)
}

/// What draws prompts.
#[derive(Debug)]
pub(super) struct Studio {
    texts: Texts,
    /// Told once.
    negative: (Told, bool),
    connector: Option<Connector>,
    unet: UNet,
    vae: Vae,
    drawer: Drawer,
    noise: Noise,
    seed: u64,
    batch: usize,
    device: Device,
}

impl Studio {
    /// Loads what was found. The connector, and all between steps, compute in float32.
    pub(super) fn load(found: Found, settings: &DrawSettings, device: Device) -> Result<Self, ModelError> {
        let kind = device::kind(settings.dtype);
        let how = draw::Settings { method: method(settings.sampler), steps: settings.steps as usize, guidance: settings.guidance };
        // What is soon known to be wrong comes before what takes long.
        let drawer = Drawer::new(how, &found.base.schedule(device)?, device)?;
        let texts = Texts::load(&found, settings, (kind, device))?;
        let negative = texts.negative(settings.negative.as_deref())?;
        let Found { base, loras, reader, noise, .. } = found;
        let load = |reader: Reader| Connector::from_weights(reader.weights, i64::from(reader.heads), Kind::Float, device);
        let connector = reader.map(load).transpose()?;
        let (unet, vae) = (base.unet_with(&loras, kind, device)?, base.vae(kind, device)?);
        Ok(Self { texts, negative, connector, unet, vae, drawer, noise, seed: settings.seed, batch: settings.batch, device })
    }

    /// See [`Texts::cuts`].
    pub(super) fn cuts(&self, prompts: &[Prompt]) -> Result<[Option<usize>; 2], ModelError> {
        self.texts.cuts(prompts)
    }

    /// The tiles of some prompts, one prompt after the other. `tell` hears of each batch.
    pub(super) fn draw(&mut self, prompts: &[Prompt], tell: &Tell) -> Result<Vec<Picture>, DrawError> {
        let script = self.script(prompts)?;
        let seed = self.seed;
        let shots: Vec<Shot> =
            prompts.iter().enumerate().flat_map(|(text, prompt)| seeds(seed, &prompt.id).map(|seed| Shot { text, seed })).collect();
        let through = Networks { connector: self.connector.as_ref(), unet: &self.unet, vae: &self.vae };
        let mut drawn = Vec::with_capacity(prompts.len() * TILES);
        for shots in shots.chunks(self.batch) {
            let mut drawing = self.drawer.begin(shots, &script, &self.noise.rows(0, shots)?)?;
            while !self.drawer.is_done(&drawing) {
                if tell.stopped() {
                    return Err(DrawError::Leaves);
                }
                self.drawer.step(through, &mut drawing)?;
            }
            drawn.extend(self.drawer.finish(&self.vae, &drawing)?);
            tell.samples(shots.len() as u64);
        }
        Ok(drawn)
    }

    fn script(&self, prompts: &[Prompt]) -> Result<Script, ModelError> {
        let told = prompts.iter().map(|prompt| self.texts.prompt(&prompt.text)).collect::<Result<_, _>>()?;
        let negative = (self.negative.0.to_device(self.device)?, self.negative.1);
        Ok(Script::told(told, negative, (self.texts.most(), self.texts.is_ragged())))
    }
}
