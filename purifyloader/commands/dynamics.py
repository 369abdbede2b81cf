"""`purifyloader dynamics`: how purification moves clean and poisoned images, level by level."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from purifyloader.commands.evaluate import to_json
from purifyloader.commands.inputs import Models, add_poisons, load_models, read_images
from purifyloader.commands.options import add_device
from purifyloader.core.devices import device_of_process
from purifyloader.diffusion.denoiser import Denoiser
from purifyloader.diffusion.samplers import SAMPLERS
from purifyloader.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule
from purifyloader.dynamics.measure import dynamics
from purifyloader.dynamics.paths import DiffusionPath, LangevinPath
from purifyloader.dynamics.paths import Path as Purification
from purifyloader.dynamics.pictures import picture
from purifyloader.errors import ConfigError
from purifyloader.results.folder import check_out, write_results
from purifyloader.results.table import plain

__all__ = [
    "DESCRIPTION",
    "add_options",
    "JSON_FILE",
    "PICTURE_FILE",
    "SCHEDULES",
    "add_images",
    "run",
    "make_path",
    "progress_bar",
    "table",
]

JSON_FILE = "dynamics.json"
PICTURE_FILE = "dynamics.png"
_COUNT = 100

SCHEDULES: dict[str, Schedule] = {"linear": LinearSchedule(1000), "cosine": CosineSchedule(4000)}
"""PureGen's and ECLIPSE's."""

_STEPS = (10, 20, 30, 40, 50, 75, 100, 125, 150, 175, 200, 250, 300)
_TIMESTEPS = {
    "linear": (5, 10, 20, 30, 40, 50, 75, 100, 125, 150),
    "cosine": (10, 25, 50, 75, 100, 150, 200, 300, 400),
}


DESCRIPTION = (
    "How far purification moves clean and poisoned images, level by level, as in Figure 2 of the "
    "PureGen paper: along a Langevin walk (--energy), or by diffusion from one timestep or noise level after "
    "another (--model; with --energy too, the energies on the way). Prints a table."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--data",
        required=True,
        help="clean images: cifar10, cifar100 (their test split), imagefolder, webdataset, a folder of images, .tar "
        "files, or package.module:function",
    )
    add_images(parser, "--data", _COUNT)
    add = parser.add_argument
    add("--energy", metavar="MODEL", help="an energy model: Langevin steps, or only energies where there is a --model")
    add("--model", metavar="DENOISER", help="a denoiser: diffusion")
    add(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="Langevin steps, or timesteps of diffusion, to look at (default: up to 300 steps, or timesteps up to 150 "
        "of the linear schedule, as far as the denoiser was trained)",
    )
    add("--sigma-px", type=float, nargs="+", metavar="PX", help="or noise levels of diffusion, on the 0-255 scale")
    add(
        "--schedule",
        choices=sorted(SCHEDULES),
        help="what a timestep means: linear, T = 1000 (PureGen), or cosine, T = 4000 (ECLIPSE) (default: linear)",
    )
    add(
        "--calls",
        type=int,
        metavar="N",
        help="at most N network calls for each level of diffusion (default: one a timestep; one with --sigma-px)",
    )
    add("--sampler", choices=sorted(SAMPLERS), help="of diffusion (default: ancestral)")
    add("--seed", type=int, default=0, help="of the noise and the attacks (default: 0)")
    add("--batch-size", type=int, default=32, metavar="N", help="images of a network call; decides the last bit")
    add_device(parser)
    add("--out", type=Path, metavar="FOLDER", help=f"write {JSON_FILE} and {PICTURE_FILE} there")
    add("--overwrite", action="store_true", help="replace these files")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--quiet", action="store_true", help="no progress bar")


def add_images(parser: argparse.ArgumentParser, of: str, default: int) -> None:
    """The options that choose the images of `of`, and the attacks on them."""
    parser.add_argument("--root", default="data", help="where a dataset given by name is (default: data)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--count", type=int, metavar="N", help=f"use N images, chosen by --choose-seed (default: {default})"
    )
    chosen.add_argument("--indices", type=Path, metavar="FILE", help="use the images listed in this JSON file")
    parser.add_argument("--choose-seed", type=int, default=0, help="decides which images --count takes (default: 0)")
    parser.add_argument(
        "--size", type=int, metavar="PX", help="resize the shorter side of each image to this, and crop the centre"
    )
    add_poisons(parser, of)


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`. Returns 0."""
    device = device_of_process(options.device, 0)
    check_out(options.out, (JSON_FILE, PICTURE_FILE), options.overwrite, "dynamics")
    models = load_models(options.energy, options.model, device)
    path = make_path(models, options)  # before images are read
    bars = not options.quiet and sys.stderr.isatty()
    images = read_images(models, options.data, options, root=options.root, default=_COUNT, progress=bars)
    with progress_bar(bars) as progress:
        results = dynamics(
            path, images.clean, images.poisoned, energy=models.energy, seed=options.seed, progress=progress
        )
    results = {**results, "device": device.type, "data": images.data}
    text = to_json(results)
    written: list[str] = []
    if options.out is not None:  # before anything is printed, to a pipe that may be closed
        write_results(options.out, {JSON_FILE: text}, PICTURE_FILE, lambda file: picture(results, file), written.append)
    print(text if options.json else "\n".join([*table(results), ""]), end="")
    if written:
        print("\n".join(written), file=sys.stderr if options.json else sys.stdout)
    return 0


def make_path(models: Models, options: argparse.Namespace) -> Purification:
    """The purification that the options ask for.

    Raises:
        ConfigError: options that contradict each other, or levels that are none.
        InputError: a level outside the denoiser's range.
    """
    if models.denoiser is None:
        of_diffusion = ("sigma_px", "schedule", "calls", "sampler")
        if given := [flag for flag in of_diffusion if getattr(options, flag) is not None]:
            raise ConfigError(
                f"Langevin steps take --steps. Got --{given[0].replace('_', '-')}, which is about diffusion: leave it "
                "out, or give a denoiser as --model."
            )
        assert models.energy is not None
        return LangevinPath(models.energy, sorted(set(options.steps or _STEPS)), compute_batch=options.batch_size)
    more: dict[str, Any] = {
        "calls": options.calls,
        "sampler": options.sampler or "ancestral",
        "compute_batch": options.batch_size,
    }
    if options.sigma_px is not None:
        if options.steps is not None or options.schedule is not None:
            raise ConfigError("Give the levels as --sigma-px, or as --steps of a --schedule. Got both.")
        sigmas = [px / 255 for px in sorted(set(options.sigma_px))]
        return DiffusionPath(models.denoiser, sigmas=sigmas, **more)
    name = options.schedule or "linear"
    steps = sorted(set(options.steps or _trained_for(models.denoiser, name)))
    return DiffusionPath(models.denoiser, t=steps, schedule=SCHEDULES[name], **more)


def _trained_for(denoiser: Denoiser, schedule: str) -> list[int]:
    """Timesteps worth looking at, as far as the denoiser takes them."""
    low, high = denoiser.sigma_range
    its = SCHEDULES[schedule]
    found = [t for t in _TIMESTEPS[schedule] if float(its.sigma(t)) <= high]
    if not found or float(its.sigma(1)) < low * (1 - 1e-6):
        raise ConfigError(
            f"The denoiser takes noise from {255 * low:.3g} to {255 * high:.3g} px, and the {schedule} schedule ends "
            f"at {255 * float(its.sigma(1)):.3g} px. Got no --sigma-px: give levels in the range."
        )
    return found


@contextmanager
def progress_bar(shown: bool) -> Iterator[Any]:
    """A function that takes the network calls made, and all."""
    with tqdm(unit="calls", disable=not shown, leave=False) as bar:

        def progress(calls: int, total: int) -> None:
            bar.total = total
            bar.update(calls)

        yield progress


# -- the table ---------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """What the command prints."""
    purification, images, levels = results["purification"], results["images"], results["levels"]
    size = " × ".join(str(side) for side in reversed(images["shape"][1:]))
    yield (
        f"{purification['model']['name'] or 'A model'}, weights {purification['model']['weights_sha256'][:12]}: "
        f"{images['count']:,} images of {results['data']['description']}, {size} px"
    )
    unit = results["energy"]
    yield "Distances are means over images: l2 of images in [0, 1], and root mean square in px of 255."
    if unit is not None:
        yield f"Energies are medians of U = E / {unit['temperature']:g}: no unit and no zero, only differences count."
    by_t = purification["unit"] == "timestep t"
    first = "steps" if purification["kind"] == "langevin" else "t" if by_t else "noise"
    at = [f"{level['level']:g}" if first != "noise" else f"{level.get('sigma_px', 0):.3g} px" for level in levels]
    energies = [] if unit is None else ["energy"]
    yield ""
    yield "Clean images: how far they are moved, and the seconds that an image takes on this machine"
    rows = []
    for where, level in zip(at, levels, strict=True):
        cells = [where, *([f"{level.get('sigma_px', 0):.3g} px"] if by_t else [])]
        cells += [f"{level['calls']}", f"{level['seconds_per_image']:.3g}"]
        rows.append([*cells, *_both(level["clean_to_purified_clean"]), *_median(level["energy"])])
    yield from plain([first, *(["noise"] if by_t else []), "calls", "seconds", "l2 moved", "px moved", *energies], rows)
    for name, poison in results["poisons"].items():
        yield ""
        yield (
            f"{name}, {poison['size']['rms_px']:.3g} px RMS, at most {poison['largest_px']:.3g} px, in "
            f"{poison['images']:,} images:"
        )
        yield "distance of the purified image from the clean and from the poisoned one; share of images closer to clean"
        rows = []
        for where, level in zip(at, levels, strict=True):
            measured = level["poisoned"][name]
            cells = [*_both(measured["clean_to_purified_poisoned"]), *_both(measured["poisoned_to_purified_poisoned"])]
            rows.append([where, *cells, f"{100 * measured['closer_to_clean']:.0f} %", *_median(measured["energy"])])
        yield from plain([first, "l2 to clean", "px to clean", "l2 to pois.", "px to pois.", "closer", *energies], rows)
        yield _crossing(poison["crossing"], first)


def _crossing(level: float | None, first: str) -> str:
    if level is None:
        return "On average it stays closer to the poisoned than to the clean image up to the last level."
    where = {"steps": f"{level:.0f} steps", "t": f"t = {level:.0f}", "noise": f"{255 * level:.1f} px"}[first]
    return f"On average it has come closer to the clean than to the poisoned image at {where}."


def _both(distance: Mapping[str, Any]) -> list[str]:
    return [f"{distance['l2']:.3f}", f"{distance['rms_px']:.2f}"]


def _median(energy: Mapping[str, Any] | None) -> list[str]:
    return [] if energy is None else [f"{energy['quantiles']['0.5']:,.5g}"]
