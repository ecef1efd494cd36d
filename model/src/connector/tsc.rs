//! The timestep-aware connector (paper §1.1), and its AdaLN-Zero variant (§1.2): a timestep embedding before the resampler.

use tch::Tensor;

use super::ConnectorConfig;
use super::chain::Chain;
use super::linear::Linear;
use super::resampler::Resampler;
use crate::error::Result;
use crate::layers::{silu, timestep_embedding};
use crate::params::Params;

/// The network, under the keys `time_embedding` and `connector`.
#[derive(Debug)]
pub(super) struct Tsc {
    time_channel: i64,
    time: (Linear, Linear),
    resampler: Resampler,
}

impl Tsc {
    pub(super) fn new(p: &Params, config: &ConnectorConfig) -> Result<Self> {
        let ConnectorConfig { time_channel, time_embed_dim, .. } = *config;
        let time = p.at("time_embedding");
        let time = (
            Linear::new(&time.at("linear_1"), time_channel, time_embed_dim)?,
            Linear::new(&time.at("linear_2"), time_embed_dim, time_embed_dim)?,
        );
        Ok(Tsc { time_channel, time, resampler: Resampler::new(&p.at("connector"), config)? })
    }

    /// As [`super::Connector::forward`]; to `[B, L, D]`. The time embedding is made in the kind that its parameters are kept in.
    pub(super) fn forward(
        &self,
        text_features: &Tensor,
        timesteps: &Tensor,
        key_mask: Option<&Tensor>,
        chain: &mut Chain,
        attention: Option<&mut Vec<Tensor>>,
    ) -> Result<Tensor> {
        let sinusoid = timestep_embedding(timesteps, self.time_channel)?.f_to_kind(self.time.0.kind())?;
        let time = self.time.1.forward(&silu(&self.time.0.forward(&sinusoid)?)?)?; // [B, T]
        // Every use of the time embedding passes through SiLU first.
        self.resampler.forward(text_features, Some(&silu(&time)?), key_mask, chain, attention)
    }
}
