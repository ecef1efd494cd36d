"""Key correspondences of single-file checkpoints: LDM's and SGM's names to those of diffusers and transformers.

Small random models are renamed the other way by the published correspondence, then diffusers' own conversion
(`loaders/single_file_utils.py`) must give back the same tensors. What is written are names and configurations,
no weights: ../tests/goldens/single-file/FAMILY.json, with for each key of the single file
[part, name, what becomes of the tensor]. The test makes the tensors.

Run: python single_file.py (torch 2.11, diffusers 0.42.1, transformers 5.23)
"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as sf
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

OUT = Path(__file__).parent.parent / "tests/goldens/single-file"

RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
          ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")]


def resnet(rest):
    for new, old in RESNET:
        rest = re.sub(rf"^{new}\.", old + ".", rest)
    return rest


def unet_key(key, levels, layers):
    fixed = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    for new, old in fixed.items():
        if key.startswith(new + "."):
            return old + key[len(new):]
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, n, rest = match.groups()
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * int(n)}.{resnet(rest)}"
    side, level, kind, n, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
    level, n = int(level), int(n)
    if side == "down":
        first = 1 + level * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + n}.0.{resnet(rest)}" if kind == "resnets" else f"input_blocks.{first + n}.1.{rest}"
    first = level * (layers + 1)
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{{upsampler}}.{rest}"
    return f"output_blocks.{first + n}.0.{resnet(rest)}" if kind == "resnets" else f"output_blocks.{first + n}.1.{rest}"


def vae_key(key, levels):
    def level(match):
        way, n = match.group(1), int(match.group(2))
        return f".{way}.{n if way == 'down' else levels - 1 - n}."
    key = re.sub(r"\.(down|up)_blocks\.(\d+)\.", level, key)
    for new, old in [(".resnets.", ".block."), (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."),
                     ("conv_norm_out", "norm_out"), ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
                     ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"), ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
                     ("mid_block.attentions.0.to_k", "mid.attn_1.k"), ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
                     ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("conv_shortcut", "nin_shortcut")]:
        key = key.replace(new, old)
    return key


def open_clip(tensors, prefix):
    """{file key: (name or names, operation)} of OpenCLIP's layout."""
    keys = {}
    for name in tensors:
        if name == "text_projection.weight":
            keys[prefix + "text_projection"] = (name, "transpose")
            continue
        name_ = name.removeprefix("text_model.")
        fixed = {"embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
                 "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
        if name_ in fixed:
            keys[prefix + fixed[name_]] = (name, "")
            continue
        n, rest = re.match(r"encoder\.layers\.(\d+)\.(.*)", name_).groups()
        block = f"{prefix}transformer.resblocks.{n}."
        if match := re.match(r"self_attn\.q_proj\.(weight|bias)", rest):
            names = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            keys[f"{block}attn.in_proj_{match.group(1)}"] = (names, "pack")
        elif not re.match(r"self_attn\.[kv]_proj", rest):
            for new, old in [("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")]:
                rest = rest.replace(new, old)
            keys[block + rest] = (name, "")
    return keys


def tensors_of(model, text=False):
    tensors = model.state_dict()
    # transformers 5 writes CLIPTextModel without the prefix that files of all years have.
    if text and not any(name.startswith("text_model.") for name in tensors):
        tensors = {"text_model." + name: tensor for name, tensor in tensors.items()}
    return tensors


def stored(tensors, name, operation):
    if operation == "pack":
        return torch.cat([tensors[one] for one in name])
    tensor = tensors[name]
    return {"": lambda: tensor, "transpose": lambda: tensor.T.contiguous(), "conv": lambda: tensor[:, :, None, None]}[operation]()


def same(converted, tensors):
    assert set(converted) == set(tensors), set(converted) ^ set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(converted[name], tensor), name


def clip(cls, act, layers, projection):
    return cls(CLIPTextConfig(vocab_size=99, hidden_size=64, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=1,
                              max_position_embeddings=77, hidden_act=act, projection_dim=projection, eos_token_id=2,
                              bos_token_id=0, pad_token_id=1))


def family(name, unet_config, scaling, texts, extra):
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, norm_num_groups=32, sample_size=unet_config.pop("size"), **unet_config)
    vae = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32, scaling_factor=scaling, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, force_upcast=name == "sdxl")
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    keys = {}
    for key in unet.state_dict():
        old = unet_key(key, levels, layers)
        if "{upsampler}" in old:
            attends = f"{key.split('.upsamplers')[0]}.attentions.0.norm.weight" in unet.state_dict()
            old = old.format(upsampler=2 if attends else 1)
        keys["model.diffusion_model." + old] = ("unet", key, "")
    for key in vae.state_dict():
        linear = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight", key)
        keys["first_stage_model." + vae_key(key, 2)] = ("vae", key, "conv" if linear else "")
    models = {"unet": unet, "vae": vae}
    for part, prefix, model in texts:
        models[part] = model
        tensors = tensors_of(model, text=True)
        if prefix.endswith("model."):
            keys |= {key: (part, *value) for key, value in open_clip(tensors, prefix).items()}
        else:
            keys |= {prefix + name: (part, name, "") for name in tensors}
    parts = {part: tensors_of(model, part.startswith("text")) for part, model in models.items()}
    file = {key: stored(parts[part], names, operation) for key, (part, names, operation) in keys.items()}
    file |= {key: torch.ones(shape) for key, shape in extra.items()}

    same(sf.convert_ldm_unet_checkpoint(dict(file), unet.config), parts["unet"])
    same(sf.convert_ldm_vae_checkpoint(dict(file), vae.config), parts["vae"])
    for part, prefix, model in texts:
        if prefix.endswith("model."):
            converted = sf.convert_open_clip_checkpoint(model, file, prefix)
        else:
            converted = sf.convert_ldm_clip_checkpoint({key: value for key, value in file.items() if key.startswith(prefix) and key in keys})
        same(converted, parts[part])

    configs = {"unet": dict(unet.config), "vae": dict(vae.config)}
    for part, _, model in texts:
        # Old enough to be as in published folders.
        configs[part] = {field: model.config.to_dict()[field] for field in (
            "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
            "vocab_size", "projection_dim", "eos_token_id")} | {"model_type": "clip_text_model", "architectures": [type(model).__name__]}
    for part in ("unet", "vae"):
        configs[part]["_class_name"] = type(models[part]).__name__
    OUT.mkdir(parents=True, exist_ok=True)
    golden = {"configs": configs, "keys": keys, "extra": extra}
    (OUT / f"{name}.json").write_text(json.dumps(golden, separators=(",", ":")).replace('],"', '],\n"') + "\n")


def main():
    torch.manual_seed(7)
    plain = {"betas": [10], "alphas_cumprod": [10], "sqrt_one_minus_alphas_cumprod": [10], "model_ema.decay": []}
    family("sd1", dict(block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=64, attention_head_dim=8, size=64,
                       down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
           0.18215, [("text_encoder", "cond_stage_model.transformer.", clip(CLIPTextModel, "quick_gelu", 2, 64))],
           plain | {"cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77], "cond_stage_model.logit_scale": []})

    # diffusers leaves out layer 23 of 24; here it is the last of three.
    sf.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE = [key.replace(".23.", ".2.") for key in sf.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE]
    last = "cond_stage_model.model.transformer.resblocks.2."
    unused = {"attn.in_proj_bias": [192], "attn.in_proj_weight": [192, 64], "attn.out_proj.bias": [64], "attn.out_proj.weight": [64, 64],
              "ln_1.bias": [64], "ln_1.weight": [64], "ln_2.bias": [64], "ln_2.weight": [64], "mlp.c_fc.bias": [80],
              "mlp.c_fc.weight": [80, 64], "mlp.c_proj.bias": [64], "mlp.c_proj.weight": [64, 80]}
    family("sd2", dict(block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=64, attention_head_dim=(1, 2), size=96,
                       use_linear_projection=True, upcast_attention=True,
                       down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
           0.18215, [("text_encoder", "cond_stage_model.model.", clip(CLIPTextModel, "gelu", 2, 64))],
           plain | {last + key: shape for key, shape in unused.items()}
           | {"cond_stage_model.model.text_projection": [64, 64], "cond_stage_model.model.logit_scale": []})

    family("sdxl", dict(block_out_channels=(64, 64, 128), layers_per_block=1, cross_attention_dim=128, attention_head_dim=(1, 1, 2), size=128,
                        use_linear_projection=True, transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time",
                        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
                        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")),
           0.13025, [("text_encoder", "conditioner.embedders.0.transformer.", clip(CLIPTextModel, "quick_gelu", 2, 64)),
                     ("text_encoder_2", "conditioner.embedders.1.model.", clip(CLIPTextModelWithProjection, "gelu", 2, 32))],
           {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": [1, 77],
            "conditioner.embedders.1.model.logit_scale": [], "denoiser.sigmas": [1000]})


main()
