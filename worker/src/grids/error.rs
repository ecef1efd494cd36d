//! Why a set of prompts cannot be drawn.

use ella_dataset::DataError;
use ella_model::ModelError;
use ella_proto::config::ConfigError;
use ella_store::StoreError;

use crate::device::NoDevice;
use crate::gpu::fault::{Fault, first_line};
use crate::job::JobError;

/// Why a set of prompts cannot be drawn, or one of them.
#[derive(Debug, thiserror::Error)]
pub enum DrawError {
    /// The prompts, or where the pictures go.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A model that was named.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device to compute on.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// A setting outside its rule.
    #[error(transparent)]
    Setting(#[from] ConfigError),
    /// The folder that the pictures go to holds something else.
    #[error("{file}: {what}")]
    Folder {
        /// The file that says so.
        file: String,
        /// What it says, and what to do.
        what: String,
    },
    /// The folder's pictures are drawn on another kind of device than this worker's.
    #[error("{file}: these pictures are drawn on {theirs}, and this worker computes on {own}; use --device, or another folder")]
    OtherDevice {
        /// The folder's record.
        file: String,
        /// What they are drawn on.
        theirs: String,
        /// What this worker has.
        own: String,
    },
    /// The worker leaves.
    #[error("this worker leaves")]
    Leaves,
}

impl DrawError {
    /// Whether what was typed is at fault.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Setting(_) => true,
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
            Self::Setting(_) | Self::Folder { .. } | Self::Device(_) => true,
            Self::OtherDevice { .. } | Self::Leaves => false,
        }
    }
}

impl From<StoreError> for DrawError {
    fn from(error: StoreError) -> Self {
        Self::Data(error.into())
    }
}

impl From<tch::TchError> for DrawError {
    fn from(error: tch::TchError) -> Self {
        Self::Model(error.into())
    }
}

impl From<DrawError> for JobError {
    fn from(error: DrawError) -> Self {
        match error {
            DrawError::Data(error) => error.into(),
            DrawError::Model(error) => of_model(&error),
            DrawError::Setting(_) => Self::permanent(error).alone(true, true),
            DrawError::Folder { .. } => Self::permanent(error),
            // Others may have the device.
            DrawError::Device(_) => Self::passing(error).alone(false, true),
            DrawError::OtherDevice { .. } | DrawError::Leaves => Self::passing(error),
        }
    }
}

/// Others may have the model, or a GPU that works.
fn of_model(error: &ModelError) -> JobError {
    match Fault::of(error) {
        Some(fault) if fault.ends_the_process() => {
            JobError::passing(format_args!("{}: {}", first_line(error), fault.hint())).of_a_broken_worker()
        }
        Some(_) => JobError::passing(format_args!("{}: use a smaller --batch, or --dtype fp16 or bf16", first_line(error))),
        None => JobError::of_model(error),
    }
}
