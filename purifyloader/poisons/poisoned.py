"""Define what every attack and every reader gives: a poisoned training set, and all that is known of the poison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from purifyloader.core.checks import stored_integers
from purifyloader.core.images import pil_mode
from purifyloader.datasets.arrays import InMemory
from purifyloader.errors import InputError
from purifyloader.poisons.triggers import Additive, Trigger

__all__ = ["Bound", "Moved", "Poisoned", "Target"]


@dataclass(frozen=True)
class Bound:
    """A `Bound` is how far an attack may move an image.

    Attributes:
        norm: "linf", "l2" or "l0", of one image's perturbation.
        epsilon: the largest it may be, before rounding to 8 bits, in units of [0, 1] images: 8/255 for l-infinity,
            1 for AR's l2. For l0 it counts pixels: 1 for OPS.

    >>> from purifyloader.poisons import Bound
    >>> Bound("linf", 8 / 255).norm
    'linf'
    """

    norm: Literal["linf", "l2", "l0"]
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2", "l0") or not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InputError(
                "A bound is linf, l2 or l0, and a finite epsilon above 0: in units of [0, 1] images, for l0 in pixels. "
                f"Got {self.norm!r}, {self.epsilon!r}."
            )


@dataclass(frozen=True, eq=False)
class Target:
    """A `Target` is a test image, uint8 (H, W, C), that a targeted attack wants taken for another class.

    Attributes:
        label: what the victim is to call it.
        true_label: what it shows, where that is known.
        index: its place in the test set, where that is known.

    >>> import numpy as np
    >>> from purifyloader.poisons import Target
    >>> Target(np.zeros((32, 32, 3), np.uint8), label=3, true_label=5).label
    3
    """

    image: NDArray[np.uint8]
    label: int
    true_label: int | None = None
    index: int | None = None


class Moved(NamedTuple):
    """`Moved` is how far a poisoned set is from the clean one, in levels of 0 to 255, over the poisoned images.

    Attributes:
        images: how many differ from the clean ones at all.
        linf: largest difference of a channel of a pixel.
        l2_mean, l2_max: of an image's perturbation.
        mean: signed mean difference over the images that differ.
        down: share of the values that differ which became smaller: near 0 or 1 where a sign was lost.
        pixels: most pixels of an image that differ.

    >>> import numpy as np
    >>> from purifyloader.poisons import Poisoned
    >>> clean = np.zeros((2, 8, 8, 3), np.uint8)
    >>> Poisoned.of(clean + np.uint8(4), [0, 1], "brighter").moved(clean).linf
    4
    """

    images: int
    linf: int
    l2_mean: float
    l2_max: float
    mean: float
    down: float
    pixels: int


@dataclass(frozen=True, eq=False)
class Poisoned(InMemory):
    """A `Poisoned` is a poisoned training set in memory: a map-style dataset of (PIL image, label).

    It goes wherever a torchvision dataset goes: `PurifiedDataset(poisoned, purifier, transform=...)`.

    Attributes:
        images: uint8 (N, H, W, C), C 1 or 3.
        labels: int64 (N,), from 0: what a victim is told.
        poisoned: int64 (P,), rising: which images are poisoned.
        bound: of the perturbation, where the attack has one.
        trigger: of a back door; an array, float (H, W, C) in units of [0, 1] images, becomes `Additive`.
        target_class: of a back door: what the trigger stands for.
        settings: what the attack was made with, or the file that was read; JSON values.
        true_labels: int64 (N,), what the images show, where some labels are wrong; None where the labels are right, as
            far as is known.

    >>> import numpy as np
    >>> from purifyloader.poisons import Poisoned
    >>> poisoned = Poisoned.of(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], "none", poisoned=[])
    >>> image, label = poisoned[1]
    >>> image.size, label
    ((8, 8), 1)
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    poisoned: NDArray[np.int64]
    attack: str
    bound: Bound | None = None
    target: Target | None = None
    trigger: Trigger | None = None
    target_class: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    true_labels: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        images, labels, poisoned = self.images, self.labels, self.poisoned
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
            raise InputError(f"images must be uint8 (N, H, W, 1 or 3). Got {images.dtype} {images.shape}.")
        for name, values in (("labels", labels), ("true_labels", self.true_labels)):
            if values is not None and (values.dtype != np.int64 or values.shape != (len(images),) or values.min() < 0):
                raise InputError(
                    f"{name} must be int64 ({len(images)},), from 0: one an image. Got {values.dtype} {values.shape}."
                )
        rising = poisoned.dtype == np.int64 and poisoned.ndim == 1 and bool((np.diff(poisoned) > 0).all())
        if not rising or (len(poisoned) and not 0 <= poisoned[0] <= poisoned[-1] < len(images)):
            raise InputError(
                f"poisoned must be rising int64 indices of the {len(images)} images. Got {poisoned.dtype} "
                f"{poisoned.shape}."
            )
        trigger: Any = self.trigger
        if trigger is not None:
            trigger = trigger if isinstance(trigger, Trigger) else Additive(trigger)
            trigger.check_fits(images.shape[1:])
            object.__setattr__(self, "trigger", trigger)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.images[index]
        height, width, channels = image.shape
        return Image.frombytes(pil_mode(channels), (width, height), image.tobytes()), int(self.labels[index])

    @property
    def targets(self) -> list[int]:
        """The labels, under the name that torchvision's datasets have for them."""
        return [int(label) for label in self.labels]

    @property
    def shown_labels(self) -> NDArray[np.int64]:
        """What the images show: the true labels where they are known, else the labels."""
        return self.labels if self.true_labels is None else self.true_labels

    def only(self, places: NDArray[np.int64]) -> Self:
        """Keep the images at these places, in their order."""
        return replace(
            self,
            images=self.images[places],
            labels=self.labels[places],
            poisoned=np.flatnonzero(np.isin(places, self.poisoned)),
            true_labels=None if self.true_labels is None else self.true_labels[places],
        )

    def moved(self, clean: NDArray[np.uint8]) -> Moved:
        """Compare with the clean images, uint8 (N, H, W, C) in the same order."""
        if clean.dtype != np.uint8 or clean.shape != self.images.shape:
            raise InputError(
                f"The clean images must be uint8 {self.images.shape}, in the order of the poisoned. Got "
                f"{clean.dtype} {clean.shape}."
            )
        linf = count = below = differing = pixels = 0
        total = total_values = 0.0
        lengths: list[NDArray[np.float64]] = []
        for start in range(0, len(clean), 1024):
            part = slice(start, start + 1024)
            delta = self.images[part].astype(np.int16) - clean[part]
            rows = delta.reshape(len(delta), -1)
            changed = (rows != 0).any(axis=1)
            rows = rows[changed]
            if not len(rows):
                continue
            linf = max(linf, int(np.abs(rows).max()))
            pixels = max(pixels, int((delta != 0).any(axis=3).sum(axis=(1, 2)).max()))
            count += len(rows)
            below += int((rows < 0).sum())
            differing += int((rows != 0).sum())
            total += float(rows.sum())
            total_values += rows.size
            lengths.append(np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1)))
        if not count:
            return Moved(0, 0, 0.0, 0.0, 0.0, 0.0, 0)
        length = np.concatenate(lengths)
        mean, down = total / total_values, below / differing
        return Moved(count, linf, float(length.mean()), float(length.max()), mean, down, pixels)

    @classmethod
    def of(
        cls,
        images: NDArray[np.uint8],
        labels: Sequence[int] | NDArray[Any],
        attack: str,
        poisoned: Sequence[int] | NDArray[Any] | None = None,
        **known: Any,
    ) -> Self:
        """Make one of arrays of any integer type; all images are poisoned if `poisoned` is None."""
        which = np.arange(len(images)) if poisoned is None else np.sort(np.asarray(poisoned))
        given = np.asarray(labels)
        if given.dtype.kind in "uO":  # those of 64 bits and more
            given = stored_integers("A label", given)
        return cls(images, given.astype(np.int64), which.astype(np.int64), attack, **known)
