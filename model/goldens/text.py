"""Dumps the goldens of the text side: the connectors from plain PyTorch modules, the T5 encoder from transformers.

    python model/goldens/text.py model/tests/goldens            writes the goldens
    python model/goldens/text.py --check-base DIR ELLA          DIR: what `ella init-base` wrote; ELLA: the ella binary

Needs torch 2.11, transformers 5 and diffusers 0.42. The tests read only what is checked in; run this again when a golden
must change. Each golden is a folder: the network's own files, inputs.safetensors and outputs.safetensors.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel, T5Model


class AdaLayerNorm(nn.Module):
    def __init__(self, width, time_width):
        super().__init__()
        self.linear = nn.Linear(time_width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, time):
        shift, scale = self.linear(nn.functional.silu(time)).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.c_proj(self.c_fc(x).relu() ** 2)


class PerceiverBlock(nn.Module):
    def __init__(self, width, heads, time_width, zero=False):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = Mlp(width)
        self.ln_1 = AdaLayerNorm(width, time_width)
        self.ln_2 = AdaLayerNorm(width, time_width)
        self.ln_ff = AdaLayerNorm(width, time_width)
        if zero:
            self.gate_linear = nn.Linear(time_width, 2 * width)

    def gates(self, time):
        if not hasattr(self, "gate_linear"):
            return 1, 1
        return self.gate_linear(nn.functional.silu(time)).chunk(2, dim=-1)

    def forward(self, x, latents, time):
        attention_gate, mlp_gate = self.gates(time)
        queries = self.ln_1(latents, time)
        keys = torch.cat([queries, self.ln_2(x, time)], dim=1)
        latents = latents + attention_gate * self.attn(queries, keys, keys, need_weights=False)[0]
        return latents + mlp_gate * self.mlp(self.ln_ff(latents, time))


class PlainBlock(nn.Module):
    """A block that knows no timestep: the official code's norm_type "ln" (commit b7c2202)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = Mlp(width)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.ln_ff = nn.LayerNorm(width)

    def forward(self, x, latents):
        queries = self.ln_1(latents)
        keys = torch.cat([queries, self.ln_2(x)], dim=1)
        latents = latents + self.attn(queries, keys, keys, need_weights=False)[0]
        return latents + self.mlp(self.ln_ff(latents))


class PlainResampler(nn.Module):
    """The connector without time."""

    def __init__(self, width, layers, heads, latents, text_width):
        super().__init__()
        connector = nn.Module()
        connector.latents = nn.Parameter(torch.zeros(latents, width))
        connector.proj_in = nn.Linear(text_width, width)
        connector.perceiver_blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.connector = connector

    def forward(self, text_features, timesteps):
        latents = self.connector.latents.unsqueeze(0).repeat(len(text_features), 1, 1)
        x = self.connector.proj_in(text_features)
        for block in self.connector.perceiver_blocks:
            latents = block(x, latents)
        return latents


class LlavaMlp(nn.Module):
    """The connector as LLaVA's projector."""

    def __init__(self, width, text_width):
        super().__init__()
        self.connector = nn.ModuleDict({"linear_1": nn.Linear(text_width, width), "linear_2": nn.Linear(width, width)})

    def forward(self, text_features, timesteps):
        return self.connector["linear_2"](nn.functional.gelu(self.connector["linear_1"](text_features)))


class Resampler(nn.Module):
    def __init__(self, width, layers, heads, latents, text_width, time_width, zero):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latents, width))
        self.time_aware_linear = nn.Linear(time_width, width)
        self.proj_in = nn.Linear(text_width, width)
        self.perceiver_blocks = nn.ModuleList(PerceiverBlock(width, heads, time_width, zero) for _ in range(layers))

    def forward(self, x, time):
        latents = self.latents.unsqueeze(0) + self.time_aware_linear(nn.functional.silu(time))
        x = self.proj_in(x)
        for block in self.perceiver_blocks:
            latents = block(x, latents, time)
        return latents


class TimestepEmbedding(nn.Module):
    def __init__(self, channel, width):
        super().__init__()
        self.linear_1 = nn.Linear(channel, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(nn.functional.silu(self.linear_1(x)))


class Tsc(nn.Module):
    """The official connector (TencentQQGYLab/ELLA, model.py at 3c228f1) without its dependencies; with `zero`, AdaLN-Zero (b7c2202)."""

    def __init__(self, width, layers, heads, latents, text_width, time_channel, time_embed_dim, zero=False):
        super().__init__()
        self.time_channel = time_channel
        self.time_embedding = TimestepEmbedding(time_channel, time_embed_dim)
        self.connector = Resampler(width, layers, heads, latents, text_width, time_embed_dim, zero)

    def forward(self, text_features, timesteps):
        half = self.time_channel // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timesteps[:, None].float() * frequencies[None]
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(text_features.dtype)
        return self.connector(text_features, self.time_embedding(sinusoid).unsqueeze(1))


class AttentionPool(nn.Module):
    """openai/CLIP's AttentionPool2d (clip/model.py) over a sequence; without positions where the sequence has no fixed length."""

    def __init__(self, length, width, heads, output):
        super().__init__()
        if length:
            self.positional_embedding = nn.Parameter(torch.zeros(1 + length, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output)
        self.heads = heads

    def forward(self, x):
        x = x.transpose(0, 1)  # [L, B, D]
        x = torch.cat([x.mean(dim=0, keepdim=True), x], dim=0)
        if hasattr(self, "positional_embedding"):
            x = x + self.positional_embedding[:, None, :]
        x, _ = nn.functional.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=self.heads,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight, in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]), bias_k=None, bias_v=None, add_zero_attn=False,
            dropout_p=0.0, out_proj_weight=self.c_proj.weight, out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True, need_weights=False,
        )
        return x.squeeze(0)


class Pooled(nn.Module):
    """A connector with a pooled head: the states, and what SDXL is told besides."""

    def __init__(self, kind, pool, **config):
        super().__init__()
        body = kind(**config)
        self.time_embedding = getattr(body, "time_embedding", None)
        self.connector = body.connector
        self.pool = AttentionPool(**pool)
        self.body = [body]  # in a list, so that its parameters are not named twice

    def forward(self, text_features, timesteps):
        states = self.body[0](text_features, timesteps)
        return states, self.pool(states)


CONNECTORS = {
    # The default number of heads; a time embedding that is not as wide as the network; both ends of the schedule.
    "tsc-8-heads": (Tsc, dict(width=24, layers=2, heads=8, latents=5, text_width=20, time_channel=320, time_embed_dim=16), 7, [0, 999, 500], torch.float32),
    # A longer text, one sample a step apart from the next: what a low-precision sinusoid would confuse.
    "tsc-4-heads": (Tsc, dict(width=32, layers=1, heads=4, latents=9, text_width=12, time_channel=32, time_embed_dim=32), 33, [998, 999], torch.float32),
    # Stored in float16, as released; a single token.
    "tsc-half": (Tsc, dict(width=16, layers=3, heads=2, latents=3, text_width=8, time_channel=64, time_embed_dim=24), 1, [999, 0, 1, 250], torch.float16),
    # The paper's other kinds.
    "tsc-zero": (Tsc, dict(width=24, layers=2, heads=4, latents=5, text_width=12, time_channel=32, time_embed_dim=16, zero=True), 9, [0, 999, 500], torch.float32),
    "resampler": (PlainResampler, dict(width=24, layers=2, heads=8, latents=5, text_width=20), 7, [0, 999, 500], torch.float32),
    "resampler-1-block": (PlainResampler, dict(width=16, layers=1, heads=2, latents=9, text_width=12), 33, [998, 3], torch.float32),
    "mlp": (LlavaMlp, dict(width=24, text_width=20), 11, [0, 999, 500], torch.float32),
    # With a pooled head.
    "tsc-pooled": (Pooled, dict(kind=Tsc, pool=dict(length=5, width=24, heads=4, output=10), width=24, layers=2, heads=4, latents=5, text_width=12, time_channel=32, time_embed_dim=16), 9, [0, 999, 500], torch.float32),
    "mlp-pooled": (Pooled, dict(kind=LlavaMlp, pool=dict(length=0, width=16, heads=2, output=6), width=16, text_width=12), 7, [3, 998], torch.float32),
}

T5S = {
    "t5-gated": (dict(vocab_size=40, d_model=16, d_kv=3, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False), T5EncoderModel, 150),
    "t5-relu": (dict(vocab_size=32, d_model=12, d_kv=5, d_ff=20, num_layers=3, num_decoder_layers=1, num_heads=2, feed_forward_proj="relu",
                     relative_attention_num_buckets=8, relative_attention_max_distance=20, layer_norm_epsilon=1e-5), T5Model, 40),
}


def randomize(model, spread):
    """Random values everywhere, so that no parameter is without effect."""
    for parameter in model.parameters():
        width = parameter.shape[-1] if parameter.dim() > 1 else 4
        nn.init.normal_(parameter, std=spread * width**-0.5)


def dump_connector(folder, kind, config, tokens, timesteps, dtype):
    model = kind(**config)
    randomize(model, 1.0)
    stored = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    features = torch.randn(len(timesteps), tokens, config["text_width"], requires_grad=True)
    timesteps = torch.tensor(timesteps)
    output = model(features, timesteps)
    outputs = dict(zip(["hidden_states", "pooled"], output if isinstance(output, tuple) else [output]))
    weights = {name: torch.randn_like(tensor) for name, tensor in outputs.items()}
    sum((outputs[name] * weight).sum() for name, weight in weights.items()).backward()
    weights = {"grad_output" if name == "hidden_states" else f"grad_output.{name}": weight for name, weight in weights.items()}
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    save_file(stored, folder / "connector.safetensors", metadata={"format": "pt"})
    save_file({"text_features": features.detach(), "timesteps": timesteps, **weights}, folder / "inputs.safetensors")
    outputs = {name: tensor.detach() for name, tensor in outputs.items()}
    save_file({**outputs, "grad.text_features": features.grad, **gradients}, folder / "outputs.safetensors")


def dump_t5(folder, config, kind, tokens):
    model = kind(T5Config(**config)).eval()
    randomize(model, 1.5)
    lengths = [tokens, tokens // 3, 1]
    ids = torch.randint(2, config["vocab_size"], (len(lengths), tokens))
    mask = (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    encoder = model if kind is T5EncoderModel else model.encoder
    with torch.no_grad():
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    model.save_pretrained(folder)
    save_file({"input_ids": ids, "attention_mask": mask}, folder / "inputs.safetensors")
    save_file({"last_hidden_state": states.contiguous()}, folder / "outputs.safetensors")


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def check_base(folder, ella):
    """Loads an `init-base` folder in diffusers and transformers, and compares outputs with those of `ella forward`."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    def run(net, model, inputs):
        with tempfile.TemporaryDirectory() as work:
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, f"{work}/in.safetensors")
            command = [ella, "forward", net, "--model", model, "--inputs", f"{work}/in.safetensors", "--outputs", f"{work}/out.safetensors"]
            subprocess.run(command, check=True)
            return load_file(f"{work}/out.safetensors")

    base, text = folder / "base", folder / "text"
    unet = UNet2DConditionModel.from_pretrained(base / "unet").float().eval()
    vae = AutoencoderKL.from_pretrained(base / "vae").float().eval()
    print("scheduler", DDIMScheduler.from_pretrained(base / "scheduler").alphas_cumprod[[0, -1]].tolist())
    tokenizer = AutoTokenizer.from_pretrained(text)
    t5 = T5EncoderModel.from_pretrained(text).float().eval()
    with torch.no_grad():
        tokens = tokenizer(["a red circle left of a blue square", "stripes"], padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        ours = run("text", text, {name: tokens[name] for name in ("input_ids", "attention_mask")})["last_hidden_state"]
        theirs = t5(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        print("tokens", tokens["input_ids"][0, :12].tolist())
        print("text", relative(ours, theirs))
        size = unet.config.sample_size
        sample, t = torch.randn(2, 4, size, size), torch.tensor([10, 900])
        states = torch.randn(2, 64, unet.config.cross_attention_dim)
        added = {}
        if unet.config.addition_embed_type == "text_time":
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            added = {"text_embeds": torch.randn(2, width), "time_ids": torch.tensor([[64.0, 80, 0, 8, 64, 64], [1024, 1024, 0, 0, 1024, 1024]])}
        ours = run("unet", base / "unet", {"sample": sample, "timesteps": t, "hidden_states": states, **added})["sample"]
        print("unet", relative(ours, unet(sample, t, states, added_cond_kwargs=added).sample))
        image = torch.rand(1, 3, 8 * size, 8 * size) * 2 - 1
        ours, theirs = run("vae-encode", base / "vae", {"image": image}), vae.encode(image).latent_dist
        print("vae-encode", relative(ours["mean"], theirs.mean), relative(ours["logvar"], theirs.logvar))
        ours = run("vae-decode", base / "vae", {"latent": theirs.mean})["image"]
        print("vae-decode", relative(ours, vae.decode(theirs.mean).sample))


def main():
    if sys.argv[1] == "--check-base":
        check_base(Path(sys.argv[2]), sys.argv[3])
        return
    root = Path(sys.argv[1])
    for name, arguments in CONNECTORS.items():
        torch.manual_seed(1)
        (root / name).mkdir(parents=True, exist_ok=True)
        dump_connector(root / name, *arguments)
    for name, arguments in T5S.items():
        torch.manual_seed(1)
        (root / name).mkdir(parents=True, exist_ok=True)
        dump_t5(root / name, *arguments)


main()
