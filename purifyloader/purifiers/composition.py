"""Compose purifiers: one after another, one several times, one for some of the images, one for images of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn

from purifyloader.core import limits, noise, sizes
from purifyloader.core.checks import check_integer
from purifyloader.errors import ConfigError
from purifyloader.purifiers.base import (
    Condition,
    Purifier,
    Resolver,
    common_channels,
    condition_from_config,
    extent,
    from_config,
    refuse_plans,
)

__all__ = ["Chain", "Repeat", "Resize", "Tiles", "Where"]


class Chain(Purifier):
    """Apply one purifier after another; stage i draws from `fold_in(seed, i)`, even if it is the only one.

    >>> from purifyloader.purifiers import BitDepth, Chain, Jpeg
    >>> [stage["kind"] for stage in Chain(Jpeg(50), BitDepth(4)).config()["stages"]]
    ['jpeg', 'bit-depth']
    """

    kind = "chain"

    def __init__(self, *stages: Purifier) -> None:
        super().__init__()
        if not stages or not all(isinstance(stage, Purifier) for stage in stages):
            raise ConfigError(f"Chain takes one or more purifiers. Got {[type(s).__name__ for s in stages]}.")
        self._extent = extent("Chain", stages)
        self.stages = nn.ModuleList(stages)
        self.image_channels = common_channels("Chain", *stages)

    @property
    def calls(self) -> int:
        return sum(stage.calls for stage in self._stages())

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "stages": [stage.config() for stage in self._stages()]}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        stages = values.pop("stages")
        if values or not isinstance(stages, list | tuple):
            raise ConfigError(f"A chain has a list of stages, and nothing else. Got {stages!r:.80} and {list(values)}.")
        return cls(*(from_config(stage, resolve) for stage in stages))

    def _stages(self) -> Iterator[Purifier]:
        for stage in self.stages:
            assert isinstance(stage, Purifier)
            yield stage

    def in_order(self) -> Iterator[Purifier]:
        yield from self._stages()

    def to_plan(self, images: Sequence[Tensor], seeds_B: Tensor) -> tuple[Condition, list[Tensor]] | None:
        for i, stage in enumerate(self._stages()):
            keys_B = noise.fold_in(seeds_B, i)
            if (waiting := stage.to_plan(images, keys_B)) is not None:
                return waiting
            images = stage.run_images(images, keys_B)
        return None

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        for stage in self._stages():
            shape = stage.output_shape(shape)
        return shape

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        for i, stage in enumerate(self._stages()):
            x_BCHW = stage.run(x_BCHW, noise.fold_in(seeds_B, i))
        return x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        for i, stage in enumerate(self._stages()):
            images = stage.run_images(images, noise.fold_in(seeds_B, i))
        return list(images)


class Repeat(Purifier):
    """Apply the same purifier several times; repetition i draws from `fold_in(seed, i)`.

    >>> from purifyloader.purifiers import Jpeg, Repeat
    >>> Repeat(Jpeg(50), 3).config()["times"]
    3
    """

    kind = "repeat"
    options = ("purifier", "times")

    def __init__(self, purifier: Purifier, times: int) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier) or type(times) is not int or times < 1:
            raise ConfigError(
                f"Repeat takes a purifier and a positive number of times. Got {type(purifier).__name__} and {times!r}."
            )
        refuse_plans("Repeat", purifier)
        self._extent = extent("Repeat", [purifier], times)
        self.purifier, self.times = purifier, times
        self.image_channels = purifier.image_channels

    @property
    def calls(self) -> int:
        return self.times * self.purifier.calls

    def in_order(self) -> Iterator[Purifier]:
        yield self.purifier

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        for _ in range(self.times):
            before, shape = shape, self.purifier.output_shape(shape)
            if shape == before:  # and so on
                break
        return shape

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        for i in range(self.times):
            x_BCHW = self.purifier.run(x_BCHW, noise.fold_in(seeds_B, i))
        return x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        for i in range(self.times):
            images = self.purifier.run_images(images, noise.fold_in(seeds_B, i))
        return list(images)


class Resize(Purifier):
    """Bring images of any size to the size that a model was trained for: the one purifier that changes shapes.

    Antialiased bilinear, image by image; an image that has the size already passes unchanged. `size` is that of the
    shorter side, in pixels; the aspect is kept, the longer side rounded down (torchvision). `crop`, at most `size`,
    also cuts out the central crop x crop pixels, so that all images have one shape.

    >>> from purifyloader.purifiers import Resize
    >>> Resize(32, crop=32).output_shape((3, 100, 80))
    (3, 32, 32)
    """

    kind = "resize"
    options = ("size", "crop")

    def __init__(self, size: int, crop: int | None = None) -> None:
        super().__init__()
        sizes.check_resize(size, crop)
        self.size, self.crop = size, crop

    def noise_first(self) -> float | str:
        return "which changes how far images are apart: resize the data set beforehand, and certify what comes of it."

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return sizes.resized_shape(shape, self.size, self.crop)

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        images = self.run_images(x_BCHW.unbind(), seeds_B)
        if not images:
            channels, height, width = x_BCHW.shape[1:]
            return x_BCHW.new_zeros(0, *self.output_shape((channels, height, width)))
        return torch.stack(images)

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        return [sizes.resize(image, self.size, self.crop) for image in images]


def keeps_shape(purifier: Purifier, shape: sizes.Shape) -> bool:
    """Tell whether images of `shape` keep it, whatever size they have.

    Asked by kind too: a resize to the very size of a tile would do nothing, which nobody asks for.
    """
    return purifier.output_shape(shape) == shape and not any(isinstance(part, Resize) for part in purifier.modules())


class Tiles(Purifier):
    """Apply a purifier to square tiles, at the resolution the image has, and blend them together again.

    All tiles of all images that come together are purified together, in full batches. Tile j of an image (row by row
    from the top left) draws from `fold_in(seed, j)`. Where tiles overlap they are averaged, each weighted by a ramp
    that falls linearly towards its edge; a pixel that one tile covers is exactly that tile's. The last tile of a row or
    column ends with the image, and so may overlap more. An image smaller than a tile is mirrored at its borders (its
    border repeated where it is too small for that) and cut back. Decisions about a whole image, such as whether
    `Compensation` makes it grey, belong after the tiles, not in them.

    Args:
        purifier: one that keeps shapes and has no condition over the dataset; put a `Resize` before the tiles.
        size: side of a tile, in pixels, at most 4096: the one that the model was trained for.
        overlap: pixels that neighbours share, at most half a tile; a quarter by default.

    >>> from purifyloader.purifiers import Jpeg, Tiles
    >>> Tiles(Jpeg(50), 32).overlap
    8
    """

    kind = "tiles"
    options = ("purifier", "size", "overlap")

    def __init__(self, purifier: Purifier, size: int, overlap: int | None = None) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier):
            raise ConfigError(f"Tiles takes a purifier. Got {type(purifier).__name__}.")
        if overlap is None and isinstance(size, int):
            overlap = size // 4
        check_integer("The size of a tile", size, 1, limits.TILE, unit="in pixels")
        check_integer("overlap", overlap, 0, size // 2, unit="in pixels, half a tile at most")
        if not keeps_shape(purifier, (purifier.image_channels or 3, size, size)):
            raise ConfigError(
                "Tiles takes a purifier that keeps the shape of a tile. Got one that resizes: "
                "put the Resize before, as in Chain(Resize(...), Tiles(...))."
            )
        refuse_plans("Tiles", purifier)
        self._extent = extent("Tiles", [purifier])
        assert overlap is not None
        self.purifier, self.size, self.overlap = purifier, size, overlap
        self.image_channels = purifier.image_channels

    @property
    def calls(self) -> int:
        return self.purifier.calls

    def noise_first(self) -> float | str:
        return (
            "which draw noise for each tile, so that a pixel in several of them, or mirrored at the border of a small "
            "image, has several draws: purify whole images, of the size that the model was trained for."
        )

    def in_order(self) -> Iterator[Purifier]:
        yield self
        yield self.purifier

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return torch.stack(self.run_images(x_BCHW.unbind(), seeds_B)) if len(x_BCHW) else x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        cuts = [sizes.cut(image, self.size, self.overlap) for image in images]
        place = [(row, j) for row, tiles in enumerate(cuts) for j in range(len(tiles))]
        row_T, j_T = torch.tensor(place, dtype=torch.int64, device=seeds_B.device).reshape(-1, 2).unbind(1)
        tiles = self.purifier.run_images([cuts[row][j] for row, j in place], noise.fold_in(seeds_B[row_T], j_T))
        done = iter(tiles)
        return [
            sizes.join(list(islice(done, len(own))), image.shape, self.size, self.overlap)
            for image, own in zip(images, cuts, strict=True)
        ]


_SIZE = 32  # of the image whose shape is asked for; any would do


class Where(Purifier):
    """Purify the images for which a condition holds; the others pass unchanged.

    Seeds are handed on as they are: under a condition that always holds it is, bit for bit, the bare purifier.
    `purify_with_grad` gives the gradients of the purifier, and none of the condition, which is a step.

    Args:
        condition: such as `EnergyAbove`. One with a share k needs a plan before it can run:
            `purifyloader.purified.plans.plan`; `PurifiedDataset` and `precompute` make it by themselves.
        purifier: of the same channels, one that keeps shapes and has no share k of its own; put a `Resize` before.

    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> from purifyloader.purifiers import EnergyAbove, Jpeg, Where
    >>> Where(EnergyAbove(EnergyNetwork(EnergyConfig(channels=4)), threshold=0.1), Jpeg(10)).calls
    1
    """

    kind = "where"
    options = ("condition", "purifier")
    selects = True

    def __init__(self, condition: Condition, purifier: Purifier) -> None:
        super().__init__()
        if not isinstance(condition, Condition) or not isinstance(purifier, Purifier):
            raise ConfigError(
                "Where takes a condition, such as EnergyAbove, and a purifier. Got "
                f"{type(condition).__name__} and {type(purifier).__name__}."
            )
        if not keeps_shape(purifier, (purifier.image_channels or 3, _SIZE, _SIZE)):
            raise ConfigError(
                "Where takes a purifier that keeps the shape of an image, for the others pass unchanged. Got one that "
                "resizes: put the Resize before, as in Chain(Resize(...), Where(...))."
            )
        refuse_plans("Another Where", purifier)
        self._extent = extent("Where", [purifier])
        self.image_channels = common_channels("Where", condition, purifier)
        self.condition, self.purifier = condition, purifier

    @property
    def calls(self) -> int:
        return 1 + self.purifier.calls  # the condition's own

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return super().build({**values, "condition": condition_from_config(values["condition"], resolve)}, resolve)

    def noise_first(self) -> float | str:
        return "which chooses images by how they look without noise: purify all of them, or choose after the noise."

    def in_order(self) -> Iterator[Purifier]:
        yield self
        yield self.purifier

    def to_plan(self, images: Sequence[Tensor], seeds_B: Tensor) -> tuple[Condition, list[Tensor]] | None:
        waits = self.condition.needs_plan and self.condition.planned is None
        return (self.condition, list(images)) if waits else None

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        return torch.stack(self.run_images(x_BCHW.unbind(), seeds_B)) if len(x_BCHW) else x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        rows = self.condition.holds_images(images)
        chosen = self.purifier.run_images([images[row] for row in rows], seeds_B[rows]) if rows else []
        out = list(images)
        for row, x in zip(rows, chosen, strict=True):
            out[row] = x
        return out
