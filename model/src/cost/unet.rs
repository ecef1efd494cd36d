//! The U-Net's operations, in the order of its forward pass ([`crate::unet`]).

use super::{Back, Family, Operation, Product, activated, attention, moved, norm};
use crate::unet::UNetConfig;

/// A feature map's channels, height and width.
#[derive(Clone, Copy, Debug)]
struct Map {
    channels: i64,
    size: (i64, i64),
}

impl Map {
    fn pixels(self) -> i64 {
        self.size.0 * self.size.1
    }

    fn numbers(self) -> i64 {
        self.channels * self.pixels()
    }
}

/// One sample's pass through a U-Net: latents of `size` (height, width) beside `tokens` text states.
pub fn unet(config: &UNetConfig, size: (i64, i64), tokens: i64) -> Vec<Operation> {
    let first = config.block_out_channels[0];
    let mut walk = Walk { config, tokens, level: 0, reached: false, operations: Vec::new() };
    walk.time();
    let mut x = walk.convolution(Map { channels: config.in_channels, size }, first, 3, size);
    let mut skips = vec![x];
    for level in 0..config.block_out_channels.len() {
        walk.level = level;
        x = walk.down(x, &mut skips);
    }
    let channels = x.channels;
    x = walk.resnet(x, channels);
    walk.transformer(x, config.mid_transformers);
    x = walk.resnet(x, channels);
    for block in 0..config.block_out_channels.len() {
        walk.level = config.halvings() - block;
        x = walk.up(x, block, &mut skips);
    }
    walk.norm(x, walk.back());
    walk.convolution(x, config.out_channels, 3, x.size);
    walk.operations
}

struct Walk<'a> {
    config: &'a UNetConfig,
    tokens: i64,
    level: usize,
    /// Whether the conditions are behind: from here on a gradient goes backward.
    reached: bool,
    operations: Vec<Operation>,
}

impl Walk<'_> {
    fn back(&self) -> Back {
        if self.reached { Back::Input } else { Back::None }
    }

    fn add(&mut self, operation: Operation) {
        self.operations.push(operation);
    }

    fn linear(&mut self, widths: (i64, i64), rows: i64, bias: bool, back: Back) {
        self.add(Product::linear(widths, rows, bias).operation(Family::Linear, self.level, back));
    }

    fn norm(&mut self, x: Map, back: Back) {
        self.add(norm(self.level, x.numbers(), 2 * x.channels, back));
    }

    /// A sum of two feature maps.
    fn sum(&mut self, x: Map) {
        self.add(moved(self.level, (2 * x.numbers(), x.numbers()), self.back()));
    }

    fn convolution(&mut self, x: Map, channels: i64, kernel: i64, size: (i64, i64)) -> Map {
        let out = Map { channels, size };
        let product = Product::convolution((x.channels, channels), kernel, (x.pixels(), out.pixels()));
        self.add(product.operation(Family::Convolution, self.level, self.back()));
        out
    }

    /// The pooled text's gradient goes through the time embedding, where there is one.
    fn time_back(&self) -> Back {
        if self.config.added.is_some() { Back::Input } else { Back::None }
    }

    fn time(&mut self) {
        let width = self.config.time_embed_dim;
        self.linear((self.config.block_out_channels[0], width), 1, true, Back::None);
        self.linear((width, width), 1, true, Back::None);
        if let Some(added) = self.config.added {
            self.linear((added.input_width, width), 1, true, Back::Input);
            self.linear((width, width), 1, true, Back::Input);
        }
    }

    fn resnet(&mut self, x: Map, channels: i64) -> Map {
        self.norm(x, self.back());
        let h = self.convolution(x, channels, 3, x.size);
        if x.channels != channels {
            self.convolution(x, channels, 1, x.size);
        }
        self.linear((self.config.time_embed_dim, channels), 1, true, self.time_back());
        self.reached |= self.config.added.is_some();
        self.norm(h, self.back());
        let h = self.convolution(h, channels, 3, h.size);
        self.sum(h);
        h
    }

    fn transformer(&mut self, x: Map, depth: i64) {
        let (width, rows) = (x.channels, x.pixels());
        self.norm(x, self.back());
        self.linear((width, width), rows, true, self.back());
        for _ in 0..depth {
            self.block(x);
        }
        self.linear((width, width), rows, true, self.back());
        self.sum(x);
    }

    fn block(&mut self, x: Map) {
        let (width, rows) = (x.channels, x.pixels());
        self.norm(x, self.back());
        for _ in 0..3 {
            self.linear((width, width), rows, false, self.back());
        }
        self.add(attention(Family::SelfAttention, self.level, (rows, rows), width, self.back()));
        self.linear((width, width), rows, true, self.back());
        self.sum(x);

        self.norm(x, self.back());
        self.linear((width, width), rows, false, self.back());
        self.reached = true;
        for _ in 0..2 {
            self.linear((self.config.cross_attention_dim, width), self.tokens, false, self.back());
        }
        self.add(attention(Family::CrossAttention, self.level, (rows, self.tokens), width, self.back()));
        self.linear((width, width), rows, true, self.back());
        self.sum(x);

        self.norm(x, self.back());
        self.linear((width, 8 * width), rows, true, self.back());
        self.add(activated(self.level, (8 * x.numbers(), 4 * x.numbers()), self.back()));
        self.linear((4 * width, width), rows, true, self.back());
        self.sum(x);
    }

    fn down(&mut self, x: Map, skips: &mut Vec<Map>) -> Map {
        let (config, level) = (self.config, self.level);
        let (mut x, channels) = (x, config.block_out_channels[level]);
        for layer in 0..config.layers_per_block[level] as usize {
            x = self.resnet(x, channels);
            if config.down_attention[level] {
                self.transformer(x, config.down_transformers[level][layer]);
            }
            skips.push(x);
        }
        if level < config.halvings() {
            // One row and column of padding in all without `downsample_padding`, two with it.
            let half = |n: i64| if config.downsample_padding == 0 { n / 2 } else { (n + 1) / 2 };
            x = self.convolution(x, channels, 3, (half(x.size.0), half(x.size.1)));
            skips.push(x);
        }
        x
    }

    fn up(&mut self, x: Map, block: usize, skips: &mut Vec<Map>) -> Map {
        let (config, level) = (self.config, self.level);
        let (mut x, channels) = (x, config.block_out_channels[level]);
        for layer in 0..=config.layers_per_block[level] as usize {
            let skip = skips.pop().unwrap_or(x);
            let both = Map { channels: x.channels + skip.channels, size: x.size };
            self.add(moved(level, (both.numbers(), both.numbers()), self.back()));
            x = self.resnet(both, channels);
            if config.up_attention[block] {
                self.transformer(x, config.up_transformers[block][layer]);
            }
        }
        match skips.last() {
            Some(next) if level > 0 => {
                let doubled = Map { channels, size: next.size };
                self.add(moved(level, (x.numbers(), doubled.numbers()), self.back()));
                self.convolution(doubled, channels, 3, doubled.size)
            }
            _ => x,
        }
    }
}
