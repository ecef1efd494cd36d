//! The units of preparing a data set: `plan`, then each part, then `resolve` (keys that sources share, and duplicates), then the parts that
//! hold duplicates again, then `finish`.

use std::sync::Mutex;
use std::sync::PoisonError;

use async_trait::async_trait;
use ella_dataset::{DataError, Preparation, Report, UnitWatch};
use ella_proto::config::{Device, JobConfig};
use ella_store::Store;
use tokio::runtime::Handle;

use super::{PrepareError, PrepareSettings};
use crate::job::{Job, JobError, PLAN, Tell};

/// The job's config, in the data set's folder: how the data set can be prepared again.
pub const CONFIG: &str = "prepare.toml";

/// Prepares a data set, unit by unit.
#[derive(Debug)]
pub struct PrepareJob {
    preparation: Preparation,
    out: Store,
    config: String,
}

/// Makes the job of a config. It blocks, in a tokio runtime.
pub fn make(config: &JobConfig, device: Device) -> Result<Box<dyn Job>, JobError> {
    let settings = config.settings(&PrepareSettings::full()).map_err(JobError::permanent)?;
    let models = settings.load(device)?;
    let preparation = Handle::current().block_on(settings.preparation(&config.job.data, models));
    let out = Store::open(&config.job.data).map_err(DataError::from)?;
    Ok(Box::new(PrepareJob { preparation: preparation?, out, config: config.to_toml() }))
}

impl From<PrepareError> for JobError {
    fn from(error: PrepareError) -> Self {
        match error {
            PrepareError::Data(error) => error.into(),
            // Another machine may have the model, or the device.
            PrepareError::Model(error) => Self::of_model(&error),
            PrepareError::Device(_) => Self::passing(error).alone(false, true),
            PrepareError::Gpu(_) => Self::passing(error),
            PrepareError::Usage(_) => Self::permanent(error).alone(true, true),
            PrepareError::Digest(_) | PrepareError::KeyList { .. } => Self::permanent(error),
        }
    }
}

impl From<DataError> for JobError {
    fn from(error: DataError) -> Self {
        let (usage, permanent) = (error.is_usage(), error.is_permanent());
        if permanent { Self::permanent(error).alone(usage, permanent) } else { Self::passing(error) }
    }
}

enum Unit {
    Plan,
    Part(usize),
    Check(usize),
    Resolve,
    Again(usize),
    Finish,
}

impl Unit {
    fn parse(text: &str) -> Option<Self> {
        let (name, number) = text.split_once(' ').map_or((text, None), |(name, number)| (name, number.parse().ok()));
        match (name, number) {
            (PLAN, None) => Some(Self::Plan),
            ("part", Some(part)) => Some(Self::Part(part)),
            ("check", Some(part)) => Some(Self::Check(part)),
            ("resolve", None) => Some(Self::Resolve),
            ("again", Some(part)) => Some(Self::Again(part)),
            ("finish", None) => Some(Self::Finish),
            _ => None,
        }
    }
}

#[async_trait]
impl Job for PrepareJob {
    async fn unit(&self, unit: &str, tell: &Tell) -> Result<Vec<String>, JobError> {
        let unknown = || JobError::permanent(format!("no unit of preparing has the name {unit:?}; use workers of one version"));
        let one = |unit: &str| vec![unit.to_owned()];
        match Unit::parse(unit).ok_or_else(unknown)? {
            Unit::Plan => {
                let todo = self.preparation.plan().await?;
                self.out.put(CONFIG, self.config.clone().into()).await.map_err(DataError::from)?;
                let units =
                    todo.parts.iter().map(|part| format!("part {part}")).chain(todo.check.iter().map(|part| format!("check {part}")));
                Ok(Some(units.collect::<Vec<_>>()).filter(|units| !units.is_empty()).unwrap_or_else(|| one("resolve")))
            }
            Unit::Part(part) => {
                let record = self.watched(tell, |watch| self.preparation.part(part, watch)).await?;
                count(&record.report, tell);
                Ok(one("resolve"))
            }
            Unit::Check(part) => self.preparation.check(part).await.map(|()| one("resolve")).map_err(JobError::from),
            Unit::Resolve => {
                let again: Vec<String> = self.preparation.resolve().await?.into_iter().map(|part| format!("again {part}")).collect();
                Ok(if again.is_empty() { one("finish") } else { again })
            }
            Unit::Again(part) => {
                self.watched(tell, |watch| self.preparation.again(part, watch)).await?;
                Ok(one("finish"))
            }
            Unit::Finish => {
                let report = self.preparation.finish().await?;
                tell.count("prepared", report.kept);
                Ok(Vec::new())
            }
        }
    }
}

impl PrepareJob {
    /// Does a part, telling its samples as they come, and gives up when this worker leaves.
    async fn watched<'a, F, T>(&'a self, tell: &Tell, part: impl FnOnce(UnitWatch) -> F) -> Result<T, JobError>
    where
        F: Future<Output = Result<T, DataError>> + 'a,
    {
        // What is told comes from the part's own threads: the samples read so far.
        let (read, mut told) = tokio::sync::watch::channel(0);
        let read = Mutex::new(read);
        let watch: UnitWatch = Box::new(move |report: &Report| {
            read.lock().unwrap_or_else(PoisonError::into_inner).send_replace(report.read);
        });
        let mut part = std::pin::pin!(part(watch));
        let mut samples = 0;
        loop {
            tokio::select! {
                done = &mut part => return Ok(done?),
                changed = told.changed() => {
                    if changed.is_err() {
                        return Ok(part.await?);
                    }
                    let now = *told.borrow_and_update();
                    tell.samples(now - samples);
                    samples = now;
                }
            }
        }
    }
}

/// What became of a part's samples, by name.
fn count(report: &Report, tell: &Tell) {
    tell.count("read", report.read);
    tell.count("kept", report.kept);
    for (why, refused) in report.counts() {
        tell.count(&format!("refused.{why}"), refused);
    }
}
