//! What a folder of grids is: the file beside them that says how they are made. It is written before the first of them, and what goes on
//! there goes on with the same settings, or not at all.

use std::collections::BTreeMap;

use ella_dataset::Prompts;
use ella_model::ModelError;
use ella_model::base::Base;
use ella_proto::config::{Dtype, Layers, Padding};
use ella_store::{Created, Digest, Store, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Device;

use super::grid::{PLACES, seeds};
use super::models::Found;
use super::{DrawError, DrawSettings};
use crate::device;

/// The record's name, beside the grids.
pub const RECORD: &str = "generate.json";

/// How a folder's grids are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The command that makes them.
    pub made_by: String,
    /// The side of a tile in pixels: what the official scorer wants as `--resolution`.
    pub resolution: u32,
    /// The left top corners of a grid's tiles in pixels, in the order of their seeds.
    pub tiles: Vec<[u32; 2]>,
    /// What decides every pixel. Models and prompts are told by their BLAKE3.
    pub settings: Settings,
    /// The same as they were named.
    pub named: Named,
    /// How many prompts lost their end.
    pub cut: Cut,
    /// The prompts, by their names.
    pub images: BTreeMap<String, Image>,
}

/// What decides every pixel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // as `DrawSettings` has them, and digests
pub struct Settings {
    pub prompts: Digest,
    pub base: BaseDigests,
    pub loras: Vec<String>,
    pub connector: Option<String>,
    pub heads: Option<u32>,
    pub text: Option<String>,
    pub tokenizer: Option<String>,
    pub clip: Option<String>,
    pub padding: Option<Padding>,
    pub negative_padding: Option<Padding>,
    pub max_tokens: Option<usize>,
    pub layers: Option<Layers>,
    pub text_dtype: Option<Dtype>,
    pub negative: Option<String>,
    pub seed: u64,
    pub sampler: String,
    pub steps: u32,
    pub guidance: f64,
    pub size: u32,
    pub batch: usize,
    pub dtype: Dtype,
    pub device: String,
    /// Of a processor; a GPU's pictures do not depend on them.
    pub threads: Option<usize>,
}

/// BLAKE3 of a base's parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseDigests {
    /// The U-Net's weights and configuration.
    pub unet: String,
    /// The VAE's.
    pub vae: String,
    /// The scheduler's configuration.
    pub scheduler: Digest,
}

/// Models and prompts as they were named.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // as `DrawSettings` has them
pub struct Named {
    pub prompts: String,
    pub base: String,
    pub loras: Vec<String>,
    pub connector: Option<String>,
    pub text: Option<String>,
}

/// Prompts that lost their end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// At the text encoder's longest; none: it is not asked.
    pub text: Option<usize>,
    /// At the base's own CLIP's; none: it is not asked.
    pub clip: Option<usize>,
}

/// A grid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What it shows.
    pub prompt: String,
    /// The tiles'.
    pub seeds: Vec<u64>,
}

impl Settings {
    /// What decides the pixels of prompts by models that were found. Reads all weights once.
    pub(super) fn of(settings: &DrawSettings, found: &Found, prompts: &Prompts, on: Device) -> Result<Self, ModelError> {
        let reader = found.reader.as_ref();
        let asks_clip = settings.with_clip || reader.is_none();
        Ok(Self {
            prompts: prompts.digest(),
            base: BaseDigests::of(&found.base)?,
            loras: found.loras.iter().map(|lora| lora.fingerprint()).collect(),
            connector: reader.map(|reader| reader.weights.digest()),
            heads: reader.map(|reader| reader.heads),
            text: reader.map(|reader| reader.text.weights_digest.clone()),
            tokenizer: reader.map(|reader| reader.text.tokenizer_digest.clone()),
            clip: asks_clip.then(|| clip(&found.base)).transpose()?,
            padding: reader.map(|reader| reader.reads.prompt.padding),
            negative_padding: reader.map(|reader| reader.reads.negative.padding),
            max_tokens: reader.map(|reader| reader.reads.prompt.most),
            layers: reader.map(|reader| reader.reads.layers),
            text_dtype: reader.map(|reader| reader.reads.dtype),
            negative: settings.negative.clone(),
            seed: settings.seed,
            sampler: crate::draw::method(settings.sampler).to_string(),
            steps: settings.steps,
            guidance: settings.guidance,
            size: found.side(),
            batch: settings.batch,
            dtype: settings.dtype,
            device: device::kind_name(on).to_owned(),
            threads: (!on.is_cuda()).then_some(settings.threads),
        })
    }
}

impl BaseDigests {
    fn of(base: &Base) -> Result<Self, ModelError> {
        let scheduler = Digest::of(base.scheduler()?.text().as_bytes());
        Ok(Self { unet: base.unet_part()?.fingerprint(), vae: base.vae_part()?.fingerprint(), scheduler })
    }
}

/// BLAKE3 over the base's own text encoders and their tokenizers.
fn clip(base: &Base) -> Result<String, ModelError> {
    let mut all = String::new();
    for encoder in base.text_encoders()? {
        all += &encoder.part.fingerprint();
        all += encoder.tokenizer.as_ref().map_or("", |tokenizer| tokenizer.digest());
    }
    Ok(Digest::of(all.as_bytes()).to_string())
}

impl Record {
    /// Of prompts and settings; `cut` of the prompts lose their end.
    pub(super) fn new(settings: &DrawSettings, bound: Settings, prompts: &Prompts, cut: Cut) -> Self {
        let side = bound.size;
        let named = Named {
            prompts: settings.prompts.clone(),
            base: settings.base.clone(),
            loras: settings.loras.iter().map(|lora| format!("{}:{}", lora.file, lora.weight)).collect(),
            connector: settings.connector.clone(),
            text: settings.text.clone(),
        };
        let image = |prompt: &ella_dataset::Prompt| {
            let seeds = seeds(settings.seed, &prompt.id).to_vec();
            (prompt.id.clone(), Image { prompt: prompt.text.clone(), seeds })
        };
        let images = prompts.all().iter().map(image).collect();
        let tiles = PLACES.map(|(x, y)| [x * side, y * side]).to_vec();
        Self { made_by: "ella dpg generate".to_owned(), resolution: side, tiles, settings: bound, named, cut, images }
    }

    /// Reads a folder's record; none if there is none.
    ///
    /// # Errors
    /// The store's, or the file is no record.
    pub async fn read(out: &Store) -> Result<Option<Self>, DrawError> {
        let bytes = match out.get(RECORD).await {
            Err(StoreError::NotFound { .. }) => return Ok(None),
            read => read?,
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| DrawError::Folder {
            file: format!("{}/{RECORD}", out.url()),
            what: format!("is no record of `ella dpg generate` ({error}); choose another folder"),
        })
    }

    /// Begins in a folder, or goes on there. A record of other settings gives way as long as no grid was drawn by them.
    ///
    /// # Errors
    /// The folder holds grids of other settings, the first of which is named, or pictures that no record tells of.
    pub(super) async fn begin(&self, out: &Store) -> Result<(), DrawError> {
        loop {
            if let Some(there) = Self::read(out).await? {
                let differs = self.differs_from(&there, out);
                if differs.is_ok() || !has_pictures(out).await? {
                    return match differs {
                        Ok(()) => Ok(()),
                        Err(_) => Ok(out.put(RECORD, self.bytes(out)?).await?),
                    };
                }
                return differs;
            }
            // A record comes before the first picture: one that came meanwhile is found when it is looked for again.
            if has_pictures(out).await? && Self::read(out).await?.is_none() {
                let what = "is not there, and pictures are, which it would tell of; choose another folder, or empty this one".to_owned();
                return Err(DrawError::Folder { file: format!("{}/{RECORD}", out.url()), what });
            }
            if out.create(RECORD, self.bytes(out)?).await? == Created::Yes {
                return Ok(());
            }
        }
    }

    fn bytes(&self, out: &Store) -> Result<bytes::Bytes, DrawError> {
        let wrong =
            |error| DrawError::Folder { file: format!("{}/{RECORD}", out.url()), what: format!("cannot be written as JSON ({error})") };
        Ok(serde_json::to_vec_pretty(self).map_err(wrong)?.into())
    }

    /// Whether this record's settings are those that are there.
    fn differs_from(&self, there: &Self, out: &Store) -> Result<(), DrawError> {
        let (own, theirs) = (&self.settings, &there.settings);
        let file = || format!("{}/{RECORD}", out.url());
        let Some((key, expected, found)) = first_difference(theirs, own) else { return Ok(()) };
        if key == "device" {
            return Err(DrawError::OtherDevice { file: file(), theirs: theirs.device.clone(), own: own.device.clone() });
        }
        let what =
            format!("these pictures are drawn with `{key}` {expected}, and not {found}; go on with the same, or choose another folder");
        Err(DrawError::Folder { file: file(), what })
    }
}

/// The first setting that differs, and its two values.
fn first_difference(one: &Settings, other: &Settings) -> Option<(String, Value, Value)> {
    let values = |settings: &Settings| match serde_json::to_value(settings) {
        Ok(Value::Object(values)) => values,
        _ => serde_json::Map::new(),
    };
    let mut other = values(other);
    values(one).into_iter().find_map(|(key, value)| {
        let of_other = other.remove(&key).unwrap_or_default();
        (value != of_other).then_some((key, value, of_other))
    })
}

async fn has_pictures(out: &Store) -> Result<bool, StoreError> {
    Ok(out.files("").await?.iter().any(|meta| meta.key.ends_with(".png")))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn prompts() -> Prompts {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.txt"), "a red circle").unwrap();
        Prompts::read(dir.path().to_str().unwrap()).await.unwrap()
    }

    async fn record() -> Record {
        let prompts = prompts().await;
        let settings = Settings {
            prompts: prompts.digest(),
            base: BaseDigests { unet: "u".into(), vae: "v".into(), scheduler: Digest::of(b"s") },
            loras: Vec::new(),
            connector: Some("c".into()),
            heads: Some(8),
            text: Some("t".into()),
            tokenizer: Some("k".into()),
            clip: None,
            padding: Some(Padding::Fixed),
            negative_padding: Some(Padding::Fixed),
            max_tokens: Some(128),
            layers: Some(Layers::Last),
            text_dtype: Some(Dtype::Fp16),
            negative: None,
            seed: 7,
            sampler: "ddim".into(),
            steps: 50,
            guidance: 7.5,
            size: 64,
            batch: 4,
            dtype: Dtype::Fp32,
            device: "cpu".into(),
            threads: Some(1),
        };
        Record::new(&DrawSettings { seed: 7, ..DrawSettings::default() }, settings, &prompts, Cut::default())
    }

    #[tokio::test]
    async fn a_folder_is_begun_once_and_gone_on_with_by_the_same_settings() {
        let (out, record) = (Store::in_memory(), record().await);
        assert_eq!(Record::read(&out).await.unwrap(), None);
        record.begin(&out).await.unwrap();
        assert_eq!(Record::read(&out).await.unwrap(), Some(record.clone()));
        assert_eq!((record.resolution, &record.tiles[..]), (64, &[[0, 0], [64, 0], [0, 64], [64, 64]][..]));
        assert_eq!(record.images["a"], Image { prompt: "a red circle".into(), seeds: seeds(7, "a").to_vec() });
        // Named otherwise, it is the same all the same.
        let mut other = record.clone();
        other.named.base = "./base".into();
        other.begin(&out).await.unwrap();

        // Other settings are taken as long as nothing was drawn, and refused by name afterwards.
        other.settings.guidance = 3.0;
        other.begin(&out).await.unwrap();
        out.put("a.png", b"x"[..].into()).await.unwrap();
        other.begin(&out).await.unwrap();
        let error = record.begin(&out).await.unwrap_err().to_string();
        assert!(error.contains("generate.json: these pictures are drawn with `guidance` 3.0, and not 7.5"), "{error}");
        for (name, change) in [
            ("connector", (|s| s.connector = None) as fn(&mut Settings)),
            ("prompts", |s| s.prompts = Digest::of(b"")),
            ("base", |s| s.base.vae = "w".into()),
            ("negative", |s| s.negative = Some("blur".into())),
            ("batch", |s| s.batch = 8),
        ] {
            let mut changed = other.clone();
            change(&mut changed.settings);
            let error = changed.begin(&out).await.unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_worker_with_another_device_leaves_the_work_to_others() {
        let (out, record) = (Store::in_memory(), record().await);
        record.begin(&out).await.unwrap();
        out.put("a.png", b"x"[..].into()).await.unwrap();
        let mut other = record.clone();
        (other.settings.device, other.settings.threads) = ("cuda".into(), None);
        let error = crate::job::JobError::from(other.begin(&out).await.unwrap_err());
        assert!(!error.permanent && error.message.contains("drawn on cpu, and this worker computes on cuda"), "{error}");
    }

    #[tokio::test]
    async fn pictures_of_others_and_files_that_are_no_record_are_left_alone() {
        let (out, record) = (Store::in_memory(), record().await);
        out.put("holiday.png", b"x"[..].into()).await.unwrap();
        let error = record.begin(&out).await.unwrap_err().to_string();
        assert!(error.contains("generate.json: is not there, and pictures are"), "{error}");
        out.put(RECORD, b"{\"made_by\": 3}"[..].into()).await.unwrap();
        let error = record.begin(&out).await.unwrap_err().to_string();
        assert!(error.contains("generate.json: is no record of `ella dpg generate`"), "{error}");
    }
}
