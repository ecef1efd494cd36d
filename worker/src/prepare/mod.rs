//! `ella prepare` as a job: its settings as people type them and as a job's config carries them, and what they come to.

mod job;
mod settings;

use std::path::Path;
use std::sync::Arc;

use ella_dataset::{
    DataError, KeyList, LatentEncoder, Preparation, PrepareOptions, Settings, Source, SourceOptions, TokenCounter, TokenRule,
};
use ella_model::ModelError;
use ella_model::text::TextConfig;
use ella_model::tokenizer::{Padding, TextTokenizer};
use ella_proto::config::Device as Choice;
use ella_store::digest::BadDigest;
use ella_store::{Digest, Store};

use crate::device::{self, NoDevice};
use crate::latents::VaeLatents;
use crate::models;
use crate::precision::Precision;
pub use job::{CONFIG, PrepareJob, make};
pub use settings::{CropAt, Format, PrepareSettings, Twice};

/// More tokens than these are not told apart: no encoder takes so many.
const MOST_TOKENS: usize = 1 << 16;

/// Why a data set can't be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The sources, the settings or the destination.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A model that was named.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device to compute on.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// How it is to round.
    #[error("the GPU: {0}")]
    Gpu(#[from] ella_cuda::Error),
    /// A digest that is none.
    #[error(transparent)]
    Digest(#[from] BadDigest),
    /// A list of keys that can't be read.
    #[error("{file}: not a list of keys ({what}); expected UTF-8 text, one key a line")]
    KeyList {
        /// The file.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// What was typed does not go together.
    #[error("{0}")]
    Usage(String),
}

impl PrepareError {
    /// Whether what was typed is at fault.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Usage(_) => true,
            Self::Data(error) => error.is_usage(),
            Self::Model(error) => error.is_usage(),
            _ => false,
        }
    }

    /// Whether the same would fail again on this machine.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Data(error) => error.is_permanent(),
            Self::Model(error) => error.is_permanent(),
            Self::Digest(_) | Self::KeyList { .. } | Self::Usage(_) | Self::Device(_) => true,
            Self::Gpu(_) => false,
        }
    }
}

/// The models of a prepare job.
#[derive(Clone, Default)]
pub struct PrepareModels {
    tokens: Option<Arc<dyn TokenCounter>>,
    latents: Option<Arc<dyn LatentEncoder>>,
}

impl std::fmt::Debug for PrepareModels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (tokens, latents) = (self.tokens.is_some(), self.latents.is_some());
        f.debug_struct("PrepareModels").field("tokens", &tokens).field("latents", &latents).finish()
    }
}

impl PrepareSettings {
    /// Loads the models that were named. Blocks; not to be called in an async task, for it may download.
    ///
    /// # Errors
    /// If what was given does not go together, or a model can't be used.
    pub fn load(&self, choice: Choice) -> Result<PrepareModels, PrepareError> {
        self.check()?;
        Ok(PrepareModels { tokens: self.tokens()?, latents: self.latents(&self.settings()?, choice)? })
    }

    /// Finds the sources, and makes the preparation into `data`. Must run in a tokio runtime.
    ///
    /// # Errors
    /// If what was given does not go together, or a source or list can't be used.
    pub async fn preparation(&self, data: &str, models: PrepareModels) -> Result<Preparation, PrepareError> {
        bound_heaps();
        let PrepareModels { tokens, latents } = models;
        let mut settings = self.settings()?;
        let (allow, deny) = (key_list("--allow", self.allow.as_deref()).await?, key_list("--deny", self.deny.as_deref()).await?);
        settings.filters.allow = allow.as_ref().and_then(|list| list.digest());
        settings.filters.deny = deny.as_ref().and_then(|list| list.digest());
        settings.filters.caption_tokens = tokens.as_ref().map(|counter| TokenRule {
            tokenizer: counter.digest(),
            min: self.min_caption_tokens.unwrap_or(0),
            max: self.max_caption_tokens,
        });
        settings.check()?;
        let sources = self.find_sources().await?;
        let options = PrepareOptions { threads: self.threads, latents, tokens, allow, deny };
        Ok(Preparation::new(sources, settings, options, Store::open(data).map_err(DataError::from)?)?)
    }

    async fn find_sources(&self) -> Result<Vec<Source>, PrepareError> {
        let options = SourceOptions { image_column: self.image_column.clone(), key_column: self.key_column.clone() };
        Ok(Source::find_all(&self.sources, &options).await?)
    }

    fn tokens(&self) -> Result<Option<Arc<dyn TokenCounter>>, PrepareError> {
        let Some(model) = &self.tokenizer else { return Ok(None) };
        Ok(Some(Arc::new(Tokens::load(&models::locate("--tokenizer", model)?)?)))
    }

    fn latents(&self, settings: &Settings, choice: Choice) -> Result<Option<Arc<dyn LatentEncoder>>, PrepareError> {
        let Some(model) = &self.latents else { return Ok(None) };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let device = device::set_up(choice, threads)?;
        Precision::OF_FILES.set(device)?;
        let encoder = VaeLatents::load(&models::locate("--latents", model)?, device, threads)?;
        let downscale = encoder.spec().downscale;
        let odd =
            settings.sizes().into_iter().find(|(width, height)| !width.is_multiple_of(downscale) || !height.is_multiple_of(downscale));
        match odd {
            Some((width, height)) => Err(PrepareError::Usage(format!(
                "pictures of {width}×{height} are no multiples of the VAE's {downscale}; choose another --resolution or --buckets"
            ))),
            None => Ok(Some(Arc::new(encoder))),
        }
    }
}

/// glibc gives every thread a heap of its own, and each keeps what large pictures once took: 1.3 GB with 16 threads. With few heaps, and what is
/// large given back to the system at once, it is 0.45.
fn bound_heaps() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets numbers, under the allocator's own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
    }
}

/// Reads the list of keys that an option names by path or URL.
async fn key_list(option: &str, location: Option<&str>) -> Result<Option<Arc<KeyList>>, PrepareError> {
    let Some(location) = location else { return Ok(None) };
    let refused = |what: &str| Err(PrepareError::KeyList { file: format!("{option} {location}"), what: what.to_owned() });
    match std::fs::metadata(location) {
        Ok(meta) if meta.is_dir() => return refused("it is a folder"),
        // By its path the list is read again by whoever goes on, repairs or shares the work.
        Ok(meta) if !meta.is_file() => return refused("it is a pipe or device, which can be read only once: write the keys to a file"),
        _ => {}
    }
    let (folder, key) = location.rsplit_once('/').unwrap_or((".", location));
    let store = Store::open(if folder.is_empty() { "/" } else { folder }).map_err(DataError::from)?;
    let bytes = store.get(key).await.map_err(DataError::from)?;
    let text = std::str::from_utf8(&bytes);
    let text = text.map_err(|error| PrepareError::KeyList { file: format!("{option} {location}"), what: error.to_string() })?;
    Ok(Some(Arc::new(KeyList::parse(text))))
}

/// A text model's tokenizer, to count with.
#[derive(Debug)]
struct Tokens {
    tokenizer: TextTokenizer,
    digest: Digest,
}

impl Tokens {
    fn load(model: &Path) -> Result<Self, PrepareError> {
        let config = TextConfig::load(model)?;
        let tokenizer = TextTokenizer::load(model, &config)?;
        let digest = tokenizer.digest().parse()?;
        Ok(Self { tokenizer, digest })
    }
}

impl TokenCounter for Tokens {
    fn digest(&self) -> Digest {
        self.digest
    }

    fn count(&self, caption: &str) -> Option<usize> {
        let encoded = self.tokenizer.encode(&[caption], MOST_TOKENS, Padding::None).ok()?;
        encoded.lengths.first().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe has no length, by which the store would read it as an empty list.
    #[tokio::test]
    async fn a_list_of_keys_that_cannot_be_read_again_is_refused_by_its_option() {
        let refused = |option: &'static str, location: &'static str| async move {
            match key_list(option, Some(location)).await {
                Err(error @ PrepareError::KeyList { .. }) => error.to_string(),
                other => panic!("{other:?}"),
            }
        };
        let said = refused("--deny", "/dev/null").await;
        assert!(said.contains("--deny /dev/null") && said.contains("read only once"), "{said}");
        let said = refused("--allow", "/").await;
        assert!(said.contains("--allow /") && said.contains("a folder"), "{said}");
    }
}
