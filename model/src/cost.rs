//! What a step costs, by arithmetic: the FLOP of every operation, and the numbers that it moves to and from memory. Pure.
//!
//! A network is a list of [`Operation`]s, made from its configuration by [`unet`], [`connector`], [`t5`], [`vae_encoder`] and
//! [`vae_decoder`] for one sample. A multiply-add is 2 FLOP; what is not a matrix product (norms, activations, sums) counts no FLOP, for it
//! never decides: it counts what it moves.
//!
//! Two figures of bytes come out of one list. Every operation as a kernel of its own reads its inputs once and writes its output once. In
//! the ideal fused pass only matrix products and attention touch memory: norms, activations and sums ride on what they write or read
//! ([`Family::is_fused`]). The second is what [`floor`] takes, so that no kernel can be below it.
//!
//! Backward passes are the ones that training a connector needs. Through the U-Net: gradients of activations alone, and of those only what
//! lies behind the first place where the text comes in. Through the connector: gradients of its parameters too.

mod small;
mod unet;

use std::collections::BTreeMap;
use std::ops::AddAssign;

pub use small::{connector, t5, vae_decoder, vae_encoder};
pub use unet::unet;

/// What kind of work an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// 2-D convolutions.
    Convolution,
    /// Linear maps, the projections around attention among them.
    Linear,
    /// A picture's tokens, or a text's, attending to each other: the two products and the softmax between.
    SelfAttention,
    /// Attention to something else: of pixels to the text, of latents to latents and text.
    CrossAttention,
    /// Norms, with the activation or modulation after them.
    Norm,
    /// Sums, gates, concatenations, changes of resolution.
    Elementwise,
}

impl Family {
    /// All of them, by the names that tables have for them.
    pub const NAMES: [(&'static str, Family); 6] = [
        ("convolution", Family::Convolution),
        ("linear", Family::Linear),
        ("self-attention", Family::SelfAttention),
        ("cross-attention", Family::CrossAttention),
        ("norm", Family::Norm),
        ("elementwise", Family::Elementwise),
    ];

    /// Whether the ideal pass moves nothing for it.
    pub fn is_fused(self) -> bool {
        matches!(self, Family::Norm | Family::Elementwise)
    }
}

/// What one pass of an operation does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Multiply-adds for a sample.
    pub macs: u64,
    /// Numbers read and written for a sample: activations and their gradients.
    pub data: u64,
    /// Numbers read and written once for a whole micro-batch: parameters and their gradients.
    pub weights: u64,
}

impl Work {
    /// FLOP for so many samples.
    pub fn flops(&self, samples: u64) -> f64 {
        2.0 * self.macs as f64 * samples as f64
    }

    /// Bytes for so many samples at once, in numbers of `width` bytes.
    pub fn bytes(&self, samples: u64, width: u64) -> f64 {
        (self.data as f64 * samples as f64 + self.weights as f64) * width as f64
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.macs += other.macs;
        self.data += other.data;
        self.weights += other.weights;
    }
}

/// One operation of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What kind of work.
    pub family: Family,
    /// How often the feature map has been halved where it happens; 0 where there are no levels.
    pub level: usize,
    /// The forward pass.
    pub forward: Work,
    /// The backward pass; nothing where no gradient goes.
    pub backward: Work,
    /// Multiply-adds for a sample that flash attention does once more in its backward pass, for it keeps no scores. They are in no other
    /// figure.
    pub recompute: u64,
}

/// Which gradients an operation's backward pass makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Back {
    None,
    /// Of what comes in.
    Input,
    /// Of its parameters.
    Weights,
    /// Of both.
    Both,
}

impl Back {
    fn input(self) -> bool {
        matches!(self, Back::Input | Back::Both)
    }

    fn weights(self) -> bool {
        matches!(self, Back::Weights | Back::Both)
    }

    fn any(self) -> bool {
        self != Back::None
    }
}

/// A matrix product, linear or a convolution: multiply-adds and numbers of a sample.
#[derive(Clone, Copy, Debug)]
struct Product {
    macs: i64,
    input: i64,
    output: i64,
    weights: i64,
}

impl Product {
    /// A linear map of `rows` rows.
    fn linear((input, output): (i64, i64), rows: i64, bias: bool) -> Self {
        let weights = input * output + if bias { output } else { 0 };
        Product { macs: rows * input * output, input: rows * input, output: rows * output, weights }
    }

    /// A convolution with a square kernel, from maps of so many pixels to maps of so many.
    fn convolution((input, output): (i64, i64), kernel: i64, (before, after): (i64, i64)) -> Self {
        let weights = input * output * kernel * kernel;
        Product { macs: weights * after, input: input * before, output: output * after, weights: weights + output }
    }

    fn operation(self, family: Family, level: usize, back: Back) -> Operation {
        let Product { macs, input, output, weights } = self;
        let forward = work(macs, input + output, weights);
        // Each reads the gradient of the output, and writes that of the input or of the weights from the other one.
        let mut backward = Work::default();
        if back.input() {
            backward += forward;
        }
        if back.weights() {
            backward += forward;
        }
        Operation { family, level, forward, backward, recompute: 0 }
    }
}

/// `queries` × `keys` attention of `width` channels in all its heads: QKᵀ, and its softmax times V.
fn attention(family: Family, level: usize, (queries, keys): (i64, i64), width: i64, back: Back) -> Operation {
    let product = queries * keys * width;
    let (input, output) = ((queries + 2 * keys) * width, queries * width);
    // Backward, four products (of Q, K, V and the scores) over two, from Q, K, V, the output and its gradient.
    let backward = if back.any() { work(4 * product, 2 * input + 2 * output, 0) } else { Work::default() };
    let recompute = if back.any() { product as u64 } else { 0 };
    Operation { family, level, forward: work(2 * product, input + output, 0), backward, recompute }
}

/// A norm over so many numbers with so many parameters.
fn norm(level: usize, numbers: i64, weights: i64, back: Back) -> Operation {
    let backward = if back.any() { work(0, 3 * numbers, weights) } else { Work::default() };
    Operation { family: Family::Norm, level, forward: work(0, 2 * numbers, weights), backward, recompute: 0 }
}

/// Something that reads so many numbers and writes so many, and that needs nothing but its output's gradient to give its inputs'.
fn moved(level: usize, (read, written): (i64, i64), back: Back) -> Operation {
    let both = work(0, read + written, 0);
    let backward = if back.any() { both } else { Work::default() };
    Operation { family: Family::Elementwise, level, forward: both, backward, recompute: 0 }
}

/// A nonlinear one, whose backward pass reads its inputs once more.
fn activated(level: usize, (read, written): (i64, i64), back: Back) -> Operation {
    let mut operation = moved(level, (read, written), back);
    if back.any() {
        operation.backward.data += read as u64;
    }
    operation
}

/// Sizes are of networks that exist, and never negative.
fn work(macs: i64, data: i64, weights: i64) -> Work {
    Work { macs: macs.unsigned_abs(), data: data.unsigned_abs(), weights: weights.unsigned_abs() }
}

/// What operations do together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// The forward pass.
    pub forward: Work,
    /// The backward pass.
    pub backward: Work,
    /// [`Operation::recompute`].
    pub recompute: u64,
}

impl Total {
    /// FLOP of a sample in both passes, without what is computed twice: the figure that speeds are told in.
    pub fn flops(&self) -> f64 {
        self.forward.flops(1) + self.backward.flops(1)
    }
}

impl AddAssign<&Operation> for Total {
    fn add_assign(&mut self, operation: &Operation) {
        self.forward += operation.forward;
        self.backward += operation.backward;
        self.recompute += operation.recompute;
    }
}

/// The sum over operations.
pub fn total<'a>(operations: impl IntoIterator<Item = &'a Operation>) -> Total {
    let mut total = Total::default();
    operations.into_iter().for_each(|operation| total += operation);
    total
}

/// The sums by what `key` tells of each operation: its family, or its level.
pub fn by<K: Ord>(operations: &[Operation], key: impl Fn(&Operation) -> K) -> BTreeMap<K, Total> {
    let mut sums = BTreeMap::<K, Total>::new();
    operations.iter().for_each(|operation| *sums.entry(key(operation)).or_default() += operation);
    sums
}

/// A GPU, by its maker's figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Its name.
    pub name: &'static str,
    /// Products of dense bf16 matrices, FLOP/s.
    pub peak: f64,
    /// Of its memory, bytes/s.
    pub bandwidth: f64,
}

/// The SXM modules' data sheets (nvidia.com/en-us/data-center/h200, /h100, /a100: with sparsity, of which half is dense).
pub const GPUS: [Gpu; 3] = [
    Gpu { name: "H200", peak: 989e12, bandwidth: 4.8e12 },
    Gpu { name: "H100", peak: 989e12, bandwidth: 3.35e12 },
    Gpu { name: "A100", peak: 312e12, bandwidth: 2.039e12 },
];

impl Gpu {
    /// Seconds below which this work cannot be done for `samples` at once in numbers of `width` bytes: each operation takes as long as its
    /// FLOP or its bytes, whichever is longer.
    fn least(&self, work: &Work, samples: u64, width: u64) -> f64 {
        (work.flops(samples) / self.peak).max(work.bytes(samples, width) / self.bandwidth)
    }
}

/// The least time of operations on a GPU, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Floor {
    /// Of matrix products and attention, each by itself, with all else riding on them.
    pub fused: f64,
    /// What norms, activations and sums add, each as a kernel of its own that reads once and writes once.
    pub unfused: f64,
}

/// The floor of `samples` samples at once in numbers of `width` bytes, both passes.
pub fn floor<'a>(operations: impl IntoIterator<Item = &'a Operation>, gpu: &Gpu, samples: u64, width: u64) -> Floor {
    let mut floor = Floor::default();
    for operation in operations {
        let seconds = gpu.least(&operation.forward, samples, width) + gpu.least(&operation.backward, samples, width);
        match operation.family.is_fused() {
            true => floor.unfused += seconds,
            false => floor.fused += seconds,
        }
    }
    floor
}

/// Bytes that one fused update of so many float32 parameters moves: the gradient twice (its norm, then the update), and weights, both
/// moments and the moving average, each read and written.
pub fn optimizer_bytes(parameters: u64) -> f64 {
    (2 + 4 * 2) as f64 * 4.0 * parameters as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connector::{ConnectorConfig, ConnectorKind};
    use crate::presets::Preset;
    use crate::t5::T5Config;

    fn giga(work: Work) -> f64 {
        work.macs as f64 / 1e9
    }

    #[track_caller]
    fn near(found: f64, expected: f64, tolerance: f64) {
        assert!((found - expected).abs() <= tolerance, "{found} (expected {expected} within {tolerance})");
    }

    fn forward(preset: Preset, latent: i64, tokens: i64) -> f64 {
        giga(total(&unet(&preset.unet().unwrap(), (latent, latent), tokens)).forward)
    }

    /// Paper §7.1's table, to its last digit.
    #[test]
    fn forward_passes_are_the_papers() {
        near(forward(Preset::Sd15, 64, 64), 401.1, 0.05);
        near(forward(Preset::Sd15, 64, 77), 401.6, 0.05);
        near(forward(Preset::Sd15, 32, 64), 89.7, 0.05);
        near(forward(Preset::Sdxl, 128, 77), 3380.6, 0.05);
        near(forward(Preset::Sdxl, 64, 64), 789.3, 0.05);
    }

    #[test]
    fn families_are_the_papers() {
        let families = by(&unet(&Preset::Sd15.unet().unwrap(), (64, 64), 77), |operation| operation.family);
        let of = |family| giga(families[&family].forward);
        near(of(Family::Convolution), 209.2, 0.05);
        // 128.0, and 1.5 of the text's keys and values.
        near(of(Family::Linear), 129.5, 0.1);
        near(of(Family::SelfAttention) + of(Family::CrossAttention), 63.0, 0.05);
        assert!([Family::Norm, Family::Elementwise].iter().all(|family| families[family].forward.macs == 0));
    }

    /// 433 GMAC, and 459 with what flash attention computes twice; 1.67 to 1.72 TFLOP with the forward pass. The paper's figures have the
    /// gradient of what the first queries to the text are made from, which leads nowhere and is not made here.
    #[test]
    fn the_step_is_the_papers() {
        let step = total(&unet(&Preset::Sd15.unet().unwrap(), (64, 64), 64));
        let backward = giga(step.backward) + (64 * 64 * 320 * 320) as f64 / 1e9;
        near(backward, 433.0, 0.5);
        near(backward + step.recompute as f64 / 1e9, 459.0, 0.5);
        near(step.flops() / 1e12, 1.67, 0.005);
        near((step.flops() + 2.0 * step.recompute as f64) / 1e12, 1.72, 0.005);
    }

    #[test]
    fn connectors_and_encoders_are_the_papers() {
        let tsc = total(&connector(&ConnectorConfig::new(ConnectorKind::Tsc, 768, 2048), 128));
        near(giga(tsc.forward), 3.96, 0.005);
        // The paper's is three times the forward pass, with a gradient of the features that nobody needs.
        let features = (128 * 2048 * 768) as f64;
        near((tsc.flops() + 2.0 * features) / 1e12, 0.024, 0.0005);
        near(giga(total(&connector(&ConnectorConfig::new(ConnectorKind::Tsc, 2048, 2048), 128)).forward), 26.8, 0.05);
        for (tokens, expected) in [(64, 74.5), (128, 149.8), (256, 302.8)] {
            near(giga(total(&t5(&T5Config::flan_t5_xl(), tokens)).forward), expected, 0.1);
        }
        let vae = Preset::Sd15.vae().unwrap();
        // To the last one as torch's FlopCounterMode counts diffusers' (onnx-tool, which the paper cites, counts norms and activations
        // too).
        assert_eq!(total(&vae_encoder(&vae, (512, 512))).forward.macs, 558_329_233_408);
        assert_eq!(total(&vae_decoder(&vae, (512, 512))).forward.macs, 1_257_259_466_752);
    }

    /// The lists have every parameter of the networks, and no other.
    #[test]
    fn weights_are_those_of_the_networks() {
        for (preset, parameters) in [(Preset::Sd15, 859_520_964), (Preset::Sdxl, 2_567_463_684)] {
            assert_eq!(total(&unet(&preset.unet().unwrap(), (64, 64), 64)).forward.weights, parameters);
        }
        for kind in [ConnectorKind::Tsc, ConnectorKind::TscZero, ConnectorKind::Resampler, ConnectorKind::Mlp] {
            let config = ConnectorConfig { pooled: Some(32), ..ConnectorConfig::new(kind, 64, 96) };
            let layout = crate::connector::Connector::layout(&config).unwrap();
            let parameters: i64 = layout.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
            assert_eq!(total(&connector(&config, 16)).forward.weights as i64, parameters, "{kind:?}");
        }
        let vae = Preset::Sd15.vae().unwrap();
        let both = total(&vae_encoder(&vae, (64, 64))).forward.weights + total(&vae_decoder(&vae, (64, 64))).forward.weights;
        assert_eq!(both, 83_653_863);
        let inner = total(&t5(&T5Config::flan_t5_xl(), 8)).forward.weights;
        assert_eq!(inner, 1_223_527_424 - 32128 * 2048 - 32 * 32);
    }

    /// Where the pooled text comes in with the time, the gradient goes on to the first residual block; else it ends at the first
    /// transformer.
    #[test]
    fn the_gradient_ends_where_the_text_comes_in_first() {
        let ends = |preset: Preset| {
            let operations = unet(&preset.unet().unwrap(), (64, 64), 64);
            let last = |operation: &Operation| operation.backward != Work::default() && operation.family != Family::Linear;
            let first = operations.iter().position(last).unwrap();
            operations[first].family
        };
        assert_eq!(ends(Preset::Sd15), Family::CrossAttention);
        assert_eq!(ends(Preset::Sdxl), Family::Norm);
    }

    #[test]
    fn levels_and_families_add_up_and_odd_sizes_go_through() {
        let operations = unet(&Preset::Sd15.unet().unwrap(), (72, 57), 64);
        let all = total(&operations).forward.macs;
        assert_eq!(by(&operations, |operation| operation.level).values().map(|level| level.forward.macs).sum::<u64>(), all);
        assert_eq!(by(&operations, |operation| operation.level).len(), 4);
    }

    /// At a micro-batch of 32 the step is bound by arithmetic: the fused floor is within a tenth of FLOP over peak, and all of it is below
    /// a kernel for each operation.
    #[test]
    fn the_floor_is_bound_by_arithmetic() {
        let operations = unet(&Preset::Sd15.unet().unwrap(), (64, 64), 64);
        for gpu in &GPUS {
            let floor = floor(&operations, gpu, 32, 2);
            let arithmetic = 32.0 * total(&operations).flops() / gpu.peak;
            assert!(floor.fused >= arithmetic && floor.fused < 1.25 * arithmetic, "{floor:?} {arithmetic}");
            assert!(floor.unfused > 0.1 * floor.fused, "{floor:?}");
        }
        assert_eq!(optimizer_bytes(66_820_608), 2_672_824_320.0);
    }
}
