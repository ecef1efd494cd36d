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

#[cfg(test)]
mod tests {
    use super::*;
    use ella_proto::config::job_keys;
    use serde_json::{Value, to_value};
    use std::mem::discriminant;

    /// Whether both have the same keys, and values of the same kind for each.
    fn alike(a: &Value, b: &Value) -> bool {
        match (a, b) {
            (Value::Object(a), Value::Object(b)) => a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| alike(a, b))),
            _ => discriminant(a) == discriminant(b) && a.is_f64() == b.is_f64(),
        }
    }

    #[test]
    fn coordinators_know_all_keys_of_every_kind() {
        let full = [
            (JobKind::Prepare, to_value(prepare::PrepareSettings::full())),
            (JobKind::Embed, to_value(embed::EmbedSettings::full())),
            (JobKind::Caption, to_value(caption::CaptionSettings::full())),
            (JobKind::Draw, to_value(grids::DrawSettings::full())),
        ];
        assert_eq!(full.len(), KINDS.len());
        for (kind, full) in full {
            let (full, known) = (full.unwrap(), to_value(job_keys::known(kind)).unwrap());
            assert!(alike(&full, &known), "{kind}: {full}\n{known}");
        }
    }
}
