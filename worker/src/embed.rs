//! `ella embed`: features of every caption of a data set, into sidecars. Each shard is one unit: written once, and skipped if it is
//! there, so that an interrupted run goes on where it was, and any number of workers share the work.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use ella_dataset::{Counts, DataError, DataSet, FeatureSet, FeatureSpec, FeatureSpool, FeatureWriter};
use ella_proto::config::{Device as Choice, Dtype, Features, JobConfig, Layers, Padding, Text};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};
use tokio::runtime::Handle;

use crate::device::{self, NoDevice};
use crate::feed::{self, FeedError, stored_kind};
use crate::job::{Job, JobError, PLAN, Tell};
use crate::models;
use crate::text::{TextEncoder, TextOptions, identity};

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
            batch: 32,
            threads: 1,
        }
    }
}

impl EmbedSettings {
    /// Settings in which every key is there.
    fn full() -> Self {
        Self { captions: vec![String::new()], ..Self::default() }
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
    spec: FeatureSpec,
    batch: usize,
    threads: usize,
    encoder: Mutex<TextEncoder>,
}

impl EmbedJob {
    /// Opens the data set and loads the encoder. Blocks, in a tokio runtime.
    pub fn open(data: &str, settings: &EmbedSettings, choice: Choice) -> Result<Self, JobError> {
        let device = device::set_up(choice, settings.threads)?;
        // Another machine may have the model.
        let model = models::locate("--text", &settings.text).map_err(JobError::passing)?;
        let EmbedSettings { max_tokens, padding, layers, dtype, .. } = *settings;
        let spec = feed::spec(&settings.text(), &identity(&model, max_tokens).map_err(JobError::passing)?)?;
        let encoder = TextEncoder::load(&TextOptions { model, max_tokens, padding, layers, dtype }, device).map_err(JobError::passing)?;
        let runtime = Handle::current();
        let data = runtime.block_on(DataSet::open(data))?;
        let own = || data.manifest().captions.iter().map(|column| column.name.clone()).collect();
        let names: Vec<String> = if settings.captions.is_empty() { own() } else { settings.captions.clone() };
        let mut columns = Vec::new();
        for name in names {
            let set = runtime.block_on(data.begin_features(&spec, &name))?;
            columns.push((name, set));
        }
        Ok(Self { data, columns, spec, batch: settings.batch, threads: settings.threads, encoder: Mutex::new(encoder) })
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
        let (file, counts) = self.embed(&captions, tell)?;
        set.write(shard, captions.len() as u64, file, counts.clone()).await?;
        counts.iter().for_each(|(name, count)| tell.count(name, *count));
        Ok(())
    }

    async fn finish(&self) -> Result<(), FeedError> {
        for (_, set) in &self.columns {
            if !set.has_empty().await? {
                // For dropped captions in training, and for guidance without a negative prompt.
                let rows = encode(&self.encoder(), &self.spec, &[""], &mut Counts::new())?;
                let mut writer = FeatureWriter::new(&self.spec)?;
                rows.into_iter().try_for_each(|(bytes, tokens)| writer.push(&bytes, tokens))?;
                set.write_empty(writer.finish()?).await?;
            }
            set.finish().await?;
        }
        Ok(())
    }

    fn encoder(&self) -> std::sync::MutexGuard<'_, TextEncoder> {
        // The number of threads is the calling thread's own.
        device::set_threads(self.threads);
        self.encoder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The feature file of some captions, in their order. Batches are of like length, so that little is computed for padding; which
    /// captions share one depends on the captions alone, so that the bytes do not depend on who computes them.
    fn embed(&self, captions: &[String], tell: &Tell) -> Result<(bytes::Bytes, Counts), FeedError> {
        let encoder = self.encoder();
        let there: Vec<usize> = (0..captions.len()).filter(|row| !captions[*row].is_empty()).collect();
        let texts: Vec<&str> = there.iter().map(|row| captions[*row].as_str()).collect();
        let lengths = if texts.is_empty() { Vec::new() } else { encoder.lengths(&texts)? };
        let mut by_length: Vec<(usize, usize)> = lengths.into_iter().zip(there).collect();
        by_length.sort_unstable();
        let mut spool = FeatureSpool::new(&self.spec, captions.len())?;
        let mut counts = Counts::from([("embedded".to_owned(), 0), ("absent".to_owned(), (captions.len() - by_length.len()) as u64)]);
        for group in by_length.chunks(self.batch.max(1)) {
            if tell.stopped() {
                return Err(FeedError::Died);
            }
            let texts: Vec<&str> = group.iter().map(|(_, row)| captions[*row].as_str()).collect();
            for ((_, row), (features, tokens)) in group.iter().zip(encode(&encoder, &self.spec, &texts, &mut counts)?) {
                spool.put(*row, &features, tokens)?;
            }
            tell.samples(group.len() as u64);
        }
        Ok((spool.finish()?, counts))
    }
}

/// The stored features and tokens of some captions, as one batch.
fn encode(encoder: &TextEncoder, spec: &FeatureSpec, texts: &[&str], counts: &mut Counts) -> Result<Vec<(Vec<u8>, u32)>, FeedError> {
    let rows = encoder.encode(texts)?;
    let kept: usize = rows.tokens.iter().sum();
    let computed = (rows.features.size()[0] * rows.features.size()[1]) as u64;
    for (name, count) in [
        ("embedded", texts.len() as u64),
        ("truncated", rows.truncated as u64),
        ("tokens_kept", kept as u64),
        ("tokens_computed", computed),
    ] {
        *counts.entry(name.to_owned()).or_default() += count;
    }
    let features = rows.features.f_to_kind(stored_kind(spec.dtype))?.f_to_device(Device::Cpu)?;
    let row = |(at, tokens): (usize, &usize)| {
        let tokens = *tokens as u32;
        Ok((row_bytes(&features.f_get(at as i64)?, tokens, spec)?, tokens))
    };
    rows.tokens.iter().enumerate().map(row).collect()
}

/// The positions that are stored of one caption's features `[S, E]`, little-endian.
fn row_bytes(row: &Tensor, tokens: u32, spec: &FeatureSpec) -> Result<Vec<u8>, tch::TchError> {
    let row = row.f_narrow(0, 0, i64::from(spec.stored_tokens(tokens)))?.f_contiguous()?;
    let mut bytes = vec![0u8; row.numel() * spec.dtype.bytes()];
    row.f_copy_data_u8(&mut bytes, row.numel())?;
    Ok(bytes)
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
        if error.is_permanent() { Self::permanent(error) } else { Self::passing(error) }
    }
}

impl From<NoDevice> for JobError {
    fn from(error: NoDevice) -> Self {
        Self::passing(error)
    }
}
