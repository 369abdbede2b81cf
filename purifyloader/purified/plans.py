"""Plans: what a purifier must know of the whole dataset before it can decide about one image.

A plan is one pass over the dataset that yields numbers, such as the energy above which an image is purified. With
them the purifier is again a function of one image. The numbers are a function of the rest of the configuration, the
source and the seed, and so they are no part of a purifier's identity, and a cache is opened without them.

`PurifiedDataset` and `precompute` plan by themselves. In a cache the plan stands in `plan.json` until the index
takes it over (cache/README.md), so that all processes, and a run that goes on after a stop, purify the same images.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.cache import format as fmt
from purifyloader.cache.writer import CacheWriter
from purifyloader.core.checks import as_integer
from purifyloader.datasets.samples import ImageKey
from purifyloader.datasets.sources import check_honest, random_state_kept, take_over
from purifyloader.errors import CacheError, ConfigError, PurifyError
from purifyloader.files.locks import Lock
from purifyloader.purified.job import Job, check_arguments, placed, read_batches
from purifyloader.purifiers import Condition, Purifier
from purifyloader.purifiers.base import conditions_of

__all__ = ["plan"]  # the rest is for PurifiedDataset and precompute

log = logging.getLogger(__name__)


def plan(
    purifier: Purifier,
    dataset: Dataset[Any],
    *,
    device: str | torch.device | None = None,
    batch_size: int = 256,
    seed: int = 0,
    image_key: ImageKey = None,
    progress: bool = True,
) -> Purifier:
    """A copy of the purifier with a plan for this dataset, in place of the one it may have.

    One pass over the dataset for each condition that needs one (`EnergyAbove(energy, k=0.5)`), through whatever
    stands in front of it in a chain. The same numbers for any `batch_size`.

    Args:
        purifier: see `purifyloader.recipes`. One with nothing to plan comes back as it is.
        dataset: map-style, with its own transform or without: see `PurifiedDataset`.
        device: where to compute; by default where the purifier is.
        batch_size: images read at a time.
        seed: of all noise in front of a condition: that of the `PurifiedDataset` it is for.
        image_key: where the image is in a sample.
        progress: show a bar.

    Returns:
        A purifier on the device of the one given, which shares its weights.

    Raises:
        InputError: a dataset that cannot be purified honestly, or images that the purifier does not take.
        ConfigError: a condition stands where it cannot be planned.
        PurifyError: the energy of an image is not finite.
    """
    check_arguments(dataset, purifier)
    seed, batch_size = as_integer("seed", seed, -(2**63)), as_integer("batch_size", batch_size, 1)
    if not _conditions(purifier):
        return purifier
    source = take_over(dataset)
    moved = placed(purifier, device)
    check_honest(source, moved.image_channels, image_key)
    found = make(Job(source, moved, seed, 1, image_key), batch_size, progress=progress)
    return applied(_copied(purifier), found)


def is_open(purifier: Purifier) -> bool:
    """Whether it cannot run before a plan is made."""
    return any(condition.planned is None for condition in _conditions(purifier))


def make(job: Job, batch_size: int, *, workers: int = 0, progress: bool = True) -> dict[str, Any]:
    """The plan of a job's purifier for its source, whatever plan the purifier has.

    Returns:
        `conditions`, the configuration of each with what was `planned`, and `source`, the identity of all images
        and targets that were read.
    """
    job = job.with_purifier(_copied(job.purifier))
    conditions = _conditions(job.purifier)
    source = None
    for condition in conditions:
        measures_N, hashes = _measured(job, condition, batch_size, workers, progress)
        condition.planned = condition.make_plan(measures_N)
        source = fmt.source_sha256(hashes)
        log.info("Planned: %s", fmt.plan_in_words(condition.config()))
    return fmt.plain("A plan", {"conditions": [condition.config() for condition in conditions], "source": source})


def applied(purifier: Purifier, found: Mapping[str, Any]) -> Purifier:
    """The purifier with the numbers that `make` found: a copy that shares its weights.

    Raises:
        ConfigError: it has a plan with other numbers, or needs another plan.
    """
    out = _copied(purifier)
    conditions, plans = _conditions(out), [entry.get("planned") for entry in found["conditions"]]
    if len(conditions) != len(plans):
        raise ConfigError(
            f"A plan has one entry for each of {len(conditions)} conditions. Got {len(plans)}: plan again."
        )
    for old, condition, planned in zip(_conditions(purifier), conditions, plans, strict=True):
        condition.check_plan(planned)
        if old.planned not in (None, planned):
            raise ConfigError(
                f"A purifier that has a plan must have the one of this dataset, {planned}. Got {old.planned}, of "
                "another dataset, seed or version: give it without a plan, or give its condition that threshold."
            )
        condition.planned = dict(planned)
    return out


# -- with a cache ------------------------------------------------------------------------------------


def agreed(
    job: Job, writer: CacheWriter, batch_size: int, *, workers: int = 0, progress: bool = True
) -> dict[str, Any] | None:
    """The plan of a cache that is being filled, the same in every process; None where nothing needs one.

    Whoever comes first makes it and writes it down; the others wait, and read it. A file that is damaged is made
    again, to the same numbers.

    Raises:
        CacheError: it cannot be written.
    """
    if not _conditions(job.purifier):
        return None
    if (found := _stored(job, writer)) is not None:
        return found
    with Lock(writer.folder, fmt.PLAN_FILE):
        found = _stored(job, writer)
        if found is None:
            writer.check_same_device()  # before a pass that would be in vain
            found = make(job, batch_size, workers=workers, progress=progress)
            writer.write_plan(found)
        return found


def of_index(index_plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `make` found, in the plan that the index of a cache keeps."""
    found = (index_plan or {}).get(fmt.WHERE)
    return found if isinstance(found, dict) and isinstance(found.get("conditions"), list) else None


def with_plan(folder: Path, given: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The plan to keep in the index: the user's, and what `make` found. None keeps the one that is there.

    Raises:
        ConfigError: the user's has something in the place of the other.
    """
    whole = None if given is None else fmt.plain("A plan", given)
    if found is None:
        return whole
    if whole is not None and fmt.WHERE in whole:
        raise ConfigError(
            f"The plan of a cache says under {fmt.WHERE!r} which images are purified. Got a plan with that key: "
            "rename it."
        )
    there = _index_plan(folder)
    return {**((there or {}) if whole is None else whole), fmt.WHERE: dict(found)}


def _stored(job: Job, writer: CacheWriter) -> dict[str, Any] | None:
    """The plan in the folder; None where there is none that fits."""
    # first the file, for it goes when the index is there
    found = writer.read_plan()
    if found is None:
        found = of_index(_index_plan(writer.folder))
    try:
        if found is not None:
            applied(_copied(job.purifier), found)
    except (ConfigError, AttributeError, TypeError):
        return None
    return found


def _index_plan(folder: Path) -> dict[str, Any] | None:
    try:
        return fmt.read_index(folder).plan
    except (OSError, CacheError):
        return None


# -- inside ------------------------------------------------------------------------------------------


def _conditions(purifier: Purifier) -> list[Condition]:
    """Those that need a plan, each in one place only, for another place sees other images."""
    found = list(conditions_of(purifier))
    if len({id(condition) for condition in found}) < len(found):
        raise ConfigError("Each Where needs a condition of its own to plan. Got the same one twice: make two of it.")
    return found


def _copied(purifier: Purifier) -> Purifier:
    """A copy without a plan. Its weights share their memory with the original's, and can move without them."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in purifier.parameters()}
    shared |= {id(b): b.detach() for b in purifier.buffers()}
    out = copy.deepcopy(purifier, shared)
    for condition in conditions_of(out):
        condition.planned = None
    return out


def _measured(
    job: Job, condition: Condition, batch_size: int, workers: int, progress: bool
) -> tuple[Tensor, NDArray[np.uint64]]:
    """What decides about each image, float32 (N,), and the hashes of the images, (N, 2)."""
    length = len(job.reader)
    batches = [list(range(start, min(start + batch_size, length))) for start in range(0, length, batch_size)]
    measures, hashes = [], []
    with random_state_kept(), tqdm(total=length, unit="img", desc="planning", disable=not progress, leave=False) as bar:
        for positions, reads in zip(batches, read_batches(job.reader, iter(batches), workers), strict=True):
            if isinstance(reads, PurifyError):
                raise reads
            try:
                found = job.to_plan(positions, [torch.from_numpy(read.pixels) for read in reads])
                if found is None or found[0] is not condition:
                    raise ConfigError(
                        "A condition with a share k is that of a Where, alone or in a Chain. Got one inside a "
                        f"{type(job.purifier).__name__} that brings no images to it: give it a threshold."
                    )
                measures.append(condition.measure_images(found[1]))
            except PurifyError as error:
                raise type(error)(f"Items {positions[0]} to {positions[-1]} of the dataset: {error}") from None
            hashes += [read.hashes for read in reads]
            bar.update(len(positions))
    return torch.cat(measures), np.stack(hashes)
