"""Plan: find out over a whole dataset what decides about each of its images.

A plan is one pass over the dataset that yields numbers, such as the energy above which an image is purified, the
images under suspicion, or their corrected labels. With a threshold the purifier is again a function of one image. It is
a function of the rest of the configuration, the source and the seed, and so it is no part of a purifier's identity, and
a cache is opened without it. Suspects and labels (`Sanitation`) change no pixel.

In a cache the plan stands in `plan.json` until the index takes it over (cache/README.md), so that all processes, and a
run that goes on after a stop, purify the same images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from purifyloader.cache import format as fmt
from purifyloader.cache.reader import CacheReader
from purifyloader.cache.writer import CacheWriter
from purifyloader.core.checks import as_integer
from purifyloader.datasets.samples import ImageKey
from purifyloader.datasets.sources import check_honest, random_state_kept, take_over
from purifyloader.errors import CacheError, ConfigError, PurifyError
from purifyloader.files.locks import Lock
from purifyloader.purified.job import Job, check_arguments, placed
from purifyloader.purified.reading import read_batches
from purifyloader.purified.sanitation import Sanitation
from purifyloader.purifiers import Condition, Purifier
from purifyloader.purifiers.base import conditions_of
from purifyloader.purifiers.networks import copied

__all__ = ["Sanitation", "plan"]  # the rest is for PurifiedDataset and precompute

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Findings:
    """The results of the passes over a dataset."""

    conditions: tuple[dict[str, Any], ...] = ()  # configuration of each of the purifier, with what was `planned`
    source: Mapping[str, Any] | None = None  # identity of the images and targets that were read; None if not taken
    sanitation: Sanitation | None = None  # suspects and corrected labels, if anybody looked for them

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON, as a cache keeps them (cache/README.md)."""
        values = {"conditions": list(self.conditions), "source": self.source}
        if self.sanitation is not None:
            values["sanitation"] = self.sanitation.to_dict()
        return fmt.plain("A plan", values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gives; `ConfigError` for a sanitation that is damaged, or of a newer schema."""
        sanitation = values.get("sanitation")
        return cls(
            tuple(values["conditions"]),
            values.get("source"),
            None if sanitation is None else Sanitation.from_dict(sanitation),
        )

    def with_sanitation(self, sanitation: Sanitation | None) -> Self:
        """Add a sanitation; `ConfigError` where it is of another dataset."""
        if sanitation is None:
            return self
        if None not in (sanitation.source, self.source) and sanitation.source != self.source:
            raise ConfigError("The sanitation was found in another dataset than this one. Sanitize this one.")
        return replace(self, source=self.source or sanitation.source, sanitation=sanitation)


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
    """Plan a purifier for a dataset: a copy, which shares its weights, with a plan in place of the one it may have.

    One pass over the dataset for each condition that needs one (`EnergyAbove(energy, k=0.5)`), through whatever
    stands in front of it in a chain. The same numbers for any `batch_size`.

    Args:
        purifier: see `purifyloader.recipes`. One with nothing to plan comes back as it is.
        dataset, image_key: as in `PurifiedDataset`.
        device: where to compute; by default where the purifier is.
        batch_size: images read at a time.
        seed: of all noise in front of a condition: that of the `PurifiedDataset` it is for.
        progress: show a bar.

    Raises `InputError` for a dataset that cannot be purified honestly, or images that the purifier does not take;
    `ConfigError` where a condition cannot be planned; `PurifyError` where an image's energy is not finite.

    >>> import torch
    >>> from purifyloader import plans, recipes
    >>> dataset = [(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)]
    >>> plans.plan(recipes.jpeg(10), dataset, progress=False).config()  # which has nothing to plan
    {'kind': 'jpeg', 'quality': 10}
    """
    check_arguments(dataset, purifier)
    seed, batch_size = as_integer("seed", seed, -(2**63)), as_integer("batch_size", batch_size, 1)
    if not _conditions(purifier):
        return purifier
    source = take_over(dataset)
    moved = placed(purifier, device)
    check_honest(source, moved.image_channels, image_key)
    findings = make(Job(source, moved, seed, 1, image_key), batch_size, progress=progress)
    return applied(_copied(purifier), findings)


def is_open(purifier: Purifier) -> bool:
    """Say whether a purifier cannot run before a plan is made."""
    return any(condition.planned is None for condition in _conditions(purifier))


def make(
    job: Job,
    batch_size: int,
    *,
    workers: int = 0,
    progress: bool = True,
    seen: Callable[[int], object] = lambda count: None,
) -> Findings:
    """Plan a job's purifier for its source, whatever plan the purifier has; `seen` is told how many images are read."""
    job = job.with_purifier(_copied(job.purifier))
    conditions = _conditions(job.purifier)
    source = None
    for condition in conditions:
        measures_N, hashes = _measured(job, condition, batch_size, workers, progress, seen)
        condition.take_plan(condition.make_plan(measures_N))
        source = fmt.source_sha256(hashes)
        log.info("Planned: %s", fmt.plan_in_words(condition.config()))
    return Findings(tuple(fmt.plain("A plan", condition.config()) for condition in conditions), source)


def applied(purifier: Purifier, findings: Findings) -> Purifier:
    """Copy the purifier, sharing its weights, with the numbers that `make` found.

    Raises `ConfigError` where it has a plan with other numbers, or needs another plan.
    """
    out = _copied(purifier)
    conditions, plans = _conditions(out), [entry.get("planned") for entry in findings.conditions]
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
        assert isinstance(planned, dict)  # which check_plan has seen to
        condition.take_plan(planned)
    return out


def planned(job: Job, findings: Findings | None) -> Job:
    """Give the job's purifier its plan, where it has conditions that need one."""
    if findings is None or not (findings.conditions or _conditions(job.purifier)):
        return job
    return job.with_purifier(applied(job.purifier, findings))


def agreed(
    job: Job,
    writer: CacheWriter,
    batch_size: int,
    *,
    sanitation: Sanitation | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Findings | None:
    """Return the findings of a cache that is being filled, the same in every process; None where there are none.

    Whoever comes first makes the plan and writes it down; the others wait, and read it. A file that is damaged is made
    again, to the same numbers. A sanitation is written down beside it, and stays when a stopped run goes on without.
    """
    needed = bool(_conditions(job.purifier))

    def is_complete(findings: Findings | None) -> bool:
        if findings is None:
            return not needed and sanitation is None
        return sanitation is None or findings.sanitation is not None

    findings = _stored(job, writer)
    if not is_complete(findings):
        with Lock(writer.folder, fmt.PLAN_FILE) as lock:
            findings = _stored(job, writer)
            if not is_complete(findings):
                if findings is None:
                    writer.claim()  # before a pass that would be in vain
                    findings = Findings()
                    if needed:
                        findings = make(job, batch_size, workers=workers, progress=progress, seen=lock.note)
                findings = findings.with_sanitation(sanitation)
                writer.write_plan(findings.to_dict())
    if findings is not None:
        check_sanitation(writer.folder, findings.sanitation, sanitation)
    return findings


def check_sanitation(folder: Path, there: Sanitation | None, wanted: Sanitation | None) -> None:
    """Refuse a sanitation other than the one that the cache has."""
    if there is not None and wanted is not None and there != wanted:
        raise CacheError(
            f"The cache {folder} has another sanitation (there → given):\n"
            f"{fmt.differences(there.to_dict(), wanted.to_dict())}\nGive none to use the one that is there, or "
            "precompute into another folder."
        )


def sanitation_of(reader: CacheReader, wanted: Sanitation | None) -> Sanitation | None:
    """Return the sanitation by which a finished cache is read: its own, or the one wanted.

    Raises `CacheError` where it has another, or was made from another dataset than the one that was sanitized.
    """
    findings = of_index(reader.plan)
    there = None if findings is None else findings.sanitation
    check_sanitation(reader.folder, there, wanted)
    if there is None and wanted is not None:
        wanted.check_length(len(reader))
        source = reader.identity["source"]
        if wanted.source is not None and source is not None and wanted.source != source:
            raise CacheError(
                f"The sanitation was found in another dataset than the one that the cache {reader.folder} was made "
                "from. Sanitize this one."
            )
    return wanted if there is None else there


def of_index(index_plan: Mapping[str, Any] | None) -> Findings | None:
    """Read the findings in the plan that the index of a cache keeps."""
    values = (index_plan or {}).get(fmt.WHERE)
    if not isinstance(values, dict) or not isinstance(values.get("conditions"), list):
        return None
    return Findings.from_dict(values)


def with_plan(writer: CacheWriter, plan: Mapping[str, Any] | None, findings: Findings | None) -> dict[str, Any] | None:
    """Join the user's plan and the findings for the index. None keeps the plan that is there."""
    whole = None if plan is None else fmt.plain("A plan", plan)
    if findings is None:
        return whole
    if whole is not None and fmt.WHERE in whole:
        raise ConfigError(
            f"The plan of a cache says under {fmt.WHERE!r} which images are purified. Got a plan with that key: "
            "rename it."
        )
    index = writer.index()
    there = {} if index is None else index.plan or {}
    return {**(there if whole is None else whole), fmt.WHERE: findings.to_dict()}


def _stored(job: Job, writer: CacheWriter) -> Findings | None:
    """Read the findings in the folder; None where there are none that fit."""
    # first the file, for it goes when the index is there
    if (values := writer.read_plan()) is not None:
        findings: Findings | None = Findings.from_dict(values)
    else:
        findings = None if (index := writer.index()) is None else of_index(index.plan)
    try:
        if findings is not None and (findings.conditions or _conditions(job.purifier)):
            applied(_copied(job.purifier), findings)
    except (ConfigError, AttributeError, TypeError):
        return None
    return findings


def _conditions(purifier: Purifier) -> list[Condition]:
    """List those that need a plan, each in one place only, for another place sees other images."""
    conditions = list(conditions_of(purifier))
    if len({id(condition) for condition in conditions}) < len(conditions):
        raise ConfigError("Each Where needs a condition of its own to plan. Got the same one twice: make two of it.")
    return conditions


def _copied(purifier: Purifier) -> Purifier:
    """Copy it without a plan. Its weights share their memory with the original's, and can move without them."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in purifier.parameters()}
    shared |= {id(b): b.detach() for b in purifier.buffers()}
    out: Purifier = copied(purifier, shared)
    for condition in conditions_of(out):
        condition.take_plan(None)
    return out


def _measured(
    job: Job, condition: Condition, batch_size: int, workers: int, progress: bool, seen: Callable[[int], object]
) -> tuple[Tensor, NDArray[np.uint64]]:
    """Return what decides about each image, float32 (N,), and the hashes of the images, (N, 2)."""
    length = len(job.reader)
    batches = [list(range(start, min(start + batch_size, length))) for start in range(0, length, batch_size)]
    measures, hashes = [], []
    with random_state_kept(), tqdm(total=length, unit="img", desc="planning", disable=not progress, leave=False) as bar:
        for positions, reads in zip(batches, read_batches(job.reader, iter(batches), workers), strict=True):
            if isinstance(reads, PurifyError):
                raise reads
            try:
                reached = job.to_plan(positions, [torch.from_numpy(read.pixels) for read in reads])
                if reached is None or reached[0] is not condition:
                    raise ConfigError(
                        "A condition with a share k is that of a Where, alone or in a Chain. Got one inside a "
                        f"{type(job.purifier).__name__} that brings no images to it: give it a threshold."
                    )
                measures.append(condition.measure_images(reached[1]))
            except PurifyError as error:
                raise type(error)(f"Items {positions[0]} to {positions[-1]} of the dataset: {error}") from None
            hashes += [read.hashes for read in reads]
            bar.update(len(positions))
            seen(len(hashes))
    return torch.cat(measures), np.stack(hashes)
