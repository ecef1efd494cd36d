"""Dumps the goldens of the diffusion side (U-Net, VAE, schedules, DDIM) from diffusers.

    python model/goldens/diffusion.py model/tests/goldens

Needs torch 2.11 and diffusers 0.42. The tests read only what is checked in; run this again when a golden must change.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from safetensors.torch import save_file

# Width of the pooled text of the small SDXL.
POOLED = 10
UNETS = {
    # The SD 1.5 kind: 1x1 convolutions around the transformers, one number of heads, the deepest block without attention.
    "unet-sd15": dict(
        in_channels=4, out_channels=4, block_out_channels=(6, 8, 10), layers_per_block=2, cross_attention_dim=10,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, norm_num_groups=2, sample_size=8,
    ),
    # What SD 2 and SDXL add: linear projections, heads and depth by block, the first block without attention.
    "unet-linear": dict(
        in_channels=4, out_channels=4, block_out_channels=(6, 8, 10), layers_per_block=1, cross_attention_dim=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 4, 5), transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        upcast_attention=True, norm_num_groups=2, norm_eps=1e-4, flip_sin_to_cos=False, freq_shift=1,
        time_embedding_dim=14, downsample_padding=0, sample_size=8,
    ),
    # SD 2.1: heads of one width, attention in float32, the deepest block without attention.
    "unet-sd2": dict(
        in_channels=4, out_channels=4, block_out_channels=(4, 8, 12), layers_per_block=1, cross_attention_dim=10,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2, 3), use_linear_projection=True, upcast_attention=True, norm_num_groups=2, sample_size=8,
    ),
    # SDXL: conditions added to the time embedding, transformers that deepen, the first block without.
    "unet-sdxl": dict(
        in_channels=4, out_channels=4, block_out_channels=(4, 8, 8), layers_per_block=1, cross_attention_dim=10,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 4), transformer_layers_per_block=(1, 2, 3), use_linear_projection=True,
        norm_num_groups=2, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8, sample_size=8,
    ),
    # What small SDXLs do: a depth for each layer, and another way up than down.
    "unet-uneven": dict(
        in_channels=4, out_channels=4, block_out_channels=(4, 8), layers_per_block=2, cross_attention_dim=10,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(1, 2), transformer_layers_per_block=(1, (2, 1)),
        reverse_transformer_layers_per_block=((1, 2, 1), 2), use_linear_projection=True, norm_num_groups=2, sample_size=8,
    ),
}

# Weights that are well conditioned, see `expected`.
SEEDS = {"unet-linear": 107, "unet-sd2": 77, "unet-sdxl": 88, "unet-uneven": 6}

VAE = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 12, 16), layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=4, sample_size=16, scaling_factor=0.18215,
)

SD15 = dict(
    _class_name="PNDMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None,
)
SCHEDULES = {
    "sd15": SD15,
    "v-trailing": dict(
        SD15, _class_name="DDIMScheduler", prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True, steps_offset=0,
    ),
    "v-leading": dict(SD15, _class_name="DDIMScheduler", prediction_type="v_prediction", timestep_spacing="leading"),
    "linear-linspace": dict(
        _class_name="DDPMScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000,
        clip_sample=True, clip_sample_range=1.5, timestep_spacing="linspace", prediction_type="epsilon",
        variance_type="fixed_small",
    ),
    "cosine-trailing": dict(
        _class_name="DDIMScheduler", beta_schedule="squaredcos_cap_v2", num_train_timesteps=500, clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="epsilon",
    ),
}
# Not 499: there the reference's trailing spacing has a rounding error, and gives a 500th timestep of -1.
COUNTS = [*range(1, 61), 100, 250, 333, 500]
STEPS = 20


def randomise(model, generator, size):
    """Weights that hide nothing: normal, times `size` / sqrt(fan in), with biases and norm gains away from their usual 0 and 1."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() > 1:
            p.data = noise * size / p[0].numel() ** 0.5
        else:
            p.data = 0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def save(path, tensors):
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path)
    print(f"{path}: {path.stat().st_size} bytes")


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def expected(what, model, run, bounds):
    """What `run` gives for the model in float64, as float32.

    A network this small can be badly conditioned (a norm over few values of little variance), and then a golden would measure rounding
    and not the code that is tested. So one is refused where the reference itself strays further in float32 or bfloat16 than `bounds`
    say for each of its values.
    """
    exact = run(copy.deepcopy(model).double())
    for kind, most in bounds.items():
        strays = [relative(a.double(), b) for a, b in zip(run(copy.deepcopy(model).to(kind)), exact)]
        print(f"{what}: {kind} strays by {', '.join(f'{s:.1e}' for s in strays)}")
        assert all(s < m for s, m in zip(strays, most)), "badly conditioned: take other weights or sizes"
    return [x.float() for x in exact]


def unet(out, name, config):
    g = torch.Generator().manual_seed(SEEDS.get(name, len(name)))
    model = UNet2DConditionModel(**config).eval()
    randomise(model, g, 3**-0.5)
    model.save_pretrained(out / name)
    golden = {}
    # 9x7 halves to 5x4 and 3x2 (padding 1): sizes that the way up can only restore if it is told them.
    for case, (b, h, w, tokens) in {"even": (2, 8, 8, 3), "odd": (3, 9, 7, 5)}.items():
        sample = torch.randn(b, 4, h, w, generator=g)
        t = torch.tensor([0, 999, 421][:b])
        hidden = torch.randn(b, tokens, config["cross_attention_dim"], generator=g)
        grad_output = torch.randn(sample.shape, generator=g)
        added = {}
        if config.get("addition_embed_type") == "text_time":
            added["text_embeds"] = torch.randn(b, POOLED, generator=g)
            # Height and width of the original, top and left of the crop, height and width of the picture.
            added["time_ids"] = torch.tensor([[1024, 768, 0, 0, 1024, 1024], [333, 1999, 7, 512, 512, 640], [64] * 6][:b]).float()

        def run(net):
            x = hidden.to(net.dtype, copy=True).requires_grad_()
            y = net(sample.to(net.dtype), t, x, added_cond_kwargs=added).sample
            y.backward(grad_output.to(net.dtype))
            return y.detach(), x.grad

        # Well within what the tests allow: other machines' kernels round otherwise.
        bounds = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (1.5e-2, 4e-2), torch.float16: (5e-3, 1e-2)}
        y, grad = expected(f"{name} {case}", model, run, bounds)
        golden |= {
            f"{case}.sample": sample, f"{case}.timesteps": t, f"{case}.hidden_states": hidden, f"{case}.grad_output": grad_output,
            f"{case}.output": y, f"{case}.grad.hidden_states": grad,
        }
        golden |= {f"{case}.{key}": value for key, value in added.items()}
    if name == "unet-sd2":
        golden |= v_prediction(name, model, g)
    save(out / name / "golden.safetensors", golden)


def v_prediction(name, model, g):
    """The loss of each sample and its gradient when the network is taken to predict v, as SD 2.1's schedule says."""
    schedule = DDIMScheduler.from_config({k: v for k, v in SCHEDULES["v-leading"].items() if k != "_class_name"})
    x0, noise = torch.randn(3, 4, 9, 7, generator=g), torch.randn(3, 4, 9, 7, generator=g)
    t = torch.tensor([0, 999, 421])
    hidden = torch.randn(3, 5, model.config.cross_attention_dim, generator=g)

    def run(net):
        x = hidden.to(net.dtype, copy=True).requires_grad_()
        noisy, target = schedule.add_noise(x0, noise, t), schedule.get_velocity(x0, noise, t)
        loss = (net(noisy.to(net.dtype), t, x).sample - target).square().mean(dim=(1, 2, 3))
        loss.sum().backward()
        return loss.detach(), x.grad

    loss, grad = expected(f"{name} v", model, run, {torch.float32: (2e-6, 1e-5)})
    return {
        "v.x0": x0, "v.noise": noise, "v.timesteps": t, "v.hidden_states": hidden, "v.loss": loss, "v.grad.hidden_states": grad,
    }


@torch.no_grad()
def vae(out):
    g = torch.Generator().manual_seed(3)
    model = AutoencoderKL(**VAE).eval()
    randomise(model, g, 1)
    # Some log-variances beyond the clamp of -30..20.
    model.quant_conv.weight.data[4:] *= 20
    model.save_pretrained(out / "vae")
    golden = {}
    for case, (b, h, w) in {"even": (2, 16, 24), "odd": (1, 19, 13)}.items():
        image = torch.rand(b, 3, h, w, generator=g) * 2 - 1
        latent = torch.randn(b, 4, h // 4, w // 4, generator=g)

        def run(net):
            moments = net.encode(image.to(net.dtype)).latent_dist
            return moments.mean, moments.logvar, net.decode(latent.to(net.dtype)).sample

        mean, logvar, decoded = expected(f"vae {case}", model, run, {torch.float32: (2e-6,) * 3, torch.bfloat16: (2e-2,) * 3})
        golden |= {f"{case}.image": image, f"{case}.mean": mean, f"{case}.logvar": logvar}
        golden |= {f"{case}.latent": latent, f"{case}.decoded": decoded}
    assert golden["even.logvar"].max() == 20
    golden |= tiled(model, g)
    save(out / "vae" / "golden.safetensors", golden)


def tiled(model, g):
    """Pictures larger than the tile of 16 (a latent of 4), one at a time and in tiles."""
    golden = {}
    for case, (b, h, w) in {"even": (2, 40, 28), "odd": (1, 53, 17)}.items():
        image = torch.rand(b, 3, h, w, generator=g) * 2 - 1
        latent = torch.randn(b, 4, h // 4, w // 4, generator=g)

        def run(net):
            net.enable_slicing()
            net.enable_tiling()
            moments = net.encode(image.to(net.dtype)).latent_dist
            return moments.mean, moments.logvar, net.decode(latent.to(net.dtype)).sample

        values = expected(f"vae tiled {case}", model, run, {torch.float32: (2e-6,) * 3})
        names = ["image", "latent", "mean", "logvar", "decoded"]
        golden |= {f"tiled.{case}.{name}": value for name, value in zip(names, [image, latent, *values])}
    return golden


def model_output(x, t):
    """What stands in for a U-Net in the sampler's goldens; the test computes the same."""
    return torch.tanh(0.7 * x + t / 1000)


def schedule(out, name, config):
    g = torch.Generator().manual_seed(11)
    folder = out / "schedules" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")
    ddim = DDIMScheduler.from_config({k: v for k, v in config.items() if k != "_class_name"})
    last = ddim.config.num_train_timesteps - 1
    x0, noise = torch.randn(4, 4, 3, 2, generator=g), torch.randn(4, 4, 3, 2, generator=g)
    t = torch.tensor([0, 1, 421, last])
    velocity = ddim.config.prediction_type == "v_prediction"
    snr = compute_snr(ddim, t)
    golden = {
        "alphas_cumprod": ddim.alphas_cumprod, "x0": x0, "noise": noise, "t": t,
        "noisy": ddim.add_noise(x0, noise, t),
        "target": ddim.get_velocity(x0, noise, t) if velocity else noise,
        "min_snr": torch.clamp(snr, max=5.0) / (snr + 1 if velocity else snr),
    }
    for n in COUNTS:
        ddim.set_timesteps(n)
        golden[f"timesteps.{n}"] = ddim.timesteps
    ddim.set_timesteps(STEPS)
    x = torch.randn(1, 4, 3, 2, generator=g)
    sequence = [x]
    for step in ddim.timesteps:
        x = ddim.step(model_output(x, step), step, x).prev_sample
        sequence.append(x)
    golden["sequence"] = torch.stack(sequence)
    save(folder / "golden.safetensors", golden)


def main():
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name, config in UNETS.items():
        unet(out, name, config)
    vae(out)
    for name, config in SCHEDULES.items():
        schedule(out, name, config)


if __name__ == "__main__":
    main()
