//! What a tensor's name in a LoRA file says: which layer it is for, and which factor it is.

use std::path::Path;

use crate::error::{ModelError, Result};

/// Of a layer's tensors, which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// [rank, in, …]
    Down,
    /// [out, rank, …]
    Up,
    /// The kernel between the two, of LoCon's decomposed convolutions: [rank, rank, k, k].
    Mid,
    /// The numerator of the scale.
    Alpha,
}

impl Role {
    pub(super) fn word(self) -> &'static str {
        match self {
            Role::Down => "down",
            Role::Up => "up",
            Role::Mid => "middle",
            Role::Alpha => "alpha",
        }
    }
}

/// A parsed name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A layer of a text encoder.
    Text,
    /// A layer of the U-Net, without prefixes; and which of its tensors.
    Layer(String, Role),
}

/// How names end, by who writes them.
const ENDS: [(&str, Role); 16] = [
    // kohya, LyCORIS
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".alpha", Role::Alpha),
    // PEFT, and diffusers since
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    // diffusers before: its attention processors, then its layers
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    ("_lora.alpha", Role::Alpha),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora.alpha", Role::Alpha),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
];

/// What names of text encoders' layers begin with.
const TEXT: [&str; 6] = ["lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.", "text_model."];

/// What may stand before the name of a U-Net's layer.
const PREFIXES: [&str; 4] = ["base_model.model.", "unet.", "diffusion_model.", "lora_unet_"];

/// Other ways to change a network, by what their tensors' names hold, with a dot after them.
const OTHERS: [(&str, &str); 11] = [
    (".hada_", "LoHa"),
    (".lokr_", "LoKr"),
    (".dora_scale", "DoRA"),
    (".lora_magnitude_vector", "DoRA"),
    (".oft_", "OFT"),
    (".boft_", "BOFT"),
    (".on_input", "IA3"),
    (".diff.", "a full difference of weights"),
    (".diff_b.", "a full difference of weights"),
    (".lora_B.bias", "a LoRA of biases"),
    (".w_norm", "a change of norms"),
];

impl Key {
    /// Reads `name`; `file` is what errors name.
    pub(super) fn parse(name: &str, file: &Path) -> Result<Self> {
        let bare = name.strip_prefix("base_model.model.").unwrap_or(name);
        if TEXT.iter().any(|prefix| bare.starts_with(prefix)) {
            return Ok(Key::Text);
        }
        if let Some((_, kind)) = OTHERS.iter().find(|(mark, _)| format!("{name}.").contains(mark)) {
            let what = format!("{}: {kind} (tensor {name})", file.display());
            return Err(ModelError::Unsupported {
                what,
                instead: "merge it into the base with the tool that made it, or take a plain LoRA".into(),
            });
        }
        // The first that fits counts: the processors' ends are those of no layer.
        let Some((layer, role)) = ENDS.iter().find_map(|(end, role)| Some((name.strip_suffix(end)?, *role))) else {
            let expected = "a LoRA's tensor: lora_down and lora_up, lora_A and lora_B, or alpha".to_owned();
            return Err(ModelError::LoraMismatch { file: file.into(), key: name.into(), expected, found: "another name".into() });
        };
        Ok(Key::Layer(layer_name(layer), role))
    }
}

/// The layer's name without prefixes, and without the traces of diffusers' attention processors.
fn layer_name(layer: &str) -> String {
    let bare = PREFIXES.iter().fold(layer, |name, prefix| name.strip_prefix(prefix).unwrap_or(name));
    let bare = bare.strip_suffix("_lora").unwrap_or(bare);
    match bare.split_once(".processor.") {
        Some((attention, "to_out")) => format!("{attention}.to_out.0"),
        Some((attention, projection)) => format!("{attention}.{projection}"),
        None => bare.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Result<Key> {
        Key::parse(name, Path::new("x.safetensors"))
    }

    #[test]
    fn every_writers_names_are_read() {
        let layer = |name: &str, role| Key::Layer(name.to_owned(), role);
        let block = "down_blocks.0.attentions.1.transformer_blocks.0.attn1";
        for (name, expected) in [
            ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", layer("mid_block_attentions_0_proj_in", Role::Down)),
            ("lora_unet_input_blocks_4_1_proj_in.alpha", layer("input_blocks_4_1_proj_in", Role::Alpha)),
            (&format!("unet.{block}.to_q.lora_A.weight"), layer(&format!("{block}.to_q"), Role::Down)),
            (&format!("base_model.model.unet.{block}.to_q.lora_B.default.weight"), layer(&format!("{block}.to_q"), Role::Up)),
            (&format!("base_model.model.diffusion_model.{block}.to_q.lora_A.weight"), layer(&format!("{block}.to_q"), Role::Down)),
            (&format!("{block}.to_out.0.lora.up.weight"), layer(&format!("{block}.to_out.0"), Role::Up)),
            (&format!("unet.{block}.processor.to_out_lora.down.weight"), layer(&format!("{block}.to_out.0"), Role::Down)),
            (&format!("{block}.processor.to_k_lora.alpha"), layer(&format!("{block}.to_k"), Role::Alpha)),
            ("unet.conv_in.lora.up.weight", layer("conv_in", Role::Up)),
            ("lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", Key::Text),
            ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight", Key::Text),
        ] {
            assert_eq!(parse(name).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        for (end, kind) in [
            ("hada_w1_a", "LoHa"),
            ("lokr_w1", "LoKr"),
            ("dora_scale", "DoRA"),
            ("diff", "difference"),
            ("diff_b", "difference"),
            ("oft_blocks", "OFT"),
        ] {
            let error = parse(&format!("lora_unet_conv_in.{end}")).unwrap_err().to_string();
            assert!(error.starts_with("x.safetensors: ") && error.contains(kind) && error.contains(end), "{error}");
        }
        let error = parse("conv_in.weight").unwrap_err().to_string();
        assert!(error.contains("x.safetensors") && error.contains("conv_in.weight") && error.contains("lora_down"), "{error}");
    }
}
