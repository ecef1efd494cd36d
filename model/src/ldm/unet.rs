//! The U-Net: LDM numbers all blocks of a side in one list; diffusers has levels of residual blocks and attentions.
//!
//! diffusers 0.42, `loaders/single_file_utils.py`: `convert_ldm_unet_checkpoint`, `create_unet_diffusers_config_from_ldm`.

use serde_json::{Value, json};

use super::{Family, UNET, size, swap};
use crate::error::{ModelError, Result};
use crate::weights::Weights;

/// SD 1's attention heads in every block.
const SD1_HEADS: i64 = 8;
/// The others' channels of a head.
const HEAD_CHANNELS: i64 = 64;
/// SDXL's width of each micro-condition's sinusoid.
const TIME_WIDTH: i64 = 256;
/// How many micro-conditions SDXL has.
const TIME_IDS: i64 = 6;

const RESNET: [(&str, &str); 6] = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("emb_layers.1.", "time_emb_proj."),
    ("skip_connection.", "conv_shortcut."),
];

/// One level of one side.
#[derive(Debug, Default)]
struct Level {
    channels: i64,
    /// Transformer layers after each residual block; 0 where there is no transformer.
    depths: Vec<i64>,
}

/// One side: its levels, and for each of LDM's blocks its level and its number there.
#[derive(Debug, Default)]
struct Side {
    levels: Vec<Level>,
    places: Vec<(usize, usize)>,
}

impl Side {
    /// Takes LDM's next block for a residual block of the current level.
    fn push(&mut self, channels: i64, depth: i64) {
        let level = self.levels.len().saturating_sub(1);
        if let Some(last) = self.levels.last_mut() {
            self.places.push((level, last.depths.len()));
            last.channels = channels;
            last.depths.push(depth);
        }
    }

    /// The types of the levels' blocks, `plain` or with transformers.
    fn types(&self, plain: &str) -> Vec<String> {
        let attends = |level: &Level| level.depths.iter().any(|&depth| depth > 0);
        self.levels.iter().map(|level| if attends(level) { format!("CrossAttn{plain}") } else { plain.to_owned() }).collect()
    }

    /// The depths of the levels' transformers, each level's as one number where it has one.
    fn depths(&self) -> Vec<Value> {
        let level = |level: &Level| {
            let depths: Vec<i64> = level.depths.iter().map(|&depth| depth.max(1)).collect();
            if depths.windows(2).all(|pair| pair[0] == pair[1]) { json!(depths.first().unwrap_or(&1)) } else { json!(depths) }
        };
        self.levels.iter().map(level).collect()
    }
}

/// Where LDM's blocks belong.
#[derive(Debug)]
pub(super) struct Layout {
    down: Side,
    up: Side,
}

impl Layout {
    /// Reads it off the names of `raw`, which are LDM's below the U-Net's prefix.
    pub(super) fn read(raw: &Weights) -> Self {
        let has = |key: String| raw.shape(&key).is_some();
        let channels = |block: &str| raw.shape(&format!("{block}.0.out_layers.3.weight")).and_then(|shape| shape.first().copied());
        let depth = |block: &str| (0..).take_while(|n| has(format!("{block}.1.transformer_blocks.{n}.norm1.weight"))).count() as i64;

        let mut down = Side { levels: vec![Level::default()], places: Vec::new() };
        for i in 1.. {
            let block = format!("input_blocks.{i}");
            if has(format!("{block}.0.op.weight")) {
                down.places.push((down.levels.len() - 1, 0));
                down.levels.push(Level::default());
            } else if let Some(channels) = channels(&block) {
                down.push(channels, depth(&block));
            } else {
                break;
            }
        }
        let mut up = Side { levels: vec![Level::default()], places: Vec::new() };
        for i in 0.. {
            let block = format!("output_blocks.{i}");
            let Some(channels) = channels(&block) else { break };
            up.push(channels, depth(&block));
            if has(format!("{block}.1.conv.weight")) || has(format!("{block}.2.conv.weight")) {
                up.levels.push(Level::default());
            }
        }
        Layout { down, up }
    }

    /// The configuration that diffusers would have; `pooled` is the width of the pooled text, where the file tells.
    ///
    /// # Errors
    /// A tensor that tells a size is missing.
    pub(super) fn config(&self, raw: &Weights, family: Family, pooled: Option<i64>) -> Result<Value> {
        let size = |key: &str, axis| size(raw, UNET, key, axis);
        let ending = |end: &str| {
            let found = raw.names().find(|name| name.ends_with(end)).map(str::to_owned);
            let any = || format!("{UNET}input_blocks.1.1{end}");
            found.ok_or_else(|| ModelError::MissingTensor { file: raw.path().into(), key: any() })
        };
        let channels: Vec<i64> = self.down.levels.iter().map(|level| level.channels).collect();
        let heads = match family {
            Family::Sd1 => json!(SD1_HEADS),
            Family::Sd2 | Family::Sdxl => json!(channels.iter().map(|n| (n / HEAD_CHANNELS).max(1)).collect::<Vec<_>>()),
        };
        let linear = raw.shape(&ending(".proj_in.weight")?).is_some_and(|shape| shape.len() == 2);
        let mut fields = json!({
            "_class_name": "UNet2DConditionModel",
            "in_channels": size("input_blocks.0.0.weight", 1)?,
            "out_channels": size("out.2.weight", 0)?,
            "block_out_channels": channels,
            "layers_per_block": self.down.levels.iter().map(|level| level.depths.len()).collect::<Vec<_>>(),
            "down_block_types": self.down.types("DownBlock2D"),
            "up_block_types": self.up.types("UpBlock2D"),
            "transformer_layers_per_block": self.down.depths(),
            "reverse_transformer_layers_per_block": self.up.depths(),
            "cross_attention_dim": size(&ending(".attn2.to_k.weight")?, 1)?,
            "attention_head_dim": heads,
            "use_linear_projection": linear,
            // Where SD 2.1's attention overflows in float16.
            "upcast_attention": family == Family::Sd2,
        });
        if family == Family::Sdxl {
            let input = size("label_emb.0.0.weight", 1)?;
            fields["addition_embed_type"] = json!("text_time");
            fields["addition_time_embed_dim"] = json!(pooled.map_or(TIME_WIDTH, |pooled| (input - pooled) / TIME_IDS));
            fields["projection_class_embeddings_input_dim"] = json!(input);
        }
        Ok(fields)
    }

    /// diffusers' name of LDM's `key`, if it has one.
    pub(super) fn name(&self, key: &str) -> Option<String> {
        let (head, rest) = key.split_once('.')?;
        match head {
            "time_embed" => swap(rest, &[("0.", "time_embedding.linear_1."), ("2.", "time_embedding.linear_2.")]),
            "label_emb" => swap(rest, &[("0.0.", "add_embedding.linear_1."), ("0.2.", "add_embedding.linear_2.")]),
            "out" => swap(rest, &[("0.", "conv_norm_out."), ("2.", "conv_out.")]),
            "middle_block" => match rest.split_once('.')? {
                ("0", rest) => Some(format!("mid_block.resnets.0.{}", swap(rest, &RESNET)?)),
                ("1", rest) => Some(format!("mid_block.attentions.0.{rest}")),
                ("2", rest) => Some(format!("mid_block.resnets.1.{}", swap(rest, &RESNET)?)),
                _ => None,
            },
            "input_blocks" => match rest.strip_prefix("0.0.") {
                Some(rest) => Some(format!("conv_in.{rest}")),
                None => block(rest, &self.down, "down_blocks", 1),
            },
            "output_blocks" => block(rest, &self.up, "up_blocks", 0),
            _ => None,
        }
    }
}

/// The name of what is at `rest` = `I.J.…` in the list of one side, whose numbers begin at `first`.
fn block(rest: &str, side: &Side, name: &str, first: usize) -> Option<String> {
    let (number, rest) = rest.split_once('.')?;
    let (kind, rest) = rest.split_once('.')?;
    let (level, n) = side.places.get(number.parse::<usize>().ok()?.checked_sub(first)?)?;
    let at = format!("{name}.{level}");
    match (kind, rest.split_once('.')?) {
        ("0", ("op", rest)) => Some(format!("{at}.downsamplers.0.conv.{rest}")),
        ("0", _) => Some(format!("{at}.resnets.{n}.{}", swap(rest, &RESNET)?)),
        ("1" | "2", ("conv", rest)) => Some(format!("{at}.upsamplers.0.conv.{rest}")),
        ("1", _) => Some(format!("{at}.attentions.{n}.{rest}")),
        _ => None,
    }
}
