//! The manifests: what Kubernetes takes, what policies ask for, and what a rendering is.
#![allow(clippy::unwrap_used)]

mod common;
mod policies;
mod render;
mod types;
