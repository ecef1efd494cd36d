//! One perceiver block, and its norms: plain, or led by the timestep.

use ella_cuda::fused;
use tch::{Kind, Tensor};

use super::linear::{Linear, linear};
use super::{ConnectorConfig, ConnectorKind};
use crate::error::Result;
use crate::layers::LayerNorm;
use crate::params::{Init, Params};

/// The epsilon of norms that the timestep leads.
const ADA_EPS: f64 = 1e-6;

/// The epsilon of the resampler's own norms: PyTorch's default, which the official code left as it is.
const PLAIN_EPS: f64 = 1e-5;

/// Latents attend to themselves and the text, then pass an MLP.
#[derive(Debug)]
pub(super) struct Block {
    in_proj: (Tensor, Tensor),
    out_proj: Linear,
    c_fc: Linear,
    c_proj: Linear,
    ln_1: Norm,
    ln_2: Norm,
    ln_ff: Norm,
    /// AdaLN-Zero's: from the time embedding to a factor for each channel of the attention and of the MLP.
    gates: Option<Linear>,
    heads: i64,
}

impl Block {
    pub(super) fn new(p: &Params, config: &ConnectorConfig) -> Result<Self> {
        let (d, t) = (config.width, config.time_embed_dim);
        let (attn, mlp) = (p.at("attn"), p.at("mlp"));
        Ok(Block {
            in_proj: (attn.get("in_proj_weight", &[3 * d, d], Init::XavierUniform)?, attn.get("in_proj_bias", &[3 * d], Init::Zeros)?),
            out_proj: Linear::with_init(&attn.at("out_proj"), d, d, (Init::KaimingUniform, Init::Zeros))?,
            c_fc: Linear::new(&mlp.at("c_fc"), d, 4 * d)?,
            c_proj: Linear::new(&mlp.at("c_proj"), 4 * d, d)?,
            ln_1: Norm::new(&p.at("ln_1"), config)?,
            ln_2: Norm::new(&p.at("ln_2"), config)?,
            ln_ff: Norm::new(&p.at("ln_ff"), config)?,
            gates: (config.kind == ConnectorKind::TscZero).then(|| gates(&p.at("gate_linear"), t, d)).transpose()?,
            heads: config.heads,
        })
    }

    /// `latents` `[B, L, D]` float32, `x` `[B, S, D]` of the kind that is computed in, `time` `[B, T]` after SiLU for kinds that know it, `mask`
    /// `[B, 1, 1, L + S]` true where a key is seen; to `[B, L, D]` float32.
    pub(super) fn forward(&self, latents: &Tensor, x: &Tensor, time: Option<&Tensor>, mask: Option<&Tensor>) -> Result<Tensor> {
        let kind = x.f_kind()?;
        let gates = match self.gates.as_ref().zip(time) {
            Some((linear, time)) => Some(linear.forward(time)?.f_unsqueeze(1)?.f_chunk(2, -1)?), // 2 of [B, 1, D]
            None => None,
        };
        let gated = |x: Tensor, branch: usize| match &gates {
            Some(gates) => x.f_mul(&gates[branch]),
            None => Ok(x),
        };
        let queries = self.ln_1.forward(latents, time, kind)?;
        let text = self.ln_2.forward(x, time, kind)?;
        let latents = latents.f_add(&gated(self.attend(&queries, &text, mask)?, 0)?)?;
        let hidden = self.c_fc.forward(&self.ln_ff.forward(&latents, time, kind)?)?;
        let hidden = self.c_proj.forward(&hidden.f_relu()?.f_square()?)?; // squared ReLU
        Ok(latents.f_add(&gated(hidden, 1)?)?)
    }

    /// How much each query looks at each key, the latents first and then the text, of the mean over heads: `[B, L, L + S]` float32. Inputs are
    /// those of [`Block::forward`].
    pub(super) fn attention(&self, latents: &Tensor, x: &Tensor, time: Option<&Tensor>, mask: Option<&Tensor>) -> Result<Tensor> {
        let kind = x.f_kind()?;
        let [q, k, _] = self.project(&self.ln_1.forward(latents, time, kind)?, &self.ln_2.forward(x, time, kind)?)?;
        let scale = (q.size4()?.3 as f64).powf(-0.5);
        let scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_to_kind(Kind::Float)?.f_mul_scalar(scale)?;
        let scores = match mask {
            Some(mask) => scores.f_masked_fill(&mask.f_logical_not()?, f64::NEG_INFINITY)?,
            None => scores,
        };
        Ok(scores.f_softmax(-1, Kind::Float)?.f_mean_dim(1i64, false, Kind::Float)?)
    }

    /// `nn.MultiheadAttention` of the queries over `[queries, text]`.
    fn attend(&self, queries: &Tensor, text: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (b, l, d) = queries.size3()?;
        let [q, k, v] = self.project(queries, text)?;
        let mixed = Tensor::f_scaled_dot_product_attention(&q, &k, &v, mask, 0.0, false, None, false)?;
        self.out_proj.forward(&mixed.f_transpose(1, 2)?.f_reshape([b, l, d])?)
    }

    /// Queries `[B, heads, L, K]`, and keys and values of queries and text `[B, heads, L + S, K]`; each part is projected once.
    fn project(&self, queries: &Tensor, text: &Tensor) -> Result<[Tensor; 3]> {
        let (b, _, d) = queries.size3()?;
        let kind = queries.f_kind()?;
        let split = |x: &Tensor| -> Result<Tensor> {
            Ok(x.f_reshape([b, -1, self.heads, d / self.heads])?.f_transpose(1, 2)?) // [B, heads, tokens, head]
        };
        let (weight, bias) = (self.in_proj.0.f_to_kind(kind)?, self.in_proj.1.f_to_kind(kind)?);
        let own = linear(queries, &weight, &bias)?.f_split_with_sizes([d, 2 * d], -1)?;
        let theirs = linear(text, &weight.f_narrow(0, d, 2 * d)?, &bias.f_narrow(0, d, 2 * d)?)?;
        let both = Tensor::f_cat(&[&own[1], &theirs], 1)?.f_chunk(2, -1)?; // keys and values
        Ok([split(&own[0])?, split(&both[0])?, split(&both[1])?])
    }
}

/// Only the bias starts at zero: the official code (commit b7c2202) leaves the weight as PyTorch makes it, so that its blocks do not
/// start as the identity, as AdaLN-Zero's name says.
fn gates(p: &Params, time_width: i64, width: i64) -> Result<Linear> {
    Linear::with_init(p, time_width, 2 * width, (Init::KaimingUniform, Init::Zeros))
}

/// A layer norm: with learned scale and shift, or with both from the time embedding.
#[derive(Debug)]
struct Norm {
    /// For kinds that know the timestep.
    linear: Option<Linear>,
    norm: LayerNorm,
    fused: bool,
}

impl Norm {
    fn new(p: &Params, config: &ConnectorConfig) -> Result<Self> {
        let width = config.width;
        if !config.kind.is_timed() {
            return Ok(Norm { linear: None, norm: LayerNorm::trained(p, width, PLAIN_EPS)?, fused: false });
        }
        let linear = Linear::with_init(&p.at("linear"), config.time_embed_dim, 2 * width, (Init::Zeros, Init::Zeros))?;
        let fused = p.fused().norm && config.fits_fused_norm();
        Ok(Norm { linear: Some(linear), norm: LayerNorm::plain(width, ADA_EPS), fused })
    }

    /// `x` `[B, tokens, D]`, `time` `[B, T]` after SiLU; to `kind`, in float32 until then.
    fn forward(&self, x: &Tensor, time: Option<&Tensor>, kind: Kind) -> Result<Tensor> {
        let lead = self.linear.as_ref().zip(time).map(|(linear, time)| linear.forward(time)).transpose()?; // [B, 2 D]: shift, scale
        if let Some(lead) = &lead
            && self.fused
            && lead.f_kind()? == Kind::Float
        {
            return Ok(fused::ada_layer_norm(x, lead, ADA_EPS, kind)?);
        }
        let normed = self.norm.forward(&x.f_to_kind(Kind::Float)?)?;
        let Some(lead) = lead else {
            return Ok(normed.f_to_kind(kind)?);
        };
        let shift_scale = lead.f_unsqueeze(1)?.f_chunk(2, -1)?;
        let scale = shift_scale[1].f_add_scalar(1.0)?;
        Ok(normed.f_mul(&scale)?.f_add(&shift_scale[0])?.f_to_kind(kind)?)
    }
}
