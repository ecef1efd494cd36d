//! `ella caption` as a job: a new column of captions for a data set, shard by shard, asked of a model at an endpoint.

use async_trait::async_trait;
use ella_dataset::{CaptionSet, CaptionSpec, DataError, DataSet, Made};
use ella_proto::config::{Device, JobConfig};
use futures::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::runtime::Handle;

use super::config::full;
use super::{CaptionClient, CaptionConfig, CaptionFailure, Captioned, EndpointError, Probe, Refused};
use crate::job::{Job, JobError, PLAN, Tell};

/// The settings of a caption job: `[caption]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptionSettings {
    /// The new column's name.
    pub column: String,
    /// The data set's own column that the prompt may show as `{caption}`; left out: the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shown: Option<String>,
    /// What is asked of which endpoint.
    pub ask: CaptionConfig,
}

impl CaptionSettings {
    pub(crate) fn full() -> Self {
        Self { column: String::new(), shown: Some(String::new()), ask: full() }
    }

    /// What decides the captions.
    fn spec(&self) -> CaptionSpec {
        let mut made_by = self.ask.binding();
        made_by.insert("shown".to_owned(), json!(self.shown));
        CaptionSpec { column: self.column.clone(), made_by: made_by.into() }
    }
}

/// Makes the job of a config. It blocks, in a tokio runtime.
pub fn make(config: &JobConfig, _: Device) -> Result<Box<dyn Job>, JobError> {
    let settings = config.settings(&CaptionSettings::full()).map_err(JobError::permanent)?;
    settings.ask.check("[caption.ask]").map_err(JobError::permanent)?;
    Ok(Box::new(Handle::current().block_on(CaptionJob::open(&config.job.data, &settings))?))
}

/// Captions a data set's pictures.
#[derive(Debug)]
pub struct CaptionJob {
    data: DataSet,
    set: CaptionSet,
    shown: usize,
    client: CaptionClient,
}

impl CaptionJob {
    /// Opens the data set, and begins or goes on with the column.
    pub async fn open(data: &str, settings: &CaptionSettings) -> Result<Self, JobError> {
        let data = DataSet::open(data).await?;
        let url = data.store().url();
        if !data.manifest().has_images() {
            return Err(JobError::permanent(format!(
                "{url}: it holds no pictures to caption; prepare it with pictures (--format jpeg or webp)"
            )));
        }
        let first = || data.manifest().captions.first().map(|column| column.name.clone()).unwrap_or_default();
        let name = settings.shown.clone().unwrap_or_else(first);
        let known = || data.manifest().captions.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ");
        let none = || DataError::ColumnMissing { data: url.to_owned(), column: name.clone(), known: known() };
        let shown = data.manifest().caption_column(&name).ok_or_else(none)?;
        let set = CaptionSet::begin(data.store(), data.shared_manifest(), settings.spec()).await?;
        let client = CaptionClient::new(settings.ask.clone()).map_err(JobError::permanent)?;
        Ok(Self { data, set, shown, client })
    }

    /// Pictures that have no caption in the column yet.
    pub async fn left(&self) -> Result<u64, DataError> {
        let rows = |shard: usize| self.data.manifest().shards.get(shard).map_or(0, |shard| shard.rows);
        Ok(self.set.missing().await?.into_iter().map(rows).sum())
    }

    /// Mean words of the captions that the prompt may show, on the first shard.
    pub async fn existing_words(&self) -> Result<u64, DataError> {
        let shard = self.data.shard(0).await?;
        let words = (0..shard.rows()).map(|row| Ok(shard.caption(row, self.shown)?.split_whitespace().count() as u64));
        let words: Vec<u64> = words.collect::<Result<_, DataError>>()?;
        Ok(words.iter().sum::<u64>() / (words.len() as u64).max(1))
    }

    /// Asks for one picture's caption, before all others are asked for.
    pub async fn probe(&self) -> Result<Probe, JobError> {
        let shard = self.data.shard(0).await?;
        let image = shard.row(0)?.image.unwrap_or_default();
        Ok(self.client.probe(image, shard.caption(0, self.shown)?).await?)
    }

    async fn shard(&self, index: usize, tell: &Tell) -> Result<(), JobError> {
        let shard = self.data.shard(index).await?;
        let rows = (0..shard.rows()).map(|row| Ok((shard.row(row)?.image.unwrap_or_default(), shard.caption(row, self.shown)?)));
        let rows: Vec<(&[u8], &str)> = rows.collect::<Result<_, DataError>>()?;
        let keys: Vec<String> = shard.iter().map(|row| row.key.to_owned()).collect();
        let rows = &rows;
        let ask = |row: usize| async move { self.client.caption(rows[row].0, rows[row].1).await };
        let mut asked = stream::iter(0..rows.len()).map(ask).buffered(self.client.config().concurrency);
        let mut made = Vec::with_capacity(rows.len());
        while let Some(answer) = asked.next().await {
            made.push(taken(answer)?);
            tell.samples(1);
        }
        // Of an earlier attempt's file, if that stands.
        let counts = self.set.write(index, &keys, &made).await?;
        counts.iter().for_each(|(name, count)| tell.count(name, *count));
        // What was tried again is no property of the captions: only whoever watches is told.
        for (kind, count) in self.client.take_passing() {
            tell.count(&format!("retried.{kind}"), count);
        }
        Ok(())
    }
}

/// A caption; an empty one, with its reason, for a picture that is to have none.
fn taken(answer: Result<Captioned, CaptionFailure>) -> Result<Made, EndpointError> {
    let (made, usage) = match answer {
        Ok(Captioned { caption, trimmed, usage }) => (Made { caption, trimmed, ..Made::default() }, usage),
        Err(CaptionFailure::Refused(Refused { why, detail, usage })) => {
            (Made { refused: Some((why.to_string(), detail)), ..Made::default() }, usage)
        }
        Err(CaptionFailure::Endpoint(error)) => return Err(error),
    };
    Ok(Made { input_tokens: usage.input_tokens, output_tokens: usage.output_tokens, ..made })
}

impl From<EndpointError> for JobError {
    fn from(error: EndpointError) -> Self {
        if error.passes() { Self::passing(error) } else { Self::permanent(error) }
    }
}

#[async_trait]
impl Job for CaptionJob {
    async fn unit(&self, unit: &str, tell: &Tell) -> Result<Vec<String>, JobError> {
        let finish = || vec!["finish".to_owned()];
        match unit.split_once(' ').map_or((unit, None), |(name, number)| (name, number.parse().ok())) {
            (PLAN, None) => {
                let missing = self.set.missing().await?;
                Ok(if missing.is_empty() { finish() } else { missing.into_iter().map(|shard| format!("shard {shard}")).collect() })
            }
            ("shard", Some(shard)) => self.shard(shard, tell).await.map(|()| finish()),
            ("finish", None) => {
                self.set.finish().await?;
                Ok(Vec::new())
            }
            _ => Err(JobError::permanent(format!("no unit of captioning has the name {unit:?}; use workers of one version"))),
        }
    }
}
