"""How fast Langevin and diffusion purification are beside the plain loop of the published code, with the same weights.

    python examples/puregen_speed.py --out examples/results/puregen_speed.json
    python examples/puregen_speed.py --energy-width 128 --energy-steps 6 --out examples/results/puregen_speed_128.json

The plain loop is eager float32, one network call a step on all images at once, with torch's own random numbers. Ours
pads to `compute_batch`, draws counter-based noise and is reproducible bit for bit; `fast` is bfloat16, `compiled`
compiles the energy network too. All take turns in one process, and medians over the rounds are compared: the ratios
hold on a machine whose speed drifts, the absolute numbers are this machine's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from purifyloader import pretrained
from purifyloader.core import noise
from purifyloader.datasets.splits import load_sample
from purifyloader.diffusion import LinearSchedule
from purifyloader.diffusion.denoiser import NetworkDenoiser
from purifyloader.energy import EnergyConfig, EnergyNetwork
from purifyloader.files.atomic import write_text
from purifyloader.purifiers import Diffuse, Langevin, Purifier


def plain_langevin(energy: EnergyNetwork, x: Tensor, steps: int) -> Tensor:
    """On images in [-1, 1], eps = 0.0125, temperature 1e-4."""
    x = 2 * x - 1
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((energy((x + 1) / 2) / 1e-4).sum(), x)
        x = x.detach() - 0.0125**2 / 2 * gradient + 0.0125 * torch.randn_like(x)
    return (x + 1) / 2


@torch.no_grad()
def plain_diffusion(denoiser: NetworkDenoiser, x: Tensor, steps: int) -> Tensor:
    """DDPM on images in [-1, 1]: linear betas, T = 1000, fixed small variance, clipped."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas_bar = (1 - betas).cumprod(0)
    x = (2 * x - 1) * alphas_bar[steps - 1].sqrt().float() + (
        1 - alphas_bar[steps - 1]
    ).sqrt().float() * torch.randn_like(x)
    for t in reversed(range(steps)):
        bar = alphas_bar[t]
        below = alphas_bar[t - 1] if t else torch.ones((), dtype=torch.float64)
        # the network of this library is told the noise in units of [0, 1] images, before the scaling
        scaled = (x / bar.sqrt().float() + 1) / 2
        sigma = torch.full((len(x),), float(((1 - bar) / bar).sqrt() / 2), dtype=torch.float64)
        x0 = (2 * denoiser(scaled, sigma) - 1).clamp(-1, 1)
        mean = (below.sqrt() * betas[t] * x0 + (1 - betas[t]).sqrt() * (1 - below) * x) / (1 - bar)
        x = mean.float()
        if t:
            x = x + (betas[t] * (1 - below) / (1 - bar)).sqrt().float() * torch.randn_like(x)
    return (x + 1) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--energy", default="cifar10-energy")
    parser.add_argument("--energy-width", type=int, help="an untrained energy network of this width; 128 is published")
    parser.add_argument("--model", default="cifar10-puregen-ddpm")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--energy-steps", type=int, default=30)
    parser.add_argument("--diffusion-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    images, _ = load_sample(Path(__file__).parent / "data", "train")
    x = torch.from_numpy(images[: options.images]).permute(0, 3, 1, 2).float().div(255).to(options.device)
    keys = noise.image_keys(0, 0, range(len(x))).to(options.device)
    if options.energy_width is None:
        energy = pretrained.load(options.energy, kind="energy").to(options.device)
    else:
        torch.manual_seed(0)
        options.energy = f"untrained, width {options.energy_width}"
        energy = EnergyNetwork(EnergyConfig(options.energy_width)).to(options.device).eval().requires_grad_(False)
    denoiser = pretrained.load(options.model).to(options.device)
    steps, t, batch = options.energy_steps, options.diffusion_steps, options.images

    def of(purifier: Purifier) -> Callable[[], Tensor]:
        purifier = purifier.to(options.device)
        return lambda: purifier(x, keys)

    linear = LinearSchedule(1000)
    candidates: dict[str, dict[str, Callable[[], Tensor]]] = {
        "Langevin": {
            "plain loop": lambda: plain_langevin(energy, x, steps),
            "float32": of(Langevin(energy, steps, compute_batch=batch)),
            "fast": of(Langevin(energy, steps, dtype="bfloat16", compute_batch=batch)),
            "fast, compiled": of(Langevin(energy, steps, dtype="bfloat16", compute_batch=batch, compile=True)),
        },
        "diffusion": {
            "plain loop": lambda: plain_diffusion(denoiser, x, t),
            "float32": of(Diffuse(denoiser, t=t, schedule=linear, compute_batch=batch)),
            "fast": of(Diffuse(denoiser, t=t, schedule=linear, dtype="bfloat16", compute_batch=batch)),
        },
    }
    calls = {"Langevin": steps, "diffusion": t}
    rates: dict[str, dict[str, float]] = {}
    for what, functions in candidates.items():
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(options.rounds + 1):  # the first, with compilation, does not count
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                if x.is_cuda:
                    torch.cuda.synchronize()
                if turn:
                    taken[name].append(time.perf_counter() - start)
        rates[what] = {n: round(len(x) * calls[what] / statistics.median(s), 1) for n, s in taken.items()}
        for name, rate in rates[what].items():
            ratio = rate / rates[what]["plain loop"]
            print(f"{what:>10}, {name:<15}{rate:>10,.0f} image steps/s, {ratio:.2f} of the plain loop")
    machine = f"{options.device}, {platform.machine()}, {torch.get_num_threads()} threads"
    results = {
        "machine": f"{machine}, torch {torch.__version__}",
        "settings": {"images": len(x), "energy_steps": steps, "diffusion_steps": t, "rounds": options.rounds},
        "models": {"energy": options.energy, "denoiser": options.model},
        "image_steps_per_second": rates,
        "ratio": {
            what: {name: round(rate / its["plain loop"], 2) for name, rate in its.items()}
            for what, its in rates.items()
        },
    }
    if options.out:
        write_text(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
