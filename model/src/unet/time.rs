//! The time embedding, and the conditions that SDXL adds to it: the pooled text and the micro-conditioning.
//!
//! diffusers 0.42: `models/embeddings.py` (`Timesteps`, `TimestepEmbedding`), `models/unets/unet_2d_condition.py` (`get_aug_embed`).

use tch::{Kind, Tensor};

use super::{UNetConfig, misshapen};
use crate::error::{ModelError, Result};
use crate::layers::{Linear, silu, sinusoid};
use crate::params::Params;

/// What a U-Net with `addition_embed_type = "text_time"` is told of a sample besides its text features.
#[derive(Debug)]
pub struct Added {
    /// The pooled text, [B, P].
    pub text_embeds: Tensor,
    /// [B, N], floats or integers. For SDXL N is 6: height and width of the original picture, top and left of the crop, height and width of
    /// what is made; all in pixels.
    pub time_ids: Tensor,
}

/// The sizes of what is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddedConfig {
    /// Width of the sinusoid of each of the `time_ids` (`addition_time_embed_dim`).
    pub time_width: i64,
    /// Width of the pooled text and all those sinusoids together (`projection_class_embeddings_input_dim`).
    pub input_width: i64,
}

impl AddedConfig {
    /// Refuses conditions that do not fit this, or that are missing or surplus, for `batch` samples.
    pub(super) fn check(config: Option<&Self>, added: Option<&Added>, batch: i64) -> Result<()> {
        let refuse = |expected: &str, found: &str| Err(ModelError::argument("text_embeds and time_ids", expected, found));
        let (config, added) = match (config, added) {
            (None, None) => return Ok(()),
            (Some(config), Some(added)) => (config, added),
            (Some(_), None) => return refuse("given, because the U-Net's addition_embed_type is \"text_time\"", "neither"),
            (None, Some(_)) => return refuse("left out, because the U-Net has no addition_embed_type", "both"),
        };
        let width = match added.time_ids.size()[..] {
            [b, count] if b == batch && count > 0 => config.input_width - count * config.time_width,
            _ => return Err(misshapen("time_ids", format!("[{batch}, 6]"), &added.time_ids)),
        };
        if width < 1 {
            let most = (config.input_width - 1) / config.time_width;
            return Err(misshapen("time_ids", format!("[{batch}, N] with N at most {most}"), &added.time_ids));
        }
        if added.text_embeds.size() != [batch, width] {
            let expected = format!("[{batch}, {width}] beside time_ids {:?}", added.time_ids.size());
            return Err(misshapen("text_embeds", expected, &added.text_embeds));
        }
        Ok(())
    }
}

/// Two linear layers with a SiLU between: the reference's `TimestepEmbedding`.
#[derive(Debug)]
struct Mlp {
    linear_1: Linear,
    linear_2: Linear,
}

impl Mlp {
    fn new(p: &Params, input: i64, output: i64) -> Result<Self> {
        Ok(Self { linear_1: Linear::new(&p.at("linear_1"), input, output)?, linear_2: Linear::new(&p.at("linear_2"), output, output)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&silu(&self.linear_1.forward(x)?)?)
    }
}

/// From timesteps, and what is added to them, to what every residual block takes.
#[derive(Debug)]
pub(super) struct TimeEmbedding {
    time: Mlp,
    added: Option<(AddedConfig, Mlp)>,
    channels: i64,
    cosines_first: bool,
    shift: i64,
}

impl TimeEmbedding {
    pub(super) fn new(config: &UNetConfig, p: &Params) -> Result<Self> {
        let channels = config.block_out_channels[0];
        let mlp = |name, input| Mlp::new(&p.at(name), input, config.time_embed_dim);
        Ok(Self {
            time: mlp("time_embedding", channels)?,
            added: config.added.map(|added| mlp("add_embedding", added.input_width).map(|mlp| (added, mlp))).transpose()?,
            channels,
            cosines_first: config.flip_sin_to_cos,
            shift: config.freq_shift,
        })
    }

    /// `timesteps` `[B]` to [B, T] of `kind`, activated: every residual block would do that, so it is done once.
    pub(super) fn forward(&self, timesteps: &Tensor, added: Option<&Added>, kind: Kind) -> Result<Tensor> {
        let mut time = self.time.forward(&self.sinusoid(timesteps, self.channels)?.f_to_kind(kind)?)?;
        if let (Some((config, mlp)), Some(Added { text_embeds, time_ids })) = (&self.added, added) {
            let sizes = self.sinusoid(&time_ids.f_flatten(0, 1)?, config.time_width)?; // [B N, A]
            let sizes = sizes.f_reshape([time_ids.size()[0], -1])?; // [B, N A]
            let both = Tensor::f_cat(&[text_embeds.f_to_kind(kind)?, sizes.f_to_kind(kind)?], 1)?;
            time = time.f_add(&mlp.forward(&both)?)?;
        }
        silu(&time)
    }

    fn sinusoid(&self, values: &Tensor, channels: i64) -> Result<Tensor> {
        sinusoid(values, channels, self.cosines_first, self.shift)
    }
}
