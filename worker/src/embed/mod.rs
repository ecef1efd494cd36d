//! `ella embed`: features of every caption of a data set, into sidecars. Each shard is one unit: written once, and skipped if it is
//! there, so that an interrupted run goes on where it was, and any number of workers share the work.

mod shard;

pub use shard::{BATCH, ShardEncoder};

use std::path::Path;

use async_trait::async_trait;
use ella_dataset::{DataError, DataSet, FeatureSet, FeatureSpec};
use ella_proto::config::{Bytes, Device as Choice, Dtype, Features, JobConfig, Layers, Padding, Text};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::device::{self, NoDevice};
use crate::feed::{self, FeedError};
use crate::gpu;
use crate::gpu::fault::{Fault, first_line};
use crate::job::{Job, JobError, PLAN, Tell};
use crate::models;
use crate::precision::Precision;
use crate::text::identity;

/// The settings of an embed job: `[embed]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmbedSettings {
    /// The text encoder: a folder in transformers' layout, or a hub id.
    pub text: String,
    /// Longest caption in tokens; longer ones are cut, and counted.
    pub max_tokens: usize,
    /// Padding rule.
    pub padding: Padding,
    /// Which layers features are made of.
    pub layers: Layers,
    /// What to compute in, and to store.
    pub dtype: Dtype,
    /// Columns of captions; none: all of the data set's own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub captions: Vec<String>,
    /// Most captions that go through the encoder at once.
    pub batch: usize,
    /// Threads that compute.
    pub threads: usize,
    /// The most that is taken of a GPU's memory, which leaves the rest to others there; none: all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<Bytes>,
    /// Whether a batch that runs out of a GPU's memory is halved.
    pub split_on_oom: bool,
}

impl Default for EmbedSettings {
    fn default() -> Self {
        Self {
            text: String::new(),
            max_tokens: 128,
            padding: Padding::Fixed,
            layers: Layers::Last,
            dtype: Dtype::Fp32,
            captions: Vec::new(),
            batch: BATCH,
            threads: 1,
            gpu_memory: None,
            split_on_oom: false,
        }
    }
}

impl EmbedSettings {
    /// Settings in which every key is there.
    pub(crate) fn full() -> Self {
        Self { captions: vec![String::new()], gpu_memory: Some(Bytes(1)), ..Self::default() }
    }

    /// The encoder's settings as a run's config has them.
    pub fn text(&self) -> Text {
        Text {
            model: self.text.clone(),
            max_tokens: self.max_tokens,
            padding: self.padding,
            layers: self.layers,
            features: Features::Cached,
            dtype: self.dtype,
        }
    }

    /// What the features of the encoder in a folder will be, read without loading it.
    pub fn spec(&self, model: &Path) -> Result<FeatureSpec, FeedError> {
        feed::spec(&self.text(), &identity(model, self.max_tokens)?)
    }
}

/// Makes the job of a config. It blocks, in a tokio runtime, while it loads the encoder.
pub fn make(config: &JobConfig, choice: Choice) -> Result<Box<dyn Job>, JobError> {
    let settings = config.settings(&EmbedSettings::full()).map_err(JobError::permanent)?;
    Ok(Box::new(EmbedJob::open(&config.job.data, &settings, choice)?))
}

/// Embeds a data set's captions, shard by shard.
#[derive(Debug)]
pub struct EmbedJob {
    data: DataSet,
    columns: Vec<(String, FeatureSet)>,
    encoder: ShardEncoder,
}

impl EmbedJob {
    /// Opens the data set and loads the encoder. Blocks, in a tokio runtime.
    pub fn open(data: &str, settings: &EmbedSettings, choice: Choice) -> Result<Self, JobError> {
        let device = device::set_up(choice, settings.threads)?;
        Precision::OF_FILES.set(device).map_err(JobError::passing)?;
        gpu::limit(device, settings.gpu_memory).map_err(JobError::passing)?;
        // Another machine may have the model.
        let model = models::locate("--text", &settings.text).map_err(|error| JobError::of_model(&error))?;
        let (text, load) = (settings.text(), (settings.batch, settings.threads));
        let spec = feed::spec(&text, &identity(&model, settings.max_tokens).map_err(|error| JobError::of_model(&error))?)?;
        let encoder = ShardEncoder::load(&text, model, spec.clone(), device, load)
            .map_err(|error| JobError::of_model(&error))?
            .splitting(settings.split_on_oom);
        let runtime = Handle::current();
        let data = runtime.block_on(DataSet::open(data))?;
        let own = || data.manifest().captions.iter().map(|column| column.name.clone()).collect();
        let names: Vec<String> = if settings.captions.is_empty() { own() } else { settings.captions.clone() };
        let mut columns = Vec::new();
        for name in names {
            let set = runtime.block_on(data.begin_features(&spec, &name))?;
            columns.push((name, set));
        }
        Ok(Self { data, columns, encoder })
    }

    /// What has no features yet: shards of each column, as units; or the end.
    async fn plan(&self) -> Result<Vec<String>, DataError> {
        let mut units = Vec::new();
        for (column, (_, set)) in self.columns.iter().enumerate() {
            units.extend(set.missing().await?.into_iter().map(|shard| format!("shard {column} {shard}")));
        }
        Ok(if units.is_empty() { vec!["finish".to_owned()] } else { units })
    }

    async fn shard(&self, column: usize, shard: usize, tell: &Tell) -> Result<(), FeedError> {
        let (name, set) = self.columns.get(column).ok_or(FeedError::NoColumn)?;
        let captions = self.data.captions(name, shard).await?;
        let (file, counts) = self.encoder.embed(&captions, |tokens| set.check_size(shard, tokens), tell)?;
        set.write(shard, captions.len() as u64, file, counts.clone()).await?;
        counts.iter().for_each(|(name, count)| tell.count(name, *count));
        Ok(())
    }

    async fn finish(&self) -> Result<(), FeedError> {
        for (_, set) in &self.columns {
            if set.empty().await?.is_none() {
                set.write_empty(self.encoder.embed_empty()?).await?;
            }
            set.finish().await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Job for EmbedJob {
    async fn unit(&self, unit: &str, tell: &Tell) -> Result<Vec<String>, JobError> {
        let numbers: Vec<usize> = unit.split(' ').skip(1).filter_map(|number| number.parse().ok()).collect();
        match (unit.split(' ').next(), numbers.as_slice()) {
            (Some(PLAN), []) => Ok(self.plan().await?),
            (Some("shard"), [column, shard]) => {
                self.shard(*column, *shard, tell).await?;
                Ok(vec!["finish".to_owned()])
            }
            (Some("finish"), []) => {
                self.finish().await?;
                Ok(Vec::new())
            }
            _ => Err(JobError::permanent(format!("no unit of embedding has the name {unit:?}; use workers of one version"))),
        }
    }
}

impl From<FeedError> for JobError {
    fn from(error: FeedError) -> Self {
        match Fault::of(&error) {
            // Others may have a GPU that works: the unit is theirs.
            Some(fault) if fault.ends_the_process() => {
                Self::passing(format_args!("{}: {}", first_line(&error), fault.hint())).of_a_broken_worker()
            }
            _ if error.is_permanent() => Self::permanent(error),
            _ => Self::passing(error),
        }
    }
}

impl From<NoDevice> for JobError {
    fn from(error: NoDevice) -> Self {
        // Another machine may have it.
        Self::passing(error).alone(false, true)
    }
}
