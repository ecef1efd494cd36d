//! What the networks of a step take of a device's memory, by arithmetic over their configurations: nothing is allocated, nothing loaded.
//!
//! Of a frozen network autograd keeps what the gradient of its *input* is made from: no linear layer's input, but both inputs of products,
//! what goes into norms and activations, and what goes into convolutions (libtorch keeps that whether or not their weights train). Group norms
//! take float32, so that a 16-bit network keeps a copy of twice the size for each; fused operators keep less. Before the first transformer of the U-Net nothing depends on
//! the text and nothing is kept, unless the pooled text (SDXL) reaches all residual blocks by the time embedding.
//!
//! Small things are left out: moments of group norms, embeddings of the time, biases. `model/tests/memory.rs` holds this against what
//! libtorch really keeps.

use ella_cuda::fused::Fused;
use serde::Serialize;
use tch::Kind;

use crate::connector::{ConnectorConfig, ConnectorKind};
use crate::unet::UNetConfig;

/// Of float32.
const FLOAT: u64 = 4;
/// The mean and deviation of a place, which a layer norm keeps.
const MOMENTS: u64 = 2 * FLOAT;

/// One figure, and how it was reckoned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Figure {
    /// Of what.
    pub name: String,
    /// Bytes on the device.
    pub bytes: u64,
    /// What they come from.
    pub formula: String,
}

/// What goes through the U-Net at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// B.
    pub samples: u64,
    /// Height and width of the latents.
    pub size: (u64, u64),
    /// L: states of the text.
    pub states: u64,
    /// What the network computes in.
    pub kind: Kind,
    /// Which of its operators are fused: those keep less.
    pub fused: Fused,
}

/// A number of bytes for each place of a feature map, and for each sample besides.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    place: u64,
    sample: u64,
}

/// Walks a U-Net's blocks.
struct Walk<'a> {
    config: &'a UNetConfig,
    pass: Pass,
    /// Bytes of a number in the network's kind.
    number: u64,
    /// Whether what comes next depends on the text: only then is anything kept.
    depends: bool,
    /// Of each map that the way up takes beside its own: whether a norm on the way down keeps it.
    skips: Vec<bool>,
}

/// What autograd keeps of the U-Net from the forward pass to the backward pass, by block in the order of the forward pass.
pub fn unet_activations(config: &UNetConfig, pass: Pass) -> Vec<Figure> {
    let mut walk = Walk { config, pass, number: pass.kind.elt_size_in_bytes() as u64, depends: false, skips: vec![false] };
    let levels = config.block_out_channels.len();
    let mut figures = Vec::new();
    for level in 0..levels {
        figures.push(walk.down(level));
    }
    figures.push(walk.middle());
    for i in 0..levels {
        figures.push(walk.up(i));
    }
    figures.push(walk.last());
    figures
}

/// The same with gradient checkpointing: what goes into every block, and the whole of the one that keeps most.
pub fn unet_checkpointed(config: &UNetConfig, pass: Pass) -> Vec<Figure> {
    let number = pass.kind.elt_size_in_bytes() as u64;
    let (levels, places) = (config.block_out_channels.len(), |level| places(config, pass, level));
    let channels = |level: usize| config.block_out_channels[level] as u64;
    // Of conv_in; of every layer and downsampling on the way down; of the middle; of every block on the way up.
    let mut numbers = channels(0) * places(0);
    for level in 0..levels {
        numbers += config.layers_per_block[level] as u64 * channels(level) * places(level);
        numbers += if level + 1 < levels { channels(level) * places(level + 1) } else { channels(level) * places(level) };
        numbers += channels(level) * places(level.saturating_sub(1));
    }
    let inputs = Figure {
        name: "what goes into each block".to_owned(),
        bytes: pass.samples * numbers * number,
        formula: format!("{} samples × {numbers} numbers × {number} bytes", pass.samples),
    };
    let largest = unet_activations(config, pass).into_iter().max_by_key(|figure| figure.bytes);
    let largest = largest.map(|figure| Figure { name: format!("{}, made again", figure.name), ..figure });
    std::iter::once(inputs).chain(largest).collect()
}

/// What the fused changes of resolution hold of weights beside the network's own: sums of them, for the way there and the way back.
pub fn unet_resized(config: &UNetConfig, kind: Kind) -> Figure {
    let halvings = config.halvings();
    let squares = |levels: std::ops::Range<usize>| levels.map(|level| config.block_out_channels[level].unsigned_abs().pow(2)).sum::<u64>();
    // Four kernels of 2 × 2 for the gradient of a half, four there and one of 4 × 4 back for a double.
    let halves = if config.downsample_padding == 1 { 16 * squares(0..halvings) } else { 0 };
    let (numbers, number) = (halves + 32 * squares(1..halvings + 1), kind.elt_size_in_bytes() as u64);
    Figure {
        name: "weights of changes of resolution".to_owned(),
        bytes: numbers * number,
        formula: format!("{numbers} sums of weights × {number} bytes"),
    }
}

/// What one operation of the U-Net holds beside what is kept, at most: what it takes, makes, and the gradients of both.
pub fn unet_workspace(config: &UNetConfig, pass: Pass) -> Figure {
    let number = pass.kind.elt_size_in_bytes() as u64;
    let each = |level: usize| {
        let channels = config.block_out_channels[level] as u64;
        let widest = channels + config.block_out_channels[(level + 1).min(config.halvings())] as u64;
        // A norm backward: three maps in float32 and two in the network's kind; or a gated layer: values, gates and their gradients.
        let (norm, gated) = ((3 * FLOAT + 2 * number) * widest, if config.attends(level) { 16 * number * channels } else { 0 });
        (norm.max(gated), places(config, pass, level))
    };
    let (bytes, places) = (0..config.block_out_channels.len()).map(each).max_by_key(|(bytes, places)| bytes * places).unwrap_or_default();
    Figure {
        name: "the largest operation".to_owned(),
        bytes: pass.samples * places * bytes,
        formula: format!("{} samples × {places} places × {bytes} bytes: what it takes and makes, and their gradients", pass.samples),
    }
}

/// What autograd keeps of a connector, which trains: linear layers' inputs too. `tokens` is S, `number` the bytes of a number in what it computes in;
/// norms and the stream of latents are float32. Of the `fused` operators norms are its own.
pub fn connector_activations(config: &ConnectorConfig, (samples, tokens): (u64, u64), number: u64, fused: Fused) -> Figure {
    let size = |n: i64| n.unsigned_abs();
    let (d, l, e, heads) = (size(config.width), size(config.latents), size(config.text_width), size(config.heads));
    let fused = fused.norm && config.fits_fused_norm();
    // What a norm makes goes into a linear layer; the timestep's factor comes between.
    let made = number + if config.kind.is_timed() && !fused { FLOAT } else { 0 };
    // The text is the same for all blocks, unless each needs it in float32.
    let text = if number == FLOAT || fused { 0 } else { FLOAT };
    let gates = if config.kind == ConnectorKind::TscZero { 2 } else { 0 };
    let norms = 2 * (FLOAT + made) * l * d + (text + made) * tokens * d;
    // Queries with the latents' own keys and values, all keys, all values, what is mixed; the MLP: four times the width, twice.
    let products = number * ((3 + 1 + 8 + gates) * l * d + 2 * (l + tokens) * d) + FLOAT * heads * l;
    let block = norms + products;
    let (bytes, formula) = match config.kind {
        ConnectorKind::Mlp => (number * tokens * (e + 2 * d), format!("{number} bytes × S × (E + 2 D), S = {tokens}, E = {e}, D = {d}")),
        _ => {
            let blocks = size(config.layers);
            let formula =
                format!("({number} bytes × S × (E + D) + {blocks} blocks × {block} bytes), S = {tokens}, E = {e}, D = {d}, L = {l}");
            (number * tokens * (e + d) + blocks * block, formula)
        }
    };
    let states = if config.kind == ConnectorKind::Mlp { tokens } else { l };
    let pool = if config.pooled.is_some() { 4 * number * (1 + states) * d } else { 0 };
    Figure { name: "connector".to_owned(), bytes: samples * (bytes + pool), formula: format!("{samples} samples × {formula}") }
}

/// Places of a feature map at a level: each halves the one before.
fn places(config: &UNetConfig, pass: Pass, level: usize) -> u64 {
    let half = |n: u64| if config.downsample_padding == 0 { n / 2 } else { n.div_ceil(2) };
    let (h, w) = (0..level).fold(pass.size, |(h, w), _| (half(h), half(w)));
    h * w
}

impl Walk<'_> {
    fn channels(&self, level: usize) -> u64 {
        self.config.block_out_channels[level] as u64
    }

    fn places(&self, level: usize) -> u64 {
        places(self.config, self.pass, level)
    }

    /// What a norm and the activation after it keep, and the convolution after that, of so many channels. A fused norm keeps what it takes as
    /// it is, and makes the rest again; a fused convolution keeps nothing.
    fn normed(&self, channels: u64) -> u64 {
        let norm = if self.pass.fused.norm { self.number } else { FLOAT + self.number };
        channels * norm + self.convolved(channels)
    }

    /// What a convolution keeps of its input.
    fn convolved(&self, channels: u64) -> u64 {
        if self.pass.fused.conv { 0 } else { channels * self.number }
    }

    /// The same of a change of resolution.
    fn resized(&self, channels: u64) -> u64 {
        if self.pass.fused.resize { 0 } else { self.convolved(channels) }
    }

    fn resnet(&mut self, input: u64, output: u64) -> Kept {
        // A norm that takes the map as it is has kept the shortcut's input already.
        let shortcut = if input == output || self.pass.fused.norm || self.number == FLOAT { 0 } else { self.convolved(input) };
        let first = if self.depends { self.normed(input) + shortcut } else { 0 };
        // The pooled text comes in by the time embedding, in the middle of each block.
        self.depends |= self.config.added.is_some();
        let second = if self.depends { self.normed(output) } else { 0 };
        Kept { place: first + second, sample: 0 }
    }

    fn transformer(&mut self, level: usize, depth: u64) -> Kept {
        let (c, heads) = (self.channels(level), self.config.heads[level] as u64);
        // Queries, keys, values and what is mixed.
        let mixed = if self.config.upcast_attention { FLOAT } else { self.number };
        let sums = heads * FLOAT;
        // Values and gates, and the activated gates unless they are made again.
        let gated = if self.pass.fused.gate { 8 * c * self.number } else { 12 * c * self.number };
        let norm = c * self.number + MOMENTS;
        let fused = self.pass.fused.takes_few_keys(self.pass.states as i64, (c / heads) as i64, self.pass.kind);
        let few = fused && !self.config.upcast_attention;
        let mut kept = Kept::default();
        if self.depends {
            kept.place += c * if self.pass.fused.norm { self.number } else { FLOAT }; // the group norm
        }
        for _ in 0..depth {
            if self.depends {
                kept.place += 2 * norm + 4 * c * mixed + sums; // two layer norms, attention to itself
            }
            // Attention to the text; to few keys, nothing of what it makes.
            kept.place += if few { c * mixed } else { 2 * c * mixed + sums };
            kept.sample += 2 * self.pass.states * c * mixed; // its keys and values
            kept.place += norm + gated; // a layer norm, and the gated layer
            self.depends = true;
        }
        kept
    }

    fn down(&mut self, level: usize) -> Figure {
        let (c, places) = (self.channels(level), self.places(level));
        let mut kept = Kept::default();
        let (layers, halves) = (self.config.layers_per_block[level] as usize, level < self.config.halvings());
        for i in 0..layers {
            let input = if i == 0 { self.channels(level.saturating_sub(1)) } else { c };
            let depth = self.config.down_attention[level].then(|| self.config.down_transformers[level][i] as u64);
            kept = kept.and(self.layer(level, (input, c), depth));
            // A fused norm keeps what comes next into it; downsampling has none.
            self.skips.push(self.depends && !(halves && i + 1 == layers));
        }
        if halves {
            self.skips.push(self.depends);
            kept.place += if self.depends { self.resized(c) } else { 0 };
        }
        self.figure(format!("down_blocks.{level}"), kept, places, 0)
    }

    fn middle(&mut self) -> Figure {
        let level = self.config.halvings();
        let c = self.channels(level);
        let first = self.layer(level, (c, c), Some(self.config.mid_transformers as u64));
        let second = self.resnet(c, c);
        self.figure("mid_block".to_owned(), first.and(second), self.places(level), 0)
    }

    fn up(&mut self, i: usize) -> Figure {
        let level = self.config.halvings() - i;
        let (c, last) = (self.channels(level), self.config.layers_per_block[level] as usize);
        let mut kept = Kept::default();
        for j in 0..=last {
            let skip = if j == last { self.channels(level.saturating_sub(1)) } else { c };
            // Fused, both maps are kept as they are, and the way down may have kept the skip already; else they become one.
            let apart = self.pass.fused.norm && self.pass.fused.conv;
            let skip = if self.skips.pop().unwrap_or_default() && apart { 0 } else { skip };
            let input = if j == 0 { self.channels((level + 1).min(self.config.halvings())) } else { c };
            let depth = self.config.up_attention[i].then(|| self.config.up_transformers[i][j] as u64);
            kept = kept.and(self.layer(level, (input + skip, c), depth));
        }
        let larger = if level > 0 { self.places(level - 1) * self.resized(c) } else { 0 };
        self.figure(format!("up_blocks.{i}"), kept, self.places(level), larger)
    }

    fn last(&self) -> Figure {
        // The prediction, and what the loss compares.
        let out = self.config.out_channels as u64;
        let kept = Kept { place: self.normed(self.channels(0)) + out * (self.number + 2 * FLOAT), sample: 0 };
        self.figure("conv_out and the loss".to_owned(), kept, self.places(0), 0)
    }

    fn layer(&mut self, level: usize, (input, output): (u64, u64), depth: Option<u64>) -> Kept {
        let resnet = self.resnet(input, output);
        depth.map_or(resnet, |depth| resnet.and(self.transformer(level, depth)))
    }

    fn figure(&self, name: String, kept: Kept, places: u64, besides: u64) -> Figure {
        let each = kept.place * places + kept.sample + besides;
        let mut formula = format!("{} samples × ({places} places × {} bytes", self.pass.samples, kept.place);
        for (bytes, what) in [(kept.sample, "of the text"), (besides, "upsampled")] {
            if bytes > 0 {
                formula += &format!(" + {bytes} {what}");
            }
        }
        Figure { name, bytes: self.pass.samples * each, formula: formula + ")" }
    }
}

impl Kept {
    fn and(self, other: Self) -> Self {
        Self { place: self.place + other.place, sample: self.sample + other.sample }
    }
}
