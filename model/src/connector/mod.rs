//! Connectors: from a text encoder's features to the U-Net's cross-attention states. [`Connector`] is any of the four kinds that the
//! paper compares (§1.4), and all that the rest of the program knows.
//!
//! Architecture, initial values and state-dict keys of the three kinds with perceiver blocks are those of paper §1 (the official
//! `model.py`: <https://github.com/TencentQQGYLab/ELLA/blob/3c228f1/model.py>, and its first published form, commit b7c2202, which
//! had all three). Any kind may have a pooled head besides, which SDXL asks for (§1.3).
//! Letters: B batch, S text tokens, L latent queries, D width, E text width, T width of the time embedding, P width of the pooled text.

mod block;
mod chain;
mod file;
mod linear;
mod mlp;
mod pool;
mod resampler;
#[cfg(test)]
mod tests;
mod tsc;

use std::ops::Range;
use std::path::Path;

use ella_cuda::fused;
use tch::{Device, Kind, Tensor};

use crate::error::{ModelError, Result};
use crate::layers::inner_product;
use crate::params::{Compute, Params};
use crate::weights::{self, Weights};
use chain::Chain;
use mlp::Mlp;
use pool::Pool;
use resampler::Resampler;
use tsc::Tsc;

/// The attention heads of the released connectors, whose files do not tell.
pub const DEFAULT_HEADS: i64 = 8;

/// The field of a file's metadata that tells the attention heads.
pub const HEADS_FIELD: &str = "ella.heads";

/// The kinds of connector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectorKind {
    /// ELLA's timestep-aware semantic connector: a resampler whose norms take shift and scale from the timestep (AdaLN).
    Tsc,
    /// The same with a gate from the timestep on both branches of every block (AdaLN-Zero).
    TscZero,
    /// A resampler that knows no timestep, with plain layer norms.
    Resampler,
    /// Two linear maps of each token, as LLaVA has them: neither timestep nor latents.
    Mlp,
}

impl ConnectorKind {
    /// The name that configurations have for it.
    pub fn name(self) -> &'static str {
        match self {
            ConnectorKind::Tsc => "tsc",
            ConnectorKind::TscZero => "tsc-zero",
            ConnectorKind::Resampler => "resampler",
            ConnectorKind::Mlp => "mlp",
        }
    }

    /// Whether its output depends on the timestep.
    pub fn is_timed(self) -> bool {
        matches!(self, ConnectorKind::Tsc | ConnectorKind::TscZero)
    }
}

/// The sizes of a connector. What its kind does not have counts for nothing: the time's for a `Resampler`, and for an `Mlp` the
/// blocks' and latents' too, and without a pooled head the heads'.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectorConfig {
    /// Which kind.
    pub kind: ConnectorKind,
    /// D: the U-Net's `cross_attention_dim`.
    pub width: i64,
    /// Perceiver blocks.
    pub layers: i64,
    /// Attention heads of the blocks and of the pooled head; must divide `width`.
    pub heads: i64,
    /// L: the states that the U-Net attends to.
    pub latents: i64,
    /// E: the text encoder's width.
    pub text_width: i64,
    /// The timestep sinusoid's channels.
    pub time_channel: i64,
    /// T: the time embedding's width. `width` in the official code's defaults, but independent of it in files.
    pub time_embed_dim: i64,
    /// P: the channels of the pooled head, if there is one: the U-Net's [`crate::unet::UNetConfig::pooled_width`].
    pub pooled: Option<i64>,
}

impl ConnectorConfig {
    /// The released shape at a given width: 6 layers, 8 heads, 64 latents, 320 time channels, a time embedding of `width`, and no pooled head.
    pub fn new(kind: ConnectorKind, width: i64, text_width: i64) -> Self {
        ConnectorConfig {
            kind,
            width,
            layers: 6,
            heads: DEFAULT_HEADS,
            latents: 64,
            text_width,
            time_channel: 320,
            time_embed_dim: width,
            pooled: None,
        }
    }

    /// The kind and sizes of a connector's file. Its attention heads are told by its metadata, or else given; with neither they are those of the
    /// released connectors.
    ///
    /// # Errors
    /// The file holds no connector, or lacks tensors that tell a size; so many heads do not fit its width, or its metadata tells others than are given.
    pub fn of_file(weights: &Weights, heads: impl Into<Option<i64>>) -> Result<Self> {
        let config = file::config_of(weights, heads.into())?;
        config.check()?;
        Ok(config)
    }

    /// Whether its norms, where the timestep leads them, may be [`fused::ada_layer_norm`].
    pub(crate) fn fits_fused_norm(&self) -> bool {
        self.kind.is_timed() && self.width % 8 == 0 && self.width <= fused::MOST_OF_ROW
    }

    /// Its sizes by name, and whether a connector of its kind has them.
    fn sizes(&self) -> [(bool, &'static str, i64); 8] {
        let (blocks, timed) = (self.kind != ConnectorKind::Mlp, self.kind.is_timed());
        [
            (true, "connector width", self.width),
            (blocks, "connector layers", self.layers),
            (self.attends(), "connector heads", self.heads),
            (blocks, "connector latents", self.latents),
            (true, "text width", self.text_width),
            (timed, "connector time channels", self.time_channel),
            (timed, "connector time embedding width", self.time_embed_dim),
            (self.pooled.is_some(), "connector pooled width", self.pooled.unwrap_or_default()),
        ]
    }

    /// The first size that this one and another of its kind have not in common: its name, this one's, the other's (0: it has none).
    pub fn difference(&self, other: &Self) -> Option<(&'static str, i64, i64)> {
        let differ = |((own, name, a), (others, _, b)): ((bool, &'static str, i64), (bool, &'static str, i64))| {
            ((own || others) && a != b).then_some((name, a, b))
        };
        self.sizes().into_iter().zip(other.sizes()).find_map(differ)
    }

    /// Whether its heads count.
    fn attends(&self) -> bool {
        self.kind != ConnectorKind::Mlp || self.pooled.is_some()
    }

    fn check(&self) -> Result<()> {
        if let Some((_, name, size)) = self.sizes().into_iter().find(|(counts, _, size)| *counts && !(1..=1 << 20).contains(size)) {
            return Err(ModelError::argument(name, "a size from 1 to 2^20", size));
        }
        if self.attends() && self.width % self.heads != 0 {
            let rule = format!("a divisor of the width {}", self.width);
            return Err(ModelError::argument("connector heads", rule, self.heads));
        }
        if self.kind.is_timed() && self.time_channel % 2 != 0 {
            return Err(ModelError::argument("connector time channels", "even", self.time_channel));
        }
        Ok(())
    }
}

/// What a connector tells the U-Net.
#[derive(Debug)]
pub struct Conditions {
    /// What it attends to: `[B, L, D]`, of an `Mlp` `[B, S, D]`.
    pub states: Tensor,
    /// The pooled text `[B, P]`, of a connector with a pooled head.
    pub pooled: Option<Tensor>,
}

/// A connector of any kind.
#[derive(Debug)]
pub struct Connector {
    config: ConnectorConfig,
    network: Network,
    pool: Option<Pool>,
    params: Vec<(String, Tensor)>,
    /// The same without their names.
    tensors: Vec<Tensor>,
    segments: Vec<Segment>,
}

/// A stretch of a connector whose parameters' gradients are known together: what comes before the blocks, each block, the pooled head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Which of [`Connector::tensors`].
    params: Range<usize>,
    /// Where they lie in a flat buffer in [`Connector::layout`]'s order.
    pub elements: Range<i64>,
}

/// A forward pass whose gradient is made segment by segment.
#[derive(Debug)]
pub struct Pass<'a> {
    connector: &'a Connector,
    chain: Chain,
    /// What the U-Net takes, as leaves that take gradients.
    pub conditions: Conditions,
    /// The pooled text with its graph, and the states that this begins from.
    pooled: Option<(Tensor, Tensor)>,
}

impl Pass<'_> {
    /// The gradient by the parameters, from that by [`Pass::conditions`]: for each of [`Connector::segments`], the last first, its place there and
    /// its stretch `[len]` of the flat gradient, in the parameters' kind. The segments before it have not been computed when it is handed out.
    ///
    /// # Shapes
    /// `states` and `pooled` as those of the conditions.
    ///
    /// # Errors
    /// libtorch's, and what `done` returns.
    pub fn backward<E: From<ModelError>>(
        self,
        states: &Tensor,
        pooled: Option<&Tensor>,
        mut done: impl FnMut(usize, Tensor) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let Connector { tensors, segments, .. } = self.connector;
        let params: Vec<&[Tensor]> = segments.iter().map(|segment| &tensors[segment.params.clone()]).collect();
        let mut gradient = states.shallow_clone();
        if let Some(((made, leaf), by_pooled)) = self.pooled.zip(pooled) {
            let last = segments.len() - 1;
            let root = inner_product(&made, by_pooled)?;
            drop(made);
            let mut gradients = chain::backward(&[root], params[last].iter().chain([&leaf]))?;
            if let Some(through) = gradients.pop() {
                gradient = gradient.f_add(&through).map_err(ModelError::from)?;
            }
            done(last, flat(&gradients)?)?;
        }
        self.chain.backward(gradient, &params, |segment, gradients| done(segment, flat(&gradients)?))
    }
}

fn flat(tensors: &[Tensor]) -> Result<Tensor> {
    let rows: Vec<Tensor> = tensors.iter().map(|tensor| tensor.f_reshape([-1])).collect::<std::result::Result<_, _>>()?;
    Ok(Tensor::f_cat(&rows, 0)?)
}

/// The parameters in order: all up to the first block, each block's, the pooled head's.
fn segments(params: &[(String, Tensor)]) -> Vec<Segment> {
    let number = |name: &str| -> usize {
        let block = name.strip_prefix("connector.perceiver_blocks.").and_then(|rest| rest.split('.').next()?.parse().ok());
        block.map_or(if name.starts_with("pool.") { usize::MAX } else { 0 }, |block: usize| block + 1)
    };
    let (mut segments, mut param, mut element) = (Vec::new(), 0, 0);
    for group in params.chunk_by(|(a, _), (b, _)| number(a) == number(b)) {
        let len: i64 = group.iter().map(|(_, tensor)| tensor.numel() as i64).sum();
        segments.push(Segment { params: param..param + group.len(), elements: element..element + len });
        (param, element) = (param + group.len(), element + len);
    }
    segments
}

#[derive(Debug)]
enum Network {
    Tsc(Tsc),
    Resampler(Resampler),
    Mlp(Mlp),
}

impl Connector {
    /// Builds the network from any source of parameters, and refuses parameters left over.
    ///
    /// # Errors
    /// Sizes that do not fit one another; a parameter missing, of another shape, or surplus.
    pub fn new(config: &ConnectorConfig, p: &Params) -> Result<Self> {
        config.check()?;
        let network = match config.kind {
            ConnectorKind::Tsc | ConnectorKind::TscZero => Network::Tsc(Tsc::new(p, config)?),
            ConnectorKind::Resampler => Network::Resampler(Resampler::new(&p.at("connector"), config)?),
            ConnectorKind::Mlp => Network::Mlp(Mlp::new(&p.at("connector"), config)?),
        };
        let pool = config.pooled.map(|pooled| Pool::new(&p.at("pool"), config, pooled)).transpose()?;
        p.finish(&[])?;
        let params = p.taken();
        let (tensors, segments) = (params.iter().map(|(_, tensor)| tensor.shallow_clone()).collect(), segments(&params));
        Ok(Connector { config: config.clone(), network, pool, params, tensors, segments })
    }

    /// Random initial values (paper §1.1), each a pure function of `seed` and the parameter's name. float32.
    pub fn init(config: &ConnectorConfig, seed: u64, device: Device) -> Result<Self> {
        Self::new(config, &Params::random(seed, Kind::Float, device))
    }

    /// A connector over tensors that are at hand (views into a flat buffer, leaves that require gradients), to compute in this way.
    pub fn from_tensors(config: &ConnectorConfig, tensors: impl IntoIterator<Item = (String, Tensor)>, compute: Compute) -> Result<Self> {
        let params = Params::given(tensors);
        params.compute_by(compute);
        Self::new(config, &params)
    }

    /// Opens a connector's file.
    ///
    /// # Errors
    /// A folder, as of a run; those of [`Weights::open`].
    pub fn open(path: &Path) -> Result<Weights> {
        if path.is_dir() {
            let what = format!("{}: a folder as a connector", path.display());
            let instead = "give a file: what `ella export RUN --out FILE` writes, or a commit's connector.safetensors".into();
            return Err(ModelError::Unsupported { what, instead });
        }
        Weights::open(path)
    }

    /// Loads a safetensors file. Its kind is told by the names of its tensors, and all sizes but the heads by their shapes.
    ///
    /// # Errors
    /// A file that cannot be read, is of no known kind, or lacks tensors of its kind or has others besides; those of [`ConnectorConfig::of_file`].
    pub fn load(path: &Path, heads: impl Into<Option<i64>>, kind: Kind, device: Device) -> Result<Self> {
        Self::from_weights(Self::open(path)?, heads, kind, device)
    }

    /// Builds the network from what [`Connector::load`] finds in a file; errors as there.
    pub fn from_weights(weights: Weights, heads: impl Into<Option<i64>>, kind: Kind, device: Device) -> Result<Self> {
        let config = ConnectorConfig::of_file(&weights, heads)?;
        let params = Params::from_weights(weights, kind, device);
        params.compute_by(Compute::fastest(kind, device)?);
        Self::new(&config, &params)
    }

    /// Checkpoint names and shapes in the order that flat buffers keep them.
    pub fn layout(config: &ConnectorConfig) -> Result<Vec<(String, Vec<i64>)>> {
        let p = Params::shapes();
        Self::new(config, &p)?;
        Ok(p.taken().into_iter().map(|(name, tensor)| (name, tensor.size())).collect())
    }

    /// The network's kind and sizes.
    pub fn config(&self) -> &ConnectorConfig {
        &self.config
    }

    /// The parameters under their checkpoint names, in [`Connector::layout`]'s order.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.params
    }

    /// The parameters' checkpoint names, in [`Connector::layout`]'s order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.params.iter().map(|(name, _)| name.as_str())
    }

    /// The parts of the flat gradient that are known one after the other, in their order in the buffer; the last is known first.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Connects one batch of features, each sample at its own timestep; kinds without time do not look at `timesteps`.
    ///
    /// `key_mask` is true where a token may be attended to. Without it every position counts, padding too, which is how
    /// the released weights were trained (paper §0).
    ///
    /// # Shapes
    /// `text_features` `[B, S, E]` of the kind that is computed in, and the states come in: the parameters', or a shorter one, to which these
    /// are cast where they are used, all but the time embedding's; norms, the softmax and what passes by the blocks are float32 in any case.
    /// `timesteps` `[B]`, whole or between; `key_mask` `[B, S]` bool.
    ///
    /// # Errors
    /// A `key_mask` for an `Mlp`, whose every token becomes a state that the U-Net attends to.
    pub fn forward(&self, text_features: &Tensor, timesteps: &Tensor, key_mask: Option<&Tensor>) -> Result<Conditions> {
        let states = self.states((text_features, timesteps, key_mask), &mut Chain::whole(), None)?;
        let pooled = self.pool.as_ref().map(|pool| pool.forward(&states)).transpose()?;
        Ok(Conditions { states, pooled })
    }

    /// The same values, whose gradient is then made by [`Pass::backward`].
    ///
    /// # Errors
    /// As [`Connector::forward`].
    pub fn forward_in_segments(&self, text_features: &Tensor, timesteps: &Tensor, key_mask: Option<&Tensor>) -> Result<Pass<'_>> {
        let mut chain = Chain::cut();
        let states = self.states((text_features, timesteps, key_mask), &mut chain, None)?;
        let leaf = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_detach()?.f_set_requires_grad(true)?) };
        let pooled = match &self.pool {
            Some(pool) => {
                // The U-Net looks at the states too: a leaf for each, so that neither's gradient waits for the other's.
                let own = leaf(&states)?;
                Some((pool.forward(&own)?, own))
            }
            None => None,
        };
        let told = pooled.as_ref().map(|(made, _)| leaf(made)).transpose()?;
        Ok(Pass { connector: self, chain, conditions: Conditions { states, pooled: told }, pooled })
    }

    /// How much each of the connector's queries looks at each of its keys, block by block: `[B, L, L + S]` float32 each, the mean over heads. Its keys are
    /// the L queries themselves, and then the S positions of the text.
    ///
    /// # Errors
    /// As [`Connector::forward`]; the kind has no queries.
    pub fn attention(&self, text_features: &Tensor, timesteps: &Tensor, key_mask: Option<&Tensor>) -> Result<Vec<Tensor>> {
        if let Network::Mlp(_) = self.network {
            return Err(ModelError::Unsupported {
                what: "attention of a connector of the kind mlp, which has none".into(),
                instead: "use another kind".into(),
            });
        }
        let mut attention = Vec::new();
        let _ = self.states((text_features, timesteps, key_mask), &mut Chain::whole(), Some(&mut attention))?;
        Ok(attention)
    }

    fn states(
        &self,
        (text_features, timesteps, key_mask): (&Tensor, &Tensor, Option<&Tensor>),
        chain: &mut Chain,
        attention: Option<&mut Vec<Tensor>>,
    ) -> Result<Tensor> {
        Ok(match &self.network {
            Network::Tsc(tsc) => tsc.forward(text_features, timesteps, key_mask, chain, attention)?,
            Network::Resampler(resampler) => resampler.forward(text_features, None, key_mask, chain, attention)?,
            Network::Mlp(_) if key_mask.is_some() => {
                return Err(ModelError::Unsupported {
                    what: "text of unequal length (padding \"none\") with a connector of the kind mlp, whose padding nothing masks".into(),
                    instead: "use padding \"fixed\", or another kind".into(),
                });
            }
            Network::Mlp(mlp) => chain.end(mlp.forward(text_features)?)?,
        })
    }
}

/// Writes a connector's parameters as safetensors in the official key layout, a pooled head's beside them, as `kind` (the released file is `Half`).
pub fn save(path: &Path, tensors: &[(String, Tensor)], kind: Kind) -> Result<()> {
    let convert = |(name, tensor): &(String, Tensor)| Ok((name.clone(), tensor.f_to_kind(kind)?));
    weights::save(path, &tensors.iter().map(convert).collect::<Result<Vec<_>>>()?)
}
