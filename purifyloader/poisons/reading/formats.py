"""Every format that is read, by name: how its content shows, and what reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from purifyloader.poisons.poisoned import Poisoned
from purifyloader.poisons.reading import perturbations, pictures, rows, targeted
from purifyloader.poisons.reading.request import Request

__all__ = ["FORMATS", "Format"]


class Format(NamedTuple):
    """One way in which poisons are published.

    Attributes:
        what: its content, in a line for messages.
        matches: whether content looks like it.
        read: the poisoned set; it checks all that `matches` did not.
        may_aim: whether it may be of a poison that is aimed at a test image, which `target=` gives.
        by_row: it has a row for each image of the clean set, so that a part of them can be read alone.
    """

    what: str
    matches: Callable[[Any, Request], bool]
    read: Callable[[Any, Request], Poisoned]
    may_aim: bool = False
    by_row: bool = False


FORMATS: dict[str, Format] = {
    "benchmark": Format(
        "a folder with poisons.pickle, base_indices.pickle and target.pickle",
        targeted.is_benchmark,
        targeted.read_benchmark,
        may_aim=True,
    ),
    "puregen": Format(
        "a .pth of (list of (PIL image, label), indices, target)",
        targeted.is_puregen,
        targeted.read_puregen,
        may_aim=True,
    ),
    "bullseye": Format(
        "a .pth of {'poison': [(normalised tensor, label)], 'idx': indices}",
        targeted.is_bullseye,
        targeted.read_bullseye,
        may_aim=True,
    ),
    "witches-brew": Format(
        "a .pth of [perturbations (P, 3, H, W), indices]",
        perturbations.is_witches_brew,
        perturbations.read_witches_brew,
        may_aim=True,
    ),
    "narcissus": Format(
        "an .npy trigger, float (1, 3, H, W)", perturbations.is_narcissus, perturbations.read_narcissus
    ),
    "em-samplewise": Format(
        "a .pt tensor, float (images, 3, H, W)", perturbations.is_em_samplewise, perturbations.read_em_samplewise
    ),
    "em-classwise": Format(
        "a .pt tensor, float (classes, 3, H, W)", perturbations.is_em_classwise, perturbations.read_em_classwise
    ),
    "rem": Format("a .pkl array, int8 (N, 3, H, W)", perturbations.is_rem, perturbations.read_rem),
    "ar": Format("a .pt list of coefficients (3, 3, 3), one a class", perturbations.is_ar, perturbations.read_ar),
    "ntga": Format(
        "x_train*.npy, float (N, H, W, C), beside one-hot y_train*.npy", pictures.is_ntga, pictures.read_ntga
    ),
    "npz": Format(
        "an .npz with data, uint8 (N, H, W, C), and targets", pictures.is_npz, pictures.read_npz, may_aim=True
    ),
    "raw-bytes": Format(
        "a pickle of a list of (bytes of an RGB image, label)",
        pictures.is_raw_bytes,
        pictures.read_raw_bytes,
        may_aim=True,
    ),
    "perturbations": Format(
        "an .npy of perturbations (N, H, W, C) or (N, C, H, W), or one for all, with units=",
        rows.is_perturbations,
        rows.read_perturbations,
        by_row=True,
    ),
    "images": Format("an .npy of poisoned images, uint8 (N, H, W, C)", rows.is_images, rows.read_images, by_row=True),
    "png": Format(
        "a folder of <index>.png, or of class folders of them", pictures.is_png, pictures.read_png, may_aim=True
    ),
}
