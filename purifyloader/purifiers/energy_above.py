"""Choose which images to purify by their energy; a share of them needs a look at the whole dataset first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from purifyloader.core import limits
from purifyloader.core.checks import check_integer, check_number
from purifyloader.energy import EnergyNetwork, image_energies
from purifyloader.errors import ConfigError
from purifyloader.pretrained.kinds import identity_of
from purifyloader.purifiers.base import Condition, Resolver
from purifyloader.purifiers.networks import check_model, copied, known_hashes

__all__ = ["EnergyAbove"]


def check_share(k: Any) -> None:
    """Raise `ConfigError` unless k is a share of a dataset, in (0, 1]."""
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= 1:
        raise ConfigError(f"k is the share of the images to purify, above 0 and at most 1. Got {k!r}.")


class EnergyAbove(Condition):
    """Hold for images whose energy is at least a threshold (PureGen-Filt; Bhat et al. 2024, arXiv:2405.18627).

    Energies are computed in float32, whatever the purifier computes in. `InputError` for no energy model, `ConfigError`
    for other bad arguments.

    Args:
        energy: see `purifyloader.pretrained.load(..., kind="energy")`; copied and frozen.
        threshold: E in the network's own unit, which the paper divides by its temperature: `purifyloader audit
            energy` gives it as threshold_energy, beside U = E / T. Give this,
        k: or the share of a dataset, in (0, 1], that has the highest energies. A plan over the dataset finds the
            threshold: the energy of the round(k n)-th highest of n images (of the highest, if that is 0). Images
            of the very same energy are all above it.
        compute_batch: images of every network call, at most 16,384.

    >>> from purifyloader.energy import EnergyConfig, EnergyNetwork
    >>> from purifyloader.purifiers import EnergyAbove
    >>> EnergyAbove(EnergyNetwork(EnergyConfig(channels=4)), k=0.5).needs_plan
    True
    """

    kind = "energy-above"

    def __init__(
        self, energy: EnergyNetwork, threshold: float | None = None, *, k: float | None = None, compute_batch: int = 32
    ) -> None:
        super().__init__()
        check_model("EnergyAbove", energy, "energy")
        if (threshold is None) == (k is None):
            raise ConfigError(
                f"Give the threshold of the energy, or the share k of the images. Got threshold={threshold!r}, k={k!r}."
            )
        if k is None:
            check_number("threshold", threshold)
        else:
            check_share(k)
        check_integer("compute_batch", compute_batch, 1, limits.COMPUTE_BATCH)
        self._threshold = None if threshold is None else float(threshold)
        self.k = None if k is None else float(k)
        self.compute_batch = compute_batch
        self.image_channels = energy.config.image_channels
        self._entry = identity_of(energy)
        # in one memory format, or the same weights would have other last bits, and another threshold
        self.energy = copied(energy).to(dtype=torch.float32, memory_format=torch.contiguous_format)
        self.energy.requires_grad_(False)
        self._hashes = known_hashes(energy, self.energy, "energy", self._entry)
        self.eval()

    @property
    def threshold(self) -> float | None:
        """The lowest energy for which it holds; None before a plan has found it."""
        return self._threshold if self.planned is None else float(self.planned["threshold"])

    @property
    def needs_plan(self) -> bool:
        return self.k is not None

    def config(self) -> dict[str, Any]:
        level = {"threshold": self._threshold} if self.k is None else {"k": self.k}
        return {
            "kind": self.kind,
            "energy": self._entry,
            **level,
            **({} if self.planned is None else {"planned": self.planned}),
            "compute_batch": self.compute_batch,
        }

    @classmethod
    def build(cls, values: dict[str, Any], resolve: Resolver) -> Self:
        planned = values.pop("planned", None)
        self = cls(resolve(values.pop("energy"), "energy"), **values)
        if planned is not None:
            self.check_plan(planned)
            self.take_plan(planned)
        return self

    def measure(self, x_BCHW: Tensor) -> Tensor:
        with self.unchanged():
            return image_energies(self.energy, x_BCHW.detach(), self.compute_batch)

    def holds(self, x_BCHW: Tensor) -> Tensor:
        if self.threshold is None:
            raise ConfigError(
                f"Which images have the highest energies, the share k = {self.k:g} of a dataset, is known after a look "
                "at all of them. Got images before it. PurifiedDataset and precompute look by themselves; by hand it "
                "is purifier = purifyloader.purified.plans.plan(purifier, dataset)."
            )
        return self.measure(x_BCHW) >= self.threshold

    def make_plan(self, measures_N: Tensor) -> dict[str, Any]:
        assert self.k is not None
        count = max(1, round(self.k * len(measures_N)))
        threshold = measures_N.topk(count).values[-1]
        purified = int((measures_N >= threshold).sum())
        return {"threshold": float(threshold), "purified": purified, "images": len(measures_N)}

    def check_plan(self, planned: Any) -> None:
        if self.k is None:
            raise ConfigError(f"A condition with a threshold needs no plan. Got {planned!r}: leave it out.")
        values = planned if isinstance(planned, Mapping) else {}
        counts = [values.get(name) for name in ("purified", "images")]
        if len(values) != 3 or not all(type(count) is int and 0 < count < 2**63 for count in counts):
            raise ConfigError(
                f"The plan of an energy condition has a threshold, and how many images of how many it holds for. Got "
                f"{planned!r}: leave it out, and plan again."
            )
        check_number("The threshold of a plan", values.get("threshold"))
