//! Sets of prompts as grids of four pictures each (`ella dpg generate`), as DPG-Bench's official scorer takes them (paper §3.3): a job of
//! leased units, each some prompts that are drawn together.
//!
//! SAME: a tile's seed follows from the job's seed, its prompt's name and its place, and which tiles share a batch from the set and the
//! settings; so a grid's bytes do not depend on who draws it, when, and what was there before. A grid is written once, under its prompt's
//! name. One that is there and whole is not drawn again; one that is not whole is drawn again and replaced, which is counted (KNOWN).

mod error;
mod grid;
mod models;
mod record;
mod settings;

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use ella_dataset::{Prompt, Prompts};
use ella_model::ModelError;
use ella_proto::config::{Device as Choice, JobConfig};
use ella_store::{Created, Store, StoreError};
use tokio::runtime::Handle;

use crate::device;
use crate::draw::{self, Made, Picture};
use crate::job::{Job, JobError, PLAN, Tell};
use crate::precision::Precision;
use crate::trained::Reads;
pub use error::DrawError;
pub use grid::seeds;
use grid::{TILES, grid, is_whole};
pub use models::Found;
use models::Studio;
pub use record::{BaseDigests, Cut, Image, Named, RECORD, Record, Settings};
pub use settings::DrawSettings;

/// Grids that were drawn now.
pub const DRAWN: &str = "drawn";
/// Grids that were there, and whole.
pub const THERE: &str = "there";
/// Grids that were there, not whole, and drawn again.
pub const REPLACED: &str = "replaced";

/// Makes the job of a config. It blocks, in a tokio runtime, while it loads the models.
pub fn make(config: &JobConfig, choice: Choice) -> Result<Box<dyn Job>, JobError> {
    let settings = config.settings(&DrawSettings::full()).map_err(JobError::permanent)?;
    Ok(Box::new(DrawJob::open(&config.job.data, settings, choice)?))
}

/// Draws a set of prompts.
#[derive(Debug)]
pub struct DrawJob {
    prompts: Prompts,
    settings: DrawSettings,
    /// The connector's digest, as pictures tell it, and how texts are read before it.
    connector: Option<(String, Reads)>,
    side: u32,
    out: Store,
    studio: Mutex<Studio>,
}

/// A grid's file.
enum There {
    No,
    Whole,
    Damaged,
}

impl DrawJob {
    /// Reads the prompts, loads the models, and begins in the folder `out`, or goes on there. Blocks, in a tokio runtime.
    ///
    /// # Errors
    /// Prompts, models or settings that cannot be used, or a folder that holds something else.
    pub fn open(out: &str, settings: DrawSettings, choice: Choice) -> Result<Self, DrawError> {
        settings.check("[draw]")?;
        let (runtime, out) = (Handle::current(), Store::open(out)?);
        let prompts = runtime.block_on(Prompts::read(&settings.prompts))?;
        let on = device::set_up(choice, settings.threads)?;
        Precision::OF_FILES.set(on).map_err(ModelError::from)?;
        let found = Found::find(&settings)?;
        let (bound, side) = (Settings::of(&settings, &found, &prompts, on)?, found.side());
        found.otherwise().for_each(|told| tracing::info!("{told}"));
        let connector = bound.connector.clone().zip(found.reader.as_ref().map(|reader| reader.reads));
        let studio = Studio::load(found, &settings, on)?;
        let [text, clip] = studio.cuts(prompts.all())?;
        let record = Record::new(&settings, bound, &prompts, Cut { text, clip });
        runtime.block_on(record.begin(&out))?;
        Ok(Self { prompts, settings, connector, side, out, studio: Mutex::new(studio) })
    }

    fn groups(&self) -> impl Iterator<Item = &[Prompt]> {
        self.prompts.all().chunks(self.settings.prompts_at_once())
    }

    /// Draws what is missing of some prompts. All of them are drawn if one is: its bytes may depend on the others' presence.
    async fn group(&self, number: usize, tell: &Tell) -> Result<(), DrawError> {
        let prompts = self.groups().nth(number).unwrap_or_default();
        let mut there = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            there.push(self.look(prompt).await?);
        }
        let whole = there.iter().filter(|there| matches!(there, There::Whole)).count();
        tell.count(THERE, whole as u64);
        if whole == prompts.len() {
            return Ok(());
        }
        let drawn = self.draw(prompts, tell)?;
        for ((prompt, there), tiles) in prompts.iter().zip(there).zip(drawn.chunks(TILES)) {
            let file = || -> Result<bytes::Bytes, ModelError> {
                let png = grid(tiles, self.side).png(&self.parameters(prompt));
                Ok(png.map_err(|error| ModelError::argument("a grid", "one that a PNG can hold", error))?.into())
            };
            match there {
                There::Whole => {}
                There::Damaged => {
                    self.out.put(&key(prompt), file()?).await?;
                    tell.count(REPLACED, 1);
                }
                // Of another worker's, if one had the same unit: the bytes are the same.
                There::No => tell.count(if self.out.create(&key(prompt), file()?).await? == Created::Yes { DRAWN } else { THERE }, 1),
            }
        }
        Ok(())
    }

    async fn look(&self, prompt: &Prompt) -> Result<There, StoreError> {
        match self.out.get(&key(prompt)).await {
            Err(StoreError::NotFound { .. }) => Ok(There::No),
            Err(error) => Err(error),
            Ok(file) => Ok(if is_whole(&file, self.side) { There::Whole } else { There::Damaged }),
        }
    }

    fn draw(&self, prompts: &[Prompt], tell: &Tell) -> Result<Vec<Picture>, DrawError> {
        // The number of threads is the calling thread's own.
        device::set_threads(self.settings.threads);
        self.studio.lock().unwrap_or_else(PoisonError::into_inner).draw(prompts, tell)
    }

    /// How a prompt's tiles were made, one after the other.
    fn parameters(&self, prompt: &Prompt) -> String {
        let DrawSettings { negative, steps, sampler, guidance, base, loras, text, with_clip, seed, .. } = &self.settings;
        let more = if *with_clip { ", CLIP: prompt" } else { "" };
        let made = seeds(*seed, &prompt.id).map(|seed| {
            let by = text.as_ref().zip(self.connector.as_ref()).map(|(text, (digest, reads))| draw::Reader {
                text,
                layers: reads.layers,
                padding: reads.prompt.padding,
                connector: format!("{digest}{more}"),
            });
            let made = Made {
                prompt: &prompt.text,
                negative: negative.as_deref(),
                steps: *steps,
                sampler: draw::method(*sampler),
                guidance: *guidance,
                seed,
                noise: None,
                base,
                loras: loras.iter().map(|lora| format!("{}:{}", lora.file, lora.weight)).collect(),
                by,
            };
            made.to_string()
        });
        made.join("\n\n")
    }

    /// Makes sure that all grids are there, and sweeps up what killed workers left.
    async fn finish(&self) -> Result<(), JobError> {
        let files = self.out.files("").await.map_err(DrawError::from)?;
        let has = |prompt: &&Prompt| !files.iter().any(|meta| meta.key == key(prompt));
        if let Some(prompt) = self.prompts.all().iter().find(has) {
            let what = "is gone, and was there; run the same command again";
            return Err(JobError::passing(format_args!("{}/{}: {what}", self.out.url(), key(prompt))));
        }
        self.out.sweep("").await.map_err(DrawError::from)?;
        Ok(())
    }
}

fn key(prompt: &Prompt) -> String {
    format!("{}.png", prompt.id)
}

#[async_trait]
impl Job for DrawJob {
    async fn unit(&self, unit: &str, tell: &Tell) -> Result<Vec<String>, JobError> {
        match unit.split_once(' ').map_or((unit, None), |(name, number)| (name, number.parse().ok())) {
            (PLAN, None) => Ok((0..self.groups().count()).map(|number| format!("group {number}")).collect()),
            ("group", Some(number)) => {
                self.group(number, tell).await?;
                Ok(vec!["finish".to_owned()])
            }
            ("finish", None) => self.finish().await.map(|()| Vec::new()),
            _ => Err(JobError::permanent(format!("no unit of drawing has the name {unit:?}; use workers of one version"))),
        }
    }
}
