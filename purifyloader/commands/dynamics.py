"""Measure how purification moves clean and poisoned images, level by level: `purifyloader dynamics`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from purifyloader.commands import options as shared
from purifyloader.errors import ConfigError

if TYPE_CHECKING:
    from purifyloader.diffusion.denoiser import Denoiser
    from purifyloader.dynamics.paths import LangevinPath, Path
    from purifyloader.evaluation.inputs import Models

_FILES = ("dynamics.json", "dynamics.png")
COUNT = 100
_STEPS = (10, 20, 30, 40, 50, 75, 100, 125, 150, 175, 200, 250, 300)
_TIMESTEPS = {
    "cosine": (10, 25, 50, 75, 100, 150, 200, 300, 400),
    "linear": (5, 10, 20, 30, 40, 50, 75, 100, 125, 150),
}
SCHEDULES = tuple(_TIMESTEPS)  # of `purifyloader.dynamics.paths`, which needs torch

DESCRIPTION = (
    "Measure how far purification moves clean and poisoned images, level by level, as in Figure 2 of the "
    "PureGen paper: along a Langevin walk (--energy), or by diffusion from one timestep or noise level after "
    "another (--model; with --energy too, the energies on the way). Prints a table."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    shared.add_data(parser, "clean images (cifar10 and cifar100: their test split)")
    add_measuring(parser, "--data")
    add = parser.add_argument
    words = (
        "Langevin steps, or timesteps of diffusion, to look at (default: up to 300 steps, or timesteps up to 150 "
        "of the linear schedule, as far as the denoiser was trained)"
    )
    add("--steps", type=int, nargs="+", metavar="N", help=words)
    add(
        "--sigma-px",
        type=shared.above_zero,
        nargs="+",
        metavar="PX",
        help="or noise levels of diffusion, on the 0-255 scale",
    )
    words = "what a timestep means: linear, T = 1000 (PureGen), or cosine, T = 4000 (ECLIPSE) (default: linear)"
    add("--schedule", choices=SCHEDULES, help=words)
    words = "at most N network calls for each level of diffusion (default: one a timestep; one with --sigma-px)"
    add("--calls", type=int, metavar="N", help=words)
    add("--sampler", choices=shared.SAMPLERS, help="of diffusion (default: ancestral)")
    shared.add_results(parser, *_FILES)


def add_measuring(parser: argparse.ArgumentParser, of: str) -> None:
    """Add the options that `dynamics` and `tune` share: images of the option `of`, attacks on them, and models."""
    shared.add_choice(parser, str(COUNT))
    shared.add_size(parser)
    shared.add_poisons(parser, of)
    shared.add_model(parser, "diffusion")
    shared.add_model(parser, "Langevin steps, or only energies where there is a --model", energy=True)
    shared.add_seed(parser, "the noise and the attacks")
    words = "images of a network call; decides the last bit"
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help=words)
    shared.add_device(parser)


def run(options: argparse.Namespace) -> int:
    from purifyloader.commands.reporting import calls_bar, clean_images, report
    from purifyloader.core.devices import device_of_process
    from purifyloader.dynamics.measuring import dynamics
    from purifyloader.dynamics.pictures import picture
    from purifyloader.dynamics.report import table
    from purifyloader.evaluation.inputs import load_models
    from purifyloader.results.folder import check_out

    device = device_of_process(options.device, 0)
    check_out(options.out, _FILES, options.overwrite, "dynamics")
    models = load_models(options.energy, options.model, device)
    path = _path(models, options)  # before images are read
    images = clean_images(models, options, COUNT)
    with calls_bar(shared.shows_progress(options)) as progress:
        results = dynamics(
            path, images.clean, images.poisoned, energy=models.energy, seed=options.seed, progress=progress
        )
    results = {**results, "device": device.type, "data": images.data}
    report(options, results, table(results), _FILES, lambda file: picture(results, file))
    return 0


def langevin_path(
    models: Models, options: argparse.Namespace, of_diffusion: Sequence[str], steps: Sequence[int]
) -> LangevinPath:
    """Make the walk of --steps, by default `steps`, and refuse the options `of_diffusion`."""
    from purifyloader.dynamics.paths import LangevinPath

    if extra := list(shared.given(options, of_diffusion)):
        raise ConfigError(
            f"Langevin steps take --steps. Got --{extra[0].replace('_', '-')}, which is about diffusion: leave it "
            "out, or give a denoiser as --model."
        )
    assert models.energy is not None
    return LangevinPath(models.energy, sorted(set(options.steps or steps)), compute_batch=options.batch_size)


def _path(models: Models, options: argparse.Namespace) -> Path:
    from purifyloader.dynamics.paths import SCHEDULES, DiffusionPath

    if (denoiser := models.denoiser) is None:
        return langevin_path(models, options, ("sigma_px", "schedule", "calls", "sampler"), _STEPS)
    more = {"calls": options.calls, "sampler": options.sampler or "ancestral", "compute_batch": options.batch_size}
    if options.sigma_px is not None:
        if options.steps is not None or options.schedule is not None:
            raise ConfigError("Give the levels as --sigma-px, or as --steps of a --schedule. Got both.")
        return DiffusionPath(denoiser, sigmas=[px / 255 for px in sorted(set(options.sigma_px))], **more)
    name = options.schedule or "linear"
    steps = sorted(set(options.steps or _trained_for(denoiser, name)))
    return DiffusionPath(denoiser, t=steps, schedule=SCHEDULES[name], **more)


def _trained_for(denoiser: Denoiser, name: str) -> list[int]:
    """Choose timesteps worth looking at, as far as the denoiser takes them."""
    from purifyloader.dynamics.paths import SCHEDULES

    low, high = denoiser.sigma_range
    schedule = SCHEDULES[name]
    steps = [t for t in _TIMESTEPS[name] if float(schedule.sigma(t)) <= high]
    if not steps or float(schedule.sigma(1)) < low * (1 - 1e-6):
        raise ConfigError(
            f"The denoiser takes noise from {255 * low:.3g} to {255 * high:.3g} px, and the {name} schedule ends "
            f"at {255 * float(schedule.sigma(1)):.3g} px. Got no --sigma-px: give levels in the range."
        )
    return steps
