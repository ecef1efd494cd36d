//! The resampler: learned latents that attend to the text through perceiver blocks; with a time embedding it is the TSC's body.

use tch::{Kind, Tensor};

use super::ConnectorConfig;
use super::block::Block;
use crate::error::Result;
use crate::layers::Linear;
use crate::params::{Init, Params};

/// The network, under the key `connector`.
#[derive(Debug)]
pub(super) struct Resampler {
    latents: Tensor,
    /// For kinds that know the timestep.
    time_aware: Option<Linear>,
    proj_in: Linear,
    blocks: Vec<Block>,
}

impl Resampler {
    pub(super) fn new(p: &Params, config: &ConnectorConfig) -> Result<Self> {
        let ConnectorConfig { kind, width, text_width, time_embed_dim, .. } = *config;
        let latents = p.get("latents", &[config.latents, width], Init::Normal { std: (width as f64).powf(-0.5) })?;
        // Its bias starts at zero, as in the first published model.py (commit b7c2202).
        let init = (Init::KaimingUniform, Init::Zeros);
        let time_aware = || Linear::with_init(&p.at("time_aware_linear"), time_embed_dim, width, init);
        let time_aware = kind.is_timed().then(time_aware).transpose()?;
        let proj_in = Linear::new(&p.at("proj_in"), text_width, width)?;
        let block = |n| Block::new(&p.at("perceiver_blocks").at(n), config);
        let blocks = (0..config.layers).map(block).collect::<Result<_>>()?;
        Ok(Resampler { latents, time_aware, proj_in, blocks })
    }

    /// `text_features` `[B, S, E]`, `time` `[B, T]` after SiLU for kinds that know it, `key_mask` `[B, S]` true where attended; to
    /// `[B, L, D]`.
    pub(super) fn forward(&self, text_features: &Tensor, time: Option<&Tensor>, key_mask: Option<&Tensor>) -> Result<Tensor> {
        let x = self.proj_in.forward(text_features)?; // [B, S, D]
        let mask = key_mask.map(|mask| self.mask(mask)).transpose()?;
        let mut latents = match self.time_aware.as_ref().zip(time) {
            Some((linear, time)) => {
                let start = linear.forward(time)?.f_unsqueeze(1)?; // [B, 1, D]
                self.latents.f_unsqueeze(0)?.f_add(&start)?
            }
            None => self.latents.f_unsqueeze(0)?.f_expand([x.size3()?.0, -1, -1], false)?,
        }; // [B, L, D]
        for block in &self.blocks {
            latents = block.forward(&latents, &x, time, mask.as_ref())?;
        }
        Ok(latents)
    }

    /// `[B, S]` true where attended, to `[B, 1, 1, L + S]` true where hidden; the latents themselves are always seen.
    fn mask(&self, key_mask: &Tensor) -> Result<Tensor> {
        let (b, _) = key_mask.size2()?;
        let (l, _) = self.latents.size2()?;
        let latents = Tensor::f_zeros([b, l], (Kind::Bool, key_mask.device()))?;
        Ok(Tensor::f_cat(&[latents, key_mask.f_logical_not()?], 1)?.f_unsqueeze(1)?.f_unsqueeze(1)?)
    }
}
