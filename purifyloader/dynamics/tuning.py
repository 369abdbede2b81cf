"""Choose how strongly to purify, from curves measured on clean images and attacks on them.

The criterion is PureGen's (Bhat et al. 2024, section 3.4): the smallest level at which a poisoned image, purified, has
come closer to the clean image than to the poisoned one; here for a share of the images, and for every attack tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purifyloader.audit.compare import halves, threshold
from purifyloader.core import noise
from purifyloader.diffusion.psnr import check_images
from purifyloader.dynamics.measuring import Floats, dynamics, energies_of, temperature_of
from purifyloader.dynamics.paths import Path
from purifyloader.energy import EnergyNetwork
from purifyloader.errors import InputError
from purifyloader.results.values import auc, six_digits

__all__ = ["COMPENSATED", "FORMAT", "VERSION", "Choice", "choose_level", "compare_unpaired", "tune"]

FORMAT = "purifyloader-tune"
VERSION = 1

COMPENSATED = ("lsp",)
"""Attacks of smooth patches: what purification leaves of them, compensation in training removes (README's tables)."""

_OTHER, _PROBE = 1, 2  # purposes of the noise: images that are no one's twins, and the probe


@dataclass(frozen=True)
class Choice:
    """Positions among the levels.

    Attributes:
        chosen: the smallest level that does for every attack; None where none does.
        best: the smallest level at which the attack that fares worst does best; the last, where none brings a single
            image of that attack closer.

    >>> from purifyloader.dynamics import choose_level
    >>> choose_level({"lsp": [0.1, 0.3, 0.2]})
    Choice(chosen=None, best=1)
    """

    chosen: int | None
    best: int


def choose_level(closer: Mapping[str, Sequence[float]], share: float = 0.5) -> Choice:
    """Choose the smallest level at which every attack is undone for a share of its images.

    Args:
        closer: for each attack, at each level, the share of images closer to clean than to poisoned.
        share: that must be reached, in (0, 1].

    >>> from purifyloader.dynamics import choose_level
    >>> choose_level({"lsp": [0.2, 0.6, 0.9], "ar": [0.4, 0.4, 0.7]}).chosen
    2
    """
    if not 0 < share <= 1:
        raise InputError(f"share is the part of the images that must come closer, above 0, at most 1. Got {share!r}.")
    if not closer or not all(len(values) for values in closer.values()):
        raise InputError("Expected one attack or more, measured at one level or more. Got none.")
    worst = np.min(np.array(list(closer.values())), axis=0)
    enough = np.flatnonzero(worst >= share)
    return Choice(int(enough[0]) if len(enough) else None, int(worst.argmax()) if worst.any() else len(worst) - 1)


def tune(
    path: Path,
    clean_NCHW: Tensor,
    poisoned: Mapping[str, Tensor],
    *,
    share: float = 0.5,
    data_NCHW: Tensor | None = None,
    energy: EnergyNetwork | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Choose a level of a path: the smallest at which every attack is undone for a share of its images.

    Args:
        path: whose levels are tried; no others are proposed. For what is not here see `measure` and `dynamics`.
        poisoned: the clean images by attack.
        share: of the images of each attack that must come closer to clean than to poisoned.
        data_NCHW: images of the dataset to be purified, of the same shape, to be compared with the clean ones.

    Returns:
        What `json.dumps` takes: "proposal", the level chosen, None where none in the range does; "best", the one that
        comes nearest, which is the same where there is a proposal; each with level, calls, sigma_px, seconds_per_image,
        cost_px (how far clean images are moved, RMS) and for each attack the share that is closer to clean, and the
        distance to clean before and after. "before" is the level just below, and "alone" has the level that each attack
        alone would need. "with_compensation" is the smallest level that does for the attacks that compensation in
        training does not undo, unless it is the proposal. "unpaired" compares `data_NCHW` with the clean images before
        and after the best level. "curves" is the result of `dynamics`.

    >>> import torch
    >>> from purifyloader.dynamics import LangevinPath, tune
    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> path = LangevinPath(EnergyNetwork(EnergyConfig(channels=8)).eval(), steps=[1, 2], compute_batch=16)
    >>> clean = torch.full((2, 3, 16, 16), 99, dtype=torch.uint8)
    >>> results = tune(path, clean, {"brighter": clean + 8})
    >>> sorted(results["alone"])
    ['brighter']
    """
    if not poisoned:
        raise InputError("tune needs one attack or more on the clean images. Got none: give some, such as lsp and ar.")
    if data_NCHW is not None:
        check_images(data_NCHW, "The dataset's images are")
        if data_NCHW.shape[1:] != clean_NCHW.shape[1:]:
            raise InputError(
                f"Expected images of one size, {tuple(clean_NCHW.shape[1:])} (C, H, W), as the clean ones. Got "
                f"{tuple(data_NCHW.shape[1:])} in the dataset: give a size for both."
            )
    choose_level({"": [0.0]}, share)  # before minutes of work
    of_energy: dict[str, Any] = {"energy": energy, "temperature": temperature, "seed": seed}
    curves = dynamics(path, clean_NCHW, poisoned, progress=progress, **of_energy)
    levels = curves["levels"][1:]  # nothing is proposed without purification
    closer = {name: [level["poisoned"][name]["closer_to_clean"] for level in levels] for name in poisoned}
    choice = choose_level(closer, share)
    others = {name: values for name, values in closer.items() if name not in COMPENSATED}
    less = choose_level(others, share).chosen if others else None
    alone = {name: choose_level({name: values}, share).chosen for name, values in closer.items()}
    at = choice.best if choice.chosen is None else choice.chosen
    unpaired = None
    if data_NCHW is not None:
        unpaired = compare_unpaired(path.only(at), path.only(0), clean_NCHW, data_NCHW, **of_energy)
    records = [_record(level, curves["poisons"]) for level in levels]
    return {
        "format": FORMAT,
        "version": VERSION,
        "share": share,
        "proposal": None if choice.chosen is None else records[choice.chosen],
        "best": records[at],
        "before": records[at - 1] if at else None,
        "with_compensation": None if less is None or less == choice.chosen else records[less],
        "alone": {name: None if i is None else records[i] for name, i in alone.items()},
        "unpaired": unpaired,
        "curves": curves,
    }


def _record(level: Mapping[str, Any], poisons: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: level[key] for key in ("level", "sigma_px", "calls", "seconds_per_image") if key in level},
        "cost_px": level["clean_to_purified_clean"]["rms_px"],
        "attacks": {
            name: {
                "closer_to_clean": attack["closer_to_clean"],
                "to_clean_px": attack["clean_to_purified_poisoned"]["rms_px"],
                "to_clean_before_px": poisons[name]["size"]["rms_px"],
            }
            for name, attack in level["poisoned"].items()
        },
    }


def compare_unpaired(
    path: Path,
    probe: Path,
    clean_NCHW: Tensor,
    data_NCHW: Tensor,
    *,
    energy: EnergyNetwork | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare images of a dataset with clean ones that are not their twins, before and after purification.

    "removed_px" is what a light purification, the `probe` of one level, removes from an image (RMS): a poison is often
    what goes first. "energy" is U = E / T. Each has the medians; auc: P(one of the data is above one of the clean);
    share_above, of the data above the 99th percentile of the clean ones, which tells of a part that is poisoned what
    auc may not; and the ranges of these two between halves of the clean images.
    """
    temperature = temperature_of(energy) if temperature is None else temperature
    removed: dict[str, list[Floats]] = {}
    u: dict[str, list[Floats]] = {}
    for name, images, part in (("clean", clean_NCHW, 0), ("data", data_NCHW, _OTHER)):
        keys = noise.image_keys(seed, part, torch.arange(len(images)))
        both = [images, _purified(path, images, keys)]
        removed[name] = [_rms_px(x, _purified(probe, x, noise.fold_in(keys, _PROBE))) for x in both]
        if energy is not None:
            u[name] = [energies_of(energy, x) / temperature for x in both]
    return {
        "images": {"clean": len(clean_NCHW), "data": len(data_NCHW)},
        "removed_px": _before_and_after(removed, seed),
        "energy": None if energy is None else _before_and_after(u, seed),
    }


def _purified(path: Path, images_NCHW: Tensor, keys_N: Tensor) -> Tensor:
    out = torch.empty_like(images_NCHW)
    for piece in path.purify(images_NCHW, keys_N):
        out[piece.rows] = piece.images
    return out


def _rms_px(a: Tensor, b: Tensor) -> Floats:
    return (a.double() - b.double()).square().mean(dim=(1, 2, 3)).sqrt().numpy()


def _before_and_after(values: Mapping[str, Sequence[Floats]], seed: int) -> dict[str, Any]:
    compared = {}
    for when, clean, data in zip(("before", "after"), values["clean"], values["data"], strict=True):
        among = halves(clean, len(data), seed)
        compared[when] = {
            "clean_median": six_digits(float(np.median(clean))),
            "data_median": six_digits(float(np.median(data))),
            "auc": six_digits(auc(clean.tolist(), data.tolist())),
            "clean_auc": None if among is None else [among["auc"]["low"], among["auc"]["high"]],
            "share_above": six_digits(float((data > threshold(clean)).mean())),
            "clean_share_above": None if among is None else [among["share_above"]["low"], among["share_above"]["high"]],
        }
    return compared
