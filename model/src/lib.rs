//! The networks, in tch: connectors, U-Net, text encoders, VAE, diffusion schedules, and the files they live in.
//!
//! `error`, `weights`, `params`, `config`, `layers` and `rng` are the ground that every network stands on. A network is a
//! configuration, a constructor over [`params::Params`] whose tensor names are the checkpoint's, and a `forward`.

pub mod base;
mod bpe;
pub mod clip;
pub mod clip_tokenizer;
pub mod config;
pub mod connector;
pub mod cost;
pub mod decoder;
pub mod decoder_tokenizer;
pub mod detector;
pub mod error;
pub mod forward;
pub mod layers;
pub mod ldm;
pub mod lora;
pub mod memory;
pub mod params;
pub mod part;
pub mod presets;
pub mod rng;
pub mod sampler;
pub mod schedule;
mod special_tokens;
pub mod t5;
pub mod text;
pub mod tokenizer;
pub mod unet;
pub mod unigram;
pub mod vae;
pub mod weights;

pub use error::{ModelError, Result};
