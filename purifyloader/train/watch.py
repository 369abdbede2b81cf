"""Tell a sound training from a broken one by running means of what its steps measure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

__all__ = ["SETTLED", "Watch"]

SMOOTH = 0.02  # weight of a new value in its running mean
_LARGEST = 1e300
SETTLED = 100  # steps before a running mean is worth stopping for


class Watch(ABC):
    """Keep running means of the measured `names` over the steps of one training.

    `values` are these, and whatever else a subclass keeps; all of it goes into the state file.
    """

    names: ClassVar[tuple[str, ...]]
    more: ClassVar[tuple[str, ...]] = ()  # what a subclass keeps beside the means of `names`

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def see(self, step: int, measured: Mapping[str, float], norm: float) -> str | None:
        """Take in the values of a step, and the norm of its gradient; return a reason to stop, or None."""
        for name in self.names:
            if not (math.isfinite(measured[name]) and math.isfinite(norm)):
                return f"The {name} became {measured[name]} with a gradient of norm {norm}"
        for name in self.names:
            before = self.values.get(name, measured[name])
            self.values[name] = before + SMOOTH * (measured[name] - before)
        return self.broken(step)

    @abstractmethod
    def broken(self, step: int) -> str | None:
        """Return a reason to stop, from the running means after `step`; None for a sound training."""

    @abstractmethod
    def suspicion(self) -> str | None:
        """Return a reason not to save the present state over an older one; None for a sound training."""

    def header(self) -> dict[str, Any]:
        """Return the values as fields of the header of a state file."""
        return {"watch": dict(self.values)}

    def restore(self, header: Mapping[str, Any]) -> None:
        """Take over what `header` returned."""
        self.values = numbers_of(header["watch"], (*self.names, *self.more))


def numbers_of(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return finite values under some of these names; `ValueError` for others."""
    if values.keys() - {*names} or not all(
        type(value) in (int, float) and abs(value) < _LARGEST for value in values.values()
    ):
        raise ValueError(f"what was watched is {dict(values)!r:.200}")
    return dict(values)
