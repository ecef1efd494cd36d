"""Dumps the goldens of the samplers from diffusers.

    python model/goldens/samplers.py model/tests/goldens

Needs torch 2.11 and diffusers 0.42. The tests read only what is checked in; run this again when a golden must change.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.utils import logging
from safetensors.torch import save_file

SAMPLERS = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
}

BASE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, num_train_timesteps=1000,
    set_alpha_to_one=False, steps_offset=1,
)
CONFIGS = {
    f"{prediction}-{spacing}": dict(BASE, prediction_type=prediction, timestep_spacing=spacing)
    for prediction in ("epsilon", "v_prediction", "sample")
    for spacing in ("leading", "trailing", "linspace")
} | {
    "own-spacing": BASE,
    "final-sigma": dict(BASE, timestep_spacing="leading", steps_offset=0, final_sigmas_type="sigma_min"),
    "zero-snr": dict(BASE, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
    "linear": dict(beta_schedule="linear", num_train_timesteps=500, clip_sample=False, timestep_spacing="trailing"),
    "cosine": dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, timestep_spacing="linspace"),
}
# The last two: where DPM-Solver++ stops being careful about its last step.
COUNTS = [1, 2, 7, 30, 50, 14, 15]
STEPS = 20
SHAPE = (1, 2, 2, 2)


def model_output(x, t):
    """What stands in for a U-Net; the test computes the same."""
    return torch.tanh(0.7 * x + t / 1000)


def sequence(scheduler, noise, steps):
    """The latents before the first step and after each; `noise` is what each step draws, seeded."""
    scheduler.set_timesteps(steps)
    if not isinstance(scheduler, DDIMScheduler):
        scheduler.set_begin_index(0)  # else it is told by the first timestep, which can be there twice
    generator = torch.Generator().manual_seed(7)
    x = noise * scheduler.init_noise_sigma
    latents = [x]
    for t in scheduler.timesteps:
        output = model_output(scheduler.scale_model_input(x, t), t)
        random = {"generator": generator} if isinstance(scheduler, EulerAncestralDiscreteScheduler) else {}
        x = scheduler.step(output, t, x, **random).prev_sample
        latents.append(x)
    return torch.stack(latents)


def main():
    out = Path(sys.argv[1]) / "samplers"
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(7)
    golden = {"noise": noise, "steps": torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(STEPS)])}
    for config_name, config in CONFIGS.items():
        for name, (kind, settings) in SAMPLERS.items():
            if kind is EulerAncestralDiscreteScheduler and config.get("prediction_type") == "sample":
                continue  # not there in the reference
            scheduler = kind.from_config(config | settings)
            golden[f"{config_name}.{name}"] = sequence(scheduler, noise, STEPS)
            if name != "euler-a" and (config_name.startswith("epsilon") or config_name in ("linear", "cosine")):
                timesteps = []
                for count in COUNTS:
                    scheduler.set_timesteps(count)
                    timesteps.append(scheduler.timesteps.float())
                golden[f"{config_name}.{name}.timesteps"] = torch.cat(timesteps)
        if config_name == "final-sigma":
            for count in (14, 15):
                golden[f"{config_name}.dpm++2m.{count}"] = sequence(DPMSolverMultistepScheduler.from_config(config), noise, count)
    for name, tensor in golden.items():
        assert tensor.isfinite().all(), name
    (out / "configs.json").write_text(json.dumps(CONFIGS, indent=1) + "\n")
    path = out / "golden.safetensors"
    save_file({k: v.contiguous().clone() for k, v in golden.items()}, path)
    print(f"{path}: {path.stat().st_size} bytes, {len(golden)} tensors")


if __name__ == "__main__":
    main()
