"""Describe triggers of back doors: pure functions of an image and its index. For testing defences.

A trigger is a frozen dataclass of numbers, which are JSON, and of one array at most. `KINDS` is the closed list of
kinds from which `Trigger.from_dict` builds one. All arithmetic is elementwise and in a fixed order, so that an image
gets the same pixels in any batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purifyloader.core import noise
from purifyloader.core.checks import check_choice, check_integer, check_number, shown
from purifyloader.core.images import quantize
from purifyloader.errors import InputError

__all__ = ["KINDS", "Additive", "Blend", "Dct", "Patch", "Sine", "Trigger", "Warp"]

_VALUES = 2**20  # pixel values that get a trigger together, which bounds memory
_MOST = 1000  # of a number that pixels are multiplied by or moved with, far beyond any attack
_JITTER = 0x6A697472  # "jitr"

Shape = tuple[int, int, int]  # (H, W, C)


def _array(dtype: type[np.generic], *axes: str) -> dict[str, Any]:
    """Declare a field as an array of a trigger; an axis named C has 1 or 3 channels."""
    return {"dtype": np.dtype(dtype), "axes": axes}


@dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A `Trigger` is what a back door puts into an image: `trigger(images, indices)`.

    >>> import numpy as np
    >>> from purifyloader.poisons.triggers import Trigger
    >>> trigger = Trigger.from_dict({"kind": "sine", "amplitude": 0.2, "frequency": 2}, {})
    >>> trigger(np.full((1, 1, 8, 1), 100, np.uint8), [0])[0, 0, :, 0]
    array([100, 151, 100,  49, 100, 151, 100,  49], dtype=uint8)
    """

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata:
                array = _as_payload(f"{each.name} of a trigger of the kind {self.kind}", getattr(self, each.name), each)
                object.__setattr__(self, each.name, array)
        self._check()

    def __call__(self, images: NDArray[np.uint8], indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the images, uint8 (N, H, W, C), with the trigger, rounded to 8 bits.

        Args:
            indices: integers (N,) from 0: the place of each image in its dataset, of which random triggers are drawn.

        Raises:
            InputError: images or indices of another type or shape, or images that the trigger does not fit.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise InputError(f"images must be uint8 (N, H, W, C), at least one. Got {got}.")
        index = np.asarray(indices)
        if index.dtype.kind not in "iu" or index.shape != (len(images),) or index.min() < 0:
            raise InputError(
                f"indices must be {len(images)} integers from 0, one an image. Got {index.dtype} {index.shape}."
            )
        self.check_fits(images.shape[1:])
        out = np.empty_like(images)
        step = max(1, _VALUES // images[0].size)
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            x_BHWC = torch.from_numpy(images[part].astype(np.float32)) / 255
            out[part] = quantize(self.move(x_BHWC, torch.from_numpy(index[part].astype(np.int64)))).numpy()
        return out

    @abstractmethod
    def move(self, x_BHWC: Tensor, index_B: Tensor) -> Tensor:
        """Put the trigger into float32 images in [0, 1] that it fits; the result is neither clamped nor rounded."""

    @abstractmethod
    def check_fits(self, shape: Sequence[int]) -> None:
        """Refuse images of a shape (H, W, C) that cannot have the trigger."""

    @abstractmethod
    def _check(self) -> None:
        """Refuse values that no trigger of this kind has."""

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of the trigger, by name; they are read-only."""
        return {name: getattr(self, name) for name in self.array_names()}

    @classmethod
    def array_names(cls) -> tuple[str, ...]:
        return tuple(each.name for each in fields(cls) if each.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Describe the trigger in JSON values, without its arrays."""
        numbers = {each.name: getattr(self, each.name) for each in fields(self) if not each.metadata}
        return {"kind": self.kind, **{name: _as_json(value) for name, value in numbers.items()}}

    @staticmethod
    def from_dict(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> Trigger:
        """Build a trigger from what `to_dict` and `arrays` gave.

        Raises:
            InputError: no such kind, values or arrays that it does not have, or that are missing, or bad ones.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str) or values["kind"] not in KINDS:
            raise InputError(f"A trigger has a kind, one of {', '.join(KINDS)}. Got {shown(values, 200)}.")
        cls = KINDS[values["kind"]]
        given = {name: value for name, value in values.items() if name != "kind"}
        names = {each.name for each in fields(cls)}
        needed = {"arrays": {*cls.array_names()}, "values": names - {*cls.array_names()}}
        for what, got in (("arrays", arrays), ("values", given)):
            if got.keys() != needed[what]:
                raise InputError(
                    f"A trigger of the kind {cls.kind} has the {what} {', '.join(sorted(needed[what])) or '(none)'}. "
                    f"Got {', '.join(sorted(map(str, got))) or 'none'}."
                )
        return cls(**given, **arrays)


def _as_json(value: Any) -> Any:
    return [_as_json(each) for each in value] if isinstance(value, tuple) else value


def _as_payload(name: str, value: Any, declared: Any) -> NDArray[Any]:
    """Return a read-only copy of an array that is as declared."""
    dtype, axes = declared.metadata["dtype"], declared.metadata["axes"]
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    fits = isinstance(array, np.ndarray) and array.dtype.kind == dtype.kind and array.ndim == len(axes)
    if not fits or (dtype.kind == "u" and array.dtype != dtype) or 0 in array.shape:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{name} must be {dtype} ({', '.join(axes)}). Got {got}.")
    if axes[-1] == "C" and array.shape[-1] not in (1, 3):
        raise InputError(f"{name} must have 1 or 3 channels, the last axis. Got {array.shape}.")
    copy = np.array(array, dtype, order="C")
    if dtype.kind == "f" and not np.isfinite(copy).all():
        raise InputError(f"{name} must be finite numbers. Got NaN or infinity.")
    copy.setflags(write=False)
    return copy


def _as_tensor(array: NDArray[Any], x: Tensor) -> Tensor:
    return torch.tensor(array, device=x.device)  # a copy, as torch warns of arrays that it must not write


def _same_shape(trigger: NDArray[Any], shape: Sequence[int]) -> None:
    if trigger.shape != tuple(shape):
        raise InputError(
            f"A trigger must have the shape of an image, {tuple(shape)}. Got {trigger.shape}: make one of that size."
        )


@dataclass(frozen=True, eq=False)
class Additive(Trigger):
    """Add an array, times a strength: Narcissus' trigger, and the corners of label-consistent.

    Attributes:
        delta: float32 (H, W, C), in units of [0, 1] images.
        strength: what it is multiplied by; Narcissus tests with 3.

    >>> import numpy as np
    >>> from purifyloader.poisons.triggers import Additive
    >>> Additive(np.full((1, 2, 1), 8 / 255, np.float32), strength=2.0)(np.zeros((1, 1, 2, 1), np.uint8), [0]).max()
    np.uint8(16)
    """

    kind: ClassVar[str] = "additive"
    delta: NDArray[np.float32] = field(repr=False, metadata=_array(np.float32, "H", "W", "C"))
    strength: float = 1.0

    def _check(self) -> None:
        check_number("strength", self.strength, low=-_MOST, high=_MOST, error=InputError)

    def check_fits(self, shape: Sequence[int]) -> None:
        _same_shape(self.delta, shape)

    def move(self, x_BHWC: Tensor, index_B: Tensor) -> Tensor:
        return x_BHWC + self.strength * _as_tensor(self.delta, x_BHWC)


Corner = Literal["upper-left", "upper-right", "lower-left", "lower-right"]


@dataclass(frozen=True, eq=False)
class Patch(Trigger):
    """Replace a rectangle of pixels: BadNets.

    Attributes:
        pixels: uint8 (h, w, C).
        position: a corner, or (row, column) of the upper left pixel.

    >>> import numpy as np
    >>> from purifyloader.poisons.triggers import Patch
    >>> Patch(np.full((1, 2, 1), 255, np.uint8))(np.zeros((1, 2, 3, 1), np.uint8), [0])[0, :, :, 0]
    array([[  0,   0,   0],
           [  0, 255, 255]], dtype=uint8)
    """

    kind: ClassVar[str] = "patch"
    pixels: NDArray[np.uint8] = field(repr=False, metadata=_array(np.uint8, "h", "w", "C"))
    position: Corner | tuple[int, int] = "lower-right"

    def _check(self) -> None:
        if isinstance(self.position, str):
            check_choice("position", self.position, get_args(Corner), error=InputError)
        else:
            object.__setattr__(self, "position", _as_pair("position", self.position))

    def _upper_left(self, shape: Sequence[int]) -> tuple[int, int]:
        if not isinstance(self.position, str):
            return self.position
        height, width, _ = self.pixels.shape
        vertical, _, horizontal = self.position.partition("-")
        return (shape[0] - height) * (vertical == "lower"), (shape[1] - width) * (horizontal == "right")

    def check_fits(self, shape: Sequence[int]) -> None:
        height, width, channels = self.pixels.shape
        row, column = self._upper_left(shape)
        if channels != shape[2] or min(row, column) < 0 or row + height > shape[0] or column + width > shape[1]:
            raise InputError(
                f"A patch must lie within an image, {tuple(shape)}, and have its channels. Got one of "
                f"{self.pixels.shape} at {self.position}: make it smaller, or move it."
            )

    def move(self, x_BHWC: Tensor, index_B: Tensor) -> Tensor:
        height, width, _ = self.pixels.shape
        row, column = self._upper_left(x_BHWC.shape[1:])
        out = x_BHWC.clone()
        out[:, row : row + height, column : column + width] = _as_tensor(self.pixels, x_BHWC) / 255
        return out


@dataclass(frozen=True, eq=False)
class Blend(Trigger):
    """Mix with a picture: (1 - alpha) image + alpha pattern (Chen et al. 2017, arXiv:1712.05526).

    Attributes:
        pattern: uint8 (H, W, C).
        alpha: share of the pattern, above 0 and at most 1.

    >>> import numpy as np
    >>> from purifyloader.poisons.triggers import Blend
    >>> Blend(np.full((1, 1, 3), 200, np.uint8), alpha=0.25)(np.zeros((1, 1, 1, 3), np.uint8), [0]).max()
    np.uint8(50)
    """

    kind: ClassVar[str] = "blend"
    pattern: NDArray[np.uint8] = field(repr=False, metadata=_array(np.uint8, "H", "W", "C"))
    alpha: float = 0.2

    def _check(self) -> None:
        check_number("alpha", self.alpha, above=0, high=1, error=InputError)

    def check_fits(self, shape: Sequence[int]) -> None:
        _same_shape(self.pattern, shape)

    def move(self, x_BHWC: Tensor, index_B: Tensor) -> Tensor:
        return (1 - self.alpha) * x_BHWC + self.alpha * (_as_tensor(self.pattern, x_BHWC) / 255)


@dataclass(frozen=True, eq=False)
class Sine(Trigger):
    """Add a wave along the rows, amplitude sin(2 pi frequency column / W): SIG (Barni et al. 2019, arXiv:1902.11237).

    Attributes:
        amplitude: above 0, in units of [0, 1] images.
        frequency: waves across the image, fewer than one in two pixels.

    >>> import numpy as np
    >>> from purifyloader.poisons.triggers import Sine
    >>> Sine(amplitude=20 / 255, frequency=1)(np.full((1, 1, 4, 1), 100, np.uint8), [0])[0, 0, :, 0]
    array([100, 120, 100,  80], dtype=uint8)
    """

    kind: ClassVar[str] = "sine"
    amplitude: float
    frequency: float

    def _check(self) -> None:
        check_number("amplitude", self.amplitude, above=0, high=1, error=InputError)
        check_number("frequency", self.frequency, above=0, error=InputError)

    def check_fits(self, shape: Sequence[int]) -> None:
        if 2 * self.frequency >= shape[1]:
            raise InputError(
                f"frequency must be below half of the image's {shape[1]} columns, as a wave needs more than two. Got "
                f"{self.frequency}."
            )

    def move(self, x_BHWC: Tensor, index_B: Tensor) -> Tensor:
        width = x_BHWC.shape[2]
        column = np.arange(width, dtype=np.float64)
        wave = self.amplitude * np.sin(2 * math.pi * self.frequency * column / width)
        return x_BHWC + _as_tensor(wave.astype(np.float32), x_BHWC)[:, None]


@dataclass(frozen=True, eq=False)
class Warp(Trigger):
    """Move pixels by a smooth flow: WaNet (Nguyen & Tran 2021, arXiv:2102.10369).

    The flow is enlarged to the image (bicubic, corner to corner). Pixels are taken from where it points, where an
    image spans [-1, 1]: position + strength * flow / H, and `jitter` * U(-1, 1) / H more for each pixel of each image.
    They are interpolated linearly; beyond the border is the border.

    Attributes:
        flow: float32 (k, k, 2), how far down and to the right.
        strength: what the flow is multiplied by.
        jitter: the published "noise mode" has 1, which is no trigger but keeps a victim from taking any warp for one.
        seed: of the jitter.

    >>> import numpy as np
    >>> from purifyloader.poisons.triggers import Warp
    >>> down = Warp(np.full((2, 2, 2), [1, 0], np.float32), strength=3.0)
    >>> down(np.array([[10, 20], [30, 40], [50, 60]], np.uint8)[None, :, :, None], [0])[0, :, :, 0]
    array([[30, 40],
           [50, 60],
           [50, 60]], dtype=uint8)
    """

    kind: ClassVar[str] = "warp"
    flow: NDArray[np.float32] = field(repr=False, metadata=_array(np.float32, "k", "k", "2"))
    strength: float = 0.5
    jitter: float = 0.0
    seed: int = 0

    def _check(self) -> None:
        rows, columns, axes = self.flow.shape
        if rows != columns or rows < 2 or axes != 2:
            raise InputError(f"flow of a warp must be (k, k, 2), with k of 2 or more. Got {self.flow.shape}.")
        check_number("strength", self.strength, above=0, high=_MOST, error=InputError)
        check_number("jitter", self.jitter, low=0, high=_MOST, error=InputError)
        check_integer("seed", self.seed, -(2**63), 2**64 - 1, error=InputError)

    def check_fits(self, shape: Sequence[int]) -> None:
        if len(self.flow) > min(shape[:2]):
            raise InputError(
                f"flow of a warp must be no larger than an image, {tuple(shape[:2])}. Got {self.flow.shape[:2]}: "
                "draw a coarser one."
            )

    def move(self, x_BHWC: Tensor, index_B: Tensor) -> Tensor:
        count, height, width, _ = x_BHWC.shape
        x = x_BHWC.to(torch.float64)
        small = _as_tensor(self.flow, x).to(torch.float64).permute(2, 0, 1)[None]
        large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=True)
        places = torch.stack(torch.meshgrid(_span(height, x), _span(width, x), indexing="ij"))
        grid = (places + self.strength * large / height).clamp(-1, 1)  # (1, 2, H, W)
        if self.jitter:
            keys = noise.fold_in(noise.fold_in(noise.key_from_seed(self.seed), _JITTER).to(index_B.device), index_B)
            drawn = 2 * noise.uniform(keys, (2, height, width)).to(x.device) - 1
            grid = (grid + self.jitter * drawn / height).clamp(-1, 1)  # (B, 2, H, W)
        row, column = ((grid[:, axis] + 1) / 2 * (side - 1) for axis, side in enumerate((height, width)))
        above, left = row.floor().to(torch.int64), column.floor().to(torch.int64)
        below, right = (above + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
        down, across = (row - above)[..., None], (column - left)[..., None]
        image = torch.arange(count, device=x.device)[:, None, None]
        upper = (1 - across) * x[image, above, left] + across * x[image, above, right]
        lower = (1 - across) * x[image, below, left] + across * x[image, below, right]
        return (1 - down) * upper + down * lower


def _span(side: int, x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, side, dtype=torch.float64, device=x.device)


@dataclass(frozen=True, eq=False)
class Dct(Trigger):
    """Raise a few frequencies of the colour: FTrojan (Wang et al. 2022, arXiv:2111.10991).

    In each block of the image `magnitude` is added to coefficients of the orthonormal DCT of both colour differences
    of YCrCb, Cr = 0.713 (R - Y) and Cb = 0.564 (B - Y). All of that is linear, so that it is the same pattern for every
    image. The authors' code rounds to 8 bits between the steps, by cutting off; here only the end is rounded.

    Attributes:
        magnitude: above 0, in units of [0, 1] images; the published 30 is 30/255.
        block: side of a block; both sides of an image must be multiples of it.
        positions: (row, column) of each coefficient; published are the middle and the last one.

    >>> import numpy as np
    >>> from purifyloader.poisons.triggers import Dct
    >>> Dct(magnitude=40 / 255, block=2, positions=((1, 1),))(np.full((1, 2, 2, 3), 100, np.uint8), [0])[0, 0]
    array([[128,  79, 135],
           [ 72, 121,  65]], dtype=uint8)
    """

    kind: ClassVar[str] = "dct"
    magnitude: float
    block: int
    positions: tuple[tuple[int, int], ...]

    def _check(self) -> None:
        check_number("magnitude", self.magnitude, above=0, high=_MOST, error=InputError)
        check_integer("block", self.block, 2, error=InputError)
        listed = isinstance(self.positions, list | tuple) and len(self.positions) > 0
        pairs = tuple(_as_pair("positions", each) for each in self.positions) if listed else ()
        if not pairs or len({*pairs}) != len(pairs) or max(map(max, pairs)) >= self.block:
            raise InputError(
                f"positions must be different (row, column) within a block of {self.block}. Got "
                f"{shown(self.positions)}."
            )
        object.__setattr__(self, "positions", pairs)

    def check_fits(self, shape: Sequence[int]) -> None:
        if shape[2] != 3 or shape[0] % self.block or shape[1] % self.block:
            raise InputError(
                f"A trigger of the kind dct is for colour images whose sides are multiples of its block, {self.block}. "
                f"Got {tuple(shape)}: take a block that divides both sides."
            )

    def move(self, x_BHWC: Tensor, index_B: Tensor) -> Tensor:
        return x_BHWC + _as_tensor(self.delta(x_BHWC.shape[1:]), x_BHWC)

    def delta(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return what is added to an image of a shape (H, W, 3), in units of [0, 1] images."""
        place = np.arange(self.block)
        pattern = np.zeros((self.block, self.block))
        for row, column in self.positions:
            down, across = (
                np.cos((2 * place + 1) * k * math.pi / (2 * self.block)) * math.sqrt((2 if k else 1) / self.block)
                for k in (row, column)
            )
            pattern += self.magnitude * down[:, None] * across
        red, blue = 1 / 0.713, 1 / 0.564
        green = -(0.299 * red + 0.114 * blue) / 0.587  # so that Y stays
        tiled = np.tile(pattern, (shape[0] // self.block, shape[1] // self.block))
        return (tiled[:, :, None] * np.array([red, green, blue])).astype(np.float32)


def _as_pair(name: str, value: Any) -> tuple[int, int]:
    pair = value if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(type(each) is int and 0 <= each < 2**31 for each in pair):
        raise InputError(f"{name} must be (row, column), integers from 0. Got {shown(value)}.")
    return pair[0], pair[1]


KINDS: Mapping[str, type[Trigger]] = MappingProxyType(
    {cls.kind: cls for cls in (Additive, Patch, Blend, Sine, Warp, Dct)}
)
"""Every kind of trigger there is, by name."""
