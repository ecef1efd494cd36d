//! The VAE. diffusers 0.42, `loaders/single_file_utils.py`: `convert_ldm_vae_checkpoint`, `create_vae_diffusers_config_from_ldm`.

use serde_json::{Value, json};

use super::{Family, VAE, size, swap};
use crate::error::Result;
use crate::weights::Weights;

const MIDDLE: &str = "mid_block.attentions.0.";

const FIXED: [(&str, &str); 10] = [
    ("conv_in.", "conv_in."),
    ("conv_out.", "conv_out."),
    ("norm_out.", "conv_norm_out."),
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
];

/// The configuration that diffusers would have. `raw` has LDM's names below the VAE's prefix.
///
/// # Errors
/// A tensor that tells a size is missing.
pub(super) fn config(raw: &Weights, family: Family) -> Result<Value> {
    let size = |key: &str, axis| size(raw, VAE, key, axis);
    let there = |key: &str| raw.shape(key).is_some();
    let channels =
        (0..levels(raw)).map(|level| size(&format!("encoder.down.{level}.block.0.conv1.weight"), 0)).collect::<Result<Vec<_>>>()?;
    let layers = (0..).take_while(|n| there(&format!("encoder.down.0.block.{n}.conv1.weight"))).count();
    let (scaling, upcast) = match family {
        Family::Sd1 | Family::Sd2 => (0.18215, false),
        Family::Sdxl => (0.13025, true),
    };
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "in_channels": size("encoder.conv_in.weight", 1)?,
        "out_channels": size("decoder.conv_out.weight", 0)?,
        "latent_channels": size("decoder.conv_in.weight", 1)?,
        "down_block_types": vec!["DownEncoderBlock2D"; channels.len()],
        "up_block_types": vec!["UpDecoderBlock2D"; channels.len()],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "mid_block_add_attention": there("decoder.mid.attn_1.q.weight"),
        "use_quant_conv": there("quant_conv.weight"),
        "use_post_quant_conv": there("post_quant_conv.weight"),
        "scaling_factor": scaling,
        // SDXL's VAE overflows in float16.
        "force_upcast": upcast,
    }))
}

/// The tensors under diffusers' names; those that have none keep the file's own, so that they are refused by it.
pub(super) fn named(raw: &Weights) -> Result<Weights> {
    let levels = levels(raw);
    let mut weights = raw.renamed(|key| Some(name(key, levels).unwrap_or_else(|| format!("{VAE}{key}"))))?;
    // Linear layers now, 1×1 convolutions in the file.
    for side in ["encoder", "decoder"] {
        for linear in ["to_q", "to_k", "to_v", "to_out.0"] {
            weights.flatten(&format!("{side}.{MIDDLE}{linear}.weight"));
        }
    }
    Ok(weights)
}

fn levels(raw: &Weights) -> usize {
    (0..).take_while(|level| raw.shape(&format!("encoder.down.{level}.block.0.conv1.weight")).is_some()).count()
}

fn name(key: &str, levels: usize) -> Option<String> {
    let (side, rest) = key.split_once('.')?;
    match side {
        "quant_conv" | "post_quant_conv" => Some(key.to_owned()),
        "encoder" | "decoder" => {
            let name = swap(rest, &FIXED).or_else(|| level(rest, levels))?;
            Some(format!("{side}.{}", name.replace(".nin_shortcut.", ".conv_shortcut.")))
        }
        _ => None,
    }
}

/// The name of what is at `down.L.…` or `up.L.…`; LDM counts levels of the way up from the picture's.
fn level(rest: &str, levels: usize) -> Option<String> {
    let (way, rest) = rest.split_once('.')?;
    let (level, rest) = rest.split_once('.')?;
    let level: usize = level.parse().ok()?;
    let (level, resample) = match way {
        "down" => (level, ("downsample.", "downsamplers.0.")),
        "up" => (levels.checked_sub(level + 1)?, ("upsample.", "upsamplers.0.")),
        _ => return None,
    };
    Some(format!("{way}_blocks.{level}.{}", swap(rest, &[("block.", "resnets."), resample])?))
}
