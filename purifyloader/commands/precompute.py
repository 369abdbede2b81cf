"""Fill a purified cache: `accelerate launch -m purifyloader.precompute`, or `purifyloader precompute`.

The work itself is `purifyloader.purified.filling.precompute`, which is `purifyloader.precompute` in Python.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

import torch

from purifyloader.cache.reader import CacheReader
from purifyloader.commands.recipe_options import add_recipe_options, purifier_of
from purifyloader.core.devices import device_of_process
from purifyloader.datasets.named import open_dataset
from purifyloader.errors import InputError
from purifyloader.purified.filling import CHECKED, place, precompute

__all__ = ["DESCRIPTION", "add_options", "run"]

log = logging.getLogger("purifyloader")

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
    add_recipe_options(recipe)
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
