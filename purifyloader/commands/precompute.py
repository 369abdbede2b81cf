"""Fill a purified cache: `accelerate launch -m purifyloader.precompute`, or `purifyloader precompute`.

The work itself is `purifyloader.purified.filling.precompute`, which is `purifyloader.precompute` in Python.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from purifyloader import recipes
from purifyloader.cache.reader import CacheReader
from purifyloader.core.devices import device_of_process
from purifyloader.datasets.named import open_dataset
from purifyloader.errors import ConfigError, InputError
from purifyloader.purified.filling import CHECKED, place, precompute
from purifyloader.purifiers import Purifier

__all__ = ["DESCRIPTION", "add_options", "purifier_of", "run"]

log = logging.getLogger("purifyloader")

# Options of the recipes, which recipe takes which, and which models it uses.
_RESIZING = ("resize", "crop", "tile", "overlap")
_BOTH = ("ebm_steps", "ddpm_steps", "calls", "step_size", "temperature", "compile", "compute_batch", *_RESIZING)
_OPTIONS = {
    "eclipse": ("t", "sigma", "steps", "sampler", "compensate_once", "compute_batch", *_RESIZING),
    "denoise-once": ("sigma", "compute_batch", *_RESIZING),
    "puregen-ebm": ("steps", "step_size", "temperature", "compile", "compute_batch", *_RESIZING),
    "puregen-ddpm": ("steps", "calls", "compute_batch", *_RESIZING),
    "puregen-naive": _BOTH,
    "puregen-reps": ("repeats", *_BOTH),
    "puregen-filt": ("k", "repeats", *_BOTH),
    "jpeg": ("quality", *_RESIZING),
    "grayscale": _RESIZING,
    "bit-depth": ("bits", *_RESIZING),
    "coin": ("alpha", *_RESIZING),
}
_MODELS = {
    "eclipse": ("model",),
    "denoise-once": ("model",),
    "puregen-ebm": ("energy",),
    "puregen-ddpm": ("model",),
    "puregen-naive": ("energy", "model"),
    "puregen-reps": ("energy", "model"),
    "puregen-filt": ("energy", "model"),
}
_NAMED = ("eclipse", "denoise-once")  # those that have no model of their own


DESCRIPTION = (
    "Purify a dataset once, into a cache. Run the same command again after a stop: it goes on. "
    "On several GPUs: accelerate launch -m purifyloader.precompute, or torchrun, with the same options."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    data = parser.add_argument_group("what to purify")
    data.add_argument(
        "--dataset",
        required=True,
        help="cifar10, cifar100, imagefolder, webdataset, a folder of images, or package.module:function that "
        "returns a map-style dataset",
    )
    data.add_argument("--root", default="data", help="folder, tar or pattern of tars of the dataset (default: data)")
    data.add_argument("--split", choices=("train", "test"), default="train", help="of a torchvision dataset")
    data.add_argument("--image-key", help="where the image is in a sample, if not first or under 'image'")

    recipe = parser.add_argument_group("how")
    recipe.add_argument("--recipe", required=True, help=f"{', '.join(_OPTIONS)}, or a file with the JSON of a purifier")
    recipe.add_argument("--model", help="a denoiser that ships with the library, or its folder")
    recipe.add_argument("--energy", help="an energy model that ships with the library, or its folder (puregen)")
    recipe.add_argument("--t", type=float, help="timestep to noise to (eclipse; default 100)")
    recipe.add_argument("--sigma", type=float, help="or the noise level, in image units: 25 px is 0.098")
    recipe.add_argument("--steps", type=int, help="network calls (eclipse), Langevin or diffusion steps (puregen)")
    recipe.add_argument("--ebm-steps", type=int, metavar="N", help="Langevin steps (puregen-naive, -reps, -filt)")
    recipe.add_argument("--ddpm-steps", type=int, metavar="N", help="diffusion steps (puregen-naive, -reps, -filt)")
    recipe.add_argument(
        "--calls", type=int, metavar="N", help="network calls for these diffusion steps, all by default"
    )
    recipe.add_argument("--repeats", type=int, metavar="N", help="of both in turn (puregen-reps, -filt)")
    recipe.add_argument("--k", type=float, help="share of the images to purify (puregen-filt; default 0.5)")
    recipe.add_argument("--step-size", type=float, help="noise of a Langevin step, in image units (puregen-ebm)")
    recipe.add_argument("--temperature", type=float, help="what the energy is divided by (puregen-ebm)")
    recipe.add_argument("--compile", action="store_true", default=None, help="compile the energy network (puregen)")
    recipe.add_argument("--sampler", choices=("ancestral", "ddim"), help="(eclipse)")
    recipe.add_argument("--compensate-once", action="store_true", default=None, help="a fixed draw too (eclipse)")
    recipe.add_argument("--quality", type=int, help="(jpeg; default 10)")
    recipe.add_argument("--bits", type=int, help="of each channel (bit-depth; default 2)")
    recipe.add_argument("--alpha", type=float, metavar="PX", help="furthest that a pixel moves (coin; default 2)")
    recipe.add_argument(
        "--resize", type=int, metavar="PX", help="bring the shorter side to this, for images of any size"
    )
    recipe.add_argument("--crop", type=int, metavar="PX", help="then crop the centre to this")
    recipe.add_argument("--tile", type=int, metavar="PX", help="purify in tiles of this size, at full resolution")
    recipe.add_argument("--overlap", type=int, metavar="PX", help="of neighbouring tiles (default: a quarter)")
    recipe.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the network (default: float32)")
    recipe.add_argument("--compute-batch", type=int, help="images of every network call; decides the last bit")
    recipe.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    recipe.add_argument("--draws", type=int, default=1, help="independent purifications of each image (default: 1)")

    cache = parser.add_argument_group("where to, and with what")
    cache.add_argument("--out", required=True, type=Path, help="folder of the cache")
    cache.add_argument("--batch-size", type=int, default=256, help="images read at a time; decides no pixel")
    cache.add_argument("--shard-size", type=int, help="images a file (default: 1024)")
    cache.add_argument("--encoding", choices=("auto", "raw", "png"), default="auto", help="(default: auto)")
    cache.add_argument("--device", help="such as cpu or cuda (default: a GPU for each process, else the CPU)")
    cache.add_argument("--workers", type=int, help="processes that read, for each that purifies")
    cache.add_argument("--threads", type=int, help="of the CPU, for each process (default: its share of the cores)")
    cache.add_argument(
        "--check-source",
        default=str(CHECKED),
        metavar="N|all",
        help=f"images of each finished shard that are compared with the source when going on (default: {CHECKED})",
    )
    cache.add_argument("--rank", type=int, help="which process this is, where no launcher says so")
    cache.add_argument("--world-size", type=int, help="of how many")
    cache.add_argument("--allow-mixed-devices", action="store_true", help="go on with another kind of device's shards")
    cache.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """Run the command; errors of the user's are raised as `PurifyError`."""
    logging.basicConfig(level=logging.WARNING if options.quiet else logging.INFO, format="%(message)s")
    rank, world_size = place(options.rank, options.world_size)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if options.rank is not None else world_size))
    device = device_of_process(options.device, rank)
    share = max(1, _cores() // max(1, local_size))
    # launchers set OMP_NUM_THREADS=1, which would leave the other cores idle
    torch.set_num_threads(share if options.threads is None else _positive("--threads", options.threads))
    purifier = purifier_of(options)
    dataset = open_dataset(options.dataset, options.root, train=options.split == "train")
    begun = time.monotonic()
    reader = precompute(
        dataset,
        purifier,
        options.out,
        seed=options.seed,
        draws=options.draws,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        encoding=options.encoding,
        device=device,
        workers=(0 if device.type == "cpu" else min(8, share - 1)) if options.workers is None else options.workers,
        check_source=_amount(options.check_source),
        image_key=_key(options.image_key),
        rank=rank,
        world_size=world_size,
        allow_mixed_devices=options.allow_mixed_devices,
        progress=not options.quiet,
    )
    if rank == 0:
        print(_summary(reader, time.monotonic() - begun))
    return 0


def _summary(reader: CacheReader, seconds: float) -> str:
    size = sum((reader.folder / entry.file).stat().st_size for entry in reader.index.shards)
    return (
        f"{reader.folder}: {len(reader):,} images, {len(reader.index.shards)} shards, {size / 1e6:,.1f} MB, "
        f"{seconds:.0f} s, fingerprint {reader.fingerprint[:12]}"
    )


def _cores() -> int:
    """What this process may use, not what the machine has; on Linux it can be told."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def purifier_of(options: argparse.Namespace) -> Purifier:
    given = {name: getattr(options, name) for names in _OPTIONS.values() for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if options.recipe not in _OPTIONS:
        return _from_file(options, given)
    takes = _OPTIONS[options.recipe]
    uses = _MODELS.get(options.recipe, ())
    if foreign := sorted(set(given) - set(takes)):
        known = _flags((*uses, *takes, *(("dtype",) if uses else ())))
        raise ConfigError(f"The recipe {options.recipe} takes {known}. Got {_flags(foreign)}: leave it out.")
    models = {name: getattr(options, name) for name in ("energy", "model") if getattr(options, name) is not None}
    if not uses and (models or options.dtype is not None):
        raise ConfigError(
            f"The recipe {options.recipe} has no network. Got --energy, --model or --dtype: leave them out."
        )
    if foreign := sorted(set(models) - set(uses)):
        raise ConfigError(f"The recipe {options.recipe} takes {_flags(uses)}. Got {_flags(foreign)}: leave it out.")
    if options.recipe in _NAMED and not models:
        raise ConfigError(f"The recipe {options.recipe} needs --model, a name of `purifyloader models` or a folder.")
    if options.recipe == "denoise-once" and "sigma" not in given:
        raise ConfigError("The recipe denoise-once needs --sigma, the noise level in image units. Got none.")
    if "t" in given and given["t"].is_integer():
        given["t"] = int(given["t"])
    if uses:
        given["fast"] = options.dtype == "bfloat16"
    purifier: Purifier = getattr(recipes, options.recipe.replace("-", "_"))(**models, **given)
    return purifier


def _from_file(options: argparse.Namespace, given: dict[str, Any]) -> Purifier:
    path = Path(options.recipe)
    if not path.is_file():
        raise ConfigError(
            f"--recipe must be one of {', '.join(_OPTIONS)}, or a file with what Purifier.to_json gives. "
            f"Got {options.recipe!r}, which is neither."
        )
    if given or options.dtype is not None:
        extra = [*given, *(["dtype"] if options.dtype is not None else [])]
        raise ConfigError(f"A recipe from a file says all of itself. Got {_flags(extra)}: edit the file.")
    models = [model for model in (options.energy, options.model) if model is not None]
    return recipes.from_json(path.read_text(encoding="utf-8"), models)


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be a positive integer. Got {value}.")
    return value


def _amount(text: str) -> bool | int:
    if text == "all":
        return True
    if not text.isdecimal():
        raise InputError(f"--check-source must be a number of images, or all. Got {text!r}.")
    return int(text) or False


def _key(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() else text
