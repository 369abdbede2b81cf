"""Propose how strongly to purify a dataset, and say why: `purifyloader tune`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purifyloader.commands.dynamics import COUNT, add_measuring, langevin_path
from purifyloader.commands.options import above_zero, add_clean, add_data, add_results, add_split, shows_progress
from purifyloader.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from purifyloader.dynamics.paths import Path as Purification
    from purifyloader.evaluation.inputs import Models

_FILES = ("tune.json", "tune.png")

RECIPES = ("eclipse", "puregen-ddpm")  # of a denoiser: noise of a level and one call, or PureGen's timesteps
_STEPS = tuple(range(10, 301, 10))  # more levels of one walk cost nothing
_TIMESTEPS = (10, 20, 30, 40, 50, 60, 75, 90, 100, 125, 150, 175, 200)
_SIGMA_PX = (2, 3, 4, 5, 6.37, 8, 10, 12.75, 16, 20, 25, 32, 40, 50, 63.75, 80, 100)

DESCRIPTION = (
    "Propose how strongly to purify: the smallest level at which poisoned images, purified, have come "
    "closer to the clean image than to the poisoned one. Attacks are made on clean images here, for nobody knows "
    "the attack on a dataset; with --data, that is compared with the clean images before and after."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_clean(parser, "clean images", required=True)
    add_measuring(parser, "--clean")
    add_data(parser, "the dataset to be purified", required=False)
    add_split(parser)
    add = parser.add_argument
    words = "of a denoiser: noise and one call, or PureGen's timesteps (default: eclipse)"
    add("--recipe", choices=RECIPES, help=words)
    add("--steps", type=int, nargs="+", metavar="N", help="Langevin steps or, with puregen-ddpm, timesteps to try")
    add(
        "--sigma-px",
        type=above_zero,
        nargs="+",
        metavar="PX",
        help="noise levels to try with eclipse, on the 0-255 scale",
    )
    add("--calls", type=int, metavar="N", help="at most N network calls of diffusion (default: one; puregen-ddpm: all)")
    words = "of the images of every attack that must have come closer to clean (default: 0.5)"
    add("--share", type=float, default=0.5, help=words)
    add_results(parser, *_FILES)


def run(options: argparse.Namespace) -> int:
    """Propose a level, and report why. Returns 0, also without a proposal."""
    from purifyloader.commands.reporting import calls_bar, clean_images, report
    from purifyloader.core.devices import device_of_process
    from purifyloader.dynamics.pictures import picture
    from purifyloader.dynamics.report import proposal_table, reasons
    from purifyloader.dynamics.tuning import choose_level, tune
    from purifyloader.evaluation.inputs import load_models
    from purifyloader.results.folder import check_out

    device = device_of_process(options.device, 0)
    check_out(options.out, _FILES, options.overwrite, "a proposal")
    choose_level({"": [0.0]}, options.share)
    models = load_models(options.energy, options.model, device)
    path = _path(models, options)  # before images are read
    images = clean_images(models, options, COUNT, "clean")
    data, described = _data(options, models, len(images.clean))
    with calls_bar(shows_progress(options)) as progress:
        results = tune(
            path,
            images.clean,
            images.poisoned,
            share=options.share,
            data_NCHW=data,
            energy=models.energy,
            seed=options.seed,
            progress=progress,
        )
    results["curves"] = {**results["curves"], "device": device.type, "data": images.data}
    results = {**results, "data": described, "reasons": list(reasons(results))}
    # a path stays out of the results, which may travel; the printed proposal names it
    full = {"energy": options.energy, "model": options.model}
    short = {kind: Path(spec).name if spec and Path(spec).is_dir() else spec for kind, spec in full.items()}
    printed = {}
    for key, level in (("pasted", "proposal"), ("pasted_with_compensation", "with_compensation")):
        results[key] = None
        if results[level] is not None:
            results[key] = pasted(results[level], options, short)[0]
            printed[level] = pasted(results[level], options, full)
    report(options, results, proposal_table(results, printed), _FILES, lambda file: picture(results, file))
    return 0


def _path(models: Models, options: argparse.Namespace) -> Purification:
    from purifyloader.dynamics.paths import SCHEDULES, DiffusionPath

    if models.denoiser is None:
        return langevin_path(models, options, ("sigma_px", "calls", "recipe"), _STEPS)
    low, high = models.denoiser.sigma_range
    more = {"calls": options.calls, "compute_batch": options.batch_size}
    if options.recipe == "puregen-ddpm":
        if options.sigma_px is not None:
            raise ConfigError("puregen-ddpm takes --steps, timesteps of its schedule. Got --sigma-px: leave it out.")
        schedule = SCHEDULES["linear"]
        steps = sorted(set(options.steps or [t for t in _TIMESTEPS if float(schedule.sigma(t)) <= high]))
        return DiffusionPath(models.denoiser, t=steps, schedule=schedule, **more)
    if options.steps is not None:
        raise ConfigError(
            "eclipse takes --sigma-px, noise levels. Got --steps: leave it out, or give --recipe puregen-ddpm."
        )
    px = options.sigma_px or [px for px in _SIGMA_PX if 255 * low <= px <= 255 * high]
    # four digits, for the level that is pasted is the one that was measured
    sigmas = sorted({float(f"{level / 255:.4g}") for level in px})
    return DiffusionPath(models.denoiser, sigmas=sigmas, **more)


def _data(options: argparse.Namespace, models: Models, count: int) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Read as many images of the dataset as there are clean ones, at random, and describe them."""
    from purifyloader.datasets.named import describe, open_dataset
    from purifyloader.datasets.select import choose, load
    from purifyloader.evaluation.inputs import tell
    from purifyloader.pretrained.learned import learned_images

    if options.data is None:
        return None, None
    dataset = open_dataset(options.data, options.root, train=options.split == "train")
    length = len(dataset)  # type: ignore[arg-type]
    if not length:
        raise InputError("Expected images in --data. Got an empty dataset.")
    indices = choose(length, min(count, length), options.choose_seed)
    progress = shows_progress(options)
    images = load(dataset, indices, models.channels, options.size, progress, "--data").images
    learned = learned_images(models.specs, dataset, options.data, models.channels, progress)
    if trained_on := sum(learned.has(dataset[index], options.size) for index in indices):
        tell(
            f"note: the model was trained on {trained_on:,} of the {len(indices):,} images chosen from --data, which "
            "it purifies better than others."
        )
    elif not learned.is_known:
        tell(f"note: {' and '.join(learned.silent)} does not say which images it was trained on: --data may have some.")
    seen = {"trained_on": trained_on, "trained_on_known": learned.is_known}
    return images, {"description": describe(options.data, options.split), "length": length, "indices": indices, **seen}


def pasted(level: Mapping[str, Any], options: argparse.Namespace, names: Mapping[str, str | None]) -> tuple[str, str]:
    """Write the proposal as a line of Python, and as a command that precomputes the dataset with it.

    Args:
        names: the model under "model" or "energy", as it is to be written.
    """
    from purifyloader.datasets.named import TORCHVISION

    values: dict[str, Any]
    calls = level["calls"]
    if options.model is None:
        recipe, values = "puregen-ebm", {"energy": names["energy"], "steps": int(level["level"])}
    elif options.recipe == "puregen-ddpm":
        recipe, values = "puregen-ddpm", {"model": names["model"], "steps": int(level["level"])}
        values |= {"calls": calls} if calls < values["steps"] else {}
    else:
        recipe, values = "eclipse", {"model": names["model"], "sigma": float(f"{level['level']:.4g}")}
        values |= {"steps": calls} if calls > 1 else {}
    values |= {} if options.size is None else {"resize": options.size, "crop": options.size}
    arguments = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
    words = ["purifyloader", "precompute", "--dataset", options.data or "YOUR_DATA"]
    if options.data in (*TORCHVISION, "imagefolder", "webdataset"):
        words += ["--root", options.root]
    if options.data in TORCHVISION and options.split != "train":
        words += ["--split", options.split]
    words += ["--recipe", recipe, *(str(word) for name, value in values.items() for word in (f"--{name}", value))]
    return f"recipes.{recipe.replace('-', '_')}({arguments})", shlex.join([*words, "--out", "cache/purified"])
