//! The pooled head: from the states to the one vector that SDXL takes beside them.
//!
//! CLIP's `AttentionPool2d` (<https://github.com/openai/CLIP/blob/main/clip/model.py>) over a sequence, as the paper's author says of
//! the SDXL connector (paper §1.3): the states' mean attends to itself and to all states.

use ella_cuda::speed::attend;
use tch::Tensor;

use super::linear::Linear;
use super::{ConnectorConfig, ConnectorKind};
use crate::error::Result;
use crate::params::{Init, Params};

/// The head, under the key `pool`. The official code never had it; the names below are `AttentionPool2d`'s.
#[derive(Debug)]
pub(super) struct Pool {
    /// Of the mean, then of each state: `[1 + L, D]`. An MLP's states are tokens, of any number, and have none.
    positional_embedding: Option<Tensor>,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    c_proj: Linear,
    heads: i64,
}

impl Pool {
    /// To `pooled` channels. Initial values are CLIP's: weights and positions normal with deviation 1/√D, biases PyTorch's default.
    pub(super) fn new(p: &Params, config: &ConnectorConfig, pooled: i64) -> Result<Self> {
        let ConnectorConfig { kind, width, latents, heads, .. } = *config;
        let std = (width as f64).powf(-0.5);
        let init = (Init::Normal { std }, Init::Uniform { bound: std });
        let linear = |name, output| Linear::with_init(&p.at(name), width, output, init);
        let positions = || p.get("positional_embedding", &[1 + latents, width], Init::Normal { std });
        Ok(Pool {
            positional_embedding: (kind != ConnectorKind::Mlp).then(positions).transpose()?,
            q_proj: linear("q_proj", width)?,
            k_proj: linear("k_proj", width)?,
            v_proj: linear("v_proj", width)?,
            c_proj: linear("c_proj", pooled)?,
            heads,
        })
    }

    /// `[B, L, D]` to `[B, P]`.
    pub(super) fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let mean = states.f_mean_dim(1i64, true, None)?; // [B, 1, D]
        let mut x = Tensor::f_cat(&[&mean, states], 1)?; // [B, 1 + L, D]
        if let Some(positions) = &self.positional_embedding {
            x = x.f_add(&positions.f_to_kind(x.f_kind()?)?)?;
        }
        let query = self.q_proj.forward(&x.f_narrow(1, 0, 1)?)?;
        let mixed = attend(&query, &self.k_proj.forward(&x)?, &self.v_proj.forward(&x)?, self.heads)?; // [B, 1, D]
        self.c_proj.forward(&mixed.f_squeeze_dim(1)?)
    }
}
