"""Run an audit: read the energies of a dataset and of clean images, and compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from purifyloader import pretrained
from purifyloader.audit.compare import audit_energy, check_top
from purifyloader.audit.energies import DatasetEnergies, dataset_energies, read_poisoned
from purifyloader.audit.report import ranked_csv, sizes_in_words
from purifyloader.core.version import __version__
from purifyloader.datasets.named import describe, open_dataset
from purifyloader.datasets.select import choose, choose_images, read_indices
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import InputError
from purifyloader.evaluation.inputs import tell, tell_learned
from purifyloader.pretrained.kinds import sized_identity
from purifyloader.pretrained.learned import Learned, learned_images

__all__ = ["Audit", "Settings", "audit"]

_CLEAN = 2000  # twenty images lie above the 99th percentile, which is then known to a fifth
_MANY_SHAPES = 8


@dataclass(frozen=True)
class Settings:
    """Options of `purifyloader audit energy`, whose help explains them; None for those that are not given."""

    data: str
    root: str
    split: str
    count: int | None
    indices: Path | None
    clean: str | None
    clean_root: str | None
    clean_split: str
    clean_count: int | None
    choose_seed: int
    size: int | None
    energy: str
    poisoned: Path | None
    top: Sequence[float]

    def __post_init__(self) -> None:
        check_top(self.top)


class Audit(NamedTuple):
    """Results of an audit, as plain data, and the energies and indices that they are computed from."""

    results: Mapping[str, Any]
    data: DatasetEnergies
    reference: DatasetEnergies | None  # the clean images
    poisoned: list[int] | None

    def csv(self) -> str:
        temperature = self.results["energy"]["temperature"]
        return ranked_csv(self.data, self.reference, poisoned=self.poisoned, temperature=temperature)


def audit(settings: Settings, device: torch.device, *, progress: bool = False) -> Audit:
    """Audit a dataset, and warn on standard error of what makes energies hard to compare."""
    energy: EnergyNetwork = pretrained.load(settings.energy, kind="energy").to(device)
    dataset = _open(settings.data, settings.root, settings.split, "data")
    poisoned = None if settings.poisoned is None else read_poisoned(settings.poisoned, dataset)
    data, of_data = _data(settings, energy, dataset, progress)
    reference, of_reference = None, None
    if settings.clean is not None:
        reference, of_reference = _reference(settings, energy, progress)
        if data.shapes.keys() != reference.shapes.keys():
            tell(
                f"warning: the images in the data have {sizes_in_words(data.shapes)}, the clean ones "
                f"{sizes_in_words(reference.shapes)}. Energies of different sizes do not compare: give a size to bring "
                "all to."
            )
    how: dict[str, Any] = {"top": settings.top, "temperature": energy.temperature, "seed": settings.choose_seed}
    results = audit_energy(data, reference, poisoned=poisoned, **how)
    results = {
        **results,
        "purifyloader": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "model": sized_identity(energy),
        "data": {**results["data"], **of_data},
        "reference": None if of_reference is None else {**results["reference"], **of_reference},
    }
    return Audit(results, data, reference, poisoned)


def _open(spec: str, root: str, split: str, argument: str) -> Dataset[Any]:
    dataset = open_dataset(spec, root, train=split == "train")
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError("must have images. Got an empty dataset.", argument=argument)
    return dataset


def _data(
    settings: Settings, energy: EnergyNetwork, dataset: Dataset[Any], progress: bool
) -> tuple[DatasetEnergies, dict[str, Any]]:
    """Read all images asked for: those trained on too, for their owner wants to see each ranked."""
    length = len(dataset)  # type: ignore[arg-type]
    indices: Sequence[int] = range(length)
    if settings.indices is not None:
        indices = read_indices(settings.indices)
    elif settings.count is not None:
        if not 1 <= settings.count <= length:
            raise InputError(
                f"must be from 1 to {length}, the images in the data. Got {settings.count}.", argument="count"
            )
        indices = choose(length, settings.count, settings.choose_seed)
    learned = learned_images([settings.energy], dataset, settings.data, energy.config.image_channels, progress)
    finder = learned.finder(settings.size)
    data = dataset_energies(energy, dataset, indices, size=settings.size, learned=finder, progress=progress)
    if len(data.shapes) > _MANY_SHAPES:
        tell(
            f"warning: the data has images of {len(data.shapes)} sizes. Energies of different sizes compare only "
            "roughly, and this is slow: give a size to bring all to."
        )
    _tell_trained_on(learned, data)
    seen = {"trained_on": data.learned, "trained_on_known": learned.is_known}
    return data, {"description": describe(settings.data, settings.split), "length": length, **seen}


def _tell_trained_on(learned: Learned, data: DatasetEnergies) -> None:
    if data.learned:
        what = f"the model was trained on {data.learned:,} of the {len(data):,} images in the data, which lowers"
    elif seen := len(learned.doubtful.intersection(data.indices)):
        what = f"the model may have been trained on {seen:,} of the {len(data):,} images in the data, which would lower"
    elif learned.silent:
        names = " and ".join(learned.silent)
        what = f"{names} does not say which images it was trained on: some of the data would lower"
    else:
        return
    tell(f"note: {what} their energies.")


def _reference(settings: Settings, energy: EnergyNetwork, progress: bool) -> tuple[DatasetEnergies, dict[str, Any]]:
    """Read clean images, none that the model was trained on."""
    assert settings.clean is not None
    root = settings.root if settings.clean_root is None else settings.clean_root
    dataset = _open(settings.clean, root, settings.clean_split, "clean")
    learned = learned_images([settings.energy], dataset, settings.clean, energy.config.image_channels, progress)
    finder = learned.finder(settings.size)
    try:
        indices, left_out = choose_images(dataset, settings.clean_count, settings.choose_seed, _CLEAN, learned=finder)
    except InputError as error:
        if error.argument == "count":
            raise InputError(error.message, argument="clean_count") from None
        raise InputError(f"The reference: {error}") from None
    what = "the reference"
    reference = dataset_energies(energy, dataset, indices, size=settings.size, what=what, progress=progress)
    length = len(dataset)  # type: ignore[arg-type]
    tell_learned(learned, indices, left_out, length, what)
    described = describe(settings.clean, settings.clean_split)
    seen = {"trained_on_left_out": left_out, "trained_on_known": learned.is_known}
    return reference, {"description": described, "length": length, **seen}
