"""Tell a sound training from a broken one by running means of what its steps measure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = ["SETTLED", "Watch"]

SMOOTH = 0.02  # weight of a new value in its running mean
SETTLED = 100  # steps before a running mean is worth stopping for


class Watch(ABC):
    """Keep running means of the measured `names` over the steps of one training.

    `values` are these, and whatever else a subclass keeps; all of it goes into the state file.
    """

    names: ClassVar[tuple[str, ...]]

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
        self.values = dict(header["watch"])
