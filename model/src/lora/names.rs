//! A U-Net's layers under all the names that LoRA files have for them.

use std::collections::HashMap;

use crate::error::Result;
use crate::params::Params;
use crate::unet::{UNet, UNetConfig};

/// The layers that a LoRA may change: linear maps and convolutions.
#[derive(Debug)]
pub(super) struct Names {
    /// From a layer's name to its diffusers name.
    known: HashMap<String, String>,
    /// From a layer's diffusers name to the shape of its weight.
    shapes: HashMap<String, Vec<i64>>,
}

impl Names {
    /// All layers of the U-Net of this configuration.
    pub(super) fn of(config: &UNetConfig) -> Result<Self> {
        let p = Params::shapes();
        UNet::new(config, &p)?;
        let weight = |(name, tensor): (String, tch::Tensor)| {
            let shape = tensor.size();
            (shape.len() > 1).then(|| Some((name.strip_suffix(".weight")?.to_owned(), shape))).flatten()
        };
        let shapes: HashMap<String, Vec<i64>> = p.taken().into_iter().filter_map(weight).collect();
        // The original implementation has one depth for all blocks.
        let depth = config.layers_per_block.first().copied().filter(|first| config.layers_per_block.iter().all(|depth| depth == first));
        let mut known = HashMap::new();
        for layer in shapes.keys() {
            let attended = |block: &str| shapes.keys().any(|name| name.starts_with(&format!("{block}.attentions.")));
            let original = depth.and_then(|depth| original(layer, depth, attended));
            for name in [Some(layer.clone()), original].into_iter().flatten() {
                known.insert(name.replace('.', "_"), layer.clone());
                known.insert(name, layer.clone());
            }
        }
        Ok(Names { known, shapes })
    }

    /// The diffusers name of the layer that a file calls `name`, and its weight's shape.
    pub(super) fn find(&self, name: &str) -> Option<(&str, &[i64])> {
        let layer = self.known.get(name)?;
        Some((layer, self.shapes.get(layer)?))
    }
}

/// The name that the original implementation has for a layer, for U-Nets of `depth` layers per block. `attended` tells of an up block
/// whether it has transformers: the upsampler comes after them. diffusers 0.42, `_maybe_map_sgm_blocks_to_diffusers`, the other way round.
fn original(layer: &str, depth: i64, attended: impl Fn(&str) -> bool) -> Option<String> {
    let fixed = [
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ];
    if let Some((_, original)) = fixed.iter().find(|(name, _)| *name == layer) {
        return Some((*original).to_owned());
    }
    if let Some(rest) = layer.strip_prefix("mid_block.") {
        let (part, index, rest) = part(rest)?;
        let at = if part == "attentions" { 1 } else { 2 * index };
        return Some(format!("middle_block.{at}.{}", inside(part, rest)));
    }
    let (side, rest) = layer.split_once('.')?;
    let (block, rest) = rest.split_once('.')?;
    let (part, index, rest) = part(rest)?;
    let first = block.parse::<i64>().ok()? * (depth + 1);
    Some(match (side, part) {
        ("down_blocks", "downsamplers") => format!("input_blocks.{}.0.op", 1 + first + depth),
        ("down_blocks", _) => format!("input_blocks.{}.{}.{}", 1 + first + index, i32::from(part == "attentions"), inside(part, rest)),
        ("up_blocks", "upsamplers") => {
            let place = if attended(&format!("up_blocks.{block}")) { 2 } else { 1 };
            format!("output_blocks.{}.{place}.conv", first + depth)
        }
        ("up_blocks", _) => format!("output_blocks.{}.{}.{}", first + index, i32::from(part == "attentions"), inside(part, rest)),
        _ => return None,
    })
}

/// `resnets.1.conv1` as ("resnets", 1, "conv1").
fn part(name: &str) -> Option<(&str, i64, &str)> {
    let (part, rest) = name.split_once('.')?;
    let (index, rest) = rest.split_once('.')?;
    Some((part, index.parse().ok()?, rest))
}

/// A layer's name inside a residual block or a transformer; only the former's differ.
fn inside<'a>(part: &str, name: &'a str) -> &'a str {
    match (part, name) {
        ("resnets", "conv1") => "in_layers.2",
        ("resnets", "conv2") => "out_layers.3",
        ("resnets", "time_emb_proj") => "emb_layers.1",
        ("resnets", "conv_shortcut") => "skip_connection",
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn original_names_are_those_published() {
        // Stability's SDXL: two layers per block, no attention in the first level.
        let name = |layer| original(layer, 2, |block| block != "up_blocks.2").unwrap();
        for (layer, expected) in [
            ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
            ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
            ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
            ("down_blocks.2.resnets.1.time_emb_proj", "input_blocks.8.0.emb_layers.1"),
            ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
            ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
            ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
            ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
            ("up_blocks.2.upsamplers.0.conv", "output_blocks.8.1.conv"),
            ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
            ("conv_out", "out.2"),
        ] {
            assert_eq!(name(layer), expected);
        }
    }
}
