"""Dumps the goldens of whole pipelines from diffusers: pictures by the base's own CLIP, as `ella sample --compare` draws them.

    python model/goldens/pipelines.py model/tests/goldens

Needs torch 2.11, diffusers 0.42 and transformers 5. The tests read only what is checked in; run this again when a golden must change.
Each pipeline is a folder: what save_pretrained writes, noise.safetensors with the first `latents`, pictures.safetensors with what is drawn
from them, [pictures, H, W, 3] of bytes by sampler, and prompts.json.
"""

import json
import sys
from pathlib import Path

import torch
from clip import CAPTIONS, SIZES, randomize, train
from diffusers import (
    AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel,
)
from diffusion import SD15, randomise
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

STEPS, GUIDANCE = 4, 7.5
NEGATIVE = "a blue square, again"
PROMPTS = ["a red circle left of a blue square", " ".join([CAPTIONS[0]] * 12)]
SCHEDULER = {name: value for name, value in SD15.items() if name not in ("_class_name", "skip_prk_steps")}
SAMPLERS = {"ddim": DDIMScheduler, "dpm++2m": DPMSolverMultistepScheduler}

UNET = dict(
    in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=16, norm_num_groups=2, sample_size=6,
)
UNETS = {
    "pipeline-sd15": dict(
        UNET, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "pipeline-sdxl": dict(
        UNET, attention_head_dim=(2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 6 * 8,
    ),
}


def encoder(kind, tokenizer, width, **more):
    sizes = dict(SIZES, vocab_size=len(tokenizer), hidden_size=width, max_position_embeddings=77, projection_dim=12)
    model = kind(CLIPTextConfig(**sizes, num_hidden_layers=3, num_attention_heads=2, eos_token_id=tokenizer.eos_token_id, **more)).eval()
    randomize(model)
    return model


def pipeline(name, tokenizer):
    generator = torch.Generator().manual_seed(5)
    unet = UNet2DConditionModel(**UNETS[name]).eval()
    randomise(unet, generator, 0.9)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2, sample_size=48, scaling_factor=0.5,
    ).eval()
    randomise(vae, generator, 0.7)
    vae.decoder.conv_out.weight.data *= 0.5
    parts = dict(unet=unet, vae=vae, scheduler=DDIMScheduler(**SCHEDULER), tokenizer=tokenizer)
    if name == "pipeline-sd15":
        one = encoder(CLIPTextModel, tokenizer, 16, hidden_act="quick_gelu")
        return StableDiffusionPipeline(text_encoder=one, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts)
    one = encoder(CLIPTextModel, tokenizer, 6, hidden_act="quick_gelu")
    two = encoder(CLIPTextModelWithProjection, tokenizer, 10, hidden_act="gelu")
    return StableDiffusionXLPipeline(text_encoder=one, text_encoder_2=two, tokenizer_2=tokenizer, add_watermarker=False, **parts)


def main():
    vocab, merges = train(CAPTIONS[:4], 60)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    for name in UNETS:
        folder = Path(sys.argv[1]) / name
        torch.manual_seed(11)
        pipe = pipeline(name, tokenizer)
        pipe.save_pretrained(folder)
        for file in folder.rglob("tokenizer.json"):
            file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False) + "\n")
        pipe.set_progress_bar_config(disable=True)
        # Not the size that the base was made for: wider than high, and odd.
        latents = torch.randn((len(PROMPTS), 4, 3, 5), generator=torch.Generator().manual_seed(3))
        pictures = {}
        for sampler, kind in SAMPLERS.items():
            for case, negative in {"": NEGATIVE, ".none": None}.items():
                pipe.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
                drawn = pipe(
                    PROMPTS, negative_prompt=None if negative is None else [negative] * len(PROMPTS), latents=latents.clone(), height=24, width=40,
                    num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
                ).images
                pictures[sampler + case] = torch.from_numpy((drawn * 255).round().astype("uint8")).contiguous()
                print(name, sampler + case, drawn.mean(), drawn.std(), ((drawn == 0) | (drawn == 1)).mean())
        save_file({"latents": latents}, folder / "noise.safetensors")
        save_file(pictures, folder / "pictures.safetensors")
        settings = dict(prompts=PROMPTS, negative=NEGATIVE, steps=STEPS, guidance=GUIDANCE)
        (folder / "prompts.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
