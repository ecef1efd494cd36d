//! Transformers over the pixels of a feature map, with cross-attention to the text features.
//!
//! diffusers 0.42: `models/transformers/transformer_2d.py`, `models/attention.py` (`BasicTransformerBlock`, `FeedForward`),
//! `models/attention_processor.py` (`Attention`, `AttnProcessor2_0`).

use ella_cuda::fused::{self, Fused};
use ella_cuda::speed::attend;
use tch::{Kind, Tensor};

use super::UNetConfig;
use crate::error::Result;
use crate::layers::{GroupNorm, LayerNorm, Linear, gelu};
use crate::params::{Init, Params};

/// ε of the layer norms, and of the group norm before a transformer: fixed in the reference, unlike `norm_eps`.
const LAYER_EPS: f64 = 1e-5;
const GROUP_EPS: f64 = 1e-6;

/// How pixels become queries, and pixels or text keys and values.
#[derive(Debug)]
enum Projections {
    /// Queries, keys and values by a product each.
    Apart([Linear; 3]),
    /// All by one: attention of pixels to themselves.
    Own(Linear),
    /// Keys and values by one: attention to the text.
    Text { q: Linear, kv: Linear },
}

impl Projections {
    /// Queries of `width` to keys and values made from `source`, the width of the text, or from the pixels themselves.
    fn new(p: &Params, width: i64, source: Option<i64>) -> Result<Self> {
        let linear = |name, input| Linear::no_bias(&p.at(name), input, width, Init::KaimingUniform);
        let from = source.unwrap_or(width);
        let (q, k, v) = (linear("to_q", width)?, linear("to_k", from)?, linear("to_v", from)?);
        Ok(match (p.fused(), source) {
            (fused, Some(_)) if fused.attention || fused.cross => Self::Text { q, kv: Linear::joined(&[k, v])? },
            (fused, None) if fused.attention || fused.pixels => Self::Own(Linear::joined(&[q, k, v])?),
            _ => Self::Apart([q, k, v]),
        })
    }

    /// Queries, keys and values [B, N or M, D] of `x` [B, N, D] and `source` [B, M, E].
    fn forward(&self, x: &Tensor, source: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let parts = match self {
            Self::Apart([q, k, v]) => vec![q.forward(x)?, k.forward(source)?, v.forward(source)?],
            Self::Own(all) => all.forward(x)?.f_chunk(3, -1)?,
            Self::Text { q, kv } => std::iter::once(q.forward(x)?).chain(kv.forward(source)?.f_chunk(2, -1)?).collect(),
        };
        let [q, k, v] = <[Tensor; 3]>::try_from(parts).map_err(|parts| {
            // Products of three widths are cut into three.
            crate::error::ModelError::argument("an attention's projections", "queries, keys and values", parts.len())
        })?;
        Ok((q, k, v))
    }
}

/// Multi-head attention of pixels to themselves or to the text.
#[derive(Debug)]
struct Attention {
    projections: Projections,
    to_out: Linear,
    heads: i64,
    upcast: bool,
    /// Which of them it takes from there.
    fused: Fused,
}

impl Attention {
    /// Queries of `width` to keys and values made from text of width `source`, or from the pixels themselves.
    fn new(p: &Params, width: i64, source: Option<i64>, heads: i64, upcast: bool) -> Result<Self> {
        Ok(Self {
            projections: Projections::new(p, width, source)?,
            to_out: Linear::new(&p.at("to_out").at(0), width, width)?,
            heads,
            upcast,
            fused: p.fused(),
        })
    }

    /// What `x` mixes of `source`, [B, N, D], where a fused operator takes it.
    fn by_own_kernels(&self, x: &Tensor, source: &Tensor) -> Result<Option<Tensor>> {
        let (width, kind) = (x.size()[2] / self.heads, x.kind());
        Ok(match &self.projections {
            _ if self.upcast => None,
            Projections::Text { q, kv } if self.fused.takes_few_keys(source.size()[1], width, kind) => {
                Some(fused::few_keys(&q.forward(x)?, &kv.forward(source)?, self.heads)?)
            }
            Projections::Own(all) if self.fused.takes_pixels(width, kind) => Some(fused::pixels(&all.forward(x)?, self.heads)?),
            _ => None,
        })
    }

    /// `x` [B, N, D] attends to `source` [B, M, E], to [B, N, D].
    fn forward(&self, x: &Tensor, source: &Tensor) -> Result<Tensor> {
        if let Some(mixed) = self.by_own_kernels(x, source)? {
            return self.to_out.forward(&mixed);
        }
        let (q, k, v) = self.projections.forward(x, source)?;
        let y = if self.upcast {
            let wide = |x: &Tensor| x.f_to_kind(Kind::Float);
            attend(&wide(&q)?, &wide(&k)?, &wide(&v)?, self.heads)?.f_to_kind(x.kind())?
        } else {
            attend(&q, &k, &v, self.heads)?
        };
        self.to_out.forward(&y)
    }
}

/// The gated feed-forward network: four times the width inside, the gate through a GELU.
#[derive(Debug)]
struct FeedForward {
    proj: Linear,
    out: Linear,
    fused: bool,
}

impl FeedForward {
    fn new(p: &Params, width: i64) -> Result<Self> {
        let net = p.at("net");
        Ok(Self {
            proj: Linear::new(&net.at(0).at("proj"), width, 8 * width)?,
            out: Linear::new(&net.at(2), 4 * width, width)?,
            fused: p.fused().gate && width % 2 == 0,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let both = self.proj.forward(x)?; // [B, N, 8D]: values, then gates
        if self.fused {
            return self.out.forward(&fused::geglu(&both)?);
        }
        let half = both.size()[2] / 2;
        let gate = gelu(&both.f_narrow(-1, half, half)?)?;
        self.out.forward(&both.f_narrow(-1, 0, half)?.f_mul(&gate)?)
    }
}

/// Self-attention, attention to the text, feed-forward; each after a layer norm and beside a residual.
#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
}

impl Block {
    fn new(p: &Params, width: i64, heads: i64, config: &UNetConfig) -> Result<Self> {
        let norm = |name| LayerNorm::new(&p.at(name), width, LAYER_EPS);
        let attention = |name, source| Attention::new(&p.at(name), width, source, heads, config.upcast_attention);
        Ok(Self {
            norm1: norm("norm1")?,
            attn1: attention("attn1", None)?,
            norm2: norm("norm2")?,
            attn2: attention("attn2", Some(config.cross_attention_dim))?,
            norm3: norm("norm3")?,
            ff: FeedForward::new(&p.at("ff"), width)?,
        })
    }

    fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let (x, normed) = self.norm1.past(x)?;
        let (x, normed) = self.norm2.of_sum(&x, &self.attn1.forward(&normed, &normed)?)?;
        let (x, normed) = self.norm3.of_sum(&x, &self.attn2.forward(&normed, text)?)?;
        Ok(x.f_add(&self.ff.forward(&normed)?)?)
    }
}

/// Transformer layers over a feature map, beside a residual.
#[derive(Debug)]
pub(crate) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

impl Transformer {
    /// `depth` layers for feature maps of the `level`'s channels.
    pub(crate) fn new(p: &Params, level: usize, depth: i64, config: &UNetConfig) -> Result<Self> {
        let width = config.block_out_channels[level];
        let project = |name| match config.use_linear_projection {
            true => Linear::new(&p.at(name), width, width),
            // Stored as 1×1 convolutions: the same map, applied to tokens.
            false => Linear::pointwise(&p.at(name), width, width),
        };
        let blocks = p.at("transformer_blocks");
        Ok(Self {
            norm: GroupNorm::new(&p.at("norm"), width, config.norm_num_groups, GROUP_EPS)?,
            proj_in: project("proj_in")?,
            blocks: (0..depth).map(|i| Block::new(&blocks.at(i), width, config.heads[level], config)).collect::<Result<_>>()?,
            proj_out: project("proj_out")?,
        })
    }

    /// `x` [B, C, H, W] and `text` [B, L, D] to [B, C, H, W].
    pub(crate) fn forward(&self, x: &Tensor, text: &Tensor) -> Result<Tensor> {
        let (x, normed) = self.norm.past(&x.shallow_clone().into(), None, false)?;
        let x = x.one()?;
        let tokens = normed.f_flatten(2, 3)?.f_transpose(1, 2)?; // [B, HW, C]
        let mut h = self.proj_in.forward(&tokens)?;
        for block in &self.blocks {
            h = block.forward(&h, text)?;
        }
        let h = self.proj_out.forward(&h)?.f_transpose(1, 2)?;
        Ok(x.f_add(&h.f_reshape(x.size())?)?)
    }
}
