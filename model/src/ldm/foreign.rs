//! Files that are no checkpoint of the three families, told by what they hold, so that a refusal can name it.

use super::UNET;
use crate::error::{ModelError, Result};
use crate::weights::{Weights, matches};

/// Keys of things that are not supported, what they are, and what to give instead.
const FOREIGN: [(&str, &str, &str); 22] = [
    ("lora_unet_*", "a LoRA", LORA),
    ("lora_te*", "a LoRA", LORA),
    ("*.lora_up.weight", "a LoRA", LORA),
    ("*.lora_A.weight", "a LoRA", LORA),
    ("*.lora.up.weight", "a LoRA", LORA),
    ("control_model.*", "a ControlNet", BASE),
    ("controlnet_cond_embedding.*", "a ControlNet", BASE),
    ("input_hint_block.*", "a ControlNet", BASE),
    ("model.diffusion_model.joint_blocks.*", "an SD 3 model", BASE),
    ("joint_blocks.*", "an SD 3 model", BASE),
    ("model.diffusion_model.double_blocks.*", "a Flux model", BASE),
    ("double_blocks.*", "a Flux model", BASE),
    ("conditioner.embedders.0.model.transformer.*", "SDXL's refiner", "give SDXL's base"),
    ("edm_mean", "a Playground 2.5 model, whose noise schedule is EDM's,", BASE),
    ("embedder.*", "an SD 2.x unCLIP model", BASE),
    ("noise_augmentor.*", "an SD 2.x unCLIP model", BASE),
    ("connector.*", "an ELLA connector as a diffusion model", "give the base that it was trained for"),
    ("encoder.down.*", "a VAE on its own as a diffusion model", BASE),
    ("encoder.down_blocks.*", "a VAE on its own as a diffusion model", BASE),
    ("down_blocks.*", "a U-Net in diffusers' layout without its config.json", "give the model's folder"),
    ("text_model.*", "a text encoder on its own as a diffusion model", BASE),
    ("encoder.block.*", "a text encoder on its own as a diffusion model", BASE),
];
const LORA: &str = "give the base that it was made for as the model";
const BASE: &str = "give a checkpoint of SD 1.x, SD 2.x or SDXL";

/// Refuses what is not supported.
///
/// # Errors
/// [`ModelError::Unsupported`], naming the file and what it is.
pub(super) fn refuse(weights: &Weights) -> Result<()> {
    let refuse = |what: &str, instead: &str| {
        Err(ModelError::Unsupported { what: format!("{}: {what}", weights.path().display()), instead: instead.into() })
    };
    for (pattern, what, instead) in FOREIGN {
        if weights.names().any(|name| matches(pattern, name)) {
            return refuse(what, instead);
        }
    }
    match weights.shape("model.diffusion_model.input_blocks.0.0.weight").and_then(|shape| shape.get(1)) {
        Some(9) => return refuse("an in-painting model (9 channels into its U-Net)", BASE),
        Some(8) => return refuse("an image-editing model (8 channels into its U-Net)", BASE),
        Some(7) => return refuse("an upscaling model (7 channels into its U-Net)", BASE),
        Some(5) => return refuse("a depth-guided model (5 channels into its U-Net)", BASE),
        _ => {}
    }
    if weights.shape("model.diffusion_model.label_emb.weight").is_some() {
        return refuse("a model of numbered classes (label_emb.weight)", BASE);
    }
    match weights.names().any(|name| name.starts_with(UNET)) {
        true => Ok(()),
        false => refuse("a file without a U-Net (no key begins with model.diffusion_model.)", BASE),
    }
}
