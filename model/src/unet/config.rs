//! `config.json` of diffusers' `UNet2DConditionModel`: what is supported, what is refused.

use std::ops::RangeInclusive;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::AddedConfig;
use crate::config::ConfigFile;
use crate::error::{ModelError, Result};

/// The shape of a U-Net. Lists have an entry for each block of the way down; the way up is their mirror image.
#[derive(Clone, Debug, PartialEq)]
pub struct UNetConfig {
    /// Height and width of the latents that the network was made for; others go through it as well.
    pub sample_size: i64,
    /// Channels of the noisy sample.
    pub in_channels: i64,
    /// Channels of the prediction: as many.
    pub out_channels: i64,
    /// Whether the sample comes in 0..1 and is to be moved to -1..1 first.
    pub center_input_sample: bool,
    /// Whether cosines come first in the sinusoid of the timestep.
    pub flip_sin_to_cos: bool,
    /// Shortens the sinusoid's range of frequencies.
    pub freq_shift: i64,
    /// Width of the time embedding.
    pub time_embed_dim: i64,
    /// Channels of each block.
    pub block_out_channels: Vec<i64>,
    /// Residual blocks in each block of the way down; the way up has one more.
    pub layers_per_block: Vec<i64>,
    /// Whether a block of the way down has transformers.
    pub down_attention: Vec<bool>,
    /// Whether a block of the way up has transformers, in the order of the way up.
    pub up_attention: Vec<bool>,
    /// Attention heads in each block.
    pub heads: Vec<i64>,
    /// Transformer layers after each residual block of each block of the way down.
    pub down_transformers: Vec<Vec<i64>>,
    /// Transformer layers in the middle.
    pub mid_transformers: i64,
    /// Transformer layers after each residual block of each block of the way up, in the order of the way up.
    pub up_transformers: Vec<Vec<i64>>,
    /// Width of the text features.
    pub cross_attention_dim: i64,
    /// Whether the projections around transformers are stored as linear layers, else as 1×1 convolutions.
    pub use_linear_projection: bool,
    /// Whether attention is computed in float32 when the network is not.
    pub upcast_attention: bool,
    /// Padding of the downsampling convolutions, 1 on all sides; 0 pads below and to the right only.
    pub downsample_padding: i64,
    /// Groups of the group norms.
    pub norm_num_groups: i64,
    /// ε of the residual blocks' group norms.
    pub norm_eps: f64,
    /// What is added to the time embedding, if anything is: SDXL's `text_time`.
    pub added: Option<AddedConfig>,
}

impl UNetConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// A field is missing, out of range, unknown, or asks for something unsupported: named with file, rule and value.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::read(ConfigFile::open(&dir.join("config.json"))?)
    }

    /// Reads an opened configuration; errors as in [`UNetConfig::load`].
    pub fn read(c: ConfigFile) -> Result<Self> {
        refuse_unsupported(&c)?;
        let block_out_channels: Vec<i64> = c.optional("block_out_channels", CHANNELS, vec![320, 640, 1280, 1280])?;
        let n = block_out_channels.len();
        if n == 0 || block_out_channels.iter().any(|channels| !COUNTS.contains(channels)) {
            return Err(c.refuse("block_out_channels", CHANNELS));
        }
        let layers_per_block = per_block(&c, "layers_per_block", n, 2)?;
        let (down_transformers, up_transformers) = transformers(&c, &layers_per_block)?;
        let config = Self {
            sample_size: c.size_or("sample_size", 64)?,
            in_channels: c.size_or("in_channels", 4)?,
            out_channels: c.size_or("out_channels", 4)?,
            center_input_sample: c.optional("center_input_sample", BOOL, false)?,
            flip_sin_to_cos: c.optional("flip_sin_to_cos", BOOL, true)?,
            freq_shift: c.optional("freq_shift", "0 or 1", 0)?,
            time_embed_dim: c.size_or("time_embedding_dim", 4 * block_out_channels[0])?,
            down_attention: block_types(&c, "down_block_types", n, ["DownBlock2D", "CrossAttnDownBlock2D"])?,
            up_attention: block_types(&c, "up_block_types", n, ["UpBlock2D", "CrossAttnUpBlock2D"])?,
            // diffusers calls the number of heads attention_head_dim here, and keeps to it (its issue 2011).
            heads: per_block(&c, "attention_head_dim", n, 8)?,
            mid_transformers: down_transformers[n - 1][0],
            cross_attention_dim: c.size_or("cross_attention_dim", 1280)?,
            use_linear_projection: c.optional("use_linear_projection", BOOL, false)?,
            upcast_attention: c.optional("upcast_attention", BOOL, false)?,
            downsample_padding: c.optional("downsample_padding", "0 or 1", 1)?,
            norm_num_groups: c.size_or("norm_num_groups", 32)?,
            norm_eps: c.optional("norm_eps", "a number", 1e-5)?,
            added: added(&c)?,
            block_out_channels,
            layers_per_block,
            down_transformers,
            up_transformers,
        };
        config.check(&c)?;
        // dropout does nothing in a frozen network.
        c.finish(&["dropout", "addition_embed_type_num_heads"])?;
        Ok(config)
    }

    /// P: the width of the pooled text that is expected beside SDXL's six `time_ids`, if any is.
    ///
    /// # Errors
    /// They would leave nothing for it: the network is of another kind.
    pub fn pooled_width(&self) -> Result<Option<i64>> {
        let Some(added) = self.added else { return Ok(None) };
        let sizes = 6 * added.time_width;
        if added.input_width <= sizes {
            let rule = format!("above 6 · addition_time_embed_dim, {sizes}: SDXL's six time_ids, and the pooled text");
            return Err(ModelError::argument("projection_class_embeddings_input_dim", rule, added.input_width));
        }
        Ok(Some(added.input_width - sizes))
    }

    /// How often the way down halves the sample.
    pub fn halvings(&self) -> usize {
        self.block_out_channels.len() - 1
    }

    fn check(&self, c: &ConfigFile) -> Result<()> {
        let rule = |field, holds: bool, rule: &str| if holds { Ok(()) } else { Err(c.refuse(field, rule)) };
        let out = self.out_channels;
        let why = "ella has nothing to give for the further inputs of in-painting, depth, upscaling and editing models";
        rule("in_channels", self.in_channels == out, &format!("out_channels, {out}, because {why}"))?;
        rule("freq_shift", (0..=1).contains(&self.freq_shift), "0 or 1")?;
        rule("downsample_padding", (0..=1).contains(&self.downsample_padding), "0 or 1")?;
        rule("norm_eps", self.norm_eps > 0.0, "above 0")?;
        // Below 4 channels the sinusoid's range of frequencies is empty.
        rule("block_out_channels", self.block_out_channels[0] >= 4, "at least 4 in its first entry")?;
        for (level, &channels) in self.block_out_channels.iter().enumerate() {
            let divides = channels % self.norm_num_groups == 0;
            rule("norm_num_groups", divides, &format!("a divisor of block_out_channels, of which one is {channels}"))?;
            let divides = channels % self.heads[level] == 0 || !self.attends(level);
            rule("attention_head_dim", divides, &format!("a number of heads that divides the block's {channels} channels"))?;
        }
        Ok(())
    }

    /// Whether any transformer works at this level: on the way down, up, or in the middle.
    pub(crate) fn attends(&self, level: usize) -> bool {
        let last = self.halvings();
        self.down_attention[level] || self.up_attention[last - level] || level == last
    }
}

const BOOL: &str = "true or false";
const CHANNELS: &str = "a list of numbers of channels, one for each block";

/// Switches of which one side is supported: each named, so that none is ignored.
fn refuse_unsupported(c: &ConfigFile) -> Result<()> {
    let only: [(&str, &[Value]); 15] = [
        ("_class_name", &[json!("UNet2DConditionModel")]),
        ("act_fn", &[json!("silu"), json!("swish")]),
        ("attention_type", &[json!("default")]),
        ("class_embeddings_concat", &[json!(false)]),
        ("conv_in_kernel", &[json!(3)]),
        ("conv_out_kernel", &[json!(3)]),
        ("dual_cross_attention", &[json!(false)]),
        ("mid_block_only_cross_attention", &[json!(false)]),
        ("mid_block_scale_factor", &[json!(1)]),
        ("mid_block_type", &[json!("UNetMidBlock2DCrossAttn")]),
        ("only_cross_attention", &[json!(false)]),
        ("resnet_out_scale_factor", &[json!(1)]),
        ("resnet_skip_time_act", &[json!(false)]),
        ("resnet_time_scale_shift", &[json!("default")]),
        ("time_embedding_type", &[json!("positional")]),
    ];
    let absent = [
        "class_embed_type",
        "cross_attention_norm",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "num_attention_heads",
        "num_class_embeds",
        "time_cond_proj_dim",
        "time_embedding_act_fn",
        "timestep_post_act",
    ];
    for field in absent {
        if c.value(field).is_some() {
            return Err(c.refuse(field, "null or absent"));
        }
    }
    only.iter().try_for_each(|(field, supported)| c.only(field, supported))
}

/// The conditions that are added to the time embedding.
fn added(c: &ConfigFile) -> Result<Option<AddedConfig>> {
    let (kind, time, input) = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim");
    if c.value(kind).is_none() {
        return match [time, input].into_iter().find(|field| c.value(field).is_some()) {
            Some(field) => Err(c.refuse(field, "null or absent, as addition_embed_type is")),
            None => Ok(None),
        };
    }
    c.only(kind, &[json!("text_time")])?;
    let added = AddedConfig { time_width: c.size(time)?, input_width: c.size(input)? };
    if added.time_width < 4 {
        return Err(c.refuse(time, "at least 4"));
    }
    if added.input_width <= added.time_width {
        return Err(c.refuse(input, &format!("above addition_time_embed_dim, {}", added.time_width)));
    }
    Ok(Some(added))
}

/// What sizes and counts of one block may be.
const COUNTS: RangeInclusive<i64> = 1..=1 << 20;

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

/// A number for each residual block of each block.
type Counts = Vec<Vec<i64>>;

#[derive(Deserialize)]
#[serde(untagged)]
enum Depths {
    All(i64),
    Each(Vec<OneOrMany>),
}

/// The numbers of transformer layers after each residual block, by block: (of the way down, of the way up), for blocks of `layers` residual
/// blocks on the way down. The way up is the mirror image unless it has its own field.
fn transformers(c: &ConfigFile, layers: &[i64]) -> Result<(Counts, Counts)> {
    let (down, up) = ("transformer_layers_per_block", "reverse_transformer_layers_per_block");
    let lists = format!("a list of {} whole numbers of at least 1, or of lists with one for each residual block", layers.len());
    let rule = format!("a whole number of at least 1, or {lists}");
    let depths = match c.optional(down, &rule, Depths::All(1))? {
        Depths::All(depth) => vec![OneOrMany::One(depth); layers.len()],
        Depths::Each(depths) => depths,
    };
    let downward = spread(&depths, layers.iter().copied()).ok_or_else(|| c.refuse(down, &rule))?;
    // A list for the way down has no mirror image: blocks of the way up have one residual block more.
    let depths: Vec<OneOrMany> = c.get(up, &lists)?.unwrap_or_else(|| depths.into_iter().rev().collect());
    let upward = spread(&depths, layers.iter().rev().map(|layers| layers + 1));
    Ok((downward, upward.ok_or_else(|| c.refuse(up, &format!("{lists} of the way up")))?))
}

/// A number for each of a block's `layers`, for all blocks, if all fit.
fn spread(depths: &[OneOrMany], layers: impl ExactSizeIterator<Item = i64>) -> Option<Counts> {
    let block = |(depths, layers): (&OneOrMany, i64)| {
        let depths = match depths {
            OneOrMany::One(depth) => vec![*depth; layers as usize],
            OneOrMany::Many(depths) => depths.clone(),
        };
        (depths.len() as i64 == layers && depths.iter().all(|depth| COUNTS.contains(depth))).then_some(depths)
    };
    if depths.len() == layers.len() { depths.iter().zip(layers).map(block).collect() } else { None }
}

/// A positive number for all blocks, or a list with one for each of `n`.
fn per_block(c: &ConfigFile, field: &str, n: usize, default: i64) -> Result<Vec<i64>> {
    let rule = format!("a whole number of at least 1, or a list of {n} of them");
    let values = match c.optional(field, &rule, OneOrMany::One(default))? {
        OneOrMany::One(value) => vec![value; n],
        OneOrMany::Many(values) => values,
    };
    let fits = values.len() == n && values.iter().all(|value| COUNTS.contains(value));
    if fits { Ok(values) } else { Err(c.refuse(field, &rule)) }
}

/// For each of `n` blocks whether it is of the second kind, the one with transformers.
fn block_types(c: &ConfigFile, field: &str, n: usize, kinds: [&str; 2]) -> Result<Vec<bool>> {
    let rule = format!("a list of {n} of {} and {}, as long as block_out_channels", kinds[0], kinds[1]);
    let names: Vec<String> = c.required(field, &rule)?;
    let flags: Option<Vec<bool>> = names.iter().map(|name| kinds.iter().position(|kind| kind == name).map(|at| at == 1)).collect();
    flags.filter(|flags| flags.len() == n).ok_or_else(|| c.refuse(field, &rule))
}
