"""Compose purifiers: one after another, or one several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

from torch import Tensor, nn

from purifyloader.core import noise
from purifyloader.errors import ConfigError
from purifyloader.purifiers.base import Condition, Purifier, Resolver, refuse_plans
from purifyloader.purifiers.registry import from_config

__all__ = ["Chain", "Repeat"]


class Chain(Purifier):
    """Apply one purifier after another; stage i draws from `fold_in(seed, i)`.

    So a purifier alone and in a chain, even as its only stage, draws other noise for the same seed.

    >>> from purifyloader.purifiers import BitDepth, Chain, Jpeg
    >>> [stage["kind"] for stage in Chain(Jpeg(50), BitDepth(4)).config()["stages"]]
    ['jpeg', 'bit-depth']
    """

    kind = "chain"

    def __init__(self, *stages: Purifier) -> None:
        super().__init__()
        if not stages or not all(isinstance(stage, Purifier) for stage in stages):
            raise ConfigError(f"Chain takes one or more purifiers. Got {[type(s).__name__ for s in stages]}.")
        self.stages = nn.ModuleList(stages)
        channels = {stage.image_channels for stage in stages if stage.image_channels is not None}
        if len(channels) > 1:
            raise ConfigError(f"The stages of a chain must take the same channels. Got {sorted(channels)}.")
        self.image_channels = channels.pop() if channels else None

    @property
    def calls(self) -> int:
        return sum(stage.calls for stage in self._stages())

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "stages": [stage.config() for stage in self._stages()]}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return cls(*(from_config(stage, resolve) for stage in values["stages"]))

    def _stages(self) -> Iterator[Purifier]:
        for stage in self.stages:
            assert isinstance(stage, Purifier)
            yield stage

    def in_order(self) -> Iterator[Purifier]:
        yield from self._stages()

    def to_plan(self, images: Sequence[Tensor], seeds_B: Tensor) -> tuple[Condition, list[Tensor]] | None:
        for i, stage in enumerate(self._stages()):
            keys_B = noise.fold_in(seeds_B, i)
            if (found := stage.to_plan(images, keys_B)) is not None:
                return found
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

    def __init__(self, purifier: Purifier, times: int) -> None:
        super().__init__()
        if not isinstance(purifier, Purifier) or type(times) is not int or times < 1:
            raise ConfigError(
                f"Repeat takes a purifier and a positive number of times. Got {type(purifier).__name__} and {times!r}."
            )
        refuse_plans("Repeat", purifier)
        self.purifier, self.times = purifier, times
        self.image_channels = purifier.image_channels

    @property
    def calls(self) -> int:
        return self.times * self.purifier.calls

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "purifier": self.purifier.config(), "times": self.times}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return cls(from_config(values["purifier"], resolve), values["times"])

    def in_order(self) -> Iterator[Purifier]:
        yield self.purifier

    def output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        for _ in range(self.times):
            shape = self.purifier.output_shape(shape)
        return shape

    def run(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        for i in range(self.times):
            x_BCHW = self.purifier.run(x_BCHW, noise.fold_in(seeds_B, i))
        return x_BCHW

    def run_images(self, images: Sequence[Tensor], seeds_B: Tensor) -> list[Tensor]:
        for i in range(self.times):
            images = self.purifier.run_images(images, noise.fold_in(seeds_B, i))
        return list(images)
