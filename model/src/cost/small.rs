//! The operations of what is around the U-Net: the connector, T5's encoder, and the VAE.

use super::{Back, Family, Operation, Product, activated, attention, moved, norm};
use crate::connector::{ConnectorConfig, ConnectorKind};
use crate::t5::T5Config;
use crate::vae::VaeConfig;

/// One caption of `tokens` positions through a connector, forward and back to its parameters.
pub fn connector(config: &ConnectorConfig, tokens: i64) -> Vec<Operation> {
    let mut operations = Vec::new();
    let mut linear = |widths, rows, back| operations.push(Product::linear(widths, rows, true).operation(Family::Linear, 0, back));
    let ConnectorConfig { width, text_width, time_channel, time_embed_dim: time, latents, .. } = *config;
    if config.kind == ConnectorKind::Mlp {
        // Features and sinusoids take no gradient.
        linear((text_width, width), tokens, Back::Weights);
        linear((width, width), tokens, Back::Both);
        operations.push(activated(0, (tokens * width, tokens * width), Back::Both));
        pool(config, tokens, &mut operations);
        return operations;
    }
    linear((text_width, width), tokens, Back::Weights);
    if config.kind.is_timed() {
        linear((time_channel, time), 1, Back::Weights);
        linear((time, time), 1, Back::Both);
        linear((time, width), 1, Back::Both);
    }
    // The latents themselves are parameters.
    let mut start = moved(0, (0, latents * width), Back::Both);
    start.forward.weights = (latents * width).unsigned_abs();
    operations.push(start);
    for _ in 0..config.layers {
        block(config, tokens, &mut operations);
    }
    pool(config, latents, &mut operations);
    operations
}

fn block(config: &ConnectorConfig, tokens: i64, operations: &mut Vec<Operation>) {
    let ConnectorConfig { width, latents, time_embed_dim: time, .. } = *config;
    let timed = config.kind.is_timed();
    let linear = |widths, rows| Product::linear(widths, rows, true).operation(Family::Linear, 0, Back::Both);
    let normed = |rows: i64| norm(0, rows * width, if timed { 0 } else { 2 * width }, Back::Both);
    if timed {
        operations.extend((0..3).map(|_| linear((time, 2 * width), 1)));
    }
    if config.kind == ConnectorKind::TscZero {
        operations.push(linear((time, 2 * width), 1));
    }
    // Keys and values of latents and text have the same weights: read once, used twice.
    let own = linear((width, 3 * width), latents);
    let mut theirs = linear((width, 2 * width), tokens);
    (theirs.forward.weights, theirs.backward.weights) = (0, 0);
    operations.extend([normed(latents), normed(tokens), own, theirs]);
    operations.push(attention(Family::CrossAttention, 0, (latents, latents + tokens), width, Back::Both));
    operations.push(linear((width, width), latents));
    let numbers = latents * width;
    operations.extend([moved(0, (2 * numbers, numbers), Back::Both), normed(latents)]);
    operations.push(linear((width, 4 * width), latents));
    operations.push(activated(0, (4 * numbers, 4 * numbers), Back::Both));
    operations.push(linear((4 * width, width), latents));
    operations.push(moved(0, (2 * numbers, numbers), Back::Both));
}

/// The pooled head over `states` states, if there is one.
fn pool(config: &ConnectorConfig, states: i64, operations: &mut Vec<Operation>) {
    let Some(pooled) = config.pooled else { return };
    let width = config.width;
    let linear = |widths, rows| Product::linear(widths, rows, true).operation(Family::Linear, 0, Back::Both);
    let mut placed = moved(0, (states * width, (1 + states) * width), Back::Both);
    if config.kind != ConnectorKind::Mlp {
        placed.forward.weights = ((1 + states) * width).unsigned_abs();
    }
    operations.extend([placed, linear((width, width), 1), linear((width, width), 1 + states), linear((width, width), 1 + states)]);
    operations.push(attention(Family::CrossAttention, 0, (1, 1 + states), width, Back::Both));
    operations.push(linear((width, pooled), 1));
}

/// One caption of `tokens` positions through T5's encoder, without its embedding and its table of positions.
pub fn t5(config: &T5Config, tokens: i64) -> Vec<Operation> {
    let (width, inner, hidden) = (config.d_model, config.num_heads * config.d_kv, config.d_ff);
    let linear = |widths| Product::linear(widths, tokens, false).operation(Family::Linear, 0, Back::None);
    let normed = || norm(0, tokens * width, width, Back::None);
    let sum = || moved(0, (2 * tokens * width, tokens * width), Back::None);
    let branches = if config.gated { 2 } else { 1 };
    let mut operations = Vec::new();
    for _ in 0..config.num_layers {
        operations.push(normed());
        operations.extend((0..3).map(|_| linear((width, inner))));
        operations.push(attention(Family::SelfAttention, 0, (tokens, tokens), inner, Back::None));
        operations.extend([linear((inner, width)), sum(), normed()]);
        operations.extend((0..branches).map(|_| linear((width, hidden))));
        operations.push(activated(0, (branches * tokens * hidden, tokens * hidden), Back::None));
        operations.extend([linear((hidden, width)), sum()]);
    }
    operations.push(normed());
    operations
}

/// One picture of `size` (height, width) through the VAE's encoder.
pub fn vae_encoder(config: &VaeConfig, size: (i64, i64)) -> Vec<Operation> {
    let channels = &config.block_out_channels;
    let mut vae = Maps { size, operations: Vec::new(), level: 0 };
    vae.convolution((config.in_channels, channels[0]), 3, size);
    for (level, &output) in channels.iter().enumerate() {
        vae.level = level;
        let input = channels[level.saturating_sub(1)];
        (0..config.layers_per_block).for_each(|i| vae.resnet((if i == 0 { input } else { output }, output)));
        if level + 1 < channels.len() {
            vae.convolution((output, output), 3, (vae.size.0 / 2, vae.size.1 / 2));
        }
    }
    let (deepest, moments) = (channels[channels.len() - 1], 2 * config.latent_channels);
    vae.middle(deepest, config.mid_block_add_attention);
    vae.norm(deepest);
    vae.convolution((deepest, moments), 3, vae.size);
    if config.use_quant_conv {
        vae.convolution((moments, moments), 1, vae.size);
    }
    vae.operations
}

/// One picture of `size` (height, width) through the VAE's decoder.
pub fn vae_decoder(config: &VaeConfig, size: (i64, i64)) -> Vec<Operation> {
    let (channels, down) = (&config.block_out_channels, config.downscale());
    let (last, latent) = (channels.len() - 1, config.latent_channels);
    let mut vae = Maps { size: (size.0 / down, size.1 / down), operations: Vec::new(), level: last };
    if config.use_post_quant_conv {
        vae.convolution((latent, latent), 1, vae.size);
    }
    vae.convolution((latent, channels[last]), 3, vae.size);
    vae.middle(channels[last], config.mid_block_add_attention);
    let mut input = channels[last];
    for (level, &output) in channels.iter().enumerate().rev() {
        vae.level = level;
        (0..=config.layers_per_block).for_each(|i| vae.resnet((if i == 0 { input } else { output }, output)));
        if level > 0 {
            let numbers = output * vae.size.0 * vae.size.1;
            vae.operations.push(moved(level, (numbers, 4 * numbers), Back::None));
            vae.size = (2 * vae.size.0, 2 * vae.size.1);
            vae.convolution((output, output), 3, vae.size);
        }
        input = output;
    }
    vae.norm(channels[0]);
    vae.convolution((channels[0], config.out_channels), 3, vae.size);
    vae.operations
}

/// A frozen network of feature maps.
struct Maps {
    size: (i64, i64),
    level: usize,
    operations: Vec<Operation>,
}

impl Maps {
    /// To maps of another size, which is then the size.
    fn convolution(&mut self, channels: (i64, i64), kernel: i64, size: (i64, i64)) {
        let pixels = (self.size.0 * self.size.1, size.0 * size.1);
        self.operations.push(Product::convolution(channels, kernel, pixels).operation(Family::Convolution, self.level, Back::None));
        self.size = size;
    }

    fn norm(&mut self, channels: i64) {
        self.operations.push(norm(self.level, channels * self.size.0 * self.size.1, 2 * channels, Back::None));
    }

    fn sum(&mut self, channels: i64) {
        let numbers = channels * self.size.0 * self.size.1;
        self.operations.push(moved(self.level, (2 * numbers, numbers), Back::None));
    }

    fn resnet(&mut self, (input, output): (i64, i64)) {
        self.norm(input);
        self.convolution((input, output), 3, self.size);
        self.norm(output);
        self.convolution((output, output), 3, self.size);
        if input != output {
            self.convolution((input, output), 1, self.size);
        }
        self.sum(output);
    }

    fn middle(&mut self, channels: i64, attends: bool) {
        self.resnet((channels, channels));
        if attends {
            let pixels = self.size.0 * self.size.1;
            let linear = || Product::linear((channels, channels), pixels, true).operation(Family::Linear, self.level, Back::None);
            let attention = attention(Family::SelfAttention, self.level, (pixels, pixels), channels, Back::None);
            let operations = [linear(), linear(), linear(), attention, linear()];
            self.norm(channels);
            self.operations.extend(operations);
            self.sum(channels);
        }
        self.resnet((channels, channels));
    }
}
