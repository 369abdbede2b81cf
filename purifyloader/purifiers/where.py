"""Purify only some of the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from purifyloader.errors import ConfigError
from purifyloader.purifiers.base import Condition, Purifier, Resolver, refuse_plans
from purifyloader.purifiers.registry import condition_from_config, from_config
from purifyloader.purifiers.shapes import keeps_shape

__all__ = ["Where"]

_SIZE = 32  # of the image whose shape is asked for; any would do


class Where(Purifier):
    """Purify the images for which a condition holds; the others pass unchanged.

    Seeds are handed on as they are: under a condition that always holds it is, bit for bit, the bare purifier.
    `purify_with_grad` gives the gradients of the purifier, and none of the condition, which is a step.

    Args:
        condition: such as `EnergyAbove`. One with a share k needs a plan before it can run:
            `purifyloader.purified.plans.plan`; `PurifiedDataset` and `precompute` make it by themselves.
        purifier: one that keeps shapes; put a `Resize` before.

    Raises:
        ConfigError: no condition or purifier, one that changes shapes or has a share k of its own, or other channels.

    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> from purifyloader.purifiers import EnergyAbove, Jpeg, Where
    >>> Where(EnergyAbove(EnergyNetwork(EnergyConfig(channels=4)), threshold=0.1), Jpeg(10)).calls
    1
    """

    kind = "where"
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
        channels = {part.image_channels for part in (condition, purifier) if part.image_channels is not None}
        if len(channels) > 1:
            raise ConfigError(
                "The condition and the purifier of a Where must take the same channels. "
                f"Got {condition.image_channels} and {purifier.image_channels}."
            )
        self.image_channels = channels.pop() if channels else None
        self.condition, self.purifier = condition, purifier

    @property
    def calls(self) -> int:
        return 1 + self.purifier.calls  # the condition's own

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "condition": self.condition.config(), "purifier": self.purifier.config()}

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        return cls(condition_from_config(values["condition"], resolve), from_config(values["purifier"], resolve))

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
