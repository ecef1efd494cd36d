"""ella beside diffusers and transformers at full size, with random weights stored in float16: errors, seconds, peak memory.

    make parity-full

Two models: the U-Net of SD 1.5 (860 M parameters) and the encoder of Flan-T5-XL (1.2 B). Each is written by its reference library,
run there in float32, and run by `ella forward` in several formats. Exits with 1 if any figure is beyond its bound:

    error    max|a - b| / max|b| against the reference in float32: 1e-5, 1e-4 for gradients; in float16 and bfloat16 2e-2, or where
             the reference itself in that format is further off, a quarter more than it
    memory   the most that `ella forward` ever held on a tiny input, that is for loading, over what its parameters take in the format
             that it computes in: 1.3. Mapped pages of files count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOUNDS = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-2}
GRADIENT_BOUND = 1e-4
MEMORY_BOUND = 1.3
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def unet(folder: Path, seed: int) -> None:
    """Writes the U-Net and what it makes of one input."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    # The defaults of the class are SD 1.5's but for the width of the text.
    net = UNet2DConditionModel(cross_attention_dim=768, sample_size=64).half()
    net.save_pretrained(folder / "model")
    net = net.float().eval().requires_grad_(False)
    sample, states = torch.randn(2, 4, 64, 64), torch.randn(2, 64, 768).requires_grad_()
    timesteps = torch.tensor([0, 999])
    begin = time.monotonic()
    out = net(sample, timesteps, states).sample
    seconds = {"values": time.monotonic() - begin}
    grad_output = torch.randn(out.shape)
    out.backward(grad_output)
    seconds["gradients"] = time.monotonic() - begin
    inputs = {"sample": sample, "timesteps": timesteps, "hidden_states": states.detach()}
    save_file(inputs, folder / "inputs.safetensors")
    tiny = {"sample": sample[:1, :, :8, :8].contiguous(), "timesteps": timesteps[:1], "hidden_states": states.detach()[:1, :1].contiguous()}
    save_file(tiny, folder / "tiny.safetensors")
    save_file(inputs | {"grad_output": grad_output}, folder / "grad-inputs.safetensors")
    save_file({"sample": out.detach(), "grad.hidden_states": states.grad}, folder / "expected.safetensors")
    again = lambda dtype: net.to(dtype)(sample.to(dtype), timesteps, states.detach().to(dtype)).sample
    report(folder, net, seconds, own_errors("SD 1.5 U-Net", again, out))


def text(folder: Path, seed: int) -> None:
    """Writes the encoder and what it says of two rows of ids."""
    import torch
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )
    net = T5EncoderModel(config).half()
    net.save_pretrained(folder / "model")
    net = net.float().eval().requires_grad_(False)
    ids = torch.randint(3, 32000, (2, 128))
    mask = (torch.arange(128) < torch.tensor([[128], [61]])).long()
    begin = time.monotonic()
    out = net(input_ids=ids, attention_mask=mask).last_hidden_state
    seconds = {"values": time.monotonic() - begin}
    save_file({"input_ids": ids, "attention_mask": mask}, folder / "inputs.safetensors")
    save_file({"input_ids": ids[:1, :4].contiguous(), "attention_mask": mask[:1, :4].contiguous()}, folder / "tiny.safetensors")
    save_file({"last_hidden_state": out}, folder / "expected.safetensors")
    again = lambda dtype: net.to(dtype)(input_ids=ids, attention_mask=mask).last_hidden_state
    report(folder, net, seconds, own_errors("Flan-T5-XL encoder", again, out))


def distance(found, expected) -> float:
    """max|a - b| / max|b|."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def own_errors(model: str, again, expected) -> dict[str, float]:
    """How far the reference itself is from float32 in the lower formats that `model` is run in."""
    import torch

    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
    with torch.no_grad():
        return {dtype: distance(again(kinds[dtype]), expected) for dtype in MODELS[model][2] if dtype in kinds}


def report(folder: Path, net, seconds: dict, own: dict) -> None:
    """Leaves a note for the process that measures."""
    # What is shared counts once.
    parameters = sum(p.numel() for p in {p.data_ptr(): p for p in net.parameters()}.values())
    (folder / "reference.json").write_text(json.dumps({"parameters": parameters, "seconds": seconds, "own_errors": own}))


MODELS = {
    # The network's name for `ella forward`, who writes it, the formats, and whether its gradient is compared.
    "SD 1.5 U-Net": ("unet", unet, ["fp32", "bf16"], True),
    "Flan-T5-XL encoder": ("text", text, ["fp32", "fp16", "bf16"], False),
}


def run(command: list[str]) -> tuple[float, int]:
    """Runs a command; gives the seconds it took and the most bytes it ever held."""
    begin = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {child.returncode}")
    return time.monotonic() - begin, usage.ru_maxrss * 1024


def worst(found: Path, expected: Path) -> dict[str, float]:
    """max|a - b| / max|b| of each tensor."""
    from safetensors.torch import load_file

    found, expected = load_file(found), load_file(expected)
    return {name: distance(tensor, expected[name]) for name, tensor in found.items()}


def measure(folder: Path, ella: str, net: str, dtype: str, grad: bool) -> dict:
    """One run of `ella forward`, compared with what the reference left in `folder`."""
    outputs = folder / "outputs.safetensors"
    command = [ella, "forward", net, "--model", folder / "model", "--outputs", outputs, "--dtype", dtype, "--inputs"]
    command = [str(word) for word in command]
    _, peak = run([*command, str(folder / "tiny.safetensors")])
    inputs = [str(folder / "grad-inputs.safetensors"), "--grad"] if grad else [str(folder / "inputs.safetensors")]
    seconds, peak_whole = run(command + inputs)
    errors = worst(outputs, folder / "expected.safetensors")
    reference = json.loads((folder / "reference.json").read_text())
    held = peak / (reference["parameters"] * BYTES[dtype])
    row = {
        "network": net, "dtype": dtype, "gradient": grad, "parameters": reference["parameters"], "errors": errors,
        "seconds": seconds, "reference_seconds": reference["seconds"]["gradients" if grad else "values"],
        "loading_bytes": peak, "loading_over_parameters": held, "peak_bytes": peak_whole, "reference_error": reference["own_errors"].get(dtype, 0.0),
    }
    bound = max(BOUNDS[dtype], 1.25 * row["reference_error"])
    near = all(error <= (GRADIENT_BOUND if name.startswith("grad.") else bound) for name, error in errors.items())
    row["within_bounds"] = near and held <= MEMORY_BOUND
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ella", required=True, help="the ella binary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    parser.add_argument("--write", nargs=2, metavar=("MODEL", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        MODELS[args.write[0]][1](Path(args.write[1]), args.seed)
        return 0
    rows = []
    for name, (net, _, dtypes, differentiable) in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="ella-parity-") as folder:
            # In a process of its own, whose memory is free again afterwards.
            run([sys.executable, __file__, "--ella", args.ella, "--seed", str(args.seed), "--write", name, folder])
            for dtype, grad in [(dtype, False) for dtype in dtypes] + [("fp32", True)] * differentiable:
                row = {"model": name} | measure(Path(folder), args.ella, net, dtype, grad)
                rows.append(row)
                if not args.json:
                    show(row)
    if args.json:
        print(json.dumps({"runs": rows}))
    return 0 if all(row["within_bounds"] for row in rows) else 1


def show(row: dict) -> None:
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    if row["dtype"] != "fp32":
        errors += f" (reference in {row['dtype']}: {row['reference_error']:.1e})"
    print(
        f"{row['model']}, {row['parameters'] / 1e6:.1f} M, {row['dtype']}{' with gradient' * row['gradient']}: {errors}; "
        f"{row['seconds']:.1f} s with loading (reference, loaded, float32: {row['reference_seconds']:.1f} s); "
        f"{row['loading_bytes'] / 2**30:.2f} GiB to load = {row['loading_over_parameters']:.2f} x the parameters, "
        f"{row['peak_bytes'] / 2**30:.2f} GiB in all; "
        f"{'within bounds' if row['within_bounds'] else 'BEYOND ITS BOUNDS'}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
