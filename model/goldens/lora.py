"""Dumps the goldens of LoRA files merged into a U-Net at 0.8: diffusers' own loader reads each layout, and fuses it.

    python model/goldens/lora.py model/tests/goldens

Needs torch 2.11, diffusers 0.42 and peft 0.21, and the goldens of diffusion.py. The tests read only what is checked in.
"""

import json
import re
import sys
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from safetensors.torch import load_file, save_file

WEIGHT = 0.8


def layers(unet, keep):
    """Linear maps and convolutions, by name."""
    found = {n: m for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    return {n: m for n, m in found.items() if keep(n)}


def factors(module, rank, g):
    """(down, up) as a LoRA of the module has them: of a convolution, a convolution of its kernel and then one of 1x1."""
    out, *rest = module.weight.shape
    down = torch.randn(rank, *rest, generator=g) / module.weight[0].numel() ** 0.5
    up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=g) / rank**0.5
    return down, up


def attention(name):
    return "attn" in name and ".to_" in name


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def sgm(name, depth=1):
    """The original implementation's block names, which kohya's scripts use for SDXL."""
    fixed = {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if name in fixed:
        return "lora_unet_" + fixed[name].replace(".", "_")
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    m = re.match(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    side, block, part, at, rest = m.groups()
    rest, at = inner.get(rest, rest) if part == "resnets" else rest, int(at)
    if side is None:
        place = f"middle_block.{1 if part == 'attentions' else 2 * at}"
    elif part == "downsamplers":
        place, rest = f"input_blocks.{1 + int(block) * (depth + 1) + depth}.0", "op"
    elif part == "upsamplers":
        place, rest = f"output_blocks.{int(block) * (depth + 1) + depth}.2", "conv"
    else:
        first = int(block) * (depth + 1) + at + (side == "down")
        place = f"{'input' if side == 'down' else 'output'}_blocks.{first}.{int(part == 'attentions')}"
    return "lora_unet_" + f"{place}.{rest}".replace(".", "_")


def write_kohya(unet, g, naming, keep, alpha):
    tensors = {}
    for i, (name, module) in enumerate(layers(unet, keep).items()):
        down, up = factors(module, 1 + i % 3, g)
        base = naming(name)
        tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up, f"{base}.alpha": torch.tensor(alpha)}
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return tensors | {f"{te}.lora_down.weight": torch.randn(1, 4, generator=g), f"{te}.lora_up.weight": torch.randn(4, 1, generator=g)}


def write_peft(unet, g, keep, rank):
    tensors = {}
    for name, module in layers(unet, keep).items():
        down, up = factors(module, rank, g)
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return tensors


def write_old(unet, g):
    """diffusers' attention processors, and its layers for the rest."""
    tensors = {}
    for name, module in layers(unet, lambda n: attention(n) or "ff.net" in n).items():
        down, up = factors(module, 2, g)
        if attention(name):
            block, projection = re.match(r"(.*)\.(to_q|to_k|to_v|to_out)(?:\.0)?$", name).groups()
            base = f"unet.{block}.processor.{projection}_lora"
        else:
            base = f"unet.{name}.lora"
        tensors |= {f"{base}.down.weight": down, f"{base}.up.weight": up}
    return tensors


def main(out):
    (out / "lora").mkdir(exist_ok=True)
    golden = {}
    cases = {
        # name: (U-Net, loader, what the file holds, PEFT's settings)
        "kohya": ("unet-sd15", lambda u, g: write_kohya(u, g, kohya, lambda n: True, 0.5), None),
        "sgm": ("unet-sdxl", lambda u, g: write_kohya(u, g, sgm, lambda n: True, 1.5), None),
        "peft": ("unet-sd15", lambda u, g: write_peft(u, g, lambda n: attention(n) or "proj_" in n or "ff.net" in n, 2), None),
        "peft-settings": (
            "unet-sdxl", lambda u, g: write_peft(u, g, attention, 2),
            {"r": 2, "lora_alpha": 3, "alpha_pattern": {"attn2.to_q": 5}, "use_rslora": True, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        ),
        "processors": ("unet-sd15", write_old, None),
    }
    for case, (name, write, settings) in cases.items():
        g = torch.Generator().manual_seed(len(case))
        unet = UNet2DConditionModel.from_pretrained(out / name)
        tensors = write(unet, g)
        file = out / "lora" / f"{case}.safetensors"
        metadata = {"format": "pt"}
        if settings:
            metadata["lora_adapter_metadata"] = json.dumps({f"unet.{k}": v for k, v in settings.items()})
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=metadata)

        golden[case] = merged(unet.double(), {file: WEIGHT}, out / name, name)
        print(f"{file}: {file.stat().st_size} bytes, {len(tensors)} tensors")
    unet = UNet2DConditionModel.from_pretrained(out / "unet-sd15").double()
    both = {out / "lora" / "kohya.safetensors": WEIGHT, out / "lora" / "peft.safetensors": -0.5}
    golden["two"] = merged(unet, both, out / "unet-sd15", "unet-sd15")
    golden["mid"] = decomposed(out)
    save_file(golden, out / "lora" / "golden.safetensors")


@torch.no_grad()
def run(unet, folder):
    case = load_file(folder / "golden.safetensors")
    added = {k: case[f"odd.{k}"].to(unet.dtype) for k in ("text_embeds", "time_ids") if f"odd.{k}" in case}
    states = case["odd.hidden_states"].to(unet.dtype)
    return unet(case["odd.sample"].to(unet.dtype), case["odd.timesteps"], states, added_cond_kwargs=added).sample


def merged(unet, files, folder, name):
    """What the U-Net gives with all files fused at their weights, in float64."""
    mixin = StableDiffusionXLLoraLoaderMixin if "sdxl" in name else StableDiffusionLoraLoaderMixin
    before = run(unet, folder)
    for i, file in enumerate(files):
        state, alphas, *rest = mixin.lora_state_dict(str(file), unet_config=unet.config, return_lora_metadata=True)
        metadata = rest[0] if rest else None
        mixin.load_lora_into_unet(state, alphas, unet, adapter_name=f"a{i}", metadata=metadata)
    # The factors come in float32.
    unet.double()
    names = [f"a{i}" for i in range(len(files))]
    unet.set_adapters(names, list(files.values()))
    unet.fuse_lora(adapter_names=names)
    unet.unload_lora()
    y = run(unet, folder)
    far = ((y - before).abs().max() / before.abs().max()).item()
    print(f"{[f.name for f in files]}: the output moves by {far:.2f}")
    assert far > 0.05
    return y.float()


def decomposed(out):
    """LoCon's decomposed convolution: three convolutions beside the layer. diffusers does not read it; this is LyCORIS' forward."""
    g = torch.Generator().manual_seed(7)
    unet = UNet2DConditionModel.from_pretrained(out / "unet-sd15").double()
    conv, rank = unet.down_blocks[0].resnets[0].conv1, 2
    width = conv.in_channels
    down, mid = torch.randn(rank, width, 1, 1, generator=g), torch.randn(rank, rank, 3, 3, generator=g)
    up = torch.randn(conv.out_channels, rank, 1, 1, generator=g)
    base = "lora_unet_down_blocks_0_resnets_0_conv1"
    names = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file({f"{base}.{k}": v for k, v in names.items()}, out / "lora" / "mid.safetensors")
    f = torch.nn.functional

    def beside(_, args, y):
        x = f.conv2d(f.conv2d(args[0], down.double()), mid.double(), padding=1)
        return y + WEIGHT * (1.0 / rank) * f.conv2d(x, up.double())

    conv.register_forward_hook(beside)
    return run(unet, out / "unet-sd15").float()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
