"""What a good engineer would write with PyTorch and diffusers to train ELLA's connector: the peer of ella's own step, at its shapes and batch.

A TSC (66.8 million parameters, float32, computing in bfloat16 by autocast) before diffusers' U-Net of Stable Diffusion 1.5 (random weights,
frozen, bfloat16, channels-last, SDPA), compiled as one graph from features to loss; clipping, fused AdamW, and a moving average by foreach.
Latents and features are cached, in pinned memory; the next batch is copied on a stream of its own while one is computed. The U-Net's
gradient goes to its conditioning alone.

    python peer_trainer.py --micro-batch 64 --json
    python peer_trainer.py --micro-batch 32 --accumulate 2 --compile reduce-overhead
    python peer_trainer.py --preset nano --device cpu --eager --micro-batch 4 --steps 2

Time is taken per window of --steps steps, and the device is waited for at a window's end only. With --json, standard output has one object, and
what goes on goes to standard error. Needs `pip install torch diffusers`.
"""

import argparse
import contextlib
import json
import math
import platform
import resource
import statistics
import sys
import time
import warnings

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(f"peer_trainer: no PyTorch here ({error}): python3 -m pip install torch")

UNET = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 64,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
# `parameters`: of connector and U-Net, as ella counts its own. `tflop`: an image's, of a step, by paper §7.1: 1.67 for the U-Net's passes
# forward and back to its conditioning, 0.024 for the connector's. What a kernel computes twice is counted once; torch's FlopCounterMode agrees.
PRESETS = {
    "sd15": {"width": 768, "text": 2048, "tokens": 128, "unet": UNET, "parameters": (66_820_608, 859_520_964), "tflop": 1.69},
    "nano": {
        "width": 64, "text": 64, "tokens": 128, "parameters": None, "tflop": None,
        "unet": UNET | {
            "attention_head_dim": 4, "block_out_channels": (32, 64), "cross_attention_dim": 64, "layers_per_block": 1, "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8,
        },
    },
}
LATENTS, LAYERS, HEADS, TIME_CHANNELS = 64, 6, 8, 320
LEARNING_RATE, WEIGHT_DECAY, CLIP, EMA_DECAY, TRAIN_STEPS = 1e-4, 0.01, 1.0, 0.9999, 1000
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
CACHED_BATCHES = 4


class AdaLayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, time):
        shift, scale = self.linear(time).unsqueeze(1).chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PerceiverBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_1, self.ln_2, self.ln_ff = (AdaLayerNorm(width) for _ in range(3))

    def forward(self, latents, x, time):
        queries = self.ln_1(latents, time)
        keys = torch.cat([queries, self.ln_2(x, time)], dim=1)  # [B, L + S, D]
        latents = latents + self.attn(queries, keys, keys, need_weights=False)[0]
        hidden = F.relu(self.mlp["c_fc"](self.ln_ff(latents, time))).square()
        return latents + self.mlp["c_proj"](hidden)


class Resampler(nn.Module):
    def __init__(self, width, text):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(LATENTS, width) * width**-0.5)
        self.time_aware_linear = nn.Linear(width, width)
        self.proj_in = nn.Linear(text, width)
        self.perceiver_blocks = nn.ModuleList(PerceiverBlock(width) for _ in range(LAYERS))

    def forward(self, features, time):
        latents = self.latents + self.time_aware_linear(time).unsqueeze(1)  # [B, L, D]
        x = self.proj_in(features)  # [B, S, D]
        for block in self.perceiver_blocks:
            latents = block(latents, x, time)
        return latents


class Connector(nn.Module):
    """The TSC of paper §1.1, under the official code's names."""

    def __init__(self, width, text):
        super().__init__()
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(TIME_CHANNELS, width), "linear_2": nn.Linear(width, width)})
        self.connector = Resampler(width, text)
        half = TIME_CHANNELS // 2
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * (-math.log(10_000) / half)), persistent=False)

    def forward(self, features, timesteps):
        angles = timesteps.float().unsqueeze(1) * self.frequencies
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        time = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](time)))
        return self.connector(features, F.silu(time))


class Trainer:
    def __init__(self, args, preset, device, unet_class):
        self.args, self.device = args, device
        with torch.device(device):
            self.connector = Connector(preset["width"], preset["text"])
            unet = unet_class(**preset["unet"])
        counts = tuple(sum(p.numel() for p in module.parameters()) for module in (self.connector, unet))
        if preset["parameters"] not in (None, counts):
            sys.exit(f"peer_trainer: connector and U-Net have {counts} parameters (expected {preset['parameters']}): another diffusers?")
        self.counts = counts
        # PyTorch's own `to`: diffusers' warns of modules to keep in float32 where there are none.
        self.unet = nn.Module.to(unet.eval().requires_grad_(False), torch.bfloat16, memory_format=torch.channels_last)
        if args.fuse_qkv:
            self.unet.fuse_qkv_projections()
        self.params = list(self.connector.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        # Stable Diffusion's schedule ("scaled_linear"), as factors of latents and of noise.
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.signal, self.noise = (factor.sqrt().float().to(device).view(-1, 1, 1, 1) for factor in (alphas, 1 - alphas))
        self.loss = self.forward if args.compile is None else torch.compile(self.forward, mode=args.compile, fullgraph=True)
        self.step_number = 0

    def forward(self, latents, features, timesteps, noise):
        """The mean loss of a batch."""
        noisy = self.signal[timesteps] * latents + self.noise[timesteps] * noise
        noisy = noisy.to(torch.bfloat16, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.connector == "bf16"):
            states = self.connector(features.float(), timesteps)
        predicted = self.unet(noisy, timesteps, states.to(torch.bfloat16), return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    def step(self, feed):
        """One update; its last micro-batch's loss, on the device."""
        if self.args.accumulate > 1 and self.step_number:
            torch._foreach_zero_([p.grad for p in self.params])
        elif self.args.accumulate > 1:
            # Sums need memory of their own: a CUDA graph's is written anew at each replay.
            for p in self.params:
                p.grad = torch.zeros_like(p)
        for _ in range(self.args.accumulate):
            latents, features, timesteps = next(feed)
            torch.compiler.cudagraph_mark_step_begin()
            loss = self.loss(latents, features, timesteps, torch.randn_like(latents))
            (loss / self.args.accumulate).backward()
        nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        self.step_number += 1
        decay = min(EMA_DECAY, (1 + self.step_number) / (10 + self.step_number))
        with torch.no_grad():
            # Without it every average would hang on a graph that grows by a node a step.
            torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        if self.args.accumulate == 1:
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def cached_batches(args, preset):
    """Batches as a cache has them: latents [B, 4, H, W] float32, features [B, S, E] float16, timesteps [B]; pinned where there is a GPU."""
    rng, size = torch.Generator().manual_seed(args.seed), preset["unet"]["sample_size"]
    for _ in range(CACHED_BATCHES):
        latents = torch.randn(args.micro_batch, 4, size, size, generator=rng)
        features = torch.randn(args.micro_batch, preset["tokens"], preset["text"], generator=rng).half()
        timesteps = torch.randint(TRAIN_STEPS, (args.micro_batch,), generator=rng)
        yield [x.pin_memory() if torch.cuda.is_available() else x for x in (latents, features, timesteps)]


def feed(batches, device):
    """The batches on the device, round and round; on a GPU the next one is copied while one is in use."""
    if device.type == "cpu":
        while True:
            yield from batches
    stream, number = torch.cuda.Stream(), 0

    def copied():
        with torch.cuda.stream(stream):
            return [x.to(device, non_blocking=True) for x in batches[number % len(batches)]]

    ahead = copied()
    while True:
        torch.cuda.current_stream().wait_stream(stream)
        batch, number = ahead, number + 1
        for x in batch:
            x.record_stream(torch.cuda.current_stream())
        ahead = copied()
        yield batch


def at_least(least):
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    compiling = parser.add_mutually_exclusive_group()
    modes = ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]
    compiling.add_argument("--compile", choices=modes, default="max-autotune-no-cudagraphs", help="torch.compile's mode (%(default)s)")
    compiling.add_argument("--eager", dest="compile", action="store_const", const=None, help="no torch.compile")
    parser.add_argument("--micro-batch", type=at_least(1), default=32, help="images that pass the networks at once (%(default)s)")
    parser.add_argument("--accumulate", type=at_least(1), default=1, help="micro-batches of one update (%(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=10, help="updates in a window (%(default)s)")
    parser.add_argument("--windows", type=at_least(5), default=7, help="windows that are timed, at least 5 (%(default)s)")
    parser.add_argument("--warmup", type=at_least(1), default=5, help="updates before them (%(default)s)")
    parser.add_argument("--preset", choices=PRESETS, default="sd15", help="sizes; nano is for trying it on a CPU (%(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--connector", choices=["bf16", "fp32"], default="bf16", help="what the connector computes in (%(default)s)")
    parser.add_argument("--sdpa", choices=["auto", *SDPA], default="auto", help="the kernels of attention (%(default)s)")
    parser.add_argument("--no-tf32", dest="tf32", action="store_false", help="float32 products without TF32")
    parser.add_argument("--fuse-qkv", action="store_true", help="diffusers' fused projections")
    parser.add_argument("--tune", action="store_true", help="Inductor's settings that diffusers' guide advises; compiles for longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args()


def unet_class():
    try:
        from diffusers import UNet2DConditionModel
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(f"peer_trainer: diffusers cannot be loaded ({reason}): python3 -m pip install diffusers")
    return UNet2DConditionModel


def chosen_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no NVIDIA GPU or driver"
        sys.exit(f"peer_trainer: --device cuda: {why}")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def settle(args):
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = True
    if args.tune:
        import torch._inductor.config as inductor

        inductor.conv_1x1_as_mm = inductor.coordinate_descent_tuning = inductor.coordinate_descent_check_all_directions = True
        inductor.epilogue_fusion = False


def measure(args, preset, device):
    """Seconds of each window, the losses at their ends, and the trainer."""
    say = lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    trainer = Trainer(args, preset, device, unet_class())
    batches = feed(list(cached_batches(args, preset)), device)
    seconds, losses = [], []
    for window in range(1 + args.windows):
        begin = time.perf_counter()
        for _ in range(args.steps if window else args.warmup):
            loss = trainer.step(batches)
        wait()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
        if device.type == "cuda" and not window:
            # What compiling and choosing kernels took is not the step's.
            torch.cuda.reset_peak_memory_stats()
        if not math.isfinite(losses[-1]):
            sys.exit(f"peer_trainer: the loss is {losses[-1]} after {trainer.step_number} updates: nothing is measured")
        images = args.micro_batch * args.accumulate * args.steps / seconds[-1]
        say(f"window {window}: {images:.2f} images/s, loss {losses[-1]:.4f}" if window else f"warm-up: {seconds[0]:.1f} s, loss {losses[0]:.4f}")
    return seconds, losses, trainer


def main():
    args = arguments()
    # Of Dynamo, about code of diffusers.
    warnings.filterwarnings("ignore")
    device, preset = chosen_device(args.device), PRESETS[args.preset]
    settle(args)
    kernels = contextlib.nullcontext() if args.sdpa == "auto" else sdpa_kernel(SDPA[args.sdpa])
    try:
        with kernels:
            seconds, losses, trainer = measure(args, preset, device)
    except RuntimeError as error:
        # The compiler wraps the allocator's error in its own.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        sys.exit(f"peer_trainer: --micro-batch {args.micro_batch} does not fit this GPU's memory: take a smaller one")
    batch = args.micro_batch * args.accumulate
    rates = [batch * args.steps / taken for taken in seconds[1:]]
    median, gpu = statistics.median(rates), device.type == "cuda"
    import diffusers

    result = {
        "images_per_second": median, "slowest": min(rates), "fastest": max(rates), "spread": (max(rates) - min(rates)) / median,
        "step_ms": 1e3 * batch / median, "tflops": preset["tflop"] and median * preset["tflop"], "tflop_per_image": preset["tflop"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "reserved_memory_bytes": torch.cuda.max_memory_reserved() if gpu else None,
        "warmup_seconds": seconds[0], "first_loss": losses[0], "last_loss": losses[-1],
        "connector_parameters": trainer.counts[0], "unet_parameters": trainer.counts[1],
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "diffusers": diffusers.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "cudnn": torch.backends.cudnn.version(), "settings": vars(args) | {"device": device.type},
    }
    if args.json:
        print(json.dumps(result))
        return
    speed = f", {result['tflops']:.1f} TFLOP/s" if result["tflops"] else ""
    print(f"{result['device']}, PyTorch {result['torch']}, diffusers {result['diffusers']}, {args.preset}, {args.compile or 'eager'}:")
    print(f"{median:.2f} images/s ({min(rates):.2f} to {max(rates):.2f}){speed}, {result['peak_memory_bytes'] / 2**30:.1f} GiB at most")


if __name__ == "__main__":
    main()
