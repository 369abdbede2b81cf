"""Plant back doors by triggers that need no network. For testing defences.

Some images get a trigger and, but for `sig`, the label of the target class, which is wrong for all of them: they are
drawn from the images of other classes. A victim learns the trigger as a sign of the class. The same images are drawn
for all attacks with wrong labels, if dataset, seed and number are the same.

Not here are attacks whose trigger is trained with the victim (low-frequency, input-aware, BPP), and those that need a
network of their authors' (SSBA, TrojanNN). Sets that they made are read from files: `poisons.read`.
"""

from __future__ import annotations

import hashlib
import operator
import os
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from purifyloader.core import noise
from purifyloader.core.checks import as_path, check_choice, check_integer, check_number
from purifyloader.datasets.arrays import Part
from purifyloader.datasets.named import read_image
from purifyloader.errors import InputError
from purifyloader.poisons.attacks.additive import purpose_keys
from purifyloader.poisons.attacks.choice import colour, drawn, how_many, is_class, of_class
from purifyloader.poisons.poisoned import Bound, Poisoned
from purifyloader.poisons.triggers import Blend, Dct, Patch, Sine, Trigger, Warp

__all__ = ["PATCHES", "badnets", "blended", "ftrojan", "sig", "wanet"]

_ATTACK = 0x62646F72  # "bdor"
_CROSS = 0x63726F73  # "cros"
_PATTERN = 1  # what keys of `_ATTACK` are for, beside the choice of images

PATCHES: dict[str, NDArray[np.uint8]] = {
    "white": np.full((3, 3, 3), 255, np.uint8),
    "dataelixir": np.array([[(255, 255, 0), (255, 0, 255)], [(0, 255, 255), (122, 122, 122)]], np.uint8)
    .repeat(2, axis=0)
    .repeat(2, axis=1),
}
"""Patches of BadNets by name: yellow, magenta, cyan and grey are the published set of DataElixir's."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """Images to poison, and the options that all of these attacks have; `positions` are places in the whole dataset."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    classes: int
    seed: int
    target_class: int
    share: float | None
    count: int | None

    @classmethod
    def of(cls, dataset: Any, seed: int, target_class: Any, share: float | None, count: int | None) -> Self:
        noise.key_from_seed(seed)  # which refuses what is none
        images, labels = colour(dataset)
        is_part = isinstance(dataset, Part)
        classes = dataset.classes if is_part else int(labels.max()) + 1
        if not is_class(target_class) or not 0 <= target_class < classes:
            raise InputError(f"target_class must be a class from 0 to {classes - 1}. Got {target_class!r}.")
        positions = dataset.positions if is_part else np.arange(len(images))
        return cls(images, labels, positions, classes, operator.index(seed), int(target_class), share, count)

    def relabel(
        self, attack: str, trigger: Trigger, bound: Bound | None, cross: Cross | None = None, **settings: Any
    ) -> Poisoned:
        """Put a trigger into images of other classes, a tenth of the set unless said, and call them the target class.

        Those of `cross`, drawn from all other images, keep their labels.
        """
        others = np.flatnonzero(self.labels != self.target_class)
        share = 0.1 if self.share is None and self.count is None else self.share
        whole, of_others = f"the {len(self.labels)} images", f"the {len(others)} images of other classes"
        wanted = how_many(len(self.labels), share, None, whole)
        if self.count is not None:
            wanted = how_many(len(others), share, self.count, of_others)
        assert wanted is not None
        if wanted > len(others):
            raise InputError(
                f"share must be of no more than {of_others}. Got {share!r} of {whole} in the set, {wanted}: poison "
                "fewer."
            )
        chosen = drawn(torch.from_numpy(others), wanted, self.seed, _ATTACK).numpy()
        out, out_labels = self._triggered(self.images, trigger, chosen), self.labels.copy()
        out_labels[chosen] = self.target_class
        if cross is not None and (crossed := round(cross.ratio * wanted)):
            rest = np.setdiff1d(np.arange(len(self.labels)), chosen)
            if crossed > len(rest):
                raise InputError(
                    f"cross_ratio must be of no more than the {len(rest)} images that are left. Got {cross.ratio}, "
                    f"which is {crossed}: make it smaller, or poison fewer."
                )
            which = drawn(torch.from_numpy(rest), crossed, self.seed, _CROSS).numpy()
            out, chosen = self._triggered(out, cross.trigger, which), np.union1d(chosen, which)
        known: dict[str, Any] = {"trigger": trigger, "bound": bound, "target_class": self.target_class}
        known |= {"true_labels": self.labels.copy(), "settings": self._settings(share, settings)}
        return Poisoned.of(out, out_labels, attack, chosen, **known)

    def keep_labels(self, attack: str, trigger: Trigger, bound: Bound, **settings: Any) -> Poisoned:
        """Put a trigger into images of the target class, four fifths of them unless said."""
        share = 0.8 if self.share is None and self.count is None else self.share
        wanted = of_class(self.labels, self.target_class, share, self.count, "class")
        members = torch.from_numpy(np.flatnonzero(self.labels == self.target_class))
        chosen = drawn(members, wanted, self.seed, _ATTACK).numpy()
        out = self._triggered(self.images, trigger, chosen)
        known = {"trigger": trigger, "bound": bound, "target_class": self.target_class}
        return Poisoned.of(out, self.labels, attack, chosen, **known, settings=self._settings(share, settings))

    def _triggered(self, images: NDArray[np.uint8], trigger: Trigger, chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = images.copy()
        out[chosen] = trigger(images[chosen], self.positions[chosen])
        return out

    def _settings(self, share: float | None, settings: dict[str, Any]) -> dict[str, Any]:
        common = {"seed": self.seed, "target_class": self.target_class, "share": share, "count": self.count}
        return {**common, **settings}

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Draw numbers in (0, 1) by the seed alone."""
        keys = purpose_keys(self.seed, _ATTACK, _PATTERN, torch.zeros(1, dtype=torch.int64))
        return noise.uniform(keys, shape)[0].numpy()


class Cross(NamedTuple):
    """`Cross` is a trigger for images that keep their labels, and how many of these there are for each poisoned one."""

    trigger: Trigger
    ratio: float


def badnets(
    dataset: Any,
    seed: int = 0,
    *,
    target_class: int,
    share: float | None = None,
    count: int | None = None,
    pattern: Literal["white", "dataelixir"] = "white",
) -> Poisoned:
    """Set a patch in the lower right corner of images of other classes (Gu et al. 2017, arXiv:1708.06733).

    Args:
        dataset: see `as_arrays`; in colour.
        seed: of the choice of images.
        target_class: what they are called.
        share, count: so many images of the set, a tenth of it unless said.
        pattern: "white", 3 x 3 pixels, or "dataelixir", 4 x 4 in four colours.
    """
    check_choice("pattern", pattern, tuple(PATCHES), error=InputError)
    plan = _Plan.of(dataset, seed, target_class, share, count)
    pixels = PATCHES[pattern]
    bound = Bound("l0", pixels.shape[0] * pixels.shape[1])
    return plan.relabel("badnets", Patch(pixels, "lower-right"), bound, pattern=pattern)


def blended(
    dataset: Any,
    seed: int = 0,
    *,
    target_class: int,
    share: float | None = None,
    count: int | None = None,
    alpha: float = 0.2,
    image: str | os.PathLike[str] | NDArray[np.uint8] | None = None,
) -> Poisoned:
    """Mix a picture into images of other classes (Chen et al. 2017, arXiv:1712.05526).

    Args:
        dataset: see `as_arrays`; in colour.
        seed: of the choice of images, and of the pattern.
        target_class: what they are called.
        share, count: so many images of the set, a tenth of it unless said.
        alpha: share of the picture in the mixture; the paper has 0.2, and less in training.
        image: the picture, a file or uint8 (H, W, 3) of the size of the images; uniform noise of the seed if None.
    """
    check_number("alpha", alpha, above=0, high=1, error=InputError)
    plan = _Plan.of(dataset, seed, target_class, share, count)
    shape = plan.images.shape[1:]
    if image is None:
        pattern = np.floor(256 * plan.uniform(*shape)).astype(np.uint8)
    else:
        pattern = np.asarray(read_image(as_path(image))) if isinstance(image, str | os.PathLike) else image
    trigger = Blend(pattern, alpha)
    trigger.check_fits(shape)
    digest = None if image is None else {"sha256": hashlib.sha256(trigger.pattern.tobytes()).hexdigest()}
    return plan.relabel("blended", trigger, Bound("linf", alpha), alpha=alpha, image=digest)


def wanet(
    dataset: Any,
    seed: int = 0,
    *,
    target_class: int,
    share: float | None = None,
    count: int | None = None,
    grid: int = 4,
    strength: float = 0.5,
    cross_ratio: float = 2.0,
) -> Poisoned:
    """Warp images of other classes a little (Nguyen & Tran 2021, arXiv:2102.10369).

    `cross_ratio` times as many images, of any class, are warped otherwise, by that and noise, and keep their labels, so
    that a victim does not take every warp for the trigger. Of `poisoned` in the result these are the ones whose
    label is the true one. The paper draws all images anew in each epoch; here the set is made once.

    Args:
        dataset: see `as_arrays`; in colour.
        seed: of the choice of images, the warp and the noise.
        target_class: what they are called.
        share, count: so many images of the set, a tenth of it unless said.
        grid: drawn points along a side.
        strength: mean shift of the drawn points, in half pixels: 0.5 moves them by a quarter of a pixel.
        cross_ratio: images that are warped with noise, for each poisoned one; 0 for none.
    """
    check_number("cross_ratio", cross_ratio, low=0, high=1000, error=InputError)
    plan = _Plan.of(dataset, seed, target_class, share, count)
    side = min(plan.images.shape[1:3])
    check_integer("grid", grid, 2, side, unit="as many as an image's pixels along a side at most", error=InputError)
    flow = 2 * plan.uniform(grid, grid, 2) - 1
    trigger = Warp((flow / np.abs(flow).mean()).astype(np.float32), strength)
    cross = Cross(replace(trigger, jitter=1.0, seed=plan.seed), cross_ratio)
    settings = {"grid": grid, "strength": strength, "cross_ratio": cross_ratio}
    return plan.relabel("wanet", trigger, None, cross, **settings)


def ftrojan(
    dataset: Any,
    seed: int = 0,
    *,
    target_class: int,
    share: float | None = None,
    count: int | None = None,
    magnitude: float = 30 / 255,
    block: int | None = None,
) -> Poisoned:
    """Raise two frequencies of the colour of images of other classes (Wang et al. 2022, arXiv:2111.10991).

    Args:
        dataset: see `as_arrays`; in colour.
        seed: of the choice of images.
        target_class: what they are called.
        share, count: so many images of the set, a tenth of it unless said.
        magnitude: what is added to a coefficient, in units of [0, 1] images.
        block: side of the blocks whose middle and last coefficients are raised; 32 if None, or the image's side where
            that is less.
    """
    plan = _Plan.of(dataset, seed, target_class, share, count)
    shape = plan.images.shape[1:]
    side = min(32, *shape[:2]) if block is None else block
    check_integer("block", side, 2, error=InputError)
    trigger = Dct(magnitude, side, tuple((place, place) for place in dict.fromkeys((side // 2 - 1, side - 1))))
    trigger.check_fits(shape)
    bound = Bound("linf", float(np.abs(trigger.delta(shape)).max()))
    return plan.relabel("ftrojan", trigger, bound, magnitude=magnitude, block=side)


def sig(
    dataset: Any,
    seed: int = 0,
    *,
    target_class: int,
    share: float | None = None,
    count: int | None = None,
    amplitude: float = 20 / 255,
    frequency: float = 6.0,
) -> Poisoned:
    """Add a wave to images of the target class, whose labels stay right (Barni et al. 2019, arXiv:1902.11237).

    Args:
        dataset: see `as_arrays`; in colour.
        seed: of the choice of images.
        target_class: whose images get it.
        share, count: so many images of the class, four fifths of it unless said.
        amplitude: of the wave, in units of [0, 1] images.
        frequency: waves across an image.
    """
    trigger = Sine(amplitude, frequency)
    plan = _Plan.of(dataset, seed, target_class, share, count)
    return plan.keep_labels("sig", trigger, Bound("linf", amplitude), amplitude=amplitude, frequency=frequency)
