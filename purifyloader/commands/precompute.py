"""Fill a purified cache: `purifyloader precompute`, or `accelerate launch -m purifyloader.precompute` on GPUs."""

from __future__ import annotations

import argparse
import logging
import os
import time
from typing import TYPE_CHECKING

from purifyloader.commands.logs import show
from purifyloader.commands.options import add_data, add_device, add_quiet, add_seed, add_split, add_threads, as_key
from purifyloader.commands.recipe_options import add_recipe_options, purifier_of
from purifyloader.core.checks import as_path, launcher_number
from purifyloader.errors import InputError

if TYPE_CHECKING:
    from purifyloader.cache.reader import CacheReader
    from purifyloader.purified.sanitation import Sanitation

log = logging.getLogger(__name__)

DESCRIPTION = (
    "Purify a dataset once, into a cache. Run the same command again after a stop: it goes on. "
    "On several GPUs: accelerate launch -m purifyloader.precompute, or torchrun, with the same options."
)


# options that are arguments of `purifyloader.precompute` by the same names
_SAME = ("seed", "draws", "batch_size", "shard_size", "encoding", "allow_mixed_devices")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command, those of all recipes among them."""
    data = parser.add_argument_group("what to purify")
    add_data(data, "images to purify")
    add_split(data)
    data.add_argument("--image-key", help="where the image is in a sample, if not first or under 'image'")
    add_recipe_options(parser.add_argument_group("how", "Behind an option stand the recipes that take it."))

    cache = parser.add_argument_group("where to, and with what")
    cache.add_argument("--out", required=True, type=as_path, help="folder of the cache")
    add_seed(cache, "all noise")
    cache.add_argument("--draws", type=int, default=1, help="independent purifications of each image (default: 1)")
    cache.add_argument("--batch-size", type=int, default=256, help="images read at a time; decides no pixel")
    cache.add_argument("--shard-size", type=int, help="images a file (default: 1024)")
    cache.add_argument("--encoding", choices=("auto", "raw", "png"), default="auto", help="(default: auto)")
    add_device(cache)
    cache.add_argument("--workers", type=int, help="processes that read, for each that purifies")
    add_threads(cache, "its share of the cores")
    words = "images of each shard made by another process or run that are compared with the source (default: all)"
    cache.add_argument("--check-source", metavar="N|all", help=words)
    words = "what `purifyloader sanitize` found in these images, kept with the cache for all who read it"
    cache.add_argument("--sanitation", type=as_path, metavar="FOLDER", help=words)
    words = "what is done with its suspects: dropped, called by the better label, or only named (default: drop)"
    cache.add_argument("--suspects", choices=("drop", "relabel", "keep"), help=words)
    cache.add_argument("--rank", type=int, help="number of this process, where no launcher says so")
    cache.add_argument("--world-size", type=int, help="number of all processes")
    cache.add_argument("--allow-mixed-devices", action="store_true", help="go on with another kind of device's shards")
    add_quiet(cache)


def run(options: argparse.Namespace) -> int:
    """Fill the cache, or the part of it that is this process's."""
    import torch

    from purifyloader.core.devices import device_of_process
    from purifyloader.datasets.named import ImageFiles, open_dataset
    from purifyloader.purified.filling import place, precompute

    show(logging.WARNING if options.quiet else logging.INFO)
    rank, world_size = place(options.rank, options.world_size)
    local_size = launcher_number("LOCAL_WORLD_SIZE", 1 if options.rank is not None else world_size, 1)
    device = device_of_process(options.device, rank)
    share = max(1, _cores() // max(1, local_size))
    # launchers set OMP_NUM_THREADS=1, which would leave the other cores idle
    torch.set_num_threads(options.threads or share)
    purifier = purifier_of(options)
    dataset = open_dataset(options.data, options.root, train=options.split == "train")
    if isinstance(dataset, ImageFiles) and (classes := dataset.subfolders()):
        names = ", ".join(classes[:3]) + ", ..." * (len(classes) > 3)
        log.warning(
            f"The names of the folders in {options.data} ({names}) are not kept. If they are classes, give "
            f"--dataset imagefolder --root {options.data}."
        )
    sanitation = _sanitation(options)
    begun = time.monotonic()
    reader = precompute(
        dataset,
        purifier,
        options.out,
        device=device,
        workers=(0 if device.type == "cpu" else min(8, share - 1)) if options.workers is None else options.workers,
        check_source=True if options.check_source is None else _amount(options.check_source),
        image_key=as_key(options.image_key),
        rank=rank,
        world_size=world_size,
        sanitation=sanitation,
        progress=not options.quiet,
        **{name: getattr(options, name) for name in _SAME},
    )
    if rank == 0:
        print(_summary(reader, time.monotonic() - begun))
    return 0


def _sanitation(options: argparse.Namespace) -> Sanitation | None:
    if options.sanitation is None:
        if options.suspects is not None:
            raise InputError("goes with --sanitation. Got it alone: give that, or leave it out.", argument="suspects")
        return None
    from purifyloader import sanitize

    return sanitize.load(options.sanitation).sanitation(options.suspects or "drop")


def _summary(reader: CacheReader, seconds: float) -> str:
    size = sum((reader.folder / entry.file).stat().st_size for entry in reader.index.shards)
    shards = len(reader.index.shards)
    return (
        f"{reader.folder}: {len(reader):,} images, {shards} shard{'s' * (shards != 1)}, {size / 1e6:,.1f} MB, "
        f"{seconds:.0f} s, fingerprint {reader.fingerprint[:12]}"
    )


def _cores() -> int:
    """Count the cores that this process may use, which only Linux says, else those of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _amount(text: str) -> bool | int:
    if text == "all":
        return True
    if not text.isdecimal():
        raise InputError(f"--check-source must be a number of images, or all. Got {text!r}.")
    return int(text) or False
