//! The kinds of job that a worker can do, in one place.

use super::{Job, JobError};
use crate::{caption, embed, grids, prepare};
use ella_proto::config::{Device, JobConfig, JobKind};

/// Makes a kind's job from its config, to compute on a device. It may block: it has a thread of its own.
pub type Make = fn(&JobConfig, Device) -> Result<Box<dyn Job>, JobError>;

/// Every kind that this build can do.
const KINDS: &[(JobKind, Make)] =
    &[(JobKind::Prepare, prepare::make), (JobKind::Embed, embed::make), (JobKind::Caption, caption::make), (JobKind::Draw, grids::make)];

/// Makes the job of a config.
///
/// # Errors
/// If this build cannot do its kind, or the kind refuses its settings.
pub fn make(config: &JobConfig, device: Device) -> Result<Box<dyn Job>, JobError> {
    let kind = config.job.kind;
    match KINDS.iter().find(|(known, _)| *known == kind) {
        Some((_, make)) => make(config, device),
        None => Err(JobError::permanent(format!("this build of ella-worker cannot do {kind} jobs"))),
    }
}
