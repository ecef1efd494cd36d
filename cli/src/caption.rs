//! `ella caption`: a new column of captions for a data set's pictures, from a multimodal model at an OpenAI-compatible endpoint.

use std::path::PathBuf;

use clap::Args;
use ella_dataset::{CaptionSet, CaptionStats, Counts, DataSet, REPORT, Tokens, caption_stats};
use ella_proto::config::{Device, JobConfig, JobKind, JobTable};
use ella_worker::caption::{CaptionConfig, CaptionJob, CaptionSettings, Estimate, Work};
use serde_json::json;

use crate::jobs::Who;
use crate::ui::{DONE, Fail, Out, USAGE, note};

/// Captions of which the statistics are told.
const COUNTED: usize = 50_000;

#[derive(Debug, Args)]
pub(crate) struct Caption {
    /// A prepared data set with pictures (path or URL)
    data: String,
    /// The new column's name
    #[arg(long, default_value = "dense", value_name = "NAME")]
    column: String,
    /// What is asked of which endpoint: a TOML table with endpoint, model, prompt and more
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set or override one key of it, as in --set endpoint=http://host:8000/v1; may be given more than once
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The data set's own column that the prompt may show as {caption} [default: the first]
    #[arg(long, value_name = "NAME")]
    shown: Option<String>,
    /// Only say what it will take, by one request
    #[arg(long)]
    estimate: bool,
    #[command(flatten)]
    who: Who,
}

impl Caption {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let settings = self.settings()?;
        let config = JobConfig::new(JobTable::new(JobKind::Caption, self.data.clone()), &settings)?;
        if self.who.is_elsewhere() {
            return Ok(self.who.conclude(&self.who.run(&config, Device::Cpu)?, &config, out));
        }
        let runtime = crate::runtime()?;
        let estimate = runtime.block_on(self.reckon(&settings))?;
        match &estimate {
            Some(estimate) if self.estimate => {
                out.result(estimate, || estimate.to_string());
                return Ok(DONE);
            }
            Some(estimate) => note(estimate),
            None => note("every picture has its caption already"),
        }
        let ran = self.who.run(&config, Device::Cpu)?;
        if ran.code != DONE {
            return Ok(self.who.conclude(&ran, &config, out));
        }
        let results = ran.status.and_then(|status| status.job).map(|job| job.results).unwrap_or_default();
        let (counts, report, stats) = runtime.block_on(self.made())?;
        let told = json!({
            "data": self.data, "column": self.column, "counts": counts, "report": report, "results": results, "captions": stats,
        });
        out.result(&told, || {
            let line = |(name, count): (&String, &u64)| format!("{count:>10}  {name}\n");
            let retried = results.iter().filter(|(name, _)| name.starts_with("retried."));
            let mut text: String = counts.iter().chain(retried).map(line).collect();
            if counts.keys().any(|name| name.starts_with("refused.")) {
                text += &format!("every refused key with its reason: {report}\n");
            }
            format!("{text}\n{stats}\ncolumn: {}, for ella embed --caption {0} and data.captions", self.column)
        });
        Ok(DONE)
    }

    fn settings(&self) -> Result<CaptionSettings, Fail> {
        let text = match &self.config {
            Some(file) => std::fs::read_to_string(file).map_err(|error| Fail { code: USAGE, ..Fail::io(file, "read", &error) })?,
            None => String::new(),
        };
        let origin = self.config.as_ref().map_or_else(|| "ella caption".to_owned(), |file| file.display().to_string());
        let ask = CaptionConfig::parse(&text, &origin, &self.set)?;
        Ok(CaptionSettings { column: self.column.clone(), shown: self.shown.clone(), ask })
    }

    /// What is left to do, as one request shows. None: nothing.
    async fn reckon(&self, settings: &CaptionSettings) -> Result<Option<Estimate>, Fail> {
        let job = CaptionJob::open(&self.data, settings).await?;
        let pictures = job.left().await?;
        if pictures == 0 {
            return Ok(None);
        }
        let probe = job.probe().await?;
        let work = Work { pictures, existing_words: job.existing_words().await?, workers: u64::from(self.who.workers()) };
        Ok(Some(Estimate::new(&settings.ask, work, Some(&probe))))
    }

    /// What the whole column counts, where its report is, and what its captions are like.
    async fn made(&self) -> Result<(Counts, String, CaptionStats), Fail> {
        let data = DataSet::open(&self.data).await?;
        let set = CaptionSet::find(data.store(), data.shared_manifest(), &self.column).await?;
        let report = format!("{}/captions/{}/{REPORT}", data.store().url(), self.column);
        Ok((set.finish().await?.counts, report, column_stats(&data, &self.column, None).await?))
    }
}

/// What the captions of a column are like, on the first ones.
pub(crate) async fn column_stats(data: &DataSet, column: &str, tokens: Option<Tokens<'_>>) -> Result<CaptionStats, Fail> {
    let mut captions = Vec::new();
    for shard in 0..data.manifest().shards.len() {
        captions.extend(data.captions(column, shard).await?.into_iter().filter(|caption| !caption.is_empty()));
        if captions.len() >= COUNTED {
            break;
        }
    }
    Ok(caption_stats(captions.iter().take(COUNTED), tokens))
}
