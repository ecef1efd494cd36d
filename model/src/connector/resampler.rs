//! The resampler: learned latents that attend to the text through perceiver blocks; with a time embedding it is the TSC's body.

use tch::{Kind, Tensor};

use super::ConnectorConfig;
use super::block::Block;
use super::chain::Chain;
use super::linear::Linear;
use crate::error::Result;
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

    /// `text_features` `[B, S, E]`, `time` `[B, T]` after SiLU for kinds that know it, `key_mask` `[B, S]` true where a token may be attended to;
    /// to `[B, L, D]` of the features' kind. A chain's first segment is what comes before the blocks; then each block is one.
    ///
    /// What passes by the blocks is float32 whatever they compute in, as the sums of a residual network should be. `attention` gets that of each block
    /// ([`Block::attention`]).
    pub(super) fn forward(
        &self,
        text_features: &Tensor,
        time: Option<&Tensor>,
        key_mask: Option<&Tensor>,
        chain: &mut Chain,
        mut attention: Option<&mut Vec<Tensor>>,
    ) -> Result<Tensor> {
        let kind = text_features.f_kind()?;
        let x = chain.share(self.proj_in.forward(text_features)?)?; // [B, S, D]
        let mask = key_mask.map(|mask| self.mask(mask)).transpose()?;
        let latents = self.latents.f_unsqueeze(0)?;
        let latents = match self.time_aware.as_ref().zip(time) {
            Some((linear, time)) => latents.f_add(&linear.forward(time)?.f_unsqueeze(1)?)?, // [B, 1, D]
            None => latents.f_expand([x.size3()?.0, -1, -1], false)?,
        }; // [B, L, D]
        let time = time.map(|time| chain.share(time.shallow_clone())).transpose()?;
        let mut latents = chain.end(latents.f_to_kind(Kind::Float)?)?;
        for (number, block) in self.blocks.iter().enumerate() {
            if let Some(attention) = attention.as_deref_mut() {
                attention.push(block.attention(&latents, &x, time.as_ref(), mask.as_ref())?);
            }
            let made = block.forward(&latents, &x, time.as_ref(), mask.as_ref())?;
            let is_last = number + 1 == self.blocks.len();
            latents = chain.end(if is_last { made.f_to_kind(kind)? } else { made })?;
        }
        Ok(latents)
    }

    /// `[B, S]` true where attended, to `[B, 1, 1, L + S]`; the latents themselves are always seen.
    fn mask(&self, key_mask: &Tensor) -> Result<Tensor> {
        let (b, _) = key_mask.size2()?;
        let (l, _) = self.latents.size2()?;
        let latents = Tensor::f_ones([b, l], (Kind::Bool, key_mask.device()))?;
        Ok(Tensor::f_cat(&[&latents, key_mask], 1)?.f_unsqueeze(1)?.f_unsqueeze(1)?)
    }
}
