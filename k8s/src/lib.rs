//! ella in a Kubernetes cluster: its manifests, and what makes them for a run.
//!
//! `base`, `components` and `overlays` beside this crate's source are Kustomize folders: base is a whole run, each component changes it in one way,
//! and each overlay is base with a component, for `kubectl apply -k`. The same files are built into this crate, and [`render`] applies a
//! run's config to them.

#[cfg(feature = "client")]
pub mod client;
mod error;
mod files;
mod kustomize;
mod naming;
mod options;
mod patch;
mod places;
mod render;
mod workers;

pub use error::RenderError;
pub use files::{FILES, overlays};
pub use kustomize::{KustomizeError, build};
pub use options::{Options, Volume};
pub use render::{CLUSTER_SCOPED, Rendered, render};
