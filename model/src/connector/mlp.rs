//! The MLP of paper Table 6: LLaVA's projector, from each token's features to one state.

use tch::Tensor;

use super::ConnectorConfig;
use super::linear::Linear;
use crate::error::Result;
use crate::layers::gelu;
use crate::params::Params;

/// The network, under the key `connector`. The official code never had it; the key names are ours.
#[derive(Debug)]
pub(super) struct Mlp {
    linear_1: Linear,
    linear_2: Linear,
}

impl Mlp {
    pub(super) fn new(p: &Params, config: &ConnectorConfig) -> Result<Self> {
        Ok(Mlp {
            linear_1: Linear::new(&p.at("linear_1"), config.text_width, config.width)?,
            linear_2: Linear::new(&p.at("linear_2"), config.width, config.width)?,
        })
    }

    /// `[B, S, E]` to `[B, S, D]`.
    pub(super) fn forward(&self, text_features: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&gelu(&self.linear_1.forward(text_features)?)?)
    }
}
