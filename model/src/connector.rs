//! ELLA's timestep-aware semantic connector (TSC): from a text encoder's features to the U-Net's cross-attention states.
//!
//! Architecture, initial values and state-dict keys are those of paper §1.1 (the official `model.py`,
//! <https://github.com/TencentQQGYLab/ELLA/blob/3c228f1/model.py>). Letters: B batch, S text tokens, L latent queries,
//! D width, E text width, T width of the time embedding.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use crate::error::{ModelError, Result};
use crate::layers::{LayerNorm, Linear, silu, timestep_embedding};
use crate::params::{Init, Params};
use crate::weights::{self, Weights};

/// The attention heads of the released connectors; a file does not tell.
pub const DEFAULT_HEADS: i64 = 8;

/// The channels of the released connectors' timestep sinusoid.
pub const DEFAULT_TIME_CHANNEL: i64 = 320;

/// The layer norms' epsilon.
const EPS: f64 = 1e-6;

/// The sizes of a connector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TscConfig {
    /// D: the U-Net's `cross_attention_dim`.
    pub width: i64,
    /// Perceiver blocks.
    pub layers: i64,
    /// Attention heads; must divide `width`.
    pub heads: i64,
    /// L: the states that the U-Net attends to.
    pub latents: i64,
    /// E: the text encoder's width.
    pub text_width: i64,
    /// The timestep sinusoid's channels.
    pub time_channel: i64,
    /// T: the time embedding's width. `width` in the official code's defaults, but independent of it in files.
    pub time_embed_dim: i64,
}

impl TscConfig {
    /// The released shape at a given width: 6 layers, 8 heads, 64 latents, 320 time channels, and a time embedding of `width`.
    pub fn new(width: i64, text_width: i64) -> Self {
        TscConfig {
            width,
            layers: 6,
            heads: DEFAULT_HEADS,
            latents: 64,
            text_width,
            time_channel: DEFAULT_TIME_CHANNEL,
            time_embed_dim: width,
        }
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("connector width", self.width),
            ("connector layers", self.layers),
            ("connector heads", self.heads),
            ("connector latents", self.latents),
            ("text width", self.text_width),
            ("connector time channels", self.time_channel),
            ("connector time embedding width", self.time_embed_dim),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| !(1..=1 << 20).contains(size)) {
            return Err(ModelError::argument(name, "a size from 1 to 2^20", size));
        }
        if self.width % self.heads != 0 {
            let rule = format!("a divisor of the width {}", self.width);
            return Err(ModelError::argument("connector heads", rule, self.heads));
        }
        if self.time_channel % 2 != 0 {
            return Err(ModelError::argument("connector time channels", "even", self.time_channel));
        }
        Ok(())
    }
}

/// The connector.
#[derive(Debug)]
pub struct Tsc {
    config: TscConfig,
    time: (Linear, Linear),
    latents: Tensor,
    time_aware: Linear,
    proj_in: Linear,
    blocks: Vec<Block>,
    params: Vec<(String, Tensor)>,
}

impl Tsc {
    /// Builds the network from any source of parameters, and refuses parameters left over.
    ///
    /// # Errors
    /// Sizes that do not fit one another; a parameter missing, of another shape, or surplus.
    pub fn new(config: &TscConfig, p: &Params) -> Result<Self> {
        config.check()?;
        let TscConfig { width, latents, text_width, time_channel, time_embed_dim, .. } = *config;
        let (time, connector) = (p.at("time_embedding"), p.at("connector"));
        let time = (
            Linear::new(&time.at("linear_1"), time_channel, time_embed_dim)?,
            Linear::new(&time.at("linear_2"), time_embed_dim, time_embed_dim)?,
        );
        let latents = connector.get("latents", &[latents, width], Init::Normal { std: (width as f64).powf(-0.5) })?;
        // Its bias starts at zero, as in the first published model.py (commit b7c2202).
        let time_aware_init = (Init::KaimingUniform, Init::Zeros);
        let time_aware = Linear::with_init(&connector.at("time_aware_linear"), time_embed_dim, width, time_aware_init)?;
        let proj_in = Linear::new(&connector.at("proj_in"), text_width, width)?;
        let block = |n| Block::new(&connector.at("perceiver_blocks").at(n), config);
        let blocks = (0..config.layers).map(block).collect::<Result<_>>()?;
        p.finish(&[])?;
        Ok(Tsc { config: config.clone(), time, latents, time_aware, proj_in, blocks, params: p.taken() })
    }

    /// Random initial values (paper §1.1), each a pure function of `seed` and the parameter's name. float32.
    pub fn init(config: &TscConfig, seed: u64, device: Device) -> Result<Self> {
        Self::new(config, &Params::random(seed, Kind::Float, device))
    }

    /// A connector over tensors that are at hand: views into a flat buffer, leaves that require gradients.
    pub fn from_tensors(config: &TscConfig, tensors: impl IntoIterator<Item = (String, Tensor)>) -> Result<Self> {
        Self::new(config, &Params::given(tensors))
    }

    /// Loads a safetensors file in the official key layout. All sizes but `heads` are read from its tensors' shapes.
    pub fn load(path: &Path, heads: i64, kind: Kind, device: Device) -> Result<Self> {
        let weights = Weights::open(path)?;
        let config = config_of(&weights, heads)?;
        Self::new(&config, &Params::from_weights(weights, kind, device))
    }

    /// Checkpoint names and shapes in the order that flat buffers keep them.
    pub fn layout(config: &TscConfig) -> Result<Vec<(String, Vec<i64>)>> {
        let p = Params::shapes();
        Self::new(config, &p)?;
        Ok(p.taken().into_iter().map(|(name, tensor)| (name, tensor.size())).collect())
    }

    /// The network's sizes.
    pub fn config(&self) -> &TscConfig {
        &self.config
    }

    /// The parameters under their checkpoint names, in [`Tsc::layout`]'s order.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.params
    }

    /// The parameters' checkpoint names, in [`Tsc::layout`]'s order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.params.iter().map(|(name, _)| name.as_str())
    }

    /// Connects one batch of features at each sample's own timestep.
    ///
    /// `key_mask` is true where a token may be attended to. Without it every position counts, padding too, which is how
    /// the released weights were trained (paper §0).
    ///
    /// # Shapes
    /// `text_features` `[B, S, E]` of the parameters' kind; `timesteps` `[B]` i64; `key_mask` `[B, S]` bool; to `[B, L, D]`.
    pub fn forward(&self, text_features: &Tensor, timesteps: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        let kind = text_features.f_kind()?;
        let sinusoid = timestep_embedding(timesteps, self.config.time_channel)?.f_to_kind(kind)?;
        let time = self.time.1.forward(&silu(&self.time.0.forward(&sinusoid)?)?)?; // [B, T]
        // Every use of the time embedding passes through SiLU first.
        let time = silu(&time)?;
        let x = self.proj_in.forward(text_features)?; // [B, S, D]
        let mask = key_mask.map(|mask| self.mask(mask)).transpose()?;
        let start = self.time_aware.forward(&time)?.f_unsqueeze(1)?; // [B, 1, D]
        let mut latents = self.latents.f_unsqueeze(0)?.f_add(&start)?; // [B, L, D]
        for block in &self.blocks {
            latents = block.forward(&latents, &x, &time, mask.as_ref())?;
        }
        Ok(latents)
    }

    /// `[B, S]` true where attended, to `[B, 1, 1, L + S]` true where hidden; the latents themselves are always seen.
    fn mask(&self, key_mask: &Tensor) -> Result<Tensor> {
        let (b, _) = key_mask.size2()?;
        let latents = Tensor::f_zeros([b, self.config.latents], (Kind::Bool, key_mask.device()))?;
        Ok(Tensor::f_cat(&[latents, key_mask.f_logical_not()?], 1)?.f_unsqueeze(1)?.f_unsqueeze(1)?)
    }
}

/// Writes a connector's parameters as safetensors in the official key layout, as `kind` (the released file is `Half`).
pub fn save(path: &Path, tensors: &[(String, Tensor)], kind: Kind) -> Result<()> {
    let convert = |(name, tensor): &(String, Tensor)| Ok((name.clone(), tensor.f_to_kind(kind)?));
    weights::save(path, &tensors.iter().map(convert).collect::<Result<Vec<_>>>()?)
}

/// The sizes that a connector's file implies.
fn config_of(weights: &Weights, heads: i64) -> Result<TscConfig> {
    let matrix = |name: &str| match *weights.describe(name)?.0 {
        [rows, columns] => Ok((rows, columns)),
        ref found => {
            Err(ModelError::WrongShape { file: weights.path().into(), key: name.into(), expected: vec![-1, -1], found: found.into() })
        }
    };
    let (latents, width) = matrix("connector.latents")?;
    let (_, text_width) = matrix("connector.proj_in.weight")?;
    let (time_embed_dim, time_channel) = matrix("time_embedding.linear_1.weight")?;
    let mut layers = 0;
    while weights.shape(&format!("connector.perceiver_blocks.{layers}.attn.in_proj_weight")).is_some() {
        layers += 1;
    }
    Ok(TscConfig { width, layers, heads, latents, text_width, time_channel, time_embed_dim })
}

/// One perceiver block: latents attend to themselves and the text, then pass an MLP.
#[derive(Debug)]
struct Block {
    in_proj: (Tensor, Tensor),
    out_proj: Linear,
    c_fc: Linear,
    c_proj: Linear,
    ln_1: AdaLayerNorm,
    ln_2: AdaLayerNorm,
    ln_ff: AdaLayerNorm,
    heads: i64,
}

impl Block {
    fn new(p: &Params, config: &TscConfig) -> Result<Self> {
        let (d, t) = (config.width, config.time_embed_dim);
        let (attn, mlp) = (p.at("attn"), p.at("mlp"));
        Ok(Block {
            in_proj: (attn.get("in_proj_weight", &[3 * d, d], Init::XavierUniform)?, attn.get("in_proj_bias", &[3 * d], Init::Zeros)?),
            out_proj: Linear::with_init(&attn.at("out_proj"), d, d, (Init::KaimingUniform, Init::Zeros))?,
            c_fc: Linear::new(&mlp.at("c_fc"), d, 4 * d)?,
            c_proj: Linear::new(&mlp.at("c_proj"), 4 * d, d)?,
            ln_1: AdaLayerNorm::new(&p.at("ln_1"), d, t)?,
            ln_2: AdaLayerNorm::new(&p.at("ln_2"), d, t)?,
            ln_ff: AdaLayerNorm::new(&p.at("ln_ff"), d, t)?,
            heads: config.heads,
        })
    }

    /// `latents` `[B, L, D]`, `x` `[B, S, D]`, `time` `[B, T]` after SiLU, `mask` `[B, 1, 1, L + S]`.
    fn forward(&self, latents: &Tensor, x: &Tensor, time: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let queries = self.ln_1.forward(latents, time)?;
        let text = self.ln_2.forward(x, time)?;
        let latents = latents.f_add(&self.attend(&queries, &text, mask)?)?;
        let hidden = self.c_fc.forward(&self.ln_ff.forward(&latents, time)?)?;
        let hidden = self.c_proj.forward(&hidden.f_relu()?.f_square()?)?; // squared ReLU
        Ok(latents.f_add(&hidden)?)
    }

    /// `nn.MultiheadAttention` of the queries over `[queries, text]`; each part is projected once.
    fn attend(&self, queries: &Tensor, text: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (b, l, d) = queries.size3()?;
        let head = d / self.heads;
        let split = |x: Tensor| -> Result<Tensor> {
            Ok(x.f_reshape([b, -1, self.heads, head])?.f_transpose(1, 2)?) // [B, heads, tokens, head]
        };
        let (weight, bias) = &self.in_proj;
        let own = queries.f_linear(weight, Some(bias))?.f_chunk(3, -1)?;
        let theirs = text.f_linear(&weight.f_narrow(0, d, 2 * d)?, Some(bias.f_narrow(0, d, 2 * d)?))?.f_chunk(2, -1)?;
        let q = split(own[0].f_mul_scalar((head as f64).powf(-0.5))?)?;
        let k = split(Tensor::f_cat(&[&own[1], &theirs[0]], 1)?)?;
        let v = split(Tensor::f_cat(&[&own[2], &theirs[1]], 1)?)?;
        let mut scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_to_kind(Kind::Float)?; // [B, heads, L, L + S]
        if let Some(mask) = mask {
            scores = scores.f_masked_fill(mask, f64::NEG_INFINITY)?;
        }
        let shares = scores.f_softmax(-1, Kind::Float)?.f_to_kind(v.f_kind()?)?;
        let mixed = shares.f_matmul(&v)?.f_transpose(1, 2)?.f_reshape([b, l, d])?;
        self.out_proj.forward(&mixed)
    }
}

/// Layer norm whose shift and scale come from the time embedding.
#[derive(Debug)]
struct AdaLayerNorm {
    linear: Linear,
    norm: LayerNorm,
}

impl AdaLayerNorm {
    fn new(p: &Params, width: i64, time_width: i64) -> Result<Self> {
        let linear = Linear::with_init(&p.at("linear"), time_width, 2 * width, (Init::Zeros, Init::Zeros))?;
        Ok(AdaLayerNorm { linear, norm: LayerNorm::plain(width, EPS) })
    }

    /// `x` `[B, tokens, D]`, `time` `[B, T]` after SiLU.
    fn forward(&self, x: &Tensor, time: &Tensor) -> Result<Tensor> {
        let shift_scale = self.linear.forward(time)?.f_unsqueeze(1)?.f_chunk(2, -1)?;
        let scale = shift_scale[1].f_add_scalar(1.0)?;
        Ok(self.norm.forward(x)?.f_mul(&scale)?.f_add(&shift_scale[0])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> TscConfig {
        TscConfig { layers: 2, heads: 2, latents: 3, time_channel: 6, time_embed_dim: 5, ..TscConfig::new(8, 4) }
    }

    fn features(b: i64, s: i64) -> Tensor {
        Tensor::arange(b * s * 4, (Kind::Float, Device::Cpu)).sin().reshape([b, s, 4])
    }

    #[test]
    fn the_released_shape_has_the_paper_s_parameter_count() {
        let layout = Tsc::layout(&TscConfig::new(768, 2048)).unwrap();
        let count: i64 = layout.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        assert_eq!(count, 66_820_608); // paper §1.2
        assert_eq!(layout.len(), 9 + 6 * 14);
    }

    #[test]
    fn the_released_shape_has_the_official_keys() {
        let layout = Tsc::layout(&TscConfig::new(768, 2048)).unwrap();
        let has = |name: &str, shape: &[i64]| {
            assert!(layout.iter().any(|(n, s)| n == name && s == shape), "{name} {shape:?}");
        };
        has("time_embedding.linear_1.weight", &[768, 320]);
        has("time_embedding.linear_1.bias", &[768]);
        has("time_embedding.linear_2.weight", &[768, 768]);
        has("time_embedding.linear_2.bias", &[768]);
        has("connector.latents", &[64, 768]);
        has("connector.time_aware_linear.weight", &[768, 768]);
        has("connector.time_aware_linear.bias", &[768]);
        has("connector.proj_in.weight", &[768, 2048]);
        has("connector.proj_in.bias", &[768]);
        for n in 0..6 {
            let block = |name: &str, shape: &[i64]| has(&format!("connector.perceiver_blocks.{n}.{name}"), shape);
            block("attn.in_proj_weight", &[2304, 768]);
            block("attn.in_proj_bias", &[2304]);
            block("attn.out_proj.weight", &[768, 768]);
            block("attn.out_proj.bias", &[768]);
            block("mlp.c_fc.weight", &[3072, 768]);
            block("mlp.c_fc.bias", &[3072]);
            block("mlp.c_proj.weight", &[768, 3072]);
            block("mlp.c_proj.bias", &[768]);
            for norm in ["ln_1", "ln_2", "ln_ff"] {
                block(&format!("{norm}.linear.weight"), &[1536, 768]);
                block(&format!("{norm}.linear.bias"), &[1536]);
            }
        }
    }

    #[test]
    fn a_saved_connector_loads_with_the_same_sizes_and_values() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("connector.safetensors");
        let made = Tsc::init(&small(), 3, Device::Cpu).unwrap();
        save(&path, made.tensors(), Kind::Float).unwrap();
        let loaded = Tsc::load(&path, 2, Kind::Float, Device::Cpu).unwrap();
        assert_eq!(loaded.config(), made.config());
        let (x, t) = (features(2, 5), Tensor::from_slice(&[0i64, 999]));
        let (a, b) = (made.forward(&x, &t, None).unwrap(), loaded.forward(&x, &t, None).unwrap());
        assert!(a.equal(&b) && a.size() == [2, 3, 8]);
    }

    #[test]
    fn masked_tokens_have_no_influence_and_unmasked_ones_do() {
        let tsc = Tsc::init(&small(), 3, Device::Cpu).unwrap();
        let t = Tensor::from_slice(&[17i64]);
        let (full, mask) = (features(1, 5), Tensor::from_slice(&[true, true, true, false, false]).reshape([1, 5]));
        let masked = tsc.forward(&full, &t, Some(&mask)).unwrap();
        let short = tsc.forward(&full.narrow(1, 0, 3), &t, None).unwrap();
        assert!(masked.allclose(&short, 1e-5, 1e-6, false));
        assert!(!masked.allclose(&tsc.forward(&full, &t, None).unwrap(), 1e-5, 1e-6, false));
    }

    #[test]
    fn the_initial_values_are_the_paper_s() {
        let tsc = Tsc::init(&TscConfig { layers: 1, ..TscConfig::new(256, 64) }, 1, Device::Cpu).unwrap();
        for (name, tensor) in tsc.tensors() {
            let zero =
                name.contains("ln_") || ["in_proj_bias", "out_proj.bias", "time_aware_linear.bias"].iter().any(|end| name.ends_with(end));
            assert_eq!(tensor.abs().max().double_value(&[]) == 0.0, zero, "{name}");
        }
        let latents = &tsc.tensors().iter().find(|(name, _)| name == "connector.latents").unwrap().1;
        assert!((latents.std(true).double_value(&[]) - 256f64.powf(-0.5)).abs() < 2e-3);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let bad = TscConfig { heads: 3, ..small() };
        assert!(matches!(Tsc::init(&bad, 0, Device::Cpu), Err(ModelError::Input { what, .. }) if what == "connector heads"));
    }
}
